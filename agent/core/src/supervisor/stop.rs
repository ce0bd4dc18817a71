//! The stop ladder (orchestration.md 4.14): draining, stop signal, grace, SIGKILL, cgroup kill, and again with
//! back-off, loudly, for as long as it takes. It ends with the real exit, never with the request. Beside it the
//! sweep: whatever an ended process left in its cgroup is killed before anything else is started there.

use std::time::Duration;

use nave_proto::pb;

use super::action::{Action, Level, SignalScope};
use super::input::{ProcessKey, SignalError};
use super::restart::signal_name;
use super::state::{Drain, Running, State, StopCause, StopStep, Stopping};
use super::{Goal, Supervisor};
use crate::monotonic::Monotonic;

/// How long callers' agents get to acknowledge that an endpoint drains. They do within milliseconds; one that is cut off
/// is not waited for longer, since what it sends here is handed on.
pub const DRAIN_WAIT: Duration = Duration::from_secs(2);
/// How long calls under way get, unless the manifest says otherwise.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
pub const GRACE: Duration = Duration::from_secs(10);
/// From SIGKILL of the process and its group to that of the cgroup.
pub const KILL_WAIT: Duration = Duration::from_secs(15);
/// How long one stays for others that need it and stop too. Each of those ends in the time its own stop takes, 40 s
/// unless the manifest says otherwise; this is for some in a row.
pub const NEEDED_WAIT: Duration = Duration::from_secs(300);
const KILL_RETRY_FIRST: Duration = Duration::from_secs(5);
const KILL_RETRY_MAX: Duration = Duration::from_secs(120);
/// SIGKILLs after which it is a matter for a person.
const KILL_TRIES_QUIET: u32 = 5;

const SIGABRT: i32 = 6;
const SIGKILL: i32 = 9;
pub(super) const SIGTERM: i32 = 15;
const SIGCONT: i32 = 18;

/// Processes left in the cgroup of one that ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sweep {
    pub tries: u32,
    pub next: Monotonic,
}

/// 5 s, 20 s, 80 s, then every 120 s.
fn retry_after(tries: u32) -> Duration {
    let quadruplings = tries.saturating_sub(1).min(4);
    (KILL_RETRY_FIRST * 4_u32.pow(quadruplings)).min(KILL_RETRY_MAX)
}

/// What the manifest says of a stop, or the defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rules {
    pub(super) signal: i32,
    pub(super) scope: SignalScope,
    pub(super) grace: Duration,
}

pub(super) fn rules(manifest: Option<&pb::Manifest>) -> Rules {
    let stop = manifest.and_then(|manifest| manifest.stop.as_ref());
    let signal = stop.map_or(0, |stop| stop.signal);
    let grace = stop.and_then(|stop| stop.grace.as_ref());
    Rules {
        signal: if signal > 0 { signal } else { SIGTERM },
        scope: scope(stop.map_or(pb::StopScope::Process, pb::Stop::scope)),
        grace: grace.map_or(GRACE, |grace| Duration::try_from(*grace).unwrap_or_default()),
    }
}

pub(super) const fn scope(scope: pb::StopScope) -> SignalScope {
    match scope {
        pb::StopScope::Process => SignalScope::Process,
        pb::StopScope::Group => SignalScope::Group,
    }
}

/// The manifest's `stop.drain_timeout`, or the default.
fn drain_timeout(manifest: &pb::Manifest) -> Duration {
    let given = manifest.stop.as_ref().and_then(|stop| stop.drain_timeout.as_ref());
    given.map_or(DRAIN_TIMEOUT, |given| Duration::try_from(*given).unwrap_or_default())
}

impl Supervisor {
    /// What a stop waits for: the callers of what was ready until now, when the hub has told them that it drains. What is
    /// sick, placed anew or without a lease has none to wait for.
    fn drain(&self, now: Monotonic, running: &Running, cause: &StopCause) -> Drain {
        let told = *cause == StopCause::Told && self.goal() == Goal::Stop && !self.forget;
        let manifest = self.wanted.manifest.as_ref().filter(|manifest| !manifest.ports.is_empty());
        let Some(manifest) = manifest.filter(|_| told && running.health.ready_since.is_some()) else {
            return Drain::over(now);
        };
        let timeout = drain_timeout(manifest);
        Drain {
            callers_left: false,
            callers_until: now + DRAIN_WAIT.min(timeout),
            in_flight: 0,
            until: now + timeout,
        }
    }

    /// It is about to be told to stop, and does not begin before [`Supervisor::go_at_last`].
    pub(crate) fn stay_for_others(&mut self, now: Monotonic) {
        self.needed_until.get_or_insert(now + NEEDED_WAIT);
    }

    /// Nobody needs it any longer.
    pub(crate) fn go_at_last(&mut self) {
        self.needed_until = None;
    }

    /// Its stop is not begun yet. One that must not run twice does not stay beyond its lease.
    pub(super) fn stays_for_others(&self, now: Monotonic) -> bool {
        self.needed_until.is_some_and(|until| now < until) && !self.has_lost_lease(now)
    }

    /// A process of it runs or is about to, for all that is known, and will end when told.
    pub(crate) fn may_run(&self) -> bool {
        match &self.state {
            State::Stopping(stopping) => stuck(stopping).is_none(),
            State::Pending(_) | State::Starting(_) | State::Running(_) => true,
            State::BackingOff { .. } | State::Exited { .. } | State::Failed { .. } | State::Gone => false,
        }
    }

    /// Every agent that may call it has taken it out of its choice.
    pub(super) fn callers_left(&mut self) {
        if let State::Stopping(Stopping { step: StopStep::Draining(drain), .. }) = &mut self.state {
            drain.callers_left = true;
        }
    }

    /// So many calls to it are under way.
    pub(super) fn in_flight(&mut self, count: u64) {
        if let State::Stopping(Stopping { step: StopStep::Draining(drain), .. }) = &mut self.state {
            drain.in_flight = count;
        }
    }

    /// Whether its stop waits for calls to end.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        matches!(&self.state, State::Stopping(Stopping { step: StopStep::Draining(_), .. }))
    }

    /// The first rung. The deadline of the last is fixed, and stored, before any signal.
    pub(super) fn begin_stop(
        &mut self,
        now: Monotonic,
        running: Running,
        cause: StopCause,
        out: &mut Vec<Action>,
    ) {
        let Rules { signal, scope, grace } = rules(self.wanted.manifest.as_ref());
        let (signal, scope) = match cause {
            // So that there is a core to read, and one.
            StopCause::Watchdog(_) => (SIGABRT, SignalScope::Process),
            StopCause::Told | StopCause::Lease | StopCause::Probe(_) => (signal, scope),
        };
        let drain = self.drain(now, &running, &cause);
        self.state = State::Stopping(Stopping {
            running,
            cause,
            signal,
            scope,
            step: StopStep::Draining(drain),
            kill_at: drain.until + grace,
            began: now,
            asked: now,
        });
        out.push(Action::StopProbes);
        self.end_post_start(out);
        self.publish_report(out);
        self.persist(out);
    }

    /// Climbs as far as the time allows.
    pub(super) fn climb(&mut self, now: Monotonic, out: &mut Vec<Action>) {
        loop {
            let key = self.key();
            let hub = self.signal_cause();
            // One that must not run twice is not kept for its callers.
            let hurries = self.has_lost_lease(now);
            let Rules { grace, .. } = rules(self.wanted.manifest.as_ref());
            let State::Stopping(stopping) = &mut self.state else { return };
            match stopping.step {
                StopStep::Draining(drain) if drain.holds(now) && !hurries => return,
                StopStep::PreStop { until } if now < until => return,
                StopStep::Draining(_) => {
                    // Sooner than was written down at first, when the callers left sooner.
                    stopping.kill_at = stopping.kill_at.min(now + grace);
                    stopping.asked = now;
                    if self.pre_stop(now, out) {
                        return;
                    }
                    self.terminate(out);
                }
                StopStep::PreStop { until } => {
                    let had = until.since(stopping.asked);
                    self.pre_stop_timed_out(had, out);
                    self.terminate(out);
                }
                StopStep::Terminating { .. } if now < stopping.kill_at => return,
                StopStep::Terminating { .. } => stopping.step = StopStep::Killing { tries: 0, next: now },
                StopStep::Killing { next, .. } if now < next => return,
                StopStep::Killing { tries, .. } => {
                    let signal = stopping.signal;
                    let wait = if tries == 0 { KILL_WAIT } else { retry_after(tries) };
                    stopping.step = StopStep::Killing { tries: tries.saturating_add(1), next: now + wait };
                    kill(key, tries, signal, hub, out);
                }
            }
        }
    }

    /// The rung of the stop signal.
    pub(super) fn terminate(&mut self, out: &mut Vec<Action>) {
        let (key, cause) = (self.key(), self.signal_cause());
        let State::Stopping(stopping) = &mut self.state else { return };
        stopping.step = StopStep::Terminating { delivered: true };
        out.push(signal_process(key, stopping.signal, stopping.scope, cause));
        // A stopped process would not see the signal.
        out.push(signal_process(key, SIGCONT, stopping.scope, pb::ExitCause::Unspecified));
    }

    fn signal_cause(&self) -> pb::ExitCause {
        match &self.state {
            State::Stopping(Stopping { cause: StopCause::Probe(_), .. }) => pb::ExitCause::Probe,
            State::Stopping(Stopping { cause: StopCause::Watchdog(_), .. }) => pb::ExitCause::Watchdog,
            State::Stopping(_) if self.goal() == Goal::Rest => pb::ExitCause::Operator,
            State::Stopping(_)
            | State::Pending(_)
            | State::Starting(_)
            | State::Running(_)
            | State::BackingOff { .. }
            | State::Exited { .. }
            | State::Failed { .. }
            | State::Gone => pb::ExitCause::Hub,
        }
    }

    /// A signal was not delivered. The ladder's next rung is the retry; what the keeper does not know needs its list,
    /// and a stop signal it never got goes out again once it is back.
    pub(super) fn signal_failed(
        &mut self,
        key: ProcessKey,
        signal: i32,
        error: SignalError,
        out: &mut Vec<Action>,
    ) {
        if key != self.key() {
            return;
        }
        match (error, &mut self.state) {
            (SignalError::Gone, State::Running(_) | State::Stopping(_)) => out.push(Action::ListProcesses),
            (SignalError::Unavailable, State::Stopping(stopping)) if signal == stopping.signal => {
                if let StopStep::Terminating { delivered } = &mut stopping.step {
                    *delivered = false;
                }
            }
            (
                SignalError::Gone | SignalError::Unavailable | SignalError::System,
                State::Pending(_)
                | State::Starting(_)
                | State::Running(_)
                | State::Stopping(_)
                | State::BackingOff { .. }
                | State::Exited { .. }
                | State::Failed { .. }
                | State::Gone,
            ) => {}
        }
    }

    /// Kills what is left beside a process that is not, or no longer, ours to keep.
    pub(super) fn sweep(&mut self, now: Monotonic, key: ProcessKey, out: &mut Vec<Action>) {
        self.sweeps.insert(key, Sweep { tries: 1, next: now + retry_after(1) });
        out.push(Action::SweepCgroup { key });
    }

    /// Sweeps that nobody has answered in time are ordered again.
    pub(super) fn sweep_again(&mut self, now: Monotonic, out: &mut Vec<Action>) {
        for (&key, sweep) in &mut self.sweeps {
            if now < sweep.next {
                continue;
            }
            sweep.tries = sweep.tries.saturating_add(1);
            sweep.next = now + retry_after(sweep.tries);
            out.push(Action::SweepCgroup { key });
            if sweep.tries == KILL_TRIES_QUIET {
                let message =
                    "processes left in the cgroup do not die from SIGKILL; nothing is started until \
                               they have ended"
                        .to_owned();
                out.push(Action::Log { level: Level::Error, message });
            }
        }
    }

    /// A second process of the instance, which must not be: killed without ceremony.
    pub(super) fn kill_duplicate(&mut self, now: Monotonic, key: ProcessKey, out: &mut Vec<Action>) {
        let message =
            format!("found another process of this instance (epoch {}, attempt {})", key.epoch, key.attempt);
        out.push(Action::Log { level: Level::Warn, message: format!("{message}; it is killed") });
        out.push(signal_process(key, SIGKILL, SignalScope::Process, pb::ExitCause::Hub));
        if key.epoch != self.epoch || self.state.process().is_none() {
            self.sweep(now, key, out);
        }
    }
}

/// What was done to end a process that has ended, rung by rung, after its name.
pub(super) fn ladder(stopping: &Stopping, now: Monotonic) -> String {
    let signal = match stopping.scope {
        SignalScope::Process | SignalScope::Cgroup => signal_name(stopping.signal),
        SignalScope::Group => format!("{} with its process group", signal_name(stopping.signal)),
    };
    let took = |since: Monotonic| human_ms(now.since(since));
    match stopping.step {
        StopStep::Draining(_) | StopStep::PreStop { .. } => {
            "ended by itself before its stop signal".to_owned()
        }
        StopStep::Terminating { .. } => format!("was sent {signal} and ended after {}", took(stopping.asked)),
        StopStep::Killing { tries, .. } => {
            let grace = human_ms(stopping.kill_at.since(stopping.asked));
            let kills = match tries {
                0 | 1 => "SIGKILL with its process group".to_owned(),
                2 => "SIGKILL with its process group, then with its cgroup".to_owned(),
                _ => format!("SIGKILL {tries} times, the last ones with its cgroup"),
            };
            let took = took(stopping.kill_at);
            format!("was sent {signal}, had not ended after {grace}, was sent {kills} and ended {took} later")
        }
    }
}

/// How far a stop has come, and why it takes so long, when it does.
pub(super) fn progress(stopping: &Stopping) -> String {
    let signal = signal_name(stopping.signal);
    let grace = human_ms(stopping.kill_at.since(stopping.asked));
    match stopping.step {
        StopStep::Draining(Drain { in_flight: 0, .. }) => String::new(),
        StopStep::Draining(_) => "waits for calls under way to end before its stop signal".to_owned(),
        StopStep::PreStop { .. } => "runs its pre_stop hook".to_owned(),
        StopStep::Terminating { .. } => format!("was sent {signal} and has {grace} to end"),
        StopStep::Killing { .. } => stuck(stopping)
            .unwrap_or_else(|| format!("did not end after {signal} within {grace} and was sent SIGKILL")),
    }
}

pub(super) fn human_ms(duration: Duration) -> String {
    nave_proto::time::format_duration(Duration::from_millis(
        u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
    ))
}

/// Why a stop takes so long, when it does.
pub(super) fn stuck(stopping: &Stopping) -> Option<String> {
    match stopping.step {
        StopStep::Killing { tries, .. } if tries > 1 => Some(format!(
            "pid {} does not die from SIGKILL, sent {tries} times",
            stopping.running.process.pid
        )),
        StopStep::Killing { .. }
        | StopStep::Draining(_)
        | StopStep::PreStop { .. }
        | StopStep::Terminating { .. } => None,
    }
}

/// One turn of the last rung: the process and its group first, the cgroup from the second time on.
fn kill(key: ProcessKey, tries: u32, stop_signal: i32, cause: pb::ExitCause, out: &mut Vec<Action>) {
    let scopes: &[SignalScope] = if tries == 0 {
        &[SignalScope::Process, SignalScope::Group]
    } else {
        &[SignalScope::Process, SignalScope::Cgroup]
    };
    for &scope in scopes {
        out.push(signal_process(key, SIGKILL, scope, cause));
    }
    if tries == 0 {
        let message = format!("not ended by {} within its grace; SIGKILL", signal_name(stop_signal));
        out.push(Action::Log { level: Level::Warn, message });
    }
    if tries == KILL_TRIES_QUIET {
        let message =
            "cannot be killed: SIGKILL has no effect, most likely it hangs in the kernel (see its state \
                       and stack in /proc)"
                .to_owned();
        out.push(Action::Log { level: Level::Error, message });
    }
}

fn signal_process(key: ProcessKey, signal: i32, scope: SignalScope, cause: pb::ExitCause) -> Action {
    Action::Signal { key, signal, scope, cause }
}
