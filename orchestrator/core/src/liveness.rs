//! Which hosts are lost: the verdicts that belong into the log, by one leader that hears beats outside it.
//!
//! A host not heard for a lease ([`TTL`]) is lost, and what it ran is placed again. A new leader waits as long for its
//! agents to be heard before it judges. What a lost host ran with `on_disconnect = "stop"` waits longer: for each such
//! grace it is logged, once, that the host has been without a lease for long enough (`nave_proto::lease`).
//!
//! **The brake.** When more than max(1, a fifth) of the hosts fall silent within a minute, it is more likely us than
//! them: none is judged, the silent ones are marked so in the log where people see it, and judging goes on only
//! once so many have returned, or been given up, that the rest are few. Who was silent with those that return has a
//! lease's time to return as well. Hosts fall silent at once and are noticed
//! within a beat of each other, so a verdict waits for a moment while others are *late*.
//!
//! **Flapping.** A host that is lost again and again is called back only after it has been heard for ever longer.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use nave_proto::ids::HostId;
use nave_proto::lease::{OVERLAP, TTL};
use nave_proto::pb;
use pb::HostStatus;

use crate::leases::{Leases, fences_ms};
use crate::state::ClusterState;

/// Hosts that fall silent within this time count together.
const TOGETHER: Duration = Duration::from_secs(60);
/// A host not heard for so long is late: a beat, and what its way takes on a slow machine. Hosts that died at one
/// moment differ in the age of their last beat by a beat and a member's forwarding, so when the first is due the
/// last is late.
const LATE: Duration = Duration::from_millis(1_700);
/// How long a verdict waits for hosts that are late. Together with the rest it stays below the 5 s promised.
const WAIT: Duration = Duration::from_millis(1_000);
/// Two losses further apart than this have nothing to do with each other.
const FLAPPING: Duration = Duration::from_secs(600);
/// The longest time that a host has to be heard before it is called back.
const TRUST_MAX: Duration = Duration::from_secs(60);

/// A change of a host's status that belongs into the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub host: HostId,
    pub status: HostStatus,
    /// For people; empty when all is well.
    pub reason: String,
    /// Of a lost host: for how long it has been without a lease, for certain. 0: nothing new is said of that.
    pub lease_over_ms: u64,
}

impl Verdict {
    fn new(host: HostId, status: HostStatus, reason: impl Into<String>) -> Self {
        Self { host, status, reason: reason.into(), lease_over_ms: 0 }
    }

    /// As the log takes it.
    #[must_use]
    pub fn command(&self) -> pb::SetHostStatus {
        pb::SetHostStatus {
            host_id: self.host.0,
            status: self.status.into(),
            reason: self.reason.clone(),
            lease_over_ms: self.lease_over_ms,
        }
    }
}

/// What one leadership remembers. Times are elapsed time of this leader, the same as its [`Leases`] has.
#[derive(Debug, Clone)]
pub struct Judge {
    leads_since: Duration,
    /// Of hosts that have not been heard yet, since when they could have been.
    unheard: BTreeMap<HostId, Duration>,
    /// Until when a host that was lost counts as one of many.
    lost: Option<BTreeMap<HostId, Duration>>,
    flapping: BTreeMap<HostId, Flapping>,
    braking: bool,
    /// When a host that had been silent with others was last heard again.
    returned: Option<Duration>,
}

/// A host that was lost in this leadership.
#[derive(Debug, Clone, Copy)]
struct Flapping {
    losses: u32,
    at: Duration,
    heard_since: Option<Duration>,
}

impl Flapping {
    /// How long it has to be heard: the first time not at all, then 2 s, 4 s and so on.
    fn trust(self) -> Duration {
        match self.losses {
            0 | 1 => Duration::ZERO,
            losses => Duration::from_secs(1 << (losses - 1).min(6)).min(TRUST_MAX),
        }
    }
}

impl Judge {
    /// Of a leadership that began at this moment, or earlier.
    #[must_use]
    pub fn new(leads_since: Duration) -> Self {
        Self {
            leads_since,
            unheard: BTreeMap::new(),
            lost: None,
            flapping: BTreeMap::new(),
            braking: false,
            returned: None,
        }
    }

    /// Whether so many hosts are silent that none is judged.
    #[must_use]
    pub fn is_braking(&self) -> bool {
        self.braking
    }

    /// What is to be said of the hosts now. `wall_unix_ns`: the leader's wall time, only to see from the log which
    /// hosts an earlier leader lost within the last minute.
    pub fn look(
        &mut self,
        state: &ClusterState,
        leases: &Leases,
        now: Duration,
        wall_unix_ns: i64,
    ) -> Vec<Verdict> {
        // A leader that has heard nothing yet counts from its own beginning; and who joins later, from its first look.
        let unheard_since = if self.lost.is_none() { self.leads_since + OVERLAP } else { now };
        self.remember(state, now, wall_unix_ns);
        let mut verdicts = Vec::new();
        let mut look = Look::default();
        for record in state.hosts() {
            let host = HostId(record.id);
            let heard = leases.heard(host).filter(|heard| *heard + TTL > now);
            match (heard, record.status()) {
                (Some(_), HostStatus::Lost) if !record.forgotten => {
                    if self.is_trusted(host, now) {
                        verdicts.push(Verdict::new(host, HostStatus::Connected, ""));
                    }
                }
                (Some(_), HostStatus::Silent) => {
                    self.returned = Some(now);
                    verdicts.push(Verdict::new(host, HostStatus::Connected, ""));
                }
                (_, HostStatus::Lost) => {
                    if let Some(flapping) = self.flapping.get_mut(&host) {
                        flapping.heard_since = None;
                    }
                    verdicts.extend(lease_over(state, record, leases, now));
                }
                (heard, HostStatus::Connected | HostStatus::Silent | HostStatus::Unspecified) => {
                    let since = match heard.or_else(|| leases.heard(host)) {
                        Some(heard) => {
                            self.unheard.remove(&host);
                            heard
                        }
                        None => *self.unheard.entry(host).or_insert(unheard_since),
                    };
                    look.sort(host, since, now);
                }
            }
        }
        verdicts.extend(self.judge(state, &look, now));
        verdicts
    }

    /// Hosts that are lost by the log alone, at the first look; later, forgets what is too long ago.
    fn remember(&mut self, state: &ClusterState, now: Duration, wall_unix_ns: i64) {
        let lost = self.lost.get_or_insert_with(|| {
            let lost =
                state.hosts().filter(|record| record.status() == HostStatus::Lost && !record.forgotten);
            lost.filter_map(|record| {
                let age = wall_unix_ns.saturating_sub(record.lost_unix_ns).max(0);
                let left = TOGETHER.checked_sub(Duration::from_nanos(age.unsigned_abs()))?;
                Some((HostId(record.id), now + left))
            })
            .collect()
        });
        let known = |host: &HostId| state.host(*host).is_some_and(|record| !record.forgotten);
        lost.retain(|host, until| *until > now && known(host));
        self.unheard.retain(|host, _| known(host));
        self.flapping.retain(|host, flapping| now.saturating_sub(flapping.at) < FLAPPING && known(host));
    }

    fn is_trusted(&mut self, host: HostId, now: Duration) -> bool {
        let Some(flapping) = self.flapping.get_mut(&host) else { return true };
        let since = *flapping.heard_since.get_or_insert(now);
        now.saturating_sub(since) >= flapping.trust()
    }

    fn judge(&mut self, state: &ClusterState, look: &Look, now: Duration) -> Vec<Verdict> {
        let hosts = state.hosts().filter(|record| !record.forgotten).count();
        let few = (hosts / 5).max(1);
        let lost = self.lost.get_or_insert_default();
        // A host that has come back since it was lost, and a verdict not applied yet, count once.
        let together: BTreeSet<_> = look.silent.keys().chain(lost.keys()).collect();
        let late = look.late.iter().filter(|host| !together.contains(host)).count();
        self.braking = !look.silent.is_empty() && together.len() > few;
        if self.braking {
            return unsaid(state, look, together.len(), hosts);
        }
        let waits = |since: &Duration| together.len() + late > few && *since + TTL + WAIT > now;
        // Those that return do so one after another.
        let returning = self.returned.is_some_and(|at| at + TTL > now);
        let is_said =
            |host: &HostId| state.host(*host).is_some_and(|record| record.status() == HostStatus::Silent);
        let mut verdicts = Vec::new();
        for (host, since) in &look.silent {
            if waits(since) || returning && is_said(host) {
                continue;
            }
            let reason = format!("not heard for {} s", TTL.as_secs());
            verdicts.push(Verdict::new(*host, HostStatus::Lost, reason));
        }
        for verdict in &verdicts {
            let since = look.silent.get(&verdict.host).copied().unwrap_or(now);
            lost.insert(verdict.host, since + TOGETHER);
            let flapping = self.flapping.entry(verdict.host).or_insert(Flapping {
                losses: 0,
                at: now,
                heard_since: None,
            });
            // A verdict that was not committed is passed again at the next look.
            if flapping.losses == 0 || flapping.heard_since.is_some() {
                flapping.losses = flapping.losses.saturating_add(1);
            }
            (flapping.at, flapping.heard_since) = (now, None);
        }
        verdicts
    }
}

/// The hosts not heard, by how long.
#[derive(Debug, Default)]
struct Look {
    /// With the moment of the last beat.
    silent: BTreeMap<HostId, Duration>,
    late: BTreeSet<HostId>,
}

impl Look {
    fn sort(&mut self, host: HostId, since: Duration, now: Duration) {
        if since + TTL <= now {
            self.silent.insert(host, since);
        } else if since + LATE <= now {
            self.late.insert(host);
        }
    }
}

/// Marks what is silent while the brake is on, each host once.
fn unsaid(state: &ClusterState, look: &Look, together: usize, hosts: usize) -> Vec<Verdict> {
    let reason = format!(
        "{together} of {hosts} hosts fell silent within a minute: none is replaced until most return; look at the \
         network between the hub and the hosts, or give one up with `nave hosts forget HOST`"
    );
    let is_said =
        |host: &HostId| state.host(*host).is_some_and(|record| record.status() == HostStatus::Silent);
    let unsaid = look.silent.keys().filter(|host| !is_said(host));
    unsaid.map(|host| Verdict::new(*host, HostStatus::Silent, reason.clone())).collect()
}

/// What the log has yet to know about the lease of a lost host: only when it opens a fence.
fn lease_over(
    state: &ClusterState,
    record: &pb::HostRecord,
    leases: &Leases,
    now: Duration,
) -> Option<Verdict> {
    let host = HostId(record.id);
    let over = now.saturating_sub(leases.last_lease(host));
    let over_ms = u64::try_from(over.as_millis()).unwrap_or(u64::MAX);
    let opens = fences_ms(state, host).any(|fence| record.lease_over_ms < fence && fence <= over_ms);
    opens.then(|| Verdict {
        lease_over_ms: over_ms,
        ..Verdict::new(host, HostStatus::Lost, record.status_reason.clone())
    })
}

#[cfg(test)]
pub(crate) mod tests;
