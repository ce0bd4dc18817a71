//! What this host's processes have called of late: the counters as they were every few seconds of the last minute, so
//! that a rate is one of now and not of all the time since the agent began. Read by the API for `nave status`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use nave_agent_core::Monotonic;
use nave_proto::pb;
use parking_lot::Mutex;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::meter::{BUCKETS, Routes, Totals};
use crate::clock;

/// Between two looks at the counters. A thousand services are added up in less than a millisecond.
const LOOK: Duration = Duration::from_secs(5);
/// The oldest is a minute old.
const LOOKS: usize = 13;

/// See the module's description. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Recent {
    routes: Routes,
    looks: Arc<Mutex<VecDeque<Look>>>,
}

#[derive(Debug)]
struct Look {
    at: Monotonic,
    /// Those that were ever called.
    services: BTreeMap<Arc<str>, Totals>,
}

impl Recent {
    pub(crate) fn new(routes: Routes) -> Self {
        let recent = Self { routes, looks: Arc::default() };
        recent.look(clock::monotonic());
        recent
    }

    /// Looks until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
            self.look(clock::monotonic());
        }
    }

    fn look(&self, now: Monotonic) {
        let mut services = BTreeMap::<Arc<str>, Totals>::new();
        for route in self.routes.all() {
            let totals = route.meter.totals();
            if totals.requests() > 0 {
                services.entry(route.service.clone()).or_default().add(&totals);
            }
        }
        let mut looks = self.looks.lock();
        looks.push_back(Look { at: now, services });
        if looks.len() > LOOKS {
            looks.pop_front();
        }
    }

    /// Calls of a service in the last minute, or since the agent began. A service that nobody here has called has none.
    pub(crate) fn of(&self, service: &str) -> pb::ServiceTraffic {
        self.of_at(service, clock::monotonic())
    }

    fn of_at(&self, service: &str, now: Monotonic) -> pb::ServiceTraffic {
        let (mut totals, mut ejected) = (Totals::default(), 0);
        for route in self.routes.all().iter().filter(|route| *route.service == *service) {
            totals.add(&route.meter.totals());
            ejected += route.balancer.view(now).iter().filter(|endpoint| endpoint.ejected).count();
        }
        let looks = self.looks.lock();
        let Some(oldest) = looks.front() else { return pb::ServiceTraffic::default() };
        let before = oldest.services.get(service).copied().unwrap_or_default();
        let (window, recent) = (now.since(oldest.at), totals.since(&before));
        #[expect(clippy::cast_precision_loss, reason = "nobody calls 2^53 times a minute")]
        let requests = recent.requests() as f64;
        pb::ServiceTraffic {
            window_ms: u64::try_from(window.as_millis()).unwrap_or(u64::MAX),
            requests: recent.by_class(),
            requests_per_second: requests / window.as_secs_f64().max(1.0),
            latency: recent.latency.to_vec(),
            latency_bounds: BUCKETS.to_vec(),
            retries: recent.retries,
            connections_open: totals.connections_open,
            ejected: u32::try_from(ejected).unwrap_or(u32::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use nave_agent_core::balancer::BalancerSettings;
    use nave_agent_core::directory::{PortRules, Protocol};

    use super::*;
    use crate::proxy::meter::Class;
    use crate::proxy::route::{Caller, Route};

    fn route() -> Arc<Route> {
        let (rules, settings) = (PortRules::default(), BalancerSettings::default());
        Arc::new(Route::new("web".into(), "http".into(), Protocol::Http, rules, settings))
    }

    fn calls(route: &Route, count: usize, class: Class) {
        let meter = route.meter.caller(&Caller::Unknown);
        (0..count).for_each(|_| meter.request(class, Duration::from_millis(3)));
    }

    #[test]
    fn only_the_last_minute_counts_and_a_port_made_anew_begins_at_none() {
        let (routes, at) = (Routes::default(), |seconds: i64| Monotonic(seconds * 1_000_000_000));
        let first = route();
        routes.0.store(Arc::new(vec![first.clone()]));
        let recent = Recent { routes: routes.clone(), looks: Arc::default() };
        calls(&first, 1000, Class::Success);
        (0..30).for_each(|look| recent.look(at(look * 5)));
        assert_eq!(recent.of_at("web", at(145)).requests, BTreeMap::new(), "all of it is long ago");
        calls(&first, 30, Class::Success);
        calls(&first, 30, Class::ServerError);
        let traffic = recent.of_at("web", at(145));
        assert_eq!(traffic.window_ms, 60_000);
        assert_eq!(traffic.requests, [("server_error".to_owned(), 30), ("success".to_owned(), 30)].into());
        assert!((traffic.requests_per_second - 1.0).abs() < 1e-9, "{traffic:?}");
        assert_eq!(traffic.latency.iter().sum::<u64>(), 60);
        assert_eq!(traffic.latency.len(), traffic.latency_bounds.len() + 1);

        let second = route();
        routes.0.store(Arc::new(vec![second.clone()]));
        calls(&second, 5, Class::Success);
        assert_eq!(recent.of_at("web", at(146)).requests, [("success".to_owned(), 5)].into());
        assert_eq!(recent.of_at("db", at(146)).requests, BTreeMap::new());
    }
}
