//! One request, until it is answered: choose an endpoint, send, and pass the answer on; or, as long as that is safe and
//! nothing of an answer has gone to the caller, try another.
//!
//! Sent again is what was never sent (nobody answered the connection), what may be sent twice (RFC 9110 section 9.2.2)
//! and was answered by nothing or by 502, 503 or 504; each within the port's budget of retries, and only while the body
//! is still at hand.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Buf as _;
use nave_agent_core::balancer::{Ask, EndpointKey, NoPick, Outcome, Pick, Reach};
use nave_agent_core::directory::PortRules;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout};

use super::connection::{After, Calling, Client};
use super::framing::{Body, Framing};
use super::passing::{Fault, Passing, Patience, ReceiveFault, STALL_TIMEOUT};
use super::receiver::Receiver;
use super::refusal::Refusal;
use super::replay::Replay;
use super::request::Request;
use super::response::{Response, Returning, response};
use super::sender::{Sender, Taken};
use super::upstream::Upstream;
use crate::proxy::dial::{connect, unreached};
use crate::proxy::meter::{Class, Refusal as Why};
use crate::proxy::records::Call;
use crate::proxy::route::Route;
use crate::proxy::spans::Name;
use crate::proxy::to::{TO, To};
use crate::proxy::tries::Tries;
use crate::proxy::wire::Wire;

/// How long an endpoint may take to begin its answer when the port sets no time of its own: an endpoint that takes a
/// connection and says nothing must not hold its caller for ever.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// While a connection is being made, whether another has come free.
const LOOK_FOR_FREE_EVERY: Duration = Duration::from_millis(20);
/// A response's head.
const RESPONSE_HEAD_BYTES_MAX: usize = 128 * 1024;

/// Switching Protocols.
const SWITCHED: u16 = 101;

/// A caller's connection.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

/// What one try came to.
#[derive(Debug)]
enum Tried {
    /// The answer was passed on, whole.
    Answered(Answered),
    /// Nothing has been said to the caller.
    Failed(Failure),
    /// The caller's connection is of no more use: it has gone, or part of an answer has been passed on.
    Broken(Outcome),
}

#[derive(Debug)]
struct Answered {
    status: u16,
    reusable: bool,
    /// The caller's connection can carry on.
    after: After,
}

#[derive(Debug)]
struct Failure {
    refusal: Refusal,
    outcome: Outcome,
    /// Sending the request again cannot do twice what should be done once, whatever it is.
    safe: bool,
    /// A connection that had carried requests before ended under this one. It may have been about to: that says nothing
    /// of the endpoint, which may be asked again on a new one.
    stale: bool,
}

/// What one try shows beside its end.
#[derive(Debug, Default)]
struct Learnt {
    /// From its beginning to the head of its answer.
    first_byte: Option<Duration>,
    /// Who is to be asked instead.
    next: Option<Pick>,
}

/// One request on its way.
#[derive(Debug)]
pub(super) struct Exchange<'a> {
    route: &'a Route,
    rules: &'a PortRules,
    calling: &'a Calling,
    request: Request,
    /// The next hop's head; what was taken of the body is put behind it.
    outgoing: &'a mut Vec<u8>,
    head_bytes: usize,
    /// The caller's connection goes on afterwards, if the answer allows it.
    keep_alive: bool,
    begun: Instant,
    tries: Tries,
    tried_at: Instant,
    /// Of this try, from its beginning to the head of its answer.
    first_byte: Option<Duration>,
    /// Who is asked next, when that had to be known before.
    next: Option<Pick>,
    retries_max: usize,
    /// It comes from another agent, which has chosen the endpoint and tries others itself.
    given: bool,
    /// On whose old connection a try has failed. From then on only new ones are used.
    stale: Option<EndpointKey>,
}

impl<'a> Exchange<'a> {
    pub(super) fn new(
        route: &'a Route,
        rules: &'a PortRules,
        calling: &'a Calling,
        request: Request,
        outgoing: &'a mut Vec<u8>,
        keep_alive: bool,
    ) -> Self {
        let (now, tries) = (Instant::now(), Tries::default());
        Self {
            route,
            rules,
            calling,
            request,
            outgoing,
            head_bytes: 0,
            keep_alive,
            begun: now,
            tries,
            tried_at: now,
            first_byte: None,
            next: None,
            retries_max: usize::try_from(rules.retries_max).unwrap_or(usize::MAX),
            given: false,
            stale: None,
        }
    }

    /// For one that another host's balancer has sent to this endpoint; whether to try again is for that host to say.
    pub(super) fn given(
        route: &'a Route,
        rules: &'a PortRules,
        calling: &'a Calling,
        request: Request,
        outgoing: &'a mut Vec<u8>,
        keep_alive: bool,
        pick: Pick,
    ) -> Self {
        let balanced = Self::new(route, rules, calling, request, outgoing, keep_alive);
        Self { next: Some(pick), retries_max: 0, given: true, ..balanced }
    }

    pub(super) async fn run<S: Stream>(mut self, client: &mut Client<S>) -> After {
        self.head_bytes = self.outgoing.len();
        let mut taken =
            Taken { body: Body::new(self.request.framing), replay: Replay::new(self.rules.replay_bytes_max) };
        if let Err(bad) = self.take_first(client, &mut taken) {
            return self.refuse(client, &Refusal::bad_body(bad), false).await;
        }
        let Some(_place) = self.route.request() else {
            let text = format!(
                "nave: {} has {} requests under way from this host",
                self.route.service, self.rules.requests_max
            );
            return self.refuse(client, &Refusal::new(503, Why::Requests, text), taken.body.is_done()).await;
        };
        self.calling.budget.request(crate::clock::monotonic());
        loop {
            let mut pick = match self.pick().await {
                Ok(pick) => pick,
                Err(none) => {
                    let refusal =
                        Refusal::new(503, Why::NoEndpoint, self.tries.explain(self.route, Some(none)));
                    return self.refuse(client, &refusal, taken.body.is_done()).await;
                }
            };
            let failure = match self.attempt(client, &mut pick, &mut taken).await {
                Tried::Answered(answered) => {
                    let class = Class::of_http(answered.status);
                    self.ended(&mut pick, outcome(answered.status), class);
                    return answered.after;
                }
                Tried::Broken(outcome) => {
                    self.ended(&mut pick, outcome, Class::Cut);
                    return After::Cut;
                }
                Tried::Failed(failure) => failure,
            };
            self.tried(&mut pick, failure.outcome);
            self.tries.add(pick.endpoint(), &failure.refusal.text, failure.safe);
            if failure.stale {
                self.stale = Some(pick.endpoint().key);
            }
            drop(pick);
            if self.next.is_none() && !self.may_retry(&failure, &taken) {
                let text = self.tries.explain(self.route, None);
                let refusal = Refusal { text, not_processed: self.given && failure.safe, ..failure.refusal };
                return self.refuse(client, &refusal, taken.body.is_done()).await;
            }
            self.route.meter.retried();
            self.outgoing.truncate(self.head_bytes);
            self.outgoing.extend_from_slice(taken.replay.bytes().unwrap_or_default());
        }
    }

    async fn pick(&mut self) -> Result<Pick, NoPick> {
        if let Some(next) = self.next.take() {
            return Ok(next);
        }
        let (hash, deadline) = (self.request.hash, self.deadline());
        let picked = self.route.next(&mut self.tries, hash, deadline).await;
        let Some(stale) = self.stale.filter(|_| matches!(picked, Err(NoPick::AllTried))) else {
            return picked;
        };
        // Nobody else is there, and it, or its agent, may only have been started anew.
        match self.tries.forgive(stale) {
            true => self.route.next(&mut self.tries, hash, deadline).await,
            false => picked,
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.rules.request_timeout.map(|limit| self.begun + limit)
    }

    /// What of the body has come with the head goes on with it, in one write.
    fn take_first<S: Stream>(
        &mut self,
        client: &mut Client<S>,
        taken: &mut Taken,
    ) -> Result<(), super::framing::BadBody> {
        let first = taken.body.take(&client.buffer)?;
        taken.replay.add(&client.buffer[..first]);
        self.outgoing.extend_from_slice(&client.buffer[..first]);
        client.buffer.advance(first);
        Ok(())
    }

    fn may_retry(&self, failure: &Failure, taken: &Taken) -> bool {
        let repeats = failure.stale || failure.outcome != Outcome::Cancelled;
        let again = failure.safe || (self.request.idempotent && repeats);
        again
            && !self.given
            && self.tries.may_go_on(self.retries_max, self.rules.pending_timeout)
            && self.can_repeat(taken)
            // What was never sent costs no endpoint anything, and only one try of a request is made on an old connection.
            && (failure.stale || failure.safe || self.calling.budget.retry(crate::clock::monotonic()))
    }

    fn can_repeat(&self, taken: &Taken) -> bool {
        taken.replay.bytes().is_some() && !self.is_late()
    }

    fn is_late(&self) -> bool {
        self.deadline().is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// One try is over.
    fn tried(&self, pick: &mut Pick, outcome: Outcome) {
        let first_byte = self.first_byte.unwrap_or_else(|| self.tried_at.elapsed());
        pick.finish(crate::clock::monotonic(), outcome, first_byte);
        let failed = matches!(outcome, Outcome::Failure | Outcome::Unreached);
        self.route.meter.tried(pick.endpoint().key, failed);
    }

    /// The request is over, with that try.
    fn ended(&self, pick: &mut Pick, outcome: Outcome, class: Class) {
        self.tried(pick, outcome);
        self.note(class, Some(pick.endpoint().key), self.tries.len());
    }

    fn note(&self, class: Class, endpoint: Option<EndpointKey>, retries: usize) {
        let took = self.begun.elapsed();
        self.calling.meter.request(class, took);
        let (trace, name) = (self.request.trace, Name::of_head(self.outgoing));
        let call = Call { trace, name, endpoint, class, took, retries };
        self.route.records.call(&self.calling.label, self.rules, call);
    }

    /// Says no. The connection goes on only when nothing of the request is left on it.
    async fn refuse<S: Stream>(&self, client: &mut Client<S>, refusal: &Refusal, whole: bool) -> After {
        self.route.meter.refused(refusal.why);
        let tries = self.tries.keys();
        self.note(Class::Refused, tries.last().copied(), tries.len().saturating_sub(1));
        let keep_alive = self.keep_alive && whole;
        client.refuse(refusal, keep_alive, self.request.head_only).await
    }

    async fn attempt<S: Stream>(
        &mut self,
        client: &mut Client<S>,
        pick: &mut Pick,
        taken: &mut Taken,
    ) -> Tried {
        let key = pick.endpoint().key;
        (self.tried_at, self.first_byte) = (Instant::now(), None);
        let mut upstream = match self.connection(pick).await {
            Ok(upstream) => upstream,
            Err(error) => return Tried::Failed(never_sent(unreached(pick.endpoint(), &error), &error)),
        };
        let addressed = upstream.stream.is_peer().then(|| self.addressed(key));
        let mut sender = Sender::new(addressed.as_deref().unwrap_or(self.outgoing));
        let mut passing = Passing::new(client, &mut upstream, &mut sender, taken, self.patience());
        let mut learnt = Learnt::default();
        let tried = self.pass(&mut passing, pick, &mut learnt).await;
        sender.abandon(&mut client.buffer);
        if matches!(&tried, Tried::Answered(answered) if answered.reusable) {
            match pick.endpoint().reach {
                Reach::Local(_) => self.route.idle.give(key, upstream),
                Reach::Remote { host, .. } => self.route.peers.idle.give(host, upstream),
            }
        }
        (self.first_byte, self.next) = (learnt.first_byte, learnt.next);
        tried
    }

    /// What goes to another agent: the same with a line that says for whom.
    fn addressed(&self, endpoint: EndpointKey) -> Vec<u8> {
        let to = To { service: self.route.service.to_string(), port: self.route.port.to_string(), endpoint };
        // Before the empty line that ends the head.
        let (head, body) = self.outgoing.split_at(self.head_bytes - 2);
        [head, format!("{TO}: {to}\r\n").as_bytes(), body].concat()
    }

    async fn connection(&self, pick: &Pick) -> io::Result<Upstream> {
        if let Some(waiting) = self.waiting(pick) {
            return Ok(waiting);
        }
        let stream = match pick.endpoint().reach {
            Reach::Local(address) => return self.opened_or_freed(address, pick).await,
            Reach::Remote { host, .. } => {
                let _turn = self.route.peers.turn(host).await?;
                if let Some(waiting) = self.waiting(pick) {
                    return Ok(waiting);
                }
                Wire::Peer(Box::new(self.route.peers.http1(host).await?))
            }
        };
        Ok(Upstream::new(stream))
    }

    /// A new connection, or one that comes free before: an endpoint whose queue of connections is full still serves
    /// those it has.
    async fn opened_or_freed(&self, address: SocketAddr, pick: &Pick) -> io::Result<Upstream> {
        let connecting = connect(address, self.rules.connect_timeout);
        tokio::pin!(connecting);
        loop {
            match timeout(LOOK_FOR_FREE_EVERY, &mut connecting).await {
                Ok(stream) => return Ok(Upstream::new(Wire::Local(stream?))),
                Err(_) => {
                    if let Some(waiting) = self.waiting(pick) {
                        return Ok(waiting);
                    }
                }
            }
        }
    }

    fn waiting(&self, pick: &Pick) -> Option<Upstream> {
        match pick.endpoint().reach {
            _ if self.stale.is_some() => None,
            Reach::Local(_) => self.route.idle.take(pick.endpoint().key),
            Reach::Remote { host, .. } => self.route.peers.idle.take(host),
        }
    }

    async fn pass<S: Stream>(
        &self,
        passing: &mut Passing<'_, '_, S>,
        pick: &mut Pick,
        learnt: &mut Learnt,
    ) -> Tried {
        let response = match self.answer(passing).await {
            Ok(response) => response,
            Err(tried) => return tried,
        };
        if response.not_processed && passing.upstream.stream.is_peer() {
            let text = format!("its agent answered {} without asking it", response.status);
            let refusal = Refusal::new(503, Why::NoEndpoint, text);
            return Tried::Failed(Failure { refusal, outcome: Outcome::Unreached, safe: true, stale: false });
        }
        let took = self.tried_at.elapsed();
        pick.first_byte(crate::clock::monotonic(), took);
        learnt.first_byte = Some(took);
        if matches!(response.status, 502..=504)
            && let Some(other) = self.other(pick, passing.taken)
        {
            learnt.next = Some(other);
            let text = format!("it answered {}", response.status);
            let refusal = Refusal::new(response.status, Why::NoEndpoint, text);
            return Tried::Failed(Failure { refusal, outcome: Outcome::Failure, safe: false, stale: false });
        }
        self.pass_on(passing, response).await
    }

    /// Who else may be asked, after an answer that says that this endpoint cannot; nobody: that answer is passed on.
    fn other(&self, pick: &Pick, taken: &Taken) -> Option<Pick> {
        let may_follow = self.tries.may_follow_answer(self.retries_max, self.rules.pending_timeout);
        if !self.request.idempotent || !may_follow || !self.can_repeat(taken) {
            return None;
        }
        let tried = [self.tries.keys(), &[pick.endpoint().key]].concat();
        let (now, ask) = (crate::clock::monotonic(), Ask { tried: &tried, hash: self.request.hash });
        let other = self.route.balancer.pick(now, &mut rand::rng(), &ask).ok()?;
        self.calling.budget.retry(now).then_some(other)
    }

    /// Sends, and waits for the head of the answer; what is said before it (1xx) is passed on.
    async fn answer<S: Stream>(&self, passing: &mut Passing<'_, '_, S>) -> Result<Response, Tried> {
        let returning = Returning {
            head_only: self.request.head_only,
            old: self.request.old,
            keep_alive: self.keep_alive,
            upgrade: self.request.upgrade,
        };
        loop {
            passing.client.scratch.clear();
            match response(&passing.upstream.buffer, returning, &mut passing.client.scratch) {
                Ok(Some(response)) if response.is_interim() => {
                    passing.upstream.buffer.advance(response.length);
                    passing.say_interim().await.map_err(|_| Tried::Broken(Outcome::Cancelled))?;
                    continue;
                }
                Ok(Some(response)) => {
                    passing.upstream.buffer.advance(response.length);
                    return Ok(response);
                }
                Ok(None) if passing.upstream.buffer.len() > RESPONSE_HEAD_BYTES_MAX => {
                    return Err(Tried::Failed(nonsense("its head has more than 128 KiB")));
                }
                Ok(None) => {}
                Err(bad) => return Err(Tried::Failed(nonsense(&bad.to_string()))),
            }
            if let Err(fault) = poll_fn(|cx| passing.poll_answer(cx)).await {
                return Err(failed(passing, fault));
            }
        }
    }

    fn patience(&self) -> Patience {
        Patience { whole: self.deadline(), still: self.rules.try_timeout.unwrap_or(ANSWER_TIMEOUT) }
    }

    async fn pass_on<S: Stream>(&self, passing: &mut Passing<'_, '_, S>, response: Response) -> Tried {
        if response.is_switch() {
            return match passing.tunnel(self.rules.idle_timeout).await {
                Ok(()) => {
                    Tried::Answered(Answered { status: SWITCHED, reusable: false, after: After::Close })
                }
                Err(_) => Tried::Broken(Outcome::Cancelled),
            };
        }
        let receiver =
            Receiver::new(response.framing, &mut passing.upstream.buffer, &mut passing.client.scratch);
        let mut receiver = match receiver {
            Ok(receiver) => receiver,
            Err(bad) => return Tried::Failed(nonsense(&bad.to_string())),
        };
        passing.begin_body(STALL_TIMEOUT);
        match poll_fn(|cx| passing.poll_body(cx, &mut receiver)).await {
            Ok(()) => {}
            Err(ReceiveFault::Caller) => return Tried::Broken(Outcome::Cancelled),
            Err(ReceiveFault::Endpoint | ReceiveFault::Late) => {
                return Tried::Broken(Outcome::Failure);
            }
        }
        let sent = passing.is_sent();
        let goes_on = sent && self.keep_alive && response.framing != Framing::UntilClose;
        Tried::Answered(Answered {
            status: response.status,
            reusable: sent && response.reusable && passing.upstream.buffer.is_empty(),
            after: if goes_on { After::Next } else { After::Close },
        })
    }
}

/// What a try comes to that got no answer.
fn failed<S>(passing: &Passing<'_, '_, S>, fault: Fault) -> Tried {
    match fault {
        Fault::Caller => Tried::Broken(Outcome::Cancelled),
        Fault::Body(bad) => Tried::Failed(Failure {
            refusal: Refusal::bad_body(bad),
            outcome: Outcome::Cancelled,
            safe: false,
            stale: false,
        }),
        Fault::Late => Tried::Failed(Failure {
            refusal: Refusal::new(504, Why::RequestTimeout, "it did not answer in time"),
            outcome: Outcome::Failure,
            safe: false,
            stale: false,
        }),
        // An agent closes a connection with a farewell only when it has begun nothing of what came on it.
        Fault::Closed if passing.upstream.stream.is_peer() => Tried::Failed(Failure {
            refusal: Refusal::new(
                503,
                Why::NoEndpoint,
                "its agent closed the connection without beginning it",
            ),
            outcome: Outcome::Cancelled,
            safe: true,
            stale: true,
        }),
        Fault::Closed => ended_early(passing, &io::ErrorKind::UnexpectedEof.into()),
        Fault::Endpoint(error) => ended_early(passing, &error),
    }
}

/// The endpoint's connection ended before its answer.
fn ended_early<S>(passing: &Passing<'_, '_, S>, error: &io::Error) -> Tried {
    // A connection that had waited was closed before the endpoint can have read anything new from it: not known for sure,
    // so only what was never written is safe for any method.
    let safe = !passing.sender.touched;
    let stale = passing.upstream.used;
    let text = match stale {
        true => format!("it closed a waiting connection: {error}"),
        false => format!("it closed the connection without an answer: {error}"),
    };
    let outcome = if stale { Outcome::Cancelled } else { Outcome::Failure };
    Tried::Failed(Failure { refusal: Refusal::new(502, Why::NoEndpoint, text), outcome, safe, stale })
}

/// What the endpoint's answer says of its health.
fn outcome(status: u16) -> Outcome {
    match status {
        429 => Outcome::Overloaded,
        500..=599 => Outcome::Failure,
        _ => Outcome::Success,
    }
}

fn never_sent(outcome: Outcome, error: &io::Error) -> Failure {
    let text = format!("it cannot be reached: {error}");
    Failure { refusal: Refusal::new(503, Why::NoEndpoint, text), outcome, safe: true, stale: false }
}

/// An endpoint that does not speak the port's protocol. It may have done what it was asked.
fn nonsense(why: &str) -> Failure {
    let text = format!("it answered what is no HTTP/1.1: {why}");
    Failure {
        refusal: Refusal::new(502, Why::NoEndpoint, text),
        outcome: Outcome::Failure,
        safe: false,
        stale: false,
    }
}
