//! From when on: an instance counts as healthy, may be placed again after its host was lost or after it gave up.

use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_proto::pb::DeploymentStatus;

use super::recheck;
use crate::leases::fence_ms;
use crate::limits::{
    LOSS_DELAY_MAX_NS, LOSS_DELAY_NS, LOSS_MEMORY_NS, RESCHEDULE_DELAY_MAX_NS, RESCHEDULE_DELAY_NS,
    UNPROBED_READY_NS,
};
use crate::state::{ClusterState, ServiceEntry};
use crate::wants::{InstanceExt as _, ManifestExt as _};

/// The times of one service's instances.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times<'a> {
    entry: &'a ServiceEntry,
    now: i64,
    min_ready_ns: i64,
}

impl<'a> Times<'a> {
    pub(crate) fn of(entry: &'a ServiceEntry, now: i64) -> Self {
        let waits = entry.record.deployment.as_ref().is_none_or(|deployment| deployment.from_version != 0);
        // A service's first version replaces nothing, so nothing waits for it longer than to believe it.
        let said = entry.current().filter(|_| waits).map_or(0, |manifest| manifest.min_ready_ns());
        let unprobed = entry.current().is_some_and(|manifest| !manifest.is_probed());
        let min_ready_ns = said.max(if unprobed { UNPROBED_READY_NS } else { 0 });
        Self { entry, now, min_ready_ns }
    }

    /// Ready for long enough, or done.
    pub(crate) fn healthy(&self, instance: &pb::InstanceRecord) -> bool {
        instance.completed() || (instance.ready() && self.healthy_at(instance) <= self.now)
    }

    pub(crate) fn healthy_at(&self, instance: &pb::InstanceRecord) -> i64 {
        let ready = instance.ready_since_unix_ns.saturating_add(self.min_ready_ns);
        match instance.rechecked_unix_ns {
            0 => ready,
            since => ready.max(since.saturating_add(self.entry.current().map_or(0, recheck::proof_ns))),
        }
    }

    /// From when on an instance may be placed again; None: it is left where it is. `adrift`: its host is lost.
    pub(crate) fn again_at(
        &self,
        state: &ClusterState,
        instance: &pb::InstanceRecord,
        adrift: bool,
    ) -> Option<i64> {
        match adrift {
            true => (!self.is_fenced(state, instance)).then(|| rested_at(instance)),
            false => self.rescheduled_at(instance),
        }
    }

    /// It may still run on its lost host, and must never run twice: the log has yet to say that the host has been
    /// without a lease for long enough. Wall time has no part in that, as it may jump.
    pub(crate) fn is_fenced(&self, state: &ClusterState, instance: &pb::InstanceRecord) -> bool {
        // Without a row the host was empty, so nothing is left there.
        let over_ms = state.host(HostId(instance.host_id)).map_or(u64::MAX, |host| host.lease_over_ms);
        over_ms < self.fence_ms(instance)
    }

    /// For how long the host of an instance has to have been without a lease; 0 for one that needs none.
    pub(crate) fn fence_ms(&self, instance: &pb::InstanceRecord) -> u64 {
        let manifest = self.entry.manifest(instance.version).or_else(|| self.entry.current());
        manifest.filter(|manifest| manifest.stops_on_disconnect()).map_or(0, fence_ms)
    }

    /// When an instance that gave up may be placed again; None: it is left as it is, for the deployment that
    /// brought it has failed with it or is about to.
    fn rescheduled_at(&self, instance: &pb::InstanceRecord) -> Option<i64> {
        if !instance.gave_up() {
            return None;
        }
        let deployment = self.entry.record.deployment.as_ref()?;
        let before = instance.placed_unix_ns < deployment.started_unix_ns;
        let proven = match deployment.status() {
            DeploymentStatus::Successful => true,
            DeploymentStatus::Running => before,
            DeploymentStatus::Failed
            | DeploymentStatus::Paused
            | DeploymentStatus::Cancelled
            | DeploymentStatus::Unspecified => false,
        };
        let doubled = RESCHEDULE_DELAY_NS.saturating_mul(1 << instance.reschedules.min(10));
        proven.then(|| instance.since_unix_ns.saturating_add(doubled.min(RESCHEDULE_DELAY_MAX_NS)))
    }

    /// The version to run an instance under when it is placed again: the current one, unless it belongs to a
    /// replacement that is not over.
    pub(crate) fn version_for(&self, instance: &pb::InstanceRecord) -> u64 {
        let record = &self.entry.record;
        let status = record.deployment.as_ref().map_or(DeploymentStatus::Unspecified, |d| d.status());
        match status {
            DeploymentStatus::Successful | DeploymentStatus::Unspecified => record.version,
            DeploymentStatus::Running
            | DeploymentStatus::Failed
            | DeploymentStatus::Paused
            | DeploymentStatus::Cancelled => match instance.template_version != record.template_version {
                true => instance.version,
                false => record.version,
            },
        }
    }
}

/// How often in close succession an instance has been lost with its host, this time included.
pub(crate) fn losses(instance: &pb::InstanceRecord) -> u32 {
    let stayed = instance.since_unix_ns.saturating_sub(instance.placed_unix_ns);
    if stayed >= LOSS_MEMORY_NS { 1 } else { instance.losses.saturating_add(1) }
}

/// When an instance that was lost is placed again: at once the first time, later and later when it keeps happening.
fn rested_at(instance: &pb::InstanceRecord) -> i64 {
    let delay = match losses(instance) {
        0 | 1 => 0,
        again => LOSS_DELAY_NS.saturating_mul(1 << (again - 2).min(20)).min(LOSS_DELAY_MAX_NS),
    };
    instance.since_unix_ns.saturating_add(delay)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::SECOND_NS;

    #[test]
    fn the_first_loss_waits_for_nothing_and_the_next_ones_double() {
        let lost =
            |losses| pb::InstanceRecord { losses, since_unix_ns: 10 * SECOND_NS, ..Default::default() };
        for (before, seconds) in [(0, 0), (1, 1), (2, 2), (3, 4), (8, 128), (10, 300), (u32::MAX, 300)] {
            assert_eq!(rested_at(&lost(before)), (10 + seconds) * SECOND_NS, "after {before}");
        }
        let stayed = pb::InstanceRecord { losses: 8, since_unix_ns: LOSS_MEMORY_NS, ..Default::default() };
        assert_eq!((losses(&stayed), rested_at(&stayed)), (1, LOSS_MEMORY_NS));
    }
}
