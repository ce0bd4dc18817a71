//! Reads a stopped member's log as it is on disk, entry by entry: for tests that compare members, and for a person
//! who must know what a member holds. Opens the database read-only, so the evidence stays as it is.

use std::io;
use std::path::Path;

use bytes::Bytes;
use nave_proto::pb;
use prost::Message as _;
use rocksdb::{DB, Direction, IteratorMode, Options};

use super::keys;
use crate::storage::rocks::io_error;

/// One entry as it is on disk.
#[derive(Debug, Clone, PartialEq)]
pub struct LoggedEntry {
    /// Position in the group's log.
    pub index: u64,
    /// Term of the leader that made it.
    pub term: u64,
    /// The encoded `nave.v1.Command`; empty for blank and membership entries.
    pub command: Bytes,
    /// Set on membership entries.
    pub membership: Option<pb::Membership>,
}

/// All entries of `group` below `data_dir`, oldest first. The member must not be running.
///
/// # Errors
/// When there is no log database, or one of its entries cannot be decoded.
pub fn dump_log(data_dir: &Path, group: u32) -> io::Result<Vec<LoggedEntry>> {
    let mut entries = Vec::new();
    read_log(data_dir, group, |entry| {
        entries.push(entry);
        true
    })?;
    Ok(entries)
}

/// The same one by one, until `take` wants no more.
pub(crate) fn read_log(
    data_dir: &Path,
    group: u32,
    mut take: impl FnMut(LoggedEntry) -> bool,
) -> io::Result<()> {
    let families = ["default", keys::LOG, keys::META];
    let db = DB::open_cf_for_read_only(&Options::default(), data_dir.join("log"), families, false)
        .map_err(io_error)?;
    let log = db.cf_handle(keys::LOG).expect("opened with this column family");
    let first = keys::entry(group, 0);
    for row in db.iterator_cf(&log, IteratorMode::From(&first, Direction::Forward)) {
        let (key, value) = row.map_err(io_error)?;
        let Some(index) = keys::index(group, &key) else { break };
        if !take(decode(index, &value)?) {
            break;
        }
    }
    Ok(())
}

fn decode(index: u64, value: &[u8]) -> io::Result<LoggedEntry> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("log entry {index}: {what}"));
    let entry = pb::Entry::decode(value).map_err(|error| wrong(&error.to_string()))?;
    let id = entry.log_id.ok_or_else(|| wrong("no log id"))?;
    if id.index != index {
        return Err(wrong("its key and its log id differ"));
    }
    let (command, membership) = match entry.payload {
        Some(pb::entry::Payload::Command(command)) => (command, None),
        Some(pb::entry::Payload::Membership(membership)) => (Bytes::new(), Some(membership)),
        Some(pb::entry::Payload::Blank(_)) => (Bytes::new(), None),
        None => return Err(wrong("a payload of a kind this build does not know")),
    };
    Ok(LoggedEntry { index, term: id.term, command, membership })
}
