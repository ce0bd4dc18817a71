//! Whose turn it is to be restarted, of those whose liveness has failed. What makes one process hang often makes all of
//! them hang at the same moment, and the cure must not be worse: no more are down at a time than the update rules allow.

use std::sync::Arc;

use nave_proto::ids::InstanceId;
use nave_proto::pb;

use super::rollout::Rollout;
use crate::state::ClusterState;
use crate::wants::{InstanceExt as _, ManifestExt as _};

/// Asks to be restarted, and has not been told that it may.
fn asks(instance: &pb::InstanceRecord) -> bool {
    instance.wants_restart != 0
        && instance.wants_restart == instance.attempt
        && instance.restart_granted != instance.attempt
}

/// Until when a restart that was granted counts as under way, unless it is done before.
fn restarts_until(rollout: &Rollout<'_>, instance: &pb::InstanceRecord) -> Option<i64> {
    let done = instance.attempt > instance.restart_granted && instance.ready();
    let granted = instance.restart_granted != 0 && !done;
    let patience = rollout.manifest.progress_deadline_ns();
    granted.then(|| instance.restart_granted_unix_ns.saturating_add(patience))
}

impl<'a> Rollout<'a> {
    fn present(&self) -> impl Iterator<Item = &'a Arc<pb::InstanceRecord>> {
        let all = self.current.iter().chain(&self.old).copied();
        all.filter(|instance| !self.is_adrift(instance))
    }

    /// Those that may be restarted now, in order: first those that serve nobody anyway.
    pub(crate) fn restartable(&self, now: i64) -> Vec<&'a Arc<pb::InstanceRecord>> {
        let mut asking: Vec<_> = self.present().filter(|instance| asks(instance)).collect();
        if asking.is_empty() {
            return asking;
        }
        asking.sort_by_key(|instance| (instance.ready(), instance.id));
        let under_way = |instance: &&Arc<pb::InstanceRecord>| {
            restarts_until(self, instance).is_some_and(|until| now < until)
        };
        let mut restarting = self.present().filter(under_way).count();
        let ready = self.present().filter(|instance| instance.ready() && !under_way(instance)).count();
        let mut down = self.slots.saturating_sub(ready);
        let most = self.manifest.max_parallel();
        asking.retain(|instance| {
            let takes_down = usize::from(instance.ready());
            // One at a time always may: whatever else is down may stay so for ever.
            let may = restarting == 0 || (restarting < most && down + takes_down <= most.max(down));
            if may {
                restarting += 1;
                down += takes_down;
            }
            may
        });
        asking
    }

    /// When one that is being restarted counts no longer, if others wait for that.
    pub(crate) fn restart_wake_at(&self, now: i64) -> Option<i64> {
        self.present().find(|instance| asks(instance))?;
        self.present().filter_map(|instance| restarts_until(self, instance)).filter(|at| *at > now).min()
    }
}

/// Whether an instance may be restarted as the service stands now.
pub(crate) fn may_restart(state: &ClusterState, instance: &pb::InstanceRecord, now: i64) -> bool {
    let entry = state.services.get(&instance.service).filter(|entry| !entry.record.deleting);
    let rollout = entry.and_then(|entry| Rollout::of(state, entry, now));
    let id = InstanceId(instance.id);
    rollout.is_some_and(|rollout| rollout.restartable(now).iter().any(|other| other.id() == id))
}
