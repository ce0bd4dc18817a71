//! The whole state as rows and back, for snapshots and for start-up.

use std::collections::BTreeMap;
use std::sync::Arc;

use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb::row::Row;
use nave_proto::{COMMAND_FORMAT, pb};

use super::ClusterState;
use crate::change::Change;
use crate::wants::InstanceExt as _;

/// Rows that are not the rows of one state: the database or the snapshot is damaged, or a newer build wrote it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    #[error("a row of a kind that this build does not know: a newer build wrote it")]
    UnknownTable,
    #[error(
        "it is of command format {format}, this build knows formats up to {COMMAND_FORMAT}: a newer build wrote it"
    )]
    Newer { format: u32 },
    #[error("instance {instance} belongs to service {service:?}, which has no row")]
    NoService { instance: InstanceId, service: String },
    #[error("instance {instance} is on host {host}, which has no row")]
    NoHost { instance: InstanceId, host: HostId },
    #[error("version {version} of service {service:?}, which has no row")]
    StrayVersion { service: String, version: u64 },
    #[error("the rows contradict each other: {0}")]
    Contradiction(String),
}

impl ClusterState {
    /// Every row, as changes that share their records with the tables.
    pub fn records(&self) -> impl Iterator<Item = Change> + '_ {
        let cluster = self.cluster.iter().cloned().map(Change::Cluster);
        let services = self.services.iter().map(|entry| Change::Service(Arc::clone(&entry.record)));
        let versions =
            self.services.iter().flat_map(|entry| entry.versions.iter().cloned().map(Change::Version));
        let hosts = self.hosts().cloned().map(Change::Host);
        let instances = self.instances().cloned().map(Change::Instance);
        let events = self.events.iter().cloned().map(Change::Event);
        let tokens = self.tokens.values().cloned().map(Change::Token);
        let dedup = self.dedup.iter().cloned().map(Change::Dedup);
        let sessions = self.sessions.values().cloned().map(Change::Session);
        cluster
            .chain(services)
            .chain(versions)
            .chain(hosts)
            .chain(instances)
            .chain(events)
            .chain(tokens)
            .chain(dedup)
            .chain(sessions)
    }

    /// Every row, copied.
    pub fn rows(&self) -> impl Iterator<Item = pb::Row> + '_ {
        self.records().filter_map(|change| change.row())
    }

    /// The state that these rows, in any order, are the rows of.
    pub fn from_rows(rows: impl IntoIterator<Item = pb::Row>, applied_index: u64) -> Result<Self, RowError> {
        let mut state = Self { applied_index, ..Self::default() };
        let mut versions = Vec::new();
        let mut instances = BTreeMap::new();
        let mut events = BTreeMap::new();
        for row in rows {
            match row.row.ok_or(RowError::UnknownTable)? {
                Row::Cluster(record) => state.cluster = Some(Arc::new(record)),
                Row::Service(record) => {
                    state.services.put(Arc::new(record), 0);
                }
                Row::Version(record) => versions.push(record),
                Row::Host(record) => state.hosts.put(Arc::new(record), 0),
                Row::Instance(record) => {
                    instances.insert(record.id, record);
                }
                Row::Event(record) => {
                    events.insert((record.revision, record.index), record);
                }
                Row::Token(record) => {
                    state.tokens.insert(record.id.clone(), Arc::new(record));
                }
                Row::Dedup(record) => state.dedup.insert(Arc::new(record)),
                Row::Session(record) => {
                    state.sessions.insert(HostId(record.host_id), Arc::new(record));
                }
            }
        }
        versions.into_iter().try_for_each(|record| state.adopt_version(record))?;
        instances.into_values().try_for_each(|record| state.adopt_instance(record))?;
        for record in events.into_values() {
            state.events.insert(Arc::new(record));
        }
        state.forget_history();
        match state.command_format() {
            format if format > COMMAND_FORMAT => Err(RowError::Newer { format }),
            _ => Ok(state),
        }
    }

    fn adopt_version(&mut self, record: pb::VersionRecord) -> Result<(), RowError> {
        match self.services.get_mut(&record.service) {
            Some(entry) => {
                entry.put_version(Arc::new(record));
                Ok(())
            }
            None => Err(RowError::StrayVersion { service: record.service, version: record.version }),
        }
    }

    fn adopt_instance(&mut self, record: pb::InstanceRecord) -> Result<(), RowError> {
        let (instance, host) = (record.id(), record.host());
        if self.hosts.get(host).is_none() {
            return Err(RowError::NoHost { instance, host });
        }
        if self.services.get(&record.service).is_none() {
            return Err(RowError::NoService { instance, service: record.service });
        }
        self.put_instance(Arc::new(record), 0);
        Ok(())
    }

    /// What the rows do not say: all of it counts as changed now, and the newest time is the newest they carry.
    fn forget_history(&mut self) {
        let revision = self.revision();
        self.services.touch_all(revision);
        self.hosts.fleet_touched = revision;
        self.hosts.room_touched = revision;
        let newest_event = self.events.iter().next_back().map_or(0, |event| event.time_unix_ns);
        let cluster_time = self.cluster.as_ref().map_or(0, |cluster| cluster.time_unix_ns);
        self.time_unix_ns = newest_event.max(cluster_time).max(self.dedup.newest_use());
    }
}
