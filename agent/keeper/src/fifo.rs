//! The named FIFOs of one log, `stdout` and `stderr` in its directory.
//!
//! Always opened read-write: then neither end waits for the other, and neither notices when the other goes. Nothing
//! here follows a link, and everything is relative to the directory once that is open.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl, open, openat};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{Gid, Uid, fchown, mkfifoat};

use crate::lines::Stream;

/// What a process can write while no keeper runs.
const FIFO_BYTES: i32 = 256 * 1024;

/// The ends to read from, made where they are missing; never waiting.
///
/// # Errors
/// When one cannot be made, or something else has its name.
pub(crate) fn reading_ends(directory: &OwnedFd) -> io::Result<[OwnedFd; 2]> {
    let end = |stream: Stream| -> io::Result<OwnedFd> {
        let fd = open_fifo(directory.as_fd(), stream, OFlag::O_NONBLOCK)?;
        // Refused to a user who has many; what there is then must do.
        let _ = fcntl(&fd, FcntlArg::F_SETPIPE_SZ(FIFO_BYTES));
        Ok(fd)
    };
    Ok([end(Stream::Stdout)?, end(Stream::Stderr)?])
}

/// The ends of a log's FIFOs for a process to write to; `owner` may open them again through /dev/stdout.
///
/// # Errors
/// When they are not there or not FIFOs.
pub(crate) fn writing_ends(dir: &Path, owner: Option<(u32, u32)>) -> io::Result<[OwnedFd; 2]> {
    let directory = open_directory(dir)?;
    let end = |stream: Stream| -> io::Result<OwnedFd> {
        let fd = open_fifo(directory.as_fd(), stream, OFlag::empty())?;
        if let Some((uid, gid)) = owner {
            fchown(&fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        Ok(fd)
    };
    Ok([end(Stream::Stdout)?, end(Stream::Stderr)?])
}

/// The directory itself, which must not be a link.
///
/// # Errors
/// As open.
pub(crate) fn open_directory(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(open(dir, flags, Mode::empty())?)
}

fn open_fifo(directory: BorrowedFd<'_>, stream: Stream, more: OFlag) -> io::Result<OwnedFd> {
    match mkfifoat(directory, stream.name(), Mode::from_bits_truncate(0o600)) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
        Err(error) => return Err(error.into()),
    }
    // Read-write never waits for the other end, and never sees it go.
    let flags = OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | more;
    let fd = openat(directory, stream.name(), flags, Mode::empty())?;
    let kind = SFlag::from_bits_truncate(fstat(&fd)?.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFIFO {
        return Err(io::Error::from_raw_os_error(libc::EEXIST));
    }
    Ok(fd)
}
