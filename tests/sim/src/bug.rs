//! Mistakes that the harness can make on purpose, each in an adapter around a core, so that it is known what it would
//! notice. The cores themselves stay as they are.

use nave_orchestrator_core::ClusterState;
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use pb::plan_step::Step;

use crate::context::Context;

/// One mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// Agents take a wish for a later epoch as one for the epoch they know.
    EpochNotChecked,
    /// A lost host's processes are taken for ended as soon as its lease is, as if no grace followed.
    DeadlineIgnoresGrace,
    /// Steps of the plan that would move instances away from a draining host are forgotten.
    PlanForgetsDrain,
}

impl Bug {
    /// All of them, with their names on the command line.
    pub const ALL: [(&'static str, Self); 3] = [
        ("epoch-not-checked", Self::EpochNotChecked),
        ("deadline-ignores-grace", Self::DeadlineIgnoresGrace),
        ("plan-forgets-drain", Self::PlanForgetsDrain),
    ];
}

impl Context {
    /// What a planner with a bug would not have said.
    pub(crate) fn spoil_plan(&self, state: &ClusterState, steps: &mut Vec<pb::PlanStep>) {
        if self.bug != Some(Bug::PlanForgetsDrain) {
            return;
        }
        let leaves = |step: &pb::PlanStep| match &step.step {
            Some(Step::Stop(stop)) => {
                let instance = state.instance(InstanceId(stop.instance_id));
                let host = instance.and_then(|instance| state.host(HostId(instance.host_id)));
                host.is_some_and(|host| host.draining)
            }
            _ => false,
        };
        steps.retain(|step| !leaves(step));
    }
}
