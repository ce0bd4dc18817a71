//! The end of a process: reaped or seen, put into words, written, told.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use nave_proto::manifest::format_size;
use nave_proto::pb;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use pb::keeper_ledger_record::Record;
use pb::keeper_reply::Reply;

use crate::cgroup;
use crate::clock::{MS, SECOND, boottime_ns, unix_ns};
use crate::identity::{self, Stat};
use crate::keeper::{Keeper, Source};
use crate::kept::{Ended, Kept, Phase, Process};
use crate::ledger::Key;
use crate::oom::{Oom, Rise};
use crate::spawn::{exec_error, never_ran};
use crate::sys::{self, Usage};

/// How long the parent of an adopted process may take to reap it, which is when the kernel tells how it ended.
const UNKNOWN_AFTER_NS: i64 = SECOND;

/// What is known of an end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ending {
    Status {
        status: i32,
        usage: Usage,
        /// What it was called in the end, as it may have become another program.
        name: Option<String>,
    },
    /// Only that, and why no more.
    Unknown(&'static str),
}

impl Keeper {
    /// Reaps all children that have ended; one SIGCHLD may stand for many.
    pub(crate) fn reap(&mut self) {
        while let Some(pid) = sys::ended_one() {
            let known = self.pids.get(&pid).copied();
            // Only a zombie still has its name.
            let name = known.and_then(|_| identity::name(pid));
            let Some(reaped) = sys::reap_one(pid) else { break };
            if self.agent.pid() == Some(reaped.pid) {
                self.agent_ended(reaped.status);
            } else if let Some(key) = known {
                // Started is told before ended, however close they are.
                self.hear_stub(reaped.pid);
                self.ended(key, Ending::Status { status: reaped.status, usage: reaped.usage, name });
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
            let name = identity::name(pid);
            self.ended(key, Ending::Status { status, usage, name });
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
        let (mut process, starting) = match kept.phase {
            Phase::Starting(process, starting) => (process, Some(starting)),
            Phase::Running(process) => (process, None),
            Phase::Ended(_) => {
                self.table.insert(key, kept);
                return;
            }
        };
        self.pids.remove(&process.identity.pid);
        let failure = starting.as_ref().and_then(|starting| starting.failure.clone());
        let memory = Memory::of(&kept.spawn, &mut process.oom);
        let mut record = match &failure {
            Some(failure) => never_ran(&kept.spawn, failure),
            None => describe(&kept.spawn, &process, ending, &memory),
        };
        record.cgroup_empty = cgroup::is_known(&kept.spawn) && !cgroup::is_populated(&kept.spawn);
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

/// What the kernel has killed in an instance's cgroups and nobody has told yet, when its process has ended.
#[derive(Debug, Clone, Copy)]
struct Memory {
    kills: u64,
    /// That was met; none: the host was out of memory.
    limit_bytes: Option<u64>,
}

impl Memory {
    fn of(spawn: &pb::Spawn, oom: &mut Oom) -> Self {
        let Rise { kills, at_limit } = oom.rise(spawn);
        Self { kills, limit_bytes: at_limit.then(|| cgroup::met_limit_bytes(spawn)).flatten() }
    }

    /// Who went beyond which limit, for people.
    fn explain(&self, pid: u32, name: Option<&str>) -> String {
        let who = format!("{} (pid {pid})", name.unwrap_or("the process"));
        match self.limit_bytes {
            Some(bytes) => format!("{who} reached the limit of {}, resources.memory", format_size(bytes)),
            None => format!("the host ran out of memory, and {who} was chosen"),
        }
    }

    /// What killed one of its children, which may be why it has ended itself.
    fn explain_children(&self) -> String {
        let many = match self.kills {
            1 => "a child of it was".to_owned(),
            kills => format!("{kills} of its children were"),
        };
        match self.limit_bytes {
            Some(bytes) => format!("{many} killed at the memory limit of {}", format_size(bytes)),
            None => format!("{many} killed as the host ran out of memory"),
        }
    }
}

/// An ended process in words.
fn describe(spawn: &pb::Spawn, process: &Process, ending: Ending, memory: &Memory) -> pb::ExitRecord {
    let mut record = pb::ExitRecord {
        instance_id: spawn.instance_id,
        service: spawn.service.clone(),
        epoch: spawn.epoch,
        attempt: spawn.attempt,
        process: Some(process.identity.clone()),
        ..Default::default()
    };
    match ending {
        Ending::Status { status, usage, name } => {
            record.user_cpu_us = usage.user_us;
            record.system_cpu_us = usage.system_us;
            record.max_rss_bytes = usage.max_rss_bytes;
            if libc::WIFSIGNALED(status) {
                record.signal = libc::WTERMSIG(status);
                record.core_dumped = libc::WCOREDUMP(status);
                let oom = record.signal == libc::SIGKILL && memory.kills > 0;
                let cause = if oom { pb::ExitCause::Oom } else { pb::ExitCause::Signal };
                record.set_cause(cause);
            } else {
                record.code = libc::WEXITSTATUS(status);
                record.set_cause(pb::ExitCause::Exit);
            }
            if record.cause() == pb::ExitCause::Oom {
                record.message = memory.explain(process.identity.pid, name.as_deref());
            } else if memory.kills > 0 && status != 0 {
                record.message = memory.explain_children();
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
        let limit = "web (pid 0) reached the limit of 32MiB, resources.memory";
        let host = "the host ran out of memory, and web (pid 0) was chosen";
        // wait status, cause asked for, OOM kills not told yet, whether at the limit -> cause, code, signal, message
        let cases = [
            (0, None, 0, false, (C::Exit, 0, 0), ""),
            (7 << 8, None, 0, false, (C::Exit, 7, 0), ""),
            (term, None, 0, false, (C::Signal, 0, term), ""),
            (term, Some(C::Hub), 0, false, (C::Hub, 0, term), ""),
            (0, Some(C::Operator), 0, false, (C::Operator, 0, 0), ""),
            (kill, None, 0, true, (C::Signal, 0, kill), ""),
            (kill, None, 1, true, (C::Oom, 0, kill), limit),
            (kill, None, 1, false, (C::Oom, 0, kill), host),
            (kill, Some(C::Probe), 1, true, (C::Probe, 0, kill), limit),
            (
                term,
                None,
                1,
                true,
                (C::Signal, 0, term),
                "a child of it was killed at the memory limit of 32MiB",
            ),
            (
                1 << 8,
                None,
                2,
                false,
                (C::Exit, 1, 0),
                "2 of its children were killed as the host ran out of memory",
            ),
            (0, None, 1, true, (C::Exit, 0, 0), ""),
        ];
        for (status, asked, kills, at_limit, wanted, message) in cases {
            let process = Process {
                identity: pb::ProcessIdentity::default(),
                pidfd: sys::pidfd_open(std::process::id()).unwrap(),
                adopted: false,
                started_unix_ns: 0,
                started_boottime_ns: 0,
                cause: asked.map(|cause| Cause { cause, message: "" }),
                oom: Oom::default(),
                unknown_at: None,
            };
            let ending = Ending::Status { status, usage: Usage::default(), name: Some("web".into()) };
            let memory = Memory { kills, limit_bytes: at_limit.then_some(32 << 20) };
            let record = describe(&pb::Spawn::default(), &process, ending, &memory);
            let found = (record.cause(), record.code, record.signal);
            assert_eq!((found, record.message.as_str()), (wanted, message), "{status} {asked:?} {kills}");
        }
    }
}
