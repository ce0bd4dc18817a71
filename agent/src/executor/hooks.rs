//! Runs hooks, one at a time for each instance, in a cgroup of their own below the instance's. What is left in it is
//! killed before the next one begins and when it ends, whoever started it: a hook that was given up, one that left a
//! child behind, or one of the agent before us. Owned by the executor; answers go to the main loop as inputs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nave_agent_core::supervisor::{Hook, HookOrder, HookResult};
use nave_agent_core::{Input, ProcessKey};
use nave_proto::ids::InstanceId;
use nave_proto::time::format_duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::spawn::SpawnContext;

/// Killed processes are gone within milliseconds, or stuck in the kernel for long.
const CLEAR_PAUSES_MS: [u64; 8] = [1, 5, 20, 75, 200, 400, 800, 1600];

/// All hooks that run, and the newest that ran of each instance; dropping it ends them.
#[derive(Debug)]
pub(super) struct Hooks {
    inputs: mpsc::Sender<(InstanceId, Input)>,
    tasks: JoinSet<()>,
    turns: BTreeMap<InstanceId, Turn>,
}

/// The newest of an instance.
#[derive(Debug)]
struct Turn {
    end: CancellationToken,
    /// Closed once nothing of it runs.
    over: oneshot::Receiver<()>,
}

impl Hooks {
    pub(super) fn new(inputs: mpsc::Sender<(InstanceId, Input)>) -> Self {
        Self { inputs, tasks: JoinSet::new(), turns: BTreeMap::new() }
    }

    /// Ends the one before, then runs this one.
    pub(super) fn run(&mut self, context: Arc<SpawnContext>, instance: InstanceId, order: Box<HookOrder>) {
        let end = CancellationToken::new();
        let (key, hook, ending) = (order.key, order.hook, end.clone());
        let inputs = self.inputs.clone();
        self.begin(instance, key, hook, end, async move {
            let group = context.hook_group(instance, &order.wanted, order.key);
            clear(&group).await?;
            let done = perform(&inputs, context, instance, order, ending).await;
            clear(&group).await.and(done)
        });
    }

    /// Kills what runs of it, whoever started it.
    pub(super) fn end(&mut self, group: Option<PathBuf>, instance: InstanceId, key: ProcessKey, hook: Hook) {
        self.begin(instance, key, hook, CancellationToken::new(), async move {
            clear(&group).await?;
            Err("it was ended".to_owned())
        });
    }

    /// The instance has left this host for good.
    pub(super) fn forget(&mut self, instance: InstanceId) {
        self.turns.remove(&instance);
    }

    fn begin(
        &mut self,
        instance: InstanceId,
        key: ProcessKey,
        hook: Hook,
        end: CancellationToken,
        work: impl Future<Output = Result<(), String>> + Send + 'static,
    ) {
        let (done, over) = oneshot::channel::<()>();
        let before = self.turns.insert(instance, Turn { end, over });
        let inputs = self.inputs.clone();
        self.tasks.spawn(async move {
            if let Some(before) = before {
                before.end.cancel();
                let _closed = before.over.await;
            }
            let began = Instant::now();
            let outcome = work.await;
            drop(done);
            let result = HookResult { took: began.elapsed(), outcome };
            let _ending = inputs.send((instance, Input::HookEnded { key, hook, result })).await;
        });
        while self.tasks.try_join_next().is_some() {}
    }
}

async fn perform(
    inputs: &mpsc::Sender<(InstanceId, Input)>,
    context: Arc<SpawnContext>,
    instance: InstanceId,
    order: Box<HookOrder>,
    end: CancellationToken,
) -> Result<(), String> {
    let (key, timeout) = (order.key, order.timeout);
    let made = tokio::task::spawn_blocking(move || context.hook_command(instance, &order)).await;
    let (command, unknown) = made.map_err(|_| "the agent is ending".to_owned())??;
    super::tell_unknown(inputs, instance, key, unknown).await;
    tokio::select! {
        biased;
        () = end.cancelled() => Err("it was ended".to_owned()),
        done = tokio::time::timeout(timeout, command.run()) => done
            .unwrap_or_else(|_| Err(format!("it took longer than {} and was killed", format_duration(timeout)))),
    }
}

/// Until nobody is in the cgroup, and it is gone.
async fn clear(group: &Option<PathBuf>) -> Result<(), String> {
    let Some(group) = group else { return Ok(()) };
    let mut failure = String::new();
    for pause in CLEAR_PAUSES_MS {
        let dir = group.clone();
        let cleared = tokio::task::spawn_blocking(move || nave_keeper::clear_cgroup(&dir)).await;
        match cleared {
            Ok(Ok(true)) => return Ok(()),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => failure = format!(" ({error})"),
            Err(_) => return Err("the agent is ending".to_owned()),
        }
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    Err(format!("processes of a hook do not die from SIGKILL{failure}"))
}
