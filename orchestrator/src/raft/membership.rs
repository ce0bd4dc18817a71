//! The Raft membership as the leader changes it, one guarded step at a time, and what any member knows of another.
//! What the next step is, `nave_orchestrator_core::members` decides; `controllers/members.rs` calls both.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use nave_orchestrator_core::members::{Membership, Progress};
use nave_proto::ids::MemberId;
use nave_proto::pb::{self, MemberStanding};
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::raft::Precondition;
use openraft::{ChangeMembers, Instant as _};
use tokio::time::timeout;

use crate::raft::RaftHub;
use crate::raft::state_machine::Tables;
use crate::raft::types::{LogId, MemberNode, TypeConfig};

/// Who has not answered a heartbeat (each 100 ms) for so long does not answer.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
/// Both halves of a joint change. What is not committed by then is looked at afresh.
const CHANGE_WITHIN: Duration = Duration::from_secs(10);

/// Why the membership was not changed, or is not known to have been.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    #[error("the membership has changed meanwhile, or the leader has")]
    Moved,
    #[error("the change is not acceptable: {0}")]
    Refused(String),
    #[error("not committed within 10 s; it may still be")]
    Unknown,
    #[error("this member has stopped")]
    Stopped,
}

/// The membership, and what pins a change to it.
#[derive(Debug, Clone)]
pub struct MembershipView {
    pub membership: Membership,
    guard: Option<LogId>,
}

impl RaftHub {
    /// The newest membership that this member has, committed or not. Progress is known on the leader only.
    pub fn membership(&self) -> MembershipView {
        let receiver = self.inner.raft.metrics();
        let metrics = receiver.borrow_watched();
        let replication = metrics.replication.clone().unwrap_or_default();
        let heartbeat = metrics.heartbeat.clone().unwrap_or_default();
        let stored = metrics.membership_config.clone();
        let committed = metrics.committed_membership_config.log_id() == stored.log_id();
        let last_index = metrics.last_log_index.unwrap_or(0);
        drop(metrics);
        let own = self.inner.id;
        let progress = |id: u64| {
            if id == own.0 {
                return Progress { matched: last_index, answers: true };
            }
            let heard = heartbeat.get(&id).copied().flatten();
            Progress {
                matched: replication.get(&id).copied().flatten().map_or(0, |id| id.index),
                answers: heard.is_some_and(|at| at.elapsed() < HEARD_WITHIN),
            }
        };
        let configs = stored.get_joint_config().iter();
        let membership = Membership {
            own,
            configs: configs.map(|voters| voters.iter().copied().map(MemberId).collect()).collect(),
            members: stored.nodes().map(|(id, _)| (MemberId(*id), progress(*id))).collect(),
            committed,
            last_index,
            probed: BTreeMap::new(),
        };
        MembershipView { membership, guard: *stored.log_id() }
    }

    /// What this member has applied says of a member: whether it belongs to the cluster, is to join, or has left.
    /// Ids are never used again, so [`MemberStanding::Removed`] is true for ever, however old this member's state.
    pub fn standing(&self, id: MemberId) -> MemberStanding {
        self.inner.tables.standing(id)
    }

    /// The highest id in the membership that this member has applied.
    pub fn highest_member_id(&self) -> u64 {
        self.inner.tables.membership.read().nodes().map(|(id, _)| *id).max().unwrap_or(0)
    }

    pub async fn add_learner(
        &self,
        view: &MembershipView,
        id: MemberId,
        node: MemberNode,
    ) -> Result<(), MembershipError> {
        self.change(view, ChangeMembers::AddNodes(BTreeMap::from([(id.0, node)])), true).await
    }

    /// Exactly these vote afterwards; voters that are not among them leave altogether.
    pub async fn set_voters(
        &self,
        view: &MembershipView,
        voters: &BTreeSet<MemberId>,
    ) -> Result<(), MembershipError> {
        let voters = voters.iter().map(|id| id.0).collect();
        self.change(view, ChangeMembers::ReplaceAllVoters(voters), false).await
    }

    pub async fn remove_learner(&self, view: &MembershipView, id: MemberId) -> Result<(), MembershipError> {
        self.change(view, ChangeMembers::RemoveNodes(BTreeSet::from([id.0])), true).await
    }

    /// Writes the second half of a joint change that its leader left behind.
    pub async fn flatten_membership(&self, view: &MembershipView) -> Result<(), MembershipError> {
        self.change(view, ChangeMembers::AddVoterIds(BTreeSet::new()), false).await
    }

    async fn change(
        &self,
        view: &MembershipView,
        change: ChangeMembers<u64, MemberNode>,
        retain: bool,
    ) -> Result<(), MembershipError> {
        let guard = Precondition::<TypeConfig>::LastMembershipLogId { last_membership_log_id: view.guard };
        let changed = self.inner.raft.change_membership_if(change, retain, [guard]);
        match timeout(CHANGE_WITHIN, changed).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(RaftError::Fatal(_))) => Err(MembershipError::Stopped),
            Ok(Err(RaftError::APIError(error))) => Err(match error {
                ClientWriteError::ForwardToLeader(_) | ClientWriteError::PreconditionFailed(_) => {
                    MembershipError::Moved
                }
                ClientWriteError::LogEntryDiscarded(_) => MembershipError::Unknown,
                ClientWriteError::ChangeMembershipError(error) => MembershipError::Refused(error.to_string()),
            }),
            Err(_) => Err(MembershipError::Unknown),
        }
    }
}

impl Tables {
    pub(crate) fn standing(&self, id: MemberId) -> MemberStanding {
        // Both change under the state's write lock, so together they are of one moment.
        let state = self.state.read();
        let member = self.membership.read().get_node(&id.0).is_some();
        standing(state.cluster(), member, id)
    }
}

fn standing(cluster: Option<&pb::ClusterRecord>, member: bool, id: MemberId) -> MemberStanding {
    if member {
        return MemberStanding::Member;
    }
    match cluster {
        Some(cluster) if cluster.joining.iter().any(|joining| joining.id == id.0) => MemberStanding::Joining,
        Some(cluster) if id.0 < cluster.next_member_id => MemberStanding::Removed,
        Some(_) | None => MemberStanding::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_removed_only_when_it_was_known_and_is_nowhere() {
        let joining = vec![pb::MemberReservation { id: 5, ..Default::default() }];
        let cluster = pb::ClusterRecord { next_member_id: 6, joining, ..Default::default() };
        let of = |id, member| standing(Some(&cluster), member, MemberId(id));
        assert_eq!(of(2, true), MemberStanding::Member);
        assert_eq!(of(2, false), MemberStanding::Removed);
        assert_eq!(of(5, false), MemberStanding::Joining);
        assert_eq!(of(6, false), MemberStanding::Unknown, "this state may be older than its reservation");
        // Before anybody was added or removed, ids are not counted: nobody can have left.
        let begun = pb::ClusterRecord::default();
        assert_eq!(standing(Some(&begun), false, MemberId(2)), MemberStanding::Unknown);
        assert_eq!(standing(None, false, MemberId(2)), MemberStanding::Unknown);
    }
}
