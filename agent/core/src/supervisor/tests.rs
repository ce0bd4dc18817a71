//! One table or scene per rule. The random walk over all of them together is in `tests/model.rs`.

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
        }),
        stop: Some(pb::Stop { signal: 15, grace: seconds(10).try_into().ok() }),
        ..pb::Manifest::default()
    }
}

fn with_port(fixed: u32) -> pb::Manifest {
    let port = pb::Port { protocol: pb::Protocol::Http.into(), service_port: 80, port: fixed };
    pb::Manifest { ports: BTreeMap::from([("http".to_owned(), port)]), ..manifest() }
}

fn http_probe() -> pb::Probe {
    pb::Probe {
        check: Some(pb::probe::Check::Http("/".to_owned())),
        interval: seconds(1).try_into().ok(),
        ..pb::Probe::default()
    }
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
            self.give(Input::CgroupEmpty { key });
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

// Starting

#[test]
fn nothing_is_done_before_the_keepers_word() {
    let mut supervisor = Supervisor::new(wanted(manifest(), 1, pb::Desired::Run), BOOT, Monotonic(0));
    let orders = supervisor.step(Monotonic(1), &mut StdRng::seed_from_u64(1), Input::Tick);
    assert!(
        !orders.iter().any(|action| matches!(action, Action::Spawn(_) | Action::PickPorts { .. })),
        "{orders:?}"
    );
    assert!(matches!(supervisor.state, State::Pending(_)));
}

#[test]
fn the_attempt_is_on_disk_before_the_order_is_given() {
    let mut scene = Scene::new(manifest());
    let orders = scene.orders();
    let persist =
        position(&orders, |action| matches!(action, Action::Persist(ledger) if ledger.attempt == 1));
    let spawn = position(&orders, |action| matches!(action, Action::Spawn(order) if order.key.attempt == 1));
    assert!(persist < spawn);
}

#[test]
fn without_a_probe_it_is_ready_once_exec_has_succeeded() {
    let mut scene = Scene::new(manifest());
    assert!(!scene.is_ready());
    scene.spawned();
    assert!(scene.is_ready());
    assert!(matches!(scene.seen(), Seen::Running(pb::observed::Running { ready: true, .. })));
}

#[test]
fn fixed_ports_are_asked_for_by_number_and_dynamic_ones_by_name() {
    let mut scene = Scene::new(with_port(0));
    let dynamic = Action::PickPorts { fixed: BTreeMap::new(), dynamic: vec!["http".to_owned()] };
    assert!(scene.orders().contains(&dynamic));
    let mut scene = Scene::new(with_port(8_080));
    let fixed = Action::PickPorts { fixed: BTreeMap::from([("http".to_owned(), 8_080)]), dynamic: vec![] };
    assert!(scene.orders().contains(&fixed));
}

#[test]
fn ports_are_kept_over_a_restart_but_not_after_a_quick_exit_or_a_clash() {
    let table = [
        (seconds(20), 1, "", false),
        (seconds(20), 1, "bind: Address already in use", true),
        (seconds(1), 1, "", true),
        (seconds(1), 0, "", false),
    ];
    for (uptime, code, message, picks) in table {
        let mut scene = Scene::running(with_port(0));
        scene.pass(uptime);
        scene.orders();
        let exit =
            pb::ExitRecord { message: message.to_owned(), ..scene.record(pb::ExitCause::Exit, code, 0) };
        scene.give(Input::Exited(exit));
        scene.swept();
        scene.pass(seconds(1));
        let picked = scene.orders().iter().any(|action| matches!(action, Action::PickPorts { .. }));
        assert_eq!(picked, picks, "uptime {uptime:?}, status {code}, {message:?}");
    }
}

#[test]
fn a_taken_port_is_the_reason_and_ends_in_failed() {
    let mut scene = Scene::new(with_port(8_080));
    for _ in 0..11 {
        assert_eq!(scene.supervisor.state, State::Starting(Starting::PickingPorts));
        scene.give(Input::PortClash { message: "port 8080 (http) is taken by nginx (pid 7)".to_owned() });
        let reason = scene.report().reason;
        assert!(reason.contains("port 8080 (http) is taken by nginx (pid 7)"), "{reason}");
        scene.pass(scene.supervisor.next_wake().map_or(Duration::ZERO, |at| at.since(scene.now)));
    }
    assert!(matches!(scene.seen(), Seen::Failed(_)));
}

// Ends and restarts

#[test]
fn a_crash_after_ten_seconds_is_answered_at_once_and_the_next_waits() {
    let mut scene = Scene::running(manifest());
    scene.pass(seconds(10));
    scene.orders();
    scene.exit(1);
    assert_eq!(scene.spawns(), 1);
    scene.spawned();
    scene.pass(seconds(10));
    scene.orders();
    scene.exit(1);
    assert_eq!(scene.spawns(), 0);
    assert!(matches!(scene.seen(), Seen::BackingOff(_)));
    assert_eq!(scene.report().reason, "process exited with status 1");
    scene.pass(Duration::from_millis(121));
    assert_eq!(scene.spawns(), 1);
    assert_eq!((scene.report().attempt, scene.report().restarts), (3, 2));
}

#[test]
fn nothing_starts_beside_what_the_last_process_left() {
    let mut scene = Scene::running(manifest());
    scene.pass(seconds(30));
    scene.orders();
    scene.give(Input::Exited(scene.record(pb::ExitCause::Signal, 0, 11)));
    let key = scene.supervisor.key();
    assert!(scene.orders().contains(&Action::SweepCgroup { key }));
    scene.pass(seconds(4));
    assert_eq!(scene.spawns(), 0);
    scene.pass(seconds(1));
    assert!(scene.orders().contains(&Action::SweepCgroup { key }), "asked again after 5 s");
    assert!(scene.report().reason.contains("left others that do not die"), "{}", scene.report().reason);
    scene.give(Input::CgroupEmpty { key });
    assert_eq!(scene.spawns(), 1);
}

#[test]
fn a_command_that_does_not_exist_is_given_up_after_three_tries_with_its_path() {
    let mut scene = Scene::new(manifest());
    for attempt in 1..=3 {
        assert_eq!(scene.supervisor.key().attempt, attempt);
        scene.spawn_failed(SpawnErrorKind::Exec, 2, "/usr/bin/nope: no such file or directory");
        assert_eq!(scene.report().reason, "/usr/bin/nope: no such file or directory");
        assert_eq!(matches!(scene.seen(), Seen::Failed(_)), attempt == 3);
        scene.pass(seconds(1));
    }
    scene.orders();
    scene.pass(seconds(3_600));
    assert_eq!(scene.spawns(), 0);
}

#[test]
fn errors_that_can_heal_are_retried_until_the_budget_is_spent() {
    const ETXTBSY: i32 = 26;
    let mut scene = Scene::new(manifest());
    for _ in 0..10 {
        scene.spawn_failed(SpawnErrorKind::Exec, ETXTBSY, "/srv/web: text file busy");
        assert!(matches!(scene.seen(), Seen::BackingOff(_)));
        scene.pass(scene.supervisor.next_wake().unwrap().since(scene.now));
    }
    scene.spawn_failed(SpawnErrorKind::Exec, ETXTBSY, "/srv/web: text file busy");
    let reason = scene.report().reason;
    assert_eq!(reason, "given up: restarted 10 times within 5m; the last time: /srv/web: text file busy");
}

#[test]
fn an_exec_error_told_by_record_and_by_answer_counts_once() {
    for record_first in [true, false] {
        let mut scene = Scene::new(manifest());
        let record = pb::ExitRecord { errno: 2, ..scene.record(pb::ExitCause::ExecError, 0, 0) };
        if record_first {
            scene.give(Input::Exited(record));
            scene.spawn_failed(SpawnErrorKind::Exec, 2, "nope");
        } else {
            scene.spawn_failed(SpawnErrorKind::Exec, 2, "nope");
            scene.give(Input::Exited(record));
        }
        assert_eq!(scene.supervisor.memory.exec_failures, 1);
        assert_eq!(scene.supervisor.memory.restarts, 1);
        assert_eq!(scene.supervisor.last_exit.as_ref().unwrap().sequence, 1, "the keeper's own record stays");
    }
}

#[test]
fn being_stopped_with_the_keeper_is_no_failure() {
    let mut scene = Scene::running(manifest());
    scene.orders();
    scene.give(Input::Exited(scene.record(pb::ExitCause::Operator, 0, 15)));
    scene.swept();
    assert_eq!(scene.spawns(), 0);
    assert_eq!(scene.supervisor.memory, RestartMemory::default());
    scene.pass(seconds(5));
    assert_eq!(scene.spawns(), 1);
}

#[test]
fn attempts_that_only_the_keeper_remembers_are_not_used_again() {
    let mut scene = Scene::new(manifest());
    scene.supervisor = Supervisor::new(wanted(manifest(), 1, pb::Desired::Run), BOOT, scene.now);
    let exit = pb::ExitRecord { attempt: 7, ..scene.record(pb::ExitCause::Exit, 1, 0) };
    scene.give(Input::Exited(exit));
    scene.give(Input::Absent { fresh: true });
    assert_eq!(scene.supervisor.key().attempt, 8);
}

#[test]
fn policies_say_whether_an_end_is_the_end() {
    use pb::RestartPolicy::{Always, Never, OnFailure};
    for (policy, code, again) in
        [(Always, 0, true), (Always, 1, true), (OnFailure, 0, false), (OnFailure, 1, true), (Never, 1, false)]
    {
        let mut scene = Scene::running(pb::Manifest {
            restart: Some(pb::Restart { policy: policy.into(), ..manifest().restart.unwrap() }),
            ..manifest()
        });
        scene.pass(seconds(30));
        scene.orders();
        scene.exit(code);
        assert_eq!(scene.spawns() == 1, again, "{policy:?} status {code}");
        assert_eq!(matches!(scene.seen(), Seen::Exited(_)), !again, "{policy:?} status {code}");
    }
}

#[test]
fn an_exit_before_the_answer_to_its_spawn_is_not_lost_and_not_doubled() {
    let mut scene = Scene::new(manifest());
    scene.orders();
    scene.exit(1);
    assert_eq!(scene.supervisor.memory.restarts, 1);
    scene.spawned();
    assert!(scene.signals().is_empty(), "the late answer is about a process that has ended");
    assert!(matches!(scene.supervisor.state, State::BackingOff { .. }));
}

#[test]
fn exit_records_told_twice_or_of_older_processes_change_nothing() {
    let mut scene = Scene::running(manifest());
    scene.pass(seconds(20));
    let first = scene.record(pb::ExitCause::Exit, 1, 0);
    scene.exit(1);
    scene.spawned();
    let state = scene.supervisor.state.clone();
    scene.give(Input::Exited(first.clone()));
    scene.give(Input::Exited(pb::ExitRecord { epoch: 0, attempt: 2, ..first }));
    assert_eq!(scene.supervisor.state, state);
    assert_eq!(scene.report().restarts, 1);
}

#[test]
fn a_restart_at_once_still_shows_the_exit() {
    let mut scene = Scene::running(manifest());
    scene.pass(seconds(20));
    scene.exit(3);
    scene.spawned();
    assert!(scene.is_ready());
    assert_eq!(scene.report().last_exit.unwrap().code, 3);
}

// Health

fn probed() -> pb::Manifest {
    let health = pb::Health { ready: Some(http_probe()), live: None };
    pb::Manifest { health: Some(health), ..with_port(0) }
}

#[test]
fn ready_on_the_first_success_unready_on_the_third_failure() {
    let mut scene = Scene::running(probed());
    let asked = scene.orders();
    let asked =
        asked.iter().any(|action| matches!(action, Action::StartProbe(probe) if probe.port == Some(20_001)));
    assert!(asked);
    assert_eq!(scene.report().endpoint(), pb::EndpointState::Starting);
    scene.probe(ProbeKind::Ready, Some("connection refused"));
    assert_eq!(scene.report().reason, "http GET / on port 20001: connection refused");
    scene.probe(ProbeKind::Ready, None);
    assert!(scene.is_ready());
    assert_eq!(scene.report().reason, "");
    for (failure, ready) in [("a", true), ("b", true), ("status 503", false)] {
        scene.probe(ProbeKind::Ready, Some(failure));
        assert_eq!(scene.is_ready(), ready, "after {failure}");
    }
    assert_eq!(scene.report().reason, "http GET / on port 20001: status 503");
    scene.probe(ProbeKind::Ready, None);
    scene.probe(ProbeKind::Ready, Some("a"));
    scene.probe(ProbeKind::Ready, None);
    scene.probe(ProbeKind::Ready, Some("a"));
    scene.probe(ProbeKind::Ready, Some("a"));
    assert!(scene.is_ready(), "only failures in a row count");
}

#[test]
fn results_of_an_older_process_are_ignored() {
    let mut scene = Scene::running(probed());
    let key = ProcessKey { epoch: 1, attempt: 0 };
    scene.give(Input::ProbeResult { key, probe: ProbeKind::Ready, outcome: ProbeOutcome::Passed });
    assert!(!scene.is_ready());
}

#[test]
fn notify_makes_it_ready_only_when_the_manifest_says_so() {
    let by_notify = pb::Probe { check: Some(pb::probe::Check::Notify(true)), ..pb::Probe::default() };
    for (probe, ready) in [(by_notify, true), (http_probe(), false)] {
        let health = pb::Health { ready: Some(probe), live: None };
        let mut scene = Scene::running(pb::Manifest { health: Some(health), ..with_port(0) });
        let key = scene.supervisor.key();
        scene.give(Input::Notify { key, message: Notification::Ready });
        assert_eq!(scene.is_ready(), ready);
        scene.give(Input::Notify { key, message: Notification::Stopping });
        scene.probe(ProbeKind::Ready, None);
        assert!(!scene.is_ready(), "it says that it is going");
    }
}

fn living() -> pb::Manifest {
    pb::Manifest { health: Some(pb::Health { ready: None, live: Some(http_probe()) }), ..with_port(0) }
}

#[test]
fn three_bad_liveness_results_after_the_grace_stop_it_to_start_it_again() {
    let mut scene = Scene::running(living());
    for _ in 0..9 {
        scene.probe(ProbeKind::Live, Some("no answer"));
        scene.pass(seconds(1));
    }
    assert!(matches!(scene.supervisor.state, State::Running(_)), "nothing counts within the grace");
    scene.pass(seconds(1));
    scene.probe(ProbeKind::Live, Some("no answer"));
    scene.pass(seconds(1));
    scene.probe(ProbeKind::Live, None);
    for second in 0..3 {
        assert!(matches!(scene.supervisor.state, State::Running(_)), "second {second}");
        scene.pass(seconds(1));
        scene.orders();
        scene.probe(ProbeKind::Live, Some("no answer"));
    }
    let reason = "liveness probe failed: http GET / on port 20001: no answer";
    assert_eq!(scene.report().reason, reason);
    assert_eq!(scene.report().endpoint(), pb::EndpointState::Draining);
    let cause = pb::ExitCause::Probe;
    let key = scene.supervisor.key();
    let expected = Action::Signal { key, signal: 15, scope: SignalScope::Process, cause };
    assert!(scene.orders().contains(&expected));
    // It ends with status 0; being restarted for its health is a failure all the same.
    scene.exit(0);
    assert_eq!(scene.supervisor.memory.restarts, 1);
    assert_eq!(scene.spawns(), 1, "at once, after more than ten seconds");
}

#[test]
fn a_live_change_of_health_leaves_the_process_alone() {
    let mut scene = Scene::running(probed());
    scene.orders();
    scene.want(with_port(0), 1, pb::Desired::Run);
    assert!(scene.is_ready(), "without a probe it is ready");
    let mut orders = scene.orders();
    assert!(orders.contains(&Action::StopProbes));
    assert!(!orders.iter().any(|action| matches!(action, Action::Signal { .. } | Action::Spawn(_))));
    scene.want(probed(), 1, pb::Desired::Run);
    assert!(scene.is_ready(), "until the new probe says otherwise");
    orders = scene.orders();
    position(&orders, |action| matches!(action, Action::StartProbe(_)));
}

// Stopping

#[test]
fn the_ladder_is_climbed_rung_by_rung() {
    let mut scene = Scene::running(manifest());
    scene.orders();
    scene.stop();
    let orders = scene.orders.clone();
    let report = position(&orders, |action| matches!(action, Action::Report));
    let persist = position(
        &orders,
        |action| matches!(action, Action::Persist(ledger) if ledger.stop_kill_boottime_ns == (scene.now + seconds(10)).0),
    );
    let signal = position(&orders, |action| matches!(action, Action::Signal { .. }));
    assert!(
        report < signal && persist < signal,
        "draining is said, and the deadline stored, before the signal"
    );
    assert_eq!(scene.report().endpoint(), pb::EndpointState::Draining);
    assert_eq!(scene.signals(), [(15, SignalScope::Process), (18, SignalScope::Process)]);
    scene.pass(Duration::from_millis(9_999));
    assert!(scene.signals().is_empty());
    scene.pass(Duration::from_millis(1));
    assert_eq!(scene.signals(), [(9, SignalScope::Process), (9, SignalScope::Group)]);
    for wait in [15, 5, 20, 80, 120, 120, 120] {
        scene.pass(seconds(wait) - Duration::from_millis(1));
        assert!(scene.signals().is_empty(), "{wait} s");
        scene.pass(Duration::from_millis(1));
        assert_eq!(scene.signals(), [(9, SignalScope::Process), (9, SignalScope::Cgroup)], "{wait} s");
    }
    assert_eq!(scene.report().reason, "pid 101 does not die from SIGKILL, sent 8 times");
    assert!(matches!(scene.seen(), Seen::Stopping(_)));
}

#[test]
fn a_process_that_cannot_be_killed_is_reported_loudly_once() {
    let mut scene = Scene::running(manifest());
    scene.stop();
    for _ in 0..1_200 {
        scene.pass(seconds(1));
    }
    let loud = |action: &&Action| matches!(action, Action::Log { level: Level::Error, .. });
    assert_eq!(scene.orders().iter().filter(loud).count(), 1);
}

#[test]
fn stop_waits_for_the_exit_and_for_the_cgroup_then_cleans_up_and_is_gone() {
    let mut scene = Scene::running(manifest());
    scene.stop();
    scene.orders();
    scene.give(Input::Exited(scene.record(pb::ExitCause::Hub, 0, 15)));
    assert!(!scene.supervisor.is_gone());
    assert!(matches!(scene.seen(), Seen::Stopping(_)));
    scene.swept();
    assert!(matches!(scene.seen(), Seen::Exited(pb::observed::Exited { exit: Some(_) })));
    let orders = scene.orders();
    let forget = position(&orders, |action| *action == Action::Forget { epoch: 1 });
    assert!(forget < position(&orders, |action| *action == Action::Gone));
    assert!(!orders.iter().any(|action| matches!(action, Action::Spawn(_))));
}

#[test]
fn stop_ends_a_wait_at_once() {
    let mut backing_off = Scene::running(manifest());
    backing_off.exit(1);
    assert!(matches!(backing_off.supervisor.state, State::BackingOff { .. }));
    let picking = Scene::new(with_port(0));
    let mut failed = Scene::new(manifest());
    failed.supervisor.state = State::Failed { reason: "given up".to_owned() };
    for mut scene in [backing_off, picking, failed] {
        scene.orders();
        scene.stop();
        assert!(scene.supervisor.is_gone());
        assert!(scene.signals().is_empty());
    }
}

#[test]
fn stop_during_a_spawn_waits_for_its_outcome() {
    let mut scene = Scene::new(manifest());
    scene.orders();
    scene.stop();
    assert!(!scene.supervisor.is_gone());
    scene.spawned();
    assert_eq!(scene.signals(), [(15, SignalScope::Process), (18, SignalScope::Process)]);
    let mut scene = Scene::new(manifest());
    scene.stop();
    scene.spawn_failed(SpawnErrorKind::Exec, 2, "nope");
    assert!(scene.supervisor.is_gone());
}

#[test]
fn a_higher_epoch_ends_the_older_process_first() {
    let mut scene = Scene::running(with_port(0));
    scene.orders();
    scene.want(with_port(0), 2, pb::Desired::Run);
    assert_eq!(scene.signals(), [(15, SignalScope::Process), (18, SignalScope::Process)]);
    let report = scene.report();
    assert_eq!((report.epoch, report.attempt), (2, 0));
    assert_eq!(report.reason, "waits for its process of epoch 1 to end");
    scene.exit(0);
    assert!(scene.orders().contains(&Action::Forget { epoch: 1 }));
    scene.pick(20_002);
    assert_eq!(scene.supervisor.key(), ProcessKey { epoch: 2, attempt: 1 });
    assert_eq!(scene.report().restarts, 0);
}

#[test]
fn an_older_epoch_never_takes_over() {
    let mut scene = Scene::running(manifest());
    scene.want(manifest(), 2, pb::Desired::Run);
    scene.exit(0);
    scene.spawned();
    scene.orders();
    scene.want(manifest(), 1, pb::Desired::Stop);
    assert!(scene.signals().is_empty());
    assert!(scene.is_ready());
}

#[test]
fn a_second_process_is_killed() {
    let mut scene = Scene::running(manifest());
    scene.exit(1);
    scene.pass(seconds(1));
    scene.spawned();
    scene.orders();
    let key = ProcessKey { epoch: 1, attempt: 1 };
    scene.supervisor.last_exit = None;
    scene.give(Input::Adopted { key, process: process(77), started_unix_ns: 1 });
    let cause = pb::ExitCause::Hub;
    let expected = Action::Signal { key, signal: 9, scope: SignalScope::Process, cause };
    assert!(scene.orders().contains(&expected));
    assert!(scene.is_ready(), "the newest stays");
}

// The agent's own restart, the keeper's absence, the reboot

#[test]
fn a_running_process_is_adopted_with_its_readiness() {
    let mut scene = Scene::running(probed());
    scene.probe(ProbeKind::Ready, None);
    scene.restart_agent();
    assert!(!scene.supervisor.can_report(), "nothing is said before the keeper's word");
    scene.adopt();
    assert!(scene.is_ready());
    let orders = scene.orders();
    position(&orders, |action| matches!(action, Action::StartProbe(_)));
    assert!(!orders.iter().any(|action| matches!(action, Action::Spawn(_) | Action::Signal { .. })));
}

#[test]
fn an_end_while_the_agent_was_away_is_counted_once_with_its_cause() {
    let mut scene = Scene::running(manifest());
    scene.pass(seconds(30));
    let exit = scene.record(pb::ExitCause::Signal, 0, 9);
    scene.restart_agent();
    scene.give(Input::Exited(exit.clone()));
    assert_eq!(scene.spawns(), 0, "the list has not come yet");
    scene.give(Input::Absent { fresh: true });
    scene.swept();
    assert_eq!(scene.spawns(), 1);
    scene.give(Input::Exited(exit));
    assert_eq!(scene.report().restarts, 1);
    assert_eq!(scene.report().last_exit.unwrap().signal, 9);
}

#[test]
fn an_end_nobody_saw_is_a_failure_of_unknown_cause() {
    let mut scene = Scene::running(manifest());
    scene.restart_agent();
    scene.give(Input::Absent { fresh: true });
    assert_eq!(scene.report().last_exit.unwrap().cause(), pb::ExitCause::Unspecified);
    assert_eq!(scene.report().reason, "process ended while nobody watched; how is not known");
}

#[test]
fn back_off_and_budget_survive_the_agent() {
    let mut scene = Scene::running(manifest());
    scene.exit(1);
    let State::BackingOff { until, .. } = scene.supervisor.state else {
        panic!("{:?}", scene.supervisor.state)
    };
    let memory = scene.supervisor.memory.clone();
    scene.restart_agent();
    scene.give(Input::Absent { fresh: true });
    assert_eq!(scene.supervisor.memory, memory);
    assert_eq!(scene.supervisor.next_wake(), Some(until));
    assert_eq!(scene.spawns(), 0);
    scene.pass(until.since(scene.now));
    assert_eq!(scene.spawns(), 1);
}

#[test]
fn failed_stays_failed_until_a_higher_epoch() {
    let mut scene = Scene::new(manifest());
    for _ in 0..3 {
        scene.spawn_failed(SpawnErrorKind::Exec, 2, "nope");
        scene.pass(seconds(1));
    }
    scene.restart_agent();
    scene.give(Input::Absent { fresh: true });
    assert!(matches!(scene.seen(), Seen::Failed(_)));
    scene.want(manifest(), 2, pb::Desired::Run);
    assert_eq!(scene.spawns(), 1);
    assert_eq!(scene.supervisor.memory, RestartMemory::default());
}

#[test]
fn a_restart_of_the_agent_neither_repeats_the_stop_signal_nor_extends_the_grace() {
    let mut scene = Scene::running(manifest());
    scene.stop();
    scene.pass(seconds(4));
    scene.restart_agent();
    scene.adopt();
    assert!(scene.signals().is_empty());
    scene.pass(seconds(6));
    assert_eq!(scene.signals(), [(9, SignalScope::Process), (9, SignalScope::Group)]);
    scene.restart_agent();
    scene.adopt();
    assert_eq!(scene.signals(), [(9, SignalScope::Process), (9, SignalScope::Cgroup)]);
}

#[test]
fn a_stop_signal_the_keeper_never_got_goes_out_once_it_is_back() {
    let mut scene = Scene::running(manifest());
    scene.stop();
    scene.orders();
    let key = scene.supervisor.key();
    scene.give(Input::SignalFailed { key, signal: 15, error: SignalError::Unavailable });
    assert!(scene.signals().is_empty());
    scene.adopt();
    assert_eq!(scene.signals(), [(15, SignalScope::Process), (18, SignalScope::Process)]);
    scene.adopt();
    assert!(scene.signals().is_empty());
}

#[test]
fn a_process_the_keeper_does_not_know_is_looked_up() {
    let mut scene = Scene::running(manifest());
    scene.stop();
    scene.orders();
    let key = scene.supervisor.key();
    scene.give(Input::SignalFailed { key, signal: 15, error: SignalError::Gone });
    assert!(scene.orders().contains(&Action::ListProcesses));
    scene.give(Input::Absent { fresh: false });
    scene.swept();
    assert!(scene.supervisor.is_gone());
}

#[test]
fn an_unanswered_spawn_waits_for_the_keepers_list() {
    for started in [true, false] {
        let mut scene = Scene::new(manifest());
        scene.orders();
        scene.spawn_failed(SpawnErrorKind::Unavailable, 0, "keeper connection lost");
        scene.pass(seconds(100));
        assert_eq!(scene.spawns(), 0, "it may run");
        if started {
            scene.adopt();
            assert!(scene.is_ready());
        } else {
            scene.give(Input::Absent { fresh: true });
            assert_eq!(scene.spawns(), 1);
            assert_eq!(scene.report().restarts, 0, "nothing had run");
        }
    }
}

#[test]
fn a_list_older_than_the_spawn_does_not_repeat_it() {
    let mut scene = Scene::new(manifest());
    scene.orders();
    scene.give(Input::Absent { fresh: false });
    assert_eq!(scene.spawns(), 0);
}

#[test]
fn a_reboot_voids_the_process_and_is_nobodys_fault() {
    let mut scene = Scene::running(manifest());
    scene.now = Monotonic::BOOT + seconds(20);
    scene.restart_agent_in("boot-2");
    scene.give(Input::Absent { fresh: true });
    assert_eq!(scene.spawns(), 1);
    assert_eq!(scene.report().restarts, 0);
    assert_eq!(scene.supervisor.key().attempt, 2, "numbers are not used twice");
}

#[test]
fn a_reboot_serves_a_back_off_again_and_forgets_no_restart() {
    let mut scene = Scene::running(manifest());
    for _ in 0..5 {
        scene.exit(1);
        scene.pass(seconds(3));
        scene.spawned();
    }
    scene.exit(1);
    scene.now = Monotonic::BOOT + seconds(20);
    let wanted = scene.supervisor.wanted.clone();
    let ledger = scene.supervisor.persisted.clone();
    scene.supervisor = Supervisor::restore(wanted, ledger.as_ref(), "boot-2", scene.now);
    scene.give(Input::Absent { fresh: true });
    assert_eq!(scene.supervisor.next_wake(), Some(scene.now + Duration::from_millis(3_200)));
    assert_eq!(scene.supervisor.memory.window.len(), 6);
    assert!(scene.supervisor.memory.window.iter().all(|at| *at <= scene.now));
}

#[test]
fn leftovers_of_a_dead_process_are_killed_before_the_next_start() {
    let mut scene = Scene::running(manifest());
    scene.restart_agent();
    let key = scene.supervisor.key();
    scene.give(Input::Leftover { key });
    scene.give(Input::Absent { fresh: true });
    scene.pass(seconds(2));
    let orders = scene.orders();
    assert!(orders.contains(&Action::SweepCgroup { key }));
    assert!(!orders.iter().any(|action| matches!(action, Action::Spawn(_))));
    scene.swept();
    assert_eq!(scene.spawns(), 1);
}

#[test]
fn run_again_after_a_stop_in_the_same_epoch_starts_afresh_with_new_numbers() {
    let mut scene = Scene::running(manifest());
    scene.stop();
    scene.orders();
    scene.want(manifest(), 1, pb::Desired::Run);
    assert!(scene.signals().is_empty());
    assert_eq!(scene.spawns(), 0, "the stop is finished first");
    scene.exit(0);
    assert_eq!(scene.supervisor.key(), ProcessKey { epoch: 1, attempt: 2 });
    scene.spawned();
    assert!(scene.is_ready());
}
