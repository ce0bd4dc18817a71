//! `needs` on the way down: of services that go down together on purpose, one is stopped only when those that need it
//! are gone. Together means the same two things being done to both: all of both is to stop (deleted, scaled to none),
//! or both have to leave one host that is being drained. A replacement elsewhere comes first as ever, so what is
//! needed also stays until that has begun.
//!
//! Nobody waits for ever: a cycle cannot be, what is not ready is of no use to wait for on a drained host (its
//! replacement may be what the other waits for), and after [`NEEDED_STOP_WAIT_NS`] the stop goes on.

use std::collections::BTreeMap;
use std::sync::Arc;

use nave_proto::ids::HostId;
use nave_proto::pb;

use crate::limits::NEEDED_STOP_WAIT_NS;
use crate::state::{ClusterState, ServiceEntry};
use crate::wants::{InstanceExt as _, ManifestExt as _};

/// What the instances of one service have to wait for before they are stopped.
#[derive(Debug, Default)]
pub(crate) struct Needing<'a> {
    everywhere: Option<Hold<'a>>,
    on_hosts: BTreeMap<HostId, Hold<'a>>,
}

/// Who holds a stop back, and until when at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hold<'a> {
    pub(crate) by: &'a str,
    pub(crate) until: i64,
}

impl<'a> Needing<'a> {
    pub(crate) fn of(state: &'a ClusterState, entry: &'a ServiceEntry, now: i64) -> Self {
        let mut needing = Self::default();
        let mut names = state.services.needing(&entry.name).peekable();
        if names.peek().is_none() || entry.instances.is_empty() {
            return needing;
        }
        let (going, drained) = (going_since(entry), drained_hosts(state, entry));
        for name in names {
            let Some(other) = state.services.get(name).filter(|other| !other.instances.is_empty()) else {
                continue;
            };
            if let (Some(since), Some(others)) = (going, going_since(other)) {
                let until = since.max(others).saturating_add(NEEDED_STOP_WAIT_NS);
                longest(&mut needing.everywhere, Hold { by: name, until }, now);
            }
            if drained.is_empty() {
                continue;
            }
            for instance in other.instances.values().filter(|instance| may_run(instance)) {
                if let Some(until) = drained.get(&instance.host()).filter(|until| **until > now) {
                    needing.on_hosts.entry(instance.host()).or_insert(Hold { by: name, until: *until });
                }
            }
        }
        needing
    }

    /// The service as a whole waits for that.
    pub(crate) fn everywhere(&self) -> Option<Hold<'a>> {
        self.everywhere
    }

    /// One that is to leave its host waits for that.
    pub(crate) fn holds(&self, instance: &Arc<pb::InstanceRecord>) -> Option<Hold<'a>> {
        let here = || self.on_hosts.get(&instance.host()).copied().filter(|_| instance.ready());
        self.everywhere.or_else(here)
    }

    /// Those that wait on one host only.
    pub(crate) fn on_hosts(&self) -> impl Iterator<Item = Hold<'a>> + '_ {
        self.on_hosts.values().copied()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.everywhere.is_none() && self.on_hosts.is_empty()
    }
}

/// Hosts that are being drained with an instance of the service that is of use there, and until when at most it stays
/// for others.
fn drained_hosts(state: &ClusterState, entry: &ServiceEntry) -> BTreeMap<HostId, i64> {
    let hosts = entry.instances.values().filter(|instance| instance.ready()).map(|instance| instance.host());
    hosts
        .filter(|host| state.hosts.closed.contains(host))
        .filter_map(|id| state.host(id).filter(|host| host.draining).map(|host| (id, host)))
        .map(|(id, host)| (id, host.draining_unix_ns.saturating_add(NEEDED_STOP_WAIT_NS)))
        .collect()
}

fn longest<'a>(hold: &mut Option<Hold<'a>>, other: Hold<'a>, now: i64) {
    if other.until > now && hold.is_none_or(|hold| hold.until < other.until) {
        *hold = Some(other);
    }
}

/// Since when all of a service is to stop; None: it is not.
pub(crate) fn going_since(entry: &ServiceEntry) -> Option<i64> {
    if entry.record.deleting {
        return Some(entry.record.deleting_unix_ns);
    }
    let none = entry.current().is_some_and(|manifest| !manifest.is_job() && manifest.wants_none());
    let deployment = entry.record.deployment.as_ref();
    none.then(|| deployment.map_or(0, |deployment| deployment.started_unix_ns))
}

/// Not known to have ended for good.
pub(crate) fn may_run(instance: &pb::InstanceRecord) -> bool {
    !instance.exited() && !instance.gave_up()
}
