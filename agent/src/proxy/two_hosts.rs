//! For tests: two agents with certificates of one cluster, and TLS between them.

use std::net::SocketAddr;
use std::sync::Arc;

use futures::StreamExt as _;
use nave_agent_core::balancer::{BalancerSettings, EndpointKey, EndpointSpec, Reach};
use nave_agent_core::directory::{EndpointState, Host, PortRules, Protocol};
use nave_proto::ids::{ClusterId, HostId, InstanceId};
use nave_tls::{AGENT_VALIDITY, Authority, ClientPolicy, Credentials, IncomingLimits, Role};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::http1::Ending;
use super::peers::{HTTP1, Peers, STREAM};
use super::route::Route;
use super::{http1, stream};
use crate::clock;

pub(crate) const NEAR: HostId = HostId(1);
pub(crate) const FAR: HostId = HostId(2);

fn agent(authority: &Authority, host: HostId) -> Credentials {
    let now = clock::wall_unix_ns() / 1_000_000_000;
    authority.issue_new(Role::Agent(host), AGENT_VALIDITY, now).unwrap()
}

fn route(protocol: Protocol) -> Route {
    let (rules, settings) = (PortRules::default(), BalancerSettings::default());
    Route::new("web".into(), "main".into(), protocol, rules, settings)
}

pub(crate) fn endpoint(instance: u64, reach: Reach, state: EndpointState) -> EndpointSpec {
    let key = EndpointKey { instance: InstanceId(instance), epoch: 1 };
    EndpointSpec { key, reach, state, weight: 1 }
}

/// An endpoint on the far host, as the near one knows it.
pub(crate) fn remote(instance: u64) -> EndpointSpec {
    endpoint(instance, Reach::Remote { host: FAR, port: 1 }, EndpointState::Ready)
}

pub(crate) fn local(instance: u64, address: SocketAddr) -> EndpointSpec {
    endpoint(instance, Reach::Local(address), EndpointState::Ready)
}

/// One port of one service on both hosts: what the near one knows of it, and what is there on the far one.
#[derive(Debug)]
pub(crate) struct TwoHosts {
    pub(crate) near: Arc<Route>,
    pub(crate) far: Arc<Route>,
    /// Of the far agent as it is.
    ending: Arc<Mutex<Ending>>,
    _far_agent: JoinSet<()>,
}

impl TwoHosts {
    /// `shown`: which host the far agent's certificate is of.
    pub(crate) async fn new(shown: HostId, protocol: Protocol) -> Self {
        let authority = Authority::generate(ClusterId(7));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = Host { id: FAR, name: "far".into(), address: listener.local_addr().unwrap().to_string() };
        let far = Arc::new(route(protocol));
        let mut far_agent = JoinSet::new();
        let ending = Arc::<Mutex<Ending>>::default();
        far_agent.spawn(serve(listener, agent(&authority, shown), far.clone(), ending.clone()));
        let peers = Peers::new(agent(&authority, NEAR));
        peers.set(&[host]);
        let near = Arc::new(route(protocol).with_peers(Arc::new(peers)));
        Self { near, far, ending, _far_agent: far_agent }
    }

    /// The far agent ends, and the next one takes up its port.
    pub(crate) fn restart(&self) {
        let before = std::mem::take(&mut *self.ending.lock());
        before.last_answers.cancel();
        before.closes.cancel();
    }
}

async fn serve(
    listener: TcpListener,
    credentials: Credentials,
    known: Arc<Route>,
    ending: Arc<Mutex<Ending>>,
) {
    let config = nave_tls::server_config_of(&credentials, ClientPolicy::default(), &[b"h2", HTTP1, STREAM]);
    let incoming = nave_tls::incoming(listener, config, IncomingLimits::default(), CancellationToken::new());
    let mut incoming = std::pin::pin!(incoming);
    let mut connections = JoinSet::new();
    while let Some(Ok(connection)) = incoming.next().await {
        let (known, ending) = (known.clone(), ending.lock().clone());
        let find =
            move |service: &str, port: &str| (service == "web" && port == "main").then(|| known.clone());
        connections.spawn(async move {
            match connection.protocol() {
                Some(HTTP1) => http1::serve_peer(connection, find, ending).await,
                _ => stream::serve_peer(connection, find).await,
            }
        });
    }
}
