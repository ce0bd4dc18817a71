//! Data stays where it is, and instances go to it.

use nave_orchestrator_core::plan;
use nave_proto::pb;

use crate::world::{World, changed, manifest, pause, running, scale, with_update};

fn with_data(count: u32) -> pb::Manifest {
    pb::Manifest { data: true, ..manifest("db", count) }
}

/// Ordinal and host of each instance that is wanted.
fn places(world: &World) -> Vec<(u32, u64)> {
    let mut places: Vec<_> = world.wanted("db").iter().map(|one| (one.ordinal, one.host_id)).collect();
    places.sort_unstable();
    places
}

/// No two instances have one directory, stopping ones included.
fn assert_apart(world: &World) {
    let mut ordinals: Vec<u32> = world.state.instances_of("db").map(|one| one.ordinal).collect();
    ordinals.sort_unstable();
    let count = ordinals.len();
    ordinals.dedup();
    assert_eq!(ordinals.len(), count, "two instances share a directory");
}

#[test]
fn a_new_version_goes_to_the_data_of_its_ordinal_once_the_old_one_has_left_it() {
    let mut world = World::with_hosts(4);
    world.deploy(with_data(3));
    world.settle();
    let before = places(&world);
    assert_eq!(before.len(), 3);
    for version in ["two", "three"] {
        world.deploy(changed(&with_data(3), version));
        for _ in 0..30 {
            world.plan_all();
            assert_apart(&world);
            world.agents();
            assert_apart(&world);
        }
        assert_eq!(places(&world), before);
        assert_eq!(world.ready("db"), 3);
    }
}

#[test]
fn it_waits_for_its_host_and_says_so() {
    let mut world = World::with_hosts(2);
    world.deploy(with_data(1));
    world.settle();
    let before = places(&world);
    let name = world.hosts_of("db").remove(0);
    world.set_draining(&name, true);
    world.settle();
    assert_eq!(places(&world), []);
    let unplaced = plan(&world.state, world.now).unplaced;
    let reason = unplaced.into_iter().flat_map(|service| service.reasons).collect::<Vec<_>>().join("; ");
    assert!(
        reason.contains("1 of 2 hosts is draining") && reason.contains("does not have its data"),
        "{reason}"
    );
    world.set_draining(&name, false);
    world.settle();
    assert_eq!(places(&world), before);
}

/// Of `count` instances, all are put on the first host and the rest of the hosts joins after that.
fn all_on_alpha(count: u32, hosts: &[&str]) -> World {
    let mut world = World::with_hosts(1);
    world.deploy(with_data(count));
    world.settle();
    for name in hosts {
        world.join(name);
    }
    world
}

fn is_drained(world: &World, name: &str) -> bool {
    let host = world.state.host_by_name(name).unwrap();
    world.state.instances_on(nave_proto::ids::HostId(host.id)).next().is_none()
}

#[test]
fn all_leave_a_drained_host_though_none_can_go_elsewhere_and_all_come_back() {
    let mut world = all_on_alpha(3, &["beta"]);
    let before = places(&world);
    world.set_draining("alpha", true);
    world.settle();
    assert!(is_drained(&world, "alpha"), "{:?}", places(&world));
    assert_eq!(places(&world), []);
    world.set_draining("alpha", false);
    world.settle();
    assert_eq!((places(&world), world.ready("db")), (before, 3));
}

#[test]
fn a_drain_waits_for_those_that_are_down_for_another_reason() {
    let mut world = all_on_alpha(2, &["beta"]);
    world.accept(scale("db", 3));
    world.settle();
    let third = world.wanted("db").into_iter().find(|one| one.ordinal == 2).unwrap();
    world.say(third.id, running(false));
    world.set_draining("alpha", true);
    world.plan_all();
    assert_eq!(world.wanted("db").len(), 3, "one is down already");
    world.settle();
    assert!(is_drained(&world, "alpha"));
    assert_eq!((places(&world), world.ready("db")), (vec![(2, third.host_id)], 1));
}

#[test]
fn what_the_others_are_replaced_with_does_not_wait_for_a_drained_host() {
    let mut world = all_on_alpha(1, &["beta", "gamma"]);
    world.accept(scale("db", 3));
    world.settle();
    world.set_draining("alpha", true);
    world.settle();
    let before = places(&world);
    assert_eq!(before.len(), 2);
    // As many may be down as are left on the drained host and one more.
    world.deploy(with_update(changed(&with_data(3), "two"), |update| update.max_parallel = 2));
    for _ in 0..30 {
        world.plan_all();
        assert!(!world.wanted("db").is_empty());
        world.agents();
    }
    assert_eq!((places(&world), world.ready("db")), (before, 2));
    assert!(world.wanted("db").iter().all(|one| one.template_version == 3), "both are of the new version");
}

#[test]
fn a_paused_version_without_data_moves_nobody_away_from_its_data() {
    let mut world = all_on_alpha(2, &["beta"]);
    let before = places(&world);
    world.deploy(changed(&manifest("db", 2), "without"));
    world.accept(pause("db", true));
    world.set_draining("alpha", true);
    world.settle();
    assert_eq!((places(&world), world.ready("db")), (before, 2));
    world.accept(pause("db", false));
    world.settle();
    assert!(is_drained(&world, "alpha"));
    assert_eq!(world.ready("db"), 2);
}

#[test]
fn a_command_of_before_leaves_the_last_one_where_it_was() {
    let mut world = all_on_alpha(2, &["beta"]);
    world.set_draining("alpha", true);
    let steps = world.steps();
    assert_eq!(steps.len(), 2, "{steps:?}");
    let steps = steps.into_iter().map(|step| pb::PlanStep { step: Some(step) }).collect();
    let command = world.command(pb::command::Body::CommitPlan(pb::CommitPlan { steps }));
    world.apply(pb::Command { written_by: 7, ..command });
    assert_eq!(world.wanted("db").len(), 1);
}

#[test]
fn when_its_host_is_lost_it_begins_anew_elsewhere_which_is_told() {
    let mut world = World::with_hosts(2);
    world.deploy(with_data(1));
    world.settle();
    let (before, name) = (places(&world), world.hosts_of("db").remove(0));
    world.lose(&name);
    world.settle_for(60);
    let after = places(&world);
    assert!(after.len() == 1 && after != before, "{after:?}");
    let other = world.hosts_of("db").remove(0);
    let told = world.last_event("data_left_behind");
    assert_eq!(
        told,
        format!(
            "db.0 begins with an empty data directory on {other}; what it had stays on {name}, which is lost"
        )
    );
    // From then on its data is there.
    world.deploy(changed(&with_data(1), "two"));
    world.settle_for(60);
    assert_eq!(places(&world), after);
}
