//! What agent and keeper cost with 1,000 processes: memory, CPU while nothing happens, and CPU for 1,000 http checks
//! a second.

use std::time::Duration;

use nave_tests::process::{cpu_seconds, resident_bytes};
use nave_tests::wait::pause;
use nave_tests::{Cluster, eventually};

use super::{PATIENCE, one_host, running, sleepers, start};

const PROCESSES: usize = 1_000;
/// For what starting left to do, among it the giving back of memory.
const SETTLE: Duration = Duration::from_secs(20);
const IDLE: Duration = Duration::from_secs(60);
const CHECKED: Duration = Duration::from_secs(30);

pub(crate) fn run() -> anyhow::Result<()> {
    println!(
        "| 1,000 processes | agent MiB | keeper MiB | agent % of a core | keeper % of a core |\n|---|---|---|---|---|"
    );
    {
        let mut cluster = one_host();
        start(&cluster, &sleepers(PROCESSES), PROCESSES);
        row("nothing happens, no checks", &mut cluster, IDLE);
    }
    let mut cluster = one_host();
    let manifest = format!(
        "name = \"web\"\ncommand = [\"{}\"]\ncount = {PROCESSES}\n\n[ports.http]\nprotocol = \"http\"\n\n\
         [health]\nhttp = \"/ready\"\ninterval = \"1s\"\ntimeout = \"1s\"\n",
        nave_tests::nave::hello().display()
    );
    start(&cluster, &manifest, PROCESSES);
    row("1,000 http checks a second", &mut cluster, CHECKED);
    Ok(())
}

fn row(what: &str, cluster: &mut Cluster, length: Duration) {
    eventually("all are known to run", PATIENCE, || running(cluster) == PROCESSES);
    pause(SETTLE);
    let pids = [cluster.agents[0].agent_pid(), cluster.agents[0].process().pid()];
    let before = pids.map(cpu_seconds);
    pause(length);
    let after = pids.map(cpu_seconds);
    let cpu = |k: usize| (after[k] - before[k]) / length.as_secs_f64() * 100.0;
    let [agent, keeper] = pids.map(|pid| mebibytes(resident_bytes(pid)));
    println!("| {what} | {agent:.1} | {keeper:.1} | {:.2} | {:.2} |", cpu(0), cpu(1));
}

#[expect(clippy::cast_precision_loss, reason = "memory sizes stay far below 2^52")]
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
