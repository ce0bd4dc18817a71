//! `MemberService`, the part that is not Raft's: what this member says of itself, and beats that other members
//! hand to the leader. Raft answers the rest of the service; one path prefix, two rooms, joined here.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use http::{Request as HttpRequest, Response as HttpResponse};
use nave_proto::ids::MemberId;
use nave_proto::pb;
use nave_tls::PeerIdentity;
use pb::member_service_server::{MemberService, MemberServiceServer};
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::server::NamedService;
use tonic::{Request, Response, Status};

use crate::api::Hub;
use crate::dispatch::beats;

const GET_MEMBER_INFO: &str = "/nave.v1.MemberService/GetMemberInfo";
const FORWARD_BEATS: &str = "/nave.v1.MemberService/ForwardBeats";

/// The whole `MemberService`: ours and Raft's.
pub(crate) fn service<R>(hub: &Arc<Hub>, raft: MemberServiceServer<R>) -> Joined<MemberServiceServer<R>> {
    Joined { own: MemberServiceServer::new(Own { hub: hub.clone() }), raft }
}

/// Sends two calls to ours and the rest to Raft's.
#[derive(Debug, Clone)]
pub(crate) struct Joined<R> {
    own: MemberServiceServer<Own>,
    raft: R,
}

impl<R: NamedService> NamedService for Joined<R> {
    const NAME: &'static str = R::NAME;
}

type Answer = BoxFuture<'static, Result<HttpResponse<Body>, Infallible>>;

impl<R> Service<HttpRequest<Body>> for Joined<R>
where
    R: Service<HttpRequest<Body>, Response = HttpResponse<Body>, Error = Infallible, Future = Answer>,
{
    type Response = HttpResponse<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Generated servers never make a caller wait.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: HttpRequest<Body>) -> Answer {
        match request.uri().path() {
            GET_MEMBER_INFO | FORWARD_BEATS => self.own.call(request),
            _ => self.raft.call(request),
        }
    }
}

/// What this member says of itself to any other.
pub(crate) fn info(hub: &Hub) -> pb::MemberInfo {
    let status = hub.raft.status();
    let leads = status.leader == Some(hub.id);
    let heard = if leads { hub.beats.heard() } else { Default::default() };
    let notes = if leads { hub.member_notes.lock().clone() } else { Default::default() };
    let (snapshot_index, snapshot_unix_ns) = hub.raft.snapshot_age().unwrap_or_default();
    pb::MemberInfo {
        member_id: hub.id.0,
        name: hub.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        term: status.term,
        leader_id: status.leader.map_or(0, |leader| leader.0),
        applied_index: status.applied_index,
        last_log_index: status.last_log_index,
        leader_proven: status.leader_proven,
        last_heard_unix_ns: heard.into_iter().map(|(id, at)| (id.0, at)).collect(),
        caller_standing: pb::MemberStanding::Unspecified.into(),
        caller_matched_index: 0,
        command_format: nave_proto::COMMAND_FORMAT,
        snapshot_index,
        snapshot_unix_ns,
        backup_unix_ns: hub.backup_unix_ns.load(Ordering::Relaxed),
        membership_notes: notes.into_iter().map(|(id, note)| (id.0, note)).collect(),
    }
}

#[derive(Debug)]
struct Own {
    hub: Arc<Hub>,
}

#[tonic::async_trait]
impl MemberService for Own {
    async fn get_member_info(
        &self,
        request: Request<pb::GetMemberInfoRequest>,
    ) -> Result<Response<pb::MemberInfo>, Status> {
        let caller = nave_tls::peer(&request).and_then(PeerIdentity::member);
        let standing = caller.map_or(pb::MemberStanding::Unspecified, |id| self.hub.raft.standing(id));
        let mut info = info(&self.hub);
        info.caller_standing = standing.into();
        if info.leader_id == self.hub.id.0 {
            let membership = self.hub.raft.membership().membership;
            let progress = caller.and_then(|id| membership.members.get(&id).copied());
            info.caller_matched_index = progress.map_or(0, |progress| progress.matched);
        }
        Ok(Response::new(info))
    }

    async fn forward_beats(
        &self,
        request: Request<pb::ForwardBeatsRequest>,
    ) -> Result<Response<pb::ForwardBeatsResponse>, Status> {
        let request = request.get_ref();
        let said = (MemberId(request.from_member), beats::standing(request));
        Ok(Response::new(self.hub.beats.take(&self.hub, said, beats::in_request(request))))
    }

    async fn propose(&self, _: Request<pb::ProposeRequest>) -> Result<Response<pb::ProposeResponse>, Status> {
        Err(Status::unimplemented("answered by raft"))
    }

    async fn get_read_index(
        &self,
        _: Request<pb::GetReadIndexRequest>,
    ) -> Result<Response<pb::GetReadIndexResponse>, Status> {
        Err(Status::unimplemented("answered by raft"))
    }
}
