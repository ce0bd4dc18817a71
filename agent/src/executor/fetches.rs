//! Fetches what the successors of running instances need, and looks for what they read, a few at a time, beside everything
//! else: nothing that runs or starts waits for it. Owned by the executor; answers go to the main loop as inputs.

use std::collections::BTreeMap;
use std::sync::Arc;

use nave_agent_core::Input;
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::spawn::SpawnContext;
use crate::provision::artifacts::cutoff::Cutoff;
use crate::provision::{self, ProvisionError};

/// Each is one process, one connection and one thread that mostly waits; starts that fetch for themselves come on top.
const FETCHES_AT_ONCE: usize = 4;

/// All that are under way; dropping it ends them.
#[derive(Debug)]
pub(super) struct Fetches {
    inputs: mpsc::Sender<(InstanceId, Input)>,
    tasks: JoinSet<()>,
    turns: Arc<Semaphore>,
    ending: CancellationToken,
    /// The newest of each instance.
    cutoffs: BTreeMap<InstanceId, Arc<Cutoff>>,
}

impl Fetches {
    pub(super) fn new(inputs: mpsc::Sender<(InstanceId, Input)>) -> Self {
        Self {
            inputs,
            tasks: JoinSet::new(),
            turns: Arc::new(Semaphore::new(FETCHES_AT_ONCE)),
            ending: CancellationToken::new(),
            cutoffs: BTreeMap::new(),
        }
    }

    /// In place of what the instance had ordered before.
    pub(super) fn begin(
        &mut self,
        context: Arc<SpawnContext>,
        instance: InstanceId,
        order: Box<pb::FetchOrder>,
    ) {
        context.artifacts.hold(instance, &order.artifacts);
        let cutoff = Arc::<Cutoff>::default();
        if let Some(before) = self.cutoffs.insert(instance, cutoff.clone()) {
            before.cut();
        }
        let (inputs, turns, ending) = (self.inputs.clone(), self.turns.clone(), self.ending.clone());
        self.tasks.spawn(async move {
            let Ok(_turn) = turns.acquire_owned().await else { return };
            let (template_version, cut) = (order.template_version, cutoff.clone());
            let fetch = move || -> Result<(), ProvisionError> {
                // First, since it takes no time.
                provision::look(&order)?;
                let mut artifacts = order.artifacts.iter();
                artifacts.try_for_each(|artifact| context.artifacts.get(artifact, &cutoff).map(drop))
            };
            if cut.is_cut() {
                return;
            }
            let Ok(fetched) = tokio::task::spawn_blocking(fetch).await else { return };
            if cut.is_cut() {
                return;
            }
            let result = fetched.map_err(|error| error.message);
            tokio::select! {
                biased;
                () = ending.cancelled() => {}
                _gone = inputs.send((instance, Input::Fetched { template_version, result })) => {}
            }
        });
        while self.tasks.try_join_next().is_some() {}
    }

    /// What it had ordered is wanted no longer.
    pub(super) fn cancel(&mut self, context: &SpawnContext, instance: InstanceId) {
        context.artifacts.release(instance);
        if let Some(cutoff) = self.cutoffs.remove(&instance) {
            cutoff.cut();
        }
    }

    /// Cuts all of them short and waits for their end.
    pub(super) async fn end(&mut self) {
        self.cut_all();
        while self.tasks.join_next().await.is_some() {}
    }

    fn cut_all(&mut self) {
        self.ending.cancel();
        self.turns.close();
        self.cutoffs.values().for_each(|cutoff| cutoff.cut());
    }
}

impl Drop for Fetches {
    fn drop(&mut self) {
        self.cut_all();
    }
}
