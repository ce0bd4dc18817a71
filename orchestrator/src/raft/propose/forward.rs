//! Hands batches to the leader over `MemberService.Propose` and reads the outcomes. A few requests are in flight at a
//! time; what comes meanwhile makes the next batch, so batches grow with the load and a lone proposal never waits.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use nave_proto::ids::MemberId;
use nave_proto::pb;
use nave_proto::pb::member_service_client::MemberServiceClient;
use openraft::async_runtime::WatchReceiver as _;
use prost::Message as _;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, timeout_at};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::door::{retry_unknown, retry_unproposed};
use super::{Outcome, Proposal, ProposeError};
use crate::raft::channels::{Channels, Purpose};
use crate::raft::network::MESSAGE_BYTES_MAX;
use crate::raft::types::Raft;

/// Requests in flight to one leader.
const IN_FLIGHT_MAX: usize = 4;

pub(crate) struct Forwarder {
    raft: Raft,
    channels: Arc<Channels>,
    /// By leader, so that a frozen one blocks nothing but itself.
    slots: BTreeMap<MemberId, Arc<Semaphore>>,
    freed: Arc<Notify>,
}

/// Permission for one request; tells the door when it is given back.
pub(super) struct Slot {
    permit: Option<OwnedSemaphorePermit>,
    freed: Arc<Notify>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        drop(self.permit.take());
        self.freed.notify_one();
    }
}

impl Forwarder {
    pub(crate) fn new(raft: Raft, channels: Arc<Channels>) -> Self {
        Self { raft, channels, slots: BTreeMap::new(), freed: Arc::new(Notify::new()) }
    }

    /// Resolves when a slot was given back.
    pub(super) fn slot_free(&self) -> impl Future<Output = ()> + use<'_> {
        self.freed.notified()
    }

    pub(super) fn slot(&mut self, leader: MemberId) -> Option<Slot> {
        let slots = self.slots.entry(leader).or_insert_with(|| Arc::new(Semaphore::new(IN_FLIGHT_MAX)));
        let permit = slots.clone().try_acquire_owned().ok()?;
        Some(Slot { permit: Some(permit), freed: self.freed.clone() })
    }

    fn client(&self, leader: MemberId) -> Option<MemberServiceClient<Channel>> {
        let metrics = self.raft.server_metrics();
        let membership = metrics.borrow_watched().membership_config.clone();
        let node = membership.get_node(&leader.0)?;
        let channel = self.channels.get(leader, &node.address, Purpose::Forward);
        let client = MemberServiceClient::new(channel);
        Some(client.max_decoding_message_size(MESSAGE_BYTES_MAX).max_encoding_message_size(MESSAGE_BYTES_MAX))
    }

    /// The whole exchange for one batch of submitted proposals, to be spawned.
    pub(super) fn forward(
        &self,
        leader: MemberId,
        slot: Slot,
        batch: Vec<Proposal>,
        return_to: mpsc::UnboundedSender<Vec<Proposal>>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let client = self.client(leader);
        async move {
            let answer = match client {
                Some(client) => ask(client, &batch).await,
                None => Err(Lost::Unsent),
            };
            drop(slot);
            let mut again = Vec::new();
            match answer {
                Ok(outcomes) => settle(leader, batch, outcomes, &mut again),
                Err(Lost::Unsent) => {
                    batch.into_iter().for_each(|proposal| retry_unproposed(proposal, None, &mut again));
                }
                Err(Lost::Unknown) => {
                    batch.into_iter().for_each(|proposal| retry_unknown(proposal, &mut again));
                }
            }
            if !again.is_empty() {
                let _closed = return_to.send(again);
            }
        }
    }
}

/// Why a request has no answer.
enum Lost {
    /// It never left, or was refused unread.
    Unsent,
    Unknown,
}

async fn ask(
    mut client: MemberServiceClient<Channel>,
    batch: &[Proposal],
) -> Result<Vec<pb::ProposeOutcome>, Lost> {
    let commands = batch.iter().map(|proposal| proposal.command.clone()).collect();
    let deadline = batch.iter().map(|proposal| proposal.deadline).max().unwrap_or_else(Instant::now);
    let mut request = tonic::Request::new(pb::ProposeRequest { commands, hops: 1 });
    request.set_timeout(deadline.saturating_duration_since(Instant::now()));
    match timeout_at(deadline, client.propose(request)).await {
        Ok(Ok(response)) => Ok(response.into_inner().outcomes),
        Ok(Err(status)) if is_unsent(&status) => {
            tracing::debug!(error = %status.message(), "proposals not forwarded");
            Err(Lost::Unsent)
        }
        Ok(Err(_)) | Err(_) => Err(Lost::Unknown),
    }
}

fn is_unsent(status: &Status) -> bool {
    nave_tls::connect_error(status).is_some()
        || matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented)
}

fn settle(
    leader: MemberId,
    batch: Vec<Proposal>,
    outcomes: Vec<pb::ProposeOutcome>,
    again: &mut Vec<Proposal>,
) {
    use pb::propose_outcome::Outcome as Told;
    let mut outcomes = outcomes.into_iter();
    for proposal in batch {
        let Some(pb::ProposeOutcome { outcome, log_index }) = outcomes.next() else {
            tracing::warn!(member = %leader, "fewer outcomes than proposals");
            retry_unknown(proposal, again);
            continue;
        };
        match outcome {
            Some(Told::Reply(bytes)) => match pb::Reply::decode(bytes) {
                Ok(reply) => proposal.finish(Outcome::Reply { reply, log_index }),
                Err(error) => {
                    tracing::warn!(member = %leader, %error, "undecodable reply");
                    proposal.fail(ProposeError::Unknown);
                }
            },
            Some(Told::NotLeader(_)) => retry_unproposed(proposal, None, again),
            Some(Told::Overloaded(why)) if proposal.tainted => {
                tracing::debug!(why, "repetition refused");
                proposal.fail(ProposeError::Unknown);
            }
            Some(Told::Overloaded(why)) if why.is_empty() => proposal.fail(ProposeError::Overloaded),
            Some(Told::Overloaded(why)) => proposal.fail(ProposeError::Refused { why }),
            Some(Told::Unknown(_)) | None => retry_unknown(proposal, again),
        }
    }
}
