//! The sockets on which callers find services: one for each port, on the service's own address. Where that cannot be
//! had, on a port above 10,000 of the same address, which stays the same for as long as the host does, and the log says
//! who has the right one; it is taken as soon as it is free.
//!
//! The keeper holds a second end of each, so that none closes with the agent: callers that come while there is no agent
//! wait in the socket's backlog for the next one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use nave_agent_core::directory::Protocol;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::identity::Attestor;
use super::meter::Refusal;
use super::route::{Caller, Route};
use super::table::Wanted;
use super::workers::Workers;
use super::{http1, http2, tcp};
use crate::executor::ports::holder_or_other;
use crate::notes::Notes;

/// Callers that wait while no agent takes them.
const BACKLOG: u32 = 4096;
/// Outside the instances' own ports and the kernel's ephemeral ones.
const HIGH_FIRST: u16 = 10_000;
const HIGH_COUNT: u16 = 10_000;
/// Tries to find a free one, each on the next port.
const HIGH_TRIES: u16 = 64;
/// After an accept that failed for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What the keeper calls them.
const NAME_PREFIX: &str = "proxy/";

/// How connections are served and ended.
#[derive(Debug, Clone)]
pub(crate) struct Ends {
    /// No answer leaves its connection open.
    pub(crate) drain: CancellationToken,
    /// No new connections: they wait for the next agent.
    pub(crate) deaf: CancellationToken,
    /// What is still under way is cut.
    pub(crate) force: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

#[derive(Debug)]
pub(crate) struct Listeners {
    workers: Workers,
    ends: Ends,
    attestor: Arc<Attestor>,
    /// Where the high ports are remembered.
    high_file: PathBuf,
    /// Who is told which addresses could not be had.
    notes: Notes,
    inner: Mutex<Inner>,
    /// For whoever keeps them with the keeper.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    /// Not before the keeper has said what it holds: a port that it holds cannot be bound again.
    adopted: bool,
    inherited: BTreeMap<String, OwnedFd>,
    wanted: BTreeMap<Arc<str>, Vec<Wanted>>,
    /// By the address that is bound.
    open: BTreeMap<SocketAddr, Open>,
    /// By the address that could not be had.
    high: BTreeMap<SocketAddr, u16>,
    complained: BTreeSet<SocketAddr>,
}

#[derive(Debug)]
struct Open {
    /// Which address it stands for: its own, or the one that could not be had.
    proper: SocketAddr,
    route: Arc<ArcSwap<Route>>,
    kept: OwnedFd,
    closed: CancellationToken,
}

impl Listeners {
    pub(crate) fn new(workers: Workers, ends: Ends, high_file: PathBuf, attestor: Arc<Attestor>) -> Self {
        let high = read_high(&high_file);
        let inner = Mutex::new(Inner { high, ..Inner::default() });
        let (notes, changed) = Default::default();
        Self { workers, ends, attestor, high_file, notes, inner, changed }
    }

    pub(crate) fn with_notes(self, notes: Notes) -> Self {
        Self { notes, ..self }
    }

    pub(crate) fn threads(&self) -> impl Iterator<Item = &Handle> {
        self.workers.runtimes()
    }

    /// On this thread of the proxy's, until it has come to its end or everything is cut.
    pub(crate) fn spawn(
        &self,
        task: impl Future<Output = ()> + Send + 'static,
        thread: &Handle,
    ) -> JoinHandle<()> {
        let force = self.ends.force.clone();
        let task = async move {
            tokio::select! {
                () = task => {}
                () = force.cancelled() => {}
            }
        };
        self.ends.tasks.spawn_on(task, thread)
    }

    /// When no new connection is taken any more: callers wait for the next agent.
    pub(crate) fn deaf(&self) -> CancellationToken {
        self.ends.deaf.clone()
    }

    /// The same on the thread that asks, for something that is told when no answer may leave its connection open.
    pub(crate) fn serve<F, T>(&self, task: F)
    where
        F: FnOnce(CancellationToken) -> T,
        T: Future<Output = ()> + Send + 'static,
    {
        // Owned by the tracker; nobody waits for one connection.
        drop(self.spawn(task(self.ends.drain.clone()), &Handle::current()));
    }

    /// Callers of the service are to find these.
    pub(crate) fn want(&self, service: &Arc<str>, wanted: Vec<Wanted>) {
        let mut inner = self.inner.lock();
        inner.wanted.insert(service.clone(), wanted);
        self.settle(&mut inner, service);
    }

    /// Nobody is to find the service any more.
    pub(crate) fn unwant(&self, service: &str) {
        let mut inner = self.inner.lock();
        inner.wanted.remove(service);
        inner.open.retain(|_, open| {
            let stays = *open.route.load().service != *service;
            if !stays {
                open.closed.cancel();
            }
            stays
        });
        self.forget(&mut inner);
        self.changed.notify_one();
    }

    /// Complaints of addresses that nobody wants any more.
    fn forget(&self, inner: &mut Inner) {
        let Inner { complained, wanted, .. } = inner;
        complained.retain(|address| {
            let stays = wanted.values().flatten().any(|one| one.address == *address);
            if !stays {
                self.notes.unsay(&about(*address));
            }
            stays
        });
    }

    /// What the keeper holds from the agent before; from now on sockets are opened.
    pub(crate) fn adopt(&self, inherited: BTreeMap<String, OwnedFd>) {
        let mut inner = self.inner.lock();
        if !inner.adopted {
            inner.inherited = inherited;
        }
        inner.adopted = true;
        let services: Vec<Arc<str>> = inner.wanted.keys().cloned().collect();
        services.iter().for_each(|service| self.settle(&mut inner, service));
    }

    /// What nobody has wanted by now belongs to services that are gone.
    pub(crate) fn let_go(&self) {
        self.inner.lock().inherited.clear();
        self.changed.notify_one();
    }

    /// Addresses that somebody else had are tried again.
    pub(crate) fn retry(&self) {
        let mut inner = self.inner.lock();
        let services: Vec<Arc<str>> = inner.wanted.keys().cloned().collect();
        services.iter().for_each(|service| self.settle(&mut inner, service));
    }

    /// Everything that is open or not yet given up, by the name under which the keeper is to hold it.
    pub(crate) fn kept(&self) -> io::Result<BTreeMap<String, OwnedFd>> {
        let inner = self.inner.lock();
        let open = inner.open.iter().map(|(address, open)| (name(*address), &open.kept));
        let inherited = inner.inherited.iter().map(|(name, kept)| (name.clone(), kept));
        open.chain(inherited).map(|(name, kept)| Ok((name, kept.try_clone()?))).collect()
    }

    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Where callers on this host find the ports of the service, or of a single instance of it, by name.
    pub(crate) fn addresses(&self, service: &str, single: Option<u32>) -> BTreeMap<String, SocketAddr> {
        let inner = self.inner.lock();
        let mut addresses = BTreeMap::new();
        let wanted = inner.wanted.get(service).into_iter().flatten();
        for wanted in wanted.filter(|wanted| wanted.route.single == single) {
            let own = inner.open.contains_key(&wanted.address).then_some(wanted.address);
            let stands_for =
                |(bound, open): (&SocketAddr, &Open)| (open.proper == wanted.address).then_some(*bound);
            if let Some(address) = own.or_else(|| inner.open.iter().find_map(stands_for)) {
                addresses.insert(wanted.route.port.to_string(), address);
            }
        }
        addresses
    }

    fn settle(&self, inner: &mut Inner, service: &Arc<str>) {
        let wanted = inner.wanted.get(service).cloned().unwrap_or_default();
        inner.open.retain(|_, open| {
            let is_other = open.route.load().service != *service;
            let stays = is_other || wanted.iter().any(|one| one.address == open.proper);
            if !stays {
                open.closed.cancel();
            }
            stays
        });
        self.forget(inner);
        if inner.adopted {
            wanted.iter().for_each(|one| self.ensure(inner, one));
        }
        self.changed.notify_one();
    }

    fn ensure(&self, inner: &mut Inner, wanted: &Wanted) {
        let mut has_high = false;
        for (address, open) in &inner.open {
            if open.proper == wanted.address {
                open.route.store(wanted.route.clone());
                has_high |= *address != wanted.address;
            }
        }
        if inner.open.contains_key(&wanted.address) {
            return;
        }
        let why = match self.listener(inner, wanted.address) {
            Ok(listener) => {
                if inner.complained.remove(&wanted.address) {
                    self.notes.unsay(&about(wanted.address));
                    info!(service = %wanted.route.service, address = %wanted.address, "the address is free now");
                }
                return self.open(inner, listener, wanted);
            }
            Err(why) => why,
        };
        if has_high {
            return;
        }
        match self.high(inner, wanted.address) {
            Some(listener) => {
                let instead = listener.local_addr().ok();
                self.open(inner, listener, wanted);
                if inner.complained.insert(wanted.address) {
                    self.complain(wanted, instead, &why);
                }
            }
            None if inner.complained.insert(wanted.address) => self.complain(wanted, None, &why),
            None => {}
        }
    }

    /// The socket at this address: the one from before, or a new one.
    fn listener(&self, inner: &mut Inner, address: SocketAddr) -> io::Result<StdListener> {
        if let Some(kept) = inner.inherited.remove(&name(address)) {
            let listener = StdListener::from(kept);
            if listener.local_addr().is_ok_and(|own| own == address) {
                listener.set_nonblocking(true)?;
                return Ok(listener);
            }
        }
        let _in_runtime = self.workers.first().enter();
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)?.into_std()
    }

    /// Another port of the same address, the same as the last time where that is possible.
    fn high(&self, inner: &mut Inner, proper: SocketAddr) -> Option<StdListener> {
        let remembered = inner.high.get(&proper).copied();
        let first = remembered.unwrap_or_else(|| high_port(proper, 0));
        for number in (0..HIGH_TRIES).map(|step| if step == 0 { first } else { high_port(proper, step) }) {
            let Ok(listener) = self.listener(inner, SocketAddr::new(proper.ip(), number)) else { continue };
            if remembered != Some(number) {
                inner.high.insert(proper, number);
                if let Err(error) = write_high(&self.high_file, &inner.high) {
                    warn!(%error, file = %self.high_file.display(), "cannot remember a port");
                }
            }
            return Some(listener);
        }
        None
    }

    /// Says who lost which address to whom.
    fn complain(&self, wanted: &Wanted, instead: Option<SocketAddr>, why: &io::Error) {
        let (service, address) = (&wanted.route.service, wanted.address);
        let found = match instead {
            Some(instead) => format!("{service} is found at {instead} instead of {address}"),
            None => format!("{service} is not found on this host: {address} cannot be had"),
        };
        let sentence = match why.kind() {
            io::ErrorKind::AddrInUse => {
                let holder = holder_or_other(address.port());
                format!("{found}: {holder} has port {}", address.port())
            }
            io::ErrorKind::PermissionDenied => {
                warn!(%service, %address, "{found}: this agent may not listen below port 1024");
                // One sentence for all: without the right it is so for every service of the web.
                let all = "services with ports below 1024 are found on others (`nave url`): this agent may not listen there";
                return self.notes.say("port/low", all.to_owned());
            }
            _ => format!("{found}: {why}"),
        };
        warn!(%service, %address, "{sentence}");
        self.notes.say(&about(address), sentence);
    }

    fn open(&self, inner: &mut Inner, listener: StdListener, wanted: &Wanted) {
        let thread = self.workers.nth(inner.open.len());
        let opened = (|| {
            let _in_runtime = thread.enter();
            let bound = listener.local_addr()?;
            let kept = listener.as_fd().try_clone_to_owned()?;
            Ok::<_, io::Error>((bound, kept, TcpListener::from_std(listener)?))
        })();
        let (bound, kept, listener) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                warn!(service = %wanted.route.service, %error, "cannot listen");
                return;
            }
        };
        debug!(service = %wanted.route.service, address = %bound, "listening");
        let route = Arc::new(ArcSwap::new(wanted.route.clone()));
        let closed = CancellationToken::new();
        let host =
            Host { ends: self.ends.clone(), attestor: self.attestor.clone(), workers: self.workers.clone() };
        self.ends.tasks.spawn_on(accept(listener, route.clone(), closed.clone(), host), thread);
        inner.open.insert(bound, Open { proper: wanted.address, route, kept, closed });
    }
}

/// Of a note.
fn about(address: SocketAddr) -> String {
    format!("port/{address}")
}

/// What every new connection needs.
#[derive(Debug)]
struct Host {
    ends: Ends,
    attestor: Arc<Attestor>,
    workers: Workers,
}

async fn accept(listener: TcpListener, route: Arc<ArcSwap<Route>>, closed: CancellationToken, host: Host) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = closed.cancelled() => return,
            () = host.ends.deaf.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => host.begin(route.load_full(), stream, peer),
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                warn!(service = %route.load().service, %error, "cannot take a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
}

impl Host {
    /// Serves a connection by its port's protocol, on the thread that has the fewest, unless there are too many.
    fn begin(&self, route: Arc<Route>, stream: TcpStream, peer: SocketAddr) {
        let Some(place) = route.connection() else {
            route.meter.refused(Refusal::Connections);
            return;
        };
        let caller = match stream.local_addr() {
            Ok(local) => self.attestor.caller(peer, local),
            Err(_) => Caller::Unknown,
        };
        if route.protocol != Protocol::Http && !route.allows(&caller) {
            // Nothing could be said to it in its protocol.
            route.meter.refused(Refusal::NotAllowed);
            return;
        }
        let open = route.meter.caller(&caller).connection();
        let (seat, ends) = (self.workers.seat(), self.ends.clone());
        let thread = seat.runtime().clone();
        let stream = stream.into_std();
        let task = async move {
            let _held = (place, open, seat);
            // Otherwise it is gone already.
            let Ok(stream) = stream.and_then(watched) else { return };
            tokio::select! {
                () = serve(route, stream, caller, ends.drain) => {}
                () = ends.force.cancelled() => {}
            }
        };
        self.ends.tasks.spawn_on(task, &thread);
    }
}

/// By the thread that this runs on.
fn watched(stream: StdStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    TcpStream::from_std(stream)
}

async fn serve(route: Arc<Route>, stream: TcpStream, caller: Caller, drain: CancellationToken) {
    match route.protocol {
        Protocol::Http => Box::pin(http1::serve(route, stream, caller, drain)).await,
        Protocol::Http2 | Protocol::Grpc => Box::pin(http2::serve(route, stream, caller, drain)).await,
        // Its streams have no end that could be waited for: they go on until they are cut.
        Protocol::Tcp => Box::pin(tcp::serve(route, stream, caller)).await,
    }
}

fn name(address: SocketAddr) -> String {
    format!("{NAME_PREFIX}{address}")
}

/// Whether the keeper holds it for the proxy.
pub(crate) fn is_ours(name: &str) -> bool {
    name.starts_with(NAME_PREFIX)
}

/// The same for the same address on every host; `step` for the next ones.
fn high_port(proper: SocketAddr, step: u16) -> u16 {
    let IpBytes(bytes) = IpBytes::of(proper);
    let hash =
        bytes.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    let offset = (hash.wrapping_add(u32::from(step))) % u32::from(HIGH_COUNT);
    HIGH_FIRST + u16::try_from(offset).expect("less than 10,000")
}

struct IpBytes(Vec<u8>);

impl IpBytes {
    /// Not the prefix: it differs between agents of one machine.
    fn of(address: SocketAddr) -> Self {
        let mut bytes = match address.ip() {
            std::net::IpAddr::V4(ip) => ip.octets()[2..].to_vec(),
            std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        bytes.extend(address.port().to_be_bytes());
        Self(bytes)
    }
}

/// A line for each: the address that could not be had, and the port instead.
fn read_high(file: &std::path::Path) -> BTreeMap<SocketAddr, u16> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let parse = |line: &str| {
        let (proper, number) = line.split_once(' ')?;
        Some((proper.parse().ok()?, number.parse().ok()?))
    };
    text.lines().filter_map(parse).collect()
}

fn write_high(file: &std::path::Path, high: &BTreeMap<SocketAddr, u16>) -> io::Result<()> {
    let text: String = high.iter().map(|(proper, number)| format!("{proper} {number}\n")).collect();
    let new = file.with_extension("new");
    std::fs::write(&new, text)?;
    std::fs::rename(&new, file)
}
