use std::collections::VecDeque;

use nave_orchestrator_core::{Change, RowId};
use nave_proto::ids::HostId;
use nave_proto::pb;
use proptest::prelude::*;

use super::*;
use crate::dispatch::directory::Directory;
use crate::dispatch::scene::{HOSTS, INCARNATION, Log, Member, instance, session};

const MEMBERS: usize = 3;

fn said(taken: u64, as_of: u64, sessions: u64) -> Standing {
    Standing { taken, as_of, sessions }
}

#[test]
fn a_leader_speaks_for_all_agents_as_soon_as_it_has_heard_of_each() {
    let sessions = LogSessions { count: 3, changed: 40, as_of: 60 };
    let mut callers = Callers::default();
    assert_eq!(callers.all_taken(sessions), 0);
    callers.said(MemberId(1), said(58, 58, 2));
    assert_eq!(callers.all_taken(sessions), 0, "one agent has not been heard of");
    callers.said(MemberId(2), said(55, 57, 1));
    assert_eq!(callers.all_taken(sessions), 55);
    callers.said(MemberId(3), said(3, 59, 0));
    assert_eq!(callers.all_taken(sessions), 55, "one without agents holds nobody up");
    let moved = LogSessions { count: 3, changed: 61, as_of: 61 };
    assert_eq!(callers.all_taken(moved), 55, "what was true stays so");
    callers.said(MemberId(1), said(61, 61, 2));
    assert_eq!(callers.all_taken(moved), 55, "the other may have lost its agent to nobody knows whom");
    callers.said(MemberId(3), said(60, 62, 1));
    assert_eq!(callers.all_taken(moved), 55, "it knows of sessions that this leader has yet to see");
    assert_eq!(callers.all_taken(LogSessions { as_of: 62, ..moved }), 60);
    assert_eq!(
        Callers::default().all_taken(LogSessions { count: 0, changed: 0, as_of: 7 }),
        7,
        "nobody calls"
    );
}

#[derive(Debug, Clone)]
enum Step {
    Drain(u64),
    Ready(u64),
    Apply(usize, u64),
    Open(usize, usize),
    /// A member notices that an agent has gone.
    Close(usize),
    Lost(usize),
    Look(usize),
    Acknowledge(usize),
    Send(usize),
    /// One of the words under way arrives.
    Arrive(usize),
    Lead(usize),
    Restart(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let hosts = 0..usize::try_from(HOSTS).unwrap();
    let step = prop_oneof![
        4 => (0..4u64).prop_map(Step::Drain),
        2 => (0..4u64).prop_map(Step::Ready),
        8 => (0..MEMBERS, 1..6u64).prop_map(|(member, most)| Step::Apply(member, most)),
        3 => (hosts.clone(), 0..MEMBERS).prop_map(|(host, member)| Step::Open(host, member)),
        2 => (0..8usize).prop_map(Step::Close),
        1 => hosts.clone().prop_map(Step::Lost),
        8 => hosts.clone().prop_map(Step::Look),
        8 => hosts.prop_map(Step::Acknowledge),
        8 => (0..MEMBERS).prop_map(Step::Send),
        8 => (0..8usize).prop_map(Step::Arrive),
        1 => (0..MEMBERS).prop_map(Step::Lead),
        1 => (0..MEMBERS).prop_map(Step::Restart),
    ];
    prop::collection::vec(step, 1..200)
}

/// An agent: how far it has taken the directory, and its session.
#[derive(Default)]
struct Agent {
    taken: u64,
    unsaid: Option<u64>,
    session: Option<u64>,
}

/// A session at a member, noticed to be over or not.
struct Seated {
    number: u64,
    member: usize,
    directory: Directory,
}

struct World {
    log: Log,
    members: Vec<Member>,
    agents: Vec<Agent>,
    seated: Vec<Seated>,
    under_way: VecDeque<(usize, Standing)>,
    leader: usize,
    callers: Callers,
    drains: Vec<u64>,
    drains_now: [bool; 4],
}

impl World {
    fn new() -> Self {
        let mut log = Log::begun(&["web"]);
        for id in 0..4 {
            log.push(instance(id, "web", 1, pb::EndpointState::Ready));
        }
        let mut members: Vec<_> = (0..MEMBERS).map(|_| Member::new(1000, 1000)).collect();
        members.iter_mut().for_each(|member| member.apply(&log, log.revision()));
        Self {
            log,
            members,
            agents: (0..HOSTS).map(|_| Agent::default()).collect(),
            seated: Vec::new(),
            under_way: VecDeque::new(),
            leader: 0,
            callers: Callers::default(),
            drains: Vec::new(),
            drains_now: [false; 4],
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Drain(id) => self.put(id, true),
            Step::Ready(id) => self.put(id, false),
            Step::Apply(member, most) => {
                let member = &mut self.members[member];
                member.apply(&self.log, member.applied + most);
            }
            Step::Open(host, member) => self.open(host, member),
            Step::Close(which) => {
                if !self.seated.is_empty() {
                    self.seated.remove(which % self.seated.len());
                }
            }
            Step::Lost(host) => drop(self.log.push(Change::Deleted(RowId::Session(id_of(host))))),
            Step::Look(host) => self.look(host),
            Step::Acknowledge(host) => self.acknowledge(host),
            Step::Send(member) => self.under_way.push_back((member, self.members[member].changes.standing())),
            Step::Arrive(which) => {
                if !self.under_way.is_empty() {
                    // A call that took too long may be taken after the next.
                    let which = which % self.under_way.len();
                    let (member, standing) = self.under_way.remove(which).unwrap();
                    self.callers.said(MemberId(u64::try_from(member).unwrap()), standing);
                    self.check();
                }
            }
            Step::Lead(member) => (self.leader, self.callers) = (member, Callers::default()),
            Step::Restart(member) => {
                self.seated.retain(|seated| seated.member != member);
                self.members[member].restart();
            }
        }
    }

    fn put(&mut self, id: u64, drains: bool) {
        let state = if drains { pb::EndpointState::Draining } else { pb::EndpointState::Ready };
        let revision = self.log.push(instance(id, "web", 1, state));
        let before = std::mem::replace(&mut self.drains_now[usize::try_from(id).unwrap()], drains);
        if drains && !before {
            self.drains.push(revision);
        }
    }

    /// The log has it, and the leader has applied that, before the agent hears anything. An older session may still
    /// seem to be open where it was.
    fn open(&mut self, host: usize, at: usize) {
        let number = self.log.revision() + 1;
        self.log.push(session(id_of(host), number));
        self.members[self.leader].apply(&self.log, number);
        let (agent, member) = (&mut self.agents[host], &self.members[at]);
        let knows = (agent.taken != 0).then_some(pb::DirectoryKnown {
            incarnation: INCARNATION,
            revision: agent.taken,
            everything: true,
        });
        let opened = (number, id_of(host), number);
        let directory = Directory::open(&member.changes, &member.state(), opened, knows);
        (agent.session, agent.unsaid) = (Some(number), None);
        self.seated.push(Seated { number, member: at, directory });
    }

    fn look(&mut self, host: usize) {
        let agent = &mut self.agents[host];
        let Some(seated) = self.seated.iter_mut().find(|seated| Some(seated.number) == agent.session) else {
            return;
        };
        let state = self.members[seated.member].state();
        if seated.directory.is_behind(&state) {
            return;
        }
        let Some(update) = seated.directory.update(&state, INCARNATION) else { return };
        if update.revision < agent.taken {
            agent.session = None; // this member is behind
            return;
        }
        agent.taken = update.revision;
        agent.unsaid = update.acknowledge.then_some(update.revision).or(agent.unsaid);
    }

    fn acknowledge(&mut self, host: usize) {
        let agent = &mut self.agents[host];
        let seated = self.seated.iter_mut().find(|seated| Some(seated.number) == agent.session);
        if let (Some(seated), Some(revision)) = (seated, agent.unsaid.take()) {
            seated.directory.acknowledged(revision);
        }
    }

    /// What the leader concludes is so, when it does, of every agent that is not lost. One that returns later is told.
    fn check(&mut self) -> u64 {
        let leader = &self.members[self.leader];
        let before = self.callers.concluded;
        let all_taken = self.callers.all_taken(leader.changes.sessions());
        if all_taken == before {
            return all_taken;
        }
        let newest = self.drains.iter().copied().filter(|drain| *drain <= all_taken).max().unwrap_or(0);
        for (host, agent) in self.agents.iter().enumerate() {
            if leader.has(&RowId::Session(id_of(host))) {
                assert!(agent.taken >= newest, "{all_taken}: {host} has taken {}, not {newest}", agent.taken);
            }
        }
        all_taken
    }

    /// Everybody comes back, and is heard.
    fn heal(&mut self) -> u64 {
        self.under_way.clear();
        for host in 0..self.agents.len() {
            self.open(host, host % MEMBERS);
        }
        let revision = self.log.revision();
        self.members.iter_mut().for_each(|member| member.apply(&self.log, revision));
        for host in 0..self.agents.len() {
            self.look(host);
            self.acknowledge(host);
        }
        for member in 0..MEMBERS {
            self.step(&Step::Send(member));
            self.step(&Step::Arrive(0));
        }
        self.check()
    }
}

fn id_of(host: usize) -> HostId {
    HostId(u64::try_from(host).unwrap())
}

proptest! {
    /// Nobody is said to have left what it may still call, whoever leads, moves, restarts or lags; and when all are
    /// heard again, it is said at once.
    #[test]
    fn what_a_leader_concludes_is_so(steps in steps()) {
        let mut world = World::new();
        steps.iter().for_each(|step| world.step(step));
        prop_assert_eq!(world.heal(), world.log.revision());
    }
}
