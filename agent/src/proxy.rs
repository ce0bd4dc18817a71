//! The proxy: calls made to a service's address on this host go to one of its endpoints, by the balancer's choice.
//!
//! It has threads of its own, so that neither a burst of the agent's work stalls traffic nor traffic the agent, and it
//! outlives the connection to a keeper. The directory says which services there are; the main loop says at once what
//! becomes of this host's own endpoints; `run` lets the keeper hold the listening sockets.

mod access;
mod dial;
mod http1;
mod http2;
mod identity;
mod listeners;
mod meter;
mod peers;
mod recent;
mod records;
mod route;
mod singles;
mod spans;
mod stream;
mod table;
mod tcp;
mod to;
mod tries;
#[cfg(test)]
mod two_hosts;
mod wire;
mod workers;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use futures::{Stream, StreamExt as _};
use nave_agent_core::balancer::EndpointKey;
use nave_agent_core::directory::{Host, Protocol, Service};
use nave_proto::ids::{HostId, InstanceId};
use nave_tls::{ClientPolicy, Credentials, IncomingLimits, PeerIdentity, TlsConnection};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

pub(crate) use access::AccessLog;
pub(crate) use meter::Routes;
pub(crate) use recent::Recent;
pub(crate) use records::Records;
pub(crate) use table::LocalWord;

use crate::directory::Asks;
use crate::keeper::{CallError, KeeperHandle};
use crate::notes::Notes;
use identity::Attestor;
use listeners::{Ends, Listeners};
use peers::Peers;
use table::Table;
use workers::Workers;

/// Of the machine's cores, for the proxy: a quarter, so that it never owns the host.
const CORES_DIVISOR: usize = 4;
const WORKERS_MIN: usize = 2;
/// When the agent is told to end, TCP streams are given so long, while connections are still taken;
const STREAMS_MAY_END: Duration = Duration::from_secs(3);
/// then requests so long, while new connections wait for the next agent. Together less than the keeper's ten seconds.
const REQUESTS_MAY_END: Duration = Duration::from_secs(5);
/// Of no request at all before connections without one are closed: callers close theirs first, once they were told.
const QUIET: Duration = Duration::from_millis(100);
/// Between two looks for connections to endpoints that nobody uses.
const SWEEP: Duration = Duration::from_secs(1);
/// Between two looks at what is under way.
const LOOK: Duration = Duration::from_millis(10);
/// For what was cut to let go of its sockets.
const CUT: Duration = Duration::from_millis(200);
/// Sockets of the agent before that nobody has asked for since belong to services that are gone.
const INHERITED_FOR: Duration = Duration::from_secs(30);
/// Connections that were taken on the proxy's threads and are for the agent's API: taken up at once, or it is too busy.
const HANDED_OUT: usize = 64;
/// Of the agent's own port, on each thread. Other hosts' calls of HTTP/1.1 hold a connection each while they last.
const LIMITS: IncomingLimits =
    IncomingLimits { handshakes: 64, handshake_timeout: Duration::from_secs(5), connections: 8192 };
/// Between two tries to get an address that another program had.
const RETRY_ADDRESSES: Duration = Duration::from_secs(10);

/// How the proxy begins.
#[derive(Debug, Clone)]
pub(crate) struct ProxyConfig {
    /// First half of the services' addresses.
    pub(crate) prefix: [u8; 2],
    pub(crate) own_host: HostId,
    /// Threads; 0: a quarter of the machine's cores, at least two.
    pub(crate) workers: usize,
    /// Where ports that had to be chosen are remembered.
    pub(crate) ports_file: PathBuf,
    /// Where addresses of single instances are remembered.
    pub(crate) singles_file: PathBuf,
    /// What a scrape reads.
    pub(crate) routes: Routes,
    /// What is noted of each call.
    pub(crate) records: Arc<Records>,
    /// What this host's people are told.
    pub(crate) notes: Notes,
    /// With which other agents know this one; none: there are no other hosts.
    pub(crate) credentials: Option<Credentials>,
    /// This host's name, and the directories of all its services' cgroups if there are any.
    pub(crate) attest: (String, Vec<PathBuf>),
}

/// For everybody who has to say something to the proxy. No method waits, but those that say so.
#[derive(Debug, Clone)]
pub(crate) struct Proxy {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    table: Table,
    listeners: Listeners,
    attestor: Arc<Attestor>,
    /// Table and listeners hear of changes in the same order.
    changes: Mutex<()>,
    /// The agent's own port is served.
    accepts: AtomicBool,
    handed_out: ArcSwapOption<mpsc::Sender<TlsConnection>>,
    ended: watch::Receiver<bool>,
}

impl Shared {
    /// Lets what is under way come to its end, in this order: no answer leaves its connection open; streams end; no new
    /// connection is taken; requests end. What is left is cut.
    async fn drain(&self, ends: &Ends) {
        let (streams, requests) =
            (|protocol| protocol == Protocol::Tcp, |protocol| protocol != Protocol::Tcp);
        let _until_then = tokio::time::timeout(STREAMS_MAY_END, self.quiet(streams, Duration::ZERO)).await;
        ends.deaf.cancel();
        let _until_then = tokio::time::timeout(REQUESTS_MAY_END, self.quiet(requests, QUIET)).await;
        let cut = self.table.under_way(|_| true);
        if cut > 0 {
            warn!(streams_and_requests = cut, "what did not end in time is cut");
        }
        ends.tasks.close();
        ends.force.cancel();
        let _cut = tokio::time::timeout(CUT, ends.tasks.wait()).await;
    }

    /// Until the stream ends. What nobody takes is closed.
    async fn take(self: Arc<Self>, incoming: impl Stream<Item = std::io::Result<TlsConnection>>) {
        let mut incoming = std::pin::pin!(incoming);
        while let Some(Ok(connection)) = incoming.next().await {
            let protocol = connection.protocol().unwrap_or_default().to_vec();
            if protocol != peers::HTTP1 && protocol != peers::STREAM {
                self.hand_out(connection);
                continue;
            }
            let identity = connection.info().identity.as_ref().and_then(PeerIdentity::valid);
            let Some(host) = identity.and_then(PeerIdentity::agent) else {
                warn!(peer = ?connection.info(), "only agents may call services of another host: refused");
                continue;
            };
            debug!(%host, "another agent is connected");
            let shared = self.clone();
            let closes = self.listeners.deaf();
            self.listeners.serve(move |last_answers| async move {
                let find = |service: &str, port: &str| shared.table.find(service, port);
                match protocol == peers::HTTP1 {
                    true => {
                        let ending = http1::Ending { last_answers, closes };
                        Box::pin(http1::serve_peer(connection, find, ending)).await;
                    }
                    false => Box::pin(stream::serve_peer(connection, find)).await,
                }
            });
        }
    }

    /// To whoever serves the agent's API, unless there is nobody or it is too busy.
    fn hand_out(&self, connection: TlsConnection) {
        let taker = self.handed_out.load();
        if taker.as_ref().is_none_or(|taker| taker.try_send(connection).is_err()) {
            debug!("nobody takes a connection for the agent's API: closed");
        }
    }

    /// Nothing of these protocols has been under way for so long.
    async fn quiet(&self, of: impl Fn(Protocol) -> bool, length: Duration) {
        let mut since = Instant::now();
        loop {
            if self.table.under_way(&of) > 0 {
                since = Instant::now();
            } else if since.elapsed() >= length {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

impl Proxy {
    /// Begins threads that serve until `shutdown`, and then until what is under way is done or its time has passed.
    ///
    /// # Errors
    /// No thread can be started.
    pub(crate) fn start(config: ProxyConfig, shutdown: CancellationToken) -> std::io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let count = match config.workers {
            0 => cores.div_ceil(CORES_DIVISOR).max(WORKERS_MIN),
            workers => workers,
        };
        let stop = CancellationToken::new();
        let (workers, threads) = Workers::start(count, &stop)?;
        let ends = Ends {
            drain: shutdown,
            deaf: CancellationToken::new(),
            force: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        let (tell_ended, ended) = watch::channel(false);
        let attestor = Arc::new(Attestor::new(&config.attest.0, config.attest.1));
        let listeners = Listeners::new(workers.clone(), ends.clone(), config.ports_file, attestor.clone())
            .with_notes(config.notes);
        let peers = Arc::new(config.credentials.map(Peers::new).unwrap_or_default());
        let table = Table::new(config.prefix, config.own_host, config.routes, peers);
        let table = table.with_records(config.records).with_singles(config.singles_file);
        let shared = Arc::new(Shared {
            table,
            listeners,
            attestor,
            changes: Mutex::default(),
            accepts: AtomicBool::default(),
            handed_out: ArcSwapOption::default(),
            ended,
        });
        let (swept, until) = (shared.clone(), ends.force.clone());
        let sweep = async move {
            let mut tick = tokio::time::interval(SWEEP);
            while until.run_until_cancelled(tick.tick()).await.is_some() {
                swept.table.sweep();
            }
        };
        // It holds the sockets too, so its end is waited for like the connections'.
        ends.tasks.spawn_on(sweep, workers.first());
        let (watched, first) = (shared.clone(), workers.first().clone());
        std::thread::Builder::new().name("nave-proxy-end".to_owned()).spawn(move || {
            first.block_on(async {
                ends.drain.cancelled().await;
                watched.drain(&ends).await;
            });
            stop.cancel();
            threads.into_iter().for_each(|thread| thread.join().unwrap_or_default());
            let _nobody_waits = tell_ended.send(true);
        })?;
        info!(workers = count, "the proxy begins");
        Ok(Self { shared })
    }

    /// The service is now this.
    pub(crate) fn put(&self, service: Arc<Service>) {
        let name = service.name.clone();
        let _in_order = self.shared.changes.lock();
        let wanted = self.shared.table.put(service);
        self.shared.listeners.want(&name, wanted);
    }

    /// The service is gone.
    pub(crate) fn remove(&self, service: &str) {
        let _in_order = self.shared.changes.lock();
        self.shared.listeners.unwant(service);
        self.shared.table.remove(service);
    }

    /// The other agents, and where they are reached.
    pub(crate) fn hosts(&self, hosts: Vec<Host>) {
        self.shared.table.peers.set(&hosts);
    }

    /// Which services have a uid of their own on this host: without cgroup2, callers are told by that.
    pub(crate) fn users(&self, users: BTreeMap<u32, Arc<str>>) {
        self.shared.attestor.set_users(users);
    }

    /// Takes the connections of the agent's own port on the proxy's threads, from now on until no new connection is
    /// taken: calls from other hosts are served there, every other connection is handed out. Once is enough.
    ///
    /// # Errors
    /// The listener cannot change its runtime, or no descriptor is left.
    pub(crate) fn accept(&self, listener: TcpListener, credentials: &Credentials) -> std::io::Result<()> {
        if self.shared.accepts.swap(true, Relaxed) {
            return Ok(());
        }
        let config = nave_tls::server_config_of(
            credentials,
            ClientPolicy::default(),
            &[b"h2", peers::HTTP1, peers::STREAM],
        );
        let listener = listener.into_std()?;
        let listeners = &self.shared.listeners;
        // A TLS connection stays with the thread that took it, so each takes its own.
        for thread in listeners.threads() {
            let (listener, config, shared) = (listener.try_clone()?, config.clone(), self.shared.clone());
            let take = async move {
                match TcpListener::from_std(listener) {
                    Ok(listener) => {
                        let deaf = shared.listeners.deaf();
                        shared.take(nave_tls::incoming(listener, config, LIMITS, deaf)).await
                    }
                    Err(error) => warn!(%error, "the agent's own port cannot be served"),
                }
            };
            // Owned by the tracker of everything that is served.
            drop(listeners.spawn(take, thread));
        }
        Ok(())
    }

    /// Connections of the agent's own port that are no calls, from now on; nobody else gets them any more.
    pub(crate) fn handed_out(&self) -> mpsc::Receiver<TlsConnection> {
        let (taker, handed_out) = mpsc::channel(HANDED_OUT);
        self.shared.handed_out.store(Some(Arc::new(taker)));
        handed_out
    }

    /// Where callers on this host find the service's ports, by name; empty while that is not known.
    pub(crate) fn addresses(&self, service: &str) -> BTreeMap<String, SocketAddr> {
        self.shared.listeners.addresses(service, None)
    }

    /// The address on this host that leads to the instance of this ordinal alone, wherever it is; `None`: nobody knows
    /// such an instance. It is made when it is first asked for, and stays the same from then on.
    pub(crate) fn single(&self, service: &str, ordinal: u32) -> Option<Ipv4Addr> {
        let _in_order = self.shared.changes.lock();
        let single = self.shared.table.single(service, ordinal)?;
        if let Some((name, wanted)) = single.news {
            self.shared.listeners.want(&name, wanted);
        }
        Some(single.address)
    }

    /// Its ports, by name.
    pub(crate) fn single_addresses(&self, service: &str, ordinal: u32) -> BTreeMap<String, SocketAddr> {
        self.shared.listeners.addresses(service, Some(ordinal))
    }

    /// What the main loop knows of an endpoint of this host. It takes effect before this returns.
    pub(crate) fn local(&self, service: &str, instance: InstanceId, epoch: u64, word: LocalWord) {
        self.shared.table.local(service, EndpointKey { instance, epoch }, word);
    }

    /// Its process has ended: nobody gets it any more.
    pub(crate) fn local_gone(&self, instance: InstanceId, epoch: u64) {
        let key = EndpointKey { instance, epoch };
        if let Some(service) = self.shared.table.service_of(key) {
            self.shared.table.local(&service, key, LocalWord::Gone);
        }
    }

    /// Services that are called and of which no endpoint is known.
    pub(crate) fn asks(&self) -> Asks {
        self.shared.table.asks()
    }

    /// Calls of this host under way to an instance.
    pub(crate) fn in_flight(&self, instance: InstanceId) -> u64 {
        self.shared.table.in_flight(instance)
    }

    /// Takes the listening sockets that the keeper holds, then has it hold those that there are, for as long as it is
    /// there; with the next keeper this is to be called again.
    pub(crate) async fn keep_with(&self, keeper: KeeperHandle) -> CallError {
        match self.keep(&keeper).await {
            // The next keeper may hold them still, and then they cannot be opened anew.
            Err(CallError::Lost) => CallError::Lost,
            // One that cannot hold them holds none: sockets that end with the agent are better than no sockets.
            Err(error) => {
                self.shared.listeners.adopt(BTreeMap::new());
                error
            }
            Ok(never) => match never {},
        }
    }

    async fn keep(&self, keeper: &KeeperHandle) -> Result<std::convert::Infallible, CallError> {
        let listeners = &self.shared.listeners;
        let mut held: BTreeSet<String> = BTreeSet::new();
        let mut inherited = BTreeMap::new();
        for name in keeper.descriptors().await? {
            if listeners::is_ours(&name) {
                inherited.insert(name.clone(), keeper.take_descriptor(name.clone()).await?);
                held.insert(name);
            }
        }
        listeners.adopt(inherited);
        let let_go = tokio::time::sleep(INHERITED_FOR);
        tokio::pin!(let_go);
        let mut retry = tokio::time::interval(RETRY_ADDRESSES);
        let mut refused = BTreeSet::new();
        loop {
            self.bring(keeper, &mut held, &mut refused).await?;
            tokio::select! {
                () = listeners.changed() => {}
                () = &mut let_go, if !let_go.is_elapsed() => listeners.let_go(),
                _ = retry.tick() => listeners.retry(),
            }
        }
    }

    /// The keeper holds what is open, and nothing else.
    async fn bring(
        &self,
        keeper: &KeeperHandle,
        held: &mut BTreeSet<String>,
        refused: &mut BTreeSet<String>,
    ) -> Result<(), CallError> {
        let kept = match self.shared.listeners.kept() {
            Ok(kept) => kept,
            Err(error) => {
                warn!(%error, "no descriptor is left to keep listening sockets with");
                return Ok(());
            }
        };
        let gone: Vec<String> = held.iter().filter(|name| !kept.contains_key(*name)).cloned().collect();
        for name in gone {
            keeper.drop_descriptor(name.clone()).await.or_else(not_there)?;
            held.remove(&name);
        }
        for (name, socket) in kept {
            if held.contains(&name) {
                continue;
            }
            match keeper.store_descriptor(name.clone(), socket).await {
                Ok(()) => {
                    held.insert(name);
                }
                Err(CallError::Lost) => return Err(CallError::Lost),
                Err(error) if refused.insert(name.clone()) => {
                    warn!(
                        name,
                        ?error,
                        "the keeper does not hold a listening socket: a restart refuses its callers"
                    );
                }
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Waits until the proxy has ended, after its shutdown.
    pub(crate) async fn ended(&self) {
        let mut ended = self.shared.ended.clone();
        let _thread_is_gone = ended.wait_for(|ended| *ended).await;
    }
}

/// What is not there need not be dropped.
fn not_there(error: CallError) -> Result<(), CallError> {
    match error {
        CallError::Lost => Err(CallError::Lost),
        CallError::Refused(_) | CallError::Unsupported => Ok(()),
    }
}

#[cfg(test)]
mod tests;
