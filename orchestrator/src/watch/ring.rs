//! The ring itself: the newest changes in order, bounded in number and in bytes. Pure data, no waiting.

use std::collections::VecDeque;

use nave_orchestrator_core::{Change, RowId};
use prost::Message as _;

/// At most this many changes. A record in the ring is shared with the state, so an entry itself is a revision and a
/// pointer, about 64 bytes: 65,536 × 64 B = 4 MiB at most for the ring's own memory.
const CHANGES_MAX: usize = 65_536;

/// At most this many bytes of records. A service of 300 B and its event of 200 B cost about 1.4 KiB in memory, so
/// 12 MiB hold some 9,000 applies: 0.2 s of the highest rate this hub reaches, minutes of an ordinary day.
const BYTES_MAX: usize = 12 * 1024 * 1024;

/// What a record costs beside its encoded bytes: reference counts, headers of its strings and maps.
const RECORD_OVERHEAD_BYTES: usize = 200;

/// The newest changes, oldest first.
#[derive(Debug)]
pub(crate) struct Ring {
    entries: VecDeque<Entry>,
    /// Every change with a greater revision that was ever applied is in `entries`; `None` before the first.
    complete_after: Option<u64>,
    newest: u64,
    bytes: usize,
    changes_max: usize,
    bytes_max: usize,
}

#[derive(Debug)]
struct Entry {
    revision: u64,
    cost: usize,
    change: Change,
}

/// What lies behind a revision.
#[derive(Debug)]
pub(crate) enum Read {
    /// All that was wanted of the changes after the revision asked for and up to `upto`, in order.
    Changes {
        /// Each with its revision; the changes of one revision are never torn apart.
        changes: Vec<(u64, Change)>,
        /// Where to read on.
        upto: u64,
    },
    /// Some of them are gone: the reader must take the state instead.
    FellOut,
}

/// For the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RingSize {
    pub(crate) changes: usize,
    pub(crate) bytes: usize,
}

impl Default for Ring {
    fn default() -> Self {
        Self::bounded(CHANGES_MAX, BYTES_MAX)
    }
}

impl Ring {
    fn bounded(changes_max: usize, bytes_max: usize) -> Self {
        Self { entries: VecDeque::new(), complete_after: None, newest: 0, bytes: 0, changes_max, bytes_max }
    }

    /// The state has been loaded, or replaced as a whole: whoever watches must take it anew.
    pub(super) fn restart(&mut self, revision: u64) {
        self.entries.clear();
        self.bytes = 0;
        self.complete_after = Some(revision);
        self.newest = revision;
    }

    pub(super) fn push(&mut self, revision: u64, changes: &[Change]) {
        self.complete_after.get_or_insert(revision.saturating_sub(1));
        self.newest = revision;
        for change in changes.iter().filter(|change| is_watched(change)) {
            let cost = cost(change);
            self.bytes += cost;
            self.entries.push_back(Entry { revision, cost, change: change.clone() });
        }
        while self.entries.len() > self.changes_max || self.bytes > self.bytes_max {
            self.forget_oldest_revision();
        }
    }

    /// A revision is kept or forgotten as a whole, else a reader could see half of one.
    fn forget_oldest_revision(&mut self) {
        let Some(oldest) = self.entries.front().map(|entry| entry.revision) else { return };
        while self.entries.front().is_some_and(|entry| entry.revision == oldest) {
            if let Some(entry) = self.entries.pop_front() {
                self.bytes -= entry.cost;
            }
        }
        self.complete_after = Some(oldest);
    }

    pub(super) fn read(&self, after: u64, limit: usize, mut wanted: impl FnMut(&Change) -> bool) -> Read {
        if self.complete_after.is_none_or(|complete_after| after < complete_after) {
            return Read::FellOut;
        }
        let mut changes: Vec<(u64, Change)> = Vec::new();
        let from = self.entries.partition_point(|entry| entry.revision <= after);
        for entry in self.entries.range(from..) {
            let next_revision = changes.last().is_some_and(|(revision, _)| *revision != entry.revision);
            if changes.len() >= limit && next_revision {
                let upto = changes.last().map_or(after, |(revision, _)| *revision);
                return Read::Changes { changes, upto };
            }
            if wanted(&entry.change) {
                changes.push((entry.revision, entry.change.clone()));
            }
        }
        Read::Changes { changes, upto: self.newest.max(after) }
    }

    pub(super) fn size(&self) -> RingSize {
        RingSize { changes: self.entries.len(), bytes: self.bytes }
    }
}

/// Tokens, deduplication, sessions and version records are nobody's to watch.
fn is_watched(change: &Change) -> bool {
    match change {
        Change::Service(_) | Change::Host(_) | Change::Instance(_) | Change::Event(_) => true,
        Change::Deleted(row) => matches!(row, RowId::Service(_) | RowId::Host(_) | RowId::Instance(_)),
        Change::Version(_)
        | Change::Token(_)
        | Change::Dedup(_)
        | Change::Cluster(_)
        | Change::Session(_) => false,
    }
}

/// A record in memory is about twice its encoding.
fn cost(change: &Change) -> usize {
    let encoded = match change {
        Change::Service(record) => record.encoded_len(),
        Change::Host(record) => record.encoded_len(),
        Change::Instance(record) => record.encoded_len(),
        Change::Event(record) => record.encoded_len(),
        Change::Version(_)
        | Change::Token(_)
        | Change::Dedup(_)
        | Change::Cluster(_)
        | Change::Session(_)
        | Change::Deleted(_) => 0,
    };
    RECORD_OVERHEAD_BYTES + 2 * encoded
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use nave_proto::pb;
    use proptest::prelude::*;

    use super::*;

    fn service(name: &str, version: u64, revision: u64) -> Change {
        Change::Service(Arc::new(pb::ServiceRecord {
            name: name.to_owned(),
            version,
            revision,
            ..Default::default()
        }))
    }

    /// A model of the state: service name to version.
    type Model = BTreeMap<String, u64>;

    fn replay(model: &mut Model, change: &Change) {
        match change {
            Change::Service(record) => {
                model.insert(record.name.clone(), record.version);
            }
            Change::Deleted(RowId::Service(name)) => {
                model.remove(name);
            }
            other => panic!("not in this test: {other:?}"),
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        /// Changes of one revision: service number, deleted or not.
        Apply(Vec<(u8, bool)>),
        /// A revision without changes, as a blank entry is.
        Blank,
        Read(usize),
        Restart,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => prop::collection::vec((0..8u8, any::<bool>()), 1..5).prop_map(Step::Apply),
            1 => Just(Step::Blank),
            4 => (1..6usize).prop_map(Step::Read),
            1 => Just(Step::Restart),
        ];
        prop::collection::vec(step, 1..120)
    }

    proptest! {
        /// A watcher that resumes by revision sees every change once and in order, or is told to begin again.
        #[test]
        fn a_watcher_misses_nothing_and_sees_nothing_twice(steps in steps(), changes_max in 1..20usize) {
            let mut ring = Ring::bounded(changes_max, usize::MAX);
            ring.restart(0);
            let mut truth = Model::new();
            let mut revision = 0;
            let (mut seen, mut cursor) = (Model::new(), 0);
            // The state at every revision, to compare with at the cursor, wherever the reader stands.
            let mut history = vec![Model::new()];
            for step in steps {
                match step {
                    Step::Apply(changes) => {
                        revision += 1;
                        let changes: Vec<Change> = changes.iter().map(|(number, delete)| {
                            let name = format!("s{number}");
                            if *delete { Change::Deleted(RowId::Service(name)) } else { service(&name, revision, revision) }
                        }).collect();
                        for change in &changes { replay(&mut truth, change); }
                        ring.push(revision, &changes);
                        history.push(truth.clone());
                    }
                    Step::Blank => {
                        revision += 1;
                        ring.push(revision, &[]);
                        history.push(truth.clone());
                    }
                    Step::Restart => {
                        revision += 1;
                        ring.restart(revision);
                        history.push(truth.clone());
                    }
                    Step::Read(limit) => match ring.read(cursor, limit, |_| true) {
                        Read::FellOut => { seen = truth.clone(); cursor = revision; }
                        Read::Changes { changes, upto } => {
                            let mut last = cursor;
                            for (at, change) in &changes {
                                prop_assert!(*at > cursor && *at <= upto && *at >= last);
                                last = *at;
                                replay(&mut seen, change);
                            }
                            prop_assert!(changes.len() >= limit || upto == revision);
                            cursor = upto;
                        }
                    },
                }
                prop_assert_eq!(&seen, &history[usize::try_from(cursor).unwrap()]);
                prop_assert!(ring.size().changes <= changes_max);
            }
        }
    }

    #[test]
    fn the_ring_is_bounded_in_bytes() {
        let mut ring = Ring::bounded(usize::MAX, 4 * (RECORD_OVERHEAD_BYTES + 200));
        ring.restart(0);
        for revision in 1..100 {
            ring.push(revision, &[service(&"x".repeat(50), revision, revision)]);
        }
        assert!(
            ring.size().changes >= 3 && ring.size().bytes <= 4 * (RECORD_OVERHEAD_BYTES + 200),
            "{:?}",
            ring.size()
        );
        assert!(matches!(ring.read(1, 10, |_| true), Read::FellOut));
        assert!(matches!(ring.read(98, 10, |_| true), Read::Changes { upto: 99, .. }));
    }

    #[test]
    fn before_the_state_is_loaded_nothing_is_complete() {
        let ring = Ring::default();
        assert!(matches!(ring.read(5, 1, |_| true), Read::FellOut));
    }

    #[test]
    fn a_member_that_lags_behind_the_cursor_waits() {
        let mut ring = Ring::default();
        ring.restart(10);
        let Read::Changes { changes, upto } = ring.read(12, 9, |_| true) else { panic!("fell out") };
        assert_eq!((changes.len(), upto), (0, 12));
        ring.push(12, &[service("a", 1, 12)]);
        ring.push(13, &[service("b", 1, 13)]);
        let Read::Changes { changes, upto } = ring.read(12, 9, |_| true) else { panic!("fell out") };
        assert_eq!((changes.len(), upto), (1, 13));
    }
}
