//! Answers "why is it not ready": what holds instances back that should be there, a sentence each.

use std::sync::Arc;

use nave_proto::ids::InstanceId;
use nave_proto::pb;
use nave_proto::pb::DeploymentStatus;
use nave_proto::pb::observed::State;

use super::placement::Fleet;
use super::rollout::Rollout;
use super::service::plan_service;
use crate::state::ClusterState;
use crate::wants::{HostExt as _, InstanceExt as _};

/// What a sentence of [`explained`] is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum About {
    /// Instances that cannot be placed.
    Missing,
    /// What runs on until its successor's artifacts are there.
    Fetching,
    /// Instances that are there and not ready.
    NotReady,
    Deployment,
}

impl About {
    /// One word for scripts.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Fetching => "fetching",
            Self::NotReady => "not_ready",
            Self::Deployment => "deployment",
        }
    }
}

/// [`explained`] without what each is about.
pub fn explain(state: &ClusterState, service: &str) -> Vec<String> {
    explained(state, service).into_iter().map(|(_, sentence)| sentence).collect()
}

/// Why instances of a service are missing or not ready; empty when all is well or there is no such service.
pub fn explained(state: &ClusterState, service: &str) -> Vec<(About, String)> {
    let Some(entry) = state.services.get(service) else { return Vec::new() };
    let now = state.time_unix_ns();
    let Some(rollout) = Rollout::of(state, entry, now) else { return Vec::new() };
    let plan = plan_service(state, &mut Fleet::new(state, now), entry, now, usize::MAX);
    let mut sentences = Vec::new();
    match plan.missing {
        0 => sentences.extend(plan.reasons.into_iter().map(|reason| (About::Missing, reason))),
        missing => {
            let cannot = if missing == 1 { "instance cannot" } else { "instances cannot" };
            let placed = plan.reasons.iter().map(|reason| format!("{missing} {cannot} be placed: {reason}"));
            sentences.extend(placed.map(|sentence| (About::Missing, sentence)));
        }
    }
    sentences.extend(plan.stays.into_iter().map(|sentence| (About::Fetching, sentence)));
    let unready = rollout.current.iter().chain(&rollout.old).filter(|i| !i.ready() && !i.completed());
    sentences.extend(unready.map(|instance| (About::NotReady, why_not_ready(state, instance))));
    sentences.extend(deployment(&rollout).map(|sentence| (About::Deployment, sentence)));
    sentences
}

/// `web.0 (i-42) on alpha is backing off: exited with code 1`.
pub(crate) fn why_not_ready(state: &ClusterState, instance: &Arc<pb::InstanceRecord>) -> String {
    let host = state.host(instance.host()).map_or_else(|| instance.host().to_string(), |host| host.shown());
    let what = match instance.state() {
        None | Some(State::Pending(_)) => "is placed and has not been started yet",
        Some(State::Starting(_)) => "is starting",
        Some(State::Running(running)) if running.ready => "is ready, but not for long enough yet",
        Some(State::Running(_)) => "runs and is not ready",
        Some(State::BackingOff(_)) => "has ended and is started again soon",
        Some(State::Stopping(_)) => "is being stopped",
        Some(State::Exited(_)) => "has ended and is not started again",
        Some(State::Failed(_)) => "was given up",
        Some(State::Lost(_)) => "is lost with its host",
        Some(State::Unknown(_)) => "has not been heard of since its host came back",
    };
    let why = if instance.reason.is_empty() { String::new() } else { format!(": {}", instance.reason) };
    let (service, ordinal, id) = (&instance.service, instance.ordinal, InstanceId(instance.id));
    format!("{service}.{ordinal} ({id}) on {host} {what}{why}")
}

/// What the deployment of a service waits for that only a person can give: a promotion, or to be resumed. `now`: wall
/// time in unix nanoseconds, since nothing is logged when a canary has been ready for long enough.
pub fn waits_for(state: &ClusterState, service: &str, now: i64) -> Option<String> {
    let entry = state.services.get(service)?;
    let undecided =
        entry.record.deployment.as_ref().is_some_and(|deployment| {
            deployment.canary > 0 || deployment.status() == DeploymentStatus::Paused
        });
    let rollout = undecided.then(|| Rollout::of(state, entry, now)).flatten()?;
    let waits = rollout.status() == DeploymentStatus::Paused || rollout.waits_for_promotion();
    waits.then(|| deployment(&rollout)).flatten()
}

fn deployment(rollout: &Rollout<'_>) -> Option<String> {
    let deployment = rollout.deployment()?;
    let version = deployment.version;
    match deployment.status() {
        DeploymentStatus::Failed => Some(format!("version {version} failed: {}", deployment.reason)),
        DeploymentStatus::Paused => {
            let service = &rollout.entry.record.name;
            Some(format!("version {version} is paused; `nave resume {service}` lets it go on"))
        }
        DeploymentStatus::Running if rollout.waits_for_promotion() => {
            let (service, ready) = (&rollout.entry.record.name, rollout.rules.current.healthy);
            let are = if ready == 1 { "canary is" } else { "canaries are" };
            Some(format!(
                "{ready} {are} ready, and the rest of version {version} waits for `nave promote {service}`"
            ))
        }
        DeploymentStatus::Running if !rollout.old.is_empty() => {
            let (ready, slots) = (rollout.rules.current.healthy, rollout.slots);
            Some(format!("version {version} is being rolled out, {ready} of {slots} instances replaced"))
        }
        DeploymentStatus::Running
        | DeploymentStatus::Successful
        | DeploymentStatus::Cancelled
        | DeploymentStatus::Unspecified => None,
    }
}
