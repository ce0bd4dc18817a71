//! Claims about the hub's decisions, tried on a whole registry with pretend agents (`world`). One binary, so that
//! it links once; a file per kind of claim.

#![expect(clippy::unwrap_used, reason = "helpers of tests: what is missing fails the test")]

mod ahead;
mod cluster;
mod data;
mod ends;
mod hosts;
mod jobs;
mod limits;
mod members;
mod model;
mod placement;
mod random;
mod recheck;
mod reports;
mod restarts;
mod rollout;
mod services;
mod sessions;
mod world;
