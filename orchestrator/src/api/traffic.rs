//! `GetServiceTraffic`: how a service is called of late. Callers' agents count; this member asks each of them and adds
//! up. Histograms are added, never their percentiles. Nothing of it is kept here.

use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt as _, stream};
use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_tls::{ChannelOptions, Expect};
use pb::agent_service_client::AgentServiceClient;
use tokio::time::timeout;
use tonic::Status;

use crate::api::{Hub, errors};

/// An agent that takes longer is left out. A person waits for the page.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1500);
/// Asked at a time; a thousand hosts take some tenths of a second.
const AT_ONCE: usize = 64;
/// More would be a storm of handshakes for one page.
const HOSTS_MAX: usize = 1000;
/// Named in the answer; more are counted.
const SILENT_MAX: usize = 10;

/// Asks all hosts that are connected.
pub(crate) async fn get(hub: &Arc<Hub>, service: &str) -> Result<pb::GetServiceTrafficResponse, Status> {
    let hosts: Vec<(HostId, String, String)> = {
        let state = hub.raft.state();
        if state.service(service).is_none() {
            return Err(errors::no_service(service));
        }
        let connected = state.hosts().filter(|host| host.status() == pb::HostStatus::Connected);
        let facts = connected.filter_map(|host| Some((HostId(host.id), host.facts.as_ref()?)));
        facts.map(|(id, facts)| (id, facts.name.clone(), facts.address.clone())).collect()
    };
    let left_out = hosts.len().saturating_sub(HOSTS_MAX);
    let asked = hosts
        .into_iter()
        .take(HOSTS_MAX)
        .map(|(id, name, address)| async move { (name, ask(hub, id, &address, service).await) });
    let mut answers = stream::iter(asked).buffer_unordered(AT_ONCE);
    let (mut traffic, mut hosts, mut silent) = (pb::ServiceTraffic::default(), 0, Vec::new());
    while let Some((name, answer)) = answers.next().await {
        match answer {
            Some(one) => {
                add(&mut traffic, &one);
                hosts += 1;
            }
            None => silent.push(name),
        }
    }
    silent.sort();
    let unnamed = silent.len().saturating_sub(SILENT_MAX) + left_out;
    silent.truncate(SILENT_MAX);
    if unnamed > 0 {
        silent.push(format!("{unnamed} more"));
    }
    Ok(pb::GetServiceTrafficResponse { traffic: Some(traffic), hosts, silent })
}

async fn ask(hub: &Hub, host: HostId, address: &str, service: &str) -> Option<pb::ServiceTraffic> {
    let (credentials, expect) = (&hub.credentials, Expect::Agent(host));
    let channel = nave_tls::channel(address, credentials, expect, ChannelOptions::default());
    let mut agent = AgentServiceClient::new(channel);
    let request = pb::GetServiceTrafficRequest { service: service.to_owned() };
    Some(timeout(ANSWER_TIMEOUT, agent.get_host_traffic(request)).await.ok()?.ok()?.into_inner())
}

/// Adds one host's counts. Latencies are left out when they are counted in other buckets (of another build).
fn add(sum: &mut pb::ServiceTraffic, one: &pb::ServiceTraffic) {
    sum.window_ms = sum.window_ms.max(one.window_ms);
    for (class, count) in &one.requests {
        *sum.requests.entry(class.clone()).or_default() += count;
    }
    sum.requests_per_second += one.requests_per_second;
    if sum.latency.is_empty() {
        sum.latency.clone_from(&one.latency);
        sum.latency_bounds.clone_from(&one.latency_bounds);
    } else if sum.latency_bounds == one.latency_bounds && sum.latency.len() == one.latency.len() {
        sum.latency.iter_mut().zip(&one.latency).for_each(|(sum, one)| *sum += one);
    }
    sum.retries += one.retries;
    sum.connections_open += one.connections_open;
    // Each agent judges for itself; a service has no more endpoints left alone than the one that left most.
    sum.ejected = sum.ejected.max(one.ejected);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_buckets_are_added_host_by_host() {
        let one = |success: u64, latency: [u64; 3]| pb::ServiceTraffic {
            window_ms: 60_000,
            requests: [("success".to_owned(), success)].into(),
            requests_per_second: 1.5,
            latency: latency.to_vec(),
            latency_bounds: vec![0.001, 0.01],
            retries: 1,
            connections_open: 2,
            ejected: 1,
        };
        let mut sum = pb::ServiceTraffic::default();
        add(&mut sum, &one(10, [9, 1, 0]));
        add(&mut sum, &one(5, [0, 0, 5]));
        let other = pb::ServiceTraffic { latency_bounds: vec![1.0], latency: vec![7, 7], ..one(1, [0; 3]) };
        add(&mut sum, &other);
        assert_eq!(sum.requests["success"], 16);
        assert_eq!(sum.latency, [9, 1, 5]);
        assert!((sum.requests_per_second - 4.5).abs() < 1e-9);
        assert_eq!((sum.retries, sum.connections_open, sum.ejected), (3, 6, 1));
    }
}
