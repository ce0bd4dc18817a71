//! What an agent decides, without doing any of it: the life of each instance ([`Supervisor`]), the wanted set as a
//! whole ([`Reconciler`]), ports, the environment of a process, and which endpoint a call goes to
//! ([`balancer::Balancer`]). Pure and deterministic: the time and randomness
//! are arguments; no tokio, no files, no clock. The crate `nave-agent` performs the actions and feeds results back.

#![warn(clippy::wildcard_enum_match_arm)]

pub mod address;
pub mod balancer;
pub mod callable;
pub mod directory;
pub mod env;
mod monotonic;
pub mod ports;
mod reconciler;
mod shortage;
pub mod supervisor;

pub use monotonic::{Monotonic, WallOffset};
pub use reconciler::{NeedWhole, Order, Reconciler, StaleWanted};
pub use shortage::{Look, Shortage};
pub use supervisor::{Action, Input, ProcessKey, SpawnOrder, Supervisor};
