//! The one door through which wall time enters this crate; everything that shows or judges a time takes `now`.

use jiff::Timestamp;

/// The wall clock of this machine.
pub(crate) fn now() -> Timestamp {
    Timestamp::now()
}

/// Seconds since 1970.
pub(crate) fn now_unix() -> i64 {
    now().as_second()
}
