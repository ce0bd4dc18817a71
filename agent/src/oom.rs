//! Sees that the kernel has killed somebody on this host for want of memory, and has the keeper look whose that was.
//!
//! One line of /proc counts the kills of the whole host, so a thousand instances cost no more than one. A kill that an
//! instance's process outlives comes back to the main loop as the answer; one that ends it is told by its exit.

use std::time::Duration;

use crate::keeper::{KeeperHandle, Purpose};
use nave_proto::pb;
use pb::keeper_request::Request;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// The keeper is asked at so many looks in a row: it waits for what is dying, and tells what was outlived only then.
const ASKS: u32 = 5;

/// Looks for as long as the agent lives.
pub(crate) async fn watch(keeper: KeeperHandle) {
    let mut lookout = Lookout::default();
    loop {
        let vmstat = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
        if lookout.sees(kills(&vmstat)) {
            keeper.ask(Request::LookForOomKills(pb::LookForOomKills {}), Purpose::OomKills).await;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What was seen, and how often the keeper is still to be asked about it.
#[derive(Debug, Default)]
struct Lookout {
    kills: Option<u64>,
    asks: u32,
}

impl Lookout {
    /// Whether to ask now. At first, too: somebody may have been killed while no agent looked.
    fn sees(&mut self, kills: Option<u64>) -> bool {
        if kills.is_some() && kills != self.kills {
            self.kills = kills;
            self.asks = ASKS;
        }
        let asks = self.asks > 0;
        self.asks = self.asks.saturating_sub(1);
        asks
    }
}

/// Of the whole host since it booted; none: the kernel does not say.
fn kills(vmstat: &str) -> Option<u64> {
    vmstat.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keeper_is_asked_some_times_after_each_kill_and_not_otherwise() {
        let mut lookout = Lookout::default();
        let mut asked = |kills| (0..8).filter(|_| lookout.sees(kills)).count();
        assert_eq!(
            [asked(None), asked(Some(3)), asked(Some(3)), asked(Some(4)), asked(None)],
            [0, 5, 0, 5, 0]
        );
    }

    #[test]
    fn this_kernel_counts_its_kills() {
        assert_eq!(kills("pgfault 7\noom_kill 12\noom_kill_other 5\n"), Some(12));
        assert_eq!(kills("pgfault 7\n"), None);
        assert!(kills(&std::fs::read_to_string("/proc/vmstat").unwrap()).is_some());
    }
}
