//! Connections to the endpoints of one port, shared by all its callers on one thread of the proxy. One carries many calls;
//! another is opened when the least busy has enough, since a connection is one task, and one socket's losses hold up all
//! that it carries.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{self, SendRequest};
use h2::{Ping, PingPong};
use nave_agent_core::balancer::{EndpointKey, EndpointSpec, Reach};
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::proxy::dial::reach;
use crate::proxy::route::Route;
use crate::proxy::stream::For;
use crate::proxy::workers::PerWorker;

/// Towards us, of each stream and of the whole: larger than towards callers, and never equal.
const STREAM_WINDOW: u32 = 512 * 1024;
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;
const SEND_BUFFER_BYTES: usize = 256 * 1024;
/// h2 counts 256 bytes for each small frame that waits to be read, and ends a connection that goes beyond. Its default
/// would end one for a single stream of small messages whose caller is slow; a stream's window holds
/// 58,000 frames of nine bytes (a message of four), which is 15 MB.
const FRAME_BUDGET_BYTES: usize = 32 * 1024 * 1024;
/// Calls on a connection from which on another is opened.
const CALLS_EACH: usize = 64;
/// From one thread to one endpoint; beyond, calls share these, and wait where the endpoint allows no more.
const CONNECTIONS_MAX: usize = 8;
/// An endpoint that holds calls is asked for a sign of life so often,
const PING_EVERY: Duration = Duration::from_secs(10);
/// and has so long to give it: a runtime that pauses to collect its garbage does not take longer.
const PONG_WITHIN: Duration = Duration::from_secs(20);
/// A connection without calls is closed after this.
const IDLE: Duration = Duration::from_secs(60);

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    endpoints: PerWorker<Mutex<BTreeMap<EndpointKey, Arc<Shared>>>>,
    tasks: TaskTracker,
}

/// Of one endpoint and one thread.
#[derive(Debug)]
struct Shared {
    reach: Reach,
    connections: Mutex<Vec<Arc<Connection>>>,
    /// One dial at a time: a burst does not open one connection for each of its calls.
    dialling: Semaphore,
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<Bytes>,
    calls: AtomicUsize,
    /// It takes no more calls.
    closed: AtomicBool,
    /// Calls that wait for room on it.
    stalled: AtomicUsize,
    last_call: Mutex<Instant>,
}

/// A place for one call on a connection.
#[derive(Debug)]
pub(super) struct Lease(Arc<Connection>);

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Relaxed);
        *self.0.last_call.lock() = Instant::now();
    }
}

impl Lease {
    fn new(connection: &Arc<Connection>) -> Self {
        connection.calls.fetch_add(1, Relaxed);
        Self(connection.clone())
    }

    pub(super) fn sender(&self) -> SendRequest<Bytes> {
        self.0.sender.clone()
    }

    /// Until it is dropped, new calls are put on other connections.
    pub(super) fn stalled(&self) -> Stalled<'_> {
        self.0.stalled.fetch_add(1, Relaxed);
        Stalled(&self.0)
    }

    /// Nothing more is to be sent on its connection.
    pub(super) fn retire(&self) {
        self.0.closed.store(true, Relaxed);
    }
}

/// See [`Lease::stalled`].
#[derive(Debug)]
pub(super) struct Stalled<'a>(&'a Connection);

impl Drop for Stalled<'_> {
    fn drop(&mut self) {
        self.0.stalled.fetch_sub(1, Relaxed);
    }
}

impl Pool {
    /// A place on a connection to the endpoint, which is opened when there is none with room.
    ///
    /// # Errors
    /// Nothing was sent: the endpoint was not reached within `within`.
    pub(super) async fn lease(
        &self,
        route: &Route,
        endpoint: &EndpointSpec,
        within: Duration,
    ) -> io::Result<Lease> {
        let shared = self.shared(endpoint);
        if let Some(lease) = shared.with_room() {
            return Ok(lease);
        }
        let _only_one = timeout(within, shared.dialling.acquire())
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "connect timed out"))?;
        // Who was before us may have opened one.
        if let Some(lease) = shared.with_room() {
            return Ok(lease);
        }
        match self.open(route, endpoint, within).await {
            Ok(connection) => {
                shared.connections.lock().push(connection.clone());
                Ok(Lease::new(&connection))
            }
            // One that is busy is better than none.
            Err(error) => shared.least_busy().ok_or(error),
        }
    }

    fn shared(&self, endpoint: &EndpointSpec) -> Arc<Shared> {
        let mut endpoints = self.endpoints.own().lock();
        if let Some(shared) = endpoints.get(&endpoint.key).filter(|shared| shared.reach == endpoint.reach) {
            return shared.clone();
        }
        let shared = Arc::new(Shared {
            reach: endpoint.reach.clone(),
            connections: Mutex::default(),
            dialling: Semaphore::new(1),
        });
        endpoints.insert(endpoint.key, shared.clone());
        shared
    }

    async fn open(
        &self,
        route: &Route,
        endpoint: &EndpointSpec,
        within: Duration,
    ) -> io::Result<Arc<Connection>> {
        // It carries the calls of many, each of whom was held against the service's list when it connected to us.
        let stream = reach(route, endpoint, For::Checked, within).await?;
        let mut builder = client::Builder::new();
        builder
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buffer_size(SEND_BUFFER_BYTES)
            .data_frame_budget(FRAME_BUDGET_BYTES)
            .enable_push(false);
        let handshake = timeout(within, builder.handshake(stream)).await;
        let (sender, mut driver) =
            handshake.map_err(|_| io::ErrorKind::TimedOut)?.map_err(io::Error::other)?;
        let pings = driver.ping_pong();
        let connection = Arc::new(Connection {
            sender,
            calls: AtomicUsize::default(),
            closed: AtomicBool::default(),
            stalled: AtomicUsize::default(),
            last_call: Mutex::new(Instant::now()),
        });
        let watched = connection.clone();
        self.tasks.spawn(async move {
            let end = tokio::select! {
                ended = driver => ended.map_or_else(|error| error.to_string(), |()| "closed".to_owned()),
                why = silence(pings, &watched) => why.to_owned(),
            };
            watched.closed.store(true, Relaxed);
            debug!(end, "a connection to an endpoint has ended");
        });
        Ok(connection)
    }

    /// Closes, once their calls are done, those to endpoints that are no longer there.
    pub(crate) fn keep(&self, there: impl Fn(EndpointKey) -> bool) {
        self.endpoints.all().for_each(|part| part.lock().retain(|key, _| there(*key)));
    }

    /// Forgets what has closed, and closes what is idle. To be called every second or so.
    pub(crate) fn sweep(&self) {
        let of_thread =
            |part: &Mutex<BTreeMap<_, Arc<Shared>>>| part.lock().values().cloned().collect::<Vec<_>>();
        for shared in self.endpoints.all().flat_map(of_thread) {
            shared.connections.lock().retain(|one| {
                let idle = one.calls.load(Relaxed) == 0 && one.last_call.lock().elapsed() > IDLE;
                !idle && !one.closed.load(Relaxed)
            });
        }
    }
}

impl Shared {
    /// The least busy, unless it has enough and another may be opened.
    fn with_room(&self) -> Option<Lease> {
        let connections = self.connections.lock();
        let open = || connections.iter().filter(|one| !one.closed.load(Relaxed));
        let least = open().min_by_key(|one| (one.stalled.load(Relaxed), one.calls.load(Relaxed)))?;
        let has_room = least.stalled.load(Relaxed) == 0
            && least.calls.load(Relaxed) < CALLS_EACH.min(least.sender.current_max_send_streams());
        (has_room || open().count() >= CONNECTIONS_MAX).then(|| Lease::new(least))
    }

    fn least_busy(&self) -> Option<Lease> {
        let connections = self.connections.lock();
        let open = connections.iter().filter(|one| !one.closed.load(Relaxed));
        open.min_by_key(|one| one.calls.load(Relaxed)).map(Lease::new)
    }
}

/// Returns when an endpoint that holds calls gives no sign of life: it would hold them for ever.
async fn silence(pings: Option<PingPong>, connection: &Connection) -> &'static str {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        sleep(PING_EVERY).await;
        if connection.calls.load(Relaxed) == 0 {
            continue;
        }
        match timeout(PONG_WITHIN, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The driver says more.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return "the endpoint does not answer pings",
        }
    }
}

/// So that a test can say what it waits for.
#[cfg(test)]
impl Pool {
    pub(super) fn connections(&self) -> usize {
        let count = |shared: &Arc<Shared>| shared.connections.lock().len();
        self.endpoints.all().map(|part| part.lock().values().map(count).sum::<usize>()).sum()
    }
}
