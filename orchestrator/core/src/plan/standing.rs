//! How a service stands while the steps of one command take effect, so that each is checked against what those before
//! it have left without counting the whole service anew: a step costs the same in a service of ten and of ten
//! thousand. Apply keeps one per service and command, tells it of each effect, and drops it when it cannot tell.

use std::collections::{BTreeMap, BTreeSet};

use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;

use super::conditions::Conditions;
use super::meant::{Kind, Meant};
use super::rollout::Rollout;
use super::rules::{Count, Rules};
use super::times::Times;
use crate::state::{ClusterState, ServiceEntry};
use crate::wants::{HostExt as _, InstanceExt as _};

/// See the file's head.
#[derive(Debug)]
pub(crate) struct Standing {
    rules: Rules,
    meant: Meant,
    /// Template and ordinal of every wanted instance.
    ordinals: BTreeSet<(u64, u32)>,
    /// For `per_host`: how many there are on each host, those being stopped included.
    on_host: BTreeMap<HostId, usize>,
    now: i64,
}

impl Standing {
    /// None: there is no such service.
    pub(crate) fn of(state: &ClusterState, service: &str, now: i64) -> Option<Self> {
        let Rollout { rules, meant, .. } = Rollout::of(state, state.services.get(service)?, now)?;
        let wanted = state.instances_of(service).filter(|instance| instance.wanted());
        let ordinals = wanted.map(|instance| (instance.template_version, instance.ordinal)).collect();
        let mut on_host = BTreeMap::new();
        if meant.per_host {
            for instance in state.instances_of(service) {
                *on_host.entry(instance.host()).or_insert(0) += 1;
            }
        }
        Some(Self { rules, meant, ordinals, on_host, now })
    }

    /// Whether a placement still fits everything but the host's room; then the template it runs.
    pub(crate) fn may_place(&self, state: &ClusterState, step: &pb::Place) -> Option<u64> {
        let entry = state.services.get(&step.service).filter(|entry| !entry.record.deleting)?;
        let template = entry.template_of(step.version)?;
        if !self.is_open(state, entry, step) || self.held(state, entry) {
            return None;
        }
        let fits = match step.instance_id {
            0 => self.may_place_new(entry, step, template),
            id => self.may_place_again(state, entry, InstanceId(id), step, template),
        };
        fits.then_some(template)
    }

    /// Whether an instance may be stopped without taking more than the rules allow.
    pub(crate) fn may_stop(&self, state: &ClusterState, instance: &pb::InstanceRecord) -> bool {
        let Some(entry) = state.services.get(&instance.service) else { return true };
        let ready = instance.ready();
        let other_template = instance.template_version != self.meant.template;
        match self.meant.kind(state, instance) {
            Kind::Stopping => false,
            Kind::Surplus => true,
            _ if entry.record.deleting => true,
            Kind::Away => false,
            Kind::Current => self.rules.may_drop(ready),
            Kind::Old => {
                self.rules.may_replace(ready, other_template, self.held(state, entry))
                    || self.rules.may_make_room(ready)
            }
        }
    }

    /// After a step: what the instance was (none: it is new), and what it is now.
    pub(crate) fn changed(
        &mut self,
        state: &ClusterState,
        before: Option<&pb::InstanceRecord>,
        after: &pb::InstanceRecord,
    ) {
        if let Some(before) = before {
            self.count(state, before, Count::remove);
            if before.wanted() {
                self.ordinals.remove(&(before.template_version, before.ordinal));
            }
        }
        self.count(state, after, Count::add);
        if after.wanted() {
            self.ordinals.insert((after.template_version, after.ordinal));
        }
        if before.is_none() && self.meant.per_host {
            *self.on_host.entry(after.host()).or_insert(0) += 1;
        }
    }

    fn count(
        &mut self,
        state: &ClusterState,
        instance: &pb::InstanceRecord,
        change: fn(&mut Count, bool, bool),
    ) {
        let Some(entry) = state.services.get(&instance.service) else { return };
        let healthy = Times::of(entry, self.now).healthy(instance);
        let other_template = instance.template_version != self.meant.template;
        match self.meant.kind(state, instance) {
            Kind::Current => change(&mut self.rules.current, instance.ready(), healthy),
            Kind::Old => {
                let before = self.rules.old.all;
                change(&mut self.rules.old, instance.ready(), healthy);
                if other_template {
                    self.rules.old_templates = self.rules.old_templates + self.rules.old.all - before;
                }
            }
            Kind::Surplus | Kind::Away | Kind::Stopping => {}
        }
    }

    fn held(&self, state: &ClusterState, entry: &ServiceEntry) -> bool {
        missing_needs(state, entry).next().is_some()
    }

    fn is_open(&self, state: &ClusterState, entry: &ServiceEntry, step: &pb::Place) -> bool {
        let Some(host) = state.hosts.get(HostId(step.host_id)) else { return false };
        let admitted = match step.version == entry.record.version {
            true => self.meant.conditions.admit(host),
            false => {
                entry.manifest(step.version).is_some_and(|manifest| Conditions::of(manifest).admit(host))
            }
        };
        host.record.is_open() && admitted
    }

    fn may_place_new(&self, entry: &ServiceEntry, step: &pb::Place, template: u64) -> bool {
        let host = HostId(step.host_id);
        step.version == entry.record.version
            && self.rules.may_add() > 0
            && !self.ordinals.contains(&(template, step.ordinal))
            && (!self.meant.per_host
                || (self.meant.slot_hosts.contains(&host) && !self.on_host.contains_key(&host)))
    }

    fn may_place_again(
        &self,
        state: &ClusterState,
        entry: &ServiceEntry,
        id: InstanceId,
        step: &pb::Place,
        template: u64,
    ) -> bool {
        let Some(instance) = state.instance(id).filter(|instance| instance.service == step.service) else {
            return false;
        };
        match self.meant.kind(state, instance) {
            Kind::Current | Kind::Old => {}
            Kind::Surplus | Kind::Away | Kind::Stopping => return false,
        }
        let times = Times::of(entry, self.now);
        let due = times.again_at(instance, self.meant.is_adrift(state, instance));
        let keeps = (instance.template_version, instance.ordinal) == (template, step.ordinal);
        let stays = !self.meant.per_host || instance.host_id == step.host_id;
        instance.epoch == step.expected_epoch
            && due.is_some_and(|at| at <= self.now)
            && stays
            && (keeps || !self.ordinals.contains(&(template, step.ordinal)))
            && times.version_for(instance) == step.version
    }
}

/// Needed services without a ready instance.
pub(crate) fn missing_needs<'a>(
    state: &'a ClusterState,
    entry: &'a ServiceEntry,
) -> impl Iterator<Item = &'a str> + use<'a> {
    let ready = |name: &str| state.services.get(name).is_some_and(|entry| entry.ready > 0);
    let needs = entry.current().map_or(&[][..], |manifest| &manifest.needs);
    needs.iter().map(String::as_str).filter(move |name| !ready(name))
}
