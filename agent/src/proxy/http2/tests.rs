//! Calls through the engine, from a real client to real endpoints, both in this process.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use h2::client::SendRequest;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use nave_agent_core::balancer::{BalancerSettings, EndpointKey, EndpointSpec, Reach};
use nave_agent_core::directory::{EndpointState, PortRules, Protocol};
use nave_proto::ids::InstanceId;
use tokio::net::TcpListener;

use super::*;

/// What an endpoint does with each call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Sends the body back, then trailers with this gRPC status.
    Echo(u16),
    /// Only a head, with this gRPC status.
    TrailersOnly(u16),
    /// This HTTP status.
    Status(u16),
    /// Refuses each stream.
    Refuse,
    /// Says that it goes away, and that it has begun nothing.
    GoAway,
    /// Closes the connection when the call has come.
    Hang,
    /// Takes calls, and never answers.
    Silent,
}

#[derive(Debug)]
struct Endpoint {
    address: SocketAddr,
    calls: Arc<AtomicUsize>,
    resets: Arc<AtomicUsize>,
}

fn endpoint(tasks: &mut JoinSet<()>, manner: Manner) -> Endpoint {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let listener = TcpListener::from_std(listener).unwrap();
    let (calls, resets) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let counts = (calls.clone(), resets.clone());
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(connection(stream, manner, counts.clone()));
        }
    });
    Endpoint { address, calls, resets }
}

async fn connection(stream: TcpStream, manner: Manner, counts: (Arc<AtomicUsize>, Arc<AtomicUsize>)) {
    let mut builder = server::Builder::new();
    builder.data_frame_budget(1 << 30);
    let Ok(mut connection) = builder.handshake::<_, Bytes>(stream).await else { return };
    if manner == Manner::GoAway {
        connection.abrupt_shutdown(Reason::NO_ERROR);
        let _said = connection.accept().await;
        // With the socket closed, what was not read would reset it, and take back what was said.
        return std::future::pending().await;
    }
    let mut calls = JoinSet::new();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        counts.0.fetch_add(1, SeqCst);
        match manner {
            Manner::Refuse => respond.send_reset(Reason::REFUSED_STREAM),
            Manner::Hang => return,
            Manner::Silent => {
                let resets = counts.1.clone();
                calls.spawn(async move {
                    let _held = request;
                    let _reset = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
                    resets.fetch_add(1, SeqCst);
                });
            }
            Manner::Status(status) => {
                let response = Response::builder().status(status).body(()).unwrap();
                respond.send_response(response, true).unwrap();
            }
            Manner::TrailersOnly(status) => {
                let response = Response::builder().header("grpc-status", status).body(()).unwrap();
                respond.send_response(response, true).unwrap();
            }
            Manner::Echo(status) => {
                calls.spawn(echo(request.into_body(), respond, status));
            }
            Manner::GoAway => {}
        }
    }
}

async fn echo(mut body: RecvStream, mut respond: server::SendResponse<Bytes>, status: u16) {
    let head = Response::builder().header("content-type", "application/grpc").body(()).unwrap();
    let mut sink = respond.send_response(head, false).unwrap();
    while let Some(Ok(chunk)) = body.data().await {
        if send(&mut sink, chunk.clone()).await.is_err() {
            return;
        }
        body.flow_control().release_capacity(chunk.len()).unwrap();
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", status.into());
    let _gone = sink.send_trailers(trailers);
}

async fn send(sink: &mut SendStream<Bytes>, mut chunk: Bytes) -> Result<(), h2::Error> {
    while !chunk.is_empty() {
        sink.reserve_capacity(chunk.len());
        let room = std::future::poll_fn(|cx| sink.poll_capacity(cx)).await;
        let part = chunk.split_to(room.unwrap_or(Ok(0))?.min(chunk.len()));
        sink.send_data(part, false)?;
    }
    Ok(())
}

struct Scene {
    route: Arc<Route>,
    client: SendRequest<Bytes>,
    drain: CancellationToken,
    tasks: JoinSet<()>,
}

/// A client's connection, served by the engine, before these endpoints.
async fn scene(tasks: JoinSet<()>, endpoints: &[SocketAddr], rules: PortRules) -> Scene {
    let settings = BalancerSettings::default();
    let route = Arc::new(Route::new("api".into(), "grpc".into(), Protocol::Grpc, rules, settings));
    let spec = |(instance, address): (u64, &SocketAddr)| EndpointSpec {
        key: EndpointKey { instance: InstanceId(instance), epoch: 1 },
        reach: Reach::Local(*address),
        state: EndpointState::Ready,
        weight: 1,
    };
    route.update((1..).zip(endpoints).map(spec).collect());
    let drain = CancellationToken::new();
    let mut scene = Scene { route, client: placeholder().await, drain, tasks };
    scene.client = scene.connect().await;
    scene
}

/// A sender of a connection that is never used.
async fn placeholder() -> SendRequest<Bytes> {
    let (near, _far) = tokio::io::duplex(1024);
    h2::client::Builder::new().handshake(near).await.unwrap().0
}

impl Scene {
    async fn connect(&mut self) -> SendRequest<Bytes> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(to), listener.accept());
        let (route, drain) = (self.route.clone(), self.drain.clone());
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(1 << 20).data_frame_budget(1 << 30);
        let (client, driver) = builder.handshake(near.unwrap()).await.unwrap();
        self.tasks.spawn(serve(route, far.unwrap().0, Caller::Unknown, drain));
        self.tasks.spawn(async move {
            let _ended = driver.await;
        });
        client
    }

    async fn call(&mut self, method: &str, body: Bytes) -> Result<Answer, h2::Error> {
        let request = Request::builder().method(method).uri("http://api/say");
        let request = request.header("content-type", "application/grpc").body(()).unwrap();
        answer(&mut self.client, request, body).await
    }
}

#[derive(Debug)]
struct Answer {
    head: Response<()>,
    body: Vec<u8>,
    trailers: Option<HeaderMap>,
}

impl Answer {
    /// From the trailers, or from the head when there is nothing else.
    fn status(&self) -> &str {
        let trailer = self.trailers.as_ref().and_then(|trailers| trailers.get("grpc-status"));
        trailer.or_else(|| self.head.headers().get("grpc-status")).unwrap().to_str().unwrap()
    }
}

async fn answer(
    client: &mut SendRequest<Bytes>,
    request: Request<()>,
    body: Bytes,
) -> Result<Answer, h2::Error> {
    std::future::poll_fn(|cx| client.poll_ready(cx)).await?;
    let (response, mut sink) = client.send_request(request, false)?;
    let sending = async {
        // An answer may come before all is sent.
        let sent = send(&mut sink, body).await;
        let _answered_already = sent.and_then(|()| sink.send_data(Bytes::new(), true));
        // Held until there is an answer: dropped unfinished, it would take the call back.
        sink
    };
    let receiving = async {
        let (head, mut source) = response.await?.into_parts();
        let mut body = Vec::new();
        while let Some(chunk) = source.data().await {
            let chunk = chunk?;
            body.extend_from_slice(&chunk);
            source.flow_control().release_capacity(chunk.len())?;
        }
        let trailers = source.trailers().await?;
        Ok(Answer { head: Response::from_parts(head, ()), body, trailers })
    };
    tokio::join!(sending, receiving).1
}

#[tokio::test]
async fn calls_of_one_connection_spread_and_keep_body_trailers_and_status() {
    let mut tasks = JoinSet::new();
    let both = [endpoint(&mut tasks, Manner::Echo(0)), endpoint(&mut tasks, Manner::Echo(0))];
    let mut scene = scene(tasks, &both.each_ref().map(|one| one.address), PortRules::default()).await;
    for size in [0, 1, 70_000, 3_000_000] {
        let sent: Vec<u8> = (0..size).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let answer = scene.call("POST", sent.clone().into()).await.unwrap();
        assert_eq!(answer.status(), "0");
        assert!(answer.body == sent, "{} bytes of {size}", answer.body.len());
    }
    // Many at once, so that neither endpoint alone is the better one.
    let calls = (0..200).map(|_| {
        let mut client = scene.client.clone();
        let request = Request::builder().method("POST").uri("http://api/say");
        let request = request.header("content-type", "application/grpc").body(()).unwrap();
        async move { answer(&mut client, request, Bytes::from_static(b"hello")).await.unwrap().body }
    });
    let answers = futures::future::join_all(calls).await;
    assert!(answers.iter().all(|body| body == b"hello"));
    let shares = both.each_ref().map(|one| one.calls.load(SeqCst));
    assert_eq!(shares.iter().sum::<usize>(), 204);
    assert!(shares.iter().all(|share| *share > 2), "{shares:?}");
    assert!((2..=16).contains(&scene.route.http2.connections()), "{}", scene.route.http2.connections());
    scene.tasks.abort_all();
}

/// h2 by itself would end the endpoint's connection, and with it every other call that it carries.
#[tokio::test]
async fn a_slow_reader_of_many_small_messages_harms_no_other_call() {
    let mut tasks = JoinSet::new();
    let good = endpoint(&mut tasks, Manner::Echo(0));
    let mut scene = scene(tasks, &[good.address], PortRules::default()).await;
    let mut client = scene.connect().await;
    let request = Request::builder().method("POST").uri("http://api/x").body(()).unwrap();
    std::future::poll_fn(|cx| client.poll_ready(cx)).await.unwrap();
    let (response, mut sink) = client.send_request(request, false).unwrap();
    let mut source = response.await.unwrap().into_body();
    // Nobody reads the echo, until every window on its way is full.
    let mut sent = 0;
    let small = Bytes::from_static(b"0123456789");
    while timeout(Duration::from_millis(500), send(&mut sink, small.clone()))
        .await
        .is_ok_and(|sent| sent.is_ok())
    {
        sent += 10;
    }
    assert!(sent > 400_000, "{sent}");
    assert_eq!(scene.call("POST", Bytes::from_static(b"other")).await.unwrap().body, b"other");
    sink.send_data(Bytes::new(), true).unwrap();
    let mut read = 0;
    while let Some(chunk) = source.data().await {
        let chunk = chunk.unwrap();
        read += chunk.len();
        source.flow_control().release_capacity(chunk.len()).unwrap();
    }
    // The last may have gone in part.
    assert!((sent..sent + 10).contains(&read), "{read} of {sent}");
}

#[tokio::test]
async fn what_no_endpoint_has_begun_goes_to_another_with_its_body() {
    for manner in [Manner::Refuse, Manner::GoAway] {
        let mut tasks = JoinSet::new();
        let bad = endpoint(&mut tasks, manner);
        let good = endpoint(&mut tasks, Manner::Echo(0));
        let mut scene = scene(tasks, &[bad.address, good.address], PortRules::default()).await;
        for _ in 0..30 {
            let answer = scene.call("POST", Bytes::from_static(b"once")).await.unwrap();
            assert_eq!((answer.status(), answer.body.as_slice()), ("0", b"once".as_slice()), "{manner:?}");
        }
        assert_eq!(good.calls.load(SeqCst), 30);
    }
}

#[tokio::test]
async fn what_may_have_been_begun_is_not_repeated_unless_it_may_be() {
    let mut tasks = JoinSet::new();
    let bad = endpoint(&mut tasks, Manner::Hang);
    let good = endpoint(&mut tasks, Manner::Echo(0));
    let mut scene = scene(tasks, &[bad.address, good.address], PortRules::default()).await;
    let mut failed = None;
    for _ in 0..20 {
        let answer = scene.call("POST", Bytes::from_static(b"once")).await.unwrap();
        if answer.status() != "0" {
            failed = Some(answer);
        }
    }
    let failed = failed.expect("two draws of twenty find it");
    let message = failed.head.headers()["grpc-message"].to_str().unwrap();
    assert_eq!(failed.status(), "14");
    assert!(message.starts_with("nave: api cannot be reached; tried i-1: "), "{message}");
    let calls = bad.calls.load(SeqCst) + good.calls.load(SeqCst);
    assert_eq!(calls, 20, "each was begun once");
    for _ in 0..20 {
        assert_eq!(scene.call("GET", Bytes::new()).await.unwrap().status(), "0");
    }
}

#[tokio::test]
async fn a_503_is_tried_elsewhere_only_if_that_may_be_done_twice() {
    let mut tasks = JoinSet::new();
    let bad = endpoint(&mut tasks, Manner::Status(503));
    let good = endpoint(&mut tasks, Manner::Status(200));
    let mut scene = scene(tasks, &[bad.address, good.address], PortRules::default()).await;
    let mut statuses = Vec::new();
    for method in ["GET", "POST"].repeat(10) {
        let request = Request::builder().method(method).uri("http://api/x").body(()).unwrap();
        let answer = answer(&mut scene.client, request, Bytes::new()).await.unwrap();
        statuses.push((method, answer.head.status().as_u16()));
    }
    assert!(statuses.iter().all(|(method, status)| *method == "POST" || *status == 200), "{statuses:?}");
    // The only one there is: its own answer is better than ours.
    scene.route.balancer.set_state(clock(), EndpointKey { instance: InstanceId(2), epoch: 1 }, None);
    let request = Request::builder().method("GET").uri("http://api/x").body(()).unwrap();
    let alone = answer(&mut scene.client, request, Bytes::new()).await.unwrap();
    assert_eq!(alone.head.status(), 503);
    assert!(!alone.head.headers().contains_key("nave-refused"), "{alone:?}");
}

#[tokio::test]
async fn those_that_were_not_reached_leave_a_retry_for_one_that_is_unwell() {
    let rules = PortRules { retries_max: 1, ..PortRules::default() };
    // Of four endpoints the first two of a call are in twelve orders; that no call meets the one before the other is rare.
    for _ in 0..40 {
        let mut tasks = JoinSet::new();
        let bad = endpoint(&mut tasks, Manner::Status(503));
        let good = endpoint(&mut tasks, Manner::Status(200));
        let nobody = crate::nobody::Nobody::new();
        let gone = nobody.address;
        let mut scene = scene(tasks, &[gone, gone, bad.address, good.address], rules.clone()).await;
        let request = Request::builder().method("GET").uri("http://api/x").body(()).unwrap();
        let answer = answer(&mut scene.client, request, Bytes::new()).await.unwrap();
        assert_eq!(answer.head.status(), 200);
    }
}

fn clock() -> nave_agent_core::Monotonic {
    crate::clock::monotonic()
}

#[tokio::test]
async fn failures_in_trailers_alone_count_and_five_of_them_open_the_breaker() {
    // INTERNAL is a failure; NOT_FOUND is an answer.
    for (status, ejections) in [(13, 1), (5, 0)] {
        let mut tasks = JoinSet::new();
        let only = endpoint(&mut tasks, Manner::TrailersOnly(status));
        let mut scene = scene(tasks, &[only.address], PortRules::default()).await;
        for _ in 0..5 {
            assert_eq!(scene.call("POST", Bytes::new()).await.unwrap().status(), status.to_string());
        }
        // The answer is out a moment before it is counted.
        until(|| scene.route.balancer.in_flight(InstanceId(1)) == 0).await;
        assert_eq!(scene.route.balancer.ejections(), ejections, "{status}");
    }
}

#[tokio::test]
async fn a_service_without_instances_says_so_in_the_callers_own_words() {
    let rules = PortRules { pending_timeout: Duration::from_millis(20), ..PortRules::default() };
    let mut scene = scene(JoinSet::new(), &[], rules).await;
    let answer_to_grpc = scene.call("POST", Bytes::new()).await.unwrap();
    assert_eq!(answer_to_grpc.status(), "14");
    assert_eq!(answer_to_grpc.head.status(), 200);
    let request = Request::builder().uri("http://api/x").body(()).unwrap();
    let plain = answer(&mut scene.client, request, Bytes::new()).await.unwrap();
    assert_eq!(plain.head.status(), 503);
    let text = String::from_utf8(plain.body).unwrap();
    assert_eq!(text, "nave: api cannot be reached: it has no instances (nave endpoints api)\n");
}

#[tokio::test]
async fn a_silent_endpoint_is_given_up_at_the_callers_deadline_and_told_so() {
    let mut tasks = JoinSet::new();
    let silent = endpoint(&mut tasks, Manner::Silent);
    let mut scene = scene(tasks, &[silent.address], PortRules::default()).await;
    let request = Request::builder().method("POST").uri("http://api/x");
    let request = request.header("content-type", "application/grpc").header("grpc-timeout", "50m");
    let late = answer(&mut scene.client, request.body(()).unwrap(), Bytes::new()).await.unwrap();
    assert_eq!(late.status(), "4");
    until(|| silent.resets.load(SeqCst) == 1).await;

    // A caller that takes its call back takes it back from the endpoint too.
    let request = Request::builder().method("POST").uri("http://api/x").body(()).unwrap();
    let (response, mut sink) = scene.client.send_request(request, true).unwrap();
    until(|| silent.calls.load(SeqCst) == 2).await;
    sink.send_reset(Reason::CANCEL);
    drop(response);
    until(|| silent.resets.load(SeqCst) == 2).await;
    until(|| scene.route.balancer.in_flight(InstanceId(1)) == 0).await;
}

#[tokio::test]
async fn a_drained_connection_finishes_its_calls_and_takes_no_more() {
    let mut tasks = JoinSet::new();
    let good = endpoint(&mut tasks, Manner::Echo(0));
    let mut scene = scene(tasks, &[good.address], PortRules::default()).await;
    let request = Request::builder().method("POST").uri("http://api/x").body(()).unwrap();
    std::future::poll_fn(|cx| scene.client.poll_ready(cx)).await.unwrap();
    let (response, mut sink) = scene.client.send_request(request, false).unwrap();
    let mut source = response.await.unwrap().into_body();
    scene.drain.cancel();
    let mut client = scene.client.clone();
    let refused = async {
        loop {
            let request = Request::builder().method("POST").uri("http://api/x").body(()).unwrap();
            if let Err(error) = answer(&mut client, request, Bytes::new()).await {
                return error;
            }
        }
    };
    let refused = timeout(Duration::from_secs(20), refused).await.expect("it is told to go");
    assert!(refused.is_go_away(), "{refused}");
    send(&mut sink, Bytes::from_static(b"still here")).await.unwrap();
    sink.send_data(Bytes::new(), true).unwrap();
    assert_eq!(source.data().await.unwrap().unwrap(), "still here");
    let trailers = source.trailers().await.unwrap().unwrap();
    assert_eq!(trailers["grpc-status"], "0");
}

async fn until(condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(20), waiting).await.expect("it comes true");
}
