//! What the proxy knows: services as the directory says them, and this host's own endpoints as its main loop says them,
//! whose word is newer and wins. A change goes to the balancers at once, under one short lock that no call ever takes.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use nave_agent_core::address::service_address;
use nave_agent_core::balancer::{BalancerSettings, EndpointKey, EndpointSpec, Reach};
use nave_agent_core::directory::{EndpointState, Port, Protocol, Service};
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use parking_lot::Mutex;
use tracing::warn;

use super::meter::Routes;
use super::peers::Peers;
use super::records::Records;
use super::route::Route;
use super::singles::Singles;
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
    singles_file: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    services: BTreeMap<Arc<str>, Entry>,
    /// Second halves of the addresses of single instances, by service and ordinal.
    singles: Singles,
    words: BTreeMap<EndpointKey, (Arc<str>, LocalWord)>,
}

#[derive(Debug)]
struct Entry {
    service: Arc<Service>,
    ports: Ports,
    /// To single instances of it, by ordinal.
    singles: BTreeMap<u32, Ports>,
}

type Ports = BTreeMap<Arc<str>, Arc<Route>>;

/// The way to a single instance.
#[derive(Debug)]
pub(crate) struct Single {
    pub(crate) address: Ipv4Addr,
    /// The service, and all that its callers are to find, when that has changed.
    pub(crate) news: Option<(Arc<str>, Vec<Wanted>)>,
}

impl Table {
    pub(crate) fn new(prefix: [u8; 2], own_host: HostId, routes: Routes, peers: Arc<Peers>) -> Self {
        // The seed keeps agents from probing at the same moment.
        let settings = BalancerSettings { seed: own_host.0, ..BalancerSettings::default() };
        let (records, asks, singles_file, inner) = Default::default();
        Self { prefix, own_host, settings, routes, peers, records, asks, singles_file, inner }
    }

    /// Remembers the addresses of single instances in this file.
    pub(crate) fn with_singles(self, singles_file: PathBuf) -> Self {
        let singles = Singles::read(&singles_file);
        Self { singles_file, inner: Mutex::new(Inner { singles, ..Inner::default() }), ..self }
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
        let Inner { services, words, singles: suffixes } = &mut *inner;
        let name = service.name.clone();
        let known = services.remove(&name);
        let (known, mut known_singles) = known.map(|entry| (entry.ports, entry.singles)).unwrap_or_default();
        let ports = self.ports(&service, known, None);
        let singles = suffixes.ordinals(&name).map(|ordinal| {
            (ordinal, self.ports(&service, known_singles.remove(&ordinal).unwrap_or_default(), Some(ordinal)))
        });
        let entry = Entry { ports, singles: singles.collect(), service };
        words.retain(|key, (of, word)| *of != name || *word != LocalWord::Gone || entry.lists(*key));
        entry.update(self.own_host, words);
        let wanted = self.wanted(&entry, suffixes);
        services.insert(name, entry);
        self.show(services);
        wanted
    }

    /// The routes of the service's ports as they are now.
    fn ports(&self, service: &Service, mut known: Ports, single: Option<u32>) -> Ports {
        let port = |port: &Port| {
            // Another protocol is another port: connections of the old one keep their route.
            let route = known.remove(&port.name).filter(|route| route.protocol == port.protocol);
            let route = route.unwrap_or_else(|| self.route(&service.name, port, single));
            route.set_rules(port.rules.clone());
            route.set_allow(service.allow.clone());
            (port.name.clone(), route)
        };
        service.ports.iter().map(port).collect()
    }

    /// The way to the instance of this ordinal; `None`: nobody knows such an instance, or there are too many ways.
    pub(crate) fn single(&self, service: &str, ordinal: u32) -> Option<Single> {
        let mut inner = self.inner.lock();
        let Inner { services, words, singles } = &mut *inner;
        let name = services.get_key_value(service)?.0.clone();
        if let Some(suffix) = singles.suffix(service, ordinal) {
            return Some(Single { address: service_address(self.prefix, suffix.into())?, news: None });
        }
        let taken: Vec<u16> = services.values().map(|entry| entry.service.suffix).collect();
        let entry = services.get_mut(service)?;
        if !entry.service.endpoints.iter().any(|endpoint| endpoint.ordinal == ordinal) {
            return None;
        }
        let suffix = singles.allot(service, ordinal, &taken)?;
        if let Err(error) = singles.write(&self.singles_file) {
            warn!(%error, file = %self.singles_file.display(), "cannot remember an address");
        }
        let ports = self.ports(&entry.service, Ports::new(), Some(ordinal));
        entry.singles.insert(ordinal, ports);
        entry.update(self.own_host, words);
        let (address, wanted) = (service_address(self.prefix, suffix.into())?, self.wanted(entry, singles));
        self.show(services);
        Some(Single { address, news: Some((name, wanted)) })
    }

    fn route(&self, service: &Arc<str>, port: &Port, single: Option<u32>) -> Arc<Route> {
        let (service, name, rules) = (service.clone(), port.name.clone(), port.rules.clone());
        let route = Route::new(service, name, port.protocol, rules, self.settings.clone());
        let route = route.with_peers(self.peers.clone()).with_asks(self.asks.clone());
        let route = route.with_records(self.records.clone());
        Arc::new(match single {
            Some(ordinal) => route.into_single(ordinal),
            None => route,
        })
    }

    /// A port by its service's name and its own.
    pub(crate) fn find(&self, service: &str, port: &str) -> Option<Arc<Route>> {
        let routes = self.routes.0.load();
        // They are shown in this order.
        let at = routes.binary_search_by(|route| (&*route.service, &*route.port).cmp(&(service, port)));
        at.ok().map(|at| routes[at].clone())
    }

    fn wanted(&self, entry: &Entry, singles: &Singles) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        let mut want = |suffix: u16, ports: &Ports| {
            let Some(ip) = service_address(self.prefix, u32::from(suffix)) else { return };
            wanted.extend(entry.service.ports.iter().filter_map(|port| {
                let address = SocketAddr::new(IpAddr::V4(ip), port.service_port);
                Some(Wanted { route: ports.get(&port.name)?.clone(), address })
            }));
        };
        want(entry.service.suffix, &entry.ports);
        for (ordinal, ports) in &entry.singles {
            if let Some(suffix) = singles.suffix(&entry.service.name, *ordinal) {
                want(suffix, ports);
            }
        }
        wanted
    }

    /// The service is gone; its connections end by themselves.
    pub(crate) fn remove(&self, name: &str) {
        let mut inner = self.inner.lock();
        inner.words.retain(|_, (of, word)| **of != *name || *word != LocalWord::Gone);
        if let Some(entry) = inner.services.remove(name) {
            entry.routes().for_each(|route| route.update(Vec::new()));
        }
        if inner.singles.forget(name)
            && let Err(error) = inner.singles.write(&self.singles_file)
        {
            warn!(%error, file = %self.singles_file.display(), "cannot forget an address");
        }
        self.show(&inner.services);
    }

    fn show(&self, services: &BTreeMap<Arc<str>, Entry>) {
        let routes = services.values().flat_map(|entry| entry.ports.values().cloned()).collect();
        self.routes.0.store(Arc::new(routes));
        let singles = services.values().flat_map(|entry| entry.singles.values().flat_map(Ports::values));
        self.routes.1.store(Arc::new(singles.cloned().collect()));
    }

    /// What the main loop knows of an endpoint of this host, which takes effect before this returns.
    pub(crate) fn local(&self, service: &str, key: EndpointKey, word: LocalWord) {
        let mut inner = self.inner.lock();
        let Inner { services, words, .. } = &mut *inner;
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
                for route in entry.routes() {
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
        self.routes.all().iter().for_each(|route| route.sweep());
    }

    /// Calls under way on ports of these protocols.
    pub(crate) fn under_way(&self, of: impl Fn(Protocol) -> bool) -> u64 {
        let routes = self.routes.all();
        let routes = routes.iter().filter(|route| of(route.protocol));
        let calls = routes.flat_map(|route| route.balancer.view(clock::monotonic()));
        calls.map(|endpoint| endpoint.in_flight).sum()
    }

    /// Calls under way to an instance.
    pub(crate) fn in_flight(&self, instance: InstanceId) -> u64 {
        self.routes.all().iter().map(|route| route.balancer.in_flight(instance)).sum()
    }
}

impl Entry {
    fn lists(&self, key: EndpointKey) -> bool {
        self.service.endpoints.iter().any(|one| one.instance == key.instance && one.epoch == key.epoch)
    }

    fn routes(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.ports.values().chain(self.singles.values().flat_map(Ports::values))
    }

    fn update(&self, own_host: HostId, words: &BTreeMap<EndpointKey, (Arc<str>, LocalWord)>) {
        for route in self.routes() {
            route.update(self.specs(&route.port, route.single, own_host, words));
        }
    }

    /// What the directory lists, as this host's own word changes it; then what only this host knows yet.
    fn specs(
        &self,
        port: &str,
        single: Option<u32>,
        own_host: HostId,
        words: &BTreeMap<EndpointKey, (Arc<str>, LocalWord)>,
    ) -> Vec<EndpointSpec> {
        let mut specs = Vec::new();
        let is_meant = |ordinal: u32| single.is_none_or(|single| single == ordinal);
        for endpoint in self.service.endpoints.iter().filter(|one| is_meant(one.ordinal)) {
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
        // Which ordinal such a one has only the directory says.
        for (key, (service, word)) in words.iter().filter(|_| single.is_none()) {
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
    fn a_single_instance_has_an_address_of_its_own_and_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let table = || {
            let table = Table::new([127, 88], OWN, Routes::default(), Arc::default());
            table.with_singles(dir.path().join("singles"))
        };
        let second = |instance, host| Endpoint { ordinal: 1, ..endpoint(instance, host) };
        let both = || service(vec![endpoint(1, OWN), second(2, HostId(2))]);
        let first = table();
        assert_eq!(first.put(both()).len(), 1);
        assert!(first.single("web", 2).is_none() && first.single("db", 0).is_none(), "nobody knows them");
        let single = first.single("web", 1).unwrap();
        assert_eq!(single.address, Ipv4Addr::new(127, 88, 255, 254));
        let (_, wanted) = single.news.unwrap();
        assert_eq!((callable(&wanted[0].route), callable(&wanted[1].route)), (vec![1, 2], vec![2]));
        assert!(first.single("web", 1).unwrap().news.is_none());
        let held =
            wanted[1].route.balancer.pick(clock::monotonic(), &mut rand::rng(), &Ask::default()).unwrap();
        assert_eq!(first.in_flight(InstanceId(2)), 1, "a stop waits for its calls too");
        drop(held);
        let known = first.find("web", "http").unwrap();
        assert!(Arc::ptr_eq(&known, &wanted[0].route), "another agent asks for the service");

        first.put(service(vec![second(3, OWN)]));
        assert_eq!(callable(&wanted[1].route), [3], "it has moved");
        first.local("web", key(3), LocalWord::Draining);
        first.put(service(vec![second(3, OWN), second(4, HostId(2))]));
        let picked =
            wanted[1].route.balancer.pick(clock::monotonic(), &mut rand::rng(), &Ask::default()).unwrap();
        assert_eq!(picked.endpoint().key, key(4), "the successor, not what drains");

        let next = table();
        let again = next.put(both());
        assert_eq!(again[1].address, ([127, 88, 255, 254], 80).into(), "after a restart of the agent");
        next.remove("web");
        assert_eq!(table().put(both()).len(), 1, "it went with its service");
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
        let mut stricter = (*service(vec![endpoint(1, OWN)])).clone();
        stricter.ports[0].rules.requests_max = 1;
        let same = table.put(Arc::new(stricter)).remove(0).route;
        assert!(
            Arc::ptr_eq(&first, &same) && first.rules().requests_max == 1,
            "a rule holds for who is there"
        );
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
