//! The table of services with their kept versions, and what is looked up by service: its instances, how many of
//! them are ready, who needs it, when anything about it last changed.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use compact_str::CompactString;
use nave_proto::ids::InstanceId;
use nave_proto::pb;

use crate::limits::{ADDRESS_SUFFIXES, UIDS, VERSIONS_KEPT};
use crate::plan::may_run;
use crate::wants::InstanceExt as _;

/// One service and everything indexed by its name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ServiceEntry {
    pub(crate) name: Arc<str>,
    pub(crate) record: Arc<pb::ServiceRecord>,
    /// Ascending. The current version's record carries no manifest: the service's has it.
    pub(crate) versions: Vec<Arc<pb::VersionRecord>>,
    /// The same records as in the table of instances, so that a look at a service reads one table.
    pub(crate) instances: BTreeMap<InstanceId, Arc<pb::InstanceRecord>>,
    /// Instances that are wanted and ready.
    pub(crate) ready: usize,
    /// Revision at which anything that planning this service depends on last changed.
    pub(crate) touched: u64,
}

impl ServiceEntry {
    pub(crate) fn manifest(&self, version: u64) -> Option<&pb::Manifest> {
        if version == self.record.version {
            return self.current();
        }
        self.version(version)?.manifest.as_deref()
    }

    pub(crate) fn current(&self) -> Option<&pb::Manifest> {
        self.record.manifest.as_deref()
    }

    /// As stored: without manifest when it is the current one.
    pub(crate) fn version(&self, version: u64) -> Option<&Arc<pb::VersionRecord>> {
        let at = self.versions.binary_search_by_key(&version, |record| record.version).ok()?;
        self.versions.get(at)
    }

    /// The template that a kept version runs.
    pub(crate) fn template_of(&self, version: u64) -> Option<u64> {
        match version == self.record.version {
            true => Some(self.record.template_version),
            false => self.version(version).map(|record| record.template_version),
        }
    }

    pub(crate) fn version_in_full(&self, version: u64) -> Option<Arc<pb::VersionRecord>> {
        self.version(version).map(|record| self.in_full(record))
    }

    pub(crate) fn versions_in_full(&self) -> impl DoubleEndedIterator<Item = Arc<pb::VersionRecord>> + '_ {
        self.versions.iter().map(|record| self.in_full(record))
    }

    fn in_full(&self, record: &Arc<pb::VersionRecord>) -> Arc<pb::VersionRecord> {
        if record.version != self.record.version {
            return Arc::clone(record);
        }
        let manifest = self.record.manifest.clone();
        Arc::new(pb::VersionRecord { manifest, ..record.as_ref().clone() })
    }

    /// Puts a version's record in its place.
    pub(crate) fn put_version(&mut self, record: Arc<pb::VersionRecord>) {
        match self.versions.binary_search_by_key(&record.version, |kept| kept.version) {
            Ok(at) => self.versions[at] = record,
            Err(at) => self.versions.insert(at, record),
        }
    }

    /// Versions that need not be kept: neither among the newest, nor the stable one, nor run by an instance.
    pub(crate) fn stale_versions(&self, in_use: &BTreeSet<u64>) -> Vec<u64> {
        let old = self.versions.len().saturating_sub(VERSIONS_KEPT);
        let stale = self.versions.iter().take(old).map(|record| record.version);
        stale.filter(|v| *v != self.record.stable_version && !in_use.contains(v)).collect()
    }
}

/// All services.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Services {
    /// Names of up to 24 bytes stand in the tree itself: a search compares some twenty of them, and of 100,000 that lay
    /// elsewhere most would have to be fetched from memory, four searches for each apply.
    entries: BTreeMap<CompactString, ServiceEntry>,
    index: Index,
}

/// What is derived from service rows, and the order of touches.
#[derive(Debug, Clone, Default, PartialEq)]
struct Index {
    /// Every service by the revision that last touched it: the newest changes are the end of the set.
    touched: BTreeSet<(u64, Arc<str>)>,
    /// For each name in somebody's `needs`: who says so.
    needed_by: BTreeMap<String, BTreeSet<Arc<str>>>,
    per_host: BTreeSet<Arc<str>>,
    suffixes: BTreeSet<u32>,
    uids: BTreeSet<u32>,
}

impl Services {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn get(&self, name: &str) -> Option<&ServiceEntry> {
        self.entries.get(name)
    }

    /// To change what no index is derived from; the rest goes through [`Services::put`].
    pub(crate) fn get_mut(&mut self, name: &str) -> Option<&mut ServiceEntry> {
        self.entries.get_mut(name)
    }

    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = &ServiceEntry> + '_ {
        self.entries.values()
    }

    pub(crate) fn needing(&self, name: &str) -> impl Iterator<Item = &Arc<str>> + '_ {
        self.index.needed_by.get(name).into_iter().flatten()
    }

    pub(crate) fn per_host(&self) -> impl Iterator<Item = &Arc<str>> + '_ {
        self.index.per_host.iter()
    }

    /// Services that anything has touched after `revision`.
    pub(crate) fn touched_after(&self, revision: u64) -> impl Iterator<Item = &Arc<str>> + '_ {
        self.index.touched.range((revision + 1, Arc::from(""))..).map(|(_, name)| name)
    }

    /// Puts the row of a new or changed service and brings every index that it feeds up to date. One search of the
    /// table: a million names make each search a good part of an apply.
    pub(crate) fn put(&mut self, record: Arc<pb::ServiceRecord>, revision: u64) -> &mut ServiceEntry {
        match self.entries.entry(CompactString::from(record.name.as_str())) {
            Entry::Vacant(vacant) => {
                let name: Arc<str> = Arc::from(record.name.as_str());
                self.index.add(&name, &record);
                self.index.touched.insert((revision, Arc::clone(&name)));
                let (versions, instances) = (Vec::with_capacity(1), BTreeMap::new());
                vacant.insert(ServiceEntry { name, record, versions, instances, ready: 0, touched: revision })
            }
            Entry::Occupied(occupied) => {
                let entry = occupied.into_mut();
                self.index.remove(&entry.name, &entry.record);
                self.index.add(&entry.name, &record);
                self.index.touch(entry, revision);
                entry.record = record;
                entry
            }
        }
    }

    pub(crate) fn remove(&mut self, name: &str) -> Option<ServiceEntry> {
        let entry = self.entries.remove(name)?;
        self.index.remove(&entry.name, &entry.record);
        self.index.touched.remove(&(entry.touched, Arc::clone(&entry.name)));
        Some(entry)
    }

    /// Puts an instance's row, or with None takes it out. True: the service's readiness has come or gone, for those
    /// that need it. The first ready instance lets them start; the last one gone holds them back.
    #[must_use]
    pub(crate) fn put_instance(
        &mut self,
        service: &str,
        id: InstanceId,
        record: Option<&Arc<pb::InstanceRecord>>,
        revision: u64,
    ) -> bool {
        let Some(entry) = self.entries.get_mut(service) else { return false };
        let before = match record {
            Some(record) => entry.instances.insert(id, Arc::clone(record)),
            None => entry.instances.remove(&id),
        };
        let needs = entry.current().map_or(&[][..], |manifest| &manifest.needs);
        let there = |record: &Arc<pb::InstanceRecord>| (record.host(), may_run(record));
        let needs = match needs.is_empty() || record.map(there) == before.as_ref().map(there) {
            true => Vec::new(),
            false => needs.to_vec(),
        };
        let had_ready = entry.ready > 0;
        entry.ready += usize::from(record.is_some_and(|record| record.ready()));
        entry.ready -= usize::from(before.is_some_and(|record| record.ready()));
        self.index.touch(entry, revision);
        let changed = had_ready != (entry.ready > 0);
        // What it needs may wait for it to be gone.
        needs.iter().for_each(|name| self.touch(name, revision));
        changed
    }

    /// Marks a service for the planner. One that does not exist needs no plan.
    pub(crate) fn touch(&mut self, name: &str, revision: u64) {
        if let Some(entry) = self.entries.get_mut(name) {
            self.index.touch(entry, revision);
        }
    }

    /// Marks every service that needs this one: its readiness has come or gone.
    pub(crate) fn touch_needing(&mut self, name: &str, revision: u64) {
        let needing: Vec<Arc<str>> = self.needing(name).cloned().collect();
        for name in needing {
            self.touch(&name, revision);
        }
    }

    /// Forgets what touched what: a state read from rows has no history, so all of it counts as new.
    pub(crate) fn touch_all(&mut self, revision: u64) {
        self.index.touched = self.iter().map(|entry| (revision, Arc::clone(&entry.name))).collect();
        for entry in self.entries.values_mut() {
            entry.touched = revision;
        }
    }

    /// A free address suffix, looking from `next` upwards and round, so that a freed one rests longest.
    pub(crate) fn free_suffix(&self, next: u32) -> Option<u32> {
        free_from(&self.index.suffixes, ADDRESS_SUFFIXES, next)
    }

    /// A free uid, likewise: files of a deleted service should not soon belong to another.
    pub(crate) fn free_uid(&self, next: u32) -> Option<u32> {
        free_from(&self.index.uids, UIDS, next)
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        for entry in self.iter() {
            if !self.index.touched.contains(&(entry.touched, Arc::clone(&entry.name))) {
                return Err(format!("service {}: not in the order of touches", entry.name));
            }
        }
        if self.index.touched.len() != self.entries.len() {
            return Err(format!("{} touches for {} services", self.index.touched.len(), self.entries.len()));
        }
        Ok(())
    }
}

impl Index {
    fn add(&mut self, name: &Arc<str>, record: &pb::ServiceRecord) {
        if let Some(manifest) = &record.manifest {
            for needed in &manifest.needs {
                self.needed_by.entry(needed.clone()).or_default().insert(Arc::clone(name));
            }
            if manifest.per_host {
                self.per_host.insert(Arc::clone(name));
            }
        }
        if record.address_suffix != 0 {
            self.suffixes.insert(record.address_suffix);
        }
        if record.uid != 0 {
            self.uids.insert(record.uid);
        }
    }

    fn remove(&mut self, name: &Arc<str>, record: &pb::ServiceRecord) {
        if let Some(manifest) = &record.manifest {
            for needed in &manifest.needs {
                if let Some(needing) = self.needed_by.get_mut(needed) {
                    needing.remove(name);
                    if needing.is_empty() {
                        self.needed_by.remove(needed);
                    }
                }
            }
            if manifest.per_host {
                self.per_host.remove(name);
            }
        }
        self.suffixes.remove(&record.address_suffix);
        self.uids.remove(&record.uid);
    }

    fn touch(&mut self, entry: &mut ServiceEntry, revision: u64) {
        if entry.touched == revision {
            return;
        }
        self.touched.remove(&(entry.touched, Arc::clone(&entry.name)));
        entry.touched = revision;
        self.touched.insert((revision, Arc::clone(&entry.name)));
    }
}

fn free_from(used: &BTreeSet<u32>, range: std::ops::RangeInclusive<u32>, next: u32) -> Option<u32> {
    let start = if range.contains(&next) { next } else { *range.start() };
    (start..=*range.end()).chain(*range.start()..start).find(|number| !used.contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_number_is_the_next_one_up_and_round() {
        let used = BTreeSet::from([3, 4, 6]);
        assert_eq!(free_from(&used, 3..=6, 0), Some(5));
        assert_eq!(free_from(&used, 3..=6, 6), Some(5));
        assert_eq!(free_from(&used, 3..=7, 6), Some(7));
        assert_eq!(free_from(&BTreeSet::from([1, 2]), 1..=2, 1), None);
    }
}
