//! Promise (invariant 4): with `on_disconnect = "stop"` never two processes of one instance at a time. What counts is
//! what /proc says, not what Nave says.

use std::time::Duration;

use nave_tests::cluster::{Role, SOON, processes_of};
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nix::sys::signal::Signal;
use nix::time::{ClockId, clock_gettime};

use crate::deploy_and_serve::pid;

/// Lease, grace, kill and fence are some 16 s; a slow machine gets more.
const BOUND: Duration = Duration::from_secs(60);

/// Ignores SIGTERM, so that it lasts for the whole of its grace.
fn stubborn(name: &str) -> String {
    format!(
        "name = \"{name}\"\ncommand = [\"sh\", \"-c\", \"trap '' TERM; while :; do sleep 1; done\"]\ncount = 1\n\n\
         [stop]\ngrace = \"1s\"\n\n[placement]\non_disconnect = \"stop\"\n"
    )
}

/// Clock ticks since boot, as the start time of a process is given.
fn now_ticks() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has it");
    u64::try_from(now.tv_sec()).expect("after boot") * 100
        + u64::try_from(now.tv_nsec()).expect("positive") / 10_000_000
}

fn start_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_whitespace().nth(19)?.parse().ok()
}

/// The main process of the service on an agent.
fn shell_of(agent: &Role) -> Option<u32> {
    processes_of(&agent.dir.join("data"))
        .into_iter()
        .find(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"sh\0")))
}

#[test]
fn a_frozen_agents_process_is_ended_by_the_keeper_before_its_successor_starts() {
    let cluster = Cluster::start(&Setup { members: 3, agents: 2 });
    cluster.apply(&stubborn("single"), &["--wait"]).expect(0);
    let row = &cluster.wait_ready("single", 1)[0];
    let old = pid(row);
    let on = usize::from(row["host"] == "agent-2");
    let (frozen, other) = (&cluster.agents[on], &cluster.agents[1 - on]);
    let agent = frozen.agent_pid();

    send(agent, Signal::SIGSTOP);
    let mut last_seen = now_ticks();
    let new = eventually_some("a successor on the other host", BOUND, || {
        if alive(old) {
            last_seen = now_ticks();
        }
        shell_of(other)
    });
    let started = start_ticks(new).expect("it runs");
    assert!(!alive(old), "two at a time");
    assert!(last_seen < started, "the old one was there at {last_seen}, the new one began at {started}");

    send(agent, Signal::SIGCONT);
    cluster.wait_for_agents(2);
    eventually("one is ready, elsewhere", SOON, || {
        let rows = cluster.ps("single");
        rows.len() == 1 && rows[0]["ready"] == true && pid(&rows[0]) == new
    });
    assert_eq!(shell_of(frozen), None, "the agent that came back starts nothing");
}

#[test]
fn without_a_hub_it_ends_and_with_one_it_goes_on() {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&stubborn("single"), &["--wait"]).expect(0);
    let old = pid(&cluster.wait_ready("single", 1)[0]);

    cluster.members[0].kill();
    eventually("it has ended for want of a lease", BOUND, || !alive(old));
    assert_eq!(shell_of(&cluster.agents[0]), None, "and is not started again");
    cluster.members[0].start();
    // At first the member knows only what was when it was killed.
    let row = eventually_some("it goes on", SOON, || {
        let row = cluster.ps("single").into_iter().next()?;
        (row["ready"] == true && pid(&row) != old).then_some(row)
    });
    assert_eq!(row["restarts"], 0, "it was no failure of its own");
}

#[test]
fn a_change_of_leader_harms_it_not() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 1 });
    cluster.apply(&stubborn("single"), &["--wait"]).expect(0);
    let before = pid(&cluster.wait_ready("single", 1)[0]);
    for _ in 0..2 {
        let leader = cluster.wait_for_leader();
        cluster.members[leader].kill();
        cluster.wait_for_leader();
        cluster.wait_for_agents(1);
        cluster.members[leader].start();
    }
    assert!(alive(before));
    assert_eq!(pid(&cluster.wait_ready("single", 1)[0]), before);
}
