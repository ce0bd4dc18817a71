//! Runs the probes of all instances, each a task of its own that looks, says what it saw, and waits.
//!
//! A readiness probe looks often at first (50 ms, doubling up to its interval), so that a process that is ready at
//! once is seen so; after the first pass, and for liveness always, it keeps to its interval.

mod check;

use std::collections::BTreeMap;
use std::time::Duration;

use nave_agent_core::Input;
use nave_agent_core::supervisor::{ProbeKind, ProbeOrder, ProbeOutcome};
use nave_proto::ids::InstanceId;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

pub(crate) use check::{Check, LogCheck};

const FIRST_INTERVAL: Duration = Duration::from_millis(50);

/// All running probes; dropping it ends them.
#[derive(Debug)]
pub(crate) struct Probes {
    results: mpsc::Sender<(InstanceId, Input)>,
    tasks: JoinSet<()>,
    running: BTreeMap<(InstanceId, ProbeKind), AbortHandle>,
}

impl Probes {
    pub(crate) fn new(results: mpsc::Sender<(InstanceId, Input)>) -> Self {
        Self { results, tasks: JoinSet::new(), running: BTreeMap::new() }
    }

    /// Begins to look, in place of the probe of the same kind that may run.
    pub(crate) fn start(&mut self, instance: InstanceId, order: ProbeOrder, check: Check) {
        let kind = order.kind;
        let task = self.tasks.spawn(look_again_and_again(instance, order, check, self.results.clone()));
        if let Some(old) = self.running.insert((instance, kind), task) {
            old.abort();
        }
        while self.tasks.try_join_next().is_some() {}
    }

    /// Ends all probes of the instance.
    pub(crate) fn stop(&mut self, instance: InstanceId) {
        for kind in [ProbeKind::Ready, ProbeKind::Live] {
            if let Some(task) = self.running.remove(&(instance, kind)) {
                task.abort();
            }
        }
        while self.tasks.try_join_next().is_some() {}
    }
}

async fn look_again_and_again(
    instance: InstanceId,
    order: ProbeOrder,
    check: Check,
    results: mpsc::Sender<(InstanceId, Input)>,
) {
    let mut pause = match order.kind {
        ProbeKind::Ready => FIRST_INTERVAL.min(order.interval),
        ProbeKind::Live => order.interval,
    };
    loop {
        tokio::time::sleep(pause).await;
        let outcome = match check.run(order.timeout).await {
            Ok(()) => {
                pause = order.interval;
                ProbeOutcome::Passed
            }
            Err(why) => {
                pause = (pause * 2).min(order.interval);
                ProbeOutcome::Failed(why)
            }
        };
        let input = Input::ProbeResult { key: order.key, probe: order.kind, outcome };
        if results.send((instance, input)).await.is_err() {
            return;
        }
    }
}
