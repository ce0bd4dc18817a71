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
