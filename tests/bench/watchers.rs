//! Thousands of watchers of one member: what each costs it in memory, and how long a change takes from its commit to
//! the last of them. `nave-bench watchers [WATCHERS]`; every watcher watches everything, over shared connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nave_proto::pb;
use nave_tests::api::Api;
use nave_tests::process::{cpu_seconds, resident_bytes};
use nave_tests::{Cluster, Setup};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::load::runtime;

const WATCHERS: usize = 10_000;
/// Watches of one connection.
const PER_CONNECTION: usize = 100;
const CHANGES: usize = 20;
/// Until memory has settled.
const SETTLE: Duration = Duration::from_secs(6);
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn run() -> anyhow::Result<()> {
    let watchers = std::env::args().nth(2).and_then(|count| count.parse().ok()).unwrap_or(WATCHERS);
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 0 });
    let leader = cluster.wait_for_leader();
    let member = (leader + 1) % 3;
    let pid = cluster.members[member].process().pid();
    runtime()?.block_on(async {
        let writer = Api::open(&cluster.context())?;
        writer.write(leader, "first", None).await?;
        sleep(SETTLE).await;
        let before = resident_bytes(pid);
        let connections: anyhow::Result<Vec<Api>> =
            (0..watchers.div_ceil(PER_CONNECTION)).map(|_| Api::open(&cluster.context())).collect();
        let crowd = Crowd::gather(&connections?, member, watchers).await?;
        sleep(SETTLE).await;
        let each = resident_bytes(pid).saturating_sub(before) / watchers as u64;
        let cpu = cpu_seconds(pid);
        let mut times = Vec::new();
        for n in 0..CHANGES {
            let revision = writer.write(leader, &format!("change-{n}"), None).await?;
            let committed = Instant::now();
            crowd.wait_for(revision).await?;
            times.push(committed.elapsed());
        }
        let cpu = (cpu_seconds(pid) - cpu) / CHANGES as f64;
        times.sort_unstable();
        println!("| watchers of one member | its memory for each, KiB | commit to the last watcher, median ms | worst ms | its CPU ms for each change |\n|---|---|---|---|---|");
        let ms = |time: Duration| time.as_millis();
        println!(
            "| {watchers} | {} | {} | {} | {:.0} |",
            each / 1024,
            ms(times[CHANGES / 2]),
            ms(times[CHANGES - 1]),
            cpu * 1e3
        );
        Ok(())
    })
}

/// Watchers, and the newest revision that each has been told of.
struct Crowd {
    _watching: JoinSet<()>,
    told: Arc<Vec<AtomicU64>>,
}

impl Crowd {
    /// Opens the watches; each begins with the whole state, which is small.
    async fn gather(connections: &[Api], member: usize, size: usize) -> anyhow::Result<Self> {
        let told: Arc<Vec<AtomicU64>> = Arc::new((0..size).map(|_| AtomicU64::new(0)).collect());
        let mut watching = JoinSet::new();
        for n in 0..size {
            let mut client = connections[n / PER_CONNECTION].services(member);
            let mut stream = client.watch(pb::WatchRequest::default()).await.context("watch")?.into_inner();
            let told = Arc::clone(&told);
            watching.spawn(async move {
                while let Ok(Some(message)) = stream.message().await {
                    if let Some(cursor) = message.cursor {
                        told[n].store(cursor.revision, Ordering::Relaxed);
                    }
                }
            });
        }
        Ok(Self { _watching: watching, told })
    }

    /// Until every watcher has been told of this revision, looked at each millisecond.
    async fn wait_for(&self, revision: u64) -> anyhow::Result<()> {
        let end = Instant::now() + PATIENCE;
        while self.told.iter().any(|told| told.load(Ordering::Relaxed) < revision) {
            ensure!(Instant::now() < end, "watchers were not told of revision {revision}");
            sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }
}
