//! How a deployment ends: successful once everything wanted is healthy, failed when an instance gave up or none
//! became ready for too long; and what a failure leads to.

use nave_proto::pb;
use nave_proto::pb::DeploymentStatus;
use nave_proto::pb::plan_step::Step;

use super::explain;
use super::rollout::Rollout;
use crate::events::called;
use crate::limits::SECOND_NS;
use crate::state::ClusterState;
use crate::wants::{InstanceExt as _, ManifestExt as _};

/// What a deployment has come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Everything is as wanted.
    Complete,
    /// It will not get there; why.
    Failed(String),
    /// Under way, or over.
    Open,
}

/// Whether a deployment may still be said to have ended so: between plan and commit the last instance may have
/// become ready, or the first unready.
pub(crate) fn may_conclude(state: &ClusterState, service: &str, status: DeploymentStatus, now: i64) -> bool {
    let entry = state.services.get(service).filter(|entry| !entry.record.deleting);
    entry.and_then(|entry| Rollout::of(state, entry, now)).is_some_and(|rollout| rollout.still(status, now))
}

/// Canaries that are healthy, and how many there shall be; None: none wait for a promotion.
pub(crate) fn canaries(state: &ClusterState, service: &str, now: i64) -> Option<(usize, usize)> {
    let rollout = Rollout::of(state, state.services.get(service)?, now)?;
    let rules = rollout.rules;
    rules.canarying().then(|| (rules.current.healthy, rules.wanted_current()))
}

impl Rollout<'_> {
    /// `unplaced`: why instances are missing, for the sentence of a failure.
    pub(crate) fn verdict(&self, unplaced: &[String], now: i64) -> Verdict {
        if self.meant.run.is_some() {
            return Verdict::Open; // its run says how it ends
        }
        match self.status() {
            DeploymentStatus::Running if self.complete() => Verdict::Complete,
            DeploymentStatus::Running => match self.gave_up().or_else(|| self.out_of_time(unplaced, now)) {
                Some(reason) => Verdict::Failed(reason),
                None => Verdict::Open,
            },
            // A version that came too late is still the one that runs: say so, and let it be rolled back to.
            DeploymentStatus::Failed if self.complete() => Verdict::Complete,
            DeploymentStatus::Failed
            | DeploymentStatus::Paused
            | DeploymentStatus::Successful
            | DeploymentStatus::Cancelled
            | DeploymentStatus::Unspecified => Verdict::Open,
        }
    }

    /// Whether a verdict that was proposed is still true. Failing is judged without the list of what is unplaced,
    /// which only fills its sentence.
    fn still(&self, status: DeploymentStatus, now: i64) -> bool {
        match (status, self.verdict(&[], now)) {
            (DeploymentStatus::Successful, verdict) => verdict == Verdict::Complete,
            (DeploymentStatus::Failed, verdict) => matches!(verdict, Verdict::Failed(_)),
            (
                DeploymentStatus::Running
                | DeploymentStatus::Paused
                | DeploymentStatus::Cancelled
                | DeploymentStatus::Unspecified,
                _,
            ) => true,
        }
    }

    fn complete(&self) -> bool {
        // None that is lost with its host is healthy.
        self.old.is_empty()
            && self.current.len() == self.slots
            && self.rules.current.healthy == self.slots
            && self.unchecked().next().is_none()
    }

    /// An instance that this deployment brought has ended for good.
    fn gave_up(&self) -> Option<String> {
        let started = self.deployment()?.started_unix_ns;
        let mine = self.current.iter().filter(|i| i.placed_unix_ns >= started && !self.is_adrift(i));
        let mut ended = mine.filter(|i| i.gave_up() || (i.exited() && !i.completed()));
        ended.next().map(|instance| {
            let why = if instance.reason.is_empty() { "its process ended" } else { &instance.reason };
            format!("{} gave up: {why}", called(instance))
        })
    }

    fn out_of_time(&self, unplaced: &[String], now: i64) -> Option<String> {
        if now < self.deadline()? {
            return None;
        }
        let ready = self.current.iter().filter(|instance| self.healthy(instance)).count();
        let mut parts = vec![format!(
            "no progress in {} s, {ready} of {} instances are ready",
            self.manifest.progress_deadline_ns() / SECOND_NS,
            self.slots
        )];
        parts.extend(unplaced.iter().take(3).cloned());
        let unready = self.current.iter().filter(|instance| !self.healthy(instance));
        parts.extend(unready.take(3).map(|instance| explain::why_not_ready(self.state, instance)));
        Some(parts.join("; "))
    }

    /// Nothing that becomes healthy changes the verdict any more. A failed deployment may still succeed, late.
    pub(crate) fn over(&self) -> bool {
        match self.status() {
            DeploymentStatus::Running | DeploymentStatus::Failed => false,
            DeploymentStatus::Paused
            | DeploymentStatus::Successful
            | DeploymentStatus::Cancelled
            | DeploymentStatus::Unspecified => true,
        }
    }

    /// When a running deployment runs out of patience.
    pub(crate) fn deadline(&self) -> Option<i64> {
        let deployment = self.deployment()?;
        match deployment.status() {
            // Waiting for a person never fails.
            DeploymentStatus::Running if self.waits_for_promotion() => None,
            // Nor does staying for others while it and they leave.
            DeploymentStatus::Running if !self.needing.is_empty() => None,
            DeploymentStatus::Running => Some(deployment.progress_deadline_unix_ns),
            DeploymentStatus::Failed
            | DeploymentStatus::Paused
            | DeploymentStatus::Successful
            | DeploymentStatus::Cancelled
            | DeploymentStatus::Unspecified => None,
        }
    }

    /// The step that a verdict leads to.
    pub(crate) fn conclude(&self, verdict: Verdict, now: i64) -> Option<Step> {
        match verdict {
            Verdict::Open => None,
            Verdict::Complete => self.set(DeploymentStatus::Successful, String::new(), now),
            Verdict::Failed(reason) => self.revert(&reason).or_else(|| {
                let reason = match self.stable_elsewhere() {
                    Some(_) => format!("{reason}; update.auto_revert is off"),
                    None if self.other_template_runs() => reason,
                    None => format!("{reason}; there is no other version to go back to"),
                };
                self.set(DeploymentStatus::Failed, reason, now)
            }),
        }
    }

    fn set(&self, status: DeploymentStatus, reason: String, now: i64) -> Option<Step> {
        let before = self.deployment()?;
        let mark_stable = status == DeploymentStatus::Successful;
        // What it says of an auto-revert stays true once that has succeeded.
        let reason = if reason.is_empty() { before.reason.clone() } else { reason };
        let reason = if before.status() == DeploymentStatus::Failed { String::new() } else { reason };
        // What returns with a lost host is replaced without another promotion.
        let canary = if mark_stable { 0 } else { before.canary };
        let deployment =
            pb::Deployment { status: status.into(), reason, ended_unix_ns: now, canary, ..before.clone() };
        let service = self.entry.record.name.clone();
        Some(Step::SetDeployment(pb::SetDeployment { service, deployment: Some(deployment), mark_stable }))
    }

    fn other_template_runs(&self) -> bool {
        self.old.iter().any(|instance| instance.template_version != self.entry.record.template_version)
    }

    /// The stable version, when it would run something else than what has failed, or check it in another way. Going back
    /// to the same cannot help, and would go round in circles: the numbers of templates differ, so what they say is
    /// compared.
    fn stable_elsewhere(&self) -> Option<u64> {
        let stable = self.entry.version(self.entry.record.stable_version)?;
        let other = |stable: &pb::Manifest| {
            !nave_proto::manifest::same_template(stable, self.manifest)
                || stable.health != self.manifest.health
        };
        stable.manifest.as_deref().is_some_and(other).then_some(stable.version)
    }

    fn revert(&self, reason: &str) -> Option<Step> {
        let to_version = self.stable_elsewhere().filter(|_| self.manifest.auto_revert())?;
        Some(Step::Revert(pb::Revert {
            service: self.entry.record.name.clone(),
            failed_version: self.entry.record.version,
            to_version,
            reason: reason.to_owned(),
        }))
    }
}
