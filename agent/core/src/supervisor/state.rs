//! The states of one instance on this host; each owns what exists only then.
//!
//! ```text
//! Pending ──keeper's word──> BackingOff ──due──> Starting ──exec──> Running ──told──> Stopping ──ended──> Gone
//!                                 ^                  │ failed          │ ended           │ (probe: again)
//!                                 └──────────────────┴─────────────────┴─────────────────┘ or Exited, Failed
//! ```

use nave_proto::pb;

use super::action::SignalScope;
use super::health::Health;
use crate::monotonic::Monotonic;

/// Where an instance stands.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// The keeper has not yet said what it runs for us; nothing is started or signalled before.
    Pending(Pending),
    /// A process is being made.
    Starting(Starting),
    /// A process runs.
    Running(Running),
    /// No process; one is started at `until`. `why` the last one ended; empty for a first start.
    BackingOff { until: Monotonic, why: String },
    /// The process is being ended.
    Stopping(Stopping),
    /// It ended, and its restart policy says that this was that.
    Exited { why: String },
    /// Given up.
    Failed { reason: String },
    /// Stopped as told, and cleaned up.
    Gone,
}

impl State {
    /// No process, start at `until`.
    pub(super) const fn due(until: Monotonic) -> Self {
        Self::BackingOff { until, why: String::new() }
    }

    /// The recorded process, if this state has one.
    #[must_use]
    pub fn process(&self) -> Option<&pb::ProcessIdentity> {
        match self {
            Self::Running(running) => Some(&running.process),
            Self::Stopping(stopping) => Some(&stopping.running.process),
            Self::Pending(pending) => pending.recalled.process(),
            Self::Starting(_)
            | Self::BackingOff { .. }
            | Self::Exited { .. }
            | Self::Failed { .. }
            | Self::Gone => None,
        }
    }
}

/// What was true when the ledger was last written, to be confirmed by the keeper.
#[derive(Debug, Clone, PartialEq)]
pub struct Pending {
    pub recalled: Box<State>,
    /// An exit of the current attempt, told before the keeper's list.
    pub exit: Option<Box<pb::ExitRecord>>,
}

/// The steps of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Starting {
    PickingPorts,
    /// What the process needs is fetched and made, where that may take long. `ending`: that is being cut short.
    Preparing {
        ending: bool,
    },
    /// The hook of that name runs. `ending`: it is being killed.
    PreStart {
        ending: bool,
    },
    /// The order is with the keeper; only its answer, an exit record or its list ends this.
    Spawning,
}

/// A process that runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Running {
    pub process: pb::ProcessIdentity,
    pub started_unix_ns: i64,
    /// When it was first seen to run.
    pub since: Monotonic,
    pub health: Health,
}

/// A process that shall end.
#[derive(Debug, Clone, PartialEq)]
pub struct Stopping {
    pub running: Running,
    pub cause: StopCause,
    /// The manifest's stop signal at the moment the stop began.
    pub signal: i32,
    /// Whom it goes to.
    pub scope: SignalScope,
    pub step: StopStep,
    /// When grace ends and SIGKILL begins. Fixed when the stop begins; a restart of the agent does not extend it.
    pub kill_at: Monotonic,
    /// When the stop began.
    pub began: Monotonic,
    /// When its grace began, with its callers gone; the same as `began` before.
    pub asked: Monotonic,
}

/// Who wants it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopCause {
    /// The hub: stopped for good, forgotten, or placed anew.
    Told,
    /// Ourselves, to start it again; the text says what failed.
    Probe(String),
    /// Likewise: its watchdog was silent, or it asked for it.
    Watchdog(String),
    /// Nobody: the host's lease is over, and it may run only under one.
    Lease,
}

/// What a stop waits for before it sends a signal, since many programs stop listening at once when they get one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// All agents that may send calls have taken it out of their choice.
    pub callers_left: bool,
    /// They are not waited for beyond this.
    pub callers_until: Monotonic,
    /// Calls under way, as far as is known.
    pub in_flight: u64,
    /// They are not waited for beyond this. A restart of the agent does not extend it.
    pub until: Monotonic,
}

impl Drain {
    /// Nobody calls it.
    #[must_use]
    pub const fn over(now: Monotonic) -> Self {
        Self { callers_left: true, callers_until: now, in_flight: 0, until: now }
    }

    /// Whether there is something to wait for still.
    #[must_use]
    pub fn holds(&self, now: Monotonic) -> bool {
        (!self.callers_left && now < self.callers_until) || (self.in_flight > 0 && now < self.until)
    }

    /// When that ends by itself. With calls under way the callers alone change nothing.
    #[must_use]
    pub const fn next_wake(&self) -> Monotonic {
        if self.in_flight > 0 { self.until } else { self.callers_until }
    }
}

/// The rungs of the ladder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopStep {
    /// The endpoint is reported as draining; its callers get the time to leave.
    Draining(Drain),
    /// The hook of that name runs, until then at most.
    PreStop { until: Monotonic },
    /// The stop signal is sent, and as far as is known was `delivered`.
    Terminating { delivered: bool },
    /// SIGKILL is sent, `tries` times; again at `next`.
    Killing { tries: u32, next: Monotonic },
}
