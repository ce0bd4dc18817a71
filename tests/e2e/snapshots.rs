//! Promise: a snapshot holds all that was acknowledged before it; a restore brings it all back, takes revisions and
//! ids back from nobody, and stops no process. What cannot be restored is refused and harms nothing.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nave_tests::cluster::{Role, SOON};
use nave_tests::nave::run;
use nave_tests::{Cluster, Setup, eventually};

use crate::deploy_and_serve::pid;
use crate::manifests::sleeper;
use crate::members::{assert_kept, under_load, versions};

fn path(path: &Path) -> &str {
    path.to_str().expect("test folders have plain names")
}

fn snapshot(cluster: &Cluster, name: &str) -> PathBuf {
    let file = cluster.dir().join(name);
    cluster.nave(&["cluster", "snapshot", path(&file)]).expect(0);
    file
}

fn config(member: &Role) -> PathBuf {
    member.dir.join("member.toml")
}

/// Adds a table to the configuration of every member; nothing runs yet.
fn configure(cluster: &Cluster, table: &str, values: &[(&str, toml::Value)]) {
    for member in &cluster.members {
        let text = std::fs::read_to_string(config(member)).expect("the configuration");
        let mut file: toml::Table = text.parse().expect("toml");
        let values = values.iter().map(|(key, value)| ((*key).to_owned(), value.clone()));
        file.insert(table.into(), toml::Value::Table(values.collect()));
        std::fs::write(config(member), file.to_string()).expect("written");
    }
}

fn start(cluster: &mut Cluster) {
    cluster.members.iter_mut().for_each(Role::start);
    cluster.wait_for_leader();
}

/// Pids of the sleeper's two processes.
fn pids(cluster: &Cluster) -> Vec<u32> {
    cluster.wait_ready("sleeper", 2).iter().map(pid).collect()
}

#[test]
fn a_restored_hub_has_all_that_was_in_the_snapshot_and_stops_no_process() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 1 });
    cluster.apply(&sleeper("sleeper", 2), &["--wait"]).expect(0);
    let before = pids(&cluster);
    let written = under_load(&mut cluster, |cluster| {
        let few = |cluster: &Cluster| cluster.json(&["services"]).as_array().map_or(0, Vec::len) > 50;
        eventually("some services", SOON, || few(cluster));
    });
    let file = snapshot(&cluster, "before.snapshot");
    cluster.apply(&sleeper("later", 0), &[]).expect(0);
    let old = cluster.json(&["cluster", "status"]);
    cluster.stop_members();

    let config = config(&cluster.members[0]);
    let said = run(None, &["cluster", "restore", path(&file), "--config", path(&config)], None).expect(0);
    assert!(
        said.stdout.contains("nave cluster add") && said.stdout.contains("what it held before"),
        "{}",
        said.stdout
    );
    cluster.members.truncate(1);
    start(&mut cluster);
    cluster.wait_for_agents(1);
    let status = cluster.json(&["cluster", "status"]);
    let number = |status: &serde_json::Value, field: &str| status[field].as_u64().expect("a number");
    assert!(number(&status, "incarnation") > number(&old, "incarnation"), "{status}");
    assert!(number(&status, "revision") > number(&old, "revision"), "{status}");
    let versions_now = versions(&cluster);
    assert_kept(&versions_now, written.acknowledged.iter().chain([&"sleeper".to_owned()]));
    assert!(!versions_now.contains_key("later"), "written after the snapshot");
    assert_eq!(pids(&cluster), before, "no process noticed");

    // What is placed from now on has ids that no host has ever seen.
    cluster.apply(&sleeper("fresh", 1), &["--wait"]).expect(0);
    let id = cluster.ps("fresh")[0]["id"].as_str().expect("an id").to_owned();
    assert!(id.len() > "i-100000000".len() - 1, "{id}");
    for count in [2, 3] {
        let place = cluster.reserve_member(&["add"]);
        cluster.members[place].start();
        eventually("it votes", SOON, || cluster.settled(count));
    }
    let names: Vec<_> = cluster.members.iter().map(|member| member.name.clone()).collect();
    assert!(!names.contains(&"member-2".to_owned()), "{names:?}");
    cluster.members[0].kill();
    eventually("the others go on", SOON, || cluster.apply(&sleeper("goes-on", 0), &[]).code == 0);
    assert_eq!(pids(&cluster), before, "no process noticed");
}

#[test]
fn what_cannot_be_restored_is_refused_and_nothing_is_lost() {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 0 });
    cluster.apply(&sleeper("kept", 0), &[]).expect(0);
    let file = snapshot(&cluster, "whole.snapshot");
    cluster.nave(&["cluster", "snapshot", path(&file), "--verify"]).expect(0);
    let whole = std::fs::read(&file).expect("the snapshot");
    let config = config(&cluster.members[0]);
    let refused = |file: &Path, config: &Path, why: &str| {
        let said = run(None, &["cluster", "restore", path(file), "--config", path(config)], None).expect(1);
        assert!(said.stderr.contains(why), "{why:?} is not in {}", said.stderr);
    };
    refused(&file, &config, "in use by another process");

    cluster.members[0].terminate();
    let write = |name: &str, bytes: &[u8]| {
        let file = cluster.dir().join(name);
        std::fs::write(&file, bytes).expect("written");
        file
    };
    refused(&write("short", &whole[..whole.len() / 2]), &config, "cut short");
    refused(&write("empty", &[]), &config, "cut short");
    refused(&write("text", b"name = \"not a snapshot\""), &config, "not a snapshot");
    let mut altered = whole.clone();
    let middle = altered.len() / 2;
    altered[middle] ^= 1;
    refused(&write("altered", &altered), &config, "cannot be restored");
    let mut newer = whole;
    newer[8..12].copy_from_slice(&99_u32.to_be_bytes());
    refused(&write("newer", &newer), &config, "format 99");
    refused(&cluster.dir().join("absent"), &config, "No such file");

    let other = cluster.dir().join("other");
    run(None, &["init", "--members", "127.0.0.1:1", "--out", path(&other)], None).expect(0);
    let strange = other.join("member-1/member.toml");
    refused(&file, &strange, "--other-cluster");

    cluster.members[0].start();
    cluster.wait_for_leader();
    assert_eq!(cluster.json(&["services"])[0]["name"], "kept", "nothing was harmed");
}

#[test]
fn a_cluster_that_runs_is_not_restored_into_and_another_one_gets_the_services() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 0 });
    cluster.apply(&sleeper("kept", 1), &[]).expect(0);
    let file = snapshot(&cluster, "whole.snapshot");
    cluster.members[0].terminate();
    let first = config(&cluster.members[0]);
    let said = run(None, &["cluster", "restore", path(&file), "--config", path(&first)], None).expect(1);
    assert!(said.stderr.contains("still runs"), "{}", said.stderr);
    let kept = tempfile::tempdir().expect("a folder");
    let kept_file = kept.path().join("whole.snapshot");
    std::fs::copy(&file, &kept_file).expect("copied");
    // Its turn is over: at most two clusters run at a time, and no test holds one while it waits for another.
    drop(cluster);
    let file = kept_file;

    let mut other = Cluster::prepare(&Setup { members: 1, agents: 1 }).expect("prepared");
    let config = config(&other.members[0]);
    let words = ["cluster", "restore", path(&file), "--config", path(&config), "--other-cluster"];
    run(None, &words, None).expect(0);
    start(&mut other);
    assert_eq!(other.json(&["services"])[0]["name"], "kept");
    // Its tokens did not come along: a new one lets the first host in, and the service is placed there.
    let token = other.nave(&["token", "create"]).expect(0).stdout;
    std::fs::write(other.context().with_file_name("join-token"), token).expect("written");
    other.agents[0].start();
    other.wait_for_agents(1);
    other.wait_ready("kept", 1);
}

#[test]
fn a_member_far_behind_catches_up_by_snapshot_while_writes_go_on() {
    let mut cluster = Cluster::prepare(&Setup { members: 3, agents: 0 }).expect("prepared");
    configure(&cluster, "log", &[("entries_between_snapshots", 100.into()), ("entries_kept", 10.into())]);
    start(&mut cluster);
    let leader = cluster.wait_for_leader();
    let away = (0..3).find(|k| *k != leader).expect("a follower");
    let name = cluster.members[away].name.clone();
    let member = |cluster: &Cluster, name: &str| {
        let status = cluster.try_json(&["cluster", "status"])?;
        status["members"].as_array()?.iter().find(|member| member["name"] == name).cloned()
    };
    let snapshot_of = |cluster: &Cluster, name: &str| member(cluster, name)?["snapshot_index"].as_u64();
    let written = under_load(&mut cluster, |cluster| {
        let led = cluster.members[leader].name.clone();
        // Raft keeps entries that it was about to send when the member died, and then needs no snapshot: seldom twice.
        for _ in 0..5 {
            cluster.members[away].kill();
            let before = snapshot_of(cluster, &led).unwrap_or(0);
            // Raft's snapshots are put off for 30 s unless ten times as many entries wait.
            eventually("the log has gone on without it", Duration::from_secs(120), || {
                snapshot_of(cluster, &led).is_some_and(|index| index > before + 1200)
            });
            cluster.members[away].start();
            eventually("it has caught up", SOON, || {
                member(cluster, &name).is_some_and(|member| {
                    member["reachable"] == true && member["lag_entries"].as_u64().is_some_and(|lag| lag < 100)
                })
            });
            if cluster.members[away].log().contains("snapshot installed") {
                break;
            }
        }
    });
    assert!(cluster.members[away].log().contains("snapshot installed"), "{}", cluster.members[away].log());
    assert_eq!(written.refused, Vec::<String>::new());
    assert_kept(&versions(&cluster), &written.acknowledged);
}

#[test]
fn members_restarted_in_turn_under_load_fail_no_write() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 1 });
    cluster.apply(&sleeper("sleeper", 2), &["--wait"]).expect(0);
    let before = pids(&cluster);
    let written = under_load(&mut cluster, |cluster| {
        for member in 0..3 {
            assert_eq!(cluster.members[member].terminate(), Some(0));
            cluster.members[member].start();
            eventually("it is back", SOON, || cluster.settled(3));
        }
    });
    assert_eq!(written.refused, Vec::<String>::new());
    assert_kept(&versions(&cluster), &written.acknowledged);
    assert_eq!(pids(&cluster), before, "no process noticed");
}

#[test]
fn scheduled_snapshots_are_kept_and_pruned() {
    let mut cluster = Cluster::prepare(&Setup { members: 1, agents: 0 }).expect("prepared");
    configure(&cluster, "snapshots", &[("every", "1s".into()), ("keep", 2.into())]);
    start(&mut cluster);
    let folder = cluster.members[0].dir.join("data/backups");
    let files = || {
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        let mut files: Vec<_> = entries.map(|entry| entry.path()).collect();
        files.sort();
        files
    };
    eventually("the first", SOON, || !files().is_empty());
    let first = files()[0].clone();
    eventually("the first is pruned", SOON, || !first.exists());
    assert!(files().len() <= 3, "{:?}", files());
    let status = cluster.json(&["cluster", "status"]);
    assert_ne!(status["members"][0]["backup_time"], "", "{status}");
    // Quiet, so that it is not pruned while it is read.
    cluster.members[0].terminate();
    let newest = files().pop().expect("one at least");
    cluster.nave(&["cluster", "snapshot", path(&newest), "--verify"]).expect(0);
}
