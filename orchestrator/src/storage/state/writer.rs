//! The one thread that writes the state database. It encodes rows as well, which keeps that off the apply path, and
//! writes all batches that wait as one.

use std::io;
use std::sync::Arc;

use nave_orchestrator_core::Change;
use prost::Message as _;
use rocksdb::{WriteBatch, WriteOptions};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::{APPLIED, Database, MEMBERSHIP, META, ROWS, StateBatch};
use crate::raft::convert::{log_id_to_pb, stored_membership_to_pb};
use crate::storage::failure::Failure;
use crate::storage::rocks;
use crate::storage::snapshot::SnapshotFile;

/// A write is handed to RocksDB when it holds this much, whatever else waits.
const WRITE_BYTES_MAX: usize = 4 * 1024 * 1024;

pub(super) enum Message {
    Write(StateBatch, OwnedSemaphorePermit),
    Barrier(oneshot::Sender<()>),
    Replace(SnapshotFile, oneshot::Sender<io::Result<()>>),
    Close,
}

/// Rows to be written as one: a key and what it holds from now on, if anything.
#[derive(Default)]
struct Rows {
    rows: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    bytes: usize,
}

impl Rows {
    fn add(&mut self, changes: &[Change]) {
        for change in changes {
            let (key, value) = (change.key(), change.value());
            self.bytes += key.len() + value.as_ref().map_or(0, Vec::len);
            self.rows.push((key, value));
        }
    }

    /// By key, each once, as it was added last: RocksDB finds the place of a key at once that lies just behind the one
    /// before, and what was overtaken in the meantime need not be written.
    fn in_order(mut self) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
        self.rows.sort_by(|(a, _), (b, _)| a.cmp(b));
        self.rows.dedup_by(|later, kept| {
            let same = later.0 == kept.0;
            if same {
                std::mem::swap(later, kept);
            }
            same
        });
        self.rows
    }
}

pub(super) struct Writer {
    db: Arc<Database>,
    queue: mpsc::UnboundedReceiver<Message>,
    failure: Failure,
}

impl Writer {
    pub(super) fn new(db: Arc<Database>, queue: mpsc::UnboundedReceiver<Message>, failure: Failure) -> Self {
        Self { db, queue, failure }
    }

    pub(super) fn run(mut self) {
        let failure = self.failure.clone();
        let _guard = failure.guard("the state's writer");
        let mut next = self.queue.blocking_recv();
        while let Some(message) = next.take() {
            let result = match message {
                Message::Write(batch, slot) => self.write(batch, slot).map(|following| next = following),
                Message::Barrier(done) => {
                    // A caller that is gone no longer cares.
                    let _gone = done.send(());
                    Ok(())
                }
                Message::Replace(file, done) => {
                    let result = self.replace(&file);
                    let copy = result.as_ref().map_err(|e| io::Error::new(e.kind(), e.to_string())).copied();
                    let _gone = done.send(copy);
                    result
                }
                Message::Close => return,
            };
            if let Err(error) = result {
                self.failure
                    .publish(format!("writing the state in {} failed: {error}", self.db.0.path().display()));
                return;
            }
            if next.is_none() {
                next = self.queue.blocking_recv();
            }
        }
    }

    /// Writes `first` and the batches that wait behind it; returns the message that ended the run of batches.
    fn write(&mut self, first: StateBatch, first_slot: OwnedSemaphorePermit) -> io::Result<Option<Message>> {
        let mut rows = Rows::default();
        let mut slots = vec![first_slot];
        let mut following = None;
        let mut newest = first;
        rows.add(&newest.changes);
        while rows.bytes < WRITE_BYTES_MAX {
            match self.queue.try_recv() {
                Ok(Message::Write(batch, slot)) => {
                    rows.add(&batch.changes);
                    slots.push(slot);
                    let membership = newest.membership;
                    newest = batch;
                    newest.membership = newest.membership.or(membership);
                }
                Ok(other) => {
                    following = Some(other);
                    break;
                }
                Err(_) => break,
            }
        }
        self.db.0.write(self.encode(rows, &newest)).map_err(rocks::io_error)?;
        Ok(following)
    }

    fn encode(&self, rows: Rows, newest: &StateBatch) -> WriteBatch {
        let mut out = WriteBatch::default();
        let (family, meta) = (self.db.family(ROWS), self.db.family(META));
        for (key, value) in rows.in_order() {
            match value {
                Some(value) => out.put_cf(family, key, value),
                None => out.delete_cf(family, key),
            }
        }
        out.put_cf(meta, APPLIED, log_id_to_pb(&newest.applied).encode_to_vec());
        if let Some(membership) = &newest.membership {
            out.put_cf(meta, MEMBERSHIP, stored_membership_to_pb(membership).encode_to_vec());
        }
        out
    }

    /// The mark goes first and comes last, both synced, so that a crash in between leaves no half that looks whole.
    fn replace(&self, file: &SnapshotFile) -> io::Result<()> {
        self.db.clear()?;
        let (rows, meta) = (self.db.family(ROWS), self.db.family(META));
        let mut reader = file.reader()?;
        let mut out = WriteBatch::default();
        while let Some((key, value)) = reader.next_row()? {
            out.put_cf(rows, key, value);
            if out.size_in_bytes() >= WRITE_BYTES_MAX {
                self.db.0.write(std::mem::take(&mut out)).map_err(rocks::io_error)?;
            }
        }
        let snapshot = reader.meta();
        if let Some(last) = &snapshot.last_log_id {
            out.put_cf(meta, APPLIED, log_id_to_pb(last).encode_to_vec());
        }
        let membership = stored_membership_to_pb(&snapshot.last_membership).encode_to_vec();
        out.put_cf(meta, MEMBERSHIP, membership);
        let mut synced = WriteOptions::default();
        synced.set_sync(true);
        self.db.0.write_opt(out, &synced).map_err(rocks::io_error)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use nave_orchestrator_core::RowId;
    use nave_proto::pb;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Written as one or one after the other, the database is the same.
        #[test]
        fn the_last_of_each_row_is_what_is_written(
            steps in prop::collection::vec((0..6u8, prop::option::of(any::<u64>())), 0..60),
        ) {
            let mut rows = Rows::default();
            let mut expected: BTreeMap<Vec<u8>, Option<Vec<u8>>> = BTreeMap::new();
            for (number, version) in steps {
                let name = format!("s{number}");
                let change = match version {
                    Some(version) => Change::Service(
                        pb::ServiceRecord { name, version, ..Default::default() }.into(),
                    ),
                    None => Change::Deleted(RowId::Service(name)),
                };
                expected.insert(change.key(), change.value());
                rows.add(&[change]);
            }
            prop_assert_eq!(rows.in_order(), expected.into_iter().collect::<Vec<_>>());
        }
    }
}
