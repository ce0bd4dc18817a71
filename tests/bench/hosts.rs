//! A host that dies (keeper, agent and services at once), to all of its services ready elsewhere: alone, and with the leader.

use std::time::Duration;

use nave_tests::cluster::processes_of;
use nave_tests::process::send;
use nave_tests::{Cluster, Setup, eventually};
use nix::sys::signal::Signal;
use tokio::time::Instant;

const ROUNDS: usize = 6;
const SERVICES: usize = 6;
const BOUND: Duration = Duration::from_secs(120);

pub(crate) fn run() -> anyhow::Result<()> {
    println!(
        "| what dies | rounds | lost said, median ms | ready elsewhere: min ms | median ms | max ms |\n|---|---|---|---|---|---|"
    );
    for with_leader in [false, true] {
        let mut rounds = Vec::new();
        for round in 0..ROUNDS {
            rounds.push(one(round % 3, with_leader));
        }
        let median = |mut all: Vec<u128>| {
            all.sort_unstable();
            (all[0], all[all.len() / 2], all[all.len() - 1])
        };
        let (_, said, _) = median(rounds.iter().map(|(said, _)| said.as_millis()).collect());
        let (min, middle, max) = median(rounds.iter().map(|(_, ready)| ready.as_millis()).collect());
        let what = if with_leader { "a host and the leader" } else { "a host" };
        println!("| {what} | {ROUNDS} | {said} | {min} | {middle} | {max} |");
    }
    Ok(())
}

/// Until the host is said to be lost, and until all is ready elsewhere. In a cluster of its own, since a second loss
/// within a minute would meet the brake.
fn one(agent: usize, with_leader: bool) -> (Duration, Duration) {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 3 });
    let manifest = format!(
        "name = \"web\"\ncommand = [\"{}\"]\ncount = {SERVICES}\n\n[ports.http]\nprotocol = \"http\"\n\n\
         [health]\nhttp = \"/ready\"\ninterval = \"200ms\"\n",
        nave_tests::nave::hello().display()
    );
    cluster.apply(&manifest, &["--wait"]).expect(0);
    let name = cluster.agents[agent].name.clone();
    let leader = cluster.wait_for_leader();
    let (data, own) = (cluster.agents[agent].dir.join("data"), cluster.agents[agent].agent_pid());
    let services = processes_of(&data);
    let began = Instant::now();
    cluster.agents[agent].kill();
    send(own, Signal::SIGKILL);
    for pid in services {
        send(pid, Signal::SIGKILL);
    }
    if with_leader {
        cluster.members[leader].kill();
    }
    let mut said = None;
    eventually("all are ready elsewhere", BOUND, || {
        if said.is_none() && is_lost(&cluster, &name) {
            said = Some(began.elapsed());
        }
        let rows = cluster.ps("web");
        let ready = rows.len() == SERVICES && rows.iter().all(|row| row["ready"] == true);
        ready && rows.iter().all(|row| row["host"] != name.as_str())
    });
    let ready = began.elapsed();
    (said.unwrap_or(ready), ready)
}

fn is_lost(cluster: &Cluster, name: &str) -> bool {
    let hosts = cluster.try_json(&["hosts"]).and_then(|hosts| hosts.as_array().cloned()).unwrap_or_default();
    hosts.iter().any(|host| host["name"] == name && host["status"] == "lost")
}
