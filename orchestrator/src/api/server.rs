//! Puts the services of a member together and serves them on its port until the member stops.

use std::sync::Arc;
use std::time::Duration;

use nave_proto::pb;
use nave_tls::{ClientPolicy, IncomingLimits};
use pb::agent_session_server::AgentSessionServer;
use pb::cluster_service_server::ClusterServiceServer;
use pb::enroll_service_server::EnrollServiceServer;
use pb::event_service_server::EventServiceServer;
use pb::host_service_server::HostServiceServer;
use pb::service_service_server::ServiceServiceServer;
use tokio::net::TcpListener;
use tokio::time::timeout;
use tonic::service::{Routes, RoutesBuilder};
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::api::cluster::Cluster;
use crate::api::enroll::Enroll;
use crate::api::events::Events;
use crate::api::gate::Gate;
use crate::api::hosts::Hosts;
use crate::api::services::Services;
use crate::api::{Hub, member};
use crate::dispatch::Dispatch;

/// Calls under way on one connection. A client library that multiplexes keeps at most this many; 512 clients on one
/// channel fit twice.
const STREAMS_PER_CONNECTION_MAX: u32 = 1024;
/// A stream's window: a Raft append of 1 MiB and a page of a listing pass without waiting for a round trip.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// A connection's window. What a connection may make us hold is this much at most, 4 MiB.
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
/// A peer that vanished without a word is noticed after interval and time-out.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
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
    let incoming = nave_tls::incoming(listener, tls, IncomingLimits::default(), hub.stop.child_token());
    let gate = gate(&hub, health)?;
    let stop = hub.stop.clone();
    let serving = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .serve_with_incoming_shutdown(gate, incoming, hub.stop.clone().cancelled_owned());
    let drained = async move {
        stop.cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        result = serving => result.map_err(|error| format!("the API server failed: {error}")),
        () = drained => {
            tracing::debug!("calls still under way were cut off");
            Ok(())
        }
    }
}

fn gate(hub: &Arc<Hub>, health: HealthReporter) -> Result<Gate, String> {
    let services = ServiceServiceServer::new(Services::new(hub.clone()));
    Ok(Gate::new(hub.cluster, services, routes(hub, health)?))
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
