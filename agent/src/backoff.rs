//! Pauses between attempts that have no end: doubling, capped, and jittered so that a fleet does not move in step.

use std::time::Duration;

use rand::Rng as _;

const FIRST: Duration = Duration::from_millis(200);
/// Below the lease of 3 s, so that a hub that is back hears its agents before it judges them.
const MAX: Duration = Duration::from_secs(2);

#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    step: Duration,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { step: FIRST }
    }

    /// The next pause: half to all of the step, and the step doubles.
    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.step.mul_f64(rand::rng().random_range(0.5..=1.0));
        self.step = (self.step * 2).min(MAX);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_differ() {
        let mut backoff = Backoff::new();
        let pauses: Vec<Duration> = (0..20).map(|_| backoff.next()).collect();
        assert!(pauses[0] <= FIRST && pauses[0] >= FIRST / 2, "{pauses:?}");
        assert!(pauses[10..].iter().all(|pause| (MAX / 2..=MAX).contains(pause)), "{pauses:?}");
        assert_ne!(pauses[10], pauses[11]);
    }
}
