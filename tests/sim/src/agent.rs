//! One host: its clock, its disk, its keeper, and the agent that comes and goes. The agent's shell does what the real
//! one does, in the same order (records before effects, by the real sequencer), and may die between any two steps.

use std::collections::BTreeSet;
use std::time::Duration;

use nave_agent_core::supervisor::{Hook, HookResult, ProbeKind, ProbeOrder, ProbeOutcome};
use nave_agent_core::{Action, Input, Monotonic, Order, ProcessKey, Reconciler};
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use pb::hub_message::Message as FromHub;
use pb::ledger_record::Record;
use rand::Rng as _;
use rand::seq::SliceRandom as _;

use crate::bug::Bug;
use crate::clock::{Clock, MS, SECOND};
use crate::context::Context;
use crate::event::{Ask, Event, ToAgent, ToKeeper, Told};
use crate::keeper::Keeper;
use crate::network::{Refusal, Way, Word};
use crate::uplink::Uplink;

// The agent's own file: it is plain data, but its crate brings a runtime with it.
#[path = "../../../agent/src/sequence.rs"]
mod sequence;

use sequence::Sequencer;

/// The ledger is rewritten when it has so many records.
const LEDGER_LONG: usize = 120;
/// A session that lasted so long was a good one.
/// After a refusal that only a person can change.
const REFUSED_PAUSE: i64 = 10 * SECOND;
const GOOD_SESSION: i64 = 10 * SECOND;

#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) index: usize,
    /// As the hub calls it.
    pub(crate) id: u64,
    boot: Clock,
    boots: u32,
    pub(crate) up: bool,
    disk: Vec<pb::LedgerRecord>,
    pub(crate) keeper: Keeper,
    pub(crate) agent: Option<Agent>,
    runs: u64,
}

/// A run of the agent.
#[derive(Debug)]
pub(crate) struct Agent {
    run: u64,
    reconciler: Reconciler,
    sequencer: Sequencer,
    pub(crate) uplink: Option<Uplink>,
    /// Members to dial, in order; the last dialled first to be avoided.
    to_dial: Vec<usize>,
    avoid: Option<usize>,
    dialling: bool,
    dial_at: i64,
    pause: i64,
    wake_at: Option<i64>,
    asks: u64,
    /// Steps until it dies in the middle of its work.
    doom: Option<u32>,
}

/// What one turn has to do.
#[derive(Debug, Default)]
struct Work {
    records: Vec<Record>,
    orders: Vec<Order>,
}

impl Host {
    pub(crate) fn new(cx: &mut Context, index: usize) -> Self {
        let reading = cx.rng.random_range(0..1_000_000 * SECOND);
        Self {
            index,
            id: index as u64 + 1,
            boot: Clock::begin(&mut cx.rng, 0, reading),
            boots: 0,
            up: true,
            disk: Vec::new(),
            keeper: Keeper::new(index),
            agent: None,
            runs: 0,
        }
    }

    fn now(&self, cx: &Context) -> Monotonic {
        Monotonic(self.boot.read(cx.now))
    }

    // Life and death

    pub(crate) fn start_agent(&mut self, cx: &mut Context) {
        if !self.up || self.agent.is_some() {
            return;
        }
        cx.note(|| format!("host {}: the agent starts", self.index));
        self.runs += 1;
        let now = self.now(cx);
        let reconciler = Reconciler::restore(&self.keeper.boot_id, self.disk.clone(), now);
        self.agent = Some(Agent {
            run: self.runs,
            reconciler,
            sequencer: Sequencer::default(),
            uplink: None,
            to_dial: Vec::new(),
            avoid: None,
            dialling: false,
            dial_at: now.0,
            pause: 200 * MS,
            wake_at: None,
            asks: 0,
            doom: None,
        });
        self.ask(cx, Ask::Hello);
        self.end_turn(cx);
    }

    /// SIGKILL of the agent alone; its processes go on.
    pub(crate) fn crash_agent(&mut self, cx: &mut Context) {
        let Some(agent) = self.agent.take() else { return };
        cx.note(|| format!("host {}: the agent is killed", self.index));
        let some = cx.rng.random_range(0..=agent.asks);
        self.keeper.agent_died(agent.run, some.max(agent.asks.saturating_sub(4)));
        let node = cx.net.host(self.index);
        cx.net.thaw(node);
        if let Some(uplink) = agent.uplink {
            cx.drop_end(uplink.stream, Way::Down);
        }
    }

    /// The agent will die after so many more steps of its work.
    pub(crate) fn doom_agent(&mut self, steps: u32) {
        if let Some(agent) = &mut self.agent {
            agent.doom = Some(steps);
        }
    }

    /// Power is lost: everything dies, the disk stays.
    pub(crate) fn power_off(&mut self, cx: &mut Context) {
        if !self.up {
            return;
        }
        cx.note(|| format!("host {}: power is lost", self.index));
        self.crash_agent(cx);
        self.up = false;
        self.boots += 1;
        self.keeper.reboot(cx, self.boots);
    }

    pub(crate) fn power_on(&mut self, cx: &mut Context) {
        if self.up {
            return;
        }
        cx.note(|| format!("host {}: power is back", self.index));
        self.up = true;
        let reading = cx.rng.random_range(5 * SECOND..30 * SECOND);
        self.boot = Clock::begin(&mut cx.rng, cx.now, reading);
        self.start_agent(cx);
    }

    // Events

    pub(crate) fn keeper_event(&mut self, cx: &mut Context, event: ToKeeper) {
        if self.up {
            let boot = self.boot;
            self.keeper.event(cx, &boot, event);
        }
    }

    pub(crate) fn agent_event(&mut self, cx: &mut Context, event: ToAgent) {
        let Some(agent) = &mut self.agent else { return };
        let mut work = Work::default();
        match event {
            ToAgent::Wake { run, at } if run == agent.run && agent.wake_at == Some(at) => {
                agent.wake_at = None;
            }
            ToAgent::Told { run, told } if run == agent.run => self.told(cx, told, &mut work),
            ToAgent::Input { run, instance, mut input } if run == agent.run => {
                if let Input::ProbeResult { outcome, .. } = &mut *input
                    && self.keeper.process(instance).is_some_and(|process| process.is_well(cx.now))
                {
                    *outcome = ProbeOutcome::Passed;
                }
                self.input(cx, InstanceId(instance), *input, &mut work);
            }
            ToAgent::Dialled { run, member, taken } if run == agent.run => self.dialled(cx, member, taken),
            ToAgent::Wake { .. } | ToAgent::Told { .. } | ToAgent::Input { .. } | ToAgent::Dialled { .. } => {
                return;
            }
        }
        self.turn(cx, work);
    }

    /// A word from the hub, or the end of the stream.
    pub(crate) fn hear(&mut self, cx: &mut Context, stream: u64, word: Word) {
        let now = self.now(cx);
        let Some(agent) = &mut self.agent else { return };
        let Some(uplink) = agent.uplink.as_mut().filter(|uplink| uplink.stream == stream) else { return };
        let mut work = Work::default();
        match word {
            Word::Hub(message) => match *message {
                FromHub::Welcome(_) => uplink.welcomed = true,
                FromHub::Wanted(set) => self.wanted(cx, set, &mut work),
                FromHub::Delta(delta) => self.delta(cx, delta, &mut work),
                FromHub::ReportAcknowledged(acknowledged) => {
                    let (gone, ends) = uplink.acknowledged(acknowledged.sequence);
                    agent.reconciler.acknowledge_ends(&ends);
                    work.orders = agent.reconciler.acknowledge_gone(&gone);
                }
                FromHub::Lease(lease) => {
                    if let Some(until) = uplink.lease_until(&lease) {
                        work.orders = agent.reconciler.lease(now, &mut cx.rng, until);
                    }
                }
                FromHub::Goodbye(_) | FromHub::Directory(_) | FromHub::CallersLeft(_) => {}
            },
            Word::Refused(Refusal::Forgotten) => {
                let (nothing, orders) = agent.reconciler.given_up(now, &mut cx.rng);
                work.records.push(Record::Wanted(nothing));
                work.orders = orders;
                self.leave(cx);
                self.pause(cx, REFUSED_PAUSE);
            }
            Word::Closed | Word::Agent(_) | Word::Refused(Refusal::Held) => self.leave(cx),
        }
        self.turn(cx, work);
    }

    /// The session is over, or is of no use.
    pub(crate) fn leave(&mut self, cx: &mut Context) {
        let now = self.now(cx).0;
        let Some(agent) = &mut self.agent else { return };
        let Some(uplink) = agent.uplink.take() else { return };
        cx.close(uplink.stream, Way::Down);
        if now >= uplink.opened + GOOD_SESSION {
            agent.pause = 200 * MS;
        }
        agent.to_dial.clear();
        agent.dial_at = now + cx.rng.random_range(agent.pause / 2..=agent.pause);
        agent.pause = (agent.pause * 2).min(2 * SECOND);
    }

    /// The hub has said no, which only a person changes.
    fn pause(&mut self, cx: &Context, pause: i64) {
        let now = self.now(cx).0;
        if let Some(agent) = &mut self.agent {
            agent.dial_at = now + pause;
        }
    }

    fn told(&mut self, cx: &mut Context, told: Told, work: &mut Work) {
        let now = self.now(cx);
        let Some(agent) = &mut self.agent else { return };
        match told {
            Told::Input { instance, input, answers } => {
                let instance = InstanceId(instance);
                if answers {
                    work.orders.extend(agent.sequencer.answered(instance));
                }
                match *input {
                    Input::Exited(exit) => {
                        work.orders.extend(agent.reconciler.exited(now, &mut cx.rng, exit))
                    }
                    input => self.input(cx, instance, input, work),
                }
            }
            Told::Answered { instance } => work.orders.extend(agent.sequencer.answered(InstanceId(instance))),
            Told::List(list) => {
                work.orders.extend(agent.reconciler.keeper_processes(now, &mut cx.rng, &list));
            }
        }
    }

    fn input(&mut self, cx: &mut Context, instance: InstanceId, input: Input, work: &mut Work) {
        let now = self.now(cx);
        let Some(agent) = &mut self.agent else { return };
        work.orders.extend(agent.reconciler.input(now, &mut cx.rng, instance, input));
    }

    fn wanted(&mut self, cx: &mut Context, mut set: pb::WantedSet, work: &mut Work) {
        let now = self.now(cx);
        let Some(agent) = &mut self.agent else { return };
        set.instances.iter_mut().for_each(|wanted| agent.blur_epoch(cx, wanted));
        let known = agent.reconciler.generation() == (set.incarnation, set.generation);
        match agent.reconciler.apply_wanted(now, &mut cx.rng, set.clone()) {
            Ok(orders) => {
                if !known {
                    work.records.push(Record::Wanted(set));
                }
                work.orders.extend(orders);
            }
            Err(stale) => {
                cx.note(|| format!("host {}: {stale}", self.index));
                self.leave(cx);
            }
        }
    }

    fn delta(&mut self, cx: &mut Context, mut delta: pb::WantedDelta, work: &mut Work) {
        let now = self.now(cx);
        let Some(agent) = &mut self.agent else { return };
        delta.put.iter_mut().for_each(|wanted| agent.blur_epoch(cx, wanted));
        match agent.reconciler.apply_delta(now, &mut cx.rng, delta.clone()) {
            Ok(orders) => {
                work.records.push(Record::Delta(delta));
                work.orders.extend(orders);
            }
            Err(gap) => {
                cx.note(|| format!("host {}: {gap}", self.index));
                self.leave(cx);
            }
        }
    }

    // A turn

    fn turn(&mut self, cx: &mut Context, mut work: Work) {
        let now = self.now(cx);
        let Some(agent) = &mut self.agent else { return };
        work.orders.extend(agent.reconciler.tick(now, &mut cx.rng));
        self.carry_out(cx, work);
        self.end_turn(cx);
    }

    /// A turn in which nothing new is heard.
    pub(crate) fn tick(&mut self, cx: &mut Context) {
        self.turn(cx, Work::default());
    }

    fn end_turn(&mut self, cx: &mut Context) {
        let now = self.now(cx);
        let Some(agent) = &mut self.agent else { return };
        if let Some(uplink) = &mut agent.uplink {
            uplink.say(cx, &mut agent.reconciler, now);
            uplink.beat(cx, now.0);
        }
        self.dial(cx);
        self.set_timer(cx);
    }

    fn set_timer(&mut self, cx: &mut Context) {
        let (index, boot) = (self.index, self.boot);
        let Some(agent) = &mut self.agent else { return };
        let next = agent.reconciler.next_wake().map_or(i64::MAX, |at| at.0);
        let uplink = match &agent.uplink {
            Some(uplink) => uplink.next_wake(),
            None if agent.dialling => i64::MAX,
            None => agent.dial_at,
        };
        let at = boot.when(next.min(uplink).min(boot.read(cx.now) + 10 * SECOND)).max(cx.now);
        if agent.wake_at.is_none_or(|before| before > at) {
            agent.wake_at = Some(at);
            cx.at(at, Event::Agent(index, ToAgent::Wake { run: agent.run, at }));
        }
    }

    /// Ledger first, effects after, round by round.
    fn carry_out(&mut self, cx: &mut Context, mut work: Work) {
        while !work.records.is_empty() || !work.orders.is_empty() {
            let Some(agent) = &mut self.agent else { return };
            let round = agent.sequencer.round(std::mem::take(&mut work.orders));
            work.orders = round.later;
            work.records.extend(round.records);
            if !work.records.is_empty() && self.dies(cx) {
                return;
            }
            let records = std::mem::take(&mut work.records).into_iter();
            self.disk.extend(records.map(|record| pb::LedgerRecord { record: Some(record) }));
            for Order { instance, action } in round.effects {
                if self.dies(cx) {
                    return;
                }
                self.perform(cx, instance, action, &mut work);
            }
        }
        let Some(agent) = &mut self.agent else { return };
        if let Some(up_to_sequence) = agent.sequencer.acknowledge() {
            let action = Action::AcknowledgeExits { up_to_sequence };
            self.order(cx, Order { instance: InstanceId(0), action });
        }
        let Some(agent) = &mut self.agent else { return };
        if self.disk.len() > LEDGER_LONG && agent.sequencer.is_settled() {
            self.disk = agent.reconciler.ledger_records();
        }
    }

    fn dies(&mut self, cx: &mut Context) -> bool {
        let Some(agent) = &mut self.agent else { return true };
        match &mut agent.doom {
            None => false,
            Some(0) => {
                let soon = cx.rng.random_range(50 * MS..3 * SECOND);
                self.crash_agent(cx);
                cx.after(soon, Event::Heal(crate::event::Heal::StartAgent(self.index)));
                true
            }
            Some(steps) => {
                *steps -= 1;
                false
            }
        }
    }

    fn perform(&mut self, cx: &mut Context, instance: InstanceId, action: Action, work: &mut Work) {
        match action {
            Action::PickPorts { fixed, dynamic } => {
                let Some(agent) = &mut self.agent else { return };
                let taken: BTreeSet<u16> = agent.taken_ports(instance);
                let picked =
                    nave_agent_core::ports::pick(&mut cx.rng, 20_000..=20_200, &fixed, &dynamic, &taken);
                let input = match picked {
                    Ok(ports) => Input::PortsPicked { ports },
                    Err(error) => Input::PortClash { message: error.to_string() },
                };
                self.input(cx, instance, input, work);
            }
            Action::StartProbe(order) => self.probe(cx, instance.0, &order),
            Action::Prepare(order) => {
                self.answers(cx, instance, Input::Prepared { key: order.key, result: Ok(()) })
            }
            Action::RunHook(order) => {
                let fails = !cx.calm && cx.rng.random_bool(0.1);
                let outcome = if fails { Err("it had a bad day".to_owned()) } else { Ok(()) };
                self.hook_ends(cx, instance, order.key, order.hook, outcome);
            }
            Action::EndHook { key, hook } => {
                self.hook_ends(cx, instance, key, hook, Err("it was ended".to_owned()));
            }
            Action::SetLimits { key, .. } => {
                self.answers(cx, instance, Input::LimitsSet { key, refused: Vec::new() });
            }
            Action::CancelPreparation { .. } | Action::CancelFetch => {} // it takes no long time here
            Action::FetchAhead(order) => {
                let fails = !cx.calm && cx.rng.random_bool(0.3);
                let result = if fails { Err("artifact tool: not found".to_owned()) } else { Ok(()) };
                let template_version = order.template_version;
                self.answers(cx, instance, Input::Fetched { template_version, result });
            }
            Action::Spawn(_)
            | Action::Signal { .. }
            | Action::SetDeadline { .. }
            | Action::SweepCgroup { .. }
            | Action::ListProcesses
            | Action::Forget { .. } => self.order(cx, Order { instance, action }),
            Action::StopProbes
            | Action::Persist(_)
            | Action::ForgetLedger
            | Action::AcknowledgeExits { .. }
            | Action::Report
            | Action::Gone
            | Action::WakeAt(_)
            | Action::Log { .. } => {}
        }
    }

    fn hook_ends(
        &mut self,
        cx: &mut Context,
        instance: InstanceId,
        key: ProcessKey,
        hook: Hook,
        outcome: Result<(), String>,
    ) {
        let result = HookResult { took: Duration::ZERO, outcome };
        self.answers(cx, instance, Input::HookEnded { key, hook, result });
    }

    /// What a job beside the main loop has to say in a while.
    fn answers(&mut self, cx: &mut Context, instance: InstanceId, input: Input) {
        let Some(agent) = &self.agent else { return };
        let soon = cx.rng.random_range(MS..SECOND);
        let input = Box::new(input);
        cx.after(
            soon,
            Event::Agent(self.index, ToAgent::Input { run: agent.run, instance: instance.0, input }),
        );
    }

    fn order(&mut self, cx: &mut Context, order: Order) {
        let Some(agent) = &self.agent else { return };
        let told = match (&order.action, agent.reconciler.supervisor(order.instance)) {
            (Action::Signal { key, .. }, Some(supervisor)) => {
                let wanted = supervisor.wanted();
                supervisor.is_forgotten() || wanted.desired() == pb::Desired::Stop || wanted.epoch > key.epoch
            }
            _ => true,
        };
        self.ask(cx, Ask::Order { order: Box::new(order), told });
    }

    fn ask(&mut self, cx: &mut Context, ask: Ask) {
        let Some(agent) = &mut self.agent else { return };
        agent.asks += 1;
        let (run, number) = (agent.run, agent.asks);
        self.keeper.ask(cx, run, number, ask);
    }

    /// A probe's answers, where they say something new: the first that passes, or the first that fail.
    fn probe(&mut self, cx: &mut Context, instance: u64, order: &ProbeOrder) {
        let Some(agent) = &self.agent else { return };
        let Some(process) = self.keeper.process(instance).filter(|process| process.key == order.key) else {
            return;
        };
        let (run, key) = (agent.run, order.key);
        let soon = cx.rng.random_range(5 * MS..SECOND);
        let (at, outcome) = match (process.sick, process.healthy_at) {
            (true, _) => (cx.now + soon, ProbeOutcome::Failed("sick".to_owned())),
            (false, Some(at)) => (at.max(cx.now) + soon, ProbeOutcome::Passed),
            (false, None) => (cx.now + soon, ProbeOutcome::Failed("never healthy".to_owned())),
        };
        let times = if outcome == ProbeOutcome::Passed { 1 } else { 3 };
        for time in 0..times {
            let outcome = outcome.clone();
            let input = Box::new(Input::ProbeResult { key, probe: ProbeKind::Ready, outcome });
            cx.at(at + time * SECOND, Event::Agent(self.index, ToAgent::Input { run, instance, input }));
        }
    }

    /// The probes of a process that has changed see it.
    pub(crate) fn probe_again(&mut self, cx: &mut Context, instance: u64) {
        let Some(process) = self.keeper.process(instance) else { return };
        let order = ProbeOrder {
            key: process.key,
            kind: ProbeKind::Ready,
            spec: pb::Probe::default(),
            port: None,
            interval: std::time::Duration::from_secs(1),
            timeout: std::time::Duration::from_secs(1),
        };
        self.probe(cx, instance, &order);
    }

    // Dialling

    fn dial(&mut self, cx: &mut Context) {
        let now = self.now(cx).0;
        let (index, node) = (self.index, cx.net.host(self.index));
        let Some(agent) = &mut self.agent else { return };
        if agent.uplink.is_some() || agent.dialling || now < agent.dial_at {
            return;
        }
        if agent.to_dial.is_empty() {
            let mut order: Vec<usize> = (0..node - index).collect();
            order.shuffle(&mut cx.rng);
            order.sort_by_key(|member| Some(*member) != agent.avoid);
            agent.to_dial = order;
        }
        let Some(member) = agent.to_dial.pop() else { return };
        agent.dialling = true;
        agent.avoid = Some(member);
        let run = agent.run;
        let open = cx.net.both_ways(node, member) && cx.net.answers(member, cx.now);
        let wait = if open { 2 * cx.net.delay(&mut cx.rng, node, member) } else { 5 * SECOND };
        cx.after(wait, Event::Agent(index, ToAgent::Dialled { run, member, taken: open }));
    }

    fn dialled(&mut self, cx: &mut Context, member: usize, taken: bool) {
        let now = self.now(cx).0;
        let (index, id) = (self.index, self.id);
        // Differs from boot to boot.
        let place = (id << 16) + u64::from(self.boots) + 1;
        let Some(agent) = &mut self.agent else { return };
        agent.dialling = false;
        let node = cx.net.host(index);
        if taken && cx.net.both_ways(node, member) && cx.net.answers(member, cx.now) {
            let stream = cx.net.open_stream(index, member);
            agent.uplink = Some(Uplink::open(cx, stream, id, place, now, agent.reconciler.generation()));
            agent.to_dial.clear();
        } else if agent.to_dial.is_empty() {
            agent.dial_at = now + cx.rng.random_range(agent.pause / 2..=agent.pause);
            agent.pause = (agent.pause * 2).min(2 * SECOND);
        }
    }
}

impl Agent {
    fn taken_ports(&self, instance: InstanceId) -> BTreeSet<u16> {
        let others = self.reconciler.supervisors().filter(|one| one.instance() != instance && !one.is_gone());
        others.flat_map(|one| one.ports().values().copied()).collect()
    }

    /// The agent of [`Bug::EpochNotChecked`].
    fn blur_epoch(&self, cx: &Context, wanted: &mut pb::WantedInstance) {
        if cx.bug != Some(Bug::EpochNotChecked) {
            return;
        }
        if let Some(known) = self.reconciler.supervisor(InstanceId(wanted.instance_id)) {
            wanted.epoch = known.wanted().epoch;
        }
    }
}
