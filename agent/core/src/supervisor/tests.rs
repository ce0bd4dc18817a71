//! One table or scene per rule. The random walk over all of them together is in `tests/model.rs`.

mod ahead;
mod draining;
mod ending;
mod ends;
mod health;
mod hooks;
mod leasing;
mod limits;
mod starting;
mod stopping;
mod surviving;

use std::collections::BTreeMap;
use std::time::Duration;

use nave_proto::pb::{self, observed::State as Seen};
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::*;
use crate::monotonic::WallOffset;

const BOOT: &str = "boot-1";

/// One supervisor, its time, and what it has ordered since it was last asked.
struct Scene {
    supervisor: Supervisor,
    now: Monotonic,
    rng: StdRng,
    orders: Vec<Action>,
}

fn seconds(s: u64) -> Duration {
    Duration::from_secs(s)
}

fn manifest() -> pb::Manifest {
    pb::Manifest {
        name: "web".to_owned(),
        command: vec!["web".to_owned()],
        restart: Some(pb::Restart {
            policy: pb::RestartPolicy::Always.into(),
            budget_restarts: 10,
            budget_window: seconds(300).try_into().ok(),
            ..Default::default()
        }),
        stop: Some(pb::Stop { signal: 15, grace: seconds(10).try_into().ok(), ..Default::default() }),
        ..pb::Manifest::default()
    }
}

fn with_port(fixed: u32) -> pb::Manifest {
    let port = pb::Port { protocol: pb::Protocol::Http.into(), service_port: 80, port: fixed, calls: None };
    pb::Manifest { ports: BTreeMap::from([("http".to_owned(), port)]), ..manifest() }
}

fn http_probe() -> pb::Probe {
    pb::Probe {
        check: Some(pb::probe::Check::Http("/".to_owned())),
        interval: seconds(1).try_into().ok(),
        ..pb::Probe::default()
    }
}

fn probed() -> pb::Manifest {
    let health = pb::Health { ready: Some(http_probe()), ..Default::default() };
    pb::Manifest { health: Some(health), ..with_port(0) }
}

fn wanted(manifest: pb::Manifest, epoch: u64, desired: pb::Desired) -> pb::WantedInstance {
    pb::WantedInstance {
        instance_id: 42,
        epoch,
        version: 1,
        desired: desired.into(),
        manifest: Some(manifest),
        ..pb::WantedInstance::default()
    }
}

fn process(pid: u32) -> pb::ProcessIdentity {
    pb::ProcessIdentity { pid, start_ticks: 7, boot_id: BOOT.to_owned(), cgroup_id: 1 }
}

impl Scene {
    /// The keeper has said that it runs nothing.
    fn new(manifest: pb::Manifest) -> Self {
        let supervisor = Supervisor::new(wanted(manifest, 1, pb::Desired::Run), BOOT, Monotonic(0));
        let now = Monotonic::BOOT + seconds(1_000);
        let mut scene = Self { supervisor, now, rng: StdRng::seed_from_u64(1), orders: Vec::new() };
        scene.give(Input::Absent { fresh: true });
        scene
    }

    /// Started, exec has succeeded.
    fn running(manifest: pb::Manifest) -> Self {
        let mut scene = Self::new(manifest);
        if scene.supervisor.state == State::Starting(Starting::PickingPorts) {
            scene.pick(20_001);
        }
        scene.spawned();
        scene
    }

    fn give(&mut self, input: Input) {
        self.orders.extend(self.supervisor.step(self.now, &mut self.rng, input));
    }

    fn pick(&mut self, port: u16) {
        self.give(Input::PortsPicked { ports: BTreeMap::from([("http".to_owned(), port)]) });
    }

    fn spawned(&mut self) {
        let key = self.supervisor.key();
        self.give(Input::Spawned { key, process: process(100 + key.attempt), started_unix_ns: 1 });
    }

    fn spawn_failed(&mut self, kind: SpawnErrorKind, errno: i32, message: &str) {
        let key = self.supervisor.key();
        let error = SpawnError { kind, errno, message: message.to_owned() };
        self.give(Input::SpawnFailed { key, error });
    }

    /// Time passes, and the timer rings once.
    fn pass(&mut self, duration: Duration) {
        self.now = self.now + duration;
        self.give(Input::Tick);
    }

    fn record(&self, cause: pb::ExitCause, code: i32, signal: i32) -> pb::ExitRecord {
        let key = self.supervisor.key();
        let uptime = match &self.supervisor.state {
            State::Running(running) => self.now.since(running.since),
            State::Stopping(stopping) => self.now.since(stopping.running.since),
            State::Pending(_)
            | State::Starting(_)
            | State::BackingOff { .. }
            | State::Exited { .. }
            | State::Failed { .. }
            | State::Gone => Duration::ZERO,
        };
        pb::ExitRecord {
            ran_ms: u64::try_from(uptime.as_millis()).unwrap(),
            instance_id: 42,
            epoch: key.epoch,
            attempt: key.attempt,
            cause: cause.into(),
            code,
            signal,
            sequence: 1,
            ..pb::ExitRecord::default()
        }
    }

    /// The process exits, and nothing is left in its cgroup.
    fn exit(&mut self, code: i32) {
        self.give(Input::Exited(self.record(pb::ExitCause::Exit, code, 0)));
        self.swept();
    }

    fn swept(&mut self) {
        let keys: Vec<_> = self.supervisor.sweeps.keys().copied().collect();
        for key in keys {
            self.give(Input::CgroupEmpty { key, killed: 0 });
        }
    }

    fn want(&mut self, manifest: pb::Manifest, epoch: u64, desired: pb::Desired) {
        self.give(Input::Wanted(Box::new(wanted(manifest, epoch, desired))));
    }

    fn stop(&mut self) {
        self.want(manifest(), self.supervisor.wanted.epoch, pb::Desired::Stop);
    }

    fn probe(&mut self, probe: ProbeKind, failure: Option<&str>) {
        let outcome = failure.map_or(ProbeOutcome::Passed, |why| ProbeOutcome::Failed(why.to_owned()));
        self.give(Input::ProbeResult { key: self.supervisor.key(), probe, outcome });
    }

    fn orders(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.orders)
    }

    fn spawns(&mut self) -> usize {
        self.orders().iter().filter(|action| matches!(action, Action::Spawn(_))).count()
    }

    fn signals(&mut self) -> Vec<(i32, SignalScope)> {
        let signal = |action: &Action| match action {
            Action::Signal { signal, scope, .. } => Some((*signal, *scope)),
            Action::PickPorts { .. }
            | Action::Prepare(_)
            | Action::CancelPreparation { .. }
            | Action::FetchAhead(_)
            | Action::CancelFetch
            | Action::RunHook(_)
            | Action::SetLimits { .. }
            | Action::EndHook { .. }
            | Action::Spawn(_)
            | Action::SweepCgroup { .. }
            | Action::StartProbe(_)
            | Action::StopProbes
            | Action::ListProcesses
            | Action::Persist(_)
            | Action::Forget { .. }
            | Action::AcknowledgeExits { .. }
            | Action::ForgetLedger
            | Action::Report
            | Action::Gone
            | Action::WakeAt(_)
            | Action::SetDeadline { .. }
            | Action::Log { .. } => None,
        };
        self.orders().iter().filter_map(signal).collect()
    }

    fn report(&self) -> pb::InstanceReport {
        self.supervisor.report(WallOffset::default())
    }

    fn seen(&self) -> Seen {
        self.report().observed.unwrap().state.unwrap()
    }

    fn is_ready(&self) -> bool {
        self.report().endpoint() == pb::EndpointState::Ready
    }

    /// The agent is killed and starts again: only the ledger remains.
    fn restart_agent(&mut self) {
        self.restart_agent_in(BOOT);
    }

    fn restart_agent_in(&mut self, boot_id: &str) {
        let ledger = self.supervisor.persisted.clone();
        assert_eq!(ledger, Some(self.supervisor.ledger()), "everything is on disk between steps");
        let wanted = self.supervisor.wanted.clone();
        self.supervisor = Supervisor::restore(wanted, ledger.as_ref(), boot_id, self.now);
        self.orders.clear();
    }

    fn adopt(&mut self) {
        let key = self.supervisor.key();
        self.give(Input::Adopted { key, process: process(100 + key.attempt), started_unix_ns: 1 });
    }
}

fn position(orders: &[Action], wanted: impl Fn(&Action) -> bool) -> usize {
    orders.iter().position(wanted).unwrap_or_else(|| panic!("not among {orders:#?}"))
}
