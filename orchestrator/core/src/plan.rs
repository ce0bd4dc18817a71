//! The scheduler: what should happen next, from the state alone. It never changes anything: its steps go through
//! the log and are checked again when applied. It is stable (what need not move does not), works in slices, and
//! looks only at services that something has touched since the last look; the whole plan is the same code with a
//! fresh cursor, and the tests' oracle.
//!
//! A plan is made for the state as it is, not for what its own steps will bring: after they are applied, the
//! services they touched are looked at again. So a step lost on the way does no harm either, a service is looked
//! at until a look finds nothing to do.

mod ahead;
mod conditions;
mod data;
mod deployment;
mod explain;
mod job;
mod lack;
mod leaving;
mod meant;
mod needing;
mod placement;
mod queue;
mod recheck;
mod restarts;
mod rollout;
mod rules;
mod score;
mod search;
mod service;
mod standing;
mod times;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nave_proto::pb;

use crate::limits::{HOSTS_JUDGED_PER_SLICE, LOOKS_PER_SLICE};
use crate::state::{ClusterState, ServiceEntry};
use crate::wants::InstanceExt as _;

pub use ahead::fetches_ahead;
pub(crate) use deployment::{canaries, may_conclude};
pub use explain::{About, explain, explained, waits_for};
pub use leaving::{Leaving, leaving};
pub(crate) use needing::may_run;
pub(crate) use placement::Room;
pub use recheck::replaces as replaces_for_both;
pub(crate) use recheck::{RECHECKS, checks_differ};
pub(crate) use restarts::may_restart;
pub(crate) use standing::Standing;
pub(crate) use times::losses;

use placement::Fleet;
use queue::Queue;
use rollout::Rollout;
use service::{ServicePlan, plan_service};

/// What should happen now.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// In order; to be committed together or in slices.
    pub steps: Vec<pb::PlanStep>,
    /// Services, among those looked at, with instances that cannot be placed.
    pub unplaced: Vec<Unplaced>,
    /// When to plan again though nothing changes, unix nanoseconds.
    pub wake_at: Option<i64>,
    /// The limit was reached: plan again once these steps are applied.
    pub more: bool,
}

/// A service with instances that cannot be placed, and why: sentences that account for every host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unplaced {
    pub service: String,
    pub missing: usize,
    pub reasons: Vec<String>,
}

/// How far a planner has looked. The default has seen nothing. Kept in memory by the leader; a new leader, and one
/// whose state was replaced by a snapshot, starts with the default.
#[derive(Debug, Clone, Default)]
pub struct PlanCursor {
    seen: Option<u64>,
    /// Left over from a slice.
    queue: Queue,
    /// Had steps at the last look.
    again: BTreeSet<Arc<str>>,
    /// Had instances without a place.
    unplaced: BTreeSet<Arc<str>>,
    /// The last plan gave room away, perhaps for steps that never took effect.
    given: bool,
    timers: BTreeSet<(i64, Arc<str>)>,
    timer_of: BTreeMap<Arc<str>, i64>,
}

/// The whole plan.
pub fn plan(state: &ClusterState, now: i64) -> Plan {
    look(
        state,
        &mut PlanCursor::default(),
        now,
        Limits { steps: usize::MAX, looks: usize::MAX, hosts: usize::MAX },
    )
}

/// The plan for what has changed since the cursor, what its own steps touched, and what is due by now. At most
/// `limit_steps` steps, and at most [`LOOKS_PER_SLICE`] services looked at; `more` says that something is left.
pub fn plan_dirty(state: &ClusterState, cursor: &mut PlanCursor, now: i64, limit_steps: usize) -> Plan {
    let limits = Limits { steps: limit_steps, looks: LOOKS_PER_SLICE, hosts: HOSTS_JUDGED_PER_SLICE };
    look(state, cursor, now, limits)
}

/// How much one plan may do.
struct Limits {
    steps: usize,
    /// Services looked at.
    looks: usize,
    /// Hosts judged, by all services together; the service that is being looked at goes on to its end.
    hosts: usize,
}

fn look(state: &ClusterState, cursor: &mut PlanCursor, now: i64, limits: Limits) -> Plan {
    cursor.collect(state, now);
    let mut fleet = Fleet::new(state, now);
    let mut plan = Plan::default();
    let mut looks = 0;
    while let Some(name) = cursor.queue.pop_first() {
        looks += 1;
        if plan.steps.len() >= limits.steps || looks > limits.looks || fleet.looked >= limits.hosts {
            cursor.queue.insert(&state.services, &name);
            plan.more = true;
            break;
        }
        let Some(entry) = state.services.get(&name) else {
            cursor.note(&name, &ServicePlan::default());
            continue;
        };
        let part = plan_service(state, &mut fleet, entry, now, limits.steps - plan.steps.len());
        cursor.note(&name, &part);
        plan.add(&name, part);
    }
    cursor.given = fleet.given;
    plan.wake_at = cursor.next_timer(state);
    plan
}

impl Plan {
    fn add(&mut self, name: &str, part: ServicePlan) {
        self.steps.extend(part.steps.into_iter().map(|step| pb::PlanStep { step: Some(step) }));
        self.more |= part.cut;
        if part.missing > 0 {
            let (service, missing, reasons) = (name.to_owned(), part.missing, part.reasons);
            self.unplaced.push(Unplaced { service, missing, reasons });
        }
    }
}

impl PlanCursor {
    /// Puts every service into the queue that has to be looked at.
    fn collect(&mut self, state: &ClusterState, now: i64) {
        let revision = state.revision();
        let services = &state.services;
        let Some(seen) = self.seen.replace(revision) else {
            services.iter().for_each(|entry| self.queue.insert(services, &entry.name));
            return;
        };
        let due = self.timers.iter().take_while(|(at, _)| *at <= now).map(|(_, name)| name);
        let mut dirty: Vec<&Arc<str>> = services.touched_after(seen).chain(&self.again).chain(due).collect();
        if self.given || state.hosts.room_touched > seen {
            dirty.extend(&self.unplaced);
        }
        if state.hosts.fleet_touched > seen {
            dirty.extend(services.per_host());
        }
        dirty.into_iter().for_each(|name| self.queue.insert(services, name));
    }

    /// The first timer of a service that still exists.
    fn next_timer(&mut self, state: &ClusterState) -> Option<i64> {
        while let Some((at, name)) = self.timers.first() {
            if state.services.get(name).is_some() {
                return Some(*at);
            }
            self.timer_of.remove(name);
            self.timers.pop_first();
        }
        None
    }

    /// Keeps what the look at one service says about the next one.
    fn note(&mut self, name: &Arc<str>, part: &ServicePlan) {
        keep(&mut self.again, name, !part.steps.is_empty() || part.cut);
        keep(&mut self.unplaced, name, part.missing > 0 || part.waits_for_room);
        if let Some(at) = self.timer_of.remove(name) {
            self.timers.remove(&(at, Arc::clone(name)));
        }
        if let Some(at) = part.wake_at {
            self.timer_of.insert(Arc::clone(name), at);
            self.timers.insert((at, Arc::clone(name)));
        }
    }
}

fn keep(set: &mut BTreeSet<Arc<str>>, name: &Arc<str>, wanted: bool) {
    if wanted {
        set.insert(Arc::clone(name));
    } else {
        set.remove(name);
    }
}

/// Instances of a service that are wanted and ready.
pub fn ready_count(state: &ClusterState, service: &str) -> usize {
    state.services.get(service).map_or(0, |entry| entry.ready)
}

/// Instances of a service whose process runs, those being stopped included.
pub fn running_count(state: &ClusterState, service: &str) -> usize {
    state.instances_of(service).filter(|instance| instance.running()).count()
}

/// Instances that a service should have now: its count, or with `per_host` the hosts that are meant.
pub fn desired_count(state: &ClusterState, service: &str) -> usize {
    let slots =
        |entry: &ServiceEntry| Rollout::of(state, entry, state.time_unix_ns()).map(|rollout| rollout.slots);
    state.services.get(service).and_then(slots).unwrap_or_default()
}
