//! What the shell tells a supervisor. Everything that speaks of a process carries its [`ProcessKey`], so that late
//! news of an older one is recognised and ignored.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use nave_proto::pb;

use super::hooks::{Hook, HookResult};
use super::limits::LimitRefused;
use crate::env::UnknownName;
use crate::monotonic::Monotonic;

/// One start of one placement: what makes two processes of an instance different.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProcessKey {
    /// Rises each time the hub places the instance.
    pub epoch: u64,
    /// Starts within the epoch, from 1.
    pub attempt: u32,
}

/// Something happened to one instance.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// What the hub wants now, whole: a new instance, a live change, desired stop, or a higher epoch.
    Wanted(Box<pb::WantedInstance>),
    /// The host's lease holds until then. It matters to what runs only under one: `on_disconnect = "stop"`.
    Lease { until: Monotonic },
    /// The hub no longer knows the instance: stop it and forget it.
    Forget,
    /// Answer to [`Action::PickPorts`](super::Action::PickPorts): every port by name, fixed ones included.
    PortsPicked { ports: BTreeMap<String, u16> },
    /// Answer to [`Action::PickPorts`](super::Action::PickPorts): it cannot be had. The message names port and holder.
    PortClash { message: String },
    /// Answer to [`Action::Prepare`](super::Action::Prepare), also when it was cut short: what the attempt needs is
    /// there, or why it cannot be had.
    Prepared { key: ProcessKey, result: Result<(), SpawnError> },
    /// What is made for an attempt, or for a hook of it, asks for names that nobody knows. Before the answer that it is
    /// made.
    NamesUnknown { key: ProcessKey, names: BTreeSet<UnknownName> },
    /// Answer to [`Action::FetchAhead`](super::Action::FetchAhead) of this template: all of it is there, or why not.
    Fetched { template_version: u64, result: Result<(), String> },
    /// Answer to [`Action::RunHook`](super::Action::RunHook) and [`Action::EndHook`](super::Action::EndHook): nothing of
    /// it runs any longer.
    HookEnded { key: ProcessKey, hook: Hook, result: HookResult },
    /// The keeper started the process of [`Action::Spawn`](super::Action::Spawn): exec has succeeded.
    Spawned { key: ProcessKey, process: pb::ProcessIdentity, started_unix_ns: i64 },
    /// The process could not be started.
    SpawnFailed { key: ProcessKey, error: SpawnError },
    /// The process ended. May come before `Spawned`, and more than once.
    Exited(pb::ExitRecord),
    /// The keeper's list, asked for on a fresh connection or by [`Action::ListProcesses`](super::Action::ListProcesses),
    /// shows this process of the instance alive. Exit records the keeper had kept are given before.
    Adopted { key: ProcessKey, process: pb::ProcessIdentity, started_unix_ns: i64 },
    /// The same list shows no main process, but others left in its cgroup.
    Leftover { key: ProcessKey },
    /// The same list shows nothing of the instance. `fresh`: it is the first of a new connection, so that an order
    /// given before it and not answered was never carried out.
    Absent { fresh: bool },
    /// One probe ended.
    ProbeResult { key: ProcessKey, probe: ProbeKind, outcome: ProbeOutcome },
    /// A signal could not be delivered.
    SignalFailed { key: ProcessKey, signal: i32, error: SignalError },
    /// Answer to [`Action::SweepCgroup`](super::Action::SweepCgroup): no process is left in it (or there is no cgroup).
    /// `killed`: those that had to be killed for that.
    CgroupEmpty { key: ProcessKey, killed: u32 },
    /// Answer to [`Action::SetLimits`](super::Action::SetLimits): all is set but these.
    LimitsSet { key: ProcessKey, refused: Vec<LimitRefused> },
    /// The processes of the instance use nearly all memory that they may.
    MemoryShort { key: ProcessKey, used_bytes: u64, limit_bytes: u64 },
    /// The kernel has killed others of its cgroups for want of memory, and the process has outlived that. `limit_bytes`:
    /// at that limit; 0: the host had no more.
    OomOutlived { key: ProcessKey, kills: u64, limit_bytes: u64 },
    /// The process spoke through its notify socket (sd_notify).
    Notify { key: ProcessKey, message: Notification },
    /// The socket that the process may speak into has ended, with whoever kept it; there is a new one.
    Unheard { key: ProcessKey },
    /// All agents that may call it have taken it out of their choice.
    CallersLeft,
    /// So many calls to it are under way, all of them through this host's agent.
    InFlight { count: u64 },
    /// The time of the last [`Action::WakeAt`](super::Action::WakeAt) has come. Early and superfluous ticks do no harm.
    Tick,
}

/// What became of a spawn, by what can be done about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpawnError {
    pub kind: SpawnErrorKind,
    /// 0 when there is none.
    pub errno: i32,
    /// For people, e.g. `/usr/bin/nope: no such file or directory`.
    pub message: String,
}

/// See [`SpawnError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpawnErrorKind {
    /// The program could not be executed, its user or directory not be entered.
    Exec,
    /// The keeper already has a process of this instance.
    Busy,
    /// The keeper finds the order senseless.
    Invalid,
    /// The system refused: fork, cgroup, FIFO.
    System,
    /// The keeper is not reachable, or its connection broke before it answered: the outcome is unknown until its
    /// next list.
    Unavailable,
}

impl From<pb::KeeperErrorKind> for SpawnErrorKind {
    fn from(kind: pb::KeeperErrorKind) -> Self {
        match kind {
            pb::KeeperErrorKind::Exec => Self::Exec,
            pb::KeeperErrorKind::Busy => Self::Busy,
            pb::KeeperErrorKind::Invalid => Self::Invalid,
            pb::KeeperErrorKind::Unspecified
            | pb::KeeperErrorKind::NotFound
            | pb::KeeperErrorKind::Stranger
            | pb::KeeperErrorKind::System => Self::System,
        }
    }
}

/// Why a signal was not delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalError {
    /// The keeper knows no such process, or its pid now belongs to somebody else: it has ended.
    Gone,
    /// The keeper is not reachable.
    Unavailable,
    /// The system refused.
    System,
}

impl From<pb::KeeperErrorKind> for SignalError {
    fn from(kind: pb::KeeperErrorKind) -> Self {
        match kind {
            pb::KeeperErrorKind::NotFound | pb::KeeperErrorKind::Stranger => Self::Gone,
            pb::KeeperErrorKind::Unspecified
            | pb::KeeperErrorKind::Exec
            | pb::KeeperErrorKind::Busy
            | pb::KeeperErrorKind::Invalid
            | pb::KeeperErrorKind::System => Self::System,
        }
    }
}

/// Which of the two questions a probe asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ProbeKind {
    /// May it be given traffic?
    Ready,
    /// Must it be started again?
    Live,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    Passed,
    /// Why, without naming the probe: `connection refused`, `status 503`, `no answer in 500 ms`.
    Failed(String),
}

/// The part of sd_notify that a supervisor acts on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notification {
    /// `READY=1`; counts when the manifest says `notify = true`.
    Ready,
    /// `STOPPING=1`: it ends by its own will; no more traffic.
    Stopping,
    /// `STATUS=`, one line for people.
    Status(String),
    /// `RELOADING=1`; `READY=1` follows. It goes on serving meanwhile.
    Reloading,
    /// `WATCHDOG=1`: it lives; counts when the manifest says `live = { notify = true }`.
    Watchdog,
    /// `WATCHDOG=trigger`: it asks to be treated as if its watchdog had been silent.
    WatchdogTrigger,
    /// `EXTEND_TIMEOUT_USEC=`: what it is about takes that long from now; it says so again when it takes longer.
    ExtendTimeout(Duration),
    /// `MAINPID=`: another process shall be the main one, which is refused: only the keeper's own child is sure to be
    /// signalled and seen to end.
    MainPid(u32),
}
