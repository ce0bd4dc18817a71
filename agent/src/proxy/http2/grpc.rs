//! What gRPC says in its own words: the status behind the answer, the deadline before it, and how to fail.

use std::time::Duration;

use http::header::{CONTENT_TYPE, HeaderValue};
use http::{HeaderMap, Response, StatusCode};
use nave_agent_core::balancer::Outcome;

use crate::proxy::meter::Class;

pub(super) const STATUS: &str = "grpc-status";
const MESSAGE: &str = "grpc-message";
pub(super) const TIMEOUT: &str = "grpc-timeout";

/// A gRPC status code that we say ourselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    DeadlineExceeded = 4,
    ResourceExhausted = 8,
    Unavailable = 14,
}

/// Whether a request is of gRPC.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// How a call ended, from the trailers or, when there are none, from the head.
pub(super) fn outcome(headers: &HeaderMap) -> Option<(Outcome, Class)> {
    let status = headers.get(STATUS)?.to_str().ok()?;
    Some(match status.parse::<u32>().ok()? {
        0 => (Outcome::Success, Class::Success),
        // UNKNOWN is what a server's own exceptions become.
        2 | 4 | 13 | 14 | 15 => (Outcome::Failure, Class::ServerError),
        8 => (Outcome::Overloaded, Class::ServerError),
        _ => (Outcome::Success, Class::ClientError),
    })
}

/// An answer of nothing but a status.
pub(super) fn refusal(code: Code, message: &str) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::OK;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(STATUS, HeaderValue::from(code as u16));
    if let Ok(message) = HeaderValue::from_str(&percent(message)) {
        headers.insert(MESSAGE, message);
    }
    response
}

/// Printable ASCII but for `%` stays as it is.
fn percent(message: &str) -> String {
    let one = |byte: u8| match byte {
        b' '..=b'~' if byte != b'%' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    message.bytes().map(one).collect()
}

/// `1S`, `250m`, at most eight digits.
pub(super) fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(TIMEOUT)?.to_str().ok()?;
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if number.is_empty() || number.len() > 8 {
        return None;
    }
    let number: u64 = number.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// What is left, for the next to keep to.
pub(super) fn timeout_value(left: Duration) -> HeaderValue {
    const DIGITS: u128 = 100_000_000;
    let text = [(left.as_micros(), 'u'), (left.as_millis(), 'm')]
        .into_iter()
        .find(|(number, _)| *number < DIGITS)
        .map_or_else(
            || format!("{}S", left.as_secs().min(99_999_999)),
            |(number, unit)| format!("{number}{unit}"),
        );
    HeaderValue::try_from(text).expect("digits and a letter")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_str(value).unwrap());
        headers
    }

    #[test]
    fn the_status_decides_and_not_the_200_in_front_of_it() {
        for (status, wanted) in [
            ("0", Some((Outcome::Success, Class::Success))),
            ("5", Some((Outcome::Success, Class::ClientError))),
            ("8", Some((Outcome::Overloaded, Class::ServerError))),
            ("14", Some((Outcome::Failure, Class::ServerError))),
            ("x", None),
        ] {
            assert_eq!(outcome(&headers(STATUS, status)), wanted, "{status}");
        }
        assert_eq!(outcome(&HeaderMap::new()), None);
    }

    #[test]
    fn deadlines_are_read_and_written() {
        for (text, wanted) in [
            ("1S", Some(Duration::from_secs(1))),
            ("250m", Some(Duration::from_millis(250))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("100000000u", None),
            ("S", None),
            ("", None),
            ("5x", None),
            ("-5S", None),
        ] {
            assert_eq!(timeout(&headers(TIMEOUT, text)), wanted, "{text}");
        }
        for left in [Duration::from_micros(1500), Duration::from_secs(500), Duration::from_secs(200_000)] {
            let value = timeout_value(left);
            let map: HeaderMap = [(http::HeaderName::from_static(TIMEOUT), value)].into_iter().collect();
            assert_eq!(timeout(&map), Some(left));
        }
    }

    #[test]
    fn a_refusal_says_why_in_one_header() {
        let response = refusal(Code::Unavailable, "db is 100% out\n");
        assert_eq!(response.headers()[STATUS], "14");
        assert_eq!(response.headers()[MESSAGE], "db is 100%25 out%0A");
    }
}
