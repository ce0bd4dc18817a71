//! The `state` database: the rows of `ClusterState`, and in the same write the log id and membership that they stand
//! for. It is behind the tables in memory by what its writer thread has queued, and never synced: after a crash it is a
//! prefix of what was applied, and openraft applies the rest of the log again.
//!
//! Snapshots are views of this database, so building one neither stops `apply` nor copies the tables.

mod writer;

use std::io;
use std::path::Path;
use std::sync::Arc;

use nave_orchestrator_core::{Change, ClusterState};
use nave_proto::pb;
use prost::Message as _;
use rocksdb::{ColumnFamily, DB, IteratorMode, Snapshot, WriteBatch, WriteOptions};
use tokio::sync::{Semaphore, mpsc, oneshot};

use self::writer::{Message, Writer};
use crate::raft::convert::{log_id_from_pb, stored_membership_from_pb};
use crate::raft::types::{LogId, SnapshotMeta, StoredMembership};
use crate::storage::failure::Failure;
use crate::storage::rocks;
use crate::storage::snapshot::{SnapshotDirectory, SnapshotFile, SnapshotWriter, TemporaryFile};

const ROWS: &str = "rows";
const META: &str = "meta";
const APPLIED: &[u8] = b"applied";
const MEMBERSHIP: &[u8] = b"membership";

/// Batches that may wait for the writer. One is the changes of at most `APPLY_ENTRIES_MAX` (128) entries, in practice
/// some 100 KiB, so 64 are a few MiB; then `apply` waits, and with it the proposals.
const QUEUED_BATCHES_MAX: usize = 64;

/// What `apply` did to the rows, to be written as one.
#[derive(Debug)]
pub(crate) struct StateBatch {
    pub(crate) changes: Vec<Change>,
    pub(crate) applied: LogId,
    /// Set when a membership entry was among the applied.
    pub(crate) membership: Option<StoredMembership>,
}

/// The state as it was found on disk.
#[derive(Debug)]
pub(crate) struct LoadedState {
    pub(crate) tables: ClusterState,
    pub(crate) applied: Option<LogId>,
    pub(crate) membership: StoredMembership,
}

/// The open state database and its writer thread. Dropping it ends the thread after what is queued has been written.
#[derive(Debug)]
pub(crate) struct StateDatabase {
    handle: StateHandle,
    writer: Option<std::thread::JoinHandle<()>>,
    failure: Failure,
}

/// The way into the writer's queue. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct StateHandle {
    db: Arc<Database>,
    queue: mpsc::UnboundedSender<Message>,
    /// Bounds the queue; not the channel, so that closing never waits.
    slots: Arc<Semaphore>,
}

struct Database(DB);

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("StateDatabase").field(&self.0.path()).finish()
    }
}

impl Database {
    fn family(&self, name: &str) -> &ColumnFamily {
        self.0.cf_handle(name).expect("column families are created in open()")
    }

    /// Deletes every row, and first of all the mark that says what they stand for.
    fn clear(&self) -> io::Result<()> {
        let mut batch = WriteBatch::default();
        batch.delete_cf(self.family(META), APPLIED);
        batch.delete_cf(self.family(META), MEMBERSHIP);
        batch.delete_range_cf(self.family(ROWS), [].as_slice(), [u8::MAX; 8].as_slice());
        let mut synced = WriteOptions::default();
        synced.set_sync(true);
        self.0.write_opt(batch, &synced).map_err(rocks::io_error)
    }
}

impl StateDatabase {
    /// Opens the database and loads its rows.
    pub(crate) fn open(path: &Path, failure: Failure) -> io::Result<(Self, LoadedState)> {
        let db = Arc::new(Database(rocks::open(&rocks::state_options(), path, [ROWS, META])?));
        let loaded = load(&db)?;
        let (queue, receiver) = mpsc::unbounded_channel();
        let writer = Writer::new(db.clone(), receiver, failure.clone());
        let writer =
            std::thread::Builder::new().name("state-writer".to_owned()).spawn(move || writer.run())?;
        let slots = Arc::new(Semaphore::new(QUEUED_BATCHES_MAX));
        let handle = StateHandle { db, queue, slots };
        Ok((Self { handle, writer: Some(writer), failure }, loaded))
    }

    pub(crate) fn handle(&self) -> StateHandle {
        self.handle.clone()
    }
}

impl Drop for StateDatabase {
    fn drop(&mut self) {
        // Fails only when the thread has ended already.
        let _closed = self.handle.queue.send(Message::Close);
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            self.failure.publish("the state writer thread panicked");
        }
    }
}

impl StateHandle {
    /// Queues a batch; waits while too many are queued.
    pub(crate) async fn write(&self, batch: StateBatch) -> io::Result<()> {
        let slot = self.slots.clone().acquire_owned().await.map_err(|_| stopped())?;
        self.queue.send(Message::Write(batch, slot)).map_err(|_| stopped())
    }

    /// Resolves once all that is queued is in the database.
    pub(crate) async fn barrier(&self) -> io::Result<()> {
        let (done, reached) = oneshot::channel();
        self.queue.send(Message::Barrier(done)).map_err(|_| stopped())?;
        reached.await.map_err(|_| stopped())
    }

    /// Replaces all rows by a snapshot's; durable on return. The file was verified.
    pub(crate) async fn replace(&self, file: SnapshotFile) -> io::Result<()> {
        let (done, replaced) = oneshot::channel();
        self.queue.send(Message::Replace(file, done)).map_err(|_| stopped())?;
        replaced.await.map_err(|_| stopped())?
    }

    /// Takes a view of the database after all that was queued, and starts to write it to a file. Returns once the view
    /// is taken; the result comes with the handle.
    pub(crate) async fn start_snapshot(
        &self,
        directory: Arc<SnapshotDirectory>,
    ) -> io::Result<SnapshotBuild> {
        self.with_view(move |db, view| write_snapshot(db, view, &directory)).await
    }

    /// The same into a file that stays temporary: it is deleted with its last user.
    pub(crate) async fn start_export(
        &self,
        directory: Arc<SnapshotDirectory>,
    ) -> io::Result<tokio::task::JoinHandle<io::Result<SnapshotFile>>> {
        self.with_view(move |db, view| {
            let temporary = directory.temporary("export");
            write_view(db, view, &temporary)?;
            SnapshotFile::open_temporary(temporary)
        })
        .await
    }

    async fn with_view<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database, &Snapshot<'_>) -> io::Result<T> + Send + 'static,
    ) -> io::Result<tokio::task::JoinHandle<io::Result<T>>> {
        self.barrier().await?;
        let (taken, view_taken) = oneshot::channel();
        let db = self.db.clone();
        // The view borrows the database, so it lives and dies on the thread that reads it.
        let build = tokio::task::spawn_blocking(move || {
            let view = db.0.snapshot();
            // The caller waits for this; if it is gone, nobody wants the file either.
            if taken.send(()).is_err() {
                return Err(stopped());
            }
            work(&db, &view)
        });
        view_taken.await.map_err(|_| stopped())?;
        Ok(build)
    }

    /// The rows as they are in the database now; blocks. For tests.
    #[cfg(test)]
    pub(crate) fn rows(&self) -> io::Result<Vec<pb::Row>> {
        read_rows(&self.db)
    }
}

/// A snapshot in the making.
pub(crate) type SnapshotBuild = tokio::task::JoinHandle<io::Result<(SnapshotMeta, SnapshotFile)>>;

fn stopped() -> io::Error {
    io::Error::other("the state writer has stopped")
}

/// Log id and membership come from the view itself, so they fit the rows whatever is applied meanwhile.
fn write_snapshot(
    db: &Database,
    view: &Snapshot<'_>,
    directory: &SnapshotDirectory,
) -> io::Result<(SnapshotMeta, SnapshotFile)> {
    let temporary = directory.temporary("build");
    let meta = write_view(db, view, &temporary)?;
    let file = directory.publish(&temporary, &meta)?;
    tracing::info!(
        index = meta.last_log_id.map(|id| id.index),
        size_bytes = file.size_bytes(),
        "snapshot written"
    );
    Ok((meta, file))
}

fn write_view(db: &Database, view: &Snapshot<'_>, into: &TemporaryFile) -> io::Result<SnapshotMeta> {
    let get = |key| view.get_cf(db.family(META), key).map_err(rocks::io_error);
    let meta = SnapshotMeta {
        last_log_id: decode_applied(get(APPLIED)?)?,
        last_membership: decode_membership(get(MEMBERSHIP)?)?,
    };
    let mut writer = SnapshotWriter::create(into.path(), &meta)?;
    for item in view.iterator_cf(db.family(ROWS), IteratorMode::Start) {
        let (key, value) = item.map_err(rocks::io_error)?;
        writer.row(&key, &value)?;
    }
    writer.finish()?;
    Ok(meta)
}

/// The cluster's row and the applied index of a database that nobody has open; nothing when it holds none. Blocks.
pub(crate) fn peek(path: &Path) -> io::Result<Option<(pb::ClusterRecord, u64)>> {
    let options = rocksdb::Options::default();
    let db =
        DB::open_cf_for_read_only(&options, path, ["default", ROWS, META], false).map_err(rocks::io_error)?;
    let db = Database(db);
    let applied = decode_applied(db.0.get_cf(db.family(META), APPLIED).map_err(rocks::io_error)?)?;
    for item in db.0.iterator_cf(db.family(ROWS), IteratorMode::Start) {
        let (_, value) = item.map_err(rocks::io_error)?;
        if let Some(pb::row::Row::Cluster(cluster)) = pb::Row::decode(&*value).map_err(|e| corrupt(&e))?.row {
            return Ok(Some((cluster, applied.map_or(0, |id| id.index))));
        }
    }
    Ok(None)
}

fn load(db: &Database) -> io::Result<LoadedState> {
    let get = |key| db.0.get_cf(db.family(META), key).map_err(rocks::io_error);
    let applied = decode_applied(get(APPLIED)?)?;
    let Some(last) = applied else {
        // Rows without a mark are an install that did not end. Openraft installs the snapshot again.
        db.clear()?;
        let membership = StoredMembership::default();
        return Ok(LoadedState { tables: ClusterState::new(), applied: None, membership });
    };
    let membership = decode_membership(get(MEMBERSHIP)?)?;
    let tables = ClusterState::from_rows(read_rows(db)?, last.index).map_err(|e| corrupt(&e))?;
    Ok(LoadedState { tables, applied, membership })
}

fn read_rows(db: &Database) -> io::Result<Vec<pb::Row>> {
    db.0.iterator_cf(db.family(ROWS), IteratorMode::Start)
        .map(|item| {
            let (_, value) = item.map_err(rocks::io_error)?;
            pb::Row::decode(&*value).map_err(|e| corrupt(&e))
        })
        .collect()
}

fn decode_applied(bytes: Option<Vec<u8>>) -> io::Result<Option<LogId>> {
    let Some(bytes) = bytes else { return Ok(None) };
    let id = pb::LogId::decode(bytes.as_slice()).map_err(|e| corrupt(&e))?;
    Ok(Some(log_id_from_pb(&id)))
}

fn decode_membership(bytes: Option<Vec<u8>>) -> io::Result<StoredMembership> {
    let Some(bytes) = bytes else { return Ok(StoredMembership::default()) };
    let stored = pb::StoredMembership::decode(bytes.as_slice()).map_err(|e| corrupt(&e))?;
    stored_membership_from_pb(stored).map_err(|e| corrupt(&e))
}

fn corrupt(error: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("state database: {error}"))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Leaves the rows of a closed database, without what they stand for.
    pub(crate) fn forget_mark(path: &Path) {
        let db = Database(rocks::open(&rocks::state_options(), path, [ROWS, META]).unwrap());
        db.0.delete_cf(db.family(META), APPLIED).unwrap();
    }
}
