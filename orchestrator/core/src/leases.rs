//! Who may act for a host: one leader's memory of beats, and its answer to each. Outside the log, begun anew with
//! each leadership; `nave_proto::lease` has the rules and why they hold.
//!
//! A host is held by one *place* (a data directory since a boot). Another place is let in only once the holder has
//! been silent for so long that nothing it ran under a lease can run any more: after a reboot, or when a disk was put
//! into another machine. Two places that beat at the same time are one identity on two machines: the newer is refused.

use std::collections::BTreeMap;
use std::time::Duration;

use nave_proto::ids::HostId;
use nave_proto::lease::{self, HOLD, KILL, OVERLAP};
use nave_proto::pb;
use pb::{BeatRefusal, HostStatus};

use crate::state::ClusterState;
use crate::wants::ManifestExt as _;

/// One sign of life of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    pub host: HostId,
    /// 0: of an agent or member of an older build, which has none.
    pub place: u64,
}

/// What a beat is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BeatAnswer {
    /// The host has a lease, from when the agent sent the beat.
    Lease,
    /// Heard, which is all that can be said now: the host is lost and first to be called back, or this leader may
    /// not give leases yet.
    Heard,
    Refused {
        why: BeatRefusal,
        /// For a place that is held: until it may try with success, if the other stays silent.
        after: Duration,
    },
}

/// The beats of one leadership. Times are elapsed time of this leader, from any fixed moment.
#[derive(Debug, Clone)]
pub struct Leases {
    leads_since: Duration,
    holders: BTreeMap<HostId, Holder>,
}

#[derive(Debug, Clone, Copy)]
struct Holder {
    place: u64,
    heard: Option<Duration>,
    rival: Option<Rival>,
}

/// Another place that spoke for the host.
#[derive(Debug, Clone, Copy)]
struct Rival {
    place: u64,
    at: Duration,
    /// The holder was heard after it: both are alive.
    proven: bool,
    told: bool,
}

impl Leases {
    /// Of a leadership that began at this moment, or earlier.
    #[must_use]
    pub fn new(leads_since: Duration) -> Self {
        Self { leads_since, holders: BTreeMap::new() }
    }

    /// When this leadership began.
    #[must_use]
    pub fn leads_since(&self) -> Duration {
        self.leads_since
    }

    /// Takes one beat. `may_give`: this leader has proved its leadership just now, and has applied all that was
    /// committed before its term.
    pub fn take(&mut self, state: &ClusterState, beat: Beat, may_give: bool, now: Duration) -> BeatAnswer {
        let Some(record) = state.host(beat.host).filter(|_| !state.hosts.is_gone(beat.host)) else {
            return BeatAnswer::Refused { why: BeatRefusal::Unknown, after: Duration::ZERO };
        };
        let known = record.facts.as_ref().map_or(0, |facts| facts.place);
        let held_by = self.holders.get(&beat.host).map_or(known, |holder| holder.place);
        // Looks at all that the host runs, so it is asked only when it matters: beats come by the thousand.
        let is_rival = beat.place != 0 && held_by != 0 && held_by != beat.place;
        let held_until = is_rival.then(|| self.last_lease(beat.host) + takeover(state, beat.host));
        let holder =
            self.holders.entry(beat.host).or_insert(Holder { place: known, heard: None, rival: None });
        if let Some(held_until) = held_until {
            if now < held_until {
                return holder.refuse(beat.place, held_until, now);
            }
            *holder = Holder { place: beat.place, heard: None, rival: None };
        }
        holder.hear(beat.place, now);
        match may_give && record.status() != HostStatus::Lost {
            true => BeatAnswer::Lease,
            false => BeatAnswer::Heard,
        }
    }

    /// When the host was last heard, by its holder.
    #[must_use]
    pub fn heard(&self, host: HostId) -> Option<Duration> {
        self.holders.get(&host).and_then(|holder| holder.heard)
    }

    /// The hosts heard, and when.
    pub fn all_heard(&self) -> impl Iterator<Item = (HostId, Duration)> + '_ {
        self.holders.iter().filter_map(|(host, holder)| Some((*host, holder.heard?)))
    }

    /// The latest moment at which any leader can have taken a beat of this host that was answered with a lease.
    #[must_use]
    pub fn last_lease(&self, host: HostId) -> Duration {
        let earlier = self.leads_since + OVERLAP;
        self.heard(host).map_or(earlier, |heard| heard.max(earlier))
    }

    /// Hosts for which two places have been found to speak, each told once.
    pub fn take_clones(&mut self) -> Vec<HostId> {
        let mut clones = Vec::new();
        for (host, holder) in &mut self.holders {
            if let Some(rival) = holder.rival.as_mut().filter(|rival| rival.proven && !rival.told) {
                rival.told = true;
                clones.push(*host);
            }
        }
        clones
    }

    /// Drops hosts that are no more, so that the table is as large as the fleet.
    pub fn retain(&mut self, known: impl Fn(HostId) -> bool) {
        self.holders.retain(|host, _| known(*host));
    }
}

impl Holder {
    fn hear(&mut self, place: u64, now: Duration) {
        if place != 0 {
            self.place = place;
        }
        self.heard = Some(now);
        if let Some(rival) = &mut self.rival {
            rival.proven = true;
        }
    }

    fn refuse(&mut self, place: u64, held_until: Duration, now: Duration) -> BeatAnswer {
        // One that gave up long ago says nothing of the next.
        let same = self.rival.filter(|rival| rival.place == place && now.saturating_sub(rival.at) < HOLD);
        let rival = Rival { at: now, ..same.unwrap_or(Rival { place, at: now, proven: false, told: false }) };
        self.rival = Some(rival);
        let why = if rival.proven { BeatRefusal::Cloned } else { BeatRefusal::Held };
        BeatAnswer::Refused { why, after: held_until.saturating_sub(now) }
    }
}

/// How long a holder has to be silent before another place may act for its host: what it runs under a lease has
/// ended by then.
fn takeover(state: &ClusterState, host: HostId) -> Duration {
    fences_ms(state, host).max().map_or(HOLD + KILL, Duration::from_millis)
}

/// The fence of each instance of the host that runs only under a lease.
pub(crate) fn fences_ms(state: &ClusterState, host: HostId) -> impl Iterator<Item = u64> + '_ {
    state.instances_on(host).filter_map(|instance| {
        let entry = state.services.get(&instance.service)?;
        let manifest = entry.manifest(instance.version).or_else(|| entry.current())?;
        manifest.stops_on_disconnect().then(|| fence_ms(manifest))
    })
}

/// For how long a host has to have been without a lease before what it ran by this manifest has certainly ended.
pub(crate) fn fence_ms(manifest: &pb::Manifest) -> u64 {
    let grace = u64::try_from(manifest.stop_grace_ns()).unwrap_or_default();
    lease::fence_ms(Duration::from_nanos(grace))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::liveness::tests::{Fleet, at};

    const HOST: HostId = HostId(1);

    fn beat(place: u64) -> Beat {
        Beat { host: HOST, place }
    }

    fn refusal(answer: BeatAnswer) -> Option<(BeatRefusal, u64)> {
        match answer {
            BeatAnswer::Refused { why, after } => Some((why, after.as_secs())),
            BeatAnswer::Lease | BeatAnswer::Heard => None,
        }
    }

    #[test]
    fn a_lost_host_and_an_unproven_leader_get_no_lease() {
        let table = [
            (HostStatus::Connected, true, BeatAnswer::Lease),
            (HostStatus::Silent, true, BeatAnswer::Lease),
            (HostStatus::Lost, true, BeatAnswer::Heard),
            (HostStatus::Connected, false, BeatAnswer::Heard),
        ];
        for (status, may_give, expected) in table {
            let mut leases = Leases::new(at(0.0));
            let state = Fleet::of(&[status]).state();
            assert_eq!(leases.take(&state, beat(0), may_give, at(1.0)), expected, "{status:?} {may_give}");
            assert_eq!(leases.heard(HOST), Some(at(1.0)), "heard in any case");
        }
    }

    #[test]
    fn a_host_that_is_not_known_or_was_given_up_is_refused() {
        let mut fleet = Fleet::of(&[HostStatus::Connected, HostStatus::Lost]);
        fleet.instance(2, "own", None);
        fleet.forget(2);
        let mut leases = Leases::new(at(0.0));
        for host in [HostId(2), HostId(9)] {
            let answer = leases.take(&fleet.state(), Beat { host, place: 5 }, true, at(1.0));
            assert_eq!(refusal(answer), Some((BeatRefusal::Unknown, 0)));
            assert_eq!(leases.heard(host), None);
        }
    }

    #[test]
    fn a_second_place_is_refused_while_the_first_may_run_anything() {
        let state = Fleet::of(&[HostStatus::Connected]).state();
        let mut leases = Leases::new(at(0.0));
        assert_eq!(leases.take(&state, beat(7), true, at(1.0)), BeatAnswer::Lease);
        assert_eq!(
            leases.take(&state, beat(7), true, at(2.0)),
            BeatAnswer::Lease,
            "a restart in the same place"
        );
        // A reboot: the holder is not heard again.
        assert_eq!(refusal(leases.take(&state, beat(8), true, at(4.0))), Some((BeatRefusal::Held, 12)));
        assert_eq!(refusal(leases.take(&state, beat(8), true, at(15.9))), Some((BeatRefusal::Held, 0)));
        assert_eq!(leases.heard(HOST), Some(at(2.0)), "what is refused is no sign of life");
        assert_eq!(leases.take(&state, beat(8), true, at(16.0)), BeatAnswer::Lease);
        assert_eq!(refusal(leases.take(&state, beat(7), true, at(17.0))), Some((BeatRefusal::Held, 13)));
    }

    #[test]
    fn two_places_that_take_turns_are_one_identity_on_two_machines() {
        let state = Fleet::of(&[HostStatus::Connected]).state();
        let mut leases = Leases::new(at(0.0));
        for second in 1..60_u32 {
            let now = at(f64::from(second));
            assert_eq!(
                leases.take(&state, beat(7), true, now),
                BeatAnswer::Lease,
                "the first goes on, {second}"
            );
            let expected = if second == 1 { BeatRefusal::Held } else { BeatRefusal::Cloned };
            let answer = refusal(leases.take(&state, beat(8), true, now));
            assert_eq!(answer.map(|(why, _)| why), Some(expected), "{second}");
            let told = leases.take_clones();
            assert_eq!(told.len(), usize::from(second == 2), "said once, {second}");
        }
    }

    #[test]
    fn a_new_leader_knows_the_place_from_the_log_and_waits_in_full() {
        let mut fleet = Fleet::of(&[HostStatus::Connected]);
        fleet.place(1, 7);
        fleet.instance(1, "single", Some(at(20.0)));
        let state = fleet.state();
        let mut leases = Leases::new(at(100.0));
        let until = at(100.0) + OVERLAP + Duration::from_millis(lease::fence_ms(at(20.0)));
        assert!(refusal(leases.take(&state, beat(8), true, until - at(0.001))).is_some());
        assert_eq!(leases.heard(HOST), None);
        let mut other = Leases::new(at(100.0));
        assert_eq!(other.take(&state, beat(7), true, at(100.1)), BeatAnswer::Lease);
        assert_eq!(other.last_lease(HOST), at(100.5), "the leader before may have given one since");
        assert_eq!(leases.take(&state, beat(8), true, until), BeatAnswer::Lease);
    }
}
