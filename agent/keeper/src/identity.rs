//! Which process is ours: pid, start time, boot and cgroup, read from /proc.
//!
//! A pid alone names nobody: it is given to a stranger as soon as ours has ended. Nothing is adopted or signalled
//! unless all parts match.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use nave_proto::pb;

use crate::clock::SECOND;
use crate::sys;

/// Of the flags in /proc/PID/stat (include/linux/sched.h).
const PF_EXITING: u32 = 0x4;

/// What /proc/PID/stat says of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) state: u8,
    pub(crate) parent: u32,
    /// On its way out: it runs its program no longer.
    pub(crate) ends: bool,
    pub(crate) user_ticks: u64,
    pub(crate) system_ticks: u64,
    pub(crate) start_ticks: u64,
    /// The wait status of a process that has ended; 0 when we may not know.
    pub(crate) exit_status: i32,
}

impl Stat {
    /// # Errors
    /// `NotFound` when no process has this pid.
    pub(crate) fn read(pid: u32) -> io::Result<Self> {
        let text =
            fs::read_to_string(format!("/proc/{pid}/stat")).map_err(|error| match error.raw_os_error() {
                Some(libc::ESRCH) => io::ErrorKind::NotFound.into(),
                _ => error,
            })?;
        Self::parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Fields after the name, which may itself hold spaces and parentheses.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        // The state is field 3 in proc(5)'s count.
        let field = |number: usize| fields.get(number - 3).copied();
        Some(Self {
            state: *field(3)?.as_bytes().first()?,
            parent: field(4)?.parse().ok()?,
            ends: field(9)?.parse::<u32>().ok()? & PF_EXITING != 0,
            user_ticks: field(14)?.parse().ok()?,
            system_ticks: field(15)?.parse().ok()?,
            start_ticks: field(22)?.parse().ok()?,
            exit_status: field(52).and_then(|status| status.parse().ok()).unwrap_or(0),
        })
    }

    /// Ended, but not yet reaped.
    pub(crate) fn is_zombie(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }

    pub(crate) fn usage(&self) -> sys::Usage {
        let microseconds = |ticks: u64| ticks.saturating_mul(1_000_000) / sys::ticks_per_second();
        sys::Usage {
            user_us: microseconds(self.user_ticks),
            system_us: microseconds(self.system_ticks),
            max_rss_bytes: 0,
        }
    }
}

/// What a process is called, while it is there at all.
pub(crate) fn name(pid: u32) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(name.trim_end().to_owned()).filter(|name| !name.is_empty())
}

/// CLOCK_BOOTTIME of a start, to a tick (10 ms).
pub(crate) fn started_boottime_ns(start_ticks: u64) -> i64 {
    let ns = u128::from(start_ticks) * SECOND.unsigned_abs() as u128 / u128::from(sys::ticks_per_second());
    i64::try_from(ns).unwrap_or(i64::MAX)
}

/// The id of this boot.
///
/// # Errors
/// When /proc is not there.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// What has become of a process in the ledger.
#[derive(Debug)]
pub(crate) enum Found {
    /// It runs; the descriptor is proven to be of it and no other.
    Running(OwnedFd, Stat),
    /// It has ended and its parent (not this keeper) has not reaped it yet.
    Zombie(OwnedFd, Stat),
    /// It is gone.
    Gone,
    /// It is gone, and its pid is somebody else's.
    Stranger,
}

/// Looks for a process of this boot.
///
/// # Errors
/// When it cannot be looked at now, which says nothing of it.
pub(crate) fn find(identity: &pb::ProcessIdentity) -> io::Result<Found> {
    // The descriptor first: whoever the checks below approve of is then whom it stands for, or has ended.
    let looked = sys::pidfd_open(identity.pid).and_then(|pidfd| Ok((pidfd, Stat::read(identity.pid)?)));
    match looked {
        Ok((_, stat)) if stat.start_ticks != identity.start_ticks => Ok(Found::Stranger),
        Ok((pidfd, stat)) if stat.is_zombie() => Ok(Found::Zombie(pidfd, stat)),
        Ok((pidfd, stat)) => Ok(Found::Running(pidfd, stat)),
        Err(error) if names_nobody(&error) => Ok(Found::Gone),
        Err(error) => Err(error),
    }
}

/// Whether an error says that no process has the pid, and not that the look itself failed. `EINVAL` is of a number that
/// no process can have, or that by now is one of another's threads.
fn names_nobody(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL))
}

/// Whether it has ended or is about to: also when that is not known.
pub(crate) fn is_dying(pid: u32) -> bool {
    let ends = Stat::read(pid).map_or(true, |stat| stat.ends || stat.is_zombie());
    ends || fs::read_to_string(format!("/proc/{pid}/status")).map_or(true, |status| awaits_kill(&status))
}

/// Whether /proc/PID/status shows a SIGKILL on its way.
fn awaits_kill(status: &str) -> bool {
    let pending = |line: &str| {
        let set = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(set.trim(), 16).ok()
    };
    status.lines().filter_map(pending).any(|set| set >> (libc::SIGKILL - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let text = "7 (a) b (c)) S 1 7 7 0 -1 4194560 1 2 3 4 11 12 13 14 20 0 1 0 777 1 2 3 4 5 6 7 8 9 10 11 12 13 14 \
                    15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 256\n";
        let stat = Stat::parse(text).unwrap();
        assert_eq!((stat.state, stat.parent, stat.start_ticks, stat.ends), (b'S', 1, 777, false));
        assert_eq!((stat.user_ticks, stat.system_ticks), (11, 12));
        assert_eq!(stat.exit_status, 256);
    }

    #[test]
    fn we_find_ourselves_and_nobody_with_our_pid_but_another_start() {
        let pid = std::process::id();
        let start_ticks = Stat::read(pid).unwrap().start_ticks;
        let identity = pb::ProcessIdentity { pid, start_ticks, ..Default::default() };
        assert!(matches!(find(&identity).unwrap(), Found::Running(..)));
        let stranger = pb::ProcessIdentity { start_ticks: start_ticks + 1, ..identity };
        assert!(matches!(find(&stranger).unwrap(), Found::Stranger));
        let never_ran = pb::ProcessIdentity::default();
        assert!(matches!(find(&never_ran).unwrap(), Found::Gone));
        assert!(!is_dying(pid));
    }

    #[test]
    fn a_look_that_fails_says_nothing_of_the_process() {
        for (errno, gone) in [
            (libc::ESRCH, true),
            (libc::ENOENT, true),
            (libc::EINVAL, true),
            (libc::EMFILE, false),
            (libc::ENFILE, false),
            (libc::ENOMEM, false),
            (libc::EPERM, false),
        ] {
            let error = io::Error::from_raw_os_error(errno);
            assert_eq!(names_nobody(&error), gone, "{error}");
        }
    }

    #[test]
    fn a_kill_on_its_way_is_seen() {
        let status = |thread: &str, shared: &str| format!("Name:\tx\nSigPnd:\t{thread}\nShdPnd:\t{shared}\n");
        for (thread, shared, awaits) in [
            ("0000000000000000", "0000000000000000", false),
            ("0000000000000100", "0000000000000000", true),
            ("0000000000000000", "0000000000004100", true),
            ("0000000000004000", "0000000000004000", false),
        ] {
            assert_eq!(awaits_kill(&status(thread, shared)), awaits, "{thread} {shared}");
        }
    }
}
