//! What the hub of an old data directory is known to have reached: its state as far as it was made durable, and after
//! it what its log holds. Entries that were never committed count as well: a number too high costs nothing.

use std::io;

use nave_orchestrator_core::{ClusterState, unknown_command};
use nave_proto::pb;
use prost::Message as _;

use crate::raft::types::REGISTRY_GROUP;
use crate::storage::directory::DataDirectory;
use crate::storage::log::{LoggedEntry, read_log};
use crate::storage::state::peek;

/// The cluster's row and the applied index. The old directory may be damaged, which is a reason to restore: of the log
/// counts what comes before the damage, and of a state that cannot be read nothing, so that the gaps alone must do.
/// Blocks.
pub(crate) fn reached(old: &DataDirectory) -> Option<(pb::ClusterRecord, u64)> {
    let (mut tables, mut applied) = match peek(&old.state()).ok()? {
        Some(loaded) => (loaded.tables, loaded.applied.map(|id| id.index)),
        None => (ClusterState::new(), None),
    };
    let read = read_log(old.path(), REGISTRY_GROUP, |entry| {
        let next = applied.map_or(0, |index| index + 1);
        if entry.index < next {
            return true;
        }
        let fits = entry.index == next && apply(&mut tables, &entry).is_ok();
        if fits {
            applied = Some(entry.index);
        }
        fits
    });
    if let Err(error) = read {
        tracing::warn!(%error, "the old log cannot be read to its end");
    }
    Some((tables.cluster()?.clone(), applied.unwrap_or(0)))
}

fn apply(tables: &mut ClusterState, entry: &LoggedEntry) -> io::Result<()> {
    if entry.command.is_empty() {
        tables.apply_blank(entry.index);
        return Ok(());
    }
    let command = pb::Command::decode(entry.command.clone()).map_err(io::Error::other)?;
    if unknown_command(&command) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    tables.apply(entry.index, command);
    Ok(())
}
