//! What operators do to services: apply, delete, scale, restart, roll back. Each checks, then makes a version
//! (`versions.rs`).

use nave_proto::pb;
use nave_proto::pb::RejectedCode;
use nave_proto::pb::apply_service_response::Outcome as ApplyOutcome;

use super::versions::Cause;
use super::{Outcome, Tx, rejected};
use crate::change::{Change, RowId};
use crate::events::Subject;
use crate::limits::{COUNT_MAX, SERVICES_MAX};
use crate::state::ServiceEntry;
use crate::wants::ManifestExt as _;

impl Tx<'_> {
    pub(super) fn apply_service(&mut self, command: pb::ApplyService) -> Outcome {
        let Some(manifest) = command.manifest.filter(|manifest| !manifest.name.is_empty()) else {
            return Err(rejected(RejectedCode::Invalid, "a manifest needs a name"));
        };
        self.check_count(&manifest.name, manifest.count)?;
        let existing = self.state.services.get(&manifest.name);
        if let Some(expected) = command.expected_version {
            expect_version(&manifest.name, existing, expected)?;
        }
        match existing {
            Some(entry) if entry.current() == Some(&*manifest) && !entry.record.deleting => {
                Ok(unchanged(entry.record.version))
            }
            Some(_) => self.make_next_version(manifest, &Cause::Apply),
            None if self.state.services.len() < SERVICES_MAX => self.make_first_version(manifest),
            None => {
                let message = format!("there are {SERVICES_MAX} services, which is the most a hub holds");
                Err(rejected(RejectedCode::Exhausted, message))
            }
        }
    }

    pub(super) fn delete_service(&mut self, name: &str) -> Outcome {
        let entry = self.state.services.get(name).ok_or_else(|| no_service(name))?;
        let version = entry.record.version;
        if entry.record.deleting {
            return Ok(unchanged(version));
        }
        let now = self.now;
        self.edit_service(name, |record| {
            record.deleting = true;
            record.deleting_unix_ns = now;
            if let Some(deployment) = &mut record.deployment
                && deployment.status() == pb::DeploymentStatus::Running
            {
                deployment.set_status(pb::DeploymentStatus::Cancelled);
                deployment.reason = "the service is being deleted".to_owned();
                deployment.ended_unix_ns = now;
            }
        });
        self.touch_needed_by(name);
        self.event("service_deleting", Subject::service(name), format!("{name} is being deleted"));
        self.remove_service_if_done(name);
        Ok(pb::Accepted { version, outcome: ApplyOutcome::Updated.into(), ..Default::default() })
    }

    pub(super) fn scale_service(&mut self, name: &str, count: u32) -> Outcome {
        self.check_count(name, count)?;
        let manifest = self.changeable(name)?;
        if manifest.per_host {
            let message =
                format!("{name} runs once per host (per_host = true), so it has no count to change");
            return Err(rejected(RejectedCode::Invalid, message));
        }
        if manifest.is_job() {
            let message =
                format!("{name} is a job and has one process at a time, so it has no count to change");
            return Err(rejected(RejectedCode::Invalid, message));
        }
        let before = manifest.count;
        if before == count {
            return Ok(unchanged(self.version_of(name)));
        }
        let manifest = Box::new(pb::Manifest { count, ..manifest.clone() });
        self.make_next_version(manifest, &Cause::Scale { before })
    }

    pub(super) fn restart_service(&mut self, name: &str) -> Outcome {
        let manifest = Box::new(self.changeable(name)?.clone());
        self.make_next_version(manifest, &Cause::Restart)
    }

    /// `to_version` 0: the last stable version before the current one that is not the same again.
    pub(super) fn rollback_service(&mut self, name: &str, to_version: u64) -> Outcome {
        self.changeable(name)?;
        let entry = self.state.services.get(name).ok_or_else(|| no_service(name))?;
        let current = entry.record.version;
        let target = match to_version {
            0 => entry.versions_in_full().rev().find(|version| {
                version.stable && version.version < current && version.manifest.as_deref() != entry.current()
            }),
            _ => entry.version_in_full(to_version),
        };
        let Some(target) = target else { return Err(no_version(entry, to_version)) };
        match target.manifest.clone() {
            Some(manifest) if Some(&*manifest) != entry.current() => {
                self.make_next_version(manifest, &Cause::Rollback { to: target.version })
            }
            Some(_) | None => Ok(unchanged(current)),
        }
    }

    /// The manifest of a service that may be changed.
    pub(super) fn changeable(&self, name: &str) -> Result<&pb::Manifest, pb::Rejected> {
        let entry = self.state.services.get(name).ok_or_else(|| no_service(name))?;
        match entry.current() {
            Some(manifest) if !entry.record.deleting => Ok(manifest),
            Some(_) | None => {
                let message = format!("{name} is being deleted; apply its manifest to bring it back");
                Err(rejected(RejectedCode::Conflict, message))
            }
        }
    }

    fn version_of(&self, name: &str) -> u64 {
        self.state.services.get(name).map_or(0, |entry| entry.record.version)
    }

    fn check_count(&self, name: &str, count: u32) -> Result<(), pb::Rejected> {
        if count <= COUNT_MAX {
            return Ok(());
        }
        let message = format!("{name}: count is {count}, the most is {COUNT_MAX}");
        Err(rejected(RejectedCode::Invalid, message))
    }

    /// The last row of a service that is being deleted goes with its last instance.
    pub(super) fn remove_service_if_done(&mut self, name: &str) {
        match self.state.services.get(name) {
            Some(entry) if entry.record.deleting && entry.instances.is_empty() => {}
            Some(_) | None => return,
        }
        self.touch_needed_by(name);
        let Some(entry) = self.state.services.remove(name) else { return };
        for version in &entry.versions {
            self.changes.push(Change::Deleted(RowId::Version(name.to_owned(), version.version)));
        }
        self.changes.push(Change::Deleted(RowId::Service(name.to_owned())));
        self.event("service_deleted", Subject::service(name), format!("{name} is gone, nothing of it runs"));
    }

    /// Services are stopped before what they need, so those wait to hear of it.
    pub(super) fn touch_needed_by(&mut self, name: &str) {
        let needs = self.state.services.get(name).and_then(|entry| entry.current()).map(|m| m.needs.clone());
        for needed in needs.into_iter().flatten() {
            self.state.services.touch(&needed, self.revision);
        }
    }
}

fn unchanged(version: u64) -> pb::Accepted {
    pb::Accepted { version, outcome: ApplyOutcome::Unchanged.into(), ..Default::default() }
}

fn no_service(name: &str) -> pb::Rejected {
    rejected(RejectedCode::NotFound, format!("no service {name}; `nave services` shows all"))
}

fn no_version(entry: &ServiceEntry, to_version: u64) -> pb::Rejected {
    let kept: Vec<_> = entry.versions.iter().map(|version| version.version.to_string()).collect();
    let (name, kept) = (&entry.name, kept.join(", "));
    let message = match to_version {
        0 => {
            format!("{name} has no earlier version that was fully ready; kept are {kept}: name one with --to")
        }
        _ => format!("{name} has no version {to_version}; kept are {kept}"),
    };
    rejected(RejectedCode::NotFound, message)
}

fn expect_version(name: &str, existing: Option<&ServiceEntry>, expected: u64) -> Result<(), pb::Rejected> {
    let message = match (existing, expected) {
        (None, 0) => return Ok(()),
        (None, _) => format!("{name} does not exist, so it is not at version {expected}"),
        (Some(entry), _) if entry.record.version == expected => return Ok(()),
        (Some(entry), 0) if entry.record.deleting => format!("{name} is still being deleted"),
        (Some(entry), 0) => format!("{name} exists, at version {}", entry.record.version),
        (Some(entry), _) => format!("{name} is at version {}, not {expected}", entry.record.version),
    };
    Err(rejected(RejectedCode::Conflict, message))
}
