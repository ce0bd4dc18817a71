//! What a person decides about a deployment that is under way: to halt it, to let it go on, to promote its canaries.

use nave_proto::pb;
use nave_proto::pb::{DeploymentStatus, RejectedCode};
use pb::apply_service_response::Outcome as ApplyOutcome;

use super::{Outcome, Tx, rejected};
use crate::events::Subject;
use crate::plan::canaries;
use crate::wants::ManifestExt as _;

impl Tx<'_> {
    /// Only what is under way can be halted, and only what is halted goes on.
    pub(super) fn set_service_paused(&mut self, name: &str, paused: bool) -> Outcome {
        let (status, version) = self.deployment_of(name)?;
        let (from, to) = match paused {
            true => (DeploymentStatus::Running, DeploymentStatus::Paused),
            false => (DeploymentStatus::Paused, DeploymentStatus::Running),
        };
        if status == to {
            return Ok(decided(version, ApplyOutcome::Unchanged));
        }
        if status != from {
            let message = match paused {
                true => format!(
                    "version {version} of {name} is not being rolled out, so there is nothing to pause"
                ),
                false => format!("version {version} of {name} is not paused"),
            };
            return Err(rejected(RejectedCode::Conflict, message));
        }
        self.edit_deployment(name, |deployment| deployment.set_status(to));
        let (kind, what) = match paused {
            true => ("deployment_paused", "is paused"),
            false => ("deployment_running", "goes on"),
        };
        self.event(kind, Subject::service(name), format!("version {version} of {name} {what}"));
        Ok(decided(version, ApplyOutcome::Updated))
    }

    /// Refused while they are not all ready: what has not been seen to work is not for all.
    pub(super) fn promote_service(&mut self, name: &str) -> Outcome {
        let (status, version) = self.deployment_of(name)?;
        let refused = |message| Err(rejected(RejectedCode::Conflict, message));
        let Some((healthy, wanted)) = canaries(self.state, name, self.now) else {
            return refused(format!("version {version} of {name} has no canaries that wait for a promotion"));
        };
        if status == DeploymentStatus::Paused {
            return refused(format!("version {version} of {name} is paused; `nave resume {name}` first"));
        }
        if status != DeploymentStatus::Running || healthy < wanted {
            return refused(format!(
                "{healthy} of {wanted} canaries of {name} are ready; `nave status {name}` says why"
            ));
        }
        self.edit_deployment(name, |deployment| deployment.canary = 0);
        let message = format!("version {version} of {name} is promoted, all instances are to run it");
        self.event("deployment_promoted", Subject::service(name), message);
        Ok(decided(version, ApplyOutcome::Updated))
    }

    fn deployment_of(&self, name: &str) -> Result<(DeploymentStatus, u64), pb::Rejected> {
        self.changeable(name)?;
        let record = self.state.services.get(name).map(|entry| &entry.record);
        let status = record.and_then(|record| record.deployment.as_ref()).map(pb::Deployment::status);
        Ok((status.unwrap_or_default(), record.map_or(0, |record| record.version)))
    }

    /// Each decision gives it its full patience again.
    fn edit_deployment(&mut self, name: &str, edit: impl FnOnce(&mut pb::Deployment)) {
        let now = self.now;
        self.edit_service(name, |record| {
            let patience = record.manifest.as_ref().map_or(0, |manifest| manifest.progress_deadline_ns());
            if let Some(deployment) = &mut record.deployment {
                edit(deployment);
                deployment.progress_deadline_unix_ns = now.saturating_add(patience);
            }
        });
    }
}

fn decided(version: u64, outcome: ApplyOutcome) -> pb::Accepted {
    pb::Accepted { version, outcome: outcome.into(), ..Default::default() }
}
