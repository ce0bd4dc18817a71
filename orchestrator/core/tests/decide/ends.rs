//! Every end of a process is one event, also when the hub hears of many at once.

use nave_proto::ids::InstanceId;
use nave_proto::pb;
use nave_proto::pb::command::Body;
use nave_proto::pb::observed::State;

use crate::world::{World, manifest, report, running};

/// The format before ends were told one by one.
const ONLY_THE_NEWEST: u32 = 8;

/// One instance i-1 of `web` on alpha, which runs.
fn placed() -> World {
    let mut world = World::with_hosts(2);
    world.deploy(manifest("web", 1));
    world.plan_all();
    world.say(1, running(true));
    world
}

fn instance(world: &World) -> pb::InstanceRecord {
    world.state.instance(InstanceId(1)).unwrap().as_ref().clone()
}

fn end(epoch: u64, attempt: u32) -> pb::EndNote {
    let code = i32::try_from(attempt).unwrap();
    let exit =
        pb::ExitRecord { epoch, attempt, cause: pb::ExitCause::Exit.into(), code, ..Default::default() };
    pb::EndNote { number: (epoch << 20) + u64::from(attempt), exit: Some(exit), lost: 0 }
}

/// It runs as attempt `attempt`, after these ends.
fn runs(world: &World, attempt: u32, ends: Vec<pb::EndNote>) -> pb::InstanceReport {
    let instance = instance(world);
    let last_exit = ends.last().and_then(|end| end.exit.clone()).filter(|exit| exit.epoch == instance.epoch);
    pb::InstanceReport { ends, tells_ends: true, last_exit, ..report(&instance, attempt, running(true)) }
}

fn command(format: u32, world: &World, said: pb::InstanceReport) -> pb::Command {
    let body = pb::ReportInstances { host_id: 1, instances: vec![said], ..Default::default() };
    pb::Command { written_by: format, ..world.command(Body::ReportInstances(body)) }
}

/// Exit codes of the ends that were told, in their order.
fn told(world: &World) -> Vec<u32> {
    let events = world.state.events(&Default::default(), usize::MAX);
    let code = |message: &str| message.split("exited with code ").nth(1)?.split(' ').next()?.parse().ok();
    events.iter().filter_map(|event| code(&event.message)).collect()
}

#[test]
fn all_ends_of_the_time_without_a_hub_are_told_once() {
    let mut world = placed();
    let said = runs(&world, 4, vec![end(1, 1), end(1, 2), end(1, 3)]);
    world.report(1, said.clone());
    assert_eq!(told(&world), [1, 2, 3]);
    world.report(1, said);
    let more = runs(&world, 5, vec![end(1, 1), end(1, 2), end(1, 3), end(1, 4)]);
    world.report(1, more);
    assert_eq!(told(&world), [1, 2, 3, 4], "what was told before is repeated until it is acknowledged");
}

#[test]
fn commands_of_before_tell_the_newest_and_it_is_not_told_again() {
    let mut world = placed();
    let said = runs(&world, 4, vec![end(1, 1), end(1, 2), end(1, 3)]);
    world.apply(command(ONLY_THE_NEWEST, &world, said.clone()));
    assert_eq!(told(&world), [3]);
    assert_eq!(instance(&world).note, 0, "as the members of before take it");
    world.report(1, said);
    assert_eq!(told(&world), [3]);
    world.report(1, runs(&world, 5, vec![end(1, 3), end(1, 4)]));
    assert_eq!(told(&world), [3, 4]);
}

#[test]
fn an_older_agent_tells_the_newest() {
    let mut world = placed();
    let said = pb::InstanceReport { ends: Vec::new(), tells_ends: false, ..runs(&world, 3, vec![end(1, 2)]) };
    world.report(1, said);
    assert_eq!(told(&world), [2]);
}

#[test]
fn an_end_of_an_earlier_placement_is_told_late_and_changes_nothing_else() {
    let mut world = placed();
    let late = |world: &World| pb::InstanceReport { epoch: 0, ..runs(world, 1, vec![end(0, 7)]) };
    let before = instance(&world);
    assert!(before.epoch > 0);
    world.report(1, late(&world));
    assert_eq!(told(&world), [7]);
    let after = instance(&world);
    assert_eq!(pb::InstanceRecord { note: before.note, revision: before.revision, ..after }, before);
    world.report(1, late(&world));
    world.report(2, late(&world));
    assert_eq!(told(&world), [7], "once, and not of a host that it is not on");
    let older =
        command(ONLY_THE_NEWEST, &world, pb::InstanceReport { ends: vec![end(0, 9)], ..late(&world) });
    world.apply(older);
    assert_eq!(told(&world), [7], "commands of before say nothing of it");
}

#[test]
fn an_agent_that_has_forgotten_all_begins_its_history_again() {
    let mut world = placed();
    world.report(1, runs(&world, 3, vec![end(1, 1), end(1, 2)]));
    let nothing = pb::ReportInstances { host_id: 1, full: true, ..Default::default() };
    world.accept(Body::ReportInstances(nothing));
    assert!(matches!(instance(&world).observed.unwrap().state, Some(State::Pending(_))));
    world.report(1, runs(&world, 2, vec![end(1, 1)]));
    assert_eq!(told(&world), [1, 2, 1]);
}
