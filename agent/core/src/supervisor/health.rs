//! Readiness and liveness of one running process, from probe results and notifications (4.8, 4.9).
//!
//! Ready on the first success, so that a start is quick; unready only after three failures in a row, so that one
//! slow answer moves no traffic. Liveness is slower still, since its cure is a restart.

use std::time::Duration;

use nave_proto::pb;

use super::action::{Action, Level, ProbeOrder};
use super::input::{Notification, ProbeKind, ProbeOutcome, ProcessKey};
use super::state::{State, StopCause};
use crate::monotonic::Monotonic;

/// Failures in a row that make a ready process unready.
pub const READY_FAILURES_MAX: u32 = 3;
/// Failures in a row after which a process is not live.
pub const LIVE_FAILURES_MAX: u32 = 3;
/// Liveness failures this soon after the start do not count.
pub const LIVE_GRACE: Duration = Duration::from_secs(10);
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
    /// It said that it is ending by itself, so no probe makes it ready again.
    leaving: bool,
}

impl Health {
    /// At the start of a process.
    #[must_use]
    pub fn begin(manifest: &pb::Manifest, now: Monotonic) -> Self {
        match probe(manifest, ProbeKind::Ready) {
            None => Self { ready_since: Some(now), ..Self::default() },
            Some(_) => Self { why_not: "not probed yet".to_owned(), ..Self::default() },
        }
    }

    /// As the ledger remembers it.
    #[must_use]
    pub fn recall(ready_since: Option<Monotonic>) -> Self {
        let why_not = if ready_since.is_some() { "" } else { "not probed yet since the agent started" };
        Self { ready_since, why_not: why_not.to_owned(), ..Self::default() }
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

    /// One result of the liveness probe; true when the process must be started again. `since` its start.
    pub fn live_result(
        &mut self,
        now: Monotonic,
        since: Monotonic,
        outcome: &ProbeOutcome,
        interval: Duration,
    ) -> bool {
        match outcome {
            ProbeOutcome::Passed => {
                self.live_bad_since = None;
                false
            }
            ProbeOutcome::Failed(_) if now < since + LIVE_GRACE => false,
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
                self.why_not = "it says that it is stopping".to_owned();
                self.ready_since.take().map(|since| now.since(since))
            }
            Notification::Status(status) => {
                if self.ready_since.is_none() && !self.leaving {
                    self.why_not = format!("it says: {status}");
                }
                None
            }
        }
    }

    /// The manifest changed while the process runs: what was ready stays so until the new probe says otherwise.
    pub fn respecify(&mut self, now: Monotonic, manifest: &pb::Manifest) {
        self.live_bad_since = None;
        self.ready_failures = 0;
        if probe(manifest, ProbeKind::Ready).is_none() && !self.leaving {
            self.why_not.clear();
            self.ready_since.get_or_insert(now);
        }
    }
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

/// Whether the process tells it by itself, so that nobody has to ask.
fn is_said(spec: &pb::Probe) -> bool {
    use pb::probe::Check;
    match spec.check {
        Some(Check::Notify(_) | Check::NotifyFd(_) | Check::Log(_)) => true,
        Some(Check::Http(_) | Check::Tcp(_) | Check::Grpc(_) | Check::Exec(_)) | None => false,
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
                if !running.health.live_result(now, running.since, outcome, interval) {
                    return;
                }
                let why = match outcome {
                    ProbeOutcome::Failed(why) => format!("liveness probe failed: {what}: {why}"),
                    ProbeOutcome::Passed => return,
                };
                out.push(Action::Log { level: Level::Warn, message: why.clone() });
                let running = running.clone();
                self.begin_stop(now, running, StopCause::Probe(why), out);
            }
        }
    }

    pub(super) fn notified(&mut self, now: Monotonic, message: &Notification) {
        let unknown = pb::Manifest::default();
        let manifest = self.wanted.manifest.as_ref().unwrap_or(&unknown);
        if let State::Running(running) = &mut self.state {
            let ended = running.health.notified(now, message, manifest);
            self.memory.was_ready(ended.unwrap_or_default());
        }
    }
}
