//! The table of lifecycle events, bounded per subject and in all. History outlives what it is about: a deleted
//! service's events stay until newer ones push them out.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeBounds;
use std::sync::Arc;

use nave_proto::pb;

use crate::events::EventFilter;
use crate::limits::{EVENTS_MAX, EVENTS_PER_SUBJECT_MAX};

type EventKey = (u64, u32);

/// All events, and the keys by service and by host.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Events {
    all: BTreeMap<EventKey, Arc<pb::EventRecord>>,
    by_service: BTreeMap<String, BTreeSet<EventKey>>,
    /// Every event that names the host.
    by_host: BTreeMap<u64, BTreeSet<EventKey>>,
    /// Those of `by_host` that concern no service: the ones the host's bound counts.
    of_host: BTreeMap<u64, BTreeSet<EventKey>>,
}

impl Events {
    /// Adds an event and returns the keys of those it pushed out.
    pub(crate) fn add(&mut self, record: Arc<pb::EventRecord>) -> Vec<EventKey> {
        self.insert(Arc::clone(&record));
        let mut pushed_out = Vec::new();
        let subject = if record.service.is_empty() {
            self.of_host.get(&record.host_id)
        } else {
            self.by_service.get(&record.service)
        };
        if let Some(keys) = subject
            && keys.len() > EVENTS_PER_SUBJECT_MAX
        {
            pushed_out.extend(keys.first());
        }
        for key in &pushed_out {
            self.remove(*key);
        }
        if self.all.len() > EVENTS_MAX
            && let Some((key, _)) = self.all.first_key_value()
        {
            let key = *key;
            self.remove(key);
            pushed_out.push(key);
        }
        pushed_out
    }

    /// Adds an event without looking at bounds, as when reading rows.
    pub(crate) fn insert(&mut self, record: Arc<pb::EventRecord>) {
        let key = (record.revision, record.index);
        if record.host_id != 0 {
            self.by_host.entry(record.host_id).or_default().insert(key);
        }
        match self.by_service.get_mut(&record.service) {
            Some(keys) => {
                keys.insert(key);
            }
            None if record.service.is_empty() => {
                self.of_host.entry(record.host_id).or_default().insert(key);
            }
            None => {
                self.by_service.insert(record.service.clone(), BTreeSet::from([key]));
            }
        }
        self.all.insert(key, record);
    }

    fn remove(&mut self, key: EventKey) {
        let Some(record) = self.all.remove(&key) else { return };
        forget(&mut self.by_host, &record.host_id, key);
        if record.service.is_empty() {
            forget(&mut self.of_host, &record.host_id, key);
        } else {
            forget(&mut self.by_service, &record.service, key);
        }
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &Arc<pb::EventRecord>> + '_ {
        self.all.values()
    }

    pub(crate) fn range(
        &self,
        keys: impl RangeBounds<EventKey>,
    ) -> impl Iterator<Item = &Arc<pb::EventRecord>> + '_ {
        self.all.range(keys).map(|(_, record)| record)
    }

    pub(crate) fn newest(&self, filter: &EventFilter, limit: usize) -> Vec<Arc<pb::EventRecord>> {
        let mut found: Vec<_> = match (&filter.service, filter.host) {
            (Some(service), _) => self.pick(self.by_service.get(service), filter, limit),
            (None, Some(host)) => self.pick(self.by_host.get(&host.0), filter, limit),
            (None, None) => self.all.values().rev().take(limit).cloned().collect(),
        };
        found.reverse();
        found
    }

    fn pick(
        &self,
        keys: Option<&BTreeSet<EventKey>>,
        filter: &EventFilter,
        limit: usize,
    ) -> Vec<Arc<pb::EventRecord>> {
        let newest_first = keys.into_iter().flatten().rev().filter_map(|key| self.all.get(key));
        newest_first.filter(|record| filter.admits(record)).take(limit).cloned().collect()
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        if self.all.len() > EVENTS_MAX {
            return Err(format!("{} events", self.all.len()));
        }
        let subjects = self.by_service.values().chain(self.of_host.values());
        match subjects.map(BTreeSet::len).max() {
            Some(most) if most > EVENTS_PER_SUBJECT_MAX => Err(format!("{most} events of one subject")),
            Some(_) | None => Ok(()),
        }
    }
}

fn forget<K: Ord>(index: &mut BTreeMap<K, BTreeSet<EventKey>>, of: &K, key: EventKey) {
    if let Some(keys) = index.get_mut(of) {
        keys.remove(&key);
        if keys.is_empty() {
            index.remove(of);
        }
    }
}
