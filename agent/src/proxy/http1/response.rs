//! A response's head: read, and written anew for the caller in one pass over its bytes, as [`request`](super::request)
//! does it for the other way.

use std::mem::MaybeUninit;

use super::framing::Framing;
use super::lines::{BadHead, Connection, Copier, HEADERS_MAX, Lengths, is_ours, line_starts};
use crate::proxy::to::NOT_PROCESSED;

/// What a response says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Response {
    /// Bytes of its head.
    pub(crate) length: usize,
    pub(crate) status: u16,
    pub(crate) framing: Framing,
    /// The connection can carry another request afterwards.
    pub(crate) reusable: bool,
    /// It says that the request has reached no endpoint; to be believed of agents only.
    pub(crate) not_processed: bool,
}

impl Response {
    /// Another answer follows.
    pub(crate) fn is_interim(&self) -> bool {
        (100..=199).contains(&self.status) && !self.is_switch()
    }

    /// The connection speaks another protocol from here on.
    pub(crate) fn is_switch(&self) -> bool {
        self.status == 101
    }
}

/// What the request and its connection ask of the response's head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Returning {
    /// To a HEAD there is no body.
    pub(crate) head_only: bool,
    /// The caller speaks HTTP/1.0.
    pub(crate) old: bool,
    /// The caller's connection goes on, as far as we and the caller are concerned.
    pub(crate) keep_alive: bool,
    /// The caller asked for another protocol.
    pub(crate) upgrade: bool,
}

/// Reads the head at the beginning of these bytes and writes the caller's to `out`. Nothing: there is no whole head yet.
///
/// # Errors
/// When the response cannot be trusted; `out` is to be thrown away.
pub(crate) fn response(
    bytes: &[u8],
    returning: Returning,
    out: &mut Vec<u8>,
) -> Result<Option<Response>, BadHead> {
    let mut headers = [const { MaybeUninit::uninit() }; HEADERS_MAX];
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    let length = match config.parse_response_with_uninit_headers(&mut parsed, bytes, &mut headers) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(BadHead::TooManyHeaders),
        Err(_) => return Err(BadHead::Syntax),
    };
    let (Some(status), Some(minor)) = (parsed.code, parsed.version) else { return Err(BadHead::Syntax) };
    let head = &bytes[..length];
    let mut starts = [0; HEADERS_MAX + 1];
    line_starts(head, parsed.headers, &mut starts)?;
    let switches = status == 101;
    if switches && !returning.upgrade {
        return Err(BadHead::Connection);
    }
    let mut connection = Connection::default();
    for header in parsed.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("connection")) {
        connection.read(header.value)?;
    }
    let mut lengths = Lengths::default();
    let mut copier = Copier::new(head, 0);
    if minor == 0 {
        out.extend_from_slice(b"HTTP/1.1");
        copier.leave_out(0, 8, &mut Vec::new());
    }
    for (index, header) in parsed.headers.iter().enumerate() {
        if !keeps(header, &connection, &mut lengths, switches)? {
            copier.leave_out(starts[index], starts[index + 1], out);
        }
    }
    copier.finish(length - 2, out);
    let framing = framing(status, returning.head_only, &lengths)?;
    let reusable = framing != Framing::UntilClose
        && !connection.close
        && (minor == 1 || connection.keep_alive)
        && !switches;
    say_connection(status, framing, returning, out);
    out.extend_from_slice(b"\r\n");
    let not_processed = parsed.headers.iter().any(|one| one.name.eq_ignore_ascii_case(NOT_PROCESSED));
    Ok(Some(Response { length, status, framing, reusable, not_processed }))
}

/// RFC 9112 section 6.3.
fn framing(status: u16, head_only: bool, lengths: &Lengths) -> Result<Framing, BadHead> {
    let said = lengths.framing()?;
    Ok(match status {
        100..=199 | 204 | 304 => Framing::None,
        _ if head_only => Framing::None,
        _ => said.unwrap_or(Framing::UntilClose),
    })
}

/// What becomes of the caller's connection, where that is not what it takes for granted.
fn say_connection(status: u16, framing: Framing, returning: Returning, out: &mut Vec<u8>) {
    let said: &[u8] = match status {
        101 => b"Connection: Upgrade\r\n",
        100..=199 => b"",
        _ if framing == Framing::UntilClose || !returning.keep_alive => b"Connection: close\r\n",
        _ if returning.old => b"Connection: keep-alive\r\n",
        _ => b"",
    };
    out.extend_from_slice(said);
}

/// Takes note of a line, and says whether it goes on.
fn keeps(
    header: &httparse::Header<'_>,
    connection: &Connection<'_>,
    lengths: &mut Lengths,
    switches: bool,
) -> Result<bool, BadHead> {
    let (name, value) = (header.name.as_bytes(), header.value);
    let is = |other: &[u8]| name.eq_ignore_ascii_case(other);
    match name.len() {
        // An endpoint may offer a protocol to whoever asks; only a switch concerns the caller.
        7 if is(b"upgrade") => return Ok(switches),
        10 if is(b"connection") || is(b"keep-alive") => return Ok(false),
        14 if is(b"content-length") => {
            let first = lengths.framing()?.is_none();
            lengths.content_length(value)?;
            return Ok(first);
        }
        16 if is(b"proxy-connection") => return Ok(false),
        17 if is(b"transfer-encoding") => lengths.transfer_encoding(value)?,
        _ if is_ours(name) => return Ok(false),
        _ => {}
    }
    Ok(!connection.names(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Returning = Returning { head_only: false, old: false, keep_alive: true, upgrade: false };

    fn run(text: &str, returning: Returning) -> Result<Option<(Response, String)>, BadHead> {
        let mut out = Vec::new();
        let response = response(text.as_bytes(), returning, &mut out)?;
        Ok(response.map(|response| (response, String::from_utf8(out).unwrap())))
    }

    fn good(text: &str, returning: Returning) -> (Response, String) {
        run(text, returning).unwrap().unwrap()
    }

    #[test]
    fn a_head_goes_on_as_it_came() {
        let head = "HTTP/1.1 200 Fine\r\nsErVer: x\r\nContent-Length: 2\r\n";
        let (response, out) = good(&format!("{head}\r\nok"), PLAIN);
        assert_eq!(out, format!("{head}\r\n"));
        assert_eq!(response.framing, Framing::Length(2));
        assert!(response.reusable);
        assert_eq!(response.length, head.len() + 2);
    }

    #[test]
    fn the_body_ends_by_the_standards_order() {
        let framing = |lines: &str, status: u16, head_only: bool| {
            let returning = Returning { head_only, upgrade: true, ..PLAIN };
            good(&format!("HTTP/1.1 {status} X\r\n{lines}\r\n"), returning).0.framing
        };
        assert_eq!(framing("Content-Length: 7\r\n", 200, true), Framing::None);
        assert_eq!(framing("Content-Length: 7\r\n", 304, false), Framing::None);
        assert_eq!(framing("Transfer-Encoding: chunked\r\n", 204, false), Framing::None);
        assert_eq!(framing("", 100, false), Framing::None);
        assert_eq!(framing("Transfer-Encoding: chunked\r\n", 200, false), Framing::Chunked);
        assert_eq!(framing("Content-Length: 0\r\n", 200, false), Framing::None);
        assert_eq!(framing("", 200, false), Framing::UntilClose);
    }

    #[test]
    fn the_callers_connection_is_told_only_of_what_it_does_not_expect() {
        let out = |lines: &str, returning| good(&format!("HTTP/1.1 200 OK\r\n{lines}\r\n"), returning).1;
        let sized = "Content-Length: 1\r\n";
        assert!(!out(sized, PLAIN).contains("Connection"));
        assert!(out("", PLAIN).contains("Connection: close\r\n"));
        assert!(out(sized, Returning { keep_alive: false, ..PLAIN }).contains("Connection: close\r\n"));
        assert!(out(sized, Returning { old: true, ..PLAIN }).contains("Connection: keep-alive\r\n"));
        let closing = good("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\n", PLAIN);
        assert!(!closing.0.reusable);
        assert!(!closing.1.contains("Connection"), "the endpoint's connection is not the caller's");
    }

    #[test]
    fn an_old_endpoint_is_spoken_for() {
        let (response, out) = good("HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\n", PLAIN);
        assert_eq!(out, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n");
        assert!(!response.reusable);
        let kept = "HTTP/1.0 200 OK\r\nContent-Length: 1\r\nConnection: keep-alive\r\n\r\n";
        assert!(good(kept, PLAIN).0.reusable);
    }

    #[test]
    fn a_switch_of_protocols_needs_to_be_asked_for() {
        let head = "HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n";
        assert_eq!(run(head, PLAIN), Err(BadHead::Connection));
        let (_, out) = good(head, Returning { upgrade: true, ..PLAIN });
        assert_eq!(out, "HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n");
    }

    #[test]
    fn what_two_readers_could_read_differently_is_refused() {
        for (lines, bad) in [
            ("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", BadHead::TwoLengths),
            ("Content-Length: 1\r\nContent-Length: 2\r\n", BadHead::ContentLength),
            ("Transfer-Encoding: gzip, chunked\r\n", BadHead::TransferEncoding),
            ("A: b\nC: d\r\n", BadHead::LineEnd),
        ] {
            assert_eq!(run(&format!("HTTP/1.1 200 OK\r\n{lines}\r\n"), PLAIN), Err(bad), "{lines}");
        }
        assert_eq!(run("SSH-2.0-OpenSSH\r\n\r\n", PLAIN), Err(BadHead::Syntax));
    }
}
