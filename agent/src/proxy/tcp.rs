//! The engine for TCP: bytes both ways, each way closed when its source is, so that a protocol that half-closes works.
//! A buffer is small until a stream shows that it carries much: thousands of quiet connections cost little.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use nave_agent_core::balancer::Outcome;
use nave_tls::TlsConnection;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};
use tracing::{debug, warn};

use super::dial::dial;
use super::meter::{Class, Refusal};
use super::route::{Caller, Route};
use super::tries::Tries;
use super::wire::Wire;
use crate::clock;

/// A buffer, and after how many bytes the next size pays.
const SIZES: [(usize, u64); 3] = [(1024, 128 * 1024), (16 * 1024, 10 * 1024 * 1024), (128 * 1024, u64::MAX)];

/// Whose fault the end of a stream was.
#[derive(Debug)]
enum End {
    /// Both have closed.
    Whole,
    Caller,
    Endpoint,
    Idle,
}

/// Serves one connection to its end.
pub(crate) async fn serve(route: Arc<Route>, caller_stream: TcpStream, caller: Caller) {
    let meter = route.meter.caller(&caller);
    let begun = Instant::now();
    let mut tries = Tries::default();
    let dialled = tokio::select! {
        dialled = dial(&route, &caller, &mut tries, None, None) => dialled,
        () = gone(&caller_stream) => return meter.request(Class::Cut, begun.elapsed()),
    };
    let mut dialled = match dialled {
        Ok(dialled) => dialled,
        Err(end) => {
            route.meter.refused(Refusal::NoEndpoint);
            meter.request(Class::Refused, begun.elapsed());
            warn!(service = %route.service, "{}", tries.explain(&route, Some(end)));
            return;
        }
    };
    dialled.pick.first_byte(clock::monotonic(), dialled.took);
    let carried = Carried::default();
    let idle = route.rules().idle_timeout;
    let caller_ends = caller_stream.into_split();
    let end = match dialled.stream {
        Wire::Local(stream) => carry(caller_ends, stream.into_split(), &carried, idle).await,
        Wire::Peer(stream) => carry(caller_ends, tokio::io::split(*stream), &carried, idle).await,
    };
    let (outcome, class) = match end {
        End::Whole => (Outcome::Success, Class::Success),
        End::Endpoint => (Outcome::Failure, Class::Cut),
        End::Caller => (Outcome::Cancelled, Class::Cut),
        End::Idle => {
            route.meter.refused(Refusal::Idle);
            (Outcome::Cancelled, Class::Cut)
        }
    };
    dialled.pick.finish(clock::monotonic(), outcome, dialled.took);
    route.meter.tried(dialled.pick.endpoint().key, outcome == Outcome::Failure);
    let (to_endpoint, to_caller) = (carried.to_endpoint.load(Relaxed), carried.to_caller.load(Relaxed));
    meter.bytes(to_endpoint, to_caller);
    meter.request(class, begun.elapsed());
    if route.rules().access_log {
        let (service, port, instance) = (&route.service, &route.port, dialled.pick.endpoint().key.instance);
        let took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let line = serde_json::json!({
            "port": **port,
            "caller": caller.to_string(),
            "instance": instance.to_string(),
            "class": class.word(),
            "to_endpoint": to_endpoint,
            "to_caller": to_caller,
            "took_ms": took_ms,
            "retries": tries.len(),
        });
        route.records.access.write(service, line.to_string());
    }
    debug!(service = %route.service, ?end, "connection");
}

/// The caller has reset the connection. One that has only closed its sending side still waits for an answer.
async fn gone(stream: &TcpStream) {
    let mut byte = [0];
    loop {
        match stream.peek(&mut byte).await {
            Err(_) => return,
            // Bytes or the end are there and stay there: nothing more can be learnt without taking them.
            Ok(_) => std::future::pending().await,
        }
    }
}

/// Bytes so far.
#[derive(Debug, Default)]
struct Carried {
    to_endpoint: AtomicU64,
    to_caller: AtomicU64,
}

impl Carried {
    fn sum(&self) -> u64 {
        self.to_endpoint.load(Relaxed).wrapping_add(self.to_caller.load(Relaxed))
    }
}

/// A stream that another host's agent has sent here; it counts the bytes, and judges.
pub(crate) async fn carry_for_peer(peer: TlsConnection, endpoint: TcpStream, idle: Duration) -> Outcome {
    match carry(tokio::io::split(peer), endpoint.into_split(), &Carried::default(), idle).await {
        End::Endpoint => Outcome::Failure,
        End::Whole | End::Caller | End::Idle => Outcome::Cancelled,
    }
}

/// `caller` and `endpoint`: where each is read and where it is written.
async fn carry<CR, CW, ER, EW>(caller: (CR, CW), endpoint: (ER, EW), carried: &Carried, idle: Duration) -> End
where
    CR: AsyncRead + Unpin,
    CW: AsyncWrite + Unpin,
    ER: AsyncRead + Unpin,
    EW: AsyncWrite + Unpin,
{
    let there = one_way(caller.0, endpoint.1, &carried.to_endpoint, (End::Caller, End::Endpoint));
    let back = one_way(endpoint.0, caller.1, &carried.to_caller, (End::Endpoint, End::Caller));
    tokio::select! {
        ends = async { tokio::try_join!(there, back) } => match ends {
            Ok(_) => End::Whole,
            Err(end) => end,
        },
        () = until_idle(carried, idle) => End::Idle,
    }
}

/// `ends`: what an error of the reading and of the writing side means.
async fn one_way(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    count: &AtomicU64,
    ends: (End, End),
) -> Result<(), End> {
    let (reading, writing) = ends;
    let mut sizes = SIZES.iter();
    let (mut size, mut until) = *sizes.next().expect("there are three");
    let mut buffer = vec![0; size];
    let mut total: u64 = 0;
    loop {
        let length = match from.read(&mut buffer).await {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) => return said(&error, reading),
        };
        let written = async {
            to.write_all(&buffer[..length]).await?;
            // Under TLS what was written may wait for the socket; otherwise this is nothing.
            to.flush().await
        };
        if let Err(error) = written.await {
            return said(&error, writing);
        }
        total = total.saturating_add(length as u64);
        count.store(total, Relaxed);
        if total >= until {
            (size, until) = *sizes.next().expect("the last size has no bound");
            buffer = vec![0; size];
        }
    }
    match to.shutdown().await {
        // The other side has closed both already.
        Err(error) if error.kind() != io::ErrorKind::NotConnected => said(&error, writing),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn said(error: &io::Error, end: End) -> Result<(), End> {
    debug!(%error, ?end, "a stream broke");
    Err(end)
}

/// Returns when no byte has passed for so long.
async fn until_idle(carried: &Carried, idle: Duration) {
    let mut before = carried.sum();
    loop {
        sleep(idle).await;
        let now = carried.sum();
        if now == before {
            return;
        }
        before = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nave_agent_core::balancer::{BalancerSettings, EndpointKey, EndpointSpec, Reach};
    use nave_agent_core::directory::{EndpointState, PortRules, Protocol};
    use nave_proto::ids::InstanceId;
    use std::net::SocketAddr;
    use tokio::net::TcpListener;
    use tokio::task::JoinSet;

    async fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    fn route(endpoints: &[SocketAddr], rules: PortRules) -> Arc<Route> {
        let settings = BalancerSettings::default();
        let route = Route::new("db".into(), "tcp".into(), Protocol::Tcp, rules, settings);
        let spec = |(instance, address): (u64, &SocketAddr)| EndpointSpec {
            key: EndpointKey { instance: InstanceId(instance), epoch: 1 },
            reach: Reach::Local(*address),
            state: EndpointState::Ready,
            weight: 1,
        };
        route.update((1..).zip(endpoints).map(spec).collect());
        Arc::new(route)
    }

    /// A caller's end of a connection that is served.
    async fn call(route: &Arc<Route>, tasks: &mut JoinSet<()>) -> TcpStream {
        let (listener, address) = listener().await;
        let (caller, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        tasks.spawn(serve(route.clone(), accepted.unwrap().0, Caller::Unknown));
        caller.unwrap()
    }

    #[tokio::test]
    async fn half_a_close_lets_the_answer_through_and_large_streams_arrive_whole() {
        let (endpoint, address) = listener().await;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let (mut stream, _) = endpoint.accept().await.unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.unwrap();
            all.reverse();
            stream.write_all(&all).await.unwrap();
        });
        let route = route(&[address], PortRules::default());
        let mut caller = call(&route, &mut tasks).await;
        let sent: Vec<u8> = (0..12_000_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        caller.write_all(&sent).await.unwrap();
        caller.shutdown().await.unwrap();
        let mut answer = Vec::new();
        caller.read_to_end(&mut answer).await.unwrap();
        answer.reverse();
        assert!(answer == sent, "{} bytes of {}", answer.len(), sent.len());
        while tasks.join_next().await.is_some() {}
        assert_eq!(route.balancer.in_flight(InstanceId(1)), 0);
    }

    #[tokio::test]
    async fn one_that_refuses_is_passed_over_and_avoided() {
        let (endpoint, address) = listener().await;
        let (closed, refusing) = listener().await;
        drop(closed);
        let route = route(&[refusing, address], PortRules::default());
        let mut tasks = JoinSet::new();
        for _ in 0..40 {
            let mut caller = call(&route, &mut tasks).await;
            let (mut stream, _) = endpoint.accept().await.unwrap();
            stream.write_all(b"hello").await.unwrap();
            drop(stream);
            let mut answer = String::new();
            caller.read_to_string(&mut answer).await.unwrap();
            assert_eq!(answer, "hello");
        }
        let view = route.balancer.view(clock::monotonic());
        assert!(
            view[0].rtt > view[1].rtt.map(|rtt| rtt * 10),
            "one refusal is enough to be avoided: {view:?}"
        );
    }

    #[tokio::test]
    async fn a_quiet_stream_ends_after_its_time_and_a_service_without_instances_in_bounded_time() {
        let (endpoint, address) = listener().await;
        let rules = PortRules {
            idle_timeout: Duration::from_millis(50),
            pending_timeout: Duration::from_millis(50),
            ..PortRules::default()
        };
        let mut tasks = JoinSet::new();
        let quiet = route(&[address], rules.clone());
        let mut caller = call(&quiet, &mut tasks).await;
        let _held = endpoint.accept().await.unwrap();
        assert!(matches!(caller.read(&mut [0]).await, Ok(0) | Err(_)));
        let nobody = route(&[], rules);
        let mut caller = call(&nobody, &mut tasks).await;
        assert!(matches!(caller.read(&mut [0]).await, Ok(0) | Err(_)));
        while tasks.join_next().await.is_some() {}
    }
}
