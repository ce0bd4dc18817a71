//! The members' logs and answers, compared: what a cluster must agree on after any fault.

use std::collections::BTreeSet;
use std::time::Duration;

use nave_orchestrator::{LoggedEntry, dump_log};
use nave_proto::pb;
use pb::command::Body;

use crate::cluster::Cluster;
use crate::wait::eventually;

/// Waits until all members answer and have applied the same.
#[track_caller]
pub fn wait_for_agreement(cluster: &Cluster) {
    eventually("all members have applied the same", Duration::from_secs(60), || {
        let Some(status) = cluster.try_json(&["cluster", "status"]) else { return false };
        let members = status["members"].as_array().cloned().unwrap_or_default();
        let applied: BTreeSet<u64> = members.iter().filter_map(|m| m["applied_index"].as_u64()).collect();
        members.iter().all(|m| m["reachable"] == true) && applied.len() == 1
    });
}

/// Waits until all members answer each other again; writes may go on.
#[track_caller]
pub fn wait_for_all(cluster: &Cluster) {
    eventually("all members are reachable", Duration::from_secs(60), || {
        let Some(status) = cluster.try_json(&["cluster", "status"]) else { return false };
        let members = status["members"].as_array().cloned().unwrap_or_default();
        let leads = status["leader"].as_str().is_some_and(|leader| !leader.is_empty());
        leads && members.iter().all(|member| member["reachable"] == true)
    });
}

/// Stops the members and compares their logs entry by entry; every acknowledged service has to be in them.
///
/// # Panics
/// When they differ, or lack one.
#[track_caller]
pub fn assert_equal(cluster: &mut Cluster, acknowledged: &[String]) {
    wait_for_agreement(cluster);
    let known = service_names(cluster);
    let logs: Vec<Vec<LoggedEntry>> =
        cluster.stop_members().iter().map(|data| dump_log(data, 0).expect("the log can be read")).collect();
    let first = logs.iter().map(|log| log.first().map_or(u64::MAX, |e| e.index)).max().expect("some logs");
    let last = logs.iter().map(|log| log.last().map_or(0, |e| e.index)).min().expect("some logs");
    let common = |log: &Vec<LoggedEntry>| -> Vec<LoggedEntry> {
        log.iter().filter(|entry| (first..=last).contains(&entry.index)).cloned().collect()
    };
    let reference = common(&logs[0]);
    assert!(!reference.is_empty(), "the logs have no entry in common");
    for (k, log) in logs.iter().enumerate().skip(1) {
        for (ours, theirs) in reference.iter().zip(common(log)) {
            assert_eq!(*ours, theirs, "entry {} of member-1 and member-{}", ours.index, k + 1);
        }
        assert_eq!(common(log).len(), reference.len());
    }
    // After many writes the oldest entries have given way to a snapshot; then the tables alone have them all.
    let applied: BTreeSet<String> = reference.iter().filter_map(|e| service_applied(&e.command)).collect();
    for name in acknowledged {
        assert!(known.contains(name), "{name} was acknowledged and is no service");
        assert!(first > 1 || applied.contains(name), "{name} was acknowledged and is in no log");
    }
}

fn service_names(cluster: &Cluster) -> BTreeSet<String> {
    let services = cluster.json(&["services"]);
    let rows = services.as_array().expect("an array").iter();
    rows.map(|row| row["name"].as_str().expect("a name").to_owned()).collect()
}

/// The name of the service that an entry applies.
fn service_applied(command: &[u8]) -> Option<String> {
    let command = <pb::Command as prost::Message>::decode(command).ok()?;
    match command.body? {
        Body::ApplyService(apply) => Some(apply.manifest?.name),
        _ => None,
    }
}

/// Every member's own answer to these listings is the same.
///
/// # Panics
/// When two differ.
#[track_caller]
pub fn assert_same_answers(cluster: &Cluster) {
    for listing in [&["services"][..], &["ps"], &["events"]] {
        let answers: Vec<_> = (0..cluster.members.len()).map(|k| cluster.ask_member(k, listing)).collect();
        for (k, answer) in answers.iter().enumerate().skip(1) {
            assert_eq!(answers[0], *answer, "{listing:?} of member-1 and member-{}", k + 1);
        }
    }
}
