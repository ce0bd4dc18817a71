//! The one door into the log. Whoever wants a change calls `propose`; concurrent proposals are submitted together and
//! never merged into one entry. On the leader the door stamps the time; elsewhere it hands batches to the leader.
//!
//! Every proposal ends in one of three ways: a reply; a refusal that certainly proposed nothing; or *unknown*, when it
//! was submitted and no answer came. What certainly was not proposed is tried again until the deadline. What may have
//! been proposed is tried again only when the command carries a request id, since `apply` then takes it once.

pub(crate) mod door;
mod forward;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use nave_proto::ids::MemberId;
use nave_proto::pb;
use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};

use crate::raft::status::Leadership;

/// The largest encoded command. A manifest is at most 64 KiB; this leaves room for a whole plan or report.
pub const COMMAND_BYTES_MAX: usize = 1024 * 1024;

/// Proposals under way on one member, each weighing one KiB plus its size: 32 MiB, or 16,000 small ones with room to
/// spare. At 40,000 answers a second that is 0.4 s of work; more in the queue would only time out.
const OUTSTANDING_KIB_MAX: usize = 32 * 1024;

/// A proposal that no leader could take is given up after this, whatever its deadline.
const NO_LEADER_MAX: Duration = Duration::from_millis(4500);

/// Why a command has no reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Certainly not proposed: no leader could take it in time.
    #[error("no leader could take the command in time, last known leader: {}", leader.map_or("none".to_owned(), |id| id.to_string()))]
    Unavailable { leader: Option<MemberId> },
    /// It was submitted and no answer came: it may or may not take effect.
    #[error("whether the command took effect is unknown")]
    Unknown,
    /// Certainly not proposed: too many commands are under way.
    #[error("too many commands are under way")]
    Overloaded,
    /// Certainly not proposed, and why, for the person who must act: the disk is nearly full.
    #[error("{why}")]
    Refused { why: String },
    /// Certainly not proposed: larger than [`COMMAND_BYTES_MAX`].
    #[error("the command is larger than {COMMAND_BYTES_MAX} bytes")]
    TooLarge,
    /// Certainly not proposed: this member is stopping.
    #[error("this member is stopping")]
    Stopped,
}

/// How a proposal ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Outcome {
    Reply {
        reply: pb::Reply,
        log_index: u64,
    },
    /// For a forwarded proposal only: this member does not lead either.
    NotLeader(Option<MemberId>),
    Failed(ProposeError),
}

/// A command on its way through the door.
#[derive(Debug)]
pub(crate) struct Proposal {
    /// Encoded, its time not stamped.
    command: Bytes,
    /// It carries a request id, so proposing it twice has the effect of once.
    repeatable: bool,
    /// Another member handed it over: it is not forwarded again.
    forwarded: bool,
    /// An earlier attempt may have been proposed.
    tainted: bool,
    attempts: u32,
    deadline: Instant,
    claim: Arc<Claim>,
    done: oneshot::Sender<Outcome>,
    _slot: OwnedSemaphorePermit,
}

/// Who decides about a proposal at the deadline: the caller may abandon it only while the door has not submitted it.
#[derive(Debug, Default)]
struct Claim(AtomicU8);

const WAITING: u8 = 0;
const SUBMITTED: u8 = 1;
const ABANDONED: u8 = 2;

impl Claim {
    /// The door is about to submit it; false: nobody waits for it any more.
    fn submit(&self, tainted: bool) -> bool {
        match self.0.compare_exchange(WAITING, SUBMITTED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(state) => tainted && state == SUBMITTED,
        }
    }

    /// It turned out not to have been proposed.
    fn take_back(&self) {
        // Fails when the caller has given up meanwhile, having been told "unknown", which is not wrong.
        let _given_up = self.0.compare_exchange(SUBMITTED, WAITING, Ordering::AcqRel, Ordering::Acquire);
    }

    /// The caller gives up; true: certainly nothing was proposed.
    fn abandon(&self) -> bool {
        self.0.swap(ABANDONED, Ordering::AcqRel) == WAITING
    }

    fn is_waiting(&self) -> bool {
        self.0.load(Ordering::Acquire) == WAITING
    }

    fn is_abandoned(&self) -> bool {
        self.0.load(Ordering::Acquire) == ABANDONED
    }
}

impl Proposal {
    fn finish(self, outcome: Outcome) {
        // The caller may have given up.
        let _gone = self.done.send(outcome);
    }

    fn fail(self, error: ProposeError) {
        self.finish(Outcome::Failed(error));
    }
}

/// The callers' side of the door. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Door {
    queue: mpsc::Sender<Proposal>,
    slots: Arc<Semaphore>,
    leadership: watch::Receiver<Leadership>,
}

/// A proposal as its caller holds it.
#[derive(Debug)]
pub(crate) struct Ticket {
    claim: Arc<Claim>,
    outcome: oneshot::Receiver<Outcome>,
}

impl Door {
    pub(crate) fn new(leadership: watch::Receiver<Leadership>) -> (Self, mpsc::Receiver<Proposal>) {
        // Never full: each proposal holds at least one slot.
        let (queue, receiver) = mpsc::channel(OUTSTANDING_KIB_MAX);
        (Self { queue, slots: Arc::new(Semaphore::new(OUTSTANDING_KIB_MAX)), leadership }, receiver)
    }

    pub(crate) async fn propose(
        &self,
        mut command: pb::Command,
        deadline: Instant,
    ) -> Result<pb::Reply, ProposeError> {
        command.time_unix_ns = 0;
        let repeatable = command.request_id.is_some();
        let ticket = self.enter(command.encode_to_vec().into(), repeatable, false, deadline)?;
        match self.wait(ticket, deadline).await {
            Outcome::Reply { reply, .. } => Ok(reply),
            Outcome::NotLeader(leader) => Err(ProposeError::Unavailable { leader }),
            Outcome::Failed(error) => Err(error),
        }
    }

    /// Queues an encoded command.
    pub(crate) fn enter(
        &self,
        command: Bytes,
        repeatable: bool,
        forwarded: bool,
        deadline: Instant,
    ) -> Result<Ticket, ProposeError> {
        if command.len() > COMMAND_BYTES_MAX {
            return Err(ProposeError::TooLarge);
        }
        let weight = u32::try_from(1 + command.len() / 1024).expect("a command is at most 1 MiB");
        let slot = self.slots.clone().try_acquire_many_owned(weight).map_err(|_| ProposeError::Overloaded)?;
        let (done, outcome) = oneshot::channel();
        let claim = Arc::new(Claim::default());
        let proposal = Proposal {
            command,
            repeatable,
            forwarded,
            tainted: false,
            attempts: 0,
            deadline,
            claim: claim.clone(),
            done,
            _slot: slot,
        };
        match self.queue.try_send(proposal) {
            Ok(()) => Ok(Ticket { claim, outcome }),
            Err(mpsc::error::TrySendError::Full(_)) => Err(ProposeError::Overloaded),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(ProposeError::Stopped),
        }
    }

    pub(crate) async fn wait(&self, mut ticket: Ticket, deadline: Instant) -> Outcome {
        let patience = deadline.min(Instant::now() + NO_LEADER_MAX);
        if let Ok(outcome) = timeout_at(patience, &mut ticket.outcome).await {
            return ended(&ticket.claim, outcome);
        }
        if !ticket.claim.is_waiting() {
            // Submitted: an answer may still come until the deadline.
            if let Ok(outcome) = timeout_at(deadline, &mut ticket.outcome).await {
                return ended(&ticket.claim, outcome);
            }
        }
        if ticket.claim.abandon() {
            return Outcome::Failed(ProposeError::Unavailable { leader: self.leadership.borrow().leader });
        }
        // The answer may have come while we looked.
        ticket.outcome.try_recv().unwrap_or(Outcome::Failed(ProposeError::Unknown))
    }
}

/// The door drops proposals when the member stops.
fn ended(claim: &Claim, outcome: Result<Outcome, oneshot::error::RecvError>) -> Outcome {
    outcome.unwrap_or_else(|_| {
        let error = if claim.abandon() { ProposeError::Stopped } else { ProposeError::Unknown };
        Outcome::Failed(error)
    })
}

/// Field 1, `time_unix_ns`, appended to an encoded command. In protobuf the last value of a field counts, so this stamps
/// without decoding what may be a large command.
fn stamp(command: &Bytes, time_unix_ns: i64) -> Bytes {
    let mut stamped = BytesMut::with_capacity(command.len() + 11);
    stamped.put_slice(command);
    prost::encoding::int64::encode(1, &time_unix_ns, &mut stamped);
    stamped.freeze()
}

#[cfg(test)]
mod tests;
