//! The one place where this crate reads wall time: the validity of certificates is a matter of wall time.

/// Seconds since 1970 by this machine's clock; 0 when it stands before that.
#[expect(clippy::disallowed_methods, reason = "the crate's clock")]
pub(crate) fn unix_seconds() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}
