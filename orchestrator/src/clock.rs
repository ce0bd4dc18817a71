//! The one place where this crate reads the wall clock. The cores take the time as an argument; the leader stamps
//! it into each command (`raft::propose`). Elapsed time is `tokio::time::Instant`, which tests can pause.

use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since 1970 by this machine's wall clock; 0 when the clock stands before that.
#[expect(clippy::disallowed_methods, reason = "wall time enters the crate here and nowhere else")]
pub(crate) fn unix_now_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}
