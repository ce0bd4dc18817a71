//! The table of lifecycle events, bounded per subject and in all. History outlives what it is about: a deleted
//! service's events stay until newer ones push them out.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::RangeBounds;
use std::sync::Arc;

use nave_proto::pb;

use crate::events::EventFilter;
use crate::limits::{EVENTS_MAX, EVENTS_PER_SUBJECT_MAX};

type EventKey = (u64, u32);

/// All events, and their keys by service and by host.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Events {
    all: BTreeMap<EventKey, Arc<pb::EventRecord>>,
    by_service: BTreeMap<String, VecDeque<EventKey>>,
    /// Every event that names the host.
    by_host: BTreeMap<u64, BTreeSet<EventKey>>,
    /// Those of `by_host` that concern no service: the ones the host's bound counts.
    of_host: BTreeMap<u64, BTreeSet<EventKey>>,
}

impl Events {
    /// Adds the newest event and returns the keys of those it pushed out.
    pub(crate) fn add(&mut self, record: Arc<pb::EventRecord>) -> Vec<EventKey> {
        let mut pushed_out = Vec::new();
        pushed_out.extend(self.insert(record));
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

    /// Adds an event newer than all there are; returns the oldest of its subject when that has too many.
    pub(crate) fn insert(&mut self, record: Arc<pb::EventRecord>) -> Option<EventKey> {
        let key = (record.revision, record.index);
        if record.host_id != 0 {
            self.by_host.entry(record.host_id).or_default().insert(key);
        }
        let oldest = if record.service.is_empty() {
            let keys = self.of_host.entry(record.host_id).or_default();
            keys.insert(key);
            keys.first().copied().filter(|_| keys.len() > EVENTS_PER_SUBJECT_MAX)
        } else {
            let keys = self.by_service.entry(record.service.clone()).or_default();
            keys.push_back(key);
            keys.front().copied().filter(|_| keys.len() > EVENTS_PER_SUBJECT_MAX)
        };
        self.all.insert(key, record);
        oldest
    }

    /// The oldest event of its subject goes first, always: bounds push out nothing else.
    fn remove(&mut self, key: EventKey) {
        let Some(record) = self.all.remove(&key) else { return };
        forget(&mut self.by_host, record.host_id, key);
        if record.service.is_empty() {
            forget(&mut self.of_host, record.host_id, key);
        } else if let Some(keys) = self.by_service.get_mut(&record.service) {
            keys.pop_front();
            if keys.is_empty() {
                self.by_service.remove(&record.service);
            }
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
            (Some(service), _) => {
                self.pick(self.by_service.get(service).into_iter().flatten(), filter, limit)
            }
            (None, Some(host)) => self.pick(self.by_host.get(&host.0).into_iter().flatten(), filter, limit),
            (None, None) => self.all.values().rev().take(limit).cloned().collect(),
        };
        found.reverse();
        found
    }

    fn pick<'a>(
        &self,
        keys: impl DoubleEndedIterator<Item = &'a EventKey>,
        filter: &EventFilter,
        limit: usize,
    ) -> Vec<Arc<pb::EventRecord>> {
        let newest_first = keys.rev().filter_map(|key| self.all.get(key));
        newest_first.filter(|record| filter.admits(record)).take(limit).cloned().collect()
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        if self.all.len() > EVENTS_MAX {
            return Err(format!("{} events", self.all.len()));
        }
        let subjects =
            self.by_service.values().map(VecDeque::len).chain(self.of_host.values().map(BTreeSet::len));
        match subjects.max() {
            Some(most) if most > EVENTS_PER_SUBJECT_MAX => Err(format!("{most} events of one subject")),
            Some(_) | None => Ok(()),
        }
    }
}

fn forget(index: &mut BTreeMap<u64, BTreeSet<EventKey>>, of: u64, key: EventKey) {
    if let Entry::Occupied(mut keys) = index.entry(of) {
        keys.get_mut().remove(&key);
        if keys.get().is_empty() {
            keys.remove();
        }
    }
}
