//! The one thread that writes the log database. It takes all that is queued, writes it as one batch, syncs once if any
//! of it must be durable, and completes the callbacks in order: group commit, since openraft appends entries one by one
//! far more often than it waits for one to be durable. An error is final.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use openraft::storage::IOFlushed;
use parking_lot::{Condvar, Mutex};
use prost::Message as _;
use rocksdb::{AsColumnFamilyRef, WriteBatch, WriteOptions};
use tokio::sync::oneshot;

use super::{Group, Shared, index_of, keys};
use crate::raft::convert::{entry_to_pb, log_id_to_pb, vote_to_pb};
use crate::raft::types::{Entry, LogId, TypeConfig, Vote};
use crate::storage::rocks;

/// Truncations of more entries than this are one range deletion.
const POINT_DELETES_MAX: u64 = 1024;

pub(super) enum Io {
    Append {
        entries: Vec<Entry>,
        sequence: u64,
        callback: IOFlushed<TypeConfig>,
    },
    Vote(Vote, oneshot::Sender<io::Result<()>>),
    /// Deletes the entries `from..end`.
    Truncate {
        from: u64,
        end: u64,
    },
    /// Deletes the entries from `from` up to and with `upto`.
    Purge {
        from: u64,
        upto: LogId,
    },
    #[cfg(test)]
    Barrier(oneshot::Sender<io::Result<()>>),
}

struct Queued {
    group: Arc<Group>,
    io: Io,
}

/// Unbounded by itself; `Tail` says what bounds it.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<QueueState>,
    wake: Condvar,
}

#[derive(Default)]
struct QueueState {
    ios: Vec<Queued>,
    committed: BTreeMap<u32, Arc<Group>>,
    closed: bool,
    sleeping: bool,
}

impl Queue {
    pub(super) fn push(&self, group: Arc<Group>, io: Io) {
        let mut state = self.state.lock();
        if state.closed {
            drop(state);
            complete(io, &Err(io::Error::other("the log writer has stopped")));
            return;
        }
        state.ios.push(Queued { group, io });
        if std::mem::take(&mut state.sleeping) {
            self.wake.notify_one();
        }
    }

    /// A commit mark rides with the next write, or is written at the end: it is only a hint for the next start.
    pub(super) fn mark_committed(&self, group: Arc<Group>) {
        self.state.lock().committed.insert(group.id, group);
    }

    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.wake.notify_one();
    }

    /// What is to be written next; `None`: closed and empty.
    fn take(&self) -> Option<Taken> {
        let mut state = self.state.lock();
        loop {
            let due = state.closed && !state.committed.is_empty();
            if !state.ios.is_empty() || due {
                return Some((std::mem::take(&mut state.ios), std::mem::take(&mut state.committed)));
            }
            if state.closed {
                return None;
            }
            state.sleeping = true;
            self.wake.wait(&mut state);
            state.sleeping = false;
        }
    }
}

/// What to write as one, and the groups whose commit mark has changed.
type Taken = (Vec<Queued>, BTreeMap<u32, Arc<Group>>);

pub(super) struct Writer {
    shared: Arc<Shared>,
    synced: WriteOptions,
    unsynced: WriteOptions,
    buffer: Vec<u8>,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let mut synced = WriteOptions::default();
        synced.set_sync(true);
        Self { shared, synced, unsynced: WriteOptions::default(), buffer: Vec::new() }
    }

    pub(super) fn run(mut self) {
        let shared = self.shared.clone();
        let _guard = shared.failure.guard("the log's writer");
        while let Some((ios, committed)) = shared.queue.take() {
            let result = shared.failure.check().and_then(|()| self.write(&ios, committed));
            if let Err(error) = &result {
                shared.failure.publish(format!(
                    "writing the log in {} failed: {error}; what it holds is unknown until this member starts again",
                    shared.db.path().display()
                ));
                shared.queue.close();
            }
            for queued in ios {
                if result.is_ok() {
                    note_written(&queued);
                }
                complete(queued.io, &result);
            }
        }
    }

    fn write(&mut self, ios: &[Queued], committed: BTreeMap<u32, Arc<Group>>) -> io::Result<()> {
        let shared = self.shared.clone();
        let family = |name| shared.db.cf_handle(name).expect("column families are created in open()");
        let (log, meta) = (family(keys::LOG), family(keys::META));
        let mut batch = WriteBatch::default();
        let (mut entries, mut sync) = (0, false);
        for Queued { group, io } in ios {
            match io {
                Io::Append { entries: appended, .. } => {
                    sync = true;
                    entries += appended.len();
                    for entry in appended {
                        self.buffer.clear();
                        entry_to_pb(entry).encode(&mut self.buffer).expect("a Vec grows");
                        batch.put_cf(log, keys::entry(group.id, index_of(entry)), &self.buffer);
                    }
                }
                Io::Vote(vote, _) => {
                    sync = true;
                    batch.put_cf(
                        meta,
                        keys::meta(group.id, keys::Meta::Vote),
                        vote_to_pb(vote).encode_to_vec(),
                    );
                }
                Io::Truncate { from, end } => delete(&mut batch, log, group.id, *from, *end),
                Io::Purge { from, upto } => {
                    let mark = log_id_to_pb(upto).encode_to_vec();
                    batch.put_cf(meta, keys::meta(group.id, keys::Meta::Purged), mark);
                    delete(&mut batch, log, group.id, *from, upto.index + 1);
                }
                #[cfg(test)]
                Io::Barrier(_) => sync = true,
            }
        }
        for (id, group) in committed {
            let key = keys::meta(id, keys::Meta::Committed);
            match group.tail.read().committed() {
                Some(mark) => batch.put_cf(meta, key, log_id_to_pb(&mark).encode_to_vec()),
                None => batch.delete_cf(meta, key),
            }
        }
        self.commit(batch, sync, entries)
    }

    fn commit(&self, batch: WriteBatch, sync: bool, entries: usize) -> io::Result<()> {
        let counters = &self.shared.counters;
        let started = tokio::time::Instant::now();
        let options = if sync { &self.synced } else { &self.unsynced };
        #[cfg(test)]
        if super::tests::write_must_fail(&self.shared) {
            return Err(io::Error::other("injected"));
        }
        self.shared.db.write_opt(batch, options).map_err(rocks::io_error)?;
        if sync {
            let elapsed = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
            counters.fsyncs_total.fetch_add(1, Ordering::Relaxed);
            counters.fsync_ns_total.fetch_add(elapsed, Ordering::Relaxed);
            counters.entries_appended_total.fetch_add(entries as u64, Ordering::Relaxed);
        }
        Ok(())
    }
}

fn delete(batch: &mut WriteBatch, log: &impl AsColumnFamilyRef, group: u32, from: u64, end: u64) {
    if end.saturating_sub(from) > POINT_DELETES_MAX {
        batch.delete_range_cf(log, keys::entry(group, from), keys::entry(group, end));
    } else {
        for index in from..end {
            batch.delete_cf(log, keys::entry(group, index));
        }
    }
}

/// Publishes what became durable before the callback runs, so that whoever is woken by it finds it.
fn note_written(queued: &Queued) {
    match &queued.io {
        Io::Append { sequence, .. } => queued.group.tail.write().written(*sequence),
        Io::Vote(vote, _) => queued.group.tail.write().set_vote(*vote),
        Io::Truncate { .. } | Io::Purge { .. } => {}
        #[cfg(test)]
        Io::Barrier(_) => {}
    }
}

fn complete(io: Io, result: &io::Result<()>) {
    let result = match result {
        Ok(()) => Ok(()),
        Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
    };
    match io {
        Io::Append { callback, .. } => callback.io_completed(result),
        // A receiver that is gone no longer cares.
        Io::Vote(_, done) => drop(done.send(result)),
        #[cfg(test)]
        Io::Barrier(done) => drop(done.send(result)),
        Io::Truncate { .. } | Io::Purge { .. } => {}
    }
}
