//! Which agents there are, by the log, and how far those of one member have taken the directory.
//!
//! An agent between two sessions still calls what it knew, so it is not enough to hear from those that have one: the log
//! says who has to be heard, and every member knows the log. `dispatch/callers.rs` has the reckoning.

use std::collections::HashMap;
use std::sync::Arc;

use nave_proto::ids::HostId;
use nave_proto::pb;

/// How far the agents with a session at one member have taken the directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Standing {
    /// All of them have taken everything up to this revision.
    pub(crate) taken: u64,
    /// By the log as of this revision.
    pub(crate) as_of: u64,
    /// So many of the log's sessions are here.
    pub(crate) sessions: u64,
}

/// The sessions that there are, by the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct LogSessions {
    pub(crate) count: u64,
    /// When one was opened or ended last.
    pub(crate) changed: u64,
    pub(crate) as_of: u64,
}

/// The session of each host that has one.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    of: HashMap<HostId, u64>,
    changed: u64,
}

impl Sessions {
    pub(super) fn of(&self, host: HostId) -> Option<u64> {
        self.of.get(&host).copied()
    }

    /// Returns whether that is another one than the host had.
    pub(super) fn put(&mut self, revision: u64, record: &pb::SessionRecord) -> bool {
        // The row also counts the session's reports.
        let is_news = self.of.insert(HostId(record.host_id), record.session) != Some(record.session);
        self.note(revision, is_news)
    }

    pub(super) fn remove(&mut self, revision: u64, host: HostId) -> bool {
        let is_news = self.of.remove(&host).is_some();
        self.note(revision, is_news)
    }

    pub(super) fn restart<'a>(
        &mut self,
        revision: u64,
        records: impl Iterator<Item = &'a Arc<pb::SessionRecord>>,
    ) {
        self.of = records.map(|record| (HostId(record.host_id), record.session)).collect();
        self.changed = revision;
    }

    pub(super) fn as_of(&self, revision: u64) -> LogSessions {
        let count = u64::try_from(self.of.len()).unwrap_or(u64::MAX);
        LogSessions { count, changed: self.changed, as_of: revision }
    }

    fn note(&mut self, revision: u64, is_news: bool) -> bool {
        if is_news {
            self.changed = revision;
        }
        is_news
    }
}
