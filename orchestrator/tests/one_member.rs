//! One member in this process, over real TLS on a real port: what people, agents and strangers get from it.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use nave_orchestrator::{Bootstrap, MemberConfig, MemberEntry, RunError, run};
use nave_proto::ids::{ClusterId, HostId, MemberId};
use nave_proto::pb;
use nave_proto::token::JoinToken;
use nave_tls::{Authority, ChannelOptions, Credentials, Expect, KeyPair, OPERATOR_VALIDITY, Role};
use pb::agent_message::Message as FromAgent;
use pb::agent_session_client::AgentSessionClient;
use pb::cluster_service_client::ClusterServiceClient;
use pb::enroll_service_client::EnrollServiceClient;
use pb::host_service_client::HostServiceClient;
use pb::hub_message::Message as ToAgent;
use pb::service_service_client::ServiceServiceClient;
use pb::watch_item::Item;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Streaming};
use tonic_types::StatusExt as _;

const CLUSTER: ClusterId = ClusterId(0x00f1_e2d3_c4b5_a697);
/// Certificates of this test are judged by the machine's clock, so they are made by it.
const NOW_UNIX: fn() -> i64 = || {
    let output = std::process::Command::new("date").arg("+%s").output().expect("date runs");
    String::from_utf8(output.stdout).expect("digits").trim().parse().expect("a number")
};

struct Member {
    address: String,
    authority: Authority,
    token: JoinToken,
    config: MemberConfig,
    stop: CancellationToken,
    running: JoinSet<Result<(), RunError>>,
}

/// A port that was free a moment ago.
fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
}

impl Member {
    fn start(folder: &Path) -> Self {
        let authority = Authority::generate(CLUSTER);
        authority.save(folder).expect("a writable folder");
        let token = JoinToken::new(CLUSTER, authority.sha256(), [7; JoinToken::RANDOM_BYTES]);
        let listen = free_address();
        let config = MemberConfig {
            id: MemberId(1),
            name: "member-1".to_owned(),
            cluster_id: CLUSTER,
            data_dir: folder.join("data"),
            listen,
            advertise: listen.to_string(),
            metrics_listen: Some(free_address()),
            ca_cert: folder.join("ca.pem"),
            ca_key: folder.join("ca.key"),
            members: vec![MemberEntry {
                id: MemberId(1),
                name: "member-1".to_owned(),
                address: listen.to_string(),
            }],
            bootstrap: Some(Bootstrap {
                token_id: token.id.clone(),
                token_sha256: Bootstrap::hex(&token.secret_sha256()),
                token_expires_unix: NOW_UNIX() + 3600,
            }),
        };
        let mut member = Self {
            address: listen.to_string(),
            authority,
            token,
            config,
            stop: CancellationToken::new(),
            running: JoinSet::new(),
        };
        member.begin();
        member
    }

    fn begin(&mut self) {
        self.stop = CancellationToken::new();
        self.running.spawn(run(self.config.clone(), self.stop.clone()));
    }

    async fn end(&mut self) {
        self.stop.cancel();
        let ended = timeout(Duration::from_secs(20), self.running.join_next()).await.expect("ends in time");
        ended.expect("it was running").expect("no panic").expect("no error");
    }

    fn credentials(&self, role: Role) -> Credentials {
        self.authority.issue_new(role, OPERATOR_VALIDITY, NOW_UNIX()).expect("a good role")
    }

    fn operator(&self) -> Channel {
        let credentials = self.credentials(Role::Operator("ann".to_owned()));
        nave_tls::channel(&self.address, &credentials, Expect::Member, ChannelOptions::default())
    }

    /// Waits until there is a leader and the cluster has begun.
    async fn ready(&self) -> pb::ClusterStatus {
        let mut cluster = ClusterServiceClient::new(self.operator());
        let ready = async {
            loop {
                match cluster.get_cluster_status(pb::GetClusterStatusRequest {}).await {
                    Ok(status) if status.get_ref().incarnation != 0 => return status.into_inner(),
                    _ => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        };
        timeout(Duration::from_secs(30), ready).await.expect("a leader in time")
    }

    async fn enroll(&self, name: &str) -> (HostId, Credentials) {
        let key = KeyPair::generate();
        let mut client =
            EnrollServiceClient::new(nave_tls::enroll_channel(&self.address, self.authority.sha256()));
        let request = pb::EnrollRequest {
            token: self.token.to_string(),
            csr_der: key.csr_der(),
            facts: Some(facts(name)),
        };
        let answer = client.enroll(request).await.expect("enrolled").into_inner();
        assert_eq!(answer.members, [self.address.clone()]);
        let credentials = key.with_certificate(answer.certificate_der, answer.ca_der).expect("they fit");
        (answer.host_id.parse().expect("a host id"), credentials)
    }
}

fn facts(name: &str) -> pb::HostFacts {
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

fn manifest(name: &str, count: u32) -> pb::Manifest {
    let text = format!("name = \"{name}\"\ncommand = [\"/bin/sleep\", \"1000\"]\ncount = {count}\n");
    nave_proto::manifest::parse(&text, nave_proto::manifest::Format::Toml, "test.toml")
        .expect("a good manifest")
}

fn apply(manifest: pb::Manifest) -> pb::ApplyServiceRequest {
    pb::ApplyServiceRequest { manifest: Some(manifest), ..Default::default() }
}

fn reason(status: &tonic::Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

/// The test's end of an agent's stream.
struct Agent {
    send: mpsc::Sender<pb::AgentMessage>,
    receive: Streaming<pb::HubMessage>,
}

impl Agent {
    async fn connect(member: &Member, credentials: &Credentials, host: HostId) -> Self {
        let channel =
            nave_tls::channel(&member.address, credentials, Expect::Member, ChannelOptions::default());
        let (send, outgoing) = mpsc::channel(16);
        let mut client = AgentSessionClient::new(channel);
        let receive =
            client.open_session(ReceiverStream::new(outgoing)).await.expect("a stream").into_inner();
        let agent = Self { send, receive };
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

    async fn say(&self, message: FromAgent) {
        self.send.send(pb::AgentMessage { message: Some(message) }).await.expect("the stream is open");
    }

    async fn hear(&mut self) -> Result<Option<ToAgent>, tonic::Status> {
        let heard =
            timeout(Duration::from_secs(10), self.receive.message()).await.expect("an answer in time");
        Ok(heard?.and_then(|message| message.message))
    }

    async fn expect(&mut self) -> ToAgent {
        self.hear().await.expect("no error").expect("a message")
    }
}

fn running(instance_id: u64, epoch: u64) -> pb::InstanceReport {
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_goes_from_apply_to_running_and_away_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut member = Member::start(folder.path());
    let status = member.ready().await;
    assert_eq!((status.leader.as_str(), status.members.len()), ("member-1", 1));
    assert_eq!((status.members[0].role.as_str(), status.members[0].reachable), ("leader", true));

    let (host, credentials) = member.enroll("alpha").await;
    let mut agent = Agent::connect(&member, &credentials, host).await;
    let ToAgent::Welcome(welcome) = agent.expect().await else { panic!("welcome comes first") };
    assert_eq!((welcome.incarnation, welcome.members), (1, vec![member.address.clone()]));
    let ToAgent::Wanted(set) = agent.expect().await else { panic!("then the whole set") };
    assert_eq!(set.instances, []);

    let mut services = ServiceServiceClient::new(member.operator());
    let mut watch = services.watch(pb::WatchRequest::default()).await.unwrap().into_inner();
    let first = watch.message().await.unwrap().unwrap();
    assert!(first.reset && first.synced, "the whole state in one message");

    let mut applied = apply(manifest("web", 1));
    applied.dry_run = true;
    let dry = services.apply_service(applied.clone()).await.unwrap().into_inner();
    assert_eq!((dry.outcome(), dry.version), (pb::apply_service_response::Outcome::Created, 1));
    assert!(!dry.changes.is_empty());
    applied.dry_run = false;
    let answer = services.apply_service(applied.clone()).await.unwrap().into_inner();
    assert_eq!((answer.outcome(), answer.version), (pb::apply_service_response::Outcome::Created, 1));
    let again = services.apply_service(applied).await.unwrap().into_inner();
    assert_eq!((again.outcome(), again.version), (pb::apply_service_response::Outcome::Unchanged, 1));

    let ToAgent::Delta(delta) = agent.expect().await else { panic!("a delta") };
    assert_eq!((delta.from_generation, delta.put.len()), (set.generation, 1));
    let wanted = delta.put[0].clone();
    assert_eq!(wanted.manifest.as_ref().map(|m| m.name.as_str()), Some("web"));
    agent
        .say(FromAgent::Report(pb::Report {
            sequence: 1,
            full: true,
            instances: vec![running(wanted.instance_id, wanted.epoch)],
            ..Default::default()
        }))
        .await;
    let ToAgent::ReportAcknowledged(acknowledged) = agent.expect().await else {
        panic!("an acknowledgement")
    };
    assert_eq!(acknowledged.sequence, 1);
    let shown = services
        .get_service(pb::GetServiceRequest { name: "web".to_owned(), linearizable: true })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(shown.service.as_ref().map(|service| (service.desired, service.ready)), Some((1, 1)));
    assert_eq!(
        (shown.instances[0].observed.as_str(), shown.instances[0].host.as_str()),
        ("running", "alpha")
    );
    assert!(shown.freshness.is_some_and(|freshness| freshness.linearizable && freshness.age_ms == 0));

    // The watch has seen each revision in order; a second one resumes in the middle and sees the rest alike.
    let mut seen = Vec::new();
    let mut cursors = Vec::new();
    while !seen.iter().any(|item| matches!(item, Item::Instance(instance) if instance.ready)) {
        let message = timeout(Duration::from_secs(10), watch.message()).await.unwrap().unwrap().unwrap();
        assert!(!message.reset);
        seen.extend(message.items.into_iter().filter_map(|item| item.item));
        cursors.push((message.cursor.unwrap(), seen.len()));
    }
    assert!(cursors.windows(2).all(|pair| pair[0].0.revision <= pair[1].0.revision));
    let (cursor, from) = cursors[0].clone();
    let resume = pb::WatchRequest { resume: Some(cursor), ..Default::default() };
    let mut resumed = services.watch(resume).await.unwrap().into_inner();
    let mut rest = Vec::new();
    while from + rest.len() < seen.len() {
        let message = timeout(Duration::from_secs(10), resumed.message()).await.unwrap().unwrap().unwrap();
        rest.extend(message.items.into_iter().filter_map(|item| item.item));
    }
    let keys = |items: &[Item]| items.iter().map(key).collect::<Vec<_>>();
    assert_eq!(keys(&rest)[..seen.len() - from], keys(&seen)[from..]);

    services
        .delete_service(pb::DeleteServiceRequest { name: "web".to_owned(), request_id: None })
        .await
        .unwrap();
    let ToAgent::Delta(delta) = agent.expect().await else { panic!("a delta") };
    assert_eq!(delta.put[0].desired(), pb::Desired::Stop);
    agent
        .say(FromAgent::Report(pb::Report {
            sequence: 2,
            gone: vec![wanted.instance_id],
            ..Default::default()
        }))
        .await;
    let gone = async {
        while services
            .get_service(pb::GetServiceRequest { name: "web".to_owned(), linearizable: true })
            .await
            .is_ok()
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(10), gone).await.expect("the service is gone in time");

    let hosts = HostServiceClient::new(member.operator())
        .list_hosts(pb::ListHostsRequest { linearizable: false })
        .await
        .unwrap()
        .into_inner();
    assert_eq!((hosts.hosts[0].id.as_str(), hosts.hosts[0].status.as_str()), ("h-1", "connected"));
    assert!(hosts.hosts[0].last_heard.is_some());

    // Goes down in order with a stream open, and comes back with what it knew.
    member.end().await;
    member.begin();
    assert_eq!(member.ready().await.incarnation, 1);
    let hosts = HostServiceClient::new(member.operator())
        .list_hosts(pb::ListHostsRequest { linearizable: true })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(hosts.hosts.len(), 1);
    member.end().await;
}

fn key(item: &Item) -> String {
    match item {
        Item::Service(service) => format!("service {} {}", service.name, service.revision),
        Item::Instance(instance) => format!("instance {} {}", instance.id, instance.revision),
        Item::Host(host) => format!("host {} {}", host.id, host.revision),
        Item::Event(event) => format!("event {} {}", event.revision, event.index),
        Item::DeletedService(name) => format!("no service {name}"),
        Item::DeletedInstance(id) => format!("no instance {id}"),
        Item::DeletedHost(id) => format!("no host {id}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_impostors_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut member = Member::start(folder.path());
    member.ready().await;

    let stranger = || nave_tls::enroll_channel(&member.address, member.authority.sha256());
    let refused = HostServiceClient::new(stranger()).list_hosts(pb::ListHostsRequest::default()).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated);
    let mut wrong = member.token.clone();
    wrong.secret = JoinToken::new(CLUSTER, member.authority.sha256(), [8; JoinToken::RANDOM_BYTES]).secret;
    let request = pb::EnrollRequest {
        token: wrong.to_string(),
        csr_der: KeyPair::generate().csr_der(),
        facts: Some(facts("mallory")),
    };
    let refused = EnrollServiceClient::new(stranger()).enroll(request).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "TOKEN_INVALID"));

    let (host, credentials) = member.enroll("alpha").await;
    let mut claims_another = Agent::connect(&member, &credentials, HostId(host.0 + 1)).await;
    let refused = claims_another.hear().await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    let agent = nave_tls::channel(&member.address, &credentials, Expect::Member, ChannelOptions::default());
    let refused = ServiceServiceClient::new(agent.clone()).apply_service(apply(manifest("web", 0))).await;
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);

    // A certificate of the right CA whose key nobody enrolled.
    let forged = member.credentials(Role::Agent(host));
    let mut unknown_key = Agent::connect(&member, &forged, host).await;
    let refused = unknown_key.hear().await.unwrap_err();
    assert_eq!(reason(&refused), "HOST_NOT_REGISTERED");
    let forged = nave_tls::channel(&member.address, &forged, Expect::Member, ChannelOptions::default());
    let csr_der = KeyPair::generate().csr_der();
    let refused = EnrollServiceClient::new(forged).renew(pb::RenewRequest { csr_der }).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");

    let renewed =
        EnrollServiceClient::new(agent).renew(pb::RenewRequest { csr_der: credentials.csr_der() }).await;
    assert!(!renewed.unwrap().into_inner().certificate_der.is_empty());
    member.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_done_is_said_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let mut member = Member::start(folder.path());
    member.ready().await;
    let mut services = ServiceServiceClient::new(member.operator());

    let mut bad = manifest("web", 1);
    bad.name = "Not A Name".to_owned();
    bad.command.clear();
    let refused = services.apply_service(apply(bad)).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::InvalidArgument, "INVALID_MANIFEST"));
    assert!(refused.get_error_details().bad_request().unwrap().field_violations.len() >= 2);

    let mut large = manifest("web", 1);
    large.env.insert("X".to_owned(), "x".repeat(70_000));
    let refused = services.apply_service(apply(large)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("at most 65536"), "{refused}");

    let refused = services
        .scale_service(pb::ScaleServiceRequest { name: "nope".to_owned(), count: 1, request_id: None })
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    let mut conflict = apply(manifest("web", 0));
    conflict.expected_version = Some(4);
    for dry_run in [true, false] {
        conflict.dry_run = dry_run;
        let refused = services.apply_service(conflict.clone()).await.unwrap_err();
        assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "CONFLICT"));
    }
    let refused = ClusterServiceClient::new(member.operator())
        .transfer_leader(pb::TransferLeaderRequest { to: "m-9".to_owned() })
        .await
        .unwrap_err();
    assert_eq!(reason(&refused), "NO_SUCH_MEMBER");

    // The same request twice takes effect once.
    let mut once = apply(manifest("once", 0));
    once.request_id = Some(pb::RequestId { client_id: "test".to_owned(), serial: 1 });
    let first = services.apply_service(once.clone()).await.unwrap().into_inner();
    let second = services.apply_service(once).await.unwrap().into_inner();
    assert_eq!((first.version, first.revision, second.version), (1, first.revision, 1));

    // The port is taken, and that is said before anything else is touched.
    let mut other = member.config.clone();
    other.data_dir = folder.path().join("other");
    let refused = run(other.clone(), CancellationToken::new()).await.unwrap_err();
    assert!(matches!(refused, RunError::Listen { key: "listen", .. }), "{refused}");
    assert!(refused.to_string().contains("another process uses the port"), "{refused}");
    assert!(!other.data_dir.exists());
    member.end().await;
}
