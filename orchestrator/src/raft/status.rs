//! What this member knows of its group, as plain values: for the API, for /metrics, and for whoever waits for a leader.

use std::time::Duration;

use nave_proto::ids::MemberId;
use openraft::async_runtime::WatchReceiver as _;
use openraft::{Instant as _, ServerState};

use crate::raft::server::LastHeard;
use crate::raft::settings::LEASE;
use crate::raft::types::{MemberNode, Raft};

/// What a member is within its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Leader,
    Candidate,
    Follower,
    /// Receives the log, does not vote; also a member that is not in a group yet.
    Learner,
    /// After a failure or a shutdown.
    Stopped,
}

impl Role {
    fn of(state: ServerState) -> Self {
        match state {
            ServerState::Leader => Self::Leader,
            ServerState::Candidate => Self::Candidate,
            ServerState::Follower => Self::Follower,
            ServerState::Learner => Self::Learner,
            ServerState::Shutdown => Self::Stopped,
        }
    }
}

/// Who leads, as far as this member knows. After a crash of the leader the others name it for up to a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leadership {
    pub leader: Option<MemberId>,
    pub term: u64,
    pub role: Role,
}

/// A momentary picture of one member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftStatus {
    pub id: MemberId,
    pub leader: Option<MemberId>,
    pub term: u64,
    /// Of the newest entry that the tables show.
    pub applied_index: u64,
    /// Of the newest entry in this member's log, committed or not.
    pub last_log_index: u64,
    /// Of the newest snapshot, and of the newest entry deleted from the log; 0: none.
    pub snapshot_index: u64,
    pub purged_index: u64,
    pub role: Role,
    /// This member leads, and a quorum said so within the lease (350 ms).
    pub leader_proven: bool,
    /// On the leader: since a quorum answered. Elsewhere: since a leader was heard, or since the start.
    pub last_quorum_contact: Duration,
    /// Id, name and address, and whether it votes. Empty before the cluster is initialised.
    pub members: Vec<(MemberId, MemberNode, bool)>,
}

pub(crate) fn leadership(raft: &Raft) -> Leadership {
    let metrics = raft.server_metrics();
    let metrics = metrics.borrow_watched();
    let role = Role::of(metrics.state);
    // A stopped core still names whoever led when it stopped, itself included.
    let leader = if role == Role::Stopped { None } else { metrics.current_leader.map(MemberId) };
    Leadership { leader, term: metrics.vote.leader_id.term, role }
}

pub(crate) fn status(raft: &Raft, applied_index: u64, heard: &LastHeard) -> RaftStatus {
    let receiver = raft.metrics();
    // The core waits for this borrow to publish the next metrics, so only plain values are copied under it.
    let metrics = receiver.borrow_watched();
    let role = if metrics.running_state.is_ok() { Role::of(metrics.state) } else { Role::Stopped };
    let (id, term, leader) = (metrics.id, metrics.current_term, metrics.current_leader);
    let last_log_index = metrics.last_log_index.unwrap_or(0);
    let snapshot_index = metrics.snapshot.map_or(0, |id| id.index);
    let purged_index = metrics.purged.map_or(0, |id| id.index);
    let acknowledged = metrics.last_quorum_acked.map(|at| at.elapsed());
    let membership = metrics.membership_config.clone();
    drop(metrics);

    let voters: Vec<u64> = membership.voter_ids().collect();
    let last_quorum_contact = match role {
        Role::Leader if voters == [id] => Duration::ZERO,
        Role::Leader => acknowledged.unwrap_or_else(|| heard.age()),
        Role::Candidate | Role::Follower | Role::Learner | Role::Stopped => heard.age(),
    };
    RaftStatus {
        id: MemberId(id),
        leader: leader.filter(|_| role != Role::Stopped).map(MemberId),
        term,
        applied_index,
        last_log_index,
        snapshot_index,
        purged_index,
        role,
        leader_proven: role == Role::Leader && last_quorum_contact < LEASE,
        last_quorum_contact,
        members: membership
            .nodes()
            .map(|(id, node)| (MemberId(*id), node.clone(), voters.contains(id)))
            .collect(),
    }
}
