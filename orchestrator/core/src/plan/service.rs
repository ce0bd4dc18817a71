//! The plan for one service: what should happen now, why instances are missing, when to look again.

use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_proto::pb::plan_step::Step;

use super::conditions::Conditions;
use super::data;
use super::deployment::Verdict;
use super::lack::{Lack, Refusals};
use super::placement::{Fleet, Request};
use super::rollout::{Rollout, Turns};
use super::score::Census;
use super::search::Placer;
use crate::events::called;
use crate::state::{ClusterState, Reservation, ServiceEntry};
use crate::wants::{HostExt as _, InstanceExt as _, ManifestExt as _};

/// What one look at a service came to.
#[derive(Debug, Default)]
pub(crate) struct ServicePlan {
    pub(crate) steps: Vec<Step>,
    /// Instances that should be placed and cannot be.
    pub(crate) missing: usize,
    pub(crate) reasons: Vec<String>,
    /// Why old instances still stand where new ones are to be.
    pub(crate) stays: Vec<String>,
    pub(crate) wake_at: Option<i64>,
    /// Something changes when a host has more room, though nothing is missing.
    pub(crate) waits_for_room: bool,
    /// The budget was used up before the end.
    pub(crate) cut: bool,
}

/// Plans one service with at most `budget` steps, taking room from the fleet.
pub(crate) fn plan_service<'a>(
    state: &'a ClusterState,
    fleet: &mut Fleet<'a>,
    entry: &'a ServiceEntry,
    now: i64,
    budget: usize,
) -> ServicePlan {
    if at_rest(entry) {
        return ServicePlan::default();
    }
    let Some(rollout) = Rollout::of(state, entry, now) else { return ServicePlan::default() };
    let mut planner = Planner { rollout: &rollout, fleet, now, budget, plan: ServicePlan::default() };
    planner.forget_lost();
    match (entry.record.deleting, rollout.manifest.is_job()) {
        (true, _) => planner.stop_all(),
        (false, true) => planner.run_job(),
        (false, false) => planner.converge(),
    }
    planner.plan
}

/// Nothing wanted, nothing there, and said so: most of what a look finds when services are many.
fn at_rest(entry: &ServiceEntry) -> bool {
    let deployment = entry.record.deployment.as_ref();
    entry.instances.is_empty()
        && entry.current().is_some_and(|manifest| manifest.wants_none())
        && deployment.is_some_and(|deployment| deployment.status() == pb::DeploymentStatus::Successful)
}

pub(super) struct Planner<'r, 'a> {
    pub(super) rollout: &'r Rollout<'a>,
    pub(super) fleet: &'r mut Fleet<'a>,
    pub(super) now: i64,
    budget: usize,
    pub(super) plan: ServicePlan,
}

impl<'a> Planner<'_, 'a> {
    /// False: the budget is used up.
    pub(super) fn push(&mut self, step: Step) -> bool {
        if self.plan.steps.len() >= self.budget {
            self.plan.cut = true;
            return false;
        }
        self.plan.steps.push(step);
        true
    }

    pub(super) fn wake_at(&mut self, at: i64) {
        self.plan.wake_at = Some(self.plan.wake_at.map_or(at, |earlier| earlier.min(at)));
    }

    /// What was stopping on a host that is lost will never be reported gone.
    fn forget_lost(&mut self) {
        for instance in &self.rollout.stopping {
            if !self.rollout.is_adrift(instance) {
                continue;
            }
            if self.rollout.times.is_fenced(self.rollout.state, instance) {
                continue;
            }
            let forget = pb::ForgetInstance { instance_id: instance.id, epoch: instance.epoch };
            if !self.push(Step::Forget(forget)) {
                return;
            }
        }
    }

    fn stop_all(&mut self) {
        if self.is_held_back() {
            return;
        }
        let wanted: Vec<_> =
            self.rollout.state.instances_of(&self.rollout.entry.name).filter(|i| i.wanted()).collect();
        self.stop_each(&wanted, "the service is being deleted");
    }

    /// All of it is to stop, once what needs it is gone.
    fn is_held_back(&mut self) -> bool {
        let rollout = self.rollout;
        let left = rollout.entry.instances.len() > rollout.stopping.len();
        let Some(hold) = rollout.needing.everywhere().filter(|_| left) else { return false };
        self.plan.reasons.push(format!("{}, which needs it, is stopped first", hold.by));
        self.wake_at(hold.until);
        true
    }

    pub(super) fn stop_each(&mut self, instances: &[&Arc<pb::InstanceRecord>], reason: &str) {
        for instance in instances {
            let (instance_id, epoch) = (instance.id, instance.epoch);
            let stop = pb::StopInstance { instance_id, epoch, reason: reason.to_owned() };
            if !self.push(Step::Stop(stop)) {
                return;
            }
        }
    }

    /// Extra ones stop, lost ones come back elsewhere, missing ones are placed, old ones give way; and the
    /// deployment is judged by what is there now, not by what these steps will bring.
    fn converge(&mut self) {
        let rollout = self.rollout;
        self.grant_restarts();
        self.recheck();
        if self.resize() {
            // Who is to be replaced is seen once that has taken effect.
            return;
        }
        if self.is_held_back() {
            return self.judge();
        }
        rollout.needing.on_hosts().for_each(|hold| self.wake_at(hold.until));
        self.stop_each(&self.unneeded(&rollout.surplus), "no longer meant for this host");
        self.stop_each(&rollout.sparable(), "no longer meant for this host");
        let excess = rollout.excess();
        self.stop_each(&excess, &format!("scaled down to {}", rollout.slots));
        let blocked = self.place_all(&excess);
        self.replace(blocked, &excess);
        self.judge();
    }

    /// Those among the ones to be stopped that nobody beside them needs; for the others it is time later.
    fn unneeded(&self, instances: &[&'a Arc<pb::InstanceRecord>]) -> Vec<&'a Arc<pb::InstanceRecord>> {
        let rollout = self.rollout;
        instances.iter().copied().filter(|instance| rollout.needing.holds(instance).is_none()).collect()
    }

    fn grant_restarts(&mut self) {
        for instance in self.rollout.restartable(self.now) {
            let (instance_id, epoch, attempt) = (instance.id, instance.epoch, instance.attempt);
            if !self.push(Step::GrantRestart(pb::GrantRestart { instance_id, epoch, attempt })) {
                return;
            }
        }
        if let Some(at) = self.rollout.restart_wake_at(self.now) {
            self.wake_at(at);
        }
    }

    /// Those whose turn it is are checked as the current version says.
    fn recheck(&mut self) {
        let version = self.rollout.entry.record.version;
        for instance in self.rollout.recheck() {
            let (instance_id, epoch) = (instance.id, instance.epoch);
            if !self.push(Step::Resize(pb::ResizeInstance { instance_id, epoch, version })) {
                return;
            }
        }
    }

    /// Gives those that run the limits of the current version, where their hosts have the room. True: some got them.
    fn resize(&mut self) -> bool {
        let rollout = self.rollout;
        let wanted = Reservation::of(rollout.manifest);
        let mut resized = false;
        for instance in rollout.old.iter().filter(|instance| rollout.has_outgrown(instance)) {
            let Some(entry) = rollout.state.instances.get(&instance.id()) else { continue };
            if rollout.gives_way(instance) {
                continue;
            }
            match self.fleet.grow(instance.host(), &wanted, &entry.taken) {
                Ok(()) => {
                    let (instance_id, epoch) = (instance.id, instance.epoch);
                    let version = rollout.entry.record.version;
                    resized = true;
                    if !self.push(Step::Resize(pb::ResizeInstance { instance_id, epoch, version })) {
                        break;
                    }
                }
                Err(shortage) if rollout.manifest.stop_first() => {
                    self.plan.waits_for_room = true;
                    let mut refusals = Refusals::default();
                    refusals.add(instance.host(), shortage, &wanted);
                    let name = |host| {
                        rollout.state.host(host).map_or_else(|| host.to_string(), |record| record.shown())
                    };
                    let lacks = refusals.sentences(&wanted, 1, name).join("; ");
                    self.plan.reasons.push(format!(
                        "{} keeps the limits of version {}: {lacks}",
                        called(instance),
                        instance.version
                    ));
                }
                Err(_) => {} // it moves
            }
        }
        resized
    }

    /// Places what is missing; true: there was no room, and stopping an old instance could make some.
    fn place_all(&mut self, excess: &[&Arc<pb::InstanceRecord>]) -> bool {
        let rollout = self.rollout;
        let again = self.due_again(excess);
        let (new, moves) = (rollout.rules.may_add(), rollout.rules.may_move());
        if again.is_empty() && new == 0 && moves == 0 {
            return false;
        }
        if rollout.held() {
            self.lacks_needs(again.len() + new + moves);
            return false;
        }
        let mut placer = Placer::new(self.census());
        let mut ordinals = rollout.free_ordinals();
        let mut refusals = Rc::default();
        for instance in again {
            if let Err(why) = self.place_again(instance, &mut placer, &mut ordinals) {
                refusals = why;
                self.plan.missing += 1;
            }
            if self.plan.cut {
                return false;
            }
        }
        if let Err(why) = self.place_moved(moves, &mut placer) {
            refusals = why;
        }
        let wanted = Reservation::of(rollout.manifest);
        let placed = match (rollout.manifest.per_host, rollout.manifest.data) {
            (true, _) => self.place_per_host(new, &wanted, &mut ordinals),
            (false, true) => self.place_by_data(new, &wanted, &mut placer, &mut ordinals),
            (false, false) => self.place_count(new, &wanted, &mut placer, &mut ordinals),
        };
        if let Err(why) = placed {
            refusals = why;
        }
        if self.plan.missing > 0 {
            self.explain_missing(&refusals);
        }
        refusals.have_shortage()
    }

    pub(super) fn lacks_needs(&mut self, missing: usize) {
        let rollout = self.rollout;
        self.plan.missing = missing;
        self.plan.reasons = rollout.missing_needs().map(|name| needs_reason(rollout.state, name)).collect();
    }

    pub(super) fn explain_missing(&mut self, refusals: &Refusals) {
        let state = self.rollout.state;
        let name = |host| state.host(host).map_or_else(|| host.to_string(), |record| record.shown());
        let wanted = Reservation::of(self.rollout.manifest);
        self.plan.reasons = refusals.sentences(&wanted, state.hosts.len(), name);
    }

    /// Instances to place under their next epoch: lost with their host, or given up and due for another try.
    pub(super) fn due_again(
        &mut self,
        excess: &[&Arc<pb::InstanceRecord>],
    ) -> Vec<&'a Arc<pb::InstanceRecord>> {
        let rollout = self.rollout;
        if rollout.troubled.is_empty() {
            return Vec::new();
        }
        let leaving = rollout.turns(false).go;
        let leaving: BTreeSet<u64> = excess.iter().chain(&leaving).map(|instance| instance.id).collect();
        let mut due = Vec::new();
        for instance in rollout.troubled.iter().copied() {
            if leaving.contains(&instance.id) {
                continue;
            }
            match rollout.times.again_at(rollout.state, instance, rollout.is_adrift(instance)) {
                Some(at) if at <= self.now => due.push(instance),
                Some(at) => self.wake_at(at),
                None => {}
            }
        }
        due.sort_by_key(|instance| (rollout.times.version_for(instance), instance.id));
        due
    }

    /// Where instances of the current template are, or with the next step will be no more.
    pub(super) fn census(&self) -> Census {
        let here = self.rollout.current.iter().filter(|instance| !self.rollout.is_adrift(instance));
        Census::new(self.rollout.manifest.spread(), here.map(|instance| instance.host()).collect())
    }

    pub(super) fn place_again(
        &mut self,
        instance: &Arc<pb::InstanceRecord>,
        placer: &mut Placer<'a>,
        ordinals: &mut impl Iterator<Item = u32>,
    ) -> Result<(), Rc<Refusals>> {
        let rollout = self.rollout;
        let version = rollout.times.version_for(instance);
        let Some(manifest) = rollout.entry.manifest(version) else { return Ok(()) };
        if self.plan.steps.len() >= self.budget {
            self.plan.cut = true;
            return Ok(());
        }
        let (conditions, wanted) = (Conditions::of(manifest), Reservation::of(manifest));
        let request = Request { conditions: &conditions, wanted: &wanted };
        let held = rollout.state.instances.get(&instance.id()).map(|entry| &entry.taken);
        let gave_up_on = held.filter(|_| instance.gave_up()).map(|held| (instance.host(), held));
        let same = rollout.entry.template_of(version) == Some(instance.template_version);
        let ordinal = if same { instance.ordinal } else { ordinals.next().unwrap_or_default() };
        let data_host = self.data_host(manifest, ordinal);
        let host = match rollout.manifest.per_host {
            true => self.place_back(instance.host(), &request, gave_up_on.map(|(_, held)| held))?,
            false => match data_host {
                Some(host) => self.place_with_data(host, &request, held.filter(|_| instance.gave_up()))?,
                None => placer.place(self.fleet, version, &request, gave_up_on)?,
            },
        };
        let place = self.placement(version, host, ordinal);
        self.push(Step::Place(pb::Place {
            instance_id: instance.id,
            expected_epoch: instance.epoch,
            ..place
        }));
        Ok(())
    }

    /// Where the data of an ordinal is. When that host is lost the instance begins anew elsewhere.
    fn data_host(&self, manifest: &pb::Manifest, ordinal: u32) -> Option<HostId> {
        let host = manifest.data.then(|| self.rollout.entry.record.data_hosts.get(&ordinal)).flatten()?;
        data::lives(self.rollout.state, HostId(*host))
    }

    /// On the host that has its data, or nowhere.
    fn place_with_data(
        &mut self,
        host: HostId,
        request: &Request<'_>,
        held: Option<&Reservation>,
    ) -> Result<HostId, Rc<Refusals>> {
        let others = self.rollout.state.hosts.len() - 1;
        self.place_back(host, request, held).map_err(|refusals| {
            let mut refusals = refusals.as_ref().clone();
            refusals.add_hosts(Lack::Data, others);
            Rc::new(refusals)
        })
    }

    /// On the host where it was, with what it still holds there.
    fn place_back(
        &mut self,
        host: HostId,
        request: &Request<'_>,
        held: Option<&Reservation>,
    ) -> Result<HostId, Rc<Refusals>> {
        match self.fleet.place_on(host, request, held) {
            Ok(()) => Ok(host),
            Err(shortage) => {
                let mut refusals = Refusals::default();
                refusals.add(host, shortage, request.wanted);
                Err(Rc::new(refusals))
            }
        }
    }

    /// Anew, under its own version: one of the version before, which has to leave its host and is not replaced yet.
    fn place_moved(&mut self, moves: usize, placer: &mut Placer<'a>) -> Result<(), Rc<Refusals>> {
        let rollout = self.rollout;
        // Data does not leave with an instance, of whichever version.
        let has_data = |version| rollout.entry.manifest(version).is_some_and(|manifest| manifest.data);
        if rollout.manifest.data {
            return Ok(());
        }
        let leaving = rollout.old.iter().filter(|one| rollout.leaves(one) && !has_data(one.version));
        let mut taken: BTreeSet<(u64, u32)> = BTreeSet::new();
        for (placed, instance) in leaving.take(moves).enumerate() {
            let (version, template) = (instance.version, instance.template_version);
            let Some(manifest) = rollout.entry.manifest(version) else { continue };
            if self.plan.steps.len() >= self.budget {
                self.plan.cut = true;
                return Ok(());
            }
            let (conditions, wanted) = (Conditions::of(manifest), Reservation::of(manifest));
            let request = Request { conditions: &conditions, wanted: &wanted };
            let host = placer
                .place(self.fleet, version, &request, None)
                .inspect_err(|_| self.plan.missing += moves - placed)?;
            let ordinal = rollout.free_ordinals_of(template).find(|free| !taken.contains(&(template, *free)));
            let ordinal = ordinal.unwrap_or_default();
            taken.insert((template, ordinal));
            let place = self.placement(version, host, ordinal);
            self.push(Step::Place(place));
        }
        Ok(())
    }

    fn place_count(
        &mut self,
        new: usize,
        wanted: &Reservation,
        placer: &mut Placer<'a>,
        ordinals: &mut impl Iterator<Item = u32>,
    ) -> Result<(), Rc<Refusals>> {
        let rollout = self.rollout;
        let request = Request { conditions: &rollout.meant.conditions, wanted };
        let version = rollout.entry.record.version;
        let (mut fetched, leaving) = self.fetched_hosts(new);
        let new = new - leaving;
        for placed in 0..new {
            if self.plan.steps.len() >= self.budget {
                self.plan.cut = true;
                return Ok(());
            }
            let ordinal = ordinals.next().unwrap_or_default();
            let host = match self.place_fetched(&mut fetched, &request) {
                Some(host) => {
                    placer.look_again();
                    Ok(host)
                }
                None => placer.place(self.fleet, version, &request, None),
            };
            let host = host.inspect_err(|_| self.plan.missing += leaving + new - placed)?;
            let place = self.placement(version, host, ordinal);
            self.push(Step::Place(place));
        }
        if leaving == 0 {
            return Ok(());
        }
        self.plan.missing += leaving;
        let mut refusals = Refusals::default();
        refusals.add_hosts(Lack::Leaving, leaving);
        Err(Rc::new(refusals))
    }

    /// Each on the host that has its data, and those that have none yet wherever there is room. One that has to wait holds
    /// up no other.
    fn place_by_data(
        &mut self,
        new: usize,
        wanted: &Reservation,
        placer: &mut Placer<'a>,
        ordinals: &mut impl Iterator<Item = u32>,
    ) -> Result<(), Rc<Refusals>> {
        let rollout = self.rollout;
        let request = Request { conditions: &rollout.meant.conditions, wanted };
        let version = rollout.entry.record.version;
        let mut outcome = Ok(());
        for placed in 0..new {
            if self.plan.steps.len() >= self.budget {
                self.plan.cut = true;
                break;
            }
            let ordinal = ordinals.next().unwrap_or_default();
            if usize::try_from(ordinal).is_ok_and(|ordinal| ordinal >= rollout.slots) {
                // The one before it still has the directory.
                self.plan.missing += new - placed;
                let mut refusals = Refusals::default();
                refusals.add_hosts(Lack::Leaving, 1);
                return outcome.and(Err(Rc::new(refusals)));
            }
            let found = match self.data_host(rollout.manifest, ordinal) {
                Some(host) => {
                    let found = self.place_with_data(host, &request, None);
                    placer.look_again();
                    found
                }
                None => placer.place(self.fleet, version, &request, None),
            };
            match found {
                Ok(host) => {
                    let place = self.placement(version, host, ordinal);
                    self.push(Step::Place(place));
                }
                Err(refusals) => {
                    self.plan.missing += 1;
                    outcome = Err(refusals);
                }
            }
        }
        outcome
    }

    /// Hosts that have what a new one needs and may take it now; and how many places of `new` are kept for others that
    /// have it, until those that were stopped there have left.
    fn fetched_hosts(&mut self, new: usize) -> (VecDeque<HostId>, usize) {
        let (mut open, mut leaving) = (VecDeque::new(), 0);
        for (host, state) in self.rollout.fetched_hosts(self.now) {
            match state {
                Ok(()) => open.push_back(host),
                Err(until) if leaving < new => {
                    leaving += 1;
                    self.wake_at(until);
                }
                Err(_) => {}
            }
        }
        (open, leaving)
    }

    /// Where its artifacts are, if there is room.
    fn place_fetched(&mut self, fetched: &mut VecDeque<HostId>, request: &Request<'_>) -> Option<HostId> {
        while let Some(host) = fetched.pop_front() {
            if self.fleet.place_on(host, request, None).is_ok() {
                return Some(host);
            }
        }
        None
    }

    /// One on each host that is meant and has none, up to what the update rules let be under way.
    fn place_per_host(
        &mut self,
        new: usize,
        wanted: &Reservation,
        ordinals: &mut impl Iterator<Item = u32>,
    ) -> Result<(), Rc<Refusals>> {
        let rollout = self.rollout;
        let request = Request { conditions: &rollout.meant.conditions, wanted };
        let here = |instances: &[&Arc<pb::InstanceRecord>]| -> BTreeSet<HostId> {
            instances.iter().map(|instance| instance.host()).collect()
        };
        let mut filled = here(&rollout.current);
        filled.extend(here(&rollout.old));
        let leaving = here(&[rollout.stopping.as_slice(), &rollout.surplus, &rollout.spare].concat());
        let mut refusals = Refusals::default();
        let mut left = new;
        for host in rollout.meant.slot_hosts.difference(&filled) {
            if left == 0 {
                break;
            }
            if leaving.contains(host) {
                refusals.add(*host, Lack::Leaving.into(), wanted);
                self.plan.missing += 1;
                continue;
            }
            if self.plan.steps.len() >= self.budget {
                self.plan.cut = true;
                break;
            }
            match self.fleet.place_on(*host, &request, None) {
                Ok(()) => {
                    left -= 1;
                    let ordinal = ordinals.next().unwrap_or_default();
                    let place = self.placement(rollout.entry.record.version, *host, ordinal);
                    self.push(Step::Place(place));
                }
                Err(shortage) => {
                    refusals.add(*host, shortage, wanted);
                    self.plan.missing += 1;
                }
            }
        }
        if refusals.is_empty() { Ok(()) } else { Err(Rc::new(refusals)) }
    }

    pub(super) fn placement(&self, version: u64, host: HostId, ordinal: u32) -> pb::Place {
        let service = self.rollout.entry.record.name.clone();
        pb::Place { service, version, host_id: host.0, instance_id: 0, expected_epoch: 0, ordinal, run: 0 }
    }

    fn replace(&mut self, blocked: bool, excess: &[&Arc<pb::InstanceRecord>]) {
        let rollout = self.rollout;
        let placed = self.plan.steps.iter().filter_map(placed_again);
        let spared: BTreeSet<u64> = placed.chain(excess.iter().map(|instance| instance.id)).collect();
        let Turns { go: mut victims, fetch } = rollout.turns(blocked);
        victims.retain(|victim| !spared.contains(&victim.id));
        for victim in victims {
            self.stop_each(&[victim], &self.why_replaced(victim));
        }
        self.fetch_ahead(&fetch);
        if rollout.old.is_empty() && rollout.spare.is_empty() && rollout.over() {
            return;
        }
        // Those of the version before stand for others only while some of them leave their hosts.
        let standing = if rollout.rules.leaving.all > 0 { rollout.old.as_slice() } else { &[] };
        let waiting = rollout.current.iter().chain(standing);
        for instance in waiting.filter(|i| i.ready() && !rollout.healthy(i)) {
            self.wake_at(rollout.times.healthy_at(instance));
        }
    }

    /// For those whose turn it is next, as many at a time as the rules allow.
    fn fetch_ahead(&mut self, next: &[&Arc<pb::InstanceRecord>]) {
        let rollout = self.rollout;
        let mut free = rollout.rules.fetches_free();
        for instance in next {
            if rollout.is_fetching(instance) {
                self.plan.stays.push(rollout.why_it_stays(instance));
                continue;
            }
            if free == 0 {
                continue;
            }
            free -= 1;
            let (instance_id, epoch) = (instance.id, instance.epoch);
            let template_version = rollout.meant.template;
            if !self.push(Step::FetchAhead(pb::FetchAhead { instance_id, epoch, template_version })) {
                return;
            }
        }
    }

    fn why_replaced(&self, instance: &Arc<pb::InstanceRecord>) -> String {
        let rollout = self.rollout;
        let record = &rollout.entry.record;
        let moved = instance.template_version == record.template_version
            || (rollout.rules.holds_old() && rollout.leaves(instance));
        if !moved {
            return format!("replaced by version {}", record.version);
        }
        let host = rollout.state.host(instance.host());
        match host {
            Some(host) if host.draining => format!("{} is being drained", host.shown()),
            Some(_) if rollout.is_replaced_for_both(instance) => {
                format!("version {} has another health check and needs more", record.version)
            }
            Some(host) if rollout.has_outgrown(instance) => {
                format!("{} has no room for the limits of version {}", host.shown(), record.version)
            }
            Some(_) | None => "no longer meant for this host".to_owned(),
        }
    }

    fn judge(&mut self) {
        let why = [self.plan.stays.as_slice(), &self.plan.reasons].concat();
        let verdict = self.rollout.verdict(&why, self.now);
        match verdict {
            Verdict::Open => {
                if let Some(deadline) = self.rollout.deadline() {
                    self.wake_at(deadline);
                }
            }
            Verdict::Complete => {}
            // What this plan would have done for the failed version is not worth doing any more.
            Verdict::Failed(_) => {
                self.plan.steps.retain(|step| matches!(step, Step::Forget(_)));
                self.plan.cut = false;
            }
        }
        if let Some(step) = self.rollout.conclude(verdict, self.now) {
            self.push(step);
        }
    }
}

fn placed_again(step: &Step) -> Option<u64> {
    match step {
        Step::Place(place) => Some(place.instance_id),
        Step::Stop(_)
        | Step::SetDeployment(_)
        | Step::Revert(_)
        | Step::Forget(_)
        | Step::Resize(_)
        | Step::GrantRestart(_)
        | Step::FetchAhead(_)
        | Step::ScheduleRun(_) => None,
    }
}

/// Why a needed service holds this one back.
pub(crate) fn needs_reason(state: &ClusterState, name: &str) -> String {
    match state.services.get(name) {
        None => format!("needs {name}, which does not exist; apply its manifest"),
        Some(entry) if entry.record.deleting => format!("needs {name}, which is being deleted"),
        Some(entry) if entry.current().is_some_and(|manifest| manifest.is_job()) => {
            format!("needs {name}, a job that has not succeeded; `nave status {name}` says why")
        }
        Some(_) => format!("needs {name}, which has no ready instance; `nave status {name}` says why"),
    }
}
