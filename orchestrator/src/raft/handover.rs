//! Leadership moved on purpose, and the end of a member: a leader that is stopped hands over first, so that the others
//! do not wait for an election.

use std::time::Duration;

use nave_proto::ids::MemberId;
use openraft::Instant as _;
use openraft::async_runtime::WatchReceiver as _;
use tokio::time::timeout;

use crate::raft::RaftHub;

/// A handover takes some 10 ms when the target is up.
const TRANSFER_WITHIN: Duration = Duration::from_secs(2);
/// Answers under way when a member stops.
const DRAIN_WITHIN: Duration = Duration::from_secs(1);
/// Who has not answered a heartbeat (each 100 ms) for so long is not handed the lead.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
/// A target may lack this many entries; it is given them first, and writes wait meanwhile.
const LAG_MAX: u64 = 1000;

/// Why leadership did not move.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    #[error("this member does not lead, the leader is {}", leader.map_or("unknown".to_owned(), |id| id.to_string()))]
    NotLeader { leader: Option<MemberId> },
    #[error("{member} is not a voter of this cluster")]
    NotVoter { member: MemberId },
    #[error("no other voter has answered this leader")]
    NobodyElse,
    #[error("{member} is {entries} log entries behind; wait until it has caught up")]
    TooFarBehind { member: MemberId, entries: u64 },
    #[error("{member} did not take over within 2 s")]
    NotTaken { member: MemberId },
    #[error("this member has stopped")]
    Stopped,
}

impl RaftHub {
    /// Makes `to` the leader, or the most advanced other voter; returns once it leads. To be called on the leader.
    pub async fn transfer_leader(&self, to: Option<MemberId>) -> Result<MemberId, TransferError> {
        let target = self.transfer_target(to)?;
        if target == self.inner.id {
            return Ok(target);
        }
        self.inner.raft.trigger().transfer_leader(target.0).await.map_err(|_| TransferError::Stopped)?;
        let mut leadership = self.subscribe_status();
        let own = self.inner.id;
        let moved = leadership.wait_for(|now| now.leader.is_some_and(|leader| leader != own));
        match timeout(TRANSFER_WITHIN, moved).await {
            Ok(Ok(now)) if now.leader == Some(target) => Ok(target),
            Ok(Ok(_)) | Err(_) => Err(TransferError::NotTaken { member: target }),
            Ok(Err(_)) => Err(TransferError::Stopped),
        }
    }

    fn transfer_target(&self, to: Option<MemberId>) -> Result<MemberId, TransferError> {
        let own = self.inner.id;
        let leader = self.inner.leadership.borrow().leader;
        if leader != Some(own) {
            return Err(TransferError::NotLeader { leader });
        }
        let receiver = self.inner.raft.metrics();
        let metrics = receiver.borrow_watched();
        let replication = metrics.replication.clone().unwrap_or_default();
        let heartbeat = metrics.heartbeat.clone().unwrap_or_default();
        let voters: Vec<u64> = metrics.membership_config.voter_ids().collect();
        let last = metrics.last_log_index.unwrap_or(0);
        drop(metrics);
        let matched = |id: u64| replication.get(&id).copied().flatten().map(|id| id.index);
        let Some(member) = to else {
            let heard =
                |id: u64| heartbeat.get(&id).copied().flatten().is_some_and(|at| at.elapsed() < HEARD_WITHIN);
            return voters
                .iter()
                .filter(|id| **id != own.0 && matched(**id).is_some() && heard(**id))
                .max_by_key(|id| matched(**id))
                .map(|id| MemberId(*id))
                .ok_or(TransferError::NobodyElse);
        };
        if !voters.contains(&member.0) {
            return Err(TransferError::NotVoter { member });
        }
        let entries = if member == own { 0 } else { last.saturating_sub(matched(member.0).unwrap_or(0)) };
        if entries > LAG_MAX {
            return Err(TransferError::TooFarBehind { member, entries });
        }
        Ok(member)
    }

    /// Ends without a handover, as a crash would, but closes its databases: what was written stays.
    #[cfg(test)]
    pub(crate) async fn kill(&self) {
        self.inner.tasks.close();
        self.inner.stopping.cancel();
        self.stop_raft().await;
    }

    /// Hands over when this member leads, ends Raft and its tasks, and closes the databases. Idempotent.
    pub async fn shutdown(&self) {
        let inner = &self.inner;
        if inner.stopping.is_cancelled() {
            inner.tasks.wait().await;
            return;
        }
        match self.transfer_leader(None).await {
            Ok(leader) => tracing::info!(%leader, "handed over leadership before stopping"),
            Err(TransferError::NotLeader { .. } | TransferError::NobodyElse | TransferError::Stopped) => {}
            Err(error) => tracing::warn!(%error, "stopping without a handover"),
        }
        inner.tasks.close();
        inner.stopping.cancel();
        // What was submitted may still be answered; the door itself has ended.
        let _drained = timeout(DRAIN_WITHIN, inner.tasks.wait()).await;
        self.stop_raft().await;
    }

    async fn stop_raft(&self) {
        let inner = &self.inner;
        if let Err(error) = inner.raft.shutdown().await {
            tracing::warn!(%error, "the Raft core ended badly");
        }
        let _ended = timeout(DRAIN_WITHIN, inner.tasks.wait()).await;
        let stores = inner.stores.lock().take();
        // Waits for the writer threads to write what is queued.
        if let Err(error) = tokio::task::spawn_blocking(move || drop(stores)).await {
            tracing::warn!(%error, "closing the databases");
        }
    }
}
