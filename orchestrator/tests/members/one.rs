//! What people, agents and strangers get from one member.

use std::time::Duration;

use nave_orchestrator::{RunError, run};
use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_proto::token::JoinToken;
use nave_tls::{KeyPair, Role};
use pb::agent_message::Message as FromAgent;
use pb::cluster_service_client::ClusterServiceClient;
use pb::enroll_service_client::EnrollServiceClient;
use pb::host_service_client::HostServiceClient;
use pb::hub_message::Message as ToAgent;
use pb::service_service_client::ServiceServiceClient;
use pb::watch_item::Item;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::harness::{Agent, CLUSTER, Cluster, apply, facts, manifest, reason, running};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_goes_from_apply_to_running_and_away_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(folder.path(), 1).await;
    let status = cluster.ready(0).await;
    assert_eq!((status.leader.as_str(), status.members.len()), ("member-1", 1));
    assert_eq!((status.members[0].role.as_str(), status.members[0].reachable), ("leader", true));

    let (host, credentials) = cluster.enroll(0, "alpha").await;
    let mut agent = Agent::connect(&cluster, 0, &credentials, host).await;
    let ToAgent::Welcome(welcome) = agent.expect().await else { panic!("welcome comes first") };
    assert_eq!((welcome.incarnation, welcome.members), (1, vec![cluster.address(0).to_owned()]));
    let ToAgent::Wanted(set) = agent.expect().await else { panic!("then the whole set") };
    assert_eq!(set.instances, []);

    let mut services = cluster.services(0);
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

    let hosts = HostServiceClient::new(cluster.operator(0))
        .list_hosts(pb::ListHostsRequest { linearizable: false })
        .await
        .unwrap()
        .into_inner();
    assert_eq!((hosts.hosts[0].id.as_str(), hosts.hosts[0].status.as_str()), ("h-1", "connected"));
    assert!(hosts.hosts[0].last_heard.is_some());

    // Goes down in order with a stream open, and comes back with what it knew.
    cluster.end().await;
    cluster.members[0].begin();
    assert_eq!(cluster.ready(0).await.incarnation, 1);
    let hosts = HostServiceClient::new(cluster.operator(0))
        .list_hosts(pb::ListHostsRequest { linearizable: true })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(hosts.hosts.len(), 1);
    cluster.end().await;
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
    let mut cluster = Cluster::start(folder.path(), 1).await;

    let stranger = || nave_tls::enroll_channel(cluster.address(0), cluster.authority.sha256());
    let refused = HostServiceClient::new(stranger()).list_hosts(pb::ListHostsRequest::default()).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated);
    let mut wrong = cluster.token.clone();
    wrong.secret = JoinToken::new(CLUSTER, cluster.authority.sha256(), [8; JoinToken::RANDOM_BYTES]).secret;
    let request = pb::EnrollRequest {
        token: wrong.to_string(),
        csr_der: KeyPair::generate().csr_der(),
        facts: Some(facts("mallory")),
    };
    let refused = EnrollServiceClient::new(stranger()).enroll(request).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "TOKEN_INVALID"));

    let (host, credentials) = cluster.enroll(0, "alpha").await;
    let mut claims_another = Agent::connect(&cluster, 0, &credentials, HostId(host.0 + 1)).await;
    let refused = claims_another.hear().await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    let agent = cluster.channel(0, &credentials);
    let refused = ServiceServiceClient::new(agent.clone()).apply_service(apply(manifest("web", 0))).await;
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);

    // A certificate of the right CA whose key nobody enrolled.
    let forged = cluster.credentials(Role::Agent(host));
    let mut unknown_key = Agent::connect(&cluster, 0, &forged, host).await;
    let refused = unknown_key.hear().await.unwrap_err();
    assert_eq!(reason(&refused), "HOST_NOT_REGISTERED");
    let forged = cluster.channel(0, &forged);
    let csr_der = KeyPair::generate().csr_der();
    let refused = EnrollServiceClient::new(forged).renew(pb::RenewRequest { csr_der }).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");

    let renewed =
        EnrollServiceClient::new(agent).renew(pb::RenewRequest { csr_der: credentials.csr_der() }).await;
    assert!(!renewed.unwrap().into_inner().certificate_der.is_empty());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_done_is_said_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(folder.path(), 1).await;
    let mut services = cluster.services(0);

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
    let refused = ClusterServiceClient::new(cluster.operator(0))
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
    let mut other = cluster.members[0].config.clone();
    other.data_dir = folder.path().join("other");
    let refused = run(other.clone(), CancellationToken::new()).await.unwrap_err();
    assert!(matches!(refused, RunError::Listen { key: "listen", .. }), "{refused}");
    assert!(refused.to_string().contains("another process uses the port"), "{refused}");
    assert!(!other.data_dir.exists());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_are_told_whom_they_may_call_and_say_when_nobody_calls_what_drains() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(folder.path(), 1).await;
    cluster.ready(0).await;
    let (host, credentials) = cluster.enroll(0, "alpha").await;
    let mut agent = Agent::connect(&cluster, 0, &credentials, host).await;
    let whole = agent.expect_directory().await;
    assert!(whole.whole && whole.everything && whole.services.is_empty());
    let taken = |revision| {
        FromAgent::Acknowledge(pb::Acknowledge { draining_revision: revision, ..Default::default() })
    };
    agent.say(taken(whole.revision)).await;

    let mut services = cluster.services(0);
    let port = pb::Port { protocol: pb::Protocol::Http.into(), service_port: 80, port: 0, calls: None };
    let web = pb::Manifest { ports: [("http".to_owned(), port)].into(), ..manifest("web", 1) };
    services.apply_service(apply(web)).await.unwrap();
    let told = agent.expect_directory().await;
    assert_eq!((told.from_revision, told.services[0].name.as_str()), (whole.revision, "web"));
    assert_ne!(told.services[0].address_suffix, 0);
    let wanted = loop {
        if let ToAgent::Delta(delta) = agent.expect().await {
            break delta.put[0].clone();
        }
    };
    let ready = pb::InstanceReport {
        ports: [("http".to_owned(), 20_007)].into(),
        ..running(wanted.instance_id, wanted.epoch)
    };
    let report = pb::Report { sequence: 1, full: true, instances: vec![ready], ..Default::default() };
    agent.say(FromAgent::Report(report)).await;
    let told = agent.expect_directory().await;
    assert_eq!(
        (told.endpoints[0].instance_id, told.endpoints[0].ports["http"]),
        (wanted.instance_id, 20_007)
    );
    assert_eq!((told.endpoints[0].state(), told.acknowledge), (pb::EndpointState::Ready, false));
    assert_eq!(told.hosts[0].name, "alpha");

    services
        .delete_service(pb::DeleteServiceRequest { name: "web".to_owned(), request_id: None })
        .await
        .unwrap();
    let drains = loop {
        let told = agent.expect_directory().await;
        if told.acknowledge {
            break told;
        }
    };
    assert_eq!(drains.endpoints[0].state(), pb::EndpointState::Draining);
    agent.say(taken(drains.revision)).await;
    let left = loop {
        if let ToAgent::CallersLeft(left) = agent.expect().await {
            break left;
        }
        agent.say(FromAgent::Beat(pb::Beat { sequence: 1 })).await;
    };
    assert!(left.revision >= drains.revision, "{left:?}");

    let gone = pb::Report { sequence: 2, gone: vec![wanted.instance_id], ..Default::default() };
    agent.say(FromAgent::Report(gone)).await;
    let told = agent.expect_directory().await;
    assert_eq!(told.removed_endpoints, [wanted.instance_id]);
    cluster.members[0].end().await;
}
