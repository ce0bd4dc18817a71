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
    let (sender, receiver) = mpsc::channel(PARTS_WAITING);
    // A large one takes longer to write than a call may take to answer.
    hub.tasks.spawn(send(hub.clone(), sender));
    Ok(Box::pin(ReceiverStream::new(receiver)))
}

async fn send(hub: Arc<Hub>, parts: mpsc::Sender<Result<pb::SnapshotPart, Status>>) {
    let sent = tokio::select! {
        sent = export(&hub, &parts) => sent,
        () = hub.stop.cancelled() => Err(errors::stopping()),
    };
    if let Err(status) = sent {
        // The operator may have gone.
        parts.send(Err(status)).await.ok();
    }
}

async fn export(hub: &Hub, parts: &mpsc::Sender<Result<pb::SnapshotPart, Status>>) -> Result<(), Status> {
    let exported = hub.raft.export_snapshot().await;
    let file = exported.map_err(|error| {
        errors::unavailable("NO_SNAPSHOT", format!("this member cannot write a snapshot: {error}"))
    })?;
    info!(size_bytes = file.size_bytes(), "a snapshot is taken for an operator");
    let mut offset = 0;
    while offset < file.size_bytes() {
        let whole = file.clone();
        let read = tokio::task::spawn_blocking(move || whole.read_at(offset, PART_BYTES)).await;
        let read = read.map_err(std::io::Error::other).and_then(|read| read);
        let data =
            read.map_err(|error| errors::internal(format!("cannot read the snapshot back: {error}")))?;
        offset += data.len() as u64;
        if parts.send(Ok(pb::SnapshotPart { data })).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}
