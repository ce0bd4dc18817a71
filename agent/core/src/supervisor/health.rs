//! Readiness and liveness of one running process, from probe results and notifications (4.8, 4.9).
//!
//! Ready on the first success, so that a start is quick; unready only after three failures in a row, so that one
//! slow answer moves no traffic. Liveness is slower still, since its cure is a restart.

use std::time::Duration;

use nave_proto::pb;

use super::action::{Action, Level, ProbeOrder};
use super::input::{Notification, ProbeKind, ProbeOutcome, ProcessKey};
use super::lease::needs_lease;
use super::ledger::noted;
use super::state::{State, StopCause};
use crate::monotonic::Monotonic;

/// How the reason of a stop by the watchdog begins, on disk too.
pub(super) const WATCHDOG_SILENT: &str = "watchdog";
/// Failures in a row that make a ready process unready.
pub const READY_FAILURES_MAX: u32 = 3;
/// Failures in a row after which a process is not live.
pub const LIVE_FAILURES_MAX: u32 = 3;
/// Liveness failures this soon after the start do not count, unless the manifest says otherwise.
pub const LIVE_GRACE: Duration = Duration::from_secs(10);
/// The most that a process may ask for at a time; it can ask again.
const EXTENSION_MAX: Duration = Duration::from_secs(600);
const IS_LEAVING: &str = "it says that it is stopping";
/// How long a process that is not live waits for its turn when nothing is heard of the hub.
pub(super) const TURN_WAIT: Duration = Duration::from_secs(10);
/// For so long one that acts alone lets others of its host go first: by then they are ready or will not be.
const OTHERS_WAIT: Duration = Duration::from_secs(120);
const INTERVAL: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_millis(500);

/// What is known of a running process's health.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Health {
    /// Since when it has been ready without a break; `None`: it is not.
    pub ready_since: Option<Monotonic>,
    /// Why it is not ready; may be empty before the first result.
    pub why_not: String,
    ready_failures: u32,
    live_bad_since: Option<Monotonic>,
    /// Until when it must have fed its watchdog, when it has one and can be heard.
    watchdog_at: Option<Monotonic>,
    /// Its watchdog may be silent until then, as it has asked for; nothing once it has fed it since.
    put_off_until: Option<Monotonic>,
    /// Until when failures of liveness do not count; the process may have asked for more time.
    live_grace_until: Option<Monotonic>,
    /// It said that it is ending by itself, so no probe makes it ready again.
    leaving: bool,
    /// It may speak into a socket that has ended: its silence means nothing until it has fed its watchdog once more.
    unheard: bool,
    /// Its liveness has failed, and it is yet to be started again for that.
    pub(super) stuck: Option<Stuck>,
}

/// A process that is not live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stuck {
    pub(super) since: Monotonic,
    pub(super) why: String,
}

impl Health {
    /// At the start of a process.
    #[must_use]
    pub fn begin(manifest: &pb::Manifest, now: Monotonic) -> Self {
        let grace_until = now + start_grace(manifest);
        let begun = Self {
            live_grace_until: Some(grace_until),
            watchdog_at: watchdog(manifest).map(|period| grace_until + period),
            ..Self::default()
        };
        match probe(manifest, ProbeKind::Ready) {
            None => Self { ready_since: Some(now), ..begun },
            Some(probe) => Self { why_not: not_yet(probe, "not probed yet"), ..begun },
        }
    }

    /// When its watchdog will have been silent for too long.
    #[must_use]
    pub fn watchdog_at(&self) -> Option<Monotonic> {
        self.watchdog_at
    }

    /// As the ledger remembers it. Whoever adopts the process has it [respecified](Self::respecify).
    pub(super) fn recall(ledger: &pb::InstanceLedger) -> Self {
        Self {
            ready_since: noted(ledger.ready_since_boottime_ns),
            why_not: if ledger.leaving { IS_LEAVING.to_owned() } else { String::new() },
            put_off_until: noted(ledger.put_off_boottime_ns),
            live_grace_until: noted(ledger.live_grace_boottime_ns),
            leaving: ledger.leaving,
            unheard: ledger.unheard,
            ..Self::default()
        }
    }

    /// What the ledger is to remember. Nothing in it moves with each word that feeds the watchdog: after a restart of the
    /// agent its silence is counted from then on.
    pub(super) fn write(&self, ledger: &mut pb::InstanceLedger) {
        let note = |at: Option<Monotonic>| at.map_or(0, Monotonic::as_nanos);
        ledger.ready_since_boottime_ns = note(self.ready_since);
        ledger.put_off_boottime_ns = note(self.put_off_until);
        ledger.live_grace_boottime_ns = note(self.live_grace_until);
        ledger.leaving = self.leaving;
        ledger.unheard = self.unheard;
    }

    /// One result of the readiness probe. Returns how long it had been ready when this ends it.
    pub fn ready_result(&mut self, now: Monotonic, outcome: &ProbeOutcome, what: &str) -> Option<Duration> {
        match outcome {
            ProbeOutcome::Passed if self.leaving => None,
            ProbeOutcome::Passed => {
                self.ready_failures = 0;
                self.why_not.clear();
                self.ready_since.get_or_insert(now);
                None
            }
            ProbeOutcome::Failed(why) => {
                self.ready_failures = self.ready_failures.saturating_add(1);
                if self.ready_since.is_some() && self.ready_failures < READY_FAILURES_MAX {
                    return None;
                }
                if !self.leaving {
                    self.why_not = format!("{what}: {why}");
                }
                self.ready_since.take().map(|since| now.since(since))
            }
        }
    }

    /// One result of the liveness probe; true when the process must be started again. Failures before `grace_until`
    /// do not count, nor before the process itself has asked for.
    pub fn live_result(
        &mut self,
        now: Monotonic,
        grace_until: Monotonic,
        outcome: &ProbeOutcome,
        interval: Duration,
    ) -> bool {
        match outcome {
            ProbeOutcome::Passed => {
                self.live_bad_since = None;
                self.stuck = None;
                false
            }
            ProbeOutcome::Failed(_)
                if now < grace_until.max(self.live_grace_until.unwrap_or(grace_until)) =>
            {
                false
            }
            ProbeOutcome::Failed(_) => {
                let first = *self.live_bad_since.get_or_insert(now);
                now >= first + interval * (LIVE_FAILURES_MAX - 1)
            }
        }
    }

    /// What the process says of itself. Returns how long it had been ready when this ends it.
    pub fn notified(
        &mut self,
        now: Monotonic,
        message: &Notification,
        manifest: &pb::Manifest,
    ) -> Option<Duration> {
        match message {
            Notification::Ready => {
                let by_notify = probe(manifest, ProbeKind::Ready).is_some_and(is_said);
                if by_notify && !self.leaving {
                    self.why_not.clear();
                    self.ready_since.get_or_insert(now);
                }
                None
            }
            Notification::Stopping => {
                self.leaving = true;
                self.why_not = IS_LEAVING.to_owned();
                self.ready_since.take().map(|since| now.since(since))
            }
            Notification::Watchdog => {
                self.unheard = false;
                self.put_off_until = None;
                self.watchdog_at = watchdog(manifest).map(|period| now + period);
                None
            }
            Notification::ExtendTimeout(more) => {
                let until = whole_second(now + (*more).min(EXTENSION_MAX));
                self.live_grace_until = self.live_grace_until.max(Some(until));
                self.put_off_until = self.put_off_until.max(Some(until));
                self.watchdog_at = self.watchdog_at.map(|at| at.max(until));
                None
            }
            Notification::Reloading | Notification::WatchdogTrigger | Notification::MainPid(_) => None,
            Notification::Status(status) => {
                if self.ready_since.is_none() && !self.leaving {
                    self.why_not = format!("it says: {status}");
                }
                None
            }
        }
    }

    /// The manifest changed while the process runs, or a new agent has taken it over: what was ready stays so until the
    /// new probe says otherwise. `since` its start.
    pub fn respecify(&mut self, now: Monotonic, since: Monotonic, manifest: &pb::Manifest) {
        self.live_bad_since = None;
        self.stuck = None;
        self.ready_failures = 0;
        let grace_until = since + start_grace(manifest);
        let silent_until =
            |period: Duration| self.put_off_until.unwrap_or(now).max(now.max(grace_until) + period);
        self.watchdog_at = watchdog(manifest).filter(|_| !self.unheard).map(silent_until);
        match probe(manifest, ProbeKind::Ready) {
            None if !self.leaving => {
                self.why_not.clear();
                self.ready_since.get_or_insert(now);
            }
            Some(probe) if self.ready_since.is_none() && self.why_not.is_empty() => {
                self.why_not = not_yet(probe, "not probed yet since the agent started");
            }
            None | Some(_) => {}
        }
    }

    /// The socket that it may speak into has ended, and with it what it said there.
    fn cannot_be_heard(&mut self) {
        self.unheard = true;
        self.watchdog_at = None;
    }
}

/// So that one who asks for a little more time again and again costs a write of the ledger a second, and no more.
fn whole_second(at: Monotonic) -> Monotonic {
    const SECOND_NS: i64 = 1_000_000_000;
    let over = at.as_nanos().rem_euclid(SECOND_NS);
    if over == 0 { at } else { Monotonic(at.as_nanos().saturating_add(SECOND_NS - over)) }
}

/// The probe of a kind, when the manifest asks for one.
pub(super) fn probe(manifest: &pb::Manifest, kind: ProbeKind) -> Option<&pb::Probe> {
    let health = manifest.health.as_ref()?;
    let probe = match kind {
        ProbeKind::Ready => health.ready.as_ref(),
        ProbeKind::Live => health.live.as_ref(),
    };
    probe.filter(|probe| probe.check.is_some())
}

/// The actions that begin probing a process.
pub(super) fn start_probes(
    key: ProcessKey,
    manifest: &pb::Manifest,
    ports: &super::Ports,
    out: &mut Vec<Action>,
) {
    for kind in [ProbeKind::Ready, ProbeKind::Live] {
        let Some(spec) = probe(manifest, kind) else { continue };
        if is_said(spec) {
            continue; // it speaks, nobody asks
        }
        out.push(Action::StartProbe(ProbeOrder {
            key,
            kind,
            spec: spec.clone(),
            port: port(spec, ports),
            interval: interval(spec),
            timeout: super::duration(spec.timeout.as_ref()).unwrap_or(TIMEOUT),
        }));
    }
}

/// How long the watchdog may be silent: as long as any liveness check may fail.
#[must_use]
pub fn watchdog(manifest: &pb::Manifest) -> Option<Duration> {
    let spec = probe(manifest, ProbeKind::Live)?;
    matches!(spec.check, Some(pb::probe::Check::Notify(true))).then(|| interval(spec) * LIVE_FAILURES_MAX)
}

fn start_grace(manifest: &pb::Manifest) -> Duration {
    let given = manifest.health.as_ref().and_then(|health| health.start_grace.as_ref());
    given.map_or(LIVE_GRACE, |grace| Duration::try_from(*grace).unwrap_or(LIVE_GRACE))
}

/// Why a process of which nothing was heard is not ready. `unasked`: where somebody has to ask.
fn not_yet(probe: &pb::Probe, unasked: &str) -> String {
    if is_said(probe) { "has not said yet that it is".to_owned() } else { unasked.to_owned() }
}

/// Whether the process tells it by itself, so that nobody has to ask.
fn is_said(spec: &pb::Probe) -> bool {
    use pb::probe::Check;
    match spec.check {
        Some(Check::Notify(_) | Check::NotifyFd(_)) => true,
        Some(Check::Http(_) | Check::Tcp(_) | Check::Grpc(_) | Check::Exec(_) | Check::Log(_)) | None => {
            false
        }
    }
}

/// The port to probe: the named one, else the only or first.
fn port(spec: &pb::Probe, ports: &super::Ports) -> Option<u16> {
    if spec.port.is_empty() { ports.values().next().copied() } else { ports.get(&spec.port).copied() }
}

pub(super) fn interval(spec: &pb::Probe) -> Duration {
    super::duration(spec.interval.as_ref()).unwrap_or(INTERVAL)
}

/// `http GET / on port 20001`.
#[must_use]
pub(super) fn describe(spec: &pb::Probe, ports: &super::Ports) -> String {
    use pb::probe::Check;
    let port = port(spec, ports).map_or_else(|| "no port".to_owned(), |port| format!("port {port}"));
    match &spec.check {
        Some(Check::Http(path)) => format!("http GET {path} on {port}"),
        Some(Check::Tcp(_)) => format!("tcp connect to {port}"),
        Some(Check::Grpc(_)) => format!("grpc health check on {port}"),
        Some(Check::Exec(exec)) => format!("exec {}", exec.command.join(" ")),
        Some(Check::Notify(_)) => "notify READY=1".to_owned(),
        Some(Check::NotifyFd(number)) => format!("a line on descriptor {number}"),
        Some(Check::Log(pattern)) => format!("a line of output that matches {pattern:?}"),
        None => "probe".to_owned(),
    }
}

impl super::Supervisor {
    pub(super) fn probed(
        &mut self,
        now: Monotonic,
        kind: ProbeKind,
        outcome: &ProbeOutcome,
        out: &mut Vec<Action>,
    ) {
        let State::Running(running) = &mut self.state else { return };
        let Some(spec) = self.wanted.manifest.as_ref().and_then(|manifest| probe(manifest, kind)) else {
            return;
        };
        let what = describe(spec, &self.ports);
        match kind {
            ProbeKind::Ready => {
                let was = running.health.ready_since.is_some();
                let ended = running.health.ready_result(now, outcome, &what);
                if was != running.health.ready_since.is_some() {
                    let message =
                        if was { format!("not ready: {}", running.health.why_not) } else { "ready".into() };
                    out.push(Action::Log { level: if was { Level::Warn } else { Level::Info }, message });
                }
                self.memory.was_ready(ended.unwrap_or_default());
            }
            ProbeKind::Live => {
                let interval = interval(spec);
                let grace_until =
                    running.since + self.wanted.manifest.as_ref().map_or(LIVE_GRACE, start_grace);
                if !running.health.live_result(now, grace_until, outcome, interval) {
                    return;
                }
                let why = match outcome {
                    ProbeOutcome::Failed(why) => format!("liveness probe failed: {what}: {why}"),
                    ProbeOutcome::Passed => return,
                };
                if running.health.stuck.is_none() {
                    out.push(Action::Log { level: Level::Warn, message: why.clone() });
                    running.health.stuck = Some(Stuck { since: now, why });
                }
            }
        }
    }

    pub(super) fn notified(&mut self, now: Monotonic, message: &Notification, out: &mut Vec<Action>) {
        let unknown = pb::Manifest::default();
        let manifest = self.wanted.manifest.as_ref().unwrap_or(&unknown);
        match (&mut self.state, message) {
            (State::Running(running), Notification::WatchdogTrigger) if watchdog(manifest).is_some() => {
                let running = running.clone();
                self.bite(now, running, "it asked for that itself", out);
            }
            (State::Running(_) | State::Stopping(_), Notification::MainPid(pid)) => {
                let message = format!(
                    "its word that pid {pid} is its main process is refused; it has to stay in the foreground"
                );
                out.push(Action::Log { level: Level::Warn, message });
            }
            (State::Running(running), _) => {
                let ended = running.health.notified(now, message, manifest);
                self.memory.was_ready(ended.unwrap_or_default());
            }
            (State::Stopping(stopping), Notification::ExtendTimeout(more)) if !needs_lease(&self.wanted) => {
                stopping.kill_at = stopping.kill_at.max(now + (*more).min(EXTENSION_MAX));
            }
            (
                State::Pending(_)
                | State::Starting(_)
                | State::Stopping(_)
                | State::BackingOff { .. }
                | State::Exited { .. }
                | State::Failed { .. }
                | State::Gone,
                _,
            ) => {}
        }
    }

    /// It may speak into a socket that ended with agent and keeper: it is not ended for that.
    pub(super) fn unheard(&mut self, out: &mut Vec<Action>) {
        let State::Running(running) = &mut self.state else { return };
        if running.health.unheard {
            return;
        }
        running.health.cannot_be_heard();
        let message = "the socket that it says into how it is has ended, and there is a new one; its watchdog \
                       waits for its next WATCHDOG=1";
        out.push(Action::Log { level: Level::Warn, message: message.to_owned() });
    }

    /// Why the process has to be started again now: it is not live, and its turn has come. The hub gives the turns, so
    /// that what befalls all instances at once does not take all of them down; while it is away, we do not wait long.
    pub(super) fn restart_is_due(&self, now: Monotonic) -> Option<String> {
        let State::Running(running) = &self.state else { return None };
        let stuck = running.health.stuck.as_ref()?;
        let granted = !self.wanted.grants_restarts || self.wanted.restart_granted == self.attempt;
        (granted || self.acts_alone_at(stuck) <= now).then(|| stuck.why.clone())
    }

    fn acts_alone_at(&self, stuck: &Stuck) -> Monotonic {
        let waited = stuck.since + TURN_WAIT;
        let waited = self.lease.map_or(waited, |until| waited.max(until));
        let at_last = stuck.since + OTHERS_WAIT;
        self.others_turn_until.map_or(waited, |until| waited.max(until.min(at_last)))
    }

    /// Its liveness has failed, and nobody has said that it may be restarted.
    pub(crate) fn waits_for_turn(&self) -> bool {
        let State::Running(running) = &self.state else { return false };
        let granted = !self.wanted.grants_restarts || self.wanted.restart_granted == self.attempt;
        running.health.stuck.is_some() && !granted
    }

    /// So many others of its service are down on this host that it does not act alone; looked at again then.
    pub(crate) fn lets_others_go_first(&mut self, until: Option<Monotonic>) {
        self.others_turn_until = until;
    }

    /// Its slot is without a process that does its work, or was when this began.
    pub(crate) fn is_down(&self) -> bool {
        match &self.state {
            State::Running(running) => running.health.stuck.is_none() && running.health.ready_since.is_none(),
            State::Starting(_) | State::BackingOff { .. } | State::Stopping(_) => true,
            State::Pending(_) | State::Exited { .. } | State::Failed { .. } | State::Gone => false,
        }
    }

    pub(super) fn restart_due_at(&self) -> Option<Monotonic> {
        let State::Running(running) = &self.state else { return None };
        running.health.stuck.as_ref().map(|stuck| self.acts_alone_at(stuck))
    }

    /// Its watchdog has been silent for too long: ended in a way that leaves a core to read, and started again.
    pub(super) fn bite(&mut self, now: Monotonic, running: super::Running, why: &str, out: &mut Vec<Action>) {
        let why = format!("{WATCHDOG_SILENT}: {why}");
        out.push(Action::Log { level: Level::Warn, message: why.clone() });
        self.begin_stop(now, running, StopCause::Watchdog(why), out);
    }
}
