//! The system calls that neither std nor nix offers safely: the only file of this crate with `unsafe`.
//!
//! Each function is as thin as its call, takes owned or borrowed descriptors, and returns `io::Result`. What to do
//! with them is decided elsewhere.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A child that has ended, as `wait4` tells it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Reaped {
    pub(crate) pid: u32,
    /// The raw wait status.
    pub(crate) status: i32,
    pub(crate) usage: Usage,
}

/// What a process used over its life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) user_us: u64,
    pub(crate) system_us: u64,
    pub(crate) max_rss_bytes: u64,
}

/// A child that has ended, if any; it stays, for a last look at it, until it is reaped.
#[expect(unsafe_code, reason = "nix leaves the pid out for some of the ways to end")]
pub(crate) fn ended_one() -> Option<u32> {
    // SAFETY: siginfo_t is plain data, for which all zeroes is a value, and what the kernel writes into it for a child.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        let done = libc::waitid(libc::P_ALL, 0, &raw mut info, flags);
        (done == 0).then(|| u32::try_from(info.si_pid()).ok()).flatten().filter(|pid| *pid != 0)
    }
}

/// Reaps a child that has ended.
#[expect(unsafe_code, reason = "nix has no wait4")]
pub(crate) fn reap_one(pid: u32) -> Option<Reaped> {
    let pid = libc::pid_t::try_from(pid).ok()?;
    let mut status = 0;
    // SAFETY: rusage is plain numbers, for which all zeroes is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live, writable locals of the right type.
    let reaped = unsafe { libc::wait4(pid, &raw mut status, libc::WNOHANG, &raw mut usage) };
    let pid = u32::try_from(reaped).ok().filter(|pid| *pid != 0)?;
    let microseconds = |time: libc::timeval| {
        u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000 + u64::try_from(time.tv_usec).unwrap_or(0)
    };
    let usage = Usage {
        user_us: microseconds(usage.ru_utime),
        system_us: microseconds(usage.ru_stime),
        max_rss_bytes: u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024,
    };
    Some(Reaped { pid, status, usage })
}

/// A descriptor for the process that has `pid` now; close-on-exec by the kernel's rule.
#[expect(unsafe_code, reason = "nix has no pidfd_open")]
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers; the descriptor that it returns is new and ours.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(raw(fd)?))
    }
}

/// Signals the process behind `pidfd`; with `group`, its whole process group (kernel 6.9 and newer, else EINVAL).
#[expect(unsafe_code, reason = "nix has no pidfd_send_signal")]
pub(crate) fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32, group: bool) -> io::Result<()> {
    const PIDFD_SIGNAL_PROCESS_GROUP: libc::c_long = 4;
    let flags = if group { PIDFD_SIGNAL_PROCESS_GROUP } else { 0 };
    // SAFETY: integers, and a null siginfo, which means "as kill would".
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            libc::c_long::from(pidfd.as_raw_fd()),
            libc::c_long::from(signal),
            std::ptr::null::<libc::siginfo_t>(),
            flags,
        )
    };
    check(done)
}

/// The wait status of the ended process behind `pidfd`, once it has been reaped by whoever is its parent.
/// `None` when it has not, or when this kernel does not tell (before 6.15).
#[expect(unsafe_code, reason = "an ioctl of its own")]
pub(crate) fn pidfd_exit_status(pidfd: BorrowedFd<'_>) -> Option<i32> {
    // struct pidfd_info in its first size; the ids between are not wanted.
    #[repr(C)]
    #[derive(Default)]
    struct PidfdInfo {
        mask: u64,
        cgroup_id: u64,
        ids: [u32; 11],
        exit_code: i32,
    }
    const PIDFD_INFO_EXIT: u64 = 1 << 3;
    // _IOWR(0xFF, 11, struct pidfd_info)
    const PIDFD_GET_INFO: libc::Ioctl = (3 << 30) | (64 << 16) | (0xFF << 8) | 11;
    const { assert!(size_of::<PidfdInfo>() == 64) };
    let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..PidfdInfo::default() };
    // SAFETY: the request names the size of the struct, which lives and is writable.
    let done = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) };
    (done == 0 && info.mask & PIDFD_INFO_EXIT != 0).then_some(info.exit_code)
}

/// Forks, keeps exactly `inherit` (and stderr) across the exec, and executes `program` with `argv` and no
/// environment. When even that fails, the child sends `failure` followed by errno (4 bytes, little-endian) to
/// `report` and ends. The child begins its life in the cgroup2 directory `cgroup` where that is possible, else where
/// we are.
///
/// # Errors
/// The fork's.
#[expect(unsafe_code, reason = "fork: only the raw call lets the parent act between fork and exec")]
pub(crate) fn fork_exec(
    program: &CStr,
    argv: &[CString],
    inherit: &[BorrowedFd<'_>],
    cgroup: Option<BorrowedFd<'_>>,
    report: BorrowedFd<'_>,
    failure: u8,
) -> io::Result<u32> {
    // All memory is made ready here: between fork and exec another thread may hold the allocator's lock for ever.
    let mut arguments: Vec<*const libc::c_char> = argv.iter().map(|argument| argument.as_ptr()).collect();
    arguments.push(std::ptr::null());
    let environment: [*const libc::c_char; 1] = [std::ptr::null()];
    let mut message = [failure, 0, 0, 0, 0];
    // SAFETY: the child calls async-signal-safe functions only (fcntl, execve, send, _exit) on memory prepared above.
    unsafe {
        let pid = fork_into(cgroup);
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        if pid > 0 {
            return u32::try_from(pid).map_err(|_| io::ErrorKind::InvalidData.into());
        }
        for fd in inherit {
            libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0);
        }
        libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr());
        message[1..].copy_from_slice(&(*libc::__errno_location()).to_le_bytes());
        libc::send(report.as_raw_fd(), message.as_ptr().cast(), message.len(), libc::MSG_NOSIGNAL);
        libc::_exit(127)
    }
}

/// fork, into a cgroup2 directory where the kernel can do that (from 5.7 on) and the directory takes it.
///
/// # Safety
/// As fork in a process with threads: the child may call async-signal-safe functions only.
#[expect(unsafe_code, reason = "the C library has no clone3")]
unsafe fn fork_into(cgroup: Option<BorrowedFd<'_>>) -> libc::c_long {
    const CLONE_INTO_CGROUP: u64 = 1 << 33;
    // struct clone_args, of which flags, exit_signal and cgroup are wanted.
    let mut arguments = [0_u64; 11];
    // SAFETY: the kernel reads as many bytes as we say, of an array that lives; no memory is shared with the child, and
    // what it may call is the caller's promise.
    unsafe {
        if let Some(cgroup) = cgroup {
            arguments[0] = CLONE_INTO_CGROUP;
            arguments[4] = u64::from(libc::SIGCHLD.unsigned_abs());
            arguments[10] = u64::from(cgroup.as_raw_fd().unsigned_abs());
            let pid = libc::syscall(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments));
            if pid >= 0 {
                return pid;
            }
        }
        libc::fork().into()
    }
}

/// A copy of this process that is its sibling: a child of our own parent. Some: its pid; None: we are the copy.
///
/// # Errors
/// As clone3, also when the cgroup2 directory does not take it.
#[expect(unsafe_code, reason = "the C library has no clone3")]
pub(crate) fn copy_beside(cgroup: Option<BorrowedFd<'_>>) -> io::Result<Option<u32>> {
    const CLONE_INTO_CGROUP: u64 = 1 << 33;
    let parent = u64::from(libc::CLONE_PARENT.unsigned_abs());
    let mut arguments = [0_u64; 11];
    arguments[0] = parent;
    if let Some(cgroup) = cgroup {
        arguments[0] |= CLONE_INTO_CGROUP;
        arguments[10] = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }
    // SAFETY: the kernel reads as many bytes as we say, of an array that lives. No memory is shared with the copy, and as
    // this process has one thread (see its caller), no lock is held in it.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments)) };
    match u32::try_from(pid) {
        Ok(0) => Ok(None),
        Ok(pid) => Ok(Some(pid)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Closes what a copy has inherited and its maker still owns.
#[expect(unsafe_code, reason = "the owner is in the process that this one was copied from")]
pub(crate) fn close_one(fd: BorrowedFd<'_>) {
    // SAFETY: the copy never returns to the owner, so nothing closes or uses the number again.
    unsafe { libc::close(fd.as_raw_fd()) };
}

/// Ends the process at once: no destructors, no exit handlers of the large binary around us.
#[expect(unsafe_code, reason = "std's exit runs handlers")]
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no precondition.
    unsafe { libc::_exit(code) }
}

/// Takes over a descriptor that another image of this program left open for us under a number.
///
/// # Errors
/// EBADF when nothing is open there.
#[expect(unsafe_code, reason = "a number becomes an owner")]
pub(crate) fn inherited(number: u32) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(number).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    if fd <= 2 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: F_SETFD on a number is harmless when it is not open; the caller (stub or handed-over keeper, at its
    // start, single-threaded) was given this number for it alone, so that we are its only owner.
    unsafe {
        check(libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC).into())?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Sends bytes with descriptors riding on the first of them. Never raises SIGPIPE.
///
/// # Errors
/// As sendmsg; `WouldBlock` on a non-blocking socket that is full (then no descriptor was sent).
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let parts = [io::IoSlice::new(bytes)];
    Ok(sendmsg::<()>(socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None)?)
}

/// Receives bytes and the descriptors that came with them (close-on-exec). 0 bytes: the other side is gone.
///
/// # Errors
/// As recvmsg; `WouldBlock` on a non-blocking socket with nothing to read.
#[expect(unsafe_code, reason = "received numbers become owners")]
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let mut control = nix::cmsg_space!([RawFd; 16]);
    let mut parts = [io::IoSliceMut::new(buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let mut descriptors = Vec::new();
    if let Ok(messages) = message.cmsgs() {
        for part in messages {
            if let ControlMessageOwned::ScmRights(numbers) = part {
                for number in numbers {
                    // SAFETY: the kernel has just opened this number for us in this call.
                    descriptors.push(unsafe { OwnedFd::from_raw_fd(number) });
                }
            }
        }
    }
    Ok((message.bytes, descriptors))
}

/// All signals unblocked and with their default action, as a new program expects them.
#[expect(unsafe_code, reason = "the C library lets nobody touch the signals it keeps to itself")]
pub(crate) fn reset_signals() -> io::Result<()> {
    // The kernel's struct sigaction, whose zeroes mean: default action, no flags, empty mask.
    let default = [0_u64; 4];
    for signal in 1..=64 as libc::c_long {
        // SAFETY: the memory is as long as the kernel's struct and outlives the call. KILL and STOP refuse, as they
        // should. The two of the C library may be inherited as ignored; nothing of it uses them in a process that has
        // one thread and is about to exec.
        unsafe {
            let old = std::ptr::null_mut::<u64>();
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), old, size_of::<u64>());
        }
    }
    nix::sys::signal::SigSet::empty().thread_set_mask()?;
    Ok(())
}

/// Has the child start with [`reset_signals`]; std passes a blocked mask on.
#[expect(unsafe_code, reason = "code between fork and exec")]
pub(crate) fn with_default_signals(command: &mut std::process::Command) -> &mut std::process::Command {
    use std::os::unix::process::CommandExt as _;
    // SAFETY: reset_signals makes system calls only.
    unsafe { command.pre_exec(reset_signals) }
}

/// Closes every descriptor from `first` on.
#[expect(unsafe_code, reason = "nix has no close_range")]
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: the caller (the stub, just before exec) owns no descriptor from `first` on that it still uses.
    check(unsafe {
        libc::syscall(libc::SYS_close_range, libc::c_long::from(first), libc::c_long::from(u32::MAX), 0)
    })
}

/// Makes `number` refer to what `fd` does.
#[expect(unsafe_code, reason = "the target is a fixed number")]
pub(crate) fn duplicate_onto(fd: BorrowedFd<'_>, number: i32, close_on_exec: bool) -> io::Result<()> {
    let flags = if close_on_exec { libc::O_CLOEXEC } else { 0 };
    // SAFETY: the stub calls this with standard numbers, with 3 once nothing else lives there, and with the number that
    // the program expects once its own two descriptors are far above.
    unsafe {
        if fd.as_raw_fd() == number {
            let flags = if close_on_exec { libc::FD_CLOEXEC } else { 0 };
            return check(libc::fcntl(number, libc::F_SETFD, flags).into());
        }
        check(libc::dup3(fd.as_raw_fd(), number, flags).into())
    }
}

/// A copy of `fd` with a number of at least `least`, close-on-exec.
pub(crate) fn duplicate_above(fd: impl AsFd, least: i32) -> io::Result<OwnedFd> {
    use nix::fcntl::{FcntlArg, fcntl};
    let number = fcntl(fd.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(least))?;
    inherited(number.unsigned_abs())
}

/// Soft and hard limit of a resource (the kernel's number).
#[expect(unsafe_code, reason = "resources come as numbers from the agent")]
pub(crate) fn resource_limit(resource: u32) -> io::Result<(u64, u64)> {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a live local of the right type.
    check(unsafe { libc::getrlimit64(resource, &raw mut limit) }.into())?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// Sets soft and hard limit of a resource (the kernel's number).
#[expect(unsafe_code, reason = "resources come as numbers from the agent")]
pub(crate) fn set_resource_limit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the pointer is to a live local of the right type.
    check(unsafe { libc::setrlimit64(resource, &raw const limit) }.into())
}

/// The nice value of this process.
#[expect(unsafe_code, reason = "nix has no setpriority")]
pub(crate) fn set_nice(nice: i32) -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) }.into())
}

/// The highest capability that any kernel may have: the sets have 64 bits.
pub(crate) const CAPABILITY_MAX: u32 = 63;

/// Takes a capability away for good, from this process and all that come from it. One that this kernel does not have
/// is as good as taken.
#[expect(unsafe_code, reason = "nix has no PR_CAPBSET_DROP")]
pub(crate) fn drop_bounding(number: u32) -> io::Result<()> {
    // SAFETY: integers only.
    match check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) }.into()) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        done => done,
    }
}

/// Makes a capability survive exec; it must be permitted and inheritable.
#[expect(unsafe_code, reason = "nix has no PR_CAP_AMBIENT")]
pub(crate) fn raise_ambient(number: u32) -> io::Result<()> {
    let raise = libc::c_ulong::from(libc::PR_CAP_AMBIENT_RAISE.unsigned_abs());
    // SAFETY: integers only.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, libc::c_ulong::from(number), 0, 0) }.into())
}

/// No capability survives exec by itself.
#[expect(unsafe_code, reason = "nix has no PR_CAP_AMBIENT")]
pub(crate) fn clear_ambient() -> io::Result<()> {
    let clear = libc::c_ulong::from(libc::PR_CAP_AMBIENT_CLEAR_ALL.unsigned_abs());
    // SAFETY: integers only.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, clear, 0, 0, 0) }.into())
}

/// Sets effective, permitted and inheritable capabilities to exactly these, one bit each.
#[expect(unsafe_code, reason = "nix has no capset")]
pub(crate) fn set_capabilities(wanted: u64) -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let header = Header { version: VERSION_3, pid: 0 };
    let half = |shift: u32| {
        let bits = u32::try_from((wanted >> shift) & 0xffff_ffff).expect("masked to 32 bits");
        Sets { effective: bits, permitted: bits, inheritable: bits }
    };
    let sets = [half(0), half(32)];
    // SAFETY: header and the two sets of version 3 live, in the kernel's layout.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) })
}

/// Makes a mount, with `below` also all mounts below it, read-only or writable again.
#[expect(unsafe_code, reason = "nix has no mount_setattr")]
pub(crate) fn set_read_only(path: &CStr, read_only: bool, below: bool) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    const MOUNT_ATTR_RDONLY: u64 = 1;
    const AT_RECURSIVE: libc::c_long = 0x8000;
    let (set, clear) = if read_only { (MOUNT_ATTR_RDONLY, 0) } else { (0, MOUNT_ATTR_RDONLY) };
    let attributes = Attributes { set, clear, propagation: 0, user_namespace: 0 };
    // SAFETY: the path ends in a zero byte; the struct lives and its size is given.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::c_long::from(libc::AT_FDCWD),
            path.as_ptr(),
            if below { AT_RECURSIVE } else { 0 },
            &raw const attributes,
            size_of::<Attributes>(),
        )
    })
}

/// The version of Landlock that this kernel has switched on.
#[expect(unsafe_code, reason = "the crate does not tell")]
pub(crate) fn landlock_version() -> Option<u32> {
    const VERSION: libc::c_long = 1;
    // SAFETY: with this flag the kernel reads no memory.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, VERSION) };
    u32::try_from(version).ok().filter(|version| *version > 0)
}

/// Clock ticks per second, the unit of /proc/PID/stat.
#[expect(unsafe_code, reason = "sysconf")]
pub(crate) fn ticks_per_second() -> u64 {
    // SAFETY: integers only.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    u64::try_from(ticks).ok().filter(|ticks| *ticks > 0).unwrap_or(100)
}

/// Lets go of the pages of a mapping; what is touched again comes back from its file.
#[expect(unsafe_code, reason = "madvise takes an address")]
pub(crate) fn forget_clean_pages(start: usize, length: usize) -> io::Result<()> {
    let address = std::ptr::without_provenance_mut::<libc::c_void>(start);
    // SAFETY: the caller passes whole mappings out of /proc/self/smaps that are private, of a file, not writable and
    // without a page of their own, so that every page is the file's and dropping it changes no content.
    check(unsafe { libc::madvise(address, length, libc::MADV_DONTNEED) }.into())
}

/// Gives freed memory back to the kernel, where the C library has a way to.
#[expect(unsafe_code, reason = "malloc_trim")]
pub(crate) fn return_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it may be called at any time; it touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}

fn check(done: libc::c_long) -> io::Result<()> {
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn raw(fd: libc::c_long) -> io::Result<RawFd> {
    RawFd::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))
}
