//! How processes of this host reach a service: at the address where the proxy listens for it.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use nave_agent_core::callable::{Callable, CallablePort, address_variables};
use nave_agent_core::directory::{Directory, Service};
use nave_proto::pb;

use super::DirectoryHandle;
use crate::proxy::Proxy;

/// Beyond so many services a process is told of those it needs alone: each is some 100 bytes of every environment, and
/// the kernel takes 2 MiB at most.
const TOLD_MAX: usize = 1000;

/// Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Ways {
    directory: DirectoryHandle,
    proxy: Proxy,
}

impl Ways {
    pub(crate) fn new(directory: DirectoryHandle, proxy: Proxy) -> Self {
        Self { directory, proxy }
    }

    /// The way to a service; `None`: nobody knows it.
    pub(crate) fn to(&self, service: &str) -> Option<Callable> {
        self.directory.read(|known| known.service(service)).map(|service| self.callable(&service))
    }

    /// Second half of its address; `None`: nobody knows it. Whoever asks is about to call it.
    pub(crate) fn suffix(&self, service: &str) -> Option<u16> {
        self.directory.service(service).map(|service| service.suffix)
    }

    /// The address that leads to one instance of a service alone.
    pub(crate) fn single(&self, service: &str, ordinal: u32) -> Option<Ipv4Addr> {
        // Whoever asks is about to call it.
        self.directory.service(service)?;
        self.proxy.single(service, ordinal)
    }

    /// One of its ports.
    pub(crate) fn single_port(&self, service: &str, ordinal: u32, port: &str) -> Option<u16> {
        self.single(service, ordinal)?;
        self.proxy.single_addresses(service, ordinal).get(port).map(SocketAddr::port)
    }

    fn callable(&self, service: &Service) -> Callable {
        let addresses = self.proxy.addresses(&service.name);
        let port = |port: &nave_agent_core::directory::Port| {
            let address = *addresses.get(&*port.name)?;
            Some(CallablePort { name: Arc::clone(&port.name), protocol: port.protocol, address })
        };
        Callable {
            service: Arc::clone(&service.name),
            ports: service.ports.iter().filter_map(port).collect(),
        }
    }

    /// What a process of this service is told: of those that it needs, and of the others that let it call them.
    pub(crate) fn variables(&self, manifest: &pb::Manifest) -> BTreeMap<String, String> {
        let callables: Vec<Callable> = self
            .directory
            .read(|known| may_call(known, manifest))
            .iter()
            .map(|service| self.callable(service))
            .collect();
        address_variables(&callables)
    }
}

fn may_call(known: &Directory, manifest: &pb::Manifest) -> Vec<Service> {
    let all = known.services().len() <= TOLD_MAX;
    let names = known.services().filter(|name| all || manifest.needs.iter().any(|need| **need == ***name));
    let lets_in = |service: &Service| match &service.allow {
        Some(callers) => callers.contains(&manifest.name),
        None => true,
    };
    names.filter_map(|name| known.service(name)).filter(lets_in).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(services: usize) -> Directory {
        let port = pb::Port { service_port: 80, ..Default::default() };
        let service = |number| pb::DirectoryService {
            name: format!("s{number}"),
            address_suffix: 5,
            ports: [("http".to_owned(), port.clone())].into(),
            allow: (number == 1).then(|| pb::AllowedCallers { callers: vec!["jobs".to_owned()] }),
        };
        let services = (0..services).map(service).collect();
        let mut directory = Directory::default();
        let update =
            pb::DirectoryUpdate { incarnation: 1, revision: 1, whole: true, services, ..Default::default() };
        directory.apply(update).unwrap();
        directory
    }

    fn names(known: &Directory, caller: &str) -> Vec<String> {
        let needs = vec!["s2".to_owned()];
        let manifest = pb::Manifest { name: caller.to_owned(), needs, ..Default::default() };
        may_call(known, &manifest).iter().map(|service| service.name.to_string()).collect()
    }

    #[test]
    fn a_process_is_told_of_whom_it_may_call() {
        assert_eq!(names(&known(3), "web"), ["s0", "s2"]);
        assert_eq!(names(&known(3), "jobs"), ["s0", "s1", "s2"]);
        assert_eq!(names(&known(TOLD_MAX + 1), "jobs"), ["s2"], "of too many, those that it needs");
    }
}
