//! What a stop waits for before the first signal: callers that leave, and calls that end.

use super::*;

const STOPPED: [(i32, SignalScope); 2] = [(15, SignalScope::Process), (18, SignalScope::Process)];

/// Ready, with a port, and told to stop.
fn draining() -> Scene {
    draining_with(with_port(0))
}

fn draining_with(manifest: pb::Manifest) -> Scene {
    let mut scene = Scene::running(manifest.clone());
    assert!(scene.is_ready());
    scene.orders();
    scene.want(manifest, 1, pb::Desired::Stop);
    assert_eq!(scene.report().endpoint(), pb::EndpointState::Draining);
    scene
}

#[test]
fn the_signal_waits_for_the_callers_to_leave() {
    let mut scene = draining();
    let stored = (scene.now + DRAIN_TIMEOUT + seconds(10)).0;
    position(
        &scene.orders.clone(),
        |action| matches!(action, Action::Persist(ledger) if ledger.stop_kill_boottime_ns == stored),
    );
    scene.give(Input::InFlight { count: 0 });
    scene.pass(Duration::from_millis(20));
    assert!(scene.signals().is_empty() && scene.supervisor.is_draining());
    scene.give(Input::CallersLeft);
    assert_eq!(scene.signals(), STOPPED);
    scene.pass(seconds(10) - Duration::from_millis(1));
    assert!(scene.signals().is_empty());
    scene.pass(Duration::from_millis(1));
    assert_eq!(scene.signals()[0], (9, SignalScope::Process), "its grace counts from its signal");
}

#[test]
fn callers_that_nobody_hears_of_are_waited_for_two_seconds() {
    let mut scene = draining();
    scene.pass(DRAIN_WAIT - Duration::from_millis(1));
    assert!(scene.signals().is_empty());
    assert_eq!(scene.supervisor.next_wake(), Some(scene.now + Duration::from_millis(1)));
    scene.pass(Duration::from_millis(1));
    assert_eq!(scene.signals(), STOPPED);
}

#[test]
fn calls_under_way_may_end_within_the_drain_timeout() {
    let mut scene = draining();
    scene.give(Input::InFlight { count: 3 });
    scene.give(Input::CallersLeft);
    scene.pass(seconds(20));
    assert!(scene.signals().is_empty());
    assert_eq!(scene.report().reason, "waits for calls under way to end before its stop signal");
    scene.give(Input::InFlight { count: 1 });
    assert!(scene.signals().is_empty());
    scene.give(Input::InFlight { count: 0 });
    assert_eq!(scene.signals(), STOPPED);

    let mut scene = draining();
    scene.give(Input::InFlight { count: 1 });
    scene.pass(DRAIN_TIMEOUT - Duration::from_millis(1));
    assert!(scene.signals().is_empty());
    assert_eq!(scene.supervisor.next_wake(), Some(scene.now + Duration::from_millis(1)));
    scene.pass(Duration::from_millis(1));
    assert_eq!(scene.signals(), STOPPED, "a call that never ends holds it no longer");
}

#[test]
fn what_nobody_calls_is_stopped_at_once() {
    let none = pb::Stop { drain_timeout: seconds(0).try_into().ok(), ..Default::default() };
    let impatient = pb::Manifest { stop: Some(none), ..with_port(0) };
    let mut without_wait = draining_with(impatient);
    let mut without_ports = Scene::running(manifest());
    without_ports.stop();
    let mut never_ready = Scene::running(probed());
    never_ready.orders();
    never_ready.want(probed(), 1, pb::Desired::Stop);
    let mut forgotten = Scene::running(with_port(0));
    forgotten.give(Input::Forget);
    for scene in [&mut without_wait, &mut without_ports, &mut never_ready, &mut forgotten] {
        assert_eq!(scene.signals(), STOPPED);
    }
}

#[test]
fn what_must_not_run_twice_is_not_kept_for_its_callers() {
    let placement = pb::Placement { on_disconnect: pb::OnDisconnect::Stop.into(), ..Default::default() };
    let single = pb::Manifest { placement: Some(placement), ..with_port(0) };
    let mut scene = Scene::new(single.clone());
    scene.give(Input::Lease { until: scene.now + seconds(9) });
    scene.pick(20_001);
    scene.spawned();
    scene.orders();
    scene.want(single, 1, pb::Desired::Stop);
    scene.give(Input::InFlight { count: 1 });
    scene.pass(seconds(8));
    assert!(scene.signals().is_empty());
    assert_eq!(scene.supervisor.next_wake(), Some(scene.now + seconds(1)));
    scene.pass(seconds(1));
    assert_eq!(scene.signals(), STOPPED);
}

#[test]
fn a_restart_of_the_agent_extends_no_drain() {
    let mut scene = draining();
    let until = scene.now + DRAIN_TIMEOUT;
    scene.give(Input::InFlight { count: 1 });
    scene.pass(seconds(25));
    scene.restart_agent();
    scene.adopt();
    scene.give(Input::InFlight { count: 1 });
    assert_eq!(scene.signals(), STOPPED, "it had been left by its callers, as far as anybody can say");

    let mut scene = draining();
    scene.pass(seconds(1));
    scene.restart_agent();
    scene.adopt();
    scene.give(Input::InFlight { count: 1 });
    assert_eq!(scene.supervisor.next_wake(), Some(until), "the same moment as before");
    scene.pass(seconds(29));
    assert_eq!(scene.signals(), STOPPED);
}
