//! The task behind the door: takes whatever is queued and sends it where the leader is, at once and without lingering.
//! One task, so that the times it stamps never go back within the log. Answers are awaited in tasks of their own.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use nave_proto::ids::MemberId;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ClientWriteError, Fatal};
use openraft::raft::WriteResult;
use rand::Rng as _;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub(crate) use super::forward::Forwarder;
use super::{Outcome, Proposal, ProposeError, stamp};
use crate::clock;
use crate::raft::state_machine::Tables;
use crate::raft::status::Leadership;
use crate::raft::types::{EncodedCommand, Raft, TypeConfig};
use crate::storage::disk::DiskSpace;

/// Proposals submitted or forwarded as one.
const BATCH_MAX: usize = 512;
/// Of one forwarded request, on top of which one more command fits the transport's limit.
const BATCH_BYTES_MAX: usize = 1024 * 1024;
/// While nobody leads, abandoned proposals are dropped this often.
const SWEEP_INTERVAL: Duration = Duration::from_millis(250);
const RETRY_DELAY_MIN: Duration = Duration::from_millis(5);
const RETRY_DELAY_MAX: Duration = Duration::from_millis(200);

pub(crate) struct DoorTask {
    pub(crate) own: MemberId,
    pub(crate) raft: Raft,
    pub(crate) tables: Arc<Tables>,
    pub(crate) disk: Arc<DiskSpace>,
    pub(crate) leadership: watch::Receiver<Leadership>,
    pub(crate) queue: mpsc::Receiver<Proposal>,
    pub(crate) forwarder: Forwarder,
    pub(crate) tasks: TaskTracker,
    pub(crate) shutdown: CancellationToken,
}

/// What the door holds between two turns.
#[derive(Default)]
struct Held {
    ready: Vec<Proposal>,
    /// To be tried again at the time given, or when the leader changes.
    delayed: Vec<(Instant, Proposal)>,
}

impl DoorTask {
    pub(crate) async fn run(mut self) {
        let (return_to, mut returned) = mpsc::unbounded_channel::<Vec<Proposal>>();
        let mut held = Held::default();
        let mut stamps = Stamps::default();
        let shutdown = self.shutdown.clone();
        loop {
            let wake = held.wake_at();
            tokio::select! {
                () = shutdown.cancelled() => break,
                count = self.queue.recv_many(&mut held.ready, BATCH_MAX) => {
                    if count == 0 {
                        break;
                    }
                }
                Some(proposals) = returned.recv() => held.delay(proposals),
                changed = self.leadership.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    held.all_ready();
                }
                () = self.forwarder.slot_free() => {}
                () = tokio::time::sleep_until(wake) => held.sweep(),
            }
            held.due();
            self.dispatch(&mut held, &mut stamps, &return_to).await;
        }
        self.queue.close();
        while let Ok(proposal) = self.queue.try_recv() {
            proposal.fail(ProposeError::Stopped);
        }
        held.all_ready();
        for proposal in held.ready {
            let error = if proposal.tainted { ProposeError::Unknown } else { ProposeError::Stopped };
            proposal.fail(error);
        }
    }

    async fn dispatch(
        &mut self,
        held: &mut Held,
        stamps: &mut Stamps,
        return_to: &mpsc::UnboundedSender<Vec<Proposal>>,
    ) {
        while !held.ready.is_empty() {
            let leadership = *self.leadership.borrow_and_update();
            match leadership.leader {
                Some(leader) if leader == self.own => {
                    if !stamps.begin_term(&mut *self, leadership.term).await {
                        return;
                    }
                    let batch = take_batch(&mut held.ready);
                    self.submit(batch, stamps, return_to).await;
                }
                Some(leader) => {
                    refuse_forwarded(&mut held.ready, Some(leader));
                    let Some(slot) = self.forwarder.slot(leader) else { return };
                    let batch = claimed(take_batch(&mut held.ready));
                    if !batch.is_empty() {
                        let forward = self.forwarder.forward(leader, slot, batch, return_to.clone());
                        self.tasks.spawn(forward);
                    }
                }
                None => {
                    refuse_forwarded(&mut held.ready, None);
                    return;
                }
            }
        }
    }

    async fn submit(
        &mut self,
        batch: Vec<Proposal>,
        stamps: &mut Stamps,
        return_to: &mpsc::UnboundedSender<Vec<Proposal>>,
    ) {
        if let Err(why) = self.disk.check() {
            for proposal in batch {
                proposal.fail(ProposeError::Refused { why: why.clone() });
            }
            return;
        }
        let batch = claimed(batch);
        if batch.is_empty() {
            return;
        }
        let time = stamps.next(&self.tables);
        let commands: Vec<_> = batch.iter().map(|p| EncodedCommand(stamp(&p.command, time))).collect();
        match self.raft.client_write_many(commands).await {
            Ok(results) => drop(self.tasks.spawn(collect(results, batch, return_to.clone()))),
            // The core is gone; it may have taken them before it went.
            Err(_) => batch.into_iter().for_each(|proposal| proposal.fail(ProposeError::Unknown)),
        }
    }
}

/// Waits for the answers to one submitted batch, which come in order.
async fn collect(
    mut results: BoxStream<'static, Result<WriteResult<TypeConfig>, Fatal<TypeConfig>>>,
    batch: Vec<Proposal>,
    return_to: mpsc::UnboundedSender<Vec<Proposal>>,
) {
    let mut again = Vec::new();
    for proposal in batch {
        match results.next().await {
            Some(Ok(Ok(written))) => {
                let log_index = written.log_id.index;
                proposal.finish(Outcome::Reply { reply: written.response.0, log_index });
            }
            Some(Ok(Err(ClientWriteError::ForwardToLeader(to)))) => {
                retry_unproposed(proposal, to.leader_id.map(MemberId), &mut again);
            }
            // The entry was dropped from this log, but may be committed through another leader.
            Some(Ok(Err(_)) | Err(_)) | None => retry_unknown(proposal, &mut again),
        }
    }
    if !again.is_empty() {
        // The door is closed only when the member stops, and the callers see that by themselves.
        let _closed = return_to.send(again);
    }
}

/// It was certainly not proposed: once more, unless whoever forwarded it should look elsewhere.
pub(super) fn retry_unproposed(mut proposal: Proposal, leader: Option<MemberId>, again: &mut Vec<Proposal>) {
    if proposal.forwarded {
        proposal.finish(Outcome::NotLeader(leader));
        return;
    }
    if !proposal.tainted {
        proposal.claim.take_back();
    }
    proposal.attempts += 1;
    again.push(proposal);
}

/// It may have been proposed: once more only when that is safe, and from now on "unknown" at the deadline.
pub(super) fn retry_unknown(mut proposal: Proposal, again: &mut Vec<Proposal>) {
    if proposal.repeatable && !proposal.forwarded {
        proposal.tainted = true;
        proposal.attempts += 1;
        again.push(proposal);
    } else {
        proposal.fail(ProposeError::Unknown);
    }
}

/// The proposals that somebody still waits for, marked as submitted.
fn claimed(batch: Vec<Proposal>) -> Vec<Proposal> {
    batch.into_iter().filter(|proposal| proposal.claim.submit(proposal.tainted)).collect()
}

fn refuse_forwarded(ready: &mut Vec<Proposal>, leader: Option<MemberId>) {
    for proposal in ready.extract_if(.., |proposal| proposal.forwarded) {
        proposal.finish(Outcome::NotLeader(leader));
    }
}

fn take_batch(ready: &mut Vec<Proposal>) -> Vec<Proposal> {
    let mut bytes = 0;
    let count = ready
        .iter()
        .take(BATCH_MAX)
        .take_while(|proposal| {
            let first = bytes == 0;
            bytes += proposal.command.len().max(1);
            first || bytes <= BATCH_BYTES_MAX
        })
        .count();
    if count == ready.len() { std::mem::take(ready) } else { ready.drain(..count).collect() }
}

impl Held {
    fn delay(&mut self, proposals: Vec<Proposal>) {
        let now = Instant::now();
        for proposal in proposals {
            self.delayed.push((now + retry_delay(proposal.attempts), proposal));
        }
    }

    fn due(&mut self) {
        if self.delayed.is_empty() {
            return;
        }
        let now = Instant::now();
        self.ready.extend(self.delayed.extract_if(.., |(at, _)| *at <= now).map(|(_, proposal)| proposal));
    }

    fn all_ready(&mut self) {
        self.ready.extend(self.delayed.drain(..).map(|(_, proposal)| proposal));
    }

    fn sweep(&mut self) {
        self.ready.retain(|proposal| !proposal.claim.is_abandoned());
        self.delayed.retain(|(_, proposal)| !proposal.claim.is_abandoned());
    }

    fn wake_at(&self) -> Instant {
        let now = Instant::now();
        let idle = if self.ready.is_empty() && self.delayed.is_empty() {
            Duration::from_secs(3600)
        } else {
            SWEEP_INTERVAL
        };
        self.delayed.iter().map(|(at, _)| *at).fold(now + idle, Instant::min)
    }
}

/// 5 ms doubling to 200 ms, each half to one and a half times as long.
fn retry_delay(attempts: u32) -> Duration {
    let delay = RETRY_DELAY_MIN.saturating_mul(1 << attempts.min(8)).min(RETRY_DELAY_MAX);
    delay.mul_f64(rand::rng().random_range(0.5..1.5))
}

/// Times for the log that never go back.
#[derive(Default)]
struct Stamps {
    newest: i64,
    /// The term in which everything before its first proposal was seen applied.
    term: u64,
}

impl Stamps {
    /// Entries of earlier leaders may lie in the log unapplied, with times ahead of our clock. Waits until they are
    /// applied, once for each term; false: this member no longer leads, or stops.
    async fn begin_term(&mut self, door: &mut DoorTask, term: u64) -> bool {
        if self.term == term {
            return true;
        }
        let inherited = door.raft.metrics().borrow_watched().last_log_index.unwrap_or(0);
        let mut applied = door.tables.applied.subscribe();
        let reached = tokio::select! {
            reached = applied.wait_for(|index| *index >= inherited) => reached.is_ok(),
            _ = door.leadership.changed() => false,
            () = door.shutdown.cancelled() => false,
        };
        if reached {
            self.term = term;
        } else {
            // Seen by nobody else: the next turn must look again.
            door.leadership.mark_changed();
        }
        reached
    }

    fn next(&mut self, tables: &Tables) -> i64 {
        let applied = tables.state.read().time_unix_ns();
        self.newest = self.newest.max(applied).max(clock::unix_now_ns());
        self.newest
    }
}

#[cfg(test)]
mod tests {
    use nave_orchestrator_core::ClusterState;
    use nave_proto::pb;
    use parking_lot::RwLock;

    use super::*;

    #[test]
    fn a_stamp_is_never_below_what_the_log_has_seen() {
        let mut state = ClusterState::new();
        let ahead = clock::unix_now_ns() + 3_600_000_000_000;
        state.apply(0, pb::Command { time_unix_ns: ahead, ..Default::default() });
        let (membership, applied) = (RwLock::default(), watch::Sender::new(0));
        let tables = Tables { state: RwLock::new(state), membership, applied };
        let mut stamps = Stamps::default();
        assert_eq!(
            (stamps.next(&tables), stamps.next(&tables)),
            (ahead, ahead),
            "the clock of another leader"
        );
        stamps.newest = ahead + 5;
        assert_eq!(stamps.next(&tables), ahead + 5, "not yet applied, but in the log");
    }

    #[test]
    fn retries_begin_soon_and_stay_bounded() {
        assert!(retry_delay(0) < Duration::from_millis(8));
        assert!((1..100).all(|attempts| retry_delay(attempts) <= RETRY_DELAY_MAX.mul_f64(1.5)));
    }
}
