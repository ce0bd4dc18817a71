//! The replicated state: ordered tables of shared records, and the indexes that keep `apply` and `plan` from
//! searching. The records are the rows of the state database; an index is never stored, always derivable, and
//! [`ClusterState::check`] derives it anew and compares.
//!
//! The manifest of a service's current version stands once, in its service row. That version's own row carries
//! none until the next version takes over, which halves what an apply encodes and keeps in memory. Accessors fill
//! it in, so only rows and this crate know.

mod check;
mod events;
mod hosts;
mod instances;
mod ranks;
mod rows;
mod services;

use std::collections::BTreeMap;
use std::sync::Arc;

use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb::command::Body;
use nave_proto::{COMMAND_FORMAT, pb};

use crate::dedup::DedupTable;
use crate::events::EventFilter;

pub(crate) use events::Events;
pub use hosts::Reserved;
pub(crate) use hosts::{HostEntry, Hosts};
pub(crate) use instances::{InstanceEntry, Reservation};
pub(crate) use ranks::{ClassId, Rank};

/// From this command format on, members agree on the one to write in.
pub(crate) const FORMATS_ARE_AGREED: u32 = 7;
pub use rows::RowError;
pub(crate) use services::{ServiceEntry, Services};

/// Everything the registry group agrees on. Cloning shares the records.
#[derive(Debug, Clone, Default)]
pub struct ClusterState {
    pub(crate) applied_index: u64,
    pub(crate) time_unix_ns: i64,
    pub(crate) cluster: Option<Arc<pb::ClusterRecord>>,
    pub(crate) services: Services,
    pub(crate) hosts: Hosts,
    pub(crate) instances: BTreeMap<InstanceId, InstanceEntry>,
    pub(crate) events: Events,
    pub(crate) tokens: BTreeMap<String, Arc<pb::TokenRecord>>,
    pub(crate) dedup: DedupTable,
    /// How far each host's reports have been taken.
    pub(crate) sessions: BTreeMap<HostId, Arc<pb::SessionRecord>>,
}

impl ClusterState {
    /// The state before the first log entry.
    pub fn new() -> Self {
        Self::default()
    }

    /// The hub's one counter: the base of this incarnation plus the applied log index.
    pub fn revision(&self) -> u64 {
        self.cluster.as_ref().map_or(0, |cluster| cluster.revision_base) + self.applied_index
    }

    /// Index of the newest log entry that is in this state.
    pub fn applied_index(&self) -> u64 {
        self.applied_index
    }

    /// Newest time seen in the log, unix nanoseconds. A leader stamps nothing older. After a restart it is the
    /// newest time that any row carries, so commands that changed nothing are not counted.
    pub fn time_unix_ns(&self) -> i64 {
        self.time_unix_ns
    }

    /// Blank and membership entries move the revision and nothing else.
    pub fn apply_blank(&mut self, log_index: u64) {
        self.applied_index = log_index;
    }

    /// None until `InitCluster` is applied.
    pub fn cluster(&self) -> Option<&pb::ClusterRecord> {
        self.cluster.as_deref()
    }

    /// The format to write that command in.
    pub fn format_of(&self, body: Option<&Body>) -> u32 {
        match body {
            // Whoever does not know that format must not pass over this.
            Some(Body::AgreeFormat(agreed)) => agreed.format,
            _ => self.command_format(),
        }
    }

    /// The format to write commands in: one that all members know. Before the cluster has begun, this build's own.
    pub fn command_format(&self) -> u32 {
        self.cluster.as_ref().map_or(COMMAND_FORMAT, |cluster| match cluster.command_format {
            0 => FORMATS_ARE_AGREED - 1,
            agreed => agreed,
        })
    }

    pub fn service(&self, name: &str) -> Option<&Arc<pb::ServiceRecord>> {
        self.services.get(name).map(|entry| &entry.record)
    }

    /// All services by name, those being deleted included.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<pb::ServiceRecord>> + '_ {
        self.services.iter().map(|entry| &entry.record)
    }

    /// The kept versions of a service, oldest first, each with its manifest.
    pub fn service_versions(
        &self,
        name: &str,
    ) -> impl DoubleEndedIterator<Item = Arc<pb::VersionRecord>> + '_ {
        self.services.get(name).into_iter().flat_map(ServiceEntry::versions_in_full)
    }

    /// One kept version with its manifest.
    pub fn service_version(&self, name: &str, version: u64) -> Option<Arc<pb::VersionRecord>> {
        self.services.get(name)?.version_in_full(version)
    }

    /// The manifest of a kept version; every version that has an instance is kept.
    pub fn manifest(&self, name: &str, version: u64) -> Option<&pb::Manifest> {
        self.services.get(name)?.manifest(version)
    }

    /// Services that name this one in their `needs`, whether or not it exists.
    pub fn services_needing(&self, name: &str) -> impl Iterator<Item = &str> + '_ {
        self.services.needing(name).map(AsRef::as_ref)
    }

    pub fn host(&self, id: HostId) -> Option<&Arc<pb::HostRecord>> {
        self.hosts.get(id).map(|entry| &entry.record)
    }

    /// The session that speaks for a host: the revision in which it was opened. None: it has yet to open one, since it
    /// joined or since it was lost.
    pub fn session(&self, id: HostId) -> Option<u64> {
        self.sessions.get(&id).map(|record| record.session)
    }

    /// All sessions that speak for a host.
    pub fn sessions(&self) -> impl ExactSizeIterator<Item = &Arc<pb::SessionRecord>> + '_ {
        self.sessions.values()
    }

    pub fn hosts(&self) -> impl ExactSizeIterator<Item = &Arc<pb::HostRecord>> + '_ {
        self.hosts.iter().map(|(_, entry)| &entry.record)
    }

    /// The host that has this name now (a lost one gives its name up to a successor).
    pub fn host_by_name(&self, name: &str) -> Option<&Arc<pb::HostRecord>> {
        self.host(self.hosts.by_name(name)?)
    }

    /// The host that enrolled with this public key.
    pub fn host_by_key(&self, public_key_sha256: &[u8]) -> Option<&Arc<pb::HostRecord>> {
        self.host(self.hosts.by_key(public_key_sha256)?)
    }

    /// What instances on this host reserve, those being stopped included.
    pub fn reserved(&self, id: HostId) -> Reserved {
        self.hosts.get(id).map_or_else(Reserved::default, |entry| entry.reserved)
    }

    pub fn instance(&self, id: InstanceId) -> Option<&Arc<pb::InstanceRecord>> {
        self.instances.get(&id).map(|entry| &entry.record)
    }

    pub fn instances(&self) -> impl ExactSizeIterator<Item = &Arc<pb::InstanceRecord>> + '_ {
        self.instances.values().map(|entry| &entry.record)
    }

    /// Instances of a service by id, those being stopped included.
    pub fn instances_of(&self, service: &str) -> impl Iterator<Item = &Arc<pb::InstanceRecord>> + '_ {
        self.services.get(service).into_iter().flat_map(|entry| entry.instances.values())
    }

    /// Instances on a host by id, those being stopped included.
    pub fn instances_on(&self, host: HostId) -> impl Iterator<Item = &Arc<pb::InstanceRecord>> + '_ {
        let ids = self.hosts.get(host).map(|entry| &entry.instances);
        ids.into_iter().flatten().filter_map(|id| self.instance(*id))
    }

    pub fn token(&self, id: &str) -> Option<&Arc<pb::TokenRecord>> {
        self.tokens.get(id)
    }

    pub fn tokens(&self) -> impl ExactSizeIterator<Item = &Arc<pb::TokenRecord>> + '_ {
        self.tokens.values()
    }

    /// The newest `limit` events that the filter lets through, oldest first.
    pub fn events(&self, filter: &EventFilter, limit: usize) -> Vec<Arc<pb::EventRecord>> {
        self.events.newest(filter, limit)
    }

    /// Events after `revision`, oldest first, for a watcher that resumes.
    pub fn events_after(&self, revision: u64) -> impl Iterator<Item = &Arc<pb::EventRecord>> + '_ {
        self.events.after(revision)
    }
}
