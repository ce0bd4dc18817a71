//! A change of how readiness is checked starts no process anew, but may find all of them unready at once. So instances
//! that are ready go over to the new check a few at a time, each counts as healthy only once the check could have said
//! no, and a version whose check fails ends as one whose processes fail.

use std::sync::Arc;

use nave_proto::pb;

use super::rollout::Rollout;
use crate::limits::SECOND_NS;
use crate::state::{Reservation, ServiceEntry};
use crate::wants::{InstanceExt as _, nanos};

/// From this command format on, a new check is not in force everywhere at once.
pub(crate) const RECHECKS: u32 = 8;

/// An agent calls one that was ready unready after so many failures in a row (`READY_FAILURES_MAX` of its core).
const FAILURES: i64 = 3;
/// Until what an agent sees is in the log.
const WORD_NS: i64 = 2 * SECOND_NS;

/// Whether what is ready by the old manifest may be unready by the new one.
pub(crate) fn checks_differ(old: &pb::Manifest, new: &pb::Manifest) -> bool {
    let check = |manifest: &pb::Manifest| manifest.health.as_ref().and_then(|health| health.ready.clone());
    check(new).is_some_and(|new| check(old).as_ref() != Some(&new))
}

/// Whether a change that starts no process anew has instances replaced all the same: a new check needs its turns, more
/// room needs it at once, so both together come with a new instance, a few at a time and each proven before an old one
/// goes.
#[must_use]
pub fn replaces(old: &pb::Manifest, new: &pb::Manifest) -> bool {
    checks_differ(old, new) && !Reservation::of(new).is_within(&Reservation::of(old))
}

/// For how long one that goes over to this check, and was ready, may still be called ready by mistake.
pub(crate) fn proof_ns(manifest: &pb::Manifest) -> i64 {
    let Some(check) = manifest.health.as_ref().and_then(|health| health.ready.as_ref()) else { return 0 };
    let round = nanos(check.interval.as_ref(), SECOND_NS).saturating_add(nanos(check.timeout.as_ref(), 0));
    round.saturating_mul(FAILURES).saturating_add(WORD_NS)
}

/// Versions before the current one whose processes it takes over as they are, and whose check it does not.
pub(crate) fn versions(entry: &ServiceEntry, manifest: &pb::Manifest) -> Vec<u64> {
    let (current, wanted) = (&entry.record, Reservation::of(manifest));
    let takes_over =
        |old: &pb::Manifest| checks_differ(old, manifest) && wanted.is_within(&Reservation::of(old));
    let same = entry.versions.iter().filter(|row| {
        row.version != current.version
            && row.template_version == current.template_version
            && row.manifest.as_deref().is_some_and(takes_over)
    });
    same.map(|row| row.version).collect()
}

impl<'a> Rollout<'a> {
    /// Current instances that are still checked as a version before says.
    pub(crate) fn unchecked(&self) -> impl Iterator<Item = &'a Arc<pb::InstanceRecord>> {
        let old = |instance: &&&Arc<pb::InstanceRecord>| self.meant.rechecks.contains(&instance.version);
        self.current.iter().filter(old).copied()
    }

    /// Those of them that go over now: all that are not ready, which cannot become worse, and so many others that no
    /// more than `max_parallel` slots are without a healthy instance should the check fail.
    pub(crate) fn recheck(&self) -> Vec<&'a Arc<pb::InstanceRecord>> {
        if self.rules.halted || self.meant.rechecks.is_empty() {
            return Vec::new();
        }
        let mut free = self.rules.rechecks_free();
        let mut turns: Vec<_> = self.unchecked().collect();
        turns.sort_by_key(|instance| (instance.ready(), std::cmp::Reverse((instance.ordinal, instance.id))));
        turns.retain(|instance| {
            let goes = !instance.ready() || free > 0;
            free = free.saturating_sub(usize::from(instance.ready()));
            goes
        });
        turns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(path: &str) -> pb::Manifest {
        let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
        let check = Some(pb::probe::Check::Http(path.to_owned()));
        let ready = pb::Probe { check, interval: seconds(2), timeout: seconds(1), ..Default::default() };
        pb::Manifest {
            health: Some(pb::Health { ready: Some(ready), ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn only_a_check_that_may_say_no_is_another_one() {
        let none = pb::Manifest::default();
        for (old, new, differ) in [
            (checked("/a"), checked("/b"), true),
            (none.clone(), checked("/a"), true),
            (checked("/a"), none.clone(), false),
            (checked("/a"), checked("/a"), false),
            (none.clone(), none, false),
        ] {
            assert_eq!(checks_differ(&old, &new), differ, "{old:?} {new:?}");
        }
        assert_eq!(proof_ns(&checked("/a")), 11 * SECOND_NS);
    }
}
