//! Another check of readiness: it takes effect on processes as they are, so a wrong one could call all of them unready.

use nave_proto::pb;
use nave_proto::pb::DeploymentStatus;

use crate::world::{SECOND, World, manifest, pause, rollback, with_update};

pub(crate) fn checked(first: &pb::Manifest, path: &str) -> pb::Manifest {
    let check = Some(pb::probe::Check::Http(path.into()));
    let ready = Some(pb::Probe { check, ..Default::default() });
    pb::Manifest { health: Some(pb::Health { ready, ..Default::default() }), ..first.clone() }
}

/// `web`, three of them, ready at version 1.
fn deployed() -> (World, pb::Manifest) {
    let first = checked(&manifest("web", 3), "/ready");
    let mut world = World::with_hosts(3);
    world.deploy(first.clone());
    world.settle_for(60);
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
    (world, first)
}

fn of_version(world: &World, version: u64) -> usize {
    world.wanted("web").iter().filter(|instance| instance.version == version).count()
}

#[test]
fn it_comes_into_force_one_by_one_each_once_the_one_before_could_have_said_no() {
    let (mut world, first) = deployed();
    world.deploy(checked(&first, "/other"));
    for over in 1..=3 {
        world.settle();
        assert_eq!((of_version(&world, 2), world.ready("web")), (over, 3), "nobody has said no");
        assert_eq!(world.status("web"), DeploymentStatus::Running);
        world.now += 4 * SECOND;
        world.settle();
        assert_eq!(of_version(&world, 2), over, "three failures take longer");
        world.now += SECOND;
    }
    world.settle();
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
    assert!(
        world.wanted("web").iter().all(|i| i.id <= 3 && i.template_version == 1),
        "no process was replaced"
    );
    assert!(world.last_event("instance_rechecked").contains("is checked as version 2 says"));
}

#[test]
fn a_wrong_one_costs_no_more_than_a_wrong_program_and_is_taken_back() {
    let (mut world, first) = deployed();
    world.unfit.push(("web".into(), 2));
    world.deploy(checked(&first, "/nosuch"));
    for _ in 0..119 {
        world.settle();
        assert!(world.ready("web") >= 2 && of_version(&world, 2) <= 1);
        world.now += SECOND;
    }
    world.now += 2 * SECOND;
    world.settle_for(60);
    assert_eq!((world.ready("web"), world.status("web")), (3, DeploymentStatus::Successful));
    let service = world.service("web");
    assert_eq!((service.version, service.template_version, service.stable_version), (3, 1, 3));
    assert!(world.reason("web").contains("version 2 failed, back to version 1"), "{}", world.reason("web"));
    assert!(world.wanted("web").iter().all(|i| i.id <= 3), "no process was replaced");
    assert!(!world.state.service_version("web", 2).unwrap().stable);
    assert!(
        world.refuse(rollback("web", 0)).1.contains("no earlier version"),
        "never to the one that failed"
    );
    assert_eq!(world.service("web").manifest.as_ref().unwrap().health, first.health);
}

#[test]
fn max_parallel_go_over_at_a_time_and_those_that_are_not_ready_at_once() {
    let (mut world, first) = deployed();
    let unready = world.wanted("web")[0].id;
    world.say(unready, crate::world::running(false));
    world.deploy(with_update(checked(&first, "/other"), |update| update.max_parallel = 2));
    assert_eq!(of_version(&world, 2), 1, "it cannot become worse");
    world.plan_all();
    assert_eq!(of_version(&world, 2), 2, "and one more, since one is unready");
}

#[test]
fn while_it_is_paused_none_goes_over() {
    let (mut world, first) = deployed();
    world.deploy(checked(&first, "/other"));
    world.plan_all();
    world.accept(pause("web", true));
    world.settle_for(600);
    assert_eq!((of_version(&world, 2), world.status("web")), (1, DeploymentStatus::Paused));
    // Nor does a change of anything else have it go on.
    world.deploy(with_update(checked(&first, "/other"), |update| update.max_parallel = 2));
    world.settle_for(600);
    assert_eq!((of_version(&world, 1), world.status("web")), (2, DeploymentStatus::Paused));
    world.accept(pause("web", false));
    world.settle_for(60);
    assert_eq!((of_version(&world, 3), world.status("web")), (3, DeploymentStatus::Successful));
}
