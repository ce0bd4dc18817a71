//! One port of a service as the engines see it: the rules, the choice of an endpoint, and what is counted. The table
//! makes one for each port and keeps it for as long as the port is there, so that a connection may hold it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use nave_agent_core::balancer::{
    Ask, Balancer, BalancerSettings, EndpointKey, EndpointSpec, NoPick, Pick, RetryBudget,
};
use nave_agent_core::directory::{PortRules, Protocol};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::http1::Pool;
use super::http2;
use super::meter::{Refusal, RouteMeter};
use super::peers::Peers;
use super::records::Records;
use super::spans::Label;
use super::tries::Tries;
use crate::clock;
use crate::directory::Asks;

/// Callers that have a retry budget and series of their own; the others share one.
pub(crate) const CALLERS_MAX: usize = 64;

/// Who opened a connection, as far as the kernel says.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Caller {
    /// The kernel does not say: it has gone already, or is no process of this machine.
    Unknown,
    Service(Arc<str>),
    /// A process that no service owns.
    User {
        host: Arc<str>,
        uid: u32,
    },
}

impl Caller {
    /// What another agent calls it.
    pub(crate) fn named(text: &str) -> Self {
        let user = || {
            let (host, uid) = text.strip_prefix("host/")?.split_once("/uid/")?;
            Some(Self::User { host: host.into(), uid: uid.parse().ok()? })
        };
        match text {
            "" | "unknown" => Self::Unknown,
            _ if text.contains('/') => user().unwrap_or(Self::Unknown),
            service => Self::Service(service.into()),
        }
    }
}

/// As a manifest's `allow` names it.
impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("unknown"),
            Self::Service(name) => f.write_str(name),
            Self::User { host, uid } => write!(f, "host/{host}/uid/{uid}"),
        }
    }
}

/// See the module's description.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) service: Arc<str>,
    pub(crate) port: Arc<str>,
    /// Leads to the instance of this ordinal alone.
    pub(crate) single: Option<u32>,
    pub(crate) protocol: Protocol,
    pub(crate) balancer: Balancer,
    pub(crate) meter: RouteMeter,
    /// Connections of HTTP/1.1 that wait for their next request.
    pub(crate) idle: Pool<EndpointKey>,
    /// The other hosts' agents.
    pub(crate) peers: Arc<Peers>,
    /// Where calls are noted.
    pub(crate) records: Arc<Records>,
    /// Where a service is named of which no endpoint is known.
    asks: Asks,
    /// Connections of HTTP/2, which calls share.
    pub(crate) http2: http2::Pool,
    rules: ArcSwap<PortRules>,
    /// Who may call; all, when there is none.
    allow: ArcSwapOption<Vec<String>>,
    budgets: Mutex<Vec<(Caller, Arc<RetryBudget>)>>,
    /// Something may be pickable that was not.
    changed: Notify,
    pending: AtomicUsize,
    connections: AtomicUsize,
    requests: AtomicUsize,
}

/// A place among so many, given back when dropped.
#[derive(Debug)]
pub(crate) struct Place<'a>(&'a AtomicUsize);

impl<'a> Place<'a> {
    fn take(count: &'a AtomicUsize, max: usize) -> Option<Self> {
        let within = |count: usize| (count < max).then_some(count + 1);
        count.fetch_update(Relaxed, Relaxed, within).ok().map(|_| Self(count))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// The same for a connection, which holds its route.
#[derive(Debug)]
pub(crate) struct ConnectionPlace(Arc<Route>);

impl Drop for ConnectionPlace {
    fn drop(&mut self) {
        drop(Place(&self.0.connections));
    }
}

impl Route {
    pub(crate) fn new(
        service: Arc<str>,
        port: Arc<str>,
        protocol: Protocol,
        rules: PortRules,
        settings: BalancerSettings,
    ) -> Self {
        Self {
            service,
            port,
            single: None,
            protocol,
            balancer: Balancer::new(settings),
            meter: RouteMeter::default(),
            idle: Pool::default(),
            peers: Arc::default(),
            records: Arc::default(),
            asks: Asks::default(),
            http2: http2::Pool::default(),
            rules: ArcSwap::from_pointee(rules),
            allow: ArcSwapOption::default(),
            budgets: Mutex::default(),
            changed: Notify::new(),
            pending: AtomicUsize::default(),
            connections: AtomicUsize::default(),
            requests: AtomicUsize::default(),
        }
    }

    /// With instances on other hosts.
    pub(crate) fn with_peers(self, peers: Arc<Peers>) -> Self {
        Self { peers, ..self }
    }

    /// To one instance of the service.
    pub(crate) fn into_single(self, ordinal: u32) -> Self {
        Self { single: Some(ordinal), ..self }
    }

    pub(crate) fn with_records(self, records: Arc<Records>) -> Self {
        Self { records, ..self }
    }

    /// For all calls of a connection.
    pub(crate) fn label(&self, caller: &Caller, is_peer: bool) -> Arc<Label> {
        let (service, port) = (self.service.clone(), self.port.clone());
        Arc::new(Label { service, port, caller: caller.to_string(), is_peer })
    }

    /// With somebody who gets to know the endpoints of what is called.
    pub(crate) fn with_asks(self, asks: Asks) -> Self {
        Self { asks, ..self }
    }

    pub(crate) fn set_allow(&self, allow: Option<Vec<String>>) {
        self.allow.store(allow.map(Arc::new));
    }

    /// Whether the service's list has the caller; without a list it has everybody. A caller of whom the kernel says
    /// nothing is on no list.
    pub(crate) fn allows(&self, caller: &Caller) -> bool {
        let allow = self.allow.load();
        let Some(allow) = allow.as_deref() else { return true };
        match caller {
            Caller::Unknown => false,
            Caller::Service(name) => allow.iter().any(|one| **one == **name),
            Caller::User { .. } => {
                let name = caller.to_string();
                allow.contains(&name)
            }
        }
    }

    /// As they are now; a connection may look again for each request.
    pub(crate) fn rules(&self) -> Arc<PortRules> {
        self.rules.load_full()
    }

    pub(crate) fn set_rules(&self, rules: PortRules) {
        self.rules.store(Arc::new(rules));
    }

    /// The endpoints are now these; whoever waits for one looks again. Called by the table only, under its lock.
    pub(crate) fn update(&self, specs: Vec<EndpointSpec>) {
        let there = |key| specs.iter().any(|spec| spec.key == key);
        self.meter.keep(there);
        self.idle.keep(there);
        self.http2.keep(there);
        self.balancer.update(clock::monotonic(), specs);
        self.changed.notify_waiters();
    }

    /// Closes connections to endpoints that nobody uses. To be called every second or so.
    pub(crate) fn sweep(&self) {
        self.idle.sweep();
        self.http2.sweep();
    }

    /// Those who wait look again, since an endpoint has changed its state.
    pub(crate) fn wake(&self) {
        self.changed.notify_waiters();
    }

    /// One budget for each caller, never more than `CALLERS_MAX`.
    pub(crate) fn budget(&self, caller: &Caller) -> Arc<RetryBudget> {
        let mut budgets = self.budgets.lock();
        if let Some((_, budget)) = budgets.iter().find(|(one, _)| one == caller) {
            return budget.clone();
        }
        if budgets.len() >= CALLERS_MAX {
            return budgets[0].1.clone();
        }
        let budget = Arc::<RetryBudget>::default();
        budgets.push((caller.clone(), budget.clone()));
        budget
    }

    /// `None`: the port has as many connections from this host as it may have.
    pub(crate) fn connection(self: &Arc<Self>) -> Option<ConnectionPlace> {
        std::mem::forget(Place::take(&self.connections, self.rules.load().connections_max)?);
        Some(ConnectionPlace(self.clone()))
    }

    /// `None`: as many requests are under way from this host as may be.
    pub(crate) fn request(&self) -> Option<Place<'_>> {
        Place::take(&self.requests, self.rules.load().requests_max)
    }

    /// An endpoint for the next try of a call. When all have been tried, those that took nothing of it are asked again
    /// after a moment, for as long as an endpoint would be waited for: one whose queue of connections is full, or whose
    /// process is just being started anew, answers a little later.
    ///
    /// # Errors
    /// As for [`pick`](Self::pick).
    pub(crate) async fn next(
        &self,
        tries: &mut Tries,
        hash: Option<u64>,
        deadline: Option<Instant>,
    ) -> Result<Pick, NoPick> {
        loop {
            let picked = self.pick(&Ask { tried: tries.keys(), hash }, deadline).await;
            if !matches!(picked, Err(NoPick::AllTried)) {
                return picked;
            }
            let rules = self.rules();
            let due = tries.due(rules.pending_timeout);
            let due = due.filter(|due| deadline.is_none_or(|deadline| *due < deadline));
            let Some(due) = due.filter(|_| tries.forgive_unreached()) else { return picked };
            let Some(_place) = Place::take(&self.pending, rules.pending_max) else {
                self.meter.refused(Refusal::PendingFull);
                return picked;
            };
            // Earlier when the endpoints change.
            let _either = timeout_at(due, self.changed.notified()).await;
        }
    }

    /// An endpoint for one try. While there is none at all, it is waited for, by a bounded number of callers for a
    /// bounded time and not beyond `deadline`: a service that is being restarted is back within that.
    ///
    /// # Errors
    /// [`NoPick::AllTried`] at once; the other reasons after the wait, or at once when too many wait already.
    pub(crate) async fn pick(&self, ask: &Ask<'_>, deadline: Option<Instant>) -> Result<Pick, NoPick> {
        let now = clock::monotonic();
        let mut why = match self.balancer.pick(now, &mut rand::rng(), ask) {
            Err(why) if why != NoPick::AllTried => why,
            picked => return picked,
        };
        if why == NoPick::Empty {
            self.asks.ask(&self.service);
        }
        let rules = self.rules();
        let Some(_place) = Place::take(&self.pending, rules.pending_max) else {
            self.meter.refused(Refusal::PendingFull);
            return Err(why);
        };
        let until = Instant::now() + rules.pending_timeout;
        let until = deadline.map_or(until, |deadline| deadline.min(until));
        loop {
            // Listening before looking: what changes between the two is not missed.
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let now = clock::monotonic();
            why = match self.balancer.pick(now, &mut rand::rng(), ask) {
                Err(why) if why != NoPick::AllTried => why,
                picked => return picked,
            };
            let look_again = match why {
                NoPick::AllOut { until: Some(due) } => Instant::now() + due.since(now) + LOOK_AGAIN_MIN,
                // The outcome of a probe wakes nobody.
                NoPick::AllOut { until: None } => Instant::now() + LOOK_AGAIN_MIN * 10,
                NoPick::Empty | NoPick::NoneReady | NoPick::AllTried => until,
            };
            let timed_out = timeout_at(look_again.min(until), changed).await.is_err();
            if timed_out && Instant::now() >= until {
                self.meter.refused(Refusal::PendingTimeout);
                return Err(why);
            }
        }
    }
}

/// Between two looks whether one that failed may be asked again.
const LOOK_AGAIN_MIN: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;
    use nave_agent_core::balancer::Reach;
    use nave_agent_core::directory::EndpointState;
    use nave_proto::ids::InstanceId;

    fn route(rules: PortRules) -> Route {
        Route::new("web".into(), "http".into(), Protocol::Tcp, rules, BalancerSettings::default())
    }

    fn endpoint(instance: u64, state: EndpointState) -> EndpointSpec {
        let key = EndpointKey { instance: InstanceId(instance), epoch: 1 };
        EndpointSpec { key, reach: Reach::Local(([127, 0, 0, 1], 1).into()), state, weight: 1 }
    }

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_is_waited_for_but_not_for_ever_and_not_by_everybody() {
        let route = route(PortRules { pending_max: 1, ..PortRules::default() });
        let begun = Instant::now();
        assert_eq!(route.pick(&Ask::default(), None).await.unwrap_err(), NoPick::Empty);
        assert_eq!(begun.elapsed().as_secs(), 3);

        route.update(vec![endpoint(1, EndpointState::Starting)]);
        let ask = Ask::default();
        let waits = route.pick(&ask, None);
        let second = async {
            let too_many = route.pick(&Ask::default(), None).await.unwrap_err();
            assert_eq!(too_many, NoPick::NoneReady);
            route.update(vec![endpoint(1, EndpointState::Ready)]);
        };
        let (picked, ()) = tokio::join!(biased; waits, second);
        assert_eq!(picked.unwrap().endpoint().key.instance, InstanceId(1));
        let deadline = Some(Instant::now() + Duration::from_millis(100));
        route.update(Vec::new());
        let begun = Instant::now();
        route.pick(&Ask::default(), deadline).await.unwrap_err();
        assert_eq!(begun.elapsed().as_millis(), 100, "the caller's deadline counts");
    }

    #[tokio::test]
    async fn what_all_have_failed_is_not_waited_for_and_is_explained() {
        let route = route(PortRules::default());
        route.update(vec![endpoint(1, EndpointState::Ready), endpoint(2, EndpointState::Ready)]);
        let mut tries = Tries::default();
        for _ in 0..2 {
            let pick = route.next(&mut tries, None, None).await.unwrap();
            tries.add(pick.endpoint(), "connection refused", false);
        }
        let end = route.next(&mut tries, None, None).await.unwrap_err();
        assert_eq!(end, NoPick::AllTried);
        let said = tries.explain(&route, Some(end));
        assert!(said.starts_with("nave: web cannot be reached; tried i-"), "{said}");
        assert!(
            said.contains("i-1: connection refused") && said.contains("i-2: connection refused"),
            "{said}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_took_is_offered_again_for_a_while() {
        let route = route(PortRules::default());
        route.update(vec![endpoint(1, EndpointState::Ready), endpoint(2, EndpointState::Ready)]);
        let (begun, mut tries) = (Instant::now(), Tries::default());
        let end = loop {
            match route.next(&mut tries, None, None).await {
                Ok(pick) => {
                    tries.add(pick.endpoint(), "connect timed out", pick.endpoint().key.instance.0 == 1)
                }
                Err(end) => break end,
            }
        };
        assert_eq!(end, NoPick::AllTried);
        let took = begun.elapsed().as_millis();
        assert!((2500..=3000).contains(&took), "{took} ms");
        let said = tries.explain(&route, Some(end));
        assert!(
            said.contains("i-1: connect timed out (") && said.contains("i-2: connect timed out"),
            "{said}"
        );
        assert_eq!(said.matches(" times)").count(), 1, "{said}");
        // The caller's own time counts.
        let (begun, mut tries) = (Instant::now(), Tries::default());
        let deadline = Some(begun + Duration::from_millis(500));
        while let Ok(pick) = route.next(&mut tries, None, deadline).await {
            tries.add(pick.endpoint(), "connect timed out", true);
        }
        assert!(begun.elapsed().as_millis() <= 500);
    }

    #[test]
    fn a_list_names_services_and_users_and_never_the_unknown() {
        let route = route(PortRules::default());
        let (web, jobs, user) =
            (Caller::named("web"), Caller::named("jobs"), Caller::named("host/box/uid/7"));
        for caller in [&web, &jobs, &user, &Caller::Unknown] {
            assert!(route.allows(caller), "without a list {caller} may call");
            assert_eq!(Caller::named(&caller.to_string()), *caller);
        }
        route.set_allow(Some(vec!["web".to_owned(), "host/box/uid/7".to_owned()]));
        assert!(route.allows(&web) && route.allows(&user));
        for caller in
            [&jobs, &Caller::Unknown, &Caller::named("host/box/uid/8"), &Caller::named("host/web/uid/x")]
        {
            assert!(!route.allows(caller), "{caller}");
        }
        // A service cannot take a user's name: names have no slash.
        assert!(!route.allows(&Caller::named("host/other/uid/7")));
        route.set_allow(Some(Vec::new()));
        assert!(!route.allows(&web));
    }

    #[test]
    fn places_are_bounded_and_come_back() {
        let route = Arc::new(route(PortRules { connections_max: 1, ..PortRules::default() }));
        let first = route.connection().unwrap();
        assert!(route.connection().is_none());
        drop(first);
        assert!(route.connection().is_some());
        assert_eq!(route.connections.load(Relaxed), 0);
        route.set_rules(PortRules { requests_max: 1, ..PortRules::default() });
        let request = route.request().unwrap();
        assert!(route.request().is_none() && route.connection().is_some());
        drop(request);
        assert!(route.request().is_some());
    }
}
