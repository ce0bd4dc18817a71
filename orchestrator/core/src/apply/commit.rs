//! The scheduler's decisions, each checked against the state as it is now: between plan and commit an operator may
//! have deleted the service, a host may have been lost, an instance may have become unready. What no longer fits is
//! skipped, and the next plan sees why.

use std::collections::BTreeMap;
use std::sync::Arc;

use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use nave_proto::pb::observed::{Pending, State};
use nave_proto::pb::plan_step::Step;
use nave_proto::pb::{DeploymentStatus, Desired, EndpointState};

use super::versions::Cause;
use super::{Outcome, Tx};
use crate::events::{Subject, called};
use crate::limits::INSTANCES_MAX;
use crate::plan::{RECHECKS, Room, Standing, checks_differ, losses, may_conclude, may_restart};
use crate::state::{ClusterState, InstanceEntry, Reservation, ServiceEntry};
use crate::wants::{HostExt as _, InstanceExt as _, observed};

/// How the services stand that the steps of one command have touched.
#[derive(Default)]
struct Standings(BTreeMap<String, Standing>);

impl Standings {
    fn of(
        &mut self,
        state: &ClusterState,
        service: &str,
        (now, written_by): (i64, u32),
    ) -> Option<&mut Standing> {
        if !self.0.contains_key(service) {
            self.0.insert(service.to_owned(), Standing::of(state, service, now, written_by)?);
        }
        self.0.get_mut(service)
    }
}

impl Tx<'_> {
    pub(super) fn commit_plan(&mut self, command: pb::CommitPlan) -> Outcome {
        let mut standings = Standings::default();
        for step in command.steps.into_iter().filter_map(|step| step.step) {
            match step {
                Step::Place(step) => self.place(&mut standings, &step),
                Step::Stop(step) => self.stop(&mut standings, step),
                Step::SetDeployment(step) => {
                    standings.0.remove(&step.service);
                    self.set_deployment(step);
                }
                Step::Revert(step) => {
                    standings.0.remove(&step.service);
                    self.revert(step);
                }
                Step::GrantRestart(step) => {
                    standings.0.remove(&self.service_of(step.instance_id));
                    self.grant_restart(&step);
                }
                Step::FetchAhead(step) => self.fetch_ahead(&mut standings, &step),
                Step::Resize(step) => self.resize(&mut standings, &step),
                Step::Forget(step) => self.forget(&mut standings, &step),
                Step::ScheduleRun(step) => {
                    standings.0.remove(&step.service);
                    self.schedule_run(&step);
                }
            }
        }
        Ok(pb::Accepted::default())
    }

    /// When this command was written, and by which format.
    fn written(&self) -> (i64, u32) {
        (self.now, self.written_by)
    }

    fn place(&mut self, standings: &mut Standings, step: &pb::Place) {
        let Some(manifest) = self.state.manifest(&step.service, step.version) else { return };
        let taken = Reservation::of(manifest);
        let has_data = manifest.data && !manifest.per_host;
        let Some(standing) = standings.of(self.state, &step.service, self.written()) else { return };
        let Some(template_version) = standing.may_place(self.state, step) else { return };
        if !self.fits(step, &taken) {
            return;
        }
        match step.instance_id {
            0 => self.place_new(standing, step, template_version),
            id => self.place_again(standing, InstanceId(id), step, template_version),
        }
        if has_data {
            self.note_data(step);
        }
    }

    /// Remembers where the data of an ordinal is. Elsewhere than before, since that host is lost: what was there stays.
    fn note_data(&mut self, step: &pb::Place) {
        let Some(entry) = self.state.services.get(&step.service) else { return };
        let before = entry.record.data_hosts.get(&step.ordinal).copied();
        if before == Some(step.host_id) {
            return;
        }
        let (ordinal, host_id) = (step.ordinal, step.host_id);
        self.edit_service(&step.service, |record| {
            record.data_hosts.insert(ordinal, host_id);
        });
        if let Some(before) = before {
            let (old, new) = (self.host_name(HostId(before)), self.host_name(HostId(host_id)));
            let message = format!(
                "{}.{ordinal} begins with an empty data directory on {new}; what it had stays on {old}, which is lost",
                step.service
            );
            self.event("data_left_behind", Subject::service(&step.service), message);
        }
    }

    /// Whether the host has the room. What an instance holds where it is is free for itself.
    fn fits(&self, step: &pb::Place, taken: &Reservation) -> bool {
        let Some(room) = self.state.hosts.get(HostId(step.host_id)).and_then(Room::of) else { return false };
        let stays = |entry: &&InstanceEntry| entry.record.host_id == step.host_id;
        match self.state.instances.get(&InstanceId(step.instance_id)).filter(stays) {
            Some(entry) => room.lacks_without(taken, &entry.taken).is_none(),
            None => room.lacks(taken).is_none(),
        }
    }

    fn place_new(&mut self, standing: &mut Standing, step: &pb::Place, template_version: u64) {
        if self.state.instances.len() >= INSTANCES_MAX {
            return;
        }
        let id = self.edit_cluster(|cluster| {
            let id = cluster.next_instance_id;
            cluster.next_instance_id += 1;
            id
        });
        let record = pb::InstanceRecord {
            id: id.unwrap_or_default(),
            service: step.service.clone(),
            version: step.version,
            template_version,
            ordinal: step.ordinal,
            host_id: step.host_id,
            epoch: 1,
            desired: Desired::Run.into(),
            observed: observed(State::Pending(Pending {})),
            since_unix_ns: self.now,
            placed_unix_ns: self.now,
            run: step.run,
            ..Default::default()
        };
        let message = format!("{} is placed on {}", called(&record), self.host_name(record.host()));
        self.event("instance_placed", Subject::instance(&record), message);
        standing.changes(self.state, None, &record);
        self.note_filled(&record);
        if record.run != 0 {
            self.run_placed(&record);
        }
        self.put_instance(record);
    }

    /// The same instance, elsewhere or anew, under the next epoch: whatever still runs under the old one is void.
    fn place_again(
        &mut self,
        standing: &mut Standing,
        id: InstanceId,
        step: &pb::Place,
        template_version: u64,
    ) {
        let Some(before) = self.state.instance(id).cloned() else { return };
        let left = before.host();
        let reschedules = before.reschedules.saturating_add(u32::from(before.gave_up()));
        let record = pb::InstanceRecord {
            version: step.version,
            template_version,
            ordinal: step.ordinal,
            host_id: step.host_id,
            epoch: before.epoch + 1,
            attempt: 0,
            wants_restart: 0,
            restart_granted: 0,
            restart_granted_unix_ns: 0,
            restarts: 0,
            observed: observed(State::Pending(Pending {})),
            ports: Default::default(),
            reason: String::new(),
            endpoint: EndpointState::Unspecified.into(),
            since_unix_ns: self.now,
            ready_since_unix_ns: 0,
            was_ready: false,
            rechecked_unix_ns: 0,
            placed_unix_ns: self.now,
            draining_acknowledged: 0,
            reschedules,
            fetch: None,
            losses: if before.lost() { losses(&before) } else { before.losses },
            ..before.as_ref().clone()
        };
        let why = if before.gave_up() { "it gave up" } else { "it is lost" };
        let (to, from) = (self.host_name(record.host()), self.host_name(left));
        let message = format!("{} is placed again on {to}, since {why} on {from}", called(&record));
        self.event("instance_placed", Subject::instance(&record), message);
        standing.changes(self.state, Some(&before), &record);
        self.put_instance(record);
        self.drop_stale_versions(&step.service);
        self.host_left(left);
    }

    fn stop(&mut self, standings: &mut Standings, step: pb::StopInstance) {
        let id = InstanceId(step.instance_id);
        let Some(before) = self.state.instance(id).cloned() else { return };
        if before.epoch != step.epoch || !before.wanted() {
            return;
        }
        let Some(standing) = standings.of(self.state, &before.service, self.written()) else { return };
        if !standing.may_stop(self.state, &before) {
            return;
        }
        let message =
            format!("{} on {} is to stop: {}", called(&before), self.host_name(before.host()), step.reason);
        self.event("instance_stopping", Subject::instance(&before), message);
        let record = pb::InstanceRecord {
            desired: Desired::Stop.into(),
            endpoint: EndpointState::Draining.into(),
            stop_reason: step.reason,
            fetch: None,
            ..before.as_ref().clone()
        };
        standing.changes(self.state, Some(&before), &record);
        let leaves_fetched = standing.leaves_fetched(self.state, &before);
        self.put_instance(record);
        if leaves_fetched {
            self.note_fetched(&before);
        }
    }

    /// The host of one that is next to be stopped fetches what its successor needs.
    fn fetch_ahead(&mut self, standings: &mut Standings, step: &pb::FetchAhead) {
        let Some(before) = self.state.instance(InstanceId(step.instance_id)).cloned() else { return };
        let Some(standing) = standings.of(self.state, &before.service, self.written()) else { return };
        let template_version = step.template_version;
        if before.epoch != step.epoch || !standing.may_fetch(self.state, &before, template_version) {
            return;
        }
        let fetch = Some(pb::FetchState { template_version, ..Default::default() });
        let record = pb::InstanceRecord { fetch, ..before.as_ref().clone() };
        standing.changes(self.state, Some(&before), &record);
        self.put_instance(record);
    }

    /// One was stopped whose host has what its successor needs: the successor is to come there.
    fn note_fetched(&mut self, stopped: &pb::InstanceRecord) {
        let host = pb::FetchedHost { host_id: stopped.host_id, stopped_unix_ns: self.now };
        self.edit_service(&stopped.service, |record| {
            record.fetched_hosts.retain(|other| other.host_id != host.host_id);
            record.fetched_hosts.push(host);
        });
    }

    /// The place that was kept for it, if there was one, is taken.
    fn note_filled(&mut self, placed: &pb::InstanceRecord) {
        let Some(entry) = self.state.services.get(&placed.service) else { return };
        let is_it = |host: &pb::FetchedHost| host.host_id == placed.host_id;
        if placed.template_version == entry.record.template_version
            && entry.record.fetched_hosts.iter().any(is_it)
        {
            self.edit_service(&placed.service, |record| record.fetched_hosts.retain(|host| !is_it(host)));
        }
    }

    fn service_of(&self, instance_id: u64) -> String {
        self.state.instance(InstanceId(instance_id)).map_or_else(String::new, |record| record.service.clone())
    }

    /// One whose liveness has failed may be restarted, while no more are down than the update rules allow.
    fn grant_restart(&mut self, step: &pb::GrantRestart) {
        let Some(before) = self.state.instance(InstanceId(step.instance_id)).cloned() else { return };
        let is_it = before.epoch == step.epoch && before.wants_restart == step.attempt;
        if !is_it || !may_restart(self.state, &before, self.now) {
            return;
        }
        self.put_instance(pb::InstanceRecord {
            restart_granted: step.attempt,
            restart_granted_unix_ns: self.now,
            ..before.as_ref().clone()
        });
    }

    /// The process stays; what is set aside for it changes, if its host still has that.
    fn resize(&mut self, standings: &mut Standings, step: &pb::ResizeInstance) {
        let Some(entry) = self.state.instances.get(&InstanceId(step.instance_id)) else { return };
        let (before, held) = (Arc::clone(&entry.record), entry.taken.clone());
        let Some(service) = self.state.services.get(&before.service) else { return };
        let current = (service.record.version, service.record.template_version);
        if before.epoch != step.epoch
            || !before.wanted()
            || current != (step.version, before.template_version)
        {
            return;
        }
        let wanted = service.current().map(Reservation::of).unwrap_or_default();
        let room = self.state.hosts.get(before.host()).and_then(Room::of);
        if room.is_none_or(|room| room.lacks_without(&wanted, &held).is_some()) {
            return;
        }
        let new_check = self.has_new_check(service, &before);
        if new_check && !self.may_recheck(standings, &before) {
            return;
        }
        let (kind, from) = match new_check && wanted.is_within(&held) {
            true => ("instance_rechecked", format!("is checked as version {} says", step.version)),
            false => ("instance_resized", format!("has the limits of version {}", step.version)),
        };
        let message = format!("{} on {} {from} from now on", called(&before), self.host_name(before.host()));
        self.event(kind, Subject::instance(&before), message);
        let rechecked_unix_ns = if new_check { self.now } else { before.rechecked_unix_ns };
        let record =
            pb::InstanceRecord { version: step.version, rechecked_unix_ns, ..before.as_ref().clone() };
        if let Some(standing) = standings.of(self.state, &record.service, self.written()) {
            standing.changes(self.state, Some(&before), &record);
        }
        let template = record.template_version;
        self.put_instance(record);
        if new_check {
            self.extend_deadline(&before.service, template);
        }
        self.drop_stale_versions(&before.service);
    }

    /// Commands of before asked for no proof.
    fn has_new_check(&self, service: &ServiceEntry, instance: &pb::InstanceRecord) -> bool {
        let manifests = service.manifest(instance.version).zip(service.current());
        self.written_by >= RECHECKS && manifests.is_some_and(|(old, new)| checks_differ(old, new))
    }

    fn may_recheck(&self, standings: &mut Standings, instance: &pb::InstanceRecord) -> bool {
        let standing = standings.of(self.state, &instance.service, self.written());
        standing.is_some_and(|standing| standing.may_recheck(self.state, instance))
    }

    fn set_deployment(&mut self, step: pb::SetDeployment) {
        let Some(deployment) = step.deployment else { return };
        let Some(entry) = self.state.services.get(&step.service) else { return };
        let Some(current) = &entry.record.deployment else { return };
        let fits = current.version == deployment.version && *current != deployment;
        if !fits || !may_conclude(self.state, &step.service, deployment.status(), self.now) {
            return;
        }
        let version = deployment.version;
        let changed = current.status() != deployment.status();
        let (status, reason) = (deployment.status(), deployment.reason.clone());
        let stored = entry.version(version).cloned();
        self.edit_service(&step.service, |record| {
            record.deployment = Some(deployment);
            if step.mark_stable {
                record.stable_version = version;
            }
        });
        if changed && status == DeploymentStatus::Failed {
            self.fetch_no_more(&step.service);
        }
        if step.mark_stable
            && let Some(stored) = stored
        {
            self.put_version(pb::VersionRecord { stable: true, ..stored.as_ref().clone() });
        }
        if changed && let Some((kind, what)) = deployment_words(status) {
            let why = if reason.is_empty() { String::new() } else { format!(": {reason}") };
            let message = format!("version {version} of {} {what}{why}", step.service);
            self.event(kind, Subject::service(&step.service), message);
        }
    }

    /// Makes the next version from a stable one, unless somebody has made another version meanwhile.
    fn revert(&mut self, step: pb::Revert) {
        let Some(entry) = self.state.services.get(&step.service) else { return };
        let failed = || may_conclude(self.state, &step.service, DeploymentStatus::Failed, self.now);
        if entry.record.version != step.failed_version || !failed() {
            return;
        }
        let Some(manifest) = entry.manifest(step.to_version).cloned() else { return };
        let reason = step.reason;
        let message = format!("version {} of {} failed: {reason}", step.failed_version, step.service);
        self.event("deployment_failed", Subject::service(&step.service), message);
        let cause =
            Cause::Revert { to: step.to_version, failed: step.failed_version, reason: reason.clone() };
        if let Err(refusal) = self.make_next_version(Box::new(manifest), &cause) {
            let reason =
                format!("{reason}; version {} cannot be restored: {}", step.to_version, refusal.message);
            self.fail_deployment(&step.service, reason);
        }
    }

    /// Without this, a way back that is closed would be tried for ever.
    fn fail_deployment(&mut self, service: &str, reason: String) {
        let now = self.now;
        self.edit_service(service, |record| {
            if let Some(deployment) = &mut record.deployment {
                deployment.set_status(DeploymentStatus::Failed);
                deployment.reason = reason;
                deployment.ended_unix_ns = now;
            }
        });
        self.fetch_no_more(service);
    }

    /// The version that things were to be fetched for has failed, or another one takes its place.
    pub(super) fn fetch_no_more(&mut self, service: &str) {
        let instances = self.state.instances_of(service).filter(|instance| instance.fetch.is_some());
        for instance in instances.cloned().collect::<Vec<_>>() {
            self.put_instance(pb::InstanceRecord { fetch: None, ..instance.as_ref().clone() });
        }
    }

    /// An instance that was to stop on a host that is lost: nobody will ever report it gone.
    fn forget(&mut self, standings: &mut Standings, step: &pb::ForgetInstance) {
        let id = InstanceId(step.instance_id);
        let Some(record) = self.state.instance(id).cloned() else { return };
        let lost = self.state.host(record.host()).is_none_or(|host| host.is_lost());
        if record.epoch != step.epoch || record.wanted() || !lost {
            return;
        }
        let message =
            format!("{} is forgotten with its lost host {}", called(&record), self.host_name(record.host()));
        self.event("instance_forgotten", Subject::instance(&record), message);
        standings.0.remove(&record.service);
        self.remove_instance(id);
    }
}

fn deployment_words(status: DeploymentStatus) -> Option<(&'static str, &'static str)> {
    match status {
        DeploymentStatus::Successful => Some(("deployment_successful", "is fully ready")),
        DeploymentStatus::Failed => Some(("deployment_failed", "failed")),
        DeploymentStatus::Paused => Some(("deployment_paused", "is paused")),
        DeploymentStatus::Running => Some(("deployment_running", "goes on")),
        DeploymentStatus::Cancelled => Some(("deployment_cancelled", "is cancelled")),
        DeploymentStatus::Unspecified => None,
    }
}
