//! A cluster in a box: members, hosts, network, and what is done to them, driven event by event until the scenario is
//! over and everything is as wanted, or a promise is broken.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nave_orchestrator_core::{ClusterState, Unplaced, desired_count, plan, ready_count};
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use pb::command::Body;
use pb::observed::State;
use rand::Rng as _;

use crate::agent::Host;
use crate::bug::Bug;
use crate::clock::{Clock, MS, SECOND};
use crate::context::{Context, Violation, seconds};
use crate::event::{Event, Heal};
use crate::hub::{Hub, Origin};
use crate::member::Member;
use crate::network::{Network, Way, Word};
use crate::oracle::Kind;
use crate::scenario::{Act, Operation, Scenario, service};

/// How long after the last fault everything has to be as wanted: longer than every back-off there is, one after the
/// other (a restart budget of 5 min, then 10 min until the next host is tried).
const CONVERGES_WITHIN: i64 = 3_600 * SECOND;
/// Until then late consequences of a fault may still upset it: a reboot noticed after everything looked well.
const SETTLES_WITHIN: i64 = 180 * SECOND;
/// And stays so, for this long.
const STAYS: i64 = 30 * SECOND;
const LOOK: i64 = 2 * SECOND;
/// A world that does so much is going round in circles.
const EVENTS_MAX: u64 = 5_000_000;
/// Tries of an operator whose command's outcome is unknown.
const OPERATOR_TRIES: u32 = 30;

/// What a run came to.
#[derive(Debug, Clone, Default)]
pub struct Run {
    pub violation: Option<Violation>,
    /// What the world lived through, nanoseconds.
    pub lived: i64,
    pub events: u64,
    pub entries: u64,
    pub processes: u64,
    pub acts: usize,
    /// Lines, when asked for.
    pub trace: Vec<String>,
}

/// (instance, host, epoch) of what runs.
type Running = BTreeSet<(u64, usize, u64)>;

struct Command {
    body: Body,
    done: bool,
    tries: u32,
    member: usize,
}

struct World {
    cx: Context,
    hub: Hub,
    hosts: Vec<Host>,
    scenario: Scenario,
    commands: Vec<Command>,
    stays: Option<(i64, Running)>,
    done: bool,
}

/// Runs a scenario to its end.
pub(crate) fn run(scenario: Scenario, bug: Option<Bug>, trace: bool) -> Run {
    let mut world = World::new(scenario, bug, trace);
    let mut events = 0;
    while !world.done && world.cx.violation.is_none() {
        let Some(event) = world.cx.next() else { break };
        world.happen(event);
        events += 1;
        if events > EVENTS_MAX {
            world.cx.violated("it comes to rest", || format!("{EVENTS_MAX} events"));
        }
    }
    Run {
        lived: world.cx.now,
        events,
        entries: world.hub.committed(),
        processes: world.cx.oracle.started,
        acts: world.scenario.acts.len(),
        violation: world.cx.violation,
        trace: world.cx.trace.unwrap_or_default(),
    }
}

impl World {
    fn new(scenario: Scenario, bug: Option<Bug>, trace: bool) -> Self {
        let network = Network::new(scenario.members, scenario.hosts);
        let mut cx = Context::new(scenario.seed, network, bug, trace);
        let members = (0..scenario.members).map(|_| {
            let boot = Clock::begin(&mut cx.rng, 0, 10 * SECOND);
            let wall = cx.rng.random_range(1_700_000_000 * SECOND..1_700_000_020 * SECOND);
            Member::new(boot, Clock::begin(&mut cx.rng, 0, wall))
        });
        let members = members.collect();
        let hosts = (0..scenario.hosts).map(|index| Host::new(&mut cx, index)).collect();
        let mut world = Self {
            cx,
            hub: Hub::new(members),
            hosts,
            scenario,
            commands: Vec::new(),
            stays: None,
            done: false,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        let Self { cx, hub, scenario, .. } = self;
        hub.lead(cx, 0);
        for member in 0..scenario.members {
            hub.begin_member(cx, member);
        }
        for body in first_commands(scenario.hosts) {
            hub.propose(cx, 0, body, Origin::Operator(usize::MAX), None);
        }
        for (index, (at, _)) in scenario.acts.iter().enumerate() {
            cx.at(*at, Event::Act(index));
        }
        cx.at(scenario.calm_at, Event::Look);
        for host in 0..scenario.hosts {
            cx.at(300 * MS, Event::Heal(Heal::StartAgent(host)));
        }
    }

    fn happen(&mut self, event: Event) {
        let Self { cx, hub, hosts, .. } = self;
        match event {
            Event::Act(index) => {
                let act = self.scenario.acts[index].1.clone();
                self.act(act);
            }
            Event::Heal(heal) => self.heal(heal),
            Event::Arrive { stream, way, word } => self.arrive(stream, way, word),
            Event::PingLost { stream, way } => self.ping_lost(stream, way),
            Event::Agent(host, event) => {
                let until = cx.net.frozen_until(cx.net.host(host));
                match until > cx.now {
                    true => cx.at(until, Event::Agent(host, event)),
                    false => hosts[host].agent_event(cx, event),
                }
            }
            Event::Keeper(host, event) => hosts[host].keeper_event(cx, event),
            Event::Member(member, event) => {
                let until = cx.net.frozen_until(member);
                match until > cx.now {
                    true => cx.at(until, Event::Member(member, event)),
                    false => hub.member_event(cx, member, event),
                }
            }
            Event::Elect { look } => hub.elect(cx, look),
            Event::Answer { proposal, reply } => {
                if let Some(origin) = hub.origin(proposal) {
                    self.answer(origin, reply);
                }
            }
            Event::Operator(index) => self.operate(index),
            Event::Look => self.look(),
        }
    }

    fn arrive(&mut self, stream: u64, way: Way, word: Word) {
        let Self { cx, hub, hosts, .. } = self;
        let Some((host, member)) = cx.net.stream(stream).map(|stream| (stream.host, stream.member)) else {
            return;
        };
        let receiver = match way {
            Way::Up => member,
            Way::Down => cx.net.host(host),
        };
        let until = cx.net.frozen_until(receiver);
        if until > cx.now {
            return cx.at(until, Event::Arrive { stream, way, word });
        }
        let Some(word) = cx.arrive(stream, way, word) else { return };
        match way {
            Way::Up => hub.hear(cx, member, stream, word),
            Way::Down => hosts[host].hear(cx, stream, word),
        }
    }

    fn ping_lost(&mut self, stream: u64, way: Way) {
        let Self { cx, hub, hosts, .. } = self;
        let Some((host, member)) = cx.net.stream(stream).map(|stream| (stream.host, stream.member)) else {
            return;
        };
        let node = cx.net.host(host);
        let fine = cx.net.both_ways(node, member) && cx.net.answers(member, cx.now);
        if fine || !cx.net.hears(stream, way) {
            return;
        }
        match way {
            Way::Up => hub.hear(cx, member, stream, Word::Closed),
            Way::Down => {
                if hosts[host]
                    .agent
                    .as_ref()
                    .is_some_and(|agent| agent.uplink.as_ref().is_some_and(|up| up.stream == stream))
                {
                    hosts[host].leave(cx);
                    hosts[host].tick(cx);
                }
            }
        }
    }

    fn answer(&mut self, origin: Origin, reply: Option<pb::Reply>) {
        let Self { cx, hub, .. } = self;
        match origin {
            Origin::Operator(usize::MAX) => {}
            Origin::Operator(index) => self.operated(index, reply),
            Origin::Report { member, stream } => hub.reported(cx, member, stream, reply),
            Origin::Open { member, stream } => {
                let accepted =
                    |reply: &pb::Reply| matches!(reply.result, Some(pb::reply::Result::Accepted(_)));
                let number = reply.filter(accepted).map(|reply| reply.revision);
                hub.opened(cx, member, stream, number);
            }
            Origin::Plan { member, term } => hub.planned(cx, member, term, reply.as_ref()),
            Origin::Verdict { member, term } => hub.judged(member, term),
        }
    }

    // The operator

    fn send(&mut self, body: Body) {
        let member = self.cx.rng.random_range(0..self.scenario.members);
        self.commands.push(Command { body, done: false, tries: 0, member });
        self.operate(self.commands.len() - 1);
    }

    fn operate(&mut self, index: usize) {
        let Self { cx, hub, commands, .. } = self;
        let command = &mut commands[index];
        command.tries += 1;
        if command.tries > OPERATOR_TRIES {
            command.done = true;
            return;
        }
        command.member += 1;
        let member = command.member % hub.members.len();
        if !hub.members[member].up {
            return cx.after(200 * MS, Event::Operator(index));
        }
        let id = pb::RequestId { client_id: format!("c-{index}"), serial: 1 };
        hub.propose(cx, member, command.body.clone(), Origin::Operator(index), Some(id));
    }

    fn operated(&mut self, index: usize, reply: Option<pb::Reply>) {
        self.commands[index].done = reply.is_some();
        if reply.is_none() {
            let delay = self.cx.rng.random_range(50 * MS..SECOND);
            self.cx.after(delay, Event::Operator(index));
        }
    }

    // What is done from outside

    fn act(&mut self, act: Act) {
        let act = act.ending_by(self.scenario.calm_at - self.cx.now);
        if !matches!(act, Act::Operate(_)) {
            self.cx.note(|| format!("-- {act:?}"));
        }
        let Self { cx, hub, hosts, .. } = self;
        match act {
            Act::Operate(operation) => self.send(body(&operation, &self.scenario)),
            Act::CutLink { from, to, both, length } => {
                self.cut(from, to, length);
                if both {
                    self.cut(to, from, length);
                }
            }
            Act::Isolate { node, length } => {
                for other in 0..self.scenario.members + self.scenario.hosts {
                    self.cut(node, other, length);
                    self.cut(other, node, length);
                }
            }
            Act::Slow { node, length } => {
                cx.net.set_slow(node, true);
                cx.after(length, Event::Heal(Heal::Slow(node)));
            }
            Act::Freeze { node, length } => {
                let until = cx.now + length;
                cx.net.freeze(node, until);
                cx.at(until, Event::Heal(Heal::Thaw));
                for stream in cx.net.streams_of(node) {
                    cx.after(3 * SECOND, Event::PingLost { stream, way: Way::Down });
                }
                hub.review(cx);
            }
            Act::KillMember { member, length } => {
                hub.crash_member(cx, member);
                cx.after(length, Event::Heal(Heal::StartMember(member)));
            }
            Act::Lead { member } => hub.lead(cx, member),
            Act::WallClock { member, by } => hub.members[member].wall.jump(by),
            Act::KillAgent { host, length } => {
                hosts[host].crash_agent(cx);
                cx.after(length, Event::Heal(Heal::StartAgent(host)));
            }
            Act::DoomAgent { host, steps } => hosts[host].doom_agent(steps),
            Act::PowerOff { host, length } => {
                hosts[host].power_off(cx);
                cx.after(length, Event::Heal(Heal::StartHost(host)));
            }
            Act::CrashProcess { host, pick } => hosts[host].keeper.crash(cx, pick),
            Act::Sicken { host, pick, length } => {
                if let Some(instance) = hosts[host].keeper.sicken(cx, pick, length) {
                    hosts[host].probe_again(cx, instance);
                }
            }
        }
    }

    fn cut(&mut self, from: usize, to: usize, length: i64) {
        if from == to {
            return;
        }
        self.cx.cut(from, to, true);
        self.cx.after(length, Event::Heal(Heal::Link(from, to)));
        self.hub.review(&mut self.cx);
    }

    fn heal(&mut self, heal: Heal) {
        let Self { cx, hub, hosts, .. } = self;
        match heal {
            Heal::Link(from, to) => {
                cx.cut(from, to, false);
                hub.review(cx);
            }
            Heal::Slow(node) => cx.net.set_slow(node, false),
            Heal::StartMember(member) => hub.start_member(cx, member),
            Heal::StartAgent(host) => hosts[host].start_agent(cx),
            Heal::StartHost(host) => hosts[host].power_on(cx),
            Heal::Thaw => hub.review(cx),
            Heal::Well { host, instance, serial } => {
                if hosts[host].keeper.recover(cx, instance, serial) {
                    hosts[host].probe_again(cx, instance);
                }
            }
        }
    }

    // The end

    /// Faults have all healed by themselves or do so soon; from now on it is waited for the promised state.
    fn look(&mut self) {
        if !self.cx.calm {
            self.cx.note(|| "-- calm".to_owned());
            self.cx.calm = true;
            self.hosts.iter_mut().for_each(|host| host.keeper.behave());
            self.undrain();
        }
        let running = self.settled();
        let settling = self.cx.now < self.scenario.calm_at + SETTLES_WITHIN;
        match self.stays.take() {
            Some((since, before)) if before == running => {
                self.done = self.cx.now - since >= STAYS;
                self.stays = Some((since, before));
            }
            Some(_) if settling => {}
            Some((_, before)) => {
                let what = format!("{before:?} became {running:?}");
                self.cx.violated("what is as wanted stays so", || what);
            }
            None => match self.wrong() {
                None => {
                    self.cx.note(|| "-- everything is as wanted".to_owned());
                    self.stays = Some((self.cx.now, running));
                }
                Some(why) if self.cx.now > self.scenario.calm_at + CONVERGES_WITHIN => {
                    self.cx.violated("it converges", || why);
                }
                Some(_) => {}
            },
        }
        self.cx.after(LOOK, Event::Look);
    }

    /// What runs of services that are as wanted; one that crashes again and again is as it will ever be.
    fn settled(&self) -> Running {
        let mut running = self.cx.oracle.running();
        let Some(leader) = self.hub.able(&self.cx) else { return running };
        let state = &self.hub.members[leader].state;
        running.retain(|(id, _, _)| {
            let instance = state.instance(InstanceId(*id));
            let service = instance.and_then(|instance| state.service(&instance.service));
            service.is_none_or(|service| is_sound_with_needs(state, service))
        });
        running
    }

    /// About half of the draining hosts are opened again; the rest has to become empty.
    fn undrain(&mut self) {
        for host in 0..self.scenario.hosts {
            if self.cx.rng.random_bool(0.5) {
                let draining = Operation::Drain { host, draining: false };
                self.send(body(&draining, &self.scenario));
            }
        }
    }

    /// Why not everything is as wanted.
    fn wrong(&self) -> Option<String> {
        let Self { cx, hub, hosts, .. } = self;
        let leader = hub.able(cx).map(|leader| &hub.members[leader]);
        let Some(leader) = leader else { return Some("no leader".to_owned()) };
        if let Some(busy) = hub.busy() {
            return Some(busy);
        }
        if !leader.scheduler_is_idle() {
            return Some("the scheduler is busy".to_owned());
        }
        if self.commands.iter().any(|command| !command.done) {
            return Some("an operator waits".to_owned());
        }
        let state = &leader.state;
        if let Some(host) =
            state.hosts().find(|host| host.status() != pb::HostStatus::Connected && !host.forgotten)
        {
            return Some(format!("h-{} is {:?}", host.id, host.status()));
        }
        if let Some(host) = hosts.iter().find(|host| host.keeper.has_left_overs()) {
            return Some(format!("host {} has processes left over", host.index));
        }
        if let Err(wrong) = state.check() {
            return Some(wrong);
        }
        let plan = plan(state, leader.wall.read(cx.now).max(state.time_unix_ns()));
        if !plan.steps.is_empty() {
            return Some(format!("the plan goes on: {:?}", plan.steps));
        }
        let unplaced: BTreeMap<_, _> = plan.unplaced.iter().map(|one| (one.service.as_str(), one)).collect();
        for service in state.services() {
            let missing = unplaced.get(service.name.as_str()).map_or(0, |unplaced| unplaced.missing);
            if let Some(why) = self.service_wrong(state, service, missing) {
                return Some(why);
            }
        }
        self.hosts_wrong(state).or_else(|| self.drain_wrong(state, &unplaced))
    }

    fn service_wrong(
        &self,
        state: &ClusterState,
        service: &pb::ServiceRecord,
        missing: usize,
    ) -> Option<String> {
        let name = &service.name;
        let status = service.deployment.as_ref().map(pb::Deployment::status);
        if service.deleting {
            return Some(format!("{name} is still being deleted"));
        }
        let hub = ready_count(state, name);
        let truth = self.cx.oracle.ready_of(name);
        if hub != truth && is_sound(service) {
            return Some(format!("{name}: {truth} are ready, {hub} by the hub's word"));
        }
        if status == Some(pb::DeploymentStatus::Running) {
            return Some(format!("the deployment of {name} is under way"));
        }
        let desired = desired_count(state, name);
        if is_sound(service) && (truth > desired || truth + missing < desired) {
            return Some(format!("{name}: {truth} of {desired} are ready, {missing} have no place"));
        }
        None
    }

    /// Hosts run what is wanted, and nothing else.
    fn hosts_wrong(&self, state: &ClusterState) -> Option<String> {
        let runs = |instance: &pb::InstanceRecord| {
            let state = instance.observed.as_ref().and_then(|observed| observed.state.as_ref());
            matches!(state, Some(State::Running(_)))
        };
        let index = |id: u64| self.hosts.iter().position(|host| host.id == id).unwrap_or(usize::MAX);
        let wanted: BTreeSet<_> = state
            .instances()
            .filter(|instance| runs(instance))
            .map(|instance| (instance.id, index(instance.host_id), instance.epoch))
            .collect();
        let running = self.cx.oracle.running();
        if let Some(extra) = running.difference(&wanted).next() {
            return Some(format!("(instance, host, epoch) {extra:?} runs and is not wanted so"));
        }
        if let Some(missing) = wanted.difference(&running).next() {
            return Some(format!("(instance, host, epoch) {missing:?} runs by the hub's word only"));
        }
        if let Some(instance) = state.instances().find(|instance| instance.desired() == pb::Desired::Stop) {
            return Some(format!("i-{} is still to stop", instance.id));
        }
        None
    }

    /// What is being drained becomes empty, as far as there is somewhere to go.
    fn drain_wrong(&self, state: &ClusterState, unplaced: &BTreeMap<&str, &Unplaced>) -> Option<String> {
        // Nothing is stopped here before it may be started elsewhere, for which what it needs has to be ready.
        let fed = |service: &pb::ServiceRecord| {
            let needs = service.manifest.iter().flat_map(|manifest| &manifest.needs);
            needs.into_iter().all(|need| ready_count(state, need) > 0)
        };
        let movable = |name: &str| {
            let free = |service: &Arc<pb::ServiceRecord>| is_sound(service) && fed(service);
            !unplaced.contains_key(name) && state.service(name).is_some_and(free)
        };
        let draining = state.hosts().filter(|host| host.draining).map(|host| HostId(host.id));
        let mut full =
            draining.filter(|host| state.instances_on(*host).any(|instance| movable(&instance.service)));
        full.next().filter(|_| self.can_drain(state)).map(|host| format!("{host} is draining and not empty"))
    }

    /// Whether there is somewhere to go.
    fn can_drain(&self, state: &ClusterState) -> bool {
        state.hosts().any(|host| !host.draining && !host.forgotten)
    }
}

/// Its processes run, and its deployment is over and well. Others may be anything; they are only not to be more than
/// wanted.
fn is_sound(service: &pb::ServiceRecord) -> bool {
    let status = service.deployment.as_ref().map(pb::Deployment::status);
    let good = service.manifest.as_ref().is_some_and(|manifest| Kind::of(manifest) == Kind::Good);
    good && status == Some(pb::DeploymentStatus::Successful)
}

/// One that needs a service which crashes again and again may fail for it, and succeed late, whenever that is ready.
fn is_sound_with_needs(state: &ClusterState, service: &pb::ServiceRecord) -> bool {
    let mut needs = service.manifest.iter().flat_map(|manifest| &manifest.needs);
    let is_met = |name: &String| state.service(name).is_some_and(|need| is_sound_with_needs(state, need));
    is_sound(service) && needs.all(is_met)
}

fn first_commands(hosts: usize) -> Vec<Body> {
    let token = pb::TokenRecord {
        id: "t".into(),
        secret_sha256: vec![7; 32],
        expires_unix_ns: i64::MAX,
        uses_left: 1_000,
        ..Default::default()
    };
    let mut bodies = vec![Body::InitCluster(pb::InitCluster {
        cluster_id: "00000000000000aa".into(),
        incarnation: 1,
        first_token: Some(token),
    })];
    bodies.extend((0..hosts).map(|host| {
        let facts = pb::HostFacts {
            name: format!("host-{host}"),
            cpu_millicores: 6_000,
            memory_bytes: 4 << 30,
            os: "linux".into(),
            arch: "x86_64".into(),
            capabilities: vec![nave_proto::FETCHES_AHEAD.into()],
            ..Default::default()
        };
        let key = u8::try_from(host + 1).unwrap_or(u8::MAX);
        let register =
            pb::RegisterHost { token_id: "t".into(), public_key_sha256: vec![key; 32], facts: Some(facts) };
        Body::RegisterHost(register)
    }));
    bodies
}

fn body(operation: &Operation, scenario: &Scenario) -> Body {
    let host_id = |host: &usize| (host % scenario.hosts) as u64 + 1;
    let name = |pick: &usize| service(*pick).to_owned();
    let reason = || "in the simulation".to_owned();
    match operation {
        Operation::Apply(manifest) => Body::ApplyService(pb::ApplyService {
            manifest: Some(Box::new(manifest.as_ref().clone())),
            expected_version: None,
        }),
        Operation::Scale { service, count } => {
            Body::ScaleService(pb::ScaleService { name: name(service), count: *count })
        }
        Operation::Restart { service } => Body::RestartService(pb::RestartService { name: name(service) }),
        Operation::Rollback { service, to } => {
            Body::RollbackService(pb::RollbackService { name: name(service), to_version: *to })
        }
        Operation::Delete { service } => Body::DeleteService(pb::DeleteService { name: name(service) }),
        Operation::Drain { host, draining } => Body::SetHostDraining(pb::SetHostDraining {
            host_id: host_id(host),
            draining: *draining,
            reason: reason(),
        }),
        Operation::Forget { host } => {
            Body::ForgetHost(pb::ForgetHost { host_id: host_id(host), reason: reason() })
        }
    }
}

/// For people.
pub(crate) fn told(violation: &Violation) -> String {
    format!("{} (at {:.3} s): {}", violation.promise, seconds(violation.at), violation.what)
}
