//! A second pair of eyes: descriptors of the processes that the agent knows, so that how one ended while no keeper
//! ran is not lost. The kernel keeps an exit status for whoever holds such a descriptor (from 6.15 on), whoever reaps.
//! Owned by the agent, which asks when an exit record comes without a status.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use nave_proto::pb;

use crate::identity::{self, Found};
use crate::sys;

/// One descriptor per process that runs.
#[derive(Debug, Default)]
pub struct Witness {
    watched: BTreeMap<Name, OwnedFd>,
}

/// A pid is given to another in time; with the start time it is one process of this boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    pid: u32,
    start_ticks: u64,
}

impl From<&pb::ProcessIdentity> for Name {
    fn from(identity: &pb::ProcessIdentity) -> Self {
        Self { pid: identity.pid, start_ticks: identity.start_ticks }
    }
}

impl Witness {
    /// Watches a process from now on, if it is still there.
    pub fn watch(&mut self, identity: &pb::ProcessIdentity) {
        let name = Name::from(identity);
        if self.watched.contains_key(&name) {
            return;
        }
        match identity::find(identity) {
            Ok(Found::Running(pidfd, _) | Found::Zombie(pidfd, _)) => {
                self.watched.insert(name, pidfd);
            }
            Ok(Found::Gone | Found::Stranger) | Err(_) => {}
        }
    }

    /// Lets go of the process of this record; when the record does not say how it ended and the kernel does, it says
    /// so afterwards.
    pub fn explain(&mut self, exit: &mut pb::ExitRecord) {
        let Some(pidfd) = exit.process.as_ref().and_then(|process| self.watched.remove(&process.into()))
        else {
            return;
        };
        if exit.cause() != pb::ExitCause::Unspecified {
            return;
        }
        let Some(status) = sys::pidfd_exit_status(pidfd.as_fd()) else { return };
        if libc::WIFSIGNALED(status) {
            exit.signal = libc::WTERMSIG(status);
            exit.core_dumped = libc::WCOREDUMP(status);
            exit.set_cause(pb::ExitCause::Signal);
        } else {
            exit.code = libc::WEXITSTATUS(status);
            exit.set_cause(pb::ExitCause::Exit);
        }
    }

    /// How many it watches.
    pub fn watched(&self) -> usize {
        self.watched.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Stat;
    use std::process::{Child, Command};

    fn identity(child: &Child) -> pb::ProcessIdentity {
        let start_ticks = Stat::read(child.id()).unwrap().start_ticks;
        pb::ProcessIdentity { pid: child.id(), start_ticks, ..Default::default() }
    }

    /// Whether the kernel keeps the status of what somebody else has reaped: from 6.15 on.
    fn kernel_tells() -> bool {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split(['.', '-']).map_while(|part| part.trim().parse::<u32>().ok());
        (numbers.next().unwrap(), numbers.next().unwrap_or(0)) >= (6, 15)
    }

    #[test]
    fn what_somebody_else_has_reaped_is_still_known_where_the_kernel_tells() {
        let signalled =
            |signal| pb::ExitRecord { signal, cause: pb::ExitCause::Signal.into(), ..Default::default() };
        let exited = pb::ExitRecord { code: 43, cause: pb::ExitCause::Exit.into(), ..Default::default() };
        for (end, true_end) in
            [("exit 43", exited), ("kill -9 $$", signalled(9)), ("kill -15 $$", signalled(15))]
        {
            let mut witness = Witness::default();
            let mut command = Command::new("sh");
            command.args(["-c", &format!("read x; {end}")]).stdin(std::process::Stdio::piped());
            let mut child = command.spawn().unwrap();
            let process = identity(&child);
            witness.watch(&process);
            drop(child.stdin.take());
            child.wait().unwrap();
            let mut exit = pb::ExitRecord { process: Some(process.clone()), ..Default::default() };
            witness.explain(&mut exit);
            let known = if kernel_tells() { true_end } else { pb::ExitRecord::default() };
            assert_eq!(exit, pb::ExitRecord { process: Some(process), ..known }, "{end}");
            assert_eq!(witness.watched(), 0);
        }
    }

    #[test]
    fn a_record_that_says_how_is_believed_and_strangers_are_not_watched() {
        let mut witness = Witness::default();
        let mut child = Command::new("true").spawn().unwrap();
        let process = identity(&child);
        let stranger = pb::ProcessIdentity { start_ticks: process.start_ticks + 1, ..process.clone() };
        witness.watch(&stranger);
        assert_eq!(witness.watched(), 0);
        witness.watch(&process);
        child.wait().unwrap();
        let mut exit = pb::ExitRecord { process: Some(process), ..Default::default() };
        exit.set_cause(pb::ExitCause::Oom);
        witness.explain(&mut exit);
        assert_eq!(exit.cause(), pb::ExitCause::Oom);
    }
}
