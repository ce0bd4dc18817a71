//! What the successor of this instance needs, fetched and looked for while this one still runs: ordered when the hub asks
//! for it, tried again later and later when it fails, cut short once it is wanted no longer. The ledger has nothing of it: the order is
//! in the wanted set, and what has been fetched is found again at once.

use std::time::Duration;

use nave_proto::pb;
use rand::Rng;

use super::Supervisor;
use super::action::{Action, Level};
use crate::monotonic::Monotonic;

/// Between two tries, doubled each time. Whoever serves the artifacts may be in trouble because of all who ask.
pub const FETCH_RETRY_FIRST: Duration = Duration::from_secs(1);
pub const FETCH_RETRY_MAX: Duration = Duration::from_secs(60);

/// How far it is.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) enum Ahead {
    /// Nothing is asked for.
    #[default]
    Nothing,
    /// Ordered for this template.
    Fetching {
        template: u64,
        tries: u32,
        /// Why the try before failed.
        problem: String,
    },
    Failed {
        template: u64,
        tries: u32,
        problem: String,
        again: Monotonic,
    },
    Done {
        template: u64,
    },
}

impl Ahead {
    fn template(&self) -> Option<u64> {
        match self {
            Self::Nothing => None,
            Self::Fetching { template, .. } | Self::Failed { template, .. } | Self::Done { template } => {
                Some(*template)
            }
        }
    }
}

impl Supervisor {
    /// Orders what is asked for, and takes back what is not any more.
    pub(super) fn fetch_ahead(&mut self, now: Monotonic, out: &mut Vec<Action>) {
        let wanted = self.wanted.fetch.as_ref().filter(|_| !self.is_to_stop());
        let Some(order) = wanted else {
            if self.ahead != Ahead::Nothing {
                self.ahead = Ahead::Nothing;
                out.push(Action::CancelFetch);
            }
            return;
        };
        let template = order.template_version;
        let (tries, problem) = match &self.ahead {
            ahead if ahead.template() != Some(template) => (0, String::new()),
            Ahead::Failed { again, tries, problem, .. } if *again <= now => (*tries, problem.clone()),
            Ahead::Nothing | Ahead::Failed { .. } | Ahead::Fetching { .. } | Ahead::Done { .. } => return,
        };
        out.push(Action::FetchAhead(Box::new(order.clone())));
        self.ahead = Ahead::Fetching { template, tries, problem };
    }

    pub(super) fn fetched<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        of_template: u64,
        result: Result<(), String>,
        out: &mut Vec<Action>,
    ) {
        let Ahead::Fetching { template, tries, problem: before } = &self.ahead else { return };
        let (template, tries) = (*template, tries.saturating_add(1));
        if of_template != template {
            return;
        }
        let log = |level, message: String| Action::Log { level, message };
        self.ahead = match result {
            Ok(()) => {
                out.push(log(Level::Info, "what its successor needs is there".to_owned()));
                Ahead::Done { template }
            }
            Err(problem) => {
                if problem != *before {
                    out.push(log(Level::Warn, format!("what its successor needs is not there: {problem}")));
                }
                let delay = FETCH_RETRY_FIRST * (1 << (tries - 1).min(10));
                let again = now + delay.min(FETCH_RETRY_MAX).mul_f64(rng.random_range(0.8..=1.2));
                Ahead::Failed { template, tries, problem, again }
            }
        };
    }

    pub(super) fn fetch_again_at(&self) -> Option<Monotonic> {
        match &self.ahead {
            Ahead::Failed { again, .. } => Some(*again),
            Ahead::Nothing | Ahead::Fetching { .. } | Ahead::Done { .. } => None,
        }
    }

    /// For the report; unset before a try has ended.
    pub(super) fn fetch_state(&self) -> Option<pb::FetchState> {
        let (template_version, done, problem) = match &self.ahead {
            Ahead::Nothing => return None,
            Ahead::Fetching { problem, .. } if problem.is_empty() => return None,
            Ahead::Fetching { template, problem, .. } | Ahead::Failed { template, problem, .. } => {
                (*template, false, problem.clone())
            }
            Ahead::Done { template } => (*template, true, String::new()),
        };
        Some(pb::FetchState { template_version, done, problem })
    }
}
