//! `/metrics` (OpenMetrics) and `/healthz` in plain HTTP, on a loopback address only; the configuration refuses
//! others. What the parts of a member count lives in [`Metrics`]; what they know anyway (Raft's position, the ring)
//! is read at each scrape.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use parking_lot::RwLock;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tracing::error;

use crate::api::Hub;

/// Counters and gauges that the parts of a member keep.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: RwLock<Registry>,
    pub(crate) propose_seconds: Histogram,
    pub(crate) propose_failures: Counter,
    pub(crate) plan_seconds: Histogram,
    pub(crate) plan_steps: Counter,
    pub(crate) sessions: Gauge,
    pub(crate) directories_resumed: Counter,
    pub(crate) directories_whole: Counter,
    session_numbers: AtomicU64,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        // 0.1 ms, doubled up to 6.5 s.
        let buckets = || Histogram::new(exponential_buckets(0.0001, 2.0, 17));
        let metrics = Self {
            registry: RwLock::new(Registry::with_prefix("nave")),
            propose_seconds: buckets(),
            propose_failures: Counter::default(),
            plan_seconds: buckets(),
            plan_steps: Counter::default(),
            sessions: Gauge::default(),
            directories_resumed: Counter::default(),
            directories_whole: Counter::default(),
            session_numbers: AtomicU64::new(0),
        };
        {
            let mut registry = metrics.registry.write();
            registry.register(
                "propose_seconds",
                "From a writing call's proposal to its commit, as callers of this member saw it",
                metrics.propose_seconds.clone(),
            );
            registry.register(
                "propose_failures",
                "Writing calls that were not acknowledged",
                metrics.propose_failures.clone(),
            );
            registry.register("plan_seconds", "Time to plan what was dirty", metrics.plan_seconds.clone());
            registry.register("plan_steps", "Steps that the scheduler committed", metrics.plan_steps.clone());
            registry.register("agent_sessions", "Agents connected to this member", metrics.sessions.clone());
            registry.register(
                "agent_directories_resumed",
                "Sessions in which an agent was told only what had changed in the directory since its last one",
                metrics.directories_resumed.clone(),
            );
            registry.register(
                "agent_directories_whole",
                "Sessions in which an agent was told the whole directory",
                metrics.directories_whole.clone(),
            );
        }
        metrics
    }

    /// A number for a session, greater than all before.
    pub(crate) fn next_session(&self) -> u64 {
        self.session_numbers.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// What is read at a scrape: name, kind, meaning, value.
type Read = (&'static str, &'static str, &'static str, u64);

fn readings(hub: &Hub) -> Vec<Read> {
    let status = hub.raft.status();
    let counters = hub.raft.counters();
    let ring = hub.changes.size();
    let size = |size: usize| u64::try_from(size).unwrap_or(u64::MAX);
    let contact_ms = u64::try_from(status.last_quorum_contact.as_millis()).unwrap_or(u64::MAX);
    vec![
        ("nave_raft_term", "gauge", "The term this member is in", status.term),
        ("nave_raft_leader", "gauge", "Id of the leader; 0: none known", status.leader.map_or(0, |id| id.0)),
        ("nave_raft_leads", "gauge", "1: this member leads", u64::from(status.leader == Some(hub.id))),
        ("nave_raft_applied_index", "gauge", "Newest log entry in the state", status.applied_index),
        ("nave_raft_last_log_index", "gauge", "Newest entry of the log", status.last_log_index),
        (
            "nave_raft_quorum_contact_age_milliseconds",
            "gauge",
            "Since a leader with a quorum was heard",
            contact_ms,
        ),
        ("nave_log_entries_total", "counter", "Entries written to the log", counters.entries_appended_total),
        ("nave_log_fsyncs_total", "counter", "Synced writes of the log", counters.fsyncs_total),
        (
            "nave_log_fsync_nanoseconds_total",
            "counter",
            "Time spent in synced writes",
            counters.fsync_ns_total,
        ),
        (
            "nave_data_disk_free_bytes",
            "gauge",
            "Room on the data directory's file system",
            counters.disk_free_bytes,
        ),
        ("nave_raft_snapshot_index", "gauge", "Newest entry of the newest snapshot", status.snapshot_index),
        (
            "nave_watchers",
            "gauge",
            "Watches and agent sessions that wait for changes",
            size(hub.changes.watchers()),
        ),
        ("nave_ring_changes", "gauge", "Changes kept for watchers", size(ring.changes)),
        ("nave_ring_bytes", "gauge", "Memory of the changes kept for watchers", size(ring.bytes)),
        ("nave_resident_bytes", "gauge", "Resident memory of this process", resident_bytes()),
    ]
}

/// From /proc/self/statm; 0 where there is none.
fn resident_bytes() -> u64 {
    const PAGE_BYTES: u64 = 4096;
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).map_or(0, |pages| pages * PAGE_BYTES)
}

/// Serves both paths until the member stops.
pub(crate) async fn serve(hub: Arc<Hub>, listener: TcpListener) -> Result<(), String> {
    let stop = hub.stop.clone().cancelled_owned();
    let router =
        Router::new().route("/metrics", get(metrics)).route("/healthz", get(healthz)).with_state(hub);
    axum::serve(listener, router)
        .with_graceful_shutdown(stop)
        .await
        .map_err(|error| format!("the metrics server failed: {error}"))
}

async fn metrics(State(hub): State<Arc<Hub>>) -> impl IntoResponse {
    match text(&hub.metrics.registry.read(), &readings(&hub)) {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            (StatusCode::OK, [(header::CONTENT_TYPE, kind)], text)
        }
        Err(cause) => {
            error!(%cause, "metrics cannot be written");
            let kind = "text/plain";
            (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, kind)], cause.to_string())
        }
    }
}

fn text(registry: &Registry, readings: &[Read]) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    for (name, kind, help, value) in readings {
        // OpenMetrics names a counter's family without its suffix.
        let family = name.strip_suffix("_total").unwrap_or(name);
        write!(text, "# HELP {family} {help}.\n# TYPE {family} {kind}\n{name} {value}\n")?;
    }
    // Ends with the mark of the end.
    encode(&mut text, registry)?;
    Ok(text)
}

/// 200 while this member knows a leader, so that whoever starts it can wait for it.
async fn healthz(State(hub): State<Arc<Hub>>) -> impl IntoResponse {
    match hub.raft.status().leader {
        Some(leader) => (StatusCode::OK, format!("ok, {leader} leads\n")),
        None => (StatusCode::SERVICE_UNAVAILABLE, "no leader is known\n".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_openmetrics() {
        let metrics = Metrics::new();
        metrics.propose_seconds.observe(0.001);
        metrics.propose_failures.inc();
        let readings = [("nave_log_fsyncs_total", "counter", "Synced writes", 7)];
        let text = text(&metrics.registry.read(), &readings).unwrap();
        assert!(
            text.starts_with("# HELP nave_log_fsyncs Synced writes.\n# TYPE nave_log_fsyncs counter\n"),
            "{text}"
        );
        assert!(text.contains("nave_log_fsyncs_total 7\n"), "{text}");
        assert!(text.contains("nave_propose_failures_total 1\n"), "{text}");
        assert!(text.contains("nave_propose_seconds_count 1\n"), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
        assert_eq!(text.matches("# EOF").count(), 1);
    }

    #[test]
    fn session_numbers_rise() {
        let metrics = Metrics::new();
        assert!(metrics.next_session() < metrics.next_session());
    }
}
