//! The two clocks of this crate: wall time for people, and time since boot (suspend included) for every wait.

use nix::time::{ClockId, clock_gettime};

/// Unix nanoseconds, for records and log lines only.
pub(crate) fn unix_ns() -> i64 {
    read(ClockId::CLOCK_REALTIME)
}

/// CLOCK_BOOTTIME nanoseconds: the agent's and the keeper's common clock, valid within one boot.
pub(crate) fn boottime_ns() -> i64 {
    read(ClockId::CLOCK_BOOTTIME)
}

pub(crate) const MS: i64 = 1_000_000;
pub(crate) const SECOND: i64 = 1_000_000_000;

fn read(clock: ClockId) -> i64 {
    clock_gettime(clock).map_or(0, |time| time.tv_sec() * SECOND + time.tv_nsec())
}
