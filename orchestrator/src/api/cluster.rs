//! `ClusterService`: the hub about itself (who leads, who answers), moving leadership, and join tokens. Changes of
//! members are in `members.rs`, snapshots in `snapshots.rs`.

use std::sync::Arc;

use nave_proto::ids::MemberId;
use nave_proto::pb;
use nave_proto::token::JoinToken;
use pb::cluster_service_server::ClusterService;
use pb::command::Body;
use tokio::time::timeout_at;
use tonic::{Request, Response, Status};

use crate::api::peers::Listed;
use crate::api::{Hub, access, convert, deadline, errors, members, snapshots};
use crate::clock;
use crate::raft::RaftStatus;

const TOKEN_TTL_DEFAULT_NS: i64 = 3600 * 1_000_000_000;
/// Ten years; a token for longer is a mistake.
const TOKEN_TTL_MAX_NS: i64 = 10 * 365 * 24 * 3600 * 1_000_000_000;
const TOKEN_USES_DEFAULT: u32 = 1000;

/// The service of this name on one member.
#[derive(Debug)]
pub(crate) struct Cluster {
    hub: Arc<Hub>,
}

impl Cluster {
    pub(crate) fn new(hub: Arc<Hub>) -> Self {
        Self { hub }
    }

    /// The member a person means, by id or name; the empty text means none in particular.
    fn target(status: &RaftStatus, to: &str) -> Result<Option<MemberId>, Status> {
        if to.is_empty() {
            return Ok(None);
        }
        let named = |(id, node, _): &&Listed| id.to_string() == to || node.name == to;
        match status.members.iter().find(named) {
            Some((id, _, true)) => Ok(Some(*id)),
            Some((id, _, false)) => Err(errors::failed_precondition(
                "NOT_A_VOTER",
                format!("{id} does not vote, so it cannot lead; `nave cluster status` shows who does"),
            )),
            None => Err(errors::failed_precondition(
                "NO_SUCH_MEMBER",
                format!("there is no member {to:?}; `nave cluster status` lists them"),
            )),
        }
    }

    /// Asks the leader to do it; a member that is asked by a member never hands on again.
    async fn transfer_by_leader(
        &self,
        request: &Request<pb::TransferLeaderRequest>,
        status: &RaftStatus,
    ) -> Result<Response<pb::TransferLeaderResponse>, Status> {
        let forwarded = nave_tls::peer(request).is_some_and(|peer| peer.member().is_some());
        let leader = status.leader.and_then(|leader| status.members.iter().find(|(id, _, _)| *id == leader));
        let (Some((id, node, _)), false) = (leader, forwarded) else {
            let reach = self.hub.reach().await;
            return Err(errors::unavailable("NO_LEADER", format!("{reach}; nothing was changed; try again")));
        };
        let mut client = self.hub.peers.cluster(*id, &node.address);
        let call = client.transfer_leader(request.get_ref().clone());
        match timeout_at(deadline::of(request.metadata()), call).await {
            Ok(answer) => answer,
            Err(_) => Err(errors::unknown(self.hub.reach().await)),
        }
    }
}

#[tonic::async_trait]
impl ClusterService for Cluster {
    type TakeSnapshotStream = snapshots::Parts;

    async fn add_member(
        &self,
        request: Request<pb::AddMemberRequest>,
    ) -> Result<Response<pb::AddMemberResponse>, Status> {
        members::add(&self.hub, &request).await.map(Response::new)
    }

    async fn remove_member(
        &self,
        request: Request<pb::RemoveMemberRequest>,
    ) -> Result<Response<pb::RemoveMemberResponse>, Status> {
        members::remove(&self.hub, &request).await.map(Response::new)
    }

    async fn take_snapshot(
        &self,
        request: Request<pb::TakeSnapshotRequest>,
    ) -> Result<Response<Self::TakeSnapshotStream>, Status> {
        snapshots::take(&self.hub, &request).await.map(Response::new)
    }

    async fn get_cluster_status(
        &self,
        _: Request<pb::GetClusterStatusRequest>,
    ) -> Result<Response<pb::ClusterStatus>, Status> {
        let status = self.hub.raft.status();
        let members = members::list(&self.hub, &status).await;
        let state = self.hub.raft.state();
        let leader = status.leader.and_then(|leader| {
            status.members.iter().find(|(id, _, _)| *id == leader).map(|(_, node, _)| node.name.clone())
        });
        let answer = pb::ClusterStatus {
            cluster_id: self.hub.cluster.to_string(),
            incarnation: state.cluster().map_or(0, |cluster| cluster.incarnation),
            leader: leader.unwrap_or_default(),
            term: status.term,
            revision: state.revision(),
            members,
            answered_by: self.hub.name.clone(),
            freshness: self.hub.freshness(&state, false),
        };
        drop(state);
        Ok(Response::new(answer))
    }

    async fn transfer_leader(
        &self,
        request: Request<pb::TransferLeaderRequest>,
    ) -> Result<Response<pb::TransferLeaderResponse>, Status> {
        let status = self.hub.raft.status();
        let to = Self::target(&status, &request.get_ref().to)?;
        if status.leader != Some(self.hub.id) {
            return self.transfer_by_leader(&request, &status).await;
        }
        let moved = timeout_at(deadline::of(request.metadata()), self.hub.raft.transfer_leader(to)).await;
        let Ok(moved) = moved else {
            return Err(errors::unknown(self.hub.reach().await));
        };
        let leader = moved.map_err(|error| {
            errors::failed_precondition("NOT_TRANSFERRED", format!("leadership stays where it is: {error}"))
        })?;
        let status = self.hub.raft.status();
        let name =
            status.members.iter().find(|(id, _, _)| *id == leader).map(|(_, node, _)| node.name.clone());
        Ok(Response::new(pb::TransferLeaderResponse { leader: name.unwrap_or_default(), term: status.term }))
    }

    async fn create_token(
        &self,
        request: Request<pb::CreateTokenRequest>,
    ) -> Result<Response<pb::CreateTokenResponse>, Status> {
        let pb::CreateTokenRequest { ttl, uses } = *request.get_ref();
        let ttl_ns = match ttl {
            None => TOKEN_TTL_DEFAULT_NS,
            Some(ttl) => ttl.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(ttl.nanos)),
        };
        if !(1..=TOKEN_TTL_MAX_NS).contains(&ttl_ns) {
            return Err(errors::invalid_field("ttl", "must be more than nothing and at most ten years"));
        }
        let now = clock::unix_now_ns();
        let token = JoinToken::new(self.hub.cluster, self.hub.authority.sha256(), rand::random());
        let record = pb::TokenRecord {
            id: token.id.clone(),
            secret_sha256: token.secret_sha256().to_vec(),
            created_unix_ns: now,
            expires_unix_ns: now.saturating_add(ttl_ns),
            uses_left: if uses == 0 { TOKEN_USES_DEFAULT } else { uses },
            actor: access::actor(&request),
            revision: 0,
        };
        let info = Some(convert::token(&record));
        self.hub.write(&request, None, Body::CreateToken(pb::CreateToken { token: Some(record) })).await?;
        Ok(Response::new(pb::CreateTokenResponse { token: token.to_string(), info }))
    }

    async fn list_tokens(
        &self,
        _: Request<pb::ListTokensRequest>,
    ) -> Result<Response<pb::ListTokensResponse>, Status> {
        let state = self.hub.raft.state();
        let tokens = state.tokens().map(|record| convert::token(record)).collect();
        let freshness = self.hub.freshness(&state, false);
        drop(state);
        Ok(Response::new(pb::ListTokensResponse { tokens, freshness }))
    }

    async fn revoke_token(
        &self,
        request: Request<pb::RevokeTokenRequest>,
    ) -> Result<Response<pb::RevokeTokenResponse>, Status> {
        let id = request.get_ref().id.clone();
        self.hub.write(&request, None, Body::RevokeToken(pb::RevokeToken { id })).await?;
        Ok(Response::new(pb::RevokeTokenResponse {}))
    }
}
