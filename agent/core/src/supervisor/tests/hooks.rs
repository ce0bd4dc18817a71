//! Hooks: when each runs, what its failure means, and what a restart of the agent makes of it.

use super::*;

fn hooked() -> pb::Manifest {
    let hook = |seconds: u64| {
        let timeout = Duration::from_secs(seconds).try_into().ok();
        Some(pb::Hook { command: vec!["true".to_owned()], timeout })
    };
    let hooks =
        pb::Hooks { pre_start: hook(30), post_start: hook(30), pre_stop: hook(4), post_stop: hook(30) };
    pb::Manifest { hooks: Some(hooks), ..manifest() }
}

impl Scene {
    fn prepared(&mut self) {
        self.give(Input::Prepared { key: self.supervisor.key(), result: Ok(()) });
    }

    fn hook_ends(&mut self, hook: Hook, outcome: Result<(), &str>) {
        let result = HookResult { took: seconds(1), outcome: outcome.map_err(str::to_owned) };
        self.give(Input::HookEnded { key: self.supervisor.key(), hook, result });
    }

    /// Started, with the first two hooks behind it.
    fn hooked() -> Self {
        let mut scene = Self::new(hooked());
        scene.prepared();
        scene.hook_ends(Hook::PreStart, Ok(()));
        scene.spawned();
        scene.hook_ends(Hook::PostStart, Ok(()));
        scene.orders();
        scene
    }

    /// What was ordered of what this file is about, in order.
    fn turns(&mut self) -> Vec<String> {
        let turn = |action: Action| match action {
            Action::Prepare(_) => Some("prepare".to_owned()),
            Action::Spawn(order) => Some(format!("spawn prepared={}", order.prepared)),
            Action::RunHook(order) => Some(format!("run {}", order.hook)),
            Action::EndHook { hook, .. } => Some(format!("end {hook}")),
            Action::CancelPreparation { .. } => Some("cancel".to_owned()),
            Action::Signal { signal, .. } if signal != 18 => Some(format!("signal {signal}")),
            Action::Gone => Some("gone".to_owned()),
            Action::Signal { .. }
            | Action::PickPorts { .. }
            | Action::SweepCgroup { .. }
            | Action::StartProbe(_)
            | Action::StopProbes
            | Action::SetLimits { .. }
            | Action::FetchAhead(_)
            | Action::CancelFetch
            | Action::ListProcesses
            | Action::Persist(_)
            | Action::Forget { .. }
            | Action::AcknowledgeExits { .. }
            | Action::ForgetLedger
            | Action::Report
            | Action::WakeAt(_)
            | Action::SetDeadline { .. }
            | Action::Log { .. } => None,
        };
        self.orders().into_iter().filter_map(turn).collect()
    }

    fn history(&self) -> Vec<String> {
        let notes = self.report().notes;
        notes.into_iter().map(|note| format!("{}: {}", note.kind, note.text)).collect()
    }
}

#[test]
fn a_life_goes_through_its_hooks_in_order_and_its_history_tells() {
    let mut scene = Scene::new(hooked());
    assert_eq!(scene.turns(), ["prepare"]);
    assert_eq!(scene.report().reason, "fetches what it needs");
    scene.prepared();
    assert_eq!(scene.turns(), ["run pre_start"]);
    assert_eq!(scene.report().reason, "runs its pre_start hook");
    scene.hook_ends(Hook::PreStart, Ok(()));
    assert_eq!(scene.turns(), ["spawn prepared=true"]);
    scene.spawned();
    assert_eq!(scene.turns(), ["run post_start"]);
    scene.hook_ends(Hook::PostStart, Err("exited with status 1"));
    assert!(matches!(scene.seen(), Seen::Running(_)), "its failure ends nothing");
    scene.want(hooked(), 1, pb::Desired::Stop);
    assert_eq!(scene.turns(), ["run pre_stop"]);
    scene.hook_ends(Hook::PreStop, Ok(()));
    assert_eq!(scene.turns(), ["signal 15"]);
    scene.give(Input::Exited(scene.record(pb::ExitCause::Hub, 0, 15)));
    assert_eq!(scene.turns(), Vec::<String>::new(), "what is left in the cgroup goes first");
    scene.swept();
    assert_eq!(scene.turns(), ["run post_stop"]);
    assert_eq!(scene.report().reason, "runs its post_stop hook");
    scene.hook_ends(Hook::PostStop, Ok(()));
    assert_eq!(scene.turns(), ["gone"]);
    let history = scene.history();
    assert_eq!(
        history,
        [
            "instance_hook: has been through its pre_start hook, in 1s",
            "instance_hook: had its post_start hook fail: exited with status 1",
            "instance_hook: has been through its pre_stop hook, in 1s",
            "instance_stop: was sent SIGTERM and ended after 0s",
            "instance_hook: has been through its post_stop hook, in 1s",
        ]
    );
}

#[test]
fn a_failed_pre_start_is_a_failed_start_with_back_off_and_budget() {
    let mut scene = Scene::new(hooked());
    for restarts in 1..=10 {
        scene.prepared();
        scene.hook_ends(Hook::PreStart, Err("migrate ended with exit status: 3"));
        assert_eq!(scene.turns().last().unwrap(), "run post_stop", "what it began is undone first");
        scene.hook_ends(Hook::PostStop, Ok(()));
        let report = scene.report();
        assert_eq!(report.reason, "pre_start hook failed: migrate ended with exit status: 3");
        assert_eq!(report.restarts, restarts);
        assert!(matches!(scene.seen(), Seen::BackingOff(_)));
        assert_eq!(scene.turns(), Vec::<String>::new());
        scene.pass(Duration::from_millis(36_001).min(seconds(20)));
        if scene.turns() != ["prepare"] {
            scene.pass(seconds(20));
        }
    }
    scene.prepared();
    scene.hook_ends(Hook::PreStart, Err("migrate ended with exit status: 3"));
    assert!(matches!(scene.seen(), Seen::Failed(_)), "{:?}", scene.report());
}

#[test]
fn a_crash_is_followed_by_post_stop_before_the_next_start() {
    let mut scene = Scene::hooked();
    scene.pass(seconds(60));
    scene.exit(1);
    assert_eq!(scene.turns(), ["run post_stop"], "the start that is due at once waits");
    assert_eq!(scene.supervisor.next_wake(), None, "and nobody wakes for it");
    scene.hook_ends(Hook::PostStop, Err("it took longer than 30s and was killed"));
    assert_eq!(scene.turns(), ["prepare"]);
}

#[test]
fn a_stop_is_not_held_up_by_what_belongs_to_the_beginning() {
    let mut scene = Scene::new(hooked());
    scene.orders();
    scene.want(hooked(), 1, pb::Desired::Stop);
    assert_eq!(scene.turns(), ["cancel"]);
    let error = SpawnError { kind: SpawnErrorKind::System, errno: 0, message: "cut".to_owned() };
    scene.give(Input::Prepared { key: scene.supervisor.key(), result: Err(error) });
    assert_eq!(scene.turns(), ["gone"], "nothing came of it, so nothing is undone");

    let mut scene = Scene::new(hooked());
    scene.prepared();
    scene.orders();
    scene.want(hooked(), 1, pb::Desired::Stop);
    assert_eq!(scene.turns(), ["end pre_start"]);
    scene.hook_ends(Hook::PreStart, Err("it was ended"));
    assert_eq!(scene.turns(), ["run post_stop"]);

    let mut scene = Scene::new(hooked());
    scene.prepared();
    scene.hook_ends(Hook::PreStart, Ok(()));
    scene.spawned();
    scene.orders();
    scene.want(hooked(), 1, pb::Desired::Stop);
    assert_eq!(scene.turns(), ["end post_start", "run pre_stop"]);
}

#[test]
fn pre_stop_has_its_time_and_never_more_than_the_grace() {
    let mut scene = Scene::hooked();
    scene.want(hooked(), 1, pb::Desired::Stop);
    assert_eq!(scene.turns(), ["run pre_stop"]);
    scene.pass(Duration::from_millis(3_999));
    assert_eq!(scene.turns(), Vec::<String>::new());
    scene.pass(Duration::from_millis(1));
    assert_eq!(scene.turns(), ["end pre_stop", "signal 15"]);
    scene.pass(Duration::from_millis(5_999));
    assert_eq!(scene.turns(), Vec::<String>::new());
    scene.pass(Duration::from_millis(1));
    assert_eq!(scene.turns(), ["signal 9", "signal 9"], "the grace counts from the beginning of the stop");
}

#[test]
fn a_pre_stop_that_takes_too_long_is_told_once() {
    let mut scene = Scene::hooked();
    scene.want(hooked(), 1, pb::Desired::Stop);
    scene.pass(seconds(4));
    let told = "instance_hook: had its pre_stop hook fail: it took longer than 4s and was killed";
    assert_eq!(scene.history().last().unwrap(), told);
    let before = scene.history().len();
    scene.hook_ends(Hook::PreStop, Err("it was ended"));
    assert_eq!(scene.history().len(), before, "its own word comes late");

    // What the grace leaves is all that it has.
    let mut scene = Scene::hooked();
    let mut hurried = hooked();
    hurried.stop.as_mut().unwrap().grace = seconds(3).try_into().ok();
    scene.want(hurried, 1, pb::Desired::Stop);
    scene.pass(seconds(3));
    assert!(scene.history().last().unwrap().ends_with("it took longer than 3s and was killed"));
    // One that says so itself, in time.
    let mut scene = Scene::hooked();
    scene.want(hooked(), 1, pb::Desired::Stop);
    scene.hook_ends(Hook::PreStop, Err("it took longer than 4s and was killed"));
    scene.pass(seconds(4));
    assert_eq!(scene.history().iter().filter(|line| *line == told).count(), 1);
}

#[test]
fn a_process_that_ends_during_pre_stop_is_not_signalled() {
    let mut scene = Scene::hooked();
    scene.want(hooked(), 1, pb::Desired::Stop);
    scene.orders();
    scene.exit(0);
    assert_eq!(scene.turns(), ["end pre_stop", "run post_stop"]);
}

#[test]
fn a_restart_of_the_agent_repeats_what_is_not_known_to_have_ended() {
    // Before the process: the hook is ended, then all begins anew.
    let mut scene = Scene::new(hooked());
    scene.prepared();
    scene.orders();
    scene.restart_agent();
    scene.give(Input::Absent { fresh: true });
    assert_eq!(scene.turns(), ["end pre_start"]);
    scene.hook_ends(Hook::PreStart, Err("it was ended"));
    assert_eq!(scene.turns(), ["run post_stop"]);
    scene.hook_ends(Hook::PostStop, Ok(()));
    assert_eq!(scene.turns(), ["prepare"]);

    // Beside it.
    let mut scene = Scene::new(hooked());
    scene.prepared();
    scene.hook_ends(Hook::PreStart, Ok(()));
    scene.spawned();
    scene.orders();
    let adopt = |scene: &mut Scene| {
        scene.restart_agent();
        let key = scene.supervisor.key();
        scene.give(Input::Adopted { key, process: process(101), started_unix_ns: 1 });
        scene.turns()
    };
    assert_eq!(adopt(&mut scene), ["run post_start"]);
    scene.hook_ends(Hook::PostStart, Ok(()));
    assert_eq!(adopt(&mut scene), Vec::<String>::new(), "once it has ended it is not run again");
    scene.want(hooked(), 1, pb::Desired::Stop);
    scene.orders();
    assert_eq!(adopt(&mut scene), ["run pre_stop"]);
    scene.hook_ends(Hook::PreStop, Ok(()));
    scene.orders();
    assert_eq!(adopt(&mut scene), Vec::<String>::new());

    // After it.
    scene.exit(0);
    assert_eq!(scene.turns(), ["run post_stop"]);
    scene.restart_agent();
    scene.give(Input::Absent { fresh: true });
    assert_eq!(scene.turns(), ["run post_stop"]);
    scene.hook_ends(Hook::PostStop, Ok(()));
    assert_eq!(scene.turns(), ["gone"]);
}

#[test]
fn a_reboot_ends_every_process_and_post_stop_follows_all_the_same() {
    let mut scene = Scene::hooked();
    scene.restart_agent_in("boot-2");
    scene.give(Input::Absent { fresh: true });
    assert_eq!(scene.turns(), ["run post_stop"]);
    scene.hook_ends(Hook::PostStop, Ok(()));
    assert_eq!(scene.turns(), ["prepare"]);
}

#[test]
fn an_instance_that_the_hub_has_forgotten_keeps_its_hooks_to_the_end() {
    let mut scene = Scene::hooked();
    scene.give(Input::Forget);
    scene.orders();
    let ledger = scene.supervisor.ledger();
    let known = forgotten(scene.supervisor.instance(), &ledger, None);
    assert_eq!(known.desired(), pb::Desired::Stop);
    assert_eq!(known.manifest.unwrap().hooks, hooked().hooks);
}

#[test]
fn the_list_of_the_keeper_does_not_mistake_a_hook_for_something_left_behind() {
    let mut scene = Scene::hooked();
    scene.exit(1);
    let key = scene.supervisor.key();
    scene.give(Input::Leftover { key });
    assert!(scene.supervisor.sweeps.is_empty(), "the hook would be killed");
}

/// Other hooks than those of the process that runs, or none: its end is still its own, also after a restart of the agent.
#[test]
fn the_end_of_a_process_has_the_hooks_that_it_was_started_with() {
    let post_stop = |scene: &mut Scene| {
        let hook = |action| {
            let Action::RunHook(order) = action else { return None };
            (order.hook == Hook::PostStop).then_some((order.command, order.wanted))
        };
        scene.orders().into_iter().find_map(hook)
    };
    let unhooked = pb::Manifest { command: vec!["other".to_owned()], ..manifest() };
    for restarts in [false, true] {
        let mut scene = Scene::hooked();
        scene.want(unhooked.clone(), 2, pb::Desired::Run);
        assert_eq!(scene.turns(), ["run pre_stop"]);
        scene.hook_ends(Hook::PreStop, Ok(()));
        // Once more, as when it is moved while it ends.
        scene.want(unhooked.clone(), 3, pb::Desired::Run);
        if restarts {
            scene.restart_agent();
            scene.adopt();
        }
        scene.give(Input::Exited(scene.record(pb::ExitCause::Hub, 0, 15)));
        scene.swept();
        let (command, wanted) = post_stop(&mut scene).expect("the hook of what ran");
        assert_eq!((command, wanted.manifest), (vec!["true".to_owned()], Some(hooked())));
        scene.hook_ends(Hook::PostStop, Ok(()));
        assert_eq!(scene.turns(), ["spawn prepared=false"], "the new one has none");
        scene.spawned();
        scene.want(unhooked.clone(), 3, pb::Desired::Stop);
        scene.give(Input::Exited(scene.record(pb::ExitCause::Hub, 0, 15)));
        scene.swept();
        assert_eq!(post_stop(&mut scene), None);
        assert_eq!(scene.supervisor.ledger().ran, None, "it is not kept for ever");
    }
    // Nor has one without hooks those of its successor.
    let mut scene = Scene::running(unhooked);
    scene.orders();
    scene.want(hooked(), 2, pb::Desired::Run);
    scene.give(Input::Exited(scene.record(pb::ExitCause::Hub, 0, 15)));
    scene.swept();
    assert_eq!(scene.turns(), ["signal 15", "prepare"]);
    // Hooks of its end that are changed alone are for the process that runs.
    let mut scene = Scene::hooked();
    let mut changed = hooked();
    changed.hooks.as_mut().unwrap().post_stop = None;
    scene.want(changed, 1, pb::Desired::Stop);
    scene.hook_ends(Hook::PreStop, Ok(()));
    scene.give(Input::Exited(scene.record(pb::ExitCause::Hub, 0, 15)));
    scene.swept();
    assert_eq!(post_stop(&mut scene), None);
}
