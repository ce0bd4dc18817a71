//! Answers "what is the drain waiting for": each instance that has yet to leave a host, and what holds it there.

use std::collections::BTreeMap;
use std::sync::Arc;

use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use nave_proto::pb::plan_step::Step;

use super::explain::why_not_ready;
use super::placement::Fleet;
use super::rollout::Rollout;
use super::service::{ServicePlan, plan_service};
use crate::events::called;
use crate::state::ClusterState;
use crate::wants::InstanceExt as _;

/// An instance that is on a host and should not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaving {
    pub instance: InstanceId,
    pub service: String,
    /// What has to happen before it is gone: `web.1 (i-4) is being stopped`.
    pub waits_for: String,
}

/// Every instance on a host in the order of ids, with what it waits for before it is gone. Meant for a host that is
/// drained or was given up; empty: nothing is left there, by the word of its agent.
pub fn leaving(state: &ClusterState, host: HostId) -> Vec<Leaving> {
    let now = state.time_unix_ns();
    let mut looks: BTreeMap<&str, Look<'_>> = BTreeMap::new();
    let mut list = Vec::new();
    for instance in state.instances_on(host) {
        let look = looks.entry(&instance.service).or_insert_with(|| Look::at(state, &instance.service, now));
        let (id, service) = (instance.id(), instance.service.clone());
        list.push(Leaving { instance: id, service, waits_for: look.waits_for(instance) });
    }
    list
}

/// One service, and what would be planned for it now.
struct Look<'a> {
    rollout: Option<Rollout<'a>>,
    plan: ServicePlan,
}

impl<'a> Look<'a> {
    fn at(state: &'a ClusterState, service: &str, now: i64) -> Self {
        let Some(entry) = state.services.get(service) else {
            return Self { rollout: None, plan: ServicePlan::default() };
        };
        let plan = plan_service(state, &mut Fleet::new(state, now), entry, now, usize::MAX);
        Self { rollout: Rollout::of(state, entry, now), plan }
    }

    fn waits_for(&self, instance: &Arc<pb::InstanceRecord>) -> String {
        let who = called(instance);
        let Some(rollout) = &self.rollout else { return format!("{who} belongs to no service") };
        if rollout.is_adrift(instance) {
            return match rollout.times.is_fenced(rollout.state, instance) {
                false => format!("{who} is placed again elsewhere"),
                true => format!(
                    "{who} must have been ended by its agent first, {} s after its host was last heard",
                    rollout.times.fence_ms(instance).div_ceil(1000)
                ),
            };
        }
        if !instance.wanted() {
            return format!("{who} is being stopped");
        }
        if self
            .plan
            .steps
            .iter()
            .any(|step| matches!(step, Step::Stop(stop) if stop.instance_id == instance.id))
        {
            return format!("{who} is stopped next");
        }
        if let Some(hold) = rollout.needing.holds(instance) {
            return format!("{who} stays until {}, which needs it, is gone from here", hold.by);
        }
        if rollout.meant.run.is_some() {
            return format!("{who} finishes its run first; `nave delete {}` ends it", instance.service);
        }
        if !rollout.old.iter().any(|old| old.id == instance.id) {
            return format!("{who} stays: {} is meant to run here", instance.service);
        }
        self.waits_to_be_replaced(rollout, &who)
    }

    /// The first of what can hold a replacement back: no place, one that is not ready, its turn.
    fn waits_to_be_replaced(&self, rollout: &Rollout<'_>, who: &str) -> String {
        let service = &rollout.entry.record.name;
        if self.plan.missing > 0 {
            return format!("{who} has no other place: {}", self.plan.reasons.join("; "));
        }
        // A version that is held moves under its own number.
        let moved = rollout.rules.holds_old();
        let replacing = if moved { &rollout.old } else { &rollout.current };
        let leaves = |instance: &&&Arc<pb::InstanceRecord>| moved && rollout.leaves(instance);
        let mut unready = replacing.iter().filter(|i| !leaves(i) && !rollout.healthy(i));
        match unready.next() {
            Some(new) => format!("{who} waits for its replacement: {}", why_not_ready(rollout.state, new)),
            None => {
                format!("{who} waits for its turn, {} of {service} at a time", rollout.rules.max_parallel)
            }
        }
    }
}
