//! Reports: what counts, what is ignored, what makes rows and events.

use nave_proto::ids::InstanceId;
use nave_proto::pb;
use nave_proto::pb::command::Body;
use nave_proto::pb::observed::{self, State};
use nave_proto::pb::{EndpointState, RejectedCode};

use crate::world::{SECOND, World, delete, failed, manifest, report, running, scale, with_update};

/// One service `web` with one instance i-1 on alpha, placed and not reported.
fn placed() -> World {
    let mut world = World::with_hosts(2);
    world.deploy(manifest("web", 1));
    world.plan_all();
    world
}

fn instance(world: &World) -> pb::InstanceRecord {
    world.state.instance(InstanceId(1)).unwrap().as_ref().clone()
}

fn full(host_id: u64, instances: Vec<pb::InstanceReport>, gone: Vec<u64>) -> Body {
    Body::ReportInstances(pb::ReportInstances { host_id, full: true, instances, gone, ..Default::default() })
}

#[test]
fn reports_of_another_host_epoch_or_older_attempt_are_ignored() {
    let mut world = placed();
    let record = instance(&world);
    world.report(1, report(&record, 2, running(true)));
    let before = instance(&world);
    let stale = |change: fn(&mut pb::InstanceReport)| {
        let mut stale = report(&record, 2, failed());
        change(&mut stale);
        stale
    };
    world.report(1, stale(|report| report.epoch = 0));
    world.report(1, stale(|report| report.epoch = 2));
    world.report(1, stale(|report| report.attempt = 1));
    world.report(1, stale(|report| report.instance_id = 99));
    world.report(2, stale(|_| ()));
    assert_eq!(instance(&world), before);
    world.report(1, stale(|_| ()));
    assert_ne!(instance(&world), before);
}

#[test]
fn a_report_that_says_nothing_new_changes_nothing() {
    let mut world = placed();
    world.say(1, running(true));
    let again = report(&instance(&world), 1, running(true));
    let body = Body::ReportInstances(pb::ReportInstances {
        host_id: 1,
        instances: vec![again],
        ..Default::default()
    });
    let applied = world.apply(world.command(body));
    assert!(applied.changes.is_empty());
}

#[test]
fn since_and_ready_since_follow_the_process() {
    let mut world = placed();
    let placed_at = world.now;
    world.now += SECOND;
    world.say(1, running(false));
    let up = world.now;
    assert_eq!((instance(&world).since_unix_ns, instance(&world).ready_since_unix_ns), (up, 0));
    world.now += SECOND;
    world.say(1, running(true));
    assert_eq!((instance(&world).since_unix_ns, instance(&world).ready_since_unix_ns), (up, world.now));
    world.now += SECOND;
    world.say(1, running(false));
    assert_eq!(instance(&world).ready_since_unix_ns, 0);
    world.report(1, report(&instance(&world), 2, running(true)));
    let restarted = world.now;
    world.now += SECOND;
    world.report(1, report(&instance(&world), 3, running(true)));
    assert_eq!(
        instance(&world).ready_since_unix_ns,
        restarted + SECOND,
        "another process, another readiness"
    );
    assert_eq!(instance(&world).since_unix_ns, world.now);
    assert_eq!(instance(&world).placed_unix_ns, placed_at);
}

#[test]
fn a_draining_endpoint_stays_draining() {
    let mut world = placed();
    world.say(1, running(true));
    assert_eq!(instance(&world).endpoint(), EndpointState::Ready);
    world.accept(scale("web", 0));
    world.plan_all();
    assert_eq!(instance(&world).endpoint(), EndpointState::Draining);
    world.say(1, running(true));
    world.report(1, report(&instance(&world), 2, running(true)));
    assert_eq!(instance(&world).endpoint(), EndpointState::Draining);
    assert_eq!(world.ready("web"), 0, "what is to stop is not counted as ready");
}

#[test]
fn an_agents_own_drain_ends_with_the_next_process() {
    let mut world = placed();
    world.say(1, running(true));
    let draining = pb::InstanceReport {
        endpoint: EndpointState::Draining.into(),
        ..report(&instance(&world), 1, running(true))
    };
    world.report(1, draining);
    world.say(1, running(true));
    assert_eq!(instance(&world).endpoint(), EndpointState::Draining);
    world.report(1, report(&instance(&world), 2, running(true)));
    assert_eq!(instance(&world).endpoint(), EndpointState::Ready);
}

#[test]
fn gone_counts_only_for_what_was_to_stop() {
    let mut world = placed();
    world.say(1, running(true));
    let gone =
        |host_id| Body::ReportInstances(pb::ReportInstances { host_id, gone: vec![1], ..Default::default() });
    world.accept(gone(1));
    assert_eq!(world.wanted("web").len(), 1, "it is wanted: an old word about an earlier epoch");
    world.accept(delete("web"));
    world.plan_all();
    world.accept(gone(2));
    assert!(world.state.instance(InstanceId(1)).is_some(), "another host has no say");
    world.accept(gone(1));
    assert!(world.state.instance(InstanceId(1)).is_none());
    assert!(world.state.service("web").is_none());
    assert!(
        world
            .last_event("instance_stopped")
            .contains("web.0 (i-1) has stopped on alpha: the service is being")
    );
}

#[test]
fn a_full_report_tells_what_is_not_there() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("web", 3));
    world.plan_all();
    world.say(1, running(true));
    world.say(2, running(true));
    world.accept(scale("web", 2));
    world.plan_all();
    assert!(world.state.instance(InstanceId(3)).is_some());
    let one = report(&instance(&world), 1, running(true));
    world.accept(full(1, vec![one], vec![]));
    assert!(world.state.instance(InstanceId(3)).is_none(), "it was to stop and is not there");
    let two = world.state.instance(InstanceId(2)).unwrap();
    assert!(matches!(two.observed.as_ref().unwrap().state, Some(State::Pending(_))));
    assert_eq!((two.attempt, two.endpoint()), (0, EndpointState::Unspecified));
    assert_eq!(world.ready("web"), 1);
    assert!(world.last_event("instance_missing").contains("web.1 (i-2) is not on alpha any more"));
    world.say(2, running(true));
    assert_eq!(world.ready("web"), 2, "attempts begin again");
}

#[test]
fn a_placement_the_agent_has_not_heard_of_yet_is_left_as_it_is() {
    let mut world = placed();
    let before = instance(&world);
    let applied = world.apply(world.command(full(1, vec![], vec![])));
    assert_eq!(instance(&world), before);
    assert!(applied.changes.is_empty());
}

#[test]
fn events_tell_an_instances_life() {
    let mut world = placed();
    world.say(1, running(false));
    assert_eq!(world.last_event("instance_started"), "web.0 (i-1) runs on alpha, not ready yet");
    world.say(1, running(true));
    let exit = pb::ExitRecord {
        cause: pb::ExitCause::Signal.into(),
        signal: 9,
        ran_ms: 65_000,
        ..Default::default()
    };
    world.say(1, State::BackingOff(observed::BackingOff { until_unix_ns: 1, last_exit: Some(exit) }));
    assert_eq!(
        world.last_event("instance_exited"),
        "web.0 (i-1) was killed by SIGKILL after 1 min 5 s on alpha, is started again"
    );
    world.say(1, failed());
    assert!(world.last_event("instance_failed").contains("given up"));
}

#[test]
fn each_instance_that_becomes_ready_gives_the_deployment_time() {
    let mut world = World::with_hosts(2);
    let slow = with_update(manifest("web", 2), |u| u.progress_deadline = crate::world::seconds(60));
    world.deploy(slow);
    world.plan_all();
    let deadline =
        |world: &World| world.service("web").deployment.as_ref().unwrap().progress_deadline_unix_ns;
    assert_eq!(deadline(&world), world.now + 60 * SECOND);
    world.now += 50 * SECOND;
    world.say(1, running(false));
    assert_eq!(deadline(&world), world.now + 10 * SECOND);
    world.say(1, running(true));
    let once = world.now + 60 * SECOND;
    assert_eq!(deadline(&world), once);
    // In another process, too: it has got no further than before.
    for attempt in 2..4 {
        world.now += SECOND;
        let record = instance(&world);
        world.report(record.host_id, report(&record, attempt, running(false)));
        world.report(record.host_id, report(&record, attempt, running(true)));
        assert_eq!(deadline(&world), once);
    }
    world.say(2, running(true));
    assert_eq!(deadline(&world), world.now + 60 * SECOND);
}

#[test]
fn by_commands_of_before_each_readiness_gives_time() {
    let mut world = placed();
    for _ in 0..2 {
        world.now += SECOND;
        for ready in [false, true] {
            let record = instance(&world);
            let instances = vec![report(&record, 1, running(ready))];
            let host_id = record.host_id;
            let said = pb::ReportInstances { host_id, instances, ..Default::default() };
            let command = world.command(Body::ReportInstances(said));
            world.apply(pb::Command { written_by: 7, ..command });
        }
        let deployment = world.service("web").deployment.clone().unwrap();
        assert_eq!(deployment.progress_deadline_unix_ns, world.now + 120 * SECOND);
        assert!(!instance(&world).was_ready);
    }
}

#[test]
fn a_host_that_is_not_known_has_no_say() {
    let mut world = placed();
    assert_eq!(world.refuse(full(77, vec![], vec![])).0, RejectedCode::NotFound);
}
