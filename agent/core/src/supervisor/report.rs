//! One instance as its agent reports it to the hub: whole, and only when it has changed.

use nave_proto::pb::{self, observed};

use super::action::Action;
use super::health::Stuck;
use super::lease::LEASE_OVER;
use super::ledger::widen;
use super::state::{Running, Starting, State};
use super::stop::{progress, stuck};
use super::{Goal, Supervisor};
use crate::monotonic::WallOffset;

impl Supervisor {
    /// The report as of now. Always of the epoch the hub asked for, also while an older process is being ended.
    #[must_use]
    pub fn report(&self, wall: WallOffset) -> pb::InstanceReport {
        let of_epoch = self.epoch == self.wanted.epoch;
        pb::InstanceReport {
            instance_id: self.instance.0,
            epoch: self.wanted.epoch,
            attempt: if of_epoch { self.attempt } else { 0 },
            restarts: self.memory.restarts,
            observed: Some(pb::Observed { state: Some(self.observed(wall)) }),
            ports: if of_epoch { widen(&self.ports) } else { Default::default() },
            reason: self.reason(),
            endpoint: self.endpoint().into(),
            last_exit: self.last_exit_of_epoch(),
            notes: self.notes.clone(),
            ends: self.ends.clone(),
            tells_ends: true,
            wants_restart: of_epoch && self.stuck().is_some(),
            fetch: self.fetch_state(),
        }
    }

    /// Before the keeper's word nothing true can be said of a process.
    #[must_use]
    pub fn can_report(&self) -> bool {
        !matches!(self.state, State::Pending(_)) || self.attempt == 0
    }

    pub(super) fn publish_report(&mut self, out: &mut Vec<Action>) {
        if !self.can_report() {
            return;
        }
        let report = self.report(WallOffset::default());
        if self.reported.as_ref() != Some(&report) {
            self.reported = Some(report);
            out.push(Action::Report);
        }
    }

    fn last_exit_of_epoch(&self) -> Option<pb::ExitRecord> {
        self.last_exit.clone().filter(|exit| exit.epoch == self.wanted.epoch)
    }

    fn observed(&self, wall: WallOffset) -> observed::State {
        let last_exit = self.last_exit_of_epoch();
        match (&self.state, self.goal()) {
            (State::Gone, _) => observed::State::Exited(observed::Exited { exit: last_exit }),
            (_, Goal::Stop) => {
                observed::State::Stopping(observed::Stopping { process: self.state.process().cloned() })
            }
            (State::Pending(_), _) | (_, Goal::Replace | Goal::Rest) => {
                observed::State::Pending(observed::Pending {})
            }
            (State::Starting(_), Goal::Run) => observed::State::Starting(observed::Starting {}),
            (State::Running(running), Goal::Run) => observed::State::Running(observed::Running {
                process: Some(running.process.clone()),
                started_unix_ns: running.started_unix_ns,
                ready: running.health.ready_since.is_some(),
            }),
            (State::BackingOff { until, .. }, Goal::Run) => {
                observed::State::BackingOff(observed::BackingOff {
                    until_unix_ns: wall.unix_ns(*until),
                    last_exit,
                })
            }
            (State::Stopping(stopping), Goal::Run) => observed::State::Stopping(observed::Stopping {
                process: Some(stopping.running.process.clone()),
            }),
            (State::Exited { .. }, Goal::Run) => {
                observed::State::Exited(observed::Exited { exit: last_exit })
            }
            (State::Failed { .. }, Goal::Run) => observed::State::Failed(observed::Failed { last_exit }),
        }
    }

    /// Whether it may be called, as of now.
    #[must_use]
    pub fn endpoint(&self) -> pb::EndpointState {
        let going = self.goal() != Goal::Run;
        match &self.state {
            State::Running(Running { health, .. }) if !going && health.ready_since.is_some() => {
                pb::EndpointState::Ready
            }
            State::Running(_) | State::Stopping(_) if going => pb::EndpointState::Draining,
            State::Stopping(_) => pb::EndpointState::Draining,
            State::Running(_) | State::Pending(_) | State::Starting(_) | State::BackingOff { .. } => {
                pb::EndpointState::Starting
            }
            State::Exited { .. } | State::Failed { .. } | State::Gone => pb::EndpointState::Unspecified,
        }
    }

    fn stuck(&self) -> Option<&Stuck> {
        match &self.state {
            State::Running(running) => running.health.stuck.as_ref(),
            State::Pending(_)
            | State::Starting(_)
            | State::BackingOff { .. }
            | State::Stopping(_)
            | State::Exited { .. }
            | State::Failed { .. }
            | State::Gone => None,
        }
    }

    fn reason(&self) -> String {
        if let Some(sweep) = self.sweeps.values().find(|sweep| sweep.tries > 1) {
            return format!(
                "an ended process left others that do not die from SIGKILL, sent {} times",
                sweep.tries
            );
        }
        match (&self.state, self.goal()) {
            (State::Stopping(stopping), goal) => {
                stuck(stopping).unwrap_or_else(|| match (&stopping.cause, goal) {
                    (_, Goal::Replace) => format!("waits for its process of epoch {} to end", self.epoch),
                    (super::StopCause::Probe(why) | super::StopCause::Watchdog(why), Goal::Run) => {
                        why.clone()
                    }
                    (super::StopCause::Lease, Goal::Run) => LEASE_OVER.to_owned(),
                    (_, Goal::Run | Goal::Stop | Goal::Rest) => progress(stopping),
                })
            }
            (State::Pending(_), Goal::Run | Goal::Replace | Goal::Rest) => "waits for the keeper".to_owned(),
            (State::Running(running), Goal::Run) if running.health.stuck.is_some() => {
                let why = self.stuck().map_or("", |stuck| stuck.why.as_str());
                format!("{why}; waits for its turn to be started again")
            }
            (State::Running(running), Goal::Run) => match running.health.ready_since {
                Some(_) => String::new(),
                None => running.health.why_not.clone(),
            },
            (State::BackingOff { why, .. } | State::Exited { why }, Goal::Run) => why.clone(),
            (State::Failed { reason }, Goal::Run) => reason.clone(),
            (State::Starting(Starting::Preparing { .. }), Goal::Run) => "fetches what it needs".to_owned(),
            (State::Starting(Starting::PreStart { .. }), Goal::Run) => "runs its pre_start hook".to_owned(),
            (State::Running(_), Goal::Stop | Goal::Rest) => {
                "stays until what needs it on this host has ended".to_owned()
            }
            (_, Goal::Stop | Goal::Rest) if self.runs_post_stop() => "runs its post_stop hook".to_owned(),
            (_, Goal::Rest) => "rests until this host's agent starts again".to_owned(),
            (State::Starting(Starting::PickingPorts | Starting::Spawning) | State::Gone, Goal::Run)
            | (_, Goal::Stop | Goal::Replace) => String::new(),
        }
    }
}
