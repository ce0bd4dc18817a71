//! A liveness failure of many instances at once takes no more of them down than the update rules allow.

use nave_proto::pb;

use crate::world::{SECOND, World, manifest, report, running, with_update};

/// All of a service say that they are not live; some may be ready all the same.
fn all_stuck(world: &mut World, ready: impl Fn(u64) -> bool) {
    for instance in world.wanted("web") {
        let said = report(&instance, instance.attempt.max(1), running(ready(instance.id)));
        world.report(instance.host_id, pb::InstanceReport { wants_restart: true, ..said });
    }
}

/// Of those that may be restarted and have not come back.
fn under_way(world: &World) -> Vec<pb::InstanceRecord> {
    world
        .wanted("web")
        .into_iter()
        .filter(|i| i.restart_granted != 0 && i.restart_granted == i.attempt)
        .collect()
}

fn five(max_parallel: u32) -> World {
    let mut world = World::with_hosts(2);
    world.deploy(with_update(manifest("web", 5), |update| update.max_parallel = max_parallel));
    world.settle();
    world
}

#[test]
fn as_many_at_a_time_as_may_be_replaced_at_a_time() {
    let mut world = five(2);
    all_stuck(&mut world, |_| true);
    let mut turns = 0;
    loop {
        world.plan_all();
        let now = under_way(&world);
        assert!(now.len() <= 2, "{} at once", now.len());
        let Some(first) = now.first() else { break };
        turns += 1;
        // It ends, and only then comes back: nobody else's turn comes meanwhile.
        let many = now.len();
        world.report(first.host_id, report(first, first.attempt + 1, running(false)));
        world.plan_all();
        assert!(under_way(&world).len() < many.max(2), "one that is not back yet counts");
        world.report(first.host_id, report(first, first.attempt + 1, running(true)));
    }
    assert_eq!(turns, 5, "all of them in the end");
}

#[test]
fn those_that_are_down_for_another_reason_count_and_never_block_the_cure() {
    let mut world = five(2);
    let ids: Vec<u64> = world.wanted("web").iter().map(|i| i.id).collect();
    for id in &ids[..2] {
        world.say(*id, running(false));
    }
    for instance in world.wanted("web").into_iter().filter(|i| !ids[..2].contains(&i.id)) {
        let said = report(&instance, 1, running(true));
        world.report(instance.host_id, pb::InstanceReport { wants_restart: true, ..said });
    }
    world.plan_all();
    assert_eq!(under_way(&world).len(), 1, "two are down already, and one may all the same");
}

#[test]
fn who_serves_nobody_comes_first() {
    let mut world = five(1);
    let last = world.wanted("web").last().unwrap().id;
    all_stuck(&mut world, |id| id != last);
    world.plan_all();
    assert_eq!(under_way(&world).iter().map(|i| i.id).collect::<Vec<_>>(), [last]);
}

#[test]
fn a_restart_that_never_ends_well_holds_up_nobody_for_ever() {
    let mut world = five(1);
    all_stuck(&mut world, |_| true);
    world.plan_all();
    let first = under_way(&world).remove(0);
    world.report(first.host_id, report(&first, first.attempt + 1, running(false)));
    world.plan_all();
    assert_eq!(under_way(&world).len(), 0);
    world.now += 121 * SECOND;
    world.plan_all();
    assert_eq!(under_way(&world).len(), 1, "after progress_deadline the next one has its turn");
}

#[test]
fn an_old_grant_is_for_no_later_attempt() {
    let mut world = five(5);
    all_stuck(&mut world, |_| true);
    let stale = world.steps();
    let one = world.wanted("web").remove(0);
    world.report(one.host_id, report(&one, 2, running(true)));
    world.commit(stale);
    let one = world.wanted("web").into_iter().find(|i| i.id == one.id).unwrap();
    assert_eq!((one.attempt, one.restart_granted), (2, 0));
}
