//! How to talk to a keeper: where its socket is, the frames, descriptors, and a blocking [`Client`].
//!
//! The agent uses [`connect`], [`encode`], [`FrameBuffer`], [`send`] and [`receive`] on its own runtime; the CLI and
//! the tests use [`Client`], which waits. A reply that carries a descriptor is a `KeeperDone` to a `TakeDescriptor`.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nave_proto::pb;
use pb::keeper_reply::Reply;
use pb::keeper_request::Request;

pub use crate::frame::{FRAME_BYTES_MAX, FrameBuffer, FrameError, encode};
pub use crate::sys::{receive, send};

/// The protocol of this build, said in the hello and in the welcome.
pub const PROTOCOL_VERSION: u32 = 1;

/// A socket's path has room for 108 bytes; beyond this many a short path elsewhere stands in.
const SOCKET_PATH_BYTES_MAX: usize = 100;

/// The socket of the keeper of this data directory: `<data_dir>/keeper.sock`, or, when that is too long for a socket,
/// a short name in /run (data directory owned by root) or in a private directory in /tmp. Keeper, agent and CLI
/// compute the same.
pub fn socket_path(data_dir: &Path) -> PathBuf {
    let plain = data_dir.join("keeper.sock");
    if plain.as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
        return plain;
    }
    let real = data_dir.canonicalize().or_else(|_| std::path::absolute(data_dir));
    let real = real.unwrap_or_else(|_| data_dir.to_path_buf());
    // FNV-1a, 64 bits: a name, not a secret.
    let name = real.as_os_str().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    match std::fs::metadata(&real).map(|data| data.uid()) {
        Ok(0) => PathBuf::from(format!("/run/nave-keeper-{name:016x}.sock")),
        Ok(uid) => PathBuf::from(format!("/tmp/nave-keeper-{uid}-{name:016x}/keeper.sock")),
        Err(_) => plain,
    }
}

/// Connects to a keeper's socket. The stream is blocking; the caller may change that.
///
/// # Errors
/// `NotFound` or `ConnectionRefused` when no keeper runs there.
pub fn connect(socket: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(socket)
}

/// Why a request to the keeper has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket failed, or nothing came in time.
    #[error("keeper not reachable")]
    Io(#[from] io::Error),
    /// What came was no frame.
    #[error("keeper not understood")]
    Frame(#[from] FrameError),
    /// The keeper refused or failed.
    #[error("{}", .0.message)]
    Refused(pb::KeeperError),
    /// The keeper is older than this request.
    #[error("not supported by this keeper, which is of an older version")]
    Unsupported,
}

/// A blocking connection to a keeper.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    frames: FrameBuffer,
    descriptors: VecDeque<OwnedFd>,
    events: VecDeque<Reply>,
    last_id: u64,
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Client {
    /// Connects, without a hello: enough for [`Client::list`] and [`Client::shutdown`].
    ///
    /// # Errors
    /// As [`connect`].
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let stream = connect(socket)?;
        Ok(Self {
            stream,
            frames: FrameBuffer::default(),
            descriptors: VecDeque::new(),
            events: VecDeque::new(),
            last_id: 0,
        })
    }

    /// The longest wait for any one message; `None` waits for ever.
    ///
    /// # Errors
    /// When the duration is zero.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)
    }

    /// Becomes the agent's connection.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn hello(&mut self, agent_version: &str) -> Result<pb::KeeperWelcome, ClientError> {
        let hello = pb::KeeperHello { version: PROTOCOL_VERSION, agent_version: agent_version.to_owned() };
        match self.request(Request::Hello(hello), None)? {
            (Reply::Welcome(welcome), _) => Ok(welcome),
            _ => Err(unexpected("welcome")),
        }
    }

    /// What the keeper keeps.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn list(&mut self) -> Result<Vec<pb::KeptProcess>, ClientError> {
        match self.request(Request::List(pb::ListProcesses {}), None)? {
            (Reply::Processes(list), _) => Ok(list.processes),
            _ => Err(unexpected("process list")),
        }
    }

    /// Which keeper it is, and how its last upgrade came out. Needs no hello.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn status(&mut self) -> Result<pb::KeeperStatus, ClientError> {
        match self.request(Request::Status(pb::KeeperStatusRequest {}), None)? {
            (Reply::Status(status), _) => Ok(status),
            _ => Err(unexpected("status")),
        }
    }

    /// Has the keeper become the program at `staged`, which must lie beside its own, as a copy of that does at
    /// `previous`. Returns when the image that was asked is gone; [`Client::status`] of a new connection tells how it
    /// comes out. `trial`: for the new agent to take over; `None`: the keeper's default.
    ///
    /// # Errors
    /// [`ClientError`]: nothing was changed.
    pub fn upgrade(
        &mut self,
        staged: &Path,
        previous: &Path,
        trial: Option<Duration>,
    ) -> Result<(), ClientError> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let trial_ms = trial.map_or(0, milliseconds);
        let upgrade = pb::KeeperUpgrade { staged: text(staged), previous: text(previous), trial_ms };
        match self.request(Request::Upgrade(upgrade), None) {
            Err(ClientError::Io(error)) if ended(&error) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(unexpected("silence to the order for an upgrade")),
        }
    }

    /// Ends the keeper and its agent and, when asked, all services first (signal, `grace`, kill). Returns when it is
    /// done and the keeper is gone.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn shutdown(&mut self, stop_services: bool, grace: Duration) -> Result<(), ClientError> {
        self.end(pb::KeeperShutdown { stop_services, grace_ms: milliseconds(grace), orderly_ms: 0 })
    }

    /// The same, where the agent gets so long to end the services as their manifests say, before what is left is ended
    /// within `grace`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn shutdown_in_order(&mut self, orderly: Duration, grace: Duration) -> Result<(), ClientError> {
        let (orderly_ms, grace_ms) = (milliseconds(orderly), milliseconds(grace));
        self.end(pb::KeeperShutdown { stop_services: true, grace_ms, orderly_ms })
    }

    fn end(&mut self, shutdown: pb::KeeperShutdown) -> Result<(), ClientError> {
        self.request(Request::Shutdown(shutdown), None)?;
        let mut rest = [0; 512];
        while receive(self.stream.as_fd(), &mut rest)?.0 > 0 {}
        Ok(())
    }

    /// Sends one request, with a descriptor where its kind has one, and waits for the reply to it; events that come
    /// before are kept for [`Client::event`].
    ///
    /// # Errors
    /// [`ClientError`], also for a reply that is an error.
    pub fn request(
        &mut self,
        request: Request,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<(Reply, Option<OwnedFd>), ClientError> {
        let takes = matches!(request, Request::TakeDescriptor(_));
        let id = self.post(request, descriptor)?;
        loop {
            let reply = self.next_reply()?;
            match reply.reply {
                Some(event) if reply.id == 0 => self.events.push_back(event),
                Some(Reply::Error(error)) if reply.id == id => return Err(ClientError::Refused(error)),
                Some(Reply::Unsupported(_)) if reply.id == id => return Err(ClientError::Unsupported),
                Some(answer) if reply.id == id => {
                    let descriptor = if takes { self.descriptors.pop_front() } else { None };
                    return Ok((answer, descriptor));
                }
                // A reply of a newer keeper that we cannot read, or to a request given up before.
                Some(_) | None => {}
            }
        }
    }

    /// Sends one request without waiting; returns its id.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn post(&mut self, request: Request, descriptor: Option<BorrowedFd<'_>>) -> Result<u64, ClientError> {
        self.last_id += 1;
        let frame = encode(&pb::KeeperRequest { id: self.last_id, request: Some(request) })?;
        let mut sent = send(self.stream.as_fd(), &frame, descriptor.as_slice())?;
        while sent < frame.len() {
            sent += send(self.stream.as_fd(), &frame[sent..], &[])?;
        }
        Ok(self.last_id)
    }

    /// The next event: a kept one, or the next to arrive.
    ///
    /// # Errors
    /// [`ClientError::Io`] with `WouldBlock` when the timeout passes first.
    pub fn event(&mut self) -> Result<Reply, ClientError> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            if let pb::KeeperReply { id: 0, reply: Some(event) } = self.next_reply()? {
                self.events.push_back(event);
            }
        }
    }

    /// The next reply or event, as it comes.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn next_reply(&mut self) -> Result<pb::KeeperReply, ClientError> {
        let mut buffer = [0; 4096];
        loop {
            if let Some(reply) = self.frames.next_message::<pb::KeeperReply>()? {
                return Ok(reply);
            }
            let (count, descriptors) = match receive(self.stream.as_fd(), &mut buffer) {
                // A signal that is no concern of ours, such as the end of a child.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                received => received?,
            };
            if count == 0 {
                return Err(ClientError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
            self.frames.push(&buffer[..count]);
            self.descriptors.extend(descriptors);
        }
    }
}

/// The other end has gone away.
fn ended(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

fn unexpected(wanted: &str) -> ClientError {
    ClientError::Io(io::Error::new(io::ErrorKind::InvalidData, format!("keeper answered with no {wanted}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_data_directory_gets_a_short_socket() {
        let base = tempfile::tempdir().unwrap();
        let short = base.path().join("a");
        assert_eq!(socket_path(&short), short.join("keeper.sock"));
        let long = base.path().join("x".repeat(120));
        std::fs::create_dir(&long).unwrap();
        let socket = socket_path(&long);
        assert!(socket.as_os_str().len() < 70, "{}", socket.display());
        assert_eq!(socket, socket_path(&long.join(".")), "the same by any path");
    }
}
