//! Promise (invariants 1 and 2): whatever part of the network between members fails, nothing acknowledged is lost, nobody
//! who is cut off acknowledges anything, and afterwards all members have one log and give one answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nave_proto::pb;
use nave_tests::api::Api;
use nave_tests::cluster::SOON;
use nave_tests::wait::pause;
use nave_tests::writes::{runtime_of, under_writes};
use nave_tests::{Cluster, Setup, eventually, logs};
use nix::sys::signal::Signal;

fn three_members() -> Option<Cluster> {
    Cluster::start_on_network(&Setup { members: 3, agents: 0 })
}

fn others_lead(cluster: &Cluster, old: usize) -> impl Fn() -> bool + '_ {
    move || leader_seen_by_others(cluster, old).is_some_and(|leader| leader != old)
}

/// Asked of a member that is not `of`.
fn leader_seen_by_others(cluster: &Cluster, of: usize) -> Option<usize> {
    let asked = (of + 1) % cluster.members.len();
    let status = cluster.try_ask_member(asked, &["cluster", "status"])?;
    let name = status["leader"].as_str()?;
    cluster.members.iter().position(|member| member.name == name)
}

#[test]
fn a_follower_cut_off_misses_nothing_in_the_end() {
    let Some(mut cluster) = three_members() else { return };
    let written = under_writes(&mut cluster, "follower", |cluster| {
        let follower = (cluster.wait_for_leader() + 1) % 3;
        cluster.network().isolate(follower, 0..3);
        pause(Duration::from_secs(4));
        assert!(cluster.apply("name = \"meanwhile\"\ncommand = [\"true\"]\ncount = 0\n", &[]).code == 0);
        cluster.network().heal();
        logs::wait_for_all(cluster);
    });
    assert!(written.len() > 20, "the others went on: {}", written.len());
    logs::wait_for_agreement(&cluster);
    logs::assert_same_answers(&cluster);
    logs::assert_equal(&mut cluster, &written);
}

#[test]
fn a_leader_cut_off_acknowledges_nothing() {
    let Some(mut cluster) = three_members() else { return };
    let runtime = runtime_of(&cluster);
    let api = {
        let _inside = runtime.enter();
        Api::open(&cluster.context()).expect("a client")
    };
    let lies = Arc::new(AtomicUsize::new(0));
    let written = under_writes(&mut cluster, "leader", |cluster| {
        for round in 0..2 {
            let old = cluster.wait_for_leader();
            cluster.network().isolate(old, 0..3);
            // Its clients still reach it. All that it says yes to from now on would be a lie.
            let asked = runtime.block_on(async {
                let writes = (0..8).map(|n| {
                    let name = format!("lie-{round}-{n}");
                    let id = pb::RequestId { client_id: name.clone(), serial: 1 };
                    let api = api.clone();
                    async move {
                        let write = api.write(old, &name, Some(id));
                        tokio::time::timeout(Duration::from_secs(8), write).await
                    }
                });
                futures::future::join_all(writes).await
            });
            lies.fetch_add(asked.iter().filter(|one| matches!(one, Ok(Ok(_)))).count(), Ordering::Relaxed);
            eventually("the others have a leader", SOON, others_lead(cluster, old));
            cluster.network().heal();
            logs::wait_for_all(cluster);
        }
    });
    assert_eq!(lies.load(Ordering::Relaxed), 0, "acknowledged by a leader without a quorum");
    logs::wait_for_agreement(&cluster);
    logs::assert_same_answers(&cluster);
    logs::assert_equal(&mut cluster, &written);
}

#[test]
fn loss_in_one_direction_is_survived_too() {
    let Some(mut cluster) = three_members() else { return };
    let written = under_writes(&mut cluster, "one-way", |cluster| {
        for hears in [true, false] {
            let leader = cluster.wait_for_leader();
            for other in (0..3).filter(|other| *other != leader) {
                // It hears the others and is not heard, or the other way round.
                let (from, to) = if hears { (leader, other) } else { (other, leader) };
                cluster.network().cut(from, to);
            }
            eventually("the others have a leader", SOON, others_lead(cluster, leader));
            let name = if hears { "heard" } else { "unheard" };
            let service = format!("name = \"{name}\"\ncommand = [\"true\"]\ncount = 0\n");
            eventually("a write is taken", SOON, || cluster.apply(&service, &[]).code == 0);
            cluster.network().heal();
            logs::wait_for_all(cluster);
        }
    });
    logs::wait_for_agreement(&cluster);
    logs::assert_same_answers(&cluster);
    logs::assert_equal(&mut cluster, &written);
}

#[test]
fn a_frozen_leader_wakes_up_as_a_follower() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 0 });
    let written = under_writes(&mut cluster, "frozen", |cluster| {
        let old = cluster.wait_for_leader();
        cluster.members[old].process().signal(Signal::SIGSTOP);
        eventually("the others have a leader", SOON, others_lead(cluster, old));
        pause(Duration::from_secs(1));
        cluster.members[old].process().signal(Signal::SIGCONT);
        logs::wait_for_all(cluster);
    });
    assert!(written.len() > 20, "writes went on: {}", written.len());
    logs::wait_for_agreement(&cluster);
    logs::assert_same_answers(&cluster);
    logs::assert_equal(&mut cluster, &written);
}
