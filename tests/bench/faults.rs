//! Twenty rounds of random faults of members under a stream of writes: kills, restarts at once, partitions of one
//! member, of the leader, in one direction, frozen ones. Afterwards the members' logs are compared entry by entry, and
//! every acknowledged write has to be in them. Prints what was done and what it cost.

use std::time::Duration;

use nave_tests::wait::pause;
use nave_tests::writes::under_writes;
use nave_tests::{Cluster, Setup, logs};
use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::time::Instant;

const ROUNDS: usize = 20;
const MEMBERS: usize = 3;

#[derive(Debug, Clone, Copy)]
enum Fault {
    Kill,
    RestartAtOnce,
    Isolate,
    DeafAndHeard,
    HearsUnheard,
    Freeze,
}

const FAULTS: [Fault; 6] = [
    Fault::Kill,
    Fault::RestartAtOnce,
    Fault::Isolate,
    Fault::DeafAndHeard,
    Fault::HearsUnheard,
    Fault::Freeze,
];

pub(crate) fn run() -> anyhow::Result<()> {
    let seed: u64 = rand::rng().random();
    let Some(mut cluster) = Cluster::start_on_network(&Setup { members: MEMBERS, agents: 0 }) else {
        return Ok(());
    };
    let mut rng = StdRng::seed_from_u64(seed);
    let began = Instant::now();
    let mut done = Vec::new();
    let acknowledged = under_writes(&mut cluster, "faults", |cluster| {
        for round in 0..ROUNDS {
            // Each kind comes up, and each hits the leader as well as another; the order is random.
            let fault = FAULTS[round % FAULTS.len()];
            let leader = cluster.wait_for_leader();
            let hits_leader = rng.random_bool(0.5);
            let victim = if hits_leader { leader } else { (leader + rng.random_range(1..MEMBERS)) % MEMBERS };
            let length = Duration::from_millis(rng.random_range(500..4_000));
            inflict(cluster, fault, victim, length);
            let healed = Instant::now();
            logs::wait_for_all(cluster);
            done.push((fault, hits_leader, length, healed.elapsed()));
        }
    });
    let took = began.elapsed();
    logs::wait_for_agreement(&cluster);
    logs::assert_same_answers(&cluster);
    logs::assert_equal(&mut cluster, &acknowledged);
    println!(
        "seed {seed}\n\n| round | fault | of the leader | for ms | all members back after ms |\n|---|---|---|---|---|"
    );
    for (round, (fault, of_leader, length, back)) in done.iter().enumerate() {
        println!(
            "| {} | {fault:?} | {of_leader} | {} | {} |",
            round + 1,
            length.as_millis(),
            back.as_millis()
        );
    }
    println!(
        "\n{ROUNDS} rounds in {} s: {} writes acknowledged, 0 lost; the logs of all members are equal entry by entry",
        took.as_secs(),
        acknowledged.len()
    );
    Ok(())
}

fn inflict(cluster: &mut Cluster, fault: Fault, victim: usize, length: Duration) {
    let others = (0..MEMBERS).filter(|other| *other != victim);
    match fault {
        Fault::Kill => {
            cluster.members[victim].kill();
            pause(length);
            cluster.members[victim].start();
        }
        Fault::RestartAtOnce => {
            cluster.members[victim].kill();
            cluster.members[victim].start();
        }
        Fault::Isolate => {
            cluster.network().isolate(victim, others);
            pause(length);
        }
        Fault::DeafAndHeard => {
            others.for_each(|other| cluster.network().cut(other, victim));
            pause(length);
        }
        Fault::HearsUnheard => {
            others.for_each(|other| cluster.network().cut(victim, other));
            pause(length);
        }
        Fault::Freeze => {
            cluster.members[victim].process().signal(Signal::SIGSTOP);
            pause(length);
            cluster.members[victim].process().signal(Signal::SIGCONT);
        }
    }
    cluster.network().heal();
}
