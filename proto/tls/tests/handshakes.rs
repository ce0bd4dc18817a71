//! Real handshakes over loopback: who gets in, who does not, and what each is told. The server is gRPC's health
//! service; an interceptor notes whom `peer` shows to a call.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use nave_proto::ids::{ClusterId, HostId, MemberId};
use nave_tls::{
    AGENT_VALIDITY, Authority, ChannelOptions, ClientPolicy, Credentials, Dialer, Expect, IncomingLimits,
    KeyPair, PeerIdentity, Role, channel, connect_error, enroll_channel, incoming, peer, peer_or_expired,
    server_config, server_config_of,
};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Server};
use tonic::{Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::HealthService;

const OURS: ClusterId = ClusterId(0xfeed);
const DAY: u64 = 24 * 60 * 60;

/// Seconds since 1970.
#[expect(clippy::disallowed_methods, reason = "certificates are judged by the real clock")]
fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    i64::try_from(since.as_secs()).expect("before the year 292277026596")
}

fn issue(authority: &Authority, role: Role) -> Credentials {
    authority.issue_new(role, AGENT_VALIDITY, now()).expect("a certificate")
}

fn member(authority: &Authority, id: u64) -> Credentials {
    issue(authority, Role::Member(MemberId(id)))
}

/// Issued two days ago for one.
fn run_out(authority: &Authority, role: Role) -> Credentials {
    authority.issue_new(role, Duration::from_secs(DAY), now() - 2 * 24 * 60 * 60).expect("a certificate")
}

/// What one call showed of its peer.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    valid: Option<PeerIdentity>,
    any: Option<PeerIdentity>,
}

struct TestServer {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    shutdown: CancellationToken,
    tasks: JoinSet<()>,
}

impl TestServer {
    async fn start(credentials: &Credentials, policy: ClientPolicy) -> Self {
        Self::start_with(credentials, policy, IncomingLimits::default()).await
    }

    async fn start_with(credentials: &Credentials, policy: ClientPolicy, limits: IncomingLimits) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let shutdown = CancellationToken::new();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let notes = seen.clone();
        let service = HealthServer::with_interceptor(
            HealthService::from_health_reporter(tonic_health::server::HealthReporter::new()),
            move |request: Request<()>| {
                notes
                    .lock()
                    .push(Seen { valid: peer(&request).cloned(), any: peer_or_expired(&request).cloned() });
                Ok(request)
            },
        );
        let connections = incoming(listener, server_config(credentials, policy), limits, shutdown.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            Server::builder().add_service(service).serve_with_incoming(connections).await.expect("serves");
        });
        Self { address, seen, shutdown, tasks }
    }

    fn address(&self) -> String {
        self.address.to_string()
    }

    fn channel(&self, credentials: &Credentials, expect: Expect) -> Channel {
        channel(&self.address(), credentials, expect, ChannelOptions::default())
    }

    fn last_seen(&self) -> Seen {
        self.seen.lock().last().expect("a call came through").clone()
    }
}

async fn call(channel: Channel) -> Result<(), Status> {
    let mut client = HealthClient::new(channel);
    let answer = client.check(HealthCheckRequest { service: String::new() });
    tokio::time::timeout(Duration::from_secs(10), answer).await.expect("an answer in time").map(|_| ())
}

/// The text of the error and of all that is behind it.
fn chain(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut next = std::error::Error::source(status);
    while let Some(error) = next {
        text.push_str(": ");
        text.push_str(&error.to_string());
        next = error.source();
    }
    text
}

/// The client's own reason for not connecting.
fn refusal(status: &Status) -> String {
    connect_error(status).unwrap_or_else(|| panic!("no connect error in {}", chain(status))).to_string()
}

#[tokio::test]
async fn members_know_each_other() {
    let authority = Authority::generate(OURS);
    let server = TestServer::start(&member(&authority, 1), ClientPolicy::default()).await;
    let two = member(&authority, 2);
    for expect in [Expect::Member, Expect::MemberId(MemberId(1))] {
        call(server.channel(&two, expect)).await.expect("a member is welcome");
    }
    let seen = server.last_seen().valid.expect("an identity");
    assert_eq!(seen.cluster, OURS);
    assert_eq!(seen.role, Role::Member(MemberId(2)));
    assert_eq!(seen.member(), Some(MemberId(2)));
    assert_eq!(seen.agent(), None);
    assert_eq!(seen.public_key_sha256, two.key_pair().public_key_sha256());
}

#[tokio::test]
async fn a_request_signed_by_the_hub_makes_an_agent() {
    let authority = Authority::generate(OURS);
    let server = TestServer::start(&member(&authority, 1), ClientPolicy::default()).await;
    let key = KeyPair::generate();
    let role = Role::Agent(HostId(3));
    let certificate = authority.issue(&role, &key.csr_der(), AGENT_VALIDITY, now()).expect("issued");
    let credentials = key.with_certificate(certificate, authority.certificate_der()).expect("they fit");
    call(server.channel(&credentials, Expect::Member)).await.expect("an agent is welcome");
    assert_eq!(server.last_seen().valid.and_then(|peer| peer.agent()), Some(HostId(3)));
}

#[tokio::test]
async fn a_server_of_another_cluster_is_refused_in_plain_words() {
    let theirs = Authority::generate(ClusterId(0xbeef));
    let server = TestServer::start(&member(&theirs, 1), ClientPolicy::default()).await;
    let ours = member(&Authority::generate(OURS), 2);
    let status = call(server.channel(&ours, Expect::Member)).await.expect_err("another cluster");
    assert_eq!(
        refusal(&status),
        format!(
            "refused the server at {}: the server belongs to another cluster (it is of 000000000000beef, we are of \
             000000000000feed)",
            server.address
        )
    );
}

#[tokio::test]
async fn an_authority_that_claims_our_cluster_id_is_refused_on_both_sides() {
    let (real, fake) = (Authority::generate(OURS), Authority::generate(OURS));
    let fake_server = TestServer::start(&member(&fake, 1), ClientPolicy::default()).await;
    let status = call(fake_server.channel(&member(&real, 2), Expect::Member)).await.expect_err("a fake");
    assert!(refusal(&status).ends_with("was not issued by this cluster's authority"), "{}", refusal(&status));

    let policy = ClientPolicy { anonymous: true, expired: true };
    let real_server = TestServer::start(&member(&real, 1), policy).await;
    // A client that trusts anyone: it has the real CA in its files, and a leaf that the fake one signed.
    let key = KeyPair::generate();
    let leaf = fake.issue(&Role::Member(MemberId(9)), &key.csr_der(), AGENT_VALIDITY, now()).expect("issued");
    let intruder = key.with_certificate(leaf, real.certificate_der()).expect("the names fit");
    let status = call(real_server.channel(&intruder, Expect::Member)).await.expect_err("an intruder");
    assert!(chain(&status).contains("the server refused our certificate"), "{}", chain(&status));
    assert_eq!(real_server.seen.lock().len(), 0);
}

#[tokio::test]
async fn a_stranger_gets_in_only_where_the_policy_says_so_and_is_shown_as_nobody() {
    let authority = Authority::generate(OURS);
    let closed =
        TestServer::start(&member(&authority, 1), ClientPolicy { anonymous: false, expired: true }).await;
    let status = call(enroll_channel(&closed.address(), authority.sha256())).await.expect_err("a stranger");
    assert!(chain(&status).contains("the server wants a certificate and we have none"), "{}", chain(&status));
    assert_eq!(closed.seen.lock().len(), 0);

    let open =
        TestServer::start(&member(&authority, 1), ClientPolicy { anonymous: true, expired: false }).await;
    call(enroll_channel(&open.address(), authority.sha256())).await.expect("enrolling is allowed");
    assert_eq!(open.last_seen(), Seen { valid: None, any: None });
}

#[tokio::test]
async fn an_expired_certificate_is_flagged_where_allowed_and_refused_elsewhere() {
    let authority = Authority::generate(OURS);
    let old = run_out(&authority, Role::Agent(HostId(3)));
    let strict =
        TestServer::start(&member(&authority, 1), ClientPolicy { anonymous: true, expired: false }).await;
    let status = call(strict.channel(&old, Expect::Member)).await.expect_err("run out");
    assert!(chain(&status).contains("it has run out"), "{}", chain(&status));
    assert_eq!(strict.seen.lock().len(), 0);

    let lenient =
        TestServer::start(&member(&authority, 1), ClientPolicy { anonymous: true, expired: true }).await;
    call(lenient.channel(&old, Expect::Member)).await.expect("renewing is allowed");
    let seen = lenient.last_seen();
    assert_eq!(seen.valid, None);
    let shown = seen.any.expect("an identity");
    assert!(shown.expired);
    assert_eq!(shown.role, Role::Agent(HostId(3)));
    assert_eq!(shown.agent(), None);

    // Expired and signed by someone else is not merely expired.
    let fake = Authority::generate(OURS);
    let key = KeyPair::generate();
    let long_ago = now() - 2 * 24 * 60 * 60;
    let leaf = fake
        .issue(&Role::Agent(HostId(3)), &key.csr_der(), Duration::from_secs(DAY), long_ago)
        .expect("issued");
    let forged = key.with_certificate(leaf, authority.certificate_der()).expect("the names fit");
    call(lenient.channel(&forged, Expect::Member)).await.expect_err("forged");
}

#[tokio::test]
async fn a_server_whose_certificate_has_run_out_is_refused() {
    let authority = Authority::generate(OURS);
    let server =
        TestServer::start(&run_out(&authority, Role::Member(MemberId(1))), ClientPolicy::default()).await;
    let status = call(server.channel(&member(&authority, 2), Expect::Member)).await.expect_err("run out");
    assert!(refusal(&status).contains("compare the clocks"), "{}", refusal(&status));
}

#[tokio::test]
async fn a_time_floor_overrules_a_clock_that_is_behind() {
    let authority = Authority::generate(OURS);
    // To this clock the server's certificate begins in ten days.
    let later = now() + 10 * 24 * 60 * 60;
    let server_credentials =
        authority.issue_new(Role::Member(MemberId(1)), AGENT_VALIDITY, later).expect("a certificate");
    let policy = ClientPolicy { anonymous: true, expired: true };
    let server = TestServer::start(&server_credentials, policy).await;
    let agent = issue(&authority, Role::Agent(HostId(3)));
    let status = call(server.channel(&agent, Expect::Member)).await.expect_err("not valid yet");
    assert!(refusal(&status).contains("not valid yet"), "{}", refusal(&status));
    agent.raise_time_floor(later);
    call(server.channel(&agent, Expect::Member)).await.expect("the floor is believed");
}

#[tokio::test]
async fn someone_else_of_the_same_cluster_is_refused() {
    let authority = Authority::generate(OURS);
    let server = TestServer::start(&member(&authority, 1), ClientPolicy::default()).await;
    let agent_server =
        TestServer::start(&issue(&authority, Role::Agent(HostId(3))), ClientPolicy::default()).await;
    let two = member(&authority, 2);
    for (channel, why) in [
        (server.channel(&two, Expect::MemberId(MemberId(3))), "expected member/m-3, found member/m-1"),
        (server.channel(&two, Expect::Agent(HostId(1))), "expected agent/h-1, found member/m-1"),
        (agent_server.channel(&two, Expect::Member), "expected a member, found agent/h-3"),
        (agent_server.channel(&two, Expect::Agent(HostId(4))), "expected agent/h-4, found agent/h-3"),
    ] {
        let status = call(channel).await.expect_err(why);
        assert!(refusal(&status).ends_with(why), "{}", refusal(&status));
    }
    call(agent_server.channel(&two, Expect::Agent(HostId(3)))).await.expect("the agent that was meant");
}

#[tokio::test]
async fn a_pinned_authority_that_differs_is_refused() {
    let authority = Authority::generate(OURS);
    let policy = ClientPolicy { anonymous: true, expired: false };
    let server = TestServer::start(&member(&authority, 1), policy).await;
    let other = Authority::generate(OURS);
    let status = call(enroll_channel(&server.address(), other.sha256())).await.expect_err("another CA");
    assert!(refusal(&status).contains("not the one that the join token names"), "{}", refusal(&status));
    // The right CA, but an agent pretending to be the hub.
    let agent_server = TestServer::start(&issue(&authority, Role::Agent(HostId(3))), policy).await;
    let status =
        call(enroll_channel(&agent_server.address(), authority.sha256())).await.expect_err("an agent");
    assert!(refusal(&status).ends_with("expected a member, found agent/h-3"), "{}", refusal(&status));
}

#[tokio::test]
async fn garbage_on_the_port_costs_only_its_own_connection() {
    let authority = Authority::generate(OURS);
    let limits =
        IncomingLimits { handshakes: 4, handshake_timeout: Duration::from_millis(300), connections: 64 };
    let server = TestServer::start_with(&member(&authority, 1), ClientPolicy::default(), limits).await;
    let two = member(&authority, 2);
    let established = server.channel(&two, Expect::Member);
    call(established.clone()).await.expect("welcome");

    // More silent clients than there are handshake slots, and one that talks HTTP.
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(TcpStream::connect(server.address).await.expect("connected"));
    }
    let mut noisy = TcpStream::connect(server.address).await.expect("connected");
    noisy.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.expect("written");
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(10), noisy.read_to_end(&mut rest)).await;
    ended.expect("the server closes the connection").ok();

    call(established).await.expect("an open connection is not disturbed");
    call(server.channel(&two, Expect::Member)).await.expect("a new one comes through");
}

#[tokio::test]
async fn a_server_that_is_no_nave_is_said_to_be_none() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            stream.write_all(b"220 mail.example.org ESMTP\r\n").await.ok();
        }
    });
    let credentials = member(&Authority::generate(OURS), 2);
    let channel = channel(&address.to_string(), &credentials, Expect::Member, ChannelOptions::default());
    let status = call(channel).await.expect_err("not TLS");
    assert_eq!(refusal(&status), format!("no TLS connection with {address}"));
}

#[tokio::test]
async fn nobody_there_and_nonsense_addresses_are_said_plainly() {
    let credentials = member(&Authority::generate(OURS), 2);
    let free = TcpListener::bind("127.0.0.1:0").await.expect("a free port").local_addr().expect("bound");
    for (address, why) in [
        (free.to_string(), format!("cannot connect to {free}")),
        ("hub".to_owned(), "\"hub\" is not an address of the form host:port".to_owned()),
        (
            "http://hub:99999".to_owned(),
            "\"http://hub:99999\" is not an address of the form host:port".to_owned(),
        ),
    ] {
        let channel = channel(&address, &credentials, Expect::Member, ChannelOptions::default());
        let status = call(channel).await.expect_err("nobody there");
        assert_eq!(refusal(&status), why);
    }
}

#[tokio::test]
async fn replaced_credentials_are_shown_by_servers_and_channels_made_before() {
    let authority = Authority::generate(OURS);
    let old_server = run_out(&authority, Role::Member(MemberId(1)));
    let server = TestServer::start(&old_server, ClientPolicy::default()).await;
    let agent = run_out(&authority, Role::Agent(HostId(3)));
    let channel = server.channel(&agent, Expect::Member);
    call(channel.clone()).await.expect_err("both have run out");

    old_server.replace(&member(&authority, 1)).expect("the same member");
    let fresh_key = issue(&authority, Role::Agent(HostId(3)));
    agent.replace(&fresh_key).expect("the same agent");
    call(channel).await.expect("both are fresh");
    let seen = server.last_seen().valid.expect("valid");
    assert_eq!(seen.public_key_sha256, fresh_key.key_pair().public_key_sha256());

    let error = agent.replace(&issue(&authority, Role::Agent(HostId(4)))).expect_err("another agent");
    assert_eq!(error.to_string(), "credentials of agent/h-3 cannot be replaced by those of agent/h-4");
}

/// A session begun with the old certificate and resumed would show the old one again.
#[tokio::test]
async fn a_channel_shows_its_renewed_certificate_when_it_connects_again() {
    let authority = Authority::generate(OURS);
    let server_credentials = member(&authority, 1);
    let server = TestServer::start(&server_credentials, ClientPolicy::default()).await;
    let agent = issue(&authority, Role::Agent(HostId(3)));
    let channel = server.channel(&agent, Expect::Member);
    call(channel.clone()).await.expect("welcome");
    agent.replace(&issue(&authority, Role::Agent(HostId(3)))).expect("the same agent");
    call(channel.clone()).await.expect("the connection stays");

    // The same port and the same session store, every connection cut.
    let relay = Relay::start(server.address).await;
    let through =
        nave_tls::channel(&relay.address.to_string(), &agent, Expect::Member, ChannelOptions::default());
    call(through.clone()).await.expect("welcome");
    let before = server.last_seen().valid.expect("valid").public_key_sha256;
    let renewed = issue(&authority, Role::Agent(HostId(3)));
    agent.replace(&renewed).expect("the same agent");
    relay.cut();
    // The first call after a cut may meet the dying connection.
    let mut tries = 0;
    while call(through.clone()).await.is_err() {
        tries += 1;
        assert!(tries < 10, "the channel does not connect again");
    }
    let after = server.last_seen().valid.expect("valid").public_key_sha256;
    assert_ne!(before, after);
    assert_eq!(after, renewed.key_pair().public_key_sha256());
}

/// Passes bytes on, until it is told to drop all its connections.
struct Relay {
    address: SocketAddr,
    cut: Arc<Mutex<CancellationToken>>,
    _tasks: JoinSet<()>,
}

impl Relay {
    async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let cut = Arc::new(Mutex::new(CancellationToken::new()));
        let current = cut.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                let cut = current.lock().clone();
                connections.spawn(async move {
                    let Ok(mut server) = TcpStream::connect(to).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
                        () = cut.cancelled() => {}
                    }
                });
            }
        });
        Self { address, cut, _tasks: tasks }
    }

    fn cut(&self) {
        let old = std::mem::replace(&mut *self.cut.lock(), CancellationToken::new());
        old.cancel();
    }
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_for_one_to_end() {
    let authority = Authority::generate(OURS);
    let limits = IncomingLimits { connections: 1, ..IncomingLimits::default() };
    let server = TestServer::start_with(&member(&authority, 1), ClientPolicy::default(), limits).await;
    let two = member(&authority, 2);
    let first = server.channel(&two, Expect::Member);
    call(first.clone()).await.expect("welcome");
    let options = ChannelOptions { connect_timeout: Duration::from_millis(300), ..ChannelOptions::default() };
    let second = channel(&server.address(), &two, Expect::Member, options);
    let status = call(second.clone()).await.expect_err("no slot is free");
    assert_eq!(refusal(&status), format!("no answer from {} within 300ms", server.address));
    drop(first);
    let mut tries = 0;
    while call(second.clone()).await.is_err() {
        tries += 1;
        assert!(tries < 20, "the slot is never given back");
    }
}

#[tokio::test]
async fn shutdown_ends_the_listener() {
    let authority = Authority::generate(OURS);
    let mut server = TestServer::start(&member(&authority, 1), ClientPolicy::default()).await;
    server.shutdown.cancel();
    let ended = tokio::time::timeout(Duration::from_secs(10), server.tasks.join_next()).await;
    ended.expect("the server ends").expect("there is one task").expect("without a panic");
    TcpStream::connect(server.address).await.expect_err("the port is closed");
}

#[tokio::test]
async fn credentials_survive_their_files() {
    let authority = Authority::generate(OURS);
    let directory = tempfile::tempdir().expect("a directory");
    let [certificate, key, ca] = ["cert.pem", "key.pem", "ca.pem"].map(|name| directory.path().join(name));
    let saved = issue(&authority, Role::Operator("ada".into()));
    saved.save(&certificate, &key, &ca).expect("saved");
    let loaded = Credentials::load(&certificate, &key, &ca).expect("loaded");
    assert_eq!(loaded.role(), saved.role());
    assert_eq!(loaded.expires_unix(), saved.expires_unix());
    let server = TestServer::start(&member(&authority, 1), ClientPolicy::default()).await;
    call(server.channel(&loaded, Expect::Member)).await.expect("an operator is welcome");
    assert_eq!(
        server.last_seen().valid.and_then(|peer| peer.operator().map(str::to_owned)),
        Some("ada".into())
    );

    KeyPair::generate().save(&key).expect("saved");
    let error = Credentials::load(&certificate, &key, &ca).expect_err("another key");
    assert_eq!(error.to_string(), "the certificate was issued for another key");
}

#[tokio::test]
async fn a_connection_speaks_what_its_dialer_named_with_whom_it_expected() {
    let authority = Authority::generate(OURS);
    let agent = |id| issue(&authority, Role::Agent(HostId(id)));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    let config = server_config_of(&agent(1), ClientPolicy::default(), &[b"h2", b"bytes"]);
    let shutdown = CancellationToken::new();
    let mut accepted = Box::pin(incoming(listener, config, IncomingLimits::default(), shutdown));
    let dial = |from: &Credentials, to, protocol| {
        let dialer =
            Dialer::new(&address, from, Expect::Agent(HostId(to)), protocol, Duration::from_secs(10));
        async move { dialer.connect().await }
    };

    let from = agent(2);
    for protocol in [b"bytes".as_slice(), b"h2"] {
        let dialled = dial(&from, 1, protocol);
        let served = async {
            let mut served = accepted.next().await.expect("a connection").expect("no errors of its own");
            served.write_all(b"hello").await.expect("written");
            served.flush().await.expect("flushed");
            served
        };
        let (dialled, served) = tokio::join!(dialled, served);
        assert_eq!(served.protocol(), Some(protocol));
        assert_eq!(served.info().identity.as_ref().and_then(PeerIdentity::agent), Some(HostId(2)));
        let mut dialled = dialled.expect("connected");
        let mut heard = [0; 5];
        dialled.read_exact(&mut heard).await.expect("heard");
        assert_eq!(&heard, b"hello");
        assert!(dialled.is_quiet());
        drop(served);
        while dialled.is_quiet() {
            tokio::task::yield_now().await;
        }
    }
    let refused = async {
        dial(&from, 3, b"bytes").await.expect_err("another host");
        dial(&from, 1, b"other").await.expect_err("another protocol");
    };
    tokio::select! {
        () = refused => {}
        strange = accepted.next() => panic!("accepted {strange:?}"),
    }
}
