//! When a dev cluster is ready: a leader is elected and every agent is connected. Asked in a loop, since there is
//! nobody to tell before there is a leader.

use std::collections::BTreeSet;
use std::time::Duration;

use nave_proto::pb;
use tokio::time::Instant;

use super::layout::Layout;
use super::say;
use super::supervise::Supervised;
use crate::client::Hub;

const ASK_EVERY: Duration = Duration::from_millis(40);
/// It takes two seconds; whoever waits much longer wants to know for what.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// The leader's name, once all is ready.
pub(super) async fn wait(hub: &Hub, layout: &Layout, _keeps_running: &Supervised) -> String {
    let mut told = Instant::now();
    loop {
        let missing = match leader(hub).await {
            None => "a leader".to_owned(),
            Some(leader) => match missing_agents(hub, layout).await {
                Some(missing) if missing.is_empty() => return leader,
                Some(missing) => missing.join(", "),
                None => "the list of hosts".to_owned(),
            },
        };
        if told.elapsed() >= SAY_EVERY {
            told = Instant::now();
            say(format_args!("still waiting for {missing}; logs are in {}/*/nave.log", layout.dir.display()));
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

/// A token for agents that have yet to join a cluster that exists.
pub(super) async fn fresh_token(hub: &Hub) -> String {
    loop {
        if leader(hub).await.is_some() {
            let created = hub
                .write(|mut member| async move {
                    member.cluster.create_token(pb::CreateTokenRequest::default()).await
                })
                .await;
            if let Ok(created) = created {
                return created.token;
            }
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

async fn leader(hub: &Hub) -> Option<String> {
    let status =
        hub.read(|mut member| async move {
            member.cluster.get_cluster_status(pb::GetClusterStatusRequest {}).await
        })
        .await
        .ok()?;
    (!status.leader.is_empty()).then_some(status.leader)
}

async fn missing_agents(hub: &Hub, layout: &Layout) -> Option<Vec<String>> {
    let listed = hub
        .read(|mut member| async move { member.hosts.list_hosts(pb::ListHostsRequest::default()).await })
        .await
        .ok()?;
    let connected: BTreeSet<&str> = listed
        .hosts
        .iter()
        .filter(|host| host.status == "connected")
        .map(|host| host.name.as_str())
        .collect();
    Some(
        layout
            .agents
            .iter()
            .map(|role| role.name.clone())
            .filter(|name| !connected.contains(name.as_str()))
            .collect(),
    )
}
