//! One agent's stream. One task owns it and waits for whatever comes first: a message of the agent, a change that
//! may concern its host, the fate of a report, room in the connection, or a reason to end.

use std::sync::Arc;
use std::time::Duration;

use nave_orchestrator_core::ClusterState;
use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_tls::PeerIdentity;
use pb::agent_message::Message as FromAgent;
use pb::hub_message::Message as ToAgent;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::{Instrument as _, debug, info, info_span, warn};

use super::reports::{Progress, Reports};
use super::wanted::Told;
use crate::api::enroll::check_facts;
use crate::api::{Hub, errors};
use crate::clock;
use crate::watch::{Route, Touched};

/// A connection that says nothing is closed.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Changes of this time travel together.
const COALESCE: Duration = Duration::from_millis(10);
/// How long a last word may take to leave.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(500);

/// A session whose agent has proved to be the host's.
#[derive(Debug)]
pub(super) struct Greeted {
    pub(super) host: HostId,
    pub(super) run_id: String,
    facts: Option<pb::HostFacts>,
}

/// Reads the hello and checks that it speaks for the certificate's host, in this cluster, with the registered key.
pub(super) async fn greet(
    hub: &Hub,
    identity: &PeerIdentity,
    incoming: &mut Streaming<pb::AgentMessage>,
) -> Result<Greeted, Status> {
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
            return Err(errors::not_registered(&format!("{claimed} is not registered with this key")));
        }
    }
    if let Some(facts) = &hello.facts {
        check_facts(facts)?;
    }
    Ok(Greeted { host: claimed, run_id: hello.agent_run_id, facts: hello.facts })
}

fn is_registered(state: &ClusterState, host: HostId, identity: &PeerIdentity) -> bool {
    state.host(host).is_some_and(|record| record.public_key_sha256 == identity.public_key_sha256)
}

/// Why a session ends.
enum End {
    /// The agent has gone, or a newer session took over: nobody is left to tell.
    Gone(&'static str),
    /// The agent should go to another member.
    Elsewhere(String),
    /// The agent did what it may not.
    Refused(Status),
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
    /// What the agent has been told last is of this revision; nothing: it has been told nothing.
    generation: Option<u64>,
    welcomed: bool,
    /// When the state is looked at for news, once something has changed.
    look_at: Option<Instant>,
    acknowledge: Option<u64>,
}

impl Session {
    pub(super) fn new(
        hub: Arc<Hub>,
        greeted: Greeted,
        sender: mpsc::Sender<Result<pb::HubMessage, Status>>,
        replaced: CancellationToken,
    ) -> Self {
        let host = greeted.host;
        Self {
            route: hub.changes.route(host),
            leaderless: hub.leaderless.clone(),
            addresses: hub.addresses.subscribe(),
            reports: Reports::new(hub.clone(), host, greeted.facts),
            told: Told::nothing(host),
            generation: None,
            welcomed: false,
            look_at: Some(Instant::now()),
            acknowledge: None,
            hub,
            host,
            sender,
            replaced,
        }
    }

    /// Lives as long as the stream.
    pub(super) async fn run(mut self, incoming: Streaming<pb::AgentMessage>) {
        let span = info_span!("session", host = %self.host);
        self.hub.beats.mark([self.host]);
        info!(parent: &span, "agent connected");
        let end = self.serve(incoming).instrument(span.clone()).await;
        let last = match end {
            End::Gone(why) => {
                info!(parent: &span, why, "session ended");
                return;
            }
            End::Elsewhere(reason) => {
                info!(parent: &span, reason, "agent sent elsewhere");
                Ok(message(ToAgent::Goodbye(pb::Goodbye { reason, members: self.others() })))
            }
            End::Refused(status) => {
                warn!(parent: &span, reason = status.message(), "session refused");
                Err(status)
            }
        };
        // A connection that takes no more gets no last word.
        timeout(GOODBYE_TIMEOUT, self.sender.send(last)).await.ok();
    }

    async fn serve(&mut self, mut incoming: Streaming<pb::AgentMessage>) -> End {
        loop {
            let look_at = self.look_at;
            tokio::select! {
                biased;
                () = self.hub.stop.cancelled() => return End::Elsewhere("this member is stopping".to_owned()),
                () = self.replaced.cancelled() => return End::Gone("the agent has a newer session"),
                () = until_leaderless(&mut self.leaderless) => {
                    return End::Elsewhere("this member knows no leader".to_owned());
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
                    Progress::Committed(0) | Progress::Later => {}
                    Progress::Committed(sequence) => self.acknowledge = Some(sequence),
                    Progress::Hopeless(status) => return End::Refused(status),
                },
                () = self.route.bell.rung(), if look_at.is_none() => {
                    self.look_at = Some(Instant::now() + COALESCE);
                }
                Ok(()) = self.addresses.changed(), if self.welcomed => self.welcomed = false,
                permit = self.sender.clone().reserve_owned(), if self.has_words() => {
                    let Ok(permit) = permit else { return End::Gone("the connection closed") };
                    if let Some(words) = self.words() {
                        permit.send(Ok(message(words)));
                    }
                }
                () = sleep_until(look_at.unwrap_or_else(Instant::now)), if look_at.is_some() && !self.has_words() => {
                    // Now it is time to look; the branch above does it once there is room.
                }
            }
        }
    }

    fn hear(&mut self, heard: pb::AgentMessage) -> Option<End> {
        self.hub.beats.mark([self.host]);
        match heard.message {
            Some(FromAgent::Beat(_) | FromAgent::Acknowledge(_)) => None,
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

    fn has_words(&self) -> bool {
        !self.welcomed || self.acknowledge.is_some() || self.look_at.is_some_and(|at| at <= Instant::now())
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
        self.look_at = None;
        self.look()
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
        match (self.generation, touched) {
            (Some(generation), Touched::Instances(touched)) => {
                let delta = self.told.delta(&state, incarnation, generation, touched)?;
                self.generation = Some(delta.to_generation);
                Some(ToAgent::Delta(delta))
            }
            (None, _) | (_, Touched::All) => Some(self.whole(&state, incarnation)),
        }
    }

    fn whole(&mut self, state: &ClusterState, incarnation: u64) -> ToAgent {
        self.generation = Some(state.revision());
        ToAgent::Wanted(self.told.whole(state, incarnation))
    }

    /// The members but this one.
    fn others(&self) -> Vec<String> {
        let members = self.hub.raft.status().members;
        members.into_iter().filter(|(id, _, _)| *id != self.hub.id).map(|(_, node, _)| node.address).collect()
    }
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
