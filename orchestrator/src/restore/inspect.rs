//! What a snapshot file holds, read to its end and checked wholly.

use std::io;
use std::path::Path;

use nave_orchestrator_core::ClusterState;
use nave_proto::pb::row::Row;
use nave_proto::{COMMAND_FORMAT, pb};

use super::{RestoreError, decode_row, read_error};
use crate::raft::types::SnapshotMeta;
use crate::storage::snapshot::SnapshotFile;

/// A snapshot file, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Sixteen hexadecimal digits.
    pub cluster_id: String,
    /// Of the hub that wrote it.
    pub incarnation: u64,
    /// The newest that it holds.
    pub revision: u64,
    /// When it was written, unix nanoseconds; 0: by a build that did not say.
    pub created_unix_ns: i64,
    /// Version of the program that wrote it; empty: by a build that did not say.
    pub written_by: String,
    /// Of the file.
    pub size_bytes: u64,
    /// Services, those being deleted included.
    pub services: usize,
    /// Instances, those being stopped included.
    pub instances: usize,
    /// Hosts.
    pub hosts: usize,
}

/// The same, with all that a restore needs.
pub(super) struct Contents {
    pub(super) info: SnapshotInfo,
    pub(super) meta: SnapshotMeta,
    pub(super) rows: Vec<pb::Row>,
}

/// Reads the whole file, compares its checksum, and checks that its rows are those of one hub. Blocks.
///
/// # Errors
/// When the file is cut short, altered, of a newer build, or no snapshot.
pub fn check_snapshot(path: &Path) -> Result<SnapshotInfo, RestoreError> {
    read_snapshot(path).map(|contents| contents.info)
}

pub(super) fn read_snapshot(path: &Path) -> Result<Contents, RestoreError> {
    let file = SnapshotFile::open(path).map_err(|error| read_error(path, error))?;
    let damaged = |what: String| RestoreError::Damaged { path: path.to_owned(), what };
    let io = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => damaged("it is cut short".to_owned()),
        io::ErrorKind::InvalidData => damaged(error.to_string()),
        _ => read_error(path, error),
    };
    let mut reader = file.reader().map_err(io)?;
    let (meta, head) = (reader.meta().clone(), reader.head().clone());
    if head.command_format > COMMAND_FORMAT {
        return Err(RestoreError::Newer {
            path: path.to_owned(),
            version: head.written_by,
            found: head.command_format,
            known: COMMAND_FORMAT,
        });
    }
    let mut rows = Vec::new();
    while let Some((_, value)) = reader.next_row().map_err(io)? {
        rows.push(decode_row(&value).map_err(damaged)?);
    }
    let index = meta.last_log_id.map_or(0, |id| id.index);
    let state = ClusterState::from_rows(rows.clone(), index).map_err(|error| damaged(error.to_string()))?;
    state.check().map_err(damaged)?;
    let cluster = rows.iter().find_map(|row| match &row.row {
        Some(Row::Cluster(cluster)) => Some(cluster.clone()),
        _ => None,
    });
    let cluster = cluster.unwrap_or_default();
    let info = SnapshotInfo {
        cluster_id: cluster.cluster_id,
        incarnation: cluster.incarnation,
        revision: state.revision(),
        created_unix_ns: head.created_unix_ns,
        written_by: head.written_by,
        size_bytes: file.size_bytes(),
        services: state.services().len(),
        instances: state.instances().len(),
        hosts: state.hosts().len(),
    };
    Ok(Contents { info, meta, rows })
}
