//! The stop ladder, and what it waits for.

use super::*;

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

fn notes(scene: &Scene) -> Vec<String> {
    scene.report().notes.iter().map(|note| format!("{}: {}", note.kind, note.text)).collect()
}

#[test]
fn what_was_done_to_end_it_is_in_its_history() {
    let mut scene = Scene::running(manifest());
    scene.stop();
    assert_eq!(scene.report().reason, "was sent SIGTERM and has 10s to end");
    scene.pass(Duration::from_millis(200));
    scene.exit(0);
    assert_eq!(notes(&scene), ["instance_stop: was sent SIGTERM and ended after 200ms"]);

    let mut scene = Scene::running(manifest());
    scene.stop();
    scene.pass(seconds(10));
    assert_eq!(scene.report().reason, "did not end after SIGTERM within 10s and was sent SIGKILL");
    scene.pass(seconds(15));
    scene.restart_agent();
    scene.adopt();
    scene.pass(seconds(1));
    let key = scene.supervisor.key();
    scene.give(Input::Exited(scene.record(pb::ExitCause::Hub, 0, 9)));
    scene.give(Input::CgroupEmpty { key, killed: 3 });
    assert_eq!(
        notes(&scene),
        [
            "instance_stop: was sent SIGTERM, had not ended after 10s, was sent SIGKILL 3 times, the last ones with \
             its cgroup and ended 16s later",
            "instance_left_processes: left 3 processes behind, which were killed",
        ]
    );
    assert!(scene.supervisor.is_gone());
}

#[test]
fn notes_have_rising_numbers_over_placements_and_only_the_newest_are_kept() {
    let mut scene = Scene::running(manifest());
    let mut last = 0;
    for epoch in 2..14 {
        scene.want(manifest(), epoch, pb::Desired::Run);
        scene.exit(0);
        scene.spawned();
        let numbers: Vec<u64> = scene.report().notes.iter().map(|note| note.number).collect();
        assert!(numbers.is_sorted() && numbers.last() > Some(&last), "{numbers:?} after {last}");
        assert!(numbers.len() <= 8);
        last = *numbers.last().unwrap_or(&0);
        scene.restart_agent();
        scene.adopt();
    }
    // Another host, which knows of none of them, goes on above.
    let mut elsewhere = Scene::running(manifest());
    elsewhere.want(manifest(), 14, pb::Desired::Run);
    elsewhere.exit(0);
    elsewhere.spawned();
    elsewhere.stop();
    elsewhere.exit(0);
    assert!(elsewhere.report().notes.last().is_some_and(|note| note.number > last));
}

#[test]
fn a_process_may_ask_for_more_time_to_end_unless_it_runs_under_a_lease() {
    let mut scene = Scene::running(manifest());
    scene.stop();
    let key = scene.supervisor.key();
    scene.give(Input::Notify { key, message: Notification::ExtendTimeout(seconds(30)) });
    scene.orders();
    scene.pass(seconds(29));
    assert!(scene.signals().is_empty());
    scene.pass(seconds(1));
    assert_eq!(scene.signals(), [(9, SignalScope::Process), (9, SignalScope::Group)]);
}
