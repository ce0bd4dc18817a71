//! The agent: one per host, child of the keeper. It enrols, keeps a session with the hub, makes the host run what
//! the hub wants (decided by `nave-agent-core`, performed here), and answers for the host's logs.
//!
//! The shell is dull on purpose: one task owns the `Reconciler`; everything else is a task in `run`'s set that
//! sends it events over bounded channels and performs what it decides. Its end, by any means, ends no service.

mod alarms;
mod api;
mod backoff;
mod cgroups;
mod clock;
mod command;
mod config;
mod data_dir;
mod directory;
mod dns;
mod executor;
mod facts;
mod firewall;
mod host;
mod hub;
mod identity;
mod keeper;
mod ledger;
mod logs;
mod metrics;
#[cfg(test)]
mod nobody;
mod notes;
mod notify;
mod oom;
mod pressure;
mod probes;
mod provision;
mod proxy;
mod run;
mod sequence;
mod sockets;
mod uplink;

pub use cgroups::services_unit;
pub use config::{AgentConfig, ConfigError};
pub use data_dir::DataDirError;
pub use identity::IdentityError;
pub use keeper::KeeperError;
pub use ledger::LedgerError;
pub use provision::artifacts::stub::artifact_stub_main;
pub use run::{RunError, instances_noted, run};

/// An error and its causes in one line, for logs and for messages that travel.
fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Some errors repeat their source.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
