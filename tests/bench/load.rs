//! A closed-loop load: N clients, each with one call under way, for a fixed time after a warm-up.

mod connection;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use nave_tests::process::cpu_seconds;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

pub(crate) use self::connection::Connection;
use self::connection::Ended;

/// What one run measured.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) per_second: f64,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    pub(crate) errors: usize,
    /// For each call, microseconds: our own first, then of each process that was watched.
    pub(crate) cpu_us: Vec<f64>,
}

const WARM_UP: Duration = Duration::from_secs(2);
const MEASURED: Duration = Duration::from_secs(8);

/// Connections that `clients` share: enough to use both cores, few enough that neither side spends itself on sockets.
pub(crate) fn connections(clients: usize) -> usize {
    clients.clamp(1, 8)
}

/// Of one call: who makes it, and its number among theirs; the message is put at the end of what is given.
pub(crate) trait Messages: Fn(usize, u64, &mut Vec<u8>) + Send + Sync + 'static {}
impl<F: Fn(usize, u64, &mut Vec<u8>) + Send + Sync + 'static> Messages for F {}

/// Runs a closed loop of `clients`, dealt out to the connections: each client has one call under way at a time, of the
/// message that `messages` makes. `watched` are the processes whose CPU time is counted, beside our own.
pub(crate) async fn closed_loop<S>(
    clients: usize,
    connections: Vec<Connection<S>>,
    messages: impl Messages,
    watched: &[u32],
) -> anyhow::Result<Load>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let messages = Arc::new(messages);
    let phase = Arc::new(AtomicU8::new(WARMING_UP));
    let mut tasks = tokio::task::JoinSet::new();
    let step = connections.len();
    for (first, connection) in connections.into_iter().enumerate() {
        let mine = (first..clients).step_by(step).map(Client::new).collect();
        tasks.spawn(drive(connection, mine, messages.clone(), phase.clone()));
    }
    tokio::time::sleep(WARM_UP).await;
    let cpu = || std::iter::once(std::process::id()).chain(watched.iter().copied()).map(cpu_seconds);
    let before: Vec<f64> = cpu().collect();
    phase.store(MEASURING, Ordering::Relaxed);
    let began = Instant::now();
    tokio::time::sleep(MEASURED).await;
    phase.store(OVER, Ordering::Relaxed);
    let took = began.elapsed();
    let used: Vec<f64> = before.iter().zip(cpu()).map(|(before, after)| after - before).collect();
    let mut all = Times::default();
    while let Some(done) = tasks.join_next().await {
        let Times { times, errors } = done.context("a connection's task")??;
        all.times.extend(times);
        all.errors += errors;
    }
    Ok(summary(all, took, &used))
}

const WARMING_UP: u8 = 0;
const MEASURING: u8 = 1;
const OVER: u8 = 2;

/// One who waits for an answer before asking again.
struct Client {
    number: usize,
    calls: u64,
    began: Instant,
}

impl Client {
    fn new(number: usize) -> Self {
        Self { number, calls: 0, began: Instant::now() }
    }
}

#[derive(Default)]
struct Times {
    times: Vec<Duration>,
    errors: usize,
}

/// All clients of one connection, until the measuring is over and the last answer is there.
async fn drive<S: AsyncRead + AsyncWrite + Unpin>(
    mut connection: Connection<S>,
    mut clients: Vec<Client>,
    messages: Arc<impl Messages>,
    phase: Arc<AtomicU8>,
) -> anyhow::Result<Times> {
    let mut all = Times { times: Vec::with_capacity(1 << 16), errors: 0 };
    let mut waiting: Vec<usize> = (0..clients.len()).collect();
    let (mut message, mut ended) = (Vec::new(), Vec::new());
    loop {
        let now = phase.load(Ordering::Relaxed);
        while now != OVER
            && let Some(place) = waiting.last().copied()
        {
            let client = &mut clients[place];
            message.clear();
            messages(client.number, client.calls + 1, &mut message);
            client.began = Instant::now();
            if !connection.call(place, &message)? {
                break;
            }
            client.calls += 1;
            waiting.pop();
        }
        if connection.under_way() == 0 {
            return Ok(all);
        }
        connection.exchange(&mut ended).await?;
        let measuring = phase.load(Ordering::Relaxed) == MEASURING;
        for Ended { caller: place, ok } in ended.drain(..) {
            waiting.push(place);
            match ok {
                _ if !measuring => {}
                true => all.times.push(clients[place].began.elapsed()),
                false => all.errors += 1,
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of calls stay far below 2^52")]
fn summary(Times { mut times, errors }: Times, took: Duration, used: &[f64]) -> Load {
    times.sort_unstable();
    let at =
        |share: usize| times.get(times.len().saturating_sub(1) * share / 100).copied().unwrap_or_default();
    let calls = times.len().max(1) as f64;
    Load {
        per_second: times.len() as f64 / took.as_secs_f64(),
        p50: at(50),
        p99: at(99),
        errors,
        cpu_us: used.iter().map(|seconds| seconds * 1e6 / calls).collect(),
    }
}

/// A row of the table.
pub(crate) fn row(what: &str, clients: usize, load: &Load, more: &str) -> String {
    let each = |of: &[f64]| of.iter().map(|us| format!("{us:.1}")).collect::<Vec<_>>().join(" ");
    let (own, watched) = load.cpu_us.split_at(1);
    format!(
        "| {what} | {clients} | {:.0} | {:.2} | {:.2} | {} | {} | {} | {more} |",
        load.per_second,
        load.p50.as_secs_f64() * 1e3,
        load.p99.as_secs_f64() * 1e3,
        load.errors,
        each(watched),
        each(own),
    )
}

pub(crate) const HEAD: &str = "| what | clients | per second | p50 ms | p99 ms | errors | members' CPU µs per call, the leader first | the generator's | |\n|---|---|---|---|---|---|---|---|---|";

/// The runtime of the load generator: one thread, since the members need the cores.
pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?)
}
