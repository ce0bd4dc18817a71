//! When an endpoint is left alone because it fails, and how it comes back.
//!
//! Two signals open it: failures in a row, which is fast, or the share of failures in the last ten seconds, which sees
//! what a row does not. A refusal for too much work counts in the share only. Once open it waits, longer each time and
//! never at the same moment as its neighbours, then lets exactly one call through; only that call's outcome matters.

use std::sync::atomic::{AtomicI64, AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use super::Outcome;
use super::window::Window;
use crate::Monotonic;

/// When a breaker opens and for how long.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BreakerSettings {
    /// Failures in a row.
    pub streak: u32,
    /// Failures per hundred requests of the last ten seconds.
    pub failures_percent: u64,
    /// Fewer requests in the window say nothing about the share.
    pub requests_min: u64,
    /// The first wait; each next one is twice as long.
    pub backoff_min: Duration,
    pub backoff_max: Duration,
    /// The same for one that could not be reached: asking again costs a failed connect, not a failed request.
    pub unreached_backoff_min: Duration,
    pub unreached_backoff_max: Duration,
}

impl Default for BreakerSettings {
    fn default() -> Self {
        Self {
            streak: 5,
            failures_percent: 50,
            requests_min: 20,
            backoff_min: Duration::from_secs(1),
            backoff_max: Duration::from_secs(60),
            unreached_backoff_min: Duration::from_millis(50),
            unreached_backoff_max: Duration::from_secs(2),
        }
    }
}

/// What the breaker says to one that would call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    Closed,
    /// `unreached`: it could not even be connected to, so not even need makes it worth a call.
    Open {
        until: Monotonic,
        unreached: bool,
    },
    /// One call is under way to find out.
    Probing {
        unreached: bool,
    },
}

/// The right to make the one call. Given back by [`Breaker::probed`].
#[derive(Debug)]
pub(super) struct Probe {
    open: i64,
}

const CLOSED: i64 = i64::MIN;
/// The lowest bit of an open or probing gate.
const UNREACHED: i64 = 1;
const PROBING: i64 = i64::MAX & !UNREACHED;

#[derive(Debug)]
pub(super) struct Breaker {
    /// [`CLOSED`], [`PROBING`], or nanoseconds of the moment from which a probe may go; the latter two with the bit.
    gate: AtomicI64,
    streak: AtomicU32,
    window: Window,
    /// Openings without a long good time between.
    trips: AtomicU32,
    closed_at: AtomicI64,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            gate: AtomicI64::new(CLOSED),
            streak: AtomicU32::default(),
            window: Window::default(),
            trips: AtomicU32::default(),
            closed_at: AtomicI64::new(i64::MIN),
        }
    }
}

impl Breaker {
    pub(super) fn gate(&self) -> Gate {
        let gate = self.gate.load(Relaxed);
        let unreached = gate & UNREACHED != 0;
        match gate {
            CLOSED => Gate::Closed,
            _ if gate & !UNREACHED == PROBING => Gate::Probing { unreached },
            until => Gate::Open { until: Monotonic(until & !UNREACHED), unreached },
        }
    }

    /// The one call, for whoever is first after the wait.
    pub(super) fn try_probe(&self, now: Monotonic) -> Option<Probe> {
        let open = self.gate.load(Relaxed);
        if open == CLOSED || open & !UNREACHED == PROBING || now.0 < open & !UNREACHED {
            return None;
        }
        let probing = PROBING | (open & UNREACHED);
        self.gate.compare_exchange(open, probing, Relaxed, Relaxed).ok().map(|open| Probe { open })
    }

    /// The outcome of a call that was no probe; `true` when it opened the breaker. `jitter` is from 0 to 1.
    pub(super) fn record(
        &self,
        now: Monotonic,
        outcome: Outcome,
        settings: &BreakerSettings,
        jitter: f64,
    ) -> bool {
        let streak = match outcome {
            Outcome::Cancelled => return false,
            Outcome::Success => {
                if self.streak.load(Relaxed) != 0 {
                    self.streak.store(0, Relaxed);
                }
                self.window.add(now, 1, 0);
                return false;
            }
            Outcome::Overloaded => {
                self.window.add(now, 1, 1);
                0
            }
            Outcome::Failure | Outcome::Unreached => {
                self.window.add(now, 1, 1);
                self.streak.fetch_add(1, Relaxed).saturating_add(1)
            }
        };
        let trips = streak >= settings.streak || {
            let counts = self.window.sum(now);
            counts.all >= settings.requests_min
                && counts.marked * 100 >= counts.all * settings.failures_percent
        };
        trips && self.open(CLOSED, now, outcome, settings, jitter)
    }

    /// The outcome of the probe; `true` when it closed the breaker.
    pub(super) fn probed(
        &self,
        probe: &Probe,
        now: Monotonic,
        outcome: Outcome,
        settings: &BreakerSettings,
        jitter: f64,
    ) -> bool {
        let probing = PROBING | (probe.open & UNREACHED);
        match outcome {
            Outcome::Success => {
                self.streak.store(0, Relaxed);
                self.window.clear();
                self.closed_at.store(now.0, Relaxed);
                self.gate.compare_exchange(probing, CLOSED, Relaxed, Relaxed).is_ok()
            }
            // It said nothing, so the next may ask.
            Outcome::Cancelled => {
                self.give_back(probe);
                false
            }
            Outcome::Failure | Outcome::Overloaded | Outcome::Unreached => {
                self.open(probing, now, outcome, settings, jitter);
                false
            }
        }
    }

    /// The probe was not made after all.
    pub(super) fn give_back(&self, probe: &Probe) {
        let probing = PROBING | (probe.open & UNREACHED);
        let _closed_since = self.gate.compare_exchange(probing, probe.open, Relaxed, Relaxed);
    }

    fn open(
        &self,
        from: i64,
        now: Monotonic,
        outcome: Outcome,
        settings: &BreakerSettings,
        jitter: f64,
    ) -> bool {
        let unreached = outcome == Outcome::Unreached;
        let was_good_for = now.since(Monotonic(self.closed_at.load(Relaxed)));
        let trips = match from == CLOSED && was_good_for > settings.backoff_max {
            true => 0,
            false => self.trips.load(Relaxed),
        };
        let (first, longest) = match unreached {
            true => (settings.unreached_backoff_min, settings.unreached_backoff_max),
            false => (settings.backoff_min, settings.backoff_max),
        };
        let wait = first.saturating_mul(1 << trips.min(16)).min(longest);
        let until = now + wait.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0));
        let gate = (until.0 & !UNREACHED).clamp(CLOSED + 2, PROBING - 2) | i64::from(unreached);
        let opened = self.gate.compare_exchange(from, gate, Relaxed, Relaxed).is_ok();
        if opened {
            self.trips.store(trips.saturating_add(1), Relaxed);
        }
        opened
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Outcome::{Cancelled, Failure, Overloaded, Success, Unreached};

    const START: Monotonic = Monotonic(1_000_000_000_000);
    const SECOND: Duration = Duration::from_secs(1);

    fn settings() -> BreakerSettings {
        BreakerSettings::default()
    }

    fn record(breaker: &Breaker, outcomes: &[Outcome]) -> bool {
        outcomes.iter().any(|outcome| breaker.record(START, *outcome, &settings(), 1.0))
    }

    #[test]
    fn what_opens_it_and_what_does_not() {
        let alternating: Vec<Outcome> = [Success, Failure].repeat(10);
        let mostly_good: Vec<Outcome> = [Failure, Success, Success].repeat(30);
        for (name, outcomes, opens) in [
            ("five in a row", vec![Failure; 5], true),
            ("four in a row", vec![Failure; 4], false),
            ("a success ends the row", [vec![Failure; 4], vec![Success], vec![Failure; 4]].concat(), false),
            ("half of twenty", alternating, true),
            ("a third of ninety", mostly_good, false),
            ("too much work is no row", vec![Overloaded; 19], false),
            ("too much work is a share", vec![Overloaded; 20], true),
            ("callers that leave say nothing", vec![Cancelled; 100], false),
            ("unreached in a row", vec![Unreached; 5], true),
        ] {
            assert_eq!(record(&Breaker::default(), &outcomes), opens, "{name}");
        }
    }

    #[test]
    fn exactly_one_probe_and_its_outcome_decides() {
        let breaker = Breaker::default();
        assert!(record(&breaker, &[Failure; 5]));
        assert!(breaker.try_probe(START + SECOND / 2).is_none(), "not before the wait");
        let due = START + SECOND;
        let probe = breaker.try_probe(due).expect("it is due");
        assert!(breaker.try_probe(due + SECOND * 100).is_none(), "one at a time");
        breaker.give_back(&probe);
        let probe = breaker.try_probe(due).expect("the one before was not made");
        assert!(!breaker.probed(&probe, due, Failure, &settings(), 1.0));
        assert_eq!(
            breaker.gate(),
            Gate::Open { until: due + SECOND * 2, unreached: false },
            "twice the wait"
        );
        let probe = breaker.try_probe(due + SECOND * 2).expect("it is due again");
        assert!(breaker.probed(&probe, due + SECOND * 2, Success, &settings(), 1.0));
        assert_eq!(breaker.gate(), Gate::Closed);
        assert!(!record(&breaker, &[Failure; 4]), "the row was forgotten");
    }

    #[test]
    fn waits_grow_to_their_bound_which_is_short_for_what_was_not_reached() {
        for (outcome, first, longest) in [(Failure, 1_000, 60), (Unreached, 50, 2)] {
            let breaker = Breaker::default();
            let mut now = START;
            assert!((0..5).any(|_| breaker.record(now, outcome, &settings(), 1.0)));
            let until = now + Duration::from_millis(first);
            assert_eq!(breaker.gate(), Gate::Open { until, unreached: outcome == Unreached });
            for _ in 0..10 {
                let Gate::Open { until, unreached } = breaker.gate() else { panic!("{:?}", breaker.gate()) };
                assert_eq!(unreached, outcome == Unreached);
                assert!(until.since(now) <= SECOND * longest);
                now = until;
                let probe = breaker.try_probe(now).expect("the wait is over");
                breaker.probed(&probe, now, outcome, &settings(), 1.0);
            }
            assert_eq!(
                breaker.gate(),
                Gate::Open { until: Monotonic((now + SECOND * longest).0), unreached: outcome == Unreached }
            );
        }
    }

    #[test]
    fn many_threads_get_one_probe() {
        let breaker = Breaker::default();
        assert!(record(&breaker, &[Failure; 5]));
        let probes: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| (0..1000).filter(|_| breaker.try_probe(START + SECOND).is_some()).count())
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(probes, 1);
    }
}
