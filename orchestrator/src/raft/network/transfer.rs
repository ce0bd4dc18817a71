//! Sends one snapshot file: the head, then chunks. The receiver answers once it has installed it.

use futures::{Stream, stream};
use nave_proto::pb;
use openraft::storage::Snapshot;
use tokio::sync::oneshot;
use tonic::{Response, Status};

use super::Client;
use crate::raft::convert;
use crate::raft::types::{LeaderId, MemberNode, REGISTRY_GROUP, Vote};
use crate::storage::snapshot::SnapshotFile;

pub(crate) const CHUNK_BYTES: usize = 256 * 1024;

pub(super) async fn send(
    mut client: Client,
    vote: Vote,
    snapshot: Snapshot<LeaderId, u64, MemberNode, SnapshotFile>,
) -> Result<Response<pb::SnapshotResponse>, Status> {
    let Snapshot { meta, snapshot: file } = snapshot;
    let head = pb::SnapshotHead {
        group: REGISTRY_GROUP,
        vote: Some(convert::vote_to_pb(&vote)),
        meta: Some(convert::snapshot_meta_to_pb(&meta)),
        size_bytes: file.size_bytes(),
    };
    let (failed, failure) = oneshot::channel();
    let sent = client.install_snapshot(Box::pin(chunks(head, file, failed))).await;
    // A file that cannot be read ends the request stream early; the receiver's complaint about that is not the cause.
    match failure.await {
        Ok(status) => Err(status),
        Err(_) => sent,
    }
}

fn chunks(
    head: pb::SnapshotHead,
    file: SnapshotFile,
    failed: oneshot::Sender<Status>,
) -> impl Stream<Item = pb::SnapshotChunk> + Send + 'static {
    let size = file.size_bytes();
    let first = pb::SnapshotChunk { chunk: Some(pb::snapshot_chunk::Chunk::Head(head)) };
    let data = stream::unfold((file, 0, failed), move |(file, offset, failed)| async move {
        if offset >= size {
            return None;
        }
        let reading = file.clone();
        let read = tokio::task::spawn_blocking(move || reading.read_at(offset, CHUNK_BYTES)).await;
        let error = match read {
            Ok(Ok(data)) => {
                let next = offset + data.len() as u64;
                let chunk = pb::snapshot_chunk::Chunk::Data(data.into());
                return Some((pb::SnapshotChunk { chunk: Some(chunk) }, (file, next, failed)));
            }
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        // The other end waits in `send`, which is gone only when nobody wants the answer.
        let _gone = failed.send(Status::data_loss(format!("read snapshot: {error}")));
        None
    });
    futures::StreamExt::chain(stream::iter([first]), data)
}
