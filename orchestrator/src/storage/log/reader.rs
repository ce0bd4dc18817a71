//! Reads of one group's log: from the tail when it is there, else from RocksDB on a blocking thread. A range is found,
//! and a view of the database taken, under the tail's lock, so a purge or truncation that comes after it takes nothing
//! away from this read; entries leave the tail only once they are written. A hole is an error: openraft would skip the
//! command silently.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;

use futures::{Stream, TryStreamExt as _, stream};
use nave_proto::pb;
use openraft::storage::RaftLogReader;
use rocksdb::{ColumnFamily, DB, Direction, IteratorMode, ReadOptions, Snapshot};

use super::tail::{Found, Tail};
use super::{Group, Shared, entry_bytes, index_of, keys};
use crate::raft::convert::{entry_from_bytes, log_id_from_pb, vote_from_pb};
use crate::raft::types::{Entry, LogId, TypeConfig, Vote};
use crate::storage::rocks;

/// Of one answer to `limited_get_log_entries`: one request to a follower, or one step of an apply. The largest command
/// (1 MiB) on top of it stays far below the transport's decode limit (8 MiB).
pub(crate) const READ_BYTES_MAX: usize = 1024 * 1024;

/// Reads one group. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct LogReader {
    shared: Arc<Shared>,
    group: Arc<Group>,
}

impl LogReader {
    pub(super) fn new(shared: Arc<Shared>, group: Arc<Group>) -> Self {
        Self { shared, group }
    }

    /// The entries of `range` that the log has, in order and without a hole; stops early at `bytes_max`.
    async fn read(&self, range: Range<u64>, bytes_max: usize) -> io::Result<Vec<Entry>> {
        let Found { on_disk, cached } = self.group.tail.read().find(range.clone(), bytes_max);
        if on_disk.is_empty() {
            return Ok(cached);
        }
        let reader = self.clone();
        tokio::task::spawn_blocking(move || reader.read_below_tail(range, bytes_max))
            .await
            .map_err(io::Error::other)?
    }

    fn read_below_tail(&self, range: Range<u64>, bytes_max: usize) -> io::Result<Vec<Entry>> {
        let tail = self.group.tail.read();
        let Found { on_disk, cached } = tail.find(range, bytes_max);
        let view = self.shared.db.snapshot();
        drop(tail);
        let count = on_disk.end - on_disk.start;
        let log = self.shared.db.cf_handle(keys::LOG).expect("column families are created in open()");
        let mut entries = read_range(&view, log, self.group.id, on_disk, bytes_max)?;
        if entries.len() as u64 == count {
            let mut bytes: usize = entries.iter().map(entry_bytes).sum();
            entries.extend(cached.into_iter().take_while(|entry| {
                bytes = bytes.saturating_add(entry_bytes(entry));
                bytes <= bytes_max
            }));
        }
        Ok(entries)
    }
}

impl RaftLogReader<TypeConfig> for LogReader {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        self.read(half_open(&range), usize::MAX).await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.read(start..end, READ_BYTES_MAX).await
    }

    /// In steps of the byte budget, so that applying a long backlog does not load it whole.
    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = Result<Entry, io::Error>> + Send
    where
        RB: RangeBounds<u64> + Clone + Debug + Send,
    {
        let steps = stream::try_unfold((self.clone(), half_open(&range)), |(reader, range)| async move {
            if range.is_empty() {
                return Ok::<_, io::Error>(None);
            }
            let entries = reader.read(range.clone(), READ_BYTES_MAX).await?;
            let next = match entries.last() {
                Some(last) => index_of(last) + 1..range.end,
                None => range.end..range.end,
            };
            Ok(Some((stream::iter(entries.into_iter().map(Ok)), (reader, next))))
        });
        Box::pin(steps.try_flatten())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.group.tail.read().vote())
    }
}

fn half_open(range: &impl RangeBounds<u64>) -> Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    start..end
}

fn read_range(
    view: &Snapshot<'_>,
    log: &ColumnFamily,
    group: u32,
    range: Range<u64>,
    bytes_max: usize,
) -> io::Result<Vec<Entry>> {
    let mut options = ReadOptions::default();
    options.set_iterate_upper_bound(keys::entry(group, range.end));
    let start = keys::entry(group, range.start);
    let mut entries = Vec::new();
    let mut bytes = 0;
    let mut expected = range.start;
    for item in view.iterator_cf_opt(log, options, IteratorMode::From(&start, Direction::Forward)) {
        let (key, value) = item.map_err(rocks::io_error)?;
        let index = keys::index(group, &key).ok_or_else(|| hole(expected))?;
        if index != expected {
            return Err(hole(expected));
        }
        let entry = entry_from_bytes(&value)?;
        bytes += entry_bytes(&entry);
        if bytes > bytes_max && !entries.is_empty() {
            return Ok(entries);
        }
        entries.push(entry);
        expected += 1;
    }
    if expected != range.end {
        return Err(hole(expected));
    }
    Ok(entries)
}

fn hole(index: u64) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("entry {index} is missing from the log"))
}

/// A group's marks, and its first and last entry, at start-up.
pub(super) fn load_tail(db: &DB, group: u32) -> io::Result<Tail> {
    let vote = read_mark::<pb::Vote>(db, group, keys::Meta::Vote)?.as_ref().map(vote_from_pb);
    let purged = read_mark::<pb::LogId>(db, group, keys::Meta::Purged)?.as_ref().map(log_id_from_pb);
    let committed = read_mark::<pb::LogId>(db, group, keys::Meta::Committed)?.as_ref().map(log_id_from_pb);
    let from = purged.map_or(0, |purged| purged.index + 1);
    let entries = match edge(db, group, from, Direction::Forward)? {
        None => None,
        Some((first, _)) => edge(db, group, u64::MAX, Direction::Reverse)?.map(|(_, last)| (first, last)),
    };
    Ok(Tail::loaded(vote, committed, purged, entries))
}

fn read_mark<M: prost::Message + Default>(db: &DB, group: u32, kind: keys::Meta) -> io::Result<Option<M>> {
    let meta = db.cf_handle(keys::META).expect("column families are created in open()");
    let Some(bytes) = db.get_cf(meta, keys::meta(group, kind)).map_err(rocks::io_error)? else {
        return Ok(None);
    };
    let mark = M::decode(bytes.as_slice())
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("log {kind:?} mark: {e}")))?;
    Ok(Some(mark))
}

/// The entry nearest to `at`, looking in `direction`.
fn edge(db: &DB, group: u32, at: u64, direction: Direction) -> io::Result<Option<(u64, LogId)>> {
    let log = db.cf_handle(keys::LOG).expect("column families are created in open()");
    let key = keys::entry(group, at);
    let Some(item) = db.iterator_cf(log, IteratorMode::From(&key, direction)).next() else {
        return Ok(None);
    };
    let (key, value) = item.map_err(rocks::io_error)?;
    let Some(index) = keys::index(group, &key) else {
        return Ok(None);
    };
    Ok(Some((index, entry_from_bytes(&value)?.log_id)))
}
