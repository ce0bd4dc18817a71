//! One service as the scheduler sees it: its instances sorted by what is to become of them, and which of them go next.
//! How many may go is said by `rules.rs`; apply asks the same rules again (`standing.rs`), so a plan that has become
//! wrong does no harm.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_proto::pb::DeploymentStatus;

use super::data;
use super::meant::{Kind, Meant};
use super::needing::Needing;
use super::placement::Room;
use super::recheck;
use super::rules::Rules;
use super::standing::missing_needs;
use super::times::Times;
use crate::state::{ClusterState, Reservation, ServiceEntry};
use crate::wants::{InstanceExt as _, ManifestExt as _};

type Instance = Arc<pb::InstanceRecord>;

/// A service, its instances sorted by [`Kind`].
#[derive(Debug)]
pub(crate) struct Rollout<'a> {
    pub(crate) state: &'a ClusterState,
    pub(crate) entry: &'a ServiceEntry,
    pub(crate) manifest: &'a pb::Manifest,
    pub(crate) meant: Meant,
    pub(crate) rules: Rules,
    pub(crate) times: Times<'a>,
    pub(crate) needing: Needing<'a>,
    /// Instances that should be there in the end.
    pub(crate) slots: usize,
    pub(crate) current: Vec<&'a Instance>,
    pub(crate) old: Vec<&'a Instance>,
    pub(crate) surplus: Vec<&'a Instance>,
    pub(crate) spare: Vec<&'a Instance>,
    pub(crate) away: Vec<&'a Instance>,
    pub(crate) stopping: Vec<&'a Instance>,
    /// Those among the current and old ones that are lost with their host or gave up: few, as a rule.
    pub(crate) troubled: Vec<&'a Instance>,
}

/// Old instances whose turn it is.
#[derive(Debug, Default)]
pub(crate) struct Turns<'a> {
    /// To be stopped now.
    pub(crate) go: Vec<&'a Instance>,
    /// To be stopped next, once their hosts have what their successors need.
    pub(crate) fetch: Vec<&'a Instance>,
}

impl<'a> Rollout<'a> {
    /// None: the service has no manifest, which no state that passes `check` has.
    pub(crate) fn of(state: &'a ClusterState, entry: &'a ServiceEntry, now: i64) -> Option<Self> {
        let manifest = entry.current()?;
        let meant = Meant::of(state, entry, manifest);
        let slots = match (entry.record.deleting, manifest.per_host, meant.run) {
            (true, _, _) => 0,
            (false, _, Some(run)) => usize::from(run != 0),
            (false, true, None) => meant.slot_hosts.len(),
            (false, false, None) => usize::try_from(manifest.count).unwrap_or(usize::MAX),
        };
        let mut rollout = Self {
            state,
            entry,
            manifest,
            meant,
            rules: Rules::default(),
            times: Times::of(entry, now),
            needing: Needing::of(state, entry, now),
            slots,
            current: Vec::new(),
            old: Vec::new(),
            surplus: Vec::new(),
            spare: Vec::new(),
            away: Vec::new(),
            stopping: Vec::new(),
            troubled: Vec::new(),
        };
        for instance in entry.instances.values() {
            rollout.sort_in(instance);
        }
        if manifest.per_host {
            rollout.one_per_host();
        }
        rollout.rules = rollout.count();
        Some(rollout)
    }

    fn sort_in(&mut self, instance: &'a Instance) {
        let kind = self.meant.kind(self.state, instance);
        let counts = matches!(kind, Kind::Current | Kind::Old);
        if counts && (instance.gave_up() || self.is_adrift(instance)) {
            self.troubled.push(instance);
        }
        let list = match kind {
            Kind::Current => &mut self.current,
            Kind::Old => &mut self.old,
            Kind::Surplus => &mut self.surplus,
            Kind::Spare => &mut self.spare,
            Kind::Away => &mut self.away,
            Kind::Stopping => &mut self.stopping,
        };
        list.push(instance);
    }

    /// Of several on one host, the best stays in its place: ready before not, then the current template before an old one.
    fn one_per_host(&mut self) {
        let mut best: BTreeMap<HostId, (bool, bool, std::cmp::Reverse<u64>)> = BTreeMap::new();
        let template = self.meant.template;
        let rank = |i: &Instance| (i.ready(), i.template_version == template, std::cmp::Reverse(i.id));
        for instance in self.current.iter().chain(&self.old) {
            let place = best.entry(instance.host()).or_insert_with(|| rank(instance));
            *place = rank(instance).max(*place);
        }
        for list in [&mut self.current, &mut self.old] {
            let (stay, go): (_, Vec<_>) =
                list.iter().copied().partition(|i| best.get(&i.host()) == Some(&rank(i)));
            *list = stay;
            self.meant.seconds.extend(go.iter().map(|instance| instance.id));
            self.troubled.retain(|instance| !self.meant.seconds.contains(&instance.id));
            self.spare.extend(go);
        }
    }

    fn count(&self) -> Rules {
        let halted = match self.status() {
            DeploymentStatus::Failed | DeploymentStatus::Paused | DeploymentStatus::Cancelled => true,
            DeploymentStatus::Running | DeploymentStatus::Successful | DeploymentStatus::Unspecified => false,
        };
        let mut rules = Rules {
            slots: self.slots,
            max_parallel: self.manifest.max_parallel(),
            stop_first: self.manifest.stop_first(),
            halted,
            canary: self.deployment().map_or(0, |d| usize::try_from(d.canary).unwrap_or(usize::MAX)),
            stranded: data::stranded(self.state, self.entry),
            ..Rules::default()
        };
        for instance in &self.current {
            rules.current.add(instance.ready(), self.healthy(instance));
        }
        for instance in &self.old {
            rules.old.add(instance.ready(), self.healthy(instance));
            rules.old_templates += usize::from(self.other_template(instance));
            rules.fetching += usize::from(self.is_fetching(instance));
            if self.leaves(instance) {
                rules.leaving.add(instance.ready(), self.healthy(instance));
            }
        }
        for instance in &self.spare {
            rules.spare.add(instance.ready(), self.healthy(instance));
            rules.old_templates += usize::from(self.other_template(instance));
        }
        rules
    }

    /// Its host is lost, so it has to be placed again.
    pub(crate) fn is_adrift(&self, instance: &Instance) -> bool {
        self.meant.is_adrift(self.state, instance)
    }

    pub(crate) fn deployment(&self) -> Option<&'a pb::Deployment> {
        self.entry.record.deployment.as_ref()
    }

    pub(crate) fn status(&self) -> DeploymentStatus {
        self.deployment().map_or(DeploymentStatus::Unspecified, |deployment| deployment.status())
    }

    pub(crate) fn healthy(&self, instance: &Instance) -> bool {
        self.times.healthy(instance)
    }

    fn other_template(&self, instance: &Instance) -> bool {
        instance.template_version != self.meant.template
    }

    /// Of the version before, on a host that is being drained.
    pub(crate) fn leaves(&self, instance: &Instance) -> bool {
        self.other_template(instance) && self.meant.is_drained(self.state, instance)
    }

    /// It is to have more than its host was asked for, and would be welcome there with that.
    pub(crate) fn has_outgrown(&self, instance: &Instance) -> bool {
        self.meant.has_outgrown(instance) && self.meant.may_stay(self.state, instance)
    }

    /// It is to have more and another check at once, see [`recheck::replaces`].
    pub(crate) fn is_replaced_for_both(&self, instance: &Instance) -> bool {
        self.has_outgrown(instance)
            && self.entry.manifest(instance.version).is_some_and(|old| recheck::replaces(old, self.manifest))
    }

    /// Such a one is replaced, but for one that has to go first for room that is perhaps nowhere.
    pub(crate) fn gives_way(&self, instance: &Instance) -> bool {
        self.is_replaced_for_both(instance)
            && (!self.manifest.stop_first() || self.has_room_without(instance))
    }

    /// Its host has what a successor needs, once that comes in its place.
    fn has_room_without(&self, instance: &Instance) -> bool {
        let room = self.state.hosts.get(instance.host()).and_then(Room::of);
        let entry = self.state.instances.get(&instance.id());
        let wanted = Reservation::of(self.manifest);
        room.zip(entry).is_some_and(|(room, entry)| room.lacks_without(&wanted, &entry.taken).is_none())
    }

    /// The canaries are healthy, and the rest waits for a promotion.
    pub(crate) fn waits_for_promotion(&self) -> bool {
        self.rules.canarying() && self.rules.current.healthy >= self.rules.wanted_current()
    }

    /// Needed services without a ready instance.
    pub(crate) fn missing_needs(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        missing_needs(self.state, self.entry)
    }

    pub(crate) fn held(&self) -> bool {
        self.missing_needs().next().is_some()
    }

    /// Current instances beyond what is wanted: those not ready first, then the highest ordinals.
    pub(crate) fn excess(&self) -> Vec<&'a Instance> {
        let count = self.current.len().saturating_sub(self.slots);
        if count == 0 {
            return Vec::new();
        }
        let mut victims = self.current.clone();
        victims.sort_by_key(|i| (i.ready(), std::cmp::Reverse((i.ordinal, i.id))));
        victims.truncate(count);
        victims
    }

    /// Those in nobody's place that may go now: those not ready first, then the highest ordinals.
    pub(crate) fn sparable(&self) -> Vec<&'a Instance> {
        let mut victims = self.spare.clone();
        victims.sort_by_key(|i| (i.ready(), std::cmp::Reverse((i.ordinal, i.id))));
        let mut rules = self.rules;
        victims.retain(|instance| {
            let goes = rules.may_spare(instance.ready(), self.other_template(instance));
            if goes {
                rules.spare.remove(instance.ready(), self.healthy(instance));
            }
            goes
        });
        victims
    }

    /// Whose turn it is among the old instances, in order: those that are not ready, those that have to leave their host,
    /// those whose ordinal a new one has, those for which nothing is left to fetch. `blocked`: a new one found no room, so
    /// an old one that is not ready may make it.
    pub(crate) fn turns(&self, blocked: bool) -> Turns<'a> {
        let mut turns = Turns::default();
        if self.old.is_empty() {
            return turns;
        }
        let taken: BTreeSet<u32> =
            self.current.iter().filter(|i| self.healthy(i)).map(|i| i.ordinal).collect();
        let mut candidates = self.old.clone();
        // One that has to go first, for room that is perhaps nowhere, stays as it is until there is room where it is.
        let stays = |instance: &Instance| self.has_outgrown(instance) && !self.gives_way(instance);
        candidates.retain(|instance| !(self.manifest.stop_first() && stays(instance)));
        candidates.retain(|instance| self.needing.holds(instance).is_none());
        candidates.sort_by_cached_key(|i| {
            let turn = std::cmp::Reverse((i.ordinal, i.id));
            let stays = self.meant.may_stay(self.state, i);
            (i.ready(), stays, !taken.contains(&i.ordinal), self.awaits_fetch(i), turn)
        });
        let held = self.held();
        let mut rules = self.rules;
        let mut waiting = Vec::new();
        for instance in candidates {
            let waits = self.awaits_fetch(instance);
            if self.takes_turn(&mut rules, instance, blocked && !waits, held || waits) {
                turns.go.push(instance);
            } else if waits {
                waiting.push(instance);
            }
        }
        waiting.retain(|instance| self.takes_turn(&mut rules, instance, blocked, held));
        turns.fetch = waiting;
        turns
    }

    /// Whether an old instance may go now; then the rules are for the others.
    fn takes_turn(&self, rules: &mut Rules, instance: &Instance, blocked: bool, held: bool) -> bool {
        let (ready, other_template) = (instance.ready(), self.other_template(instance));
        let leaving = self.leaves(instance);
        let strands = self.strands(instance);
        let makes_room = blocked && rules.may_make_room(ready);
        let goes = makes_room
            || rules.may_replace(ready, other_template, leaving, held)
            || (strands && rules.may_strand(ready, other_template, held));
        if goes {
            rules.stranded += usize::from(strands);
            rules.old.remove(ready, self.healthy(instance));
            if leaving {
                rules.leaving.remove(ready, self.healthy(instance));
            }
            // Whether it is frozen was settled when the look began.
        }
        goes
    }

    /// It leaves a slot that stays empty, and is asked for in a format that knows of that.
    fn strands(&self, instance: &Instance) -> bool {
        self.state.command_format() >= data::STRANDS && data::strands(self.state, self.entry, instance)
    }

    /// The lowest ordinals that no wanted instance of the current template has. With data: that no instance at all has,
    /// the last one gone included, since both would have one directory.
    pub(crate) fn free_ordinals(&self) -> impl Iterator<Item = u32> + use<'a> {
        self.free_ordinals_of(self.meant.template)
    }

    pub(crate) fn free_ordinals_of(&self, template: u64) -> impl Iterator<Item = u32> + use<'a> {
        let (entry, has_data) = (self.entry, self.manifest.data);
        let mut taken: Option<BTreeSet<u32>> = None;
        (0..).filter(move |ordinal| {
            let counts =
                |i: &&Arc<pb::InstanceRecord>| has_data || i.wanted() && i.template_version == template;
            let holders = || entry.instances.values().filter(counts);
            !taken.get_or_insert_with(|| holders().map(|i| i.ordinal).collect()).contains(ordinal)
        })
    }
}
