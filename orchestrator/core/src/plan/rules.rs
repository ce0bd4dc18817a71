//! The rules of replacement as arithmetic: how many instances of a service there are of each kind, and what may be
//! added or taken away then. Plan counts once and chooses; apply counts once per command and checks each step.
//!
//! *Start-first*: a new instance is started beside the old ones, at most `max_parallel` not healthy at a time, and
//! an old one stops once a healthy new one stands for it. *Canary*: so many new ones come beside (stop-first: in the
//! place of) old ones, and the rest waits for a promotion. *Stop-first* (fixed ports, `per_host`): at most
//! `max_parallel` slots are empty or not healthy at a time; those that stand in nobody's place go as others come.

/// What the rules depend on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Rules {
    /// Instances that should be there in the end.
    pub(crate) slots: usize,
    pub(crate) max_parallel: usize,
    pub(crate) stop_first: bool,
    /// The deployment has failed, is paused or cancelled.
    pub(crate) halted: bool,
    /// Not yet promoted: so many of the new template and no more; 0: all.
    pub(crate) canary: usize,
    /// Of the template wanted now, on a host where they may stay.
    pub(crate) current: Count,
    /// To be replaced: of another template, or on a host that they have to leave.
    pub(crate) old: Count,
    /// Those among the old that are of another template, on a host that is being drained.
    pub(crate) leaving: Count,
    /// In nobody's place, to go once enough others are ready.
    pub(crate) spare: Count,
    /// Those among the old and the spare that are of another template.
    pub(crate) old_templates: usize,
    /// Those among the old whose hosts are fetching what their successors need.
    pub(crate) fetching: usize,
    /// Empty slots whose data is on a host that is being drained.
    pub(crate) stranded: usize,
}

/// Instances of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) all: usize,
    pub(crate) ready: usize,
    /// Ready for long enough, or done.
    pub(crate) healthy: usize,
}

impl Count {
    pub(crate) fn add(&mut self, ready: bool, healthy: bool) {
        self.all += 1;
        self.ready += usize::from(ready);
        self.healthy += usize::from(healthy);
    }

    pub(crate) fn remove(&mut self, ready: bool, healthy: bool) {
        self.all -= 1;
        self.ready -= usize::from(ready);
        self.healthy -= usize::from(healthy);
    }
}

impl Rules {
    /// A version that failed or is paused replaces nothing more; what runs of the version before is left alone.
    pub(crate) fn frozen(&self) -> bool {
        self.halted && self.old_templates > 0
    }

    /// The version before still stands, and is given up only after a promotion.
    pub(crate) fn canarying(&self) -> bool {
        self.canary > 0 && self.old_templates > 0
    }

    /// What runs of the version before stays as it is, whatever the new one does: what goes, goes because of its host.
    pub(crate) fn holds_old(&self) -> bool {
        self.frozen() || (self.canarying() && self.old.all <= self.slots)
    }

    /// Instances of the current template that there shall be, as far as has been decided.
    pub(crate) fn wanted_current(&self) -> usize {
        if self.canarying() { self.canary.min(self.slots) } else { self.slots }
    }

    /// How many instances of the current template may be added now.
    pub(crate) fn may_add(&self) -> usize {
        let missing = self.wanted_current().saturating_sub(self.current.all);
        if self.frozen() {
            return 0;
        }
        if self.old.all == 0 {
            return missing;
        }
        let there = self.current.all + self.old.all;
        if self.stop_first {
            return missing.min(self.slots.saturating_sub(there));
        }
        let unhealthy = self.current.all - self.current.healthy;
        let beside = if self.canarying() { self.canary.max(self.max_parallel) } else { self.max_parallel };
        let spare = self.slots.saturating_add(beside).saturating_sub(there);
        missing.min(self.max_parallel.saturating_sub(unhealthy)).min(spare)
    }

    /// How many instances of the version before may be placed anew while it is held, in the place of those on hosts
    /// that are being drained: the wait for a decision must not hold up a drain.
    pub(crate) fn may_move(&self) -> usize {
        if !self.holds_old() {
            return 0;
        }
        let unhealthy = self.staying_old() - self.staying_old_healthy();
        let stand = self.current.healthy + self.staying_old();
        let missing = self.slots.saturating_sub(stand).min(self.leaving.all);
        missing.min(self.max_parallel.saturating_sub(unhealthy))
    }

    /// Whether one of the version before may leave a host that is being drained, though the version is held.
    pub(crate) fn may_leave(&self, ready: bool) -> bool {
        let stand = self.current.healthy + self.staying_old_healthy();
        let all_ready = self.current.healthy + self.old.ready;
        stand + self.leaving.all > self.slots && (!ready || all_ready > self.slots)
    }

    fn staying_old(&self) -> usize {
        self.old.all - self.leaving.all
    }

    fn staying_old_healthy(&self) -> usize {
        self.old.healthy - self.leaving.healthy
    }

    /// Whether an old instance may be stopped. `leaving`: it is one of those. `held`: what the service needs is not ready,
    /// or has yet to be fetched, so a new one could not take its place.
    pub(crate) fn may_replace(&self, ready: bool, other_template: bool, leaving: bool, held: bool) -> bool {
        if self.holds_old() && leaving && self.may_leave(ready) {
            return true;
        }
        if self.frozen() && other_template {
            return false;
        }
        // Stop-first has to make the room that its canaries take.
        let makes_room = self.stop_first && self.slots.saturating_sub(self.old.all) < self.wanted_current();
        if self.holds_old() && other_template && !makes_room {
            return false;
        }
        let all_ready = self.current.healthy + self.old.ready;
        if self.old.all + self.current.healthy > self.slots {
            return !ready || all_ready > self.slots;
        }
        self.stop_first
            && !held
            && self.in_transit() < self.max_parallel
            && (!ready || all_ready > self.slots.saturating_sub(self.max_parallel))
    }

    /// Whether an old instance may leave its data on a host that is being drained. Who has left such a host before is not
    /// waited for, as nothing can take its place; who left for another reason is.
    pub(crate) fn may_strand(&self, ready: bool, other_template: bool, held: bool) -> bool {
        let others = Self { slots: self.slots.saturating_sub(self.stranded), ..*self };
        others.may_replace(ready, other_template, false, held)
    }

    /// How many more hosts of old instances may fetch what their successors need: no more at a time than may be replaced.
    pub(crate) fn fetches_free(&self) -> usize {
        self.max_parallel.saturating_sub(self.fetching)
    }

    /// Whether an old instance may be stopped to make room for a new one.
    pub(crate) fn may_make_room(&self, ready: bool) -> bool {
        !ready && !self.frozen() && self.in_transit() < self.max_parallel
    }

    /// Whether a current instance is one too many.
    pub(crate) fn may_drop(&self, ready: bool) -> bool {
        self.current.all > self.slots && (!ready || self.current.ready > self.slots)
    }

    /// Whether one that stands in nobody's place may be stopped.
    pub(crate) fn may_spare(&self, ready: bool, other_template: bool) -> bool {
        if self.frozen() && other_template {
            return false;
        }
        let all_ready = self.current.healthy + self.old.ready + self.spare.ready;
        !ready || all_ready > self.slots.saturating_sub(self.max_parallel)
    }

    /// Whether another check may say from now on whether one is ready: it may say no.
    pub(crate) fn may_recheck(&self, ready: bool) -> bool {
        !self.halted && (!ready || self.rechecks_free() > 0)
    }

    /// How many that are ready may go over to another check, should it find all of them unready.
    pub(crate) fn rechecks_free(&self) -> usize {
        self.max_parallel.saturating_sub(self.slots.saturating_sub(self.current.healthy))
    }

    /// Slots with neither an old instance nor a healthy new one.
    fn in_transit(&self) -> usize {
        self.slots.saturating_sub(self.old.all + self.current.healthy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(stop_first: bool, current: (usize, usize), old: (usize, usize)) -> Rules {
        let count = |(all, ready)| Count { all, ready, healthy: ready };
        let (current, old) = (count(current), count(old));
        Rules {
            slots: 3,
            max_parallel: 1,
            stop_first,
            current,
            old,
            old_templates: old.all,
            ..Default::default()
        }
    }

    #[test]
    fn start_first_adds_beside_and_stops_once_one_stands_for_it() {
        for (current, old, add, replace_ready) in [
            ((0, 0), (3, 3), 1, false),
            ((1, 0), (3, 3), 0, false),
            ((1, 1), (3, 3), 0, true),
            ((1, 1), (2, 2), 1, false),
            ((3, 3), (1, 1), 0, true),
            ((3, 2), (1, 1), 0, false),
        ] {
            let rules = rules(false, current, old);
            let found = (rules.may_add(), rules.may_replace(true, true, false, false));
            assert_eq!(found, (add, replace_ready), "{current:?} {old:?}");
        }
    }

    #[test]
    fn stop_first_empties_a_slot_before_it_fills_it() {
        for (current, old, add, replace_ready) in [
            ((0, 0), (3, 3), 0, true),
            ((0, 0), (2, 2), 1, false),
            ((1, 0), (2, 2), 0, false),
            ((1, 1), (2, 2), 0, true),
            ((1, 1), (2, 1), 0, false),
        ] {
            let rules = rules(true, current, old);
            let found = (rules.may_add(), rules.may_replace(true, true, false, false));
            assert_eq!(found, (add, replace_ready), "{current:?} {old:?}");
            assert!(!rules.may_replace(true, true, false, true), "held back");
        }
    }

    #[test]
    fn who_leaves_its_data_on_a_drained_host_does_not_wait_for_others_that_did() {
        for (current, old, stranded, rollout, leaves) in [
            ((0, 0), (3, 3), 0, true, true),
            ((0, 0), (2, 2), 1, false, true),
            ((0, 0), (1, 1), 2, false, true),
            ((0, 0), (2, 2), 0, false, false),
            ((1, 0), (1, 1), 1, false, false),
            ((1, 1), (1, 1), 1, false, true),
            ((0, 0), (2, 1), 1, false, false),
        ] {
            let rules = Rules { stranded, ..rules(true, current, old) };
            let found = (rules.may_replace(true, true, false, false), rules.may_strand(true, true, false));
            assert_eq!(found, (rollout, leaves), "{current:?} {old:?} {stranded}");
        }
    }

    #[test]
    fn spare_ones_go_as_others_come() {
        for (current, old, spare, go) in [
            ((0, 0), (1, 1), 2, true),
            ((0, 0), (1, 1), 1, false),
            ((1, 0), (1, 1), 1, false),
            ((1, 1), (1, 1), 1, true),
            ((2, 1), (0, 0), 1, false),
        ] {
            let spare = Count { all: spare, ready: spare, healthy: spare };
            let rules = Rules { spare, ..rules(true, current, old) };
            assert_eq!(rules.may_spare(true, false), go, "{current:?} {old:?} {spare:?}");
            assert!(rules.may_spare(false, false), "one that is not ready stands in for nobody");
        }
    }

    #[test]
    fn canaries_come_beside_the_old_ones_and_the_rest_waits() {
        let canary = |stop_first, current, old| Rules {
            canary: 2,
            max_parallel: 2,
            ..rules(stop_first, current, old)
        };
        for (stop_first, current, old, add, replace_ready) in [
            (false, (0, 0), (3, 3), 2, false),
            (false, (1, 0), (3, 3), 1, false),
            (false, (2, 2), (3, 3), 0, false),
            (true, (0, 0), (3, 3), 0, true),
            (true, (0, 0), (2, 2), 1, true),
            (true, (0, 0), (1, 1), 2, false),
            (true, (2, 2), (1, 1), 0, false),
        ] {
            let rules = canary(stop_first, current, old);
            let found = (rules.may_add(), rules.may_replace(true, true, false, false));
            assert_eq!(found, (add, replace_ready), "{stop_first} {current:?} {old:?}");
        }
        let promoted = Rules { canary: 0, ..canary(false, (2, 2), (3, 3)) };
        assert!(promoted.may_replace(true, true, false, false));
    }

    #[test]
    fn what_is_held_leaves_a_host_that_is_drained() {
        let leaving = |all| Count { all, ready: all, healthy: all };
        let halted =
            |current, old, left| Rules { halted: true, leaving: leaving(left), ..rules(false, current, old) };
        for (current, old, left, moves, leaves) in [
            ((1, 0), (3, 3), 1, 1, false),
            ((1, 0), (4, 3), 1, 0, false),
            ((1, 0), (4, 4), 1, 0, true),
            ((1, 1), (2, 2), 1, 1, false),
            ((1, 0), (3, 3), 0, 0, false),
        ] {
            let rules = halted(current, old, left);
            assert_eq!(
                (rules.may_move(), rules.may_leave(true)),
                (moves, leaves),
                "{current:?} {old:?} {left}"
            );
            assert!(!rules.may_replace(true, true, false, false), "the others stay");
        }
    }

    #[test]
    fn a_halted_deployment_replaces_no_other_template() {
        let halted = Rules { halted: true, ..rules(false, (1, 1), (3, 3)) };
        assert_eq!((halted.may_add(), halted.may_replace(true, true, false, false)), (0, false));
        let only_moving = Rules { old_templates: 0, ..halted };
        assert!(!only_moving.frozen() && only_moving.may_replace(true, false, false, false));
    }
}
