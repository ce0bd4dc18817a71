//! What the proxy counts, and how a scrape reads it. The counters belong to the route and go with it: a service that is
//! deleted leaves no series behind. Labels are bounded: callers and endpoints beyond their bound share one series.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use arc_swap::ArcSwap;
use nave_agent_core::balancer::EndpointKey;
use parking_lot::RwLock;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use super::route::{CALLERS_MAX, Caller, Route};
use crate::clock;

/// Endpoints with a series of their own, on each port; more share the last.
const ENDPOINTS_MAX: usize = 256;

/// Upper bounds in seconds: those of OpenTelemetry's SDKs, and finer below, where calls on one host are.
pub(crate) const BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// How a request ended for its caller. Of gRPC the status counts, not the HTTP one that is always 200.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    Informational,
    Success,
    Redirect,
    ClientError,
    ServerError,
    /// The answer had begun when the endpoint, or the caller, went.
    Cut,
    /// Answered by the proxy itself: there was no endpoint, or too much to do.
    Refused,
}

impl Class {
    const ALL: [Self; 7] = [
        Self::Informational,
        Self::Success,
        Self::Redirect,
        Self::ClientError,
        Self::ServerError,
        Self::Cut,
        Self::Refused,
    ];

    pub(crate) const COUNT: usize = Self::ALL.len();

    pub(crate) const fn of_http(status: u16) -> Self {
        match status {
            0..=199 => Self::Informational,
            200..=299 => Self::Success,
            300..=399 => Self::Redirect,
            400..=499 => Self::ClientError,
            _ => Self::ServerError,
        }
    }

    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Informational => "informational",
            Self::Success => "success",
            Self::Redirect => "redirect",
            Self::ClientError => "client_error",
            Self::ServerError => "server_error",
            Self::Cut => "cut",
            Self::Refused => "refused",
        }
    }
}

/// Why the proxy itself ended a connection or a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    NoEndpoint,
    PendingFull,
    PendingTimeout,
    Connections,
    Requests,
    Idle,
    HeaderTimeout,
    HeaderTooLarge,
    Malformed,
    RequestTimeout,
    NotAllowed,
}

impl Refusal {
    const ALL: [Self; 11] = [
        Self::NoEndpoint,
        Self::PendingFull,
        Self::PendingTimeout,
        Self::Connections,
        Self::Requests,
        Self::Idle,
        Self::HeaderTimeout,
        Self::HeaderTooLarge,
        Self::Malformed,
        Self::RequestTimeout,
        Self::NotAllowed,
    ];

    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::NoEndpoint => "no_endpoint",
            Self::PendingFull => "pending_full",
            Self::PendingTimeout => "pending_timeout",
            Self::Connections => "connections_max",
            Self::Requests => "requests_max",
            Self::Idle => "idle",
            Self::HeaderTimeout => "header_timeout",
            Self::HeaderTooLarge => "header_too_large",
            Self::Malformed => "malformed",
            Self::RequestTimeout => "request_timeout",
            Self::NotAllowed => "not_allowed",
        }
    }
}

/// Of one port.
#[derive(Debug, Default)]
pub(crate) struct RouteMeter {
    callers: RwLock<Vec<(Caller, Arc<CallerMeter>)>>,
    endpoints: RwLock<BTreeMap<EndpointKey, Arc<EndpointMeter>>>,
    retries: AtomicU64,
    refusals: [AtomicU64; Refusal::ALL.len()],
}

/// Of one caller of one port. A connection holds it, so that a request looks nothing up.
#[derive(Debug, Default)]
pub(crate) struct CallerMeter {
    classes: [AtomicU64; Class::ALL.len()],
    /// One more than the bounds: what takes longer than all.
    latency: [AtomicU64; BUCKETS.len() + 1],
    latency_ns: AtomicU64,
    connections: AtomicU64,
    connections_ended: AtomicU64,
    bytes_to_endpoint: AtomicU64,
    bytes_to_caller: AtomicU64,
}

/// Of one endpoint.
#[derive(Debug, Default)]
pub(crate) struct EndpointMeter {
    tries: AtomicU64,
    failures: AtomicU64,
}

/// Counts a connection as open until it is dropped.
#[derive(Debug)]
pub(crate) struct OpenConnection(Arc<CallerMeter>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.connections_ended.fetch_add(1, Relaxed);
    }
}

impl RouteMeter {
    pub(crate) fn caller(&self, caller: &Caller) -> Arc<CallerMeter> {
        let find = |known: &[(Caller, Arc<CallerMeter>)]| {
            let found = known.iter().find(|(one, _)| one == caller);
            found.or_else(|| known.get(CALLERS_MAX - 1)).map(|(_, meter)| meter.clone())
        };
        if let Some(meter) = find(&self.callers.read()) {
            return meter;
        }
        let mut callers = self.callers.write();
        if let Some(meter) = find(&callers) {
            return meter;
        }
        let meter = Arc::<CallerMeter>::default();
        callers.push((caller.clone(), meter.clone()));
        meter
    }

    /// One try on an endpoint is over; `failed`: by the endpoint's fault.
    pub(crate) fn tried(&self, endpoint: EndpointKey, failed: bool) {
        let count = |meter: &EndpointMeter| {
            meter.tries.fetch_add(1, Relaxed);
            meter.failures.fetch_add(u64::from(failed), Relaxed);
        };
        if let Some(meter) = self.endpoints.read().get(&endpoint) {
            return count(meter);
        }
        let mut endpoints = self.endpoints.write();
        match endpoints.len() >= ENDPOINTS_MAX {
            true => endpoints.last_entry().into_iter().for_each(|last| count(last.get())),
            false => count(endpoints.entry(endpoint).or_default()),
        }
    }

    /// These endpoints are there; the counters of others go.
    pub(crate) fn keep(&self, there: impl Fn(EndpointKey) -> bool) {
        self.endpoints.write().retain(|key, _| there(*key));
    }

    pub(crate) fn retried(&self) {
        self.retries.fetch_add(1, Relaxed);
    }

    pub(crate) fn refused(&self, why: Refusal) {
        let index = Refusal::ALL.iter().position(|one| *one == why).expect("all are in ALL");
        self.refusals[index].fetch_add(1, Relaxed);
    }
}

impl CallerMeter {
    pub(crate) fn connection(self: &Arc<Self>) -> OpenConnection {
        self.connections.fetch_add(1, Relaxed);
        OpenConnection(self.clone())
    }

    /// A request is over, `took` after its head was there.
    pub(crate) fn request(&self, class: Class, took: Duration) {
        let index = Class::ALL.iter().position(|one| *one == class).expect("all are in ALL");
        self.classes[index].fetch_add(1, Relaxed);
        let seconds = took.as_secs_f64();
        let bucket = BUCKETS.iter().position(|bound| seconds <= *bound).unwrap_or(BUCKETS.len());
        self.latency[bucket].fetch_add(1, Relaxed);
        self.latency_ns.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    pub(crate) fn bytes(&self, to_endpoint: u64, to_caller: u64) {
        self.bytes_to_endpoint.fetch_add(to_endpoint, Relaxed);
        self.bytes_to_caller.fetch_add(to_caller, Relaxed);
    }
}

/// What has been counted of a port, of all its callers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Totals {
    pub(crate) classes: [u64; Class::COUNT],
    pub(crate) latency: [u64; BUCKETS.len() + 1],
    pub(crate) retries: u64,
    pub(crate) connections_open: u64,
}

impl Totals {
    pub(crate) fn add(&mut self, other: &Self) {
        let sum =
            |own: &mut [u64], other: &[u64]| own.iter_mut().zip(other).for_each(|(own, other)| *own += other);
        sum(&mut self.classes, &other.classes);
        sum(&mut self.latency, &other.latency);
        self.retries += other.retries;
        self.connections_open += other.connections_open;
    }

    /// What has come since; of a port that was made anew, all.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let of_before =
            |own: &[u64], before: &[u64]| own.iter().zip(before).all(|(own, before)| own >= before);
        if !of_before(&self.classes, &before.classes) || !of_before(&self.latency, &before.latency) {
            return *self;
        }
        let mut since = *self;
        let less = |own: &mut [u64], before: &[u64]| {
            own.iter_mut().zip(before).for_each(|(own, before)| *own -= before)
        };
        less(&mut since.classes, &before.classes);
        less(&mut since.latency, &before.latency);
        since.retries = self.retries.saturating_sub(before.retries);
        since
    }

    pub(crate) fn requests(&self) -> u64 {
        self.classes.iter().sum()
    }

    /// By the classes' words, those that are not 0.
    pub(crate) fn by_class(&self) -> BTreeMap<String, u64> {
        let classes = Class::ALL.iter().zip(self.classes).filter(|(_, count)| *count > 0);
        classes.map(|(class, count)| (class.word().to_owned(), count)).collect()
    }
}

impl RouteMeter {
    pub(crate) fn totals(&self) -> Totals {
        let mut totals = Totals { retries: self.retries.load(Relaxed), ..Totals::default() };
        for (_, caller) in self.callers.read().iter() {
            let ended = caller.connections_ended.load(Relaxed);
            totals.add(&Totals {
                classes: caller.classes.each_ref().map(|count| count.load(Relaxed)),
                latency: caller.latency.each_ref().map(|count| count.load(Relaxed)),
                retries: 0,
                connections_open: caller.connections.load(Relaxed).saturating_sub(ended),
            });
        }
        totals
    }
}

/// All routes, for the scrape: the table puts a new list here whenever it changes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Routes(
    /// Of services, by service and port.
    pub(crate) Arc<ArcSwap<Vec<Arc<Route>>>>,
    /// To single instances of them.
    pub(crate) Arc<ArcSwap<Vec<Arc<Route>>>>,
);

impl Routes {
    pub(crate) fn all(&self) -> Vec<Arc<Route>> {
        [self.0.load().as_slice(), self.1.load().as_slice()].concat()
    }
}

type Labels = Vec<(&'static str, String)>;

impl Collector for Routes {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut all = Exposition::default();
        self.all().iter().for_each(|route| all.add(route));
        all.encode(&mut encoder)
    }
}

/// The samples by metric, since all of one metric must stand together.
#[derive(Debug, Default)]
struct Exposition {
    requests: Vec<(Labels, u64)>,
    latency: Vec<(Labels, f64, Vec<u64>)>,
    connections: Vec<(Labels, u64)>,
    open: Vec<(Labels, u64)>,
    bytes: Vec<(Labels, u64)>,
    tries: Vec<(Labels, u64)>,
    failures: Vec<(Labels, u64)>,
    in_flight: Vec<(Labels, u64)>,
    ejected: Vec<(Labels, u64)>,
    ejections: Vec<(Labels, u64)>,
    retries: Vec<(Labels, u64)>,
    refusals: Vec<(Labels, u64)>,
}

impl Exposition {
    fn add(&mut self, route: &Route) {
        let port = match route.single {
            None => route.port.to_string(),
            Some(ordinal) => format!("{}#{ordinal}", route.port),
        };
        let of_route: Labels = vec![("service", route.service.to_string()), ("port", port)];
        let with = |name, value: String| [of_route.as_slice(), &[(name, value)]].concat();
        for (caller, meter) in route.meter.callers.read().iter() {
            self.add_caller(&with("caller", caller.to_string()), meter);
        }
        for (key, meter) in route.meter.endpoints.read().iter() {
            let labels = with("instance", key.instance.to_string());
            self.tries.push((labels.clone(), meter.tries.load(Relaxed)));
            self.failures.push((labels, meter.failures.load(Relaxed)));
        }
        for view in route.balancer.view(clock::monotonic()).iter().take(ENDPOINTS_MAX) {
            let labels = with("instance", view.spec.key.instance.to_string());
            self.in_flight.push((labels.clone(), view.in_flight));
            self.ejected.push((labels, u64::from(view.ejected)));
        }
        for (why, count) in Refusal::ALL.iter().zip(&route.meter.refusals) {
            let count = count.load(Relaxed);
            if count > 0 {
                self.refusals.push((with("reason", why.word().to_owned()), count));
            }
        }
        self.ejections.push((of_route.clone(), route.balancer.ejections()));
        self.retries.push((of_route, route.meter.retries.load(Relaxed)));
    }

    fn add_caller(&mut self, labels: &Labels, meter: &CallerMeter) {
        let with = |name, value: &str| [labels.as_slice(), &[(name, value.to_owned())]].concat();
        for (class, count) in Class::ALL.iter().zip(&meter.classes) {
            let count = count.load(Relaxed);
            if count > 0 {
                self.requests.push((with("class", class.word()), count));
            }
        }
        let buckets: Vec<u64> = meter.latency.iter().map(|bucket| bucket.load(Relaxed)).collect();
        if buckets.iter().any(|count| *count > 0) {
            let sum = Duration::from_nanos(meter.latency_ns.load(Relaxed)).as_secs_f64();
            self.latency.push((labels.clone(), sum, buckets));
        }
        let ended = meter.connections_ended.load(Relaxed);
        let begun = meter.connections.load(Relaxed);
        self.connections.push((labels.clone(), begun));
        self.open.push((labels.clone(), begun.saturating_sub(ended)));
        for (direction, bytes) in
            [("to_endpoint", &meter.bytes_to_endpoint), ("to_caller", &meter.bytes_to_caller)]
        {
            let bytes = bytes.load(Relaxed);
            if bytes > 0 {
                self.bytes.push((with("direction", direction), bytes));
            }
        }
    }

    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        use MetricType::{Counter, Gauge};
        for (name, help, kind, samples) in [
            ("proxy_requests", "Requests by how they ended for the caller", Counter, &self.requests),
            (
                "proxy_connections",
                "Connections of callers since they were first seen",
                Counter,
                &self.connections,
            ),
            ("proxy_connections_open", "Connections of callers", Gauge, &self.open),
            ("proxy_bytes", "Bytes of TCP streams", Counter, &self.bytes),
            ("proxy_tries", "Tries of requests and connections on an endpoint", Counter, &self.tries),
            ("proxy_tries_failed", "Tries that the endpoint failed", Counter, &self.failures),
            ("proxy_in_flight", "Tries under way on an endpoint", Gauge, &self.in_flight),
            ("proxy_ejected", "1 while an endpoint is left alone because it fails", Gauge, &self.ejected),
            ("proxy_ejections", "Times that an endpoint was left alone", Counter, &self.ejections),
            ("proxy_retries", "Tries after the first", Counter, &self.retries),
            ("proxy_refusals", "What the proxy itself ended, by reason", Counter, &self.refusals),
        ] {
            if samples.is_empty() {
                continue;
            }
            let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
            for (labels, value) in samples {
                let mut sample = metric.encode_family(labels)?;
                match kind {
                    Gauge => sample.encode_gauge(&i64::try_from(*value).unwrap_or(i64::MAX))?,
                    _ => sample.encode_counter::<NoLabelSet, u64, u64>(value, None)?,
                }
            }
        }
        self.encode_latency(encoder)
    }

    fn encode_latency(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        if self.latency.is_empty() {
            return Ok(());
        }
        let help = "From a request's head to the end of its answer";
        let mut metric: MetricEncoder<'_> =
            encoder.encode_descriptor("proxy_request_duration_seconds", help, None, MetricType::Histogram)?;
        for (labels, sum, counts) in &self.latency {
            let bounds = BUCKETS.iter().copied().chain([f64::MAX]);
            let buckets: Vec<(f64, u64)> = bounds.zip(counts.iter().copied()).collect();
            let count = counts.iter().sum();
            metric.encode_family(labels)?.encode_histogram::<NoLabelSet>(*sum, count, &buckets, None)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nave_agent_core::balancer::BalancerSettings;
    use nave_agent_core::directory::{PortRules, Protocol};
    use nave_proto::ids::InstanceId;
    use prometheus_client::registry::Registry;

    #[test]
    fn a_scrape_shows_each_series_once_and_nothing_of_what_is_gone() {
        let settings = BalancerSettings::default();
        let route = Route::new("web".into(), "http".into(), Protocol::Http, PortRules::default(), settings);
        let caller = route.meter.caller(&Caller::Unknown);
        let open = caller.connection();
        caller.request(Class::Success, Duration::from_millis(3));
        caller.request(Class::Success, Duration::from_secs(60));
        let key = |instance| EndpointKey { instance: InstanceId(instance), epoch: 1 };
        (1..=1000).for_each(|instance| route.meter.tried(key(instance), instance == 1));
        route.meter.refused(Refusal::Idle);
        let routes = Routes::default();
        routes.0.store(Arc::new(vec![Arc::new(route)]));
        let mut registry = Registry::with_prefix("nave_agent");
        registry.register_collector(Box::new(routes.clone()));
        let scrape = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            text
        };
        let text = scrape();
        let labels = "service=\"web\",port=\"http\"";
        for line in [
            format!("nave_agent_proxy_requests_total{{{labels},caller=\"unknown\",class=\"success\"}} 2"),
            format!("nave_agent_proxy_connections_open{{{labels},caller=\"unknown\"}} 1"),
            format!("nave_agent_proxy_tries_failed_total{{{labels},instance=\"i-1\"}} 1"),
            format!("nave_agent_proxy_tries_total{{{labels},instance=\"i-256\"}} 745"),
            format!("nave_agent_proxy_refusals_total{{{labels},reason=\"idle\"}} 1"),
            format!("nave_agent_proxy_request_duration_seconds_count{{{labels},caller=\"unknown\"}} 2"),
            format!(
                "nave_agent_proxy_request_duration_seconds_bucket{{le=\"0.005\",{labels},caller=\"unknown\"}} 1"
            ),
            format!(
                "nave_agent_proxy_request_duration_seconds_bucket{{le=\"+Inf\",{labels},caller=\"unknown\"}} 2"
            ),
        ] {
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
        assert_eq!(text.matches("# TYPE nave_agent_proxy_tries ").count(), 1);
        drop(open);
        routes.0.store(Arc::default());
        assert!(!scrape().contains("web"));
    }
}
