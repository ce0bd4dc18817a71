//! Promise: members are added, removed and replaced under load, one change at a time; nothing acknowledged is lost,
//! no write fails beyond a retry, no process notices, and what would cost the majority is refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nave_proto::pb;
use nave_tests::api::Api;
use nave_tests::cluster::SOON;
use nave_tests::wait::eventually_some;
use nave_tests::{Cluster, Setup, eventually};

use crate::deploy_and_serve::pid;
use crate::manifests::sleeper;

const WRITERS: usize = 4;

/// What one writer saw.
#[derive(Debug, Default)]
pub(crate) struct Written {
    pub(crate) acknowledged: Vec<String>,
    /// Tries beyond the first, of the write that needed most.
    pub(crate) retries_max: u32,
    /// Answers that are neither an acknowledgement nor "try elsewhere".
    pub(crate) refused: Vec<String>,
}

/// Writes distinct services until told to stop. A write goes on under its request id, on the next member, until it is
/// acknowledged.
async fn write_until(api: Api, writer: usize, stop: Arc<AtomicBool>) -> Written {
    use tonic::Code;
    let mut written = Written::default();
    let (mut serial, mut member) = (0, writer);
    while !stop.load(Ordering::Relaxed) {
        serial += 1;
        let name = format!("w-{writer}-{serial}");
        let id = pb::RequestId { client_id: format!("w-{writer}"), serial };
        let mut rounds = 0;
        while let Err(status) = api.write(member, &name, Some(id.clone())).await {
            let elsewhere = matches!(
                status.code(),
                Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal
            );
            if !elsewhere {
                written.refused.push(format!("{name}: {status}"));
                break;
            }
            // An address where no member is does not count: most of the list has none.
            rounds += u32::from(nave_tls::connect_error(&status).is_none());
            member += 1;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        written.retries_max = written.retries_max.max(rounds);
        written.acknowledged.push(name);
    }
    written
}

/// A client file that names every address a member of this cluster may have.
fn all_addresses(cluster: &Cluster) -> PathBuf {
    let text = std::fs::read_to_string(cluster.context()).expect("the client file");
    let mut file: toml::Table = text.parse().expect("toml");
    let addresses = (0..6).map(|k| format!("127.0.0.1:{}", cluster.base_port + k));
    file.insert("addresses".into(), addresses.collect::<Vec<_>>().into());
    let path = cluster.context().with_file_name("all.toml");
    std::fs::write(&path, file.to_string()).expect("written");
    path
}

/// Runs `fault` under load, and says what was written meanwhile.
pub(crate) fn under_load(cluster: &mut Cluster, fault: impl FnOnce(&mut Cluster)) -> Written {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let stop = Arc::new(AtomicBool::new(false));
    let context = all_addresses(cluster);
    let writers: Vec<_> = {
        let _inside = runtime.enter();
        let api = Api::open(&context).expect("a client");
        (0..WRITERS).map(|n| runtime.spawn(write_until(api.clone(), n, stop.clone()))).collect()
    };
    fault(cluster);
    stop.store(true, Ordering::Relaxed);
    runtime.block_on(async {
        let mut all = Written::default();
        for writer in writers {
            let one = writer.await.expect("a writer ends");
            all.retries_max = all.retries_max.max(one.retries_max);
            all.acknowledged.extend(one.acknowledged);
            all.refused.extend(one.refused);
        }
        all
    })
}

/// Version of each service, read linearizably: `nave services` may ask a member that is a moment behind.
pub(crate) fn versions(cluster: &Cluster) -> BTreeMap<String, u64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let context = all_addresses(cluster);
    let api = {
        let _inside = runtime.enter();
        Api::open(&context).expect("a client")
    };
    eventually_some("a member that knows all", SOON, || {
        (0..api.members()).find_map(|member| runtime.block_on(api.service_versions(member)).ok())
    })
}

/// Of these services, none is lost and none was written twice.
pub(crate) fn assert_kept<'a>(versions: &BTreeMap<String, u64>, names: impl IntoIterator<Item = &'a String>) {
    let found = names.into_iter().map(|name| (name, versions.get(name)));
    let wrong: Vec<_> = found.filter(|(_, version)| *version != Some(&1)).collect();
    assert!(wrong.is_empty(), "acknowledged, and not there once, {} of them: {wrong:?}", wrong.len());
}

fn add(cluster: &mut Cluster, words: &[&str], count: usize) {
    let place = cluster.reserve_member(words);
    cluster.members[place].start();
    eventually("it votes", SOON, || cluster.settled(count));
}

/// Removes the member at this place, which ends by itself.
fn remove(cluster: &mut Cluster, place: usize) {
    let name = cluster.members[place].name.clone();
    cluster.nave(&["cluster", "remove", &name]).expect(0);
    ended(cluster, place);
}

fn ended(cluster: &mut Cluster, place: usize) {
    let mut gone = cluster.members.remove(place);
    eventually("a removed member ends by itself", SOON, || !gone.is_running());
    let log = gone.log();
    assert!(log.contains("was removed from the cluster"), "{log}");
}

#[test]
#[expect(clippy::print_stderr, reason = "figures for the report")]
fn ten_changes_under_load_lose_nothing_and_fail_no_write() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 1 });
    cluster.apply(&sleeper("sleeper", 2), &["--wait"]).expect(0);
    let before: Vec<u32> = cluster.wait_ready("sleeper", 2).iter().map(pid).collect();

    let written = under_load(&mut cluster, |cluster| {
        // Ten: the founders are all gone at the end, the leader is replaced and removed as well.
        for _ in 0..2 {
            add(cluster, &["add"], 4);
            let leader = cluster.wait_for_leader();
            remove(cluster, leader);
            eventually("three members", SOON, || cluster.settled(3));
            for _ in 0..3 {
                let old = cluster.members[0].name.clone();
                add(cluster, &["replace", &old], 3);
                ended(cluster, 0);
            }
        }
    });
    eprintln!("{} writes, at most {} retries", written.acknowledged.len(), written.retries_max);
    assert_eq!(written.refused, Vec::<String>::new());
    assert!(written.acknowledged.len() > 100, "the writers wrote: {}", written.acknowledged.len());
    assert_kept(&versions(&cluster), &written.acknowledged);
    let after: Vec<u32> = cluster.wait_ready("sleeper", 2).iter().map(pid).collect();
    assert_eq!(before, after, "no process noticed");
    cluster.wait_for_agents(1);
    let status = cluster.json(&["cluster", "status"]);
    let ids: Vec<&str> = status["members"]
        .as_array()
        .expect("rows")
        .iter()
        .filter_map(|member| member["id"].as_str())
        .collect();
    assert!(["m-1", "m-2", "m-3"].iter().all(|founder| !ids.contains(founder)), "{ids:?}");
}

#[test]
fn a_member_that_waits_begins_no_cluster_and_a_removed_one_does_not_come_back() {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 0 });
    let place = cluster.reserve_member(&["add"]);
    let waits = |cluster: &Cluster| {
        let status = cluster.json(&["cluster", "status"]);
        status["members"][1]["note"].as_str().map(str::to_owned).unwrap_or_default()
    };
    eventually("it is said what is waited for", SOON, || waits(&cluster).contains("answers"));
    assert_eq!(cluster.json(&["cluster", "status"])["members"][1]["role"], "joining");
    // The same words again are the same member.
    let address = format!("127.0.0.1:{}", cluster.members[place].port);
    let again = cluster.nave(&["cluster", "add", &address]).expect(0);
    assert!(again.stdout.contains("m-2") && again.stdout.contains("known already"), "{}", again.stdout);
    cluster.members[place].start();
    cluster.nave(&["cluster", "add", &address, "--wait"]).expect(0);
    assert!(cluster.settled(2));
    let client = std::fs::read_to_string(cluster.context()).expect("the client file");
    assert!(client.contains(&address), "the client file follows: {client}");

    // Away while it is removed: it hears of it when it is back, and says so from then on.
    cluster.members[place].terminate();
    cluster.nave(&["cluster", "remove", "member-2"]).expect(3);
    cluster.members[place].start();
    eventually("both answer", SOON, || cluster.settled(2));
    cluster.nave(&["cluster", "remove", "member-2"]).expect(0);
    cluster.nave(&["cluster", "remove", "m-2"]).expect(0);
    let member = &mut cluster.members[place];
    eventually("the removed member ends", SOON, || !member.is_running());
    member.start();
    assert_eq!(member.process().wait(), Some(1), "{}", member.log());
    assert!(member.log().contains("its id is not used again"), "{}", member.log());
    cluster.members.pop();
    let next = cluster.reserve_member(&["add"]);
    assert_eq!(cluster.members[next].name, "member-3", "the id of a removed member is not used again");
}

#[test]
fn what_would_cost_the_majority_is_refused() {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 0 });
    let last = refused(&cluster, &["cluster", "remove", "member-1"]);
    assert!(last.stderr.contains("last member that votes"), "{}", last.stderr);
    let unknown = refused(&cluster, &["cluster", "remove", "m-9"]);
    assert!(unknown.stderr.contains("no member"), "{}", unknown.stderr);
    let there = format!("127.0.0.1:{}", cluster.members[0].port);
    let exists = refused(&cluster, &["cluster", "add", &there, "--name", "other"]);
    assert!(exists.stderr.contains("is a member"), "{}", exists.stderr);
    asked(&cluster, &["cluster", "add", "nowhere:0"], 2);
    asked(&cluster, &["cluster", "add", "127.0.0.1:1", "--ca", path(cluster.dir())], 2);
    assert_eq!(cluster.json(&["cluster", "status"])["members"].as_array().map(Vec::len), Some(1));

    for count in [2, 3] {
        add(&mut cluster, &["add"], count);
    }
    let follower = (0..3).find(|k| Some(*k) != cluster.leader()).expect("a follower");
    cluster.members[follower].kill();
    let live = (0..3).find(|k| *k != follower && Some(*k) != cluster.leader()).expect("another follower");
    let name = cluster.members[live].name.clone();
    let no = refused(&cluster, &["cluster", "remove", &name]);
    assert!(no.stderr.contains("no majority would answer"), "{}", no.stderr);
    // The dead one may be replaced: that is what the verb is for.
    let dead = cluster.members[follower].name.clone();
    let place = cluster.reserve_member(&["replace", &dead]);
    cluster.members[place].start();
    eventually("three again", SOON, || cluster.settled(3));
    let mut old = cluster.members.remove(follower);
    old.start();
    eventually("the dead one hears that it was removed", SOON, || !old.is_running());
}

#[test]
fn a_member_that_lost_its_data_does_not_vote_under_its_old_id() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 0 });
    cluster.apply(&sleeper("kept", 0), &[]).expect(0);
    eventually("three members", SOON, || cluster.settled(3));
    let wiped = (0..3).find(|k| Some(*k) != cluster.leader()).expect("a follower");
    cluster.members[wiped].terminate();
    std::fs::remove_dir_all(cluster.members[wiped].dir.join("data")).expect("lost");
    let member = &mut cluster.members[wiped];
    member.start();
    assert_eq!(member.process().wait(), Some(1), "{}", member.log());
    assert!(member.log().contains("nave cluster replace"), "{}", member.log());
    let name = member.name.clone();
    let place = cluster.reserve_member(&["replace", &name]);
    cluster.members[place].start();
    eventually("three again", SOON, || cluster.settled(3));
    cluster.members.remove(wiped);
    assert_eq!(versions(&cluster).get("kept"), Some(&1));
}

/// Asked again while nobody answers, which on a busy machine happens; then it ends with `code`.
fn asked(cluster: &Cluster, words: &[&str], code: i32) -> nave_tests::nave::Output {
    eventually_some("an answer", SOON, || Some(cluster.nave(words)).filter(|said| said.code != 3))
        .expect(code)
}

fn refused(cluster: &Cluster, words: &[&str]) -> nave_tests::nave::Output {
    asked(cluster, words, 1)
}

fn path(path: &Path) -> &str {
    path.to_str().expect("test folders have plain names")
}
