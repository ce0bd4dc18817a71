//! How an agent begins and ends: lock, identity, ledger, keeper; then its tasks, until the first ends or it is told
//! to stop. Called by the cli. Services are never touched by either: the next agent adopts them.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nave_agent_core::Reconciler;
use nave_agent_core::address::{DEFAULT_PREFIX, parse_prefix};
use nave_keeper::witness::Witness;
use nave_proto::pb;
use nave_proto::pb::ledger_record::Record;
use parking_lot::Mutex;
use rand::Rng as _;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::api::{Api, Shown};
use crate::cgroups::Cgroups;
use crate::clock;
use crate::config::{AgentConfig, ConfigError};
use crate::data_dir::{DataDir, DataDirError, check_format};
use crate::directory::{DirectoryHandle, Store, Ways};
use crate::dns::{Begun, Naming};
use crate::executor::directories::Directories;
use crate::executor::spawn::SpawnContext;
use crate::executor::users;
use crate::executor::{Executor, Tells};
use crate::facts;
use crate::firewall::{FirewallTask, Told};
use crate::host::{HostTask, Inbox, Outbox};
use crate::hub::{HubTask, Members};
use crate::identity::{Identity, IdentityError, RenewTask, enrol};
use crate::keeper::{self, KeeperError};
use crate::ledger::{Ledger, LedgerError, Opened};
use crate::metrics::{self, Metrics};
use crate::notes::Notes;
use crate::notify::{Ears, NotifySockets};
use crate::oom;
use crate::provision::secrets;
use crate::proxy::{AccessLog, Proxy, ProxyConfig, Recent, Records, Routes};
use crate::sockets::Sockets;
use crate::uplink::{Hello, Uplink};

/// Exits after a hello and answers under way: a burst of every instance on a full host.
const KEEPER_EVENTS: usize = 256;
/// Messages are taken faster than a network brings them.
const HUB_EVENTS: usize = 16;
/// Probe results of some hundred instances within a turn.
const INPUTS: usize = 256;
/// What as many processes say within a turn; each waits with its next word until the last is noted.
const SAID: usize = 256;
/// The name server's port, when another program had it.
const RETRY_NAMES: Duration = Duration::from_secs(10);
/// Its service manager starts it again within a second or two; one that was upgraded is there at once. The keeper gives
/// an agent that it finds as long to say hello.
const NEXT_KEEPER_WITHIN: Duration = Duration::from_secs(10);

/// Why an agent ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    #[error(
        "{key} = {address} cannot be used: another program has that port; stop it, or set {key} to a free one"
    )]
    PortTaken { key: &'static str, address: SocketAddr },
    #[error("{key} = {address} cannot be used")]
    Listen { key: &'static str, address: SocketAddr, source: std::io::Error },
    #[error("the keeper is lost; the next one starts the agent again")]
    KeeperLost,
    #[error("the keeper does not say what it runs: {message}")]
    KeeperList { message: String },
    #[error("cannot read the machine's boot id")]
    BootId(#[source] std::io::Error),
    #[error("cannot look at the lock of the data directory")]
    Place(#[source] std::io::Error),
    #[error("the agent's API failed")]
    Api(#[source] tonic::transport::Error),
    #[error("the metrics listener failed")]
    Metrics(#[source] std::io::Error),
    #[error("a part of the agent ended unexpectedly: {0}")]
    Task(String),
    #[error("the proxy cannot start its threads")]
    Proxy(#[source] std::io::Error),
    #[error("the agent was stopped in the middle of a write")]
    Stopped,
}

impl RunError {
    /// Whether starting again cannot help until a person has acted.
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Config(_) => true,
            Self::DataDir(error) => !matches!(error, DataDirError::Io { .. }),
            Self::Identity(error) => !matches!(error, IdentityError::Stopped | IdentityError::Write { .. }),
            Self::Ledger(error) => matches!(error, LedgerError::Strange { .. }),
            Self::Keeper(_)
            | Self::PortTaken { .. }
            | Self::Listen { .. }
            | Self::KeeperLost
            | Self::KeeperList { .. }
            | Self::BootId(_)
            | Self::Place(_)
            | Self::Api(_)
            | Self::Metrics(_)
            | Self::Task(_)
            | Self::Proxy(_)
            | Self::Stopped => false,
        }
    }
}

/// The agent's whole life. Returns `Ok` after `shutdown`, an error when it cannot go on. `rest` has all services end
/// first, each as its manifest says and what is needed after what needs it, and cancels `shutdown` then; the next agent
/// starts them again.
///
/// When the keeper ends, everything is begun anew with the next one, in this process: it alone may know how a process
/// that ended without a keeper had ended.
pub async fn run(
    config: AgentConfig,
    shutdown: CancellationToken,
    rest: CancellationToken,
) -> Result<(), RunError> {
    config.check()?;
    let witness = Arc::<Mutex<Witness>>::default();
    let mut patience = Duration::ZERO;
    // Traffic goes on while there is no keeper.
    let mut lasting = Lasting { rest, ..Lasting::default() };
    let ended = loop {
        match with_keeper(&config, &shutdown, &witness, &mut lasting, patience).await {
            Err(RunError::KeeperLost) if !shutdown.is_cancelled() => {
                let processes = witness.lock().watched();
                warn!(processes, "the keeper has ended; services go on, waiting for the next keeper");
                patience = NEXT_KEEPER_WITHIN;
            }
            ended => break ended,
        }
    };
    if let Some(proxy) = lasting.proxy.filter(|_| shutdown.is_cancelled()) {
        proxy.ended().await;
    }
    ended
}

/// What goes on from one keeper to the next: sockets, and, once this host is known, who it is and its proxy.
#[derive(Debug, Default)]
struct Lasting {
    sockets: Sockets,
    /// What processes say into how they are.
    ears: Ears,
    /// One for all: the proxy's certificate is the one that is renewed.
    identity: Option<Arc<Identity>>,
    routes: Routes,
    notes: Notes,
    records: Arc<Records>,
    proxy: Option<Proxy>,
    rest: CancellationToken,
}

impl Lasting {
    async fn identity(
        &mut self,
        data: &DataDir,
        config: &AgentConfig,
        facts: &pb::HostFacts,
        shutdown: &CancellationToken,
    ) -> Result<Arc<Identity>, IdentityError> {
        if let Some(identity) = &self.identity {
            return Ok(identity.clone());
        }
        let identity = match Identity::load(data.path(), config)? {
            Some(identity) => identity,
            None => enrol(data.path(), config, facts, shutdown).await?,
        };
        Ok(self.identity.insert(identity).clone())
    }

    fn proxy(
        &mut self,
        config: &AgentConfig,
        data: &DataDir,
        identity: &Identity,
        name: &str,
        cgroups: &Cgroups,
        shutdown: &CancellationToken,
    ) -> Result<Proxy, RunError> {
        if let Some(proxy) = &self.proxy {
            return Ok(proxy.clone());
        }
        let access = AccessLog::start(data.access()).map_err(RunError::Proxy)?;
        self.records = Arc::new(Records { access, ..Records::default() });
        let proxy_config = ProxyConfig {
            prefix: parse_prefix(&config.address_prefix).unwrap_or(DEFAULT_PREFIX),
            own_host: identity.host,
            workers: 0,
            ports_file: data.path().join("proxy-ports"),
            singles_file: data.path().join("proxy-singles"),
            routes: self.routes.clone(),
            records: self.records.clone(),
            notes: self.notes.clone(),
            credentials: Some(identity.credentials.clone()),
            attest: (name.to_owned(), cgroups.folders()),
        };
        let proxy = Proxy::start(proxy_config, shutdown.clone()).map_err(RunError::Proxy)?;
        Ok(self.proxy.insert(proxy).clone())
    }
}

/// From a keeper's hello to its end.
async fn with_keeper(
    config: &AgentConfig,
    shutdown: &CancellationToken,
    witness: &Arc<Mutex<Witness>>,
    lasting: &mut Lasting,
    patience: Duration,
) -> Result<(), RunError> {
    let data = DataDir::open(&config.data_dir)?;
    let boot_id = clock::boot_id().map_err(RunError::BootId)?;
    info!(?config, "agent begins");
    let address = config.metrics_listen;
    let metrics_listener = TcpListener::bind(address).await;
    let metrics_listener = metrics_listener.map_err(|why| cannot_listen("metrics_listen", address, why))?;

    let metrics = Metrics { routes: lasting.routes.clone(), ..Metrics::default() };
    let mut tasks: JoinSet<Result<(), RunError>> = JoinSet::new();
    let serving = metrics::serve(metrics_listener, metrics.clone(), shutdown.clone());
    tasks.spawn(async move { serving.await.map_err(RunError::Metrics) });

    let (keeper, keeper_task, welcome) = tokio::select! {
        connected = keeper::connect(data.path(), patience) => connected?,
        () = shutdown.cancelled() => return Ok(()),
    };
    let (keeper_events, keeper_inbox) = mpsc::channel(KEEPER_EVENTS);
    let keeper_gone = CancellationToken::new();
    let gone = keeper_gone.clone();
    tasks.spawn(async move {
        let error = keeper_task.run(keeper_events).await;
        warn!(error = %crate::error_chain(&error), "the connection to the keeper has ended");
        gone.cancel();
        // The main loop hears of it by its empty inbox and ends at the end of a turn, so that nothing is half written
        // when the next begins.
        std::future::pending().await
    });
    metrics.keeper_up.set(1);
    for damage in &welcome.damages {
        lasting.notes.say(damage, damage.clone());
    }
    lasting.sockets.inherit(&keeper).await.map_err(|_| RunError::KeeperLost)?;
    let listener = lasting.sockets.tcp("listen", config.listen);
    let listener = listener.map_err(|why| cannot_listen("listen", config.listen, why))?;

    let cgroups = Cgroups::detect(&[welcome.keeper_pid, std::process::id()]);
    let mut facts = facts::facts(config, &cgroups, advertised(config, &listener).await);
    facts.place = data.place(&boot_id).map_err(RunError::Place)?;
    let closed = closed_to_services(data.path());
    facts.lacks.extend(closed.map(|dir| {
        format!(
            "services with users of their own cannot reach their directories: {} is closed to others",
            dir.display()
        )
    }));

    let identity = tokio::select! {
        identity = lasting.identity(&data, config, &facts, shutdown) => match identity {
            Err(IdentityError::Stopped) => return Ok(()),
            identity => identity?,
        },
        // The hub may never answer, and without a keeper nobody would end this.
        () = keeper_gone.cancelled() => return Err(RunError::KeeperLost),
        ended = tasks.join_next() => return Err(why(ended)),
    };
    let (cluster, host) = (identity.cluster, identity.host);
    let cgroups = cgroups.named(cluster, host);
    let proxy = lasting.proxy(config, &data, &identity, &facts.name, &cgroups, shutdown)?;
    let (keeping, keeper_of_sockets) = (proxy.clone(), keeper.clone());
    tasks.spawn(async move {
        let error = keeping.keep_with(keeper_of_sockets).await;
        warn!(?error, "the keeper holds no more listening sockets");
        std::future::pending().await
    });
    let directory = DirectoryHandle::new(Store::read(&data.directory()), proxy.asks());
    let ways = Ways::new(directory.clone(), proxy.clone());
    let mut naming = config.dns.then(|| {
        let prefix = parse_prefix(&config.address_prefix).unwrap_or(DEFAULT_PREFIX);
        Naming::new(prefix, ways.clone(), data.resolv_conf(), lasting.notes.clone())
    });
    let resolver = naming.as_ref().map(Naming::resolver).unwrap_or_default();
    if let Some(naming) = &mut naming {
        serve_names(naming, &mut lasting.sockets, &mut tasks, shutdown).await;
    }
    lasting.sockets.keep(&keeper).await.map_err(|_| RunError::KeeperLost)?;
    let runtime_name = format!("nave-{cluster}-{host}");
    let (secrets, lack) = secrets::root(data.path(), secrets::memory(), &runtime_name);
    facts.lacks.extend(lack);
    let directories = Directories::new(data.path()).with_secrets(secrets);
    let notify = NotifySockets::for_host(data.path(), &runtime_name, closed.is_some());
    let context = SpawnContext::new(
        cluster,
        facts.name.clone(),
        directories,
        cgroups,
        notify,
        closed.map(Path::to_owned),
    )
    .with_ways(ways.clone(), resolver)
    .with_notes(lasting.notes.clone());
    context.tell_of_unit();

    let Opened { mut ledger, mut records, lost_bytes } = Ledger::open(&data.ledger())?;
    if lost_bytes > 0 {
        let damage = format!(
            "{}: {lost_bytes} bytes of it were torn or damaged and are not used, the rest is",
            data.ledger().display()
        );
        warn!("{damage}");
        lasting.notes.say("ledger", damage);
        // For the next agent as well, should this one end before the hub has said what it wants.
        let damaged = Record::Damaged(true);
        ledger.append(vec![damaged.clone()])?;
        records.push(pb::LedgerRecord { record: Some(damaged) });
    }
    let reconciler = Reconciler::restore(&boot_id, records, clock::monotonic());
    if reconciler.is_doubtful() {
        info!(
            "what this host is to run is not known: nothing is started or stopped until the hub has said it"
        );
    }
    let (_, generation) = reconciler.generation();
    let known = reconciler.supervisors().count();
    info!(%cluster, %host, name = facts.name, generation, instances = known, "this host is known");

    let recent = Recent::new(lasting.routes.clone());
    let shown = Shown::default();
    let members = Members { identity: identity.clone(), join: config.join.clone() };
    let api = Api::new(
        identity.clone(),
        facts.name.clone(),
        welcome.keeper_pid,
        &data,
        metrics.clone(),
        shown.clone(),
    )
    .with_ways(ways)
    .with_calls(recent.clone(), lasting.records.clone());
    let counting = recent.run(shutdown.clone());
    tasks.spawn(async move {
        counting.await;
        Ok(())
    });
    let (api_shutdown, connections) = (shutdown.clone(), proxy.handed_out());
    tasks.spawn(async move { api.serve(connections, api_shutdown).await.map_err(RunError::Api) });
    let credentials = identity.credentials.clone();
    let renew = RenewTask { identity, members: members.clone(), metrics: metrics.clone() };
    tasks.spawn(async move {
        renew.run().await;
        Err(RunError::Task("certificate renewal".to_owned()))
    });
    let (hub_events, hub_inbox) = mpsc::channel(HUB_EVENTS);
    let hub = HubTask { members, events: hub_events };
    tasks.spawn(async move {
        hub.run().await;
        Err(RunError::Task("session with the hub".to_owned()))
    });

    let (store, store_shutdown) = (Store::new(data.directory(), directory.clone()), shutdown.clone());
    tasks.spawn(async move {
        store.run(store_shutdown).await;
        Ok(())
    });

    let (looking, ends) = (oom::watch(keeper.clone()), shutdown.clone());
    tasks.spawn(async move {
        tokio::select! {
            () = looking => Err(RunError::Task("looking for kills".to_owned())),
            () = ends.cancelled() => Ok(()),
        }
    });

    let (inputs, input_inbox) = mpsc::channel(INPUTS);
    let (said, said_inbox) = mpsc::channel(SAID);
    let (ports, ears) = (config.port_min..=config.port_max, lasting.ears.clone());
    let executor = Executor::new(context.into(), keeper.clone(), ports, ears, Tells { inputs, said });
    let uplink = Uplink::new(Hello { cluster, host, facts, run_id: run_id() });
    let inbox = Inbox { keeper: keeper_inbox, hub: hub_inbox, inputs: input_inbox, said: said_inbox };
    lasting.notes.repeat();
    let outbox = Outbox { uplink, metrics, shown, notes: lasting.notes.clone() };
    let main = HostTask::new(reconciler, ledger, executor, inbox, outbox, directory);
    let main = main.witnessed_by(witness.clone()).with_proxy(proxy.clone());
    let mut main = main.resting_on(lasting.rest.clone());
    if config.firewall && users::own_uid().is_root() {
        let (ports, wanted) = watch::channel(Told::default());
        let (firewall, ends) =
            (FirewallTask::new(cluster, host, wanted, lasting.notes.clone()), shutdown.clone());
        tasks.spawn(async move {
            firewall.run(ends).await;
            Ok(())
        });
        main = main.with_firewall(ports);
    }
    // Not before the proxy knows the services: a call to one that it does not know yet would be turned away.
    proxy.accept(listener, &credentials).map_err(|source| RunError::Listen {
        key: "listen",
        address: config.listen,
        source,
    })?;
    tasks.spawn(main.run(shutdown.clone()));

    // The main task ends at the end of a turn, so that what it began to write is whole; the others hold nothing.
    let mut result = Ok(());
    let mut retry = tokio::time::interval(RETRY_NAMES);
    loop {
        let unserved = naming.as_mut().filter(|naming| !naming.has_begun() && !shutdown.is_cancelled());
        let ended = tokio::select! {
            ended = tasks.join_next() => ended,
            _ = retry.tick(), if unserved.is_some() => {
                if let Some(naming) = unserved {
                    serve_names(naming, &mut lasting.sockets, &mut tasks, shutdown).await;
                    if naming.has_begun() {
                        // A keeper that is lost is told by the main loop's end.
                        lasting.sockets.keep(&keeper).await.ok();
                    }
                }
                continue;
            }
        };
        let Some(ended) = ended else { break };
        if !shutdown.is_cancelled() {
            result = Err(why(Some(ended)));
            break;
        }
        if tasks.len() <= ENDLESS_TASKS {
            break;
        }
    }
    tasks.shutdown().await;
    info!("agent ends; services go on");
    result
}

/// Answers names of services from here on, unless their port is somebody else's.
async fn serve_names(
    naming: &mut Naming,
    sockets: &mut Sockets,
    tasks: &mut JoinSet<Result<(), RunError>>,
    shutdown: &CancellationToken,
) {
    let Some(Begun { server, resolv_conf }) = naming.begin(sockets).await else { return };
    let ends = shutdown.clone();
    tasks.spawn(async move {
        server.serve(ends).await;
        Ok(())
    });
    if let Some(resolv_conf) = resolv_conf {
        let ends = shutdown.clone();
        tasks.spawn(async move {
            resolv_conf.follow(ends).await;
            Ok(())
        });
    }
}

/// How many instances the ledger of this host knows, to say that this build can read what the running one wrote. Only
/// reads.
///
/// # Errors
/// What would keep an agent of this build from starting here.
pub fn instances_noted(config: &AgentConfig) -> Result<usize, RunError> {
    config.check()?;
    check_format(&config.data_dir)?;
    Identity::load(&config.data_dir, config)?;
    let boot_id = clock::boot_id().map_err(RunError::BootId)?;
    let records = Ledger::read(&config.data_dir.join("ledger"))?;
    Ok(Reconciler::restore(&boot_id, records, clock::monotonic()).supervisors().count())
}

/// Tasks that end only by being dropped: keeper, listening sockets, renewal, hub.
const ENDLESS_TASKS: usize = 4;

fn why(ended: Option<Result<Result<(), RunError>, tokio::task::JoinError>>) -> RunError {
    match ended {
        Some(Ok(Err(error))) => error,
        Some(Ok(Ok(()))) => RunError::Task("without an error".to_owned()),
        Some(Err(error)) => RunError::Task(error.to_string()),
        None => RunError::Task("all at once".to_owned()),
    }
}

fn cannot_listen(key: &'static str, address: SocketAddr, source: std::io::Error) -> RunError {
    match source.kind() {
        std::io::ErrorKind::AddrInUse => RunError::PortTaken { key, address },
        _ => RunError::Listen { key, address, source },
    }
}

/// How others reach `listen`: as configured, else its own address, else this machine's address towards the hub.
async fn advertised(config: &AgentConfig, listener: &TcpListener) -> String {
    if let Some(address) = &config.advertise {
        return address.clone();
    }
    let bound = listener.local_addr().unwrap_or(config.listen);
    if !bound.ip().is_unspecified() {
        return bound.to_string();
    }
    for member in &config.join {
        if let Some(ip) = address_towards(member).await {
            return SocketAddr::new(ip, bound.port()).to_string();
        }
    }
    SocketAddr::new(IpAddr::from([127, 0, 0, 1]), bound.port()).to_string()
}

/// The kernel's choice of a source address; connecting a datagram socket sends nothing.
async fn address_towards(member: &str) -> Option<IpAddr> {
    let to = tokio::net::lookup_host(member).await.ok()?.next()?;
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await.ok()?;
    socket.connect(to).await.ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// A directory above the services' own that their users may not pass; matters only to an agent that is root.
fn closed_to_services(data_dir: &Path) -> Option<&Path> {
    match users::own_uid().is_root() {
        true => users::closed_to_others(data_dir),
        false => None,
    }
}

/// Tells two agents with one identity apart.
fn run_id() -> String {
    format!("{:016x}", rand::rng().random::<u64>())
}
