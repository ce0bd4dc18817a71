//! The lines of a head, as they stand in the buffer: what both requests and responses need. Header lines go on byte by
//! byte as they came, in their order and spelling; a few are left out, and ours are put behind them. So the head is
//! copied in as few runs as there are lines left out, and no map of headers is ever built.

use super::framing::Framing;

/// Header lines in one head.
pub(super) const HEADERS_MAX: usize = 128;
/// Names that one head's `Connection` may list besides the standard ones.
const NAMED_MAX: usize = 8;

/// A head that is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadHead {
    #[error("it is not HTTP/1.1")]
    Syntax,
    #[error("it has more than 128 header lines")]
    TooManyHeaders,
    #[error("it is longer than this port allows")]
    TooLong,
    #[error("a line does not end in CRLF")]
    LineEnd,
    #[error("it has no Host header, or more than one")]
    Host,
    #[error("Content-Length is not one decimal number")]
    ContentLength,
    #[error("it has both Content-Length and Transfer-Encoding")]
    TwoLengths,
    #[error("Transfer-Encoding is not exactly \"chunked\" in HTTP/1.1")]
    TransferEncoding,
    #[error("Connection names too many headers, or one that it must not")]
    Connection,
    #[error("CONNECT is not served")]
    Connect,
}

/// What the header lines say of the body's length.
#[derive(Debug, Default)]
pub(super) struct Lengths {
    content_length: Option<u64>,
    chunked: bool,
}

impl Lengths {
    pub(super) fn content_length(&mut self, value: &[u8]) -> Result<(), BadHead> {
        let length = decimal(value).ok_or(BadHead::ContentLength)?;
        match self.content_length.replace(length) {
            Some(before) if before != length => Err(BadHead::ContentLength),
            _ => Ok(()),
        }
    }

    pub(super) fn transfer_encoding(&mut self, value: &[u8]) -> Result<(), BadHead> {
        if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
            return Err(BadHead::TransferEncoding);
        }
        self.chunked = true;
        Ok(())
    }

    /// Nothing: no header line says anything.
    pub(super) fn framing(&self) -> Result<Option<Framing>, BadHead> {
        match (self.chunked, self.content_length) {
            (true, Some(_)) => Err(BadHead::TwoLengths),
            (true, None) => Ok(Some(Framing::Chunked)),
            (false, Some(0)) => Ok(Some(Framing::None)),
            (false, Some(length)) => Ok(Some(Framing::Length(length))),
            (false, None) => Ok(None),
        }
    }

    pub(super) fn is_chunked(&self) -> bool {
        self.chunked
    }
}

/// Digits only: no sign, no list, no blank.
fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// What `Connection` says.
#[derive(Debug, Default)]
pub(super) struct Connection<'a> {
    pub(super) close: bool,
    pub(super) keep_alive: bool,
    pub(super) upgrade: bool,
    /// Headers that are for the next hop only.
    named: [&'a [u8]; NAMED_MAX],
    names: usize,
}

impl<'a> Connection<'a> {
    pub(super) fn read(&mut self, value: &'a [u8]) -> Result<(), BadHead> {
        for token in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            match token {
                _ if token.eq_ignore_ascii_case(b"close") => self.close = true,
                _ if token.eq_ignore_ascii_case(b"keep-alive") => self.keep_alive = true,
                _ if token.eq_ignore_ascii_case(b"upgrade") => self.upgrade = true,
                b"" => {}
                _ if token.eq_ignore_ascii_case(b"te") => {}
                // To leave one of these out would change what the request means.
                _ if is_vital(token) || self.names == NAMED_MAX => return Err(BadHead::Connection),
                _ => {
                    self.named[self.names] = token;
                    self.names += 1;
                }
            }
        }
        Ok(())
    }

    pub(super) fn names(&self, header: &[u8]) -> bool {
        self.named[..self.names].iter().any(|name| name.eq_ignore_ascii_case(header))
    }
}

/// Headers that belong to the message or to its caller's identity, whatever `Connection` says.
fn is_vital(name: &[u8]) -> bool {
    const VITAL: [&[u8]; 6] =
        [b"host", b"content-length", b"transfer-encoding", b"authorization", b"cookie", b"traceparent"];
    VITAL.iter().any(|vital| name.eq_ignore_ascii_case(vital)) || is_ours(name)
}

/// `nave-*` says what an agent vouches for: from anybody else it is left out.
pub(super) fn is_ours(name: &[u8]) -> bool {
    name.get(..5).is_some_and(|first| first.eq_ignore_ascii_case(b"nave-"))
}

/// Copies a head's header lines, in runs between those left out.
#[derive(Debug)]
pub(super) struct Copier<'a> {
    head: &'a [u8],
    from: usize,
}

impl<'a> Copier<'a> {
    /// Lines from this offset on.
    pub(super) fn new(head: &'a [u8], from: usize) -> Self {
        Self { head, from }
    }

    /// Leaves out what lies between these offsets.
    pub(super) fn leave_out(&mut self, start: usize, end: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.head[self.from..start]);
        self.from = end;
    }

    /// Copies what is left, up to this offset.
    pub(super) fn finish(self, end: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.head[self.from..end]);
    }
}

/// Where each header line begins, with the end of the last behind them: lines begin at their names, and all before must
/// have ended in CRLF, for a reader that takes a bare LF for an end sees other lines than one that does not.
///
/// # Errors
/// When a line does not end in CRLF.
pub(super) fn line_starts(
    head: &[u8],
    headers: &[httparse::Header<'_>],
    starts: &mut [usize; HEADERS_MAX + 1],
) -> Result<(), BadHead> {
    let base = head.as_ptr().addr();
    let names = headers.iter().map(|header| header.name.as_ptr().addr() - base);
    let ends = names.chain([head.len() - 2]);
    for (slot, start) in starts.iter_mut().zip(ends) {
        if head.get(start - 2..start) != Some(b"\r\n") {
            return Err(BadHead::LineEnd);
        }
        *slot = start;
    }
    if head.ends_with(b"\r\n") { Ok(()) } else { Err(BadHead::LineEnd) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_that_disagree_are_refused() {
        let read = |values: &[&str]| {
            let mut lengths = Lengths::default();
            values.iter().try_for_each(|value| lengths.content_length(value.as_bytes()))?;
            lengths.framing()
        };
        assert_eq!(read(&[]), Ok(None));
        assert_eq!(read(&["5"]), Ok(Some(Framing::Length(5))));
        assert_eq!(read(&["5", "5"]), Ok(Some(Framing::Length(5))));
        assert_eq!(read(&["0"]), Ok(Some(Framing::None)));
        for bad in ["5, 5", "+5", "-5", "", "5x", "0x5", "99999999999999999999", " 5"] {
            assert_eq!(read(&[bad]), Err(BadHead::ContentLength), "{bad}");
        }
        assert_eq!(read(&["5", "6"]), Err(BadHead::ContentLength));
    }

    #[test]
    fn only_chunked_is_a_transfer_encoding() {
        let read = |values: &[&str]| {
            let mut lengths = Lengths::default();
            values.iter().try_for_each(|value| lengths.transfer_encoding(value.as_bytes()))
        };
        assert_eq!(read(&["Chunked"]), Ok(()));
        for bad in [
            &["gzip"][..],
            &["gzip, chunked"],
            &["chunked, chunked"],
            &["chunked", "chunked"],
            &["\x0bchunked"],
        ] {
            assert_eq!(read(bad), Err(BadHead::TransferEncoding), "{bad:?}");
        }
    }

    #[test]
    fn connection_may_not_take_away_what_the_message_means() {
        let mut connection = Connection::default();
        connection.read(b"Keep-Alive, Upgrade , x-hop").unwrap();
        assert!(connection.keep_alive && connection.upgrade && !connection.close);
        assert!(connection.names(b"X-Hop") && !connection.names(b"x-other"));
        for bad in ["host", "close, content-length", "Authorization", "nave-caller"] {
            assert_eq!(Connection::default().read(bad.as_bytes()), Err(BadHead::Connection), "{bad}");
        }
        let many = (0..=NAMED_MAX).map(|n| format!("x-{n}")).collect::<Vec<_>>().join(",");
        assert_eq!(Connection::default().read(many.as_bytes()), Err(BadHead::Connection));
    }
}
