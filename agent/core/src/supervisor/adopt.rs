//! The keeper's list: what it says of one instance, against what we remember. After a restart of the agent this is
//! what ends [`State::Pending`]; in between it settles a disagreement.

use nave_proto::pb;
use rand::Rng;

use super::Supervisor;
use super::action::{Action, Level};
use super::health;
use super::input::ProcessKey;
use super::state::{Drain, Starting, State, StopStep};
use crate::monotonic::Monotonic;

impl Supervisor {
    pub(super) fn adopted<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        key: ProcessKey,
        process: pb::ProcessIdentity,
        started_unix_ns: i64,
        out: &mut Vec<Action>,
    ) {
        let restored = self.recall(now, rng, out);
        self.is_crowded = false;
        if self.has_ended(key) {
            return; // the list is older than the exit
        }
        if restored && key > self.key() && self.attempt != 0 {
            // What is remembered is older than the truth: a part of the ledger was lost.
            self.state = State::due(now);
        }
        let current = key == self.key();
        let manifest = self.wanted.manifest.as_ref();
        match &mut self.state {
            State::Running(running) if current => {
                running.process = process;
                if let (true, Some(manifest)) = (restored, manifest) {
                    running.health.respecify(now, running.since, manifest);
                    health::start_probes(key, manifest, &self.ports, out);
                }
                if restored && self.post_start_open {
                    self.post_start(out);
                }
            }
            State::Stopping(stopping) if current => {
                stopping.running.process = process;
                if stopping.step == (StopStep::Terminating { delivered: false }) {
                    stopping.step = StopStep::Draining(Drain::over(now));
                }
            }
            State::Starting(Starting::Spawning) if current => self.run(now, process, started_unix_ns, out),
            State::Running(_) | State::Stopping(_) | State::Starting(_) => self.kill_duplicate(now, key, out),
            State::BackingOff { .. } | State::Exited { .. } | State::Failed { .. } | State::Gone => {
                if self.attempt != 0 && key < self.key() {
                    return self.kill_duplicate(now, key, out);
                }
                self.epoch = key.epoch;
                self.attempt = key.attempt;
                self.run(now, process, started_unix_ns, out);
            }
            State::Pending(_) => unreachable!("recall() has ended it"),
        }
    }

    /// Others than the main process are left. `Absent` follows.
    pub(super) fn leftover(&mut self, now: Monotonic, key: ProcessKey, out: &mut Vec<Action>) {
        self.is_crowded = false;
        let spared = match &self.state {
            State::Running(_) | State::Stopping(_) => key.epoch == self.epoch,
            State::Starting(Starting::Spawning) => key.epoch == self.epoch && key != self.key(),
            State::Starting(
                Starting::PickingPorts | Starting::Preparing { .. } | Starting::PreStart { .. },
            )
            | State::BackingOff { .. }
            | State::Exited { .. }
            | State::Failed { .. } => self.runs_hook_alone(key.epoch),
            State::Pending(_) | State::Gone => false,
        };
        if !spared {
            self.sweep(now, key, out);
        }
    }

    pub(super) fn absent<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        fresh: bool,
        out: &mut Vec<Action>,
    ) {
        let restored = self.recall(now, rng, out);
        if std::mem::take(&mut self.is_crowded) && self.state.process().is_none() {
            // Processes of an instance that its keeper does not know: their record is lost, and nobody can watch them.
            let message = "had processes in its cgroup that no keeper knew; they are ended".to_owned();
            out.push(Action::Log { level: Level::Warn, message: message.clone() });
            self.note("instance_strays_ended", message);
            self.sweep(now, self.key(), out);
        }
        match &self.state {
            State::Running(_) | State::Stopping(_) => {
                let message = "ended while nobody watched; how is not known".to_owned();
                let exit = pb::ExitRecord { message, ..self.exit_note() };
                self.ended(now, rng, exit, out);
            }
            // The order never reached the keeper: it counts for nothing.
            State::Starting(Starting::Spawning) if fresh || restored => {
                self.owe_post_stop();
                self.state = State::due(now);
            }
            State::Starting(_)
            | State::BackingOff { .. }
            | State::Exited { .. }
            | State::Failed { .. }
            | State::Gone => {}
            State::Pending(_) => unreachable!("recall() has ended it"),
        }
    }

    /// The keeper has spoken: what was remembered is what we go on from. True when we were waiting for it.
    fn recall<R: Rng + ?Sized>(&mut self, now: Monotonic, rng: &mut R, out: &mut Vec<Action>) -> bool {
        self.keeper_known = true;
        let State::Pending(pending) = &mut self.state else { return false };
        let exit = pending.exit.take();
        self.state = std::mem::replace(&mut *pending.recalled, State::Gone);
        match self.state {
            // With the agent that did it.
            State::Starting(Starting::Preparing { .. }) => self.state = State::due(now),
            // Its end will not be told to us: it is ended, and the start begins anew.
            State::Starting(Starting::PreStart { .. }) => self.end_pre_start(out),
            State::Starting(Starting::PickingPorts | Starting::Spawning)
            | State::Pending(_)
            | State::Running(_)
            | State::BackingOff { .. }
            | State::Stopping(_)
            | State::Exited { .. }
            | State::Failed { .. }
            | State::Gone => {}
        }
        if let Some(exit) = exit {
            self.exited(now, rng, *exit, out);
        }
        true
    }
}
