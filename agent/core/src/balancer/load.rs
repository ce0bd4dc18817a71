//! How long an endpoint takes to answer: a peak-sensitive average in one atomic word, so that many workers read and
//! write it without waiting for each other.
//!
//! A sample above the estimate replaces it at once; one below draws it down over `settle`; an endpoint that is not
//! asked is forgiven over `decay`, so that it is tried again. The two differ because a busy endpoint has a hundred
//! samples a second to outlive one hiccup with, while one that is avoided for being slow must not come back that soon.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::Monotonic;

/// One tick is 2^16 ns, 66 µs: 32 bits of them pass in 78 hours, after which an idle endpoint's age reads too short.
const TICK_SHIFT: u32 = 16;
const TICK_SECONDS: f32 = 65_536.0 / 1e9;

/// The estimate in seconds (upper half; 0: none yet) and when it was made (lower half, ticks).
#[derive(Debug, Default)]
pub(super) struct Load(AtomicU64);

impl Load {
    /// Seconds until an answer begins, as of now; `None` before the first sample.
    pub(super) fn estimate(&self, now: Monotonic, decay: Duration) -> Option<f32> {
        let (seconds, made_at) = unpack(self.0.load(Relaxed));
        (seconds > 0.0).then(|| seconds * faded(age(now, made_at), decay))
    }

    /// Takes an answer that began after `took`.
    pub(super) fn observe(&self, now: Monotonic, took: Duration, decay: Duration, settle: Duration) {
        let took = took.as_secs_f32().max(1e-9);
        self.change(
            |seconds, made_at| {
                let age = age(now, made_at);
                let current = seconds * faded(age, decay);
                if took >= current {
                    return Some(took);
                }
                let kept = faded(age, settle);
                (age > 0.0).then_some(current * kept + took * (1.0 - kept))
            },
            now,
        );
    }

    /// Takes that an answer took at least so long: it never lowers the estimate.
    pub(super) fn observe_at_least(&self, now: Monotonic, seconds: f32, decay: Duration) {
        self.change(
            |before, made_at| (seconds > before * faded(age(now, made_at), decay)).then_some(seconds),
            now,
        );
    }

    fn change(&self, new: impl Fn(f32, u32) -> Option<f32>, now: Monotonic) {
        let changed = |word| {
            let (seconds, made_at) = unpack(word);
            new(seconds, made_at).map(|seconds| pack(seconds, tick(now)))
        };
        // `Err`: this sample changes nothing.
        let _unchanged = self.0.fetch_update(Relaxed, Relaxed, changed);
    }
}

fn pack(seconds: f32, made_at: u32) -> u64 {
    u64::from(seconds.to_bits()) << 32 | u64::from(made_at)
}

fn unpack(word: u64) -> (f32, u32) {
    let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).expect("masked to 32 bits");
    (f32::from_bits(half(word >> 32)), half(word))
}

fn tick(now: Monotonic) -> u32 {
    u32::try_from((now.0 >> TICK_SHIFT) & i64::from(u32::MAX)).expect("masked to 32 bits")
}

/// Seconds since then; 0 when another worker's clock reading was a little ahead.
fn age(now: Monotonic, made_at: u32) -> f32 {
    let ticks = tick(now).wrapping_sub(made_at);
    if ticks > u32::MAX / 2 { 0.0 } else { ticks as f32 * TICK_SECONDS }
}

/// What is left after `age` seconds of something that fades with the time constant.
fn faded(age: f32, constant: Duration) -> f32 {
    (-age / constant.as_secs_f32().max(1e-3)).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DECAY: Duration = Duration::from_secs(10);
    const SETTLE: Duration = Duration::from_secs(1);
    const MS: Duration = Duration::from_millis(1);

    fn near(seconds: Option<f32>, wanted: f32) -> bool {
        seconds.is_some_and(|seconds| (seconds - wanted).abs() < wanted * 0.02)
    }

    #[test]
    fn a_peak_counts_at_once_and_wears_off() {
        let load = Load::default();
        let start = Monotonic(5_000_000_000);
        assert_eq!(load.estimate(start, DECAY), None);
        load.observe(start, MS, DECAY, SETTLE);
        assert!(near(load.estimate(start, DECAY), 0.001));
        load.observe(start, MS * 50, DECAY, SETTLE);
        assert!(near(load.estimate(start, DECAY), 0.05));
        let mut now = start;
        for _ in 0..5000 {
            now = now + MS;
            load.observe(now, MS, DECAY, SETTLE);
        }
        assert!(load.estimate(now, DECAY).is_some_and(|seconds| seconds < 0.0015), "{load:?}");
    }

    #[test]
    fn one_that_is_not_asked_is_forgiven_slowly() {
        let load = Load::default();
        load.observe(Monotonic::BOOT, MS * 100, DECAY, SETTLE);
        assert!(near(load.estimate(Monotonic::BOOT + DECAY, DECAY), 0.1 / std::f32::consts::E));
        assert!(load.estimate(Monotonic::BOOT - MS * 5, DECAY).is_some_and(|seconds| seconds <= 0.1));
    }

    #[test]
    fn at_least_never_makes_it_look_faster() {
        let load = Load::default();
        load.observe(Monotonic::BOOT, MS * 10, DECAY, SETTLE);
        load.observe_at_least(Monotonic::BOOT, 0.001, DECAY);
        assert!(near(load.estimate(Monotonic::BOOT, DECAY), 0.01));
        load.observe_at_least(Monotonic::BOOT, 1.0, DECAY);
        assert!(near(load.estimate(Monotonic::BOOT, DECAY), 1.0));
    }
}
