//! Sessions: only the newest of a host speaks for it, and it never goes back on its word.

use nave_proto::ids::InstanceId;
use nave_proto::pb;
use nave_proto::pb::command::Body;
use nave_proto::pb::observed::State;
use nave_proto::pb::{HostStatus, RejectedCode};

use crate::world::{World, failed, manifest, report, running};

/// One service `web` with one instance i-1 on alpha, placed and not reported.
fn placed() -> World {
    let mut world = World::with_hosts(2);
    world.deploy(manifest("web", 1));
    world.plan_all();
    world
}

fn open(world: &mut World, host_id: u64) -> u64 {
    world.accept(Body::OpenSession(pb::OpenSession { host_id, place: 0 }));
    world.state.revision()
}

fn word(world: &World, (session, sequence): (u64, u64), state: State) -> Body {
    let record = world.state.instance(InstanceId(1)).unwrap();
    Body::ReportInstances(pb::ReportInstances {
        host_id: 1,
        instances: vec![report(record, 1, state)],
        session,
        sequence,
        ..Default::default()
    })
}

fn is_ready(world: &World) -> bool {
    matches!(
        world.state.instance(InstanceId(1)).unwrap().observed.as_ref().and_then(|o| o.state.as_ref()),
        Some(State::Running(running)) if running.ready
    )
}

#[test]
fn a_late_report_of_an_older_session_is_refused() {
    let mut world = placed();
    let older = open(&mut world, 1);
    let newer = open(&mut world, 1);
    let ready = word(&world, (newer, 1), running(true));
    world.accept(ready);
    let late = word(&world, (older, 7), failed());
    assert_eq!(world.refuse(late).0, RejectedCode::Superseded);
    assert!(is_ready(&world));
    let facts = world.state.host(nave_proto::ids::HostId(1)).unwrap().facts.clone();
    let update = pb::UpdateHost { host_id: 1, facts, session: older };
    assert_eq!(world.refuse(Body::UpdateHost(update)).0, RejectedCode::Superseded);
}

#[test]
fn a_report_overtaken_by_a_newer_one_changes_nothing() {
    let mut world = placed();
    let session = open(&mut world, 1);
    let ready = word(&world, (session, 3), running(true));
    world.accept(ready);
    for sequence in [1, 2, 3] {
        let command = word(&world, (session, sequence), failed());
        let applied = world.apply(world.command(command));
        assert!(applied.changes.is_empty(), "{sequence}");
    }
    assert!(is_ready(&world));
    let newer = word(&world, (session, 4), failed());
    world.accept(newer);
    assert!(!is_ready(&world));
}

#[test]
fn a_host_that_was_lost_has_to_open_a_new_session() {
    let mut world = placed();
    let session = open(&mut world, 1);
    let ready = word(&world, (session, 1), running(true));
    world.accept(ready);
    for status in [HostStatus::Lost, HostStatus::Connected] {
        world.accept(Body::SetHostStatus(pb::SetHostStatus {
            host_id: 1,
            status: status.into(),
            ..Default::default()
        }));
    }
    let more = word(&world, (session, 2), running(true));
    assert_eq!(world.refuse(more).0, RejectedCode::Superseded, "it would leave out what did not change");
    let session = open(&mut world, 1);
    let all = word(&world, (session, 1), running(true));
    world.accept(all);
    assert!(is_ready(&world));
}

#[test]
fn a_session_is_of_one_host_that_exists() {
    let mut world = placed();
    let nobody = Body::OpenSession(pb::OpenSession { host_id: 99, place: 0 });
    assert_eq!(world.refuse(nobody).0, RejectedCode::NotFound);
    let (first, second) = (open(&mut world, 1), open(&mut world, 2));
    assert_ne!(first, second);
    let ready = word(&world, (first, 1), running(true));
    world.accept(ready);
}

#[test]
fn a_session_knows_the_place_it_was_opened_from() {
    let mut world = placed();
    world.accept(Body::OpenSession(pb::OpenSession { host_id: 1, place: 42 }));
    let place =
        |world: &World| world.state.host(nave_proto::ids::HostId(1)).unwrap().facts.clone().unwrap().place;
    assert_eq!(place(&world), 42);
    world.accept(Body::OpenSession(pb::OpenSession { host_id: 1, place: 0 }));
    assert_eq!(place(&world), 42, "unknown is no news");
}
