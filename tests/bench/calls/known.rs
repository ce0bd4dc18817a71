//! What it costs an agent to know 1,000 services with 5,000 endpoints on other hosts (simulated agents report them), and
//! to listen for callers of all of them, when nothing changes.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::ensure;
use nave_tests::api::Api;
use nave_tests::fleet::Fleet;
use nave_tests::process::{cpu_seconds, resident_bytes};
use nave_tests::{Cluster, Setup};
use tokio::time::{Instant, sleep};

use crate::fleet::{place, token, until};
use crate::load::runtime;

const HOSTS: usize = 20;
const SERVICES: u64 = 1_000;
const EACH: u64 = 5;
/// What came last is written and forgotten.
const SETTLES: Duration = Duration::from_secs(30);
const QUIET: Duration = Duration::from_secs(60);
const RESIDENT_MAX: f64 = 60.0;
const PERCENT_MAX: f64 = 0.5;

pub(crate) fn run() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let leader = cluster.wait_for_leader();
    let name = cluster.agents[0].name.clone();
    // So that all of them are elsewhere.
    cluster.nave(&["drain", &name]).expect(0);
    let agent = cluster.agents[0].agent_pid();
    let keeper = cluster.agents[0].process().pid();
    let addresses = vec![format!("127.0.0.1:{}", cluster.base_port)];
    runtime()?.block_on(async {
        let api = Api::open(&cluster.context())?;
        let mut fleet = Fleet::enrol(HOSTS, &token(&api, leader).await?, &addresses).await?;
        fleet.connect();
        let before = mebibytes(agent);
        place(&api, leader, SERVICES * EACH, EACH).await?;
        let all = SERVICES * EACH;
        let metrics = cluster.agent_metrics_port(0);
        until("the agent knows all", || known(metrics) == all).await?;
        sleep(SETTLES).await;
        let (cpu, since) = ([agent, keeper].map(cpu_seconds), Instant::now());
        sleep(QUIET).await;
        let percent =
            |pid: u32, before: f64| (cpu_seconds(pid) - before) / since.elapsed().as_secs_f64() * 100.0;
        let (of_agent, of_keeper) = (percent(agent, cpu[0]), percent(keeper, cpu[1]));
        let resident = mebibytes(agent);
        println!(
            "| services | endpoints | agent MiB before | after | % of a core | keeper MiB | % of a core |"
        );
        println!("|---|---|---|---|---|---|---|");
        println!(
            "| {SERVICES} | {all} | {before:.1} | {resident:.1} | {of_agent:.2} | {:.1} | {of_keeper:.2} |",
            mebibytes(keeper)
        );
        ensure!(resident <= RESIDENT_MAX, "{resident:.1} MiB are resident");
        ensure!(of_agent < PERCENT_MAX, "it uses {of_agent:.2} % of a core");
        Ok(())
    })
}

#[expect(clippy::cast_precision_loss, reason = "memory sizes stay far below 2^52")]
fn mebibytes(pid: u32) -> f64 {
    resident_bytes(pid) as f64 / f64::from(1 << 20)
}

/// Endpoints that the agent's proxy would call.
fn known(metrics: u16) -> u64 {
    let mut text = String::new();
    let read = TcpStream::connect(("127.0.0.1", metrics)).and_then(|mut stream| {
        write!(stream, "GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
        stream.read_to_string(&mut text)
    });
    let series = text.lines().filter(|line| line.starts_with("nave_agent_proxy_in_flight{"));
    read.map_or(0, |_| series.count() as u64)
}
