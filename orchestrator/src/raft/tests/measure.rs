//! Not a test: what three members in one process do, for whoever changes the door, the log or the network. Run with
//! `cargo test --release -p nave-orchestrator --lib measure -- --ignored --nocapture`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nave_proto::pb;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::cluster::{Cluster, soon};
use crate::raft::{RaftHub, SnapshotSettings};

/// Changes no row, so the measurement is of the log and what is around it.
fn command() -> pb::Command {
    let id = "x".repeat(200);
    let body = pb::command::Body::RevokeToken(pb::RevokeToken { id });
    pb::Command { actor: "operator/measure".into(), body: Some(body), ..Default::default() }
}

#[derive(Clone, Copy)]
enum Work {
    Write,
    Read,
}

async fn run(hubs: &[RaftHub], clients: usize, work: Work, lasting: Duration) -> (f64, Duration, Duration) {
    let done = Arc::new(AtomicU64::new(0));
    let end = Instant::now() + lasting;
    let mut tasks = JoinSet::new();
    for client in 0..clients {
        let (hub, done) = (hubs[client % hubs.len()].clone(), done.clone());
        tasks.spawn(async move {
            let mut latencies = Vec::new();
            while Instant::now() < end {
                let begun = Instant::now();
                match work {
                    Work::Write => drop(hub.propose(command(), soon()).await.unwrap()),
                    Work::Read => drop(hub.linearize(soon()).await.unwrap()),
                }
                latencies.push(begun.elapsed());
                done.fetch_add(1, Ordering::Relaxed);
            }
            latencies
        });
    }
    let mut latencies: Vec<Duration> = tasks.join_all().await.into_iter().flatten().collect();
    latencies.sort();
    let rate = latencies.len() as f64 / lasting.as_secs_f64();
    (rate, latencies[latencies.len() / 2], latencies[latencies.len() * 99 / 100])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
#[expect(clippy::print_stdout, reason = "its output is what it is for")]
async fn measure() {
    let cluster = Cluster::start(3, SnapshotSettings::default()).await;
    let leader = cluster.leader().await;
    let leading = vec![cluster.hub(leader).clone()];
    let following = vec![cluster.hub(cluster.other_than(leader)).clone()];
    let all: Vec<RaftHub> = cluster.members.values().map(|member| member.hub.clone()).collect();
    for (at, hubs) in [("leader", &leading), ("follower", &following), ("all", &all)] {
        for (name, work) in [("writes", Work::Write), ("reads", Work::Read)] {
            for clients in [1, 64, 512] {
                let before = leading[0].counters();
                let (rate, p50, p99) = run(hubs, clients, work, Duration::from_secs(3)).await;
                let after = leading[0].counters();
                let entries = after.entries_appended_total - before.entries_appended_total;
                let fsyncs = (after.fsyncs_total - before.fsyncs_total).max(1);
                let fsync_us = (after.fsync_ns_total - before.fsync_ns_total) / fsyncs / 1000;
                println!(
                    "{at:9} {clients:4} {name:7} {rate:9.0}/s p50 {p50:?} p99 {p99:?}, \
                     leader: {fsyncs} fsyncs of {fsync_us} us, {:.1} entries each",
                    entries as f64 / fsyncs as f64
                );
            }
        }
    }
}
