//! Ends, and whether and when the next start follows.

use super::*;

#[test]
fn a_crash_after_ten_seconds_is_answered_at_once_every_time_and_an_earlier_one_waits() {
    let mut scene = Scene::running(manifest());
    for _ in 0..2 {
        scene.pass(seconds(10));
        scene.orders();
        scene.exit(1);
        assert_eq!(scene.spawns(), 1);
        scene.spawned();
    }
    scene.pass(seconds(9));
    scene.orders();
    scene.exit(1);
    assert_eq!(scene.spawns(), 0);
    assert!(matches!(scene.seen(), Seen::BackingOff(_)));
    assert_eq!(scene.report().reason, "process exited with status 1");
    scene.pass(Duration::from_millis(121));
    assert_eq!(scene.spawns(), 1);
    assert_eq!((scene.report().attempt, scene.report().restarts), (4, 3));
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
    scene.give(Input::CgroupEmpty { key, killed: 0 });
    assert_eq!(scene.spawns(), 1);
}

#[test]
fn what_left_nothing_behind_is_followed_without_a_look() {
    let exec = pb::probe::Check::Exec(pb::ExecCheck { command: vec!["true".to_owned()] });
    let probe = pb::Probe { check: Some(exec), ..http_probe() };
    let looked_into =
        pb::Manifest { health: Some(pb::Health { live: Some(probe), ..Default::default() }), ..manifest() };
    for (manifest, at_once) in [(manifest(), true), (looked_into, false)] {
        let mut scene = Scene::running(manifest);
        scene.pass(seconds(30));
        scene.orders();
        let record = scene.record(pb::ExitCause::Signal, 0, 11);
        scene.give(Input::Exited(pb::ExitRecord { cgroup_empty: true, ..record }));
        let orders = scene.orders();
        let spawn = orders.iter().position(|order| matches!(order, Action::Spawn(_)));
        let sweeps = orders.iter().filter(|order| matches!(order, Action::SweepCgroup { .. })).count();
        assert_eq!((spawn.is_some(), sweeps), (at_once, usize::from(!at_once)));
        let written = orders.iter().filter(|order| matches!(order, Action::Persist(_))).count();
        assert_eq!(written, 1, "the end and the attempt after it are one record");
    }
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

#[test]
fn an_exit_code_that_cannot_heal_gives_up_at_once_and_one_of_success_rests() {
    let rules = |policy: pb::RestartPolicy| {
        let restart = pb::Restart {
            policy: policy.into(),
            success_codes: vec![143],
            fatal_codes: vec![78],
            ..manifest().restart.unwrap_or_default()
        };
        pb::Manifest { restart: Some(restart), ..manifest() }
    };
    let mut scene = Scene::running(rules(pb::RestartPolicy::Always));
    scene.exit(78);
    let reason = "process exited with status 78, which is one of restart.fatal_codes";
    assert_eq!(scene.supervisor.state, State::Failed { reason: reason.to_owned() });
    let mut scene = Scene::running(rules(pb::RestartPolicy::OnFailure));
    scene.exit(143);
    assert!(matches!(scene.seen(), Seen::Exited(_)), "{:?}", scene.seen());
}
