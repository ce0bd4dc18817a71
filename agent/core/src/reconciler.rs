//! The wanted set of this host and the supervisors that make it true. Level-triggered: the hub sends what it wants,
//! whole or as a delta on top of a known generation, and this goes there from wherever it is; an older generation
//! never moves it back. Without a hub the set on disk is enough to keep running, restarting and stopping.
//!
//! The agent's main task owns one, feeds it what keeper, probes, hub and timer say, and performs the [`Order`]s in
//! the order given. Nothing is started or signalled before the keeper's first list. While nobody knows what is wanted,
//! since the hub has never said it or what it said was lost with a part of the ledger, what runs is left alone and what
//! does not run stays so, until the hub has said it.

mod needed;
mod restore;
mod supervisors;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use nave_proto::ids::InstanceId;
use nave_proto::pb;
use rand::Rng;

use crate::monotonic::{Monotonic, WallOffset};
use crate::supervisor::{Action, Input, ProcessKey, SpawnErrorKind, Supervisor, unwanted};
use supervisors::Supervisors;

/// Between two looks of one that waits until few enough others are down.
const TURN_AGAIN: Duration = Duration::from_secs(1);

/// An action and the instance it is for; 0 for [`Action::AcknowledgeExits`], which is for none.
#[derive(Debug, Clone, PartialEq)]
pub struct Order {
    pub instance: InstanceId,
    pub action: Action,
}

/// A wanted set older than the one in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("wanted generation {given} is older than {known}")]
pub struct StaleWanted {
    pub given: u64,
    pub known: u64,
}

/// A delta that does not fit on what is in force: the whole set is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the delta does not continue generation {generation} of incarnation {incarnation}")]
pub struct NeedWhole {
    pub incarnation: u64,
    pub generation: u64,
}

/// All instances of this host.
#[derive(Debug, Clone)]
pub struct Reconciler {
    boot_id: String,
    incarnation: u64,
    generation: u64,
    supervisors: Supervisors,
    /// The keeper has listed what it runs, on the connection in use.
    keeper_known: bool,
    /// What is wanted is known only in part, or not at all: see the module's description.
    doubtful: bool,
    /// Newest exit record taken, and newest acknowledged to the keeper.
    exits_taken: u64,
    exits_acknowledged: u64,
    changed: BTreeSet<InstanceId>,
    /// Until when this host has a lease, as far as it has been told since the agent began.
    lease: Option<Monotonic>,
    /// The generation with which each was first told to stop, until its callers have left.
    stops: BTreeMap<InstanceId, u64>,
    /// They are to stop, and stay for others here that need them.
    held: BTreeSet<InstanceId>,
    /// See [`Reconciler::rest`].
    rests: bool,
    /// See [`Reconciler::take_stirred`].
    stirred: bool,
}

impl Reconciler {
    /// With nothing wanted yet. `boot_id` as in /proc/sys/kernel/random/boot_id.
    #[must_use]
    pub fn new(boot_id: &str) -> Self {
        Self {
            boot_id: boot_id.to_owned(),
            incarnation: 0,
            generation: 0,
            supervisors: Supervisors::default(),
            keeper_known: false,
            doubtful: true,
            exits_taken: 0,
            exits_acknowledged: 0,
            changed: BTreeSet::new(),
            lease: None,
            stops: BTreeMap::new(),
            held: BTreeSet::new(),
            rests: false,
            stirred: true,
        }
    }

    /// Whether anything that can be seen of the instances (which there are, their states, endpoints, ports and what is
    /// wanted of them) may have changed since the last call. A health check that says what the last one said changes
    /// nothing, and a host of a thousand instances makes a thousand of them a second.
    pub fn take_stirred(&mut self) -> bool {
        std::mem::take(&mut self.stirred)
    }

    /// Incarnation and generation in force, for `Hello` and `Acknowledge`; zeros: none.
    #[must_use]
    pub fn generation(&self) -> (u64, u64) {
        (self.incarnation, self.generation)
    }

    /// The whole truth from the hub. Instances it does not name are stopped and forgotten. When it returns `Ok`, the
    /// caller makes `LedgerRecord.wanted` durable, performs the orders, and acknowledges the generation.
    ///
    /// # Errors
    /// When it is older than what is in force; nothing has changed then.
    pub fn apply_wanted<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        set: pb::WantedSet,
    ) -> Result<Vec<Order>, StaleWanted> {
        // Incarnations rise with each restore: a hub of an older one is the history that was given up.
        if (set.incarnation, set.generation) < (self.incarnation, self.generation) {
            return Err(StaleWanted { given: set.generation, known: self.generation });
        }
        (self.incarnation, self.generation) = (set.incarnation, set.generation);
        self.stirred = true;
        let named: BTreeSet<_> = set.instances.iter().map(|wanted| InstanceId(wanted.instance_id)).collect();
        let mut orders = Vec::new();
        let unnamed: Vec<_> = self.supervisors.keys().filter(|id| !named.contains(id)).copied().collect();
        self.hold_needed(now, &unnamed.iter().copied().chain(needed::stops(&set.instances)).collect());
        for instance in unnamed {
            self.step(now, rng, instance, Input::Forget, &mut orders);
        }
        for wanted in set.instances {
            self.put(now, rng, wanted, &mut orders);
        }
        self.release_needed(now, rng, &mut orders);
        if std::mem::take(&mut self.doubtful) && !self.keeper_known {
            // What it said before was not acted upon.
            orders.push(Order { instance: InstanceId(0), action: Action::ListProcesses });
        }
        Ok(orders)
    }

    /// What has changed since the generation in force. As for [`Reconciler::apply_wanted`], with `LedgerRecord.delta`.
    ///
    /// # Errors
    /// When it does not continue the generation in force; nothing has changed then.
    pub fn apply_delta<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        delta: pb::WantedDelta,
    ) -> Result<Vec<Order>, NeedWhole> {
        if !self.continues(&delta) {
            return Err(NeedWhole { incarnation: self.incarnation, generation: self.generation });
        }
        self.generation = delta.to_generation;
        self.stirred = true;
        let stops = delta.removed.iter().copied().map(InstanceId).chain(needed::stops(&delta.put));
        let mut going: BTreeSet<InstanceId> = stops.collect();
        if !going.is_empty() {
            let again: BTreeSet<_> = delta.put.iter().map(|wanted| InstanceId(wanted.instance_id)).collect();
            going.extend(self.going().difference(&again));
            self.hold_needed(now, &going);
        }
        let mut orders = Vec::new();
        for id in delta.removed {
            self.step(now, rng, InstanceId(id), Input::Forget, &mut orders);
        }
        for wanted in delta.put {
            self.put(now, rng, wanted, &mut orders);
        }
        self.release_needed(now, rng, &mut orders);
        Ok(orders)
    }

    fn continues(&self, delta: &pb::WantedDelta) -> bool {
        !self.doubtful
            && delta.incarnation == self.incarnation
            && delta.from_generation == self.generation
            && delta.to_generation >= delta.from_generation
    }

    fn put<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        wanted: pb::WantedInstance,
        orders: &mut Vec<Order>,
    ) {
        let instance = InstanceId(wanted.instance_id);
        if wanted.desired() == pb::Desired::Stop {
            self.stops.entry(instance).or_insert(self.generation);
        } else {
            self.stops.remove(&instance);
        }
        match self.supervisors.get(&instance) {
            Some(known) if !known.is_forgotten() && *known.wanted() == wanted => {}
            Some(_) => self.step(now, rng, instance, Input::Wanted(Box::new(wanted)), orders),
            None => {
                let mut supervisor = Supervisor::new(wanted, &self.boot_id, now);
                if self.rests {
                    supervisor.rest();
                }
                if let Some(until) = self.lease {
                    supervisor.note_lease(until);
                }
                self.supervisors.insert(supervisor);
                // It is new here, so a keeper that has listed what it runs does not run it.
                let input = if self.keeper_known { Input::Absent { fresh: true } } else { Input::Tick };
                self.step(now, rng, instance, input, orders);
            }
        }
    }

    /// The hub has answered a beat: this host has a lease until then. It is told only after all that was wanted when the
    /// lease was given, so what starts under it is still this host's.
    pub fn lease<R: Rng + ?Sized>(&mut self, now: Monotonic, rng: &mut R, until: Monotonic) -> Vec<Order> {
        self.lease = self.lease.max(Some(until));
        let mut needing = Vec::new();
        self.supervisors.change_all(|supervisor| match supervisor.needs_lease() {
            true => needing.push(supervisor.instance()),
            false => supervisor.note_lease(until),
        });
        let mut orders = Vec::new();
        for instance in needing {
            self.step(now, rng, instance, Input::Lease { until }, &mut orders);
        }
        orders
    }

    /// All agents have taken the directory up to a revision, so nobody calls what was told to stop by then.
    pub fn callers_left<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        revision: u64,
    ) -> Vec<Order> {
        let left: Vec<InstanceId> =
            // One that stays for others has yet to begin its stop.
            self.stops
                .iter()
                .filter(|(id, told)| **told <= revision && !self.held.contains(id))
                .map(|(id, _)| *id)
                .collect();
        let mut orders = Vec::new();
        for instance in left {
            self.stops.remove(&instance);
            self.step(now, rng, instance, Input::CallersLeft, &mut orders);
        }
        orders
    }

    /// Instances whose stop waits for calls to end.
    pub fn draining(&self) -> impl Iterator<Item = InstanceId> + '_ {
        self.supervisors.draining()
    }

    /// The hub has given this host up, and what it runs to others: all of it is stopped and forgotten. Returns the set
    /// to be made durable as for [`Reconciler::apply_wanted`].
    pub fn given_up<R: Rng + ?Sized>(&mut self, now: Monotonic, rng: &mut R) -> (pb::WantedSet, Vec<Order>) {
        let (incarnation, generation) = self.generation();
        let nothing = pb::WantedSet { incarnation, generation, instances: Vec::new() };
        let orders = self.apply_wanted(now, rng, nothing.clone()).unwrap_or_default();
        (nothing, orders)
    }

    /// All that this host runs ends, each as its manifest says, what is needed after what needs it; nothing starts any
    /// more. What is wanted stays so, and the next agent starts it again.
    pub fn rest<R: Rng + ?Sized>(&mut self, now: Monotonic, rng: &mut R) -> Vec<Order> {
        self.rests = true;
        self.stirred = true;
        self.supervisors.change_all(Supervisor::rest);
        let all: BTreeSet<InstanceId> = self.supervisors.keys().copied().collect();
        self.hold_needed(now, &all);
        let mut orders = Vec::new();
        for instance in all {
            self.step(now, rng, instance, Input::Tick, &mut orders);
        }
        self.release_needed(now, rng, &mut orders);
        orders
    }

    /// All has ended, after [`Reconciler::rest`].
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        self.rests && self.keeper_known && self.supervisors.values().all(Supervisor::is_at_rest)
    }

    /// One input for one instance; ignored when there is no such instance (an exit is acknowledged all the same).
    /// Answers to orders must be given in the order in which the keeper gave them.
    pub fn input<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        instance: InstanceId,
        input: Input,
    ) -> Vec<Order> {
        if let Input::SpawnFailed { error, .. } = &input
            && error.kind == SpawnErrorKind::Unavailable
        {
            self.keeper_lost();
        }
        if let Input::Exited(exit) = &input {
            self.exits_taken = self.exits_taken.max(exit.sequence);
        }
        let mut orders = Vec::new();
        self.step(now, rng, instance, input, &mut orders);
        self.release_needed(now, rng, &mut orders);
        self.acknowledge_exits(&mut orders);
        orders
    }

    /// An exit record from the keeper: a new one, or one repeated after a hello.
    pub fn exited<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        exit: pb::ExitRecord,
    ) -> Vec<Order> {
        self.input(now, rng, InstanceId(exit.instance_id), Input::Exited(exit))
    }

    /// The connection to the keeper is lost: what it does from now on is known only from its next list.
    pub fn keeper_lost(&mut self) {
        self.keeper_known = false;
        self.stirred = true;
        self.supervisors.change_all(Supervisor::keeper_lost);
    }

    /// Whether it waits for the hub to say what is wanted before it starts or ends anything.
    #[must_use]
    pub fn is_doubtful(&self) -> bool {
        self.doubtful
    }

    /// Whether the keeper has listed what it runs on the connection in use.
    #[must_use]
    pub fn is_keeper_known(&self) -> bool {
        self.keeper_known
    }

    /// All that the keeper runs: after every hello (and after the exits it repeats then), and as the answer to
    /// [`Action::ListProcesses`]. Processes of nobody, or of an older placement, are stopped.
    pub fn keeper_processes<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        list: &[pb::KeptProcess],
    ) -> Vec<Order> {
        self.stirred = true;
        if self.doubtful && !(list.is_empty() && self.supervisors.is_empty()) {
            return self.adopt_known(now, rng, list);
        }
        let fresh = !self.keeper_known;
        self.keeper_known = true;
        let mut kept: BTreeMap<InstanceId, Vec<&pb::KeptProcess>> = BTreeMap::new();
        for process in list {
            kept.entry(InstanceId(process.instance_id)).or_default().push(process);
        }
        for (&instance, processes) in &kept {
            let epoch = processes.iter().map(|process| process.epoch).max().unwrap_or_default();
            if !self.supervisors.contains_key(&instance) {
                self.supervisors.insert(Supervisor::stray(unwanted(instance, epoch), &self.boot_id, now));
            }
        }
        if fresh {
            let going = self.going();
            self.hold_needed(now, &going);
        }
        let mut orders = Vec::new();
        let instances: Vec<_> = self.supervisors.keys().copied().collect();
        for instance in instances {
            let mut processes = kept.remove(&instance).unwrap_or_default();
            // The newest first: an older one beside it is the one too many.
            processes.sort_by_key(|process| std::cmp::Reverse(key(process)));
            // One that was adopted in doubt may have been acted upon since the keeper was asked.
            let fresh = fresh && !self.supervisors.get(&instance).is_some_and(Supervisor::knows_keeper);
            for input in told_by(&processes, fresh) {
                self.step(now, rng, instance, input, &mut orders);
            }
        }
        self.release_needed(now, rng, &mut orders);
        self.acknowledge_exits(&mut orders);
        orders
    }

    /// What runs and is known is watched on. Of all else the next list is to speak, when the hub has.
    fn adopt_known<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        list: &[pb::KeptProcess],
    ) -> Vec<Order> {
        let mut orders = Vec::new();
        for process in list.iter().filter(|process| !process.leftover) {
            let instance = InstanceId(process.instance_id);
            let known = self.supervisors.get(&instance);
            if known.is_some_and(|one| !one.is_forgotten() && one.key() == key(process)) {
                self.step(now, rng, instance, adopted(process), &mut orders);
            }
        }
        orders
    }

    /// Everything that is due.
    pub fn tick<R: Rng + ?Sized>(&mut self, now: Monotonic, rng: &mut R) -> Vec<Order> {
        let mut orders = Vec::new();
        for instance in self.supervisors.due(now) {
            self.step(now, rng, instance, Input::Tick, &mut orders);
        }
        self.release_needed(now, rng, &mut orders);
        orders
    }

    /// When [`Reconciler::tick`] is to be called next; `None`: not until something happens.
    #[must_use]
    pub fn next_wake(&self) -> Option<Monotonic> {
        self.supervisors.next_wake()
    }

    /// Without the hub nobody knows of the other hosts; of its own a service keeps to `update.max_parallel` all the same:
    /// one whose liveness has failed is restarted once so few others are down here.
    fn take_turns(&mut self, now: Monotonic, instance: InstanceId) {
        let Some(one) = self.supervisors.get(&instance).filter(|one| one.waits_for_turn()) else { return };
        let Some(manifest) = &one.wanted().manifest else { return };
        let most = manifest.update.as_ref().map_or(1, |update| update.max_parallel.max(1));
        let of_service = |other: &&Supervisor| {
            other.wanted().manifest.as_ref().is_some_and(|other| other.name == manifest.name)
        };
        let others = self.supervisors.values().filter(|other| other.instance() != instance);
        let down = others.filter(of_service).filter(|other| other.is_down()).count();
        let until = (down >= most as usize).then_some(now + TURN_AGAIN);
        self.supervisors.change(instance, |one| one.lets_others_go_first(until));
    }

    fn step<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        instance: InstanceId,
        input: Input,
        orders: &mut Vec<Order>,
    ) {
        self.take_turns(now, instance);
        let actions = self.supervisors.change(instance, |supervisor| supervisor.step(now, rng, input));
        for action in actions.unwrap_or_default() {
            self.stirred |= !matches!(action, Action::WakeAt(_));
            match action {
                Action::Report | Action::Gone => {
                    self.changed.insert(instance);
                }
                Action::WakeAt(_) => {}
                Action::PickPorts { .. }
                | Action::Prepare(_)
                | Action::CancelPreparation { .. }
                | Action::FetchAhead(_)
                | Action::CancelFetch
                | Action::RunHook(_)
                | Action::SetLimits { .. }
                | Action::EndHook { .. }
                | Action::Spawn(_)
                | Action::Signal { .. }
                | Action::SetDeadline { .. }
                | Action::SweepCgroup { .. }
                | Action::StartProbe(_)
                | Action::StopProbes
                | Action::ListProcesses
                | Action::Persist(_)
                | Action::Forget { .. }
                | Action::AcknowledgeExits { .. }
                | Action::ForgetLedger
                | Action::Log { .. } => orders.push(Order { instance, action }),
            }
        }
    }

    /// Records taken before the keeper's list are only remembered, not yet in the ledger; so not acknowledged.
    fn acknowledge_exits(&mut self, orders: &mut Vec<Order>) {
        if !self.keeper_known || self.exits_taken <= self.exits_acknowledged {
            return;
        }
        self.exits_acknowledged = self.exits_taken;
        let action = Action::AcknowledgeExits { up_to_sequence: self.exits_taken };
        orders.push(Order { instance: InstanceId(0), action });
    }

    /// Reports that have changed since the last call, the newest of each instance. Lost ones are made good by
    /// [`Reconciler::full_report`] in the next session.
    pub fn take_reports(&mut self, wall: WallOffset) -> Vec<pb::InstanceReport> {
        let mut reports = Vec::new();
        let supervisors = &self.supervisors;
        self.changed.retain(|instance| match supervisors.get(instance) {
            None => false,
            Some(supervisor) if supervisor.can_report() => {
                reports.push(supervisor.report(wall));
                false
            }
            Some(_) => true,
        });
        reports
    }

    /// Whether [`Reconciler::take_reports`] has anything.
    #[must_use]
    pub fn has_reports(&self) -> bool {
        self.changed.iter().any(|id| self.supervisors.get(id).is_some_and(Supervisor::can_report))
    }

    /// Every instance, for the first report of a session. `None` until the keeper's list has shown what is true.
    pub fn full_report(&mut self, wall: WallOffset) -> Option<Vec<pb::InstanceReport>> {
        if !self.supervisors.values().all(Supervisor::can_report) {
            return None;
        }
        self.changed.clear();
        Some(self.supervisors.values().map(|supervisor| supervisor.report(wall)).collect())
    }

    /// Instances stopped and cleaned up, for `Report.gone`; until acknowledged, each time.
    #[must_use]
    pub fn gone(&self) -> Vec<InstanceId> {
        self.supervisors.gone().collect()
    }

    /// The hub has committed a report with these in `gone`.
    pub fn acknowledge_gone(&mut self, gone: &[InstanceId]) -> Vec<Order> {
        let mut orders = Vec::new();
        for &instance in gone {
            if self.supervisors.get(&instance).is_some_and(Supervisor::is_gone) {
                self.supervisors.remove(instance);
                self.changed.remove(&instance);
                self.stirred = true;
                orders.push(Order { instance, action: Action::ForgetLedger });
            }
        }
        orders
    }

    /// The hub has committed a report that told of each of these instances the ends up to that number.
    pub fn acknowledge_ends(&mut self, told: &[(InstanceId, u64)]) {
        for (instance, up_to) in told {
            self.supervisors.change(*instance, |supervisor| supervisor.ends_told(*up_to));
        }
    }

    /// One instance.
    #[must_use]
    pub fn supervisor(&self, instance: InstanceId) -> Option<&Supervisor> {
        self.supervisors.get(&instance)
    }

    /// All instances, by id.
    pub fn supervisors(&self) -> impl Iterator<Item = &Supervisor> {
        self.supervisors.values()
    }

    /// Ports that instances hold or have been given, so that none is given twice.
    #[must_use]
    pub fn ports_in_use(&self) -> BTreeSet<u16> {
        self.supervisors
            .values()
            .filter(|supervisor| !supervisor.is_gone())
            .flat_map(|supervisor| supervisor.ports().values().copied())
            .collect()
    }
}

fn key(process: &pb::KeptProcess) -> ProcessKey {
    ProcessKey { epoch: process.epoch, attempt: process.attempt }
}

/// What the keeper's list says of one instance: leftovers first, so that nothing is started beside them.
fn told_by(processes: &[&pb::KeptProcess], fresh: bool) -> Vec<Input> {
    let leftovers = processes.iter().filter(|process| process.leftover);
    let mut inputs: Vec<_> = leftovers.map(|process| Input::Leftover { key: key(process) }).collect();
    let mut alive = processes.iter().filter(|process| !process.leftover).peekable();
    if alive.peek().is_none() {
        inputs.push(Input::Absent { fresh });
    }
    inputs.extend(alive.map(|process| adopted(process)));
    inputs
}

fn adopted(kept: &pb::KeptProcess) -> Input {
    Input::Adopted {
        key: key(kept),
        process: kept.process.clone().unwrap_or_default(),
        started_unix_ns: kept.started_unix_ns,
    }
}

#[cfg(test)]
mod tests;
