//! The tries of one call that came to nothing: whom to pass over next, how often it may go on, and what to tell whoever
//! called. A try that took nothing of the call (the endpoint could not be connected to) harms nobody when it is made
//! again, so those are bounded by time; the others by the port's rule.

use std::fmt;
use std::time::Duration;

use nave_agent_core::balancer::{EndpointKey, EndpointSpec, NoPick};
use tokio::time::Instant;

use super::route::Route;

/// Before those that took nothing are asked once more; doubled each time.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(250);

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct Tries {
    failed: Vec<Failed>,
    /// Whom to pass over.
    keys: Vec<EndpointKey>,
    /// The tries that may have taken something.
    reached: usize,
    first: Option<Instant>,
    rounds: u32,
}

/// An endpoint that did not serve.
#[derive(Debug)]
struct Failed {
    key: EndpointKey,
    why: String,
    times: usize,
    unreached: bool,
}

impl Tries {
    /// `unreached`: nothing of the call can have come to the endpoint.
    pub(crate) fn add(&mut self, endpoint: &EndpointSpec, why: impl fmt::Display, unreached: bool) {
        let (key, why) = (endpoint.key, why.to_string());
        self.first.get_or_insert_with(Instant::now);
        self.keys.push(key);
        self.reached += usize::from(!unreached);
        match self.failed.iter_mut().find(|one| one.key == key) {
            Some(one) => *one = Failed { key, why, times: one.times + 1, unreached },
            None => self.failed.push(Failed { key, why, times: 1, unreached }),
        }
    }

    /// For [`Ask::tried`](nave_agent_core::balancer::Ask::tried).
    pub(crate) fn keys(&self) -> &[EndpointKey] {
        &self.keys
    }

    pub(crate) fn len(&self) -> usize {
        self.failed.iter().map(|one| one.times).sum()
    }

    /// Whether there may be one more: at most `retries_max` beyond the first, where those that took nothing do not count
    /// for the first `patience`.
    pub(crate) fn may_go_on(&self, retries_max: usize, patience: Duration) -> bool {
        self.counted(patience) <= retries_max
    }

    /// Whether there may be one more after one that is not among these yet: an endpoint answered, and said that it cannot.
    pub(crate) fn may_follow_answer(&self, retries_max: usize, patience: Duration) -> bool {
        self.counted(patience) < retries_max
    }

    fn counted(&self, patience: Duration) -> usize {
        if self.is_patient(patience) { self.reached } else { self.len() }
    }

    /// The first that failed did so no longer ago than that.
    fn is_patient(&self, patience: Duration) -> bool {
        self.first.is_none_or(|first| first.elapsed() < patience)
    }

    /// When those that took nothing may be asked once more; `None`: not within `patience`.
    pub(crate) fn due(&self, patience: Duration) -> Option<Instant> {
        let pause = PAUSE_MAX.min(PAUSE_MIN.saturating_mul(1 << self.rounds.min(10)));
        let due = Instant::now() + pause;
        self.first.filter(|first| due < *first + patience).map(|_| due)
    }

    /// Those that took nothing may be tried once more; whether there are any.
    pub(crate) fn forgive_unreached(&mut self) -> bool {
        self.rounds += 1;
        let before = self.keys.len();
        let failed = &self.failed;
        self.keys.retain(|key| !failed.iter().any(|one| one.key == *key && one.unreached));
        self.keys.len() < before
    }

    /// It may be tried once more; the try still counts. Whether it was among them.
    pub(crate) fn forgive(&mut self, endpoint: EndpointKey) -> bool {
        let before = self.keys.len();
        self.keys.retain(|key| *key != endpoint);
        self.keys.len() < before
    }

    /// What to tell the caller: the service, the endpoints that were tried, and why each did not serve.
    pub(crate) fn explain(&self, route: &Route, end: Option<NoPick>) -> String {
        let mut text = format!("nave: {} cannot be reached", route.service);
        if let Some(end) = end.filter(|end| self.failed.is_empty() || *end != NoPick::AllTried) {
            text.push_str(&format!(": {end}"));
        }
        if !self.failed.is_empty() {
            let whys: Vec<String> = self.failed.iter().map(ToString::to_string).collect();
            text.push_str(&format!("; tried {}", whys.join(", ")));
        }
        text.push_str(&format!(" (nave endpoints {})", route.service));
        text
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key.instance, self.why)?;
        match self.times {
            1 => Ok(()),
            times => write!(f, " ({times} times)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::two_hosts::local;

    const PATIENCE: Duration = Duration::from_secs(3);

    #[tokio::test(start_paused = true)]
    async fn what_may_have_been_begun_counts_and_what_took_nothing_only_once_patience_ends() {
        let endpoint = |instance| local(instance, ([127, 0, 0, 1], 1).into());
        let mut tries = Tries::default();
        for _ in 0..20 {
            tries.add(&endpoint(1), "refused", true);
        }
        assert!(tries.may_go_on(0, PATIENCE), "nobody has had any of it");
        assert!(!tries.may_follow_answer(0, PATIENCE) && tries.may_follow_answer(1, PATIENCE));
        tries.add(&endpoint(2), "closed", false);
        assert!(!tries.may_go_on(0, PATIENCE) && tries.may_go_on(1, PATIENCE));
        assert!(!tries.may_follow_answer(1, PATIENCE) && tries.may_follow_answer(2, PATIENCE));
        tries.add(&endpoint(3), "closed", false);
        assert!(!tries.may_go_on(1, PATIENCE) && tries.may_go_on(2, PATIENCE));
        tokio::time::advance(PATIENCE).await;
        assert!(!tries.may_go_on(21, PATIENCE) && tries.may_go_on(22, PATIENCE), "all of them count now");
        assert_eq!(tries.due(PATIENCE), None);
        assert!(tries.forgive_unreached() && !tries.forgive_unreached());
        assert_eq!(tries.keys(), [endpoint(2).key, endpoint(3).key]);
    }
}
