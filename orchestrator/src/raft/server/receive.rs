//! Receives one snapshot into a temporary file and checks it wholly before openraft hears of it: an install that fails
//! ends this member, a transfer that fails is only tried again.

use std::io::{self, Write as _};
use std::sync::Arc;

use nave_proto::ids::MemberId;
use nave_proto::pb;
use openraft::storage::Snapshot;
use tonic::{Status, Streaming};

use super::{malformed, own_vote};
use crate::raft::convert;
use crate::raft::types::{LeaderId, MemberNode, SnapshotMeta, Vote};
use crate::storage::snapshot::{SnapshotDirectory, SnapshotFile, TemporaryFile};

pub(super) async fn receive(
    sender: MemberId,
    mut input: Streaming<pb::SnapshotChunk>,
    snapshots: Arc<SnapshotDirectory>,
) -> Result<(Vote, Snapshot<LeaderId, u64, MemberNode, SnapshotFile>), Status> {
    let first = input.message().await?.and_then(|chunk| chunk.chunk);
    let Some(pb::snapshot_chunk::Chunk::Head(head)) = first else {
        return Err(Status::invalid_argument("a snapshot begins with its head"));
    };
    own_vote(sender, head.group, head.vote.as_ref())?;
    let vote = convert::vote_from_pb(head.vote.as_ref().expect("own_vote asks for it"));
    let meta = convert::snapshot_meta_from_pb(head.meta.unwrap_or_default()).map_err(malformed)?;
    let temporary = snapshots.temporary("incoming");
    let create = temporary.path().to_owned();
    let mut file = blocking(move || std::fs::File::create(create)).await?;
    let mut left = head.size_bytes;
    while let Some(chunk) = input.message().await? {
        let Some(pb::snapshot_chunk::Chunk::Data(data)) = chunk.chunk else {
            return Err(Status::invalid_argument("a snapshot has one head, then data"));
        };
        left = left
            .checked_sub(data.len() as u64)
            .ok_or_else(|| Status::invalid_argument("the snapshot is longer than its head says"))?;
        file = blocking(move || file.write_all(&data).map(|()| file)).await?;
    }
    if left != 0 {
        return Err(Status::data_loss(format!("the snapshot ended {left} bytes early")));
    }
    drop(file);
    let expected = meta.clone();
    let file = blocking(move || check(temporary, &expected)).await?;
    tracing::info!(member = %sender, index = meta.last_log_id.map(|id| id.index), size_bytes = head.size_bytes, "snapshot received");
    Ok((vote, Snapshot { meta, snapshot: file }))
}

fn check(temporary: TemporaryFile, expected: &SnapshotMeta) -> io::Result<SnapshotFile> {
    let file = SnapshotFile::open_temporary(temporary)?;
    let found = file.verify()?;
    if found != *expected {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the snapshot is not the one that was announced",
        ));
    }
    Ok(file)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await.map_err(|e| Status::internal(e.to_string()))?;
    done.map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Status::data_loss(error.to_string()),
        _ => Status::internal(error.to_string()),
    })
}
