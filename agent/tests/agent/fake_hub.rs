//! A hub of one member that lets hosts in, tells them what the test wants, and remembers what they report.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use nave_proto::ids::{ClusterId, HostId, MemberId};
use nave_proto::pb;
use nave_proto::token::JoinToken;
use nave_tls::{Authority, ClientPolicy, Credentials, IncomingLimits, Role};
use parking_lot::Mutex;
use pb::agent_message::Message as FromAgent;
use pb::agent_session_server::{AgentSession, AgentSessionServer};
use pb::enroll_service_server::{EnrollService, EnrollServiceServer};
use pb::hub_message::Message as ToAgent;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

const DAY: Duration = Duration::from_secs(86_400);

/// What the test sees of it.
pub(crate) struct Heard {
    pub(crate) hellos: Vec<pb::Hello>,
    pub(crate) beats: u64,
    pub(crate) acknowledged: u64,
    pub(crate) reports: BTreeMap<u64, pb::InstanceReport>,
    pub(crate) gone: BTreeSet<u64>,
    pub(crate) facts: Option<pb::HostFacts>,
}

struct State {
    authority: Authority,
    cluster: ClusterId,
    token: JoinToken,
    heard: watch::Sender<Heard>,
    /// By key, so that a host keeps its id.
    hosts: Mutex<BTreeMap<[u8; 32], u64>>,
    wanted: watch::Sender<pb::WantedSet>,
    address: Mutex<Option<SocketAddr>>,
}

/// Certificates are judged by the real clock, so they are issued by it too.
fn now_unix() -> i64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).unwrap().tv_sec()
}

#[derive(Clone)]
pub(crate) struct FakeHub {
    state: Arc<State>,
}

/// The member's process: dropping it closes the hub.
pub(crate) struct Running {
    _tasks: JoinSet<()>,
}

impl FakeHub {
    pub(crate) fn new(cluster: u64) -> Self {
        let cluster = ClusterId(cluster);
        let authority = Authority::generate(cluster);
        let token = JoinToken::new(cluster, authority.sha256(), [7; JoinToken::RANDOM_BYTES]);
        let heard = Heard {
            hellos: Vec::new(),
            beats: 0,
            acknowledged: 0,
            reports: BTreeMap::new(),
            gone: BTreeSet::new(),
            facts: None,
        };
        let state = State {
            authority,
            cluster,
            token,
            heard: watch::Sender::new(heard),
            hosts: Mutex::default(),
            wanted: watch::Sender::new(pb::WantedSet {
                incarnation: 1,
                generation: 1,
                instances: Vec::new(),
            }),
            address: Mutex::new(None),
        };
        Self { state: Arc::new(state) }
    }

    pub(crate) fn token(&self) -> JoinToken {
        self.state.token.clone()
    }

    /// Where it listens: the same address each time it runs.
    pub(crate) async fn run(&self) -> (Running, String) {
        let before = *self.state.address.lock();
        let listener = TcpListener::bind(before.unwrap_or(([127, 0, 0, 1], 0).into())).await.unwrap();
        let address = listener.local_addr().unwrap();
        *self.state.address.lock() = Some(address);
        let credentials = self.credentials(Role::Member(MemberId(1)));
        let policy = ClientPolicy { anonymous: true, expired: true };
        let config = nave_tls::server_config(&credentials, policy);
        let incoming =
            nave_tls::incoming(listener, config, IncomingLimits::default(), CancellationToken::new());
        let server = tonic::transport::Server::builder()
            .add_service(EnrollServiceServer::new(self.clone()))
            .add_service(AgentSessionServer::new(self.clone()));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
        (Running { _tasks: tasks }, address.to_string())
    }

    pub(crate) fn credentials(&self, role: Role) -> Credentials {
        self.state.authority.issue_new(role, DAY, now_unix()).unwrap()
    }

    /// Changes the wanted set; agents are told at once.
    pub(crate) fn want(&self, instances: Vec<pb::WantedInstance>) {
        self.state.wanted.send_modify(|wanted| {
            wanted.generation += 1;
            wanted.instances = instances;
        });
    }

    /// Waits until what was heard satisfies `is`.
    pub(crate) async fn heard<T>(&self, what: &str, is: impl Fn(&Heard) -> Option<T>) -> T {
        let mut heard = self.state.heard.subscribe();
        let waited = tokio::time::timeout(Duration::from_secs(20), async {
            loop {
                let found = is(&heard.borrow_and_update());
                match found {
                    Some(found) => return found,
                    None => heard.changed().await.unwrap(),
                }
            }
        });
        match waited.await {
            Ok(found) => found,
            Err(_) => panic!("not heard: {what}; reports: {:?}", self.state.heard.borrow().reports),
        }
    }
}

#[tonic::async_trait]
impl EnrollService for FakeHub {
    async fn enroll(
        &self,
        request: Request<pb::EnrollRequest>,
    ) -> Result<Response<pb::EnrollResponse>, Status> {
        let request = request.into_inner();
        if request.token != self.state.token.to_string() {
            return Err(Status::permission_denied("the token has expired"));
        }
        let key = nave_tls::csr_public_key_sha256(&request.csr_der).unwrap();
        let host = {
            let mut hosts = self.state.hosts.lock();
            let next = u64::try_from(hosts.len()).unwrap() + 1;
            HostId(*hosts.entry(key).or_insert(next))
        };
        self.state.heard.send_modify(|heard| heard.facts = request.facts);
        let authority = &self.state.authority;
        Ok(Response::new(pb::EnrollResponse {
            cluster_id: self.state.cluster.to_string(),
            host_id: host.to_string(),
            certificate_der: authority.issue(&Role::Agent(host), &request.csr_der, DAY, now_unix()).unwrap(),
            ca_der: authority.certificate_der().to_vec(),
            hub_time_unix_ns: now_unix() * 1_000_000_000,
            members: Vec::new(),
        }))
    }

    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::RenewResponse>, Status> {
        let role = nave_tls::peer_or_expired(&request).unwrap().role.clone();
        let certificate_der =
            self.state.authority.issue(&role, &request.get_ref().csr_der, DAY, now_unix()).unwrap();
        Ok(Response::new(pb::RenewResponse { certificate_der, hub_time_unix_ns: now_unix() * 1_000_000_000 }))
    }
}

type Outgoing = Pin<Box<dyn Stream<Item = Result<pb::HubMessage, Status>> + Send>>;

#[tonic::async_trait]
impl AgentSession for FakeHub {
    type OpenSessionStream = Outgoing;

    async fn open_session(
        &self,
        request: Request<Streaming<pb::AgentMessage>>,
    ) -> Result<Response<Self::OpenSessionStream>, Status> {
        assert!(matches!(nave_tls::peer(&request).unwrap().role, Role::Agent(_)));
        let state = self.state.clone();
        let welcome = ToAgent::Welcome(pb::Welcome {
            cluster_id: state.cluster.to_string(),
            incarnation: 1,
            members: vec![state.address.lock().unwrap().to_string()],
            hub_time_unix_ns: now_unix() * 1_000_000_000,
            member: "member-1".into(),
        });
        let wanted = tokio_stream::wrappers::WatchStream::new(state.wanted.subscribe()).map(ToAgent::Wanted);
        let heard = request.into_inner().filter_map(move |message| {
            let answer =
                message.ok().and_then(|message| message.message).and_then(|message| hear(&state, message));
            std::future::ready(answer)
        });
        let first = futures::stream::iter([welcome]);
        let messages = first.chain(futures::stream::select(wanted, heard));
        Ok(Response::new(Box::pin(messages.map(|message| Ok(pb::HubMessage { message: Some(message) })))))
    }
}

fn hear(state: &State, message: FromAgent) -> Option<ToAgent> {
    let mut answer = None;
    state.heard.send_modify(|heard| match message {
        FromAgent::Hello(hello) => {
            heard.facts = hello.facts.clone();
            heard.hellos.push(hello);
        }
        FromAgent::Beat(_) => heard.beats += 1,
        FromAgent::Interest(_) => {}
        FromAgent::Acknowledge(acknowledge) => heard.acknowledged = acknowledge.generation,
        FromAgent::Report(report) => {
            heard.facts = report.facts.or(heard.facts.take());
            heard.reports.extend(report.instances.into_iter().map(|one| (one.instance_id, one)));
            for id in report.gone {
                heard.reports.remove(&id);
                heard.gone.insert(id);
            }
            answer = Some(ToAgent::ReportAcknowledged(pb::ReportAcknowledged { sequence: report.sequence }));
        }
    });
    answer
}
