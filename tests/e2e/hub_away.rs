//! Promise: agents work on while the hub is away, also through their own restart, and the hub learns all of it after.

use nave_tests::cluster::{Role, SOON, processes_of};
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nix::sys::signal::Signal;

use crate::deploy_and_serve::pid;
use crate::manifests::web;

#[test]
fn processes_that_die_are_restarted_without_a_hub() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 1 });
    cluster.apply(&web("web", 3), &["--wait"]).expect(0);
    let before: Vec<u32> = cluster.wait_ready("web", 3).iter().map(pid).collect();
    let data = cluster.agents[0].dir.join("data");

    cluster.members.iter_mut().for_each(Role::kill);
    send(before[0], Signal::SIGKILL);
    eventually("a successor without a hub", SOON, || {
        let now = processes_of(&data);
        now.len() == 3 && !now.contains(&before[0])
    });

    let agent = cluster.agents[0].agent_pid();
    send(agent, Signal::SIGKILL);
    eventually("another agent", SOON, || {
        cluster.agents[0].pid_file("nave.pid").is_some_and(|now| now != agent && alive(now))
    });
    send(before[1], Signal::SIGKILL);
    let now = eventually_some("a successor by an agent that started without a hub", SOON, || {
        let now = processes_of(&data);
        (now.len() == 3 && !now.contains(&before[1])).then_some(now)
    });
    assert!(now.contains(&before[2]), "the third was left alone");

    cluster.members.iter_mut().for_each(Role::start);
    cluster.wait_for_leader();
    cluster.wait_for_agents(1);
    eventually("the hub knows the new pids", SOON, || {
        let mut pids: Vec<u32> =
            cluster.ps("web").iter().filter(|row| row["ready"] == true).map(pid).collect();
        let mut now = processes_of(&data);
        pids.sort_unstable();
        now.sort_unstable();
        pids == now
    });
    let events = cluster.nave(&["events", "--service", "web"]).expect(0);
    assert!(events.stdout.matches("SIGKILL").count() >= 2, "both ends are explained:\n{}", events.stdout);
}

#[test]
fn every_end_while_the_hub_was_away_is_told_once_and_in_order() {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    // Attempt n ends with code n; the first when it is asked to, the fifth not at all.
    let script = "n=$(cat $NAVE_DATA/n || echo 0); n=$((n+1)); echo $n > $NAVE_DATA/n; trap 'exit 1' TERM; \
                  while [ $n = 1 ]; do sleep 0.05; done; [ $n -le 4 ] && exit $n; exec sleep 4321";
    let manifest = format!("name = \"flapper\"\ndata = true\ncommand = [\"sh\", \"-c\", \"{script}\"]\n");
    cluster.apply(&manifest, &["--wait"]).expect(0);
    let first = pid(&cluster.wait_ready("flapper", 1)[0]);
    let data = cluster.agents[0].dir.join("data");
    let runs_on = || {
        let named = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/cmdline"));
        processes_of(&data).iter().any(|pid| named(pid).is_ok_and(|line| line.contains("4321")))
    };

    cluster.members.iter_mut().for_each(Role::kill);
    send(first, Signal::SIGTERM);
    eventually("the fifth attempt runs", SOON, runs_on);
    // What it has to tell outlives it.
    let agent = cluster.agents[0].agent_pid();
    send(agent, Signal::SIGKILL);

    cluster.members.iter_mut().for_each(Role::start);
    cluster.wait_for_leader();
    cluster.wait_for_agents(1);
    cluster.wait_ready("flapper", 1);
    let codes = || -> Vec<u32> {
        let events = cluster.nave(&["events", "--service", "flapper"]).expect(0).stdout;
        let code = |line: &str| line.split("exited with code ").nth(1)?.split(' ').next()?.parse().ok();
        events.lines().filter_map(code).collect()
    };
    eventually("the last end is told", SOON, || codes().contains(&4));
    assert_eq!(codes(), [1, 2, 3, 4]);
}
