//! The choice itself, over one snapshot: the better of two of this host's endpoints against the better of two of the
//! others'. Small services, which nearly all are, are looked at whole; of large ones two are drawn blindly, and the
//! whole is looked at only when the draws hit nothing good.

use std::sync::Arc;

use rand::Rng;

use super::breaker::{Gate, Probe};
use super::endpoint::{Member, Snapshot, Standing};
use super::pick::{mix, unit};
use super::{Ask, BalancerSettings, NoPick};
use crate::Monotonic;

/// Looked at whole: their atomics are read in less than a microsecond.
const SMALL: usize = 32;
/// With half of the endpoints good, all these draws miss once in 65,536 picks.
const DRAWS: usize = 16;
/// Costs this close are equal: a difference of chance must not send everything to one endpoint.
const EQUAL: f32 = 1.25;

pub(super) struct Scene<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) settings: &'a BalancerSettings,
    pub(super) now: Monotonic,
    pub(super) panic: bool,
}

#[derive(Debug)]
pub(super) struct Chosen<'a> {
    pub(super) member: &'a Arc<Member>,
    pub(super) probe: Option<Probe>,
}

/// A member that may be called, and its share of the draws.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    member: &'a Arc<Member>,
    share: f32,
}

/// What one half of the endpoints (this host's, the others') has to offer.
enum Offer<'a> {
    Nothing,
    Candidate(Candidate<'a>),
    /// One that failed, and whose turn to show itself has come.
    Probe(Chosen<'a>),
}

impl<'a> Scene<'a> {
    pub(super) fn choose<R: Rng + ?Sized>(&self, rng: &mut R, ask: &Ask<'_>) -> Result<Chosen<'a>, NoPick> {
        if let Some(hash) = ask.hash {
            return self.by_hash(hash, ask);
        }
        let (here, elsewhere) = self.snapshot.members.split_at(self.snapshot.locals);
        let here = match self.offer(rng, here, ask) {
            Offer::Probe(probe) => return Ok(probe),
            Offer::Candidate(one) => Some(one),
            Offer::Nothing => None,
        };
        let elsewhere = match self.offer(rng, elsewhere, ask) {
            Offer::Probe(probe) => return Ok(probe),
            Offer::Candidate(one) => Some(one),
            Offer::Nothing => None,
        };
        let member = match (here, elsewhere) {
            (Some(here), Some(elsewhere)) => self.here_or_elsewhere(here, elsewhere),
            (Some(one), None) | (None, Some(one)) => one.member,
            (None, None) => return self.last_resort(ask),
        };
        Ok(Chosen { member, probe: None })
    }

    fn offer<R: Rng + ?Sized>(&self, rng: &mut R, of: &'a [Arc<Member>], ask: &Ask<'_>) -> Offer<'a> {
        let Some(any) = of.first() else { return Offer::Nothing };
        if of.len() > SMALL {
            return self.by_draw(rng, of, ask).map_or_else(|| self.of_many(rng, of, ask), Offer::Candidate);
        }
        let mut room = [Candidate { member: any, share: 0.0 }; SMALL];
        let mut count = 0;
        let probe = self.each_candidate(of, ask, |candidate| {
            room[count] = candidate;
            count += 1;
        });
        match probe {
            Some(probe) => Offer::Probe(probe),
            None => self.of_two(rng, &room[..count]),
        }
    }

    fn of_many<R: Rng + ?Sized>(&self, rng: &mut R, of: &'a [Arc<Member>], ask: &Ask<'_>) -> Offer<'a> {
        let mut candidates = Vec::new();
        match self.each_candidate(of, ask, |candidate| candidates.push(candidate)) {
            Some(probe) => Offer::Probe(probe),
            None => self.of_two(rng, &candidates),
        }
    }

    /// All that are ready and may be called. When the turn of one that fails has come, that one is the choice.
    fn each_candidate(
        &self,
        of: &'a [Arc<Member>],
        ask: &Ask<'_>,
        mut take: impl FnMut(Candidate<'a>),
    ) -> Option<Chosen<'a>> {
        for member in of {
            if member.shared.standing() != Standing::Ready || was_tried(member, ask) {
                continue;
            }
            if let Some(probe) = member.shared.breaker.try_probe(self.now) {
                return Some(Chosen { member, probe: Some(probe) });
            }
            if self.admits(member) {
                take(self.candidate(member));
            }
        }
        None
    }

    fn admits(&self, member: &Member) -> bool {
        match member.shared.breaker.gate() {
            Gate::Closed => true,
            Gate::Open { unreached, .. } | Gate::Probing { unreached } => self.panic && !unreached,
        }
    }

    fn candidate(&self, member: &'a Arc<Member>) -> Candidate<'a> {
        Candidate { member, share: member.share(self.now, self.settings) }
    }

    /// The better of two of many, by chance alone: each draw is as likely to be kept as its share is of the largest.
    fn by_draw<R: Rng + ?Sized>(
        &self,
        rng: &mut R,
        of: &'a [Arc<Member>],
        ask: &Ask<'_>,
    ) -> Option<Candidate<'a>> {
        let largest = self.snapshot.weight_max as f32;
        let mut first: Option<Candidate<'a>> = None;
        for _ in 0..DRAWS {
            let member = &of[rng.random_range(0..of.len())];
            let is_other = first.is_none_or(|first| !Arc::ptr_eq(first.member, member));
            if member.shared.standing() != Standing::Ready || was_tried(member, ask) || !is_other {
                continue;
            }
            if !self.admits(member) {
                if self.is_due(member) {
                    return None; // it is probed when all are looked at
                }
                continue;
            }
            let candidate = self.candidate(member);
            if rng.random::<f32>() * largest > candidate.share {
                continue;
            }
            match first {
                None => first = Some(candidate),
                Some(first) => return Some(self.better(first, candidate)),
            }
        }
        None
    }

    fn is_due(&self, member: &Member) -> bool {
        match member.shared.breaker.gate() {
            Gate::Open { until, .. } => until <= self.now,
            Gate::Closed | Gate::Probing { .. } => false,
        }
    }

    /// The better of two, drawn by share.
    fn of_two<R: Rng + ?Sized>(&self, rng: &mut R, from: &[Candidate<'a>]) -> Offer<'a> {
        match from {
            [] => Offer::Nothing,
            [one] => Offer::Candidate(*one),
            _ => {
                let first = draw(rng, from, None);
                let second = draw(rng, from, Some(first));
                Offer::Candidate(self.better(from[first], from[second]))
            }
        }
    }

    fn better(&self, first: Candidate<'a>, second: Candidate<'a>) -> Candidate<'a> {
        let (rtt_of_first, rtt_of_second) = self.rtts(first, second);
        let (of_first, of_second) = (rtt_of_first * busy(first), rtt_of_second * busy(second));
        if of_second * EQUAL < of_first { second } else { first }
    }

    /// This host's is preferred while it neither answers clearly more slowly nor has clearly more to do; else the two
    /// are compared as any two are, so that a slow one gets nothing for being near.
    fn here_or_elsewhere(&self, here: Candidate<'a>, elsewhere: Candidate<'a>) -> &'a Arc<Member> {
        let (here_rtt, elsewhere_rtt) = self.rtts(here, elsewhere);
        let (of_here, of_elsewhere) = (here_rtt * busy(here), elsewhere_rtt * busy(elsewhere));
        let preference = self.settings.local_preference;
        let is_near = here_rtt <= elsewhere_rtt * preference && of_here <= of_elsewhere * preference;
        if is_near || of_here <= of_elsewhere { here.member } else { elsewhere.member }
    }

    /// One of which nothing is known is taken to be like the other.
    fn rtts(&self, first: Candidate<'a>, second: Candidate<'a>) -> (f32, f32) {
        let rtt = |one: Candidate<'a>| one.member.shared.load.estimate(self.now, self.settings.decay);
        let default = self.settings.default_rtt.as_secs_f32();
        match (rtt(first), rtt(second)) {
            (Some(first), Some(second)) => (first, second),
            (Some(known), None) | (None, Some(known)) => (known, known),
            (None, None) => (default, default),
        }
    }

    /// Highest random weight: when an endpoint goes, only its own callers move.
    fn by_hash(&self, hash: u64, ask: &Ask<'_>) -> Result<Chosen<'a>, NoPick> {
        let mut best: Option<(f64, &'a Arc<Member>)> = None;
        let probe = self.each_candidate(&self.snapshot.members, ask, |candidate| {
            let key = candidate.member.spec.key;
            let drawn = unit(mix(hash ^ mix(key.instance.0)));
            let weight = f64::from(candidate.member.spec.weight.max(1));
            let score = -weight / drawn.ln();
            if best.is_none_or(|(highest, _)| score > highest) {
                best = Some((score, candidate.member));
            }
        });
        match (probe, best) {
            (Some(probe), _) => Ok(probe),
            (None, Some((_, member))) => Ok(Chosen { member, probe: None }),
            (None, None) => self.last_resort(ask),
        }
    }

    fn last_resort(&self, ask: &Ask<'_>) -> Result<Chosen<'a>, NoPick> {
        self.draining(ask).map_or_else(|| Err(self.why_none(ask)), Ok)
    }

    /// One that is about to stop, but has not: the one with the least to do.
    fn draining(&self, ask: &Ask<'_>) -> Option<Chosen<'a>> {
        let draining = self.snapshot.members.iter().filter(|one| {
            one.shared.standing() == Standing::Draining
                && one.shared.breaker.gate() == Gate::Closed
                && !was_tried(one, ask)
        });
        let member = draining.min_by_key(|one| one.shared.in_flight())?;
        Some(Chosen { member, probe: None })
    }

    fn why_none(&self, ask: &Ask<'_>) -> NoPick {
        let there = || self.snapshot.members.iter().filter(|one| one.shared.standing() != Standing::Gone);
        let callable = || {
            there().filter(|one| match one.shared.standing() {
                Standing::Ready | Standing::Draining => true,
                Standing::Starting | Standing::Gone => false,
            })
        };
        if there().next().is_none() {
            return NoPick::Empty;
        }
        if callable().next().is_none() {
            return NoPick::NoneReady;
        }
        if callable().all(|one| was_tried(one, ask)) {
            return NoPick::AllTried;
        }
        let until = callable().filter_map(|one| match one.shared.breaker.gate() {
            Gate::Open { until, .. } => Some(until),
            Gate::Closed | Gate::Probing { .. } => None,
        });
        NoPick::AllOut { until: until.min() }
    }
}

/// How many times longer a call takes because of those that are there already.
fn busy(one: Candidate<'_>) -> f32 {
    1.0 + one.member.shared.in_flight() as f32 / one.share
}

fn was_tried(member: &Member, ask: &Ask<'_>) -> bool {
    ask.tried.contains(&member.spec.key)
}

/// An index drawn by share, not `except`, which must leave one to draw.
fn draw<R: Rng + ?Sized>(rng: &mut R, from: &[Candidate<'_>], except: Option<usize>) -> usize {
    let others = || from.iter().enumerate().filter(move |(index, _)| Some(*index) != except);
    let total: f32 = others().map(|(_, one)| one.share).sum();
    let mut left = rng.random::<f32>() * total;
    let mut last = 0;
    for (index, one) in others() {
        last = index;
        left -= one.share;
        if left < 0.0 {
            break;
        }
    }
    last
}
