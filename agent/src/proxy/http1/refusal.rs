//! What the agent itself answers, when no endpoint's answer can be passed on: always with the name of the service and
//! the reason, for "503" alone has cost people enough nights.

use std::fmt::Write as _;

use super::framing::BadBody;
use super::lines::BadHead;
use crate::proxy::meter::Refusal as Why;
use crate::proxy::to::NOT_PROCESSED;

/// An answer of ours, after which the caller's connection is closed unless the request was read to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    /// Why, for counting.
    pub(crate) why: Why,
    /// One sentence, beginning with who speaks.
    pub(crate) text: String,
    /// The request has reached no endpoint: to be told to an agent, which may then send it elsewhere.
    pub(crate) not_processed: bool,
}

impl Refusal {
    pub(crate) fn new(status: u16, why: Why, text: impl Into<String>) -> Self {
        Self { status, why, text: text.into(), not_processed: false }
    }

    pub(crate) fn bad_head(bad: BadHead) -> Self {
        let status = match bad {
            BadHead::TooManyHeaders | BadHead::TooLong => 431,
            BadHead::Connect => 501,
            BadHead::Syntax
            | BadHead::LineEnd
            | BadHead::Host
            | BadHead::ContentLength
            | BadHead::TwoLengths
            | BadHead::TransferEncoding
            | BadHead::Connection => 400,
        };
        let why = if status == 431 { Why::HeaderTooLarge } else { Why::Malformed };
        Self::new(status, why, format!("nave: the request was not understood: {bad}"))
    }

    pub(crate) fn bad_body(bad: BadBody) -> Self {
        Self::new(400, Why::Malformed, format!("nave: the request's body was not understood: {bad}"))
    }

    /// The whole answer.
    pub(crate) fn write(&self, keep_alive: bool, head_only: bool, out: &mut Vec<u8>) {
        let mut head =
            format!("HTTP/1.1 {} {}\r\nContent-Type: text/plain\r\n", self.status, phrase(self.status));
        let _infallible =
            write!(head, "Nave-Refused: {}\r\nContent-Length: {}\r\n", self.why.word(), self.text.len() + 1);
        if self.not_processed {
            let _infallible = write!(head, "{NOT_PROCESSED}: 1\r\n");
        }
        if !keep_alive {
            head.push_str("Connection: close\r\n");
        }
        head.push_str("\r\n");
        if !head_only {
            head.push_str(&self.text);
            head.push('\n');
        }
        out.extend_from_slice(head.as_bytes());
    }
}

fn phrase(status: u16) -> &'static str {
    match status {
        400 => "Bad Request",
        403 => "Forbidden",
        408 => "Request Timeout",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        504 => "Gateway Timeout",
        _ => "Service Unavailable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::http1::framing::Framing;
    use crate::proxy::http1::response::{Returning, response};

    #[test]
    fn our_own_answers_are_well_formed() {
        for bad in [BadHead::Syntax, BadHead::TooLong, BadHead::Connect] {
            let refusal = Refusal::bad_head(bad);
            let mut out = Vec::new();
            refusal.write(false, false, &mut out);
            let returning = Returning { head_only: false, old: false, keep_alive: true, upgrade: false };
            let read = response(&out, returning, &mut Vec::new()).unwrap().unwrap();
            assert_eq!(read.status, refusal.status);
            assert_eq!(read.framing, Framing::Length((out.len() - read.length) as u64));
            assert!(!read.reusable);
            let text = String::from_utf8(out).unwrap();
            assert!(text.contains(phrase(refusal.status)) && text.ends_with('\n'), "{text}");
        }
    }
}
