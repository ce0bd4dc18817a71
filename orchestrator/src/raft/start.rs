//! Brings one member's Raft up: data directory, databases, tables, openraft, then the tasks around it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use nave_proto::ids::{ClusterId, MemberId};
use nave_tls::Credentials;
use openraft::async_runtime::WatchReceiver as _;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::raft::channels::Channels;
use crate::raft::network::Network;
use crate::raft::propose::Door;
use crate::raft::propose::door::{DoorTask, Forwarder};
use crate::raft::read::{ReadTask, Reads};
use crate::raft::server::LastHeard;
use crate::raft::settings::{self, SnapshotSettings};
use crate::raft::state_machine::StateMachine;
use crate::raft::status::{Leadership, leadership};
use crate::raft::types::{REGISTRY_GROUP, Raft};
use crate::raft::{ApplyObserver, Inner, RaftHub, Role, Stores};
use crate::storage::directory::{DataDirectory, DirectoryError};
use crate::storage::disk::{DiskSpace, FREE_BYTES_MIN};
use crate::storage::failure::Failure;
use crate::storage::log::{LogDatabase, LogStore};
use crate::storage::snapshot::SnapshotDirectory;
use crate::storage::state::{LoadedState, StateDatabase};

/// What a member needs to take part.
#[derive(Debug, Clone)]
pub struct RaftOptions {
    pub cluster: ClusterId,
    pub member: MemberId,
    /// Created when missing; belongs to this member alone.
    pub data_dir: PathBuf,
    /// This member's own, to call the others with.
    pub credentials: Credentials,
    pub snapshots: SnapshotSettings,
    /// Writes are refused while the data directory's file system has less.
    pub free_bytes_min: u64,
}

impl RaftOptions {
    pub fn new(cluster: ClusterId, member: MemberId, data_dir: PathBuf, credentials: Credentials) -> Self {
        Self {
            cluster,
            member,
            data_dir,
            credentials,
            snapshots: SnapshotSettings::default(),
            free_bytes_min: FREE_BYTES_MIN,
        }
    }
}

/// Why a member did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error("open the databases in {path}")]
    Storage { path: PathBuf, source: io::Error },
    /// The log and the state do not fit together, or the log holds a command of a newer version.
    #[error("start from the log in {path}: {message}")]
    Log { path: PathBuf, message: String },
}

/// The stores of one member, opened.
pub(crate) struct Opened {
    pub(crate) directory: DataDirectory,
    pub(crate) log: LogDatabase,
    pub(crate) registry: LogStore,
    pub(crate) state: StateDatabase,
    pub(crate) loaded: LoadedState,
    pub(crate) snapshots: Arc<SnapshotDirectory>,
}

/// Blocks.
pub(crate) fn open(options: &RaftOptions, failure: &Failure) -> Result<Opened, StartError> {
    let directory = DataDirectory::open(&options.data_dir, options.cluster, options.member)?;
    let storage = |source| StartError::Storage { path: options.data_dir.clone(), source };
    let log = LogDatabase::open(&directory.log(), failure.clone()).map_err(storage)?;
    let registry = log.group(REGISTRY_GROUP).map_err(storage)?;
    let (state, loaded) = StateDatabase::open(&directory.state(), failure.clone()).map_err(storage)?;
    let snapshots = Arc::new(SnapshotDirectory::open(&directory.snapshots()).map_err(storage)?);
    Ok(Opened { directory, log, registry, state, loaded, snapshots })
}

pub(super) async fn start(
    options: RaftOptions,
    observer: Arc<dyn ApplyObserver>,
) -> Result<RaftHub, StartError> {
    let failure = Failure::new();
    let path = options.data_dir.clone();
    let storage = |source| StartError::Storage { path: path.clone(), source };
    let (for_open, its_failure) = (options.clone(), failure.clone());
    let opened = tokio::task::spawn_blocking(move || open(&for_open, &its_failure))
        .await
        .map_err(|error| storage(io::Error::other(error)))??;
    let Opened { directory, log, registry, state, loaded, snapshots } = opened;
    let disk = DiskSpace::new(directory.path(), options.free_bytes_min).map_err(storage)?;
    let machine = StateMachine::new(
        loaded,
        state.handle(),
        snapshots.clone(),
        observer,
        failure.clone(),
        options.snapshots,
    );
    let tables = machine.tables();
    let channels = Arc::new(Channels::new(options.credentials));
    let config = settings::config(options.cluster.to_string(), options.snapshots)
        .map_err(|error| storage(io::Error::other(error)))?;
    let network = Network::new(options.member, channels.clone());
    let raft = Raft::new(options.member.0, config, network, registry, machine).await.map_err(|fatal| {
        // The state machine says better than openraft what is wrong.
        let message = failure.get().map_or_else(|| fatal.to_string(), |message| message.to_string());
        StartError::Log { path: path.clone(), message }
    })?;

    let (leadership_sender, leadership) = watch::channel(leadership(&raft));
    let (door, proposals) = Door::new(leadership.clone());
    let (reads, readers) = Reads::new(tables.clone(), leadership.clone());
    let (tasks, stopping) = (TaskTracker::new(), CancellationToken::new());
    tasks.spawn(follow_leadership(raft.clone(), leadership_sender, failure.clone(), stopping.clone()));
    tasks.spawn(disk.clone().watch(stopping.clone()));
    tasks.spawn(
        DoorTask {
            own: options.member,
            raft: raft.clone(),
            tables: tables.clone(),
            disk: disk.clone(),
            leadership: leadership.clone(),
            queue: proposals,
            forwarder: Forwarder::new(raft.clone(), channels.clone()),
            tasks: tasks.clone(),
            shutdown: stopping.clone(),
        }
        .run(),
    );
    tasks.spawn(
        ReadTask {
            own: options.member,
            raft: raft.clone(),
            channels: channels.clone(),
            leadership: leadership.clone(),
            queue: readers,
            shutdown: stopping.clone(),
        }
        .run(),
    );
    let counters = log.counters();
    let state_writer = state.handle();
    let stores = Stores { _log: log, _state: state, directory };
    let inner = Inner {
        id: options.member,
        cluster: options.cluster,
        raft,
        tables,
        channels,
        door,
        reads,
        leadership,
        heard: Arc::new(LastHeard::new()),
        snapshots,
        state_writer,
        disk,
        failure,
        counters,
        tasks,
        stopping,
        stores: Mutex::new(Some(stores)),
    };
    Ok(RaftHub { inner: Arc::new(inner) })
}

/// Publishes who leads when that changes, and the end of the core when it ends by itself: after a storage error the
/// process would live on, with metrics that still name a leader.
async fn follow_leadership(
    raft: Raft,
    sender: watch::Sender<Leadership>,
    failure: Failure,
    stopping: CancellationToken,
) {
    let mut server = raft.server_metrics();
    loop {
        publish(&sender, leadership(&raft));
        tokio::select! {
            () = stopping.cancelled() => return,
            changed = server.changed() => {
                if changed.is_err() {
                    break;
                }
            }
        }
    }
    // The core has dropped its end. Without a storage error or a panic it was told to.
    let reason = raft.metrics().borrow_watched().running_state.clone();
    if let Err(fatal) = reason
        && !stopping.is_cancelled()
    {
        failure.publish(format!("Raft has ended: {fatal}"));
    }
    let term = sender.borrow().term;
    publish(&sender, Leadership { leader: None, term, role: Role::Stopped });
}

fn publish(sender: &watch::Sender<Leadership>, now: Leadership) {
    sender.send_if_modified(|current| {
        if *current == now {
            return false;
        }
        let leader = now.leader.map(|id| id.to_string());
        tracing::info!(leader, term = now.term, role = ?now.role, "leadership changed");
        *current = now;
        true
    });
}
