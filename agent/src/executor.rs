//! Performs what the reconciler decides: talks to the keeper, looks for ports, makes directories, runs probes.
//!
//! What touches the disk or waits is a job of its own, one at a time per instance, so that what was ordered first is
//! done first while instances never wait for each other. Answers come back as inputs, or, from the keeper, as its
//! events. Called by the main loop alone, after what an action relies on is in the ledger.

mod confine;
pub(crate) mod directories;
mod fetches;
mod heirs;
mod hooks;
pub(crate) mod ports;
pub(crate) mod spawn;
pub(crate) mod users;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use nave_agent_core::env::UnknownName;
use nave_agent_core::ports::{PickPortsError, pick};
use nave_agent_core::supervisor::{Deadline, Hook, HookOrder, ProbeOrder, SpawnOrder};
use nave_agent_core::{Input, ProcessKey, Supervisor};
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use pb::keeper_request::Request;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;
use tracing::warn;

use crate::keeper::{CallError, KeeperHandle, Purpose};
use crate::notify::{EarName, Ears, NotifyTasks, Said, Speaker, Way, ears_of};
use crate::pressure::Pressure;
use crate::probes::{Check, Probes};
use crate::provision::artifacts::cutoff::Cutoff;
use directories::KeptLogs;
use fetches::Fetches;
use hooks::Hooks;
use spawn::SpawnContext;

/// Ports that others hold are met by chance; after so many the range is as good as full.
const PICK_TRIES: usize = 100;
/// Pauses of one sweep: killed processes are gone within milliseconds, or stuck in the kernel for long.
const SWEEP_PAUSES_MS: [u64; 6] = [5, 20, 75, 200, 400, 800];
/// The keeper needs a moment to remove directories of processes that have just ended.
const FORGET_TRIES: u32 = 5;
const FORGET_PAUSE: Duration = Duration::from_secs(1);
/// For what was cut short at the agent's end: its processes are killed, so only the disk takes time.
const END_WITHIN: Duration = Duration::from_secs(5);

/// What is done beside the main loop.
#[derive(Debug, Clone, PartialEq)]
enum Job {
    Prepare(Preparation),
    Spawn(Box<SpawnOrder>),
    Signal(pb::Signal),
    Limit(ProcessKey, Box<pb::Resources>, String),
    Sweep(ProcessKey),
    /// The keeper is to hold what a process speaks into.
    Keep(EarName),
    /// And no longer.
    LetGo(EarName),
}

/// Where the executor tells the main loop what happens.
#[derive(Debug, Clone)]
pub(crate) struct Tells {
    pub(crate) inputs: mpsc::Sender<(InstanceId, Input)>,
    pub(crate) said: mpsc::Sender<Said>,
}

/// Of one attempt, to be cut short from outside.
#[derive(Debug, Clone)]
struct Preparation {
    order: Box<SpawnOrder>,
    cutoff: Arc<Cutoff>,
}

impl PartialEq for Preparation {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.cutoff, &other.cutoff)
    }
}

#[derive(Debug)]
pub(crate) struct Executor {
    context: Arc<SpawnContext>,
    keeper: KeeperHandle,
    port_range: RangeInclusive<u16>,
    inputs: mpsc::Sender<(InstanceId, Input)>,
    probes: Probes,
    notify: NotifyTasks,
    pressure: Pressure,
    hooks: Hooks,
    fetches: Fetches,
    /// Per instance, what waits behind the job that runs.
    queues: BTreeMap<InstanceId, VecDeque<Job>>,
    /// `None`: a job that nothing waits for.
    running: JoinSet<Option<InstanceId>>,
    /// Whatever is being made for starts, in threads that no end of a task ends.
    making: TaskTracker,
}

impl Executor {
    pub(crate) fn new(
        context: Arc<SpawnContext>,
        keeper: KeeperHandle,
        port_range: RangeInclusive<u16>,
        ears: Ears,
        tells: Tells,
    ) -> Self {
        let Tells { inputs, said } = tells;
        let notify = NotifyTasks::new(keeper.clone(), ears, said, inputs.clone());
        Self {
            context,
            keeper,
            port_range,
            probes: Probes::new(inputs.clone()),
            notify,
            pressure: Pressure::new(inputs.clone()),
            hooks: Hooks::new(inputs.clone()),
            fetches: Fetches::new(inputs.clone()),
            inputs,
            queues: BTreeMap::new(),
            running: JoinSet::new(),
            making: TaskTracker::new(),
        }
    }

    /// Waits for a job to end and starts the next one of its instance. Cancel-safe; never ends while nothing runs.
    pub(crate) async fn job_done(&mut self) {
        match self.running.join_next().await {
            Some(Ok(Some(instance))) => self.next_job(instance),
            Some(Ok(None) | Err(_)) => {} // jobs do not panic, and only the end of the agent aborts them
            None => std::future::pending().await,
        }
    }

    pub(crate) fn spawn(&mut self, instance: InstanceId, order: Box<SpawnOrder>) {
        self.enqueue(instance, Job::Spawn(order));
    }

    pub(crate) fn prepare(&mut self, instance: InstanceId, order: Box<SpawnOrder>) {
        self.enqueue(instance, Job::Prepare(Preparation { order, cutoff: Arc::default() }));
    }

    /// Whatever of that attempt is being made; it answers at once.
    pub(crate) fn cancel_preparation(&mut self, instance: InstanceId, key: ProcessKey) {
        for job in self.queues.get(&instance).into_iter().flatten() {
            if let Job::Prepare(preparation) = job
                && preparation.order.key == key
            {
                preparation.cutoff.cut();
            }
        }
    }

    /// For a successor of the instance, while that runs.
    pub(crate) fn fetch_ahead(&mut self, instance: InstanceId, order: Box<pb::FetchOrder>) {
        self.fetches.begin(self.context.clone(), instance, order);
    }

    pub(crate) fn cancel_fetch(&mut self, instance: InstanceId) {
        self.fetches.cancel(&self.context, instance);
    }

    /// Nothing is ordered any more: what would go on for long is cut short and waited for, so that no half of it is left.
    /// What a disk holds up is left to the next agent, which begins it anew.
    pub(crate) async fn end(&mut self) {
        for job in self.queues.values().flatten() {
            if let Job::Prepare(preparation) = job {
                preparation.cutoff.cut();
            }
        }
        // Those that wait behind others are not begun.
        self.queues.clear();
        self.making.close();
        let ended = async { tokio::join!(self.fetches.end(), self.making.wait()) };
        if tokio::time::timeout(END_WITHIN, ended).await.is_err() {
            warn!("what is being made for starts does not end; the next agent makes it anew");
        }
    }

    pub(crate) fn run_hook(&mut self, instance: InstanceId, order: Box<HookOrder>) {
        self.hooks.run(self.context.clone(), instance, order);
    }

    /// Also one that is not ours.
    pub(crate) fn end_hook(
        &mut self,
        instance: InstanceId,
        key: ProcessKey,
        hook: Hook,
        wanted: Option<&pb::WantedInstance>,
    ) {
        let group = wanted.and_then(|wanted| self.context.hook_group(instance, wanted, key));
        self.hooks.end(group, instance, key, hook);
    }

    pub(crate) fn signal(&mut self, instance: InstanceId, signal: pb::Signal) {
        self.enqueue(instance, Job::Signal(signal));
    }

    /// Beside the queue: it must not wait behind a job that hangs, and the start itself carries its first deadline.
    pub(crate) fn set_deadline(&mut self, instance: InstanceId, key: ProcessKey, deadline: Deadline) {
        let keeper = self.keeper.clone();
        let request = spawn::deadline(instance, key, deadline);
        self.running.spawn(async move {
            keeper.tell(Request::SetDeadline(request)).await;
            None
        });
    }

    pub(crate) fn limit_log(&mut self, instance: InstanceId, epoch: u64, limits: pb::LogLimits) {
        let keeper = self.keeper.clone();
        let request = pb::SetLogLimits { instance_id: instance.0, epoch, limits: Some(limits) };
        self.running.spawn(async move {
            keeper.tell(Request::SetLogLimits(request)).await;
            None
        });
    }

    /// Of a running process of this service.
    pub(crate) fn set_limits(
        &mut self,
        instance: InstanceId,
        key: ProcessKey,
        resources: pb::Resources,
        wanted: &pb::WantedInstance,
    ) {
        let Some(manifest) = &wanted.manifest else { return };
        self.enqueue(instance, Job::Limit(key, Box::new(resources), manifest.name.clone()));
        // Which limit it is close to has changed as well.
        self.pressure.stop(instance);
        self.watch_memory(instance, key, wanted);
    }

    pub(crate) fn sweep(&mut self, instance: InstanceId, key: ProcessKey) {
        // Asked again while the last one still looks.
        let waits = self.queues.get(&instance).is_some_and(|queue| queue.contains(&Job::Sweep(key)));
        if !waits {
            self.enqueue(instance, Job::Sweep(key));
        }
    }

    pub(crate) fn list(&mut self) {
        let keeper = self.keeper.clone();
        self.running.spawn(async move {
            keeper.ask(Request::List(pb::ListProcesses {}), Purpose::List).await;
            None
        });
    }

    pub(crate) fn acknowledge_exits(&mut self, up_to_sequence: u64) {
        let keeper = self.keeper.clone();
        self.running.spawn(async move {
            keeper.tell(Request::AcknowledgeExits(pb::AcknowledgeExits { up_to_sequence })).await;
            None
        });
    }

    /// Removes what a placement left behind, then logs that are too old.
    pub(crate) fn forget(&mut self, instance: InstanceId, epoch: u64, kept: KeptLogs) {
        self.end_ears(instance, epoch);
        let (keeper, context) = (self.keeper.clone(), self.context.clone());
        self.running.spawn(async move {
            forget(&keeper, instance, epoch).await;
            tidy_cgroups(context.clone(), format!("{instance}-{epoch}")).await;
            prune_logs(context, kept).await;
            None
        });
    }

    /// Removes logs of ended instances that are too old or too many.
    pub(crate) fn prune_logs(&mut self, kept: KeptLogs) {
        let context = self.context.clone();
        self.running.spawn(async move {
            prune_logs(context, kept).await;
            None
        });
    }

    /// The instance has left this host for good.
    pub(crate) fn remove_directory(&mut self, instance: InstanceId) {
        self.end_ears(instance, u64::MAX);
        self.context.notify.remove(instance);
        self.pressure.stop(instance);
        self.hooks.forget(instance);
        let context = self.context.clone();
        self.running.spawn(async move {
            let _ended = tokio::task::spawn_blocking(move || context.directories.forget(instance)).await;
            None
        });
    }

    /// A free port for each name, none of `taken` and none that somebody else listens on.
    pub(crate) fn pick_ports(
        &mut self,
        instance: InstanceId,
        fixed: &BTreeMap<String, u16>,
        dynamic: &[String],
        taken: &BTreeMap<u16, String>,
    ) -> Option<BTreeMap<String, u16>> {
        let mut unusable: BTreeSet<u16> = taken.keys().copied().collect();
        for _ in 0..PICK_TRIES {
            let picked = match pick(&mut rand::rng(), self.port_range.clone(), fixed, dynamic, &unusable) {
                Ok(picked) => picked,
                Err(error) => {
                    let by = match &error {
                        PickPortsError::Taken { port, .. } => taken.get(port).cloned(),
                        PickPortsError::Exhausted { .. } => None,
                    };
                    self.port_clash(instance, error, by);
                    return None;
                }
            };
            let strangers: BTreeMap<&String, u16> = picked
                .iter()
                .filter(|(_, port)| !ports::is_free(**port))
                .map(|(name, port)| (name, *port))
                .collect();
            if strangers.is_empty() {
                return Some(picked);
            }
            let clash = strangers.iter().find(|(name, _)| fixed.contains_key(**name));
            if let Some((name, port)) = clash {
                let error = PickPortsError::Taken { name: (*name).clone(), port: *port };
                self.port_clash(instance, error, None);
                return None;
            }
            unusable.extend(strangers.into_values());
        }
        let name = dynamic.first().cloned().unwrap_or_default();
        let (first, last) = (*self.port_range.start(), *self.port_range.end());
        self.port_clash(instance, PickPortsError::Exhausted { name, first, last }, None);
        None
    }

    /// Says who holds it, which takes a look through /proc.
    fn port_clash(&mut self, instance: InstanceId, error: PickPortsError, by: Option<String>) {
        let inputs = self.inputs.clone();
        self.running.spawn(async move {
            let explained = tokio::task::spawn_blocking(move || explain_clash(&error, by));
            if let Ok(message) = explained.await {
                let _ending = inputs.send((instance, Input::PortClash { message })).await;
            }
            None
        });
    }

    pub(crate) fn start_probe(&mut self, instance: InstanceId, order: ProbeOrder, supervisor: &Supervisor) {
        match self.check(&order, supervisor) {
            Ok(Some(check)) => self.probes.start(instance, order, check),
            Ok(None) => {} // told by the process itself
            Err(why) => warn!(%instance, why, "this probe cannot run"),
        }
    }

    /// Watches the memory of a running process that has a limit.
    pub(crate) fn watch_memory(
        &mut self,
        instance: InstanceId,
        key: ProcessKey,
        wanted: &pb::WantedInstance,
    ) {
        let Some(manifest) = &wanted.manifest else { return };
        let resources = manifest.resources.unwrap_or_default();
        let name = format!("{instance}-{}", key.epoch);
        let group = self.context.cgroups.instance(&manifest.name, &name, &resources);
        self.pressure.watch(instance, key, &group, &resources);
    }

    /// A process has ended; nobody looks at its memory any more.
    pub(crate) fn ended(&mut self, instance: InstanceId, key: ProcessKey) {
        self.pressure.ended(instance, key);
    }

    pub(crate) fn stop_probes(&mut self, instance: InstanceId) {
        self.probes.stop(instance);
    }

    /// Makes what a process that is yet to start will say into how it is, when its manifest says that it does. The keeper
    /// has it before the process starts.
    pub(crate) fn prepare_to_hear(
        &mut self,
        instance: InstanceId,
        key: ProcessKey,
        wanted: &pb::WantedInstance,
    ) {
        let Some(manifest) = &wanted.manifest else { return };
        for name in ears_of(instance, key, manifest) {
            let speaker = self.speaker(instance, key, wanted);
            match self.notify.make(&self.context.notify, name, &speaker) {
                Ok(before) => {
                    before.into_iter().for_each(|before| self.enqueue(instance, Job::LetGo(before)));
                    self.enqueue(instance, Job::Keep(name));
                }
                Err(error) => {
                    warn!(%instance, %error, "its notify socket cannot be made, so it will not be seen ready");
                }
            }
        }
    }

    /// Hears what a running process says of itself, when its manifest says that it does.
    pub(crate) fn hear(&mut self, instance: InstanceId, key: ProcessKey, wanted: &pb::WantedInstance) {
        let Some(manifest) = &wanted.manifest else { return };
        for name in ears_of(instance, key, manifest) {
            let speaker = self.speaker(instance, key, wanted);
            self.notify.hear(&self.context.notify, name, speaker);
        }
    }

    /// What the agents before have left for processes that nobody knows is closed.
    pub(crate) fn hear_only(&mut self, processes: &BTreeSet<(InstanceId, ProcessKey)>) {
        let names = |&(instance, key)| [Way::Socket, Way::Line].map(|way| EarName { instance, key, way });
        let wanted: Vec<EarName> = processes.iter().flat_map(names).collect();
        let ears = self.notify.retain(&wanted);
        let keeper = self.keeper.clone();
        self.running.spawn(async move {
            // One that is lost, or holds nothing, has nothing to close.
            let _nothing = ears.tidy(&keeper, &wanted).await;
            None
        });
    }

    fn end_ears(&mut self, instance: InstanceId, epoch: u64) {
        for closed in self.notify.stop(&self.context.notify, instance, epoch) {
            self.enqueue(instance, Job::LetGo(closed));
        }
    }

    /// As whom the processes of a placement speak.
    fn speaker(&self, instance: InstanceId, key: ProcessKey, wanted: &pb::WantedInstance) -> Speaker {
        let Some(manifest) = &wanted.manifest else { return Speaker::default() };
        let name = format!("{instance}-{}", key.epoch);
        let group =
            self.context.cgroups.instance(&manifest.name, &name, &manifest.resources.unwrap_or_default());
        let is_grouped = !group.cgroup2.is_empty() || !group.cgroup1.is_empty();
        let owner = users::resolve(&manifest.user, wanted.uid).ok().and_then(|run_as| run_as.ids);
        Speaker { owner, group: is_grouped.then_some(name) }
    }

    fn check(&self, order: &ProbeOrder, supervisor: &Supervisor) -> Result<Option<Check>, String> {
        let port = || order.port.ok_or_else(|| "it names a port that the instance does not have".to_owned());
        let check = match &order.spec.check {
            Some(pb::probe::Check::Http(path)) => Check::Http { port: port()?, path: path.clone() },
            Some(pb::probe::Check::Tcp(_)) => Check::Tcp { port: port()? },
            Some(pb::probe::Check::Grpc(_)) => Check::Grpc { port: port()? },
            Some(pb::probe::Check::Exec(exec)) => Check::Exec(self.context.exec_check(
                supervisor.wanted(),
                order.key,
                supervisor.state().process().cloned(),
                supervisor.ports(),
                &exec.command,
            )?),
            Some(pb::probe::Check::Notify(_) | pb::probe::Check::NotifyFd(_)) | None => return Ok(None),
            Some(pb::probe::Check::Log(pattern)) => Check::Log(self.context.log_check(supervisor, pattern)?),
        };
        Ok(Some(check))
    }

    fn enqueue(&mut self, instance: InstanceId, job: Job) {
        let queue = self.queues.entry(instance).or_default();
        queue.push_back(job);
        if queue.len() == 1 {
            self.start_job(instance);
        }
    }

    fn next_job(&mut self, instance: InstanceId) {
        let Some(queue) = self.queues.get_mut(&instance) else { return };
        queue.pop_front();
        match queue.is_empty() {
            true => drop(self.queues.remove(&instance)),
            false => self.start_job(instance),
        }
    }

    /// The job at the head stays there while it runs.
    fn start_job(&mut self, instance: InstanceId) {
        let Some(job) = self.queues.get(&instance).and_then(|queue| queue.front()).cloned() else { return };
        let (keeper, inputs, context) = (self.keeper.clone(), self.inputs.clone(), self.context.clone());
        let (making, ears) = (self.making.clone(), self.notify.ears());
        self.running.spawn(async move {
            match job {
                Job::Prepare(preparation) => {
                    prepare(&inputs, context, &making, instance, preparation).await;
                }
                Job::Spawn(order) => spawn_process(&keeper, &inputs, context, &making, instance, order).await,
                Job::Signal(signal) => {
                    let key = ProcessKey { epoch: signal.epoch, attempt: signal.attempt };
                    let purpose = Purpose::Signal { instance, key, signal: signal.signal };
                    keeper.ask(Request::Signal(signal), purpose).await;
                }
                Job::Limit(key, resources, service) => {
                    let set = move || {
                        let name = format!("{instance}-{}", key.epoch);
                        context.cgroups.adjust(&service, &name, &resources)
                    };
                    if let Ok(refused) = tokio::task::spawn_blocking(set).await {
                        let _ending = inputs.send((instance, Input::LimitsSet { key, refused })).await;
                    }
                }
                Job::Sweep(key) => sweep(&keeper, &inputs, instance, key).await,
                Job::Keep(name) => {
                    // The next keeper gets it when the process is heard.
                    let _lost = ears.keep(&keeper, name).await;
                }
                Job::LetGo(name) => {
                    let request = pb::DropDescriptor { name: name.to_string() };
                    keeper.tell(Request::DropDescriptor(request)).await;
                }
            }
            Some(instance)
        });
    }
}

/// What the keeper does not know of a placement, and what has become empty with it.
async fn tidy_cgroups(context: Arc<SpawnContext>, name: String) {
    let tidied = tokio::task::spawn_blocking(move || {
        context.cgroups.tidy(&name);
        context.tell_of_unit();
    });
    // It fails only when the runtime is going down.
    let _ended = tidied.await;
}

/// Also of artifacts that nobody needs any longer.
async fn prune_logs(context: Arc<SpawnContext>, kept: KeptLogs) {
    let pruned = tokio::task::spawn_blocking(move || {
        context.directories.prune_logs(&kept);
        context.artifacts.clean(&context.directories.runs());
    });
    // It fails only when the runtime is going down.
    let _ended = pruned.await;
}

async fn prepare(
    inputs: &mpsc::Sender<(InstanceId, Input)>,
    context: Arc<SpawnContext>,
    making: &TaskTracker,
    instance: InstanceId,
    Preparation { order, cutoff }: Preparation,
) {
    let key = order.key;
    let made = making.spawn_blocking(move || context.prepare(instance, &order, &cutoff)).await;
    // Else the runtime is going down.
    let Ok(made) = made else { return };
    let result = match made {
        Ok(unknown) => {
            tell_unknown(inputs, instance, key, unknown).await;
            Ok(())
        }
        Err(error) => Err(error),
    };
    let _ending = inputs.send((instance, Input::Prepared { key, result })).await;
}

async fn tell_unknown(
    inputs: &mpsc::Sender<(InstanceId, Input)>,
    instance: InstanceId,
    key: ProcessKey,
    names: BTreeSet<UnknownName>,
) {
    if !names.is_empty() {
        let _ending = inputs.send((instance, Input::NamesUnknown { key, names })).await;
    }
}

/// Done when the order is on its way; the keeper's answer goes to the main loop.
async fn spawn_process(
    keeper: &KeeperHandle,
    inputs: &mpsc::Sender<(InstanceId, Input)>,
    context: Arc<SpawnContext>,
    making: &TaskTracker,
    instance: InstanceId,
    order: Box<SpawnOrder>,
) {
    let key = order.key;
    let preparing = context.clone();
    let prepared = making.spawn_blocking(move || preparing.orders(instance, &order)).await;
    match prepared {
        Ok(Ok((spawn, unknown))) => {
            tell_unknown(inputs, instance, key, unknown).await;
            keeper.ask(Request::Spawn(spawn), Purpose::Spawn { instance, key }).await;
        }
        Ok(Err(error)) => {
            let _ending = inputs.send((instance, Input::SpawnFailed { key, error })).await;
        }
        Err(_) => return, // the runtime is going down
    }
    // Behind the start, so that it costs it nothing; nothing starts before all of the earlier ones have ended.
    let _ending =
        tokio::task::spawn_blocking(move || context.directories.remove_tmp(instance, Some(key))).await;
}

/// Kills what is left of an ended process until the keeper sees nothing of it. No answer: something is stuck, and
/// the reconciler asks again.
async fn sweep(
    keeper: &KeeperHandle,
    inputs: &mpsc::Sender<(InstanceId, Input)>,
    instance: InstanceId,
    key: ProcessKey,
) {
    let left = async || {
        let list = keeper.list().await?;
        Ok::<Option<u32>, CallError>(list.iter().find_map(|process| {
            let is_it = process.instance_id == instance.0
                && process.epoch == key.epoch
                && process.attempt == key.attempt;
            is_it.then_some(process.left)
        }))
    };
    let mut killed = 0;
    for pause in SWEEP_PAUSES_MS {
        match left().await {
            Err(_) => return,
            Ok(None) => {
                let _ending = inputs.send((instance, Input::CgroupEmpty { key, killed })).await;
                return;
            }
            Ok(Some(count)) => {
                killed = killed.max(count);
                let kill = pb::Signal {
                    instance_id: instance.0,
                    epoch: key.epoch,
                    attempt: key.attempt,
                    signal: libc::SIGKILL,
                    scope: pb::SignalScope::Cgroup.into(),
                    cause: pb::ExitCause::Unspecified.into(),
                };
                keeper.tell(Request::Signal(kill)).await;
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        }
    }
}

async fn forget(keeper: &KeeperHandle, instance: InstanceId, epoch: u64) {
    let request = || Request::Forget(pb::Forget { instance_id: instance.0, epoch, remove_logs: false });
    let mut failure = String::new();
    for _ in 0..FORGET_TRIES {
        match keeper.call(request()).await {
            Ok(_) | Err(CallError::Lost | CallError::Unsupported) => return,
            Err(CallError::Refused(error)) if error.kind() == pb::KeeperErrorKind::NotFound => return,
            Err(CallError::Refused(error)) => failure = error.message,
        }
        tokio::time::sleep(FORGET_PAUSE).await;
    }
    warn!(%instance, epoch, failure, "the keeper could not remove what this placement left behind");
}

fn explain_clash(error: &PickPortsError, by: Option<String>) -> String {
    match error {
        PickPortsError::Taken { port, .. } => match by.or_else(|| ports::holder(*port)) {
            Some(holder) => format!("{error}, by {holder}"),
            None => error.to_string(),
        },
        PickPortsError::Exhausted { .. } => error.to_string(),
    }
}
