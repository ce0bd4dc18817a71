//! The keeper: the tiny parent of all service processes on a host, and of the agent.
//!
//! It exists so that the end of the agent, by any means, ends no service, and so that how each process ended is known.
//! It is blocking and small on purpose (one thread for the loop, two for output, no runtime): what cannot grow cannot
//! fail in many ways, and it is the one part that should hardly ever need an upgrade. The CLI calls [`keeper_main`]
//! for `nave agent` and [`exec_stub_main`] for the hidden `nave exec-stub`; the agent speaks to it with [`client`].
//! What to run, when, and how often to try again is decided by the agent, never here.

mod agent;
mod ahead;
mod backlog;
mod cgroup;
mod clock;
mod connection;
mod descriptors;
mod ear;
mod exits;
mod fifo;
mod frame;
mod handover;
mod identity;
mod keeper;
mod kept;
mod ledger;
mod lines;
mod oom;
mod output;
mod reap;
mod record;
pub mod sandbox;
mod segment;
mod signal;
mod spawn;
mod stub;
mod sys;
mod upgrade;

pub mod client;
pub mod frames;
pub mod memory;
pub mod notice;
pub mod witness;

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

pub use crate::cgroup::{clear as clear_cgroup, make as make_cgroup};
pub use crate::stub::{exec_check_main, exec_stub_main};

/// What a keeper is told at its start.
#[derive(Debug, Clone)]
pub struct KeeperOptions {
    /// Where ledger, exit records, socket and pid file live; made if missing. One keeper per directory.
    pub data_dir: PathBuf,
    /// The agent's argv; started again whenever it ends. Empty: no agent is started.
    pub agent_command: Vec<OsString>,
}

/// Why a keeper could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// Another keeper has this data directory.
    #[error("data directory {} is already held by {}", .data_dir.display(), holder(*.pid))]
    Held {
        /// The directory in question.
        data_dir: PathBuf,
        /// The other keeper's pid, when it could be read.
        pid: Option<u32>,
    },
    /// A file or directory of the keeper's own cannot be used.
    #[error("cannot use {}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused something the keeper cannot do without.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

pub use lines::{write_line, write_missing};

/// Of the record that a keeper leaves to the image that it becomes; builds with another cannot follow each other.
pub const HANDOVER_VERSION: u32 = handover::VERSION;

/// How many processes the ledger of a data directory says run. Only reads, also while a keeper writes.
///
/// # Errors
/// When ledger or exit records cannot be read.
pub fn processes_noted(data_dir: &std::path::Path) -> io::Result<usize> {
    ledger::running(data_dir)
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another keeper".to_owned(), |pid| format!("the keeper with pid {pid}"))
}

/// Runs a keeper for its whole life: until SIGTERM, SIGINT or a `KeeperShutdown`. Call it before any other thread is
/// started.
///
/// # Errors
/// [`KeeperError`] when it cannot start. Services are untouched by any error.
pub fn keeper_main(options: KeeperOptions) -> Result<(), KeeperError> {
    keeper_main_with_stub(options, ["/proc/self/exe", "exec-stub"].map(OsString::from).to_vec())
}

/// [`keeper_main`] with another argv for the exec-stub (tests, whose binary is not `nave`). The number of the orders'
/// descriptor is appended to it.
///
/// # Errors
/// As [`keeper_main`].
pub fn keeper_main_with_stub(options: KeeperOptions, stub_command: Vec<OsString>) -> Result<(), KeeperError> {
    keeper::run(options, stub_command)
}

/// One line for the operator on stderr, which is the unit's journal. A keeper has no log level: it says little.
macro_rules! say {
    ($($part:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "nave keeper: {}", format_args!($($part)*));
    }};
}
pub(crate) use say;
