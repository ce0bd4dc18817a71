//! Everything that waits for a time: one timer on the boot clock stands for the earliest of them.

use std::sync::atomic::Ordering;
use std::time::Duration;

use nave_proto::pb;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{Expiration, TimerSetTimeFlags};
use pb::keeper_ledger_record::Record;
use pb::keeper_reply::Reply;

use super::request::begin_ladder;
use super::{Keeper, Mode};
use crate::cgroup;
use crate::clock::{MS, SECOND, boottime_ns};
use crate::kept::{Cause, Kept, Phase};
use crate::ledger::Key;
use crate::memory;
use crate::reap::Ending;
use crate::signal::{self, refusal};

/// Dropped lines are told together, this long after the first.
pub(super) const DROPPED_REPORT_NS: i64 = SECOND / 2;
/// From something to do until memory is let go of: after a burst, and rarely when there always is something.
pub(super) const SLIM_AFTER_NS: i64 = 5 * SECOND;
/// For a disk that refused the ledger.
const RETRY_NS: i64 = SECOND;
/// Between two looks at cgroups that are to become empty.
const LOOK_NS: i64 = 20 * MS;
/// Tries to remove cgroup directories, 20 ms doubling to 2 s: about half a minute in all.
const FORGET_TRIES: u32 = 20;

impl Keeper {
    pub(super) fn do_what_is_due(&mut self) {
        let now = boottime_ns();
        self.tend_agent(now);
        self.tend_trial(now);
        if self.ledger.behind() && self.ledger_retry_at <= now {
            self.ledger.catch_up();
            self.ledger_retry_at = now + RETRY_NS;
        }
        if self.slim_at.is_some_and(|at| at <= now) {
            self.slim_at = None;
            // Failing costs memory, nothing else.
            let _ = memory::release_startup_pages();
        }
        if self.dropped_report_at.is_some_and(|at| at <= now) {
            self.report_dropped();
        }
        let due: Vec<Key> = self
            .table
            .iter()
            .filter(|(_, kept)| wake_at(kept).is_some_and(|at| at <= now))
            .map(|(key, _)| *key)
            .collect();
        for key in due {
            self.tend(key, now);
        }
    }

    fn tend(&mut self, key: Key, now: i64) {
        let Some(kept) = self.table.get_mut(&key) else { return };
        if let Some(deadline) =
            kept.deadline.filter(|deadline| !kept.deadline_begun && deadline.boottime_ns <= now)
        {
            kept.deadline_begun = true;
            let grace_ns = i64::try_from(deadline.grace_ms).unwrap_or(i64::MAX / MS).saturating_mul(MS);
            let signal = if deadline.signal == 0 { libc::SIGTERM } else { deadline.signal };
            let message = "its deadline passed without contact to the hub";
            let cause = Cause { cause: pb::ExitCause::Hub, message };
            let kill_at = deadline.boottime_ns.saturating_add(grace_ns);
            begin_ladder(kept, (deadline.scope(), signal), kill_at, cause);
        }
        climb(kept, now);
        match &kept.phase {
            Phase::Starting(_, starting) if starting.give_up_at <= now => self.give_up_stub(key),
            Phase::Running(process) if process.unknown_at.is_some_and(|at| at <= now) => {
                self.ended(
                    key,
                    Ending::Unknown("ended as the child of another process, which did not reap it"),
                );
            }
            Phase::Starting(..) | Phase::Running(_) | Phase::Ended(_) => {}
        }
        self.go_on_forgetting(key, now);
    }

    /// Removes cgroup directories until they are gone, then answers.
    fn go_on_forgetting(&mut self, key: Key, now: i64) {
        let Some(kept) = self.table.get(&key) else { return };
        let Some(forgetting) = &kept.forgetting else { return };
        if forgetting.retry_at > now {
            return;
        }
        let shared =
            |other: &Kept| !other.spawn.cgroup2.is_empty() && other.spawn.cgroup2 == kept.spawn.cgroup2;
        let shared = self.table.iter().any(|(other_key, other)| *other_key != key && shared(other));
        if !forgetting.cgroup_removed && !shared && kept.is_leftover() {
            cgroup::signal(&kept.spawn, libc::SIGKILL);
        }
        let removed =
            if forgetting.cgroup_removed || shared { Ok(true) } else { cgroup::remove(&kept.spawn) };
        let last_try = forgetting.tries >= FORGET_TRIES;
        let failure = match &removed {
            Ok(false) if last_try => Some(format!("processes in {} do not end", kept.spawn.cgroup2)),
            Err((dir, error)) => Some(format!("cannot remove {dir}: {error}")),
            Ok(_) => None,
        };
        let asker = forgetting.asker;
        let Some(kept) = self.table.get_mut(&key) else { return };
        if let Some(message) = failure {
            kept.forgetting = None;
            return self.reply(asker, Reply::Error(refusal(pb::KeeperErrorKind::System, message)), None);
        }
        let Some(forgetting) = &mut kept.forgetting else { return };
        forgetting.cgroup_removed = matches!(removed, Ok(true));
        forgetting.retry_at = now.saturating_add(LOOK_NS << forgetting.tries.min(7)).min(now + 2 * SECOND);
        forgetting.tries += 1;
        self.finish_forgetting(key);
    }

    /// A log's thread is done with it.
    pub(super) fn log_closed(&mut self, log: u32) {
        self.logs.retain(|_, open| open.log != log);
        let logs = &self.logs;
        let waiting: Vec<Key> = self
            .table
            .iter_mut()
            .filter_map(|(key, kept)| {
                let forgetting = kept.forgetting.as_mut()?;
                forgetting.log_closed |= !logs.contains_key(&kept.spawn.log_dir);
                Some(*key)
            })
            .collect();
        for key in waiting {
            self.finish_forgetting(key);
        }
    }

    fn finish_forgetting(&mut self, key: Key) {
        let Some(forgetting) = self.table.get(&key).and_then(|kept| kept.forgetting.as_ref()) else { return };
        if forgetting.log_closed && forgetting.cgroup_removed {
            let (asker, remove_logs) = (forgetting.asker, forgetting.remove_logs);
            self.table.remove(&key);
            let Key { instance_id, epoch } = key;
            self.ledger.note(Record::Forgotten(pb::Forget { instance_id, epoch, remove_logs }));
            self.reply(asker, Reply::Done(pb::KeeperDone::default()), None);
        }
    }

    /// Tells the agent what was dropped; kept for the next one when there is none.
    pub(crate) fn report_dropped(&mut self) {
        self.dropped_report_at = None;
        let Some(agent) = self.agent_connection else {
            self.dropped_report_at = Some(boottime_ns() + 10 * SECOND);
            return;
        };
        let mut reports = Vec::new();
        for (dir, log) in &mut self.logs {
            let lines = log.counters.dropped_lines.swap(0, Ordering::Relaxed);
            let bytes = log.counters.dropped_bytes.swap(0, Ordering::Relaxed);
            let kept = self.table.values().rev().find(|kept| kept.spawn.log_dir == *dir);
            let errno = log.counters.refused_errno.load(Ordering::Relaxed);
            let news = lines > 0 || errno != log.told_errno;
            if let Some(kept) = kept.filter(|_| news) {
                log.told_errno = errno;
                let refused = match errno {
                    0 => String::new(),
                    errno => nix::errno::Errno::from_raw(errno).desc().to_owned(),
                };
                reports.push(pb::OutputDropped {
                    instance_id: kept.spawn.instance_id,
                    lines,
                    bytes,
                    refused,
                });
            }
        }
        for report in reports {
            self.send(agent, &pb::KeeperReply { id: 0, reply: Some(Reply::OutputDropped(report)) }, None);
        }
    }

    /// Goes on with the end; `true` when nothing is left to do.
    pub(super) fn is_stopped(&mut self) -> bool {
        let now = boottime_ns();
        let Mode::Stopping(stopping) = &mut self.mode else { return false };
        stopping.look_at = now + LOOK_NS;
        if let Some((until, grace_ns)) = stopping.orderly {
            if !self.agent.is_off() && now < until {
                return false;
            }
            stopping.orderly = None;
            self.stop_services(now, grace_ns);
        }
        let Mode::Stopping(stopping) = &self.mode else { return false };
        let (asker, cgroups_until) = (stopping.asker, stopping.cgroups_until);
        if stopping.services {
            if self.table.values().any(|kept| kept.process().is_some() || kept.ladder.is_some()) {
                return false;
            }
            let removed = self.table.values().all(|kept| !matches!(cgroup::remove(&kept.spawn), Ok(false)));
            if !removed && now < cgroups_until {
                return false;
            }
        }
        self.agent.stop();
        self.tend_agent(now);
        if !self.agent.is_off() {
            return false;
        }
        if let Some(asker) = asker {
            self.reply(asker, Reply::Done(pb::KeeperDone::default()), None);
        }
        true
    }

    pub(super) fn set_timer(&mut self) {
        let stopping = match &self.mode {
            Mode::Stopping(stopping) => Some(stopping.look_at),
            Mode::Running => None,
        };
        let at = self
            .table
            .values()
            .filter_map(wake_at)
            .chain(self.agent.wake_at())
            .chain(self.upgrade.wake_at())
            .chain(self.dropped_report_at)
            .chain(self.slim_at)
            .chain(stopping)
            .chain(self.exits.undurable().then_some(self.exits_retry_at))
            .chain(self.ledger.behind().then_some(self.ledger_retry_at))
            .min();
        if at == self.timer_at {
            return;
        }
        self.timer_at = at;
        let done = match at {
            // Zero would disarm it.
            Some(at) => {
                let at = Duration::from_nanos(at.max(1).unsigned_abs());
                let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME;
                self.timer.set(Expiration::OneShot(TimeSpec::from_duration(at)), flags)
            }
            None => self.timer.unset(),
        };
        if let Err(error) = done {
            crate::say!("cannot set the timer: {error}");
        }
    }
}

/// When something is due for it.
fn wake_at(kept: &Kept) -> Option<i64> {
    let deadline = kept.deadline.filter(|_| !kept.deadline_begun).map(|deadline| deadline.boottime_ns);
    let phase = match &kept.phase {
        Phase::Starting(_, starting) => Some(starting.give_up_at),
        Phase::Running(process) => process.unknown_at,
        Phase::Ended(_) => None,
    };
    let ladder = kept.ladder.map(|ladder| ladder.kill_at);
    let forgetting = kept.forgetting.as_ref().filter(|f| !f.cgroup_removed).map(|f| f.retry_at);
    [deadline, phase, ladder, forgetting].into_iter().flatten().min()
}

/// The next step of killing: everyone, again and again until nobody is left, ever more rarely.
fn climb(kept: &mut Kept, now: i64) {
    let Some(mut ladder) = kept.ladder.filter(|ladder| ladder.kill_at <= now) else { return };
    if kept.process().is_none() && !kept.is_leftover() {
        kept.ladder = None;
        return;
    }
    // A stranger is refused there; what is proven ours is killed.
    let _ = signal::send(kept, pb::SignalScope::Cgroup, libc::SIGKILL);
    if kept.process().is_some() {
        let _ = signal::send(kept, pb::SignalScope::Process, libc::SIGKILL);
    }
    // Soon at first, as the dead take a moment to leave their cgroup; then for what hangs in the kernel.
    let wait = (LOOK_NS << ladder.kills.min(20)).min(120 * SECOND);
    ladder = crate::kept::Ladder { kill_at: now.saturating_add(wait), kills: ladder.kills + 1 };
    kept.ladder = Some(ladder);
}
