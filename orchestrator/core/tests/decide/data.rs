//! Data stays where it is, and instances go to it.

use nave_orchestrator_core::plan;
use nave_proto::pb;

use crate::world::{World, changed, manifest};

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
