//! From committed entries to the tables: decode, refuse what this build does not know, apply under the write lock, tell
//! the observer, answer the proposers, hand the changes to the state writer. openraft runs this on a task of its own.
//! Nothing here waits for a disk unless the state writer is a whole queue behind.

use std::io;
use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use nave_orchestrator_core::{Applied, Change, ClusterState, unknown_command};
use nave_proto::{COMMAND_FORMAT, pb};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine, Snapshot};
use parking_lot::RwLock;
use prost::Message as _;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::raft::types::{
    CommandReply, Entry, LeaderId, LogId, MemberNode, Payload, SnapshotMeta, StoredMembership, TypeConfig,
};
use crate::raft::{ApplyObserver, SnapshotSettings};
use crate::storage::failure::Failure;
use crate::storage::snapshot::{SnapshotDirectory, SnapshotFile};
use crate::storage::state::{LoadedState, SnapshotBuild, StateBatch, StateHandle};

/// Entries applied under one hold of the write lock: at some 5 µs each, readers wait well below a millisecond.
pub(crate) const APPLY_ENTRIES_MAX: usize = 128;

/// The tables, shared with every reader on this member.
#[derive(Debug)]
pub(crate) struct Tables {
    pub(crate) state: RwLock<ClusterState>,
    /// The newest applied membership; changed while the state's write lock is held.
    pub(crate) membership: RwLock<StoredMembership>,
    /// Index of the newest applied entry, raised after the tables show it.
    pub(crate) applied: watch::Sender<u64>,
}

pub(crate) struct StateMachine {
    tables: Arc<Tables>,
    applied: Option<LogId>,
    membership: StoredMembership,
    writer: StateHandle,
    snapshots: Arc<SnapshotDirectory>,
    observer: Arc<dyn ApplyObserver>,
    failure: Failure,
    policy: SnapshotSettings,
    snapshot_started: Option<Instant>,
    snapshot_wanted: bool,
    gaps_allowed: bool,
}

impl std::fmt::Debug for StateMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StateMachine").field("applied", &self.applied).finish_non_exhaustive()
    }
}

impl StateMachine {
    pub(crate) fn new(
        loaded: LoadedState,
        writer: StateHandle,
        snapshots: Arc<SnapshotDirectory>,
        observer: Arc<dyn ApplyObserver>,
        failure: Failure,
        policy: SnapshotSettings,
    ) -> Self {
        let LoadedState { tables, applied, membership } = loaded;
        observer.restored(&tables);
        let index = applied.map_or(0, |id| id.index);
        let tables = Arc::new(Tables {
            state: RwLock::new(tables),
            membership: RwLock::new(membership.clone()),
            applied: watch::Sender::new(index),
        });
        Self {
            tables,
            applied,
            membership,
            writer,
            snapshots,
            observer,
            failure,
            policy,
            snapshot_started: None,
            snapshot_wanted: false,
            gaps_allowed: false,
        }
    }

    pub(crate) fn tables(&self) -> Arc<Tables> {
        self.tables.clone()
    }

    /// The next snapshot is not put off.
    pub(crate) fn want_snapshot(&mut self) {
        self.snapshot_wanted = true;
    }

    /// openraft's test suite applies entry 5 after entry 3; nothing else may.
    #[cfg(test)]
    pub(crate) fn allow_gaps(mut self) -> Self {
        self.gaps_allowed = true;
        self
    }

    async fn apply_chunk(
        &mut self,
        chunk: Vec<Result<EntryResponder<TypeConfig>, io::Error>>,
    ) -> Result<(), io::Error> {
        let mut steps = Vec::with_capacity(chunk.len());
        let mut responders = Vec::with_capacity(chunk.len());
        for item in chunk {
            let (entry, responder) = item?;
            steps.push(self.decode(entry)?);
            responders.push(responder);
        }
        let (replies, batch) = self.apply_steps(steps);
        let Some(batch) = batch else { return Ok(()) };
        self.tables.applied.send_replace(batch.applied.index);
        for (responder, reply) in responders.into_iter().zip(replies) {
            if let Some(responder) = responder {
                responder.send(CommandReply(reply));
            }
        }
        self.writer.write(batch).await
    }

    /// Takes the entry as the next one, or ends this member: a gap is lost data, and an unknown command must not be
    /// skipped, since the members that know it have changed their tables by it.
    fn decode(&mut self, entry: Entry) -> Result<Step, io::Error> {
        let index = entry.log_id.index;
        if let Some(last) = self.applied
            && index != last.index + 1
            && !self.gaps_allowed
        {
            return Err(self.stop(format!(
                "entry {index} came to be applied after entry {}; entries in between are missing",
                last.index
            )));
        }
        let action = match entry.payload {
            Payload::Blank => Action::Nothing,
            Payload::Membership(membership) => {
                self.membership = StoredMembership::new(Some(entry.log_id), membership);
                Action::Membership(self.membership.clone())
            }
            Payload::Normal(bytes) => match pb::Command::decode(bytes.0) {
                Ok(command) if unknown_command(&command) => {
                    return Err(self.stop(format!(
                        "log entry {index} holds a command of format {}, this program (nave {}) knows formats up to \
                         {COMMAND_FORMAT}; install the newer version on this member, nothing was applied",
                        command.written_by,
                        env!("CARGO_PKG_VERSION"),
                    )));
                }
                Ok(command) => Action::Command(Box::new(command)),
                Err(error) => {
                    return Err(self.stop(format!("log entry {index} holds no command: {error}")));
                }
            },
        };
        self.applied = Some(entry.log_id);
        Ok(Step { log_id: entry.log_id, action })
    }

    fn stop(&self, message: String) -> io::Error {
        self.failure.publish(message.clone());
        io::Error::new(io::ErrorKind::InvalidData, message)
    }

    fn apply_steps(&self, steps: Vec<Step>) -> (Vec<pb::Reply>, Option<StateBatch>) {
        let mut replies = Vec::with_capacity(steps.len());
        let mut changes: Vec<Change> = Vec::new();
        let (mut applied, mut membership) = (None, None);
        // openraft would go on without its state machine, and the tables may be half changed.
        let _guard = self.failure.guard("applying a log entry");
        let mut state = self.tables.state.write();
        for Step { log_id, action } in steps {
            applied = Some(log_id);
            let outcome = match action {
                Action::Command(command) => state.apply(log_id.index, *command),
                Action::Nothing | Action::Membership(_) => {
                    if let Action::Membership(applied) = action {
                        *self.tables.membership.write() = applied.clone();
                        membership = Some(applied);
                    }
                    state.apply_blank(log_id.index);
                    Applied { reply: pb::Reply::default(), changes: Vec::new() }
                }
            };
            self.observer.applied(state.revision(), &outcome.changes);
            replies.push(outcome.reply);
            changes.extend(outcome.changes);
        }
        let revision = state.revision();
        drop(state);
        self.observer.settled(revision);
        (replies, applied.map(|applied| StateBatch { changes, applied, membership }))
    }

    async fn start_snapshot(&mut self) -> SnapshotBuilder {
        self.snapshot_started = Some(Instant::now());
        self.snapshot_wanted = false;
        SnapshotBuilder(Some(self.writer.start_snapshot(self.snapshots.clone()).await))
    }

    fn may_put_off_snapshot(&self) -> bool {
        let index = self.applied.map_or(0, |id| id.index);
        let covered =
            self.snapshots.current().and_then(|(meta, _)| meta.last_log_id).map_or(0, |id| id.index);
        !self.snapshot_wanted
            && index.saturating_sub(covered) < self.policy.entries_between.saturating_mul(10)
            && self.snapshot_started.is_some_and(|started| started.elapsed() < self.policy.interval_min)
    }
}

struct Step {
    log_id: LogId,
    action: Action,
}

enum Action {
    Nothing,
    Membership(StoredMembership),
    Command(Box<pb::Command>),
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + Send,
    {
        let mut chunks = entries.ready_chunks(APPLY_ENTRIES_MAX);
        while let Some(chunk) = chunks.next().await {
            self.apply_chunk(chunk).await?;
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<SnapshotBuilder> {
        if !force && self.may_put_off_snapshot() {
            return None;
        }
        Some(self.start_snapshot().await)
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        self.start_snapshot().await
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotFile,
    ) -> Result<(), io::Error> {
        let (directory, expected) = (self.snapshots.clone(), meta.clone());
        let (file, tables) =
            tokio::task::spawn_blocking(move || load_snapshot(&directory, &expected, &snapshot))
                .await
                .map_err(io::Error::other)??;
        self.writer.replace(file).await?;
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        let mut state = self.tables.state.write();
        *state = tables;
        *self.tables.membership.write() = self.membership.clone();
        self.observer.restored(&state);
        drop(state);
        let index = meta.last_log_id.map_or(0, |id| id.index);
        self.tables.applied.send_replace(index);
        tracing::info!(index, "snapshot installed");
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<Snapshot<LeaderId, u64, MemberNode, SnapshotFile>>, io::Error> {
        Ok(self.snapshots.current().map(|(meta, snapshot)| Snapshot { meta, snapshot }))
    }
}

/// Checks the file wholly, makes it this member's snapshot, and builds the tables from it. Blocks.
fn load_snapshot(
    directory: &SnapshotDirectory,
    expected: &SnapshotMeta,
    file: &SnapshotFile,
) -> io::Result<(SnapshotFile, ClusterState)> {
    let found = file.verify()?;
    if found != *expected {
        let message = format!("the snapshot is of {found}, not of {expected}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let file = directory.adopt(file, expected)?;
    let mut reader = file.reader()?;
    let mut rows = Vec::new();
    while let Some((_, value)) = reader.next_row()? {
        rows.push(pb::Row::decode(value.as_slice()).map_err(io::Error::other)?);
    }
    let index = expected.last_log_id.map_or(0, |id| id.index);
    let tables = ClusterState::from_rows(rows, index).map_err(io::Error::other)?;
    Ok((file, tables))
}

/// A snapshot that is being written since it was asked for; openraft awaits it on a task of its own.
#[derive(Debug)]
pub(crate) struct SnapshotBuilder(Option<io::Result<SnapshotBuild>>);

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotFile;

    async fn build_snapshot(
        &mut self,
    ) -> Result<Snapshot<LeaderId, u64, MemberNode, SnapshotFile>, io::Error> {
        let build = self.0.take().ok_or_else(|| io::Error::other("a snapshot is built once"))?;
        let (meta, snapshot) = build?.await.map_err(io::Error::other)??;
        Ok(Snapshot { meta, snapshot })
    }
}
