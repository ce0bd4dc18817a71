//! What happened, written into the state: the half of a step that does not care what is wanted.

use std::time::Duration;

use nave_proto::pb;
use rand::Rng;

use super::action::{Action, Level};
use super::advance::{give_up, ports_fit};
use super::health::{self, Health};
use super::hooks::Hook;
use super::input::{ProcessKey, SpawnError, SpawnErrorKind};
use super::lease::LEASE_OVER;
use super::restart::{cannot_heal, describe, hints_at_port, is_failure, is_fatal};
use super::state::{Running, Starting, State, StopCause, StopStep};
use super::stop::ladder;
use super::{AFTER_OPERATOR, Goal, Ports, QUICK_EXIT, Supervisor};
use crate::monotonic::Monotonic;

impl Supervisor {
    /// A newer wish. A manifest that differs in the same epoch is a live change: the process stays.
    pub(super) fn want(&mut self, now: Monotonic, mut wanted: pb::WantedInstance, out: &mut Vec<Action>) {
        if wanted.epoch < self.wanted.epoch {
            let message =
                format!("ignored a wish for epoch {}, older than {}", wanted.epoch, self.wanted.epoch);
            out.push(Action::Log { level: Level::Warn, message });
            return;
        }
        if wanted.manifest.is_none() {
            wanted.manifest = self.wanted.manifest.take();
        }
        self.forget = false;
        let before = std::mem::replace(&mut self.wanted, wanted);
        let health = |wanted: &pb::WantedInstance| wanted.manifest.as_ref().and_then(|m| m.health.clone());
        let has_other_health = before.epoch == self.wanted.epoch && health(&before) != health(&self.wanted);
        self.keep_hooks(before);
        if !has_other_health {
            return;
        }
        let key = self.key();
        if let (State::Running(running), Some(manifest)) = (&mut self.state, &self.wanted.manifest) {
            running.health.respecify(now, running.since, manifest);
            out.push(Action::StopProbes);
            health::start_probes(key, manifest, &self.ports, out);
        }
    }

    pub(super) fn ports_picked<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        ports: Ports,
        out: &mut Vec<Action>,
    ) {
        if self.state != State::Starting(Starting::PickingPorts) {
            return;
        }
        if !self.keeper_known {
            self.state = State::due(now);
        } else if self.wanted.manifest.as_ref().is_some_and(|manifest| ports_fit(manifest, &ports)) {
            self.ports = ports;
            self.pick_ports = false;
            self.spawn(out);
        } else {
            self.start_failed(now, rng, "the ports changed while they were picked".to_owned(), out);
        }
    }

    pub(super) fn port_clash<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        message: String,
        out: &mut Vec<Action>,
    ) {
        if self.state == State::Starting(Starting::PickingPorts) {
            self.pick_ports = true;
            self.start_failed(now, rng, message, out);
        }
    }

    pub(super) fn spawned(
        &mut self,
        now: Monotonic,
        key: ProcessKey,
        process: pb::ProcessIdentity,
        started_unix_ns: i64,
        out: &mut Vec<Action>,
    ) {
        let current = key == self.key();
        match &self.state {
            State::Starting(Starting::Spawning) if current => self.run(now, process, started_unix_ns, out),
            // The keeper's list will say.
            State::Pending(_) => {}
            State::Running(_) | State::Stopping(_) if current => {}
            State::Starting(_)
            | State::Running(_)
            | State::Stopping(_)
            | State::BackingOff { .. }
            | State::Exited { .. }
            | State::Failed { .. }
            | State::Gone => {
                // Its exit may have been told first.
                if !self.has_ended(key) {
                    self.kill_duplicate(now, key, out);
                }
            }
        }
    }

    /// A process of ours runs: exec has succeeded.
    pub(super) fn run(
        &mut self,
        now: Monotonic,
        process: pb::ProcessIdentity,
        started_unix_ns: i64,
        out: &mut Vec<Action>,
    ) {
        self.memory.exec_failures = 0;
        let unknown = pb::Manifest::default();
        let manifest = self.wanted.manifest.as_ref().unwrap_or(&unknown);
        health::start_probes(self.key(), manifest, &self.ports, out);
        let health = Health::begin(manifest, now);
        out.push(Action::Log { level: Level::Info, message: format!("process {} runs", process.pid) });
        self.state = State::Running(Running { process, started_unix_ns, since: now, health });
        self.post_start(out);
    }

    pub(super) fn spawn_failed<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        key: ProcessKey,
        error: &SpawnError,
        out: &mut Vec<Action>,
    ) {
        if self.state != State::Starting(Starting::Spawning) || key != self.key() {
            return;
        }
        match error.kind {
            SpawnErrorKind::Unavailable => self.keeper_lost(),
            SpawnErrorKind::Busy => {
                let until = now + self.memory.next_delay(rng, Duration::ZERO);
                self.owe_post_stop();
                self.state = State::BackingOff { until, why: error.message.clone() };
                self.is_crowded = true;
                out.push(Action::ListProcesses);
            }
            SpawnErrorKind::Exec | SpawnErrorKind::Invalid | SpawnErrorKind::System => {
                let hopeless = match error.kind {
                    SpawnErrorKind::Exec => cannot_heal(error.errno),
                    SpawnErrorKind::Invalid
                    | SpawnErrorKind::System
                    | SpawnErrorKind::Busy
                    | SpawnErrorKind::Unavailable => false,
                };
                let exit = self.exec_error(error);
                self.never_ran(now, rng, exit, hopeless, out);
            }
        }
    }

    /// What it needs cannot be had.
    pub(super) fn never_prepared<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        error: &SpawnError,
        out: &mut Vec<Action>,
    ) {
        let exit = self.exec_error(error);
        let hopeless = error.kind == SpawnErrorKind::Exec && cannot_heal(error.errno);
        self.start_came_to_nothing(now, rng, exit, hopeless, out);
    }

    pub(super) fn never_ran<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        exit: pb::ExitRecord,
        hopeless: bool,
        out: &mut Vec<Action>,
    ) {
        self.owe_post_stop();
        self.start_came_to_nothing(now, rng, exit, hopeless, out);
    }

    fn start_came_to_nothing<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        exit: pb::ExitRecord,
        hopeless: bool,
        out: &mut Vec<Action>,
    ) {
        let why = if exit.message.is_empty() { describe(&exit) } else { exit.message.clone() };
        self.note_end(exit);
        if hopeless && self.memory.exec_failed() {
            self.state = give_up(why, out);
        } else {
            self.start_failed(now, rng, why, out);
        }
    }

    /// Our own note of a failed start; the keeper's record replaces it when it comes.
    pub(super) fn exec_error(&self, error: &SpawnError) -> pb::ExitRecord {
        pb::ExitRecord {
            cause: pb::ExitCause::ExecError.into(),
            errno: error.errno,
            message: error.message.clone(),
            ..self.exit_note()
        }
    }

    pub(super) fn exit_note(&self) -> pb::ExitRecord {
        pb::ExitRecord {
            instance_id: self.instance.0,
            service: self.wanted.manifest.as_ref().map_or_else(String::new, |manifest| manifest.name.clone()),
            epoch: self.epoch,
            attempt: self.attempt,
            process: self.state.process().cloned(),
            ..pb::ExitRecord::default()
        }
    }

    /// An exit record, perhaps not for the first time, perhaps of an older process.
    pub(super) fn exited<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        exit: pb::ExitRecord,
        out: &mut Vec<Action>,
    ) {
        let key = ProcessKey { epoch: exit.epoch, attempt: exit.attempt };
        if key.epoch == self.epoch && key.attempt > self.attempt && self.state.process().is_none() {
            // Our ledger is older than the keeper's: its attempts are used up all the same.
            self.attempt = key.attempt;
            self.note_end(exit);
            return;
        }
        if key > self.key() && matches!(self.state, State::Pending(_)) {
            // What is remembered is older than the truth: a part of the ledger was lost.
            (self.epoch, self.attempt) = (key.epoch, key.attempt);
        }
        if key != self.key() {
            return;
        }
        match &mut self.state {
            State::Pending(pending) => pending.exit = Some(Box::new(exit)),
            State::Starting(Starting::Spawning) if exit.cause() == pb::ExitCause::ExecError => {
                let hopeless = cannot_heal(exit.errno);
                self.never_ran(now, rng, exit, hopeless, out);
            }
            State::Starting(Starting::Spawning) | State::Running(_) | State::Stopping(_) => {
                self.ended(now, rng, exit, out);
            }
            State::Starting(
                Starting::PickingPorts | Starting::Preparing { .. } | Starting::PreStart { .. },
            )
            | State::BackingOff { .. }
            | State::Exited { .. }
            | State::Failed { .. }
            | State::Gone => {
                // Better than our own note of the same end.
                if !self.last_exit.as_ref().is_some_and(|known| is_of(known, key) && known.sequence != 0) {
                    self.note_end(exit);
                }
            }
        }
    }

    /// The current process is no more.
    pub(super) fn ended<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        exit: pb::ExitRecord,
        out: &mut Vec<Action>,
    ) {
        self.end_post_start(out);
        self.owe_post_stop();
        let (running, cause) = match std::mem::replace(&mut self.state, State::due(now)) {
            State::Running(running) => (Some(running), None),
            State::Stopping(stopping) => {
                if matches!(stopping.step, StopStep::PreStop { .. }) {
                    out.push(Action::EndHook { key: self.key(), hook: Hook::PreStop });
                }
                self.note("instance_stop", ladder(&stopping, now));
                (Some(stopping.running), Some(stopping.cause))
            }
            State::Starting(_) => {
                self.memory.exec_failures = 0;
                (None, None)
            }
            State::Pending(_)
            | State::BackingOff { .. }
            | State::Exited { .. }
            | State::Failed { .. }
            | State::Gone => unreachable!("only a state with a process can see it end"),
        };
        if cause.is_none() && running.is_some() {
            out.push(Action::StopProbes);
        }
        // Told to have ended before it was told to run, it has to be remembered until that has come as well.
        if !exit.cgroup_empty || running.is_none() || self.is_looked_into() {
            self.sweep(now, self.key(), out);
        }
        let uptime = match &running {
            // Our own note of an end that nobody saw.
            Some(running) if exit.sequence == 0 => now.since(running.since),
            Some(_) | None => Duration::from_millis(exit.ran_ms),
        };
        if let Some(ready) = running.and_then(|running| running.health.ready_since) {
            // Time in which the agent was away and the process dead is no good running.
            self.memory.was_ready(now.since(ready).min(uptime));
        }
        let restart = self.wanted.manifest.as_ref().and_then(|manifest| manifest.restart.as_ref());
        let failed = is_failure(&exit, restart);
        let fatal = is_fatal(&exit, restart);
        let by_operator = exit.cause() == pb::ExitCause::Operator;
        // We have not asked for it, so it was the keeper, at the deadline.
        let by_deadline = exit.cause() == pb::ExitCause::Hub && self.needs_lease();
        if !self.ports.is_empty() && (hints_at_port(&exit) || (failed && uptime < QUICK_EXIT)) {
            self.pick_ports = true;
        }
        let what = format!("process {}", describe(&exit));
        self.note_end(exit);
        match cause {
            None if by_operator => {
                // With the whole keeper, so it is about to be the agent's end too; not the process's own doing.
                out.push(Action::Log { level: Level::Info, message: what.clone() });
                self.state = State::BackingOff { until: now + AFTER_OPERATOR, why: what };
            }
            None if by_deadline => self.wait_for_lease(now, what, out),
            None if fatal && self.goal() == Goal::Run => {
                self.state = give_up(format!("{what}, which is one of restart.fatal_codes"), out);
            }
            None => self.decide(now, rng, failed, uptime, what, out),
            Some(StopCause::Probe(why) | StopCause::Watchdog(why)) => {
                self.decide(now, rng, true, uptime, why, out)
            }
            Some(StopCause::Lease) => self.wait_for_lease(now, what, out),
            Some(StopCause::Told) => out.push(Action::Log { level: Level::Info, message: what }),
        }
    }

    /// Commands of ours run in its cgroup beside it, and may be in it though the keeper has just found nobody.
    fn is_looked_into(&self) -> bool {
        let health = self.wanted.manifest.as_ref().and_then(|manifest| manifest.health.as_ref());
        let probes = health.into_iter().flat_map(|health| [health.ready.as_ref(), health.live.as_ref()]);
        let hooks = self.wanted.manifest.as_ref().is_some_and(|manifest| manifest.hooks.is_some());
        hooks || probes.flatten().any(|probe| matches!(probe.check, Some(pb::probe::Check::Exec(_))))
    }

    /// Ended for want of a lease, by no fault of its own: it starts again with the next one.
    fn wait_for_lease(&mut self, now: Monotonic, what: String, out: &mut Vec<Action>) {
        out.push(Action::Log {
            level: Level::Info,
            message: format!("{what}; starts again once the hub is heard"),
        });
        self.state = State::BackingOff { until: now, why: LEASE_OVER.to_owned() };
    }

    pub(super) fn has_ended(&self, key: ProcessKey) -> bool {
        self.last_exit.as_ref().is_some_and(|exit| is_of(exit, key))
    }
}

pub(super) fn is_of(exit: &pb::ExitRecord, key: ProcessKey) -> bool {
    exit.epoch == key.epoch && exit.attempt == key.attempt
}
