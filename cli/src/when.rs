//! Times and spans as people read and write them: `3m`, `90s`, `2026-11-26T14:00:00Z`.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

/// A protobuf time; none when it was never set.
pub(crate) fn timestamp(time: Option<&prost_types::Timestamp>) -> Option<Timestamp> {
    let time = time?;
    Timestamp::new(time.seconds, time.nanos).ok()
}

/// How long ago, in the largest unit that says something: `0s`, `59s`, `3m`, `47h`, `9d`; `-` for never.
pub(crate) fn age(time: Option<Timestamp>, now: Timestamp) -> String {
    time.map_or_else(|| "-".to_owned(), |time| span(now.duration_since(time)))
}

/// A span in one unit, cut rather than rounded.
pub(crate) fn span(span: SignedDuration) -> String {
    let seconds = span.as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A duration as it was asked for: `60s`, `1m30s`.
pub(crate) fn exact(duration: Duration) -> String {
    SignedDuration::try_from(duration)
        .map_or_else(|_| format!("{duration:?}"), |duration| format!("{duration:#}").replace(' ', ""))
}

/// `2026-11-26T14:00:00.123Z`, for JSON; empty for never.
pub(crate) fn rfc3339(time: Option<Timestamp>) -> String {
    time.map_or_else(String::new, |time| format!("{time:.3}"))
}

/// `60s`, `500ms`, `1h30m`; for clap.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse::<u64>() {
        return Err(format!("a unit is missing: did you mean {seconds}s?"));
    }
    let parsed: SignedDuration =
        text.parse().map_err(|_| "not a duration, which looks like 60s or 1h30m".to_owned())?;
    Duration::try_from(parsed).map_err(|_| "a duration cannot be negative".to_owned())
}

/// A moment: a duration back from now, or an RFC 3339 time; for clap.
pub(crate) fn parse_since(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    let back = parse_duration(text)
        .map_err(|_| "neither a duration back from now (5m) nor a time (2026-11-26T14:00:00Z)".to_owned())?;
    crate::clock::now().checked_sub(back).map_err(|_| "too long ago".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_use_one_unit() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        for (ago, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (3599, "59m"),
            (3600, "1h"),
            (172_799, "47h"),
            (172_800, "2d"),
            (-5, "0s"),
        ] {
            let then = Timestamp::from_second(1_000_000 - ago).unwrap();
            assert_eq!(age(Some(then), now), text);
        }
        assert_eq!(age(None, now), "-");
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("90"), Err("a unit is missing: did you mean 90s?".to_owned()));
        assert!(parse_duration("soon").unwrap_err().contains("60s"));
    }

    #[test]
    fn since_takes_a_time_or_a_span() {
        assert_eq!(parse_since("2026-11-26T14:00:00Z").unwrap().as_second(), 1_795_701_600);
        assert!(parse_since("5m").unwrap() < crate::clock::now());
        assert!(parse_since("yesterday").unwrap_err().contains("5m"));
    }
}
