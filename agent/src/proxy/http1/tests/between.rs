//! From one host to another: two agents with certificates of one cluster, and TLS between them.

use std::net::SocketAddr;
use std::sync::Arc;

use nave_agent_core::balancer::{BalancerSettings, EndpointKey, EndpointSpec, Reach};
use nave_agent_core::directory::{EndpointState, Host, PortRules, Protocol};
use nave_proto::ids::{ClusterId, HostId, InstanceId};
use nave_tls::{AGENT_VALIDITY, Authority, ClientPolicy, Credentials, IncomingLimits, Role};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::harness::{Caller, Stage, read_head};
use crate::clock;
use crate::proxy::http1::serve_peer;
use crate::proxy::peers::{HTTP1, Peers};
use crate::proxy::route::Route;

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const GET: &str = "GET / HTTP/1.1\r\nHost: web\r\n\r\n";
const POST: &str = "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 4\r\n\r\nbody";
const NEAR: HostId = HostId(1);
const FAR: HostId = HostId(2);

fn agent(authority: &Authority, host: HostId) -> Credentials {
    let now = clock::wall_unix_ns() / 1_000_000_000;
    authority.issue_new(Role::Agent(host), AGENT_VALIDITY, now).unwrap()
}

fn route() -> Route {
    let (rules, settings) = (PortRules::default(), BalancerSettings::default());
    Route::new("web".into(), "http".into(), Protocol::Http, rules, settings)
}

fn endpoint(instance: u64, reach: Reach, state: EndpointState) -> EndpointSpec {
    let key = EndpointKey { instance: InstanceId(instance), epoch: 1 };
    EndpointSpec { key, reach, state, weight: 1 }
}

fn remote(instance: u64) -> EndpointSpec {
    endpoint(instance, Reach::Remote { host: FAR, port: 1 }, EndpointState::Ready)
}

fn local(instance: u64, address: SocketAddr) -> EndpointSpec {
    endpoint(instance, Reach::Local(address), EndpointState::Ready)
}

/// Two hosts: what the near one knows, and what is there on the far one.
struct Hosts {
    stage: Stage,
    near: Arc<Route>,
    far: Arc<Route>,
}

impl Hosts {
    /// `shown`: which host the far agent's certificate is of.
    async fn new(shown: HostId) -> Self {
        let authority = Authority::generate(ClusterId(7));
        let mut stage = Stage::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = Host { id: FAR, name: "far".into(), address: listener.local_addr().unwrap().to_string() };
        let far = Arc::new(route());
        let (known, credentials) = (far.clone(), agent(&authority, shown));
        stage.play(async move {
            use futures::StreamExt as _;
            let config = nave_tls::server_config_of(&credentials, ClientPolicy::default(), &[b"h2", HTTP1]);
            let never = CancellationToken::new();
            let limits = IncomingLimits::default();
            let mut incoming = std::pin::pin!(nave_tls::incoming(listener, config, limits, never.clone()));
            let mut connections = tokio::task::JoinSet::new();
            while let Some(connection) = incoming.next().await {
                let known = known.clone();
                let find = move |service: &str, port: &str| {
                    (service == "web" && port == "http").then(|| known.clone())
                };
                connections.spawn(serve_peer(connection.unwrap(), find, never.clone()));
            }
        });
        let peers = Peers::new(agent(&authority, NEAR));
        peers.set(&[host]);
        let near = Arc::new(route().with_peers(Arc::new(peers)));
        Self { stage, near, far }
    }

    async fn call(&mut self) -> Caller {
        self.stage.call_route(&self.near).await
    }
}

#[tokio::test]
async fn a_call_crosses_with_its_callers_name_on_connections_that_are_shared() {
    let mut hosts = Hosts::new(FAR).await;
    let there = hosts
        .stage
        .endpoint(|number, mut stream| async move {
            while let Some(head) = read_head(&mut stream).await {
                assert!(head.contains("Nave-Caller: unknown\r\n") && !head.contains("Nave-To"), "{head}");
                let mut body = [0; 4];
                stream.read_exact(&mut body).await.unwrap();
                assert_eq!(&body, b"body");
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{number}");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        })
        .await;
    hosts.near.update(vec![remote(1)]);
    hosts.far.update(vec![local(1, there)]);
    for _ in 0..3 {
        let mut caller = hosts.call().await;
        for _ in 0..3 {
            caller.say(POST).await;
            caller.hear_head().await;
            assert_eq!(caller.hear(1).await, "0", "the endpoint sees one connection");
        }
    }
    assert_eq!(hosts.far.balancer.in_flight(InstanceId(1)), 0);
}

#[tokio::test]
async fn a_body_larger_than_any_buffer_crosses_both_ways() {
    let mut hosts = Hosts::new(FAR).await;
    let echo = hosts
        .stage
        .endpoint(|_, mut stream| async move {
            read_head(&mut stream).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4000000\r\n\r\n").await.unwrap();
            let (mut read, mut write) = stream.split();
            tokio::io::copy(&mut read, &mut write).await.unwrap();
        })
        .await;
    hosts.near.update(vec![remote(1)]);
    hosts.far.update(vec![local(1, echo)]);
    let mut caller = hosts.call().await;
    let (mut read, mut write) = caller.stream.split();
    let say = async {
        write.write_all(b"POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 4000000\r\n\r\n").await.unwrap();
        write.write_all(&vec![b'x'; 4_000_000]).await.unwrap();
    };
    let hear = async {
        let mut heard = vec![0; 4_000_000 + "HTTP/1.1 200 OK\r\nContent-Length: 4000000\r\n\r\n".len()];
        read.read_exact(&mut heard).await.unwrap();
        assert!(heard.ends_with(b"xxxx"));
    };
    super::harness::within(async { tokio::join!(say, hear) }).await;
}

#[tokio::test]
async fn what_reached_no_process_there_goes_elsewhere_whatever_it_is() {
    let mut hosts = Hosts::new(FAR).await;
    let here = hosts.stage.answering(OK).await;
    let gone = hosts.stage.nobody().await;
    for there in [vec![], vec![local(1, gone)]] {
        hosts.far.update(there);
        hosts.near.update(vec![remote(1), local(2, here)]);
        for _ in 0..8 {
            let mut caller = hosts.call().await;
            caller.say("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 0\r\n\r\n").await;
            assert_eq!(caller.hear(OK.len()).await, OK);
        }
        hosts.near.update(vec![remote(1)]);
        let mut caller = hosts.call().await;
        caller.say(GET).await;
        let head = caller.hear_head().await;
        assert!(head.starts_with("HTTP/1.1 503 ") && !head.contains("Nave-Not-Processed"), "{head}");
    }
}

#[tokio::test]
async fn an_instance_that_is_not_ready_is_stood_in_for_on_its_host() {
    let mut hosts = Hosts::new(FAR).await;
    let there = hosts.stage.answering(OK).await;
    let gone = hosts.stage.nobody().await;
    hosts.near.update(vec![remote(1)]);
    let draining = endpoint(1, Reach::Local(gone), EndpointState::Draining);
    hosts.far.update(vec![draining, local(2, there)]);
    let mut caller = hosts.call().await;
    caller.say(GET).await;
    assert_eq!(caller.hear(OK.len()).await, OK);
}

#[tokio::test]
async fn the_callees_agent_keeps_the_list() {
    let mut hosts = Hosts::new(FAR).await;
    let there = hosts.stage.answering(OK).await;
    hosts.near.update(vec![remote(1)]);
    hosts.far.update(vec![local(1, there)]);
    hosts.far.set_allow(Some(vec!["jobs".to_owned()]));
    let mut caller = hosts.call().await;
    caller.say(GET).await;
    let head = caller.hear_head().await;
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
}

#[tokio::test]
async fn an_agent_of_another_host_is_not_spoken_to() {
    let mut hosts = Hosts::new(HostId(3)).await;
    let there = hosts.stage.answering(OK).await;
    hosts.near.update(vec![remote(1)]);
    hosts.far.update(vec![local(1, there)]);
    let mut caller = hosts.call().await;
    caller.say(GET).await;
    assert!(caller.hear_head().await.starts_with("HTTP/1.1 503 "));
}
