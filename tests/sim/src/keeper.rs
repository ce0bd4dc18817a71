//! A host's keeper and the processes it runs. They start, become healthy, fall sick, crash, ignore signals and leave
//! children behind. What the agent asks arrives in order; an agent that dies leaves half of it unread.

use std::collections::BTreeMap;

use nave_agent_core::supervisor::{self, SignalError, SignalScope, SpawnError, SpawnErrorKind};
use nave_agent_core::{Action, Input, Order, ProcessKey, SpawnOrder};
use nave_proto::pb;
use rand::Rng as _;

use crate::clock::{Clock, MS, SECOND};
use crate::context::Context;
use crate::event::{Ask, Event, Heal, ToAgent, ToKeeper, Told};
use crate::oracle::Kind;

/// How a process takes its stop signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Temper {
    /// Ends within this time.
    Polite(i64),
    /// Ends on SIGKILL only.
    Deaf,
}

#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) key: ProcessKey,
    pub(crate) serial: u64,
    identity: pb::ProcessIdentity,
    since: i64,
    temper: Temper,
    /// Sweeps that its children survive.
    children: u32,
    /// True time; none: never.
    pub(crate) healthy_at: Option<i64>,
    pub(crate) sick: bool,
    probed: bool,
    /// It crashes only while faults are allowed.
    good: bool,
    cause: Option<pb::ExitCause>,
    service: String,
}

impl Process {
    /// Whether a probe would pass.
    pub(crate) fn is_well(&self, now: i64) -> bool {
        !self.sick && self.healthy_at.is_some_and(|at| at <= now)
    }
}

#[derive(Debug, Clone, Copy)]
struct Deadline {
    /// On the host's boot clock.
    at: i64,
    grace: i64,
    begun: bool,
}

#[derive(Debug)]
pub(crate) struct Keeper {
    host: usize,
    pub(crate) boot_id: String,
    running: BTreeMap<u64, Process>,
    /// Of (instance, epoch): attempt, and sweeps survived.
    left: BTreeMap<(u64, u64), (u32, u32)>,
    deadlines: BTreeMap<(u64, u64), Deadline>,
    unacknowledged: Vec<pb::ExitRecord>,
    sequence: u64,
    serial: u64,
    pids: u32,
    /// The agent's run that has said hello on the connection in use.
    greeted: Option<u64>,
    /// Of dead runs: asks up to this number were in the socket and are still served.
    served_up_to: BTreeMap<u64, u64>,
    last_ask: i64,
    last_told: i64,
}

impl Keeper {
    pub(crate) fn new(host: usize) -> Self {
        Self {
            host,
            boot_id: format!("boot-{host}-0"),
            running: BTreeMap::new(),
            left: BTreeMap::new(),
            deadlines: BTreeMap::new(),
            unacknowledged: Vec::new(),
            sequence: 0,
            serial: 0,
            pids: 0,
            greeted: None,
            served_up_to: BTreeMap::new(),
            last_ask: 0,
            last_told: 0,
        }
    }

    pub(crate) fn process(&self, instance: u64) -> Option<&Process> {
        self.running.get(&instance)
    }

    pub(crate) fn has_left_overs(&self) -> bool {
        !self.left.is_empty()
    }

    /// An order goes into the socket.
    pub(crate) fn ask(&mut self, cx: &mut Context, run: u64, number: u64, ask: Ask) {
        self.last_ask = (self.last_ask + 1).max(cx.now + cx.rng.random_range(MS / 20..2 * MS));
        cx.at(self.last_ask, Event::Keeper(self.host, ToKeeper::Ask { run, number, ask }));
    }

    /// The agent of this run has died after so many asks; some of the last were not read yet and never will be.
    pub(crate) fn agent_died(&mut self, run: u64, some_of: u64) {
        self.served_up_to.insert(run, some_of);
        self.greeted = None;
    }

    fn tell(&mut self, cx: &mut Context, told: Told) {
        let Some(run) = self.greeted else { return };
        self.last_told = (self.last_told + 1).max(cx.now + cx.rng.random_range(MS / 20..2 * MS));
        cx.at(self.last_told, Event::Agent(self.host, ToAgent::Told { run, told }));
    }

    pub(crate) fn event(&mut self, cx: &mut Context, boot: &Clock, event: ToKeeper) {
        match event {
            ToKeeper::Ask { run, number, ask } => {
                let answered = self.greeted == Some(run) || matches!(ask, Ask::Hello);
                let read = self.served_up_to.get(&run).is_none_or(|last| number <= *last);
                if read {
                    self.serve(cx, boot, run, answered, ask);
                }
            }
            ToKeeper::Due => self.due(cx, boot),
            ToKeeper::Ends { instance, serial, cause, code } => {
                let own = cause == pb::ExitCause::Exit && code != 0;
                let now = |process: &Process| process.serial == serial && !(own && cx.calm && process.good);
                if self.running.get(&instance).is_some_and(now) {
                    self.end(cx, instance, cause, code);
                }
            }
            ToKeeper::Healthy { instance, serial } => {
                let host = self.host;
                if let Some(process) = self.running.get(&instance).filter(|process| process.serial == serial)
                {
                    cx.oracle.healthy(host, instance, process.key);
                }
            }
        }
    }

    fn serve(&mut self, cx: &mut Context, boot: &Clock, run: u64, answered: bool, ask: Ask) {
        match ask {
            Ask::Hello => {
                if self.served_up_to.contains_key(&run) {
                    return;
                }
                self.greeted = Some(run);
                for exit in self.unacknowledged.clone() {
                    self.tell_exit(cx, exit);
                }
                let list = self.list();
                self.tell(cx, Told::List(list));
            }
            Ask::Order { order, told } => {
                let Order { instance, action } = *order;
                self.obey(cx, boot, instance.0, action, answered, told);
            }
        }
    }

    fn obey(
        &mut self,
        cx: &mut Context,
        boot: &Clock,
        instance: u64,
        action: Action,
        answered: bool,
        told: bool,
    ) {
        match action {
            Action::Spawn(order) => {
                let key = order.key;
                let input = match self.spawn(cx, boot, instance, &order) {
                    Ok(process) => Input::Spawned { key, process, started_unix_ns: 1 },
                    Err(error) => Input::SpawnFailed { key, error },
                };
                if answered {
                    self.tell(cx, Told::Input { instance, input: Box::new(input), answers: true });
                }
            }
            Action::SetDeadline { key, deadline } => self.set_deadline(cx, boot, instance, key, deadline),
            Action::Signal { key, signal, scope, cause } => {
                let found = self.holds(instance, key, cause);
                if found {
                    self.strike(cx, instance, signal, scope, told);
                }
                if answered {
                    let told = match found {
                        true => Told::Answered { instance },
                        false => {
                            let input = Input::SignalFailed { key, signal, error: SignalError::Gone };
                            Told::Input { instance, input: Box::new(input), answers: true }
                        }
                    };
                    self.tell(cx, told);
                }
            }
            Action::SweepCgroup { key } => {
                if self.sweep(instance, key) {
                    let input = Box::new(Input::CgroupEmpty { key, killed: 0 });
                    self.tell(cx, Told::Input { instance, input, answers: false });
                }
            }
            Action::ListProcesses => {
                let list = self.list();
                self.tell(cx, Told::List(list));
            }
            Action::AcknowledgeExits { up_to_sequence } => {
                self.unacknowledged.retain(|exit| exit.sequence > up_to_sequence);
            }
            Action::Forget { epoch } => {
                self.left.remove(&(instance, epoch));
                if self.running.get(&instance).is_none_or(|process| process.key.epoch != epoch) {
                    self.deadlines.remove(&(instance, epoch));
                }
            }
            Action::PickPorts { .. }
            | Action::Prepare(_)
            | Action::CancelPreparation { .. }
            | Action::FetchAhead(_)
            | Action::CancelFetch
            | Action::RunHook(_)
            | Action::SetLimits { .. }
            | Action::EndHook { .. }
            | Action::StartProbe(_)
            | Action::StopProbes
            | Action::Persist(_)
            | Action::ForgetLedger
            | Action::Report
            | Action::Gone
            | Action::WakeAt(_)
            | Action::Log { .. } => {}
        }
    }

    fn spawn(
        &mut self,
        cx: &mut Context,
        boot: &Clock,
        instance: u64,
        order: &SpawnOrder,
    ) -> Result<pb::ProcessIdentity, SpawnError> {
        let refused =
            |kind, errno, message: &str| Err(SpawnError { kind, errno, message: message.to_owned() });
        let key = order.key;
        if let Some(other) = self.running.get(&instance) {
            let other = other.key;
            cx.violated("an agent starts no second process", || {
                format!("i-{instance}: {key:?} is ordered while {other:?} runs")
            });
            return refused(SpawnErrorKind::Busy, 0, "runs already");
        }
        let deadline = self.deadlines.get(&(instance, key.epoch));
        if deadline.is_some_and(|deadline| deadline.at <= boot.read(cx.now)) {
            return refused(SpawnErrorKind::Invalid, 0, "its deadline has passed");
        }
        let manifest = order.wanted.manifest.clone().unwrap_or_default();
        let kind = Kind::of(&manifest);
        if kind == Kind::Missing {
            return refused(SpawnErrorKind::Exec, 2, "no such file or directory");
        }
        self.pids += 1;
        self.serial += 1;
        let identity =
            pb::ProcessIdentity { pid: self.pids, boot_id: self.boot_id.clone(), ..Default::default() };
        let mut process = Process {
            key,
            serial: self.serial,
            identity: identity.clone(),
            since: cx.now,
            temper: Temper::Polite(cx.rng.random_range(MS..2 * SECOND)),
            children: 0,
            healthy_at: Some(cx.now),
            sick: false,
            good: kind == Kind::Good,
            probed: manifest.health.is_some(),
            cause: None,
            service: manifest.name.clone(),
        };
        if manifest.health.is_some() {
            process.healthy_at = Some(cx.now + cx.rng.random_range(10 * MS..4 * SECOND));
        }
        if kind == Kind::NeverHealthy {
            process.healthy_at = None;
        }
        if !cx.calm {
            self.give_temper(cx, &mut process);
        }
        let ends = match kind {
            Kind::Crashing => Some(cx.rng.random_range(MS..3 * SECOND)),
            Kind::Good if !cx.calm && cx.rng.random_bool(0.03) => Some(cx.rng.random_range(MS..300 * SECOND)),
            Kind::Good | Kind::NeverHealthy | Kind::Missing => None,
        };
        cx.started(self.host, instance, key, &manifest);
        if let Some(deadline) = order.deadline {
            self.set_deadline(cx, boot, instance, key, deadline);
        }
        let (host, serial) = (self.host, process.serial);
        if let Some(at) = process.healthy_at {
            cx.at(at, Event::Keeper(host, ToKeeper::Healthy { instance, serial }));
        }
        if let Some(after) = ends {
            let cause = pb::ExitCause::Exit;
            cx.after(after, Event::Keeper(host, ToKeeper::Ends { instance, serial, cause, code: 1 }));
        }
        self.running.insert(instance, process);
        Ok(identity)
    }

    fn give_temper(&self, cx: &mut Context, process: &mut Process) {
        if cx.rng.random_bool(0.08) {
            process.temper = Temper::Deaf;
        } else if cx.rng.random_bool(0.15) {
            process.temper = Temper::Polite(cx.rng.random_range(SECOND..40 * SECOND));
        }
        if cx.rng.random_bool(0.05) {
            process.children = cx.rng.random_range(1..3);
        }
    }

    /// Whether that process runs, so that it can be signalled; what ends it is remembered.
    fn holds(&mut self, instance: u64, key: ProcessKey, cause: pb::ExitCause) -> bool {
        let Some(process) = self.running.get_mut(&instance).filter(|process| process.key == key) else {
            return false;
        };
        if cause != pb::ExitCause::Unspecified {
            process.cause = Some(cause);
        }
        true
    }

    /// A signal reaches a process. `told`: because the hub wants it stopped.
    fn strike(&mut self, cx: &mut Context, instance: u64, signal: i32, scope: SignalScope, told: bool) {
        let Some(process) = self.running.get(&instance) else { return };
        let cause = process.cause.unwrap_or(pb::ExitCause::Signal);
        let (host, serial, key) = (self.host, process.serial, process.key);
        match (signal, process.temper) {
            (9, _) if scope == SignalScope::Process => {
                cx.stopping(host, instance, key, told);
                self.end(cx, instance, cause, 0);
            }
            (15, Temper::Polite(within)) => {
                cx.stopping(host, instance, key, told);
                let after = cx.rng.random_range(0..=within);
                cx.after(after, Event::Keeper(host, ToKeeper::Ends { instance, serial, cause, code: 0 }));
            }
            (15, Temper::Deaf) => cx.stopping(host, instance, key, told),
            _ => {}
        }
    }

    fn end(&mut self, cx: &mut Context, instance: u64, cause: pb::ExitCause, code: i32) {
        let Some(process) = self.running.remove(&instance) else { return };
        cx.ended(self.host, instance, process.key, process.cause.is_none());
        if process.children > 0 {
            self.left.insert((instance, process.key.epoch), (process.key.attempt, process.children));
        }
        self.sequence += 1;
        let ran = u64::try_from((cx.now - process.since) / MS).unwrap_or_default();
        let exit = pb::ExitRecord {
            instance_id: instance,
            service: process.service,
            epoch: process.key.epoch,
            attempt: process.key.attempt,
            process: Some(process.identity),
            cause: process.cause.unwrap_or(cause).into(),
            code,
            ran_ms: ran,
            sequence: self.sequence,
            ..Default::default()
        };
        self.unacknowledged.push(exit.clone());
        self.tell_exit(cx, exit);
    }

    fn tell_exit(&mut self, cx: &mut Context, exit: pb::ExitRecord) {
        let instance = exit.instance_id;
        self.tell(cx, Told::Input { instance, input: Box::new(Input::Exited(exit)), answers: false });
    }

    fn sweep(&mut self, instance: u64, key: ProcessKey) -> bool {
        match self.left.get_mut(&(instance, key.epoch)) {
            None => true,
            Some((_, 0)) => {
                self.left.remove(&(instance, key.epoch));
                true
            }
            Some((_, sweeps)) => {
                *sweeps -= 1;
                false
            }
        }
    }

    fn list(&self) -> Vec<pb::KeptProcess> {
        let running = self.running.iter().map(|(&instance_id, process)| pb::KeptProcess {
            instance_id,
            epoch: process.key.epoch,
            attempt: process.key.attempt,
            process: Some(process.identity.clone()),
            ..Default::default()
        });
        let left = self.left.iter().map(|(&(instance_id, epoch), &(attempt, _))| pb::KeptProcess {
            instance_id,
            epoch,
            attempt,
            leftover: true,
            ..Default::default()
        });
        running.chain(left).collect()
    }

    // Deadlines

    fn set_deadline(
        &mut self,
        cx: &mut Context,
        boot: &Clock,
        instance: u64,
        key: ProcessKey,
        given: supervisor::Deadline,
    ) {
        let grace = i64::try_from(given.grace.as_nanos()).unwrap_or(i64::MAX / 2);
        let at = given.at.0;
        let running = self.running.get(&instance).is_some_and(|process| process.key.epoch == key.epoch);
        let deadline =
            self.deadlines.entry((instance, key.epoch)).or_insert(Deadline { at, grace, begun: false });
        if deadline.begun && running {
            return;
        }
        *deadline = Deadline { at, grace, begun: false };
        cx.at(boot.when(at), Event::Keeper(self.host, ToKeeper::Due));
    }

    /// Processes whose deadline has passed are asked to end, and killed when their grace is over.
    fn due(&mut self, cx: &mut Context, boot: &Clock) {
        let now = boot.read(cx.now);
        let mut begin = Vec::new();
        let mut kill = Vec::new();
        for ((instance, epoch), deadline) in &mut self.deadlines {
            let runs = self.running.get(instance).is_some_and(|process| process.key.epoch == *epoch);
            if !runs || deadline.at > now {
                continue;
            }
            if !deadline.begun {
                deadline.begun = true;
                begin.push((*instance, deadline.at + deadline.grace));
            }
            if deadline.at + deadline.grace <= now {
                kill.push(*instance);
            }
        }
        for (instance, kill_at) in begin {
            cx.note(|| format!("host {}: the deadline of i-{instance} has passed", self.host));
            if let Some(process) = self.running.get_mut(&instance) {
                process.cause.get_or_insert(pb::ExitCause::Hub);
            }
            self.strike(cx, instance, 15, SignalScope::Process, false);
            cx.at(boot.when(kill_at), Event::Keeper(self.host, ToKeeper::Due));
        }
        for instance in kill {
            self.strike(cx, instance, 9, SignalScope::Process, false);
        }
    }

    // Faults

    /// Everything dies, and nobody knows how.
    pub(crate) fn reboot(&mut self, cx: &mut Context, boots: u32) {
        let instances: Vec<(u64, ProcessKey)> =
            self.running.iter().map(|(id, process)| (*id, process.key)).collect();
        for (instance, key) in instances {
            cx.ended(self.host, instance, key, true);
        }
        self.running.clear();
        self.left.clear();
        self.deadlines.clear();
        self.boot_id = format!("boot-{}-{boots}", self.host);
    }

    /// A process ends by itself.
    pub(crate) fn crash(&mut self, cx: &mut Context, pick: usize) {
        let count = self.running.len();
        let Some(&instance) = self.running.keys().nth(pick % count.max(1)) else { return };
        cx.note(|| format!("host {}: i-{instance} crashes", self.host));
        self.end(cx, instance, pb::ExitCause::Exit, 1);
    }

    /// A process answers its probes no more, for a while. Returns it.
    pub(crate) fn sicken(&mut self, cx: &mut Context, pick: usize, length: i64) -> Option<u64> {
        let count = self.running.len();
        let (&instance, process) = self.running.iter_mut().nth(pick % count.max(1))?;
        if process.healthy_at.is_none_or(|at| at > cx.now) || process.sick || !process.probed {
            return None;
        }
        process.sick = true;
        let (host, serial, key) = (self.host, process.serial, process.key);
        cx.note(|| format!("host {host}: i-{instance} is sick"));
        cx.oracle.unhealthy(host, instance, key);
        cx.after(length, Event::Heal(Heal::Well { host, instance, serial }));
        Some(instance)
    }

    pub(crate) fn recover(&mut self, cx: &mut Context, instance: u64, serial: u64) -> bool {
        let host = self.host;
        let Some(process) = self.running.get_mut(&instance).filter(|process| process.serial == serial) else {
            return false;
        };
        process.sick = false;
        cx.oracle.healthy(host, instance, process.key);
        true
    }

    /// From now on all processes behave.
    pub(crate) fn behave(&mut self) {
        for process in self.running.values_mut() {
            process.temper = Temper::Polite(SECOND);
            process.children = 0;
        }
        for (_, sweeps) in self.left.values_mut() {
            *sweeps = 0;
        }
    }
}
