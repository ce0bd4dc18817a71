//! Buffers begin small, for most connections wait most of the time, and grow with what flows through them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

/// A head and a small body.
pub(super) const FIRST_BYTES: usize = 4 * 1024;
/// One read of a bulk transfer; twice that gained nothing measurable on loopback.
const BULK_BYTES: usize = 64 * 1024;

/// Reads what has come behind what is there; 0 is the end. A read that fills the buffer makes it larger for the next,
/// within bounds.
pub(super) fn poll_fill<R: AsyncRead + Unpin>(
    reader: &mut R,
    cx: &mut Context<'_>,
    buffer: &mut BytesMut,
) -> Poll<io::Result<usize>> {
    if buffer.capacity() == buffer.len() {
        // Takes the room of what was used up, if there is any.
        buffer.reserve(FIRST_BYTES);
    }
    let read = ready!(poll_read_buf(Pin::new(reader), cx, buffer))?;
    let capacity = buffer.capacity();
    if buffer.len() == capacity && capacity < BULK_BYTES {
        buffer.reserve(2 * capacity);
    }
    Poll::Ready(Ok(read))
}

/// [`poll_fill`], waiting. Cancel-safe.
pub(super) async fn fill<R: AsyncRead + Unpin>(reader: &mut R, buffer: &mut BytesMut) -> io::Result<usize> {
    std::future::poll_fn(|cx| poll_fill(reader, cx, buffer)).await
}

#[cfg(test)]
mod tests {
    use bytes::Buf as _;

    use super::*;

    #[tokio::test]
    async fn room_grows_with_what_flows_up_to_the_bulk() {
        let mut buffer = BytesMut::new();
        let mut endless = tokio::io::repeat(b'x');
        assert!(fill(&mut endless, &mut buffer).await.unwrap() >= FIRST_BYTES);
        let mut read = 0;
        for _ in 0..10 {
            buffer.advance(buffer.len());
            read = fill(&mut endless, &mut buffer).await.unwrap();
        }
        assert!((BULK_BYTES..=3 * BULK_BYTES).contains(&read), "{read}");
        let mut small = &b"small"[..];
        let mut buffer = BytesMut::new();
        assert_eq!(fill(&mut small, &mut buffer).await.unwrap(), 5);
        assert!(buffer.capacity() <= 2 * FIRST_BYTES);
    }
}
