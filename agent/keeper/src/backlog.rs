//! What waits between the thread that reads output and the one that writes it, with a bound.
//!
//! A plain bound would lose lines whenever the writing thread is not scheduled for a moment; a plain wait would let a
//! slow disk hold up every process. So the reading thread waits a little, with an allowance that holds for all logs
//! together: while it waits for one, nobody reads the others, and their processes too must never notice.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::clock;
use crate::segment::Counters;

/// How long the reading thread waits for the disk in all within each [`WINDOW_NS`], before lines are dropped instead:
/// longer than an ordinary pause of the other thread, and such that a process whose FIFO is full is held up for less
/// than a tenth of a second even when another's log is what is waited for.
const ALLOWANCE_NS: i64 = 40_000_000;
const WINDOW_NS: i64 = 200_000_000;
/// Waiting for the disk: of one log, and of all.
pub(crate) const LOG_QUEUE_BYTES_MAX: u64 = 1024 * 1024;
const QUEUE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// What is left of the time in which the reading thread may wait.
#[derive(Debug)]
pub(crate) struct Patience {
    window_began: i64,
    left_ns: i64,
    allowance_ns: i64,
}

impl Patience {
    pub(crate) fn new() -> Self {
        Self { window_began: 0, left_ns: ALLOWANCE_NS, allowance_ns: ALLOWANCE_NS }
    }

    fn left(&mut self, now: i64) -> i64 {
        if now - self.window_began >= WINDOW_NS {
            (self.window_began, self.left_ns) = (now, self.allowance_ns);
        }
        self.left_ns
    }
}

/// How much waits for the disk in all logs, and a bell for when it has become less.
#[derive(Debug)]
pub(crate) struct Backlog {
    queued_bytes: AtomicU64,
    waiting: AtomicBool,
    bell: EventFd,
}

impl Backlog {
    pub(crate) fn new() -> io::Result<Self> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { queued_bytes: AtomicU64::new(0), waiting: AtomicBool::new(false), bell })
    }

    /// The disk's thread has taken this much of a log.
    pub(crate) fn done(&self, log: &Counters, bytes: usize) {
        log.queued_bytes.fetch_sub(bytes as u64, Ordering::AcqRel);
        self.queued_bytes.fetch_sub(bytes as u64, Ordering::AcqRel);
        if self.waiting.swap(false, Ordering::AcqRel) {
            let _ = self.bell.write(1);
        }
    }

    pub(crate) fn add(&self, log: &Counters, bytes: u64) {
        log.queued_bytes.fetch_add(bytes, Ordering::AcqRel);
        self.queued_bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    fn has_room(&self, log: &Counters, bytes: u64) -> bool {
        log.queued_bytes.load(Ordering::Acquire) + bytes <= LOG_QUEUE_BYTES_MAX
            && self.queued_bytes.load(Ordering::Acquire) + bytes <= QUEUE_BYTES_MAX
    }

    /// Whether so much has been written since it stood still that another pause is unlikely.
    pub(crate) fn has_caught_up(&self, log: &Counters, bytes: u64) -> bool {
        self.has_room(log, bytes + LOG_QUEUE_BYTES_MAX / 2)
    }

    /// Waits for room as long as the patience lasts; `false` when there is none by then.
    pub(crate) fn wait_for_room(&self, log: &Counters, bytes: u64, patience: &mut Patience) -> bool {
        loop {
            self.waiting.store(true, Ordering::Release);
            if self.has_room(log, bytes) {
                return true;
            }
            let began = clock::boottime_ns();
            // Rounded up, so that the last part of a millisecond is not spent turning in circles.
            let left_ms = (patience.left(began) + 999_999) / 1_000_000;
            if left_ms <= 0 {
                return false;
            }
            let mut bell = [PollFd::new(self.bell.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut bell, PollTimeout::try_from(left_ms).unwrap_or(PollTimeout::ZERO));
            let _ = self.bell.read();
            patience.left_ns -= clock::boottime_ns() - began;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: u64 = LOG_QUEUE_BYTES_MAX;

    #[test]
    fn a_disk_that_stands_still_is_not_waited_for_long() {
        let (backlog, log) = (Backlog::new().unwrap(), Counters::default());
        let mut patience = Patience::new();
        assert!(backlog.wait_for_room(&log, FULL, &mut patience));
        backlog.add(&log, FULL);
        assert!(!backlog.wait_for_room(&log, 1, &mut patience));
        assert!(patience.left_ns <= 0, "all of it was spent: {patience:?}");
        backlog.done(&log, 10);
        assert!(backlog.wait_for_room(&log, 10, &mut patience), "room needs no patience");
        assert!(!backlog.has_caught_up(&log, 10), "not before half of it is written");
        backlog.done(&log, usize::try_from(FULL / 2).unwrap());
        assert!(backlog.has_caught_up(&log, 10));
    }

    #[test]
    fn patience_is_for_all_logs_together_and_comes_back() {
        let backlog = Backlog::new().unwrap();
        let (first, second) = (Counters::default(), Counters::default());
        let mut patience = Patience::new();
        backlog.add(&first, FULL);
        backlog.add(&second, FULL);
        assert!(!backlog.wait_for_room(&first, 1, &mut patience));
        let now = patience.window_began;
        assert!(patience.left(now) <= 0, "nothing is left for the second");
        assert_eq!(patience.left(now + WINDOW_NS), ALLOWANCE_NS);
    }

    #[test]
    fn a_disk_that_goes_on_is_waited_for() {
        let (backlog, log) = (Backlog::new().unwrap(), Counters::default());
        let minute = 60_000_000_000;
        let mut patience = Patience { window_began: 0, left_ns: minute, allowance_ns: minute };
        backlog.add(&log, FULL);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                // A little at a time: in the end there is room.
                for _ in 0..FULL / 1024 {
                    backlog.done(&log, 1024);
                }
            });
            assert!(backlog.wait_for_room(&log, FULL, &mut patience));
        });
    }

    #[test]
    fn one_flood_does_not_take_the_room_of_all() {
        let backlog = Backlog::new().unwrap();
        let (flood, quiet) = (Counters::default(), Counters::default());
        backlog.add(&flood, FULL);
        assert!(!backlog.has_room(&flood, 1) && backlog.has_room(&quiet, FULL));
        for _ in 1..QUEUE_BYTES_MAX / FULL {
            backlog.add(&Counters::default(), FULL);
        }
        assert!(!backlog.has_room(&quiet, 1), "but there is an end to it");
    }
}
