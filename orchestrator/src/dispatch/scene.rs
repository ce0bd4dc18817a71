//! Members without Raft, for the tests of this room: one log, and members that apply it, each in its own time.

use std::collections::BTreeMap;
use std::sync::Arc;

use nave_orchestrator_core::{Change, ClusterState, RowId};
use nave_proto::ids::HostId;
use nave_proto::pb;

use crate::raft::ApplyObserver as _;
use crate::watch::Changes;

pub(super) const INCARNATION: u64 = 1;
pub(super) const HOSTS: u64 = 3;
const HTTP: &str = "http";

/// What is committed, by revision from 1.
#[derive(Debug, Default)]
pub(super) struct Log {
    entries: Vec<Change>,
}

impl Log {
    /// With a cluster that has hosts, and services of these names.
    pub(super) fn begun(services: &[&str]) -> Self {
        let mut log = Self::default();
        log.push(Change::Cluster(Arc::new(pb::ClusterRecord {
            incarnation: INCARNATION,
            ..Default::default()
        })));
        for id in 0..HOSTS {
            log.push(host(id, "10.0.0.1:7410"));
        }
        services.iter().for_each(|name| log.push_service(name, Some(80)));
        log
    }

    /// Returns the revision.
    pub(super) fn push(&mut self, change: Change) -> u64 {
        self.entries.push(change);
        self.revision()
    }

    pub(super) fn push_service(&mut self, name: &str, service_port: Option<u32>) {
        self.push(service(name, service_port));
        let version = pb::VersionRecord { service: name.to_owned(), version: 1, ..Default::default() };
        self.push(Change::Version(Arc::new(version)));
    }

    pub(super) fn revision(&self) -> u64 {
        u64::try_from(self.entries.len()).unwrap()
    }
}

/// One that has applied a part of the log.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) changes: Changes,
    pub(super) applied: u64,
    rows: BTreeMap<RowId, Change>,
    bounds: (usize, usize),
}

impl Member {
    pub(super) fn new(items_max: usize, everything_max: usize) -> Self {
        let changes = Changes::with_directory(items_max, everything_max);
        Self { changes, applied: 0, rows: BTreeMap::new(), bounds: (items_max, everything_max) }
    }

    pub(super) fn apply(&mut self, log: &Log, up_to: u64) {
        while self.applied < up_to.min(log.revision()) {
            let change = &log.entries[usize::try_from(self.applied).unwrap()];
            self.applied += 1;
            match change {
                Change::Deleted(id) => drop(self.rows.remove(id)),
                change => drop(self.rows.insert(change.id(), change.clone())),
            }
            self.changes.applied(self.applied, std::slice::from_ref(change));
            self.changes.settled(self.applied);
        }
    }

    pub(super) fn state(&self) -> ClusterState {
        ClusterState::from_rows(self.rows.values().filter_map(Change::row), self.applied).unwrap()
    }

    /// It has what is on its disk; its sessions are gone.
    pub(super) fn restart(&mut self) {
        self.changes = Changes::with_directory(self.bounds.0, self.bounds.1);
        self.changes.restored(&self.state());
    }

    pub(super) fn has(&self, id: &RowId) -> bool {
        self.rows.contains_key(id)
    }
}

pub(super) fn host(id: u64, address: &str) -> Change {
    let facts =
        pb::HostFacts { name: format!("host-{id}"), address: address.to_owned(), ..Default::default() };
    Change::Host(Arc::new(pb::HostRecord {
        id,
        facts: Some(facts),
        public_key_sha256: vec![u8::try_from(id).unwrap(); 32],
        ..Default::default()
    }))
}

pub(super) fn service(name: &str, service_port: Option<u32>) -> Change {
    let port = |service_port| (HTTP.to_owned(), pb::Port { service_port, ..Default::default() });
    let manifest = pb::Manifest {
        name: name.to_owned(),
        ports: service_port.map(port).into_iter().collect(),
        ..Default::default()
    };
    Change::Service(Arc::new(pb::ServiceRecord {
        name: name.to_owned(),
        version: 1,
        template_version: 1,
        oldest_version: 1,
        manifest: Some(Box::new(manifest)),
        ..Default::default()
    }))
}

pub(super) fn instance(id: u64, service: &str, epoch: u64, state: pb::EndpointState) -> Change {
    Change::Instance(Arc::new(pb::InstanceRecord {
        id,
        service: service.to_owned(),
        version: 1,
        host_id: id % HOSTS,
        epoch,
        desired: pb::Desired::Run.into(),
        ports: [(HTTP.to_owned(), 20_000)].into(),
        endpoint: state.into(),
        ..Default::default()
    }))
}

pub(super) fn session(host: HostId, session: u64) -> Change {
    Change::Session(Arc::new(pb::SessionRecord { host_id: host.0, session, sequence: 0 }))
}
