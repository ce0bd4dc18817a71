//! The members' gRPC API: what people, agents and other members may ask of this one, and how it is answered.
//!
//! [`Hub`] is what the services share. Two rules hold for all of them and live here: a write goes through the one
//! propose door with a deadline and is answered only when it is committed; a read is linearizable when asked for,
//! and every other answer says how old it is ([`pb::Freshness`]).

pub(crate) mod access;
pub(crate) mod cluster;
pub(crate) mod connection;
pub(crate) mod convert;
pub(crate) mod deadline;
pub(crate) mod enroll;
pub(crate) mod errors;
pub(crate) mod events;
pub(crate) mod gate;
pub(crate) mod hosts;
pub(crate) mod logs;
pub(crate) mod member;
pub(crate) mod members;
pub(crate) mod peers;
pub(crate) mod server;
pub(crate) mod services;
pub(crate) mod snapshots;
pub(crate) mod traffic;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::time::Duration;

use nave_orchestrator_core::ClusterState;
use nave_proto::ids::{ClusterId, MemberId};
use nave_proto::pb;
use nave_tls::{Authority, Credentials};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Status};

use crate::api::errors::Reach;
use crate::api::peers::Peers;
use crate::dispatch::beats::Beats;
use crate::metrics::Metrics;
use crate::raft::{ProposeError, RaftHub};
use crate::watch::Changes;

/// A leader that no quorum, or nobody, has answered for so long leads nothing: ten heartbeats, three times the lease.
/// A leader that is cut off still calls itself one.
const LEADER_SILENT: Duration = Duration::from_secs(1);

/// Records converted under one read lock of the state: some 2 µs each, so half a millisecond.
const RECORDS_PER_SLICE: usize = 256;

/// What every part of a member's API works with. One per process, behind an `Arc`.
#[derive(Debug)]
pub(crate) struct Hub {
    pub(crate) id: MemberId,
    pub(crate) name: String,
    pub(crate) cluster: ClusterId,
    pub(crate) raft: RaftHub,
    pub(crate) changes: Arc<Changes>,
    pub(crate) beats: Arc<Beats>,
    pub(crate) peers: Peers,
    pub(crate) authority: Authority,
    pub(crate) credentials: Credentials,
    pub(crate) metrics: Arc<Metrics>,
    /// What each change of members waits for, on the leader.
    pub(crate) member_notes: Mutex<BTreeMap<MemberId, String>>,
    /// `host:port` of every member, as the membership has it; changes with it.
    pub(crate) addresses: watch::Sender<Vec<String>>,
    /// When the newest scheduled snapshot was taken, unix nanoseconds; 0: none yet.
    pub(crate) backup_unix_ns: AtomicI64,
    /// True while this member has not heard of a leader for too long to keep agents (`dispatch`).
    pub(crate) leaderless: watch::Receiver<bool>,
    /// Cancelled when this member goes down: streams end, nothing new begins.
    pub(crate) stop: CancellationToken,
    /// Owns the tasks behind open streams.
    pub(crate) tasks: TaskTracker,
}

impl Hub {
    /// Commits one command for a caller, or says why not.
    pub(crate) async fn write<T>(
        &self,
        request: &Request<T>,
        request_id: Option<pb::RequestId>,
        body: pb::command::Body,
    ) -> Result<Committed, Status> {
        let actor = access::actor(request);
        self.write_as(actor, request_id, body, deadline::of(request.metadata())).await
    }

    /// The same for a caller whose request has been taken apart already.
    pub(crate) async fn write_as(
        &self,
        actor: String,
        request_id: Option<pb::RequestId>,
        body: pb::command::Body,
        deadline: Instant,
    ) -> Result<Committed, Status> {
        let begun = Instant::now();
        let command = command(actor, request_id, body);
        let outcome = self.raft.propose(command, deadline).await;
        self.metrics.propose_seconds.observe(begun.elapsed().as_secs_f64());
        match outcome {
            Ok(reply) => Committed::from_reply(reply),
            Err(error) => {
                self.metrics.propose_failures.inc();
                // Only these two speak of the members, and asking them takes time.
                let reach = match error {
                    ProposeError::Unavailable { .. } | ProposeError::Unknown => self.reach().await,
                    _ => Reach::default(),
                };
                Err(errors::propose(&error, reach))
            }
        }
    }

    /// Returns once this member may be read: at once, or, when asked, once it has shown to be up to date.
    pub(crate) async fn read<T>(&self, request: &Request<T>, linearizable: bool) -> Result<(), Status> {
        self.read_by(deadline::of(request.metadata()), linearizable).await
    }

    /// The same for a caller whose request has been taken apart already.
    pub(crate) async fn read_by(&self, deadline: Instant, linearizable: bool) -> Result<(), Status> {
        if !linearizable {
            return Ok(());
        }
        match self.raft.linearize(deadline).await {
            Ok(_) => Ok(()),
            Err(error) => Err(errors::read(&error, self.reach().await)),
        }
    }

    /// How old an answer from this state is.
    pub(crate) fn freshness(&self, state: &ClusterState, linearizable: bool) -> Option<pb::Freshness> {
        let status = self.raft.status();
        let age = if linearizable { 0 } else { status.last_quorum_contact.as_millis() };
        Some(pb::Freshness {
            revision: state.revision(),
            linearizable,
            age_ms: u64::try_from(age).unwrap_or(u64::MAX),
            member: self.name.clone(),
            has_leader: status.leader.is_some() && status.last_quorum_contact < LEADER_SILENT,
        })
    }

    /// The incarnation and where a watcher who has seen this state stands.
    pub(crate) fn cursor(&self, state: &ClusterState) -> pb::WatchCursor {
        self.cursor_at(state.cluster().map_or(0, |cluster| cluster.incarnation), state.revision())
    }

    pub(crate) fn cursor_at(&self, incarnation: u64, revision: u64) -> pb::WatchCursor {
        pb::WatchCursor { cluster_id: self.cluster.to_string(), incarnation, revision }
    }

    /// Converts what was taken from the state, in slices between which `apply` gets its turn: a listing of a hundred
    /// thousand services takes longer than a heartbeat may.
    pub(crate) async fn in_slices<R, T>(
        &self,
        records: Vec<Arc<R>>,
        convert: impl Fn(&ClusterState, &R) -> T,
    ) -> Vec<T> {
        let mut converted = Vec::with_capacity(records.len());
        for slice in records.chunks(RECORDS_PER_SLICE) {
            {
                let state = self.raft.state();
                converted.extend(slice.iter().map(|record| convert(&state, record)));
            }
            tokio::task::yield_now().await;
        }
        converted
    }

    /// `host:port` of every member, for agents to keep on disk.
    pub(crate) fn member_addresses(&self) -> Vec<String> {
        self.raft.status().members.into_iter().map(|(_, node, _)| node.address).collect()
    }

    /// Which members answer, for error messages; looked up at most once a second.
    pub(crate) async fn reach(&self) -> Reach {
        self.peers.reach(&self.raft.status().members).await
    }
}

/// A command as it is proposed; its format is stamped on the way, its time by the leader.
pub(crate) fn command(
    actor: String,
    request_id: Option<pb::RequestId>,
    body: pb::command::Body,
) -> pb::Command {
    pb::Command { time_unix_ns: 0, actor, request_id, written_by: 0, body: Some(body) }
}

/// An accepted command's answer.
#[derive(Debug, Clone)]
pub(crate) struct Committed {
    pub(crate) revision: u64,
    pub(crate) accepted: pb::Accepted,
}

impl Committed {
    fn from_reply(reply: pb::Reply) -> Result<Self, Status> {
        match reply.result {
            Some(pb::reply::Result::Accepted(accepted)) => Ok(Self { revision: reply.revision, accepted }),
            Some(pb::reply::Result::Rejected(rejected)) => Err(errors::rejected(&rejected)),
            None => Err(errors::internal("a committed command has no result")),
        }
    }
}
