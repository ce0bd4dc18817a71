//! The lease of a host: how hub, agent and keeper agree on who may run what without asking each other. The one set
//! of constants that all three use, and why they fit together.
//!
//! **The words.** An agent beats every [`BEAT`]. A host that the leader has not heard for [`TTL`] is judged lost. A
//! beat that the leader takes is answered, and the answer gives the host a *lease*: until [`HOLD`] after the agent
//! *sent* that beat, by its own CLOCK_BOOTTIME. A process of a service with `on_disconnect = "stop"` runs only under
//! a lease: it is started under one, its keeper has the end of the lease as the deadline of the process, and each
//! answered beat moves that deadline on. At the deadline it is asked to end, after its grace it is killed.
//!
//! **The claim.** Such a process has ended before another one of its instance starts elsewhere, whatever the network
//! does and whoever dies, if clocks run at rates that differ by less than 1 in [`DRIFT`], and a killed process is
//! gone within [`KILL`].
//!
//! **Why.** Call the moment when a leader takes the last beat of a host that is ever answered T. The agent sent it
//! before T, so the lease ends before T + `HOLD`, and the process before T + `HOLD` + grace + `KILL`. The hub places
//! the instance anew only once a leader has logged ([`fence`]) that the host has been without a lease for that long:
//! - The leader that took the last beat counts from when it took it, so from T or later.
//! - A leader that has not heard the host counts from when it began to lead, and adds [`OVERLAP`]. An earlier leader
//!   gives leases only while a quorum has answered it within its Raft lease, which is shorter than `OVERLAP`. Any later
//!   leader was elected by a quorum that shares a member with that one, after that member had answered. So T is before
//!   the start of the later leader + `OVERLAP`.
//! - Each leader counts by its own elapsed time, and only what one leader has counted is logged: wall clocks play no
//!   part, so they may jump.
//! - While the log calls a host lost, no lease is given. The leader gives one only when it has applied everything
//!   committed before its term, and the answer waits in the session until the agent has been told all that the leader
//!   had applied. So a host that returns hears first what it has lost, then that it has a lease again.
//!
//! `HOLD` is longer than `TTL` because the two have different costs: a host judged lost too soon costs another start
//! elsewhere, a lease ended too soon ends a healthy process. It covers a leader that dies with its machine (noticed
//! within 3 s, elected within 2 s, the next beat answered within 2 s).

use std::time::Duration;

/// How often an agent beats.
pub const BEAT: Duration = Duration::from_secs(1);
/// A host not heard for so long is judged: lost, or silent while too many are.
pub const TTL: Duration = Duration::from_secs(3);
/// How long a lease holds, counted from when the agent sent the beat that was answered.
pub const HOLD: Duration = Duration::from_secs(9);
/// From SIGKILL to the certain end of a process, on a machine that is short of everything.
pub const KILL: Duration = Duration::from_secs(5);
/// For how long a leader may go on giving leases when another one has been elected: more than Raft's lease.
pub const OVERLAP: Duration = Duration::from_millis(500);
/// Clocks differ in rate by less than one part in this.
pub const DRIFT: u32 = 100;
/// A process is not started under a lease that ends sooner: it would be asked to end while it begins.
pub const START_MIN: Duration = Duration::from_secs(1);

/// How long a host has to have been without a lease before what ran there with this grace has certainly ended.
#[must_use]
pub fn fence(grace: Duration) -> Duration {
    let counted = HOLD.saturating_add(grace).saturating_add(KILL);
    counted.saturating_add(counted / DRIFT)
}

/// The same in milliseconds, rounded up, as the log has it.
#[must_use]
pub fn fence_ms(grace: Duration) -> u64 {
    u64::try_from(fence(grace).as_millis()).unwrap_or(u64::MAX - 1).saturating_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The claim, in numbers: the worst agent (its clock slow, its beat answered at the last moment) against the
    /// most hasty leader (its clock fast).
    #[test]
    fn a_process_has_ended_before_its_successor_may_start() {
        let graces = [0, 1, 999, 10_000, 60_000, 600_000, 86_400_000].map(Duration::from_millis);
        // Both rates may be off, so that they differ by the whole of what is allowed.
        let (slow, fast) = (1.0 - 0.5 / f64::from(DRIFT), 1.0 + 0.49 / f64::from(DRIFT));
        for grace in graces {
            let takes = 100.0;
            let sent = takes; // at the latest
            let ends = sent + (HOLD + grace).as_secs_f64() / slow + KILL.as_secs_f64();
            let counted = takes + Duration::from_millis(fence_ms(grace)).as_secs_f64() / fast;
            assert!(ends < counted, "{grace:?}: {ends} {counted}");

            // And when another leader, just elected, has never heard the host.
            let elected = takes - OVERLAP.as_secs_f64() / fast;
            let counted = elected + (OVERLAP + Duration::from_millis(fence_ms(grace))).as_secs_f64() / fast;
            assert!(ends < counted, "{grace:?}: {ends} {counted}");
        }
        assert!(fence(Duration::MAX) == Duration::MAX && fence_ms(Duration::MAX) > 0);
    }

    #[test]
    fn a_lease_outlives_lost_beats_and_the_change_of_a_leader() {
        // Noticed, elected, answered.
        assert!(HOLD >= BEAT + Duration::from_secs(3) + Duration::from_secs(2) + Duration::from_secs(2));
        assert!(TTL >= 3 * BEAT && HOLD > TTL);
    }
}
