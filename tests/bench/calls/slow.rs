//! One of three instances takes ten times as long as the others: how many calls it gets, and what that costs all.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::ensure;
use nave_tests::wait::pause;
use nave_tests::{Cluster, Setup, eventually};

use super::generator::Generator;
use super::{ANSWER, address, spread};

const PER_SECOND: u32 = 2_000;
const LASTS: Duration = Duration::from_secs(20);
const PATIENCE: Duration = Duration::from_secs(60);
/// The ordinal of the slow one.
const SLOW: &str = "2";

pub(crate) fn run() -> anyhow::Result<()> {
    println!(
        "| three instances on | calls | failed | the slow one's share | p50 ms | p95 ms | p95 of the healthy ones' answers | p99 ms |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    one("one host", 1)?;
    one("three hosts", 3)
}

fn one(what: &str, agents: usize) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    let cluster = Cluster::start(&Setup { members: 1, agents });
    cluster.wait_for_agents(agents);
    let program = std::env::current_exe()?;
    let manifest = format!(
        "name = \"calls\"\ncommand = [{program:?}, {ANSWER:?}, {:?}, {SLOW:?}]\ncount = 3\n\
         [ports.main]\nprotocol = \"http\"\nservice_port = 8080\n[health]\nhttp = \"/ready\"\ninterval = \"200ms\"\n",
        folder.path()
    );
    cluster.apply(&manifest, &["--wait"]).expect(0);
    let rows = cluster.wait_ready("calls", 3);
    let slow =
        rows.iter().find(|row| row["ordinal"].as_u64() == SLOW.parse().ok()).map(|row| row["id"].clone());
    let slow = slow.and_then(|id| id.as_str().map(str::to_owned)).unwrap_or_default();
    let (address, _) = address(&cluster, "calls")?;
    eventually("the address answers", PATIENCE, || std::net::TcpStream::connect(address).is_ok());
    let load = Generator::start(address, PER_SECOND)?;
    pause(LASTS);
    let calls = load.stop();

    let mut by: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    for call in &calls {
        by.entry(call.answer.as_deref().unwrap_or("failed")).or_default().push(call.took);
    }
    ensure!(by.contains_key(slow.as_str()) || by.len() == 2, "{slow} is none of {:?}", by.keys());
    let count = |who: &str| by.get(who).map_or(0, Vec::len);
    #[expect(clippy::cast_precision_loss, reason = "counts of calls stay far below 2^52")]
    let share = count(&slow) as f64 / calls.len() as f64 * 100.0;
    let failed = count("failed");
    let healthy = by.iter().filter(|(who, _)| **who != slow && **who != "failed");
    let [_, healthy, ..] = spread(healthy.flat_map(|(_, took)| took.clone()).collect());
    let all = calls.len();
    let [half, high, last, _] = spread(calls.iter().map(|call| call.took).collect());
    println!(
        "| {what} | {all} | {failed} | {share:.2} % | {half:.2} | {high:.2} | {healthy:.2} | {last:.1} |"
    );
    ensure!(share <= 2.0, "the slow one got {share:.2} %");
    ensure!(high <= 2.0 * healthy, "p95 is {high:.2} ms, of the healthy ones' answers {healthy:.2} ms");
    ensure!(failed == 0, "{failed} calls failed");
    Ok(())
}
