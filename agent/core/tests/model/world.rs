//! One host: the reconciler under test, its disk, the tiny keeper, the queues between them, and a hub's wishes. The
//! agent may die between any two of its orders; whatever is in the queues then is lost, or half of it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use nave_agent_core::supervisor::{
    Action, Hook, HookResult, NEEDED_WAIT, ProbeKind, ProbeOutcome, ProcessKey, SignalError, SpawnError,
    SpawnErrorKind, State, StopStep, Supervisor,
};
use nave_agent_core::{Input, Monotonic, Order, Reconciler, WallOffset};
use nave_proto::ids::InstanceId;
use nave_proto::pb::{self, ledger_record::Record};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::INSTANCES;
use crate::hub::Hub;
use crate::keeper::FakeKeeper;
use crate::oracle::Oracle;

/// From the agent to the keeper, in order.
#[derive(Debug, Clone)]
enum Ask {
    Hello,
    Order(Order),
}

/// From the keeper to the agent, in order. `answers` counts the asks answered so far.
#[derive(Debug)]
enum Told {
    Input { instance: u64, input: Input, answer: bool },
    List { processes: Vec<pb::KeptProcess>, answer: bool },
    Answered,
}

#[derive(Debug, Clone, Copy)]
struct RunningHook {
    key: ProcessKey,
    hook: Hook,
    /// Which agent has begun it.
    agent: u32,
}

pub(crate) struct World {
    pub(crate) now: Monotonic,
    rng: StdRng,
    pub(crate) agent: Reconciler,
    disk: Vec<pb::LedgerRecord>,
    pub(crate) keeper: FakeKeeper,
    /// Ordered, not yet carried out.
    outbox: VecDeque<Order>,
    asks: VecDeque<Ask>,
    told: VecDeque<Told>,
    /// Asks without an answer that the agent has seen.
    open: VecDeque<Ask>,
    /// The keeper tells this connection about exits.
    greeted: bool,
    pub(crate) wishes: BTreeMap<u64, pb::WantedInstance>,
    generation: u64,
    boots: u32,
    /// By instance; also one whose agent has died.
    hooks: BTreeMap<u64, RunningHook>,
    /// Agents so far.
    agents: u32,
    /// Which are to stop: with which generation and since when, and whether a stop was under way then.
    to_stop: BTreeMap<u64, (u64, Monotonic, bool)>,
    pub(crate) oracle: Oracle,
    hub: Hub,
    /// What it has committed of the last report, on its way to the agent.
    word: Vec<(InstanceId, u64)>,
    /// At the last look.
    seen: BTreeMap<InstanceId, Seen>,
}

/// What the proxy, the firewall and people see of an instance.
type Seen =
    (u64, std::mem::Discriminant<State>, pb::EndpointState, BTreeMap<String, u16>, pb::WantedInstance);

pub(crate) const INCARNATION: u64 = 3;

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let keeper = FakeKeeper::new("boot-0");
        let mut world = Self {
            now: Monotonic(60_000_000_000),
            rng: StdRng::seed_from_u64(seed),
            agent: Reconciler::new("boot-0"),
            disk: Vec::new(),
            keeper,
            outbox: VecDeque::new(),
            asks: VecDeque::new(),
            told: VecDeque::new(),
            open: VecDeque::new(),
            greeted: false,
            wishes: BTreeMap::new(),
            generation: 0,
            boots: 0,
            hooks: BTreeMap::new(),
            agents: 0,
            to_stop: BTreeMap::new(),
            oracle: Oracle::default(),
            hub: Hub::default(),
            word: Vec::new(),
            seen: BTreeMap::new(),
        };
        world.connect();
        world
    }

    fn connect(&mut self) {
        self.greeted = false;
        self.asks.clear();
        self.open.clear();
        // What the agent tells itself does not pass through the keeper.
        let own = |input: &Input| {
            matches!(
                input,
                Input::PortsPicked { .. }
                    | Input::ProbeResult { .. }
                    | Input::Prepared { .. }
                    | Input::Fetched { .. }
                    | Input::HookEnded { .. }
                    | Input::LimitsSet { .. }
            )
        };
        self.told.retain(|told| matches!(told, Told::Input { input, .. } if own(input)));
        self.ask(Ask::Hello);
    }

    fn ask(&mut self, ask: Ask) {
        self.open.push_back(ask.clone());
        self.asks.push_back(ask);
    }

    // What may happen

    pub(crate) fn crash_agent(&mut self) {
        self.flush_some_asks();
        self.agents += 1;
        self.agent = Reconciler::restore(&self.keeper.boot_id, self.disk.clone(), self.now);
        self.outbox.clear();
        self.told.clear();
        self.word.clear();
        self.oracle.agent_restarted();
        self.connect();
    }

    pub(crate) fn lose_connection(&mut self) {
        if !self.outbox.is_empty() {
            return; // the agent is in the middle of something; it notices later
        }
        self.flush_some_asks();
        self.agent.keeper_lost();
        let open = std::mem::take(&mut self.open);
        self.connect();
        for ask in open {
            let Ask::Order(Order { instance, action }) = ask else { continue };
            match action {
                Action::Spawn(order) => {
                    let message = "connection lost".to_owned();
                    let error = SpawnError { kind: SpawnErrorKind::Unavailable, errno: 0, message };
                    self.input(instance.0, Input::SpawnFailed { key: order.key, error });
                }
                Action::Signal { key, signal, .. } => {
                    self.oracle.signal_lost(instance.0, key);
                    let error = SignalError::Unavailable;
                    self.input(instance.0, Input::SignalFailed { key, signal, error });
                }
                _ => {}
            }
        }
    }

    /// What was already in the socket reaches the keeper, its answers reach nobody.
    fn flush_some_asks(&mut self) {
        let some = self.rng.random_range(0..=self.asks.len());
        for _ in 0..some {
            self.keeper_turn();
        }
    }

    pub(crate) fn reboot(&mut self) {
        self.boots += 1;
        self.now = Monotonic(30_000_000_000);
        self.keeper.reboot(&format!("boot-{}", self.boots));
        self.asks.clear();
        self.hooks.clear();
        self.oracle.rebooted();
        self.crash_agent();
    }

    pub(crate) fn exit(&mut self, instance: u64, code: i32) {
        let exit = self.keeper.exit(instance, code, self.now);
        self.tell_exit(exit);
    }

    /// One that its agent still waits for.
    pub(crate) fn hook_ends(&mut self, instance: u64, succeeds: bool) -> bool {
        let Some(&RunningHook { key, hook, agent }) = self.hooks.get(&instance) else { return false };
        if agent != self.agents {
            return false;
        }
        self.hooks.remove(&instance);
        self.oracle.hook_ended(instance, key, hook, succeeds);
        let outcome = if succeeds { Ok(()) } else { Err("exited with status 1".to_owned()) };
        self.tell_hook(instance, key, hook, outcome);
        true
    }

    fn tell_hook(&mut self, instance: u64, key: ProcessKey, hook: Hook, outcome: Result<(), String>) {
        let result = HookResult { took: Duration::ZERO, outcome };
        let input = Input::HookEnded { key, hook, result };
        self.told.push_back(Told::Input { instance, input, answer: false });
    }

    /// What the shell does before it runs another, and when it is told to end one.
    fn kill_hook(&mut self, instance: u64) {
        if let Some(RunningHook { key, hook, agent }) = self.hooks.remove(&instance)
            && agent == self.agents
        {
            self.tell_hook(instance, key, hook, Err("it was ended".to_owned()));
        }
    }

    fn tell_exit(&mut self, exit: Option<pb::ExitRecord>) {
        if let Some(exit) = exit.filter(|_| self.greeted) {
            let instance = exit.instance_id;
            self.told.push_back(Told::Input { instance, input: Input::Exited(exit), answer: false });
        }
    }

    pub(crate) fn probe(&mut self, instance: u64, kind: ProbeKind, passed: bool) {
        if let Some(key) = self.keeper.running(instance) {
            let outcome =
                if passed { ProbeOutcome::Passed } else { ProbeOutcome::Failed("refused".to_owned()) };
            self.told.push_back(Told::Input {
                instance,
                input: Input::ProbeResult { key, probe: kind, outcome },
                answer: false,
            });
        }
    }

    pub(crate) fn pass(&mut self, duration: Duration) {
        self.now = self.now + duration;
        let orders = self.agent.tick(self.now, &mut self.rng);
        self.ordered(orders);
    }

    // The hub

    pub(crate) fn wish(
        &mut self,
        instance: u64,
        change: impl FnOnce(Option<pb::WantedInstance>) -> Option<pb::WantedInstance>,
    ) {
        self.finish_orders();
        let wish = change(self.wishes.remove(&instance));
        let removed = if wish.is_none() { vec![instance] } else { vec![] };
        let put: Vec<_> = wish.iter().cloned().collect();
        self.wishes.extend(wish.map(|wish| (instance, wish)));
        self.tell_wishes(put, removed);
    }

    /// Something happens to all of them in one command.
    pub(crate) fn wish_all(&mut self, change: impl Fn(pb::WantedInstance) -> Option<pb::WantedInstance>) {
        let before = std::mem::take(&mut self.wishes);
        let removed: Vec<u64> = before.keys().copied().collect();
        self.wishes = before.into_iter().filter_map(|(id, wish)| Some((id, change(wish)?))).collect();
        let put: Vec<_> = self.wishes.values().cloned().collect();
        let removed = removed.into_iter().filter(|id| !self.wishes.contains_key(id)).collect();
        self.tell_wishes(put, removed);
    }

    fn tell_wishes(&mut self, put: Vec<pb::WantedInstance>, removed: Vec<u64>) {
        self.finish_orders();
        let from_generation = self.generation;
        self.generation += 1;
        self.note_stops();
        let (generation, instances) = (self.generation, self.wishes.values().cloned().collect());
        let whole = pb::WantedSet { incarnation: INCARNATION, generation, instances };
        let delta = pb::WantedDelta {
            incarnation: INCARNATION,
            from_generation,
            to_generation: generation,
            put,
            removed,
        };
        if from_generation > 0 && self.rng.random_bool(0.5) {
            let orders = self.agent.apply_delta(self.now, &mut self.rng, delta.clone());
            let orders = orders.expect("it continues the generation in force");
            self.disk.push(pb::LedgerRecord { record: Some(Record::Delta(delta)) });
            self.ordered(orders);
        } else {
            let orders = self.agent.apply_wanted(self.now, &mut self.rng, whole.clone());
            let orders = orders.expect("it is newer");
            self.disk.push(pb::LedgerRecord { record: Some(Record::Wanted(whole.clone())) });
            self.ordered(orders);
            let stale = pb::WantedSet { generation: from_generation, instances: vec![], ..whole };
            self.agent.apply_wanted(self.now, &mut self.rng, stale).expect_err("it is older");
        }
    }

    /// Since when each is to stop; one whose stop is under way for another reason waits for nobody.
    fn note_stops(&mut self) {
        for id in 1..=INSTANCES {
            let run = self.wishes.get(&id).is_some_and(|wish| wish.desired() == pb::Desired::Run);
            if run {
                self.to_stop.remove(&id);
                continue;
            }
            let supervisor = self.agent.supervisor(InstanceId(id));
            let under_way = supervisor.is_some_and(|one| matches!(one.state(), State::Stopping(_)));
            self.to_stop.entry(id).or_insert((self.generation, self.now, under_way));
        }
    }

    /// What is needed is not told to stop before what needs it, when both are to.
    fn check_needs(&self, order: &Order) {
        let Action::Signal { signal: 15, .. } = order.action else { return };
        let id = order.instance.0;
        let Some(&(told, since, false)) = self.to_stop.get(&id) else { return };
        let Some(&(others, _, _)) = self.to_stop.get(&(id - 1)) else { return };
        let needing = self.agent.supervisor(InstanceId(id - 1));
        let stuck = needing.is_some_and(|one| match one.state() {
            State::Stopping(stopping) => matches!(stopping.step, StopStep::Killing { tries: 2.., .. }),
            _ => false,
        });
        if others <= told && !stuck && self.now < since + NEEDED_WAIT {
            let running = self.keeper.running(id - 1);
            assert!(
                running.is_none(),
                "i-{id} is stopped before {running:?} of i-{}, which needs it",
                id - 1
            );
        }
    }

    /// What is seen of the instances changes only when the agent says that it may have.
    pub(crate) fn check_stirred(&mut self) {
        let seen = self.agent.supervisors().map(|one| {
            let wanted = one.wanted().clone();
            let state = std::mem::discriminant(one.state());
            (one.instance(), (one.key().epoch, state, one.endpoint(), one.ports().clone(), wanted))
        });
        let seen: BTreeMap<_, _> = seen.collect();
        if !self.agent.take_stirred() {
            assert_eq!(self.seen, seen, "it changed, and the agent has not said so");
        }
        self.seen = seen;
    }

    /// What is kept beside the instances is what they say themselves.
    pub(crate) fn check_marks(&self) {
        let all = || self.agent.supervisors();
        assert_eq!(self.agent.next_wake(), all().filter_map(Supervisor::next_wake).min());
        assert!(self.agent.draining().eq(all().filter(|one| one.is_draining()).map(Supervisor::instance)));
        assert!(
            self.agent.gone().into_iter().eq(all().filter(|one| one.is_gone()).map(Supervisor::instance))
        );
    }

    /// The hub commits what is reported. What it said of the report before comes now, unless it is lost.
    pub(crate) fn report(&mut self, is_heard: bool) {
        self.finish_orders();
        let word = std::mem::take(&mut self.word);
        if is_heard {
            self.agent.acknowledge_ends(&word);
        }
        let reports = self.agent.take_reports(WallOffset::default());
        self.commit(&reports);
    }

    fn commit(&mut self, reports: &[pb::InstanceReport]) {
        self.word = reports.iter().filter_map(|report| self.hub.commit(report)).collect();
    }

    /// Once settled: of each process that has ended the hub knows how.
    pub(crate) fn check_ends(&mut self) {
        let reports = self.agent.full_report(WallOffset::default()).expect("the keeper's list is known");
        self.commit(&reports);
        self.hub.check_all_told(&self.keeper.ended.keys().copied().collect());
    }

    /// The hub commits what is gone, as far as it wants it gone, and forgets it.
    pub(crate) fn acknowledge_gone(&mut self) {
        let stopped = |wish: &pb::WantedInstance| wish.desired() == pb::Desired::Stop;
        let gone = self.agent.gone();
        let agreed: Vec<_> =
            gone.into_iter().filter(|id| self.wishes.get(&id.0).is_none_or(stopped)).collect();
        let orders = self.agent.acknowledge_gone(&agreed);
        self.ordered(orders);
        for id in agreed {
            if self.wishes.contains_key(&id.0) {
                self.wish(id.0, |_| None);
            }
        }
    }

    // The agent's shell

    fn input(&mut self, instance: u64, input: Input) {
        if let Input::Exited(exit) = &input {
            self.oracle.heard(exit, self.agent.is_keeper_known());
        }
        let orders = self.agent.input(self.now, &mut self.rng, InstanceId(instance), input);
        self.ordered(orders);
    }

    fn ordered(&mut self, orders: Vec<Order>) {
        for order in &orders {
            self.oracle.ordered(order, self.now);
            self.check_needs(order);
        }
        self.outbox.extend(orders);
    }

    fn finish_orders(&mut self) {
        while self.carry_out() {}
    }

    /// One order of the agent; false when there is none.
    fn carry_out(&mut self) -> bool {
        let Some(order) = self.outbox.pop_front() else {
            self.oracle.all_carried_out();
            return false;
        };
        let instance = order.instance;
        match &order.action {
            Action::Persist(ledger) => {
                self.oracle.persisted(ledger, self.now);
                let record = Record::Instance((**ledger).clone());
                self.disk.push(pb::LedgerRecord { record: Some(record) });
            }
            Action::ForgetLedger => {
                self.disk.push(pb::LedgerRecord { record: Some(Record::Forgotten(instance.0)) });
            }
            Action::PickPorts { fixed, dynamic } => {
                let taken = self.agent.ports_in_use();
                let ports =
                    nave_agent_core::ports::pick(&mut self.rng, 20_000..=20_050, fixed, dynamic, &taken);
                let ports = ports.expect("more ports than instances");
                self.told.push_back(Told::Input {
                    instance: instance.0,
                    input: Input::PortsPicked { ports },
                    answer: false,
                });
            }
            Action::Prepare(order) => {
                let result = match self.rng.random_bool(0.9) {
                    true => Ok(()),
                    false => {
                        let message = "not found".to_owned();
                        Err(SpawnError { kind: SpawnErrorKind::System, errno: 0, message })
                    }
                };
                let input = Input::Prepared { key: order.key, result };
                self.told.push_back(Told::Input { instance: instance.0, input, answer: false });
            }
            Action::SetLimits { key, .. } => {
                let input = Input::LimitsSet { key: *key, refused: Vec::new() };
                self.told.push_back(Told::Input { instance: instance.0, input, answer: false });
            }
            Action::CancelPreparation { .. } | Action::CancelFetch => {} // it has been answered
            Action::FetchAhead(order) => {
                let result = if self.rng.random_bool(0.5) { Ok(()) } else { Err("not found".to_owned()) };
                let input = Input::Fetched { template_version: order.template_version, result };
                self.told.push_back(Told::Input { instance: instance.0, input, answer: false });
            }
            Action::RunHook(order) => {
                self.kill_hook(instance.0);
                self.oracle.hook_begins(instance.0, order, self.keeper.running(instance.0));
                let (key, hook, agent) = (order.key, order.hook, self.agents);
                self.hooks.insert(instance.0, RunningHook { key, hook, agent });
            }
            Action::EndHook { key, hook } => {
                self.kill_hook(instance.0);
                self.tell_hook(instance.0, *key, *hook, Err("it was ended".to_owned()));
            }
            Action::Spawn(_)
            | Action::Signal { .. }
            | Action::SweepCgroup { .. }
            | Action::ListProcesses
            | Action::AcknowledgeExits { .. } => {
                self.oracle.carried_out(&order);
                self.ask(Ask::Order(order));
            }
            Action::StartProbe(_)
            | Action::StopProbes
            | Action::Forget { .. }
            | Action::Report
            | Action::Gone
            | Action::WakeAt(_)
            | Action::SetDeadline { .. }
            | Action::Log { .. } => {}
        }
        true
    }

    fn keeper_turn(&mut self) -> bool {
        let Some(ask) = self.asks.pop_front() else { return false };
        match ask {
            Ask::Hello => {
                self.greeted = true;
                for exit in self.keeper.unacknowledged.clone() {
                    self.tell_exit(Some(exit));
                }
                self.told.push_back(Told::List { processes: self.keeper.list(), answer: true });
            }
            Ask::Order(Order { instance, action }) => self.serve(instance.0, action),
        }
        true
    }

    fn serve(&mut self, instance: u64, action: Action) {
        match action {
            Action::Spawn(order) => {
                let key = order.key;
                self.oracle.started(instance, key, self.now, &self.keeper);
                let beside = self.hooks.get(&instance);
                assert!(beside.is_none(), "i-{instance}: {key:?} is started beside a hook: {beside:?}");
                self.oracle.hooks_allow_start(instance, &order);
                let input = match self.keeper.spawn(instance, &order, self.now) {
                    Ok((process, exit)) => {
                        self.tell_exit(exit);
                        Input::Spawned { key, process, started_unix_ns: 1 }
                    }
                    Err(error) => Input::SpawnFailed { key, error },
                };
                self.told.push_back(Told::Input { instance, input, answer: true });
            }
            Action::Signal { key, signal, scope, .. } => {
                match self.keeper.signal(instance, key, signal, scope, self.now) {
                    Ok(exit) => {
                        self.tell_exit(exit);
                        self.told.push_back(Told::Answered);
                    }
                    Err(()) => {
                        let input = Input::SignalFailed { key, signal, error: SignalError::Gone };
                        self.told.push_back(Told::Input { instance, input, answer: true });
                    }
                }
            }
            Action::SweepCgroup { key } => self.told.push_back(if self.keeper.sweep(instance, key) {
                Told::Input { instance, input: Input::CgroupEmpty { key, killed: 0 }, answer: true }
            } else {
                Told::Answered
            }),
            Action::ListProcesses => {
                self.told.push_back(Told::List { processes: self.keeper.list(), answer: true });
            }
            Action::AcknowledgeExits { up_to_sequence } => {
                for exit in self.keeper.acknowledge(up_to_sequence) {
                    self.oracle.acknowledged(&exit, &self.disk);
                }
                self.told.push_back(Told::Answered);
            }
            other => unreachable!("not for the keeper: {other:?}"),
        }
    }

    fn agent_turn(&mut self) -> bool {
        let Some(told) = self.told.pop_front() else { return false };
        match told {
            Told::Input { instance, input, answer } => {
                if answer {
                    self.open.pop_front();
                }
                self.input(instance, input);
            }
            Told::List { processes, answer } => {
                if answer {
                    self.open.pop_front();
                }
                self.oracle.listed();
                let orders = self.agent.keeper_processes(self.now, &mut self.rng, &processes);
                self.ordered(orders);
            }
            Told::Answered => {
                self.open.pop_front();
            }
        }
        true
    }

    /// One thing moves: the agent carries out its orders before it takes the next input.
    pub(crate) fn turn(&mut self) -> bool {
        if self.carry_out() {
            return true;
        }
        let keeper_first = self.rng.random_bool(0.5);
        (keeper_first && self.keeper_turn()) || self.agent_turn() || self.keeper_turn()
    }

    /// Until nothing is left to do and nothing is left to wait for.
    pub(crate) fn settle(&mut self) {
        for _ in 0..100_000 {
            let hooks: Vec<u64> = self.hooks.keys().copied().collect();
            if self.turn() || hooks.into_iter().any(|instance| self.hook_ends(instance, true)) {
                continue;
            }
            match self.agent.next_wake() {
                Some(at) => self.pass(at.since(self.now)),
                None => return,
            }
        }
        panic!("never settles: {:#?}", self.agent.supervisors().collect::<Vec<_>>());
    }

    /// What each wish has become, once settled and without faults.
    pub(crate) fn check_converged(&mut self) {
        let reports = self.agent.full_report(WallOffset::default()).expect("the keeper's list is known");
        let reported: BTreeMap<_, _> = reports.iter().map(|report| (report.instance_id, report)).collect();
        for (&instance, wish) in &self.wishes {
            let supervisor = self.agent.supervisor(InstanceId(instance)).expect("it is wanted");
            let running = self.keeper.running(instance);
            if wish.desired() == pb::Desired::Stop {
                assert!(
                    supervisor.is_gone() && running.is_none(),
                    "i-{instance} should be gone: {supervisor:#?}"
                );
                continue;
            }
            assert_eq!(reported[&instance].epoch, wish.epoch);
            let said = reported[&instance].fetch.as_ref().map(|fetch| (fetch.template_version, fetch.done));
            let order = wish.fetch.as_ref().map(|order| (order.template_version, true));
            assert_eq!(said, order, "i-{instance} was to fetch, and has in the end");
            match supervisor.state() {
                State::Running(_) => {
                    assert_eq!(running, Some(supervisor.key()));
                    assert_eq!(supervisor.key().epoch, wish.epoch);
                }
                State::Failed { reason } => {
                    assert_eq!(running, None);
                    self.oracle.may_have_given_up(instance, wish.epoch, reason);
                }
                other => panic!("i-{instance} should run: {other:?}"),
            }
        }
        assert!(self.hooks.is_empty(), "run for nobody: {:?}", self.hooks);
        for (&instance, wish) in &self.wishes {
            if wish.desired() == pb::Desired::Stop || self.keeper.running(instance).is_none() {
                self.oracle.owes_nothing(instance);
            }
        }
        let alive: BTreeSet<_> = self.keeper.list().iter().map(|process| process.instance_id).collect();
        assert!(alive.iter().all(|id| self.wishes.contains_key(id)), "runs for nobody: {alive:?}");
    }

    pub(crate) fn key(&self, instance: u64) -> Option<ProcessKey> {
        self.keeper.running(instance)
    }

    /// Instances of which the disk still has a ledger record.
    pub(crate) fn on_disk(&self) -> BTreeSet<u64> {
        let mut ids = BTreeSet::new();
        for record in &self.disk {
            match &record.record {
                Some(Record::Instance(ledger)) => {
                    ids.insert(ledger.instance_id);
                }
                Some(Record::Forgotten(id)) => {
                    ids.remove(id);
                }
                Some(Record::Wanted(_) | Record::Delta(_) | Record::Damaged(_)) | None => {}
            }
        }
        ids
    }
}
