//! The life of one member. Everything it needs is checked or taken first (directory, keys, ports), then its
//! subsystems run side by side in one `JoinSet`; any that ends before it was asked to ends the member with its
//! error, since loud beats limping. Going down follows the flow: stop accepting, let calls and streams end, hand
//! leadership over, close the log.

mod backups;
mod bootstrap;
pub(crate) mod identity;
mod pid;
mod standing;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use nave_proto::ids::ClusterId;
use nave_tls::{FileError, IssueError};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::api::peers::Peers;
use crate::api::{Hub, server};
use crate::config::{ConfigError, MemberConfig};
use crate::controllers::{format, liveness, members, scheduler};
use crate::dispatch::{self, beats};
use crate::metrics::{self, Metrics};
use crate::raft::{RaftHub, RaftOptions, StartError};
use crate::watch::Changes;

/// Calls and streams end within 3 s, handing over takes some 10 ms; a disk that hangs must not hold us for ever.
const SHUTDOWN: Duration = Duration::from_secs(15);

/// Why a member did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration contradicts itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The CA's files.
    #[error("cannot use the cluster's CA")]
    Authority(#[source] FileError),
    /// Configuration and CA are of two clusters.
    #[error(
        "cluster_id is {configured}, but {ca_cert:?} is the CA of cluster {found}; use the files of one `nave init`"
    )]
    OtherCluster {
        /// In the configuration.
        configured: ClusterId,
        /// In the CA's certificate.
        found: ClusterId,
        /// The CA's certificate.
        ca_cert: PathBuf,
    },
    /// The member's own certificate could not be made.
    #[error("cannot mint this member's certificate")]
    Mint(#[source] IssueError),
    /// A port.
    #[error("cannot listen on {address} ({key}): {}", listen_advice(.source))]
    Listen {
        /// The key in the configuration.
        key: &'static str,
        /// Its value.
        address: SocketAddr,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A file in the data directory.
    #[error("cannot write {path:?}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Log, state or Raft.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A subsystem ended by itself.
    #[error("{0}")]
    Ended(String),
}

fn listen_advice(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another process uses the port; stop it, or choose another one (`ss -ltnp` shows who has it)"
                .to_owned()
        }
        io::ErrorKind::AddrNotAvailable => "this machine does not have that address".to_owned(),
        io::ErrorKind::PermissionDenied => "not permitted; ports below 1024 need root".to_owned(),
        _ => error.to_string(),
    }
}

/// Runs one member until `shutdown`, or until something it cannot do without fails.
pub async fn run(config: MemberConfig, shutdown: CancellationToken) -> Result<(), RunError> {
    config.check()?;
    let (authority, credentials) = identity::load(&config)?;
    // Ports first: another member on this port is told before its directory is touched.
    let listener = listen("listen", config.listen).await?;
    let metrics_listener = match config.metrics_listen {
        Some(address) => Some(listen("metrics_listen", address).await?),
        None => None,
    };
    let changes = Arc::new(Changes::default());
    let mut options =
        RaftOptions::new(config.cluster_id, config.id, config.data_dir.clone(), credentials.clone());
    options.snapshots.entries_between = config.log.entries_between_snapshots;
    options.snapshots.entries_kept = config.log.entries_kept;
    let raft = RaftHub::start(options, changes.clone()).await?;
    // Raft holds the directory's lock by now.
    let pid_file = pid::write(&config.data_dir)?;
    let (leaderless_sender, leaderless) = watch::channel(false);
    let hub = Arc::new(Hub {
        id: config.id,
        name: config.name.clone(),
        cluster: config.cluster_id,
        raft: raft.clone(),
        changes,
        beats: Arc::default(),
        peers: Peers::new(config.id, credentials.clone()),
        authority: authority.clone(),
        credentials: credentials.clone(),
        metrics: Arc::new(Metrics::new()),
        member_notes: Mutex::default(),
        addresses: watch::Sender::default(),
        backup_unix_ns: AtomicI64::new(0),
        leaderless,
        // Its own: leadership is handed over before anything stops.
        stop: CancellationToken::new(),
        tasks: TaskTracker::new(),
    });
    info!(
        member = %config.id, name = config.name, cluster = %config.cluster_id, listen = %config.listen,
        advertise = config.advertise, data_dir = %config.data_dir.display(),
        revision = hub.raft.state().revision(), "member started"
    );

    let (health, _) = tonic_health::server::health_reporter();
    let mut parts = Parts::default();
    parts.spawn("api", server::serve(hub.clone(), listener, health.clone()));
    parts.spawn("health", ok(server::report_health(hub.clone(), health)));
    if let Some(listener) = metrics_listener {
        parts.spawn("metrics", metrics::serve(hub.clone(), listener));
    }
    parts.spawn("certificate", identity::keep_fresh(config.id, authority, credentials, hub.stop.clone()));
    parts.spawn("bootstrap", bootstrap::run(hub.clone(), config.clone()));
    parts.spawn("backups", backups::run(hub.clone(), config.clone()));
    parts.spawn("leader watch", ok(dispatch::watch_leader(hub.clone(), leaderless_sender)));
    parts.spawn("beats", ok(beats::forward(hub.clone())));
    parts.spawn("scheduler", ok(scheduler::run(hub.clone())));
    parts.spawn("liveness", ok(liveness::run(hub.clone())));
    parts.spawn("members", ok(members::run(hub.clone())));
    parts.spawn("command format", ok(format::run(hub.clone())));

    let ended = tokio::select! {
        biased;
        () = shutdown.cancelled() => End::Asked,
        failure = raft.failed() => End::Failed(failure),
        ended = parts.next() => End::Failed(ended),
        by = standing::removed(hub.clone(), config.clone()) => End::Removed { by },
    };
    let down = timeout(SHUTDOWN, stop(&hub, parts, matches!(ended, End::Failed(_)))).await;
    if down.is_err() {
        warn!("the member did not end in time and is cut off");
    }
    drop(pid_file);
    match ended {
        End::Asked => Ok(()),
        End::Removed { by } => {
            info!(member = %config.id, by, "ended: this member is no longer part of the cluster");
            Ok(())
        }
        End::Failed(reason) => Err(RunError::Ended(reason)),
    }
}

/// Why a member goes down.
enum End {
    Asked,
    /// Another member said so. Not a failure: nobody should start it again.
    Removed {
        by: String,
    },
    Failed(String),
}

/// In the direction of flow. After a failure there is nothing to hand over.
async fn stop(hub: &Arc<Hub>, mut parts: Parts, failed: bool) {
    info!(member = %hub.id, failed, "member stopping");
    let leads = hub.raft.status().leader == Some(hub.id);
    if leads && !failed {
        // While calls under way can still be answered: they are forwarded to the new leader.
        match hub.raft.transfer_leader(None).await {
            Ok(leader) => info!(%leader, "leadership handed over"),
            Err(error) => info!(%error, "leadership not handed over"),
        }
    }
    hub.stop.cancel();
    server::drain(hub).await;
    while let Some(ended) = parts.tasks.join_next().await {
        if let Ok((name, Err(error))) = ended {
            warn!(part = name, error, "a part of the member ended with an error");
        }
    }
    hub.raft.shutdown().await;
    info!(member = %hub.id, "member stopped");
}

/// The subsystems, each with its name.
#[derive(Debug, Default)]
struct Parts {
    tasks: JoinSet<(&'static str, Result<(), String>)>,
}

impl Parts {
    fn spawn(&mut self, name: &'static str, part: impl Future<Output = Result<(), String>> + Send + 'static) {
        self.tasks.spawn(async move { (name, part.await) });
    }

    /// The first that ends; none should.
    async fn next(&mut self) -> String {
        match self.tasks.join_next().await {
            Some(Ok((name, Ok(())))) => format!("the member's {name} ended by itself"),
            Some(Ok((name, Err(error)))) => format!("the member's {name} failed: {error}"),
            Some(Err(error)) => format!("a part of the member panicked: {error}"),
            None => std::future::pending().await,
        }
    }
}

async fn ok(part: impl Future<Output = ()>) -> Result<(), String> {
    part.await;
    Ok(())
}

async fn listen(key: &'static str, address: SocketAddr) -> Result<TcpListener, RunError> {
    TcpListener::bind(address).await.map_err(|source| RunError::Listen { key, address, source })
}
