//! The only place where time enters the agent: CLOCK_BOOTTIME for everything that waits or expires, since it
//! goes on while the machine sleeps and never jumps; wall time only for what people and certificates read.

use nave_agent_core::Monotonic;
use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;

/// Time since the machine booted, sleep included.
pub(crate) fn monotonic() -> Monotonic {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has CLOCK_BOOTTIME since 2.6.39");
    Monotonic(now.tv_sec() * 1_000_000_000 + now.tv_nsec())
}

/// Nanoseconds since 1970; may jump.
pub(crate) fn wall_unix_ns() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).expect("every system has CLOCK_REALTIME");
    now.tv_sec() * 1_000_000_000 + now.tv_nsec()
}

/// Names this boot of the machine; a monotonic time of another boot means nothing.
pub(crate) fn boot_id() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// The hub's time as far as we know it: what it last said plus the time since; before it has spoken, our own, but
/// never before what it said in an earlier life.
#[derive(Debug)]
pub(crate) struct HubClock {
    floor_unix_ns: i64,
    heard: Mutex<Option<(i64, Monotonic)>>,
}

impl HubClock {
    pub(crate) fn new(floor_unix_ns: i64) -> Self {
        Self { floor_unix_ns, heard: Mutex::new(None) }
    }

    pub(crate) fn heard(&self, hub_unix_ns: i64) {
        *self.heard.lock() = Some((hub_unix_ns, monotonic()));
    }

    pub(crate) fn now_unix_ns(&self) -> i64 {
        match *self.heard.lock() {
            Some((unix_ns, at)) => unix_ns.saturating_add(monotonic().0.saturating_sub(at.0)),
            None => wall_unix_ns().max(self.floor_unix_ns),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hubs_word_wins_over_a_clock_that_jumped() {
        let future = wall_unix_ns() + 1_000_000_000_000;
        let clock = HubClock::new(future);
        assert!(clock.now_unix_ns() >= future);
        clock.heard(5);
        assert!((5..1_000_000_000_000).contains(&clock.now_unix_ns()));
    }
}
