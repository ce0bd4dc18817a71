//! What the keeper holds for one instance under one epoch: the process, or what is left after it.

use std::os::fd::OwnedFd;

use nave_proto::pb;

use crate::cgroup;
use crate::identity;
use crate::oom::Oom;
use crate::stub::Failure;

/// Who is to have the reply to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Asker {
    pub(crate) connection: u32,
    pub(crate) id: u64,
}

/// One instance under one epoch, from its first spawn until it is forgotten.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Of the last attempt, without what only the stub needs.
    pub(crate) spawn: pb::Spawn,
    pub(crate) phase: Phase,
    /// Kill it when the boot clock passes this.
    pub(crate) deadline: Option<pb::SetDeadline>,
    /// The deadline has passed and has been acted upon.
    pub(crate) deadline_begun: bool,
    /// It is being killed.
    pub(crate) ladder: Option<Ladder>,
    pub(crate) forgetting: Option<Forgetting>,
}

#[derive(Debug)]
pub(crate) enum Phase {
    /// Forked, and not yet known to run its program.
    Starting(Process, Starting),
    Running(Process),
    Ended(Ended),
}

/// A process whose end is not known yet.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) identity: pb::ProcessIdentity,
    pub(crate) pidfd: OwnedFd,
    /// Not our child.
    pub(crate) adopted: bool,
    pub(crate) started_unix_ns: i64,
    pub(crate) started_boottime_ns: i64,
    /// What its exit record shall say.
    pub(crate) cause: Option<Cause>,
    /// What the kernel has killed in its cgroups.
    pub(crate) oom: Oom,
    /// Ended, but how is not known: by then it never will be.
    pub(crate) unknown_at: Option<i64>,
}

/// Why a process was asked to end.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Cause {
    pub(crate) cause: pb::ExitCause,
    pub(crate) message: &'static str,
}

#[derive(Debug)]
pub(crate) struct Starting {
    /// Silence and its end: the program runs. Bytes: it does not.
    pub(crate) channel: OwnedFd,
    pub(crate) asker: Option<Asker>,
    pub(crate) give_up_at: i64,
    pub(crate) failure: Option<Failure>,
}

#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) process: pb::ProcessIdentity,
    pub(crate) started_unix_ns: i64,
    /// Its pid has been seen with another start time.
    pub(crate) stranger: bool,
}

/// The steps of killing one: it was asked to end, and is killed, again and again, from `kill_at` on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ladder {
    pub(crate) kill_at: i64,
    pub(crate) kills: u32,
}

/// What is still to be removed before it is forgotten.
#[derive(Debug)]
pub(crate) struct Forgetting {
    pub(crate) asker: Asker,
    pub(crate) remove_logs: bool,
    pub(crate) log_closed: bool,
    pub(crate) cgroup_removed: bool,
    pub(crate) retry_at: i64,
    pub(crate) tries: u32,
}

impl Kept {
    /// The process, when its end is not known.
    pub(crate) fn process(&self) -> Option<&Process> {
        match &self.phase {
            Phase::Starting(process, _) | Phase::Running(process) => Some(process),
            Phase::Ended(_) => None,
        }
    }

    pub(crate) fn process_mut(&mut self) -> Option<&mut Process> {
        match &mut self.phase {
            Phase::Starting(process, _) | Phase::Running(process) => Some(process),
            Phase::Ended(_) => None,
        }
    }

    /// Which process it is, or was.
    pub(crate) fn identity(&self) -> &pb::ProcessIdentity {
        match &self.phase {
            Phase::Starting(process, _) | Phase::Running(process) => &process.identity,
            Phase::Ended(ended) => &ended.process,
        }
    }

    /// Whether the cgroup directory at the instance's path is the one that its process was started in.
    pub(crate) fn owns_cgroup(&self) -> bool {
        if self.spawn.cgroup2.is_empty() {
            return !self.spawn.cgroup1.is_empty();
        }
        cgroup::id(&self.spawn).is_some_and(|id| id == self.identity().cgroup_id)
    }

    /// The process is gone, others are still in its cgroup.
    pub(crate) fn is_leftover(&self) -> bool {
        self.process().is_none() && self.owns_cgroup() && cgroup::is_populated(&self.spawn)
    }

    /// As the agent is told.
    pub(crate) fn describe(&self) -> pb::KeptProcess {
        let (started_unix_ns, adopted) = match &self.phase {
            Phase::Starting(process, _) | Phase::Running(process) => {
                (process.started_unix_ns, process.adopted)
            }
            Phase::Ended(ended) => (ended.started_unix_ns, false),
        };
        pb::KeptProcess {
            instance_id: self.spawn.instance_id,
            epoch: self.spawn.epoch,
            attempt: self.spawn.attempt,
            service: self.spawn.service.clone(),
            process: Some(self.identity().clone()),
            started_unix_ns,
            adopted,
            leftover: self.process().is_none(),
            log_limits: Some(log_limits(&self.spawn)),
            left: match self.process() {
                Some(_) => 0,
                None => u32::try_from(crate::cgroup::members(&self.spawn).len()).unwrap_or(u32::MAX),
            },
        }
    }
}

/// As the orders say.
pub(crate) fn log_limits(spawn: &pb::Spawn) -> pb::LogLimits {
    pb::LogLimits {
        segment_bytes: spawn.log_segment_bytes,
        segments: spawn.log_segments,
        age_ms: spawn.log_age_ms,
    }
}

impl Process {
    /// Whether it is proven to be ours at this moment. For a child that is not reaped nobody else can have its pid;
    /// for an adopted one all parts of its identity are looked at again.
    pub(crate) fn is_ours(&self, spawn: &pb::Spawn) -> bool {
        if !self.adopted {
            return true;
        }
        let same = identity::Stat::read(self.identity.pid)
            .is_ok_and(|stat| stat.start_ticks == self.identity.start_ticks);
        same && (self.identity.cgroup_id == 0
            || (cgroup::id(spawn) == Some(self.identity.cgroup_id)
                && cgroup::members(spawn).contains(&self.identity.pid)))
    }
}
