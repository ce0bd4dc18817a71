//! One call, until its caller has an answer: choose an endpoint, send, and pass the answer on; or, while that is safe and
//! nothing has been said to the caller, try another.
//!
//! Sent again is what the endpoint has not begun (it was not reached, it refused the stream, or went away below it),
//! and what may be done twice (RFC 9110 section 9.2.2) when it was answered by nothing or by 502, 503 or 504; within the
//! caller's budget of retries, and only while the body is still at hand. A gRPC call is a POST: no status of its own
//! shows that nothing was done.

use std::future::{Future, poll_fn};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use nave_agent_core::balancer::{Ask, EndpointKey, NoPick, Outcome, Pick, RetryBudget};
use nave_agent_core::directory::PortRules;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::warn;

use super::body::{BodyError, Replay, pass};
use super::grpc::{self, Code};
use crate::clock;
use crate::proxy::dial::unreached;
use crate::proxy::http1::trace::Trace;
use crate::proxy::meter::{CallerMeter, Class, Refusal};
use crate::proxy::records;
use crate::proxy::route::{Caller, Route};
use crate::proxy::spans::{Label, Name};
use crate::proxy::tries::Tries;

/// Who called, said to the callee; what a caller says itself is replaced.
const CALLER: HeaderName = HeaderName::from_static("nave-caller");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Why we answered ourselves.
const REFUSED: HeaderName = HeaderName::from_static("nave-refused");
/// In place of no bound at all.
const FAR: Duration = Duration::from_secs(30 * 24 * 3600);

/// Who calls on a connection, and what is counted for it.
#[derive(Debug)]
pub(super) struct Calling {
    said: Option<HeaderValue>,
    budget: Arc<RetryBudget>,
    meter: Arc<CallerMeter>,
    label: Arc<Label>,
}

impl Calling {
    pub(super) fn new(route: &Route, caller: Caller) -> Self {
        let said = HeaderValue::try_from(caller.to_string()).ok();
        let label = route.label(&caller, false);
        Self { said, budget: route.budget(&caller), meter: route.meter.caller(&caller), label }
    }
}

/// What the callee is asked.
#[derive(Debug)]
struct Head {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    is_grpc: bool,
}

/// See the module's description.
pub(super) struct Call {
    route: Arc<Route>,
    calling: Arc<Calling>,
    rules: Arc<PortRules>,
    head: Head,
    body: Replay,
    respond: SendResponse<Bytes>,
    begun: Instant,
    /// Of the whole call.
    deadline: Option<Instant>,
    tries: Tries,
    trace: Trace,
    /// Who was asked last.
    asked: Option<EndpointKey>,
}

/// What one try came to.
enum Tried {
    /// The caller has its answer, or has gone.
    Over(Class),
    /// Nothing has been said to the caller.
    Failed(Failure),
    /// It may be done twice, it failed, and there is another: that one is next.
    Next(Pick),
}

struct Failure {
    refusal: Refusal,
    /// The endpoint has not begun it.
    safe: bool,
    /// Not a byte of it was sent, so that trying again costs nobody anything.
    unsent: bool,
}

impl Call {
    pub(super) fn new(
        route: Arc<Route>,
        calling: Arc<Calling>,
        request: Request<RecvStream>,
        respond: SendResponse<Bytes>,
    ) -> Self {
        let rules = route.rules();
        let (parts, body) = request.into_parts();
        let mut headers = parts.headers;
        if let Some(said) = &calling.said {
            headers.insert(CALLER, said.clone());
        }
        let trace = trace(&mut headers);
        let uri = absolute(parts.uri, &headers, &route.service);
        let begun = Instant::now();
        let asked = grpc::timeout(&headers);
        let within = [asked, rules.request_timeout].into_iter().flatten().min();
        let head = Head { method: parts.method, uri, is_grpc: grpc::is_grpc(&headers), headers };
        let body = Replay::new(body, rules.replay_bytes_max);
        let deadline = within.map(|within| begun + within.min(FAR));
        let (tries, asked) = (Tries::default(), None);
        Self { route, calling, rules, head, body, respond, begun, deadline, tries, trace, asked }
    }

    pub(super) async fn run(mut self) {
        let route = self.route.clone();
        let class = match route.request() {
            Some(_place) => self.go().await,
            None => {
                let text =
                    format!("nave: {} has as many requests from this host as it may have", route.service);
                self.refuse(Refusal::Requests, &text)
            }
        };
        let took = self.begun.elapsed();
        self.calling.meter.request(class, took);
        let name = Name::new(self.head.method.as_str().as_bytes(), self.head.uri.path().as_bytes());
        let retries = self.tries.len().saturating_sub(usize::from(class == Class::Refused));
        let note = records::Call { trace: self.trace, name, endpoint: self.asked, class, took, retries };
        route.records.call(&self.calling.label, &self.rules, note);
    }

    async fn go(&mut self) -> Class {
        if self.head.method == Method::CONNECT {
            return self.refuse(Refusal::Malformed, "nave: CONNECT is not carried");
        }
        self.calling.budget.request(clock::monotonic());
        let (route, hash) = (self.route.clone(), self.hash());
        let mut next = None;
        loop {
            let pick = match next.take() {
                Some(pick) => pick,
                None => match route.next(&mut self.tries, hash, self.deadline).await {
                    Ok(pick) => pick,
                    Err(end) => return self.give_up(Refusal::NoEndpoint, Some(end)),
                },
            };
            let is_retry = self.tries.len() > 0;
            if is_retry {
                self.route.meter.retried();
                self.shorten_deadline();
            }
            match self.attempt(pick, hash).await {
                Tried::Over(class) => return class,
                Tried::Next(pick) => next = Some(pick),
                Tried::Failed(failure) if self.may_retry(&failure) => {}
                Tried::Failed(failure) => return self.give_up(failure.refusal, None),
            }
        }
    }

    fn may_retry(&self, failure: &Failure) -> bool {
        failure.refusal == Refusal::NoEndpoint
            && (failure.safe || may_repeat(&self.head.method))
            && self.body.repeatable().get()
            && self.tries.may_go_on(self.retries_max(), self.rules.pending_timeout)
            && self.deadline.is_none_or(|deadline| Instant::now() < deadline)
            && (failure.unsent || self.calling.budget.retry(clock::monotonic()))
    }

    fn retries_max(&self) -> usize {
        usize::try_from(self.rules.retries_max).unwrap_or(usize::MAX)
    }

    /// One try on one endpoint.
    async fn attempt(&mut self, mut pick: Pick, hash: Option<u64>) -> Tried {
        let begun = Instant::now();
        self.asked = Some(pick.endpoint().key);
        let leased = self.route.http2.lease(&self.route, pick.endpoint(), self.rules.connect_timeout);
        let lease = match leased.await {
            Ok(lease) => lease,
            Err(error) => {
                let outcome = unreached(pick.endpoint(), &error);
                return self.failed(pick, begun, outcome, &error, Sent::Nothing);
            }
        };
        let try_until = self.rules.try_timeout.map(|within| begun + within.min(FAR));
        let until = [try_until, self.deadline].into_iter().flatten().min().unwrap_or(begun + FAR);
        let mut sender = lease.sender();
        match timeout_at(until, poll_fn(|cx| sender.poll_ready(cx))).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                lease.retire();
                // Its connection had ended, which says nothing of the endpoint: a new one shows.
                return self.failed(pick, begun, Outcome::Cancelled, &error, Sent::Nothing);
            }
            Err(_) => return self.late(pick, begun),
        }
        let has_body = !self.body.is_empty();
        let (mut response, mut sink) = match sender.send_request(self.request(), !has_body) {
            Ok(sent) => sent,
            Err(error) => {
                lease.retire();
                return self.failed(pick, begun, Outcome::Cancelled, &error, Sent::Nothing);
            }
        };
        let repeatable = self.body.repeatable();
        let (body, respond, on) = (&mut self.body, &mut self.respond, &lease);
        let mut upload: Option<Upload<'_>> = None;
        if has_body {
            upload = Some(Box::pin(async move { body.send(&mut sink, on).await }));
        }
        let answered = loop {
            tokio::select! {
                biased;
                answered = &mut response => break answered,
                sent = advance(&mut upload) => {
                    upload = None;
                    if let Err(BodyError::Source(_)) = sent {
                        pick.finish(clock::monotonic(), Outcome::Cancelled, begun.elapsed());
                        return Tried::Over(Class::Cut);
                    }
                    // An endpoint that takes no more of it says why in its answer.
                }
                _ = poll_fn(|cx| respond.poll_reset(cx)) => {
                    pick.finish(clock::monotonic(), Outcome::Cancelled, begun.elapsed());
                    return Tried::Over(Class::Cut);
                }
                () = sleep_until(until) => {
                    drop(upload);
                    return self.late(pick, begun);
                }
            }
        };
        let answer = match answered {
            Ok(answer) => answer,
            Err(error) => {
                drop(upload);
                let (outcome, sent) = read(&error);
                if !error.is_reset() {
                    lease.retire();
                }
                return self.failed(pick, begun, outcome, &error, sent);
            }
        };
        let took = begun.elapsed();
        let is_retryable = matches!(answer.status().as_u16(), 502..=504)
            && may_repeat(&self.head.method)
            && repeatable.get()
            && upload.is_none();
        if is_retryable {
            drop(upload);
            return match self.other_than(&pick, hash) {
                Some(next) => {
                    let status = answer.status();
                    // Nobody reads the rest of it.
                    drop(answer);
                    self.failed(pick, begun, Outcome::Failure, &status, Sent::All);
                    Tried::Next(next)
                }
                None => Tried::Over(self.passing().run(pick, answer, None, took).await),
            };
        }
        // The rest of the request goes on beside the answer; both borrow from the call, so it is taken apart.
        let passing = Passing {
            route: &self.route,
            respond: &mut self.respond,
            deadline: self.deadline,
            is_grpc: self.head.is_grpc,
        };
        Tried::Over(passing.run(pick, answer, upload, took).await)
    }

    fn passing(&mut self) -> Passing<'_> {
        Passing {
            route: &self.route,
            respond: &mut self.respond,
            deadline: self.deadline,
            is_grpc: self.head.is_grpc,
        }
    }

    /// Another endpoint that is there now, if one more try may be made.
    fn other_than(&self, pick: &Pick, hash: Option<u64>) -> Option<Pick> {
        let now = clock::monotonic();
        let is_late = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if is_late || !self.tries.may_follow_answer(self.retries_max(), self.rules.pending_timeout) {
            return None;
        }
        let tried = [self.tries.keys(), &[pick.endpoint().key]].concat();
        let next = self.route.balancer.pick(now, &mut rand::rng(), &Ask { tried: &tried, hash }).ok()?;
        self.calling.budget.retry(now).then_some(next)
    }

    fn failed(
        &mut self,
        mut pick: Pick,
        begun: Instant,
        outcome: Outcome,
        why: &dyn std::fmt::Display,
        sent: Sent,
    ) -> Tried {
        pick.finish(clock::monotonic(), outcome, begun.elapsed());
        let key = pick.endpoint().key;
        self.route.meter.tried(key, matches!(outcome, Outcome::Failure | Outcome::Unreached));
        let (safe, unsent) = (sent != Sent::All, sent == Sent::Nothing);
        self.tries.add(pick.endpoint(), why, unsent);
        Tried::Failed(Failure { refusal: Refusal::NoEndpoint, safe, unsent })
    }

    /// The endpoint did not begin its answer in time.
    fn late(&mut self, pick: Pick, begun: Instant) -> Tried {
        let is_last = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        let why = format!("no answer within {:?}", begun.elapsed());
        match self.failed(pick, begun, Outcome::Failure, &why, Sent::All) {
            Tried::Failed(failure) if is_last => {
                Tried::Failed(Failure { refusal: Refusal::RequestTimeout, ..failure })
            }
            tried => tried,
        }
    }

    fn give_up(&mut self, refusal: Refusal, end: Option<NoPick>) -> Class {
        let text = self.tries.explain(&self.route, end);
        warn!(service = %self.route.service, "{text}");
        self.refuse(refusal, &text)
    }

    /// Our own answer, with the reason.
    fn refuse(&mut self, why: Refusal, text: &str) -> Class {
        self.route.meter.refused(why);
        let (status, code) = match why {
            Refusal::RequestTimeout => (StatusCode::GATEWAY_TIMEOUT, Code::DeadlineExceeded),
            Refusal::Requests => (StatusCode::SERVICE_UNAVAILABLE, Code::ResourceExhausted),
            Refusal::Malformed => (StatusCode::NOT_IMPLEMENTED, Code::Unavailable),
            _ => (StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable),
        };
        if self.head.is_grpc {
            // A caller that has gone hears nothing.
            let _gone = self.respond.send_response(grpc::refusal(code, text), true);
            return Class::Refused;
        }
        let mut response = Response::new(());
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        response.headers_mut().insert(REFUSED, HeaderValue::from_static(why.word()));
        if let Ok(mut sink) = self.respond.send_response(response, false) {
            let _gone = sink.send_data(Bytes::from(format!("{text}\n")), true);
        }
        Class::Refused
    }

    fn request(&self) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = self.head.method.clone();
        *request.uri_mut() = self.head.uri.clone();
        *request.headers_mut() = self.head.headers.clone();
        *request.version_mut() = http::Version::HTTP_2;
        request
    }

    /// The next try has less time than the first had.
    fn shorten_deadline(&mut self) {
        if let Some(deadline) = self.deadline.filter(|_| self.head.headers.contains_key(grpc::TIMEOUT)) {
            let left = deadline.saturating_duration_since(Instant::now());
            self.head.headers.insert(HeaderName::from_static(grpc::TIMEOUT), grpc::timeout_value(left));
        }
    }

    fn hash(&self) -> Option<u64> {
        let value = self.head.headers.get(self.rules.hash_header.as_deref()?)?;
        let mut hasher = DefaultHasher::new();
        value.as_bytes().hash(&mut hasher);
        Some(hasher.finish())
    }
}

/// How much of a call may have been taken up by an endpoint that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Nothing,
    /// The endpoint says that it has not begun it.
    Refused,
    All,
}

type Upload<'a> = Pin<Box<dyn Future<Output = Result<(), BodyError>> + Send + 'a>>;

/// Ends when the upload does; without one, never.
async fn advance(upload: &mut Option<Upload<'_>>) -> Result<(), BodyError> {
    match upload {
        Some(upload) => upload.await,
        None => std::future::pending().await,
    }
}

/// What a call that ended without an answer says of the endpoint. A stream of ours that a GOAWAY ends was above the last
/// that the endpoint has begun; those below it go on.
fn read(error: &h2::Error) -> (Outcome, Sent) {
    if error.is_go_away() && error.is_remote() {
        return (Outcome::Cancelled, Sent::Refused);
    }
    match error.reason() {
        Some(Reason::REFUSED_STREAM) if error.is_remote() => (Outcome::Overloaded, Sent::Refused),
        _ => (Outcome::Failure, Sent::All),
    }
}

/// An answer on its way to the caller.
struct Passing<'a> {
    route: &'a Route,
    respond: &'a mut SendResponse<Bytes>,
    deadline: Option<Instant>,
    is_grpc: bool,
}

impl Passing<'_> {
    async fn run(
        self,
        mut pick: Pick,
        answer: Response<RecvStream>,
        mut upload: Option<Upload<'_>>,
        took: Duration,
    ) -> Class {
        let (parts, mut source) = answer.into_parts();
        pick.first_byte(clock::monotonic(), took);
        let by_head = self.by_head(parts.status, &parts.headers);
        let is_end = source.is_end_stream();
        let head = Response::from_parts(parts, ());
        let Ok(mut sink) = self.respond.send_response(head, is_end) else {
            return self.over(pick, Outcome::Cancelled, Class::Cut, took);
        };
        if is_end {
            let (outcome, class) = by_head.unwrap_or((Outcome::Failure, Class::ServerError));
            return self.over(pick, outcome, class, took);
        }
        let until = self.deadline.unwrap_or_else(|| Instant::now() + FAR);
        let passed = {
            let mut passing = std::pin::pin!(pass(&mut source, &mut sink));
            loop {
                tokio::select! {
                    biased;
                    passed = &mut passing => break Some(passed),
                    // How it ends matters no more: the answer has begun.
                    _ended = advance(&mut upload) => upload = None,
                    () = sleep_until(until) => break None,
                }
            }
        };
        match passed {
            Some(Ok(trailers)) => {
                let by_trailers = trailers.as_ref().filter(|_| self.is_grpc).and_then(grpc::outcome);
                // gRPC without a status is broken, whatever HTTP says.
                let (outcome, class) =
                    by_trailers.or(by_head).unwrap_or((Outcome::Failure, Class::ServerError));
                self.over(pick, outcome, class, took)
            }
            Some(Err(error @ BodyError::Source(_))) => {
                sink.send_reset(error.reason());
                self.over(pick, Outcome::Failure, Class::Cut, took)
            }
            Some(Err(BodyError::Sink(_))) => self.over(pick, Outcome::Cancelled, Class::Cut, took),
            None => {
                sink.send_reset(Reason::CANCEL);
                self.route.meter.refused(Refusal::RequestTimeout);
                self.over(pick, Outcome::Cancelled, Class::Cut, took)
            }
        }
    }

    /// What the head alone says; of gRPC only an answer that is nothing but a head.
    fn by_head(&self, status: StatusCode, headers: &HeaderMap) -> Option<(Outcome, Class)> {
        if self.is_grpc && status == StatusCode::OK {
            return grpc::outcome(headers);
        }
        let outcome = match status.as_u16() {
            429 => Outcome::Overloaded,
            500.. => Outcome::Failure,
            _ => Outcome::Success,
        };
        Some((outcome, Class::of_http(status.as_u16())))
    }

    fn over(&self, mut pick: Pick, outcome: Outcome, class: Class, took: Duration) -> Class {
        pick.finish(clock::monotonic(), outcome, took);
        self.route.meter.tried(pick.endpoint().key, outcome == Outcome::Failure);
        class
    }
}

/// Doing it twice is the same as doing it once (RFC 9110 section 9.2.2).
fn may_repeat(method: &Method) -> bool {
    [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE, Method::PUT, Method::DELETE].contains(method)
}

/// Continues the caller's trace, or begins one.
fn trace(headers: &mut HeaderMap) -> Trace {
    let fresh = Trace::random(&mut rand::rng());
    let known = headers.get(TRACEPARENT).and_then(|value| Trace::parse(value.as_bytes()));
    let trace = known.map_or(fresh, |known| known.continued(fresh));
    if let Ok(value) = HeaderValue::from_bytes(&trace.value()) {
        headers.insert(TRACEPARENT, value);
    }
    trace
}

/// With an authority, which the next hop must have: the caller's, else its Host, else the service's name.
fn absolute(uri: Uri, headers: &HeaderMap, service: &str) -> Uri {
    if uri.authority().is_some() && uri.scheme().is_some() {
        return uri;
    }
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or(service);
    let mut parts = uri.into_parts();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = parts.authority.or_else(|| host.parse::<Authority>().ok());
    parts.authority = parts.authority.or_else(|| Some(Authority::from_static("localhost")));
    parts.path_and_query = parts.path_and_query.or_else(|| Some(PathAndQuery::from_static("/")));
    Uri::from_parts(parts).expect("it has all three")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_continued_or_begun() {
        let caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let mut headers = HeaderMap::from_iter([(TRACEPARENT, HeaderValue::from_static(caller))]);
        let known = trace(&mut headers);
        assert_eq!(known.parent, Some([0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31]));
        let sent = Trace::parse(headers[TRACEPARENT].as_bytes()).unwrap();
        assert_eq!(
            (sent.id, sent.span, sent.flags),
            (known.id, known.span, 1),
            "ours is the callee's parent"
        );
        assert_eq!(format!("{:032x}", u128::from_be_bytes(sent.id)), caller[3..35]);
        assert_eq!(headers.get_all(TRACEPARENT).iter().count(), 1);
        let mut none = HeaderMap::new();
        let begun = trace(&mut none);
        assert_eq!(
            (begun.parent, Trace::parse(none[TRACEPARENT].as_bytes()).map(|sent| sent.id)),
            (None, Some(begun.id))
        );
    }
}
