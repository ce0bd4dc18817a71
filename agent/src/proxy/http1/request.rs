//! A request's head: read, judged, and written anew for the next hop in one pass over its bytes.
//!
//! What goes on: the request line and the header lines as they came. What does not: the headers of this hop (RFC 9110
//! section 7.6.1), whatever names itself ours, and a `traceparent`, which is continued. What is refused is whatever two
//! readers could read in two ways (RFC 9112 sections 3.2, 6.1, 6.3 and 11.2).

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::mem::MaybeUninit;

use super::framing::Framing;
use super::lines::{BadHead, Connection, Copier, HEADERS_MAX, Lengths, is_ours, line_starts};
use super::trace::Trace;
use crate::proxy::to::{CALLER, TO, To};

/// What a request says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    /// Bytes of its head.
    pub(crate) length: usize,
    pub(crate) framing: Framing,
    /// The caller may send another one on this connection.
    pub(crate) keep_alive: bool,
    /// HTTP/1.0.
    pub(crate) old: bool,
    /// Its response has no body, whatever that says.
    pub(crate) head_only: bool,
    /// Sending it twice does what sending it once does (RFC 9110 section 9.2.2).
    pub(crate) idempotent: bool,
    /// It asks for another protocol on this connection.
    pub(crate) upgrade: bool,
    /// Of the header that the port balances by, when there is one.
    pub(crate) hash: Option<u64>,
    pub(crate) trace: Trace,
    /// Where an agent sends it.
    pub(crate) to: Option<To>,
    /// For whom an agent sends it.
    pub(crate) caller: Option<String>,
}

/// What is decided outside.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outgoing<'a> {
    /// Whole header lines that are put behind the caller's own, CRLF included.
    pub(crate) added: &'a [u8],
    /// The header that the port balances by.
    pub(crate) hash_header: Option<&'a str>,
    /// Random, for a request that continues no trace, and for the span.
    pub(crate) fresh: Trace,
    /// An agent of this cluster sends it, whose word on the caller is passed on.
    pub(crate) from_peer: bool,
}

/// Reads the head at the beginning of these bytes and writes the next hop's to `out`. Nothing: there is no whole head
/// yet.
///
/// # Errors
/// When the request is refused; `out` is to be thrown away.
pub(crate) fn request(
    bytes: &[u8],
    outgoing: &Outgoing<'_>,
    out: &mut Vec<u8>,
) -> Result<Option<Request>, BadHead> {
    let mut headers = [const { MaybeUninit::uninit() }; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut []);
    let length = match parsed.parse_with_uninit_headers(bytes, &mut headers) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(BadHead::TooManyHeaders),
        Err(_) => return Err(BadHead::Syntax),
    };
    let (Some(method), Some(minor)) = (parsed.method, parsed.version) else { return Err(BadHead::Syntax) };
    if method == "CONNECT" {
        return Err(BadHead::Connect);
    }
    let head = &bytes[..length];
    let read = read(head, parsed.headers, outgoing, out)?;
    let old = minor == 0;
    if (!old && read.hosts != 1) || read.hosts > 1 {
        return Err(BadHead::Host);
    }
    if old && read.lengths.is_chunked() {
        return Err(BadHead::TransferEncoding);
    }
    let framing = read.lengths.framing()?.unwrap_or(Framing::None);
    // With a body both ends would have to agree on when it ends and the other protocol begins.
    let upgrade = read.connection.upgrade && read.upgrade && framing == Framing::None && !old;
    let trace = read.trace.map_or(outgoing.fresh, |caller| caller.continued(outgoing.fresh));
    if upgrade {
        out.extend_from_slice(b"Connection: Upgrade\r\n");
    }
    trace.write_header(out);
    out.extend_from_slice(outgoing.added);
    out.extend_from_slice(b"\r\n");
    Ok(Some(Request {
        length,
        framing,
        keep_alive: !read.connection.close && (!old || read.connection.keep_alive),
        old,
        head_only: method == "HEAD",
        idempotent: matches!(method, "GET" | "HEAD" | "PUT" | "DELETE" | "OPTIONS" | "TRACE"),
        upgrade,
        hash: read.hash,
        trace,
        to: read.to,
        caller: read.caller,
    }))
}

/// What the header lines say.
#[derive(Debug, Default)]
struct Read<'a> {
    lengths: Lengths,
    connection: Connection<'a>,
    hosts: usize,
    upgrade: bool,
    hash: Option<u64>,
    trace: Option<Trace>,
    to: Option<To>,
    caller: Option<String>,
}

fn read<'a>(
    head: &'a [u8],
    headers: &[httparse::Header<'a>],
    outgoing: &Outgoing<'_>,
    out: &mut Vec<u8>,
) -> Result<Read<'a>, BadHead> {
    let mut starts = [0; HEADERS_MAX + 1];
    line_starts(head, headers, &mut starts)?;
    let mut read = Read::default();
    for header in headers.iter().filter(|header| header.name.eq_ignore_ascii_case("connection")) {
        read.connection.read(header.value)?;
    }
    let mut copier = Copier::new(head, 0);
    for (index, header) in headers.iter().enumerate() {
        if !read.keeps(header, outgoing)? {
            copier.leave_out(starts[index], starts[index + 1], out);
        }
    }
    copier.finish(head.len() - 2, out);
    Ok(read)
}

impl Read<'_> {
    /// Takes note of a line, and says whether it goes on.
    fn keeps(&mut self, header: &httparse::Header<'_>, outgoing: &Outgoing<'_>) -> Result<bool, BadHead> {
        let (name, value) = (header.name.as_bytes(), header.value);
        let is = |other: &[u8]| name.eq_ignore_ascii_case(other);
        if outgoing.hash_header.is_some_and(|wanted| is(wanted.as_bytes())) {
            let mut hasher = DefaultHasher::new();
            value.hash(&mut hasher);
            self.hash = Some(hasher.finish());
        }
        match name.len() {
            4 if is(b"host") => self.hosts += 1,
            7 if is(b"upgrade") => {
                // HTTP/2 on a connection of HTTP/1.1 is spoken by nobody, and hides requests from us.
                self.upgrade = !value.to_ascii_lowercase().windows(3).any(|part| part == b"h2c");
                return Ok(self.upgrade && self.connection.upgrade);
            }
            2 if is(b"te") => return Ok(value.eq_ignore_ascii_case(b"trailers")),
            10 if is(b"connection") || is(b"keep-alive") => return Ok(false),
            11 if is(b"traceparent") => {
                self.trace = Trace::parse(value);
                return Ok(false);
            }
            14 if is(b"content-length") => {
                // Said twice it goes on once.
                let first = self.lengths.framing()?.is_none();
                self.lengths.content_length(value)?;
                return Ok(first);
            }
            14 if is(b"http2-settings") => return Ok(false),
            16 if is(b"proxy-connection") => return Ok(false),
            17 if is(b"transfer-encoding") => self.lengths.transfer_encoding(value)?,
            _ if is_ours(name) => return self.keeps_ours(name, value, outgoing.from_peer),
            _ => {}
        }
        Ok(!self.connection.names(name))
    }
}

impl Read<'_> {
    /// What an agent vouches for is passed on; from anybody else it is nothing.
    fn keeps_ours(&mut self, name: &[u8], value: &[u8], from_peer: bool) -> Result<bool, BadHead> {
        let is = |other: &str| name.eq_ignore_ascii_case(other.as_bytes());
        if from_peer && is(TO) {
            self.to = Some(To::parse(value).ok_or(BadHead::Syntax)?);
        }
        if from_peer && is(CALLER) {
            self.caller = Some(String::from_utf8(value.to_vec()).map_err(|_| BadHead::Syntax)?);
            return Ok(true);
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRESH: Trace = Trace { id: [0xab; 16], parent: None, span: [0xcd; 8], flags: 0 };

    fn run(text: &str) -> Result<Option<(Request, String)>, BadHead> {
        let outgoing = Outgoing {
            added: b"Nave-Caller: service/web\r\n",
            hash_header: Some("X-User"),
            fresh: FRESH,
            from_peer: false,
        };
        let mut out = Vec::new();
        let request = request(text.as_bytes(), &outgoing, &mut out)?;
        Ok(request.map(|request| (request, String::from_utf8(out).unwrap())))
    }

    fn good(text: &str) -> (Request, String) {
        run(text).unwrap().unwrap()
    }

    const TAIL: &str = "traceparent: 00-abababababababababababababababab-cdcdcdcdcdcdcdcd-00\r\n\
        Nave-Caller: service/web\r\n\r\n";

    #[test]
    fn a_head_goes_on_as_it_came_with_ours_behind_it() {
        let head = "GET /a?b=c HTTP/1.1\r\nhOsT: web\r\nX-Odd:  spaces kept \r\nAccept: */*\r\n";
        let (request, out) = good(&format!("{head}\r\nbody of the next"));
        assert_eq!(out, format!("{head}{TAIL}"));
        assert_eq!(request.length, head.len() + 2);
        assert_eq!(request.framing, Framing::None);
        assert!(request.keep_alive && request.idempotent && !request.upgrade && !request.old);
    }

    #[test]
    fn what_is_of_this_hop_is_left_out() {
        let (request, out) = good(
            "POST / HTTP/1.1\r\nConnection: close, X-Hop\r\nHost: a\r\nKeep-Alive: 5\r\nX-Hop: 1\r\n\
             Proxy-Connection: a\r\nTE: gzip\r\nNave-Caller: service/root\r\nnave-other: x\r\nUpgrade: websocket\r\n\
             Content-Length: 3\r\nContent-Length: 3\r\nHTTP2-Settings: AAA\r\nLast: 1\r\n\r\n",
        );
        assert_eq!(out, format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nLast: 1\r\n{TAIL}"));
        assert_eq!(request.framing, Framing::Length(3));
        assert!(!request.keep_alive && !request.idempotent && !request.upgrade);
    }

    #[test]
    fn a_trace_is_continued() {
        let caller = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n";
        let (request, out) = good(&format!("GET / HTTP/1.1\r\nHost: a\r\n{caller}tracestate: a=b\r\n\r\n"));
        let ours = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-cdcdcdcdcdcdcdcd-01\r\n";
        assert!(out.contains(ours) && out.contains("tracestate: a=b\r\n"), "{out}");
        assert_eq!(out.matches("traceparent").count(), 1);
        assert_eq!(request.trace.parent, Some([0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31]));
    }

    #[test]
    fn an_upgrade_keeps_its_headers_and_h2c_is_none() {
        let (request, out) = good(
            "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n",
        );
        assert!(request.upgrade);
        assert!(out.contains("Upgrade: websocket\r\nConnection: Upgrade\r\n"), "{out}");
        let (request, out) =
            good("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n");
        assert!(!request.upgrade && !out.contains("h2c"), "{out}");
    }

    #[test]
    fn old_callers_are_served() {
        let (request, _) = good("GET / HTTP/1.0\r\n\r\n");
        assert!(request.old && !request.keep_alive);
        assert!(good("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").0.keep_alive);
    }

    #[test]
    fn the_same_value_of_the_header_hashes_alike() {
        let hash = |user: &str| good(&format!("GET / HTTP/1.1\r\nHost: a\r\nx-user: {user}\r\n\r\n")).0.hash;
        assert_eq!(hash("ann"), hash("ann"));
        assert_ne!(hash("ann"), hash("bob"));
        assert_eq!(good("GET / HTTP/1.1\r\nHost: a\r\n\r\n").0.hash, None);
    }

    #[test]
    fn an_agents_word_is_passed_on_and_nobody_elses() {
        let head =
            "GET / HTTP/1.1\r\nHost: a\r\nNave-Caller: web\r\nNave-To: db main 7 2\r\nNave-X: y\r\n\r\n";
        let read = |from_peer| {
            let outgoing = Outgoing { added: b"", hash_header: None, fresh: FRESH, from_peer };
            let mut out = Vec::new();
            let request = request(head.as_bytes(), &outgoing, &mut out).unwrap().unwrap();
            (request, String::from_utf8(out).unwrap())
        };
        let (request, out) = read(true);
        assert_eq!(request.caller.as_deref(), Some("web"));
        assert_eq!(request.to.map(|to| to.to_string()).as_deref(), Some("db main 7 2"));
        assert!(
            out.contains("Nave-Caller: web\r\n") && !out.contains("Nave-To") && !out.contains("Nave-X"),
            "{out}"
        );
        let (request, out) = read(false);
        assert_eq!((request.caller, request.to), (None, None));
        assert!(!out.contains("Nave"), "{out}");
    }

    #[test]
    fn a_head_that_is_not_whole_waits() {
        let whole = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        for cut in 0..whole.len() {
            assert_eq!(run(&whole[..cut]), Ok(None), "{cut}");
        }
    }

    #[test]
    fn what_two_readers_could_read_differently_is_refused() {
        let cases = [
            ("Host: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n", BadHead::TwoLengths),
            ("Host: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n", BadHead::TwoLengths),
            ("Host: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n", BadHead::ContentLength),
            ("Host: a\r\nContent-Length: 5, 5\r\n", BadHead::ContentLength),
            ("Host: a\r\nContent-Length: +5\r\n", BadHead::ContentLength),
            ("Host: a\r\nTransfer-Encoding: xchunked\r\n", BadHead::TransferEncoding),
            ("Host: a\r\nTransfer-Encoding: chunked, identity\r\n", BadHead::TransferEncoding),
            ("Host: a\r\nTransfer-Encoding : chunked\r\n", BadHead::Syntax),
            ("Host: a\r\n Transfer-Encoding: chunked\r\n", BadHead::Syntax),
            ("Host: a\r\nX: b\r\n folded\r\n", BadHead::Syntax),
            ("Host: a\nX: b\r\n", BadHead::LineEnd),
            ("Host: a\r\nX: b\n", BadHead::LineEnd),
            ("Host: a\r\nHost: b\r\n", BadHead::Host),
            ("X: a\r\n", BadHead::Host),
            ("Host: a\r\nConnection: Host\r\n", BadHead::Connection),
            ("Host: a\r\nX: a\x00b\r\n", BadHead::Syntax),
        ];
        for (lines, bad) in cases {
            assert_eq!(run(&format!("POST / HTTP/1.1\r\n{lines}\r\n")), Err(bad), "{lines:?}");
        }
        assert_eq!(
            run("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"),
            Err(BadHead::TransferEncoding)
        );
        assert_eq!(run("CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"), Err(BadHead::Connect));
        assert_eq!(run("GET / HTTP/2.0\r\nHost: a\r\n\r\n"), Err(BadHead::Syntax));
        assert_eq!(run("\x16\x03\x01 hello"), Err(BadHead::Syntax));
        let many = "a: b\r\n".repeat(HEADERS_MAX + 1);
        assert_eq!(run(&format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n")), Err(BadHead::TooManyHeaders));
    }
}
