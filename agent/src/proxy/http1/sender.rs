//! The request's way: head and body from the caller to the endpoint, as one hand-written future, so that it can go on
//! while the response comes back, and be left at any byte.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};

use super::buffer::poll_fill;
use super::framing::{BadBody, Body};
use super::replay::Replay;

/// Why a request could not be sent to its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum SendError {
    /// The caller has gone, or gave less than it had announced.
    #[error("the caller is gone")]
    Caller,
    #[error(transparent)]
    Body(#[from] BadBody),
    /// The endpoint takes no more; it may have answered nevertheless.
    #[error("the endpoint takes no more")]
    Endpoint(#[source] io::Error),
}

/// What has been taken of a request's body, over all tries.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) body: Body,
    pub(super) replay: Replay,
}

/// One try at sending.
#[derive(Debug)]
pub(super) struct Sender<'a> {
    /// Head, and what of the body goes with it.
    first: &'a [u8],
    written: usize,
    /// Bytes at the beginning of the caller's buffer that are of the body and not yet written.
    unsent: usize,
    /// At least a byte has reached the endpoint's kernel.
    pub(super) touched: bool,
}

impl<'a> Sender<'a> {
    pub(super) fn new(first: &'a [u8]) -> Self {
        Self { first, written: 0, unsent: 0, touched: false }
    }

    /// Ready once all is sent. `progress` is set whenever something moved.
    pub(super) fn poll<C, U>(
        &mut self,
        cx: &mut Context<'_>,
        caller: &mut C,
        buffer: &mut BytesMut,
        taken: &mut Taken,
        endpoint: &mut U,
        progress: &mut bool,
    ) -> Poll<Result<(), SendError>>
    where
        C: AsyncRead + Unpin,
        U: AsyncWrite + Unpin,
    {
        while self.written < self.first.len() {
            let wrote = ready!(Pin::new(&mut *endpoint).poll_write(cx, &self.first[self.written..]));
            self.written += wrote.map_err(SendError::Endpoint)?;
            (self.touched, *progress) = (true, true);
        }
        loop {
            if self.unsent > 0 {
                let wrote = ready!(Pin::new(&mut *endpoint).poll_write(cx, &buffer[..self.unsent]));
                let wrote = wrote.map_err(SendError::Endpoint)?;
                buffer.advance(wrote);
                self.unsent -= wrote;
                *progress = true;
            } else if taken.body.is_done() {
                // Under TLS what was written may wait for the socket.
                return Pin::new(endpoint).poll_flush(cx).map_err(SendError::Endpoint);
            } else if !buffer.is_empty() {
                self.unsent = taken.body.take(buffer)?;
                taken.replay.add(&buffer[..self.unsent]);
            } else {
                if let Poll::Ready(Err(error)) = Pin::new(&mut *endpoint).poll_flush(cx) {
                    return Poll::Ready(Err(SendError::Endpoint(error)));
                }
                match ready!(poll_fill(caller, cx, buffer)) {
                    Ok(0) | Err(_) => return Poll::Ready(Err(SendError::Caller)),
                    Ok(_) => *progress = true,
                }
            }
        }
    }

    /// Gives the try up: what was taken from the caller and not sent is in the replay, if anywhere.
    pub(super) fn abandon(self, buffer: &mut BytesMut) {
        buffer.advance(self.unsent);
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;
    use crate::proxy::http1::framing::Framing;

    fn taken(framing: Framing) -> Taken {
        Taken { body: Body::new(framing), replay: Replay::new(64) }
    }

    async fn send(
        sender: &mut Sender<'_>,
        caller: &[u8],
        taken: &mut Taken,
    ) -> (Result<(), SendError>, Vec<u8>, BytesMut) {
        let (mut endpoint, mut buffer) = (Vec::new(), BytesMut::new());
        let mut caller = caller;
        let sent =
            poll_fn(|cx| sender.poll(cx, &mut caller, &mut buffer, taken, &mut endpoint, &mut false)).await;
        buffer.extend_from_slice(caller);
        (sent, endpoint, buffer)
    }

    #[tokio::test]
    async fn the_next_request_is_left_in_the_buffer() {
        let mut taken = taken(Framing::Chunked);
        let (sent, out, left) =
            send(&mut Sender::new(b"head "), b"2\r\nab\r\n0\r\n\r\nGET", &mut taken).await;
        sent.unwrap();
        assert_eq!((out.as_slice(), &left[..]), (b"head 2\r\nab\r\n0\r\n\r\n".as_slice(), b"GET".as_slice()));
        assert_eq!(taken.replay.bytes(), Some(b"2\r\nab\r\n0\r\n\r\n".as_slice()));
    }

    #[tokio::test]
    async fn a_caller_that_breaks_off_or_its_word_is_told_apart() {
        let mut short = taken(Framing::Length(9));
        let (sent, ..) = send(&mut Sender::new(b""), b"abc", &mut short).await;
        assert!(matches!(sent, Err(SendError::Caller)), "{sent:?}");
        let mut bad = taken(Framing::Chunked);
        let (sent, ..) = send(&mut Sender::new(b""), b"zz", &mut bad).await;
        assert!(matches!(sent, Err(SendError::Body(BadBody::ChunkSize))), "{sent:?}");
    }

    #[tokio::test]
    async fn what_an_abandoned_try_has_taken_is_in_the_replay() {
        let (mut narrow, _far) = tokio::io::duplex(3);
        let mut taken = taken(Framing::Length(6));
        let mut buffer = BytesMut::from(&b"abcdefNEXT"[..]);
        let mut sender = Sender::new(b"");
        let polled = poll_fn(|cx| {
            Poll::Ready(sender.poll(
                cx,
                &mut tokio::io::empty(),
                &mut buffer,
                &mut taken,
                &mut narrow,
                &mut false,
            ))
        })
        .await;
        assert!(polled.is_pending());
        sender.abandon(&mut buffer);
        assert_eq!(&buffer[..], b"NEXT");
        assert_eq!(taken.replay.bytes(), Some(b"abcdef".as_slice()));
    }
}
