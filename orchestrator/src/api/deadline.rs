//! How long a call may take: what the client allows with `grpc-timeout`, five seconds when it allows nothing. Four
//! fifths of it are for the hub, so that the answer still arrives and says what happened, rather than tonic's
//! cut-off that says nothing.

use std::time::Duration;

use http::HeaderMap;
use tokio::time::Instant;
use tonic::metadata::MetadataMap;

/// For calls without a `grpc-timeout`; with the four fifths, a refusal arrives within 4 s and its member check.
const DEFAULT: Duration = Duration::from_secs(5);
/// More than any change takes; a longer wait only hides that the hub is down.
const LONGEST: Duration = Duration::from_secs(60);

/// When the hub must have its answer ready.
pub(crate) fn of(metadata: &MetadataMap) -> Instant {
    at(metadata.get("grpc-timeout").and_then(|value| parse(value.as_bytes())))
}

/// The same of a call that tonic has not seen.
pub(crate) fn of_headers(headers: &HeaderMap) -> Instant {
    at(allowed(headers))
}

/// What the client allows; nothing: it does not say.
pub(crate) fn allowed(headers: &HeaderMap) -> Option<Duration> {
    headers.get("grpc-timeout").and_then(|value| parse(value.as_bytes()))
}

fn at(allowed: Option<Duration>) -> Instant {
    Instant::now() + allowed.unwrap_or(DEFAULT).min(LONGEST) * 4 / 5
}

/// `TimeoutValue TimeoutUnit` of the gRPC protocol: at most eight digits and one of H M S m u n.
fn parse(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let number: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    match unit {
        b'H' => Some(Duration::from_secs(number * 3600)),
        b'M' => Some(Duration::from_secs(number * 60)),
        b'S' => Some(Duration::from_secs(number)),
        b'm' => Some(Duration::from_millis(number)),
        b'u' => Some(Duration::from_micros(number)),
        b'n' => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocols_units_are_read() {
        let table: [(&[u8], Option<Duration>); 9] = [
            (b"1H", Some(Duration::from_secs(3600))),
            (b"2M", Some(Duration::from_secs(120))),
            (b"30S", Some(Duration::from_secs(30))),
            (b"99999999m", Some(Duration::from_millis(99_999_999))),
            (b"1u", Some(Duration::from_micros(1))),
            (b"1n", Some(Duration::from_nanos(1))),
            (b"123456789m", None),
            (b"m", None),
            (b"1x", None),
        ];
        for (text, expected) in table {
            assert_eq!(parse(text), expected, "{text:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_answer_comes_before_the_client_gives_up() {
        let mut metadata = MetadataMap::new();
        assert_eq!(of(&metadata) - Instant::now(), Duration::from_secs(4));
        metadata.insert("grpc-timeout", "10S".parse().unwrap());
        assert_eq!(of(&metadata) - Instant::now(), Duration::from_secs(8));
        metadata.insert("grpc-timeout", "9H".parse().unwrap());
        assert_eq!(of(&metadata) - Instant::now(), Duration::from_secs(48));
    }
}
