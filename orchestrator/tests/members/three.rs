//! What three members promise together: any of them answers, and losing some is said as it is.

use std::time::Duration;

use nave_proto::pb;
use pb::agent_message::Message as FromAgent;
use pb::cluster_service_client::ClusterServiceClient;
use pb::host_service_client::HostServiceClient;
use pb::hub_message::Message as ToAgent;
use pb::watch_item::Item;
use tokio::time::{Instant, timeout};
use tonic::Code;

use crate::harness::{Agent, Cluster, PATIENCE, apply, manifest, reason};

/// The two that do not lead.
fn followers(leader: usize) -> [usize; 2] {
    match leader {
        0 => [1, 2],
        1 => [0, 2],
        _ => [0, 1],
    }
}

async fn hosts(cluster: &Cluster, member: usize) -> Vec<pb::Host> {
    let mut client = HostServiceClient::new(cluster.operator(member));
    client
        .list_hosts(pb::ListHostsRequest { linearizable: false })
        .await
        .expect("the member answers")
        .into_inner()
        .hosts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_member_takes_writes_and_answers_with_the_newest() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(folder.path(), 3).await;
    let leader = cluster.leader(0).await;
    let [one, other] = followers(leader);

    let status = cluster.ready(one).await;
    assert!(status.members.iter().all(|member| member.reachable), "{status:?}");
    let roles: Vec<_> = status.members.iter().map(|member| member.role.as_str()).collect();
    assert_eq!(roles.iter().filter(|role| **role == "leader").count(), 1, "{roles:?}");
    assert_eq!(roles.iter().filter(|role| **role == "follower").count(), 2, "{roles:?}");

    let mut watch = cluster.services(other).watch(pb::WatchRequest::default()).await.unwrap().into_inner();
    let mut writer = cluster.services(one);
    let mut reader = cluster.services(other);
    for number in 0..20 {
        let name = format!("s-{number}");
        writer.apply_service(apply(manifest(&name, 0))).await.unwrap();
        let read = reader.get_service(pb::GetServiceRequest { name: name.clone(), linearizable: true }).await;
        assert_eq!(read.unwrap().into_inner().service.map(|service| service.name), Some(name));
    }
    let mut seen = Vec::new();
    while seen.len() < 20 {
        let message = timeout(PATIENCE, watch.message()).await.unwrap().unwrap().unwrap();
        for item in message.items {
            // A service is seen again when its deployment moves on.
            if let Some(Item::Service(service)) = item.item
                && !seen.contains(&service.name)
            {
                seen.push(service.name);
            }
        }
    }
    assert_eq!(seen, (0..20).map(|number| format!("s-{number}")).collect::<Vec<_>>());

    // Leadership moves where it is sent, by whichever member.
    let target = cluster.members[other].config.name.clone();
    let moved = ClusterServiceClient::new(cluster.operator(one))
        .transfer_leader(pb::TransferLeaderRequest { to: target.clone() })
        .await
        .unwrap();
    assert_eq!(moved.into_inner().leader, target);
    cluster.status_when(leader, |status| status.leader == target).await;
    writer.apply_service(apply(manifest("after", 0))).await.unwrap();
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_is_heard_through_any_member_and_lost_when_silent() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(folder.path(), 3).await;
    let leader = cluster.leader(0).await;
    let [one, other] = followers(leader);
    let (host, credentials) = cluster.enroll(one, "alpha").await;
    let mut agent = Agent::connect(&cluster, one, &credentials, host).await;
    assert!(matches!(agent.expect().await, ToAgent::Welcome(_)));

    // Heard by a follower, judged by the leader, asked of the other follower.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(5) {
        agent.say(FromAgent::Beat(pb::Beat::default())).await;
        tokio::time::sleep(Duration::from_millis(250)).await;
        assert_ne!(hosts(&cluster, other).await[0].status, "lost");
    }
    let shown = hosts(&cluster, other).await.remove(0);
    assert_eq!(shown.status, "connected");
    assert!(shown.last_heard.is_some());

    let silent_since = Instant::now();
    let status_is = async |wanted: &str| {
        let there = async {
            while hosts(&cluster, other).await[0].status != wanted {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(PATIENCE, there).await.unwrap();
    };
    status_is("lost").await;
    let took = silent_since.elapsed();
    assert!(took > Duration::from_secs(2), "within its lease a host is not lost: {took:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    // Its session is over: what it said of its instances is forgotten, and a new one begins with all of it.
    while !matches!(agent.hear().await, Err(_) | Ok(None | Some(ToAgent::Goodbye(_)))) {}
    let mut agent = Agent::connect(&cluster, other, &credentials, host).await;
    assert!(matches!(agent.expect().await, ToAgent::Welcome(_)));
    agent.say(FromAgent::Beat(pb::Beat::default())).await;
    status_is("connected").await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_it_is_said_so_and_nothing_is_changed() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(folder.path(), 3).await;
    let left = cluster.leader(0).await;
    cluster.services(left).apply_service(apply(manifest("before", 0))).await.unwrap();
    let (host, credentials) = cluster.enroll(left, "alpha").await;
    let mut agent = Agent::connect(&cluster, left, &credentials, host).await;
    let gone = followers(left);
    for member in gone {
        cluster.members[member].end().await;
    }

    // The agent is told to go elsewhere.
    let goodbye = loop {
        match agent.expect().await {
            ToAgent::Goodbye(goodbye) => break goodbye,
            ToAgent::Welcome(_) | ToAgent::Wanted(_) | ToAgent::Delta(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(goodbye.members.len(), 2, "{goodbye:?}");

    let mut services = cluster.services(left);
    let begun = Instant::now();
    let refused = services.apply_service(apply(manifest("during", 0))).await.unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unavailable, "NO_LEADER"), "{refused}");
    assert!(
        refused.message().starts_with("2 of 3 members cannot be reached; nothing was changed"),
        "{refused}"
    );

    let stale = services
        .list_services(pb::ListServicesRequest { linearizable: false })
        .await
        .expect("the member answers")
        .into_inner();
    assert_eq!(stale.services.len(), 1);
    let freshness = stale.freshness.unwrap();
    assert!(!freshness.linearizable && freshness.age_ms > 1000, "{freshness:?}");
    let refused = services.list_services(pb::ListServicesRequest { linearizable: true }).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");

    for member in gone {
        cluster.members[member].begin();
    }
    let applied = async {
        while services.apply_service(apply(manifest("after", 0))).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, applied).await.unwrap();
    let all =
        services.list_services(pb::ListServicesRequest { linearizable: true }).await.unwrap().into_inner();
    let names: Vec<_> = all.services.iter().map(|service| service.name.as_str()).collect();
    assert_eq!(names, ["after", "before"]);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_stops_hands_over_and_no_write_fails() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(folder.path(), 3).await;
    let leader = cluster.leader(0).await;
    let [one, other] = followers(leader);
    let mut services = cluster.services(one);
    let mut stopping = std::mem::take(&mut cluster.members);
    let writes = async {
        let mut slowest = Duration::ZERO;
        for number in 0..200 {
            let begun = Instant::now();
            // As the command line does: with a request id, what is cut off on its way is tried again by the hub.
            let mut write = apply(manifest(&format!("s-{number}"), 0));
            write.request_id =
                Some(pb::RequestId { client_id: "planned-stop".to_owned(), serial: number + 1 });
            services.apply_service(write).await.unwrap();
            slowest = slowest.max(begun.elapsed());
        }
        slowest
    };
    let (slowest, ()) = tokio::join!(writes, stopping[leader].end());
    cluster.members = stopping;
    assert!(slowest < PATIENCE, "a write waited {slowest:?}");
    assert_ne!(cluster.leader(other).await, leader);
    cluster.end().await;
}
