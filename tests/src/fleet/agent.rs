//! One simulated agent: an identity, and sessions one after another with random members.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use nave_proto::pb;
use nave_tls::{ChannelOptions, Credentials, Expect, KeyPair};
use pb::agent_message::Message as ToHub;
use pb::agent_session_client::AgentSessionClient;
use pb::hub_message::Message as FromHub;
use rand::Rng as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::Seen;
use super::instances::{Instances, Turned};

const BEAT: Duration = Duration::from_secs(1);
/// As the agent's own session has them (`agent/src/hub/session.rs`).
const PING: Duration = Duration::from_secs(1);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
const WINDOW_BYTES: u32 = 256 * 1024;
const MESSAGE_BYTES_MAX: usize = 80 * 1024 * 1024;
const OUTGOING: usize = 16;
/// Between sessions: jittered, so that a fleet does not come back at once.
const PAUSE_MAX_MS: u64 = 2000;

/// A host that has enrolled.
#[derive(Debug)]
pub struct SimulatedAgent {
    credentials: Credentials,
    cluster_id: String,
    host_id: String,
    members: Vec<String>,
    facts: pb::HostFacts,
    number: usize,
}

struct Session {
    instances: Instances,
    outgoing: mpsc::Sender<pb::AgentMessage>,
    sequence: u64,
    /// How many instances the report under way names.
    in_flight: Option<u64>,
    welcomed: bool,
}

impl SimulatedAgent {
    pub(super) fn new(
        key: &KeyPair,
        answer: pb::EnrollResponse,
        facts: pb::HostFacts,
        number: usize,
    ) -> anyhow::Result<Self> {
        let credentials =
            key.with_certificate(answer.certificate_der, answer.ca_der).context("the certificate")?;
        let (cluster_id, host_id, members) = (answer.cluster_id, answer.host_id, answer.members);
        Ok(Self { credentials, cluster_id, host_id, members, facts, number })
    }

    /// Keeps a session for ever.
    pub(super) async fn run(self: Arc<Self>, seen: Arc<Seen>) {
        let mut instances = Instances::default();
        let mut member = self.number;
        loop {
            instances = self.session(member, instances, &seen).await;
            seen.ended.fetch_add(1, Ordering::Relaxed);
            member += 1;
            let pause = rand::rng().random_range(0..PAUSE_MAX_MS);
            sleep(Duration::from_millis(pause)).await;
        }
    }

    /// One session, to its end; what runs outlives it.
    async fn session(&self, member: usize, instances: Instances, seen: &Seen) -> Instances {
        let (outgoing, to_send) = mpsc::channel(OUTGOING);
        let mut session = Session { instances, outgoing, sequence: 0, in_flight: None, welcomed: false };
        session.send(ToHub::Hello(self.hello()));
        let Ok(incoming) = self.open(member, to_send).await else { return session.instances };
        session.converse(incoming, seen).await;
        if session.welcomed {
            seen.sessions.fetch_sub(1, Ordering::Relaxed);
        }
        session.instances
    }

    fn hello(&self) -> pb::Hello {
        pb::Hello {
            cluster_id: self.cluster_id.clone(),
            host_id: self.host_id.clone(),
            facts: Some(self.facts.clone()),
            agent_run_id: format!("run-{}", self.number),
            ..Default::default()
        }
    }

    async fn open(
        &self,
        member: usize,
        to_send: mpsc::Receiver<pb::AgentMessage>,
    ) -> Result<Streaming<pb::HubMessage>, tonic::Status> {
        let options = ChannelOptions {
            connect_timeout: Duration::from_secs(20), // thousands dial two cores at once
            keep_alive_interval: Some(PING),
            keep_alive_timeout: PING_TIMEOUT.max(Duration::from_secs(10)),
            stream_window_bytes: WINDOW_BYTES,
            connection_window_bytes: WINDOW_BYTES,
            ..ChannelOptions::default()
        };
        let address = &self.members[member % self.members.len()];
        let channel = nave_tls::channel(address, &self.credentials, Expect::Member, options);
        let mut client = AgentSessionClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        Ok(client.open_session(ReceiverStream::new(to_send)).await?.into_inner())
    }
}

impl Session {
    async fn converse(&mut self, mut incoming: Streaming<pb::HubMessage>, seen: &Seen) {
        let offset = Duration::from_millis(rand::rng().random_range(0..1000));
        let mut beats = interval_at(Instant::now() + offset, BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut beat = 0;
        loop {
            tokio::select! {
                message = incoming.message() => match message {
                    Ok(Some(pb::HubMessage { message: Some(message) })) => {
                        seen.messages.fetch_add(1, Ordering::Relaxed);
                        if matches!(message, FromHub::Goodbye(_)) {
                            return;
                        }
                        self.take(message, seen);
                    }
                    Ok(Some(pb::HubMessage { message: None })) => {}
                    Ok(None) | Err(_) => return,
                },
                _ = beats.tick() => {
                    beat += 1;
                    self.send(ToHub::Beat(pb::Beat { sequence: beat }));
                }
            }
        }
    }

    fn take(&mut self, message: FromHub, seen: &Seen) {
        match message {
            FromHub::Welcome(_) => {
                self.welcomed = true;
                seen.sessions.fetch_add(1, Ordering::Relaxed);
                self.instances.tell_all();
            }
            FromHub::Wanted(set) => {
                let (incarnation, generation) = (set.incarnation, set.generation);
                count(self.instances.whole(set), seen);
                self.own(incarnation, generation);
            }
            FromHub::Delta(delta) => {
                let (incarnation, generation) = (delta.incarnation, delta.to_generation);
                count(self.instances.delta(delta), seen);
                self.own(incarnation, generation);
            }
            FromHub::ReportAcknowledged(acknowledged) if acknowledged.sequence == self.sequence => {
                if let Some(instances) = self.in_flight.take() {
                    seen.acknowledged.fetch_add(instances, Ordering::Relaxed);
                }
            }
            FromHub::Directory(update) => {
                seen.directory_updates.fetch_add(1, Ordering::Relaxed);
                seen.endpoints.fetch_add(update.endpoints.len() as u64, Ordering::Relaxed);
                if update.acknowledge {
                    let draining_revision = update.revision;
                    self.send(ToHub::Acknowledge(pb::Acknowledge {
                        draining_revision,
                        ..Default::default()
                    }));
                }
            }
            _ => {}
        }
        self.report();
    }

    fn own(&self, incarnation: u64, generation: u64) {
        self.send(ToHub::Acknowledge(pb::Acknowledge { incarnation, generation, draining_revision: 0 }));
    }

    /// One report is under way at a time.
    fn report(&mut self) {
        if !self.welcomed || self.in_flight.is_some() {
            return;
        }
        if let Some(report) = self.instances.report(self.sequence + 1) {
            self.sequence += 1;
            self.in_flight = Some(report.instances.len() as u64);
            self.send(ToHub::Report(report));
        }
    }

    /// A full queue means a connection that does not move: it ends by itself.
    fn send(&self, message: ToHub) {
        self.outgoing.try_send(pb::AgentMessage { message: Some(message) }).ok();
    }
}

fn count(turned: Turned, seen: &Seen) {
    seen.running.fetch_add(turned.started, Ordering::Relaxed);
    seen.running.fetch_sub(turned.stopped, Ordering::Relaxed);
}
