//! Puts the services of a member together and serves them on its port until the member stops.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use nave_proto::pb;
use nave_tls::{ClientPolicy, IncomingLimits};
use pb::agent_session_server::AgentSessionServer;
use pb::cluster_service_server::ClusterServiceServer;
use pb::enroll_service_server::EnrollServiceServer;
use pb::event_service_server::EventServiceServer;
use pb::host_service_server::HostServiceServer;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::service::{Routes, RoutesBuilder};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::api::cluster::Cluster;
use crate::api::connection::{self, note_panic};
use crate::api::enroll::Enroll;
use crate::api::events::Events;
use crate::api::gate::Gate;
use crate::api::hosts::Hosts;
use crate::api::services::Services;
use crate::api::{Hub, member};
use crate::dispatch::Dispatch;

/// How long calls under way may go on once the member stops.
const DRAIN: Duration = Duration::from_secs(3);

/// The services whose health is told one by one; the empty name stands for the member.
const HEALTH_NAMES: [&str; 4] =
    ["", "nave.v1.ServiceService", "nave.v1.ClusterService", "nave.v1.AgentSession"];

/// Serves the API until `hub.stop`, then lets the calls under way finish.
pub(crate) async fn serve(
    hub: Arc<Hub>,
    listener: TcpListener,
    health: HealthReporter,
) -> Result<(), String> {
    let tls = nave_tls::server_config(&hub.credentials, ClientPolicy { anonymous: true, expired: true });
    let gate = gate(&hub, health)?;
    let incoming = nave_tls::incoming(listener, tls, IncomingLimits::default(), hub.stop.child_token());
    let mut incoming = std::pin::pin!(incoming);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = incoming.next() => match accepted {
                Some(Ok(stream)) => {
                    connections.spawn(connection::serve(stream, gate.clone(), hub.stop.clone()));
                }
                Some(Err(error)) => return Err(format!("the API server failed: {error}")),
                None => break,
            },
            Some(ended) = connections.join_next() => note_panic(ended),
        }
    }
    // The last handshakes are done, so this began a moment after `hub.stop`.
    let all_ended = async { while connections.join_next().await.is_some() {} };
    if timeout(DRAIN, all_ended).await.is_err() {
        tracing::debug!("calls still under way were cut off");
    }
    Ok(())
}

fn gate(hub: &Arc<Hub>, health: HealthReporter) -> Result<Gate, String> {
    Ok(Gate::new(hub.cluster, Services::new(hub.clone()), routes(hub, health)?))
}

/// All services but `ServiceService`, whose calls the gate hands on itself.
fn routes(hub: &Arc<Hub>, health: HealthReporter) -> Result<Routes, String> {
    let reflection = |error| format!("the descriptors of nave.v1 are damaged: {error}");
    let reflect = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(nave_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let (raft, members) = hub.raft.services();
    let mut routes = RoutesBuilder::default();
    routes
        .add_service(HostServiceServer::new(Hosts::new(hub.clone())))
        .add_service(EventServiceServer::new(Events::new(hub.clone())))
        .add_service(ClusterServiceServer::new(Cluster::new(hub.clone())))
        .add_service(EnrollServiceServer::new(Enroll::new(hub.clone())))
        .add_service(AgentSessionServer::new(Dispatch::new(hub.clone())))
        .add_service(raft)
        .add_service(member::service(hub, members))
        .add_service(tonic_health::pb::health_server::HealthServer::new(
            tonic_health::server::HealthService::from_health_reporter(health),
        ))
        .add_service(reflect().build_v1().map_err(reflection)?)
        .add_service(reflect().build_v1alpha().map_err(reflection)?);
    Ok(routes.routes().prepare())
}

/// Says that this member serves while it knows a leader, until the member stops.
pub(crate) async fn report_health(hub: Arc<Hub>, health: HealthReporter) {
    let mut status = hub.raft.subscribe_status();
    loop {
        let serving = if status.borrow_and_update().leader.is_some() {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        for name in HEALTH_NAMES {
            health.set_service_status(name, serving).await;
        }
        tokio::select! {
            changed = status.changed() => if changed.is_err() { break },
            () = hub.stop.cancelled() => break,
        }
    }
    for name in HEALTH_NAMES {
        health.set_service_status(name, ServingStatus::NotServing).await;
    }
}

/// Waits for the tasks behind open streams, which end with `hub.stop`.
pub(crate) async fn drain(hub: &Hub) {
    hub.tasks.close();
    if timeout(DRAIN, hub.tasks.wait()).await.is_err() {
        tracing::warn!(left = hub.tasks.len(), "streams did not end in time");
    }
}
