//! The hub: one process of it is a member, `nave orchestrator`. It does what `nave-orchestrator-core` decides.
//!
//! `raft/` and `storage/` keep the members' log and state the same; `api/` answers people and other members,
//! `dispatch/` the agents; `watch/` wakes whoever waits for changes; `controllers/` place instances and judge hosts.
//! Called by the command line with a [`MemberConfig`]; what this crate leaves out is any wish of its own about
//! where that comes from.

mod api;
mod clock;
mod config;
mod controllers;
mod dispatch;
mod metrics;
pub mod raft;
mod restore;
mod run;
mod storage;
mod watch;

pub use config::{Bootstrap, ConfigError, LogConfig, MemberConfig, MemberEntry, SnapshotConfig};
pub use restore::{RestoreError, Restored, SnapshotInfo, check_snapshot, restore};
pub use run::{RunError, run};
pub use storage::log::{LoggedEntry, dump_log};
