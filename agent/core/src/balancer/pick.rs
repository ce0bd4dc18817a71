//! One try of a call on one endpoint: it counts as in flight until it is dropped, whatever happens to the call.

use std::sync::Arc;
use std::time::Duration;

use super::breaker::Probe;
use super::endpoint::Member;
use super::{EndpointSpec, Outcome, with_pool};
use crate::Monotonic;

/// See the module's description. Dropped without [`Pick::finish`] it says nothing of the endpoint.
#[derive(Debug)]
pub struct Pick {
    member: Arc<Member>,
    probe: Option<Probe>,
    timed: bool,
    finished: bool,
}

impl Pick {
    pub(super) fn begin(member: Arc<Member>, probe: Option<Probe>) -> Self {
        member.shared.enter();
        Self { member, probe, timed: false, finished: false }
    }

    #[must_use]
    pub fn endpoint(&self) -> &EndpointSpec {
        &self.member.spec
    }

    /// The one call that finds out whether an endpoint that failed is well again.
    #[must_use]
    pub fn is_probe(&self) -> bool {
        self.probe.is_some()
    }

    /// The answer began after `took`, though how it ends is not known yet.
    pub fn first_byte(&mut self, now: Monotonic, took: Duration) {
        if !self.timed {
            self.timed = true;
            let shared = &self.member.shared;
            with_pool(&shared.pool, |pool| {
                shared.load.observe(now, took, pool.settings.decay, pool.settings.settle);
            });
        }
    }

    /// What became of it; `took`: until the answer began, or until it failed. Only the first call counts.
    pub fn finish(&mut self, now: Monotonic, outcome: Outcome, took: Duration) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        match outcome {
            Outcome::Success => self.first_byte(now, took),
            Outcome::Failure | Outcome::Overloaded | Outcome::Unreached | Outcome::Cancelled => {
                self.slow_at_least(now, outcome, took);
            }
        }
        let probe = self.probe.take();
        let shared = &self.member.shared;
        with_pool(&shared.pool, |pool| {
            let settings = &pool.settings.breaker;
            let jitter = self.jitter(pool.settings.seed, now);
            match probe {
                Some(probe) => {
                    if shared.breaker.probed(&probe, now, outcome, settings, jitter) {
                        shared.begin_slowly(now);
                        pool.look_for_panic();
                    }
                }
                None => {
                    if shared.breaker.record(now, outcome, settings, jitter) {
                        pool.ejected();
                    }
                }
            }
        });
    }

    /// A quick failure must not look like a quick answer, and an endpoint that turns calls away is to get fewer.
    fn slow_at_least(&mut self, now: Monotonic, outcome: Outcome, took: Duration) {
        const PENALTY_MAX_SECONDS: f32 = 1.0;
        let shared = &self.member.shared;
        with_pool(&shared.pool, |pool| {
            let settings = &pool.settings;
            let default = settings.default_rtt.as_secs_f32();
            let known = shared.load.estimate(now, settings.decay);
            let penalty = match outcome {
                Outcome::Success | Outcome::Cancelled | Outcome::Failure => 0.0,
                Outcome::Overloaded | Outcome::Unreached => {
                    (known.unwrap_or(default) * 2.0).min(PENALTY_MAX_SECONDS)
                }
            };
            shared.load.observe_at_least(now, took.as_secs_f32().max(penalty), settings.decay);
        });
    }

    /// From 0 to 1, another for each endpoint, agent and time.
    fn jitter(&self, seed: u64, now: Monotonic) -> f64 {
        let key = self.member.spec.key;
        let mixed = mix(seed ^ mix(key.instance.0 ^ mix(key.epoch ^ now.0.cast_unsigned())));
        unit(mixed)
    }
}

impl Drop for Pick {
    fn drop(&mut self) {
        self.member.shared.leave();
        if let Some(probe) = self.probe.take() {
            self.member.shared.breaker.give_back(&probe);
        }
    }
}

/// SplitMix64's finish: every bit of the input changes half of the output's.
pub(super) const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Above 0, below 1.
pub(super) fn unit(value: u64) -> f64 {
    const STEPS: f64 = (1_u64 << 53) as f64;
    ((value >> 11) as f64 + 0.5) / STEPS
}
