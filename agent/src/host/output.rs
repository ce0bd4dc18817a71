//! What is kept of the instances' output: how much of it the keeper was told to keep, which logs may go, and whether the
//! disk takes it.

use std::collections::BTreeMap;
use std::time::Duration;

use nave_agent_core::{Monotonic, Reconciler, Supervisor};
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use tracing::{error, info, warn};

use crate::alarms::Alarms;
use crate::executor::Executor;
use crate::executor::directories::KeptLogs;
use crate::logs::limits::{log_limits, max_age};

/// Between two looks for logs that have become too old.
const PRUNE_EVERY: Duration = Duration::from_secs(600);

/// See the module's description.
#[derive(Debug)]
pub(super) struct Output {
    /// What the keeper was told to keep of each placement that it runs.
    limits: BTreeMap<(InstanceId, u64), pb::LogLimits>,
    prune_at: Monotonic,
    alarms: Alarms,
}

impl Output {
    pub(super) fn new(now: Monotonic) -> Self {
        Self { limits: BTreeMap::new(), prune_at: now + PRUNE_EVERY, alarms: Alarms::default() }
    }

    /// The keeper runs these, and keeps that much of each.
    pub(super) fn kept(&mut self, processes: &[pb::KeptProcess]) {
        self.limits = processes
            .iter()
            .filter_map(|kept| Some(((InstanceId(kept.instance_id), kept.epoch), kept.log_limits?)))
            .collect();
    }

    /// The keeper is about to be told to run it, and how much to keep.
    pub(super) fn begun(&mut self, instance: InstanceId, epoch: u64, manifest: &pb::Manifest) {
        self.limits.insert((instance, epoch), log_limits(manifest));
    }

    pub(super) fn forget(&mut self, instance: InstanceId, epoch: u64) {
        self.limits.remove(&(instance, epoch));
    }

    /// A manifest's word on its logs takes effect on what runs.
    pub(super) fn limit(&mut self, reconciler: &Reconciler, executor: &mut Executor) {
        for one in reconciler.supervisors() {
            let (instance, epoch) = (one.instance(), one.key().epoch);
            let (Some(told), Some(manifest)) =
                (self.limits.get_mut(&(instance, epoch)), &one.wanted().manifest)
            else {
                continue;
            };
            let wanted = log_limits(manifest);
            if *told != wanted && one.wanted().epoch == epoch {
                *told = wanted;
                executor.limit_log(instance, epoch, wanted);
            }
        }
    }

    /// The keeper's word that lines were not written, or (none) that they are again.
    pub(super) fn dropped(&mut self, instance: InstanceId, lines: u64, refused: &str) {
        self.alarms.output(instance, refused);
        if refused.is_empty() && lines > 0 {
            warn!(%instance, lines, "lines of output were dropped: it writes faster than the disk takes");
        }
    }

    /// Old logs of what has ended go; the alarms to raise from now on, when they are others than before.
    pub(super) fn look_after(
        &mut self,
        now: Monotonic,
        reconciler: &Reconciler,
        executor: &mut Executor,
    ) -> Option<Vec<String>> {
        if now >= self.prune_at {
            self.prune_at = now + PRUNE_EVERY;
            executor.prune_logs(kept_logs(reconciler));
        }
        let alarms = self.alarms.look(now, |instance| reconciler.supervisor(instance).is_some())?;
        match alarms.first() {
            Some(alarm) => error!("{alarm}"),
            None => info!("the disk of the logs takes what services print again"),
        }
        Some(alarms)
    }

    pub(super) fn next_wake(&self) -> Option<Monotonic> {
        self.alarms.next_wake()
    }
}

/// What logs must stay: of placements that may still write, and of others as long as their services want it.
pub(super) fn kept_logs(reconciler: &Reconciler) -> KeptLogs {
    let there = || reconciler.supervisors().filter(|one| !one.is_gone());
    let epochs = |one: &Supervisor| [one.key().epoch, one.wanted().epoch];
    let alive = there().flat_map(|one| epochs(one).map(|epoch| (one.instance(), epoch))).collect();
    let manifests = there().filter_map(|one| one.wanted().manifest.as_ref());
    let max_age = manifests.map(|manifest| (manifest.name.clone(), max_age(manifest))).collect();
    KeptLogs { alive, max_age }
}
