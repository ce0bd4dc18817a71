//! The scheduler's loop: plan what is dirty, propose it, look again. All deciding is in `nave_orchestrator_core`;
//! here is when, and how much at once. One proposal is under way at a time, so a plan never builds on a state that
//! its own earlier steps are about to change.

use std::sync::Arc;
use std::time::Duration;

use nave_orchestrator_core::limits::STEPS_PER_COMMAND;
use nave_orchestrator_core::{Plan, PlanCursor, plan_dirty};
use nave_proto::pb;
use pb::command::Body;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::{leadership, still_leads};
use crate::api::{self, Hub};
use crate::clock;

/// Changes of this time are planned together.
const COALESCE: Duration = Duration::from_millis(5);
/// How long one proposal may take before it is looked again.
const DEADLINE: Duration = Duration::from_secs(5);
/// Even when nothing is due, so that a timer missed by a jump of the clock is not missed for ever.
const LOOK_AT_LEAST: Duration = Duration::from_secs(5);
/// The same plan again means that the log did not take it: a fault, which must not spin.
const REPEATED_MAX: Duration = Duration::from_secs(1);
/// After a proposal that was not committed.
const RETRY: Duration = Duration::from_millis(100);

/// Plans while this member leads, until it stops.
pub(crate) async fn run(hub: Arc<Hub>) {
    while let Some(term) = leadership(&hub).await {
        debug!(term, "scheduler begins");
        lead(&hub, term).await;
        if hub.stop.is_cancelled() {
            return;
        }
    }
}

/// One leadership, beginning with everything dirty.
async fn lead(hub: &Arc<Hub>, term: u64) {
    let mut cursor = PlanCursor::default();
    let mut changed = hub.changes.subscribe();
    let mut repeated = Repeated::default();
    while still_leads(hub, term) && !hub.stop.is_cancelled() {
        changed.mark_unchanged();
        let now = now(hub);
        let begun = Instant::now();
        let plan = plan_dirty(&hub.raft.state(), &mut cursor, now, STEPS_PER_COMMAND);
        hub.metrics.plan_seconds.observe(begun.elapsed().as_secs_f64());
        let Plan { steps, wake_at, more, .. } = plan;
        if !steps.is_empty() {
            sleep(repeated.delay(&steps)).await;
            if !commit(hub, steps).await {
                // Nothing is known of what the steps did: everything is dirty again.
                cursor = PlanCursor::default();
                sleep(RETRY).await;
            }
            continue;
        }
        if more {
            tokio::task::yield_now().await;
            continue;
        }
        let wait = wake_at.map_or(LOOK_AT_LEAST, |at| until(at, now).min(LOOK_AT_LEAST));
        tokio::select! {
            woken = timeout(wait, changed.changed()) => match woken {
                Ok(Ok(())) => sleep(COALESCE).await,
                Ok(Err(_)) => return,
                Err(_) => {}
            },
            () = hub.stop.cancelled() => return,
        }
    }
}

/// Wall time, but never before what the log has seen: plans must not go back.
fn now(hub: &Hub) -> i64 {
    clock::unix_now_ns().max(hub.raft.state().time_unix_ns())
}

fn until(at_unix_ns: i64, now_unix_ns: i64) -> Duration {
    Duration::from_nanos(u64::try_from(at_unix_ns.saturating_sub(now_unix_ns)).unwrap_or(0))
}

/// Whether the steps are in the log and applied.
async fn commit(hub: &Hub, steps: Vec<pb::PlanStep>) -> bool {
    let count = steps.len();
    let body = Body::CommitPlan(pb::CommitPlan { steps });
    match hub.raft.propose(api::command("hub".to_owned(), None, body), Instant::now() + DEADLINE).await {
        Ok(reply) => {
            debug!(steps = count, revision = reply.revision, "plan committed");
            hub.metrics.plan_steps.inc_by(u64::try_from(count).unwrap_or(u64::MAX));
            if let Some(pb::reply::Result::Rejected(rejected)) = reply.result {
                warn!(reason = rejected.message, "the plan was rejected, planning anew");
                return false;
            }
            true
        }
        Err(error) => {
            info!(%error, steps = count, "plan not committed, planning anew");
            false
        }
    }
}

/// Notices a plan that comes again unchanged.
#[derive(Debug, Default)]
struct Repeated {
    last: Vec<pb::PlanStep>,
    delay: Duration,
}

impl Repeated {
    fn delay(&mut self, steps: &[pb::PlanStep]) -> Duration {
        if self.last != steps {
            self.last = steps.to_vec();
            self.delay = Duration::ZERO;
            return Duration::ZERO;
        }
        self.delay = (self.delay * 2).clamp(Duration::from_millis(20), REPEATED_MAX);
        if self.delay == REPEATED_MAX {
            warn!(steps = steps.len(), first = ?steps.first(), "the same plan again and again; the log does not take it");
        }
        self.delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forget(instance_id: u64) -> pb::PlanStep {
        let forget = pb::ForgetInstance { instance_id, epoch: 1 };
        pb::PlanStep { step: Some(pb::plan_step::Step::Forget(forget)) }
    }

    #[test]
    fn the_same_plan_again_is_slowed_down_and_another_is_not() {
        let mut repeated = Repeated::default();
        assert_eq!(repeated.delay(&[forget(1)]), Duration::ZERO);
        assert_eq!(repeated.delay(&[forget(1)]), Duration::from_millis(20));
        assert_eq!(repeated.delay(&[forget(1)]), Duration::from_millis(40));
        assert_eq!(repeated.delay(&[forget(2)]), Duration::ZERO);
        for _ in 0..20 {
            repeated.delay(&[forget(2)]);
        }
        assert_eq!(repeated.delay(&[forget(2)]), REPEATED_MAX);
    }

    #[test]
    fn a_moment_that_has_passed_is_due_at_once() {
        assert_eq!(until(5, 9), Duration::ZERO);
        assert_eq!(until(1_000_000_009, 9), Duration::from_secs(1));
    }
}
