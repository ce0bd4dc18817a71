//! What the hub decides. [`ClusterState::apply`] takes the log's commands one by one and says which rows changed;
//! [`plan`] looks at the state and says what should happen next, as steps that go back through the log.
//! Both are pure: the time is in the command or an argument, tables are ordered, so every member and every replay
//! comes to the same rows, and a test is a table. No clock, no runtime, no disk in here; `raft/`, `storage/` and
//! `controllers/` of the orchestrator do what this crate decides.

#![warn(clippy::wildcard_enum_match_arm)]

mod apply;
mod change;
mod dedup;
mod directory;
mod events;
mod jobs;
mod leases;
pub mod limits;
mod liveness;
pub mod members;
mod needs;
mod plan;
pub mod restore;
mod state;
mod wants;

pub use apply::{Applied, unknown_command};
pub use change::{Change, RowId};
pub use directory::{
    directory_endpoint, directory_host, directory_service, endpoint_print, host_print, is_draining,
    service_print,
};
pub use events::EventFilter;
pub use leases::{Beat, BeatAnswer, Leases};
pub use liveness::{Judge, Verdict};
pub use plan::{
    About, Leaving, Plan, PlanCursor, Unplaced, desired_count, explain, explained, fetches_ahead, leaving,
    plan, plan_dirty, ready_count, replaces_for_both, running_count, waits_for,
};
pub use state::{ClusterState, Reserved, RowError};
