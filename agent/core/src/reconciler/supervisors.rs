//! The supervisors of this host, and which of them wait for a time, drain or are gone.
//!
//! A host of a thousand instances asks that after each event, and most events are about one of them: so it is kept
//! beside them, and nobody changes a supervisor but through here.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;

use nave_proto::ids::InstanceId;

use crate::monotonic::Monotonic;
use crate::supervisor::Supervisor;

/// By instance; to be read as a map.
#[derive(Debug, Clone, Default)]
pub(super) struct Supervisors {
    all: BTreeMap<InstanceId, Supervisor>,
    wakes: BTreeSet<(Monotonic, InstanceId)>,
    draining: BTreeSet<InstanceId>,
    gone: BTreeSet<InstanceId>,
}

/// What is kept of one supervisor beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Marks {
    wake: Option<Monotonic>,
    is_draining: bool,
    is_gone: bool,
}

impl Marks {
    const NONE: Self = Self { wake: None, is_draining: false, is_gone: false };

    fn of(supervisor: &Supervisor) -> Self {
        Self {
            wake: supervisor.next_wake(),
            is_draining: supervisor.is_draining(),
            is_gone: supervisor.is_gone(),
        }
    }
}

impl Deref for Supervisors {
    type Target = BTreeMap<InstanceId, Supervisor>;

    fn deref(&self) -> &Self::Target {
        &self.all
    }
}

impl Supervisors {
    /// `None`: there is no such instance.
    pub(super) fn change<T>(
        &mut self,
        instance: InstanceId,
        change: impl FnOnce(&mut Supervisor) -> T,
    ) -> Option<T> {
        let supervisor = self.all.get_mut(&instance)?;
        let before = Marks::of(supervisor);
        let result = change(supervisor);
        let after = Marks::of(supervisor);
        self.mark(instance, before, after);
        Some(result)
    }

    pub(super) fn change_all(&mut self, mut change: impl FnMut(&mut Supervisor)) {
        let instances: Vec<InstanceId> = self.all.keys().copied().collect();
        for instance in instances {
            self.change(instance, &mut change);
        }
    }

    pub(super) fn insert(&mut self, supervisor: Supervisor) {
        let instance = supervisor.instance();
        let after = Marks::of(&supervisor);
        let before = self.all.insert(instance, supervisor);
        self.mark(instance, before.as_ref().map_or(Marks::NONE, Marks::of), after);
    }

    pub(super) fn remove(&mut self, instance: InstanceId) {
        if let Some(supervisor) = self.all.remove(&instance) {
            self.mark(instance, Marks::of(&supervisor), Marks::NONE);
        }
    }

    /// The earliest time for which one waits.
    pub(super) fn next_wake(&self) -> Option<Monotonic> {
        self.wakes.first().map(|(at, _)| *at)
    }

    /// Whose time has come, by instance.
    pub(super) fn due(&self, now: Monotonic) -> BTreeSet<InstanceId> {
        self.wakes.iter().take_while(|(at, _)| *at <= now).map(|(_, instance)| *instance).collect()
    }

    pub(super) fn draining(&self) -> impl Iterator<Item = InstanceId> + '_ {
        self.draining.iter().copied()
    }

    pub(super) fn gone(&self) -> impl Iterator<Item = InstanceId> + '_ {
        self.gone.iter().copied()
    }

    fn mark(&mut self, instance: InstanceId, before: Marks, after: Marks) {
        if before == after {
            return;
        }
        if let Some(at) = before.wake {
            self.wakes.remove(&(at, instance));
        }
        self.wakes.extend(after.wake.map(|at| (at, instance)));
        put(&mut self.draining, instance, after.is_draining);
        put(&mut self.gone, instance, after.is_gone);
    }
}

fn put(set: &mut BTreeSet<InstanceId>, instance: InstanceId, belongs: bool) {
    if belongs {
        set.insert(instance);
    } else {
        set.remove(&instance);
    }
}
