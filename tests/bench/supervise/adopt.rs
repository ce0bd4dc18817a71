//! 200 processes; the agent, the keeper, both are killed, or the program is replaced: until the agent that is there
//! afterwards has adopted all of them, and whether they are the same processes.

use std::collections::BTreeSet;
use std::time::Duration;

use nave_tests::cluster::processes_of;
use nave_tests::process::{alive, send};
use nave_tests::wait::pause;
use nave_tests::{Cluster, eventually, nave};
use nix::sys::signal::Signal;
use tokio::time::Instant;

use super::{PATIENCE, ms, one_host, percentiles, running, sleepers, start};

const PROCESSES: usize = 200;
const ROUNDS: usize = 5;

#[derive(Debug, Clone, Copy)]
enum End {
    Agent,
    Keeper,
    Both,
    Upgrade,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent killed",
            Self::Keeper => "keeper killed",
            Self::Both => "both killed at once",
            Self::Upgrade => "`nave agent upgrade`, from the end of the old agent",
        }
    }
}

pub(crate) fn run() -> anyhow::Result<()> {
    let mut cluster = one_host();
    cluster.use_own_program(0)?;
    let before = start(&cluster, &sleepers(PROCESSES), PROCESSES);
    eventually("all are known to run", PATIENCE, || running(&cluster) == PROCESSES);
    println!(
        "| what ends | rounds | all adopted: median ms | max ms | same processes |\n|---|---|---|---|---|"
    );
    for end in [End::Agent, End::Keeper, End::Both, End::Upgrade] {
        let times: Vec<Duration> = (0..ROUNDS).map(|_| round(&mut cluster, end)).collect();
        let after: BTreeSet<u32> = processes_of(&cluster.agents[0].dir.join("data")).into_iter().collect();
        let same = after.intersection(&before).count();
        anyhow::ensure!(after == before, "{} of {PROCESSES} are the same, there are {}", same, after.len());
        let (median, _, max) = percentiles(times);
        println!("| {} | {ROUNDS} | {} | {} | {same} of {PROCESSES} |", end.name(), ms(median), ms(max));
    }
    Ok(())
}

/// From the end to the moment when the next agent holds all to run.
fn round(cluster: &mut Cluster, end: End) -> Duration {
    let heard = heard(cluster);
    let agent = cluster.agents[0].agent_pid();
    let began = Instant::now();
    match end {
        End::Agent => send(agent, Signal::SIGKILL),
        End::Keeper => {
            cluster.agents[0].kill();
            cluster.agents[0].start();
        }
        End::Both => {
            send(agent, Signal::SIGKILL);
            cluster.agents[0].kill();
            cluster.agents[0].start();
        }
        End::Upgrade => return upgrade(cluster),
    }
    adopted_after(cluster, began, heard)
}

/// The command returns once the trial is over, long after the new agent has taken over.
fn upgrade(cluster: &Cluster) -> Duration {
    let data = cluster.agents[0].dir.join("data");
    let words = ["agent", "upgrade", "--data-dir", data.to_str().expect("plain names")];
    let old = cluster.agents[0].agent_pid();
    std::thread::scope(|threads| {
        let command = threads.spawn(|| nave::run(None, &words, None));
        while alive(old) {
            pause(Duration::from_millis(1));
        }
        let took = adopted_after(cluster, Instant::now(), heard(cluster));
        command.join().expect("it ends").expect(0);
        took
    })
}

fn adopted_after(cluster: &Cluster, began: Instant, heard: usize) -> Duration {
    let limit = began + PATIENCE;
    while heard_since(cluster, heard) == 0 || running(cluster) != PROCESSES {
        assert!(Instant::now() < limit, "not adopted after {PATIENCE:?}: {}", cluster.agents[0].log());
        pause(Duration::from_millis(2));
    }
    began.elapsed()
}

/// How often an agent has heard from its keeper what runs.
fn heard(cluster: &Cluster) -> usize {
    cluster.agents[0].log().matches("the keeper has said what it runs").count()
}

fn heard_since(cluster: &Cluster, before: usize) -> usize {
    heard(cluster) - before
}
