//! What every part of the world shares: the time, the queue, randomness, the network, the judge, the trace.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rand::SeedableRng as _;
use rand::rngs::SmallRng;

use crate::bug::Bug;
use crate::event::Event;
use crate::network::Network;
use crate::oracle::Oracle;

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// True time, nanoseconds since the world began.
    pub at: i64,
    /// Which promise: stable from run to run, so that shrinking keeps to it.
    pub promise: &'static str,
    pub what: String,
}

#[derive(Debug)]
struct Due {
    at: i64,
    serial: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.serial == other.serial
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.serial).cmp(&(other.at, other.serial))
    }
}

#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) now: i64,
    queue: BinaryHeap<Reverse<Due>>,
    serial: u64,
    pub(crate) rng: SmallRng,
    pub(crate) net: Network,
    pub(crate) oracle: Oracle,
    pub(crate) bug: Option<Bug>,
    /// Faults are over; from now on everything behaves.
    pub(crate) calm: bool,
    pub(crate) violation: Option<Violation>,
    /// Lines of what happened, when somebody wants to read them.
    pub(crate) trace: Option<Vec<String>>,
}

impl Context {
    pub(crate) fn new(seed: u64, net: Network, bug: Option<Bug>, trace: bool) -> Self {
        Self {
            now: 0,
            queue: BinaryHeap::new(),
            serial: 0,
            rng: SmallRng::seed_from_u64(seed),
            net,
            oracle: Oracle::default(),
            bug,
            calm: false,
            violation: None,
            trace: trace.then(Vec::new),
        }
    }

    pub(crate) fn at(&mut self, at: i64, event: Event) {
        self.serial += 1;
        let due = Due { at: at.max(self.now), serial: self.serial, event };
        self.queue.push(Reverse(due));
    }

    pub(crate) fn after(&mut self, delay: i64, event: Event) {
        self.at(self.now + delay, event);
    }

    /// The next event, the clock set to it.
    pub(crate) fn next(&mut self) -> Option<Event> {
        let Reverse(due) = self.queue.pop()?;
        self.now = due.at;
        Some(due.event)
    }

    /// A line for the trace.
    pub(crate) fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>10.3} {}", seconds(self.now), line()));
        }
    }

    /// The first broken promise counts.
    pub(crate) fn violated(&mut self, promise: &'static str, what: impl FnOnce() -> String) {
        if self.violation.is_none() {
            let what = what();
            self.note(|| format!("VIOLATION of {promise}: {what}"));
            self.violation = Some(Violation { at: self.now, promise, what });
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
pub(crate) fn seconds(nanos: i64) -> f64 {
    nanos as f64 / 1e9
}
