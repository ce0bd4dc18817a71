//! Linearizable reads on any member (ReadIndex): the leader proves by one round of heartbeats that it leads and names its
//! commit index; a read is answered once this member has applied that far. All readers that wait share one round, so a
//! round begins after each of them came. Needs no clock.

use std::sync::Arc;
use std::time::Duration;

use nave_proto::ids::MemberId;
use nave_proto::pb;
use nave_proto::pb::member_service_client::MemberServiceClient;
use openraft::ReadPolicy;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::RaftError;
use rand::Rng as _;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::raft::channels::{Channels, Purpose};
use crate::raft::state_machine::Tables;
use crate::raft::status::Leadership;
use crate::raft::types::Raft;

/// Readers that may wait at once; each is a oneshot of some 100 bytes.
const WAITING_MAX: usize = 65_536;
/// Without a leader a read is given up after this, whatever its deadline.
const NO_LEADER_MAX: Duration = Duration::from_millis(4500);
/// The leader answers within a lease (350 ms) or not at all.
const ASK_WITHIN: Duration = Duration::from_secs(1);

/// Why a read cannot be proven to be the newest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// No leader proved itself in time.
    #[error("no leader could be reached in time, last known leader: {}", leader.map_or("none".to_owned(), |id| id.to_string()))]
    Unavailable { leader: Option<MemberId> },
    /// The leader answered, but this member had not applied that far by the deadline.
    #[error("this member is too far behind the leader")]
    Timeout,
    #[error("this member is stopping")]
    Stopped,
}

type Waiter = oneshot::Sender<Result<u64, ReadError>>;

/// The readers' side. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Reads {
    queue: mpsc::Sender<Waiter>,
    tables: Arc<Tables>,
    leadership: watch::Receiver<Leadership>,
}

impl Reads {
    pub(crate) fn new(
        tables: Arc<Tables>,
        leadership: watch::Receiver<Leadership>,
    ) -> (Self, mpsc::Receiver<Waiter>) {
        let (queue, receiver) = mpsc::channel(WAITING_MAX);
        (Self { queue, tables, leadership }, receiver)
    }

    /// A log index that covers everything acknowledged before the call.
    pub(crate) async fn index(&self, deadline: Instant) -> Result<u64, ReadError> {
        let (done, index) = oneshot::channel();
        let unavailable = || ReadError::Unavailable { leader: self.leadership.borrow().leader };
        let patience = deadline.min(Instant::now() + NO_LEADER_MAX);
        match timeout_at(patience, self.queue.send(done)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(ReadError::Stopped),
            Err(_) => return Err(unavailable()),
        }
        match timeout_at(patience, index).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(ReadError::Stopped),
            Err(_) => Err(unavailable()),
        }
    }

    pub(crate) async fn linearize(&self, deadline: Instant) -> Result<u64, ReadError> {
        let index = self.index(deadline).await?;
        let mut applied = self.tables.applied.subscribe();
        if *applied.borrow_and_update() >= index {
            return Ok(index);
        }
        match timeout_at(deadline, applied.wait_for(|applied| *applied >= index)).await {
            Ok(Ok(_)) => Ok(index),
            Ok(Err(_)) => Err(ReadError::Stopped),
            Err(_) => Err(ReadError::Timeout),
        }
    }
}

/// Runs the rounds, one at a time.
pub(crate) struct ReadTask {
    pub(crate) own: MemberId,
    pub(crate) raft: Raft,
    pub(crate) channels: Arc<Channels>,
    pub(crate) leadership: watch::Receiver<Leadership>,
    pub(crate) queue: mpsc::Receiver<Waiter>,
    pub(crate) shutdown: CancellationToken,
}

enum Attempt {
    Index(u64),
    /// Nobody could prove to lead.
    Again,
    Stopped,
}

impl ReadTask {
    pub(crate) async fn run(mut self) {
        let shutdown = self.shutdown.clone();
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.rounds() => {}
        }
    }

    async fn rounds(&mut self) {
        let mut waiting: Vec<Waiter> = Vec::new();
        loop {
            if waiting.is_empty() && self.queue.recv_many(&mut waiting, WAITING_MAX).await == 0 {
                return;
            }
            while let Ok(waiter) = self.queue.try_recv() {
                waiting.push(waiter);
            }
            let result = match self.attempt().await {
                Attempt::Index(index) => Ok(index),
                Attempt::Stopped => Err(ReadError::Stopped),
                Attempt::Again => {
                    waiting.retain(|waiter| !waiter.is_closed());
                    self.pause().await;
                    continue;
                }
            };
            for waiter in waiting.drain(..) {
                // The reader may have given up.
                let _gone = waiter.send(result.clone());
            }
        }
    }

    async fn attempt(&mut self) -> Attempt {
        let leader = self.leadership.borrow_and_update().leader;
        match leader {
            Some(leader) if leader == self.own => {
                match self.raft.get_read_linearizer(ReadPolicy::ReadIndex).await {
                    Ok(linearizer) => Attempt::Index(linearizer.read_log_id().index()),
                    Err(RaftError::APIError(_)) => Attempt::Again,
                    Err(RaftError::Fatal(_)) => Attempt::Stopped,
                }
            }
            // A leader that is frozen or gone answers late or never; its successor is asked at once.
            Some(leader) => tokio::select! {
                index = Self::ask(&self.raft, &self.channels, leader) => {
                    index.map_or(Attempt::Again, Attempt::Index)
                }
                _ = self.leadership.changed() => Attempt::Again,
            },
            None => Attempt::Again,
        }
    }

    async fn ask(raft: &Raft, channels: &Channels, leader: MemberId) -> Option<u64> {
        let metrics = raft.server_metrics();
        let membership = metrics.borrow_watched().membership_config.clone();
        let node = membership.get_node(&leader.0)?;
        let channel = channels.get(leader, &node.address, Purpose::Forward);
        let mut client = MemberServiceClient::new(channel);
        let answer = timeout(ASK_WITHIN, client.get_read_index(pb::GetReadIndexRequest { hops: 1 })).await;
        let answer = answer.ok()?.ok()?.into_inner();
        answer.not_leader.is_none().then_some(answer.log_index)
    }

    /// Until the leader changes, or some 10 ms: a new leader refuses until the first quorum has answered.
    async fn pause(&mut self) {
        let delay = Duration::from_millis(rand::rng().random_range(5..15));
        // Either end of the pause is a reason to try again.
        let _elapsed = timeout(delay, self.leadership.changed()).await;
    }
}

#[cfg(test)]
mod tests {
    use nave_orchestrator_core::ClusterState;
    use parking_lot::RwLock;

    use super::*;
    use crate::raft::status::Role;

    fn reads(applied: u64) -> (watch::Sender<Leadership>, Arc<Tables>, Reads, mpsc::Receiver<Waiter>) {
        let leadership = Leadership { leader: None, term: 1, role: Role::Follower };
        let (sender, leadership) = watch::channel(leadership);
        let state = RwLock::new(ClusterState::new());
        let (membership, applied) = (RwLock::default(), watch::Sender::new(applied));
        let tables = Arc::new(Tables { state, membership, applied });
        let (reads, queue) = Reads::new(tables.clone(), leadership);
        (sender, tables, reads, queue)
    }

    #[tokio::test(start_paused = true)]
    async fn a_read_waits_until_the_index_is_applied() {
        let (_leadership, tables, reads, mut queue) = reads(9);
        let begun = Instant::now();
        let reading = reads.linearize(begun + Duration::from_secs(3));
        let applying = async {
            queue.recv().await.unwrap().send(Ok(10)).unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
            tables.applied.send_replace(10);
        };
        let (read, ()) = tokio::join!(reading, applying);
        assert_eq!((read, begun.elapsed()), (Ok(10), Duration::from_secs(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_member_too_far_behind_says_so_at_the_deadline() {
        let (_leadership, _tables, reads, mut queue) = reads(9);
        let reading = reads.linearize(Instant::now() + Duration::from_secs(3));
        let answering = async { queue.recv().await.unwrap().send(Ok(10)).unwrap() };
        assert_eq!(tokio::join!(reading, answering).0, Err(ReadError::Timeout));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_leader_a_read_is_over_within_five_seconds() {
        let (_leadership, _tables, reads, _queue) = reads(9);
        let begun = Instant::now();
        let read = reads.linearize(begun + Duration::from_secs(60)).await;
        assert_eq!(read, Err(ReadError::Unavailable { leader: None }));
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}
