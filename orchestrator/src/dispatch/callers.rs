//! Up to where all agents have taken the directory, as one leader reckons it. What was draining by then is called by
//! nobody any more, so it may end. Outside the log, begun anew with each leadership.
//!
//! **Who has to be heard.** An agent between two sessions, or with one at a member that has just died, goes on calling
//! what it knew, so it is not enough that all who have a session have taken a drain. The log says who there is: a
//! session of each host that is not lost. Each member says how far those at it are, by the log as of which revision, and
//! how many of the log's sessions they are.
//!
//! **Why that is enough.** Two members that are both past the log's newest change of sessions, and of which neither
//! is past this leader, mean the same sessions by it. A session is at one member only, so when the numbers add up to all
//! there are, each of them has been heard. What an agent has taken it never gives back, so no word of a member becomes
//! untrue, however late it comes; nor does what a leader has concluded from it. Time plays no part: a new leader speaks as
//! soon as it has heard the members, and one whose agents have not come back waits for them, until those who wait for it
//! wait no longer (`nave_agent_core::supervisor::DRAIN_WAIT`), or the host is judged lost.

use std::collections::BTreeMap;

use nave_proto::ids::MemberId;

use crate::watch::{LogSessions, Standing};

/// What the members have said to one leader.
#[derive(Debug, Default)]
pub(super) struct Callers {
    said: BTreeMap<MemberId, Standing>,
    concluded: u64,
}

impl Callers {
    pub(super) fn said(&mut self, member: MemberId, standing: Standing) {
        self.said.insert(member, standing);
    }

    /// The revision up to which all agents have taken the directory; 0: nothing can be said of them.
    pub(super) fn all_taken(&mut self, sessions: LogSessions) -> u64 {
        let LogSessions { count, changed, as_of } = sessions;
        let speaks_of_these = |said: &&Standing| (changed..=as_of).contains(&said.as_of) && said.sessions > 0;
        let (heard, taken) = self
            .said
            .values()
            .filter(speaks_of_these)
            .fold((0, as_of), |(heard, taken), said| (heard + said.sessions, taken.min(said.taken)));
        if heard == count {
            self.concluded = self.concluded.max(taken);
        }
        self.concluded
    }
}

#[cfg(test)]
mod tests;
