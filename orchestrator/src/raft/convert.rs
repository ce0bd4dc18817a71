//! openraft's values to and from `raft.proto`, by hand: what is on disk and on the wire is ours, so a new openraft
//! changes neither. Encoding cannot fail; decoding names the field that is missing or impossible.

use std::collections::{BTreeMap, BTreeSet};

use nave_proto::pb;
use openraft::RaftTypeConfig;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, StreamAppendError, StreamAppendResult};
use openraft::raft::{TransferLeaderRequest, VoteRequest, VoteResponse};
use prost::Message as _;

use crate::raft::types::{
    EncodedCommand, Entry, LeaderId, LogId, MemberNode, Membership, Payload, REGISTRY_GROUP, SnapshotMeta,
    StoredMembership, TypeConfig, Vote,
};

/// A message that this build cannot have written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} without a valid {field}")]
pub(crate) struct ConvertError {
    message: &'static str,
    field: &'static str,
}

fn missing(message: &'static str, field: &'static str) -> ConvertError {
    ConvertError { message, field }
}

pub(crate) fn log_id_to_pb(id: &LogId) -> pb::LogId {
    pb::LogId { term: id.leader_id.term, node_id: id.leader_id.node_id, index: id.index }
}

pub(crate) fn log_id_from_pb(id: &pb::LogId) -> LogId {
    LogId::new(LeaderId { term: id.term, node_id: id.node_id }, id.index)
}

pub(crate) fn vote_to_pb(vote: &Vote) -> pb::Vote {
    pb::Vote { term: vote.leader_id.term, node_id: vote.leader_id.node_id, committed: vote.committed }
}

pub(crate) fn vote_from_pb(vote: &pb::Vote) -> Vote {
    Vote { leader_id: LeaderId { term: vote.term, node_id: vote.node_id }, committed: vote.committed }
}

pub(crate) fn node_to_pb(node: &MemberNode) -> pb::MemberNode {
    pb::MemberNode { name: node.name.clone(), address: node.address.clone() }
}

pub(crate) fn node_from_pb(node: pb::MemberNode) -> MemberNode {
    MemberNode { name: node.name, address: node.address }
}

pub(crate) fn membership_to_pb(membership: &Membership) -> pb::Membership {
    pb::Membership {
        configs: membership
            .get_joint_config()
            .iter()
            .map(|voters| pb::VoterSet { ids: voters.iter().copied().collect() })
            .collect(),
        nodes: membership.nodes().map(|(id, node)| (*id, node_to_pb(node))).collect(),
    }
}

pub(crate) fn membership_from_pb(membership: pb::Membership) -> Result<Membership, ConvertError> {
    if membership.configs.is_empty() && membership.nodes.is_empty() {
        return Ok(Membership::default());
    }
    let configs: Vec<BTreeSet<u64>> =
        membership.configs.into_iter().map(|voters| voters.ids.into_iter().collect()).collect();
    let nodes: BTreeMap<u64, MemberNode> =
        membership.nodes.into_iter().map(|(id, node)| (id, node_from_pb(node))).collect();
    Membership::new(configs, nodes).map_err(|_| missing("membership", "voter set"))
}

pub(crate) fn stored_membership_to_pb(stored: &StoredMembership) -> pb::StoredMembership {
    pb::StoredMembership {
        log_id: stored.log_id().as_ref().map(log_id_to_pb),
        membership: Some(membership_to_pb(stored.membership())),
    }
}

pub(crate) fn stored_membership_from_pb(
    stored: pb::StoredMembership,
) -> Result<StoredMembership, ConvertError> {
    let log_id = stored.log_id.as_ref().map(log_id_from_pb);
    Ok(StoredMembership::new(log_id, membership_from_pb(stored.membership.unwrap_or_default())?))
}

pub(crate) fn snapshot_meta_to_pb(meta: &SnapshotMeta) -> pb::SnapshotMeta {
    pb::SnapshotMeta {
        last_log_id: meta.last_log_id.as_ref().map(log_id_to_pb),
        membership: Some(stored_membership_to_pb(&meta.last_membership)),
        ..Default::default()
    }
}

pub(crate) fn snapshot_meta_from_pb(meta: pb::SnapshotMeta) -> Result<SnapshotMeta, ConvertError> {
    Ok(SnapshotMeta {
        last_log_id: meta.last_log_id.as_ref().map(log_id_from_pb),
        last_membership: stored_membership_from_pb(meta.membership.unwrap_or_default())?,
    })
}

pub(crate) fn entry_to_pb(entry: &Entry) -> pb::Entry {
    let payload = match &entry.payload {
        Payload::Blank => pb::entry::Payload::Blank(true),
        Payload::Normal(command) => pb::entry::Payload::Command(command.0.clone()),
        Payload::Membership(membership) => pb::entry::Payload::Membership(membership_to_pb(membership)),
    };
    pb::Entry { log_id: Some(log_id_to_pb(&entry.log_id)), payload: Some(payload) }
}

pub(crate) fn entry_from_pb(entry: pb::Entry) -> Result<Entry, ConvertError> {
    let log_id = entry.log_id.as_ref().ok_or_else(|| missing("entry", "log_id"))?;
    let payload = match entry.payload.ok_or_else(|| missing("entry", "payload"))? {
        pb::entry::Payload::Blank(_) => Payload::Blank,
        pb::entry::Payload::Command(command) => Payload::Normal(EncodedCommand(command)),
        pb::entry::Payload::Membership(membership) => Payload::Membership(membership_from_pb(membership)?),
    };
    Ok(Entry { log_id: log_id_from_pb(log_id), payload })
}

/// The entry as the log database holds it.
pub(crate) fn entry_from_bytes(bytes: &[u8]) -> Result<Entry, std::io::Error> {
    let corrupt = |what: String| std::io::Error::new(std::io::ErrorKind::InvalidData, what);
    let entry = pb::Entry::decode(bytes).map_err(|e| corrupt(format!("log entry: {e}")))?;
    entry_from_pb(entry).map_err(|e| corrupt(e.to_string()))
}

pub(crate) fn append_to_pb(request: AppendEntriesRequest<TypeConfig>) -> pb::AppendRequest {
    pb::AppendRequest {
        group: REGISTRY_GROUP,
        vote: Some(vote_to_pb(&request.vote)),
        prev_log_id: request.prev_log_id.as_ref().map(log_id_to_pb),
        leader_commit: request.leader_commit.as_ref().map(log_id_to_pb),
        entries: request.entries.iter().map(entry_to_pb).collect(),
    }
}

pub(crate) fn append_from_pb(
    request: pb::AppendRequest,
) -> Result<AppendEntriesRequest<TypeConfig>, ConvertError> {
    Ok(AppendEntriesRequest {
        vote: vote_from_pb(request.vote.as_ref().ok_or_else(|| missing("append", "vote"))?),
        prev_log_id: request.prev_log_id.as_ref().map(log_id_from_pb),
        leader_commit: request.leader_commit.as_ref().map(log_id_from_pb),
        entries: request.entries.into_iter().map(entry_from_pb).collect::<Result<_, _>>()?,
    })
}

/// The answer to a unary append (a heartbeat). `prev` is echoed with a conflict.
pub(crate) fn appended_to_pb(
    response: &AppendEntriesResponse<TypeConfig>,
    prev: Option<pb::LogId>,
) -> pb::AppendResponse {
    use pb::append_response::Result as Outcome;
    let result = match response {
        AppendEntriesResponse::Success => Outcome::Success(true),
        AppendEntriesResponse::PartialSuccess(Some(id)) => Outcome::PartialSuccess(log_id_to_pb(id)),
        // Accepted, but nothing beyond an empty log.
        AppendEntriesResponse::PartialSuccess(None) => Outcome::Success(false),
        AppendEntriesResponse::Conflict => Outcome::Conflict(prev.unwrap_or_default()),
        AppendEntriesResponse::HigherVote(vote) => Outcome::HigherVote(vote_to_pb(vote)),
    };
    pb::AppendResponse { result: Some(result), ..Default::default() }
}

pub(crate) fn appended_from_pb(
    response: pb::AppendResponse,
) -> Result<AppendEntriesResponse<TypeConfig>, ConvertError> {
    use pb::append_response::Result as Outcome;
    Ok(match response.result.ok_or_else(|| missing("append response", "result"))? {
        Outcome::Success(true) => AppendEntriesResponse::Success,
        Outcome::Success(false) => AppendEntriesResponse::PartialSuccess(None),
        Outcome::PartialSuccess(id) => AppendEntriesResponse::PartialSuccess(Some(log_id_from_pb(&id))),
        Outcome::Conflict(_) => AppendEntriesResponse::Conflict,
        Outcome::HigherVote(vote) => AppendEntriesResponse::HigherVote(vote_from_pb(&vote)),
    })
}

/// The answer to one request of a streamed append.
pub(crate) fn stream_result_to_pb(result: &StreamAppendResult<TypeConfig>) -> pb::AppendResponse {
    use pb::append_response::Result as Outcome;
    let (outcome, acknowledged) = match result {
        Ok(acknowledged) => (Outcome::Success(true), acknowledged.as_ref().map(log_id_to_pb)),
        Err(StreamAppendError::Conflict(id)) => (Outcome::Conflict(log_id_to_pb(id)), None),
        Err(StreamAppendError::HigherVote(vote)) => (Outcome::HigherVote(vote_to_pb(vote)), None),
    };
    pb::AppendResponse { result: Some(outcome), acknowledged, error: String::new() }
}

pub(crate) fn stream_result_from_pb(
    response: &pb::AppendResponse,
) -> Result<StreamAppendResult<TypeConfig>, ConvertError> {
    use pb::append_response::Result as Outcome;
    Ok(match response.result.as_ref().ok_or_else(|| missing("append response", "result"))? {
        Outcome::Success(_) => Ok(response.acknowledged.as_ref().map(log_id_from_pb)),
        Outcome::PartialSuccess(id) => Ok(Some(log_id_from_pb(id))),
        Outcome::Conflict(id) => Err(StreamAppendError::Conflict(log_id_from_pb(id))),
        Outcome::HigherVote(vote) => Err(StreamAppendError::HigherVote(vote_from_pb(vote))),
    })
}

pub(crate) fn vote_request_to_pb(request: &VoteRequest<TypeConfig>) -> pb::VoteRequest {
    pb::VoteRequest {
        group: REGISTRY_GROUP,
        vote: Some(vote_to_pb(&request.vote)),
        last_log_id: request.last_log_id.as_ref().map(log_id_to_pb),
        leadership_transfer: request.leadership_transfer,
    }
}

pub(crate) fn vote_request_from_pb(
    request: &pb::VoteRequest,
) -> Result<VoteRequest<TypeConfig>, ConvertError> {
    Ok(VoteRequest {
        vote: vote_from_pb(request.vote.as_ref().ok_or_else(|| missing("vote request", "vote"))?),
        last_log_id: request.last_log_id.as_ref().map(log_id_from_pb),
        leadership_transfer: request.leadership_transfer,
    })
}

pub(crate) fn vote_response_to_pb(response: &VoteResponse<TypeConfig>) -> pb::VoteResponse {
    pb::VoteResponse {
        vote: Some(vote_to_pb(&response.vote)),
        last_log_id: response.last_log_id.as_ref().map(log_id_to_pb),
        granted: response.vote_granted,
    }
}

pub(crate) fn vote_response_from_pb(
    response: &pb::VoteResponse,
) -> Result<VoteResponse<TypeConfig>, ConvertError> {
    Ok(VoteResponse {
        vote: vote_from_pb(response.vote.as_ref().ok_or_else(|| missing("vote response", "vote"))?),
        last_log_id: response.last_log_id.as_ref().map(log_id_from_pb),
        vote_granted: response.granted,
    })
}

pub(crate) fn transfer_to_pb(request: &TransferLeaderRequest<TypeConfig>) -> pb::TransferLeadershipRequest {
    pb::TransferLeadershipRequest {
        group: REGISTRY_GROUP,
        from: Some(vote_to_pb(request.from_leader())),
        to: *request.to_node_id(),
        last_log_id: request.last_log_id().map(log_id_to_pb),
    }
}

pub(crate) fn transfer_from_pb(
    request: &pb::TransferLeadershipRequest,
) -> Result<TransferLeaderRequest<TypeConfig>, ConvertError> {
    let from = request.from.as_ref().ok_or_else(|| missing("transfer request", "from"))?;
    Ok(TransferLeaderRequest::new(
        vote_from_pb(from),
        request.to,
        request.last_log_id.as_ref().map(log_id_from_pb),
    ))
}

const _: () = {
    // The wire says u64 for both; a change of the type parameters must not compile silently.
    const fn same<A: RaftTypeConfig<NodeId = u64, Term = u64>>() {}
    same::<TypeConfig>();
};

#[cfg(test)]
mod tests {
    use super::*;

    fn id(term: u64, node: u64, index: u64) -> LogId {
        LogId::new(LeaderId { term, node_id: node }, index)
    }

    fn membership() -> Membership {
        let node = |n: u64| MemberNode { name: format!("m{n}"), address: format!("127.0.0.1:{n}") };
        Membership::new(
            vec![BTreeSet::from([1, 2, 3]), BTreeSet::from([2, 3, 4])],
            (1..=5).map(|n| (n, node(n))).collect::<BTreeMap<_, _>>(),
        )
        .unwrap()
    }

    #[test]
    fn entries_survive_their_bytes() {
        let payloads = [
            Payload::Blank,
            Payload::Normal(EncodedCommand(vec![1, 2, 3].into())),
            Payload::Normal(EncodedCommand(bytes::Bytes::new())),
            Payload::Membership(membership()),
        ];
        for (index, payload) in (0u64..).zip(payloads) {
            let entry = Entry { log_id: id(3, 2, index), payload };
            let back = entry_from_bytes(&entry_to_pb(&entry).encode_to_vec()).unwrap();
            assert_eq!(back, entry);
        }
    }

    #[test]
    fn memberships_and_votes_survive_their_bytes() {
        for stored in [
            StoredMembership::default(),
            StoredMembership::new(Some(id(1, 2, 3)), membership()),
            StoredMembership::new(None, Membership::default()),
        ] {
            assert_eq!(stored_membership_from_pb(stored_membership_to_pb(&stored)).unwrap(), stored);
        }
        for vote in [Vote::new(0, 0), Vote::new(7, 3), Vote::new_committed(u64::MAX, 1)] {
            assert_eq!(vote_from_pb(&vote_to_pb(&vote)), vote);
        }
    }

    #[test]
    fn requests_keep_every_field() {
        let request = AppendEntriesRequest::<TypeConfig> {
            vote: Vote::new_committed(4, 2),
            prev_log_id: Some(id(3, 1, 9)),
            leader_commit: None,
            entries: vec![Entry { log_id: id(4, 2, 10), payload: Payload::Blank }],
        };
        let back = append_from_pb(append_to_pb(request.clone())).unwrap();
        assert_eq!(format!("{back:?}"), format!("{request:?}"));
        let vote = VoteRequest::<TypeConfig> {
            vote: Vote::new(5, 1),
            last_log_id: Some(id(4, 2, 10)),
            leadership_transfer: true,
        };
        assert_eq!(vote_request_from_pb(&vote_request_to_pb(&vote)).unwrap(), vote);
        let transfer = TransferLeaderRequest::new(Vote::new_committed(5, 1), 3, Some(id(5, 1, 11)));
        assert_eq!(transfer_from_pb(&transfer_to_pb(&transfer)).unwrap(), transfer);
    }

    #[test]
    fn stream_answers_keep_their_meaning() {
        let answers: [StreamAppendResult<TypeConfig>; 4] = [
            Ok(None),
            Ok(Some(id(1, 1, 1))),
            Err(StreamAppendError::Conflict(id(1, 1, 7))),
            Err(StreamAppendError::HigherVote(Vote::new(9, 2))),
        ];
        for answer in answers {
            assert_eq!(stream_result_from_pb(&stream_result_to_pb(&answer)).unwrap(), answer);
        }
    }

    #[test]
    fn a_message_without_its_body_is_refused() {
        let error = entry_from_pb(pb::Entry::default()).unwrap_err();
        assert_eq!(error.to_string(), "entry without a valid log_id");
        vote_request_from_pb(&pb::VoteRequest::default()).unwrap_err();
    }
}
