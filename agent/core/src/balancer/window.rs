//! Counts of the last ten seconds in ten atomic words: how many there were, and how many of them were of the kind
//! that matters. Shared by the breaker (requests, failures) and the retry budget (requests, retries).

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::Monotonic;

const BUCKETS: usize = 10;
const COUNT_BITS: u32 = 20;
const COUNT_MAX: u64 = (1 << COUNT_BITS) - 1;
const SECOND_MAX: u64 = (1 << (64 - 2 * COUNT_BITS)) - 1;

/// What the window holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counts {
    pub(super) all: u64,
    pub(super) marked: u64,
}

/// Each bucket: the second it counts (24 bits), all (20 bits), marked (20 bits). A count that would overflow stays at
/// its largest, a million a second.
#[derive(Debug, Default)]
pub(super) struct Window([AtomicU64; BUCKETS]);

impl Window {
    pub(super) fn add(&self, now: Monotonic, all: u64, marked: u64) {
        let second = second(now);
        let bucket = &self.0[usize::try_from(second % BUCKETS as u64).expect("less than ten")];
        let add = |word: u64| {
            let before = if word >> (2 * COUNT_BITS) == second { counts(word) } else { Counts::default() };
            let all = (before.all + all).min(COUNT_MAX);
            let marked = (before.marked + marked).min(COUNT_MAX);
            Some(second << (2 * COUNT_BITS) | all << COUNT_BITS | marked)
        };
        let _always = bucket.fetch_update(Relaxed, Relaxed, add);
    }

    /// Of this second and the nine before it.
    pub(super) fn sum(&self, now: Monotonic) -> Counts {
        let second = second(now);
        let words = self.0.iter().map(|bucket| bucket.load(Relaxed));
        let recent = words
            .filter(|word| (second.wrapping_sub(word >> (2 * COUNT_BITS)) & SECOND_MAX) < BUCKETS as u64);
        recent.map(counts).fold(Counts::default(), |sum, one| Counts {
            all: sum.all + one.all,
            marked: sum.marked + one.marked,
        })
    }

    pub(super) fn clear(&self) {
        self.0.iter().for_each(|bucket| bucket.store(0, Relaxed));
    }
}

fn counts(word: u64) -> Counts {
    Counts { all: word >> COUNT_BITS & COUNT_MAX, marked: word & COUNT_MAX }
}

fn second(now: Monotonic) -> u64 {
    u64::try_from(now.0.div_euclid(1_000_000_000) & i64::try_from(SECOND_MAX).expect("24 bits"))
        .expect("masked")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn ten_seconds_count_and_the_eleventh_does_not() {
        let window = Window::default();
        let start = Monotonic(77_000_000_000);
        for second in 0..10 {
            window.add(start + Duration::from_secs(second), 2, 1);
        }
        let sum = |after| window.sum(start + Duration::from_secs(after));
        assert_eq!(sum(9), Counts { all: 20, marked: 10 });
        assert_eq!(sum(10), Counts { all: 18, marked: 9 });
        assert_eq!(sum(18), Counts { all: 2, marked: 1 });
        assert_eq!(sum(19), Counts::default());
        window.add(start + Duration::from_secs(20), 1, 0);
        assert_eq!(sum(20), Counts { all: 1, marked: 0 }, "a bucket that comes round begins anew");
        window.clear();
        assert_eq!(sum(20), Counts::default());
    }
}
