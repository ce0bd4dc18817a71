//! openraft's log storage on the `log` database. Key: group (u32, big-endian), then index (u64, big-endian), so all
//! groups share one WAL and one fsync; value: `nave.v1.Entry`. A second column family holds each group's vote, purge
//! mark and commit mark.
//!
//! `append` puts the entries into the in-memory tail, where every reader sees them at once, queues them and returns;
//! the one writer thread (`writer.rs`) makes many appends durable with one fsync. Votes, truncations and purges go
//! through the same queue, so what reaches the disk is always a prefix of what openraft asked for, in order.
//! Reads are served from the tail, and below it from RocksDB on a blocking thread (`reader.rs`).

mod dump;
mod keys;
mod reader;
mod tail;
mod writer;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use parking_lot::{Mutex, RwLock};
use rocksdb::DB;
use tokio::sync::oneshot;

pub(crate) use self::dump::read_log;
pub use self::dump::{LoggedEntry, dump_log};
pub(crate) use self::reader::LogReader;
use self::tail::Tail;
use self::writer::{Io, Queue, Writer};
use crate::raft::types::{Entry, LogId, Payload, TypeConfig, Vote};
use crate::storage::failure::Failure;
use crate::storage::rocks;

/// What the log database has done since the start, for /metrics.
#[derive(Debug, Default)]
pub(crate) struct LogCounters {
    /// Entries made durable.
    pub(crate) entries_appended_total: AtomicU64,
    /// Synced writes of the log database, each one fsync of its WAL.
    pub(crate) fsyncs_total: AtomicU64,
    /// Time spent in synced writes, nanoseconds.
    pub(crate) fsync_ns_total: AtomicU64,
}

/// The open log database and its writer thread. Dropping it ends the thread after what is queued has been written.
#[derive(Debug)]
pub(crate) struct LogDatabase {
    shared: Arc<Shared>,
    writer: Option<std::thread::JoinHandle<()>>,
}

/// What the writer thread, the stores and the readers share.
pub(in crate::storage) struct Shared {
    db: DB,
    queue: Queue,
    groups: Mutex<BTreeMap<u32, Arc<Group>>>,
    failure: Failure,
    counters: Arc<LogCounters>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogDatabase").field("path", &self.db.path()).finish_non_exhaustive()
    }
}

/// One Raft group's log as it is seen now: ahead of the disk by what is queued.
#[derive(Debug)]
pub(in crate::storage) struct Group {
    id: u32,
    tail: RwLock<Tail>,
}

impl LogDatabase {
    pub(crate) fn open(path: &Path, failure: Failure) -> io::Result<Self> {
        let db = rocks::open(&rocks::log_options(), path, [keys::LOG, keys::META])?;
        let shared = Arc::new(Shared {
            db,
            queue: Queue::default(),
            groups: Mutex::default(),
            failure,
            counters: Arc::default(),
        });
        let writer = Writer::new(shared.clone());
        let writer = std::thread::Builder::new().name("log-writer".to_owned()).spawn(move || writer.run())?;
        Ok(Self { shared, writer: Some(writer) })
    }

    pub(crate) fn counters(&self) -> Arc<LogCounters> {
        self.shared.counters.clone()
    }

    /// The store of one group; all stores of a group share its tail.
    pub(crate) fn group(&self, id: u32) -> io::Result<LogStore> {
        let mut groups = self.shared.groups.lock();
        let group = match groups.get(&id) {
            Some(group) => group.clone(),
            None => {
                let group =
                    Arc::new(Group { id, tail: RwLock::new(reader::load_tail(&self.shared.db, id)?) });
                groups.insert(id, group.clone());
                group
            }
        };
        Ok(LogStore { shared: self.shared.clone(), group })
    }
}

impl Drop for LogDatabase {
    fn drop(&mut self) {
        self.shared.queue.close();
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            self.shared.failure.publish("the log writer thread panicked");
        }
    }
}

/// One group's log, for openraft. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct LogStore {
    shared: Arc<Shared>,
    group: Arc<Group>,
}

impl LogStore {
    fn push(&self, io: Io) {
        self.shared.queue.push(self.group.clone(), io);
    }

    /// Resolves once everything queued so far is on disk.
    #[cfg(test)]
    pub(crate) async fn flush(&self) -> io::Result<()> {
        let (done, written) = oneshot::channel();
        self.push(Io::Barrier(done));
        written.await.map_err(|_| stopped())?
    }
}

fn stopped() -> io::Error {
    io::Error::other("the log writer has stopped")
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogReader;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let tail = self.group.tail.read();
        Ok(LogState { last_purged_log_id: tail.purged(), last_log_id: tail.last() })
    }

    async fn get_log_reader(&mut self) -> LogReader {
        LogReader::new(self.shared.clone(), self.group.clone())
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.shared.failure.check()?;
        let (done, written) = oneshot::channel();
        self.push(Io::Vote(*vote, done));
        written.await.map_err(|_| stopped())?
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.group.tail.write().set_committed(committed);
        self.shared.queue.mark_committed(self.group.clone());
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.group.tail.read().committed())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        self.shared.failure.check()?;
        let entries: Vec<Entry> = entries.into_iter().collect();
        // The lock covers the push as well, so that the queue has the order of the tail.
        let mut tail = self.group.tail.write();
        let sequence = tail.append(&entries)?;
        self.push(Io::Append { entries, sequence, callback });
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        self.shared.failure.check()?;
        let mut tail = self.group.tail.write();
        let from = last.map_or(0, |id| id.index + 1);
        if let Some(end) = tail.truncate_from(from, last) {
            self.push(Io::Truncate { from, end });
        }
        Ok(())
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        self.shared.failure.check()?;
        let mut tail = self.group.tail.write();
        if let Some(from) = tail.purge(upto) {
            self.push(Io::Purge { from, upto });
        }
        Ok(())
    }
}

/// What an entry costs in memory beside its command.
fn entry_bytes(entry: &Entry) -> usize {
    const FIXED: usize = 96;
    FIXED
        + match &entry.payload {
            Payload::Normal(command) => command.0.len(),
            Payload::Blank => 0,
            Payload::Membership(membership) => 128 * membership.nodes().count(),
        }
}

fn index_of(entry: &Entry) -> u64 {
    entry.log_id.index
}

#[cfg(test)]
pub(crate) mod tests;
