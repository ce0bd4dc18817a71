//! The end of a process: reaped or seen, put into words, written, told.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use nave_proto::pb;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use pb::keeper_ledger_record::Record;
use pb::keeper_reply::Reply;

use crate::cgroup;
use crate::clock::{MS, SECOND, boottime_ns, unix_ns};
use crate::identity::Stat;
use crate::keeper::{Keeper, Source};
use crate::kept::{Ended, Kept, Phase, Process};
use crate::ledger::Key;
use crate::spawn::{exec_error, never_ran};
use crate::sys::{self, Usage};

/// How long the parent of an adopted process may take to reap it, which is when the kernel tells how it ended.
const UNKNOWN_AFTER_NS: i64 = SECOND;

/// What is known of an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Status {
        status: i32,
        usage: Usage,
    },
    /// Only that, and why no more.
    Unknown(&'static str),
}

impl Keeper {
    /// Reaps all children that have ended; one SIGCHLD may stand for many.
    pub(crate) fn reap(&mut self) {
        while let Some(reaped) = sys::reap_one() {
            if self.agent.pid() == Some(reaped.pid) {
                self.agent_ended(reaped.status);
            } else if let Some(key) = self.pids.get(&reaped.pid).copied() {
                // Started is told before ended, however close they are.
                self.hear_stub(reaped.pid);
                self.ended(key, Ending::Status { status: reaped.status, usage: reaped.usage });
            }
            // Else an orphan of a service, which ended up with us: reaped, and that is all.
        }
    }

    /// The descriptor of a process that is not our child says that it has ended.
    pub(crate) fn adopted_ended(&mut self, pid: u32) {
        let Some(key) = self.pids.get(&pid).copied() else { return };
        let Some(process) = self.table.get_mut(&key).and_then(Kept::process_mut) else { return };
        let stat = Stat::read(pid).ok().filter(|stat| stat.start_ticks == process.identity.start_ticks);
        let usage = stat.map(|stat| stat.usage()).unwrap_or_default();
        // Reaped: the kernel remembers it with the descriptor. Not yet: /proc shows it, to root at least.
        let status = sys::pidfd_exit_status(process.pidfd.as_fd()).or_else(|| {
            let stat = stat.filter(Stat::is_zombie)?;
            nix::unistd::geteuid().is_root().then_some(stat.exit_status)
        });
        if let Some(status) = status {
            self.ended(key, Ending::Status { status, usage });
        } else if process.unknown_at.is_none() {
            process.unknown_at = Some(boottime_ns() + UNKNOWN_AFTER_NS);
            // Only the news of its being reaped is of interest now (always reported), not that it has ended.
            let quiet = EpollFlags::empty();
            let _ =
                self.epoll.modify(&process.pidfd, &mut EpollEvent::new(quiet, Source::Process(pid).token()));
        } else if stat.is_none() {
            self.ended(
                key,
                Ending::Unknown("ended as the child of another process, which took its exit code"),
            );
        }
    }

    /// Writes down how a process ended and lets go of it.
    pub(crate) fn ended(&mut self, key: Key, ending: Ending) {
        let Some(mut kept) = self.table.remove(&key) else { return };
        let (process, starting) = match kept.phase {
            Phase::Starting(process, starting) => (process, Some(starting)),
            Phase::Running(process) => (process, None),
            Phase::Ended(_) => {
                self.table.insert(key, kept);
                return;
            }
        };
        self.pids.remove(&process.identity.pid);
        let failure = starting.as_ref().and_then(|starting| starting.failure.clone());
        let mut record = match &failure {
            Some(failure) => never_ran(&kept.spawn, failure),
            None => describe(&kept.spawn, &process, ending, cgroup::oom_kills(&kept.spawn)),
        };
        record.started_unix_ns = process.started_unix_ns;
        record.ended_unix_ns = unix_ns();
        let ran_ms = (boottime_ns() - process.started_boottime_ns) / MS;
        record.ran_ms = u64::try_from(ran_ms).unwrap_or(0);
        if let Some(log) = self.logs.get(&kept.spawn.log_dir) {
            record.log_offset = log.counters.written_bytes.load(Ordering::Relaxed);
            self.output.drain(log.log);
        }
        self.add_exit(record);
        if let (Some(failure), Some(asker)) = (failure, starting.and_then(|starting| starting.asker)) {
            self.reply(asker, Reply::Error(exec_error(&failure)), None);
        }
        if let Some(ladder) = &mut kept.ladder {
            // Those it leaves behind are to go as well.
            ladder.kill_at = boottime_ns();
        }
        kept.phase = Phase::Ended(Ended {
            process: process.identity,
            started_unix_ns: process.started_unix_ns,
            stranger: false,
        });
        self.table.insert(key, kept);
    }

    /// Takes an exit record, to be written and told at the end of this turn of the loop.
    pub(crate) fn add_exit(&mut self, record: pb::ExitRecord) {
        self.exits.add(record);
    }

    /// Writes what has ended in this turn, notes it in the ledger, tells the agent, and syncs while that decides.
    pub(crate) fn commit_exits(&mut self) {
        if self.exits.undurable() && boottime_ns() >= self.exits_retry_at {
            match self.exits.persist() {
                Ok(()) => self.exits_retry_at = 0,
                Err(error) => {
                    if self.exits_retry_at == 0 {
                        crate::say!("exit records cannot be written, will go on trying: {error}");
                    }
                    self.exits_retry_at = boottime_ns() + SECOND;
                }
            }
        }
        let fresh: Vec<pb::ExitRecord> = self.exits.after(self.noted_sequence).cloned().collect();
        for record in fresh {
            self.noted_sequence = record.sequence;
            self.ledger.note(Record::Exited(pb::ExitRecord {
                instance_id: record.instance_id,
                epoch: record.epoch,
                attempt: record.attempt,
                ..Default::default()
            }));
        }
        if let Some(agent) = self.agent_connection {
            let untold: Vec<pb::ExitRecord> = self.exits.after(self.told_sequence).cloned().collect();
            for record in untold {
                self.told_sequence = record.sequence;
                self.send(agent, &pb::KeeperReply { id: 0, reply: Some(Reply::Exited(record)) }, None);
            }
        }
        if let Err(error) = self.exits.sync() {
            crate::say!("exit records may not survive a loss of power: {error}");
        }
    }
}

/// An ended process in words. `oom_kills` is the count of its cgroups now.
fn describe(spawn: &pb::Spawn, process: &Process, ending: Ending, oom_kills: u64) -> pb::ExitRecord {
    let mut record = pb::ExitRecord {
        instance_id: spawn.instance_id,
        service: spawn.service.clone(),
        epoch: spawn.epoch,
        attempt: spawn.attempt,
        process: Some(process.identity.clone()),
        ..Default::default()
    };
    match ending {
        Ending::Status { status, usage } => {
            record.user_cpu_us = usage.user_us;
            record.system_cpu_us = usage.system_us;
            record.max_rss_bytes = usage.max_rss_bytes;
            if libc::WIFSIGNALED(status) {
                record.signal = libc::WTERMSIG(status);
                record.core_dumped = libc::WCOREDUMP(status);
                let oom = record.signal == libc::SIGKILL && oom_kills > process.oom_kills;
                let cause = if oom { pb::ExitCause::Oom } else { pb::ExitCause::Signal };
                record.set_cause(cause);
            } else {
                record.code = libc::WEXITSTATUS(status);
                record.set_cause(pb::ExitCause::Exit);
            }
        }
        Ending::Unknown(why) => record.message = why.to_owned(),
    }
    if let Some(cause) = &process.cause {
        record.set_cause(cause.cause);
        if !cause.message.is_empty() {
            record.message = cause.message.to_owned();
        }
    }
    record
}

/// A wait status for people.
pub(crate) fn describe_status(status: i32) -> String {
    if libc::WIFSIGNALED(status) {
        format!("was ended by signal {}", libc::WTERMSIG(status))
    } else {
        format!("ended with code {}", libc::WEXITSTATUS(status))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kept::Cause;
    use pb::ExitCause as C;

    #[test]
    fn causes() {
        let term = libc::SIGTERM;
        let kill = libc::SIGKILL;
        // wait status, cause asked for, OOM kills since the start -> cause, code, signal
        let cases = [
            (0, None, 0, (C::Exit, 0, 0)),
            (7 << 8, None, 0, (C::Exit, 7, 0)),
            (term, None, 0, (C::Signal, 0, term)),
            (term, Some(C::Hub), 0, (C::Hub, 0, term)),
            (0, Some(C::Operator), 0, (C::Operator, 0, 0)),
            (kill, None, 1, (C::Oom, 0, kill)),
            (kill, Some(C::Probe), 1, (C::Probe, 0, kill)),
            (term, None, 1, (C::Signal, 0, term)),
        ];
        for (status, asked, kills, wanted) in cases {
            let process = Process {
                identity: pb::ProcessIdentity::default(),
                pidfd: sys::pidfd_open(std::process::id()).unwrap(),
                adopted: false,
                started_unix_ns: 0,
                started_boottime_ns: 0,
                cause: asked.map(|cause| Cause { cause, message: "" }),
                oom_kills: 5,
                unknown_at: None,
            };
            let ending = Ending::Status { status, usage: Usage::default() };
            let record = describe(&pb::Spawn::default(), &process, ending, 5 + kills);
            assert_eq!((record.cause(), record.code, record.signal), wanted, "{status} {asked:?} {kills}");
        }
    }
}
