//! Readiness and liveness.

use super::*;

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
        let health = pb::Health { ready: Some(probe), ..Default::default() };
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
    pb::Manifest {
        health: Some(pb::Health { live: Some(http_probe()), ..Default::default() }),
        ..with_port(0)
    }
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

fn watched(start_grace: Option<Duration>) -> pb::Manifest {
    let live = pb::Probe { check: Some(pb::probe::Check::Notify(true)), ..http_probe() };
    let start_grace = start_grace.and_then(|grace| grace.try_into().ok());
    let health = pb::Health { live: Some(live), start_grace, ..Default::default() };
    pb::Manifest { health: Some(health), ..manifest() }
}

fn say(scene: &mut Scene, message: Notification) {
    let key = scene.supervisor.key();
    scene.give(Input::Notify { key, message });
}

fn runs(scene: &Scene) -> bool {
    matches!(scene.supervisor.state, State::Running(_))
}

#[test]
fn a_silent_watchdog_ends_the_process_with_a_core_and_starts_it_again() {
    let mut scene = Scene::running(watched(Some(seconds(5))));
    scene.pass(seconds(7));
    assert!(runs(&scene), "the grace and three intervals are not over");
    say(&mut scene, Notification::Watchdog);
    scene.pass(Duration::from_millis(2_999));
    assert!(runs(&scene));
    scene.orders();
    scene.pass(Duration::from_millis(1));
    assert_eq!(scene.signals(), [(6, SignalScope::Process), (18, SignalScope::Process)]);
    assert!(scene.report().reason.starts_with("watchdog: "), "{}", scene.report().reason);
    scene.restart_agent();
    scene.adopt();
    assert!(
        matches!(&scene.supervisor.state, State::Stopping(Stopping { cause: StopCause::Watchdog(_), .. })),
        "the cause outlives the agent: {:?}",
        scene.supervisor.state
    );
    scene.give(Input::Exited(scene.record(pb::ExitCause::Watchdog, 0, 6)));
    scene.swept();
    assert_eq!(scene.supervisor.memory.restarts, 1);
}

#[test]
fn a_watchdog_can_be_put_off_and_bites_when_asked_to() {
    let mut scene = Scene::running(watched(Some(Duration::ZERO)));
    say(&mut scene, Notification::ExtendTimeout(seconds(30)));
    scene.pass(seconds(29));
    assert!(runs(&scene));
    say(&mut scene, Notification::WatchdogTrigger);
    assert!(!runs(&scene));
    let mut other = Scene::running(probed());
    say(&mut other, Notification::WatchdogTrigger);
    assert!(runs(&other), "without a watchdog there is nothing to trigger");
}

#[test]
fn a_new_agent_gives_the_watchdog_its_whole_time() {
    let mut scene = Scene::running(watched(Some(seconds(5))));
    scene.pass(seconds(7));
    scene.restart_agent();
    scene.now = scene.now + seconds(60);
    scene.adopt();
    scene.pass(Duration::from_millis(2_999));
    assert!(runs(&scene));
    scene.pass(Duration::from_millis(1));
    assert!(!runs(&scene));
}

#[test]
fn time_that_the_process_asked_for_outlives_the_agent() {
    let mut scene = Scene::running(watched(Some(Duration::ZERO)));
    say(&mut scene, Notification::ExtendTimeout(seconds(120)));
    scene.pass(seconds(16));
    scene.restart_agent();
    scene.now = scene.now + seconds(3);
    scene.adopt();
    scene.pass(seconds(100));
    assert!(runs(&scene), "120 s were asked for, 119 have passed");
    scene.pass(seconds(1));
    assert!(!runs(&scene));

    let mut fed = Scene::running(watched(Some(Duration::ZERO)));
    say(&mut fed, Notification::ExtendTimeout(seconds(120)));
    say(&mut fed, Notification::Watchdog);
    fed.restart_agent();
    fed.adopt();
    fed.pass(seconds(3));
    assert!(!runs(&fed), "it has been fed since, as for the agent before");

    let mut asked = Scene::running(living());
    say(&mut asked, Notification::ExtendTimeout(seconds(120)));
    asked.restart_agent();
    asked.adopt();
    for _ in 0..119 {
        asked.pass(seconds(1));
        asked.probe(ProbeKind::Live, Some("no answer"));
    }
    assert!(runs(&asked));
}

#[test]
fn words_that_feed_the_watchdog_or_ask_for_a_little_time_are_no_burden_to_the_ledger() {
    let mut scene = Scene::running(watched(None));
    let written = |scene: &mut Scene| {
        scene.orders().iter().filter(|action| matches!(action, Action::Persist(_))).count()
    };
    scene.orders();
    for _ in 0..10 {
        scene.pass(Duration::from_millis(100));
        say(&mut scene, Notification::Watchdog);
        say(&mut scene, Notification::Status("well".to_owned()));
    }
    assert_eq!(written(&mut scene), 0);
    for _ in 0..10 {
        scene.pass(Duration::from_millis(100));
        say(&mut scene, Notification::ExtendTimeout(seconds(30)));
    }
    assert!((1..=2).contains(&written(&mut scene)));
}

#[test]
fn one_that_is_leaving_stays_so_for_the_next_agent() {
    for manifest in [probed(), manifest()] {
        let mut scene = Scene::running(manifest);
        scene.probe(ProbeKind::Ready, None);
        say(&mut scene, Notification::Stopping);
        scene.restart_agent();
        scene.adopt();
        scene.probe(ProbeKind::Ready, None);
        assert!(!scene.is_ready());
        assert_eq!(scene.report().reason, "it says that it is stopping");
    }
}

#[test]
fn one_that_has_said_nothing_yet_is_not_said_to_be_unprobed() {
    let ready = pb::Probe { check: Some(pb::probe::Check::Notify(true)), ..pb::Probe::default() };
    let health = pb::Health { ready: Some(ready), ..Default::default() };
    let said = pb::Manifest { health: Some(health), ..manifest() };
    for (manifest, why) in
        [(said, "has not said yet that it is"), (probed(), "not probed yet since the agent started")]
    {
        let mut scene = Scene::running(manifest);
        scene.restart_agent();
        scene.adopt();
        assert_eq!(scene.report().reason, why);
    }
}

#[test]
fn one_that_may_not_be_heard_is_not_ended_for_its_silence() {
    let mut scene = Scene::running(watched(Some(Duration::ZERO)));
    scene.restart_agent();
    scene.adopt();
    let key = scene.supervisor.key();
    scene.give(Input::Unheard { key });
    scene.pass(seconds(60));
    assert!(runs(&scene));
    assert_eq!(scene.supervisor.next_wake(), None);
    // Nor by the agent after, which finds a socket and does not know of which age it is.
    scene.restart_agent();
    scene.adopt();
    scene.pass(seconds(60));
    scene.want(watched(Some(seconds(1))), 1, pb::Desired::Run);
    scene.pass(seconds(60));
    assert!(runs(&scene), "nor after a live change");
    // Some tell their status through a helper that finds the new socket.
    say(&mut scene, Notification::Status("well".to_owned()));
    scene.pass(seconds(60));
    assert!(runs(&scene));
    say(&mut scene, Notification::Watchdog);
    scene.pass(Duration::from_millis(2_999));
    assert!(runs(&scene));
    scene.pass(Duration::from_millis(1));
    assert!(!runs(&scene), "it can be heard, and is silent");
}

#[test]
fn the_grace_is_the_manifests() {
    let mut health = living().health.unwrap_or_default();
    health.start_grace = seconds(60).try_into().ok();
    let mut scene = Scene::running(pb::Manifest { health: Some(health), ..with_port(0) });
    for _ in 0..59 {
        scene.pass(seconds(1));
        scene.probe(ProbeKind::Live, Some("no answer"));
    }
    assert!(runs(&scene));
    for _ in 0..3 {
        scene.pass(seconds(1));
        scene.probe(ProbeKind::Live, Some("no answer"));
    }
    assert!(!runs(&scene));
}

#[test]
fn another_main_process_is_refused_in_words() {
    let mut scene = Scene::running(manifest());
    scene.orders();
    say(&mut scene, Notification::MainPid(7));
    assert!(
        matches!(&scene.orders()[..], [Action::Log { message, .. }] if message.contains("pid 7")),
        "and nothing else"
    );
    assert!(runs(&scene));
}

/// Of which the hub says who may be restarted, and whose liveness has just failed.
fn stuck() -> (Scene, pb::WantedInstance) {
    let health = pb::Health { live: Some(http_probe()), ..Default::default() };
    let manifest = pb::Manifest { health: Some(health), ..with_port(0) };
    let mut scene = Scene::running(manifest.clone());
    let wanted = pb::WantedInstance { grants_restarts: true, ..wanted(manifest, 1, pb::Desired::Run) };
    scene.give(Input::Wanted(Box::new(wanted.clone())));
    scene.supervisor.note_lease(scene.now + seconds(9));
    scene.pass(LIVE_GRACE);
    for _ in 0..LIVE_FAILURES_MAX {
        scene.supervisor.note_lease(scene.now + seconds(9));
        scene.probe(ProbeKind::Live, Some("no answer"));
        scene.pass(seconds(1));
    }
    scene.orders();
    (scene, wanted)
}

#[test]
fn a_process_that_is_not_live_waits_for_its_turn_and_says_so() {
    let (mut scene, wanted) = stuck();
    assert!(matches!(scene.seen(), Seen::Running(_)));
    let report = scene.report();
    assert!(report.wants_restart && report.reason.ends_with("waits for its turn to be started again"));
    // A turn that another attempt was given is none.
    scene.give(Input::Wanted(Box::new(pb::WantedInstance { restart_granted: 7, ..wanted.clone() })));
    assert!(scene.signals().is_empty());
    let attempt = scene.supervisor.key().attempt;
    scene.give(Input::Wanted(Box::new(pb::WantedInstance { restart_granted: attempt, ..wanted })));
    assert_eq!(scene.signals(), [(15, SignalScope::Process), (18, SignalScope::Process)]);
    assert!(!scene.report().wants_restart);
}

#[test]
fn one_that_answers_again_before_its_turn_is_left_alone() {
    let (mut scene, wanted) = stuck();
    scene.probe(ProbeKind::Live, None);
    assert!(!scene.report().wants_restart);
    let attempt = scene.supervisor.key().attempt;
    scene.give(Input::Wanted(Box::new(pb::WantedInstance { restart_granted: attempt, ..wanted })));
    assert!(scene.signals().is_empty());
}

#[test]
fn nobody_waits_long_for_a_hub_that_is_away() {
    let (mut scene, _) = stuck();
    for _ in 0..30 {
        scene.supervisor.note_lease(scene.now + seconds(9));
        scene.pass(seconds(1));
    }
    assert!(scene.signals().is_empty(), "the hub is there: it will say when");
    assert_eq!(scene.supervisor.next_wake(), Some(scene.now + seconds(8)));
    scene.pass(seconds(8));
    assert_eq!(scene.signals().len(), 2);
}
