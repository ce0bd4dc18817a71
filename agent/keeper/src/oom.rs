//! Whom the kernel killed for want of memory: a process, which ends of it, or others in its cgroups, which it outlives.
//!
//! The kernel counts its kills in a group and names nobody. So a kill is laid to a process that ends by SIGKILL right
//! after it; one that a process has outlived was another's: it is told once, and never laid to its own end later. The
//! agent, which sees that there was a kill anywhere on the host, asks; nothing here looks by itself.

use nave_proto::pb;
use nix::sys::eventfd::EventFd;
use pb::keeper_ledger_record::Record;

use crate::cgroup;
use crate::clock::{SECOND, boottime_ns};
use crate::identity;
use crate::keeper::Keeper;
use crate::kept::{Kept, Phase};

/// One that was killed itself has ended by then, unless it is seen to be dying.
const OUTLIVED_NS: i64 = SECOND / 2;

/// What the kernel counts of the memory of an instance's cgroups. Both only rise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// Processes killed in them.
    pub(crate) kills: u64,
    /// How often they had no room below their own limit; not for want of memory of the host.
    pub(crate) at_limit: u64,
}

/// What has been counted since the last word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rise {
    pub(crate) kills: u64,
    pub(crate) at_limit: bool,
}

/// What is known of the kills in the cgroups of one process.
#[derive(Debug, Default)]
pub(crate) struct Oom {
    outlived: Outlived,
    /// v1's way to say that a limit was met, and how often it has.
    events: Option<EventFd>,
    met: u64,
}

impl Oom {
    /// `told`: kills that are no news, when that is known of an earlier keeper; else all that there were.
    pub(crate) fn new(spawn: &pb::Spawn, told: Option<u64>) -> Self {
        let mut oom = Self { events: cgroup::at_limit_events(spawn), ..Self::default() };
        let now = oom.counters(spawn);
        oom.outlived.told = Counters { kills: told.unwrap_or(now.kills), ..now };
        oom
    }

    /// Kills that are no news, for the ledger, where 0 means that it is not known.
    pub(crate) fn note(&self) -> u64 {
        self.outlived.told.kills + 1
    }

    /// What nobody has been told of yet.
    pub(crate) fn rise(&mut self, spawn: &pb::Spawn) -> Rise {
        let now = self.counters(spawn);
        self.outlived.rise(now)
    }

    fn counters(&mut self, spawn: &pb::Spawn) -> Counters {
        let counters = cgroup::oom(spawn);
        // After the kills, since the kernel says it before it kills.
        self.met += self.events.as_ref().and_then(|events| events.read().ok()).unwrap_or(0);
        Counters { at_limit: counters.at_limit + self.met, ..counters }
    }
}

/// Which of the kills were another's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Outlived {
    /// There when it started, or told since.
    told: Counters,
    /// More, and since when that is known. Its own end may yet show that it was the one.
    seen: Option<(Counters, i64)>,
}

impl Outlived {
    fn rise(&self, now: Counters) -> Rise {
        Rise { kills: now.kills.saturating_sub(self.told.kills), at_limit: now.at_limit > self.told.at_limit }
    }

    /// A look while the process has not ended: what it has outlived, to be told now.
    fn look(&mut self, at: i64, now: Counters, is_dying: impl FnOnce() -> bool) -> Option<Rise> {
        if self.rise(now).kills == 0 {
            self.seen = None;
            return None;
        }
        let (seen, since) = *self.seen.get_or_insert((now, at));
        if at - since < OUTLIVED_NS || is_dying() {
            return None;
        }
        let outlived = self.rise(seen);
        self.told = seen;
        self.seen = (now.kills > seen.kills).then_some((now, at));
        Some(outlived)
    }
}

impl Keeper {
    /// What the processes that run have outlived since the last look, each kill once.
    pub(crate) fn look_for_oom_kills(&mut self) -> pb::OomKills {
        let at = boottime_ns();
        let mut outlived = Vec::new();
        for (key, kept) in &mut self.table {
            let Kept { spawn, phase: Phase::Starting(process, _) | Phase::Running(process), .. } = kept
            else {
                continue;
            };
            let (now, pid) = (process.oom.counters(spawn), process.identity.pid);
            let look = process.oom.outlived.look(at, now, || identity::is_dying(pid));
            let Some(Rise { kills, at_limit }) = look else { continue };
            let (instance_id, epoch, attempt) = (key.instance_id, key.epoch, spawn.attempt);
            let oom_kills = process.oom.note();
            self.ledger.note(Record::OomTold(pb::OomNoted { instance_id, epoch, attempt, oom_kills }));
            let limit_bytes = at_limit.then(|| cgroup::met_limit_bytes(spawn)).flatten().unwrap_or(0);
            outlived.push(pb::OutlivedOomKills { instance_id, epoch, attempt, kills, limit_bytes });
        }
        pb::OomKills { outlived }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: i64 = OUTLIVED_NS / 5;

    fn counters(kills: u64, at_limit: u64) -> Counters {
        Counters { kills, at_limit }
    }

    #[test]
    fn a_kill_is_told_once_when_it_was_outlived() {
        let mut oom = Outlived { told: counters(3, 7), seen: None };
        // when, counters, dying -> kills told and whether at the limit
        for (at, (kills, at_limit), dying, told) in [
            (0, (3, 7), false, None),
            (SOON, (3, 9), false, None),
            (2 * SOON, (4, 9), false, None),
            (3 * SOON, (4, 9), false, None),
            (8 * SOON, (4, 9), true, None),
            (9 * SOON, (4, 9), false, Some((1, true))),
            (10 * SOON, (4, 9), false, None),
            // Another while the first is waited for: that one has its own time.
            (20 * SOON, (5, 9), false, None),
            (24 * SOON, (6, 10), false, None),
            (25 * SOON, (6, 10), false, Some((1, false))),
            (29 * SOON, (6, 10), false, None),
            (30 * SOON, (6, 10), false, Some((1, true))),
            (40 * SOON, (6, 10), false, None),
        ] {
            let found = oom.look(at, counters(kills, at_limit), || dying);
            assert_eq!(found.map(|rise| (rise.kills, rise.at_limit)), told, "at {at}");
        }
    }

    #[test]
    fn an_end_is_laid_to_what_was_not_told_before() {
        let mut oom = Outlived { told: counters(1, 1), seen: None };
        let kills = |oom: &Outlived, now| oom.rise(counters(now, 1)).kills;
        assert_eq!(kills(&oom, 1), 0, "there when it started");
        assert_eq!(kills(&oom, 2), 1, "also when nobody has looked");
        oom.look(0, counters(2, 1), || false);
        assert_eq!(kills(&oom, 2), 1, "seen, and it may have been the one");
        oom.look(OUTLIVED_NS, counters(2, 1), || false);
        assert_eq!(kills(&oom, 2), 0, "it was another's");
        assert_eq!(kills(&oom, 3), 1, "a later one is its own");
    }

    #[test]
    fn a_keeper_goes_on_from_what_the_one_before_it_has_told() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("memory.oom_control"), "oom_kill 7\n").unwrap();
        let cgroup1 = vec![dir.path().display().to_string()];
        let spawn = pb::Spawn { cgroup1, ..Default::default() };
        for (told, kills) in [(Some(5), 2), (Some(7), 0), (None, 0)] {
            let mut oom = Oom::new(&spawn, told);
            assert_eq!(oom.rise(&spawn).kills, kills, "{told:?}");
            assert_eq!(oom.note().checked_sub(1), told.or(Some(7)), "as its own ledger has it");
        }
    }
}
