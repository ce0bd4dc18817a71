//! The one thread that writes the state database. It encodes rows as well, which keeps that off the apply path, and
//! writes all batches that have gathered as one.

use std::io;
use std::sync::Arc;

use nave_orchestrator_core::Change;
use prost::Message as _;
use rocksdb::WriteBatch;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::queue::{Message, Queue};
use super::{APPLIED, Database, MEMBERSHIP, META, ROWS, StateBatch};
use crate::raft::convert::{log_id_to_pb, stored_membership_to_pb};
use crate::storage::failure::Failure;
use crate::storage::snapshot::SnapshotFile;

/// A write is handed to RocksDB when it holds this much, whatever else waits.
const WRITE_BYTES_MAX: usize = 4 * 1024 * 1024;

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

/// Batches on their way into the database, and what they stand for together.
#[derive(Default)]
struct Gathered {
    rows: Rows,
    newest: Option<StateBatch>,
    /// Given back when they are written: a database that is slow makes `apply` wait.
    slots: Vec<OwnedSemaphorePermit>,
}

impl Gathered {
    fn add(&mut self, batch: StateBatch, slot: OwnedSemaphorePermit) {
        self.rows.add(&batch.changes);
        self.slots.push(slot);
        let membership = self.newest.take().and_then(|before| before.membership);
        let newest = self.newest.insert(batch);
        newest.membership = newest.membership.take().or(membership);
    }
}

pub(super) struct Writer {
    db: Arc<Database>,
    queue: Arc<Queue>,
    failure: Failure,
}

impl Writer {
    pub(super) fn new(db: Arc<Database>, queue: Arc<Queue>, failure: Failure) -> Self {
        Self { db, queue, failure }
    }

    pub(super) fn run(self) {
        let failure = self.failure.clone();
        let _guard = failure.guard("the state's writer");
        let result = self.serve();
        if let Err(error) = result {
            failure.publish(format!("writing the state in {} failed: {error}", self.db.0.path().display()));
        }
    }

    /// Until the queue is closed and empty; then all of it is made durable, so that the next start finds it.
    fn serve(&self) -> io::Result<()> {
        while let Some(messages) = self.queue.take() {
            let mut gathered = Gathered::default();
            for message in messages {
                self.handle(message, &mut gathered)?;
            }
            self.write(&mut gathered)?;
        }
        if let Err(error) = self.db.flush() {
            tracing::warn!(%error, "the state was not flushed; the next start applies more of the log again");
        }
        Ok(())
    }

    fn handle(&self, message: Message, gathered: &mut Gathered) -> io::Result<()> {
        match message {
            Message::Write(batch, slot) => {
                gathered.add(batch, slot);
                if gathered.rows.bytes >= WRITE_BYTES_MAX {
                    self.write(gathered)?;
                }
                Ok(())
            }
            Message::Barrier(done) => answer(done, self.write(gathered)),
            Message::Replace(file, done) => {
                answer(done, self.write(gathered).and_then(|()| self.replace(&file)))
            }
        }
    }

    fn write(&self, gathered: &mut Gathered) -> io::Result<()> {
        let Gathered { rows, newest: Some(newest), slots: _until_written } = std::mem::take(gathered) else {
            return Ok(());
        };
        self.db.write(self.encode(rows, &newest))
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

    /// The mark goes first and comes last, both durable, so that a crash in between leaves no half that looks whole.
    fn replace(&self, file: &SnapshotFile) -> io::Result<()> {
        self.db.clear()?;
        let (rows, meta) = (self.db.family(ROWS), self.db.family(META));
        let mut reader = file.reader()?;
        let mut out = WriteBatch::default();
        while let Some((key, value)) = reader.next_row()? {
            out.put_cf(rows, key, value);
            if out.size_in_bytes() >= WRITE_BYTES_MAX {
                self.db.write(std::mem::take(&mut out))?;
            }
        }
        let snapshot = reader.meta();
        if let Some(last) = &snapshot.last_log_id {
            out.put_cf(meta, APPLIED, log_id_to_pb(last).encode_to_vec());
        }
        let membership = stored_membership_to_pb(&snapshot.last_membership).encode_to_vec();
        out.put_cf(meta, MEMBERSHIP, membership);
        self.db.write(out)?;
        self.db.flush()
    }
}

/// Nobody asks one that has ended, or is about to.
impl Drop for Writer {
    fn drop(&mut self) {
        self.queue.close();
        while self.queue.take().is_some() {}
    }
}

/// Tells whoever waits, and whoever goes on with the next message.
fn answer(done: oneshot::Sender<io::Result<()>>, result: io::Result<()>) -> io::Result<()> {
    let copy = result.as_ref().map_err(|error| io::Error::new(error.kind(), error.to_string())).copied();
    // A caller that is gone no longer cares.
    let _gone = done.send(copy);
    result
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
