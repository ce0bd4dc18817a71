//! The table of instances. An instance belongs to a service and to a host; this is the one place that keeps the
//! three tables in step.

use std::sync::Arc;

use nave_proto::ids::InstanceId;
use nave_proto::pb;

use super::ClusterState;
use crate::wants::{InstanceExt as _, ManifestExt as _};

/// What one instance sets aside on its host, from the manifest of its version. It stays until the row is gone,
/// for a process that is being stopped still uses it.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Reservation {
    pub(crate) cpu_millicores: u64,
    pub(crate) memory_bytes: u64,
    pub(crate) fixed_ports: Vec<u32>,
}

/// One instance and what it takes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct InstanceEntry {
    pub(crate) record: Arc<pb::InstanceRecord>,
    pub(crate) taken: Reservation,
}

impl Reservation {
    pub(crate) fn of(manifest: &pb::Manifest) -> Self {
        let resources = manifest.resources.unwrap_or_default();
        Self {
            cpu_millicores: resources.cpu_millicores,
            memory_bytes: resources.memory_bytes,
            fixed_ports: manifest.fixed_ports(),
        }
    }

    /// Whether it asks for no more than `held`, which is of the same template.
    pub(crate) fn is_within(&self, held: &Self) -> bool {
        self.cpu_millicores <= held.cpu_millicores && self.memory_bytes <= held.memory_bytes
    }
}

impl ClusterState {
    /// Puts an instance's row; service and host must exist.
    pub(crate) fn put_instance(&mut self, record: Arc<pb::InstanceRecord>, revision: u64) {
        let id = record.id();
        let same = |before: &pb::InstanceRecord| {
            before.host_id == record.host_id
                && before.template_version == record.template_version
                && before.version == record.version
        };
        let stays = |entry: &&mut InstanceEntry| same(&entry.record);
        if let Some(entry) = self.instances.get_mut(&id).filter(stays) {
            entry.record = Arc::clone(&record);
            self.index_instance(&record.service, id, Some(&record), revision);
            return;
        }
        if let Some(InstanceEntry { record, taken }) = self.instances.remove(&id) {
            self.hosts.vacate(record.host(), id, &taken, revision);
        }
        let taken = self.manifest(&record.service, record.version).map(Reservation::of).unwrap_or_default();
        self.hosts.occupy(record.host(), id, &taken);
        self.index_instance(&record.service, id, Some(&record), revision);
        self.instances.insert(id, InstanceEntry { record, taken });
    }

    /// Takes an instance's row out of all three tables.
    pub(crate) fn remove_instance(
        &mut self,
        id: InstanceId,
        revision: u64,
    ) -> Option<Arc<pb::InstanceRecord>> {
        let InstanceEntry { record, taken } = self.instances.remove(&id)?;
        self.hosts.vacate(record.host(), id, &taken, revision);
        self.index_instance(&record.service, id, None, revision);
        Some(record)
    }

    fn index_instance(
        &mut self,
        service: &str,
        id: InstanceId,
        record: Option<&Arc<pb::InstanceRecord>>,
        revision: u64,
    ) {
        if self.services.put_instance(service, id, record, revision) {
            self.services.touch_needing(service, revision);
        }
    }
}
