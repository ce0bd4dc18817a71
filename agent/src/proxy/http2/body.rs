//! Bodies: from one stream to the other, no faster than the other takes it, and with the first of it kept for as long as
//! it may have to be sent again.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::HeaderMap;
use tokio::time::timeout;

use super::pool::Lease;

/// Without room for so long, a stream is taken to stand still.
const STALLED_AFTER: Duration = Duration::from_millis(100);

/// Why a body did not arrive whole.
#[derive(Debug)]
pub(super) enum BodyError {
    /// Who sends it broke off.
    Source(h2::Error),
    /// Who gets it does not take it; `None`: without saying why.
    Sink(Option<h2::Error>),
}

impl BodyError {
    /// What to say to the other side.
    pub(super) fn reason(&self) -> Reason {
        match self {
            Self::Source(error) | Self::Sink(Some(error)) => error.reason().unwrap_or(Reason::INTERNAL_ERROR),
            Self::Sink(None) => Reason::CANCEL,
        }
    }
}

/// Not once more has passed than is kept.
#[derive(Debug, Clone, Default)]
pub(super) struct Repeatable {
    too_long: Arc<AtomicBool>,
}

impl Repeatable {
    pub(super) fn get(&self) -> bool {
        !self.too_long.load(Relaxed)
    }
}

/// A request's body, which may be sent more than once.
#[derive(Debug)]
pub(super) struct Replay {
    source: RecvStream,
    kept: Vec<Bytes>,
    kept_bytes: usize,
    bytes_max: usize,
    repeatable: Repeatable,
    /// All of it has been read.
    end: Option<Option<HeaderMap>>,
}

impl Replay {
    pub(super) fn new(source: RecvStream, bytes_max: usize) -> Self {
        let end = source.is_end_stream().then_some(None);
        Self { source, kept: Vec::new(), kept_bytes: 0, bytes_max, repeatable: Repeatable::default(), end }
    }

    /// There is no body: the head says it all.
    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty() && matches!(self.end, Some(None))
    }

    /// Whether it can be sent again from its beginning, also to be asked while it is being sent.
    pub(super) fn repeatable(&self) -> Repeatable {
        self.repeatable.clone()
    }

    /// Sends it to its end, what is kept first.
    pub(super) async fn send(
        &mut self,
        sink: &mut SendStream<Bytes>,
        lease: &Lease,
    ) -> Result<(), BodyError> {
        for (index, chunk) in self.kept.iter().enumerate() {
            let is_last = index + 1 == self.kept.len() && matches!(self.end, Some(None));
            send(sink, chunk.clone(), is_last, Some(lease)).await?;
            if is_last {
                return Ok(());
            }
        }
        while self.end.is_none() {
            match self.source.data().await {
                Some(Ok(chunk)) => {
                    let is_last = self.source.is_end_stream();
                    self.keep(&chunk);
                    if is_last {
                        self.end = Some(None);
                    }
                    let length = chunk.len();
                    let sent = send(sink, chunk, is_last, Some(lease)).await;
                    // What was taken is free for more, whatever became of it.
                    let _gone = self.source.flow_control().release_capacity(length);
                    sent?;
                    if is_last {
                        return Ok(());
                    }
                }
                Some(Err(error)) => return Err(BodyError::Source(error)),
                None => {
                    self.end = Some(self.source.trailers().await.map_err(BodyError::Source)?);
                }
            }
        }
        let trailers = self.end.clone().flatten();
        finish(sink, trailers)
    }

    fn keep(&mut self, chunk: &Bytes) {
        if !self.repeatable.get() || self.kept_bytes + chunk.len() > self.bytes_max {
            self.repeatable.too_long.store(true, Relaxed);
            self.kept = Vec::new();
        } else {
            self.kept_bytes += chunk.len();
            self.kept.push(chunk.clone());
        }
    }
}

/// Passes an answer's body on; returns its trailers.
pub(super) async fn pass(
    source: &mut RecvStream,
    sink: &mut SendStream<Bytes>,
) -> Result<Option<HeaderMap>, BodyError> {
    loop {
        // Also while nothing comes it matters whether anybody still wants it.
        let next = poll_fn(|cx| match sink.poll_reset(cx) {
            Poll::Ready(reset) => Poll::Ready(Err(BodyError::Sink(reset.err()))),
            Poll::Pending => source.poll_data(cx).map(Ok),
        });
        let Some(chunk) = next.await? else { break };
        let chunk = chunk.map_err(BodyError::Source)?;
        let (length, is_last) = (chunk.len(), source.is_end_stream());
        send(sink, chunk, is_last, None).await?;
        let _gone = source.flow_control().release_capacity(length);
        if is_last {
            return Ok(None);
        }
    }
    let trailers = source.trailers().await.map_err(BodyError::Source)?;
    finish(sink, trailers.clone())?;
    Ok(trailers)
}

fn finish(sink: &mut SendStream<Bytes>, trailers: Option<HeaderMap>) -> Result<(), BodyError> {
    let finished = match trailers {
        Some(trailers) => sink.send_trailers(trailers),
        None => sink.send_data(Bytes::new(), true),
    };
    finished.map_err(|error| BodyError::Sink(Some(error)))
}

/// Waits for room. While there is none for long, its connection is no place for other calls: an endpoint whose windows
/// are equal, as many servers' are, gives all of a connection's room to one stream.
async fn capacity(sink: &mut SendStream<Bytes>, lease: Option<&Lease>) -> Option<Result<usize, h2::Error>> {
    let room = poll_fn(|cx| sink.poll_capacity(cx));
    let Some(lease) = lease else { return room.await };
    tokio::pin!(room);
    match timeout(STALLED_AFTER, &mut room).await {
        Ok(room) => room,
        Err(_) => {
            let _others_go_elsewhere = lease.stalled();
            room.await
        }
    }
}

/// Sends one piece, as the other side makes room for it.
async fn send(
    sink: &mut SendStream<Bytes>,
    mut chunk: Bytes,
    is_last: bool,
    lease: Option<&Lease>,
) -> Result<(), BodyError> {
    let sink_error = |error| BodyError::Sink(Some(error));
    if chunk.is_empty() {
        return if is_last { sink.send_data(chunk, true).map_err(sink_error) } else { Ok(()) };
    }
    while !chunk.is_empty() {
        sink.reserve_capacity(chunk.len());
        let room = match sink.capacity() {
            0 => match capacity(sink, lease).await {
                Some(Ok(room)) => room,
                Some(Err(error)) => return Err(sink_error(error)),
                None => return Err(BodyError::Sink(None)),
            },
            room => room,
        };
        let part = chunk.split_to(room.min(chunk.len()));
        let is_end = is_last && chunk.is_empty();
        sink.send_data(part, is_end).map_err(sink_error)?;
    }
    Ok(())
}
