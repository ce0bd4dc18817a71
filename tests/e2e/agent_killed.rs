//! Promise (invariant 6): the end of an agent ends no service; its successor adopts them all and knows how those
//! that ended meanwhile had ended.

use nave_tests::cluster::SOON;
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nix::sys::signal::Signal;

use crate::deploy_and_serve::{get, pid};
use crate::manifests::{sleeper, web};

#[test]
fn processes_keep_their_pids() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&sleeper("sleeper", 5), &["--wait"]).expect(0);
    let before: Vec<u32> = cluster.wait_ready("sleeper", 5).iter().map(pid).collect();
    let agent = cluster.agents[0].agent_pid();

    send(agent, Signal::SIGKILL);

    eventually("another agent", SOON, || {
        cluster.agents[0].pid_file("nave.pid").is_some_and(|now| now != agent && alive(now))
    });
    cluster.wait_for_agents(1);
    let after: Vec<u32> = cluster.wait_ready("sleeper", 5).iter().map(pid).collect();
    assert_eq!(before, after);
    assert!(cluster.ps("sleeper").iter().all(|row| row["restarts"] == 0));
}

#[test]
fn what_died_meanwhile_is_reported_with_its_true_exit_code() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&web("web", 1), &["--wait"]).expect(0);
    let row = &cluster.wait_ready("web", 1)[0];
    let (before, port) = (pid(row), row["ports"]["http"].as_u64().expect("a port"));

    // Stopped, the agent cannot see the exit; killed, it never will.
    let agent = cluster.agents[0].agent_pid();
    send(agent, Signal::SIGSTOP);
    let _ = get(port, "/exit/42");
    eventually("the process has ended", SOON, || !alive(before));
    send(agent, Signal::SIGKILL);

    eventually_some("its successor runs", SOON, || {
        cluster.ps("web").into_iter().find(|row| row["ready"] == true && pid(row) != before)
    });
    let events = cluster.nave(&["events", "--service", "web"]).expect(0);
    assert!(events.stdout.contains("code 42"), "{}", events.stdout);
}

#[test]
fn a_planned_stop_of_the_agent_leaves_services_alone() {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&sleeper("sleeper", 2), &["--wait"]).expect(0);
    let before: Vec<u32> = cluster.wait_ready("sleeper", 2).iter().map(pid).collect();

    cluster.agents[0].terminate();
    assert!(before.iter().all(|pid| alive(*pid)));
    cluster.agents[0].start();

    cluster.wait_for_agents(1);
    let after: Vec<u32> = cluster.wait_ready("sleeper", 2).iter().map(pid).collect();
    assert_eq!(before, after);
}
