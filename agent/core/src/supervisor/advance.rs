//! From where the state is towards where the hub wants it, by what time it is: the half of a step that does not
//! care what happened.

use std::time::Duration;

use nave_proto::pb;
use rand::Rng;

use super::action::{Action, Level, SpawnOrder};
use super::hooks::PostStop;
use super::input::{ProcessKey, SpawnError};
use super::lease::LEASE_OVER;
use super::restart::{Verdict, policy};
use super::state::{Starting, State, StopCause};
use super::{Goal, Ports, Supervisor};
use crate::monotonic::Monotonic;

impl Supervisor {
    /// Takes every step that is due now.
    pub(super) fn advance(&mut self, now: Monotonic, out: &mut Vec<Action>) {
        self.waits_for_lease = false;
        loop {
            match (&self.state, self.goal()) {
                // The keeper speaks first, or the spawn's outcome comes first.
                (State::Pending(_) | State::Starting(Starting::Spawning), _) => return,
                (State::Running(running), Goal::Run) if self.has_lost_lease(now) => {
                    let running = running.clone();
                    out.push(Action::Log { level: Level::Warn, message: LEASE_OVER.to_owned() });
                    self.begin_stop(now, running, StopCause::Lease, out);
                }
                (State::Running(running), Goal::Run)
                    if running.health.watchdog_at().is_some_and(|at| at <= now) =>
                {
                    let running = running.clone();
                    self.bite(now, running, "the process has not said WATCHDOG=1 in time", out);
                }
                (State::Running(running), Goal::Run) => {
                    let Some(why) = self.restart_is_due(now) else { return };
                    let running = running.clone();
                    self.begin_stop(now, running, StopCause::Probe(why), out);
                }
                (State::Running(_), Goal::Stop | Goal::Rest) if self.stays_for_others(now) => return,
                (State::Running(running), Goal::Stop | Goal::Replace | Goal::Rest) => {
                    let running = running.clone();
                    self.begin_stop(now, running, StopCause::Told, out);
                }
                (State::Stopping(_), _) => return self.climb(now, out),
                (State::Gone, Goal::Stop | Goal::Rest) => return,
                (State::Gone, Goal::Run | Goal::Replace) => {
                    self.memory = super::RestartMemory::default();
                    self.state = State::due(now);
                }
                (State::Starting(Starting::PickingPorts), Goal::Stop | Goal::Replace | Goal::Rest) => {
                    self.state = State::due(now);
                }
                (State::Starting(Starting::PickingPorts), Goal::Run) => return,
                (
                    State::Starting(Starting::Preparing { ending: false }),
                    Goal::Stop | Goal::Replace | Goal::Rest,
                ) => {
                    self.state = State::Starting(Starting::Preparing { ending: true });
                    return out.push(Action::CancelPreparation { key: self.key() });
                }
                (
                    State::Starting(Starting::PreStart { ending: false }),
                    Goal::Stop | Goal::Replace | Goal::Rest,
                ) => {
                    return self.end_pre_start(out);
                }
                (State::Starting(Starting::PreStart { ending: false }), Goal::Run)
                    if self.has_lost_lease(now) =>
                {
                    return self.end_pre_start(out);
                }
                (State::Starting(Starting::Preparing { .. } | Starting::PreStart { .. }), _) => return,
                (State::BackingOff { .. } | State::Exited { .. } | State::Failed { .. }, _)
                    if !self.sweeps.is_empty() =>
                {
                    return;
                }
                (State::BackingOff { .. } | State::Exited { .. } | State::Failed { .. }, _)
                    if self.post_stop != PostStop::Nothing =>
                {
                    if self.waits_for_post_stop(out) {
                        return;
                    }
                }
                (State::BackingOff { .. } | State::Exited { .. } | State::Failed { .. }, Goal::Stop) => {
                    self.clean_up(out);
                }
                (State::BackingOff { .. } | State::Exited { .. } | State::Failed { .. }, Goal::Replace) => {
                    self.begin_epoch(now, out);
                }
                (State::BackingOff { until, .. }, Goal::Run) if now < *until || !self.keeper_known => return,
                (State::BackingOff { .. }, Goal::Run) if self.lacks_lease(now) => {
                    self.waits_for_lease = true;
                    return;
                }
                (State::BackingOff { .. }, Goal::Run) => return self.start(out),
                (State::Exited { .. } | State::Failed { .. }, Goal::Run) => return,
                (State::BackingOff { .. } | State::Exited { .. } | State::Failed { .. }, Goal::Rest) => {
                    return;
                }
            }
        }
    }

    /// When [`Supervisor::step`] will have something to do, if nothing happens before.
    #[must_use]
    pub fn next_wake(&self) -> Option<Monotonic> {
        let own = match &self.state {
            State::BackingOff { until, .. } => {
                let waits = !self.sweeps.is_empty() || self.post_stop != PostStop::Nothing;
                let starts = self.keeper_known && !self.waits_for_lease && self.goal() != Goal::Rest;
                (!waits && starts).then_some(*until)
            }
            State::Starting(Starting::PreStart { ending: false }) => {
                self.lease.filter(|_| self.needs_lease())
            }
            State::Running(_) if self.is_to_stop() => {
                self.needed_until.into_iter().chain(self.lease.filter(|_| self.needs_lease())).min()
            }
            State::Running(running) => {
                let lease = self.lease.filter(|_| self.needs_lease());
                lease
                    .into_iter()
                    .chain(running.health.watchdog_at())
                    .chain(self.limits_retry_at())
                    .chain(self.restart_due_at())
                    .min()
            }
            State::Stopping(stopping) => Some(match stopping.step {
                super::StopStep::PreStop { until } => until,
                super::StopStep::Draining(drain) => {
                    let lease = self.lease.filter(|_| self.needs_lease());
                    lease.map_or(drain.next_wake(), |lease| lease.min(drain.next_wake()))
                }
                super::StopStep::Terminating { .. } => stopping.kill_at,
                super::StopStep::Killing { next, .. } => next,
            }),
            State::Pending(_)
            | State::Starting(_)
            | State::Exited { .. }
            | State::Failed { .. }
            | State::Gone => None,
        };
        own.into_iter().chain(self.fetch_again_at()).chain(self.sweeps.values().map(|sweep| sweep.next)).min()
    }

    fn clean_up(&mut self, out: &mut Vec<Action>) {
        out.push(Action::Forget { epoch: self.epoch });
        if self.wanted.epoch > self.epoch {
            self.reset_epoch();
        }
        self.state = State::Gone;
        out.push(Action::Gone);
    }

    /// The hub placed the instance here once more; nothing of the older placement runs any longer.
    fn begin_epoch(&mut self, now: Monotonic, out: &mut Vec<Action>) {
        if self.attempt > 0 {
            out.push(Action::Forget { epoch: self.epoch });
        }
        self.reset_epoch();
        self.state = State::due(now);
    }

    fn reset_epoch(&mut self) {
        self.epoch = self.wanted.epoch;
        self.attempt = 0;
        self.ran = None;
        self.memory = super::RestartMemory::default();
        self.last_exit = None;
        self.ports.clear();
        self.pick_ports = false;
    }

    fn start(&mut self, out: &mut Vec<Action>) {
        let Some(manifest) = &self.wanted.manifest else {
            self.state = State::Failed { reason: "the hub sent no manifest".to_owned() };
            return;
        };
        if !self.pick_ports && ports_fit(manifest, &self.ports) {
            return self.spawn(out);
        }
        let (fixed, dynamic): (Vec<_>, Vec<_>) = manifest.ports.iter().partition(|(_, port)| port.port != 0);
        out.push(Action::PickPorts {
            fixed: fixed
                .into_iter()
                .filter_map(|(name, port)| Some((name.clone(), u16::try_from(port.port).ok()?)))
                .collect(),
            dynamic: dynamic.into_iter().map(|(name, _)| name.clone()).collect(),
        });
        self.state = State::Starting(Starting::PickingPorts);
    }

    /// An attempt begins. It is on disk before anything is ordered, so that no number is ever used twice.
    pub(super) fn spawn(&mut self, out: &mut Vec<Action>) {
        self.attempt = self.attempt.saturating_add(1);
        self.ran = None;
        if !self.is_prepared_first() {
            return self.order_process(out);
        }
        self.state = State::Starting(Starting::Preparing { ending: false });
        self.persist(out);
        out.push(Action::Prepare(self.spawn_order()));
    }

    pub(super) fn order_process(&mut self, out: &mut Vec<Action>) {
        self.state = State::Starting(Starting::Spawning);
        self.limited_from_the_start();
        self.persist(out);
        out.push(Action::Spawn(self.spawn_order()));
    }

    fn spawn_order(&self) -> Box<SpawnOrder> {
        let (key, wanted, ports) = (self.key(), self.wanted.clone(), self.ports.clone());
        Box::new(SpawnOrder {
            key,
            wanted,
            ports,
            prepared: self.is_prepared_first(),
            deadline: self.deadline(),
        })
    }

    /// Others are made ready with the start itself, which takes no time to speak of.
    fn is_prepared_first(&self) -> bool {
        let fetches = self.wanted.manifest.as_ref().is_some_and(|manifest| !manifest.artifacts.is_empty());
        fetches || self.has_pre_start()
    }

    pub(super) fn prepared<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        key: ProcessKey,
        result: Result<(), SpawnError>,
        out: &mut Vec<Action>,
    ) {
        let State::Starting(Starting::Preparing { ending }) = self.state else { return };
        if key != self.key() {
            return;
        }
        match result {
            _ if ending => self.state = State::due(now),
            Err(error) => self.never_prepared(now, rng, &error, out),
            Ok(()) if self.may_start(now) => self.pre_start(out),
            Ok(()) => self.state = State::due(now),
        }
    }

    /// After a process ended that should have run on.
    pub(super) fn decide<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        failed: bool,
        uptime: Duration,
        why: String,
        out: &mut Vec<Action>,
    ) {
        if self.goal() != Goal::Run {
            self.state = State::due(now);
            return;
        }
        let restart = self.wanted.manifest.as_ref().and_then(|manifest| manifest.restart.as_ref());
        self.state = match self.memory.decide(now, rng, restart, failed, uptime, &why) {
            Verdict::StartAt(until) => {
                let wait = until.since(now).as_millis();
                out.push(Action::Log {
                    level: Level::Warn,
                    message: format!("{why}; starts again in {wait} ms"),
                });
                State::BackingOff { until, why }
            }
            Verdict::Rest => {
                out.push(Action::Log { level: Level::Info, message: format!("{why}; not started again") });
                State::Exited { why }
            }
            Verdict::GiveUp(reason) => give_up(reason, out),
        };
    }

    /// A start that came to nothing. No policy calls that a success.
    pub(super) fn start_failed<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        why: String,
        out: &mut Vec<Action>,
    ) {
        let restart = self.wanted.manifest.as_ref().and_then(|manifest| manifest.restart.as_ref());
        if policy(restart) == pb::RestartPolicy::Never && self.goal() == Goal::Run {
            self.state = give_up(why, out);
        } else {
            self.decide(now, rng, true, Duration::ZERO, why, out);
        }
    }
}

pub(super) fn give_up(reason: String, out: &mut Vec<Action>) -> State {
    out.push(Action::Log { level: Level::Error, message: reason.clone() });
    State::Failed { reason }
}

/// Whether these are the manifest's ports, each fixed one with its number.
pub(super) fn ports_fit(manifest: &pb::Manifest, ports: &Ports) -> bool {
    manifest.ports.len() == ports.len()
        && manifest.ports.iter().all(|(name, port)| {
            ports.get(name).is_some_and(|&have| port.port == 0 || port.port == u32::from(have))
        })
}
