//! The agent's own restart, the keeper's absence, the reboot.

use super::*;

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
fn a_signal_for_the_group_stays_so_over_a_restart_of_the_agent() {
    let stop = manifest().stop.map(|stop| pb::Stop { scope: pb::StopScope::Group.into(), ..stop });
    let manifest = pb::Manifest { stop, ..manifest() };
    let mut scene = Scene::running(manifest.clone());
    scene.want(manifest, 1, pb::Desired::Stop);
    assert_eq!(scene.signals(), [(15, SignalScope::Group), (18, SignalScope::Group)]);
    // Nobody wants it any more, and nobody knows its manifest.
    scene.supervisor.wanted.manifest = None;
    scene.restart_agent();
    scene.adopt();
    let key = scene.supervisor.key();
    scene.give(Input::SignalFailed { key, signal: 15, error: SignalError::Unavailable });
    scene.adopt();
    assert_eq!(scene.signals(), [(15, SignalScope::Group), (18, SignalScope::Group)]);
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
fn what_no_keeper_knows_in_its_cgroup_is_ended_so_that_it_can_start() {
    let mut scene = Scene::new(manifest());
    scene.orders();
    let key = scene.supervisor.key();
    scene.spawn_failed(SpawnErrorKind::Busy, 0, "the cgroup holds 1 process that no keeper noted");
    let orders = scene.orders();
    assert!(orders.contains(&Action::ListProcesses) && !orders.contains(&Action::SweepCgroup { key }));
    let mut known = Scene { supervisor: scene.supervisor.clone(), ..Scene::new(manifest()) };
    scene.give(Input::Absent { fresh: false });
    assert!(scene.orders().contains(&Action::SweepCgroup { key }));
    scene.swept();
    scene.pass(seconds(100));
    assert_eq!(scene.spawns(), 1, "and then it starts");
    // When the keeper knows it after all, nothing is swept.
    known.adopt();
    assert!(!known.orders().contains(&Action::SweepCgroup { key }));
    assert!(known.is_ready());
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
