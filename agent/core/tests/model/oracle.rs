//! What must hold, judged from outside: from the orders as they are carried out and from what really happened to the
//! processes, never from the supervisor's own state.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use nave_agent_core::supervisor::{
    Action, BACKOFF_FIRST, BACKOFF_MAX, EXEC_FAILURES_MAX, Hook, HookOrder, ProcessKey,
    UPTIME_FOR_RESTART_AT_ONCE,
};
use nave_agent_core::{Monotonic, Order, SpawnOrder};
use nave_proto::pb::{self, ledger_record::Record};

use crate::keeper::FakeKeeper;

pub(crate) const BUDGET: u32 = 4;
pub(crate) const WINDOW: Duration = Duration::from_secs(60);

type Process = (u64, ProcessKey);

#[derive(Debug, Default)]
pub(crate) struct Oracle {
    /// Processes whose end the agent knows.
    known_ended: BTreeSet<Process>,
    /// Ends told before the keeper's list.
    heard: Vec<Process>,
    acknowledged: BTreeSet<Process>,
    /// Processes whose stop signal is on record as sent.
    stop_signalled: BTreeSet<Process>,
    kill_at: BTreeMap<Process, i64>,
    /// Stop signals given to the keeper by orders of which some are not carried out yet.
    stop_signalling: Vec<Process>,
    restarts: BTreeMap<(u64, u64), (u32, Vec<Monotonic>)>,
    /// When a restart was decided that may not be on disk yet, by (instance, epoch, number of the restart).
    deciding: BTreeMap<(u64, u64, u32), Monotonic>,
    exec_failures: BTreeMap<(u64, u64), u32>,
    /// The wait that must have passed since the last end, by (instance, epoch), and its step.
    steps: BTreeMap<(u64, u64), u32>,
    /// Attempts that came as far as a hook or a process and whose `post_stop` has not ended.
    owed: BTreeSet<Process>,
    /// Attempts whose `pre_start` has succeeded.
    pre_started: BTreeSet<Process>,
    /// Set by tests in which nothing but exits, time and the agent's death happen.
    pub(crate) strict: bool,
}

impl Oracle {
    pub(crate) fn agent_restarted(&mut self) {
        self.known_ended = self.acknowledged.clone();
        self.heard.clear();
        self.stop_signalling.clear();
        self.deciding.clear();
    }

    pub(crate) fn rebooted(&mut self) {
        self.kill_at.clear();
        self.stop_signalled.clear();
        self.stop_signalling.clear();
        for (_, decided) in self.restarts.values_mut() {
            decided.clear();
        }
    }

    pub(crate) fn heard(&mut self, exit: &pb::ExitRecord, keeper_known: bool) {
        let process = (exit.instance_id, ProcessKey { epoch: exit.epoch, attempt: exit.attempt });
        self.heard.push(process);
        if keeper_known {
            self.listed();
        }
    }

    pub(crate) fn listed(&mut self) {
        self.known_ended.extend(self.heard.drain(..));
    }

    pub(crate) fn signal_lost(&mut self, instance: u64, key: ProcessKey) {
        self.stop_signalled.remove(&(instance, key));
        self.stop_signalling.retain(|process| *process != (instance, key));
    }

    /// The agent decided on it.
    pub(crate) fn ordered(&mut self, order: &Order, now: Monotonic) {
        if let Action::Persist(ledger) = &order.action {
            let restart = (ledger.instance_id, ledger.epoch, ledger.restarts);
            self.deciding.entry(restart).or_insert(now);
        }
        if let Action::Signal { key, .. } = &order.action {
            let process = (order.instance.0, *key);
            assert!(
                !self.known_ended.contains(&process),
                "signals {process:?}, which it knows to have ended"
            );
        }
    }

    /// It is on its way to the keeper.
    pub(crate) fn carried_out(&mut self, order: &Order) {
        if let Action::Signal { key, signal: 15, .. } = &order.action {
            let process = (order.instance.0, *key);
            assert!(!self.stop_signalled.contains(&process), "the stop signal of {process:?} is repeated");
            self.stop_signalling.push(process);
        }
    }

    /// All that was ordered is carried out: what is sent is on record as sent.
    pub(crate) fn all_carried_out(&mut self) {
        self.stop_signalled.extend(self.stop_signalling.drain(..));
        self.deciding.clear();
    }

    /// A ledger record is on disk.
    pub(crate) fn persisted(&mut self, ledger: &pb::InstanceLedger, now: Monotonic) {
        let instance = ledger.instance_id;
        let process = (instance, ProcessKey { epoch: ledger.epoch, attempt: ledger.attempt });
        if ledger.phase() == pb::InstanceLedgerPhase::Stopping {
            // Sooner, once its callers have left it; never later.
            let at = self.kill_at.entry(process).or_insert(ledger.stop_kill_boottime_ns);
            assert!(ledger.stop_kill_boottime_ns <= *at, "the deadline of {process:?} has moved on");
            *at = ledger.stop_kill_boottime_ns;
        }
        let failures = self.exec_failures.entry((instance, ledger.epoch)).or_default();
        *failures = (*failures).max(ledger.exec_failures);
        let (restarts, decided) = self.restarts.entry((instance, ledger.epoch)).or_default();
        if ledger.restarts < *restarts {
            decided.clear(); // stopped, then wanted again: a new life
        }
        assert!(ledger.restarts <= *restarts + 1, "{process:?} counts two restarts at once");
        if ledger.restarts > *restarts {
            let restart = (instance, ledger.epoch, ledger.restarts);
            decided.push(self.deciding.get(&restart).copied().unwrap_or(now));
        }
        *restarts = ledger.restarts;
        let recent = decided.iter().filter(|&&at| now.since(at) < WINDOW).count();
        assert!(recent <= BUDGET as usize, "{process:?}: {recent} restarts within {WINDOW:?}");
    }

    /// The keeper lets go of an exit record.
    pub(crate) fn acknowledged(&mut self, exit: &pb::ExitRecord, disk: &[pb::LedgerRecord]) {
        let process = (exit.instance_id, ProcessKey { epoch: exit.epoch, attempt: exit.attempt });
        self.acknowledged.insert(process);
        let mut ledger = None;
        for record in disk {
            match &record.record {
                Some(Record::Instance(one)) if one.instance_id == exit.instance_id => ledger = Some(one),
                Some(Record::Forgotten(id)) if *id == exit.instance_id => ledger = None,
                _ => {}
            }
        }
        // Forgotten, and perhaps named once more by a hub that has not yet: nothing is left to be known.
        let Some(ledger) = ledger.filter(|ledger| ledger.attempt > 0) else { return };
        let of_last = ledger.last_exit.as_ref().map(|exit| (exit.epoch, exit.attempt));
        let newer = (ledger.epoch, ledger.attempt) > (exit.epoch, exit.attempt);
        assert!(
            newer || of_last == Some((exit.epoch, exit.attempt)),
            "{process:?} is acknowledged but not on disk: {ledger:?}"
        );
    }

    /// A process is started: has it waited long enough since the last one ended?
    pub(crate) fn started(&mut self, instance: u64, key: ProcessKey, now: Monotonic, keeper: &FakeKeeper) {
        if !self.strict {
            return;
        }
        let before = keeper.ended.iter().rfind(|((id, one), _)| *id == instance && one.epoch == key.epoch);
        let Some((_, &(ended, uptime))) = before else { return };
        let step = self.steps.entry((instance, key.epoch)).or_default();
        if uptime >= Duration::from_secs(60) {
            *step = 0;
        }
        // Answered at once, and no step of the back-off.
        if uptime >= UPTIME_FOR_RESTART_AT_ONCE {
            return;
        }
        *step = (*step).max(1);
        let wait = (BACKOFF_FIRST * 2_u32.pow(*step - 1)).min(BACKOFF_MAX);
        *step += 1;
        let waited = now.since(ended);
        assert!(waited >= wait.mul_f64(0.8), "{key:?} of i-{instance} waited {waited:?} instead of {wait:?}");
    }

    pub(crate) fn hook_begins(&mut self, instance: u64, order: &HookOrder, running: Option<ProcessKey>) {
        let (key, hook) = (order.key, order.hook);
        match hook {
            Hook::PreStart => {
                assert_eq!(running, None, "i-{instance}: {hook} of {key:?} beside a process");
                self.owes_nothing(instance);
                self.owed.insert((instance, key));
            }
            Hook::PostStart | Hook::PreStop => {
                // It may have ended a moment ago.
                assert!(
                    running.is_none_or(|at| at == key),
                    "i-{instance}: {hook} of {key:?} beside {running:?}"
                );
            }
            Hook::PostStop => {
                assert_eq!(running, None, "i-{instance}: {hook} of {key:?} beside a process");
            }
        }
    }

    pub(crate) fn hook_ended(&mut self, instance: u64, key: ProcessKey, hook: Hook, succeeds: bool) {
        match hook {
            Hook::PreStart if succeeds => drop(self.pre_started.insert((instance, key))),
            Hook::PostStop => drop(self.owed.remove(&(instance, key))),
            Hook::PreStart | Hook::PostStart | Hook::PreStop => {}
        }
    }

    /// A process may start only after its own first hook, and after the last one of its predecessors.
    pub(crate) fn hooks_allow_start(&mut self, instance: u64, order: &SpawnOrder) {
        if order.wanted.manifest.as_ref().is_none_or(|manifest| manifest.hooks.is_none()) {
            return;
        }
        let process = (instance, order.key);
        assert!(self.pre_started.contains(&process), "{process:?} is started without its pre_start hook");
        self.owed.insert(process);
        let before = self.owed.iter().find(|other| other.0 == instance && other.1 != order.key);
        assert_eq!(before, None, "{process:?} is started before the post_stop hook of an earlier one");
    }

    pub(crate) fn owes_nothing(&self, instance: u64) {
        let owed = self.owed.iter().find(|(other, _)| *other == instance);
        assert_eq!(owed, None, "i-{instance}: a post_stop hook was forgotten");
    }

    pub(crate) fn may_have_given_up(&self, instance: u64, epoch: u64, reason: &str) {
        let spent = self.restarts.get(&(instance, epoch)).is_some_and(|(restarts, _)| *restarts >= BUDGET);
        let hopeless = self.exec_failures.get(&(instance, epoch)).is_some_and(|&n| n >= EXEC_FAILURES_MAX);
        assert!(spent || hopeless, "i-{instance} was given up too early: {reason}");
    }
}
