//! Asks the kernel whose socket is at the other end of a loopback connection (sock_diag(7), inet_diag): its owner's uid
//! and the cgroup that it was made in. An exact lookup of one connection, which needs no privilege and takes some
//! microseconds; the answer is there when the question has been sent.
//!
//! Must be asked while the caller's end is open: afterwards nobody knows.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, connect, recv, send, socket,
};
use parking_lot::Mutex;

/// linux/sock_diag.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// linux/netlink.h
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
/// linux/inet_diag.h: the cgroup2 id; since Linux 5.7, where CONFIG_SOCK_CGROUP_DATA is on.
const INET_DIAG_CGROUP_ID: u16 = 21;
const AF_INET: u8 = 2;
const IPPROTO_TCP: u8 = 6;
/// Every state.
const ANY_STATE: u32 = u32::MAX;
/// Sizes of nlmsghdr, inet_diag_req_v2 and inet_diag_msg.
const HEADER: usize = 16;
const REQUEST: usize = 56;
const ANSWER: usize = 72;
/// Of `idiag_uid` in inet_diag_msg.
const UID_AT: usize = 64;
/// The answer has the attributes asked for and a few that always come.
const ANSWER_BYTES_MAX: usize = 4096;
/// A question and its answer belong together by this; answers to questions that were given up are passed over.
const PASSED_OVER_MAX: usize = 8;

/// Whose a socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) uid: u32,
    /// Inode of the cgroup2 directory that the socket was made in.
    pub(super) cgroup: Option<u64>,
}

/// A question to the kernel at a time.
#[derive(Debug)]
pub(super) struct SockDiag {
    socket: Mutex<(OwnedFd, u32)>,
}

impl SockDiag {
    /// # Errors
    /// When the kernel has no sock_diag, or no descriptor is left.
    pub(super) fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let protocol = SockProtocol::NetlinkSockDiag;
        let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol)?;
        connect(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { socket: Mutex::new((socket, 0)) })
    }

    /// The owner of the socket at `local` that is connected to `peer`.
    ///
    /// # Errors
    /// `NotFound`: that socket is closed.
    pub(super) fn owner(&self, local: SocketAddrV4, peer: SocketAddrV4) -> io::Result<Owner> {
        let mut socket = self.socket.lock();
        let (socket, sequence) = &mut *socket;
        *sequence = sequence.wrapping_add(1);
        send(socket.as_raw_fd(), &question(*sequence, local, peer), MsgFlags::empty())?;
        let mut buffer = [0; ANSWER_BYTES_MAX];
        for _ in 0..PASSED_OVER_MAX {
            // The kernel answers within send(2); DONTWAIT, lest a surprise holds up a worker.
            let read = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT)?;
            if let Some(answered) = answer(&buffer[..read], *sequence) {
                return answered;
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }
}

fn question(sequence: u32, local: SocketAddrV4, peer: SocketAddrV4) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + REQUEST);
    let length = u32::try_from(HEADER + REQUEST).expect("72 fits");
    bytes.extend(length.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([AF_INET, IPPROTO_TCP, 0, 0]);
    bytes.extend(ANY_STATE.to_ne_bytes());
    bytes.extend(local.port().to_be_bytes());
    bytes.extend(peer.port().to_be_bytes());
    for ip in [local.ip(), peer.ip()] {
        bytes.extend(ip.octets());
        bytes.extend([0; 12]);
    }
    // Any interface, and no cookie.
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([0xff; 8]);
    bytes
}

/// Nothing: this is no answer to that question.
fn answer(bytes: &[u8], sequence: u32) -> Option<io::Result<Owner>> {
    if u32_at(bytes, 8)? != sequence {
        return None;
    }
    let end = bytes.len().min(usize::try_from(u32_at(bytes, 0)?).ok()?);
    let bytes = &bytes[..end];
    match u16_at(bytes, 4)? {
        NLMSG_ERROR => {
            let errno = u32_at(bytes, HEADER)?.cast_signed();
            let error = io::Error::from(Errno::from_raw(-errno));
            let gone = error.kind() == io::ErrorKind::NotFound;
            Some(Err(if gone { io::ErrorKind::NotFound.into() } else { error }))
        }
        SOCK_DIAG_BY_FAMILY => {
            let uid = u32_at(bytes, HEADER + UID_AT)?;
            let attributes = bytes.get(HEADER + ANSWER..)?;
            Some(Ok(Owner { uid, cgroup: attribute(attributes, INET_DIAG_CGROUP_ID) }))
        }
        _ => None,
    }
}

/// The 64 bits of one attribute, if it is there.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<u64> {
    loop {
        let length = usize::from(u16_at(bytes, 0)?);
        let value = bytes.get(4..length)?;
        if u16_at(bytes, 2)? == wanted {
            return value.first_chunk().map(|value| u64::from_ne_bytes(*value));
        }
        // Each begins on a multiple of four.
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|value| u16::from_ne_bytes(*value))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|value| u32::from_ne_bytes(*value))
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, TcpStream};

    use super::*;

    fn v4(address: SocketAddr) -> SocketAddrV4 {
        match address {
            SocketAddr::V4(address) => address,
            SocketAddr::V6(_) => unreachable!("the tests bind 127.0.0.1"),
        }
    }

    #[test]
    fn the_other_end_is_ours_and_gone_once_it_is_closed() {
        let diag = SockDiag::open().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let caller = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, peer) = listener.accept().unwrap();
        let (local, peer) = (v4(peer), v4(accepted.local_addr().unwrap()));
        let owner = diag.owner(local, peer).unwrap();
        assert_eq!(owner.uid, nix::unistd::geteuid().as_raw());
        drop(accepted);
        drop(caller);
        let strange = SocketAddrV4::new(*local.ip(), 1);
        assert_eq!(diag.owner(strange, peer).unwrap_err().kind(), io::ErrorKind::NotFound);
        diag.owner(local, strange).unwrap_err();
    }

    #[test]
    fn an_answer_to_another_question_or_cut_short_is_none() {
        let mut bytes = question(7, "127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap());
        bytes.resize(HEADER + ANSWER, 0);
        assert!(answer(&bytes, 8).is_none());
        for cut in 0..HEADER {
            assert!(answer(&bytes[..cut], 7).is_none(), "{cut}");
        }
        let with =
            [&[12_u8, 0, 9, 0, 1, 1, 1, 1, 1, 1, 1, 1][..], &[12, 0, 21, 0, 5, 0, 0, 0, 0, 0, 0, 0]].concat();
        assert_eq!(attribute(&with, INET_DIAG_CGROUP_ID), Some(5));
        assert_eq!(attribute(&with[..20], INET_DIAG_CGROUP_ID), None);
        assert_eq!(attribute(&[0, 0, 21, 0], INET_DIAG_CGROUP_ID), None);
    }
}
