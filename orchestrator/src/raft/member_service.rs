//! `MemberService` as far as Raft answers it: proposals and read indexes that other members hand to the leader. What a
//! member says of itself and agents' beats belong to the API, which puts its own half in front of this one.

use std::time::Duration;

use bytes::Bytes;
use nave_orchestrator_core::unknown_command;
use nave_proto::ids::{ClusterId, MemberId};
use nave_proto::pb;
use nave_proto::pb::member_service_server::MemberService;
use prost::Message as _;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use crate::raft::propose::{Door, Outcome, ProposeError, Ticket};
use crate::raft::read::{ReadError, Reads};
use crate::raft::server::sender;
use crate::raft::status::Leadership;

/// How long the leader works on a request without a time-out of its own.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Serves the other members' doors and readers.
#[derive(Debug, Clone)]
pub struct MemberEndpoint {
    pub(super) own: MemberId,
    pub(super) cluster: ClusterId,
    pub(super) door: Door,
    pub(super) reads: Reads,
    pub(super) leadership: watch::Receiver<Leadership>,
}

impl MemberEndpoint {
    fn not_leader(&self, leader: Option<MemberId>) -> pb::NotLeader {
        let leader_id = leader.filter(|leader| *leader != self.own).map_or(0, |leader| leader.0);
        pb::NotLeader { leader_id, leader_address: String::new() }
    }

    /// What this build cannot decode would stop every member once it is in the log, so it is turned away here.
    fn enter(&self, command: Bytes, deadline: Instant) -> Result<Ticket, ProposeError> {
        match pb::Command::decode(command.clone()) {
            Ok(decoded) if !unknown_command(&decoded) => {
                self.door.enter(command, decoded.request_id.is_some(), true, deadline)
            }
            Ok(decoded) => Err(ProposeError::Refused {
                why: format!(
                    "the leader (nave {}) does not know this command of format {}; upgrade all members first",
                    env!("CARGO_PKG_VERSION"),
                    decoded.written_by
                ),
            }),
            Err(error) => {
                Err(ProposeError::Refused { why: format!("the leader cannot read this command: {error}") })
            }
        }
    }

    async fn outcome(&self, ticket: Result<Ticket, ProposeError>, deadline: Instant) -> pb::ProposeOutcome {
        use pb::propose_outcome::Outcome as Told;
        let outcome = match ticket {
            Ok(ticket) => self.door.wait(ticket, deadline).await,
            Err(error) => Outcome::Failed(error),
        };
        let (told, log_index) = match outcome {
            Outcome::Reply { reply, log_index } => (Told::Reply(reply.encode_to_vec().into()), log_index),
            Outcome::NotLeader(leader) | Outcome::Failed(ProposeError::Unavailable { leader }) => {
                (Told::NotLeader(self.not_leader(leader)), 0)
            }
            Outcome::Failed(ProposeError::Stopped) => (Told::NotLeader(self.not_leader(None)), 0),
            Outcome::Failed(ProposeError::Unknown) => (Told::Unknown("no answer in time".to_owned()), 0),
            Outcome::Failed(ProposeError::Overloaded) => (Told::Overloaded(String::new()), 0),
            Outcome::Failed(error @ (ProposeError::Refused { .. } | ProposeError::TooLarge)) => {
                (Told::Overloaded(error.to_string()), 0)
            }
        };
        pb::ProposeOutcome { outcome: Some(told), log_index }
    }
}

#[tonic::async_trait]
impl MemberService for MemberEndpoint {
    async fn propose(
        &self,
        request: Request<pb::ProposeRequest>,
    ) -> Result<Response<pb::ProposeResponse>, Status> {
        sender(&request, self.cluster)?;
        let deadline = Instant::now() + ANSWER_WITHIN;
        let request = request.into_inner();
        if request.hops > 1 {
            return Err(Status::permission_denied("proposals are forwarded once"));
        }
        // All enter before the first is awaited, so that they are submitted together.
        let tickets: Vec<_> =
            request.commands.into_iter().map(|command| self.enter(command, deadline)).collect();
        let mut outcomes = Vec::with_capacity(tickets.len());
        for ticket in tickets {
            outcomes.push(self.outcome(ticket, deadline).await);
        }
        Ok(Response::new(pb::ProposeResponse { outcomes }))
    }

    async fn get_read_index(
        &self,
        request: Request<pb::GetReadIndexRequest>,
    ) -> Result<Response<pb::GetReadIndexResponse>, Status> {
        sender(&request, self.cluster)?;
        let leader = self.leadership.borrow().leader;
        if leader != Some(self.own) || request.get_ref().hops > 1 {
            let not_leader = Some(self.not_leader(leader));
            return Ok(Response::new(pb::GetReadIndexResponse { log_index: 0, not_leader }));
        }
        match self.reads.index(Instant::now() + ANSWER_WITHIN).await {
            Ok(log_index) => Ok(Response::new(pb::GetReadIndexResponse { log_index, not_leader: None })),
            Err(ReadError::Unavailable { leader }) => {
                let not_leader = Some(self.not_leader(leader));
                Ok(Response::new(pb::GetReadIndexResponse { log_index: 0, not_leader }))
            }
            Err(error @ (ReadError::Timeout | ReadError::Stopped)) => {
                Err(Status::unavailable(error.to_string()))
            }
        }
    }

    async fn get_member_info(
        &self,
        _: Request<pb::GetMemberInfoRequest>,
    ) -> Result<Response<pb::MemberInfo>, Status> {
        Err(Status::unimplemented("answered by the API"))
    }

    async fn forward_beats(
        &self,
        _: Request<pb::ForwardBeatsRequest>,
    ) -> Result<Response<pb::ForwardBeatsResponse>, Status> {
        Err(Status::unimplemented("answered by the API"))
    }
}
