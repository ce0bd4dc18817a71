//! Promise (invariant 6): the end of the keeper ends no service either; the next keeper adopts them.

use nave_tests::cluster::SOON;
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nix::sys::signal::Signal;

use crate::deploy_and_serve::{get, pid};
use crate::manifests::web;

#[test]
fn processes_live_on_and_are_adopted() {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&web("web", 3), &["--wait"]).expect(0);
    let rows = cluster.wait_ready("web", 3);
    let before: Vec<u32> = rows.iter().map(pid).collect();

    cluster.agents[0].kill();
    assert!(before.iter().all(|pid| alive(*pid)), "services outlive their keeper");
    let port = rows[0]["ports"]["http"].as_u64().expect("a port");
    assert!(get(port, "/").is_some(), "and answer");

    cluster.agents[0].start();
    cluster.wait_for_agents(1);
    let after: Vec<u32> = cluster.wait_ready("web", 3).iter().map(pid).collect();
    assert_eq!(before, after);

    // An adopted process is still watched: it comes back when it dies.
    send(before[0], Signal::SIGKILL);
    eventually_some("a successor of the adopted process", SOON, || {
        let rows = cluster.ps("web");
        let all_ready = rows.len() == 3 && rows.iter().all(|row| row["ready"] == true);
        (all_ready && rows.iter().all(|row| pid(row) != before[0])).then_some(())
    });
}

#[test]
fn what_died_without_a_keeper_is_started_again() {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&web("web", 2), &["--wait"]).expect(0);
    let before: Vec<u32> = cluster.wait_ready("web", 2).iter().map(pid).collect();

    cluster.agents[0].kill();
    send(before[0], Signal::SIGKILL);
    eventually("it has ended", SOON, || !alive(before[0]));
    cluster.agents[0].start();

    eventually_some("two ready, one of them new", SOON, || {
        let rows = cluster.ps("web");
        let ready = rows.len() == 2 && rows.iter().all(|row| row["ready"] == true);
        let pids: Vec<u32> = rows.iter().map(pid).collect();
        (ready && pids.contains(&before[1]) && !pids.contains(&before[0])).then_some(())
    });
}
