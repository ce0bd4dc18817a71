//! Cuts a fetch short: by the end of the process that fetches, so that whoever waits for it goes on at once.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;

/// Why a fetch that was cut short has failed.
pub(super) const CUT: &str = "it is not wanted any more";

/// Of one preparation; shared by who makes it and who may end it.
#[derive(Debug, Default)]
pub(crate) struct Cutoff(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    is_cut: bool,
    /// Fetches or unpacks, and is not reaped yet.
    child: Option<Pid>,
}

/// A child that is ended with the preparation, until it is released.
#[derive(Debug)]
pub(super) struct Watched<'c>(&'c Cutoff);

impl Cutoff {
    pub(crate) fn cut(&self) {
        let mut state = self.0.lock();
        state.is_cut = true;
        end(state.child);
    }

    pub(crate) fn is_cut(&self) -> bool {
        self.0.lock().is_cut
    }

    pub(super) fn watch(&self, pid: u32) -> Watched<'_> {
        let mut state = self.0.lock();
        state.child = i32::try_from(pid).ok().map(Pid::from_raw);
        if state.is_cut {
            end(state.child);
        }
        Watched(self)
    }
}

impl Watched<'_> {
    /// Before the child is reaped. Whether it was ended.
    pub(super) fn release(self) -> bool {
        let mut state = self.0.0.lock();
        state.child = None;
        state.is_cut
    }
}

fn end(child: Option<Pid>) {
    if let Some(pid) = child {
        // Already ended is as good.
        let _ended = kill(pid, Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_child_is_ended_whether_it_is_watched_before_or_after() {
        for cut_first in [false, true] {
            let cutoff = Cutoff::default();
            if cut_first {
                cutoff.cut();
            }
            let mut child = Command::new("sleep").arg("600").spawn().unwrap();
            let watched = cutoff.watch(child.id());
            if !cut_first {
                cutoff.cut();
            }
            assert!(watched.release());
            assert!(!child.wait().unwrap().success());
        }
    }
}
