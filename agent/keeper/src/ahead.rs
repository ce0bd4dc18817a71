//! An exec-stub that is there before it is needed. To load our large binary anew for each start takes some 3 ms of the
//! time from the end of a process to its successor; one stub that has been loaded waits, and makes a copy of itself for
//! each start, in the process's cgroup and as a child of the keeper, not of its own (`CLONE_PARENT`). It has one thread,
//! so that its copy may do anything, and it reads no orders itself, so that no secret stays in it.
//!
//! Each start is one message with the descriptors of the orders, the channel, the output and the cgroup; the answer is the
//! pid, or errno. The waiting stub ends with the keeper's end of its socket: when the keeper dies, executes itself anew
//! or has lost patience. A start that it cannot make is made without it.

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::sys::time::TimeVal;

use crate::stub::{self, Step};
use crate::sys;

/// The word before the number of the socket, on the command line.
pub(crate) const AHEAD: &str = "ahead";

/// A copy is made in less than a millisecond; one that has not answered by then is stuck, and the keeper has others to
/// look after.
const PATIENCE: Duration = Duration::from_secs(1);

/// The keeper's end.
#[derive(Debug)]
pub(crate) struct Ahead {
    channel: OwnedFd,
}

/// What a start takes along, in this order; the cgroup comes last and may be missing.
pub(crate) struct Start<'a> {
    pub(crate) orders: BorrowedFd<'a>,
    pub(crate) channel: BorrowedFd<'a>,
    pub(crate) output: [BorrowedFd<'a>; 2],
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

impl Ahead {
    /// Starts one; it is asked before it is ready, and answers then.
    ///
    /// # Errors
    /// As fork.
    pub(crate) fn start(stub_command: &[OsString]) -> io::Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        setsockopt(
            &ours,
            sockopt::ReceiveTimeout,
            &TimeVal::new(PATIENCE.as_secs().try_into().unwrap_or(1), 0),
        )?;
        let words = [AHEAD.to_owned(), theirs.as_raw_fd().to_string()];
        let argv: Vec<CString> = stub_command
            .iter()
            .map(|argument| argument.as_bytes().to_vec())
            .chain(words.into_iter().map(String::into_bytes))
            .map(CString::new)
            .collect::<Result<_, _>>()?;
        sys::fork_exec(&argv[0], &argv, &[theirs.as_fd()], None, theirs.as_fd(), Step::Stub as u8)?;
        Ok(Self { channel: ours })
    }

    /// A copy of it with these orders; its pid.
    ///
    /// # Errors
    /// The copy's, or `TimedOut`, `BrokenPipe` and the like: then there is none, or one that ends when its channel does.
    pub(crate) fn copy(&self, start: &Start<'_>) -> io::Result<u32> {
        let mut descriptors = vec![start.orders, start.channel, start.output[0], start.output[1]];
        descriptors.extend(start.cgroup);
        sys::send(self.channel.as_fd(), b"!", &descriptors)?;
        let mut answer = [0; 8];
        match sys::receive(self.channel.as_fd(), &mut answer) {
            Ok((8, _)) => {
                let [pid, errno] = numbers(answer);
                if errno == 0 { Ok(pid) } else { Err(io::Error::from_raw_os_error(errno.cast_signed())) }
            }
            Ok(_) => Err(io::ErrorKind::BrokenPipe.into()),
            Err(error) => Err(error),
        }
    }
}

fn numbers(bytes: [u8; 8]) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = bytes;
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

/// The waiting stub: never returns. Its copies go on as any stub does.
pub(crate) fn wait(channel: OwnedFd) -> ! {
    loop {
        let mut word = [0; 1];
        let (count, descriptors) = match sys::receive(channel.as_fd(), &mut word) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => sys::exit_now(0),
        };
        if count == 0 {
            sys::exit_now(0);
        }
        let (pid, errno) = match begin(channel.as_fd(), descriptors) {
            Ok(pid) => (pid, 0),
            Err(error) => (0, error.raw_os_error().unwrap_or(libc::EINVAL).cast_unsigned()),
        };
        let mut answer = pid.to_le_bytes().to_vec();
        answer.extend(errno.to_le_bytes());
        if sys::send(channel.as_fd(), &answer, &[]).is_err() {
            sys::exit_now(0);
        }
    }
}

/// In the waiting stub the copy's pid; the copy itself never returns from here.
fn begin(waiting: BorrowedFd<'_>, descriptors: Vec<OwnedFd>) -> io::Result<u32> {
    let mut descriptors = descriptors.into_iter();
    let (Some(orders), Some(channel), Some(stdout), Some(stderr)) =
        (descriptors.next(), descriptors.next(), descriptors.next(), descriptors.next())
    else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let cgroup = descriptors.next();
    match sys::copy_beside(cgroup.as_ref().map(AsFd::as_fd))? {
        Some(pid) => Ok(pid),
        None => {
            sys::close_one(waiting);
            drop(cgroup);
            stub::begin(orders, channel.into_raw_fd(), [stdout.into_raw_fd(), stderr.into_raw_fd()])
        }
    }
}
