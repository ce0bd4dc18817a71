//! `RaftTransport`: what the other members send. Every call is checked first: the certificate must be of a member of
//! this cluster, and the vote in the request must be that member's own, so that none can speak for another.

mod receive;

use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt as _};
use nave_proto::ids::{ClusterId, MemberId};
use nave_proto::pb;
use nave_proto::pb::raft_transport_server::RaftTransport;
use openraft::raft::AppendEntriesRequest;
use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

use crate::raft::convert::{self, ConvertError};
use crate::raft::state_machine::Tables;
use crate::raft::types::{REGISTRY_GROUP, Raft, TypeConfig};
use crate::storage::snapshot::SnapshotDirectory;

/// When a leader was last heard, for the age of this member's answers.
#[derive(Debug)]
pub(crate) struct LastHeard(Mutex<Instant>);

impl LastHeard {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Instant::now()))
    }

    fn now(&self) {
        *self.0.lock() = Instant::now();
    }

    /// Time since a leader was heard, or since this member started.
    pub(crate) fn age(&self) -> Duration {
        self.0.lock().elapsed()
    }
}

/// Serves the other members.
#[derive(Debug, Clone)]
pub struct RaftEndpoint {
    pub(super) cluster: ClusterId,
    pub(super) raft: Raft,
    pub(super) snapshots: Arc<SnapshotDirectory>,
    pub(super) heard: Arc<LastHeard>,
    pub(super) tables: Arc<Tables>,
}

/// The member behind a request, by its certificate.
pub(crate) fn sender<T>(request: &Request<T>, cluster: ClusterId) -> Result<MemberId, Status> {
    let Some(peer) = nave_tls::peer(request) else {
        return Err(Status::unauthenticated(
            "only members of this cluster may call this, by their certificate",
        ));
    };
    match peer.member() {
        Some(member) if peer.cluster == cluster => Ok(member),
        Some(_) | None => Err(Status::permission_denied(format!(
            "only members of cluster {cluster} may call this, not {} of cluster {}",
            peer.role, peer.cluster
        ))),
    }
}

fn own_vote(sender: MemberId, group: u32, vote: Option<&pb::Vote>) -> Result<(), Status> {
    if group != REGISTRY_GROUP {
        return Err(Status::unimplemented(format!("this member has no Raft group {group}")));
    }
    match vote {
        Some(vote) if vote.node_id == sender.0 => Ok(()),
        Some(vote) => Err(Status::permission_denied(format!("{sender} sent the vote of m-{}", vote.node_id))),
        None => Err(Status::invalid_argument("request without a vote")),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn malformed(error: ConvertError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// This member cannot go on; the sender backs off and tries again.
fn fatal(error: &dyn std::fmt::Display) -> Status {
    Status::unavailable(format!("this member has stopped: {error}"))
}

impl RaftEndpoint {
    /// A member that has left and has not heard of it is not to be elected, nor to disturb an election.
    fn refuse_removed(&self, sender: MemberId) -> Result<(), Status> {
        match self.tables.standing(sender) {
            pb::MemberStanding::Removed => {
                Err(Status::permission_denied(format!("{sender} was removed from the cluster")))
            }
            _ => Ok(()),
        }
    }

    /// The requests of a stream, until one is not acceptable; that is logged, since openraft only sees the end.
    fn requests(
        &self,
        sender: MemberId,
        input: Streaming<pb::AppendRequest>,
    ) -> impl Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + 'static {
        let heard = self.heard.clone();
        input
            .map(move |request| {
                let request = request?;
                own_vote(sender, request.group, request.vote.as_ref())?;
                convert::append_from_pb(request).map_err(malformed)
            })
            .take_while(move |request| {
                match request {
                    Ok(_) => heard.now(),
                    Err(status) => {
                        tracing::debug!(member = %sender, error = %status.message(), "stream of entries ended");
                    }
                }
                std::future::ready(request.is_ok())
            })
            .filter_map(|request| std::future::ready(request.ok()))
    }
}

#[tonic::async_trait]
impl RaftTransport for RaftEndpoint {
    type StreamAppendStream = BoxStream<'static, Result<pb::AppendResponse, Status>>;

    async fn stream_append(
        &self,
        request: Request<Streaming<pb::AppendRequest>>,
    ) -> Result<Response<Self::StreamAppendStream>, Status> {
        let sender = sender(&request, self.cluster)?;
        let requests = self.requests(sender, request.into_inner());
        let answers = self.raft.stream_append(requests).map(|answer| match answer {
            Ok(result) => Ok(convert::stream_result_to_pb(&result)),
            Err(error) => Ok(pb::AppendResponse { error: error.to_string(), ..Default::default() }),
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn append(
        &self,
        request: Request<pb::AppendRequest>,
    ) -> Result<Response<pb::AppendResponse>, Status> {
        let sender = sender(&request, self.cluster)?;
        let request = request.into_inner();
        own_vote(sender, request.group, request.vote.as_ref())?;
        let prev = request.prev_log_id;
        let request = convert::append_from_pb(request).map_err(malformed)?;
        let response = self.raft.append_entries(request).await.map_err(|e| fatal(&e))?;
        if !matches!(response, openraft::raft::AppendEntriesResponse::HigherVote(_)) {
            self.heard.now();
        }
        Ok(Response::new(convert::appended_to_pb(&response, prev)))
    }

    async fn vote(&self, request: Request<pb::VoteRequest>) -> Result<Response<pb::VoteResponse>, Status> {
        let sender = sender(&request, self.cluster)?;
        self.refuse_removed(sender)?;
        let request = request.into_inner();
        own_vote(sender, request.group, request.vote.as_ref())?;
        let request = convert::vote_request_from_pb(&request).map_err(malformed)?;
        let response = self.raft.vote(request).await.map_err(|e| fatal(&e))?;
        Ok(Response::new(convert::vote_response_to_pb(&response)))
    }

    async fn pre_vote(
        &self,
        request: Request<pb::VoteRequest>,
    ) -> Result<Response<pb::VoteResponse>, Status> {
        let sender = sender(&request, self.cluster)?;
        self.refuse_removed(sender)?;
        let request = request.into_inner();
        own_vote(sender, request.group, request.vote.as_ref())?;
        let request = convert::vote_request_from_pb(&request).map_err(malformed)?;
        let response = self.raft.pre_vote(request).await.map_err(|e| fatal(&e))?;
        Ok(Response::new(convert::vote_response_to_pb(&response)))
    }

    async fn transfer_leader(
        &self,
        request: Request<pb::TransferLeadershipRequest>,
    ) -> Result<Response<pb::TransferLeadershipResponse>, Status> {
        let sender = sender(&request, self.cluster)?;
        let request = request.into_inner();
        own_vote(sender, request.group, request.from.as_ref())?;
        let request = convert::transfer_from_pb(&request).map_err(malformed)?;
        self.raft
            .handle_transfer_leader(request)
            .await
            .map_err(|e| fatal(&e))?
            .map_err(|refused| Status::failed_precondition(refused.to_string()))?;
        Ok(Response::new(pb::TransferLeadershipResponse {}))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<pb::SnapshotChunk>>,
    ) -> Result<Response<pb::SnapshotResponse>, Status> {
        let sender = sender(&request, self.cluster)?;
        let (vote, snapshot) = receive::receive(sender, request.into_inner(), self.snapshots.clone()).await?;
        self.heard.now();
        let response = self.raft.install_full_snapshot(vote, snapshot).await.map_err(|e| fatal(&e))?;
        Ok(Response::new(pb::SnapshotResponse { vote: Some(convert::vote_to_pb(&response.vote)) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_votes_for_itself_only() {
        let vote = pb::Vote { term: 3, node_id: 2, committed: true };
        own_vote(MemberId(2), REGISTRY_GROUP, Some(&vote)).unwrap();
        let other = own_vote(MemberId(3), REGISTRY_GROUP, Some(&vote)).unwrap_err();
        assert_eq!(
            (other.code(), other.message()),
            (tonic::Code::PermissionDenied, "m-3 sent the vote of m-2")
        );
        own_vote(MemberId(2), 7, Some(&vote)).unwrap_err();
        own_vote(MemberId(2), REGISTRY_GROUP, None).unwrap_err();
    }

    #[test]
    fn a_stranger_is_refused() {
        let refused = sender(&Request::new(()), ClusterId(1)).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    }
}
