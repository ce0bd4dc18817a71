//! What the proxy knows: services as the directory says them, and this host's own endpoints as its main loop says them,
//! whose word is newer and wins. A change goes to the balancers at once, under one short lock that no call ever takes.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use nave_agent_core::address::service_address;
use nave_agent_core::balancer::{BalancerSettings, EndpointKey, EndpointSpec, Reach};
use nave_agent_core::directory::{EndpointState, Port, Protocol, Service};
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use parking_lot::Mutex;

use super::meter::Routes;
use super::peers::Peers;
use super::records::Records;
use super::route::Route;
use crate::clock;
use crate::directory::Asks;

/// Words on instances that have ended, kept until the directory knows it too; beyond, the oldest epochs go.
const WORDS_MAX: usize = 4096;

/// What the main loop says of an endpoint of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LocalWord {
    Starting,
    Ready(BTreeMap<String, u16>),
    Draining,
    /// Its process has ended.
    Gone,
}

impl LocalWord {
    /// From an instance as its supervisor sees it.
    pub(crate) fn new(state: pb::EndpointState, ports: &BTreeMap<String, u16>) -> Self {
        match state {
            pb::EndpointState::Ready => Self::Ready(ports.clone()),
            pb::EndpointState::Starting => Self::Starting,
            pb::EndpointState::Draining => Self::Draining,
            pb::EndpointState::Unspecified => Self::Gone,
        }
    }

    /// Whether [`LocalWord::new`] would say the same.
    pub(crate) fn is(&self, state: pb::EndpointState, ports: &BTreeMap<String, u16>) -> bool {
        match self {
            Self::Ready(known) => state == pb::EndpointState::Ready && known == ports,
            Self::Starting => state == pb::EndpointState::Starting,
            Self::Draining => state == pb::EndpointState::Draining,
            Self::Gone => state == pb::EndpointState::Unspecified,
        }
    }

    fn state(&self) -> Option<EndpointState> {
        match self {
            Self::Starting => Some(EndpointState::Starting),
            Self::Ready(_) => Some(EndpointState::Ready),
            Self::Draining => Some(EndpointState::Draining),
            Self::Gone => None,
        }
    }
}

/// A port that callers are to find.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) route: Arc<Route>,
    pub(crate) address: SocketAddr,
}

#[derive(Debug)]
pub(crate) struct Table {
    prefix: [u8; 2],
    own_host: HostId,
    settings: BalancerSettings,
    routes: Routes,
    pub(crate) peers: Arc<Peers>,
    records: Arc<Records>,
    asks: Asks,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    services: BTreeMap<Arc<str>, Entry>,
    words: BTreeMap<EndpointKey, (Arc<str>, LocalWord)>,
}

#[derive(Debug)]
struct Entry {
    service: Arc<Service>,
    ports: BTreeMap<Arc<str>, Arc<Route>>,
}

impl Table {
    pub(crate) fn new(prefix: [u8; 2], own_host: HostId, routes: Routes, peers: Arc<Peers>) -> Self {
        // The seed keeps agents from probing at the same moment.
        let settings = BalancerSettings { seed: own_host.0, ..BalancerSettings::default() };
        let (records, asks, inner) = Default::default();
        Self { prefix, own_host, settings, routes, peers, records, asks, inner }
    }

    /// With what is to be noted of each call.
    pub(crate) fn with_records(self, records: Arc<Records>) -> Self {
        Self { records, ..self }
    }

    /// Services that are called and of which no endpoint is known.
    pub(crate) fn asks(&self) -> Asks {
        self.asks.clone()
    }

    /// The service is now this; returns where its callers are to find its ports.
    pub(crate) fn put(&self, service: Arc<Service>) -> Vec<Wanted> {
        let mut inner = self.inner.lock();
        let Inner { services, words } = &mut *inner;
        let name = service.name.clone();
        let mut known = services.remove(&name).map(|entry| entry.ports).unwrap_or_default();
        let mut ports = BTreeMap::new();
        for port in &service.ports {
            // Another protocol is another port: connections of the old one keep their route.
            let route = known.remove(&port.name).filter(|route| route.protocol == port.protocol);
            let route = route.unwrap_or_else(|| self.route(&name, port));
            route.set_rules(port.rules.clone());
            route.set_allow(service.allow.clone());
            ports.insert(port.name.clone(), route);
        }
        let entry = Entry { service, ports };
        words.retain(|key, (of, word)| *of != name || *word != LocalWord::Gone || entry.lists(*key));
        entry.update(self.own_host, words);
        let wanted = self.wanted(&entry);
        services.insert(name, entry);
        self.show(services);
        wanted
    }

    fn route(&self, service: &Arc<str>, port: &Port) -> Arc<Route> {
        let (service, name, rules) = (service.clone(), port.name.clone(), port.rules.clone());
        let route = Route::new(service, name, port.protocol, rules, self.settings.clone());
        let route = route.with_peers(self.peers.clone()).with_asks(self.asks.clone());
        Arc::new(route.with_records(self.records.clone()))
    }

    /// A port by its service's name and its own.
    pub(crate) fn find(&self, service: &str, port: &str) -> Option<Arc<Route>> {
        let routes = self.routes.0.load();
        // They are shown in this order.
        let at = routes.binary_search_by(|route| (&*route.service, &*route.port).cmp(&(service, port)));
        at.ok().map(|at| routes[at].clone())
    }

    fn wanted(&self, entry: &Entry) -> Vec<Wanted> {
        let Some(ip) = service_address(self.prefix, u32::from(entry.service.suffix)) else {
            return Vec::new();
        };
        let ports = entry.service.ports.iter();
        let wanted = ports.filter_map(|port| {
            let address = SocketAddr::new(IpAddr::V4(ip), port.service_port);
            Some(Wanted { route: entry.ports.get(&port.name)?.clone(), address })
        });
        wanted.collect()
    }

    /// The service is gone; its connections end by themselves.
    pub(crate) fn remove(&self, name: &str) {
        let mut inner = self.inner.lock();
        inner.words.retain(|_, (of, word)| **of != *name || *word != LocalWord::Gone);
        if let Some(entry) = inner.services.remove(name) {
            entry.ports.values().for_each(|route| route.update(Vec::new()));
        }
        self.show(&inner.services);
    }

    fn show(&self, services: &BTreeMap<Arc<str>, Entry>) {
        let routes = services.values().flat_map(|entry| entry.ports.values().cloned()).collect();
        self.routes.0.store(Arc::new(routes));
    }

    /// What the main loop knows of an endpoint of this host, which takes effect before this returns.
    pub(crate) fn local(&self, service: &str, key: EndpointKey, word: LocalWord) {
        let mut inner = self.inner.lock();
        let Inner { services, words } = &mut *inner;
        let entry = services.get_key_value(service);
        let name = entry.map_or_else(|| Arc::from(service), |(name, _)| name.clone());
        if words.get(&key).is_some_and(|(_, before)| *before == word) {
            return;
        }
        words.insert(key, (name, word.clone()));
        while words.len() > WORDS_MAX {
            words.pop_first();
        }
        let Some((_, entry)) = entry else { return };
        match word {
            LocalWord::Gone | LocalWord::Draining => {
                for route in entry.ports.values() {
                    route.balancer.set_state(clock::monotonic(), key, word.state());
                    route.wake();
                }
            }
            LocalWord::Starting | LocalWord::Ready(_) => entry.update(self.own_host, words),
        }
    }

    /// The service of an instance that the main loop has spoken of, or that the directory lists here.
    pub(crate) fn service_of(&self, key: EndpointKey) -> Option<Arc<str>> {
        let inner = self.inner.lock();
        let said = inner.words.get(&key).map(|(service, _)| service.clone());
        said.or_else(|| {
            inner.services.values().find(|one| one.lists(key)).map(|one| one.service.name.clone())
        })
    }

    /// Closes connections to endpoints and other hosts that nobody uses.
    pub(crate) fn sweep(&self) {
        self.peers.idle.sweep();
        self.routes.0.load().iter().for_each(|route| route.sweep());
    }

    /// Calls under way on ports of these protocols.
    pub(crate) fn under_way(&self, of: impl Fn(Protocol) -> bool) -> u64 {
        let routes = self.routes.0.load();
        let routes = routes.iter().filter(|route| of(route.protocol));
        let calls = routes.flat_map(|route| route.balancer.view(clock::monotonic()));
        calls.map(|endpoint| endpoint.in_flight).sum()
    }

    /// Calls under way to an instance.
    pub(crate) fn in_flight(&self, instance: InstanceId) -> u64 {
        let routes = self.routes.0.load();
        routes.iter().map(|route| route.balancer.in_flight(instance)).sum()
    }
}

impl Entry {
    fn lists(&self, key: EndpointKey) -> bool {
        self.service.endpoints.iter().any(|one| one.instance == key.instance && one.epoch == key.epoch)
    }

    fn update(&self, own_host: HostId, words: &BTreeMap<EndpointKey, (Arc<str>, LocalWord)>) {
        for (port, route) in &self.ports {
            route.update(self.specs(port, own_host, words));
        }
    }

    /// What the directory lists, as this host's own word changes it; then what only this host knows yet.
    fn specs(
        &self,
        port: &str,
        own_host: HostId,
        words: &BTreeMap<EndpointKey, (Arc<str>, LocalWord)>,
    ) -> Vec<EndpointSpec> {
        let mut specs = Vec::new();
        for endpoint in &self.service.endpoints {
            let key = EndpointKey { instance: endpoint.instance, epoch: endpoint.epoch };
            let word = words.get(&key).filter(|_| endpoint.host == own_host).map(|(_, word)| word);
            let (state, number) = match word {
                Some(LocalWord::Ready(ports)) => (Some(EndpointState::Ready), ports.get(port)),
                Some(word) => (word.state(), endpoint.ports.get(port)),
                None => (Some(endpoint.state), endpoint.ports.get(port)),
            };
            let (Some(state), Some(number)) = (state, number) else { continue };
            let reach = match endpoint.host == own_host {
                true => local(*number),
                false => Reach::Remote { host: endpoint.host, port: *number },
            };
            specs.push(EndpointSpec { key, reach, state, weight: 1 });
        }
        for (key, (service, word)) in words {
            let LocalWord::Ready(ports) = word else { continue };
            let is_news = **service == *self.service.name && !self.lists(*key);
            if let Some(number) = ports.get(port).filter(|_| is_news) {
                let state = EndpointState::Ready;
                specs.push(EndpointSpec { key: *key, reach: local(*number), state, weight: 1 });
            }
        }
        specs
    }
}

/// Instances listen on loopback only.
fn local(port: u16) -> Reach {
    Reach::Local(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port))
}

#[cfg(test)]
mod tests {
    use nave_agent_core::directory::Directory;

    use super::*;
    use crate::directory::DirectoryHandle;
    use nave_agent_core::balancer::Ask;
    use nave_agent_core::directory::{Endpoint, PortRules};

    const OWN: HostId = HostId(1);

    fn service(endpoints: Vec<Endpoint>) -> Arc<Service> {
        let port = Port {
            name: "http".into(),
            protocol: Protocol::Tcp,
            service_port: 80,
            rules: PortRules::default(),
        };
        Arc::new(Service { name: "web".into(), suffix: 5, ports: vec![port], allow: None, endpoints })
    }

    fn endpoint(instance: u64, host: HostId) -> Endpoint {
        Endpoint {
            instance: InstanceId(instance),
            epoch: 1,
            ordinal: 0,
            host,
            ports: [("http".into(), 20_000)].into(),
            state: EndpointState::Ready,
        }
    }

    fn key(instance: u64) -> EndpointKey {
        EndpointKey { instance: InstanceId(instance), epoch: 1 }
    }

    fn callable(route: &Route) -> Vec<u64> {
        let mut tried = Vec::new();
        while let Ok(pick) =
            route.balancer.pick(clock::monotonic(), &mut rand::rng(), &Ask { tried: &tried, hash: None })
        {
            tried.push(pick.endpoint().key);
        }
        let mut instances: Vec<u64> = tried.iter().map(|key| key.instance.0).collect();
        instances.sort_unstable();
        instances
    }

    #[test]
    fn this_hosts_own_word_wins_until_the_directory_has_caught_up() {
        let table = Table::new([127, 88], OWN, Routes::default(), Arc::default());
        let both = || service(vec![endpoint(1, OWN), endpoint(2, HostId(2))]);
        let wanted = table.put(both());
        assert_eq!(wanted[0].address, ([127, 88, 0, 5], 80).into());
        let route = &wanted[0].route;
        assert_eq!(callable(route), [1, 2]);

        table.local("web", key(1), LocalWord::Gone);
        assert_eq!(callable(route), [2], "at once");
        table.put(both());
        assert_eq!(callable(route), [2], "the directory is behind");
        table.local("web", key(1), LocalWord::Starting);
        assert_eq!(callable(route), [2]);
        table.local("web", key(1), LocalWord::Ready([("http".to_owned(), 20_001)].into()));
        assert_eq!(callable(route), [1, 2], "before the hub has heard of it");
        table.local("web", key(3), LocalWord::Ready([("http".to_owned(), 20_003)].into()));
        assert_eq!(callable(route), [1, 2, 3], "one that the directory does not list yet");
        table.local("web", key(3), LocalWord::Gone);
        assert_eq!(callable(route), [1, 2]);
        table.put(service(vec![endpoint(2, HostId(2))]));
        assert!(!table.inner.lock().words.contains_key(&key(3)), "it is gone for both, so it is forgotten");
        assert_eq!(table.service_of(key(2)).as_deref(), Some("web"));
    }

    #[test]
    fn a_route_stays_with_its_port_and_goes_with_its_service() {
        let routes = Routes::default();
        let table = Table::new([127, 88], OWN, routes.clone(), Arc::default());
        let first = table.put(service(vec![endpoint(1, OWN)])).remove(0).route;
        let held = first.balancer.pick(clock::monotonic(), &mut rand::rng(), &Ask::default()).unwrap();
        assert_eq!(table.in_flight(InstanceId(1)), 1);
        let again = table.put(service(vec![endpoint(1, OWN)])).remove(0).route;
        assert!(Arc::ptr_eq(&first, &again));
        let mut changed = (*service(Vec::new())).clone();
        changed.ports[0].protocol = Protocol::Grpc;
        assert!(!Arc::ptr_eq(&first, &table.put(Arc::new(changed)).remove(0).route));
        table.remove("web");
        assert!(routes.0.load().is_empty());
        drop(held);
    }

    #[tokio::test]
    async fn the_first_call_asks_for_endpoints_that_nobody_has_told() {
        let table = Table::new([127, 88], OWN, Routes::default(), Arc::default());
        let directory = DirectoryHandle::new(Directory::default(), table.asks());
        let route = table.put(service(Vec::new())).remove(0).route;
        let deadline = Some(tokio::time::Instant::now());
        route.pick(&Ask::default(), deadline).await.unwrap_err();
        tokio::time::timeout(std::time::Duration::from_secs(5), directory.asks()).await.unwrap();
        assert_eq!(directory.interest([].into_iter()).0.services, ["web"]);
    }
}
