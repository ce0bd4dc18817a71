//! A caller's connection: one request after the other, until either side has had enough.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use nave_agent_core::balancer::RetryBudget;
use nave_agent_core::directory::PortRules;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::alarm::{Alarm, Expired};
use super::buffer::{FIRST_BYTES, fill, poll_fill};
use super::exchange::Exchange;
use super::refusal::Refusal;
use super::request::{Outgoing, Request, request};
use super::trace::Trace;
use crate::proxy::meter::{CallerMeter, Refusal as Why};
use crate::proxy::route::{Caller, Route};
use crate::proxy::spans::Label;
use crate::proxy::to::CALLER;

/// How long a caller may be silent between two requests, whatever the port allows.
const IDLE_TIMEOUT_MAX: Duration = Duration::from_secs(600);
/// How long our last word may take to leave.
const LAST_WORD_TIMEOUT: Duration = Duration::from_secs(5);
/// After a refusal, what the caller still sends is read and thrown away for so long and so many bytes: a connection that
/// is closed with bytes unread is reset, and the caller never sees why.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES_MAX: usize = 1024 * 1024;
/// A waiting connection keeps no more than this of either buffer.
const KEPT_BYTES_MAX: usize = 16 * 1024;

/// What becomes of the caller's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    Next,
    /// It has its answer, and that was the last.
    Close,
    /// It has no whole answer, and must not take this end for one.
    Cut,
}

/// Who calls, and what is counted for it on this port.
#[derive(Debug)]
pub(super) struct Calling {
    /// What its requests say of it, as whole header lines.
    added: Vec<u8>,
    pub(super) budget: Arc<RetryBudget>,
    pub(super) meter: Arc<CallerMeter>,
    pub(super) label: Arc<Label>,
}

impl Calling {
    fn new(route: &Route, caller: &Caller) -> Self {
        let added = format!("{CALLER}: {caller}\r\n").into_bytes();
        let label = route.label(caller, false);
        Self { added, budget: route.budget(caller), meter: route.meter.caller(caller), label }
    }

    /// Of another host, whose agent retries and counts.
    pub(super) fn of_peer(route: &Route, caller: &Caller) -> Self {
        let label = route.label(caller, true);
        Self { added: Vec::new(), budget: route.budget(caller), meter: Arc::default(), label }
    }
}

/// The caller's end.
#[derive(Debug)]
pub(super) struct Client<S> {
    pub(super) stream: S,
    /// Read and not used yet.
    pub(super) buffer: BytesMut,
    /// A response's head on its way to the caller.
    pub(super) scratch: Vec<u8>,
    pub(super) alarm: Alarm,
    /// It sends no more.
    ended: bool,
    buffer_bytes_max: usize,
}

/// Serves one caller's connection until it ends.
///
/// Once `ending` is set its answers say that they are the last; it is for the owner to wait for these, and to close what
/// stays idle.
pub(crate) async fn serve(route: Arc<Route>, stream: TcpStream, caller: Caller, ending: CancellationToken) {
    let mut client = Client::new(stream, route.rules().header_bytes_max);
    let (name, caller) = (&caller, Calling::new(&route, &caller));
    let mut outgoing = Vec::with_capacity(1024);
    loop {
        let rules = route.rules();
        let request = match client.next(&rules, &caller.added, false, &mut outgoing).await {
            Ok(request) => request,
            Err(None) => return,
            Err(Some(refusal)) => {
                route.meter.refused(refusal.why);
                client.refuse(&refusal, false, false).await;
                return;
            }
        };
        let keep_alive = request.keep_alive && !ending.is_cancelled();
        if !route.allows(name) {
            let text = format!("nave: {name} is not allowed to call {}", route.service);
            route.meter.refused(Why::NotAllowed);
            client.refuse(&Refusal::new(403, Why::NotAllowed, text), false, request.head_only).await;
            return;
        }
        let exchange = Exchange::new(&route, &rules, &caller, request, &mut outgoing, keep_alive);
        match exchange.run(&mut client).await {
            After::Next => {}
            After::Close => return client.close().await,
            After::Cut => return,
        }
        client.shrink();
        if outgoing.capacity() > KEPT_BYTES_MAX {
            outgoing = Vec::with_capacity(1024);
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub(super) fn new(stream: S, buffer_bytes_max: usize) -> Self {
        Self {
            stream,
            buffer: BytesMut::with_capacity(FIRST_BYTES),
            scratch: Vec::with_capacity(512),
            alarm: Alarm::new(),
            ended: false,
            buffer_bytes_max,
        }
    }

    /// The next request, its head written anew to `outgoing`. Nothing in the error: the caller has gone, or has been
    /// silent for long enough.
    pub(super) async fn next(
        &mut self,
        rules: &PortRules,
        added: &[u8],
        from_peer: bool,
        outgoing: &mut Vec<u8>,
    ) -> Result<Request, Option<Refusal>> {
        let idle_until = Instant::now() + rules.idle_timeout.min(IDLE_TIMEOUT_MAX);
        let mut head_until = None;
        loop {
            // Blank lines before a request are old servers' habit (RFC 9112 section 2.2).
            while self.buffer.starts_with(b"\r\n") {
                self.buffer.advance(2);
            }
            if !self.buffer.is_empty() {
                outgoing.clear();
                let fresh = Trace::random(&mut rand::rng());
                let hash_header = rules.hash_header.as_deref();
                let told = Outgoing { added, hash_header, fresh, from_peer };
                match request(&self.buffer, &told, outgoing) {
                    Ok(Some(request)) if request.length <= rules.header_bytes_max => {
                        self.buffer.advance(request.length);
                        return Ok(request);
                    }
                    Ok(None) if self.buffer.len() < rules.header_bytes_max => {}
                    Ok(_) => return Err(Some(Refusal::bad_head(super::lines::BadHead::TooLong))),
                    Err(bad) => return Err(Some(Refusal::bad_head(bad))),
                }
            }
            if self.ended {
                return Err(None);
            }
            let due = match self.buffer.is_empty() {
                true => idle_until,
                false => *head_until.get_or_insert_with(|| Instant::now() + rules.header_timeout),
            };
            match self.alarm.within(due, fill(&mut self.stream, &mut self.buffer)).await {
                Ok(Ok(0) | Err(_)) => return Err(None),
                Ok(Ok(_)) => {}
                Err(Expired) if self.buffer.is_empty() => return Err(None),
                Err(Expired) => {
                    let text =
                        format!("nave: the request's head did not come within {:?}", rules.header_timeout);
                    return Err(Some(Refusal::new(408, Why::HeaderTimeout, text)));
                }
            }
        }
    }

    /// Whether the caller has gone while it waits for its answer. What it sends ahead is kept, within bounds; that it
    /// sends no more does not mean that it waits no more.
    pub(super) fn poll_gone(&mut self, cx: &mut Context<'_>) -> bool {
        while !self.ended && self.buffer.len() < self.buffer_bytes_max {
            match poll_fill(&mut self.stream, cx, &mut self.buffer) {
                Poll::Pending => return false,
                Poll::Ready(Ok(0)) => self.ended = true,
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(_)) => return true,
            }
        }
        false
    }

    /// Our own answer.
    pub(super) async fn refuse(&mut self, refusal: &Refusal, keep_alive: bool, head_only: bool) -> After {
        self.scratch.clear();
        refusal.write(keep_alive, head_only, &mut self.scratch);
        let due = Instant::now() + LAST_WORD_TIMEOUT;
        let Self { stream, scratch, alarm, .. } = self;
        let say = async {
            stream.write_all(scratch).await?;
            stream.flush().await
        };
        let written = alarm.within(due, say).await;
        match (written, keep_alive) {
            (Ok(Ok(())), true) => After::Next,
            (Ok(Ok(())), false) => {
                self.linger().await;
                After::Close
            }
            (Ok(Err(_)) | Err(Expired), _) => After::Close,
        }
    }

    /// Says that nothing more comes, and lets the caller read what has.
    pub(super) async fn linger(&mut self) {
        if self.stream.shutdown().await.is_err() {
            return;
        }
        let until = Instant::now() + LINGER;
        let mut left = LINGER_BYTES_MAX;
        while left > 0 {
            self.buffer.clear();
            match self.alarm.within(until, fill(&mut self.stream, &mut self.buffer)).await {
                Ok(Ok(read)) if read > 0 => left = left.saturating_sub(read),
                _ => return,
            }
        }
    }

    /// The end of a connection whose last answer is on its way.
    pub(super) async fn close(&mut self) {
        // The caller may have gone already.
        self.stream.shutdown().await.ok();
    }

    pub(super) fn shrink(&mut self) {
        if self.buffer.is_empty() && self.buffer.capacity() > KEPT_BYTES_MAX {
            self.buffer = BytesMut::with_capacity(FIRST_BYTES);
        }
        if self.scratch.capacity() > KEPT_BYTES_MAX {
            self.scratch = Vec::with_capacity(512);
        }
    }
}
