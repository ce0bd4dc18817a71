//! Seeded runs of whole clusters in one thread: the pure cores of hub and agent, with everything around them made of
//! queues. Members apply one perfect log at their own pace, agents and processes come and go, the network delays,
//! breaks and heals, clocks disagree; after each step the promises of DESIGN are held against what really runs. The
//! same number gives the same history, so that every failure replays, and a failing history is made shorter.
//!
//! What it leaves out: Raft itself (the log is perfect), disks that lie, the wire format. Those have tests of their
//! own, on real processes.

mod agent;
mod beats;
mod bug;
mod clock;
mod context;
mod event;
mod hub;
mod keeper;
mod member;
mod network;
mod oracle;
mod scenario;
mod session;
mod shrink;
mod uplink;
mod world;

pub use bug::Bug;
pub use context::Violation;
pub use shrink::{Short, shorten};
pub use world::Run;

use scenario::Scenario;

/// Runs the world of a seed. A core that panics has broken a promise too.
#[must_use]
pub fn run(seed: u64, bug: Option<Bug>, trace: bool) -> Run {
    attempt(&Scenario::of(seed), bug, trace)
}

fn attempt(scenario: &Scenario, bug: Option<Bug>, trace: bool) -> Run {
    let scenario = scenario.clone();
    let run = std::panic::catch_unwind(move || world::run(scenario, bug, trace));
    run.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let what = text.unwrap_or_else(|| "a panic".to_owned());
        let violation = Violation { at: 0, promise: "no core panics", what };
        Run { violation: Some(violation), ..Run::default() }
    })
}

/// A violation in one line.
#[must_use]
pub fn told(violation: &Violation) -> String {
    world::told(violation)
}
