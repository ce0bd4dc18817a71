//! The `state` database: the rows of `ClusterState`, and in the same write the log id and membership that they stand
//! for. It has no write-ahead log, since Raft's log is one: it is behind the tables in memory by what its writer thread
//! has queued, and on disk by what RocksDB has not flushed yet. After a crash of process or host it is a prefix of what
//! was applied (all column families are flushed as one), and openraft applies the rest of the log again. It is flushed
//! at an orderly end and before each snapshot, so what is applied again is at most what lies between two snapshots.
//! The commit mark of the log is on disk with the next write only, so a member that was killed may start one write
//! behind what it had shown, until it hears from a leader; a linearizable read waits for that.
//!
//! Snapshots are views of this database, so building one neither stops `apply` nor copies the tables.

mod queue;
mod writer;

use std::io;
use std::path::Path;
use std::sync::Arc;

use nave_orchestrator_core::{Change, ClusterState};
use nave_proto::pb;
use prost::Message as _;
use rocksdb::{ColumnFamily, DB, FlushOptions, IteratorMode, Snapshot, WriteBatch, WriteOptions};
use tokio::sync::{Semaphore, oneshot};

use self::queue::{Message, Queue, stopped};
use self::writer::Writer;
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

/// The open state database and its writer thread. Dropping it ends the thread after what is queued is durable.
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
    queue: Arc<Queue>,
    /// Bounds the queue; not the queue itself, so that closing never waits.
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

    /// Not durable before the next flush.
    fn write(&self, batch: WriteBatch) -> io::Result<()> {
        let mut unlogged = WriteOptions::default();
        unlogged.disable_wal(true);
        self.0.write_opt(batch, &unlogged).map_err(rocks::io_error)
    }

    /// Makes all that was written durable, as one.
    fn flush(&self) -> io::Result<()> {
        let families = [self.family(ROWS), self.family(META)];
        self.0.flush_cfs_opt(&[&families[0], &families[1]], &FlushOptions::default()).map_err(rocks::io_error)
    }

    /// Deletes every row, and with them the mark that says what they stand for; durable on return.
    fn clear(&self) -> io::Result<()> {
        let mut batch = WriteBatch::default();
        batch.delete_cf(self.family(META), APPLIED);
        batch.delete_cf(self.family(META), MEMBERSHIP);
        batch.delete_range_cf(self.family(ROWS), [].as_slice(), [u8::MAX; 8].as_slice());
        self.write(batch)?;
        self.flush()
    }
}

impl StateDatabase {
    /// Opens the database and loads its rows.
    pub(crate) fn open(path: &Path, failure: Failure) -> io::Result<(Self, LoadedState)> {
        let db = Arc::new(Database(rocks::open(&rocks::state_options(), path, [ROWS, META])?));
        let loaded = load(&db)?;
        let queue = Arc::new(Queue::default());
        let writer = Writer::new(db.clone(), queue.clone(), failure.clone());
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
        self.handle.queue.close();
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
        self.queue.push(Message::Write(batch, slot))
    }

    /// Resolves once all that is queued is in the database.
    pub(crate) async fn barrier(&self) -> io::Result<()> {
        self.ask(Message::Barrier).await
    }

    /// Replaces all rows by a snapshot's; durable on return. The file was verified.
    pub(crate) async fn replace(&self, file: SnapshotFile) -> io::Result<()> {
        self.ask(|done| Message::Replace(file, done)).await
    }

    async fn ask(&self, message: impl FnOnce(oneshot::Sender<io::Result<()>>) -> Message) -> io::Result<()> {
        let (done, answered) = oneshot::channel();
        self.queue.push(message(done))?;
        answered.await.map_err(|_| stopped())?
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

/// Log id and membership come from the view itself, so they fit the rows whatever is applied meanwhile.
fn write_snapshot(
    db: &Database,
    view: &Snapshot<'_>,
    directory: &SnapshotDirectory,
) -> io::Result<(SnapshotMeta, SnapshotFile)> {
    // Else the next start would find a snapshot newer than the state, and write all of it anew.
    db.flush()?;
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

/// What a database that nobody has open holds; nothing when it was never filled, or not wholly. Blocks.
pub(crate) fn peek(path: &Path) -> io::Result<Option<LoadedState>> {
    let options = rocksdb::Options::default();
    let db =
        DB::open_cf_for_read_only(&options, path, ["default", ROWS, META], false).map_err(rocks::io_error)?;
    read(&Database(db))
}

fn load(db: &Database) -> io::Result<LoadedState> {
    if let Some(loaded) = read(db)? {
        return Ok(loaded);
    }
    // Rows without a mark are an install that did not end. Openraft installs the snapshot again.
    db.clear()?;
    let membership = StoredMembership::default();
    Ok(LoadedState { tables: ClusterState::new(), applied: None, membership })
}

fn read(db: &Database) -> io::Result<Option<LoadedState>> {
    let get = |key| db.0.get_cf(db.family(META), key).map_err(rocks::io_error);
    let applied = decode_applied(get(APPLIED)?)?;
    let Some(last) = applied else { return Ok(None) };
    let membership = decode_membership(get(MEMBERSHIP)?)?;
    let tables = ClusterState::from_rows(read_rows(db)?, last.index).map_err(|e| corrupt(&e))?;
    Ok(Some(LoadedState { tables, applied, membership }))
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

    /// Whether RocksDB changes its files just now, by itself.
    pub(crate) fn is_busy(handle: &StateHandle) -> bool {
        let kinds = [
            "mem-table-flush-pending",
            "num-running-flushes",
            "compaction-pending",
            "num-running-compactions",
        ];
        kinds.iter().any(|kind| {
            let value = handle.db.0.property_int_value_cf(handle.db.family(ROWS), &format!("rocksdb.{kind}"));
            value.unwrap() != Some(0)
        })
    }

    /// Leaves the rows of a closed database, without what they stand for.
    pub(crate) fn forget_mark(path: &Path) {
        let db = Database(rocks::open(&rocks::state_options(), path, [ROWS, META]).unwrap());
        db.0.delete_cf(db.family(META), APPLIED).unwrap();
    }
}
