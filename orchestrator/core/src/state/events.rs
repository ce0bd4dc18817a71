//! The table of lifecycle events, bounded per subject and in all. History outlives what it is about: a deleted
//! service's events stay until newer ones push them out.

mod queue;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use nave_proto::pb;

use crate::events::EventFilter;
use crate::limits::{EVENTS_MAX, EVENTS_PER_SUBJECT_MAX};
use queue::Queue;

pub(super) type EventKey = (u64, u32);

/// All events, and their keys by service and by host.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Events {
    all: Queue,
    /// Looked up by name only, never gone through in its own order.
    by_service: HashMap<String, Keys>,
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
            && let Some(key) = self.all.first()
        {
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
            keys.push(key);
            keys.first().filter(|_| keys.len() > EVENTS_PER_SUBJECT_MAX)
        };
        self.all.push(record);
        oldest
    }

    /// The oldest event of its subject goes first, always: bounds push out nothing else.
    fn remove(&mut self, key: EventKey) {
        let Some(record) = self.all.remove(key) else { return };
        forget(&mut self.by_host, record.host_id, key);
        if record.service.is_empty() {
            forget(&mut self.of_host, record.host_id, key);
        } else if let Some(keys) = self.by_service.get_mut(&record.service) {
            keys.forget_first();
            if keys.len() == 0 {
                self.by_service.remove(&record.service);
            }
        }
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &Arc<pb::EventRecord>> + '_ {
        self.all.iter()
    }

    /// Those of later revisions.
    pub(crate) fn after(&self, revision: u64) -> impl Iterator<Item = &Arc<pb::EventRecord>> + '_ {
        self.all.after((revision, u32::MAX))
    }

    pub(crate) fn newest(&self, filter: &EventFilter, limit: usize) -> Vec<Arc<pb::EventRecord>> {
        let mut found: Vec<_> = match (&filter.service, filter.host) {
            (Some(service), _) => {
                self.pick(self.by_service.get(service).into_iter().flat_map(Keys::iter), filter, limit)
            }
            (None, Some(host)) => self.pick(self.by_host.get(&host.0).into_iter().flatten(), filter, limit),
            (None, None) => self.all.iter().rev().take(limit).cloned().collect(),
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
        let newest_first = keys.rev().filter_map(|key| self.all.get(*key));
        newest_first.filter(|record| filter.admits(record)).take(limit).cloned().collect()
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        if self.all.len() > EVENTS_MAX {
            return Err(format!("{} events", self.all.len()));
        }
        let subjects =
            self.by_service.values().map(Keys::len).chain(self.of_host.values().map(BTreeSet::len));
        match subjects.max() {
            Some(most) if most > EVENTS_PER_SUBJECT_MAX => Err(format!("{most} events of one subject")),
            Some(_) | None => Ok(()),
        }
    }
}

/// Of one service's events, oldest first: most have one, which shall cost no memory of its own.
#[derive(Debug, Clone, PartialEq)]
enum Keys {
    One(Option<EventKey>),
    Many(VecDeque<EventKey>),
}

impl Default for Keys {
    fn default() -> Self {
        Self::One(None)
    }
}

impl Keys {
    fn len(&self) -> usize {
        match self {
            Self::One(key) => usize::from(key.is_some()),
            Self::Many(keys) => keys.len(),
        }
    }

    fn iter(&self) -> impl DoubleEndedIterator<Item = &EventKey> {
        let (one, many) = match self {
            Self::One(key) => (key.as_ref(), None),
            Self::Many(keys) => (None, Some(keys)),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }

    fn first(&self) -> Option<EventKey> {
        self.iter().next().copied()
    }

    fn push(&mut self, key: EventKey) {
        match self {
            Self::One(None) => *self = Self::One(Some(key)),
            Self::One(Some(first)) => *self = Self::Many(VecDeque::from([*first, key])),
            Self::Many(keys) => keys.push_back(key),
        }
    }

    /// With one left it is as if there had never been more, so that equal tables are equal.
    fn forget_first(&mut self) {
        match self {
            Self::One(key) => *key = None,
            Self::Many(keys) => {
                keys.pop_front();
                if keys.len() <= 1 {
                    *self = Self::One(keys.front().copied());
                }
            }
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
