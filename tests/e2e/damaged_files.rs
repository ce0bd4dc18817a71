//! Promise: of a damaged ledger the rest is used and the damage told; nothing is guessed. What runs goes on, and no
//! process is left to itself.

use std::path::Path;

use nave_tests::cluster::SOON;
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nix::sys::signal::Signal;

use crate::deploy_and_serve::pid;
use crate::manifests::web;

/// Changes one byte in the longest record of a file of records, as a failing disk may.
fn damage(file: &Path, header_bytes: usize) {
    let mut bytes = std::fs::read(file).expect("the file is there");
    let (mut at, mut longest) = (header_bytes, (0, 0));
    while let Some(length) = bytes.get(at..at + 4) {
        let length = u32::from_le_bytes(length.try_into().expect("four bytes")) as usize;
        longest = longest.max((length, at));
        at += 8 + length;
    }
    bytes[longest.1 + 8 + longest.0 / 2] ^= 0x10;
    std::fs::write(file, bytes).expect("it can be written");
}

fn is_told(cluster: &Cluster, file: &str) {
    eventually("people are told", SOON, || {
        let said = cluster.nave(&["hosts"]).stdout;
        said.contains(file) && said.contains("torn or damaged")
    });
}

fn pids(cluster: &Cluster) -> Vec<u32> {
    cluster.wait_ready("web", 3).iter().map(pid).collect()
}

#[test]
fn an_agent_that_does_not_know_what_is_wanted_ends_nothing() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&web("web", 3), &["--wait"]).expect(0);
    let before = pids(&cluster);
    let agent = cluster.agents[0].agent_pid();
    // Frozen, so that it does not write meanwhile.
    send(agent, Signal::SIGSTOP);
    damage(&cluster.agents[0].dir.join("data/ledger"), 8);
    send(agent, Signal::SIGKILL);
    eventually("another agent", SOON, || {
        cluster.agents[0].pid_file("nave.pid").is_some_and(|now| now != agent && alive(now))
    });
    cluster.wait_for_agents(1);
    is_told(&cluster, "data/ledger");
    assert_eq!(before, pids(&cluster));
    assert!(cluster.ps("web").iter().all(|row| row["restarts"] == 0));
}

#[test]
fn a_keeper_that_has_lost_one_record_adopts_the_others_and_leaves_no_orphan() {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&web("web", 3), &["--wait"]).expect(0);
    let before = pids(&cluster);
    cluster.agents[0].kill();
    damage(&cluster.agents[0].dir.join("data/keeper.ledger"), 0);
    cluster.agents[0].start();
    cluster.wait_for_agents(1);
    is_told(&cluster, "keeper.ledger");
    let after = eventually_some("three are ready, two of them as they were", SOON, || {
        let rows = cluster.ps("web");
        let ready = rows.len() == 3 && rows.iter().all(|row| row["ready"] == true);
        let pids: Vec<u32> = rows.iter().map(pid).collect();
        let stayed = pids.iter().filter(|pid| before.contains(pid)).count();
        (ready && stayed >= 2).then_some(pids)
    });
    // The one that no record names any more was ended before another one was started in its place.
    for pid in before.iter().filter(|pid| !after.contains(pid)) {
        assert!(!alive(*pid), "{pid} runs on, and nobody watches it");
    }
}
