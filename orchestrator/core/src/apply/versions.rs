//! Makes a service's next version: the one road that apply, scale, restart, rollback and auto-revert share.
//! A version whose template is that of instances already running takes them over as they are; only another
//! template needs new processes.

use std::collections::BTreeSet;
use std::sync::Arc;

use nave_proto::pb;
use nave_proto::pb::RejectedCode;
use nave_proto::pb::apply_service_response::Outcome as ApplyOutcome;

use super::{Outcome, Tx, rejected};
use crate::change::{Change, RowId};
use crate::events::Subject;
use crate::limits::VERSIONS_KEPT;
use crate::needs;
use crate::plan::{RECHECKS, checks_differ};
use crate::state::{Reservation, ServiceEntry};
use crate::wants::{InstanceExt as _, ManifestExt as _};

/// Why there is a new version.
pub(super) enum Cause {
    Apply,
    Scale { before: u32 },
    Restart,
    Rollback { to: u64 },
    Revert { to: u64, failed: u64, reason: String },
}

impl Cause {
    /// For `VersionRecord.cause`.
    fn text(&self) -> String {
        match self {
            Cause::Apply => "apply".to_owned(),
            Cause::Scale { .. } => "scale".to_owned(),
            Cause::Restart => "restart".to_owned(),
            Cause::Rollback { to } => format!("rollback to {to}"),
            Cause::Revert { to, .. } => format!("auto-revert to {to}"),
        }
    }

    fn event(&self, record: &pb::ServiceRecord, replaces: bool) -> (&'static str, String) {
        let (name, version) = (&record.name, record.version);
        let count = record.manifest.as_ref().map_or(0, |manifest| manifest.count);
        match self {
            Cause::Apply if version == 1 => ("service_applied", format!("{name} is new, as version 1")),
            Cause::Apply if replaces => {
                ("service_applied", format!("{name} is to run version {version}, in new processes"))
            }
            Cause::Apply => {
                ("service_applied", format!("{name} is at version {version}, its processes stay as they are"))
            }
            Cause::Scale { before } => {
                ("service_scaled", format!("{name} is scaled from {before} to {count}, as version {version}"))
            }
            Cause::Restart => ("service_restarted", format!("{name} is to restart, as version {version}")),
            Cause::Rollback { to } => {
                ("service_rolled_back", format!("{name} goes back to version {to}, as version {version}"))
            }
            Cause::Revert { to, failed, reason } => (
                "deployment_reverted",
                format!(
                    "version {failed} of {name} failed and version {to} is restored, as version {version}: {reason}"
                ),
            ),
        }
    }

    /// What the new deployment says of its origin.
    fn note(&self) -> String {
        match self {
            Cause::Revert { to, failed, reason } => {
                format!("version {failed} failed, back to version {to}: {reason}")
            }
            Cause::Apply | Cause::Scale { .. } | Cause::Restart | Cause::Rollback { .. } => String::new(),
        }
    }
}

impl Tx<'_> {
    /// Makes the first version of a service that does not exist.
    pub(super) fn make_first_version(&mut self, manifest: Box<pb::Manifest>) -> Outcome {
        self.check_needs(&manifest)?;
        let allotted = self.allot(None, &manifest)?;
        self.write_version(None, manifest, 1, allotted, &Cause::Apply);
        Ok(pb::Accepted { version: 1, outcome: ApplyOutcome::Created.into(), ..Default::default() })
    }

    /// Makes the next version of the manifest's service, which exists. The caller has checked everything but the
    /// cycle that its needs may close (going back can, too) and what has to be allotted.
    pub(super) fn make_next_version(&mut self, manifest: Box<pb::Manifest>, cause: &Cause) -> Outcome {
        self.check_needs(&manifest)?;
        let Some(entry) = self.state.services.get(&manifest.name) else {
            return self.make_first_version(manifest);
        };
        let template_version = self.template_for(entry, &manifest, cause);
        let before = Arc::clone(&entry.record);
        let allotted = self.allot(Some(&before), &manifest)?;
        self.archive(&before);
        // Whether it holds back what it needs from stopping may change with what it needs and with its count.
        self.touch_needed_by(&before.name);
        let version = before.version + 1;
        self.write_version(Some(&before), manifest, template_version, allotted, cause);
        self.touch_needed_by(&before.name);
        if template_version != before.template_version {
            self.fetch_no_more(&before.name);
        }
        self.relabel(&before.name, version, template_version);
        self.drop_stale_versions(&before.name);
        Ok(pb::Accepted { version, outcome: ApplyOutcome::Updated.into(), ..Default::default() })
    }

    fn check_needs(&self, manifest: &pb::Manifest) -> Result<(), pb::Rejected> {
        let Some(path) = needs::cycle(self.state, &manifest.name, &manifest.needs) else { return Ok(()) };
        let path = path.join(" -> ");
        let message = format!("needs form a cycle: {path}; none of these could ever start");
        Err(rejected(RejectedCode::Invalid, message))
    }

    /// The service's row, its version's row and the event.
    fn write_version(
        &mut self,
        before: Option<&pb::ServiceRecord>,
        manifest: Box<pb::Manifest>,
        template_version: u64,
        (address_suffix, uid): (u32, u32),
        cause: &Cause,
    ) {
        let version = before.map_or(1, |record| record.version + 1);
        let same = before.is_some_and(|before| before.template_version == template_version);
        let is_job = manifest.is_job();
        let runs = is_job && starts_run(&manifest, same, cause);
        let done = self.nothing_to_do(before, &manifest) || (is_job && !runs);
        let mut deployment = self.deployment(version, &manifest, before, cause, done);
        if let Some(before) = before.filter(|_| !done) {
            let came =
                Came { same: before.template_version == template_version, back: template_version < version };
            match self.written_by >= DECISIONS_LAST {
                true => go_on(&mut deployment, &manifest, before, came, cause),
                false => go_on_as_before(&mut deployment, &manifest, before, came.same, cause),
            }
        }
        let record = pb::ServiceRecord {
            name: manifest.name.clone(),
            version,
            template_version,
            deployment: Some(deployment),
            stable_version: if done { version } else { before.map_or(0, |record| record.stable_version) },
            address_suffix,
            uid,
            deleting: false,
            deleting_unix_ns: 0,
            created_unix_ns: before.map_or(self.now, |record| record.created_unix_ns),
            revision: self.revision,
            oldest_version: before.map_or(version, |record| record.oldest_version),
            data_hosts: before.map(|record| record.data_hosts.clone()).unwrap_or_default(),
            fetched_hosts: before
                .filter(|_| same)
                .map(|record| record.fetched_hosts.clone())
                .unwrap_or_default(),
            job: before.and_then(|before| before.job.clone()).filter(|_| is_job),
            manifest: Some(manifest),
        };
        let row = pb::VersionRecord {
            service: record.name.clone(),
            version,
            manifest: None,
            created_unix_ns: self.now,
            actor: self.actor.clone(),
            cause: cause.text(),
            stable: done,
            template_version,
            revision: self.revision,
        };
        let replaces = before.is_some_and(|record| record.template_version != template_version);
        let (kind, message) = cause.event(&record, replaces);
        let subject = Subject::service(&record.name);
        let name = runs.then(|| record.name.clone());
        self.put_service(record, row);
        self.event(kind, subject, message);
        if let Some(name) = name {
            self.start_run(&name);
        }
    }

    /// The template of the next version: that of the current one, or of other running instances, when a process
    /// would be started with the same; else a new one.
    fn template_for(&self, entry: &ServiceEntry, manifest: &pb::Manifest, cause: &Cause) -> u64 {
        let next = entry.record.version + 1;
        if matches!(cause, Cause::Restart) {
            return next;
        }
        // Commands of before replaced the processes, and do so whenever they are applied.
        let resized = self.written_by >= LIMITS_ARE_LIVE;
        let same = |version: u64| {
            let same_limits = |old| resized || nave_proto::manifest::same_limits(old, manifest);
            entry
                .manifest(version)
                .is_some_and(|old| nave_proto::manifest::same_template(old, manifest) && same_limits(old))
        };
        if same(entry.record.version) {
            return entry.record.template_version;
        }
        let wanted = self.state.instances_of(&entry.name).filter(|instance| instance.wanted());
        let running: BTreeSet<(u64, u64)> = wanted.map(|i| (i.template_version, i.version)).collect();
        running.into_iter().rev().find(|(_, version)| same(*version)).map_or(next, |(template, _)| template)
    }

    /// Address suffix and uid, kept from before or allotted once there is something that needs them.
    fn allot(
        &mut self,
        before: Option<&pb::ServiceRecord>,
        manifest: &pb::Manifest,
    ) -> Result<(u32, u32), pb::Rejected> {
        let mut suffix = before.map_or(0, |record| record.address_suffix);
        let mut uid = before.map_or(0, |record| record.uid);
        let Some(cluster) = self.state.cluster.as_ref().filter(|_| !manifest.wants_none()) else {
            return Ok((suffix, uid));
        };
        let new_suffix = suffix == 0 && !manifest.ports.is_empty();
        let new_uid = uid == 0 && manifest.user.is_empty();
        if new_suffix {
            suffix = self.state.services.free_suffix(cluster.next_address_suffix).ok_or_else(|| {
                let message = "every service address is taken; delete a service that has ports";
                rejected(RejectedCode::Exhausted, message)
            })?;
        }
        if new_uid {
            uid = self.state.services.free_uid(cluster.next_uid).ok_or_else(|| {
                rejected(
                    RejectedCode::Exhausted,
                    "every user id for services is taken; name a user in the manifest",
                )
            })?;
        }
        if new_suffix || new_uid {
            self.edit_cluster(|cluster| {
                if new_suffix {
                    cluster.next_address_suffix = suffix + 1;
                }
                if new_uid {
                    cluster.next_uid = uid + 1;
                }
            });
        }
        Ok((suffix, uid))
    }

    /// The version that is current no longer gets its manifest into its own row.
    fn archive(&mut self, before: &pb::ServiceRecord) {
        let stored = self.state.services.get(&before.name).and_then(|entry| entry.version(before.version));
        let Some(stored) = stored.cloned() else { return };
        let manifest = before.manifest.clone();
        self.put_version(pb::VersionRecord { manifest, ..stored.as_ref().clone() });
    }

    /// Nothing wanted and nothing there: the deployment is over as it begins.
    fn nothing_to_do(&self, before: Option<&pb::ServiceRecord>, manifest: &pb::Manifest) -> bool {
        let empty = |before: &pb::ServiceRecord| self.state.instances_of(&before.name).next().is_none();
        manifest.wants_none() && before.is_none_or(empty)
    }

    fn deployment(
        &self,
        version: u64,
        manifest: &pb::Manifest,
        before: Option<&pb::ServiceRecord>,
        cause: &Cause,
        done: bool,
    ) -> pb::Deployment {
        let status = if done { pb::DeploymentStatus::Successful } else { pb::DeploymentStatus::Running };
        pb::Deployment {
            version,
            status: status.into(),
            reason: cause.note(),
            started_unix_ns: self.now,
            progress_deadline_unix_ns: self.now.saturating_add(manifest.progress_deadline_ns()),
            ended_unix_ns: if done { self.now } else { 0 },
            from_version: before.map_or(0, |before| before.version),
            reverted_to: if matches!(cause, Cause::Revert { .. }) { version } else { 0 },
            canary: 0,
        }
    }

    /// Running instances of the template belong to the new version from now on. Not those for which it sets aside more:
    /// whether their hosts have that is for the plan to see. Nor those that are ready and that it checks in another way:
    /// they go over a few at a time.
    fn relabel(&mut self, name: &str, version: u64, template_version: u64) {
        let wanted = self.state.manifest(name, version).map(Reservation::of).unwrap_or_default();
        let grows = |i: &pb::InstanceRecord| {
            self.state.instances.get(&i.id()).is_some_and(|entry| !wanted.is_within(&entry.taken))
        };
        let entry = self.state.services.get(name);
        let other_check = |i: &pb::InstanceRecord| {
            let manifests = entry.and_then(|entry| entry.manifest(i.version).zip(entry.current()));
            manifests.is_some_and(|(old, new)| checks_differ(old, new))
        };
        let waits =
            |i: &pb::InstanceRecord| grows(i) || (self.written_by >= RECHECKS && i.ready() && other_check(i));
        let same =
            |i: &&Arc<pb::InstanceRecord>| i.wanted() && i.template_version == template_version && !waits(i);
        let instances: Vec<_> = self.state.instances_of(name).filter(same).cloned().collect();
        for instance in instances {
            self.put_instance(pb::InstanceRecord { version, ..instance.as_ref().clone() });
        }
    }

    /// Whatever let go of a version looks whether it has to be kept any longer.
    pub(super) fn drop_stale_versions(&mut self, name: &str) {
        let Some(entry) = self.state.services.get(name).filter(|entry| entry.versions.len() > VERSIONS_KEPT)
        else {
            return;
        };
        let in_use = self.state.instances_of(name).map(|instance| instance.version).collect();
        let stale = entry.stale_versions(&in_use);
        let Some(entry) = self.state.services.get_mut(name).filter(|_| !stale.is_empty()) else { return };
        entry.versions.retain(|record| !stale.contains(&record.version));
        let oldest = entry.versions.first().map_or(0, |record| record.version);
        self.edit_service(name, |record| record.oldest_version = oldest);
        let gone = stale.into_iter().map(|version| RowId::Version(name.to_owned(), version));
        self.changes.extend(gone.map(Change::Deleted));
    }
}

/// From this command format on, new limits replace no process.
const LIMITS_ARE_LIVE: u32 = 5;

/// From this command format on, a pause outlives every change that replaces no process, and what goes back to processes
/// that run begins with no canaries.
const DECISIONS_LAST: u32 = 8;

/// Whether a new version of a job is a word to run it: without a schedule each change is, that of limits and the like
/// apart; with one only a restart.
fn starts_run(manifest: &pb::Manifest, same_template: bool, cause: &Cause) -> bool {
    match cause {
        Cause::Restart => true,
        Cause::Apply | Cause::Scale { .. } | Cause::Rollback { .. } | Cause::Revert { .. } => {
            manifest.schedule.is_empty() && !same_template
        }
    }
}

/// How the template of a new version stands to what there was.
#[derive(Debug, Clone, Copy)]
struct Came {
    /// It is that of the version before.
    same: bool,
    /// Instances run it already, be they of the version before or of an earlier one.
    back: bool,
}

/// What a person has decided, or has yet to decide, about a version outlives a change that replaces no process: while it
/// is paused it stays paused, and its canaries wait as before. A new template begins with canaries of its own; what goes
/// back to a version, or starts the same one anew, needs none.
fn go_on(
    deployment: &mut pb::Deployment,
    manifest: &pb::Manifest,
    before: &pb::ServiceRecord,
    came: Came,
    cause: &Cause,
) {
    let earlier = undecided(before);
    match cause {
        Cause::Apply if !came.back => deployment.canary = manifest.canary(),
        Cause::Apply | Cause::Scale { .. } if came.same => {
            deployment.canary = earlier.map_or(0, |earlier| earlier.canary).min(manifest.canary());
            if earlier.is_some_and(|earlier| earlier.status() == pb::DeploymentStatus::Paused) {
                deployment.set_status(pb::DeploymentStatus::Paused);
            }
        }
        Cause::Apply
        | Cause::Scale { .. }
        | Cause::Restart
        | Cause::Rollback { .. }
        | Cause::Revert { .. } => {}
    }
}

/// As commands before [`DECISIONS_LAST`] are applied: only a change of the count leaves a pause, and each other template
/// has canaries.
fn go_on_as_before(
    deployment: &mut pb::Deployment,
    manifest: &pb::Manifest,
    before: &pb::ServiceRecord,
    same_template: bool,
    cause: &Cause,
) {
    let earlier = undecided(before);
    match cause {
        Cause::Apply if !same_template => deployment.canary = manifest.canary(),
        Cause::Apply | Cause::Scale { .. } if same_template => {
            deployment.canary = earlier.map_or(0, |earlier| earlier.canary).min(manifest.canary());
            let paused = earlier.is_some_and(|earlier| earlier.status() == pb::DeploymentStatus::Paused);
            if matches!(cause, Cause::Scale { .. }) && paused {
                deployment.set_status(pb::DeploymentStatus::Paused);
            }
        }
        Cause::Apply
        | Cause::Scale { .. }
        | Cause::Restart
        | Cause::Rollback { .. }
        | Cause::Revert { .. } => {}
    }
}

/// The deployment before, when it is not over.
fn undecided(before: &pb::ServiceRecord) -> Option<&pb::Deployment> {
    use pb::DeploymentStatus::{Paused, Running};
    before.deployment.as_ref().filter(|earlier| matches!(earlier.status(), Running | Paused))
}
