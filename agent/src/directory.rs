//! The directory of this host: what the hub has told of the services, shared by all who read it, and kept on disk so
//! that a host that boots without a hub still knows whom to call.
//!
//! The main loop alone writes, with the hub's updates. Readers are the proxy, the name server, every start of a process,
//! and the agent's API. Of a large fleet only the endpoints of services that this host needs are told; whoever meets
//! another one asks for it here, and the main loop names it to the hub.

mod store;
mod ways;

use std::collections::BTreeSet;
use std::sync::Arc;

use nave_agent_core::directory::{Directory, DirectoryChange, DirectoryRefusal, Service};
use nave_proto::pb;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, watch};

pub(crate) use store::Store;
pub(crate) use ways::Ways;

/// Services that are asked for by name beside those that manifests name: a caller that walks through all of a large
/// cluster is told of the first ones.
const ASKED_MAX: usize = 1000;

/// Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub(crate) struct DirectoryHandle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    known: RwLock<Directory>,
    /// Newest revision taken, for whoever writes it down.
    revision: watch::Sender<u64>,
    asks: Asks,
}

/// Services that somebody here calls, beside those that manifests name. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Asks {
    shared: Arc<Asked>,
}

#[derive(Debug, Default)]
struct Asked {
    names: Mutex<BTreeSet<Arc<str>>>,
    added: Notify,
}

impl Asks {
    /// Somebody is about to call this service; the endpoints come within a round trip to the hub, if it knows any.
    pub(crate) fn ask(&self, name: &Arc<str>) {
        let mut names = self.shared.names.lock();
        if names.len() < ASKED_MAX && names.insert(Arc::clone(name)) {
            self.shared.added.notify_one();
        }
    }
}

impl DirectoryHandle {
    pub(crate) fn new(known: Directory, asks: Asks) -> Self {
        let revision = watch::Sender::new(known.revision());
        let known = RwLock::new(known);
        Self { shared: Arc::new(Shared { known, revision, asks }) }
    }

    /// Takes an update of the hub.
    ///
    /// # Errors
    /// When it cannot be taken: another member, or another session, is needed.
    pub(crate) fn take(&self, update: pb::DirectoryUpdate) -> Result<DirectoryChange, DirectoryRefusal> {
        let (change, revision) = {
            let mut known = self.shared.known.write();
            (known.apply(update)?, known.revision())
        };
        self.shared.revision.send_replace(revision);
        Ok(change)
    }

    /// A service with its endpoints. When those have yet to be asked for, they are.
    pub(crate) fn service(&self, name: &str) -> Option<Service> {
        let known = self.shared.known.read();
        let service = known.service(name)?;
        if !known.knows_endpoints_of(name) {
            drop(known);
            self.shared.asks.ask(&service.name);
        }
        Some(service)
    }

    /// Waits until somebody asks for a service that nobody has asked for. Cancel-safe; for one waiter.
    pub(crate) async fn asks(&self) {
        self.shared.asks.shared.added.notified().await;
    }

    /// What this host has to know of: what its services are and need, and what was asked for. Drops the rest.
    pub(crate) fn interest<'a>(
        &self,
        manifests: impl Iterator<Item = &'a pb::Manifest>,
    ) -> (pb::Interest, DirectoryChange) {
        let mut names: BTreeSet<Arc<str>> = self.shared.asks.shared.names.lock().clone();
        for manifest in manifests {
            names.extend(manifest.needs.iter().map(|name| Arc::from(name.as_str())));
            if !manifest.ports.is_empty() {
                names.insert(manifest.name.as_str().into());
            }
        }
        let change = self.shared.known.write().keep_only(&names);
        (pb::Interest { services: names.iter().map(ToString::to_string).collect() }, change)
    }

    /// All that is known, as if it were new.
    pub(crate) fn everything(&self) -> DirectoryChange {
        self.read(|known| DirectoryChange { services: known.services().cloned().collect(), hosts: true })
    }

    /// Looks at all that is known; for a moment, since the main loop waits to write.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&Directory) -> T) -> T {
        look(&self.shared.known.read())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(everything: bool) -> pb::DirectoryUpdate {
        let port = pb::Port { service_port: 80, ..Default::default() };
        let service = |name: &str| pb::DirectoryService {
            name: name.to_owned(),
            address_suffix: 5,
            ports: [("http".to_owned(), port.clone())].into(),
            allow: None,
        };
        pb::DirectoryUpdate {
            incarnation: 1,
            revision: 3,
            whole: true,
            everything,
            services: vec![service("db"), service("web")],
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn what_a_large_fleet_has_not_told_is_asked_for_once() {
        let directory = DirectoryHandle::new(Directory::default(), Asks::default());
        directory.take(update(false)).unwrap();
        assert!(directory.service("nobody").is_none());
        directory.service("web").unwrap();
        directory.asks().await;
        let manifest = pb::Manifest { name: "worker".into(), needs: vec!["db".into()], ..Default::default() };
        let (interest, _) = directory.interest([&manifest].into_iter());
        assert_eq!(interest.services, ["db", "web"], "a service without ports has no endpoints");
        directory.service("web").unwrap();
        let again = tokio::time::timeout(std::time::Duration::from_millis(20), directory.asks()).await;
        assert!(again.is_err(), "{again:?}");
    }

    #[test]
    fn a_small_fleet_is_known_without_asking() {
        let directory = DirectoryHandle::new(Directory::default(), Asks::default());
        directory.take(update(true)).unwrap();
        directory.service("web").unwrap();
        assert_eq!(directory.interest([].into_iter()).0.services, [""; 0]);
    }
}
