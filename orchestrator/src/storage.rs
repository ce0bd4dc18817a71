//! What a member keeps on its disk, in one data directory:
//!
//! ```text
//! identity     whose directory this is: cluster, member, format; also the lock   (directory.rs)
//! log/         RocksDB: every Raft group's entries, votes, purge marks; synced    (log.rs)
//! state/       RocksDB: the rows of `ClusterState`, behind the log; without a WAL  (state.rs)
//! snapshots/   the newest snapshot as one file, synced before the log is purged   (snapshot.rs)
//! ```
//!
//! Two databases, so that the log's one fsync never waits for the state's flushes and compactions. Each has a writer
//! thread of its own; RocksDB is never called on a runtime worker. Whatever cannot be written ends the process
//! (`failure.rs`): a failed fsync leaves the page cache in an unknown state and must not be retried.
//! Called by `raft`; leaves out what the rows mean, which `nave-orchestrator-core` knows.

pub(crate) mod directory;
pub(crate) mod disk;
pub(crate) mod failure;
pub(crate) mod log;
pub(crate) mod rocks;
pub(crate) mod snapshot;
pub(crate) mod state;
