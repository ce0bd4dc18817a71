//! `/metrics` and `/healthz` in plain text, on a loopback port only (`AgentConfig::check` refuses others).
//! The main loop keeps the numbers; a scrape only formats them.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::proxy::Routes;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct StateLabel {
    pub(crate) state: &'static str,
}

/// Shared with whoever counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    pub(crate) instances: Family<StateLabel, Gauge>,
    pub(crate) process_starts: Counter<u64, AtomicU64>,
    pub(crate) process_exits: Counter<u64, AtomicU64>,
    pub(crate) lines_dropped: Counter<u64, AtomicU64>,
    pub(crate) keeper_up: Gauge,
    pub(crate) session_connected: Gauge,
    pub(crate) sessions: Counter<u64, AtomicU64>,
    pub(crate) wanted_generation: Gauge,
    pub(crate) certificate_expires: Gauge,
    /// Of the proxy, which counts for itself.
    pub(crate) routes: Routes,
}

impl Metrics {
    fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix("nave_agent");
        registry.register("instances", "Instances on this host by observed state", self.instances.clone());
        registry.register(
            "process_starts",
            "Processes started since this agent began",
            self.process_starts.clone(),
        );
        registry.register(
            "process_exits",
            "Processes that ended since this agent began",
            self.process_exits.clone(),
        );
        registry.register(
            "lines_dropped",
            "Output lines that the keeper could not write",
            self.lines_dropped.clone(),
        );
        registry.register("keeper_up", "1 while the keeper answers", self.keeper_up.clone());
        registry.register(
            "session_connected",
            "1 while a hub member hears us",
            self.session_connected.clone(),
        );
        registry.register("sessions", "Sessions with hub members begun", self.sessions.clone());
        registry.register(
            "wanted_generation",
            "Generation of the wanted set in use",
            self.wanted_generation.clone(),
        );
        registry.register(
            "certificate_expires_seconds",
            "End of this host's certificate, seconds since 1970",
            self.certificate_expires.clone(),
        );
        registry.register_collector(Box::new(self.routes.clone()));
        registry
    }
}

struct Served {
    metrics: Metrics,
    registry: Registry,
}

/// Serves until `shutdown`.
pub(crate) async fn serve(
    listener: TcpListener,
    metrics: Metrics,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let registry = metrics.registry();
    let router = Router::new()
        .route("/metrics", get(scrape))
        .route("/healthz", get(health))
        .with_state(Arc::new(Served { metrics, registry }));
    axum::serve(listener, router).with_graceful_shutdown(shutdown.cancelled_owned()).await
}

async fn scrape(State(served): State<Arc<Served>>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &served.registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Healthy is an agent that has its keeper: without the hub it does its work all the same.
async fn health(State(served): State<Arc<Served>>) -> (StatusCode, String) {
    let hub = match served.metrics.session_connected.get() {
        1 => "hub: connected",
        _ => "hub: not connected, working on",
    };
    match served.metrics.keeper_up.get() {
        1 => (StatusCode::OK, format!("ok\n{hub}\n")),
        _ => (StatusCode::SERVICE_UNAVAILABLE, format!("keeper: not connected\n{hub}\n")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio::task::JoinSet;

    async fn get(port: u16, path: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn health_follows_the_keeper_and_names_the_hub() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let metrics = Metrics::default();
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, metrics.clone(), CancellationToken::new()));
        assert!(get(port, "/healthz").await.starts_with("HTTP/1.1 503"));
        metrics.keeper_up.set(1);
        let healthy = get(port, "/healthz").await;
        assert!(healthy.starts_with("HTTP/1.1 200") && healthy.contains("hub: not connected"), "{healthy}");
        metrics.instances.get_or_create(&StateLabel { state: "running" }).set(3);
        let scraped = get(port, "/metrics").await;
        assert!(scraped.contains("nave_agent_instances{state=\"running\"} 3"), "{scraped}");
        assert!(scraped.contains("nave_agent_keeper_up 1"), "{scraped}");
    }
}
