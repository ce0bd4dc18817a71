//! The life of one instance on this host: start it, watch it, start it again, stop it. Pure: inputs in, actions
//! out, `now` and randomness as arguments, so that every rule is a table and every failure replays.
//!
//! Two halves. An input changes the state by what happened; then [`Supervisor::step`] looks only at where the state
//! is and where it should be, and takes the next step towards it. So it does not matter in which order a stop, an
//! exit and a restart of the agent come. Called by the [`Reconciler`](crate::Reconciler); knows no sockets, files or
//! clocks.

mod action;
mod adopt;
mod advance;
mod ahead;
mod ends;
mod events;
mod health;
mod hooks;
mod input;
mod lease;
mod ledger;
mod limits;
mod notes;
mod report;
mod restart;
mod state;
mod stop;

use std::collections::BTreeMap;
use std::time::Duration;

use nave_proto::ids::InstanceId;
use nave_proto::pb;
use rand::Rng;

pub use action::{Action, Deadline, Level, ProbeOrder, SignalScope, SpawnOrder};
pub use ahead::{FETCH_RETRY_FIRST, FETCH_RETRY_MAX};
pub use health::{Health, LIVE_FAILURES_MAX, LIVE_GRACE, READY_FAILURES_MAX, watchdog};
pub use hooks::{Hook, HookOrder, HookResult};
pub use input::{
    Input, Notification, ProbeKind, ProbeOutcome, ProcessKey, SignalError, SpawnError, SpawnErrorKind,
};
pub use ledger::{forgotten, unwanted};
pub use limits::LimitRefused;
pub use restart::{
    BACKOFF_FIRST, BACKOFF_MAX, EXEC_FAILURES_MAX, READY_FOR_RESET, RestartMemory,
    UPTIME_FOR_RESTART_AT_ONCE, describe, signal_name,
};
pub use state::{Drain, Pending, Running, Starting, State, StopCause, StopStep, Stopping};
pub use stop::{DRAIN_TIMEOUT, DRAIN_WAIT, GRACE, KILL_WAIT, NEEDED_WAIT, Sweep};

use crate::monotonic::Monotonic;
use ahead::Ahead;
use hooks::PostStop;
use limits::Limits;

/// A process that ends sooner may have met a port that somebody else took.
const QUICK_EXIT: Duration = Duration::from_secs(5);

/// When services are stopped together with their keeper, the agent follows within this time; what it starts until
/// then would only be refused.
const AFTER_OPERATOR: Duration = Duration::from_secs(5);

type Ports = BTreeMap<String, u16>;

/// One instance's state machine.
#[derive(Debug, Clone)]
pub struct Supervisor {
    instance: InstanceId,
    boot_id: String,
    wanted: pb::WantedInstance,
    /// The hub no longer knows it.
    forget: bool,
    /// All that this host runs is to end, and nothing starts before another agent.
    rests: bool,
    /// Of the newest process; behind `wanted.epoch` while that one is stopped.
    epoch: u64,
    /// Processes ordered in `epoch`.
    attempt: u32,
    ports: Ports,
    /// The next start takes other ports.
    pick_ports: bool,
    memory: RestartMemory,
    last_exit: Option<pb::ExitRecord>,
    /// Ended processes whose cgroup is not known to be empty. Nothing starts while there is one.
    sweeps: BTreeMap<ProcessKey, Sweep>,
    /// What was done and seen that no state shows; the newest few.
    notes: Vec<pb::InstanceNote>,
    /// How attempts ended, as far as the hub does not have it.
    ends: Vec<pb::EndNote>,
    /// Number of the newest of both.
    last_note: u64,
    state: State,
    /// `post_start` of the process that runs is not known to have ended.
    post_start_open: bool,
    post_stop: PostStop,
    /// As it was wanted when the newest attempt began, where the hub has meanwhile sent another template: the hooks of
    /// its end are those of what ran.
    ran: Option<Box<pb::WantedInstance>>,
    limits: Limits,
    ahead: Ahead,
    /// The keeper has said what it runs for us, on the connection in use. Nothing starts otherwise: its list might
    /// have been made before the order and be read after it.
    keeper_known: bool,
    /// The keeper would not start it beside what is in its cgroup: its list is to say what that is.
    is_crowded: bool,
    /// Its liveness has failed and the hub is away, and it waits until then for others of its service.
    others_turn_until: Option<Monotonic>,
    /// Until when the host has a lease; nothing: not known, as after a start of the agent.
    lease: Option<Monotonic>,
    /// It is due and waits for a lease.
    waits_for_lease: bool,
    /// It is to stop, and stays until then at most for others on this host that need it and stop too.
    needed_until: Option<Monotonic>,
    persisted: Option<pb::InstanceLedger>,
    reported: Option<pb::InstanceReport>,
    wake: Option<Monotonic>,
}

/// Where the hub wants it to go, seen from the process there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Goal {
    Run,
    Stop,
    /// Placed anew: end what runs for the older epoch, then begin again.
    Replace,
    /// Wanted as ever, but this host's services rest until an agent begins anew.
    Rest,
}

impl Supervisor {
    /// An instance nothing is known of yet. Nothing is done before the keeper's word.
    #[must_use]
    pub fn new(wanted: pb::WantedInstance, boot_id: &str, now: Monotonic) -> Self {
        Self {
            instance: InstanceId(wanted.instance_id),
            boot_id: boot_id.to_owned(),
            epoch: wanted.epoch,
            wanted,
            forget: false,
            rests: false,
            attempt: 0,
            ports: Ports::new(),
            pick_ports: false,
            memory: RestartMemory::default(),
            last_exit: None,
            sweeps: BTreeMap::new(),
            notes: Vec::new(),
            ends: Vec::new(),
            last_note: 0,
            state: State::Pending(Pending { recalled: Box::new(State::due(now)), exit: None }),
            post_start_open: false,
            post_stop: PostStop::Nothing,
            ran: None,
            limits: Limits::default(),
            ahead: Ahead::Nothing,
            keeper_known: false,
            is_crowded: false,
            others_turn_until: None,
            lease: None,
            waits_for_lease: false,
            needed_until: None,
            persisted: None,
            reported: None,
            wake: None,
        }
    }

    /// A process that the keeper runs and nobody wants: to be stopped and forgotten.
    #[must_use]
    pub fn stray(wanted: pb::WantedInstance, boot_id: &str, now: Monotonic) -> Self {
        Self::new(wanted, boot_id, now).forgotten()
    }

    /// The same, no longer known to the hub.
    #[must_use]
    pub(crate) fn forgotten(mut self) -> Self {
        self.forget = true;
        self
    }

    /// Takes one input and returns what is to be done, in order. Never fails: what does not fit is ignored, and said
    /// in the log when a person would wonder.
    pub fn step<R: Rng + ?Sized>(&mut self, now: Monotonic, rng: &mut R, input: Input) -> Vec<Action> {
        let mut out = Vec::new();
        self.take(now, rng, input, &mut out);
        self.advance(now, &mut out);
        self.adjust_limits(now, &mut out);
        self.sweep_again(now, &mut out);
        self.fetch_ahead(now, &mut out);
        self.persist(&mut out);
        self.publish_report(&mut out);
        let wake = self.next_wake();
        if wake != self.wake {
            self.wake = wake;
            out.extend(wake.map(Action::WakeAt));
        }
        out
    }

    fn take<R: Rng + ?Sized>(&mut self, now: Monotonic, rng: &mut R, input: Input, out: &mut Vec<Action>) {
        match input {
            Input::Wanted(wanted) => self.want(now, *wanted, out),
            Input::Forget => self.forget = true,
            Input::Lease { until } => self.leased(until, out),
            Input::PortsPicked { ports } => self.ports_picked(now, rng, ports, out),
            Input::PortClash { message } => self.port_clash(now, rng, message, out),
            Input::Prepared { key, result } => self.prepared(now, rng, key, result, out),
            Input::Fetched { template_version, result } => {
                self.fetched(now, rng, template_version, result, out);
            }
            Input::HookEnded { key, hook, result } => self.hook_ended(now, rng, key, hook, result, out),
            Input::Spawned { key, process, started_unix_ns } => {
                self.spawned(now, key, process, started_unix_ns, out)
            }
            Input::SpawnFailed { key, error } => self.spawn_failed(now, rng, key, &error, out),
            Input::Exited(exit) => self.exited(now, rng, exit, out),
            Input::Adopted { key, process, started_unix_ns } => {
                self.adopted(now, rng, key, process, started_unix_ns, out);
            }
            Input::Leftover { key } => self.leftover(now, key, out),
            Input::Absent { fresh } => self.absent(now, rng, fresh, out),
            Input::ProbeResult { key, probe, outcome } if key == self.key() => {
                self.probed(now, probe, &outcome, out);
            }
            Input::LimitsSet { key, refused } => self.limits_set(now, key, &refused, out),
            Input::Notify { key, message } if key == self.key() => self.notified(now, &message, out),
            Input::Unheard { key } if key == self.key() => self.unheard(out),
            Input::MemoryShort { key, used_bytes, limit_bytes } if key == self.key() => {
                self.memory_short(used_bytes, limit_bytes, out);
            }
            Input::OomOutlived { key, kills, limit_bytes } if key == self.key() => {
                self.oom_outlived(kills, limit_bytes, out);
            }
            Input::NamesUnknown { key, names } if key == self.key() => self.names_unknown(&names, out),
            Input::CallersLeft => self.callers_left(),
            Input::InFlight { count } => self.in_flight(count),
            Input::SignalFailed { key, signal, error } => self.signal_failed(key, signal, error, out),
            Input::CgroupEmpty { key, killed } => {
                self.sweeps.remove(&key);
                self.note_killed(killed);
            }
            Input::ProbeResult { .. }
            | Input::Notify { .. }
            | Input::Unheard { .. }
            | Input::MemoryShort { .. }
            | Input::OomOutlived { .. }
            | Input::NamesUnknown { .. }
            | Input::Tick => {}
        }
    }

    /// The newest process, running or not.
    #[must_use]
    pub fn key(&self) -> ProcessKey {
        ProcessKey { epoch: self.epoch, attempt: self.attempt }
    }

    #[must_use]
    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    #[must_use]
    pub fn wanted(&self) -> &pb::WantedInstance {
        &self.wanted
    }

    #[must_use]
    pub fn ports(&self) -> &BTreeMap<String, u16> {
        &self.ports
    }

    /// Stopped and cleaned up, and still meant to be.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self.state, State::Gone)
    }

    /// The hub no longer knows it.
    #[must_use]
    pub fn is_forgotten(&self) -> bool {
        self.forget
    }

    /// The keeper has said, on the connection in use, what there is of it.
    pub(crate) fn knows_keeper(&self) -> bool {
        self.keeper_known
    }

    /// It is to end and not to begin again.
    pub(crate) fn is_to_stop(&self) -> bool {
        matches!(self.goal(), Goal::Stop | Goal::Rest)
    }

    /// From now on what runs is to end, with all that belongs to its end; what is wanted stays so.
    pub(crate) fn rest(&mut self) {
        self.rests = true;
    }

    /// Nothing of it runs, and nothing is owed for what ran.
    pub(crate) fn is_at_rest(&self) -> bool {
        let ended = match &self.state {
            State::BackingOff { .. } | State::Exited { .. } | State::Failed { .. } | State::Gone => true,
            State::Pending(_) | State::Starting(_) | State::Running(_) | State::Stopping(_) => false,
        };
        ended && self.sweeps.is_empty() && self.post_stop == PostStop::Nothing
    }

    /// The name of its service, if it has been told.
    pub(crate) fn service(&self) -> Option<&str> {
        self.wanted.manifest.as_ref().map(|manifest| manifest.name.as_str())
    }

    /// The connection to the keeper is lost: nothing is started before its next list, and the outcome of an order
    /// under way is known only from that.
    pub fn keeper_lost(&mut self) {
        self.keeper_known = false;
        if self.state == State::Starting(Starting::Spawning) {
            self.await_keeper();
        }
    }

    fn await_keeper(&mut self) {
        let recalled = Box::new(std::mem::replace(&mut self.state, State::Gone));
        self.state = State::Pending(Pending { recalled, exit: None });
    }

    fn goal(&self) -> Goal {
        if self.forget || self.wanted.desired() == pb::Desired::Stop {
            Goal::Stop
        } else if self.rests {
            Goal::Rest
        } else if self.wanted.epoch > self.epoch {
            Goal::Replace
        } else {
            Goal::Run
        }
    }

    /// Writes the ledger record when it has changed; called before each side effect that must not be forgotten.
    fn persist(&mut self, out: &mut Vec<Action>) {
        let ledger = self.ledger();
        if self.persisted.as_ref() != Some(&ledger) {
            out.push(Action::Persist(Box::new(ledger.clone())));
            self.persisted = Some(ledger);
        }
    }
}

/// A duration of a manifest; `None` when unset, zero or negative.
fn duration<D: Copy + TryInto<Duration>>(duration: Option<&D>) -> Option<Duration> {
    duration.and_then(|&duration| duration.try_into().ok()).filter(|duration| !duration.is_zero())
}

#[cfg(test)]
mod tests;
