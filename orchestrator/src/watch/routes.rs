//! Whose agent session a change concerns. Thousands of sessions that each look through every change would cost the
//! product of both; here each change rings the bells of at most two hosts, the one where the instance is and the one
//! where it was. A bell remembers which instances to look at, no more than [`TOUCHED_MAX`], and then says "all".
//!
//! Written to under the state's write lock, so a session that opens its bell before it reads the state misses nothing.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use nave_orchestrator_core::{Change, ClusterState, RowId};
use nave_proto::ids::{HostId, InstanceId};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// A host with more news than this is told everything: 4,096 ids are 64 KiB or so.
const TOUCHED_MAX: usize = 4096;

/// What a session has not looked at yet.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Touched {
    /// These instances, and the host's own row.
    Instances(BTreeSet<InstanceId>),
    /// Everything: the state is another one, or too much has changed.
    All,
}

/// The bell of one session.
#[derive(Debug)]
pub(crate) struct Bell {
    touched: Mutex<Touched>,
    rung: Notify,
}

impl Bell {
    fn new() -> Self {
        Self { touched: Mutex::new(Touched::Instances(BTreeSet::new())), rung: Notify::new() }
    }

    /// Waits until something has changed since the last [`take`](Self::take). Cancel-safe; for one waiter.
    pub(crate) async fn rung(&self) {
        self.rung.notified().await;
    }

    /// What to look at; must be called before the state is read.
    pub(crate) fn take(&self) -> Touched {
        std::mem::replace(&mut *self.touched.lock(), Touched::Instances(BTreeSet::new()))
    }

    fn ring(&self, instance: Option<InstanceId>) {
        {
            let mut touched = self.touched.lock();
            if let Touched::Instances(ids) = &mut *touched {
                ids.extend(instance);
                if ids.len() > TOUCHED_MAX {
                    *touched = Touched::All;
                }
            }
        }
        self.rung.notify_one();
    }

    fn ring_all(&self) {
        *self.touched.lock() = Touched::All;
        self.rung.notify_one();
    }
}

#[derive(Debug, Default)]
struct Table {
    bells: HashMap<HostId, Arc<Bell>>,
    /// Where each instance is, or was before the change under way: some 20 bytes each.
    hosts: HashMap<InstanceId, HostId>,
}

impl Table {
    fn ring(&self, host: HostId, instance: Option<InstanceId>) {
        if let Some(bell) = self.bells.get(&host) {
            bell.ring(instance);
        }
    }

    fn route(&mut self, change: &Change) {
        match change {
            Change::Instance(record) => {
                let (id, host) = (InstanceId(record.id), HostId(record.host_id));
                let before = self.hosts.insert(id, host);
                self.ring(host, Some(id));
                if let Some(before) = before.filter(|before| *before != host) {
                    self.ring(before, Some(id));
                }
            }
            Change::Deleted(RowId::Instance(id)) => {
                if let Some(before) = self.hosts.remove(id) {
                    self.ring(before, Some(*id));
                }
            }
            Change::Host(record) => self.ring(HostId(record.id), None),
            Change::Deleted(RowId::Host(id)) => self.ring(*id, None),
            _ => {}
        }
    }
}

/// The bells of all sessions of this member.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    table: Mutex<Table>,
}

/// A session's place in the routes, until it is dropped.
#[derive(Debug)]
pub(crate) struct Route {
    routes: Arc<Routes>,
    host: HostId,
    pub(crate) bell: Arc<Bell>,
}

impl Routes {
    /// Opens the bell of a host's newest session; an older session of the same host is rung no more.
    pub(crate) fn open(self: &Arc<Self>, host: HostId) -> Route {
        let bell = Arc::new(Bell::new());
        self.table.lock().bells.insert(host, Arc::clone(&bell));
        Route { routes: Arc::clone(self), host, bell }
    }

    pub(super) fn route(&self, changes: &[Change]) {
        if !changes.is_empty() {
            let mut table = self.table.lock();
            changes.iter().for_each(|change| table.route(change));
        }
    }

    /// The state is another one altogether.
    pub(super) fn restart(&self, state: &ClusterState) {
        let mut table = self.table.lock();
        table.hosts =
            state.instances().map(|record| (InstanceId(record.id), HostId(record.host_id))).collect();
        table.bells.values().for_each(|bell| bell.ring_all());
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        let mut table = self.routes.table.lock();
        if table.bells.get(&self.host).is_some_and(|bell| Arc::ptr_eq(bell, &self.bell)) {
            table.bells.remove(&self.host);
        }
    }
}

#[cfg(test)]
mod tests {
    use nave_proto::pb;

    use super::*;

    fn instance(id: u64, host_id: u64) -> Change {
        Change::Instance(Arc::new(pb::InstanceRecord { id, host_id, ..Default::default() }))
    }

    fn ids(ids: &[u64]) -> Touched {
        Touched::Instances(ids.iter().copied().map(InstanceId).collect())
    }

    #[test]
    fn a_change_rings_where_the_instance_is_and_where_it_was() {
        let routes = Arc::new(Routes::default());
        let (first, second) = (routes.open(HostId(1)), routes.open(HostId(2)));
        routes.route(&[instance(5, 1), instance(6, 3)]);
        assert_eq!((first.bell.take(), second.bell.take()), (ids(&[5]), ids(&[])));
        routes.route(&[instance(5, 2)]);
        assert_eq!((first.bell.take(), second.bell.take()), (ids(&[5]), ids(&[5])));
        routes.route(&[Change::Deleted(RowId::Instance(InstanceId(5)))]);
        assert_eq!((first.bell.take(), second.bell.take()), (ids(&[]), ids(&[5])));
    }

    #[tokio::test]
    async fn a_ring_before_the_wait_is_not_missed() {
        let routes = Arc::new(Routes::default());
        let route = routes.open(HostId(1));
        routes.route(&[Change::Host(Arc::new(pb::HostRecord { id: 1, ..Default::default() }))]);
        route.bell.rung().await;
        assert_eq!(route.bell.take(), ids(&[]));
    }

    #[test]
    fn too_much_news_and_another_state_mean_all() {
        let routes = Arc::new(Routes::default());
        let route = routes.open(HostId(1));
        let many: Vec<Change> = (0..=TOUCHED_MAX as u64).map(|id| instance(id, 1)).collect();
        routes.route(&many);
        assert_eq!(route.bell.take(), Touched::All);
        routes.restart(&ClusterState::new());
        assert_eq!(route.bell.take(), Touched::All);
    }

    #[test]
    fn the_end_of_an_older_session_leaves_the_newer_ones_bell() {
        let routes = Arc::new(Routes::default());
        let older = routes.open(HostId(1));
        let newer = routes.open(HostId(1));
        drop(older);
        routes.route(&[instance(5, 1)]);
        assert_eq!(newer.bell.take(), ids(&[5]));
        drop(newer);
        assert!(routes.table.lock().bells.is_empty());
    }
}
