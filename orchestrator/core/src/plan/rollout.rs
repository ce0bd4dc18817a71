//! One service as the scheduler sees it, and the rules of replacement: which instances belong to what is wanted
//! now, which are to be replaced, how many may be missing or extra meanwhile. Plan asks the rules to choose, apply
//! asks them again to check, so a plan that has become wrong does no harm.
//!
//! *Start-first*: a new instance is started beside the old ones, at most `max_parallel` not healthy at a time, and
//! an old one stops once a healthy new one stands for it. *Stop-first* (fixed ports, `per_host`): at most
//! `max_parallel` slots are empty or not healthy at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_proto::pb::DeploymentStatus;

use super::placement::{Conditions, closed};
use crate::limits::{DISCONNECT_FENCE_NS, RESCHEDULE_DELAY_MAX_NS, RESCHEDULE_DELAY_NS};
use crate::state::{ClusterState, ServiceEntry};
use crate::wants::{HostExt as _, InstanceExt as _, ManifestExt as _};

type Instance = Arc<pb::InstanceRecord>;

/// A service, its wanted instances sorted by what is to become of them.
#[derive(Debug)]
pub(crate) struct Rollout<'a> {
    pub(crate) state: &'a ClusterState,
    pub(crate) entry: &'a ServiceEntry,
    pub(crate) manifest: &'a pb::Manifest,
    pub(crate) conditions: Conditions,
    now: i64,
    /// Instances that should be there in the end.
    pub(crate) slots: usize,
    /// For `per_host`: the hosts that should have one.
    pub(crate) slot_hosts: BTreeSet<HostId>,
    /// Of the template wanted now, on a host where they may stay.
    pub(crate) current: Vec<&'a Instance>,
    /// To be replaced: of another template, or on a host that they have to leave.
    pub(crate) old: Vec<&'a Instance>,
    /// In nobody's place: a second one of `per_host`, or on a host that is no longer meant.
    pub(crate) surplus: Vec<&'a Instance>,
    /// On lost hosts and to come back with them (`per_host`).
    pub(crate) away: Vec<&'a Instance>,
    /// Told to stop, not gone yet.
    pub(crate) stopping: Vec<&'a Instance>,
}

impl<'a> Rollout<'a> {
    /// None: the service has no manifest, which no state that passes `check` has.
    pub(crate) fn of(state: &'a ClusterState, entry: &'a ServiceEntry, now: i64) -> Option<Self> {
        let manifest = entry.current()?;
        let conditions = Conditions::of(manifest);
        let slot_hosts = match manifest.per_host {
            true => state.hosts.iter().filter(|(_, host)| conditions.admit(host)).map(|(id, _)| id).collect(),
            false => BTreeSet::new(),
        };
        let slots = match (entry.record.deleting, manifest.per_host) {
            (true, _) => 0,
            (false, true) => slot_hosts.len(),
            (false, false) => usize::try_from(manifest.count).unwrap_or(usize::MAX),
        };
        let mut rollout = Self {
            state,
            entry,
            manifest,
            conditions,
            now,
            slots,
            slot_hosts,
            current: Vec::new(),
            old: Vec::new(),
            surplus: Vec::new(),
            away: Vec::new(),
            stopping: Vec::new(),
        };
        for instance in state.instances_of(&entry.name) {
            rollout.sort_in(instance);
        }
        if manifest.per_host {
            rollout.one_per_host();
        }
        Some(rollout)
    }

    fn sort_in(&mut self, instance: &'a Instance) {
        let is_current = instance.template_version == self.entry.record.template_version;
        if !instance.wanted() {
            self.stopping.push(instance);
        } else if self.manifest.per_host && self.is_adrift(instance) {
            let returns = !self.state.hosts.is_gone(instance.host());
            if returns { &mut self.away } else { &mut self.surplus }.push(instance);
        } else if self.manifest.per_host && !self.slot_hosts.contains(&instance.host()) {
            self.surplus.push(instance);
        } else if is_current && (self.is_adrift(instance) || self.may_stay(instance)) {
            self.current.push(instance);
        } else {
            self.old.push(instance);
        }
    }

    /// Of several on one host, the best stays in its place: ready before not, then the current template before an old one.
    fn one_per_host(&mut self) {
        let mut best: BTreeMap<HostId, (bool, bool, std::cmp::Reverse<u64>)> = BTreeMap::new();
        let template = self.entry.record.template_version;
        let rank = |i: &Instance| (i.ready(), i.template_version == template, std::cmp::Reverse(i.id));
        for instance in self.current.iter().chain(&self.old) {
            let place = best.entry(instance.host()).or_insert_with(|| rank(instance));
            *place = rank(instance).max(*place);
        }
        for list in [&mut self.current, &mut self.old] {
            let (stay, go) = list.iter().copied().partition(|i| best.get(&i.host()) == Some(&rank(i)));
            *list = stay;
            self.surplus.extend::<Vec<_>>(go);
        }
    }

    fn may_stay(&self, instance: &Instance) -> bool {
        self.state.hosts.get(instance.host()).is_some_and(|host| self.conditions.admit(host))
    }

    /// Its host is lost, so it has to be placed again.
    pub(crate) fn is_adrift(&self, instance: &Instance) -> bool {
        self.state.host(instance.host()).is_none_or(|host| host.is_lost())
    }

    /// From when on an instance on a lost host may be placed again.
    pub(crate) fn fenced_until(&self, instance: &Instance) -> i64 {
        let manifest = self.entry.manifest(instance.version).unwrap_or(self.manifest);
        if !manifest.stops_on_disconnect() {
            return 0;
        }
        instance.since_unix_ns.saturating_add(manifest.stop_grace_ns()).saturating_add(DISCONNECT_FENCE_NS)
    }

    pub(crate) fn deployment(&self) -> Option<&'a pb::Deployment> {
        self.entry.record.deployment.as_ref()
    }

    pub(crate) fn status(&self) -> DeploymentStatus {
        self.deployment().map_or(DeploymentStatus::Unspecified, |deployment| deployment.status())
    }

    pub(crate) fn max_parallel(&self) -> usize {
        self.manifest.max_parallel()
    }

    pub(crate) fn stop_first(&self) -> bool {
        self.manifest.stop_first()
    }

    /// How long an instance has to be ready to count; nothing in a service's first version.
    fn min_ready_ns(&self) -> i64 {
        match self.deployment() {
            Some(deployment) if deployment.from_version == 0 => 0,
            Some(_) | None => self.manifest.min_ready_ns(),
        }
    }

    /// Ready for long enough, or done.
    pub(crate) fn healthy(&self, instance: &Instance) -> bool {
        instance.completed() || (instance.ready() && self.healthy_at(instance) <= self.now)
    }

    pub(crate) fn healthy_at(&self, instance: &Instance) -> i64 {
        instance.ready_since_unix_ns.saturating_add(self.min_ready_ns())
    }

    pub(crate) fn healthy_current(&self) -> usize {
        self.current.iter().filter(|instance| self.healthy(instance)).count()
    }

    fn other_template(&self, instance: &Instance) -> bool {
        instance.template_version != self.entry.record.template_version
    }

    /// A version that failed or is paused replaces nothing more; what runs of the version before is left alone.
    pub(crate) fn frozen(&self) -> bool {
        match self.status() {
            DeploymentStatus::Failed | DeploymentStatus::Paused | DeploymentStatus::Cancelled => {
                self.old.iter().any(|instance| self.other_template(instance))
            }
            DeploymentStatus::Running | DeploymentStatus::Successful | DeploymentStatus::Unspecified => false,
        }
    }

    /// The version to run an instance under when it is placed again: the current one, unless it belongs to a
    /// replacement that is not over.
    pub(crate) fn version_for(&self, instance: &Instance) -> u64 {
        match self.status() {
            DeploymentStatus::Successful | DeploymentStatus::Unspecified => self.entry.record.version,
            DeploymentStatus::Running
            | DeploymentStatus::Failed
            | DeploymentStatus::Paused
            | DeploymentStatus::Cancelled => match self.other_template(instance) {
                true => instance.version,
                false => self.entry.record.version,
            },
        }
    }

    /// Needed services without a ready instance.
    pub(crate) fn missing_needs(&self) -> impl Iterator<Item = &'a str> + '_ {
        let ready = |name: &str| self.state.services.get(name).is_some_and(|entry| entry.ready > 0);
        self.manifest.needs.iter().map(String::as_str).filter(move |name| !ready(name))
    }

    pub(crate) fn held(&self) -> bool {
        self.missing_needs().next().is_some()
    }

    /// Slots with neither an old instance nor a healthy new one.
    fn in_transit(&self, old: usize, healthy: usize) -> usize {
        self.slots.saturating_sub(old + healthy)
    }

    /// How many instances of the current template may be added now.
    pub(crate) fn may_add(&self) -> usize {
        let missing = self.slots.saturating_sub(self.current.len());
        if self.frozen() {
            return 0;
        }
        if self.old.is_empty() {
            return missing;
        }
        let there = self.current.len() + self.old.len();
        if self.stop_first() {
            return missing.min(self.slots.saturating_sub(there));
        }
        let unhealthy = self.current.len() - self.healthy_current();
        let spare = (self.slots + self.max_parallel()).saturating_sub(there);
        missing.min(self.max_parallel().saturating_sub(unhealthy)).min(spare)
    }

    /// Current instances beyond what is wanted: those not ready first, then the highest ordinals.
    pub(crate) fn excess(&self) -> Vec<&'a Instance> {
        let mut victims = self.current.clone();
        victims.sort_by_key(|i| (i.ready(), std::cmp::Reverse((i.ordinal, i.id))));
        victims.truncate(self.current.len().saturating_sub(self.slots));
        victims
    }

    /// Old instances that may go now, in order: those that are not ready, those that have to leave their host, those
    /// whose ordinal a new one has. `blocked`: a new one found no room, so an old one that is not
    /// ready may make it.
    pub(crate) fn replaceable(&self, blocked: bool) -> Vec<&'a Instance> {
        let taken: BTreeSet<u32> =
            self.current.iter().filter(|i| self.healthy(i)).map(|i| i.ordinal).collect();
        let mut candidates = self.old.clone();
        let rank = |i: &&Instance| {
            let turn = std::cmp::Reverse((i.ordinal, i.id));
            (i.ready(), self.may_stay(i), !taken.contains(&i.ordinal), turn)
        };
        candidates.sort_by_cached_key(rank);
        let mut counts = self.counts();
        let mut victims = Vec::new();
        for instance in candidates {
            let unblocks = blocked && !instance.ready() && counts.transit(self.slots) < self.max_parallel();
            if self.may_replace(instance, &counts) || unblocks {
                counts.old -= 1;
                counts.ready_old -= usize::from(instance.ready());
                victims.push(instance);
            }
        }
        victims
    }

    fn counts(&self) -> Counts {
        let ready_old = self.old.iter().filter(|instance| instance.ready()).count();
        Counts { old: self.old.len(), ready_old, healthy: self.healthy_current() }
    }

    fn may_replace(&self, instance: &Instance, counts: &Counts) -> bool {
        if self.frozen() && self.other_template(instance) {
            return false;
        }
        let ready = counts.healthy + counts.ready_old;
        if counts.old + counts.healthy > self.slots {
            return !instance.ready() || ready > self.slots;
        }
        let parallel = self.max_parallel();
        self.stop_first()
            && !self.held()
            && self.in_transit(counts.old, counts.healthy) < parallel
            && (!instance.ready() || ready > self.slots.saturating_sub(parallel))
    }

    /// Services that need this one and are being deleted too stop before it does.
    pub(crate) fn waits_to_stop(&self) -> Option<&'a str> {
        let needing = self.state.services.needing(&self.entry.name);
        let mut leaving =
            needing.filter(|name| self.state.services.get(name).is_some_and(|e| e.record.deleting));
        leaving.next().map(AsRef::as_ref)
    }

    /// When an instance that gave up may be placed again; None: it is left as it is, for the deployment that
    /// brought it has failed with it or is about to.
    pub(crate) fn reschedule_at(&self, instance: &Instance) -> Option<i64> {
        if !instance.gave_up() || self.is_adrift(instance) {
            return None;
        }
        let deployment = self.deployment()?;
        let before = instance.placed_unix_ns < deployment.started_unix_ns;
        let proven = match deployment.status() {
            DeploymentStatus::Successful => true,
            DeploymentStatus::Running => before,
            DeploymentStatus::Failed
            | DeploymentStatus::Paused
            | DeploymentStatus::Cancelled
            | DeploymentStatus::Unspecified => false,
        };
        let doubled = RESCHEDULE_DELAY_NS.saturating_mul(1 << instance.reschedules.min(10));
        proven.then(|| instance.since_unix_ns.saturating_add(doubled.min(RESCHEDULE_DELAY_MAX_NS)))
    }

    /// The lowest ordinals that no wanted instance of the current template has.
    pub(crate) fn free_ordinals(&self) -> impl Iterator<Item = u32> + use<> {
        let template = self.entry.record.template_version;
        let wanted = self.state.instances_of(&self.entry.name).filter(|i| i.wanted());
        let taken: BTreeSet<u32> =
            wanted.filter(|i| i.template_version == template).map(|i| i.ordinal).collect();
        (0..).filter(move |ordinal| !taken.contains(ordinal))
    }

    fn ordinal_free(&self, ordinal: u32, template: u64, except: u64) -> bool {
        let mut wanted = self.state.instances_of(&self.entry.name).filter(|i| i.wanted() && i.id != except);
        !wanted.any(|i| i.template_version == template && i.ordinal == ordinal)
    }

    fn template_of(&self, version: u64) -> Option<u64> {
        match version == self.entry.record.version {
            true => Some(self.entry.record.template_version),
            false => self.entry.version(version).map(|record| record.template_version),
        }
    }
}

/// How a replacement stands.
#[derive(Debug, Clone, Copy)]
struct Counts {
    old: usize,
    ready_old: usize,
    healthy: usize,
}

impl Counts {
    fn transit(&self, slots: usize) -> usize {
        slots.saturating_sub(self.old + self.healthy)
    }
}

/// Whether a placement still fits everything but the host's room; then the template it runs.
pub(crate) fn may_place(state: &ClusterState, step: &pb::Place, now: i64) -> Option<u64> {
    let entry = state.services.get(&step.service).filter(|entry| !entry.record.deleting)?;
    let rollout = Rollout::of(state, entry, now)?;
    let host = state.hosts.get(HostId(step.host_id))?;
    let template = rollout.template_of(step.version)?;
    let manifest = entry.manifest(step.version)?;
    let open = closed(&host.record).is_none() && Conditions::of(manifest).admit(host);
    let ordinal = rollout.ordinal_free(step.ordinal, template, step.instance_id);
    if !open || !ordinal || rollout.held() {
        return None;
    }
    let fits = match step.instance_id {
        0 => rollout.may_place_new(step),
        _ => rollout.may_place_again(step),
    };
    fits.then_some(template)
}

/// Whether an instance may be stopped without taking more than the rules allow.
pub(crate) fn may_stop(state: &ClusterState, instance: &pb::InstanceRecord, now: i64) -> bool {
    let Some(entry) = state.services.get(&instance.service) else { return true };
    let Some(rollout) = Rollout::of(state, entry, now) else { return false };
    let is = |list: &[&Instance]| list.iter().any(|other| other.id == instance.id);
    if entry.record.deleting || is(&rollout.surplus) {
        return true;
    }
    if is(&rollout.current) {
        let ready = rollout.current.iter().filter(|other| other.ready()).count();
        return rollout.current.len() > rollout.slots && (!instance.ready() || ready > rollout.slots);
    }
    let Some(instance) = rollout.old.iter().find(|other| other.id == instance.id) else { return false };
    let counts = rollout.counts();
    let makes_room = !rollout.frozen()
        && !instance.ready()
        && rollout.in_transit(counts.old, counts.healthy) < rollout.max_parallel();
    rollout.may_replace(instance, &counts) || makes_room
}

impl Rollout<'_> {
    fn may_place_new(&self, step: &pb::Place) -> bool {
        let host = HostId(step.host_id);
        let vacant = || self.state.instances_of(&self.entry.name).all(|instance| instance.host() != host);
        step.version == self.entry.record.version
            && self.may_add() > 0
            && (!self.manifest.per_host || (self.slot_hosts.contains(&host) && vacant()))
    }

    fn may_place_again(&self, step: &pb::Place) -> bool {
        let mut candidates = self.current.iter().chain(&self.old);
        let Some(instance) = candidates.find(|instance| instance.id == step.instance_id) else {
            return false;
        };
        let due = match self.is_adrift(instance) {
            true => self.fenced_until(instance) <= self.now,
            false => self.reschedule_at(instance).is_some_and(|at| at <= self.now),
        };
        let stays = !self.manifest.per_host || instance.host_id == step.host_id;
        instance.epoch == step.expected_epoch && due && stays && self.version_for(instance) == step.version
    }
}
