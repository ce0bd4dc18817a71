//! Datagrams in which a process says how it is (sd_notify): the bytes, and who sent them. The agent reads them, and,
//! while there is none, the keeper.
//!
//! What comes with one besides is closed: whoever says `BARRIER=1` sends a descriptor and waits for just that.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg};
use nix::unistd::close;

use crate::identity::Stat;

/// systemd's own bound.
pub const NOTICE_BYTES_MAX: usize = 4096;
/// The most that the kernel lets anybody send with one (SCM_MAX_FD).
const DESCRIPTORS_MAX: usize = 253;

/// One datagram; its bytes are in the buffer that it was read into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notice {
    /// Bytes in the buffer.
    pub length: usize,
    /// By the kernel's word; nothing when it does not say, or when the sender is in another world of pids.
    pub sender: Option<u32>,
}

/// The next one, which stays where it is.
///
/// # Errors
/// As recvmsg; `WouldBlock` when there is none.
pub fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Notice> {
    receive(socket, buffer, MsgFlags::MSG_PEEK)
}

/// The next one.
///
/// # Errors
/// As recvmsg; `WouldBlock` when there is none.
pub fn take(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Notice> {
    receive(socket, buffer, MsgFlags::empty())
}

fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], flags: MsgFlags) -> io::Result<Notice> {
    // Room for all: nothing is told of a message of which a part did not fit.
    let mut control = nix::cmsg_space!(UnixCredentials, [RawFd; DESCRIPTORS_MAX]);
    let mut parts = [io::IoSliceMut::new(buffer)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let mut sender = None;
    for part in message.cmsgs().into_iter().flatten() {
        match part {
            ControlMessageOwned::ScmCredentials(credentials) => {
                sender = u32::try_from(credentials.pid()).ok().filter(|pid| *pid != 0);
            }
            // That closing one fails changes nothing.
            ControlMessageOwned::ScmRights(descriptors) => descriptors.into_iter().for_each(|fd| {
                let _closed = close(fd);
            }),
            _ => {}
        }
    }
    Ok(Notice { length: message.bytes, sender })
}

/// Whether a process is in the cgroup of this name, or in one below it. One that has ended cannot be asked any more: it
/// was let in by the socket's owner alone. Of one that nobody knows nothing is believed.
#[must_use]
pub fn is_of(sender: Option<u32>, group: &str) -> bool {
    let Some(pid) = sender else { return false };
    match std::fs::read_to_string(format!("/proc/{pid}/cgroup")) {
        Ok(groups) => is_in(&groups, group) || has_ended(pid),
        Err(_) => true,
    }
}

/// Some kernels say that one on its way out is in no group.
fn has_ended(pid: u32) -> bool {
    Stat::read(pid).map_or(true, |stat| stat.ends || stat.is_zombie())
}

fn is_in(groups: &str, group: &str) -> bool {
    groups.lines().any(|line| line.split('/').any(|part| part == group))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use nix::sys::socket::setsockopt;
    use nix::sys::socket::sockopt::PassCred;

    use super::*;
    use crate::sys;

    fn pair() -> (UnixDatagram, UnixDatagram) {
        let (speaker, socket) = UnixDatagram::pair().unwrap();
        setsockopt(&socket, PassCred, &true).unwrap();
        (speaker, socket)
    }

    fn open_descriptors() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[test]
    fn one_that_comes_with_descriptors_is_known_by_its_sender_and_they_are_closed() {
        let (speaker, socket) = pair();
        let (kept, passed) = UnixDatagram::pair().unwrap();
        let many = [passed.as_fd(); DESCRIPTORS_MAX];
        sys::send(speaker.as_fd(), b"BARRIER=1", &many).unwrap();
        drop(passed);
        let mut buffer = [0; NOTICE_BYTES_MAX];
        let sender = Some(std::process::id());
        let looked = peek(socket.as_fd(), &mut buffer).unwrap();
        assert_eq!(looked, Notice { length: 9, sender });
        let writes = |socket: &UnixDatagram| socket.send(b"?").map_err(|error| error.kind());
        writes(&kept).expect("the barrier stands for as long as the message does");
        let taken = take(socket.as_fd(), &mut buffer).unwrap();
        assert_eq!((taken, &buffer[..9]), (looked, &b"BARRIER=1"[..]));
        writes(&kept).expect_err("all copies are closed");
        let none = take(socket.as_fd(), &mut buffer).unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::WouldBlock);
        // Others run beside this test; the copies that were passed are far more than they open.
        assert!(open_descriptors() < DESCRIPTORS_MAX);
    }

    #[test]
    fn a_sender_is_known_by_its_cgroup() {
        let groups = "4:memory:/nave-00c1-h-3/web/i-42-1\n0::/nave-00c1-h-3/web/i-42-1/below\n";
        assert!(is_in(groups, "i-42-1"));
        assert!(!is_in(groups, "i-4-1") && !is_in(groups, "i-42-2"));
        assert!(!is_in("0::/user.slice\n", "i-42-1"));
        assert!(!is_of(Some(std::process::id()), "i-42-1"), "we are a stranger");
        assert!(!is_of(None, "i-42-1"));
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        let pid = ended.id();
        while !Stat::read(pid).unwrap().is_zombie() {
            std::thread::yield_now();
        }
        assert!(is_of(Some(pid), "i-42-1"), "not reaped yet");
        ended.wait().unwrap();
        assert!(is_of(Some(pid), "i-42-1"), "nobody can say any more");
    }
}
