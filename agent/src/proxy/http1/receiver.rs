//! The response's way: head and body from the endpoint to the caller.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};

use super::buffer::poll_fill;
use super::framing::{BadBody, Body, Framing};

/// So much of a body travels in one write with its head.
const TOGETHER_BYTES: usize = 16 * 1024;

/// Why a response could not be passed on to its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
    #[error("the caller is gone")]
    Caller,
    #[error(transparent)]
    Body(#[from] BadBody),
    #[error("the endpoint broke off in the middle of its answer")]
    Endpoint(#[source] io::Error),
}

/// The passing on of one response.
#[derive(Debug)]
pub(super) struct Receiver {
    written: usize,
    /// Bytes at the beginning of the endpoint's buffer that are of the body and not yet written.
    unsent: usize,
    body: Body,
}

impl Receiver {
    /// What of the body is there already and fits travels with the head in `first`.
    ///
    /// # Errors
    /// When the body breaks its framing.
    pub(super) fn new(framing: Framing, buffer: &mut BytesMut, first: &mut Vec<u8>) -> Result<Self, BadBody> {
        let mut body = Body::new(framing);
        let mut unsent = body.take(buffer)?;
        if unsent <= TOGETHER_BYTES {
            first.extend_from_slice(&buffer[..unsent]);
            buffer.advance(unsent);
            unsent = 0;
        }
        Ok(Self { written: 0, unsent, body })
    }

    /// Ready once all is passed on. `progress` is set whenever something moved.
    pub(super) fn poll<U, C>(
        &mut self,
        cx: &mut Context<'_>,
        first: &[u8],
        endpoint: &mut U,
        buffer: &mut BytesMut,
        caller: &mut C,
        progress: &mut bool,
    ) -> Poll<Result<(), ReceiveError>>
    where
        U: AsyncRead + Unpin,
        C: AsyncWrite + Unpin,
    {
        while self.written < first.len() {
            let wrote = ready!(Pin::new(&mut *caller).poll_write(cx, &first[self.written..]));
            self.written += wrote.map_err(|_| ReceiveError::Caller)?;
            *progress = true;
        }
        loop {
            if self.unsent > 0 {
                let wrote = ready!(Pin::new(&mut *caller).poll_write(cx, &buffer[..self.unsent]));
                let wrote = wrote.map_err(|_| ReceiveError::Caller)?;
                buffer.advance(wrote);
                self.unsent -= wrote;
                *progress = true;
            } else if self.body.is_done() {
                // Under TLS what was written may wait for the socket.
                return Pin::new(caller).poll_flush(cx).map_err(|_| ReceiveError::Caller);
            } else if !buffer.is_empty() {
                self.unsent = self.body.take(buffer)?;
            } else {
                if let Poll::Ready(Err(_)) = Pin::new(&mut *caller).poll_flush(cx) {
                    return Poll::Ready(Err(ReceiveError::Caller));
                }
                match ready!(poll_fill(endpoint, cx, buffer)) {
                    Ok(0) if self.body == Body::UntilClose => self.body = Body::Done,
                    Ok(0) => {
                        return Poll::Ready(Err(ReceiveError::Endpoint(io::ErrorKind::UnexpectedEof.into())));
                    }
                    Ok(_) => *progress = true,
                    Err(error) => return Poll::Ready(Err(ReceiveError::Endpoint(error))),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    async fn receive(
        framing: Framing,
        buffered: &[u8],
        later: &[u8],
    ) -> (Result<(), ReceiveError>, Vec<u8>, BytesMut) {
        let (mut first, mut caller) = (b"head ".to_vec(), Vec::new());
        let mut buffer = BytesMut::from(buffered);
        let mut receiver = Receiver::new(framing, &mut buffer, &mut first).unwrap();
        let mut endpoint = later;
        let received =
            poll_fn(|cx| receiver.poll(cx, &first, &mut endpoint, &mut buffer, &mut caller, &mut false))
                .await;
        (received, caller, buffer)
    }

    #[tokio::test]
    async fn a_body_is_passed_on_to_its_end_and_no_further() {
        let (received, out, left) = receive(Framing::Length(6), b"abc", b"defX").await;
        received.unwrap();
        assert_eq!((out.as_slice(), &left[..]), (b"head abcdef".as_slice(), b"X".as_slice()));
        let (received, out, _) = receive(Framing::UntilClose, b"abc", b"def").await;
        received.unwrap();
        assert_eq!(out, b"head abcdef");
        let big = vec![b'x'; 3 * TOGETHER_BYTES];
        let (received, out, _) = receive(Framing::Length(big.len() as u64), &big, b"").await;
        received.unwrap();
        assert_eq!(out.len(), 5 + big.len());
    }

    #[tokio::test]
    async fn a_body_that_ends_early_is_an_error() {
        let (received, out, _) = receive(Framing::Length(6), b"abc", b"").await;
        assert!(matches!(received, Err(ReceiveError::Endpoint(_))), "{received:?}");
        assert_eq!(out, b"head abc");
        let (received, ..) = receive(Framing::Chunked, b"", b"3\r\nabcX").await;
        assert!(matches!(received, Err(ReceiveError::Body(_))), "{received:?}");
    }
}
