//! When an instance is said to be short of memory, and when its memory is looked at next.
//!
//! The kernel speaks only at the limit, which is too late, or once, when caches fill it, which is too early. So what is
//! held is looked at, and since each look costs something on a host of a thousand instances, rarely while there is room:
//! the next one comes before that room is used up, at the fastest pace that is to be told in time or at the one just
//! seen. A jump that is faster than that is told too late, or only by its end.

use std::time::Duration;

use crate::monotonic::Monotonic;

/// Said when what is held is this part of the limit,
const SHORT_AT_PERCENT: u64 = 90;
/// and not again before it has been less than this.
const WELL_BELOW_PERCENT: u64 = 80;
/// What fills the whole limit in this time, or more slowly, is told before the limit is met.
const FILLED_WITHIN: Duration = Duration::from_secs(8);
/// More than this part of the limit from one look to the next is growth; less comes and goes.
const GROWS_AT_PERCENT: u64 = 1;
/// The least time to the next look at one that does not grow, and that to the second look.
const STEADY: Duration = Duration::from_secs(1);
/// Likewise of one that grows, and is about to be short.
const GROWING: Duration = Duration::from_millis(250);
/// To the next look at one that was told: only that it is well again is of interest.
const TOLD: Duration = Duration::from_secs(5);

/// One limit of an instance's memory, and how it stands with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    limit_bytes: u64,
    told: bool,
    last: Option<(Monotonic, u64)>,
}

/// What to do after a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// It has become short.
    pub say: bool,
    /// Until the next look.
    pub next: Duration,
}

impl Shortage {
    /// Of one that nobody has looked at yet.
    #[must_use]
    pub const fn new(limit_bytes: u64) -> Self {
        Self { limit_bytes, told: false, last: None }
    }

    #[must_use]
    pub const fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    /// However much of it is cache, nothing has to be said.
    #[must_use]
    pub fn is_well_above(&self, used_bytes: u64) -> bool {
        used_bytes < percent(self.limit_bytes, WELL_BELOW_PERCENT)
    }

    /// So much is held that the kernel cannot take back.
    pub fn look(&mut self, now: Monotonic, held_bytes: u64) -> Look {
        let before = self.last.replace((now, held_bytes));
        let is_short = held_bytes >= percent(self.limit_bytes, SHORT_AT_PERCENT);
        let say = is_short && !self.told;
        self.told = is_short || (self.told && held_bytes >= percent(self.limit_bytes, WELL_BELOW_PERCENT));
        Look { say, next: self.next(before, now, held_bytes) }
    }

    fn next(&self, before: Option<(Monotonic, u64)>, now: Monotonic, held_bytes: u64) -> Duration {
        if self.told {
            return TOLD;
        }
        let Some((at, held_before)) = before else { return STEADY };
        let room = percent(self.limit_bytes, SHORT_AT_PERCENT).saturating_sub(held_bytes);
        let at_worst = part(FILLED_WITHIN, room, self.limit_bytes);
        match held_bytes.saturating_sub(held_before) {
            growth if growth < percent(self.limit_bytes, GROWS_AT_PERCENT) => at_worst.max(STEADY),
            growth => at_worst.min(part(now.since(at), room, growth)).max(GROWING),
        }
    }
}

fn percent(of: u64, percent: u64) -> u64 {
    of / 100 * percent
}

/// `of` times `numerator` by `denominator`.
fn part(of: Duration, numerator: u64, denominator: u64) -> Duration {
    let nanos = of.as_nanos() * u128::from(numerator) / u128::from(denominator.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 100_000;

    fn after(ms: u64) -> Monotonic {
        Monotonic::BOOT + Duration::from_millis(ms)
    }

    #[test]
    fn it_is_said_once_until_it_was_well_again() {
        let mut shortage = Shortage::new(LIMIT);
        for (second, (percent, say)) in [
            (10, false),
            (89, false),
            (90, true),
            (100, false),
            (85, false),
            (95, false),
            (80, false),
            (79, false),
            (89, false),
            (91, true),
            (91, false),
        ]
        .into_iter()
        .enumerate()
        {
            let look = shortage.look(after(second as u64 * 1000), LIMIT / 100 * percent);
            assert_eq!(look.say, say, "second {second}: {percent} %");
        }
    }

    #[test]
    fn the_less_room_and_the_faster_it_goes_the_sooner_the_next_look() {
        // percent at 0 s and at 2 s -> ms to the next look
        for (before, now, next) in [
            (0, 0, 7200),
            (10, 10, 6400),
            (50, 50, 3200),
            (70, 70, 1600),
            (80, 80, 1000),
            (89, 89, 1000),
            (88, 89, 250),
            (84, 85, 400),
            (60, 50, 3200),
            (90, 50, 3200),
            (0, 1, 7120),
            (40, 50, 3200),
            (10, 50, 2000),
            (50, 80, 666),
            (50, 88, 250),
            (0, 89, 250),
            (50, 90, 5000),
            (95, 85, 5000),
            (95, 70, 1600),
        ] {
            let mut shortage = Shortage::new(LIMIT);
            let first = shortage.look(after(0), LIMIT / 100 * before);
            assert_eq!(first.next.as_millis(), if before >= 90 { 5000 } else { 1000 }, "{before} %");
            let second = shortage.look(after(2000), LIMIT / 100 * now);
            assert_eq!(second.next.as_millis(), next, "{before} % and then {now} %");
        }
    }

    /// How full it is when that is said, of one that begins to fill `phase_ms` after a look and takes `fills_in_ms` for a
    /// whole limit; each look comes up to a quarter of a second late.
    fn said_at(start: u64, phase_ms: u64, fills_in_ms: u64) -> Option<u64> {
        let mut shortage = Shortage::new(LIMIT);
        let (mut now, begins) = (0_u64, 20_000 + phase_ms);
        loop {
            let held = LIMIT / 100 * start + now.saturating_sub(begins) * LIMIT / fills_in_ms;
            if held >= LIMIT {
                return None;
            }
            let look = shortage.look(after(now), held);
            if look.say {
                return Some(held);
            }
            now += u64::try_from(look.next.as_millis()).unwrap() + 250;
        }
    }

    #[test]
    fn what_fills_the_limit_in_8_seconds_or_more_is_told_before_its_end() {
        for start in [0, 20, 40, 60, 80] {
            for phase_ms in (0..8000).step_by(90) {
                for fills_in_ms in [8_000, 9_500, 15_000, 60_000, 3_600_000] {
                    let said = said_at(start, phase_ms, fills_in_ms);
                    assert!(
                        said.is_some(),
                        "from {start} % after {phase_ms} ms in {fills_in_ms} ms: {said:?}"
                    );
                }
            }
        }
    }
}
