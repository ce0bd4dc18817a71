//! Members of one cluster in this process, over real TLS on real ports, and what speaks to them.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use nave_orchestrator::{Bootstrap, LogConfig, MemberConfig, MemberEntry, RunError, SnapshotConfig, run};
use nave_proto::ids::{ClusterId, HostId, MemberId};
use nave_proto::pb;
use nave_proto::token::JoinToken;
use nave_tls::{Authority, ChannelOptions, Credentials, Expect, KeyPair, OPERATOR_VALIDITY, Role};
use pb::agent_message::Message as FromAgent;
use pb::agent_session_client::AgentSessionClient;
use pb::cluster_service_client::ClusterServiceClient;
use pb::enroll_service_client::EnrollServiceClient;
use pb::hub_message::Message as ToAgent;
use pb::service_service_client::ServiceServiceClient;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;

pub(crate) const CLUSTER: ClusterId = ClusterId(0x00f1_e2d3_c4b5_a697);
/// How long anything may take on a busy machine before the test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Certificates of these tests are judged by the machine's clock, so they are made by it.
fn now_unix() -> i64 {
    let output = std::process::Command::new("date").arg("+%s").output().expect("date runs");
    String::from_utf8(output.stdout).expect("digits").trim().parse().expect("a number")
}

/// A cluster whose members run in this process.
pub(crate) struct Cluster {
    pub(crate) authority: Authority,
    pub(crate) token: JoinToken,
    pub(crate) members: Vec<Member>,
}

pub(crate) struct Member {
    pub(crate) config: MemberConfig,
    stop: CancellationToken,
    running: JoinSet<Result<(), RunError>>,
}

/// A port that was free a moment ago.
fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
}

impl Cluster {
    /// Starts so many members and waits until the cluster has begun.
    pub(crate) async fn start(folder: &Path, members: u64) -> Self {
        let authority = Authority::generate(CLUSTER);
        authority.save(folder).expect("a writable folder");
        let token = JoinToken::new(CLUSTER, authority.sha256(), [7; JoinToken::RANDOM_BYTES]);
        let entries: Vec<_> = (1..=members)
            .map(|id| MemberEntry {
                id: MemberId(id),
                name: format!("member-{id}"),
                address: free_address().to_string(),
            })
            .collect();
        let member = |entry: &MemberEntry| Member {
            config: MemberConfig {
                id: entry.id,
                name: entry.name.clone(),
                cluster_id: CLUSTER,
                data_dir: folder.join(&entry.name),
                listen: entry.address.parse().expect("an address"),
                advertise: entry.address.clone(),
                metrics_listen: Some(free_address()),
                ca_cert: folder.join("ca.pem"),
                ca_key: folder.join("ca.key"),
                join: false,
                snapshots: SnapshotConfig::default(),
                log: LogConfig::default(),
                members: entries.clone(),
                bootstrap: Some(Bootstrap {
                    token_id: token.id.clone(),
                    token_sha256: Bootstrap::hex(&token.secret_sha256()),
                    token_expires_unix: now_unix() + 3600,
                }),
            },
            stop: CancellationToken::new(),
            running: JoinSet::new(),
        };
        let mut cluster = Self { authority, members: entries.iter().map(member).collect(), token };
        for member in &mut cluster.members {
            member.begin();
        }
        for index in 0..cluster.members.len() {
            cluster.ready(index).await;
        }
        cluster
    }

    pub(crate) fn address(&self, member: usize) -> &str {
        &self.members[member].config.advertise
    }

    pub(crate) fn credentials(&self, role: Role) -> Credentials {
        self.authority.issue_new(role, OPERATOR_VALIDITY, now_unix()).expect("a good role")
    }

    /// A connection of the operator `ann` to one member.
    pub(crate) fn operator(&self, member: usize) -> Channel {
        self.channel(member, &self.credentials(Role::Operator("ann".to_owned())))
    }

    pub(crate) fn channel(&self, member: usize, credentials: &Credentials) -> Channel {
        nave_tls::channel(self.address(member), credentials, Expect::Member, ChannelOptions::default())
    }

    pub(crate) fn services(&self, member: usize) -> ServiceServiceClient<Channel> {
        ServiceServiceClient::new(self.operator(member))
    }

    /// Waits until a member knows a leader and that the cluster has begun.
    pub(crate) async fn ready(&self, member: usize) -> pb::ClusterStatus {
        self.status_when(member, |status| status.incarnation != 0 && !status.leader.is_empty()).await
    }

    pub(crate) async fn status_when(
        &self,
        member: usize,
        wanted: impl Fn(&pb::ClusterStatus) -> bool,
    ) -> pb::ClusterStatus {
        let mut client = ClusterServiceClient::new(self.operator(member));
        let wanted = async {
            loop {
                match client.get_cluster_status(pb::GetClusterStatusRequest {}).await {
                    Ok(status) if wanted(status.get_ref()) => return status.into_inner(),
                    _ => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        };
        timeout(PATIENCE, wanted).await.expect("the cluster comes to that in time")
    }

    /// The index of the leader, as a member sees it.
    pub(crate) async fn leader(&self, seen_by: usize) -> usize {
        let leader = self.ready(seen_by).await.leader;
        self.members.iter().position(|member| member.config.name == leader).expect("one of ours")
    }

    pub(crate) async fn enroll(&self, member: usize, name: &str) -> (HostId, Credentials) {
        let key = KeyPair::generate();
        let channel = nave_tls::enroll_channel(self.address(member), self.authority.sha256());
        let mut client = EnrollServiceClient::new(channel);
        let request = pb::EnrollRequest {
            token: self.token.to_string(),
            csr_der: key.csr_der(),
            facts: Some(facts(name)),
        };
        let answer = client.enroll(request).await.expect("enrolled").into_inner();
        assert_eq!(answer.members.len(), self.members.len());
        let credentials = key.with_certificate(answer.certificate_der, answer.ca_der).expect("they fit");
        (answer.host_id.parse().expect("a host id"), credentials)
    }

    pub(crate) async fn end(&mut self) {
        for member in &self.members {
            member.stop.cancel();
        }
        for member in &mut self.members {
            member.end().await;
        }
    }
}

impl Member {
    pub(crate) fn begin(&mut self) {
        self.stop = CancellationToken::new();
        self.running.spawn(run(self.config.clone(), self.stop.clone()));
    }

    pub(crate) async fn end(&mut self) {
        self.stop.cancel();
        let ended = timeout(PATIENCE, self.running.join_next()).await.expect("ends in time");
        if let Some(ended) = ended {
            ended.expect("no panic").expect("no error");
        }
    }
}

pub(crate) fn facts(name: &str) -> pb::HostFacts {
    pb::HostFacts {
        name: name.to_owned(),
        address: "127.0.0.1:7410".to_owned(),
        cpu_millicores: 4000,
        memory_bytes: 8 << 30,
        os: "linux".to_owned(),
        address_prefix: "127.88".to_owned(),
        ..Default::default()
    }
}

pub(crate) fn manifest(name: &str, count: u32) -> pb::Manifest {
    let text = format!("name = \"{name}\"\ncommand = [\"/bin/sleep\", \"1000\"]\ncount = {count}\n");
    nave_proto::manifest::parse(&text, nave_proto::manifest::Format::Toml, "test.toml")
        .expect("a good manifest")
}

pub(crate) fn apply(manifest: pb::Manifest) -> pb::ApplyServiceRequest {
    pb::ApplyServiceRequest { manifest: Some(Box::new(manifest)), ..Default::default() }
}

pub(crate) fn reason(status: &tonic::Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

/// The test's end of an agent's stream.
pub(crate) struct Agent {
    send: mpsc::Sender<pb::AgentMessage>,
    receive: Streaming<pb::HubMessage>,
    /// Updates of the directory come between the others.
    directory: VecDeque<pb::DirectoryUpdate>,
}

impl Agent {
    pub(crate) async fn connect(
        cluster: &Cluster,
        member: usize,
        credentials: &Credentials,
        host: HostId,
    ) -> Self {
        let (send, outgoing) = mpsc::channel(16);
        let mut client = AgentSessionClient::new(cluster.channel(member, credentials));
        let receive =
            client.open_session(ReceiverStream::new(outgoing)).await.expect("a stream").into_inner();
        let agent = Self { send, receive, directory: VecDeque::new() };
        let hello = pb::Hello {
            cluster_id: CLUSTER.to_string(),
            host_id: host.to_string(),
            facts: Some(facts("alpha")),
            agent_run_id: "run".to_owned(),
            ..Default::default()
        };
        agent.say(FromAgent::Hello(hello)).await;
        agent
    }

    pub(crate) async fn say(&self, message: FromAgent) {
        self.send.send(pb::AgentMessage { message: Some(message) }).await.expect("the stream is open");
    }

    /// The next message that is not of the directory.
    pub(crate) async fn hear(&mut self) -> Result<Option<ToAgent>, tonic::Status> {
        loop {
            match self.hear_any().await? {
                Some(ToAgent::Directory(update)) => self.directory.push_back(update),
                other => return Ok(other),
            }
        }
    }

    async fn hear_any(&mut self) -> Result<Option<ToAgent>, tonic::Status> {
        let heard = timeout(PATIENCE, self.receive.message()).await.expect("an answer in time");
        Ok(heard?.and_then(|message| message.message))
    }

    /// The next update of the directory; other messages before it are passed over.
    pub(crate) async fn expect_directory(&mut self) -> pb::DirectoryUpdate {
        loop {
            if let Some(update) = self.directory.pop_front() {
                return update;
            }
            if let ToAgent::Directory(update) = self.hear_any().await.expect("no error").expect("a message") {
                return update;
            }
        }
    }

    pub(crate) async fn expect(&mut self) -> ToAgent {
        self.hear().await.expect("no error").expect("a message")
    }
}

pub(crate) fn running(instance_id: u64, epoch: u64) -> pb::InstanceReport {
    let running = pb::observed::Running { ready: true, started_unix_ns: 1, process: None };
    pb::InstanceReport {
        instance_id,
        epoch,
        attempt: 1,
        observed: Some(pb::Observed { state: Some(pb::observed::State::Running(running)) }),
        endpoint: pb::EndpointState::Ready.into(),
        ..Default::default()
    }
}
