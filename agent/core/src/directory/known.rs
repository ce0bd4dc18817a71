//! What this host has been told of the services, kept up with the hub's updates. The agent's main task owns the writing;
//! the proxy, the name server and every start of a process read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use nave_proto::time::from_proto;

use super::{Endpoint, EndpointState, Host, Port, PortRules, Protocol, Service};

/// The directory as of a revision of the hub.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Directory {
    incarnation: u64,
    revision: u64,
    /// The endpoints of every service are told; else of those in `complete`.
    everything: bool,
    complete: BTreeSet<Arc<str>>,
    services: BTreeMap<Arc<str>, pb::DirectoryService>,
    endpoints: BTreeMap<InstanceId, pb::DirectoryEndpoint>,
    by_service: BTreeMap<Arc<str>, BTreeSet<InstanceId>>,
    hosts: BTreeMap<HostId, pb::DirectoryHost>,
}

/// What an update has changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DirectoryChange {
    /// Changed in themselves or in their endpoints; gone are those that [`Directory::service`] no longer has.
    pub services: BTreeSet<Arc<str>>,
    pub hosts: bool,
}

/// An update that cannot be taken. Nothing has changed then, and what is known stays in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DirectoryRefusal {
    /// The member is behind: another one knows more.
    #[error("directory revision {given} is older than {known}")]
    Stale { given: u64, known: u64 },
    /// Something between is missing: a new session begins with the whole.
    #[error("the change of the directory does not continue revision {known}")]
    Gap { known: u64 },
}

impl Directory {
    /// The newest revision taken; 0: nothing is known.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// What a session with the hub begins with; nothing, when nothing is known.
    #[must_use]
    pub fn known(&self) -> Option<pb::DirectoryKnown> {
        let Self { incarnation, revision, everything, .. } = *self;
        (revision != 0).then_some(pb::DirectoryKnown { incarnation, revision, everything })
    }

    /// Takes an update of the hub.
    ///
    /// # Errors
    /// When it is older than what is known, or does not continue it.
    pub fn apply(&mut self, update: pb::DirectoryUpdate) -> Result<DirectoryChange, DirectoryRefusal> {
        if !update.whole {
            return self.apply_changes(update);
        }
        // Incarnations rise with each restore: a hub of an older one is the history that was given up.
        if (update.incarnation, update.revision) < (self.incarnation, self.revision) {
            return Err(DirectoryRefusal::Stale { given: update.revision, known: self.revision });
        }
        let before = std::mem::take(self);
        (self.incarnation, self.revision) = (update.incarnation, update.revision);
        self.everything = update.everything;
        self.put(update);
        Ok(self.differs_from(&before))
    }

    fn apply_changes(&mut self, update: pb::DirectoryUpdate) -> Result<DirectoryChange, DirectoryRefusal> {
        let continues = update.incarnation == self.incarnation
            && update.from_revision == self.revision
            && update.revision >= self.revision
            && update.everything == self.everything;
        if !continues {
            return Err(DirectoryRefusal::Gap { known: self.revision });
        }
        self.revision = update.revision;
        let mut change = DirectoryChange { hosts: !update.hosts.is_empty(), ..Default::default() };
        for name in &update.removed_services {
            if let Some((name, _)) = self.services.remove_entry(name.as_str()) {
                change.services.insert(name);
            }
        }
        for id in &update.removed_endpoints {
            change.services.extend(self.remove_endpoint(InstanceId(*id)));
        }
        change.services.extend(self.put(update));
        // Last, since services that are told anew drop endpoints too.
        change.hosts |= self.forget_hosts();
        Ok(change)
    }

    /// Puts what an update has; returns the services concerned.
    fn put(&mut self, update: pb::DirectoryUpdate) -> BTreeSet<Arc<str>> {
        let mut concerned = BTreeSet::new();
        for service in update.services {
            let name = self.name(&service.name);
            self.services.insert(Arc::clone(&name), service);
            concerned.insert(name);
        }
        for name in &update.complete {
            let name = self.name(name);
            let old: Vec<InstanceId> = self.by_service.get(&name).into_iter().flatten().copied().collect();
            old.into_iter().for_each(|id| drop(self.remove_endpoint(id)));
            self.complete.insert(Arc::clone(&name));
            concerned.insert(name);
        }
        for host in update.hosts {
            self.hosts.insert(HostId(host.id), host);
        }
        for endpoint in update.endpoints {
            // What is told of a service that this host has just given up is not the whole of it.
            if !self.knows_endpoints_of(&endpoint.service) {
                continue;
            }
            let (id, name) = (InstanceId(endpoint.instance_id), self.name(&endpoint.service));
            concerned.extend(self.remove_endpoint(id));
            self.by_service.entry(Arc::clone(&name)).or_default().insert(id);
            self.endpoints.insert(id, endpoint);
            concerned.insert(name);
        }
        concerned
    }

    fn remove_endpoint(&mut self, id: InstanceId) -> Option<Arc<str>> {
        let endpoint = self.endpoints.remove(&id)?;
        let (name, ids) = self.by_service.get_key_value(endpoint.service.as_str())?;
        let (name, last) = (Arc::clone(name), ids.len() == 1);
        match last {
            true => drop(self.by_service.remove(&name)),
            false => drop(self.by_service.get_mut(&name).map(|ids| ids.remove(&id))),
        }
        Some(name)
    }

    /// Hosts without endpoints are nobody's to reach.
    fn forget_hosts(&mut self) -> bool {
        let before = self.hosts.len();
        if before > 0 {
            let used: BTreeSet<u64> = self.endpoints.values().map(|endpoint| endpoint.host_id).collect();
            self.hosts.retain(|id, _| used.contains(&id.0));
        }
        self.hosts.len() != before
    }

    /// This host no longer has to know the endpoints of other services than these; returns those it drops.
    pub fn keep_only(&mut self, interest: &BTreeSet<Arc<str>>) -> DirectoryChange {
        let mut change = DirectoryChange::default();
        if self.everything {
            return change;
        }
        let dropped: Vec<Arc<str>> = self.complete.difference(interest).cloned().collect();
        for name in dropped {
            self.complete.remove(&name);
            let ids: Vec<InstanceId> = self.by_service.get(&name).into_iter().flatten().copied().collect();
            ids.into_iter().for_each(|id| drop(self.remove_endpoint(id)));
            change.services.insert(name);
        }
        change.hosts = !change.services.is_empty() && self.forget_hosts();
        change
    }

    /// Whether all endpoints of a service are known here; else the hub has to be asked for them.
    #[must_use]
    pub fn knows_endpoints_of(&self, service: &str) -> bool {
        self.everything || self.complete.contains(service)
    }

    /// A service with its endpoints.
    #[must_use]
    pub fn service(&self, name: &str) -> Option<Service> {
        let (name, service) = self.services.get_key_value(name)?;
        let ids = self.by_service.get(name).into_iter().flatten();
        Some(Service {
            name: Arc::clone(name),
            suffix: u16::try_from(service.address_suffix).unwrap_or(0),
            ports: ports(&service.ports),
            allow: service.allow.as_ref().map(|allow| allow.callers.clone()),
            endpoints: ids.filter_map(|id| self.endpoints.get(id)).map(endpoint).collect(),
        })
    }

    /// The names of all services, in order.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<str>> + '_ {
        self.services.keys()
    }

    #[must_use]
    pub fn hosts(&self) -> Vec<Host> {
        self.hosts.values().map(host).collect()
    }

    /// All that is known, as an update that begins with it.
    #[must_use]
    pub fn whole(&self) -> pb::DirectoryUpdate {
        pb::DirectoryUpdate {
            incarnation: self.incarnation,
            revision: self.revision,
            whole: true,
            everything: self.everything,
            services: self.services.values().cloned().collect(),
            endpoints: self.endpoints.values().cloned().collect(),
            hosts: self.hosts.values().cloned().collect(),
            complete: self.complete.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }
    }

    fn differs_from(&self, before: &Self) -> DirectoryChange {
        let names: BTreeSet<&Arc<str>> = self.services.keys().chain(before.services.keys()).collect();
        let changed = |name: &&&Arc<str>| self.service(name) != before.service(name);
        DirectoryChange {
            services: names.iter().filter(changed).map(|name| Arc::clone(name)).collect(),
            hosts: self.hosts != before.hosts,
        }
    }

    /// One copy of each name.
    fn name(&self, name: &str) -> Arc<str> {
        match self.services.get_key_value(name) {
            Some((name, _)) => Arc::clone(name),
            None => name.into(),
        }
    }
}

fn ports(ports: &BTreeMap<String, pb::Port>) -> Vec<Port> {
    ports.iter().map(|(name, port)| self::port(name, port)).collect()
}

fn port(name: &str, port: &pb::Port) -> Port {
    Port {
        name: name.into(),
        protocol: match port.protocol() {
            pb::Protocol::Http => Protocol::Http,
            pb::Protocol::Http2 => Protocol::Http2,
            pb::Protocol::Grpc => Protocol::Grpc,
            // What this build does not know passes as bytes.
            pb::Protocol::Tcp | pb::Protocol::Unspecified => Protocol::Tcp,
        },
        service_port: u16::try_from(port.service_port).unwrap_or(0),
        rules: port.calls.as_ref().map(rules).unwrap_or_default(),
    }
}

/// What is not said is as for a service that says nothing.
fn rules(calls: &pb::Calls) -> PortRules {
    let usual = PortRules::DEFAULT;
    let time = |said: &Option<_>| said.as_ref().and_then(from_proto);
    let number =
        |said: Option<u32>, usual| said.map_or(usual, |number| usize::try_from(number).unwrap_or(usize::MAX));
    PortRules {
        request_timeout: time(&calls.timeout),
        try_timeout: time(&calls.try_timeout),
        idle_timeout: time(&calls.idle_timeout).unwrap_or(usual.idle_timeout),
        connections_max: number(calls.max_connections, usual.connections_max),
        requests_max: number(calls.max_requests, usual.requests_max),
        pending_max: number(calls.max_pending, usual.pending_max),
        retries_max: calls.retries.unwrap_or(usual.retries_max),
        hash_header: (!calls.hash_header.is_empty()).then(|| calls.hash_header.as_str().into()),
        access_log: calls.access_log,
        ..usual
    }
}

fn endpoint(endpoint: &pb::DirectoryEndpoint) -> Endpoint {
    let port = |(name, port): (&String, &u32)| Some((name.as_str().into(), u16::try_from(*port).ok()?));
    Endpoint {
        instance: InstanceId(endpoint.instance_id),
        epoch: endpoint.epoch,
        ordinal: endpoint.ordinal,
        host: HostId(endpoint.host_id),
        ports: endpoint.ports.iter().filter_map(port).collect(),
        state: match endpoint.state() {
            pb::EndpointState::Ready => EndpointState::Ready,
            pb::EndpointState::Draining => EndpointState::Draining,
            pb::EndpointState::Starting | pb::EndpointState::Unspecified => EndpointState::Starting,
        },
    }
}

fn host(host: &pb::DirectoryHost) -> Host {
    Host { id: HostId(host.id), name: host.name.as_str().into(), address: host.address.clone() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nave_proto::time::to_proto;

    use super::*;

    fn service(name: &str, suffix: u32) -> pb::DirectoryService {
        let port = pb::Port { service_port: 80, ..Default::default() };
        let ports = [("http".to_owned(), port)].into();
        pb::DirectoryService { name: name.to_owned(), address_suffix: suffix, ports, allow: None }
    }

    #[test]
    fn what_a_manifest_says_of_calls_is_kept_to_and_the_rest_is_as_ever() {
        let seconds = |seconds| Some(to_proto(Duration::from_secs(seconds)));
        let calls = pb::Calls {
            timeout: seconds(5),
            try_timeout: seconds(2),
            idle_timeout: seconds(7),
            max_connections: Some(11),
            max_requests: Some(9),
            max_pending: Some(0),
            retries: Some(0),
            hash_header: "X-User".to_owned(),
            access_log: true,
        };
        let said = PortRules {
            request_timeout: Some(Duration::from_secs(5)),
            try_timeout: Some(Duration::from_secs(2)),
            idle_timeout: Duration::from_secs(7),
            connections_max: 11,
            requests_max: 9,
            pending_max: 0,
            retries_max: 0,
            hash_header: Some("X-User".into()),
            access_log: true,
            ..PortRules::DEFAULT
        };
        let mut service = service("web", 2);
        service.ports.get_mut("http").unwrap().calls = Some(calls);
        let told = pb::DirectoryUpdate { services: vec![service], ..whole(9) };
        let mut directory = Directory::default();
        directory.apply(told).unwrap();
        assert_eq!(directory.service("web").unwrap().ports[0].rules, said);
        directory.apply(whole(10)).unwrap();
        assert_eq!(directory.service("web").unwrap().ports[0].rules, PortRules::DEFAULT);
    }

    fn endpoint(id: u64, service: &str, host_id: u64) -> pb::DirectoryEndpoint {
        pb::DirectoryEndpoint {
            instance_id: id,
            epoch: 1,
            service: service.to_owned(),
            host_id,
            ports: [("http".to_owned(), 20_000)].into(),
            state: pb::EndpointState::Ready.into(),
            ..Default::default()
        }
    }

    fn host(id: u64) -> pb::DirectoryHost {
        pb::DirectoryHost { id, name: format!("host-{id}"), address: format!("10.0.0.{id}:7410") }
    }

    fn whole(revision: u64) -> pb::DirectoryUpdate {
        pb::DirectoryUpdate {
            incarnation: 1,
            revision,
            whole: true,
            everything: true,
            services: vec![service("db", 1), service("web", 2)],
            endpoints: vec![endpoint(5, "web", 1), endpoint(6, "web", 2), endpoint(7, "db", 2)],
            hosts: vec![host(1), host(2)],
            ..Default::default()
        }
    }

    fn delta(from: u64, to: u64) -> pb::DirectoryUpdate {
        let (from_revision, revision) = (from, to);
        pb::DirectoryUpdate {
            incarnation: 1,
            from_revision,
            revision,
            everything: true,
            ..Default::default()
        }
    }

    fn names(change: &DirectoryChange) -> Vec<&str> {
        change.services.iter().map(|name| &**name).collect()
    }

    fn instances(directory: &Directory, name: &str) -> Vec<u64> {
        directory.service(name).unwrap().endpoints.iter().map(|endpoint| endpoint.instance.0).collect()
    }

    #[test]
    fn changes_tell_which_services_they_concern() {
        let mut directory = Directory::default();
        assert_eq!(names(&directory.apply(whole(10)).unwrap()), ["db", "web"]);
        assert_eq!(names(&directory.apply(whole(11)).unwrap()), [""; 0], "the same again");
        let update = pb::DirectoryUpdate {
            endpoints: vec![pb::DirectoryEndpoint {
                state: pb::EndpointState::Draining.into(),
                ..endpoint(5, "web", 1)
            }],
            removed_endpoints: vec![7],
            ..delta(11, 14)
        };
        let change = directory.apply(update).unwrap();
        assert_eq!((names(&change), change.hosts), (vec!["db", "web"], false));
        assert_eq!((instances(&directory, "web"), instances(&directory, "db")), (vec![5, 6], vec![]));
        assert_eq!(directory.service("web").unwrap().endpoints[0].state, EndpointState::Draining);
        let gone = pb::DirectoryUpdate {
            removed_services: vec!["db".to_owned()],
            removed_endpoints: vec![6],
            ..delta(14, 15)
        };
        let change = directory.apply(gone).unwrap();
        assert_eq!(
            (names(&change), change.hosts),
            (vec!["db", "web"], true),
            "nothing is on the second host"
        );
        assert!(directory.service("db").is_none());
        assert_eq!(directory.hosts().len(), 1);
    }

    #[test]
    fn a_gap_and_an_older_whole_are_refused_and_change_nothing() {
        let mut directory = Directory::default();
        directory.apply(whole(10)).unwrap();
        let before = directory.clone();
        let gap = Err(DirectoryRefusal::Gap { known: 10 });
        assert_eq!(directory.apply(delta(9, 11)), gap);
        assert_eq!(directory.apply(delta(11, 12)), gap);
        assert_eq!(directory.apply(pb::DirectoryUpdate { incarnation: 2, ..delta(10, 11) }), gap);
        assert_eq!(directory.apply(pb::DirectoryUpdate { everything: false, ..delta(10, 11) }), gap);
        assert_eq!(directory.apply(whole(9)), Err(DirectoryRefusal::Stale { given: 9, known: 10 }));
        assert_eq!(directory, before);
        let restored = pb::DirectoryUpdate { incarnation: 2, ..whole(3) };
        directory.apply(restored).unwrap();
        assert_eq!(directory.revision(), 3, "the hub was restored from a backup");
    }

    #[test]
    fn of_a_large_fleet_only_what_was_asked_for_is_known() {
        let mut directory = Directory::default();
        let told = pb::DirectoryUpdate {
            everything: false,
            endpoints: vec![endpoint(7, "db", 2)],
            complete: vec!["db".to_owned()],
            ..whole(10)
        };
        directory.apply(told).unwrap();
        assert!(directory.knows_endpoints_of("db") && !directory.knows_endpoints_of("web"));
        assert!(directory.service("web").unwrap().endpoints.is_empty());
        let partly = pb::DirectoryUpdate {
            everything: false,
            endpoints: vec![endpoint(5, "web", 1)],
            ..delta(10, 11)
        };
        directory.apply(partly).unwrap();
        assert!(directory.service("web").unwrap().endpoints.is_empty(), "it would be part of the truth");
        let asked = pb::DirectoryUpdate {
            everything: false,
            endpoints: vec![endpoint(5, "web", 1), endpoint(6, "web", 2)],
            complete: vec!["web".to_owned()],
            ..delta(11, 12)
        };
        directory.apply(asked).unwrap();
        assert_eq!(instances(&directory, "web"), [5, 6]);
        let change = directory.keep_only(&BTreeSet::from(["web".into()]));
        assert_eq!(names(&change), ["db"]);
        assert!(!directory.knows_endpoints_of("db") && instances(&directory, "db").is_empty());
    }

    #[test]
    fn what_was_written_down_is_what_was_known() {
        let mut directory = Directory::default();
        directory.apply(whole(10)).unwrap();
        let mut again = Directory::default();
        again.apply(directory.whole()).unwrap();
        assert_eq!(again, directory);
        again.apply(delta(10, 11)).unwrap();
    }
}
