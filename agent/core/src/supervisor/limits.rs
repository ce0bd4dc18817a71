//! The limits of the process that runs, when its manifest asks for others: given to its cgroup while it goes on. What a
//! host cannot give is noted, and what it could give later is tried again.

use std::time::Duration;

use nave_proto::pb;

use super::Supervisor;
use super::action::{Action, Level};
use super::input::ProcessKey;
use super::state::State;
use crate::monotonic::Monotonic;

const RETRY_AFTER: Duration = Duration::from_secs(30);

/// One limit that was not set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LimitRefused {
    /// For people: which, and why not.
    pub what: String,
    /// It may be possible later.
    pub may_pass: bool,
}

/// What is known of the limits of the newest process.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Limits {
    /// What it was started with or given since; none: not known, as after a start of the agent.
    given: Option<pb::Resources>,
    retry_at: Option<Monotonic>,
    /// The last refusal, noted once.
    said: String,
}

/// What a cgroup can be given while somebody is in it.
fn of_cgroup(wanted: &pb::WantedInstance) -> pb::Resources {
    let resources = wanted.manifest.as_ref().and_then(|manifest| manifest.resources).unwrap_or_default();
    pb::Resources { nice: 0, oom_score_adj: 0, ..resources }
}

impl Supervisor {
    /// A process is ordered, with the limits that its manifest has now.
    pub(super) fn limited_from_the_start(&mut self) {
        self.limits = Limits { given: Some(of_cgroup(&self.wanted)), ..Limits::default() };
    }

    /// Gives the process that runs what its manifest says now, when that is not what it has.
    pub(super) fn adjust_limits(&mut self, now: Monotonic, out: &mut Vec<Action>) {
        if !matches!(self.state, State::Running(_)) || self.wanted.manifest.is_none() {
            return;
        }
        let resources = of_cgroup(&self.wanted);
        let is_due = self.limits.retry_at.is_some_and(|at| at <= now);
        if self.limits.given.as_ref() == Some(&resources) && !is_due {
            return;
        }
        self.limits.given = Some(resources);
        self.limits.retry_at = None;
        out.push(Action::SetLimits { key: self.key(), resources });
    }

    pub(super) fn limits_retry_at(&self) -> Option<Monotonic> {
        self.limits.retry_at
    }

    pub(super) fn limits_set(
        &mut self,
        now: Monotonic,
        key: ProcessKey,
        refused: &[LimitRefused],
        out: &mut Vec<Action>,
    ) {
        if key != self.key() || !matches!(self.state, State::Running(_)) {
            return;
        }
        let said: Vec<&str> = refused.iter().map(|limit| limit.what.as_str()).collect();
        let said = said.join("; ");
        self.limits.retry_at = refused.iter().any(|limit| limit.may_pass).then(|| now + RETRY_AFTER);
        if said == self.limits.said {
            return;
        }
        let (level, text) = match said.is_empty() {
            true => (Level::Info, "has its new limits now".to_owned()),
            false => (Level::Warn, format!("could not be given a new limit: {said}")),
        };
        self.limits.said = said;
        out.push(Action::Log { level, message: text.clone() });
        self.note("instance_limits", text);
    }
}
