//! The log database as openraft sees it, across crashes and failures. A crash of the process is a copy of the directory
//! while the database is open: nothing is flushed or closed in the copy.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use openraft::storage::{RaftLogReader as _, RaftLogStorage as _};
use openraft::type_config::TypeConfigExt as _;

use super::*;
use crate::raft::types::{EncodedCommand, LeaderId, REGISTRY_GROUP};

/// A write fails while a file of this name lies in the database.
pub(super) fn write_must_fail(shared: &Shared) -> bool {
    shared.db.path().join("fail-writes").exists()
}

/// As a crash would leave it at a moment at which RocksDB was not just making or removing files.
pub(crate) fn copy_directory(from: &Path, to: &Path) {
    loop {
        let before = files(from);
        for file in &before {
            let target = to.join(file);
            fs::create_dir_all(target.parent().unwrap()).unwrap();
            match fs::copy(from.join(file), target) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                copied => drop(copied.unwrap()),
            }
        }
        if files(from) == before {
            return;
        }
        fs::remove_dir_all(to).unwrap();
    }
}

/// Below `from`, relative to it, without locks.
fn files(from: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let name = PathBuf::from(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()).into_iter().map(|below| name.join(below)));
        } else if name != Path::new("LOCK") {
            found.insert(name);
        }
    }
    found
}

fn id(term: u64, index: u64) -> LogId {
    LogId::new(LeaderId { term, node_id: 1 }, index)
}

fn entry(term: u64, index: u64, bytes: usize) -> Entry {
    let fill = u8::try_from(index % 251).unwrap();
    Entry { log_id: id(term, index), payload: Payload::Normal(EncodedCommand(vec![fill; bytes].into())) }
}

fn open(path: &Path) -> (LogDatabase, LogStore) {
    let database = LogDatabase::open(path, Failure::new()).unwrap();
    let store = database.group(REGISTRY_GROUP).unwrap();
    (database, store)
}

async fn append(store: &mut LogStore, entries: Vec<Entry>) -> io::Result<()> {
    let (done, written) = TypeConfig::oneshot();
    store.append(entries, IOFlushed::signal(done)).await?;
    written.await.map_err(io::Error::other)?
}

async fn read(store: &mut LogStore, range: std::ops::Range<u64>) -> Vec<Entry> {
    store.get_log_reader().await.try_get_log_entries(range).await.unwrap()
}

#[tokio::test]
async fn what_was_acknowledged_survives_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let (database, mut store) = open(&dir.path().join("a"));
    store.save_vote(&Vote::new_committed(3, 1)).await.unwrap();
    append(&mut store, (0..20).map(|i| entry(2, i, 100)).collect()).await.unwrap();
    store.truncate_after(Some(id(2, 14))).await.unwrap();
    store.purge(id(2, 4)).await.unwrap();
    append(&mut store, (15..18).map(|i| entry(3, i, 100)).collect()).await.unwrap();
    copy_directory(&dir.path().join("a"), &dir.path().join("b"));
    drop(database);

    let (_database, mut store) = open(&dir.path().join("b"));
    let state = store.get_log_state().await.unwrap();
    assert_eq!(state.last_purged_log_id, Some(id(2, 4)));
    assert_eq!(state.last_log_id, Some(id(3, 17)));
    let expected: Vec<_> =
        (5..15).map(|i| entry(2, i, 100)).chain((15..18).map(|i| entry(3, i, 100))).collect();
    assert_eq!(read(&mut store, 0..99).await, expected);
    assert_eq!(store.get_log_reader().await.read_vote().await.unwrap(), Some(Vote::new_committed(3, 1)));
}

#[tokio::test]
async fn entries_are_readable_when_append_returns() {
    let dir = tempfile::tempdir().unwrap();
    let (_database, mut store) = open(dir.path());
    let mut reader = store.get_log_reader().await;
    for index in 0..200 {
        store.append([entry(1, index, 10)], IOFlushed::noop()).await.unwrap();
        assert_eq!(reader.try_get_log_entries(index..=index).await.unwrap(), [entry(1, index, 10)]);
    }
}

#[tokio::test]
async fn many_appends_share_a_sync() {
    let dir = tempfile::tempdir().unwrap();
    let (database, mut store) = open(dir.path());
    for index in 0..2000 {
        store.append([entry(1, index, 10)], IOFlushed::noop()).await.unwrap();
    }
    store.flush().await.unwrap();
    let counters = database.counters();
    assert_eq!(counters.entries_appended_total.load(Ordering::Relaxed), 2000);
    let fsyncs = counters.fsyncs_total.load(Ordering::Relaxed);
    assert!(fsyncs < 1000, "{fsyncs} fsyncs for 2000 appends");
}

#[tokio::test]
async fn a_long_backlog_is_read_from_disk_and_in_budgets() {
    let dir = tempfile::tempdir().unwrap();
    let (_database, mut store) = open(dir.path());
    // 24 MiB: three times what stays in memory.
    for index in 0..96 {
        store.append([entry(1, index, 256 * 1024)], IOFlushed::noop()).await.unwrap();
    }
    store.flush().await.unwrap();
    assert_eq!(read(&mut store, 0..96).await.len(), 96);
    let mut reader = store.get_log_reader().await;
    let some = reader.limited_get_log_entries(2, 96).await.unwrap();
    assert_eq!((some.len(), some[0].log_id), (3, id(1, 2)), "1 MiB less the overhead");
    let stream = reader.entries_stream(1..96).await;
    let streamed: Vec<_> = futures::TryStreamExt::try_collect(stream).await.unwrap();
    assert_eq!(streamed, (1..96).map(|i| entry(1, i, 256 * 1024)).collect::<Vec<_>>());
}

#[tokio::test]
async fn one_entry_above_the_budget_is_still_returned() {
    let dir = tempfile::tempdir().unwrap();
    let (_database, mut store) = open(dir.path());
    append(&mut store, vec![entry(1, 0, 2 * reader::READ_BYTES_MAX), entry(1, 1, 1)]).await.unwrap();
    let some = store.get_log_reader().await.limited_get_log_entries(0, 2).await.unwrap();
    assert_eq!(some.len(), 1);
}

#[tokio::test]
async fn a_hole_on_disk_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let (database, mut store) = open(dir.path());
    append(&mut store, (0..5).map(|i| entry(1, i, 1)).collect()).await.unwrap();
    let log = database.shared.db.cf_handle(keys::LOG).unwrap();
    database.shared.db.delete_cf(log, keys::entry(REGISTRY_GROUP, 2)).unwrap();
    drop(store);
    drop(database);
    let (_database, mut store) = open(dir.path());
    let error = store.get_log_reader().await.try_get_log_entries(0..5).await.unwrap_err();
    assert_eq!(error.to_string(), "entry 2 is missing from the log");
}

#[tokio::test]
async fn groups_share_the_database_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (database, mut registry) = open(dir.path());
    let mut shard = database.group(7).unwrap();
    append(&mut registry, vec![entry(1, 0, 1), entry(1, 1, 1)]).await.unwrap();
    append(&mut shard, vec![entry(5, 0, 1)]).await.unwrap();
    shard.save_vote(&Vote::new(9, 9)).await.unwrap();
    drop((registry, shard, database));
    let (database, mut registry) = open(dir.path());
    let mut shard = database.group(7).unwrap();
    assert_eq!(registry.get_log_state().await.unwrap().last_log_id, Some(id(1, 1)));
    assert_eq!(shard.get_log_state().await.unwrap().last_log_id, Some(id(5, 0)));
    assert_eq!(registry.get_log_reader().await.read_vote().await.unwrap(), None);
}

#[tokio::test]
async fn the_commit_mark_is_kept_without_a_sync() {
    let dir = tempfile::tempdir().unwrap();
    let (database, mut store) = open(dir.path());
    append(&mut store, vec![entry(1, 0, 1)]).await.unwrap();
    let before = database.counters().fsyncs_total.load(Ordering::Relaxed);
    store.save_committed(Some(id(1, 0))).await.unwrap();
    drop((store, database));
    let (database, mut store) = open(dir.path());
    assert_eq!(store.read_committed().await.unwrap(), Some(id(1, 0)));
    assert_eq!((before, database.counters().fsyncs_total.load(Ordering::Relaxed)), (1, 0));
}

#[tokio::test]
async fn a_failed_write_is_final() {
    let dir = tempfile::tempdir().unwrap();
    let failure = Failure::new();
    let database = LogDatabase::open(dir.path(), failure.clone()).unwrap();
    let mut store = database.group(REGISTRY_GROUP).unwrap();
    append(&mut store, vec![entry(1, 0, 1)]).await.unwrap();
    fs::write(dir.path().join("fail-writes"), "").unwrap();
    let error = append(&mut store, vec![entry(1, 1, 1)]).await.unwrap_err();
    assert_eq!(error.to_string(), "injected");
    assert!(failure.wait().await.contains("injected"));
    fs::remove_file(dir.path().join("fail-writes")).unwrap();
    assert!(
        append(&mut store, vec![entry(1, 2, 1)]).await.is_err(),
        "not retried, whatever the disk does now"
    );
    assert!(store.save_vote(&Vote::new(2, 1)).await.is_err());
    assert_eq!(database.counters().entries_appended_total.load(Ordering::Relaxed), 1);
}
