//! What a supervisor wants done. The shell performs actions in the order given and feeds results back as inputs.
//! The order is part of the contract: a `Persist` that stands before a `Spawn` or a `Signal` must be durable first,
//! else a restart of the agent repeats or forgets what it did; and one that stands after them says that they are done,
//! so it must not be durable before. Several records may share one write as long as no `Persist` overtakes an earlier
//! action of its own instance.

use std::collections::BTreeMap;

use nave_proto::pb;

use super::hooks::{Hook, HookOrder};
use super::input::{ProbeKind, ProcessKey};
use crate::monotonic::Monotonic;

/// One thing to do for one instance.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Find ports; answered by `Input::PortsPicked` or `Input::PortClash`. Fixed ones are only checked.
    PickPorts { fixed: BTreeMap<String, u16>, dynamic: Vec<String> },
    /// Fetch and make what the attempt needs, to which a [`Action::Spawn`] of the same key follows; answered by
    /// `Input::Prepared`, with `Input::NamesUnknown` before when there are such.
    Prepare(Box<SpawnOrder>),
    /// Cut that short; it is answered at once.
    CancelPreparation { key: ProcessKey },
    /// Fetch this and keep it for a start that comes, in place of what was ordered so before; answered by
    /// `Input::Fetched`, unless another order or [`Action::CancelFetch`] comes first.
    FetchAhead(Box<pb::FetchOrder>),
    /// Cut that short, or keep what it has fetched no longer.
    CancelFetch,
    /// Run a command of the manifest, once whatever is left of an earlier one is killed; answered by
    /// `Input::HookEnded`, when it has ended or was killed at its time-out, with all that it started.
    RunHook(Box<HookOrder>),
    /// Kill it; also one that an agent before us has started. Answered by `Input::HookEnded`.
    EndHook { key: ProcessKey, hook: Hook },
    /// Start the process; answered by `Input::Spawned`, `Input::SpawnFailed`, or `Input::Exited` alone.
    Spawn(Box<SpawnOrder>),
    /// Send a signal through the keeper, which checks that the process is ours. Failure: `Input::SignalFailed`.
    Signal { key: ProcessKey, signal: i32, scope: SignalScope, cause: pb::ExitCause },
    /// The keeper ends the process when this passes, whatever has become of us. Moves on with each lease.
    SetDeadline { key: ProcessKey, deadline: Deadline },
    /// SIGKILL whatever is left in the cgroup of an ended process, and say `Input::CgroupEmpty` when nothing is
    /// left, at once when nothing was or when there is no cgroup. Repeated when no answer comes.
    SweepCgroup { key: ProcessKey },
    /// Give the process's cgroup these limits, as far as it does not have them; answered by `Input::LimitsSet`.
    SetLimits { key: ProcessKey, resources: pb::Resources },
    /// Probe again and again from now on, replacing a running probe of that kind; each gives `Input::ProbeResult`.
    StartProbe(ProbeOrder),
    /// End all probes of the instance.
    StopProbes,
    /// Ask the keeper for its list and give it to `Reconciler::keeper_processes`: it disagrees with us.
    ListProcesses,
    /// Replace the instance's record in the ledger.
    Persist(Box<pb::InstanceLedger>),
    /// Remove what one placement left behind (`keeper.Forget`: cgroup directories, FIFOs). Retrying is the shell's.
    Forget { epoch: u64 },
    /// All exit records up to this sequence are in the ledger: `keeper.AcknowledgeExits`.
    AcknowledgeExits { up_to_sequence: u64 },
    /// Drop the instance's record from the ledger (`LedgerRecord.forgotten`).
    ForgetLedger,
    /// What [`Supervisor::report`](super::Supervisor::report) says has changed. Kept by the reconciler.
    Report,
    /// Stopped and cleaned up. Kept by the reconciler until the hub acknowledges it.
    Gone,
    /// Give `Input::Tick` at this time; replaces the time given before. Kept by the reconciler.
    WakeAt(Monotonic),
    /// A line for the agent's log. `Level::Error`: a person must act.
    Log { level: Level, message: String },
}

/// All that is needed to start a process; the shell adds what it alone knows (cgroup, log directory, gid).
#[derive(Debug, Clone, PartialEq)]
pub struct SpawnOrder {
    pub key: ProcessKey,
    /// With manifest, uid, ordinal, version and address suffix.
    pub wanted: pb::WantedInstance,
    /// Every port by name, picked and fixed.
    pub ports: BTreeMap<String, u16>,
    /// What it needs was made by [`Action::Prepare`].
    pub prepared: bool,
    /// In force from the start; for a process that runs only under a lease.
    pub deadline: Option<Deadline>,
}

/// When the keeper ends a process by itself: the stop signal at `at`, SIGKILL after the grace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline {
    pub at: Monotonic,
    pub signal: i32,
    /// Whom it goes to.
    pub scope: SignalScope,
    pub grace: std::time::Duration,
}

/// One probe to be run at its interval.
#[derive(Debug, Clone, PartialEq)]
pub struct ProbeOrder {
    pub key: ProcessKey,
    pub kind: ProbeKind,
    pub spec: pb::Probe,
    /// On loopback; `None` when the probe needs none.
    pub port: Option<u16>,
    pub interval: std::time::Duration,
    pub timeout: std::time::Duration,
}

/// Whom a signal reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SignalScope {
    Process,
    Group,
    Cgroup,
}

impl From<SignalScope> for pb::SignalScope {
    fn from(scope: SignalScope) -> Self {
        match scope {
            SignalScope::Process => Self::Process,
            SignalScope::Group => Self::Group,
            SignalScope::Cgroup => Self::Cgroup,
        }
    }
}

/// As in STYLE: error = a person must act, warn = degraded and retrying, info = lifecycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    Info,
    Warn,
    Error,
}
