//! The stores as openraft uses them at start-up: its own suite, crashes that leave log and state apart, snapshots.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use nave_proto::ids::MemberId;
use nave_proto::pb;
use openraft::StorageError;
use openraft::storage::{
    IOFlushed, RaftLogStorage as _, RaftSnapshotBuilder as _, RaftStateMachine as _, StorageHelper,
};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::TypeConfigExt as _;
use prost::Message as _;

use super::cluster::{CLUSTER, Counting, init, token};
use crate::raft::SnapshotSettings;
use crate::raft::start::{Opened, RaftOptions, open};
use crate::raft::state_machine::StateMachine;
use crate::raft::types::{
    EncodedCommand, Entry, LeaderId, LogId, MemberNode, Membership, Payload, TypeConfig, Vote,
};
use crate::storage::directory::DataDirectory;
use crate::storage::failure::Failure;
use crate::storage::log::{LogDatabase, LogStore, tests::copy_directory};
use crate::storage::snapshot::{SnapshotDirectory, SnapshotFile};
use crate::storage::state::StateDatabase;

/// Kept open while their handles are used.
struct Databases {
    state: StateDatabase,
    snapshots: Arc<SnapshotDirectory>,
    _log: LogDatabase,
    _directory: DataDirectory,
}

struct Stores {
    opened: Databases,
    machine: StateMachine,
    log: LogStore,
    observer: Arc<Counting>,
    failure: Failure,
}

fn options(path: &Path) -> RaftOptions {
    let authority = nave_tls::Authority::generate(CLUSTER);
    let role = nave_tls::Role::Member(MemberId(1));
    let now = crate::clock::unix_now_ns() / 1_000_000_000;
    let credentials = authority.issue_new(role, nave_tls::MEMBER_VALIDITY, now).unwrap();
    RaftOptions::new(CLUSTER, MemberId(1), path.to_owned(), credentials)
}

fn stores(path: &Path) -> Stores {
    let failure = Failure::new();
    let Opened { directory, log, registry, state, loaded, snapshots } =
        open(&options(path), &failure).unwrap();
    let observer = Arc::new(Counting::default());
    let policy = SnapshotSettings::default();
    let machine = StateMachine::new(
        loaded,
        state.handle(),
        snapshots.clone(),
        observer.clone(),
        failure.clone(),
        policy,
    );
    let opened = Databases { state, snapshots, _log: log, _directory: directory };
    let log = registry;
    Stores { opened, machine, log, observer, failure }
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, (Databases, tempfile::TempDir)> for Builder {
    async fn build(
        &self,
    ) -> Result<((Databases, tempfile::TempDir), LogStore, StateMachine), StorageError<TypeConfig>> {
        // The suite opens some 50 stores and is about order, not durability: memory will do where there is some.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let Stores { opened, machine, log, .. } = stores(dir.path());
        Ok(((opened, dir), log, machine.allow_gaps()))
    }
}

#[tokio::test]
async fn openrafts_own_suite_passes() {
    Suite::test_all(Builder).await.unwrap();
}

fn id(index: u64) -> LogId {
    LogId::new(LeaderId { term: 1, node_id: 1 }, index)
}

fn entry(index: u64, payload: Payload) -> Entry {
    Entry { log_id: id(index), payload }
}

fn command(index: u64, command: &pb::Command) -> Entry {
    entry(index, Payload::Normal(EncodedCommand(command.encode_to_vec().into())))
}

/// A log as a cluster begins with: membership, blank, init, then tokens.
fn entries(until: u64) -> Vec<Entry> {
    let members = Membership::new(vec![[1].into()], BTreeMap::from([(1, MemberNode::default())])).unwrap();
    (0..until)
        .map(|index| match index {
            0 => entry(0, Payload::Membership(members.clone())),
            1 => entry(1, Payload::Blank),
            2 => command(2, &init()),
            _ => command(index, &token(&format!("token-{index}"))),
        })
        .collect()
}

impl Stores {
    async fn append(&mut self, entries: Vec<Entry>) {
        let (done, written) = TypeConfig::oneshot();
        self.log.append(entries, IOFlushed::signal(done)).await.unwrap();
        written.await.unwrap().unwrap();
    }

    async fn apply(&mut self, entries: Vec<Entry>) -> std::io::Result<()> {
        self.machine.apply(futures::stream::iter(entries.into_iter().map(|entry| Ok((entry, None))))).await
    }

    /// What openraft does at start-up.
    async fn recover(&mut self) -> Option<LogId> {
        let mut helper = StorageHelper::new(&mut self.log, &mut self.machine).with_id(1);
        helper.get_initial_state().await.unwrap();
        self.machine.applied_state().await.unwrap().0
    }

    fn rows(&self) -> Vec<pb::Row> {
        let state = self.machine.tables();
        let state = state.state.read();
        state.check().unwrap();
        state.rows().collect()
    }

    async fn rows_on_disk(&self) -> Vec<pb::Row> {
        let handle = self.opened.state.handle();
        handle.barrier().await.unwrap();
        handle.rows().unwrap()
    }
}

fn sorted(rows: Vec<pb::Row>) -> Vec<Vec<u8>> {
    let mut rows: Vec<_> = rows.iter().map(prost::Message::encode_to_vec).collect();
    rows.sort();
    rows
}

#[tokio::test]
async fn rows_equal_tables() {
    let dir = tempfile::tempdir().unwrap();
    let mut stores = stores(dir.path());
    stores.apply(entries(40)).await.unwrap();
    let revoke = pb::Command {
        body: Some(pb::command::Body::RevokeToken(pb::RevokeToken { id: "token-7".into() })),
        ..Default::default()
    };
    stores.apply(vec![command(40, &revoke)]).await.unwrap();
    assert_eq!(stores.observer.applied.load(std::sync::atomic::Ordering::SeqCst), 41);
    assert!(stores.rows().len() > 36);
    assert_eq!(sorted(stores.rows_on_disk().await), sorted(stores.rows()));
}

/// With 30 entries in the log, all committed, applied and in the state database, where nothing was flushed.
async fn unflushed(path: &Path) -> Stores {
    let mut stores = stores(path);
    stores.log.save_vote(&Vote::new_committed(1, 1)).await.unwrap();
    stores.append(entries(30)).await;
    stores.apply(entries(30)).await.unwrap();
    stores.log.save_committed(Some(id(29))).await.unwrap();
    // The mark goes with the next write.
    stores.append(vec![entry(30, Payload::Blank)]).await;
    assert_eq!(sorted(stores.rows_on_disk().await), sorted(stores.rows()));
    stores
}

#[tokio::test]
async fn what_a_crash_takes_from_the_state_comes_back_from_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let before = unflushed(&dir.path().join("a")).await;
    // Nothing is flushed or closed in the copy.
    copy_directory(&dir.path().join("a"), &dir.path().join("b"));
    let mut after = stores(&dir.path().join("b"));
    assert_eq!(after.machine.applied_state().await.unwrap().0, None);
    assert_eq!(after.recover().await, Some(id(29)));
    assert_eq!(sorted(after.rows()), sorted(before.rows()));
    assert_eq!(sorted(after.rows_on_disk().await), sorted(before.rows()));
}

#[tokio::test]
async fn an_orderly_end_leaves_the_whole_state() {
    let dir = tempfile::tempdir().unwrap();
    let before = unflushed(dir.path()).await;
    let rows = sorted(before.rows());
    drop(before);
    let mut after = stores(dir.path());
    assert_eq!(after.machine.applied_state().await.unwrap().0, Some(id(29)));
    assert_eq!(sorted(after.rows()), rows);
}

#[tokio::test]
async fn after_a_crash_the_state_is_not_older_than_the_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let mut before = stores(&dir.path().join("a"));
    before.apply(entries(30)).await.unwrap();
    let rows = sorted(before.rows());
    before.machine.try_create_snapshot_builder(true).await.unwrap().build_snapshot().await.unwrap();
    before.apply(vec![command(30, &token("later"))]).await.unwrap();
    before.opened.state.handle().barrier().await.unwrap();
    copy_directory(&dir.path().join("a"), &dir.path().join("b"));
    let mut after = stores(&dir.path().join("b"));
    assert_eq!(after.machine.applied_state().await.unwrap().0, Some(id(29)));
    assert_eq!(sorted(after.rows()), rows);
}

#[tokio::test]
async fn what_rocksdb_flushes_by_itself_is_a_prefix_of_what_was_applied() {
    let dir = tempfile::tempdir().unwrap();
    let (path, copy) = (dir.path().join("a"), dir.path().join("b"));
    let mut before = stores(&path);
    // Three times what one memtable holds, and the mark and the membership are in another.
    let large = |index: u64| command(index, &token(&format!("{index}-{}", "x".repeat(60_000))));
    before.apply(entries(3)).await.unwrap();
    for index in 3..400 {
        before.apply(vec![large(index)]).await.unwrap();
    }
    let handle = before.opened.state.handle();
    handle.barrier().await.unwrap();
    tokio::time::timeout(std::time::Duration::from_secs(30), async {
        while crate::storage::state::tests::is_busy(&handle) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    copy_directory(&path, &copy);
    let mut after = stores(&copy);
    let applied = after.machine.applied_state().await.unwrap();
    let index = applied.0.unwrap().index;
    assert!((3..400).contains(&index), "{index}");
    assert_eq!(applied.1.log_id(), &Some(id(0)));
    let mut whole = stores(&dir.path().join("whole"));
    whole.apply(entries(3)).await.unwrap();
    whole.apply((3..=index).map(large).collect()).await.unwrap();
    assert_eq!(sorted(after.rows()), sorted(whole.rows()));
}

#[tokio::test]
async fn what_an_old_directory_has_reached_is_read_from_state_and_log() {
    let dir = tempfile::tempdir().unwrap();
    let before = unflushed(&dir.path().join("a")).await;
    copy_directory(&dir.path().join("a"), &dir.path().join("b"));
    let directory = DataDirectory::open(&dir.path().join("b"), CLUSTER, MemberId(1)).unwrap();
    let (cluster, applied) = crate::restore::reached::reached(&directory).unwrap();
    assert_eq!(applied, 30, "the last of the log, committed or not");
    assert_eq!(Some(&cluster), before.machine.tables().state.read().cluster());
}

#[tokio::test]
async fn a_state_behind_the_log_is_completed_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut whole = stores(&dir.path().join("whole"));
    whole.apply(entries(30)).await.unwrap();

    let mut behind = stores(&dir.path().join("behind"));
    behind.append(entries(30)).await;
    behind.apply(entries(12)).await.unwrap();
    behind.log.save_committed(Some(id(29))).await.unwrap();
    assert_eq!(behind.recover().await, Some(id(29)));
    assert_eq!(sorted(behind.rows()), sorted(whole.rows()));
}

#[tokio::test]
async fn a_state_ahead_of_the_log_purges_the_gap() {
    let dir = tempfile::tempdir().unwrap();
    let mut stores = stores(dir.path());
    stores.append(entries(10)).await;
    stores.apply(entries(30)).await.unwrap();
    assert_eq!(stores.recover().await, Some(id(29)));
    let state = stores.log.get_log_state().await.unwrap();
    assert_eq!((state.last_purged_log_id, state.last_log_id), (Some(id(29)), Some(id(29))));
    stores.append(vec![entry(30, Payload::Blank)]).await;
}

#[tokio::test]
async fn a_snapshot_moves_the_state_to_another_member() {
    let dir = tempfile::tempdir().unwrap();
    let mut from = stores(&dir.path().join("from"));
    from.apply(entries(50)).await.unwrap();
    let mut builder = from.machine.try_create_snapshot_builder(true).await.unwrap();
    // Applied while the snapshot is being written; not in it.
    from.apply(vec![command(50, &token("later"))]).await.unwrap();
    let snapshot = builder.build_snapshot().await.unwrap();
    assert_eq!(snapshot.meta.last_log_id, Some(id(49)));

    let to_path = dir.path().join("to");
    let mut to = stores(&to_path);
    to.apply(entries(5)).await.unwrap();
    to.machine.install_snapshot(&snapshot.meta, snapshot.snapshot.clone()).await.unwrap();
    assert_eq!(to.machine.applied_state().await.unwrap().0, Some(id(49)));
    assert_eq!(to.opened.snapshots.current().unwrap().0, snapshot.meta);
    assert_eq!(to.observer.restored.load(std::sync::atomic::Ordering::SeqCst), 2);
    copy_directory(&to_path, &dir.path().join("crashed"));
    let again = stores(&dir.path().join("crashed"));
    assert_eq!(sorted(again.rows()), sorted(to.rows()), "an install is durable");

    to.apply(vec![command(50, &token("later"))]).await.unwrap();
    assert_eq!(sorted(to.rows()), sorted(from.rows()));
    assert_eq!(sorted(to.rows_on_disk().await), sorted(to.rows()));
}

#[tokio::test]
async fn a_snapshot_holds_all_that_was_applied_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut stores = stores(dir.path());
    for (index, entry) in (0..).zip(entries(60)) {
        stores.apply(vec![entry]).await.unwrap();
        let mut builder = stores.machine.try_create_snapshot_builder(true).await.unwrap();
        let snapshot = builder.build_snapshot().await.unwrap();
        assert_eq!(snapshot.meta.last_log_id, Some(id(index)));
        assert_eq!(snapshot.meta.last_membership.log_id(), &Some(id(0)));
    }
}

#[tokio::test]
async fn an_install_cut_short_is_done_again_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let mut first = stores(&path);
    first.apply(entries(20)).await.unwrap();
    first.machine.try_create_snapshot_builder(true).await.unwrap().build_snapshot().await.unwrap();
    let rows = sorted(first.rows());
    first.opened.state.handle().barrier().await.unwrap();
    drop(first);
    // As after the first step of an install: rows, but no mark of what they stand for.
    crate::storage::state::tests::forget_mark(&path.join("state"));
    let mut again = stores(&path);
    assert_eq!(again.rows().len() + again.rows_on_disk().await.len(), 0, "rows of unknown age are not kept");
    assert_eq!(again.recover().await, Some(id(19)));
    assert_eq!(sorted(again.rows()), rows);
}

#[tokio::test]
async fn a_torn_snapshot_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut from = stores(&dir.path().join("from"));
    from.apply(entries(50)).await.unwrap();
    let snapshot =
        from.machine.try_create_snapshot_builder(true).await.unwrap().build_snapshot().await.unwrap();
    let bytes = snapshot.snapshot.read_at(0, usize::MAX).unwrap();
    let torn = dir.path().join("torn");
    std::fs::write(&torn, &bytes[..bytes.len() - 10]).unwrap();
    let torn = SnapshotFile::open(&torn).unwrap();

    let mut to = stores(&dir.path().join("to"));
    to.apply(entries(5)).await.unwrap();
    let rows = sorted(to.rows());
    to.machine.install_snapshot(&snapshot.meta, torn).await.unwrap_err();
    assert_eq!((sorted(to.rows()), sorted(to.rows_on_disk().await)), (rows.clone(), rows));
    assert!(to.opened.snapshots.current().is_none());
}

#[tokio::test]
async fn an_unknown_command_stops_the_member_before_anything_is_applied() {
    let dir = tempfile::tempdir().unwrap();
    let mut stores = stores(dir.path());
    stores.apply(entries(5)).await.unwrap();
    let rows = sorted(stores.rows());
    let later = nave_proto::COMMAND_FORMAT + 1;
    let newer = pb::Command { written_by: later, ..Default::default() };
    let error = stores.apply(vec![command(5, &token("fine")), command(6, &newer)]).await.unwrap_err();
    let message = stores.failure.wait().await;
    assert_eq!(error.to_string(), message);
    assert!(message.contains(&format!("entry 6 holds a command of format {later}")), "{message}");
    assert!(message.contains(&format!("knows formats up to {}", nave_proto::COMMAND_FORMAT)), "{message}");
    assert_eq!(sorted(stores.rows()), rows);
}

#[tokio::test]
async fn a_known_command_of_a_later_format_stops_the_member_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut stores = stores(dir.path());
    stores.apply(entries(5)).await.unwrap();
    let rows = sorted(stores.rows());
    // It may be meant in another way by those that know that format.
    let newer = pb::Command { written_by: nave_proto::COMMAND_FORMAT + 1, ..token("meant-otherwise") };
    let error = stores.apply(vec![command(5, &newer)]).await.unwrap_err();
    assert!(error.to_string().contains("install the newer version on this member"), "{error}");
    assert_eq!(sorted(stores.rows()), rows);
}

#[tokio::test]
async fn a_gap_in_what_is_applied_stops_the_member() {
    let dir = tempfile::tempdir().unwrap();
    let mut stores = stores(dir.path());
    stores.apply(entries(5)).await.unwrap();
    let error = stores.apply(vec![command(6, &token("too-late"))]).await.unwrap_err();
    assert!(error.to_string().contains("entry 6 came to be applied after entry 4"), "{error}");
    assert!(stores.failure.get().is_some());
}
