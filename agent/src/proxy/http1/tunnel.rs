//! After a switch of protocols (WebSocket and the like) the connection is bytes both ways. Each way ends on its own: a
//! half-closed connection goes on in the other direction.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::alarm::Alarm;
use super::buffer::poll_fill;

/// One way.
#[derive(Debug, Default)]
struct Way {
    ended: bool,
    done: bool,
}

impl Way {
    /// Ready once the reader has ended and the writer has been told.
    fn poll<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        buffer: &mut BytesMut,
        writer: &mut W,
        progress: &mut bool,
    ) -> Poll<io::Result<()>> {
        while !self.done {
            if !buffer.is_empty() {
                let wrote = ready!(Pin::new(&mut *writer).poll_write(cx, buffer))?;
                buffer.advance(wrote);
                *progress = true;
            } else if self.ended {
                ready!(Pin::new(&mut *writer).poll_shutdown(cx))?;
                self.done = true;
            } else {
                // Under TLS what was written may wait for the socket.
                if let Poll::Ready(Err(error)) = Pin::new(&mut *writer).poll_flush(cx) {
                    return Poll::Ready(Err(error));
                }
                match ready!(poll_fill(reader, cx, buffer))? {
                    0 => self.ended = true,
                    _ => *progress = true,
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// Carries bytes both ways until both have ended, one breaks, or nothing has moved for `idle`. What was read before is
/// in the buffers.
pub(super) async fn tunnel<C, U>(
    caller: (&mut C, &mut BytesMut),
    endpoint: (&mut U, &mut BytesMut),
    alarm: &mut Alarm,
    idle: Duration,
) where
    C: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    let (mut up, mut down) = (Way::default(), Way::default());
    let mut due = Instant::now() + idle;
    poll_fn(|cx| {
        let mut progress = false;
        let sent = up.poll(cx, caller.0, caller.1, endpoint.0, &mut progress);
        let received = down.poll(cx, endpoint.0, endpoint.1, caller.0, &mut progress);
        match (sent, received) {
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(()),
            (Poll::Ready(Err(_)), _) | (_, Poll::Ready(Err(_))) => return Poll::Ready(()),
            _ => {}
        }
        if progress {
            due = Instant::now() + idle;
        }
        alarm.poll(due, cx)
    })
    .await;
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    #[tokio::test]
    async fn each_way_ends_on_its_own() {
        let (mut caller, mut near) = duplex(64);
        let (mut endpoint, mut far) = duplex(64);
        let carry = async {
            let mut read_before = BytesMut::from(&b"early "[..]);
            let mut alarm = Alarm::new();
            let (near, far) = ((&mut near, &mut read_before), (&mut far, &mut BytesMut::new()));
            tunnel(near, far, &mut alarm, Duration::from_secs(60)).await;
        };
        let talk = async {
            caller.write_all(b"question").await.unwrap();
            caller.shutdown().await.unwrap();
            let mut question = String::new();
            endpoint.read_to_string(&mut question).await.unwrap();
            assert_eq!(question, "early question");
            endpoint.write_all(b"answer").await.unwrap();
            endpoint.shutdown().await.unwrap();
            let mut answer = String::new();
            caller.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "answer");
        };
        tokio::join!(carry, talk);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_stands_still_ends() {
        let (_caller, mut near) = duplex(64);
        let (_endpoint, mut far) = duplex(64);
        let begin = Instant::now();
        let (near, far) = ((&mut near, &mut BytesMut::new()), (&mut far, &mut BytesMut::new()));
        tunnel(near, far, &mut Alarm::new(), Duration::from_secs(60)).await;
        assert!(begin.elapsed() >= Duration::from_secs(60));
    }
}
