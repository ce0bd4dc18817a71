//! One agent's stream. One task owns it and waits for whatever comes first: a message of the agent, a change that
//! may concern its host, the fate of a report, room in the connection, or a reason to end.

use std::sync::Arc;
use std::time::Duration;

use nave_orchestrator_core::ClusterState;
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::lease::HOLD;
use nave_proto::pb;
use nave_tls::PeerIdentity;
use pb::BeatRefusal;
use pb::agent_message::Message as FromAgent;
use pb::command::Body;
use pb::hub_message::Message as ToAgent;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::{Instrument as _, debug, info, info_span, warn};

use super::beats::{Answer, Given};
use super::directory::Directory;
use super::reports::{self, Progress, Reports};
use super::wanted::{self, Told};
use crate::api::enroll::check_facts;
use crate::api::errors::{self, Reach};
use crate::api::{self, Hub};
use crate::clock;
use crate::watch::{Route, Touched};

/// A connection that says nothing is closed.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the leader, or the log, may take to let a session in.
const ADMISSION_TIMEOUT: Duration = Duration::from_secs(5);
/// Changes of this time travel together.
const COALESCE: Duration = Duration::from_millis(10);
/// How long a last word may take to leave.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(500);
const VOID: &str = "this host was taken for lost or has opened another session, and has to report anew";
const NO_LEADER: &str = "this member knows no leader";

/// A session whose agent has proved to be the host's, and that the leader has let in.
#[derive(Debug)]
pub(super) struct Greeted {
    pub(super) host: HostId,
    answers: watch::Receiver<Answer>,
    facts: Option<pb::HostFacts>,
    interest: pb::Interest,
    directory: Option<pb::DirectoryKnown>,
    /// The session's number in the log.
    session: u64,
}

/// Hello, then the leader's word that no other machine acts for this host. Before that the agent is told nothing, for
/// what is wanted would be started twice.
pub(super) async fn begin(
    hub: &Arc<Hub>,
    identity: &PeerIdentity,
    number: u64,
    incoming: &mut Streaming<pb::AgentMessage>,
) -> Result<Greeted, End> {
    let hello = greet(hub, identity, incoming).await.map_err(End::Refused)?;
    let host = hello.host;
    let place = hello.facts.as_ref().map_or(0, |facts| facts.place);
    let mut answers = hub.beats.open(host, number, place);
    let mut leaderless = hub.leaderless.clone();
    let let_in = tokio::select! {
        let_in = admission(hub, host, &mut answers) => let_in,
        () = until_leaderless(&mut leaderless) => Err(End::Elsewhere(NO_LEADER.to_owned())),
        () = tokio::time::sleep(ADMISSION_TIMEOUT) => Err(End::Elsewhere(NO_LEADER.to_owned())),
    };
    let opened = match let_in {
        Ok(()) => open(hub, host, place).await,
        Err(end) => Err(end),
    };
    match opened {
        Ok(session) => {
            let Hello { facts, interest, directory, .. } = hello;
            Ok(Greeted { host, answers, facts, interest, directory, session })
        }
        Err(end) => {
            hub.beats.close(number);
            Err(end)
        }
    }
}

/// The leader's first answer.
async fn admission(hub: &Hub, host: HostId, answers: &mut watch::Receiver<Answer>) -> Result<(), End> {
    let answer = answers.wait_for(|answer| answer.heard || answer.refused.is_some()).await;
    match answer.map(|answer| answer.refused) {
        Ok(None) => Ok(()),
        Ok(Some(refused)) => Err(End::Refused(refusal(hub, host, refused))),
        Err(_) => Err(End::Gone("the agent has a newer session")),
    }
}

/// The log makes this session the one that speaks for the host, and knows which place acts for it before that place is
/// told what to run: a leader that does not remember it would let another one in. Returns the session's number.
async fn open(hub: &Hub, host: HostId, place: u64) -> Result<u64, End> {
    let body = Body::OpenSession(pb::OpenSession { host_id: host.0, place });
    let command = api::command(format!("agent/{host}"), None, body);
    match hub.raft.propose(command, Instant::now() + ADMISSION_TIMEOUT).await {
        Ok(pb::Reply { result: Some(pb::reply::Result::Rejected(rejected)), .. }) => {
            Err(End::Refused(reports::refused(host, &rejected)))
        }
        Ok(reply) => Ok(reply.revision),
        Err(error) => Err(End::Refused(errors::propose(&error, Reach::default()))),
    }
}

fn refusal(hub: &Hub, host: HostId, (why, after): (BeatRefusal, Duration)) -> Status {
    match why {
        BeatRefusal::Unknown => unknown(&hub.raft.state(), host),
        BeatRefusal::Cloned => errors::cloned(host),
        BeatRefusal::Held | BeatRefusal::Unspecified => errors::held(host, after),
    }
}

/// A host that was given up is told so; one that this cluster has never seen may belong to a later state of it.
fn unknown(state: &ClusterState, host: HostId) -> Status {
    let allotted = state.cluster().is_some_and(|cluster| host.0 < cluster.next_host_id);
    match state.host(host) {
        Some(record) if !record.forgotten => errors::not_registered(&format!("{host} has another key")),
        None if !allotted => errors::not_registered(&format!("the hub does not know {host}")),
        Some(_) | None => errors::forgotten(host),
    }
}

/// What an agent says first.
struct Hello {
    host: HostId,
    facts: Option<pb::HostFacts>,
    interest: pb::Interest,
    /// What it knows of the directory.
    directory: Option<pb::DirectoryKnown>,
}

/// Reads the hello and checks that it speaks for the certificate's host, in this cluster, with the registered key.
async fn greet(
    hub: &Hub,
    identity: &PeerIdentity,
    incoming: &mut Streaming<pb::AgentMessage>,
) -> Result<Hello, Status> {
    let first = timeout(HELLO_TIMEOUT, incoming.message()).await.map_err(|_| super::hello_first())??;
    let Some(FromAgent::Hello(hello)) = first.and_then(|first| first.message) else {
        return Err(super::hello_first());
    };
    let claimed: HostId =
        hello.host_id.parse().map_err(|error| errors::invalid_field("host_id", &format!("{error}")))?;
    if identity.agent() != Some(claimed) {
        warn!(certificate = %identity.role, %claimed, "an agent claims another host");
        return Err(Status::permission_denied(format!(
            "the certificate is of {}, it cannot speak for {claimed}",
            identity.role
        )));
    }
    if hello.cluster_id.parse() != Ok(hub.cluster) {
        return Err(errors::failed_precondition(
            "OTHER_CLUSTER",
            format!("this is cluster {}, not {}", hub.cluster, hello.cluster_id),
        ));
    }
    if !is_registered(&hub.raft.state(), claimed, identity) {
        // The host may have enrolled a moment ago through another member.
        let fresh = hub.raft.linearize(Instant::now() + HELLO_TIMEOUT).await;
        if let Err(error) = fresh {
            return Err(errors::read(&error, hub.reach().await));
        }
        if !is_registered(&hub.raft.state(), claimed, identity) {
            return Err(unknown(&hub.raft.state(), claimed));
        }
    }
    if let Some(facts) = &hello.facts {
        check_facts(facts)?;
    }
    debug!(host = %claimed, run = hello.agent_run_id, "hello");
    Ok(Hello {
        host: claimed,
        facts: hello.facts,
        interest: hello.interest.unwrap_or_default(),
        directory: hello.directory,
    })
}

fn is_registered(state: &ClusterState, host: HostId, identity: &PeerIdentity) -> bool {
    state.host(host).is_some_and(|record| record.public_key_sha256 == identity.public_key_sha256)
}

/// Why a session ends, or does not begin.
#[derive(Debug)]
pub(super) enum End {
    /// The agent has gone, or a newer session took over: nobody is left to tell.
    Gone(&'static str),
    /// The agent should go to another member.
    Elsewhere(String),
    /// The agent did what it may not, or is not wanted.
    Refused(Status),
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Gone(why) => f.write_str(why),
            Self::Elsewhere(why) => write!(f, "{why}: the agent is sent elsewhere"),
            Self::Refused(status) => write!(f, "refused: {}", status.message()),
        }
    }
}

impl End {
    /// What the agent is told, if anybody is there to hear it.
    pub(super) fn last_word(self, hub: &Hub) -> Option<Result<pb::HubMessage, Status>> {
        match self {
            Self::Gone(_) => None,
            Self::Elsewhere(reason) => {
                Some(Ok(message(ToAgent::Goodbye(pb::Goodbye { reason, members: others(hub) }))))
            }
            Self::Refused(status) => Some(Err(status)),
        }
    }
}

pub(super) struct Session {
    hub: Arc<Hub>,
    host: HostId,
    sender: mpsc::Sender<Result<pb::HubMessage, Status>>,
    replaced: CancellationToken,
    route: Route,
    leaderless: watch::Receiver<bool>,
    /// Where the members are; when that changes, the agent is told by another welcome.
    addresses: watch::Receiver<Vec<String>>,
    reports: Reports,
    told: Told,
    directory: Directory,
    /// When the directory is looked at for news, once something has changed.
    directory_at: Option<Instant>,
    /// What the agent has been told to stop drains until its callers have left: up to this revision.
    drains: Option<u64>,
    /// Up to where all agents have taken the directory, as the leader has last said.
    callers_left: watch::Receiver<u64>,
    /// What the agent has been told last is of this revision; nothing: it has been told nothing.
    generation: Option<u64>,
    welcomed: bool,
    /// When the state is looked at for news, once something has changed.
    look_at: Option<Instant>,
    acknowledge: Option<u64>,
    number: u64,
    answers: watch::Receiver<Answer>,
    /// The agent has been told all that concerns it up to this revision.
    seen: u64,
    /// A lease that the agent has not been told of.
    lease: Option<Given>,
    /// The state no longer has this host.
    forgotten: bool,
    /// The session's number in the log.
    session: u64,
    /// The log knows of this session no more.
    void: bool,
}

impl Session {
    pub(super) fn new(
        hub: Arc<Hub>,
        greeted: Greeted,
        number: u64,
        sender: mpsc::Sender<Result<pb::HubMessage, Status>>,
        replaced: CancellationToken,
    ) -> Self {
        let host = greeted.host;
        let opened = (number, host, greeted.session);
        let directory = Directory::open(&hub.changes, &hub.raft.state(), opened, greeted.directory);
        match directory.is_resumed() {
            true => hub.metrics.directories_resumed.inc(),
            false => hub.metrics.directories_whole.inc(),
        };
        let mut session = Self {
            route: hub.changes.route(host),
            leaderless: hub.leaderless.clone(),
            addresses: hub.addresses.subscribe(),
            reports: Reports::new(hub.clone(), host, greeted.session, greeted.facts),
            told: Told::nothing(host),
            directory,
            directory_at: Some(Instant::now()),
            drains: None,
            callers_left: hub.beats.callers_left(),
            generation: None,
            welcomed: false,
            look_at: Some(Instant::now()),
            acknowledge: None,
            number,
            answers: greeted.answers,
            seen: 0,
            lease: None,
            forgotten: false,
            session: greeted.session,
            void: false,
            hub,
            host,
            sender,
            replaced,
        };
        // An agent that names too many is told of none; it says so again and is refused then.
        session.directory.interest(greeted.interest).ok();
        session
    }

    /// Lives as long as the stream.
    pub(super) async fn run(mut self, incoming: Streaming<pb::AgentMessage>) {
        let span = info_span!("session", host = %self.host);
        info!(parent: &span, "agent connected");
        let end = self.serve(incoming).instrument(span.clone()).await;
        match &end {
            End::Refused(_) => warn!(parent: &span, %end, "session ended"),
            End::Gone(_) | End::Elsewhere(_) => info!(parent: &span, %end, "session ended"),
        }
        if let Some(last) = end.last_word(&self.hub) {
            // A connection that takes no more gets no last word.
            timeout(GOODBYE_TIMEOUT, self.sender.send(last)).await.ok();
        }
    }

    async fn serve(&mut self, mut incoming: Streaming<pb::AgentMessage>) -> End {
        loop {
            let look_at = self.look_at;
            let next_look = look_at.into_iter().chain(self.directory_at).min();
            tokio::select! {
                biased;
                () = self.hub.stop.cancelled() => return End::Elsewhere("this member is stopping".to_owned()),
                () = self.replaced.cancelled() => return End::Gone("the agent has a newer session"),
                () = until_leaderless(&mut self.leaderless) => return End::Elsewhere(NO_LEADER.to_owned()),
                answered = self.answers.changed() => {
                    if answered.is_err() {
                        return End::Gone("the agent has a newer session");
                    }
                    if let Some(end) = self.answered() { return end }
                }
                heard = incoming.message() => match heard {
                    Ok(Some(heard)) => if let Some(end) = self.hear(heard) { return end },
                    Ok(None) => return End::Gone("the agent has closed it"),
                    Err(status) => {
                        debug!(error = status.message(), "stream broken");
                        return End::Gone("the connection broke");
                    }
                },
                progress = self.reports.progress() => match progress {
                    Progress::Committed { sequence: 0 } | Progress::Later => {}
                    Progress::Committed { sequence } => self.acknowledge = Some(sequence),
                    Progress::Hopeless(status) => return End::Refused(status),
                    Progress::Superseded => return End::Elsewhere(VOID.to_owned()),
                },
                () = self.route.bell.rung(), if look_at.is_none() => {
                    self.look_at = Some(Instant::now() + COALESCE);
                }
                coalesce = self.directory.rung(), if self.directory_at.is_none() => {
                    self.directory_at = Some(Instant::now() + coalesce);
                }
                Ok(()) = self.callers_left.changed(), if self.drains.is_some() => {}
                Ok(()) = self.addresses.changed(), if self.welcomed => self.welcomed = false,
                permit = self.sender.clone().reserve_owned(), if self.has_words() => {
                    let Ok(permit) = permit else { return End::Gone("the connection closed") };
                    if let Some(words) = self.words() {
                        permit.send(Ok(message(words)));
                    }
                    if self.forgotten {
                        return End::Refused(unknown(&self.hub.raft.state(), self.host));
                    }
                    if self.void {
                        // A session begins with everything; the agent does not repeat itself within one.
                        return End::Elsewhere(VOID.to_owned());
                    }
                }
                () = sleep_until(next_look.unwrap_or_else(Instant::now)), if next_look.is_some() && !self.has_words() => {
                    // Now it is time to look; the branch above does it once there is room.
                }
            }
        }
    }

    fn hear(&mut self, heard: pb::AgentMessage) -> Option<End> {
        match heard.message {
            Some(FromAgent::Beat(beat)) => {
                self.hub.beats.beat(self.number, beat.sequence);
                None
            }
            Some(FromAgent::Acknowledge(acknowledge)) => {
                self.directory.acknowledged(acknowledge.draining_revision);
                None
            }
            Some(FromAgent::Interest(interest)) => {
                self.directory_at.get_or_insert_with(Instant::now);
                self.directory.interest(interest).err().map(End::Refused)
            }
            Some(FromAgent::Report(report)) => {
                if let Some(facts) = &report.facts
                    && let Err(status) = check_facts(facts)
                {
                    return Some(End::Refused(status));
                }
                self.reports.add(report);
                None
            }
            Some(FromAgent::Hello(_)) => {
                Some(End::Refused(errors::invalid_field("hello", "is allowed once in a session")))
            }
            // A newer agent's message: it does without an answer.
            None => None,
        }
    }

    /// What the leader says of the newest beat.
    fn answered(&mut self) -> Option<End> {
        let answer = *self.answers.borrow_and_update();
        if let Some(refused) = answer.refused {
            return Some(End::Refused(refusal(&self.hub, self.host, refused)));
        }
        self.lease = answer.lease.filter(|given| given.sequence > 0);
        // The agent hears of it after all that the leader knew.
        self.look_at.get_or_insert_with(Instant::now);
        None
    }

    fn has_words(&self) -> bool {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        !self.welcomed
            || self.acknowledge.is_some()
            || is_due(self.look_at)
            || is_due(self.directory_at)
            || self.callers_have_left().is_some()
    }

    /// The revision up to which they have, when that is what the agent waits for.
    fn callers_have_left(&self) -> Option<u64> {
        let left = *self.callers_left.borrow();
        self.drains.filter(|revision| left >= *revision).map(|_| left)
    }

    /// The next message, when there is one.
    fn words(&mut self) -> Option<ToAgent> {
        if !self.welcomed {
            self.welcomed = true;
            return Some(ToAgent::Welcome(self.welcome()));
        }
        if let Some(sequence) = self.acknowledge.take() {
            return Some(ToAgent::ReportAcknowledged(pb::ReportAcknowledged { sequence }));
        }
        if self.generation.is_some() {
            if let Some(revision) = self.callers_have_left() {
                self.drains = None;
                // It holds for all that the agent has been told to stop by now.
                let revision = self.generation.map_or(revision, |told| told.max(revision));
                return Some(ToAgent::CallersLeft(pb::CallersLeft { revision }));
            }
            if self.directory_at.take_if(|at| *at <= Instant::now()).is_some() {
                return self.look_at_directory();
            }
        }
        self.look_at = None;
        let news = self.look();
        let Some(given) = self.lease else { return news };
        if news.is_some() || self.seen < given.revision {
            // After the news, or once this member has applied what the leader had.
            self.look_at = Some(Instant::now() + if news.is_some() { Duration::ZERO } else { COALESCE });
            return news;
        }
        self.lease = None;
        let hold_ms = u64::try_from(HOLD.as_millis()).unwrap_or_default();
        Some(ToAgent::Lease(pb::Lease { sequence: given.sequence, hold_ms }))
    }

    fn welcome(&self) -> pb::Welcome {
        let incarnation = self.hub.raft.state().cluster().map_or(0, |cluster| cluster.incarnation);
        pb::Welcome {
            cluster_id: self.hub.cluster.to_string(),
            incarnation,
            members: self.hub.member_addresses(),
            hub_time_unix_ns: clock::unix_now_ns(),
            member: self.hub.name.clone(),
        }
    }

    /// What the agent has not been told.
    fn look(&mut self) -> Option<ToAgent> {
        let hub = self.hub.clone();
        // Taken before the state is read, so that what comes between is looked at again.
        let touched = self.route.bell.take();
        let state = hub.raft.state();
        let incarnation = state.cluster().map_or(0, |cluster| cluster.incarnation);
        self.forgotten = state.host(self.host).is_none_or(|record| record.forgotten);
        if self.forgotten {
            return None;
        }
        self.seen = state.revision();
        self.void = wanted::is_void(&state, self.host, self.session);
        match (self.generation, touched) {
            (Some(generation), Touched::Instances(touched)) => {
                let delta = self.told.delta(&state, incarnation, generation, touched)?;
                self.generation = Some(delta.to_generation);
                self.note_drains(&state, &delta.put);
                Some(ToAgent::Delta(delta))
            }
            (None, _) | (_, Touched::All) => Some(self.whole(&state, incarnation)),
        }
    }

    fn whole(&mut self, state: &ClusterState, incarnation: u64) -> ToAgent {
        self.generation = Some(state.revision());
        let set = self.told.whole(state, incarnation);
        self.note_drains(state, &set.instances);
        ToAgent::Wanted(set)
    }

    /// An instance that is to stop waits for its callers' agents, if it has ports: to have taken the directory as it was
    /// when the instance began to drain, which may be long before it is told here.
    fn note_drains(&mut self, state: &ClusterState, told: &[pb::WantedInstance]) {
        let drains = |wanted: &&pb::WantedInstance| {
            wanted.desired() == pb::Desired::Stop
                && wanted.manifest.as_ref().is_some_and(|manifest| !manifest.ports.is_empty())
        };
        let began = |wanted: &pb::WantedInstance| state.instance(InstanceId(wanted.instance_id));
        let newest = told.iter().filter(drains).filter_map(began).map(|record| record.revision).max();
        if let Some(revision) = newest {
            self.drains = self.drains.max(Some(revision));
            self.hub.beats.ask_callers(revision);
        }
    }

    fn look_at_directory(&mut self) -> Option<ToAgent> {
        let hub = self.hub.clone();
        let state = hub.raft.state();
        // An agent that begins must not be told of a time before its session, which others have left behind.
        if state.revision() < self.session || self.directory.is_behind(&state) {
            self.directory_at = Some(Instant::now() + COALESCE);
            return None;
        }
        let incarnation = state.cluster().map_or(0, |cluster| cluster.incarnation);
        self.directory.update(&state, incarnation).map(ToAgent::Directory)
    }
}

/// The members but this one.
fn others(hub: &Hub) -> Vec<String> {
    let members = hub.raft.status().members;
    members.into_iter().filter(|(id, _, _)| *id != hub.id).map(|(_, node, _)| node.address).collect()
}

async fn until_leaderless(leaderless: &mut watch::Receiver<bool>) {
    if leaderless.wait_for(|leaderless| *leaderless).await.is_err() {
        // The member is going down, which is told by its own signal.
        std::future::pending().await
    }
}

fn message(message: ToAgent) -> pb::HubMessage {
    pb::HubMessage { message: Some(message) }
}
