//! What it costs and how long it takes to supervise: `nave-bench supervise`, or one of `adopt`, `exits`, `footprint`
//! and `chaos` after it. Whatever is said of processes is read from /proc or from what they wrote themselves.

mod adopt;
mod chaos;
mod exits;
mod footprint;
mod rivals;

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use nave_tests::cluster::processes_of;
use nave_tests::{Cluster, Setup, eventually};

/// A thousand processes take their time to start on two cores.
const PATIENCE: Duration = Duration::from_secs(300);

pub(crate) fn run() -> anyhow::Result<()> {
    crate::rooms(&[
        ("adopt", adopt::run),
        ("exits", exits::run),
        ("footprint", footprint::run),
        ("chaos", chaos::run),
    ])
}

/// One member, one agent.
fn one_host() -> Cluster {
    Cluster::start(&Setup { members: 1, agents: 1 })
}

/// Starts a service of so many processes on it, and waits until /proc has them.
fn start(cluster: &Cluster, manifest: &str, count: usize) -> BTreeSet<u32> {
    cluster.apply(manifest, &[]).expect(0);
    let data = cluster.agents[0].dir.join("data");
    eventually(&format!("{count} processes"), PATIENCE, || processes_of(&data).len() == count);
    processes_of(&data).into_iter().collect()
}

fn sleepers(count: usize) -> String {
    format!(
        "name = \"sleeper\"\ncommand = [\"sleep\", \"infinity\"]\ncount = {count}\n\n[restart]\nbudget = \"1000 in 5m\"\n"
    )
}

/// The agent's own figures; nothing when it does not answer.
fn metrics(cluster: &Cluster) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", cluster.agent_metrics_port(0))).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// How many instances the agent itself holds to run.
fn running(cluster: &Cluster) -> usize {
    let text = metrics(cluster).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("nave_agent_instances{state=\"running\"} "));
    line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

/// The middle, the 99th of a hundred, and the last.
fn percentiles(mut all: Vec<Duration>) -> (Duration, Duration, Duration) {
    all.sort_unstable();
    let at = |part: usize| all[(all.len() * part / 100).min(all.len() - 1)];
    (at(50), at(99), at(100))
}

fn ms(duration: Duration) -> String {
    format!("{:.1}", duration.as_secs_f64() * 1000.0)
}
