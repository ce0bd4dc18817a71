//! Signals to what is ours, and to nothing else.

use std::io;
use std::os::fd::AsFd;

use nave_proto::pb;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use pb::KeeperErrorKind as Kind;

use crate::cgroup;
use crate::kept::{Kept, Phase, Process};
use crate::sys;

/// Sends a signal to the process, its group, or everyone in its cgroup; SIGCONT follows one that asks to end, so that
/// a stopped process can obey.
///
/// # Errors
/// `STRANGER` when it cannot be proven to be ours: then nothing was signalled. `NOT_FOUND` when it has ended.
pub(crate) fn send(kept: &Kept, scope: pb::SignalScope, signal: i32) -> Result<(), pb::KeeperError> {
    if !(0..=64).contains(&signal) {
        return Err(refusal(Kind::Invalid, format!("{signal} is no signal")));
    }
    match scope {
        pb::SignalScope::Unspecified | pb::SignalScope::Process => to_process(kept, signal, false),
        pb::SignalScope::Group => to_process(kept, signal, true),
        pb::SignalScope::Cgroup => to_cgroup(kept, signal),
    }
}

fn to_process(kept: &Kept, signal: i32, group: bool) -> Result<(), pb::KeeperError> {
    let process = proven(kept)?;
    deliver(process, signal, group).map_err(|error| failed(kept, &error))?;
    if wants_continue(signal) {
        let _ = deliver(process, libc::SIGCONT, group);
    }
    Ok(())
}

fn to_cgroup(kept: &Kept, signal: i32) -> Result<(), pb::KeeperError> {
    let spawn = &kept.spawn;
    if spawn.cgroup2.is_empty() && spawn.cgroup1.is_empty() {
        return to_process(kept, signal, true);
    }
    if !kept.owns_cgroup() {
        return Err(match cgroup::id(spawn) {
            Some(_) => stranger(kept, "its cgroup directory is not the one that it was started in"),
            None => gone(kept),
        });
    }
    let mut count = cgroup::signal(spawn, signal);
    // The stub before it has entered, or a process that was moved.
    if let Ok(process) = proven(kept)
        && count == 0
    {
        deliver(process, signal, false).map_err(|error| failed(kept, &error))?;
        count = 1;
    }
    if count == 0 {
        return Err(gone(kept));
    }
    if wants_continue(signal) {
        cgroup::signal(spawn, libc::SIGCONT);
    }
    Ok(())
}

fn proven(kept: &Kept) -> Result<&Process, pb::KeeperError> {
    match &kept.phase {
        Phase::Starting(process, _) | Phase::Running(process) if process.is_ours(&kept.spawn) => Ok(process),
        Phase::Starting(..) | Phase::Running(_) => {
            Err(stranger(kept, "start time or cgroup are not those of the process that was started"))
        }
        Phase::Ended(ended) if ended.stranger => Err(stranger(kept, "it has another start time")),
        Phase::Ended(_) => Err(gone(kept)),
    }
}

fn deliver(process: &Process, signal: i32, group: bool) -> io::Result<()> {
    match sys::pidfd_signal(process.pidfd.as_fd(), signal, group) {
        // Before kernel 6.9; the leader has just been proven to be ours, and its group has its number.
        Err(error) if group && error.raw_os_error() == Some(libc::EINVAL) => {
            let leader = Pid::from_raw(i32::try_from(process.identity.pid).unwrap_or(i32::MAX));
            let signal = if signal == 0 { None } else { Some(Signal::try_from(signal)?) };
            Ok(killpg(leader, signal)?)
        }
        done => done,
    }
}

/// All but those that end it for certain, stop it on purpose, or do nothing.
fn wants_continue(signal: i32) -> bool {
    !matches!(
        signal,
        0 | libc::SIGKILL
            | libc::SIGSTOP
            | libc::SIGTSTP
            | libc::SIGTTIN
            | libc::SIGTTOU
            | libc::SIGCONT
            | libc::SIGCHLD
    )
}

/// An error without an errno.
pub(crate) fn refusal(kind: Kind, message: impl Into<String>) -> pb::KeeperError {
    pb::KeeperError { kind: kind.into(), errno: 0, message: message.into() }
}

/// A failure of the system.
pub(crate) fn system(what: &str, error: &io::Error) -> pb::KeeperError {
    pb::KeeperError {
        kind: Kind::System.into(),
        errno: error.raw_os_error().unwrap_or(0),
        message: format!("{what}: {error}"),
    }
}

fn failed(kept: &Kept, error: &io::Error) -> pb::KeeperError {
    if error.raw_os_error() == Some(libc::ESRCH) { gone(kept) } else { system("cannot signal it", error) }
}

fn stranger(kept: &Kept, why: &str) -> pb::KeeperError {
    let pid = kept.identity().pid;
    refusal(Kind::Stranger, format!("pid {pid} is no longer {}'s: {why}", kept.spawn.service))
}

fn gone(kept: &Kept) -> pb::KeeperError {
    refusal(Kind::NotFound, format!("{}'s process has ended", kept.spawn.service))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continue_follows_what_asks_to_end_only() {
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1, 34] {
            assert!(wants_continue(signal), "{signal}");
        }
        for signal in [0, libc::SIGKILL, libc::SIGSTOP, libc::SIGTSTP, libc::SIGCONT] {
            assert!(!wants_continue(signal), "{signal}");
        }
    }
}
