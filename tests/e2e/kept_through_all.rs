//! Promise (invariant 6): agent, keeper, both at once, and the program that they run may end or be replaced; the
//! processes stay, all are adopted, and how each that ended meanwhile had ended is told where anybody can know it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

use nave_tests::cluster::SOON;
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, Setup, eventually, eventually_some, nave};
use nix::sys::signal::Signal;

use crate::deploy_and_serve::{get, pid};
use crate::manifests::web;

const PROCESSES: usize = 30;

/// Instances by name, each with its process and port.
type Rows = BTreeMap<String, (u32, u64)>;

fn rows(cluster: &Cluster) -> Option<Rows> {
    let rows = cluster.ps("web");
    let all_ready = rows.len() == PROCESSES && rows.iter().all(|row| row["ready"] == true);
    all_ready.then(|| {
        let of = |row: &serde_json::Value| {
            let port = row["ports"]["http"].as_u64().expect("a port");
            (row["id"].as_str().expect("an id").to_owned(), (pid(row), port))
        };
        rows.iter().map(of).collect()
    })
}

/// Ends one process with this code, by its own doing.
fn exits(rows: &Rows, nth: usize, code: i32) -> u32 {
    let (victim, port) = rows.values().nth(nth).copied().expect("so many");
    let _ = get(port, &format!("/exit/{code}"));
    eventually("it has ended", SOON, || !alive(victim));
    victim
}

/// Waits until all run again, and looks whether those who should are the same.
fn adopted(cluster: &Cluster, before: &Rows, victims: &[u32]) -> Rows {
    let after = eventually_some("all ready, the dead replaced", SOON, || {
        rows(cluster).filter(|now| now.values().all(|(pid, _)| !victims.contains(pid)))
    });
    let pids = |rows: &Rows| -> BTreeSet<u32> { rows.values().map(|(pid, _)| *pid).collect() };
    let spared: BTreeSet<u32> = pids(before).into_iter().filter(|pid| !victims.contains(pid)).collect();
    assert_eq!(pids(&after).intersection(&spared).count(), PROCESSES - victims.len(), "the same processes");
    let there = nave_tests::cluster::processes_of(&cluster.agents[0].dir.join("data")).len();
    assert_eq!(there, PROCESSES, "and no other");
    after
}

/// Waits until the history says one of these.
fn told(cluster: &Cluster, what: &[&str]) {
    eventually(&format!("one of {what:?}"), SOON, || {
        let said = cluster.nave(&["events", "--service", "web"]).stdout;
        what.iter().any(|what| said.contains(what))
    });
}

/// Whether a descriptor of an ended process says how (Linux 6.15).
fn kernel_tells() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).filter_map(|part| part.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 15)
}

fn upgrade(cluster: &Cluster, program: &str) -> nave::Output {
    let data = cluster.agents[0].dir.join("data");
    let data = data.to_str().expect("plain names");
    nave::run(None, &["agent", "upgrade", "--data-dir", data, "--program", program], None)
}

#[test]
fn processes_stay_and_every_end_is_explained() {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.use_own_program(0).expect("a program of its own");
    let count = u32::try_from(PROCESSES).expect("few");
    cluster.apply(&web("web", count), &["--wait"]).expect(0);
    let first = eventually_some("all ready", SOON, || rows(&cluster));
    let keeper = cluster.agents[0].pid_file("keeper.pid").expect("it runs");

    // The agent: stopped, it cannot see the end; killed, it never will.
    let agent = cluster.agents[0].agent_pid();
    send(agent, Signal::SIGSTOP);
    let victim = exits(&first, 0, 41);
    send(agent, Signal::SIGKILL);
    let second = adopted(&cluster, &first, &[victim]);
    told(&cluster, &["code 41"]);

    // The keeper: the agent lives, and has seen how.
    let agent = cluster.agents[0].agent_pid();
    cluster.agents[0].kill();
    let victim = exits(&second, 1, 42);
    cluster.agents[0].start();
    let third = adopted(&cluster, &second, &[victim]);
    assert_eq!(cluster.agents[0].agent_pid(), agent, "the agent went on");
    told(&cluster, if kernel_tells() { &["code 42"] } else { &["code 42", "nobody saw how"] });

    // Both at once: known only if the dead process was still there to be looked at. Nothing is guessed.
    let agent = cluster.agents[0].agent_pid();
    send(agent, Signal::SIGKILL);
    cluster.agents[0].kill();
    let victim = exits(&third, 2, 43);
    cluster.agents[0].start();
    let fourth = adopted(&cluster, &third, &[victim]);
    told(&cluster, &["code 43", "nobody saw how"]);

    // The program is replaced: first by what is no program, then by one whose agent finds no keeper, then well.
    assert_ne!(cluster.agents[0].pid_file("keeper.pid"), Some(keeper), "another since the first");
    let keeper = cluster.agents[0].pid_file("keeper.pid").expect("it runs");
    let refused = upgrade(&cluster, "/bin/false").expect(1);
    assert!(refused.text().contains("does not prove itself"), "{}", refused.text());
    let broken = broken_program(&cluster);
    let put_back = upgrade(&cluster, broken.to_str().expect("plain names")).expect(1);
    assert!(put_back.text().contains("put back"), "{}", put_back.text());
    let fifth = adopted(&cluster, &fourth, &[]);
    let victim = exits(&fifth, 3, 44);
    let done = upgrade(&cluster, nave::binary().to_str().expect("plain names")).expect(0);
    assert!(done.stdout.contains("upgraded"), "{}", done.text());
    adopted(&cluster, &fifth, &[victim]);
    told(&cluster, &["code 44"]);
    assert_eq!(cluster.agents[0].pid_file("keeper.pid"), Some(keeper), "it is the same process");
}

/// A build whose agent looks for its keeper elsewhere.
fn broken_program(cluster: &Cluster) -> PathBuf {
    let broken = cluster.dir().join("broken");
    std::fs::copy(nave::binary(), &broken).expect("it can be copied");
    let mut sed = Command::new("sed");
    sed.args(["-i", r"s/keeper\.sock/keeper.sokk/g"]).arg(&broken).env("LC_ALL", "C");
    assert!(sed.status().expect("sed is everywhere").success());
    broken
}
