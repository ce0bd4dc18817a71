//! A request and its answer on their way between a caller and one endpoint: both directions at once, for as long as bytes
//! come. What an end means for the call is the exchange's to say.

use std::io;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::time::Instant;

use super::buffer::poll_fill;
use super::connection::Client;
use super::exchange::Stream;
use super::framing::BadBody;
use super::receiver::{ReceiveError, Receiver};
use super::sender::{SendError, Sender, Taken};
use super::tunnel::tunnel;
use super::upstream::Upstream;

/// How long a body, either way, may stand still.
pub(super) const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Why no answer came.
#[derive(Debug)]
pub(super) enum Fault {
    Caller,
    Body(BadBody),
    Late,
    /// The endpoint has said that it says no more, and had said nothing.
    Closed,
    Endpoint(io::Error),
}

/// Why the rest of an answer did not come.
#[derive(Debug, Clone, Copy)]
pub(super) enum ReceiveFault {
    Caller,
    Endpoint,
    Late,
}

/// Both ends, and how far the request has gone.
#[derive(Debug)]
pub(super) struct Passing<'a, 'h, S> {
    pub(super) client: &'a mut Client<S>,
    pub(super) upstream: &'a mut Upstream,
    pub(super) sender: &'a mut Sender<'h>,
    pub(super) taken: &'a mut Taken,
    /// How the sending ended.
    sent: Option<Result<(), SendError>>,
    pub(super) patience: Patience,
    progress_at: Instant,
}

/// How long a request may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// All of it.
    pub(super) whole: Option<Instant>,
    /// Without a byte either way.
    pub(super) still: Duration,
}

impl<'a, 'h, S: Stream> Passing<'a, 'h, S> {
    pub(super) fn new(
        client: &'a mut Client<S>,
        upstream: &'a mut Upstream,
        sender: &'a mut Sender<'h>,
        taken: &'a mut Taken,
        patience: Patience,
    ) -> Self {
        Self { client, upstream, sender, taken, sent: None, patience, progress_at: Instant::now() }
    }

    /// From now on it may stand still for so long.
    pub(super) fn begin_body(&mut self, still: Duration) {
        self.patience.still = still;
        self.progress_at = Instant::now();
    }

    /// All of the request has gone out.
    pub(super) fn is_sent(&self) -> bool {
        matches!(self.sent, Some(Ok(()))) && self.taken.body.is_done()
    }

    /// An answer before the answer.
    pub(super) async fn say_interim(&mut self) -> io::Result<()> {
        let due = Instant::now() + STALL_TIMEOUT;
        let Client { stream, scratch, alarm, .. } = &mut *self.client;
        let say = async {
            stream.write_all(scratch).await?;
            stream.flush().await
        };
        alarm.within(due, say).await.map_err(|_| io::ErrorKind::TimedOut)?
    }

    /// The endpoint has switched protocols: bytes from now on, until both are done.
    ///
    /// # Errors
    /// The caller has gone before.
    pub(super) async fn tunnel(&mut self, idle: Duration) -> io::Result<()> {
        self.say_interim().await?;
        let Client { stream, buffer, alarm, .. } = &mut *self.client;
        let upstream = &mut *self.upstream;
        tunnel((stream, buffer), (&mut upstream.stream, &mut upstream.buffer), alarm, idle).await;
        Ok(())
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, progress: &mut bool) {
        if self.sent.is_some() {
            return;
        }
        let polled = self.sender.poll(
            cx,
            &mut self.client.stream,
            &mut self.client.buffer,
            self.taken,
            &mut self.upstream.stream,
            progress,
        );
        if let Poll::Ready(sent) = polled {
            self.sent = Some(sent);
        }
    }

    /// Ready when more of the answer's head has come.
    pub(super) fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        let mut progress = false;
        self.poll_send(cx, &mut progress);
        match &self.sent {
            Some(Err(SendError::Caller)) => return Poll::Ready(Err(Fault::Caller)),
            Some(Err(SendError::Body(bad))) => return Poll::Ready(Err(Fault::Body(*bad))),
            // An endpoint that takes no more may have answered.
            Some(Err(SendError::Endpoint(_)) | Ok(())) | None => {}
        }
        let read = poll_fill(&mut self.upstream.stream, cx, &mut self.upstream.buffer);
        match read {
            Poll::Ready(Ok(0)) if self.upstream.buffer.is_empty() => return Poll::Ready(Err(Fault::Closed)),
            Poll::Ready(Ok(0)) => {
                return Poll::Ready(Err(Fault::Endpoint(io::ErrorKind::UnexpectedEof.into())));
            }
            Poll::Ready(Ok(_)) => return Poll::Ready(Ok(())),
            Poll::Ready(Err(error)) => return Poll::Ready(Err(Fault::Endpoint(error))),
            Poll::Pending => {}
        }
        if matches!(self.sent, Some(Ok(()))) && self.client.poll_gone(cx) {
            return Poll::Ready(Err(Fault::Caller));
        }
        self.poll_late(cx, progress).map(|()| Err(Fault::Late))
    }

    /// Ready when patience has run out.
    fn poll_late(&mut self, cx: &mut Context<'_>, progress: bool) -> Poll<()> {
        if progress {
            self.progress_at = Instant::now();
        }
        let still = self.progress_at + self.patience.still;
        let due = self.patience.whole.map_or(still, |whole| whole.min(still));
        self.client.alarm.poll(due, cx)
    }

    /// Ready when the whole answer has gone to the caller.
    pub(super) fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        receiver: &mut Receiver,
    ) -> Poll<Result<(), ReceiveFault>> {
        let mut progress = false;
        self.poll_send(cx, &mut progress);
        let received = receiver.poll(
            cx,
            &self.client.scratch,
            &mut self.upstream.stream,
            &mut self.upstream.buffer,
            &mut self.client.stream,
            &mut progress,
        );
        match received {
            Poll::Ready(Ok(())) => return Poll::Ready(Ok(())),
            Poll::Ready(Err(ReceiveError::Caller)) => return Poll::Ready(Err(ReceiveFault::Caller)),
            Poll::Ready(Err(ReceiveError::Body(_) | ReceiveError::Endpoint(_))) => {
                return Poll::Ready(Err(ReceiveFault::Endpoint));
            }
            Poll::Pending => {}
        }
        self.poll_late(cx, progress).map(|()| Err(ReceiveFault::Late))
    }
}
