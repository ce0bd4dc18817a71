//! What the leader does of itself: the scheduler places and stops instances, liveness says which hosts are lost,
//! format says what may be written into the log.
//!
//! Controllers take no input. Woken by changes and timers, they look at the state, decide, and propose; so a change
//! of leader needs nothing special: the next leader's controllers look at the same state. On the other members they
//! wait.

pub(crate) mod format;
pub(crate) mod liveness;
pub(crate) mod members;
pub(crate) mod scheduler;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::api::Hub;

/// Waits until this member leads, and returns the term in which it does; nothing when the member stops.
async fn leadership(hub: &Arc<Hub>) -> Option<u64> {
    let mut status = hub.raft.subscribe_status();
    loop {
        {
            let status = status.borrow_and_update();
            if status.leader == Some(hub.id) {
                return Some(status.term);
            }
        }
        tokio::select! {
            changed = status.changed() => changed.ok()?,
            () = hub.stop.cancelled() => return None,
        }
    }
}

/// Whether this member still leads in that term, by the same word as [`leadership`]. Two sources that disagree for a
/// moment would send a controller round and round between them, and on one worker nobody else would get to speak.
fn still_leads(hub: &Hub, term: u64) -> bool {
    let status = hub.raft.leadership();
    status.leader == Some(hub.id) && status.term == term
}

/// The looks that a controller takes at a steady pace, the first at once, within one term of this member's leadership.
struct Looks<'a> {
    hub: &'a Hub,
    term: u64,
    ticks: Interval,
}

impl<'a> Looks<'a> {
    fn new(hub: &'a Hub, term: u64, each: Duration) -> Self {
        let mut ticks = interval(each);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { hub, term, ticks }
    }

    /// Waits until the next one is due; `false`: this member leads no longer, or stops.
    async fn next(&mut self) -> bool {
        if !still_leads(self.hub, self.term) {
            return false;
        }
        tokio::select! {
            _ = self.ticks.tick() => true,
            () = self.hub.stop.cancelled() => false,
        }
    }
}
