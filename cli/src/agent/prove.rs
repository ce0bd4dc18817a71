//! `nave agent prove`, which a build is asked before it replaces the one that runs: whether it starts at all on this
//! machine, understands the flags and the configuration, and can read what the running one has written. Changes
//! nothing.

use serde::{Deserialize, Serialize};

use crate::args;
use crate::failure::Failure;
use crate::{out, roles};

/// What a build says of itself, one line of JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Proof {
    pub(super) version: String,
    /// Of the record that a keeper leaves to the image that it becomes.
    pub(super) handover: u32,
    /// Processes that the keeper's ledger says run.
    pub(super) processes: usize,
    /// Instances that the agent's ledger knows.
    pub(super) instances: usize,
}

pub(super) fn run(args: &args::Agent) -> Result<(), Failure> {
    let config = roles::agent_config(args)?;
    let processes = nave_keeper::processes_noted(&config.data_dir).map_err(anyhow::Error::from)?;
    let instances = nave_agent::instances_noted(&config).map_err(anyhow::Error::from)?;
    out::json_line(&Proof {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        handover: nave_keeper::HANDOVER_VERSION,
        processes,
        instances,
    });
    Ok(())
}
