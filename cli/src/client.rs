//! A person's way to the hub: any member will do, so the addresses are tried in random order, and a member that is
//! away or knows no leader is passed over. Writes carry a request id, which makes a second try of the same one
//! safe: it takes effect once. What is still unknown at the end is said to be unknown.

use std::error::Error as _;
use std::future::Future;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use nave_proto::pb;
use nave_proto::pb::cluster_service_client::ClusterServiceClient;
use nave_proto::pb::event_service_client::EventServiceClient;
use nave_proto::pb::host_service_client::HostServiceClient;
use nave_proto::pb::service_service_client::ServiceServiceClient;
use nave_tls::ConnectError;
use rand::Rng as _;
use rand::seq::SliceRandom as _;
use tokio::time::Instant;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use crate::context::{self, Context};
use crate::failure::{Exit, Failure};
use crate::{out, tls};

/// What a member is told to answer within; it takes four fifths of it to find a leader, more than an election takes.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// One try of one call, when even that brings no answer.
const TRY_TIMEOUT: Duration = Duration::from_millis(3500);
/// No new round over the members begins after this. A new leader is there within 1.5 s of the death of the old.
const ROUNDS_FOR: Duration = Duration::from_secs(3);
const PAUSE_BETWEEN_ROUNDS: Duration = Duration::from_millis(100);

/// Sends `grpc-timeout` with every call, so that a member says in time that it cannot decide.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline;

impl Interceptor for Deadline {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.set_timeout(CALL_TIMEOUT);
        Ok(request)
    }
}

type Way = InterceptedService<Channel, Deadline>;

/// One member, as a verb speaks to it.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) services: ServiceServiceClient<Way>,
    pub(crate) hosts: HostServiceClient<Way>,
    pub(crate) events: EventServiceClient<Way>,
    pub(crate) cluster: ClusterServiceClient<Way>,
}

impl Member {
    fn new(channel: Channel) -> Self {
        let way = InterceptedService::new(channel, Deadline);
        Self {
            services: ServiceServiceClient::new(way.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            hosts: HostServiceClient::new(way.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            events: EventServiceClient::new(way.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            cluster: ClusterServiceClient::new(way),
        }
    }
}

/// A listing of some ten thousand services with their manifests still fits.
const MESSAGE_BYTES_MAX: usize = 256 * 1024 * 1024;

/// All members of a client file.
#[derive(Debug)]
pub(crate) struct Hub {
    context: Context,
    /// In the order in which they are tried.
    members: Vec<(String, Member)>,
    /// Index of the one that answered last.
    current: AtomicUsize,
    client_id: String,
    serial: AtomicU64,
}

/// What went wrong at one address.
#[derive(Debug)]
struct Miss {
    address: String,
    status: Status,
    /// The request has certainly not been seen by this member.
    unsent: bool,
}

impl Hub {
    /// Needs a tokio runtime; connects to nothing yet.
    pub(crate) fn new(context: Context) -> Result<Self, Failure> {
        let credentials = tls::operator(&context)?;
        let mut members: Vec<_> = context
            .addresses
            .iter()
            .map(|address| (address.clone(), Member::new(tls::member_channel(address, &credentials))))
            .collect();
        members.shuffle(&mut rand::rng());
        let client_id = format!("cli-{:032x}", rand::rng().random::<u128>());
        Ok(Self { context, members, current: AtomicUsize::new(0), client_id, serial: AtomicU64::new(1) })
    }

    pub(crate) fn context(&self) -> &Context {
        &self.context
    }

    /// The id of one write, for all its tries.
    pub(crate) fn request_id(&self) -> pb::RequestId {
        pb::RequestId {
            client_id: self.client_id.clone(),
            serial: self.serial.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// The member that answered last, or the first to be tried; for streams, which are resumed by their reader.
    pub(crate) fn member(&self) -> Member {
        self.members[self.current.load(Ordering::Relaxed)].1.clone()
    }

    /// The next [`Hub::member`] is another one.
    pub(crate) fn pass_over(&self) {
        let next = (self.current.load(Ordering::Relaxed) + 1) % self.members.len();
        self.current.store(next, Ordering::Relaxed);
    }

    /// A read, from whichever member answers.
    pub(crate) async fn read<T, F>(&self, call: impl Fn(Member) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.try_call(call).await.map_err(|error| self.explain(error, Kind::Read))
    }

    /// A read with the refusal still a status, for those who look at its code.
    pub(crate) async fn read_status<T, F>(
        &self,
        call: impl Fn(Member) -> F,
    ) -> Result<Result<T, Status>, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        match self.try_call(call).await {
            Ok(answer) => Ok(Ok(answer)),
            Err(CallError::Refused(status)) => Ok(Err(status)),
            Err(error) => Err(self.explain(error, Kind::Read)),
        }
    }

    /// A write that carries a request id or may be made twice without harm.
    pub(crate) async fn write<T, F>(&self, call: impl Fn(Member) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.try_call(call).await.map_err(|error| self.explain(error, Kind::Write))
    }

    /// A write with the refusal still a status.
    pub(crate) async fn write_status<T, F>(
        &self,
        call: impl Fn(Member) -> F,
    ) -> Result<Result<T, Status>, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        match self.try_call(call).await {
            Ok(answer) => Ok(Ok(answer)),
            Err(CallError::Refused(status)) => Ok(Err(status)),
            Err(error) => Err(self.explain(error, Kind::Write)),
        }
    }

    async fn try_call<T, F>(&self, call: impl Fn(Member) -> F) -> Result<T, CallError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let begun = Instant::now();
        let first = self.current.load(Ordering::Relaxed);
        let mut unsure = false;
        loop {
            let mut misses = Vec::new();
            for step in 0..self.members.len() {
                let index = (first + step) % self.members.len();
                let (address, member) = &self.members[index];
                let status = match tokio::time::timeout(TRY_TIMEOUT, call(member.clone())).await {
                    Ok(Ok(answer)) => {
                        self.current.store(index, Ordering::Relaxed);
                        return Ok(answer.into_inner());
                    }
                    Ok(Err(status)) => status,
                    Err(_) => {
                        Status::deadline_exceeded(format!("no answer within {} s", TRY_TIMEOUT.as_secs()))
                    }
                };
                if !passes_over(&status) {
                    self.current.store(index, Ordering::Relaxed);
                    return Err(CallError::Refused(status));
                }
                let unsent = never_sent(&status);
                unsure |= !unsent && !said_not_done(&status);
                misses.push(Miss { address: address.clone(), status, unsent });
            }
            let none_there = misses.iter().all(|miss| miss.unsent);
            if none_there || begun.elapsed() >= ROUNDS_FOR {
                return Err(CallError::Nowhere { misses, unsure });
            }
            tokio::time::sleep(PAUSE_BETWEEN_ROUNDS).await;
        }
    }

    fn explain(&self, error: CallError, kind: Kind) -> Failure {
        match error {
            CallError::Refused(status) => Failure::from_status(&status),
            CallError::Nowhere { misses, unsure } => {
                let none_there = misses.iter().all(|miss| miss.unsent);
                let what = match (none_there, kind, unsure) {
                    (true, ..) => "no member of the cluster can be reached",
                    (false, Kind::Read, _) => "no member of the cluster can answer now",
                    (false, Kind::Write, false) => "nothing was changed: the hub cannot decide now",
                    (false, Kind::Write, true) => "the outcome is unknown: it may or may not have been done",
                };
                let next = match none_there {
                    true => format!("is it running? The addresses come from {}", self.context.path.display()),
                    false => "`nave cluster status` shows the members; a hub needs more than half of them"
                        .to_owned(),
                };
                Failure::new(Exit::Unknown, what)
                    .details(misses.iter().map(|miss| format!("{}: {}", miss.address, reason(&miss.status))))
                    .next(next)
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
}

/// Why a call has no answer.
#[derive(Debug)]
enum CallError {
    /// A member has answered: no.
    Refused(Status),
    /// No member could.
    Nowhere { misses: Vec<Miss>, unsure: bool },
}

/// Another member may do better.
pub(crate) fn passes_over(status: &Status) -> bool {
    match status.code() {
        // Cancelled is what tonic says when the time for the call is up.
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => true,
        // A connection that broke under the call; tonic has no better code for it.
        Code::Unknown | Code::Internal => of_transport(status),
        _ => false,
    }
}

/// The connection could not be made, so nothing was asked.
fn never_sent(status: &Status) -> bool {
    nave_tls::connect_error(status).is_some()
}

/// The member itself says that nothing was done; a broken connection says nothing.
fn said_not_done(status: &Status) -> bool {
    status.code() == Code::Unavailable && !of_transport(status)
}

fn of_transport(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<tonic::transport::Error>() || error.is::<std::io::Error>() {
            return true;
        }
        source = error.source();
    }
    status.source().is_some()
}

/// The cause that helps: `connection refused` rather than `transport error`.
pub(crate) fn reason(status: &Status) -> String {
    match nave_tls::connect_error(status) {
        Some(ConnectError::Unreachable { source, .. } | ConnectError::Handshake { source, .. }) => {
            context::plain(source)
        }
        Some(ConnectError::Timeout { after, .. }) => format!("no answer within {} s", after.as_secs()),
        Some(ConnectError::Refused { refusal, .. }) => refusal.to_string(),
        Some(other) => other.to_string(),
        None if of_transport(status) => "the connection broke".to_owned(),
        None => status.message().to_owned(),
    }
}

/// A note on stderr when the answer may be old because the member has no leader.
pub(crate) fn note_age(freshness: Option<&pb::Freshness>) {
    if let Some(text) = freshness.and_then(age_note) {
        out::note(text);
    }
}

fn age_note(freshness: &pb::Freshness) -> Option<String> {
    if freshness.linearizable || freshness.has_leader {
        return None;
    }
    let seconds = freshness.age_ms / 1000;
    Some(format!("this answer is {seconds} s old; there is no leader (asked {})", freshness.member))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_without_a_leader_is_marked() {
        let mut freshness = pb::Freshness { age_ms: 12_345, member: "member-2".into(), ..Default::default() };
        assert_eq!(
            age_note(&freshness).as_deref(),
            Some("this answer is 12 s old; there is no leader (asked member-2)")
        );
        freshness.has_leader = true;
        assert_eq!(age_note(&freshness), None);
    }

    #[test]
    fn refusals_end_the_search_and_absence_does_not() {
        assert!(passes_over(&Status::unavailable("no leader")));
        assert!(passes_over(&Status::deadline_exceeded("unknown")));
        for status in [Status::not_found("x"), Status::invalid_argument("x"), Status::unknown("x")] {
            assert!(!passes_over(&status), "{status:?}");
        }
    }

    #[test]
    fn only_a_failed_connection_is_certainly_unsent() {
        let refused = ConnectError::Unreachable {
            address: "a:1".to_owned(),
            source: std::io::Error::from(std::io::ErrorKind::ConnectionRefused),
        };
        let refused = Status::from_error(Box::new(refused));
        assert!(never_sent(&refused));
        assert_eq!(reason(&refused), "connection refused");
        let broken = Status::from_error(Box::new(std::io::Error::from(std::io::ErrorKind::BrokenPipe)));
        assert!(!never_sent(&broken) && !said_not_done(&broken));
        assert!(!never_sent(&Status::unavailable("no leader")));
        assert!(said_not_done(&Status::unavailable("no leader")));
        assert!(!said_not_done(&Status::deadline_exceeded("no quorum in time")));
    }
}
