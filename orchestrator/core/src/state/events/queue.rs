//! All events in order. They come at one end and nearly always go at the other, so they stand in a row, and one that goes
//! from the middle leaves a gap, which is closed when there are many.

use std::collections::VecDeque;
use std::sync::Arc;

use nave_proto::pb;

use super::EventKey;

/// Gaps are closed when there are more of them than events, and more than this.
const GAPS_MIN: usize = 64;

#[derive(Debug, Clone, Default)]
pub(super) struct Queue {
    /// Ascending by key. The first is never a gap.
    slots: VecDeque<(EventKey, Option<Arc<pb::EventRecord>>)>,
    gaps: usize,
}

impl PartialEq for Queue {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().eq(other.iter())
    }
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.gaps
    }

    pub(super) fn first(&self) -> Option<EventKey> {
        self.slots.front().map(|(key, _)| *key)
    }

    /// Adds one that is newer than all there are.
    pub(super) fn push(&mut self, record: Arc<pb::EventRecord>) {
        self.slots.push_back(((record.revision, record.index), Some(record)));
    }

    pub(super) fn get(&self, key: EventKey) -> Option<&Arc<pb::EventRecord>> {
        self.slots.get(self.place(key)?)?.1.as_ref()
    }

    pub(super) fn remove(&mut self, key: EventKey) -> Option<Arc<pb::EventRecord>> {
        let place = self.place(key)?;
        let record = self.slots.get_mut(place)?.1.take()?;
        self.gaps += 1;
        while self.slots.front().is_some_and(|(_, record)| record.is_none()) {
            self.slots.pop_front();
            self.gaps -= 1;
        }
        if self.gaps > GAPS_MIN && self.gaps > self.len() {
            self.slots.retain(|(_, record)| record.is_some());
            self.gaps = 0;
        }
        Some(record)
    }

    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = &Arc<pb::EventRecord>> + '_ {
        self.slots.iter().filter_map(|(_, record)| record.as_ref())
    }

    /// Those behind a key.
    pub(super) fn after(&self, key: EventKey) -> impl Iterator<Item = &Arc<pb::EventRecord>> + '_ {
        let from = self.slots.partition_point(|(at, _)| *at <= key);
        self.slots.range(from..).filter_map(|(_, record)| record.as_ref())
    }

    fn place(&self, key: EventKey) -> Option<usize> {
        if self.first() == Some(key) {
            return Some(0);
        }
        self.slots.binary_search_by_key(&key, |(at, _)| *at).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn event(revision: u64) -> Arc<pb::EventRecord> {
        Arc::new(pb::EventRecord { revision, ..Default::default() })
    }

    proptest! {
        /// Whatever goes and in whichever order, it is a sorted table; and its gaps are bounded.
        #[test]
        fn a_queue_is_a_table_in_order(steps in prop::collection::vec(prop::option::of(0..40usize), 0..900)) {
            let (mut queue, mut table, mut newest) = (Queue::default(), BTreeMap::new(), 0);
            for step in steps {
                match step {
                    None => {
                        newest += 1;
                        queue.push(event(newest));
                        table.insert((newest, 0), event(newest));
                    }
                    Some(nth) => {
                        let key = table.keys().nth(nth).copied().unwrap_or((newest + 1, 0));
                        prop_assert_eq!(queue.remove(key), table.remove(&key));
                        prop_assert_eq!(queue.get(key), None);
                    }
                }
                prop_assert_eq!((queue.len(), queue.first()), (table.len(), table.keys().next().copied()));
                prop_assert!(queue.gaps <= GAPS_MIN.max(queue.len()));
            }
            prop_assert!(queue.iter().eq(table.values()) && queue.iter().rev().eq(table.values().rev()));
            for revision in 0..=newest + 1 {
                prop_assert_eq!(queue.get((revision, 0)), table.get(&(revision, 0)));
                let behind = table.range((revision, 1)..).map(|(_, record)| record);
                prop_assert!(queue.after((revision, 0)).eq(behind));
            }
            let mut anew = Queue::default();
            table.values().cloned().for_each(|record| anew.push(record));
            prop_assert_eq!(queue, anew);
        }
    }
}
