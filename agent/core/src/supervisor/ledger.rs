//! What must survive the agent: attempts, back-off, deadlines, the health verdict, as one record per instance in
//! boot-time + boot id form. After a reboot every handle is void and every deadline is counted anew from now.

use std::time::Duration;

use nave_proto::ids::InstanceId;
use nave_proto::pb::{self, InstanceLedgerPhase as Phase};

use super::action::SignalScope;
use super::health::{Health, WATCHDOG_SILENT};
use super::hooks::PostStop;
use super::lease::LEASE_OVER;
use super::restart::{RestartMemory, backoff};
use super::state::{Drain, Pending, Running, Starting, State, StopCause, StopStep, Stopping};
use super::stop::DRAIN_WAIT;
use super::{Ports, Supervisor};
use crate::monotonic::Monotonic;

impl Supervisor {
    /// A supervisor as the ledger remembers it; `None`: nothing was written about this instance yet. Nothing is
    /// done before the keeper's word (`Adopted`, `Leftover` or `Absent`).
    #[must_use]
    pub fn restore(
        wanted: pb::WantedInstance,
        ledger: Option<&pb::InstanceLedger>,
        boot_id: &str,
        now: Monotonic,
    ) -> Self {
        let mut supervisor = Self::new(wanted, boot_id, now);
        let Some(ledger) = ledger else { return supervisor };
        let same_boot = ledger.boot_id == boot_id;
        supervisor.epoch = ledger.epoch;
        supervisor.attempt = ledger.attempt;
        supervisor.ports = narrow(&ledger.ports);
        supervisor.pick_ports = ledger.pick_ports;
        supervisor.last_exit = ledger.last_exit.clone();
        supervisor.notes.clone_from(&ledger.notes);
        supervisor.ends.clone_from(&ledger.ends);
        supervisor.last_note = ledger.last_note.max(ledger.notes.last().map_or(0, |note| note.number));
        supervisor.memory = RestartMemory {
            restarts: ledger.restarts,
            step: ledger.backoff_step,
            window: ledger.restart_boottime_ns.iter().copied().map(Monotonic).collect(),
            exec_failures: ledger.exec_failures,
        };
        if !same_boot {
            supervisor.memory.rebase(now);
        }
        supervisor.ran = ledger.ran.clone().map(Box::new);
        supervisor.post_start_open = ledger.post_start_open && same_boot;
        if ledger.post_stop_owed || (!same_boot && came_to_something(ledger.phase())) {
            supervisor.post_stop = PostStop::Owed;
        }
        let recalled = if same_boot { recall(ledger, now) } else { recall_other_boot(ledger, now) };
        supervisor.state = State::Pending(Pending { recalled: Box::new(recalled), exit: None });
        supervisor.persisted = Some(ledger.clone());
        supervisor
    }

    /// The hub names it no longer, and what its end takes is to be known until then: whole when it has hooks, else who it
    /// is, how it is stopped, and what it needs.
    fn remembered_when_forgotten(&self) -> Option<pb::WantedInstance> {
        let manifest = self.wanted.manifest.as_ref().filter(|_| self.forget)?;
        if manifest.hooks.is_some() {
            return Some(self.wanted.clone());
        }
        let manifest = pb::Manifest {
            name: manifest.name.clone(),
            needs: manifest.needs.clone(),
            stop: manifest.stop,
            ..pb::Manifest::default()
        };
        let pb::WantedInstance { instance_id, epoch, version, ordinal, desired, uid, .. } = self.wanted;
        let manifest = Some(manifest);
        Some(pb::WantedInstance {
            instance_id,
            epoch,
            version,
            ordinal,
            desired,
            uid,
            manifest,
            ..Default::default()
        })
    }

    /// The record as it should be on disk now.
    #[must_use]
    pub fn ledger(&self) -> pb::InstanceLedger {
        let mut ledger = pb::InstanceLedger {
            instance_id: self.instance.0,
            epoch: self.epoch,
            attempt: self.attempt,
            restarts: self.memory.restarts,
            backoff_step: self.memory.step,
            restart_boottime_ns: self.memory.window.iter().map(|at| at.as_nanos()).collect(),
            boot_id: self.boot_id.clone(),
            ports: widen(&self.ports),
            last_exit: self.last_exit.clone(),
            last_exit_sequence: self.last_exit.as_ref().map_or(0, |exit| exit.sequence),
            exec_failures: self.memory.exec_failures,
            pick_ports: self.pick_ports,
            notes: self.notes.clone(),
            ends: self.ends.clone(),
            last_note: self.last_note,
            post_start_open: self.post_start_open,
            post_stop_owed: self.post_stop != PostStop::Nothing,
            forgotten: self.remembered_when_forgotten(),
            ran: self.ran.as_deref().cloned(),
            ..pb::InstanceLedger::default()
        };
        write_state(&self.state, &mut ledger);
        ledger
    }
}

fn write_state(state: &State, ledger: &mut pb::InstanceLedger) {
    let phase = match state {
        State::Pending(pending) => return write_state(&pending.recalled, ledger),
        State::Starting(Starting::PickingPorts) => Phase::Pending,
        State::Starting(Starting::Preparing { .. }) => Phase::Preparing,
        State::Starting(Starting::PreStart { .. }) => Phase::PreStart,
        State::Starting(Starting::Spawning) => Phase::Starting,
        State::Running(running) => {
            write_running(running, ledger);
            Phase::Running
        }
        State::BackingOff { until, why } => {
            ledger.next_start_boottime_ns = until.as_nanos();
            ledger.reason.clone_from(why);
            Phase::BackingOff
        }
        State::Stopping(stopping) => {
            write_running(&stopping.running, ledger);
            write_stopping(stopping, ledger);
            Phase::Stopping
        }
        State::Exited { why } => {
            ledger.reason.clone_from(why);
            Phase::Exited
        }
        State::Failed { reason } => {
            ledger.reason.clone_from(reason);
            ledger.failed = true;
            Phase::Failed
        }
        // Not `Exited`, which is for good: should it be wanted again, it is to run again.
        State::Gone => Phase::Pending,
    };
    ledger.set_phase(phase);
}

fn write_running(running: &Running, ledger: &mut pb::InstanceLedger) {
    ledger.process = Some(running.process.clone());
    ledger.started_unix_ns = running.started_unix_ns;
    ledger.since_boottime_ns = running.since.as_nanos();
    running.health.write(ledger);
}

fn write_stopping(stopping: &Stopping, ledger: &mut pb::InstanceLedger) {
    ledger.stop_kill_boottime_ns = stopping.kill_at.as_nanos();
    ledger.stop_signal = stopping.signal;
    ledger.set_stop_scope(match stopping.scope {
        SignalScope::Process | SignalScope::Cgroup => pb::StopScope::Process,
        SignalScope::Group => pb::StopScope::Group,
    });
    ledger.stop_began_boottime_ns = stopping.began.as_nanos();
    ledger.stop_asked_boottime_ns = stopping.asked.as_nanos();
    match &stopping.cause {
        StopCause::Told => {}
        StopCause::Lease => LEASE_OVER.clone_into(&mut ledger.stop_reason),
        StopCause::Probe(reason) | StopCause::Watchdog(reason) => ledger.stop_reason.clone_from(reason),
    }
    match stopping.step {
        StopStep::Draining(drain) => ledger.stop_drain_boottime_ns = drain.until.as_nanos(),
        StopStep::PreStop { .. } => {}
        StopStep::Terminating { delivered } => ledger.stop_signalled = delivered,
        StopStep::Killing { tries, .. } => {
            ledger.stop_signalled = true;
            ledger.kill_tries = tries;
        }
    }
}

/// The state of a record written since the machine booted.
fn recall(ledger: &pb::InstanceLedger, now: Monotonic) -> State {
    match ledger.phase() {
        Phase::Unspecified | Phase::Pending => State::due(now),
        Phase::Preparing => State::Starting(Starting::Preparing { ending: false }),
        Phase::PreStart => State::Starting(Starting::PreStart { ending: false }),
        Phase::Starting => State::Starting(Starting::Spawning),
        Phase::Running => State::Running(recall_running(ledger)),
        Phase::BackingOff => {
            State::BackingOff { until: Monotonic(ledger.next_start_boottime_ns), why: ledger.reason.clone() }
        }
        Phase::Stopping => State::Stopping(recall_stopping(ledger, now)),
        Phase::Exited => State::Exited { why: ledger.reason.clone() },
        Phase::Failed => State::Failed { reason: ledger.reason.clone() },
    }
}

/// Whether the attempt had a hook or a process, which a reboot has ended.
fn came_to_something(phase: Phase) -> bool {
    match phase {
        Phase::PreStart | Phase::Starting | Phase::Running | Phase::Stopping => true,
        Phase::Unspecified
        | Phase::Pending
        | Phase::Preparing
        | Phase::BackingOff
        | Phase::Exited
        | Phase::Failed => false,
    }
}

/// Every process ended with its boot, by no fault of its own: it is due at once. A back-off is served in full from
/// now, since how much of it had passed is not known.
fn recall_other_boot(ledger: &pb::InstanceLedger, now: Monotonic) -> State {
    match ledger.phase() {
        Phase::Unspecified
        | Phase::Pending
        | Phase::Preparing
        | Phase::PreStart
        | Phase::Starting
        | Phase::Running
        | Phase::Stopping => State::due(now),
        Phase::BackingOff => {
            // `step` is the next wait's; the one under way is the one before. 1: a restart at once.
            let wait = match ledger.backoff_step {
                0 | 1 => Duration::ZERO,
                step => backoff(step - 1),
            };
            State::BackingOff { until: now + wait, why: ledger.reason.clone() }
        }
        Phase::Exited => State::Exited { why: ledger.reason.clone() },
        Phase::Failed => State::Failed { reason: ledger.reason.clone() },
    }
}

fn recall_running(ledger: &pb::InstanceLedger) -> Running {
    Running {
        process: ledger.process.clone().unwrap_or_default(),
        started_unix_ns: ledger.started_unix_ns,
        since: Monotonic(ledger.since_boottime_ns),
        health: Health::recall(ledger),
    }
}

fn recall_stopping(ledger: &pb::InstanceLedger, now: Monotonic) -> Stopping {
    let step = match (ledger.stop_signalled, ledger.kill_tries) {
        (false, _) => StopStep::Draining(recall_drain(ledger, now)),
        (true, 0) => StopStep::Terminating { delivered: true },
        (true, tries) => StopStep::Killing { tries, next: now },
    };
    let cause = match ledger.stop_reason.as_str() {
        "" => StopCause::Told,
        LEASE_OVER => StopCause::Lease,
        why if why.starts_with(WATCHDOG_SILENT) => StopCause::Watchdog(why.to_owned()),
        why => StopCause::Probe(why.to_owned()),
    };
    Stopping {
        running: recall_running(ledger),
        cause,
        signal: if ledger.stop_signal > 0 { ledger.stop_signal } else { super::stop::SIGTERM },
        scope: super::stop::scope(ledger.stop_scope()),
        step,
        kill_at: Monotonic(ledger.stop_kill_boottime_ns),
        began: noted(ledger.stop_began_boottime_ns).unwrap_or(now),
        asked: noted(ledger.stop_asked_boottime_ns).or(noted(ledger.stop_began_boottime_ns)).unwrap_or(now),
    }
}

pub(super) fn noted(boottime_ns: i64) -> Option<Monotonic> {
    Some(boottime_ns).filter(|&ns| ns != 0).map(Monotonic)
}

/// Whether the callers have left is not known any more; the rest of their time is theirs.
fn recall_drain(ledger: &pb::InstanceLedger, now: Monotonic) -> Drain {
    let until = noted(ledger.stop_drain_boottime_ns);
    let began = noted(ledger.stop_began_boottime_ns);
    let Some((until, began)) = until.zip(began).filter(|(until, began)| until > began) else {
        return Drain::over(now);
    };
    Drain { callers_left: false, callers_until: until.min(began + DRAIN_WAIT), in_flight: 0, until }
}

/// Ports as the messages carry them.
pub(super) fn widen(ports: &Ports) -> std::collections::BTreeMap<String, u32> {
    ports.iter().map(|(name, &port)| (name.clone(), u32::from(port))).collect()
}

/// Ports as we keep them; what is no port is left out, and picked anew.
fn narrow(ports: &std::collections::BTreeMap<String, u32>) -> Ports {
    ports.iter().filter_map(|(name, &port)| Some((name.clone(), u16::try_from(port).ok()?))).collect()
}

/// As [`unwanted`], of an instance that was wanted until `before`: it is stopped as its manifest says.
#[must_use]
pub fn forgotten(
    instance: InstanceId,
    ledger: &pb::InstanceLedger,
    before: Option<pb::WantedInstance>,
) -> pb::WantedInstance {
    let known = before.or_else(|| ledger.forgotten.clone()).unwrap_or_default();
    pb::WantedInstance {
        manifest: known.manifest,
        uid: known.uid,
        ordinal: known.ordinal,
        version: known.version,
        ..unwanted(instance, ledger.epoch)
    }
}

/// What little can be said of an instance that is only in the ledger or only with the keeper: stop and forget it.
#[must_use]
pub fn unwanted(instance: InstanceId, epoch: u64) -> pb::WantedInstance {
    pb::WantedInstance {
        instance_id: instance.0,
        epoch,
        desired: pb::Desired::Stop.into(),
        ..pb::WantedInstance::default()
    }
}
