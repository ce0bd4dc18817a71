//! A host with 300 processes: its agent and 50 of them are killed at once, twenty times. Each time /proc must come to
//! show exactly one process for each of 300 instances, and nobody else in the host's cgroups.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use nave_tests::cluster::processes_of;
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, eventually};
use nix::sys::signal::Signal;
use rand::seq::IndexedRandom as _;
use tokio::time::Instant;

use super::{PATIENCE, ms, one_host, percentiles, sleepers, start};

const PROCESSES: usize = 300;
const KILLED: usize = 50;
const ROUNDS: usize = 20;

pub(crate) fn run() -> anyhow::Result<()> {
    let cluster = one_host();
    start(&cluster, &sleepers(PROCESSES), PROCESSES);
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let before = census(&cluster);
        let all: Vec<u32> = before.values().flatten().copied().collect();
        let victims: Vec<u32> = all.choose_multiple(&mut rand::rng(), KILLED).copied().collect();
        let agent = cluster.agents[0].agent_pid();
        let began = Instant::now();
        send(agent, Signal::SIGKILL);
        victims.iter().for_each(|pid| send(*pid, Signal::SIGKILL));
        eventually("one process for each instance", PATIENCE, || {
            let now = census(&cluster);
            let one_each = now.len() == PROCESSES && now.values().all(|pids| pids.len() == 1);
            one_each && victims.iter().all(|pid| !alive(*pid))
        });
        times.push(began.elapsed());
        let after = census(&cluster);
        let now: BTreeSet<u32> = after.values().flatten().copied().collect();
        let spared = all.iter().filter(|pid| !victims.contains(pid));
        anyhow::ensure!(
            spared.clone().all(|pid| now.contains(pid)),
            "a process that nobody killed was replaced"
        );
        anyhow::ensure!(before.keys().eq(after.keys()), "other instances than before");
        let strangers: Vec<u32> = in_cgroups(&cluster).difference(&now).copied().collect();
        anyhow::ensure!(strangers.is_empty(), "orphans in the host's cgroups: {strangers:?}");
    }
    let (median, _, max) = percentiles(times);
    println!(
        "| rounds | killed each time | whole again: median ms | max ms | orphans | duplicates |\n|---|---|---|---|---|---|"
    );
    println!("| {ROUNDS} | agent and {KILLED} of {PROCESSES} | {} | {} | 0 | 0 |", ms(median), ms(max));
    Ok(())
}

/// The host's service processes by the folder of the instance's output.
fn census(cluster: &Cluster) -> BTreeMap<PathBuf, Vec<u32>> {
    let mut found: BTreeMap<PathBuf, Vec<u32>> = BTreeMap::new();
    for pid in processes_of(&cluster.agents[0].dir.join("data")).into_iter().filter(|pid| alive(*pid)) {
        if let Ok(out) = std::fs::read_link(format!("/proc/{pid}/fd/1")) {
            found.entry(out.parent().map(PathBuf::from).unwrap_or_default()).or_default().push(pid);
        }
    }
    found
}

/// Everybody in a cgroup of one of the host's services, seen from one of them.
fn in_cgroups(cluster: &Cluster) -> BTreeSet<u32> {
    let above = |pid: u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let own = text.lines().find_map(|line| line.strip_prefix("0::"))?.to_owned();
        // …/HOST/SERVICE/INSTANCE
        let host = own.rsplitn(3, '/').nth(2)?.to_owned();
        host.contains("nave-").then_some(host)
    };
    let Some(host) = processes_of(&cluster.agents[0].dir.join("data")).into_iter().find_map(above) else {
        return BTreeSet::new();
    };
    let pids = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    pids.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .filter(|pid| above(*pid).as_ref() == Some(&host) && alive(*pid))
        .collect()
}
