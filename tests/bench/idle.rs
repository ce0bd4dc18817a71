//! What an idle cluster costs: resident memory and CPU of a member, an agent and a keeper, with three members, one agent
//! and ten running processes, after half a minute of nothing.

use std::time::Duration;

use nave_tests::process::{cpu_seconds, resident_bytes};
use nave_tests::wait::pause;
use nave_tests::{Cluster, Setup};

const QUIET: Duration = Duration::from_secs(30);

pub(crate) fn run() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 1 });
    let manifest = "name = \"sleeper\"\ncommand = [\"sleep\", \"infinity\"]\ncount = 10\n";
    cluster.apply(manifest, &["--wait"]).expect(0);
    let mut roles: Vec<(String, u32)> =
        cluster.members.iter_mut().map(|member| (member.name.clone(), member.process().pid())).collect();
    let keeper = cluster.agents[0].process().pid();
    roles.push(("agent-1".into(), cluster.agents[0].agent_pid()));
    roles.push(("keeper of agent-1".into(), keeper));
    let before: Vec<f64> = roles.iter().map(|(_, pid)| cpu_seconds(*pid)).collect();
    pause(QUIET);
    println!("| role | resident MiB | CPU % of one core |\n|---|---|---|");
    for ((name, pid), before) in roles.iter().zip(before) {
        let cpu = (cpu_seconds(*pid) - before) / QUIET.as_secs_f64() * 100.0;
        println!("| {name} | {:.1} | {cpu:.1} |", mebibytes(resident_bytes(*pid)));
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "memory sizes stay far below 2^52")]
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
