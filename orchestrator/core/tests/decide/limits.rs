//! New limits go to the processes that run, as far as their hosts have room; those without it move, or stay as they are.

use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_proto::pb::DeploymentStatus;
use nave_proto::pb::plan_step::Step;

use crate::recheck::checked;
use crate::world::{World, apply, facts, manifest, pause, with_cpu, with_port};

/// Version and epoch of each wanted instance, with its host.
fn standing(world: &World, name: &str) -> Vec<(u64, u64, String)> {
    let host = |id| world.state.host(HostId(id)).unwrap().facts.as_ref().unwrap().name.clone();
    let mut all: Vec<_> =
        world.wanted(name).into_iter().map(|i| (i.version, i.epoch, host(i.host_id))).collect();
    all.sort();
    all
}

fn reserved(world: &World, name: &str) -> u64 {
    world.state.reserved(world.host_id(name)).cpu_millicores
}

#[test]
fn new_limits_replace_no_process_and_are_set_aside() {
    let mut world = World::with_hosts(1);
    let host = standing_host(&world);
    world.deploy(with_cpu(manifest("web", 2), 500));
    world.settle();
    let ids: Vec<u64> = world.wanted("web").iter().map(|i| i.id).collect();
    for (version, cpu) in [(2, 1500), (3, 100)] {
        world.deploy(with_cpu(manifest("web", 2), cpu));
        world.settle();
        assert_eq!(world.wanted("web").iter().map(|i| i.id).collect::<Vec<_>>(), ids);
        assert_eq!(standing(&world, "web"), [(version, 1, host.clone()), (version, 1, host.clone())]);
        assert_eq!(reserved(&world, &host), 2 * cpu);
        assert_eq!(world.status("web"), DeploymentStatus::Successful);
    }
    assert!(world.last_event("instance_resized").contains("has the limits of version 2"));
}

fn standing_host(world: &World) -> String {
    world.state.hosts().next().unwrap().facts.as_ref().unwrap().name.clone()
}

#[test]
fn never_more_than_a_host_has_and_who_lacks_room_moves_by_the_rules() {
    let mut world = World::with_hosts(2);
    world.deploy(with_cpu(manifest("web", 4), 1000));
    world.settle();
    let (one, two) = (world.state.hosts().next().unwrap().id, world.state.hosts().nth(1).unwrap().id);
    // 2 of 3000 fit on no host together: one of each host grows, and the third host takes the others.
    world.join("third");
    world.join("fourth");
    world.deploy(with_cpu(manifest("web", 4), 3000));
    while world.plan_once() > 0 {
        for host in [one, two] {
            assert!(world.state.reserved(HostId(host)).cpu_millicores <= 4000);
        }
        assert!(world.ready("web") >= 4, "never fewer than were there");
        world.agents();
    }
    world.settle();
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
    let versions: Vec<u64> = world.wanted("web").iter().map(|i| i.version).collect();
    assert_eq!(versions, [2, 2, 2, 2]);
    let stayed = world.wanted("web").iter().filter(|i| i.id <= 4).count();
    assert_eq!(stayed, 2, "one on each host had room to grow");
}

#[test]
fn one_that_would_have_to_stop_first_keeps_what_it_has_and_says_so() {
    let mut world = World::with_hosts(1);
    world.deploy(with_port(with_cpu(manifest("web", 1), 1000), 8080));
    world.deploy(with_cpu(manifest("other", 1), 2000));
    world.settle();
    world.deploy(with_port(with_cpu(manifest("web", 1), 3000), 8080));
    world.settle();
    let host = standing_host(&world);
    assert_eq!(standing(&world, "web"), [(1, 1, host.clone())]);
    assert_eq!(world.ready("web"), 1);
    let said = nave_orchestrator_core::explain(&world.state, "web").join("; ");
    assert!(said.contains("keeps the limits of version 1: "), "{said}");
    assert!(said.contains("cpu"), "{said}");
    // Room comes, and nobody has to say so.
    world.accept(crate::world::delete("other"));
    world.settle();
    assert_eq!(standing(&world, "web"), [(2, 1, host.clone())]);
    assert_eq!(reserved(&world, &host), 3000);
}

#[test]
fn a_host_that_has_shrunk_keeps_what_runs_and_still_takes_smaller_limits() {
    let mut world = World::with_hosts(1);
    world.deploy(with_cpu(manifest("web", 4), 1000));
    world.settle();
    let host = standing_host(&world);
    world.update_facts(&host, |facts| facts.cpu_millicores = 2000);
    let health = pb::Health::default();
    world.deploy(pb::Manifest { health: Some(health.clone()), ..with_cpu(manifest("web", 4), 1000) });
    assert!(
        world.wanted("web").iter().all(|i| i.version == 2),
        "a change of anything else is nobody's growth"
    );
    world.deploy(pb::Manifest { health: Some(health), ..with_cpu(manifest("web", 4), 400) });
    assert!(world.wanted("web").iter().all(|i| i.version == 3));
    assert_eq!(reserved(&world, &host), 1600);
}

#[test]
fn new_limits_wait_while_paused_and_cost_nobody_its_place() {
    let mut world = World::with_hosts(2);
    world.deploy(manifest("web", 1));
    world.settle();
    let update = pb::Update { max_parallel: 2, ..manifest("web", 2).update.unwrap_or_default() };
    let other = pb::Manifest { command: vec!["other".into()], update: Some(update), ..manifest("web", 2) };
    world.deploy(other.clone());
    world.plan_once();
    let before: Vec<u64> = world.wanted("web").iter().map(|i| i.id).collect();
    world.deploy(with_cpu(other, 1000));
    world.accept(pause("web", true));
    assert_eq!(world.steps(), []);
    assert_eq!(world.wanted("web").iter().map(|i| i.id).collect::<Vec<_>>(), before);
    world.accept(pause("web", false));
    world.settle();
    let versions: Vec<u64> = world.wanted("web").iter().map(|i| i.version).collect();
    assert_eq!((versions, world.status("web")), (vec![3, 3], DeploymentStatus::Successful));
    assert!(world.wanted("web").iter().any(|i| before.contains(&i.id)), "it has grown where it was");
}

#[test]
fn a_plan_that_came_too_late_gives_no_room_twice() {
    let mut world = World::with_hosts(1);
    world.deploy(with_cpu(manifest("web", 1), 1000));
    world.deploy(with_cpu(manifest("other", 1), 1000));
    world.settle();
    world.deploy(with_cpu(manifest("web", 1), 2500));
    let stale = world.steps();
    assert!(stale.iter().any(|step| matches!(step, Step::Resize(_))), "{stale:?}");
    world.deploy(with_cpu(manifest("other", 1), 2500));
    let fresh = world.steps();
    world.commit(fresh);
    world.commit(stale);
    assert!(reserved(&world, &standing_host(&world)) <= facts("x").cpu_millicores);
}

#[test]
fn a_command_of_an_older_build_means_what_it_meant() {
    let mut world = World::with_hosts(1);
    world.deploy(with_cpu(manifest("web", 1), 1000));
    world.settle();
    let command = world.command(apply(with_cpu(manifest("web", 1), 500)));
    world.apply(pb::Command { written_by: 4, ..command });
    assert_eq!(world.service("web").template_version, 2, "its processes were replaced then");
}

#[test]
fn more_room_and_another_check_at_once_come_with_new_instances_a_few_at_a_time() {
    let mut world = World::with_hosts(4);
    world.deploy(with_cpu(manifest("web", 3), 100));
    world.settle_for(60);
    let before: Vec<u64> = world.wanted("web").iter().map(|i| i.id).collect();
    world.deploy(checked(&with_cpu(manifest("web", 4), 1000), "/new"));
    for _ in 0..200 {
        world.plan_all();
        assert!(world.ready("web") >= 3, "never fewer than were there");
        world.agents();
    }
    world.settle_for(60);
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
    assert!(world.wanted("web").iter().all(|i| i.version == 2 && !before.contains(&i.id)));
    assert_eq!(world.ready("web"), 4);
}

#[test]
fn one_that_has_to_stop_first_gives_way_where_there_is_room_and_stays_where_there_is_none() {
    for (cpu, version) in [(2000, 2), (9000, 1)] {
        let mut world = World::with_hosts(1);
        world.deploy(with_port(with_cpu(manifest("web", 1), 100), 8080));
        world.settle_for(60);
        world.deploy(checked(&with_port(with_cpu(manifest("web", 1), cpu), 8080), "/new"));
        world.settle_for(60);
        let standing: Vec<u64> = standing(&world, "web").into_iter().map(|(version, ..)| version).collect();
        assert_eq!((standing, world.ready("web")), (vec![version], 1), "{cpu}");
    }
}
