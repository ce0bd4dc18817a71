//! The main loop: the one owner of the `Reconciler` and of the ledger.
//!
//! A turn takes what has happened, lets the reconciler decide, makes what must be remembered durable (one sync for
//! all of it), then performs what was decided, and tells the hub what is new. Nothing here waits for a process, for
//! the network or for another task; only for the ledger's disk, because an effect that is not written down may be
//! repeated by the next agent.

mod onlookers;
mod output;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nave_agent_core::directory::Directory;
use nave_agent_core::supervisor::{Level, SignalError, SpawnError, SpawnErrorKind};
use nave_agent_core::{Action, Input, Order, ProcessKey, Reconciler, Supervisor, WallOffset};
use nave_keeper::witness::Witness;
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use onlookers::Onlookers;
use output::{Output, kept_logs};
use parking_lot::Mutex;
use pb::hub_message::Message as FromHub;
use pb::keeper_reply::Reply;
use pb::ledger_record::Record;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::api::Shown;
use crate::clock;
use crate::directory::DirectoryHandle;
use crate::executor::Executor;
use crate::firewall::Told;
use crate::hub::HubEvent;
use crate::keeper::{CallError, KeeperEvent, Purpose};
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::notes::Notes;
use crate::notify::Said;
use crate::proxy::Proxy;
use crate::run::RunError;
use crate::sequence::Sequencer;
use crate::uplink::Uplink;

/// Taken in one turn, so that a burst shares one sync; more would keep the effects of the first waiting.
const EVENTS_PER_TURN: usize = 64;
/// The longest sleep: a machine that was suspended has its deadlines looked at soon after it wakes.
const SLEEP_MAX: Duration = Duration::from_secs(10);
/// While a stop waits for calls to end, they are counted this often.
const COUNT_CALLS: Duration = Duration::from_millis(10);

/// Where events come from.
#[derive(Debug)]
pub(crate) struct Inbox {
    pub(crate) keeper: mpsc::Receiver<KeeperEvent>,
    pub(crate) hub: mpsc::Receiver<HubEvent>,
    /// From probes and jobs.
    pub(crate) inputs: mpsc::Receiver<(InstanceId, Input)>,
    /// From the processes themselves.
    pub(crate) said: mpsc::Receiver<Said>,
}

/// Who is told: the hub, a scrape, and who asks the agent itself.
#[derive(Debug)]
pub(crate) struct Outbox {
    pub(crate) uplink: Uplink,
    pub(crate) metrics: Metrics,
    pub(crate) shown: Shown,
    pub(crate) notes: Notes,
}

#[derive(Debug)]
enum Event {
    Keeper(KeeperEvent),
    Hub(HubEvent),
    Input(InstanceId, Input),
    Said(Said),
    Timer,
    JobDone,
    /// Somebody here calls a service whose endpoints are not known.
    Asked,
    Rest,
}

impl Inbox {
    /// What is there already. The keeper first: its exits explain what the others complain about.
    fn try_next(&mut self) -> Option<Event> {
        if let Ok(event) = self.keeper.try_recv() {
            return Some(Event::Keeper(event));
        }
        if let Ok((instance, input)) = self.inputs.try_recv() {
            return Some(Event::Input(instance, input));
        }
        if let Ok(said) = self.said.try_recv() {
            return Some(Event::Said(said));
        }
        self.hub.try_recv().ok().map(Event::Hub)
    }
}

/// What one turn has to do.
#[derive(Debug, Default)]
struct Work {
    records: Vec<Record>,
    orders: Vec<Order>,
}

pub(crate) struct HostTask {
    reconciler: Reconciler,
    /// `None` only while it is being written.
    ledger: Option<Ledger>,
    sequencer: Sequencer,
    executor: Executor,
    uplink: Uplink,
    inbox: Inbox,
    metrics: Metrics,
    notes: Notes,
    onlookers: Onlookers,
    output: Output,
    witness: Arc<Mutex<Witness>>,
    directory: DirectoryHandle,
    /// The last word on it could not be taken.
    directory_refused: bool,
    /// What is wanted, or asked for, has changed since it was last said what this host has to know.
    interest_due: bool,
    /// Calls under way to what drains, as the reconciler was told.
    calls: BTreeMap<InstanceId, u64>,
    /// Who waits until what was said in this turn is in the ledger.
    hearing: Vec<oneshot::Sender<()>>,
    /// Cancelled when all services are to end before the agent does.
    rest: CancellationToken,
    rests: bool,
}

impl std::fmt::Debug for HostTask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostTask").field("generation", &self.reconciler.generation()).finish_non_exhaustive()
    }
}

impl HostTask {
    pub(crate) fn new(
        reconciler: Reconciler,
        ledger: Ledger,
        executor: Executor,
        inbox: Inbox,
        outbox: Outbox,
        directory: DirectoryHandle,
    ) -> Self {
        let (ledger, sequencer) = (Some(ledger), Sequencer::default());
        let Outbox { uplink, metrics, shown, notes } = outbox;
        let onlookers = Onlookers::new(metrics.clone(), shown);
        Self {
            reconciler,
            ledger,
            sequencer,
            executor,
            uplink,
            inbox,
            metrics,
            notes,
            onlookers,
            output: Output::new(clock::monotonic()),
            witness: Arc::default(),
            directory,
            directory_refused: false,
            interest_due: true,
            calls: BTreeMap::new(),
            hearing: Vec::new(),
            rest: CancellationToken::new(),
            rests: false,
        }
    }

    /// With one that says when all services are to end before the agent does.
    pub(crate) fn resting_on(self, rest: CancellationToken) -> Self {
        Self { rest, ..self }
    }

    /// With one that is to hear at once what becomes of this host's endpoints. It is told before this returns what was
    /// known when the last agent ended: that is what there is until the hub says more.
    pub(crate) fn with_proxy(self, proxy: Proxy) -> Self {
        let this = Self { onlookers: self.onlookers.with_proxy(proxy), ..self };
        this.onlookers.tell_directory(&this.directory, &this.directory.everything());
        this
    }

    /// With one that guards the instances' ports.
    pub(crate) fn with_firewall(self, firewall: watch::Sender<Told>) -> Self {
        Self { onlookers: self.onlookers.with_firewall(firewall), ..self }
    }

    /// With one that has watched the processes already.
    pub(crate) fn witnessed_by(self, witness: Arc<Mutex<Witness>>) -> Self {
        Self { witness, ..self }
    }

    /// Runs until `shutdown`, at the end of a turn; processes are left alone.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) -> Result<(), RunError> {
        let ended = self.turns(shutdown).await;
        self.executor.end().await;
        ended
    }

    async fn turns(&mut self, shutdown: CancellationToken) -> Result<(), RunError> {
        self.say_interest();
        self.onlookers.tell_users(&self.reconciler);
        self.executor.list();
        loop {
            let sleep = self.until_wake();
            let event = tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                () = self.rest.cancelled(), if !self.rests => Event::Rest,
                event = self.inbox.keeper.recv() => match event {
                    Some(event) => Event::Keeper(event),
                    None => return Err(RunError::KeeperLost),
                },
                () = self.executor.job_done() => Event::JobDone,
                () = self.directory.asks() => Event::Asked,
                Some((instance, input)) = self.inbox.inputs.recv() => Event::Input(instance, input),
                Some(said) = self.inbox.said.recv() => Event::Said(said),
                Some(event) = self.inbox.hub.recv() => Event::Hub(event),
                () = tokio::time::sleep(sleep) => Event::Timer,
            };
            self.turn(event).await?;
            if self.reconciler.is_at_rest() {
                info!("all services have ended, as asked, and the agent does too");
                shutdown.cancel();
            }
        }
    }

    fn until_wake(&self) -> Duration {
        let next = [self.reconciler.next_wake(), self.uplink.next_wake(), self.output.next_wake()];
        let next = next.into_iter().flatten().min();
        if self.reconciler.draining().next().is_some() {
            let soon = next.map_or(COUNT_CALLS, |at| at.since(clock::monotonic()).min(COUNT_CALLS));
            return soon;
        }
        next.map_or(SLEEP_MAX, |at| at.since(clock::monotonic())).min(SLEEP_MAX)
    }

    async fn turn(&mut self, event: Event) -> Result<(), RunError> {
        let mut work = Work::default();
        self.take(event, &mut work)?;
        for _ in 1..EVENTS_PER_TURN {
            let Some(event) = self.inbox.try_next() else { break };
            self.take(event, &mut work)?;
        }
        self.count_calls(&mut work);
        work.orders.extend(self.reconciler.tick(clock::monotonic(), &mut rand::rng()));
        let mut stirred = self.reconciler.take_stirred();
        if stirred {
            // Before any effect: nothing new goes to a process that is about to be told to end.
            self.onlookers.tell_proxy(&self.reconciler);
        }
        self.carry_out(work).await?;
        for noted in self.hearing.drain(..) {
            // Who waits no longer needs not know.
            let _ended = noted.send(());
        }
        stirred |= self.reconciler.take_stirred();
        if stirred {
            self.onlookers.tell_proxy(&self.reconciler);
            self.onlookers.tell_others(&self.reconciler);
        }
        self.say_alarms();
        let now = clock::monotonic();
        let wall = WallOffset::measure(now, clock::wall_unix_ns());
        self.say_interest();
        self.uplink.say(&mut self.reconciler, now, wall);
        Ok(())
    }

    fn take(&mut self, event: Event, work: &mut Work) -> Result<(), RunError> {
        match event {
            Event::Timer | Event::JobDone => {}
            Event::Rest => {
                self.rests = true;
                info!("all services are to end, and the agent after them");
                work.orders.extend(self.reconciler.rest(clock::monotonic(), &mut rand::rng()));
            }
            Event::Asked => self.interest_due = true,
            Event::Input(instance, input) => {
                if let Input::SpawnFailed { .. } = input {
                    // The order could not even be made, so the keeper will not answer.
                    work.orders.extend(self.sequencer.answered(instance));
                }
                self.input(instance, input, work);
            }
            Event::Said(said) => self.said(said, work),
            Event::Keeper(event) => self.keeper_event(event, work)?,
            Event::Hub(event) => self.hub_event(event, work),
        }
        Ok(())
    }

    fn input(&mut self, instance: InstanceId, input: Input, work: &mut Work) {
        let orders = self.reconciler.input(clock::monotonic(), &mut rand::rng(), instance, input);
        work.orders.extend(orders);
    }

    fn said(&mut self, said: Said, work: &mut Work) {
        let Said { instance, key, messages, noted } = said;
        for message in messages {
            self.input(instance, Input::Notify { key, message }, work);
        }
        self.hearing.push(noted);
    }

    fn keeper_event(&mut self, event: KeeperEvent, work: &mut Work) -> Result<(), RunError> {
        match event {
            KeeperEvent::Exited(mut exit) => {
                let instance = InstanceId(exit.instance_id);
                self.onlookers.exited(instance, exit.epoch);
                self.executor.ended(instance, ProcessKey { epoch: exit.epoch, attempt: exit.attempt });
                self.metrics.process_exits.inc();
                self.witness.lock().explain(&mut exit);
                work.orders.extend(self.reconciler.exited(clock::monotonic(), &mut rand::rng(), *exit));
            }
            KeeperEvent::OutputDropped(dropped) => {
                self.metrics.lines_dropped.inc_by(dropped.lines);
                self.output.dropped(InstanceId(dropped.instance_id), dropped.lines, &dropped.refused);
            }
            KeeperEvent::Answered { purpose: Purpose::Spawn { instance, key }, result } => {
                work.orders.extend(self.sequencer.answered(instance));
                let runs = matches!(*result, Ok(Reply::Spawned(_)));
                let input = match *result {
                    Ok(Reply::Spawned(spawned)) => {
                        self.metrics.process_starts.inc();
                        if let Some(supervisor) = self.reconciler.supervisor(instance) {
                            self.executor.watch_memory(instance, key, supervisor.wanted());
                        }
                        let process = spawned.process.unwrap_or_default();
                        self.witness.lock().watch(&process);
                        Input::Spawned { key, process, started_unix_ns: spawned.started_unix_ns }
                    }
                    other => Input::SpawnFailed { key, error: spawn_error(other) },
                };
                self.input(instance, input, work);
                // Not before it is known to run: who says nothing yet is not heard.
                if let Some(supervisor) = self.reconciler.supervisor(instance).filter(|_| runs) {
                    self.executor.hear(instance, key, supervisor.wanted());
                }
            }
            KeeperEvent::Answered { purpose: Purpose::Signal { instance, key, signal }, result } => {
                work.orders.extend(self.sequencer.answered(instance));
                if let Err(failed) = *result {
                    let error = signal_error(&failed);
                    self.input(instance, Input::SignalFailed { key, signal, error }, work);
                }
            }
            KeeperEvent::Answered { purpose: Purpose::List, result } => match *result {
                Ok(Reply::Processes(list)) => self.keeper_processes(&list.processes, work),
                other => return Err(RunError::KeeperList { message: format!("{other:?}") }),
            },
            KeeperEvent::Answered { purpose: Purpose::OomKills, result } => self.oom_kills(*result, work),
        }
        Ok(())
    }

    /// Kills that processes have outlived.
    fn oom_kills(&mut self, answer: Result<Reply, CallError>, work: &mut Work) {
        // An older keeper lays them to the process's own end.
        let Ok(Reply::OomKills(told)) = answer else { return };
        for pb::OutlivedOomKills { instance_id, epoch, attempt, kills, limit_bytes } in told.outlived {
            let input = Input::OomOutlived { key: ProcessKey { epoch, attempt }, kills, limit_bytes };
            self.input(InstanceId(instance_id), input, work);
        }
    }

    fn keeper_processes(&mut self, processes: &[pb::KeptProcess], work: &mut Work) {
        let is_first = !self.reconciler.is_keeper_known();
        if is_first {
            let alive = processes.iter().filter(|process| !process.leftover).count();
            info!(processes = alive, "the keeper has said what it runs");
        }
        let running = processes.iter().filter(|process| !process.leftover);
        running
            .filter_map(|kept| kept.process.as_ref())
            .for_each(|process| self.witness.lock().watch(process));
        let now = clock::monotonic();
        work.orders.extend(self.reconciler.keeper_processes(now, &mut rand::rng(), processes));
        self.output.kept(processes);
        self.output.limit(&self.reconciler, &mut self.executor);
        for supervisor in self.reconciler.supervisors() {
            if supervisor.state().process().is_some() {
                let (instance, key) = (supervisor.instance(), supervisor.key());
                self.executor.hear(instance, key, supervisor.wanted());
                self.executor.watch_memory(instance, key, supervisor.wanted());
            }
        }
        if is_first {
            let listed = processes.iter().map(|kept| {
                let key = ProcessKey { epoch: kept.epoch, attempt: kept.attempt };
                (InstanceId(kept.instance_id), key)
            });
            let known = self.reconciler.supervisors().map(|one| (one.instance(), one.key()));
            self.executor.hear_only(&listed.chain(known).collect());
        }
    }

    fn hub_event(&mut self, event: HubEvent, work: &mut Work) {
        match event {
            HubEvent::Opening { outgoing, close } => {
                // What it then knows is no more than what it names.
                self.say_interest();
                // After a refusal the two do not agree, and only the whole is sure to mend that.
                let known = self.directory.read(Directory::known).filter(|_| !self.directory_refused);
                self.uplink.opening(outgoing, close, self.reconciler.generation(), known);
            }
            HubEvent::Lease { until } if self.uplink.is_followed() => {
                let orders = self.reconciler.lease(clock::monotonic(), &mut rand::rng(), until);
                work.orders.extend(orders);
            }
            // What was wanted could not be taken, so the lease may be for something else.
            HubEvent::Lease { .. } => {}
            HubEvent::GivenUp => {
                let (nothing, orders) = self.reconciler.given_up(clock::monotonic(), &mut rand::rng());
                if self.reconciler.supervisors().any(|one| !one.is_gone()) {
                    warn!("this host was given up: all that it runs is stopped, since it runs elsewhere now");
                }
                work.records.push(Record::Wanted(nothing));
                work.orders.extend(orders);
            }
            HubEvent::Closed => {
                self.uplink.closed();
                self.metrics.session_connected.set(0);
            }
            HubEvent::Message(message) => match *message {
                FromHub::Welcome(_) => {
                    self.uplink.welcomed();
                    self.metrics.session_connected.set(1);
                    self.metrics.sessions.inc();
                }
                FromHub::Wanted(set) => {
                    self.interest_due = true;
                    self.wanted(set, work);
                    self.output.limit(&self.reconciler, &mut self.executor);
                }
                FromHub::Delta(delta) => {
                    self.interest_due = true;
                    self.delta(delta, work);
                    self.output.limit(&self.reconciler, &mut self.executor);
                }
                FromHub::ReportAcknowledged(acknowledged) => {
                    let committed = self.uplink.acknowledged(acknowledged.sequence);
                    self.reconciler.acknowledge_ends(&committed.ends);
                    work.orders.extend(self.reconciler.acknowledge_gone(&committed.gone));
                }
                FromHub::Directory(update) => self.directory_told(update),
                FromHub::CallersLeft(left) => {
                    self.count_calls(work);
                    let now = clock::monotonic();
                    work.orders.extend(self.reconciler.callers_left(now, &mut rand::rng(), left.revision));
                }
                FromHub::Goodbye(_) | FromHub::Lease(_) => {} // the session's affair
            },
        }
    }

    fn wanted(&mut self, set: pb::WantedSet, work: &mut Work) {
        let is_news = self.reconciler.is_doubtful()
            || self.reconciler.generation() != (set.incarnation, set.generation);
        let (generation, instances) = (set.generation, set.instances.len());
        match self.reconciler.apply_wanted(clock::monotonic(), &mut rand::rng(), set.clone()) {
            Ok(orders) => {
                info!(generation, instances, "the hub has said what it wants");
                if is_news {
                    work.records.push(Record::Wanted(set));
                }
                work.orders.extend(orders);
                self.onlookers.tell_users(&self.reconciler);
            }
            Err(stale) => {
                warn!(%stale, "this member is behind; looking for another");
                self.uplink.leave();
            }
        }
    }

    fn delta(&mut self, delta: pb::WantedDelta, work: &mut Work) {
        match self.reconciler.apply_delta(clock::monotonic(), &mut rand::rng(), delta.clone()) {
            Ok(orders) => {
                work.records.push(Record::Delta(delta));
                work.orders.extend(orders);
                self.onlookers.tell_users(&self.reconciler);
            }
            Err(gap) => {
                // Every session begins with the whole set.
                warn!(%gap, "a change of the wanted set is missing; beginning a new session");
                self.uplink.leave();
            }
        }
    }

    /// What the hub says of the services that are called from here.
    fn directory_told(&mut self, update: pb::DirectoryUpdate) {
        let (revision, whole, acknowledge) = (update.revision, update.whole, update.acknowledge);
        match self.directory.take(update) {
            Ok(change) => {
                debug!(revision, whole, services = change.services.len(), "the directory has changed");
                self.directory_refused = false;
                self.onlookers.tell_directory(&self.directory, &change);
                if acknowledge {
                    self.uplink.directory_taken(revision);
                }
            }
            Err(refusal) => {
                warn!(%refusal, "the directory goes on as it was; beginning a new session");
                self.directory_refused = true;
                self.uplink.leave();
            }
        }
    }

    /// Stops wait for calls under way; the proxy counts them.
    fn count_calls(&mut self, work: &mut Work) {
        let draining: Vec<InstanceId> = self.reconciler.draining().collect();
        self.calls.retain(|instance, _| draining.contains(instance));
        for instance in draining {
            let Some(count) = self.onlookers.in_flight(instance) else { return };
            if self.calls.insert(instance, count) != Some(count) {
                self.input(instance, Input::InFlight { count }, work);
            }
        }
    }

    fn say_interest(&mut self) {
        if std::mem::take(&mut self.interest_due) {
            let manifests = self.reconciler.supervisors().filter_map(|one| one.wanted().manifest.as_ref());
            let (interest, change) = self.directory.interest(manifests);
            self.onlookers.tell_directory(&self.directory, &change);
            self.uplink.interest(interest);
        }
    }

    /// Ledger first, effects after, round by round; what an effect answers at once is decided upon at once.
    async fn carry_out(&mut self, mut work: Work) -> Result<(), RunError> {
        while !work.records.is_empty() || !work.orders.is_empty() {
            let round = self.sequencer.round(std::mem::take(&mut work.orders));
            work.orders = round.later;
            work.records.extend(round.records);
            self.write_down(std::mem::take(&mut work.records)).await?;
            for Order { instance, action } in round.effects {
                self.perform(instance, action, &mut work);
            }
        }
        if let Some(up_to_sequence) = self.sequencer.acknowledge() {
            self.executor.acknowledge_exits(up_to_sequence);
        }
        self.shorten_ledger().await
    }

    async fn write_down(&mut self, records: Vec<Record>) -> Result<(), RunError> {
        if records.is_empty() {
            return Ok(());
        }
        let mut ledger = self.ledger.take().expect("it is put back after each write");
        let written = tokio::task::spawn_blocking(move || ledger.append(records).map(|()| ledger)).await;
        self.ledger = Some(written.map_err(|_| RunError::Stopped)??);
        Ok(())
    }

    /// Only while no record waits for its effect: the rewrite says all that is decided, not all that is done.
    async fn shorten_ledger(&mut self) -> Result<(), RunError> {
        if !self.ledger.as_ref().is_some_and(Ledger::wants_rewrite) || !self.sequencer.is_settled() {
            return Ok(());
        }
        let mut ledger = self.ledger.take().expect("it is put back after each write");
        let records = self.reconciler.ledger_records();
        let written = tokio::task::spawn_blocking(move || ledger.rewrite(&records).map(|()| ledger)).await;
        self.ledger = Some(written.map_err(|_| RunError::Stopped)??);
        Ok(())
    }

    fn perform(&mut self, instance: InstanceId, action: Action, work: &mut Work) {
        match action {
            Action::PickPorts { fixed, dynamic } => {
                let taken = self.taken_ports(instance);
                if let Some(ports) = self.executor.pick_ports(instance, &fixed, &dynamic, &taken) {
                    // Decided now, so that the next to pick sees these as taken.
                    self.input(instance, Input::PortsPicked { ports }, work);
                }
            }
            Action::Prepare(order) => self.executor.prepare(instance, order),
            Action::CancelPreparation { key } => self.executor.cancel_preparation(instance, key),
            Action::FetchAhead(order) => self.executor.fetch_ahead(instance, order),
            Action::CancelFetch => self.executor.cancel_fetch(instance),
            Action::RunHook(order) => self.executor.run_hook(instance, order),
            Action::EndHook { key, hook } => {
                let wanted = self.reconciler.supervisor(instance).map(Supervisor::wanted);
                self.executor.end_hook(instance, key, hook, wanted);
            }
            Action::Spawn(order) => {
                self.executor.prepare_to_hear(instance, order.key, &order.wanted);
                if let Some(manifest) = &order.wanted.manifest {
                    self.output.begun(instance, order.key.epoch, manifest);
                }
                self.executor.spawn(instance, order);
            }
            Action::Signal { key, signal, scope, cause } => self.executor.signal(
                instance,
                pb::Signal {
                    instance_id: instance.0,
                    epoch: key.epoch,
                    attempt: key.attempt,
                    signal,
                    scope: pb::SignalScope::from(scope).into(),
                    cause: cause.into(),
                },
            ),
            Action::SetDeadline { key, deadline } => self.executor.set_deadline(instance, key, deadline),
            Action::SetLimits { key, resources } => {
                if let Some(supervisor) = self.reconciler.supervisor(instance) {
                    self.executor.set_limits(instance, key, resources, supervisor.wanted());
                }
            }
            Action::SweepCgroup { key } => self.executor.sweep(instance, key),
            Action::StartProbe(order) => {
                if let Some(supervisor) = self.reconciler.supervisor(instance) {
                    self.executor.start_probe(instance, order, supervisor);
                }
            }
            Action::StopProbes => self.executor.stop_probes(instance),
            Action::ListProcesses => self.executor.list(),
            Action::Forget { epoch } => {
                self.output.forget(instance, epoch);
                self.executor.forget(instance, epoch, kept_logs(&self.reconciler));
            }
            Action::ForgetLedger => self.executor.remove_directory(instance),
            Action::Log { level, message } => self.log(instance, level, &message),
            // The sequencer's, or kept by the reconciler.
            Action::Persist(_)
            | Action::AcknowledgeExits { .. }
            | Action::Report
            | Action::Gone
            | Action::WakeAt(_) => {}
        }
    }

    /// Ports of all other instances, and whose they are.
    fn taken_ports(&self, instance: InstanceId) -> BTreeMap<u16, String> {
        let others = self.reconciler.supervisors().filter(|one| one.instance() != instance && !one.is_gone());
        others
            .flat_map(|one| {
                let holder = format!("{} of {}", one.instance(), service(one));
                one.ports().values().map(move |port| (*port, holder.clone()))
            })
            .collect()
    }

    /// What a person must see to on this host.
    fn say_alarms(&mut self) {
        let alarms = self.output.look_after(clock::monotonic(), &self.reconciler, &mut self.executor);
        if let Some(alarms) = alarms {
            self.uplink.alarms(alarms);
        }
        if let Some(lacks) = self.notes.news() {
            self.uplink.lacks(lacks);
        }
    }

    fn log(&self, instance: InstanceId, level: Level, message: &str) {
        let service = self.reconciler.supervisor(instance).map(service).unwrap_or_default();
        match level {
            Level::Info => info!(service, %instance, "{message}"),
            Level::Warn => warn!(service, %instance, "{message}"),
            Level::Error => error!(service, %instance, "{message}"),
        }
    }
}

fn service(supervisor: &Supervisor) -> &str {
    supervisor.wanted().manifest.as_ref().map(|manifest| manifest.name.as_str()).unwrap_or_default()
}

fn spawn_error(result: Result<Reply, CallError>) -> SpawnError {
    match result {
        Err(CallError::Refused(error)) => {
            SpawnError { kind: error.kind().into(), errno: error.errno, message: error.message }
        }
        Err(CallError::Unsupported) => SpawnError {
            kind: SpawnErrorKind::System,
            errno: 0,
            message: "the keeper is too old to start processes".to_owned(),
        },
        Err(CallError::Lost) | Ok(_) => SpawnError {
            kind: SpawnErrorKind::Unavailable,
            errno: 0,
            message: "the keeper did not say what became of it".to_owned(),
        },
    }
}

fn signal_error(error: &CallError) -> SignalError {
    match error {
        CallError::Refused(error) => error.kind().into(),
        CallError::Lost => SignalError::Unavailable,
        CallError::Unsupported => SignalError::System,
    }
}
