//! Elapsed time on one machine: CLOCK_BOOTTIME in nanoseconds, which goes on during suspend and never jumps.
//! A type of its own because mixing it with wall time is a bug that no test of an afternoon finds. It means
//! something only together with the boot id; the ledger stores both. Nothing here reads a clock: the shell does,
//! and hands `now` in.

use std::ops::{Add, Sub};
use std::time::Duration;

/// Nanoseconds of CLOCK_BOOTTIME. May be negative: a moment before this boot, carried over from the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Monotonic(pub i64);

impl Monotonic {
    /// The moment the machine booted.
    pub const BOOT: Self = Self(0);

    /// As the ledger stores it.
    #[must_use]
    pub const fn as_nanos(self) -> i64 {
        self.0
    }

    /// Time from `earlier` to `self`; zero when `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        u64::try_from(self.0.saturating_sub(earlier.0)).map_or(Duration::ZERO, Duration::from_nanos)
    }
}

/// Saturating: a duration of centuries is the same as for ever.
fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

impl Add<Duration> for Monotonic {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(nanos(duration)))
    }
}

impl Sub<Duration> for Monotonic {
    type Output = Self;
    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(nanos(duration)))
    }
}

/// What must be added to a [`Monotonic`] to get unix nanoseconds, as measured by the shell just now. Used for what
/// people read (`until`), never for a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WallOffset(pub i64);

impl WallOffset {
    /// From one reading of both clocks.
    #[must_use]
    pub const fn measure(now: Monotonic, unix_ns: i64) -> Self {
        Self(unix_ns.saturating_sub(now.0))
    }

    /// The wall time of a moment, unix nanoseconds.
    #[must_use]
    pub const fn unix_ns(self, at: Monotonic) -> i64 {
        at.0.saturating_add(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_saturates_and_never_goes_negative_as_a_duration() {
        let now = Monotonic(5_000_000_000);
        assert_eq!(now.since(now + Duration::from_secs(1)), Duration::ZERO);
        assert_eq!((now + Duration::from_secs(3)).since(now), Duration::from_secs(3));
        assert_eq!(now - Duration::from_secs(6), Monotonic(-1_000_000_000));
        assert_eq!(now + Duration::MAX, Monotonic(i64::MAX));
    }

    #[test]
    fn the_offset_turns_a_moment_into_wall_time() {
        let offset = WallOffset::measure(Monotonic(10), 1_010);
        assert_eq!(offset.unix_ns(Monotonic(25)), 1_025);
    }
}
