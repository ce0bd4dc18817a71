//! The keeper's side of one connection: never blocks, bounded in both directions.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nave_proto::pb;

use crate::frame::{FRAME_BYTES_MAX, FrameBuffer, encode};
use crate::sys;

/// Waiting for a peer that does not read: two of the largest frames and some. Beyond, it is cut off; a new hello
/// repeats what matters.
const UNSENT_BYTES_MAX: usize = 3 * FRAME_BYTES_MAX;
/// Descriptors received ahead of the requests they belong to.
const DESCRIPTORS_MAX: usize = 16;
const READ_BYTES: usize = 8 * 1024;

/// One peer.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    frames: FrameBuffer,
    descriptors: VecDeque<OwnedFd>,
    unsent: VecDeque<Unsent>,
    unsent_bytes: usize,
}

#[derive(Debug)]
struct Unsent {
    frame: Vec<u8>,
    sent: usize,
    descriptor: Option<OwnedFd>,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            frames: FrameBuffer::default(),
            descriptors: VecDeque::new(),
            unsent: VecDeque::new(),
            unsent_bytes: 0,
        })
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Takes what has arrived.
    ///
    /// # Errors
    /// When the connection is of no further use: closed, failed, or misused.
    pub(crate) fn fill(&mut self) -> io::Result<()> {
        let mut buffer = [0; READ_BYTES];
        match sys::receive(self.stream.as_fd(), &mut buffer) {
            Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((count, descriptors)) => {
                self.frames.push(&buffer[..count]);
                self.descriptors.extend(descriptors);
                if self.descriptors.len() > DESCRIPTORS_MAX {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                Ok(())
            }
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The next whole request.
    ///
    /// # Errors
    /// When what came is no frame.
    pub(crate) fn next_request(&mut self) -> io::Result<Option<pb::KeeperRequest>> {
        self.frames.next_message().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// The descriptor that came with the request just taken.
    pub(crate) fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop_front()
    }

    /// Queues a reply and sends what goes at once.
    ///
    /// # Errors
    /// When the connection is of no further use.
    pub(crate) fn send(&mut self, reply: &pb::KeeperReply, descriptor: Option<OwnedFd>) -> io::Result<()> {
        let frame = encode(reply).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        self.unsent_bytes += frame.len();
        self.unsent.push_back(Unsent { frame, sent: 0, descriptor });
        self.flush()?;
        if self.unsent_bytes > UNSENT_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not read"));
        }
        Ok(())
    }

    /// Sends what goes without waiting.
    ///
    /// # Errors
    /// When the connection is of no further use.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        while let Some(first) = self.unsent.front_mut() {
            let riding = first.descriptor.as_ref().map(AsFd::as_fd);
            match sys::send(self.stream.as_fd(), &first.frame[first.sent..], riding.as_slice()) {
                Ok(count) => {
                    first.sent += count;
                    first.descriptor = None;
                    self.unsent_bytes -= count;
                }
                Err(error) if is_transient(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
            if first.sent == first.frame.len() {
                self.unsent.pop_front();
            }
        }
        Ok(())
    }

    /// Whether something waits for the peer to read.
    pub(crate) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
