//! A closed-loop load: N clients, each with one request under way, for a fixed time after a warm-up.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// What one run measured.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) per_second: f64,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    pub(crate) errors: usize,
}

const WARM_UP: Duration = Duration::from_secs(2);
const MEASURED: Duration = Duration::from_secs(8);

/// Connections that `clients` share: enough to use both cores, few enough that neither side spends itself on sockets.
pub(crate) fn connections(clients: usize) -> usize {
    clients.clamp(1, 8)
}

/// Runs `request(client, n)` in a closed loop of `clients`.
pub(crate) async fn closed_loop<F, R>(clients: usize, request: F) -> Load
where
    F: Fn(usize, u64) -> R + Send + Sync + 'static,
    R: Future<Output = bool> + Send,
{
    let request = Arc::new(request);
    let phase = Arc::new(AtomicU8::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = tokio::task::JoinSet::new();
    for client in 0..clients {
        let (request, phase, stop) = (request.clone(), phase.clone(), stop.clone());
        tasks.spawn(async move {
            let mut times = Vec::with_capacity(1 << 14);
            let mut errors = 0;
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                n += 1;
                let began = Instant::now();
                let ok = request(client, n).await;
                if phase.load(Ordering::Relaxed) == 1 {
                    if ok { times.push(began.elapsed()) } else { errors += 1 }
                }
            }
            (times, errors)
        });
    }
    tokio::time::sleep(WARM_UP).await;
    phase.store(1, Ordering::Relaxed);
    let began = Instant::now();
    tokio::time::sleep(MEASURED).await;
    phase.store(2, Ordering::Relaxed);
    let took = began.elapsed();
    stop.store(true, Ordering::Relaxed);
    let mut times = Vec::new();
    let mut errors = 0;
    while let Some(done) = tasks.join_next().await {
        let (mine, failed) = done.expect("a client does not panic");
        times.extend(mine);
        errors += failed;
    }
    summary(times, errors, took)
}

#[expect(clippy::cast_precision_loss, reason = "counts of requests stay far below 2^52")]
fn summary(mut times: Vec<Duration>, errors: usize, took: Duration) -> Load {
    times.sort_unstable();
    let at =
        |share: usize| times.get(times.len().saturating_sub(1) * share / 100).copied().unwrap_or_default();
    Load { per_second: times.len() as f64 / took.as_secs_f64(), p50: at(50), p99: at(99), errors }
}

/// A row of the table.
pub(crate) fn row(what: &str, clients: usize, load: &Load, more: &str) -> String {
    format!(
        "| {what} | {clients} | {:.0} | {:.2} | {:.2} | {} | {more} |",
        load.per_second,
        load.p50.as_secs_f64() * 1e3,
        load.p99.as_secs_f64() * 1e3,
        load.errors
    )
}

pub(crate) const HEAD: &str =
    "| what | clients | per second | p50 ms | p99 ms | errors | |\n|---|---|---|---|---|---|---|";

/// The runtime of the load generator: one thread, since the members need the cores.
pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?)
}
