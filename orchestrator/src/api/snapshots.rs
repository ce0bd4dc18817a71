//! A snapshot of the registry streamed to an operator as a file. It holds at least all that was acknowledged before
//! the call, at one revision; the reader checks the sum at its end and keeps the file only when it is right.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use nave_proto::pb;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};
use tracing::info;

use crate::api::{Hub, errors};
use crate::storage::snapshot::SnapshotFile;

/// A message's data.
const PART_BYTES: usize = 256 * 1024;
/// Parts that wait for the connection: 1 MiB.
const PARTS_WAITING: usize = 4;

pub(crate) type Parts = Pin<Box<dyn Stream<Item = Result<pb::SnapshotPart, Status>> + Send>>;

pub(crate) async fn take(
    hub: &Arc<Hub>,
    request: &Request<pb::TakeSnapshotRequest>,
) -> Result<Parts, Status> {
    hub.read(request, true).await?;
    if hub.raft.state().cluster().is_none() {
        return Err(errors::not_begun());
    }
    let exported = hub.raft.export_snapshot().await;
    let file = exported
        .map_err(|error| errors::unavailable("NO_SNAPSHOT", format!("cannot write a snapshot: {error}")))?;
    info!(size_bytes = file.size_bytes(), "snapshot taken for an operator");
    let (sender, receiver) = mpsc::channel(PARTS_WAITING);
    hub.tasks.spawn(send(file, sender));
    Ok(Box::pin(ReceiverStream::new(receiver)))
}

async fn send(file: SnapshotFile, parts: mpsc::Sender<Result<pb::SnapshotPart, Status>>) {
    let mut offset = 0;
    while offset < file.size_bytes() {
        let whole = file.clone();
        let read = tokio::task::spawn_blocking(move || whole.read_at(offset, PART_BYTES)).await;
        let part = match read {
            Ok(Ok(data)) => {
                offset += data.len() as u64;
                Ok(pb::SnapshotPart { data: data.into() })
            }
            Ok(Err(error)) => Err(errors::internal(format!("cannot read the snapshot: {error}"))),
            Err(error) => Err(errors::internal(format!("cannot read the snapshot: {error}"))),
        };
        let failed = part.is_err();
        // The operator may have gone.
        if parts.send(part).await.is_err() || failed {
            return;
        }
    }
}
