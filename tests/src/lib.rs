//! The harness: starts real members, keepers and agents as processes on loopback, breaks them on purpose, and asks
//! them through the binary a person would use. Used by `e2e/` (one file per promise) and `bench/`.
//! It ends only processes that it started, by pid; a cluster that goes out of scope takes its processes with it.

pub mod api;
pub mod cluster;
pub mod fleet;
pub mod logs;
pub mod machine;
pub mod nave;
pub mod netns;
pub mod process;
pub mod wait;
pub mod writes;

pub use cluster::{Cluster, Setup};
pub use nave::Output;
pub use wait::{eventually, eventually_some};
