//! What waits between the thread that reads output and the one that writes it, with a bound.
//!
//! A plain bound would lose lines whenever the writing thread is not scheduled for a moment; a plain wait would let a
//! stuck disk hold up every process. So the reading thread waits while the disk goes on, for a short time when it does
//! nothing, and not at all after that until it has caught up.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::segment::Counters;

/// How long a process may be held up by a disk that does nothing at all, once, before its lines are dropped instead:
/// longer than an ordinary pause of the other thread, shorter than anyone's time-out.
const STALL_MS: u16 = 200;
/// Waiting for the disk: of one log, and of all.
const LOG_QUEUE_BYTES_MAX: u64 = 1024 * 1024;
const QUEUE_BYTES_MAX: u64 = 4 * 1024 * 1024;

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

    /// Waits for room while the disk goes on; `false` once it has done nothing for [`STALL_MS`].
    pub(crate) fn wait_for_room(&self, log: &Counters, bytes: u64) -> bool {
        loop {
            self.waiting.store(true, Ordering::Release);
            if self.has_room(log, bytes) {
                return true;
            }
            let mut bell = [PollFd::new(self.bell.as_fd(), PollFlags::POLLIN)];
            if !matches!(poll(&mut bell, STALL_MS), Ok(1..)) {
                return self.has_room(log, bytes);
            }
            let _ = self.bell.read();
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
        assert!(backlog.wait_for_room(&log, FULL));
        backlog.add(&log, FULL);
        assert!(!backlog.wait_for_room(&log, 1));
        backlog.done(&log, 10);
        assert!(backlog.wait_for_room(&log, 10));
        assert!(!backlog.has_caught_up(&log, 10), "not before half of it is written");
        backlog.done(&log, usize::try_from(FULL / 2).unwrap());
        assert!(backlog.has_caught_up(&log, 10));
    }

    #[test]
    fn a_disk_that_goes_on_is_waited_for() {
        let (backlog, log) = (Backlog::new().unwrap(), Counters::default());
        backlog.add(&log, FULL);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                // A little at a time, each within the patience: in the end there is room.
                for _ in 0..FULL / 1024 {
                    backlog.done(&log, 1024);
                }
            });
            assert!(backlog.wait_for_room(&log, FULL));
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
