//! How a service stands while the steps of one command take effect, so that each is checked against what those before
//! it have left without counting the whole service anew: a step costs the same in a service of ten and of ten
//! thousand. Apply keeps one per service and command, tells it of each effect, and drops it when it cannot tell.

use std::collections::{BTreeMap, BTreeSet};

use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;

use super::conditions::Conditions;
use super::data;
use super::meant::{Kind, Meant};
use super::rollout::Rollout;
use super::rules::{Count, Rules};
use super::times::Times;
use crate::jobs::is_done;
use crate::state::{ClusterState, ServiceEntry};
use crate::wants::{HostExt as _, InstanceExt as _, ManifestExt as _};

/// See the file's head.
#[derive(Debug)]
pub(crate) struct Standing {
    meant: Meant,
    now: i64,
    /// Commands of before fetched nothing ahead, and stop what they stop whenever they are applied.
    fetches: bool,
    /// Nor did they leave data behind that nobody comes to.
    strands: bool,
    /// Made when first asked for: what is lost with a host is placed again without it.
    tally: Option<Tally>,
}

/// What takes counting every instance.
#[derive(Debug)]
struct Tally {
    rules: Rules,
    /// Template and ordinal of every wanted instance.
    ordinals: BTreeSet<(u64, u32)>,
    /// For `per_host`: how many there are on each host, those being stopped included.
    on_host: BTreeMap<HostId, usize>,
}

/// From this command format on, an old instance may have to wait for what its successor needs.
const FETCHES_AHEAD: u32 = 6;

impl Standing {
    /// None: there is no such service. `written_by`: format of the command that asks.
    pub(crate) fn of(state: &ClusterState, service: &str, now: i64, written_by: u32) -> Option<Self> {
        let entry = state.services.get(service)?;
        let mut meant = Meant::of(state, entry, entry.current()?);
        if meant.per_host {
            meant.seconds = Rollout::of(state, entry, now)?.meant.seconds;
        }
        let (fetches, strands) = (written_by >= FETCHES_AHEAD, written_by >= data::STRANDS);
        Some(Self { meant, now, fetches, strands, tally: None })
    }

    fn tally(&mut self, state: &ClusterState, entry: &ServiceEntry) -> &mut Tally {
        self.tally.get_or_insert_with(|| Tally::of(state, entry, self.now))
    }

    /// Whether a placement still fits everything but the host's room; then the template it runs.
    pub(crate) fn may_place(&mut self, state: &ClusterState, step: &pb::Place) -> Option<u64> {
        let entry = state.services.get(&step.service).filter(|entry| !entry.record.deleting)?;
        let template = entry.template_of(step.version)?;
        if !self.is_open(state, entry, step) || self.held(state, entry) {
            return None;
        }
        let fits = match step.instance_id {
            0 => self.may_place_new(state, entry, step, template),
            id => self.may_place_again(state, entry, InstanceId(id), step, template),
        };
        fits.then_some(template)
    }

    /// Whether an instance may be stopped without taking more than the rules allow.
    pub(crate) fn may_stop(&mut self, state: &ClusterState, instance: &pb::InstanceRecord) -> bool {
        let Some(entry) = state.services.get(&instance.service) else { return true };
        let ready = instance.ready();
        let other_template = instance.template_version != self.meant.template;
        match self.meant.kind(state, instance) {
            Kind::Stopping => false,
            Kind::Surplus => true,
            _ if entry.record.deleting => true,
            Kind::Away => false,
            Kind::Spare => self.tally(state, entry).rules.may_spare(ready, other_template),
            Kind::Current => self.tally(state, entry).rules.may_drop(ready),
            Kind::Old => {
                let waits = self.fetches && self.meant.awaits_fetch(state, entry, instance);
                let held = waits || self.held(state, entry);
                let leaving = other_template && self.meant.is_drained(state, instance);
                let strands = self.strands && data::strands(state, entry, instance);
                let rules = self.tally(state, entry).rules;
                rules.may_replace(ready, other_template, leaving, held)
                    || (strands && rules.may_strand(ready, other_template, held))
                    || (!waits && rules.may_make_room(ready))
            }
        }
    }

    /// Whether another check may say from now on whether one is ready.
    pub(crate) fn may_recheck(&mut self, state: &ClusterState, instance: &pb::InstanceRecord) -> bool {
        let entry = state.services.get(&instance.service);
        entry.is_some_and(|entry| self.tally(state, entry).rules.may_recheck(instance.ready()))
    }

    /// Whether the successor of one that is stopped is to come to its host, which has what that needs.
    pub(crate) fn leaves_fetched(&self, state: &ClusterState, instance: &pb::InstanceRecord) -> bool {
        let entry = state.services.get(&instance.service);
        self.fetches && entry.is_some_and(|entry| self.meant.leaves_fetched(state, entry, instance))
    }

    /// Whether an instance is next to be stopped, and all that is missing is what its successor needs.
    pub(crate) fn may_fetch(
        &mut self,
        state: &ClusterState,
        instance: &pb::InstanceRecord,
        template: u64,
    ) -> bool {
        let Some(entry) = state.services.get(&instance.service) else { return false };
        let asked = self.meant.fetch_of(instance).is_some();
        if asked
            || template != self.meant.template
            || entry.record.deleting
            || self.held(state, entry)
            || self.meant.kind(state, instance) != Kind::Old
            || !self.meant.awaits_fetch(state, entry, instance)
        {
            return false;
        }
        let ready = instance.ready();
        let rules = self.tally(state, entry).rules;
        rules.fetches_free() > 0
            && (rules.may_replace(ready, true, false, false) || rules.may_make_room(ready))
    }

    /// Before a step takes effect: what the instance is (none: it is new), and what it will be.
    pub(crate) fn changes(
        &mut self,
        state: &ClusterState,
        before: Option<&pb::InstanceRecord>,
        after: &pb::InstanceRecord,
    ) {
        let (Self { meant, tally: Some(tally), now, fetches: _, strands: _ }, Some(entry)) =
            (self, state.services.get(&after.service))
        else {
            return;
        };
        let times = Times::of(entry, *now);
        let fetching = |instance: &pb::InstanceRecord| {
            let is_old = meant.kind(state, instance) == Kind::Old;
            usize::from(is_old && meant.is_fetching(state, entry, instance))
        };
        tally.rules.fetching -= before.map_or(0, fetching);
        tally.rules.fetching += fetching(after);
        let strands = |instance| usize::from(data::strands(state, entry, instance));
        tally.rules.stranded += before.map_or(0, strands);
        tally.rules.stranded -= strands(after);
        let mut count = |instance: &pb::InstanceRecord, change: fn(&mut Count, bool, bool)| {
            let other_template = instance.template_version != meant.template;
            let (ready, healthy) = (instance.ready(), times.healthy(instance));
            match meant.kind(state, instance) {
                Kind::Current => change(&mut tally.rules.current, ready, healthy),
                kind @ (Kind::Old | Kind::Spare) => {
                    let rules = &mut tally.rules;
                    let count = if kind == Kind::Old { &mut rules.old } else { &mut rules.spare };
                    let all = count.all;
                    change(count, ready, healthy);
                    if other_template {
                        rules.old_templates = rules.old_templates + count.all - all;
                        if kind == Kind::Old && meant.is_drained(state, instance) {
                            change(&mut rules.leaving, ready, healthy);
                        }
                    }
                }
                Kind::Surplus | Kind::Away | Kind::Stopping => {}
            }
        };
        before.into_iter().for_each(|before| count(before, Count::remove));
        count(after, Count::add);
        if let Some(before) = before.filter(|before| before.wanted()) {
            tally.ordinals.remove(&(before.template_version, before.ordinal));
        }
        if after.wanted() {
            tally.ordinals.insert((after.template_version, after.ordinal));
        }
        if before.is_none() && meant.per_host {
            *tally.on_host.entry(after.host()).or_insert(0) += 1;
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

    fn may_place_new(
        &mut self,
        state: &ClusterState,
        entry: &ServiceEntry,
        step: &pb::Place,
        template: u64,
    ) -> bool {
        if let Some(run) = self.meant.run {
            let alone = entry.instances.is_empty() && step.ordinal == 0;
            return run != 0 && step.run == run && step.version == entry.record.version && alone;
        }
        let host = HostId(step.host_id);
        let moved = self.is_moved(state, entry, step.version);
        let meant_here = !self.meant.per_host || self.meant.slot_hosts.contains(&host);
        let tally = self.tally(state, entry);
        let open = match step.version == entry.record.version {
            true => tally.rules.may_add(),
            false => {
                if moved {
                    tally.rules.may_move()
                } else {
                    0
                }
            }
        };
        open > 0
            && !tally.ordinals.contains(&(template, step.ordinal))
            && meant_here
            && !tally.on_host.contains_key(&host)
    }

    /// One of this earlier version has to leave a host that is being drained.
    fn is_moved(&self, state: &ClusterState, entry: &ServiceEntry, version: u64) -> bool {
        let leaves = |i: &pb::InstanceRecord| {
            i.version == version
                && i.template_version != self.meant.template
                && self.meant.kind(state, i) == Kind::Old
                && self.meant.is_drained(state, i)
        };
        version != entry.record.version && entry.instances.values().any(|instance| leaves(instance))
    }

    fn may_place_again(
        &mut self,
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
            Kind::Surplus | Kind::Spare | Kind::Away | Kind::Stopping => return false,
        }
        let times = Times::of(entry, self.now);
        let due = times.again_at(state, instance, self.meant.is_adrift(state, instance));
        let keeps = (instance.template_version, instance.ordinal) == (template, step.ordinal);
        let stays = !self.meant.per_host || instance.host_id == step.host_id;
        instance.epoch == step.expected_epoch
            && due.is_some_and(|at| at <= self.now)
            && stays
            && times.version_for(instance) == step.version
            && (keeps || !self.tally(state, entry).ordinals.contains(&(template, step.ordinal)))
    }
}

impl Tally {
    fn of(state: &ClusterState, entry: &ServiceEntry, now: i64) -> Self {
        let Some(rollout) = Rollout::of(state, entry, now) else {
            // Without a manifest nothing may be added, for it has no slots.
            return Self { rules: Rules::default(), ordinals: BTreeSet::new(), on_host: BTreeMap::new() };
        };
        let wanted = entry.instances.values().filter(|instance| instance.wanted());
        let ordinals = wanted.map(|instance| (instance.template_version, instance.ordinal)).collect();
        let mut on_host = BTreeMap::new();
        if rollout.meant.per_host {
            for instance in entry.instances.values() {
                *on_host.entry(instance.host()).or_insert(0) += 1;
            }
        }
        Self { rules: rollout.rules, ordinals, on_host }
    }
}

/// Needed services without a ready instance.
pub(crate) fn missing_needs<'a>(
    state: &'a ClusterState,
    entry: &'a ServiceEntry,
) -> impl Iterator<Item = &'a str> + use<'a> {
    let ready = |name: &str| {
        state.services.get(name).is_some_and(|entry| match entry.current() {
            Some(manifest) if manifest.is_job() => is_done(entry),
            Some(_) | None => entry.ready > 0,
        })
    };
    let needs = entry.current().map_or(&[][..], |manifest| &manifest.needs);
    needs.iter().map(String::as_str).filter(move |name| !ready(name))
}
