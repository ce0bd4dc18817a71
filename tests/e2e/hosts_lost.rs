//! Promise: a host that dies is replaced: what it ran is ready elsewhere within seconds, also when the leader dies with
//! it. A host that returns stops what is others' by then.

use std::time::Duration;

use nave_tests::cluster::{SOON, processes_of};
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nix::sys::signal::Signal;
use tokio::time::Instant;

use crate::deploy_and_serve::pid;
use crate::manifests::web;

/// Ten seconds are promised; a slow machine with other tests on it gets more.
const BOUND: Duration = Duration::from_secs(40);

/// Keeper, agent and services at once, as when the power fails.
pub(crate) fn power_off(cluster: &mut Cluster, agent: usize) {
    let role = &mut cluster.agents[agent];
    let (data, own) = (role.dir.join("data"), role.agent_pid());
    role.kill();
    send(own, Signal::SIGKILL);
    for pid in processes_of(&data) {
        send(pid, Signal::SIGKILL);
    }
}

/// Waits until `count` are ready on other hosts than this one, and says how long that took.
fn replaced(cluster: &Cluster, service: &str, count: usize, dead: &str, since: Instant) -> Duration {
    eventually_some("all are ready elsewhere", BOUND, || {
        let rows = cluster.ps(service);
        let ready = rows.len() == count && rows.iter().all(|row| row["ready"] == true);
        (ready && rows.iter().all(|row| row["host"] != dead)).then_some(())
    });
    since.elapsed()
}

#[test]
fn what_a_dead_host_ran_is_ready_elsewhere() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 3 });
    cluster.apply(&web("web", 3), &["--wait"]).expect(0);
    power_off(&mut cluster, 0);
    let took = replaced(&cluster, "web", 3, "agent-1", Instant::now());
    assert!(took < BOUND, "{took:?}");
    let events = cluster.nave(&["events", "--host", "agent-1"]).expect(0).stdout;
    assert!(events.contains("is lost"), "{events}");
}

#[test]
fn also_when_the_leader_dies_with_it() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 3 });
    cluster.apply(&web("web", 3), &["--wait"]).expect(0);
    let leader = cluster.wait_for_leader();
    power_off(&mut cluster, 0);
    cluster.members[leader].kill();
    let took = replaced(&cluster, "web", 3, "agent-1", Instant::now());
    assert!(took < BOUND, "{took:?}");
}

#[test]
fn a_host_that_returns_stops_what_runs_elsewhere_by_then() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 2 });
    cluster.apply(&web("web", 2), &["--wait"]).expect(0);
    let rows = cluster.wait_ready("web", 2);
    let stays = rows.iter().find(|row| row["host"] == "agent-2").map(pid).expect("one on each host");
    let agent = cluster.agents[0].agent_pid();
    let data = cluster.agents[0].dir.join("data");

    send(agent, Signal::SIGSTOP);
    eventually("both are ready on the other host", BOUND, || {
        let rows = cluster.ps("web");
        rows.len() == 2 && rows.iter().all(|row| row["ready"] == true && row["host"] == "agent-2")
    });
    assert_eq!(processes_of(&data).len(), 1, "a frozen agent's process runs on");
    send(agent, Signal::SIGCONT);

    eventually("the one too many has ended", SOON, || processes_of(&data).is_empty());
    cluster.wait_for_agents(2);
    assert!(alive(stays), "nobody else was touched");
    assert_eq!(cluster.wait_ready("web", 2).len(), 2);
}
