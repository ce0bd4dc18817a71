//! How a keeper becomes a newer keeper: execve of the program's path, with what cannot be read again from disk in a
//! sealed memfd.
//!
//! The pid stays, so the children stay children and the unit sees nothing. The memfd is found again by its name among
//! the open descriptors, so that neither command line nor environment changes. Processes come from the ledger;
//! the agent and the clients reconnect.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use nave_proto::pb;
use nix::fcntl::{FcntlArg, FdFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use prost::Message;

use crate::descriptors::Descriptors;
use crate::ear::Ear;
use crate::sys;

const NAME: &str = "nave-keeper-handover";
/// Of the record below. A build that does not know it says so, and the image before goes on.
pub(crate) const VERSION: u32 = 1;

/// A memory file with this content that nobody can change any more, positioned at its start.
///
/// # Errors
/// As memfd_create, write and fcntl.
pub(crate) fn sealed(name: &str, content: &[u8]) -> io::Result<OwnedFd> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut file = File::from(fd);
    file.write_all(content)?;
    file.rewind()?;
    let seals =
        SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

/// What the image before this one left open.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) listener: OwnedFd,
    pub(crate) lock: OwnedFd,
    pub(crate) descriptors: Descriptors,
    pub(crate) open_files_soft: u64,
}

impl Taken {
    /// A second hold on all of it, for an image that may have to go back.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            listener: self.listener.try_clone()?,
            lock: self.lock.try_clone()?,
            descriptors: self.descriptors.try_clone()?,
            open_files_soft: self.open_files_soft,
        })
    }

    /// Becomes `program` and hands it all of this. Returns only when that failed.
    pub(crate) fn pass_on(&self, program: &Path) -> io::Error {
        become_program(program, &self.listener, &self.lock, &self.descriptors, self.open_files_soft)
    }
}

/// Looks for a handover. `None` in a keeper that starts afresh.
///
/// # Errors
/// When there is one that cannot be used; one of another version stays where the next image finds it.
pub(crate) fn take() -> io::Result<Option<Taken>> {
    let Some(number) = find() else { return Ok(None) };
    let mut file = File::from(sys::inherited(number)?);
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    let handover = pb::KeeperHandover::decode(&*bytes).map_err(|_| io::ErrorKind::InvalidData)?;
    if handover.version != VERSION {
        inherit(&[file.as_fd()], FdFlag::empty());
        std::mem::forget(file);
        let message =
            format!("it left version {} of the handover, this build knows {VERSION}", handover.version);
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let mut descriptors = Descriptors::default();
    for kept in handover.descriptors {
        let pb::KeptDescriptor { name, fd, speaker, heard } = kept;
        let ear = speaker.map(|speaker| Ear::new(speaker, &heard));
        if let Err(error) = sys::inherited(fd).map(|fd| descriptors.store(name.clone(), fd, ear)) {
            crate::say!("descriptor {name:?} was lost in the upgrade: {error}");
        }
    }
    Ok(Some(Taken {
        listener: sys::inherited(handover.listener_fd)?,
        lock: sys::inherited(handover.lock_fd)?,
        descriptors,
        open_files_soft: handover.open_files_soft,
    }))
}

fn find() -> Option<u32> {
    let target = format!("/memfd:{NAME}");
    std::fs::read_dir("/proc/self/fd").ok()?.filter_map(Result::ok).find_map(|entry| {
        let link = std::fs::read_link(entry.path()).ok()?;
        link.to_str()?.starts_with(&target).then(|| entry.file_name().to_str()?.parse().ok())?
    })
}

/// Becomes the program now at `program`, with the same arguments. Returns only when that failed; then everything is
/// as before.
pub(crate) fn become_program(
    program: &Path,
    listener: &impl AsFd,
    lock: &impl AsFd,
    descriptors: &Descriptors,
    open_files_soft: u64,
) -> io::Error {
    let (listener, lock) = (listener.as_fd(), lock.as_fd());
    let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().unsigned_abs();
    let handover = pb::KeeperHandover {
        version: VERSION,
        descriptors: descriptors
            .iter()
            .map(|(name, held)| pb::KeptDescriptor {
                name: name.clone(),
                fd: number(held.fd.as_fd()),
                speaker: held.ear.as_ref().map(Ear::speaker),
                heard: held.ear.as_ref().map(|ear| ear.heard.message()).unwrap_or_default(),
            })
            .collect(),
        listener_fd: number(listener),
        agent_pid: 0,
        lock_fd: number(lock),
        open_files_soft,
    };
    let memory = match sealed(NAME, &handover.encode_to_vec()) {
        Ok(memory) => memory,
        Err(error) => return error,
    };
    let passed: Vec<BorrowedFd<'_>> =
        descriptors.iter().map(|(_, held)| held.fd.as_fd()).chain([listener, lock, memory.as_fd()]).collect();
    inherit(&passed, FdFlag::empty());
    let error = become_plainly(program);
    inherit(&passed, FdFlag::FD_CLOEXEC);
    error
}

/// Becomes `program`, with the same arguments and environment. Returns only when that failed.
pub(crate) fn become_plainly(program: &Path) -> io::Error {
    let strings = |texts: Vec<Vec<u8>>| texts.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>();
    let arguments = strings(std::env::args_os().map(OsStringExt::into_vec).collect());
    let environment = strings(
        std::env::vars_os().map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat()).collect(),
    );
    let (Ok(path), Ok(arguments), Ok(environment)) =
        (CString::new(program.as_os_str().as_bytes()), arguments, environment)
    else {
        return io::ErrorKind::InvalidInput.into();
    };
    let Err(error) = nix::unistd::execve(&path, &arguments, &environment);
    error.into()
}

fn inherit(descriptors: &[BorrowedFd<'_>], flags: FdFlag) {
    for fd in descriptors {
        let _ = fcntl(fd, FcntlArg::F_SETFD(flags));
    }
}
