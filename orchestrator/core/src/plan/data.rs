//! Where the data of a service's instances is (`data = true`), and what a drain of that host means for them: they
//! leave it, and come back to it, since their data does not go with them.

use std::collections::BTreeSet;

use nave_proto::ids::HostId;
use nave_proto::pb;

use crate::state::{ClusterState, ServiceEntry};
use crate::wants::{HostExt as _, InstanceExt as _};

/// From this command format on, who leaves its data on a drained host waits for no other that has left its own there.
pub(crate) const STRANDS: u32 = 8;

/// The host that has the data of an ordinal, while that host lives.
pub(crate) fn host_of(state: &ClusterState, entry: &ServiceEntry, ordinal: u32) -> Option<HostId> {
    let bound = entry.current().is_some_and(|manifest| manifest.data && !manifest.per_host);
    let host = entry.record.data_hosts.get(&ordinal).filter(|_| bound)?;
    lives(state, HostId(*host))
}

/// The host, unless what it has is lost with it.
pub(crate) fn lives(state: &ClusterState, host: HostId) -> Option<HostId> {
    state.host(host).is_some_and(|record| !record.is_lost()).then_some(host)
}

/// Whether the slot of an instance stays empty once it has left its host: that is being drained, and has its data; and
/// none of a template without data stands in the same place.
pub(crate) fn strands(state: &ClusterState, entry: &ServiceEntry, instance: &pb::InstanceRecord) -> bool {
    instance.wanted()
        && is_slot(entry, instance.ordinal)
        && is_drained(state, instance.host())
        && host_of(state, entry, instance.ordinal) == Some(instance.host())
        && entry
            .instances
            .values()
            .all(|other| other.id == instance.id || other.ordinal != instance.ordinal || !other.wanted())
}

/// Empty slots that nothing fills before a drained host is open again.
pub(crate) fn stranded(state: &ClusterState, entry: &ServiceEntry) -> usize {
    let closed = |ordinal: &u32| host_of(state, entry, *ordinal).is_some_and(|host| is_drained(state, host));
    let ordinals = entry.record.data_hosts.keys().filter(|ordinal| is_slot(entry, **ordinal));
    let mut ordinals = ordinals.copied().filter(closed).peekable();
    if ordinals.peek().is_none() {
        return 0;
    }
    let wanted = entry.instances.values().filter(|instance| instance.wanted());
    let filled: BTreeSet<u32> = wanted.map(|instance| instance.ordinal).collect();
    ordinals.filter(|ordinal| !filled.contains(ordinal)).count()
}

fn is_slot(entry: &ServiceEntry, ordinal: u32) -> bool {
    entry.current().is_some_and(|manifest| ordinal < manifest.count)
}

fn is_drained(state: &ClusterState, host: HostId) -> bool {
    state.host(host).is_some_and(|record| record.draining && !record.is_lost())
}
