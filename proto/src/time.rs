//! Durations and times as people write them and as the wire carries them. No clock is read here: `now` is given.

use std::fmt::Write as _;
use std::time::Duration;

const NANOS_PER_SECOND: i64 = 1_000_000_000;

/// Units of a duration's text, the greatest first, with their length in milliseconds.
const UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Text that is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseDurationError {
    /// Nothing there.
    #[error("a duration is expected, such as \"10s\"")]
    Empty,
    /// A number alone.
    #[error("{0:?} lacks a unit; write \"{0}s\" for seconds (d, h, m, s, ms)")]
    NoUnit(String),
    /// A unit that there is not.
    #[error("{0:?} is not a unit of time (d, h, m, s, ms)")]
    UnknownUnit(String),
    /// A fraction: `1.5s`.
    #[error("{0:?} has a fraction; use a smaller unit, for instance \"1s500ms\"")]
    Fraction(String),
    /// The same unit twice, or a greater one after a smaller one.
    #[error("{0:?} must name each unit once, the greatest first, for instance \"1h30m\"")]
    Order(String),
    /// More than fits.
    #[error("{0:?} is too long")]
    TooLong(String),
    /// Anything else.
    #[error("{0:?} is not a duration, such as \"500ms\", \"10s\" or \"1h30m\"")]
    Malformed(String),
}

/// Reads `500ms`, `10s`, `2m`, `1h30m`.
pub fn parse_duration(text: &str) -> Result<Duration, ParseDurationError> {
    let given = || text.to_owned();
    if text.is_empty() {
        return Err(ParseDurationError::Empty);
    }
    let mut rest = text;
    let mut total_ms: u64 = 0;
    let mut next_unit = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (number, after) = rest.split_at(digits);
        if number.is_empty() {
            return Err(ParseDurationError::Malformed(given()));
        }
        let letters = after.find(|c: char| !c.is_alphabetic()).unwrap_or(after.len());
        let (unit, remaining) = after.split_at(letters);
        if after.is_empty() {
            return Err(ParseDurationError::NoUnit(given()));
        }
        if after.starts_with(['.', ',']) {
            return Err(ParseDurationError::Fraction(given()));
        }
        if unit.is_empty() {
            return Err(ParseDurationError::Malformed(given()));
        }
        let index = UNITS
            .iter()
            .position(|(name, _)| *name == unit)
            .ok_or_else(|| ParseDurationError::UnknownUnit(unit.to_owned()))?;
        if index < next_unit {
            return Err(ParseDurationError::Order(given()));
        }
        next_unit = index + 1;
        let number: u64 = number.parse().map_err(|_| ParseDurationError::TooLong(given()))?;
        total_ms = number
            .checked_mul(UNITS[index].1)
            .and_then(|part| total_ms.checked_add(part))
            .ok_or_else(|| ParseDurationError::TooLong(given()))?;
        rest = remaining;
    }
    // What a protobuf Duration can say: ten thousand years.
    if total_ms > 315_576_000_000_000 {
        return Err(ParseDurationError::TooLong(given()));
    }
    Ok(Duration::from_millis(total_ms))
}

/// The text that [`parse_duration`] reads back to the same duration, whole milliseconds: `1h30m`, `0s`.
pub fn format_duration(duration: Duration) -> String {
    let mut left = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let mut text = String::new();
    for (unit, length) in UNITS {
        let (number, rest) = (left / length, left % length);
        if number > 0 {
            write!(text, "{number}{unit}").expect("writing to a string does not fail");
        }
        left = rest;
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}

/// For the wire.
pub fn to_proto(duration: Duration) -> prost_types::Duration {
    duration.try_into().unwrap_or(prost_types::Duration { seconds: i64::MAX, nanos: 0 })
}

/// From the wire; `None` when it is negative.
pub fn from_proto(duration: &prost_types::Duration) -> Option<Duration> {
    (*duration).try_into().ok()
}

/// From the wire; `default` when it is unset or negative.
pub fn from_proto_or(duration: Option<&prost_types::Duration>, default: Duration) -> Duration {
    duration.and_then(from_proto).unwrap_or(default)
}

/// Nanoseconds since 1970, as the log carries times, to a `Timestamp`, as the API does.
pub fn timestamp(unix_ns: i64) -> prost_types::Timestamp {
    let nanos = unix_ns.rem_euclid(NANOS_PER_SECOND);
    prost_types::Timestamp {
        seconds: unix_ns.div_euclid(NANOS_PER_SECOND),
        nanos: i32::try_from(nanos).expect("less than 10^9"),
    }
}

/// Like [`timestamp`]; `None` for 0, which the records use for "never".
pub fn timestamp_opt(unix_ns: i64) -> Option<prost_types::Timestamp> {
    (unix_ns != 0).then(|| timestamp(unix_ns))
}

/// Back to nanoseconds since 1970; times outside of the years 1677 to 2262 are moved to that bound.
pub fn unix_ns(timestamp: &prost_types::Timestamp) -> i64 {
    let ns = i128::from(timestamp.seconds) * i128::from(NANOS_PER_SECOND) + i128::from(timestamp.nanos);
    i64::try_from(ns).unwrap_or(if ns < 0 { i64::MIN } else { i64::MAX })
}

/// `2026-11-26T13:59:24.123456789Z`; the fraction only as long as it must be (0, 3, 6 or 9 digits).
pub fn format_rfc3339(unix_ns: i64) -> String {
    timestamp(unix_ns).to_string()
}

/// Text that is neither a duration nor a time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is neither how long ago, such as 10m, nor a time, such as 2026-11-26T13:59:24Z")]
pub struct ParseSinceError {
    given: String,
}

/// What `--since` says, in nanoseconds since 1970: `90s` and `10m` before `now_unix_ns`, or a time of RFC 3339.
pub fn parse_since(text: &str, now_unix_ns: i64) -> Result<i64, ParseSinceError> {
    if let Ok(ago) = parse_duration(text) {
        let ago = i64::try_from(ago.as_nanos()).unwrap_or(i64::MAX);
        return Ok(now_unix_ns.saturating_sub(ago));
    }
    let wrong = || ParseSinceError { given: text.to_owned() };
    // A time has a T in it or, as people write it, a blank; an offset or a Z at its end, else it is UTC.
    let text_with_t = text.trim().replacen(' ', "T", 1);
    let has_zone = text_with_t.split_once('T').ok_or_else(wrong)?.1.contains(['Z', 'z', '+', '-']);
    let whole = if has_zone { text_with_t } else { format!("{text_with_t}Z") };
    whole.parse::<prost_types::Timestamp>().map(|time| unix_ns(&time)).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_people_write_them() {
        for (text, ms) in [
            ("1s", 1_000),
            ("500ms", 500),
            ("2m", 120_000),
            ("1h30m", 5_400_000),
            ("1d2h3m4s5ms", 93_784_005),
            ("0s", 0),
            ("0ms", 0),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
    }

    #[test]
    fn a_bad_duration_says_how_to_write_it() {
        for (text, message) in [
            ("", "a duration is expected, such as \"10s\""),
            ("10", "\"10\" lacks a unit; write \"10s\" for seconds (d, h, m, s, ms)"),
            ("10sec", "\"sec\" is not a unit of time (d, h, m, s, ms)"),
            ("1.5s", "\"1.5s\" has a fraction; use a smaller unit, for instance \"1s500ms\""),
            ("30m1h", "\"30m1h\" must name each unit once, the greatest first, for instance \"1h30m\""),
            ("1m1m", "\"1m1m\" must name each unit once, the greatest first, for instance \"1h30m\""),
            ("-5s", "\"-5s\" is not a duration, such as \"500ms\", \"10s\" or \"1h30m\""),
            ("soon", "\"soon\" is not a duration, such as \"500ms\", \"10s\" or \"1h30m\""),
            ("99999999999999999999s", "\"99999999999999999999s\" is too long"),
            ("9999999999999d", "\"9999999999999d\" is too long"),
            ("10 s", "\"10 s\" is not a duration, such as \"500ms\", \"10s\" or \"1h30m\""),
        ] {
            assert_eq!(parse_duration(text).unwrap_err().to_string(), message, "{text}");
        }
    }

    #[test]
    fn times_survive_the_wire() {
        for ns in [0, 1, -1, 1_764_165_564_123_456_789, i64::MAX, i64::MIN] {
            assert_eq!(unix_ns(&timestamp(ns)), ns, "{ns}");
        }
        assert_eq!(format_rfc3339(1_764_165_564_123_456_789), "2025-11-26T13:59:24.123456789Z");
        assert_eq!(format_rfc3339(1_764_165_564_000_000_000), "2025-11-26T13:59:24Z");
    }

    #[test]
    fn since_is_how_long_ago_or_a_time() {
        let now = 1_764_165_564_000_000_000;
        assert_eq!(parse_since("90s", now), Ok(now - 90 * NANOS_PER_SECOND));
        for text in ["2025-11-26T13:59:24Z", "2025-11-26 13:59:24", "2025-11-26T14:59:24+01:00"] {
            assert_eq!(parse_since(text, 0), Ok(now), "{text}");
        }
        let error = parse_since("yesterday", now).unwrap_err();
        assert!(error.to_string().starts_with("\"yesterday\" is neither"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn a_duration_survives_its_own_text(ms in 0u64..10_000_000_000_000) {
            let duration = Duration::from_millis(ms);
            proptest::prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }
    }
}
