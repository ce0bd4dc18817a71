//! Watching: one ring of the newest changes per member, and cursors into it.
//!
//! Every member applies the same log, so every member can serve watches from what it has applied. There is no
//! queue per watcher: a watcher is a revision, it is woken through one `tokio::sync::watch`, and it reads what lies
//! behind its revision. One that falls out of the ring is given the state instead. So a slow watcher costs nothing
//! but itself, and memory is bounded by the ring whatever the number of watchers.
//!
//! Written to by the Raft state machine (`ApplyObserver`, under the state's write lock, so state and ring always
//! show the same revision to whoever holds the state's read lock). Read by `watch/feed.rs` (people). Agents' sessions
//! are too many to look through every change: `routes.rs` rings those that a change of what they run concerns, and
//! `directory.rs` those that may call what has changed.

mod directory;
pub(crate) mod feed;
mod ring;
mod routes;

use std::sync::Arc;

use nave_orchestrator_core::{Change, ClusterState};
use nave_proto::ids::HostId;
use parking_lot::RwLock;
use tokio::sync::watch;

pub(crate) use directory::{Changed, Known, LogSessions, News, Opened, Place, Seat, Standing};
pub(crate) use ring::{Read, Ring, RingSize};
pub(crate) use routes::{Route, Touched};

use crate::raft::ApplyObserver;
use directory::Directory;
use routes::Routes;

/// The ring of one member and the means to wait for its next change.
#[derive(Debug)]
pub(crate) struct Changes {
    ring: RwLock<Ring>,
    revision: watch::Sender<u64>,
    routes: Arc<Routes>,
    directory: Arc<Directory>,
}

impl Default for Changes {
    fn default() -> Self {
        Self {
            ring: RwLock::new(Ring::default()),
            revision: watch::Sender::new(0),
            routes: Arc::default(),
            directory: Arc::default(),
        }
    }
}

impl Changes {
    /// With room for so few changes of the directory, and everything told below so few hosts × endpoints.
    #[cfg(test)]
    pub(crate) fn with_directory(items_max: usize, everything_max: usize) -> Self {
        let directory = Directory::bounded(items_max, everything_max, everything_max * 8 / 10);
        Self { directory: Arc::new(directory), ..Self::default() }
    }

    /// The changes after a revision that `wanted` picks, at most `limit` of them.
    pub(crate) fn read(&self, after: u64, limit: usize, wanted: impl FnMut(&Change) -> bool) -> Read {
        self.ring.read().read(after, limit, wanted)
    }

    /// Holds the newest revision; changes when anything was applied.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// For an agent's session: rung when something of its host has changed.
    pub(crate) fn route(&self, host: HostId) -> Route {
        self.routes.open(host)
    }

    /// For an agent's session: rung when what the agent may call has changed.
    pub(crate) fn seat(&self, opened: Opened) -> (Seat, Option<Place>) {
        self.directory.seat(opened)
    }

    /// How far the agents with a session here have taken the directory.
    pub(crate) fn standing(&self) -> Standing {
        self.directory.standing()
    }

    /// The sessions that there are.
    pub(crate) fn sessions(&self) -> LogSessions {
        self.directory.sessions()
    }

    /// Waits until another agent has a session, here or elsewhere. Cancel-safe; for one waiter.
    pub(crate) async fn agent_has_moved(&self) {
        self.directory.moved().await;
    }

    /// Waits until [`standing`](Self::standing) has passed all that drains. Cancel-safe; for one waiter.
    pub(crate) async fn callers_have_left(&self) {
        self.directory.settled().await;
    }

    /// For the metrics.
    pub(crate) fn size(&self) -> RingSize {
        self.ring.read().size()
    }

    /// How many watchers wait for changes now.
    pub(crate) fn watchers(&self) -> usize {
        self.revision.receiver_count()
    }
}

impl ApplyObserver for Changes {
    fn applied(&self, revision: u64, changes: &[Change]) {
        self.ring.write().push(revision, changes);
        self.routes.route(changes);
        self.directory.applied(revision, changes);
    }

    fn settled(&self, revision: u64) {
        self.directory.ring();
        self.revision.send_replace(revision);
    }

    fn restored(&self, state: &ClusterState) {
        self.ring.write().restart(state.revision());
        self.routes.restart(state);
        self.directory.restart(state);
        self.revision.send_replace(state.revision());
    }
}
