//! Clocks that disagree. The world has one true time, in nanoseconds; every machine reads its own boot clock, which
//! runs a little fast or slow, and its own wall clock, which is also off by seconds and jumps. Rates are bounded
//! by half a percent, so that two machines differ by the percent that the lease arithmetic allows.

use rand::Rng;
use rand::rngs::SmallRng;

/// One millisecond of true time.
pub(crate) const MS: i64 = 1_000_000;
/// One second of true time.
pub(crate) const SECOND: i64 = 1_000 * MS;

const DRIFT_PPM_MAX: i64 = 5_000;

/// What one clock shows at a true time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    offset: i64,
    drift_ppm: i64,
}

impl Clock {
    /// Shows `reading` at the true time `at`, and drifts at random from then on.
    pub(crate) fn begin(rng: &mut SmallRng, at: i64, reading: i64) -> Self {
        let mut clock = Self { offset: 0, drift_ppm: rng.random_range(-DRIFT_PPM_MAX..=DRIFT_PPM_MAX) };
        clock.offset = reading - clock.read(at);
        clock
    }

    /// Nanoseconds it shows.
    pub(crate) fn read(&self, at: i64) -> i64 {
        self.offset + at + at / 1_000_000 * self.drift_ppm
    }

    /// The first true time, to the millisecond, at which it shows at least `reading`.
    pub(crate) fn when(&self, reading: i64) -> i64 {
        let ahead = i128::from(reading - self.offset);
        let at = ahead * 1_000_000 / (1_000_000 + i128::from(self.drift_ppm));
        let mut at = i64::try_from(at).unwrap_or(i64::MAX / 2) - MS;
        while self.read(at) < reading {
            at += MS;
        }
        at
    }

    /// Steps the wall clock, as an operator or a bad time server does.
    pub(crate) fn jump(&mut self, by: i64) {
        self.offset += by;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;

    #[test]
    fn when_is_the_inverse_of_read() {
        let mut rng = SmallRng::seed_from_u64(1);
        for _ in 0..1_000 {
            let clock = Clock::begin(&mut rng, 5 * SECOND, 100 * SECOND);
            let reading = rng.random_range(0..10_000 * SECOND);
            let at = clock.when(reading);
            assert!(clock.read(at) >= reading && clock.read(at - 3 * MS) < reading, "{clock:?} {reading}");
        }
    }
}
