//! The calls that this host has carried last, each a span of its trace. Kept in rings of a fixed size, several, so that
//! the proxy's threads do not wait for each other; the oldest goes for the newest. Nothing is written down.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use nave_agent_core::balancer::EndpointKey;
use nave_proto::pb;
use parking_lot::Mutex;

use super::http1::trace::Trace;
use super::meter::Class;

/// Threads of the proxy are fewer on most machines.
const RINGS: usize = 8;
/// Together some 16,000 of about 200 bytes: 3 MiB once they are full.
const SPANS_PER_RING: usize = 2048;
/// Of method and path.
const NAME_BYTES_MAX: usize = 64;
/// Answered at once.
const ANSWER_MAX: usize = 1000;

/// Who calls whom, the same for all calls of a connection.
#[derive(Debug)]
pub(crate) struct Label {
    pub(crate) service: Arc<str>,
    pub(crate) port: Arc<str>,
    pub(crate) caller: String,
    /// The caller is on another host.
    pub(crate) is_peer: bool,
}

/// One call that is over.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    pub(crate) label: Arc<Label>,
    pub(crate) trace: Trace,
    pub(crate) name: Name,
    pub(crate) endpoint: Option<EndpointKey>,
    pub(crate) class: Class,
    pub(crate) begun_unix_ns: i64,
    pub(crate) took_ns: u64,
    pub(crate) retries: usize,
}

/// Method and path, as much as fits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Name {
    bytes: [u8; NAME_BYTES_MAX],
    length: u8,
}

impl Name {
    pub(crate) fn new(method: &[u8], path: &[u8]) -> Self {
        let mut name = Self { bytes: [0; NAME_BYTES_MAX], length: 0 };
        for part in [method, b" ", path] {
            let at = usize::from(name.length);
            let fits = part.len().min(NAME_BYTES_MAX - at);
            name.bytes[at..at + fits].copy_from_slice(&part[..fits]);
            name.length += u8::try_from(fits).expect("at most 64");
        }
        name
    }

    /// Of a head that begins with a request line.
    pub(crate) fn of_head(head: &[u8]) -> Self {
        let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
        let mut words = line.split(|byte| *byte == b' ');
        let method = words.next().unwrap_or_default();
        let target = words.next().unwrap_or_default();
        // What is asked for, not with what: a query may hold what is nobody's business.
        Self::new(method, target.split(|byte| *byte == b'?').next().unwrap_or_default())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes[..usize::from(self.length)]).into_owned()
    }
}

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct Spans {
    rings: [Mutex<VecDeque<Span>>; RINGS],
    dropped: AtomicU64,
}

impl Spans {
    pub(crate) fn add(&self, span: Span) {
        let mut ring = self.rings[ring()].lock();
        if ring.len() >= SPANS_PER_RING {
            ring.pop_front();
            self.dropped.fetch_add(1, Relaxed);
        }
        ring.push_back(span);
    }

    /// The newest that fit the request.
    pub(crate) fn read(&self, request: &pb::ReadSpansRequest) -> pb::ReadSpansResponse {
        let most = match usize::try_from(request.limit).unwrap_or(ANSWER_MAX) {
            0 => ANSWER_MAX,
            limit => limit.min(ANSWER_MAX),
        };
        let fits = |span: &&Span| {
            (request.service.is_empty() || *span.label.service == *request.service)
                && (request.trace_id.is_empty() || hex(&span.trace.id) == request.trace_id)
        };
        let mut found: Vec<Span> = Vec::new();
        for ring in &self.rings {
            found.extend(ring.lock().iter().rev().filter(fits).take(most).cloned());
        }
        found.sort_by_key(|span| std::cmp::Reverse(span.begun_unix_ns));
        found.truncate(most);
        let spans = found.iter().map(pb::Span::from).collect();
        pb::ReadSpansResponse { spans, dropped: self.dropped.load(Relaxed) }
    }
}

/// The same for all calls of a thread.
fn ring() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: usize = THREADS.fetch_add(1, Relaxed) % RINGS;
    }
    OWN.with(|own| *own)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl From<&Span> for pb::Span {
    fn from(span: &Span) -> Self {
        let kind = match span.label.is_peer {
            true => pb::span::Kind::Server,
            false => pb::span::Kind::Client,
        };
        Self {
            trace_id: hex(&span.trace.id),
            span_id: hex(&span.trace.span),
            parent_span_id: span.trace.parent.map(|parent| hex(&parent)).unwrap_or_default(),
            flags: span.trace.flags.into(),
            kind: kind.into(),
            service: span.label.service.to_string(),
            port: span.label.port.to_string(),
            caller: span.label.caller.clone(),
            instance_id: span.endpoint.map(|key| key.instance.to_string()).unwrap_or_default(),
            name: span.name.text(),
            class: span.class.word().to_owned(),
            start_unix_ns: span.begun_unix_ns,
            duration_ns: span.took_ns,
            retries: u32::try_from(span.retries).unwrap_or(u32::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(service: &str, id: u8, at: i64) -> Span {
        let label =
            Label { service: service.into(), port: "http".into(), caller: "web".to_owned(), is_peer: false };
        let trace = Trace { id: [id; 16], parent: None, span: [1; 8], flags: 1 };
        let name = Name::of_head(b"GET /a/b?secret=1 HTTP/1.1\r\nHost: x\r\n\r\n");
        let (label, endpoint) = (Arc::new(label), None);
        Span {
            label,
            trace,
            name,
            endpoint,
            class: Class::Success,
            begun_unix_ns: at,
            took_ns: 5,
            retries: 0,
        }
    }

    #[test]
    fn the_newest_are_kept_and_found_by_trace_and_service() {
        let spans = Spans::default();
        for at in 0..i64::try_from(SPANS_PER_RING).unwrap() + 10 {
            spans.add(span("web", 7, at));
        }
        spans.add(span("db", 8, 1));
        let read = |request: pb::ReadSpansRequest| spans.read(&request);
        let all = read(pb::ReadSpansRequest::default());
        assert_eq!((all.spans.len(), all.dropped), (ANSWER_MAX, 11));
        assert_eq!(all.spans[0].start_unix_ns, i64::try_from(SPANS_PER_RING).unwrap() + 9);
        let of_db = read(pb::ReadSpansRequest { service: "db".to_owned(), ..Default::default() });
        assert_eq!(of_db.spans.len(), 1);
        let of_trace = read(pb::ReadSpansRequest { trace_id: "08".repeat(16), ..Default::default() });
        assert_eq!(of_trace.spans, of_db.spans);
        assert_eq!(of_trace.spans[0].name, "GET /a/b");
        let few = read(pb::ReadSpansRequest { limit: 3, ..Default::default() });
        assert_eq!(few.spans.len(), 3);
    }

    #[test]
    fn a_long_name_is_cut() {
        assert_eq!(Name::new(b"GET", &[b'x'; 1000]).text().len(), NAME_BYTES_MAX);
        assert_eq!(Name::of_head(b"").text(), " ");
    }
}
