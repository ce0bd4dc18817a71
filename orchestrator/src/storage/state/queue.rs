//! What waits for the state's writer. Nobody waits for its batches, so they are left to gather: the writer is woken
//! when there are many, when it has left the first for [`LINGER`], or when somebody waits for an answer. That saves two
//! switches of threads for each entry of a quiet hub, and lets rows that change often be written once.

use std::io;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use super::{QUEUED_BATCHES_MAX, StateBatch};
use crate::storage::snapshot::SnapshotFile;

/// How long a batch may lie in the queue. It costs nothing but its memory: the log has it too.
const LINGER: Duration = Duration::from_millis(100);
/// With so many the writer is woken at once, long before `apply` has to wait.
const GATHERED_BATCHES: usize = QUEUED_BATCHES_MAX / 2;

pub(super) enum Message {
    Write(StateBatch, OwnedSemaphorePermit),
    Barrier(oneshot::Sender<io::Result<()>>),
    Replace(SnapshotFile, oneshot::Sender<io::Result<()>>),
}

impl Message {
    fn can_wait(&self) -> bool {
        matches!(self, Self::Write(..))
    }
}

/// Unbounded by itself; the permits in its batches bound it.
pub(super) struct Queue {
    state: Mutex<QueueState>,
    wake: Condvar,
    linger: Duration,
}

impl Default for Queue {
    fn default() -> Self {
        Self { state: Mutex::default(), wake: Condvar::new(), linger: LINGER }
    }
}

#[derive(Default)]
struct QueueState {
    messages: Vec<Message>,
    urgent: bool,
    closed: bool,
    writer: Writer,
}

/// What the writer does meanwhile.
#[derive(Default, PartialEq, Eq)]
enum Writer {
    #[default]
    Works,
    /// Any message wakes it.
    Sleeps,
    /// It wakes by itself soon; what can wait for that does.
    Lingers,
}

impl QueueState {
    fn is_due(&self) -> bool {
        self.urgent || self.closed || self.messages.len() >= GATHERED_BATCHES
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}

impl Queue {
    /// Fails when the writer has ended, or is about to.
    pub(super) fn push(&self, message: Message) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(stopped());
        }
        state.urgent |= !message.can_wait();
        state.messages.push(message);
        let wakes = match state.writer {
            Writer::Works => false,
            Writer::Sleeps => true,
            Writer::Lingers => state.is_due(),
        };
        if wakes {
            state.writer = Writer::Works;
            self.wake.notify_one();
        }
        Ok(())
    }

    /// Takes no more messages.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.wake.notify_one();
    }

    /// Waits for what is to be done next, oldest first; `None`: closed and empty.
    pub(super) fn take(&self) -> Option<Vec<Message>> {
        let mut state = self.state.lock();
        while state.messages.is_empty() && !state.closed {
            state.writer = Writer::Sleeps;
            self.wake.wait(&mut state);
        }
        let due = Instant::now() + self.linger;
        while !state.is_due() {
            state.writer = Writer::Lingers;
            if self.wake.wait_until(&mut state, due.into_std()).timed_out() {
                break;
            }
        }
        state.writer = Writer::Works;
        state.urgent = false;
        let messages = std::mem::take(&mut state.messages);
        (!messages.is_empty()).then_some(messages)
    }
}

pub(super) fn stopped() -> io::Error {
    io::Error::other("the state writer has stopped")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;
    use crate::raft::types::{LeaderId, LogId};

    /// One whose batches would wait for ever.
    fn patient() -> Queue {
        Queue { linger: Duration::from_secs(100_000), ..Queue::default() }
    }

    fn batch(index: u64) -> Message {
        let applied = LogId::new(LeaderId { term: 1, node_id: 1 }, index);
        let slot = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        Message::Write(StateBatch { changes: Vec::new(), applied, membership: None }, slot)
    }

    /// What a writer that waits already gets, when all of these have come one by one.
    fn taken(queue: &Queue, messages: Vec<Message>) -> usize {
        std::thread::scope(|threads| {
            let taken = threads.spawn(|| queue.take().map_or(0, |taken| taken.len()));
            for message in messages {
                while queue.state.lock().writer == Writer::Works {
                    std::thread::yield_now();
                }
                queue.push(message).unwrap();
            }
            taken.join().unwrap()
        })
    }

    #[test]
    fn a_batch_waits_for_others_but_not_for_ever() {
        assert_eq!(taken(&Queue { linger: Duration::ZERO, ..Queue::default() }, vec![batch(1)]), 1);
        let many = u64::try_from(GATHERED_BATCHES).unwrap();
        assert_eq!(taken(&patient(), (0..many).map(batch).collect()), GATHERED_BATCHES);
    }

    #[test]
    fn whoever_asks_has_an_answer_at_once_and_all_before_it_with_it() {
        let (done, _answer) = oneshot::channel();
        assert_eq!(taken(&patient(), vec![batch(1), batch(2), Message::Barrier(done)]), 3);
    }

    #[test]
    fn a_closed_one_gives_what_it_has_and_takes_no_more() {
        let queue = patient();
        queue.push(batch(1)).unwrap();
        queue.close();
        assert!(queue.push(batch(2)).is_err());
        assert_eq!(queue.take().map(|taken| taken.len()), Some(1));
        assert!(queue.take().is_none());
    }
}
