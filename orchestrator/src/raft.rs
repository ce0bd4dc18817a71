//! The replicated log, and everything of openraft: nothing outside this folder names it. A member starts one
//! [`RaftHub`]; whoever wants a change calls [`RaftHub::propose`], whoever reads takes [`RaftHub::state`], after
//! [`RaftHub::linearize`] when the answer must be the newest.
//!
//! ```text
//! propose -> door -> openraft -> log (fsync) + network -> committed -> state_machine -> tables, observer, state rows
//! ```
//! What is on disk is `storage`'s; what the commands mean is `nave-orchestrator-core`'s.

mod channels;
pub(crate) mod convert;
mod handover;
mod member_service;
mod membership;
mod network;
mod propose;
mod read;
mod server;
mod settings;
mod start;
pub(crate) mod state_machine;
mod status;
pub(crate) mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nave_orchestrator_core::{Change, ClusterState};
use nave_proto::ids::{ClusterId, MemberId};
use nave_proto::pb;
use nave_proto::pb::member_service_server::MemberServiceServer;
use nave_proto::pb::raft_transport_server::RaftTransportServer;
use openraft::errors::{InitializeError as OpenraftInitializeError, RaftError};
use parking_lot::{Mutex, RwLockReadGuard};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::handover::TransferError;
pub use self::member_service::MemberEndpoint;
pub use self::membership::{MembershipError, MembershipView};
pub use self::propose::{COMMAND_BYTES_MAX, ProposeError};
pub use self::read::ReadError;
pub use self::server::RaftEndpoint;
pub use self::settings::SnapshotSettings;
pub use self::start::{RaftOptions, StartError};
pub use self::status::{Leadership, RaftStatus, Role};
pub use self::types::MemberNode;
pub use crate::storage::directory::DirectoryError;
pub use crate::storage::disk::FREE_BYTES_MIN;

use self::channels::Channels;
use self::network::MESSAGE_BYTES_MAX;
use self::propose::Door;
use self::read::Reads;
use self::server::LastHeard;
use self::state_machine::Tables;
use self::types::Raft;
use crate::storage::directory::{self, DataDirectory};
use crate::storage::disk::DiskSpace;
use crate::storage::failure::Failure;
use crate::storage::log::{LogCounters, LogDatabase};
use crate::storage::snapshot::{SnapshotDirectory, SnapshotFile};
use crate::storage::state::{StateDatabase, StateHandle};

/// Told of every entry as it is applied, in order and under the state's write lock, so whoever holds the read lock sees
/// state and observer at one revision. Must not block and must not touch the hub.
pub trait ApplyObserver: Send + Sync {
    /// One log entry; `changes` is empty for entries that only move the revision.
    fn applied(&self, revision: u64, changes: &[Change]);
    /// After some entries were applied, once the lock is free again: whoever waits for news may be woken.
    fn settled(&self, revision: u64);
    /// The state is another one altogether: loaded at start-up (before anything is applied), or from a snapshot.
    fn restored(&self, state: &ClusterState);
}

/// Why a cluster was not initialised.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InitializeError {
    #[error("this member has a log already")]
    NotPristine,
    #[error("this member is not among the members named")]
    NotAMember,
    #[error("this member has stopped: {0}")]
    Stopped(String),
}

/// One member's part in the registry group. A cheap handle; the parts end with [`RaftHub::shutdown`].
#[derive(Debug, Clone)]
pub struct RaftHub {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    id: MemberId,
    cluster: ClusterId,
    raft: Raft,
    tables: Arc<Tables>,
    channels: Arc<Channels>,
    door: Door,
    reads: Reads,
    leadership: watch::Receiver<Leadership>,
    heard: Arc<LastHeard>,
    snapshots: Arc<SnapshotDirectory>,
    state_writer: StateHandle,
    disk: Arc<DiskSpace>,
    failure: Failure,
    counters: Arc<LogCounters>,
    tasks: TaskTracker,
    stopping: CancellationToken,
    stores: Mutex<Option<Stores>>,
}

/// Closed last: openraft must be done with them. In the order in which they are dropped.
#[derive(Debug)]
struct Stores {
    _log: LogDatabase,
    _state: StateDatabase,
    directory: DataDirectory,
}

/// Numbers for /metrics, since the start of this member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RaftCounters {
    pub entries_appended_total: u64,
    pub fsyncs_total: u64,
    pub fsync_ns_total: u64,
    /// Of the data directory's file system.
    pub disk_free_bytes: u64,
}

impl RaftHub {
    /// Opens the data directory, loads the state, and starts Raft; does not form a cluster ([`RaftHub::initialize`]).
    pub async fn start(options: RaftOptions, observer: Arc<dyn ApplyObserver>) -> Result<Self, StartError> {
        start::start(options, observer).await
    }

    /// Forms the cluster. Each founding member may call this with the same members; once the log has an entry it is
    /// refused as [`InitializeError::NotPristine`], which at a restart is the normal answer.
    pub async fn initialize(&self, members: BTreeMap<MemberId, MemberNode>) -> Result<(), InitializeError> {
        let members: BTreeMap<u64, MemberNode> = members.into_iter().map(|(id, node)| (id.0, node)).collect();
        self.inner.raft.initialize(members).await.map_err(|error| match error {
            RaftError::APIError(OpenraftInitializeError::NotAllowed(_)) => InitializeError::NotPristine,
            RaftError::APIError(OpenraftInitializeError::NotInMembers(_)) => InitializeError::NotAMember,
            RaftError::Fatal(fatal) => InitializeError::Stopped(fatal.to_string()),
        })
    }

    /// Puts a command into the log and returns its reply once it is committed and applied on the leader. Whatever the
    /// deadline, no leader is waited for longer than 4.5 s. The time and the format are stamped here.
    pub async fn propose(
        &self,
        mut command: pb::Command,
        deadline: Instant,
    ) -> Result<pb::Reply, ProposeError> {
        command.written_by = self.state().format_of(command.body.as_ref());
        self.inner.door.propose(command, deadline).await
    }

    /// After `Ok`, [`RaftHub::state`] shows at least everything that was acknowledged, by whichever member, before this
    /// call. The value is the log index that was waited for.
    pub async fn linearize(&self, deadline: Instant) -> Result<u64, ReadError> {
        self.inner.reads.linearize(deadline).await
    }

    /// The tables as they are now. `apply` waits for the guard: hold it shortly, and never across an await.
    pub fn state(&self) -> RwLockReadGuard<'_, ClusterState> {
        self.inner.tables.state.read()
    }

    pub fn status(&self) -> RaftStatus {
        let applied = *self.inner.tables.applied.borrow();
        status::status(&self.inner.raft, applied, &self.inner.heard)
    }

    /// Who leads, as [`RaftHub::subscribe_status`] last said; [`RaftHub::status`] may know it earlier.
    pub fn leadership(&self) -> Leadership {
        *self.inner.leadership.borrow()
    }

    /// Who leads; changes at elections and transfers only.
    pub fn subscribe_status(&self) -> watch::Receiver<Leadership> {
        self.inner.leadership.clone()
    }

    /// Index of the newest entry that [`RaftHub::state`] shows.
    pub fn applied(&self) -> watch::Receiver<u64> {
        self.inner.tables.applied.subscribe()
    }

    pub fn counters(&self) -> RaftCounters {
        let counters = &self.inner.counters;
        RaftCounters {
            entries_appended_total: counters.entries_appended_total.load(Ordering::Relaxed),
            fsyncs_total: counters.fsyncs_total.load(Ordering::Relaxed),
            fsync_ns_total: counters.fsync_ns_total.load(Ordering::Relaxed),
            disk_free_bytes: self.inner.disk.free_bytes(),
        }
    }

    /// What to serve to the other members; both check the caller's certificate. The API answers two calls of
    /// `MemberService` itself.
    pub fn services(&self) -> (RaftTransportServer<RaftEndpoint>, MemberServiceServer<MemberEndpoint>) {
        let inner = &self.inner;
        let raft = RaftEndpoint {
            cluster: inner.cluster,
            raft: inner.raft.clone(),
            snapshots: inner.snapshots.clone(),
            heard: inner.heard.clone(),
            tables: inner.tables.clone(),
        };
        let member = MemberEndpoint {
            own: inner.id,
            cluster: inner.cluster,
            door: inner.door.clone(),
            reads: inner.reads.clone(),
            leadership: inner.leadership.clone(),
        };
        (
            RaftTransportServer::new(raft)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX),
            MemberServiceServer::new(member)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX),
        )
    }

    /// Closes the connections to all but these members.
    pub(crate) fn retain_channels(&self, members: &BTreeSet<MemberId>) {
        self.inner.channels.retain(members);
    }

    /// Writes down that this member was removed, and who said so; its data directory is not opened again.
    pub(crate) async fn mark_removed(&self, by: &str) -> std::io::Result<()> {
        let Some(path) = self.inner.stores.lock().as_ref().map(|stores| stores.directory.path().to_owned())
        else {
            return Ok(());
        };
        let text = format!("removed from the cluster, as {by} said\n");
        tokio::task::spawn_blocking(move || directory::mark_removed(&path, &text))
            .await
            .map_err(std::io::Error::other)?
    }

    /// Index of the newest snapshot, and when it was written, unix nanoseconds.
    pub fn snapshot_age(&self) -> Option<(u64, i64)> {
        let (meta, file) = self.inner.snapshots.current()?;
        Some((meta.last_log_id.map_or(0, |id| id.index), file.written_unix_ns()))
    }

    /// Writes what this member has applied to a file that is deleted when it is dropped. The log may lag or lead it:
    /// it is not Raft's snapshot.
    pub(crate) async fn export_snapshot(&self) -> std::io::Result<SnapshotFile> {
        let export = self.inner.state_writer.start_export(self.inner.snapshots.clone()).await?;
        export.await.map_err(std::io::Error::other)?
    }

    /// Writes a snapshot now, whatever the policy says; it is done when `status().snapshot_index` has risen.
    pub async fn trigger_snapshot(&self) -> Result<(), TransferError> {
        let raft = &self.inner.raft;
        raft.with_state_machine(|machine| {
            machine.want_snapshot();
            Box::pin(std::future::ready(()))
        })
        .await
        .map_err(|_| TransferError::Stopped)?;
        raft.trigger().snapshot().await.map_err(|_| TransferError::Stopped)
    }

    /// Resolves when this member cannot go on (a write failed, or the log holds a command of a newer version), with what
    /// to tell the person. The process must end.
    pub async fn failed(&self) -> String {
        self.inner.failure.wait().await
    }
}

#[cfg(test)]
mod tests;
