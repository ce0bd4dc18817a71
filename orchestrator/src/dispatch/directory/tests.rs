use std::collections::BTreeMap;

use nave_agent_core::directory::{Directory as Agents, DirectoryRefusal};
use nave_orchestrator_core::{Change, RowId};
use nave_proto::ids::InstanceId;
use proptest::prelude::*;

use super::*;
use crate::dispatch::scene::{HOSTS, INCARNATION, Log, Member, host, instance, service};

const SERVICES: [&str; 3] = ["api", "db", "web"];
const HOST: HostId = HostId(1);
/// Of a session in the log: this member has yet to apply it.
const LATER: u64 = u64::MAX;

/// One agent, and its session when it has one.
struct Agent {
    known: Agents,
    disk: Agents,
    interest: BTreeSet<Arc<str>>,
    refused: bool,
    session: Option<Directory>,
    sessions: u64,
}

impl Agent {
    fn new() -> Self {
        let (known, disk, interest) = Default::default();
        Self { known, disk, interest, refused: false, session: None, sessions: 0 }
    }

    fn named(&self) -> pb::Interest {
        pb::Interest { services: self.interest.iter().map(ToString::to_string).collect() }
    }

    fn connect(&mut self, member: &Member) {
        self.known.keep_only(&self.interest);
        self.sessions += 1;
        let known = self.known.known().filter(|_| !self.refused);
        let opened = (self.sessions, HOST, LATER);
        let mut session = Directory::open(&member.changes, &member.state(), opened, known);
        session.interest(self.named()).unwrap();
        self.session = Some(session);
    }

    /// Returns what it was told, if anything; nothing at all, when the member is behind.
    fn look(&mut self, member: &Member) -> Option<Option<pb::DirectoryUpdate>> {
        let state = member.state();
        let session = self.session.as_mut().filter(|session| !session.is_behind(&state))?;
        let Some(update) = session.update(&state, INCARNATION) else { return Some(None) };
        match self.known.apply(update.clone()) {
            Ok(_) => {
                self.refused = false;
                if update.acknowledge {
                    session.acknowledged(update.revision);
                }
                Some(Some(update))
            }
            Err(DirectoryRefusal::Stale { .. }) => {
                (self.refused, self.session) = (true, None);
                None
            }
            Err(gap @ DirectoryRefusal::Gap { .. }) => panic!("{gap}: {update:?}"),
        }
    }

    fn name(&mut self, names: BTreeSet<Arc<str>>) {
        self.interest = names;
        self.known.keep_only(&self.interest);
        let named = self.named();
        if let Some(session) = &mut self.session {
            session.interest(named).unwrap();
        }
    }
}

/// What an agent has to know that is told everything, or what it has named.
fn truth(state: &ClusterState, everything: bool, interest: &BTreeSet<Arc<str>>) -> pb::DirectoryUpdate {
    let endpoints = state.instances().filter_map(|record| directory_endpoint(record));
    let endpoints: Vec<_> =
        endpoints.filter(|one| everything || interest.contains(one.service.as_str())).collect();
    let on: BTreeSet<u64> = endpoints.iter().map(|endpoint| endpoint.host_id).collect();
    pb::DirectoryUpdate {
        whole: true,
        everything,
        services: state.services().filter_map(|record| directory_service(record)).collect(),
        hosts: state.hosts().filter(|host| on.contains(&host.id)).map(|host| directory_host(host)).collect(),
        complete: interest.iter().filter(|_| !everything).map(ToString::to_string).collect(),
        endpoints,
        ..Default::default()
    }
}

fn known(agent: &Agent) -> pb::DirectoryUpdate {
    pb::DirectoryUpdate { incarnation: 0, revision: 0, ..agent.known.whole() }
}

#[test]
fn a_session_that_is_resumed_is_told_what_has_changed_and_nothing_else() {
    let mut log = Log::begun(&SERVICES);
    for id in 1..=5 {
        log.push(instance(id, "web", 1, pb::EndpointState::Ready));
    }
    let (mut member, mut agent) = (Member::new(100, 1000), Agent::new());
    member.apply(&log, log.revision());
    agent.connect(&member);
    assert!(agent.look(&member).unwrap().unwrap().whole);
    agent.connect(&member);
    assert_eq!(agent.look(&member), Some(None), "nothing is new");
    assert_eq!(member.changes.standing().taken, log.revision(), "it owes no word");

    agent.session = None;
    log.push(instance(2, "web", 1, pb::EndpointState::Draining));
    log.push(Change::Deleted(RowId::Instance(InstanceId(3))));
    log.push(service("db", None));
    member.apply(&log, log.revision());
    agent.connect(&member);
    let told = agent.look(&member).unwrap().unwrap();
    assert!(!told.whole && told.acknowledge);
    let ids: Vec<u64> = told.endpoints.iter().map(|endpoint| endpoint.instance_id).collect();
    assert_eq!((ids, told.removed_endpoints, told.services.len()), (vec![2], vec![3], 0));
    assert_eq!(told.removed_services, ["db"]);
    assert_eq!(known(&agent), truth(&member.state(), true, &BTreeSet::new()));
}

#[test]
fn an_agent_of_another_history_is_told_everything() {
    let log = Log::begun(&SERVICES);
    let mut member = Member::new(100, 1000);
    member.apply(&log, log.revision());
    let knows = |incarnation, revision| pb::DirectoryKnown { incarnation, revision, everything: true };
    let table = [
        (None, false),
        (Some(knows(INCARNATION, log.revision())), true),
        (Some(knows(INCARNATION + 1, log.revision())), false),
        (Some(knows(INCARNATION, 0)), false),
    ];
    for (number, (knows, resumed)) in (1..).zip(table) {
        let opened = Directory::open(&member.changes, &member.state(), (number, HOST, LATER), knows);
        assert_eq!(opened.is_resumed(), resumed, "{knows:?}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Service(usize, Option<u32>),
    Instance {
        id: u64,
        service: usize,
        epoch: u64,
        state: i32,
    },
    Gone(u64),
    Moves(u64),
    Apply(usize, u64),
    Restart(usize),
    Connect(usize),
    Look,
    Cut,
    WriteDown,
    /// The agent ends, and begins anew with what it wrote down.
    Reboot,
    Interest(BTreeSet<usize>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => (0..3usize, prop::option::of(80..82u32)).prop_map(|(name, port)| Step::Service(name, port)),
        8 => (0..6u64, 0..3usize, 1..3u64, 0..4i32)
            .prop_map(|(id, service, epoch, state)| Step::Instance { id, service, epoch, state }),
        3 => (0..6u64).prop_map(Step::Gone),
        1 => (0..HOSTS).prop_map(Step::Moves),
        6 => (0..2usize, 1..6u64).prop_map(|(member, most)| Step::Apply(member, most)),
        1 => (0..2usize).prop_map(Step::Restart),
        4 => (0..2usize).prop_map(Step::Connect),
        8 => Just(Step::Look),
        2 => Just(Step::Cut),
        1 => Just(Step::WriteDown),
        1 => Just(Step::Reboot),
        1 => prop::collection::btree_set(0..3usize, 0..3).prop_map(Step::Interest),
    ];
    prop::collection::vec(step, 1..150)
}

/// The log, its members, and one agent that goes from one to the other.
struct World {
    log: Log,
    members: [Member; 2],
    agent: Agent,
    at: usize,
    instances: BTreeMap<u64, usize>,
    moves: u64,
}

impl World {
    fn new(items_max: usize, everything_max: usize) -> Self {
        let log = Log::begun(&SERVICES);
        let mut members = [(); 2].map(|()| Member::new(items_max, everything_max));
        members.iter_mut().for_each(|member| member.apply(&log, log.revision()));
        Self { log, members, agent: Agent::new(), at: 0, instances: BTreeMap::new(), moves: 0 }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Service(name, port) => drop(self.log.push(service(SERVICES[name], port))),
            Step::Instance { id, service, epoch, state } => {
                // An instance is of one service for ever.
                let of = *self.instances.entry(id).or_insert(service);
                let state = pb::EndpointState::try_from(state).unwrap();
                self.log.push(instance(id, SERVICES[of], epoch, state));
            }
            Step::Gone(id) => {
                if self.instances.contains_key(&id) {
                    self.log.push(Change::Deleted(RowId::Instance(InstanceId(id))));
                }
            }
            Step::Moves(id) => {
                self.moves += 1;
                let address = format!("10.0.1.{}:7410", self.moves);
                self.log.push(host(id, &address));
            }
            Step::Apply(member, most) => {
                let member = &mut self.members[member];
                member.apply(&self.log, member.applied + most);
            }
            Step::Restart(member) => {
                if member == self.at {
                    self.agent.session = None;
                }
                self.members[member].restart();
            }
            Step::Connect(member) => {
                self.at = member;
                self.agent.connect(&self.members[member]);
            }
            Step::Look => self.look(),
            Step::Cut => self.agent.session = None,
            Step::WriteDown => self.agent.disk = self.agent.known.clone(),
            Step::Reboot => {
                let mut known = Agents::default();
                if self.agent.disk.revision() != 0 {
                    known.apply(self.agent.disk.whole()).unwrap();
                }
                (self.agent.known, self.agent.session, self.agent.refused) = (known, None, false);
            }
            Step::Interest(names) => {
                self.agent.name(names.into_iter().map(|name| SERVICES[name].into()).collect());
            }
        }
    }

    /// What it then knows is what its member does, and it owes no word of it.
    fn look(&mut self) {
        let member = &self.members[self.at];
        if self.agent.look(member).is_none() {
            return;
        }
        let everything = self.agent.known.known().unwrap().everything;
        assert_eq!(known(&self.agent), truth(&member.state(), everything, &self.agent.interest));
        assert_eq!(member.changes.standing().taken, member.applied);
    }
}

proptest! {
    /// Whatever changes, and however often its session is cut, resumed here or there, or begun anew from its disk: an
    /// agent that has been told knows what its member knows.
    #[test]
    fn a_directory_that_is_resumed_is_the_hubs(
        steps in steps(),
        items_max in prop_oneof![1..12usize, Just(1000)],
        everything_max in prop_oneof![Just(0usize), Just(9), Just(1000), Just(1000)],
    ) {
        let mut world = World::new(items_max, everything_max);
        steps.into_iter().for_each(|step| world.step(step));
        let revision = world.log.revision();
        world.members[0].apply(&world.log, revision);
        // One may be refused for what it knew from a member that is ahead, never two.
        for _ in 0..2 {
            world.step(Step::Connect(0));
            world.step(Step::Look);
        }
        assert!(world.agent.session.is_some());
    }
}
