//! A tiny keeper: processes that start, fail, exit, ignore signals and leave children behind. It refuses nothing that
//! the real one would refuse, it panics instead: a supervisor that needs the keeper to stop it is wrong.

use std::collections::{BTreeMap, BTreeSet};

use nave_agent_core::supervisor::{ProcessKey, SignalScope, SpawnError, SpawnErrorKind};
use nave_agent_core::{Monotonic, SpawnOrder};
use nave_proto::pb;

/// How the next process behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Temper {
    /// Ends on its stop signal.
    Polite,
    /// Ends on SIGKILL only.
    Deaf,
    /// Ends on the n-th SIGKILL only.
    Stuck(u32),
    /// Like `Polite`, but leaves children in its cgroup which survive that many sweeps.
    Parent(u32),
    /// Ends by itself before the keeper has answered.
    Brief,
    /// Cannot be executed, by an error that can heal.
    Busy,
    /// Cannot be executed, by an error that cannot.
    Missing,
}

#[derive(Debug)]
struct Process {
    key: ProcessKey,
    identity: pb::ProcessIdentity,
    since: Monotonic,
    temper: Temper,
    kills: u32,
}

#[derive(Debug, Default)]
pub(crate) struct FakeKeeper {
    pub(crate) boot_id: String,
    running: BTreeMap<u64, Process>,
    /// Of (instance, epoch): sweeps its cgroup's processes still survive.
    children: BTreeMap<(u64, u64), u32>,
    pub(crate) unacknowledged: Vec<pb::ExitRecord>,
    sequence: u64,
    pids: u32,
    used: BTreeSet<(u64, ProcessKey)>,
    /// Every process that ran, by instance and epoch.
    pub(crate) ran: BTreeMap<(u64, u64), u32>,
    /// When each process that ended did so, with its uptime.
    pub(crate) ended: BTreeMap<(u64, ProcessKey), (Monotonic, std::time::Duration)>,
    /// Of the next processes, the last first; after those all are polite.
    pub(crate) next: Vec<Temper>,
}

pub(crate) type SpawnAnswer = Result<(pb::ProcessIdentity, Option<pb::ExitRecord>), SpawnError>;

impl FakeKeeper {
    pub(crate) fn new(boot_id: &str) -> Self {
        Self { boot_id: boot_id.to_owned(), ..Self::default() }
    }

    pub(crate) fn spawn(&mut self, instance: u64, order: &SpawnOrder, now: Monotonic) -> SpawnAnswer {
        let key = order.key;
        assert!(!self.running.contains_key(&instance), "i-{instance}: a second process is ordered: {key:?}");
        let left = self.children.keys().find(|(id, _)| *id == instance);
        assert_eq!(left, None, "i-{instance}: started beside what an older process left");
        assert!(self.used.insert((instance, key)), "i-{instance}: {key:?} is ordered twice");
        let failed = |errno, message: &str| SpawnError {
            kind: SpawnErrorKind::Exec,
            errno,
            message: message.to_owned(),
        };
        let temper = self.next.pop().unwrap_or(Temper::Polite);
        match temper {
            Temper::Busy => return Err(failed(26, "text file busy")),
            Temper::Missing => return Err(failed(2, "no such file or directory")),
            Temper::Polite | Temper::Deaf | Temper::Stuck(_) | Temper::Parent(_) | Temper::Brief => {}
        }
        self.pids += 1;
        let identity =
            pb::ProcessIdentity { pid: self.pids, boot_id: self.boot_id.clone(), ..Default::default() };
        let process = Process { key, identity: identity.clone(), since: now, temper, kills: 0 };
        self.running.insert(instance, process);
        *self.ran.entry((instance, key.epoch)).or_default() += 1;
        let exit = if temper == Temper::Brief { self.exit(instance, 1, now) } else { None };
        Ok((identity, exit))
    }

    /// It ends by itself.
    pub(crate) fn exit(&mut self, instance: u64, code: i32, now: Monotonic) -> Option<pb::ExitRecord> {
        self.end(instance, pb::ExitCause::Exit, code, now)
    }

    fn end(
        &mut self,
        instance: u64,
        cause: pb::ExitCause,
        code: i32,
        now: Monotonic,
    ) -> Option<pb::ExitRecord> {
        let process = self.running.remove(&instance)?;
        let uptime = now.since(process.since);
        self.sequence += 1;
        self.ended.insert((instance, process.key), (now, uptime));
        if let Temper::Parent(sweeps) = process.temper {
            self.children.insert((instance, process.key.epoch), sweeps);
        }
        let record = pb::ExitRecord {
            instance_id: instance,
            epoch: process.key.epoch,
            attempt: process.key.attempt,
            process: Some(process.identity),
            cause: cause.into(),
            code,
            ran_ms: u64::try_from(uptime.as_millis()).expect("no test runs for ever"),
            sequence: self.sequence,
            cgroup_empty: !self.children.contains_key(&(instance, process.key.epoch)),
            ..Default::default()
        };
        self.unacknowledged.push(record.clone());
        Some(record)
    }

    /// `Err`: there is no such process.
    pub(crate) fn signal(
        &mut self,
        instance: u64,
        key: ProcessKey,
        signal: i32,
        scope: SignalScope,
        now: Monotonic,
    ) -> Result<Option<pb::ExitRecord>, ()> {
        let Some(process) = self.running.get_mut(&instance).filter(|process| process.key == key) else {
            return Err(());
        };
        let kills = u32::from(signal == 9 && scope == SignalScope::Process);
        process.kills += kills;
        let ends = match process.temper {
            Temper::Polite | Temper::Parent(_) | Temper::Brief => signal == 15 || signal == 9,
            Temper::Deaf => signal == 9,
            Temper::Stuck(enough) => signal == 9 && process.kills >= enough,
            Temper::Busy | Temper::Missing => unreachable!("never ran"),
        };
        Ok(if ends { self.end(instance, pb::ExitCause::Signal, 0, now) } else { None })
    }

    /// Whether the cgroup is empty afterwards.
    pub(crate) fn sweep(&mut self, instance: u64, key: ProcessKey) -> bool {
        if let Some(process) = self.running.get(&instance) {
            assert_ne!(process.key.epoch, key.epoch, "i-{instance}: the sweep of {key:?} kills {process:?}");
        }
        match self.children.get_mut(&(instance, key.epoch)) {
            Some(0) | None => {
                self.children.remove(&(instance, key.epoch));
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
        }
    }

    pub(crate) fn list(&self) -> Vec<pb::KeptProcess> {
        let running = self.running.iter().map(|(&instance_id, process)| pb::KeptProcess {
            instance_id,
            epoch: process.key.epoch,
            attempt: process.key.attempt,
            process: Some(process.identity.clone()),
            ..Default::default()
        });
        let left = self.children.keys().map(|&(instance_id, epoch)| {
            let attempts = self.ended.keys().filter(|(id, key)| *id == instance_id && key.epoch == epoch);
            let attempt = attempts.map(|(_, key)| key.attempt).max().unwrap_or_default();
            pb::KeptProcess { instance_id, epoch, attempt, leftover: true, ..Default::default() }
        });
        running.chain(left).collect()
    }

    pub(crate) fn running(&self, instance: u64) -> Option<ProcessKey> {
        self.running.get(&instance).map(|process| process.key)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.running.is_empty() && self.children.is_empty()
    }

    pub(crate) fn acknowledge(&mut self, up_to: u64) -> Vec<pb::ExitRecord> {
        let (done, open) = self.unacknowledged.drain(..).partition(|exit| exit.sequence <= up_to);
        self.unacknowledged = open;
        done
    }

    /// Everything dies, and nobody knows how.
    pub(crate) fn reboot(&mut self, boot_id: &str) {
        self.boot_id = boot_id.to_owned();
        self.running.clear();
        self.children.clear();
    }

    /// From now on all processes behave.
    pub(crate) fn behave(&mut self) {
        self.next.clear();
        for process in self.running.values_mut() {
            process.temper = Temper::Polite;
        }
    }
}
