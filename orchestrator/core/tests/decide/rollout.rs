//! From one version to the next: how many at a time, how it ends, and the way back.

use nave_orchestrator_core::plan;
use nave_proto::pb;
use nave_proto::pb::DeploymentStatus;
use nave_proto::pb::observed::{BackingOff, State};
use nave_proto::pb::plan_step::Step;

use crate::world::{
    SECOND, World, changed, delete, exited, failed, manifest, pause, promote, restart, rollback, running,
    scale, seconds, with_cpu, with_port, with_update,
};

fn by_version(world: &World, name: &str) -> Vec<(u64, usize)> {
    let mut counts = std::collections::BTreeMap::new();
    for instance in world.wanted(name) {
        *counts.entry(instance.template_version).or_insert(0) += 1;
    }
    counts.into_iter().collect()
}

/// `web` at version 1, ready, on three hosts.
fn deployed(first: &pb::Manifest) -> World {
    let mut world = World::with_hosts(3);
    world.deploy(first.clone());
    world.settle_for(60);
    assert_eq!(world.status(&first.name), DeploymentStatus::Successful);
    world
}

#[test]
fn a_first_version_is_placed_at_once_and_successful_when_all_are_ready() {
    let mut world = World::with_hosts(3);
    world.deploy(with_update(manifest("web", 6), |update| update.min_ready = seconds(60)));
    world.plan_all();
    assert_eq!(world.wanted("web").len(), 6, "max_parallel is for replacements");
    assert_eq!(world.status("web"), DeploymentStatus::Running);
    world.settle();
    assert_eq!(world.status("web"), DeploymentStatus::Successful, "min_ready too");
    assert_eq!(world.service("web").stable_version, 1);
    assert!(world.state.service_version("web", 1).unwrap().stable);
    assert_eq!(world.last_event("deployment_successful"), "version 1 of web is fully ready");
    assert_eq!(world.steps(), []);
}

#[test]
fn start_first_never_has_fewer_ready_than_wanted() {
    let first = manifest("web", 3);
    let mut world = deployed(&first);
    world.deploy(changed(&first, "two"));
    for round in 0..3 {
        world.plan_all();
        assert_eq!(
            by_version(&world, "web"),
            [(1, 3 - round), (2, round + 1)],
            "one more than wanted, not two"
        );
        assert_eq!(world.ready("web"), 3);
        world.agents();
        assert_eq!(world.ready("web"), 4);
    }
    world.settle();
    assert_eq!(by_version(&world, "web"), [(2, 3)]);
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
    assert_eq!(world.hosts_of("web"), ["alpha", "beta", "gamma"]);
    let mut ordinals: Vec<_> = world.wanted("web").iter().map(|instance| instance.ordinal).collect();
    ordinals.sort_unstable();
    assert_eq!(ordinals, [0, 1, 2]);
}

#[test]
fn max_parallel_bounds_what_is_not_healthy_yet() {
    let first = with_update(manifest("web", 5), |update| update.max_parallel = 2);
    let mut world = deployed(&first);
    world.deploy(changed(&first, "two"));
    world.plan_all();
    assert_eq!(by_version(&world, "web"), [(1, 5), (2, 2)]);
    let new = world.wanted("web").into_iter().find(|instance| instance.template_version == 2).unwrap();
    world.say(new.id, running(true));
    world.plan_all();
    assert_eq!(by_version(&world, "web"), [(1, 4), (2, 3)]);
}

#[test]
fn min_ready_makes_each_replacement_wait() {
    let first = with_update(manifest("web", 2), |update| update.min_ready = seconds(10));
    let mut world = deployed(&first);
    world.deploy(changed(&first, "two"));
    world.settle();
    assert_eq!(by_version(&world, "web"), [(1, 2), (2, 1)]);
    assert_eq!(plan(&world.state, world.now).wake_at, Some(world.now + 10 * SECOND));
    world.now += 9 * SECOND;
    world.settle();
    assert_eq!(by_version(&world, "web"), [(1, 2), (2, 1)]);
    world.now += SECOND;
    world.settle();
    assert_eq!(by_version(&world, "web"), [(1, 1), (2, 2)]);
    world.settle_for(10);
    assert_eq!(by_version(&world, "web"), [(2, 2)]);
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
}

#[test]
fn stop_first_empties_at_most_max_parallel_slots() {
    let first = with_port(manifest("web", 3), 8080);
    let mut world = deployed(&first);
    world.deploy(changed(&first, "two"));
    world.plan_all();
    assert_eq!(by_version(&world, "web"), [(1, 2)], "the port is free once the old one is gone");
    assert_eq!(world.ready("web"), 2);
    world.agents();
    world.plan_all();
    assert_eq!(by_version(&world, "web"), [(1, 2), (2, 1)]);
    assert_eq!(world.ready("web"), 2);
    world.settle();
    assert_eq!(by_version(&world, "web"), [(2, 3)]);
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
}

#[test]
fn per_host_is_replaced_in_place_one_after_another() {
    let first = pb::Manifest { per_host: true, ..manifest("agentd", 0) };
    let mut world = deployed(&first);
    world.accept(restart("agentd"));
    let mut least = 3;
    for _ in 0..20 {
        world.plan_once();
        least = least.min(world.ready("agentd"));
        let mut hosts: Vec<_> = world.state.instances_of("agentd").map(|i| i.host_id).collect();
        hosts.dedup();
        assert_eq!(hosts.len(), world.state.instances_of("agentd").count(), "never two on one host");
        world.agents();
    }
    assert_eq!(least, 2);
    assert_eq!(by_version(&world, "agentd"), [(2, 3)]);
    assert_eq!(world.status("agentd"), DeploymentStatus::Successful);
}

#[test]
fn a_count_that_becomes_per_host_keeps_what_it_has_until_each_host_has_one() {
    let first = manifest("web", 3);
    let mut world = World::with_hosts(1);
    world.deploy(first.clone());
    world.settle();
    world.join("beta");
    world.join("gamma");
    world.sick.push(("web".into(), 2));
    world.deploy(pb::Manifest { per_host: true, ..changed(&first, "sick") });
    for _ in 0..10 {
        world.plan_once();
        assert!(world.ready("web") >= 2, "max_parallel 1 of three hosts");
        world.agents();
    }
    assert_eq!(world.hosts_of("web"), ["alpha", "alpha", "beta", "gamma"]);
    world.sick.clear();
    world.settle();
    assert_eq!(world.hosts_of("web"), ["alpha", "beta", "gamma"]);
    assert_eq!(by_version(&world, "web"), [(2, 3)]);
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
}

#[test]
fn a_change_that_leaves_processes_alone_is_done_at_once() {
    let first = manifest("web", 2);
    let mut world = deployed(&first);
    world.deploy(with_update(first, |update| update.max_parallel = 7));
    world.plan_all();
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
    assert_eq!(world.service("web").stable_version, 2);
    assert!(world.wanted("web").iter().all(|i| i.version == 2 && i.template_version == 1));
}

#[test]
fn no_progress_goes_back_to_the_stable_version() {
    let first = manifest("web", 3);
    let mut world = deployed(&first);
    world.sick.push(("web".into(), 2));
    world.deploy(changed(&first, "sick"));
    world.settle();
    assert_eq!(by_version(&world, "web"), [(1, 3), (2, 1)]);
    world.now += 119 * SECOND;
    world.settle();
    assert_eq!(world.service("web").version, 2);
    world.now += SECOND;
    world.settle();
    let service = world.service("web");
    assert_eq!((service.version, service.template_version, service.stable_version), (3, 1, 3));
    let deployment = service.deployment.as_ref().unwrap();
    assert_eq!((deployment.from_version, deployment.reverted_to), (2, 3));
    assert!(
        deployment.reason.starts_with("version 2 failed, back to version 1: no progress in 120 s"),
        "{}",
        deployment.reason
    );
    assert_eq!(world.state.service_version("web", 3).unwrap().cause, "auto-revert to 1");
    assert_eq!(by_version(&world, "web"), [(1, 3)]);
    assert!(world.wanted("web").iter().all(|instance| instance.id <= 3), "what still ran was not restarted");
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
}

#[test]
fn one_that_gives_up_fails_the_deployment_at_once() {
    let first = manifest("web", 2);
    let mut world = deployed(&first);
    world.deploy(changed(&first, "crash"));
    world.plan_all();
    let new = world.wanted("web").into_iter().find(|instance| instance.template_version == 2).unwrap();
    world.say(new.id, failed());
    world.plan_all();
    assert_eq!(world.service("web").version, 3);
    assert!(world.reason("web").contains("web.0 (i-3) gave up"), "{}", world.reason("web"));
}

#[test]
fn without_auto_revert_it_stops_where_it_is() {
    let first = with_update(manifest("web", 3), |update| update.auto_revert = false);
    let mut world = deployed(&first);
    world.sick.push(("web".into(), 2));
    world.deploy(changed(&first, "sick"));
    world.settle_for(600);
    assert_eq!(world.status("web"), DeploymentStatus::Failed);
    assert!(world.reason("web").ends_with("update.auto_revert is off"), "{}", world.reason("web"));
    assert_eq!(by_version(&world, "web"), [(1, 3), (2, 1)]);
    assert_eq!((world.ready("web"), world.service("web").stable_version), (3, 1));
    let host = world.hosts_of("web").remove(2);
    world.lose(&host);
    world.settle();
    assert!(world.ready("web") >= 3, "what is lost of the old version is placed again as the old version");
}

#[test]
fn a_first_version_that_fails_says_why_and_is_left_alone() {
    let mut world = World::with_hosts(1);
    world.sick.push(("web".into(), 1));
    world.deploy(with_cpu(manifest("web", 5), 1000));
    world.settle_for(120);
    assert_eq!(world.status("web"), DeploymentStatus::Failed);
    let reason = world.reason("web").to_owned();
    for part in [
        "0 of 5 instances are ready",
        "the only host lacks cpu",
        "web.0 (i-1) on alpha runs and is not ready",
        "no other version",
    ] {
        assert!(reason.contains(part), "{reason}");
    }
    assert_eq!(by_version(&world, "web"), [(1, 4)]);
    assert_eq!(world.steps(), []);
    world.sick.clear();
    world.join("beta");
    world.settle();
    assert_eq!(world.status("web"), DeploymentStatus::Successful, "late, but it got there");
    assert_eq!(world.reason("web"), "");
}

#[test]
fn a_revert_that_fails_too_does_not_go_round_in_circles() {
    let first = manifest("web", 2);
    let mut world = deployed(&first);
    world.sick = vec![("web".into(), 1), ("web".into(), 2)];
    world.deploy(changed(&first, "sick"));
    world.settle_for(3600);
    assert_eq!((world.service("web").version, world.status("web")), (3, DeploymentStatus::Failed));
}

#[test]
fn a_task_that_ended_well_counts_and_one_that_ended_badly_fails() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("job", 1));
    world.plan_all();
    world.say(1, exited(0));
    world.plan_all();
    assert_eq!(world.status("job"), DeploymentStatus::Successful);
    assert_eq!(world.steps(), [], "it is done, nothing starts it again");
    world.deploy(manifest("bad", 1));
    world.plan_all();
    world.say(2, exited(3));
    world.plan_all();
    assert_eq!(world.status("bad"), DeploymentStatus::Failed);
}

#[test]
fn a_newer_version_takes_over_a_running_deployment() {
    let first = manifest("web", 3);
    let mut world = deployed(&first);
    world.deploy(changed(&first, "two"));
    world.plan_all();
    world.agents();
    world.deploy(changed(&first, "three"));
    for _ in 0..30 {
        world.plan_once();
        assert!(world.ready("web") >= 3);
        world.agents();
    }
    assert_eq!(by_version(&world, "web"), [(3, 3)]);
}

#[test]
fn a_replacement_without_room_takes_that_of_an_old_one_that_is_not_ready() {
    let first = with_cpu(manifest("web", 4), 1000);
    let mut world = World::with_hosts(1);
    world.sick.push(("web".into(), 1));
    world.deploy(first.clone());
    world.settle();
    world.deploy(changed(&first, "fixed"));
    world.plan_all();
    assert_eq!(by_version(&world, "web"), [(1, 3)], "one at a time");
    world.settle();
    assert_eq!(by_version(&world, "web"), [(2, 4)]);
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
}

#[test]
fn a_replacement_without_room_harms_nothing_that_is_ready() {
    let first = with_cpu(manifest("web", 4), 1000);
    let mut world = World::with_hosts(1);
    world.deploy(first.clone());
    world.settle();
    world.deploy(changed(&first, "two"));
    world.settle();
    assert_eq!((by_version(&world, "web"), world.ready("web")), (vec![(1, 4)], 4));
    world.settle_for(120);
    assert_eq!(world.service("web").version, 3, "reverted, saying that there was no room");
    assert!(world.reason("web").contains("lacks cpu"), "{}", world.reason("web"));
}

#[test]
fn drained_instances_are_replaced_before_they_stop() {
    let mut world = deployed(&manifest("web", 3));
    world.set_draining("beta", true);
    for _ in 0..10 {
        world.plan_once();
        assert!(world.ready("web") >= 3);
        world.agents();
    }
    assert_eq!(world.hosts_of("web"), ["alpha", "alpha", "gamma"]);
    assert_eq!(world.service("web").version, 1);
}

#[test]
fn growing_and_changing_at_once_keeps_to_max_parallel() {
    let first = manifest("web", 2);
    let mut world = deployed(&first);
    world.sick.push(("web".into(), 2));
    world.deploy(changed(&pb::Manifest { count: 6, ..first }, "sick"));
    world.settle();
    assert_eq!(by_version(&world, "web"), [(1, 2), (2, 1)]);
}

#[test]
fn shrinking_and_changing_at_once_stops_what_is_too_many_first() {
    let first = manifest("web", 3);
    let mut world = deployed(&first);
    world.sick.push(("web".into(), 2));
    world.deploy(changed(&pb::Manifest { count: 1, ..first }, "sick"));
    world.settle();
    assert_eq!(by_version(&world, "web"), [(1, 1), (2, 1)]);
}

#[test]
fn a_stop_checked_when_applied_spares_the_last_ready_one() {
    let first = manifest("web", 2);
    let mut world = deployed(&first);
    world.deploy(changed(&first, "two"));
    world.plan_all();
    world.agents();
    let steps = world.steps();
    assert!(steps.iter().any(|step| matches!(step, Step::Stop(_))));
    let new = world.wanted("web").into_iter().find(|instance| instance.template_version == 2).unwrap();
    world.say(new.id, running(false));
    world.commit(steps);
    assert_eq!(world.ready("web"), 2, "the new one had turned unready, so the old one stays");
}

#[test]
fn scaling_during_a_rollout_takes_over_what_is_there() {
    let first = manifest("web", 3);
    let mut world = deployed(&first);
    world.deploy(changed(&first, "two"));
    world.plan_all();
    world.agents();
    world.accept(scale("web", 4));
    world.settle();
    assert_eq!(by_version(&world, "web"), [(2, 4)]);
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
}

#[test]
fn a_way_back_that_would_close_a_cycle_is_said_and_not_taken() {
    let first = pb::Manifest { needs: vec!["db".into()], ..manifest("web", 1) };
    let mut world = World::with_hosts(1);
    world.deploy(manifest("db", 1));
    world.deploy(first.clone());
    world.settle();
    world.sick.push(("web".into(), 2));
    world.deploy(changed(&pb::Manifest { needs: Vec::new(), ..first }, "sick"));
    world.deploy(pb::Manifest { needs: vec!["web".into()], ..manifest("db", 1) });
    assert!(world.refuse(rollback("web", 1)).1.contains("needs form a cycle: web -> db -> web"));
    world.settle_for(600);
    assert_eq!((world.service("web").version, world.status("web")), (2, DeploymentStatus::Failed));
    assert!(
        world.reason("web").contains("version 1 cannot be restored: needs form a cycle"),
        "{}",
        world.reason("web")
    );
    assert_eq!(world.ready("web"), 1);
}

#[test]
fn a_stable_version_that_cannot_come_back_is_tried_once() {
    let first = pb::Manifest { needs: vec!["db".into()], ..manifest("web", 1) };
    let mut world = World::with_hosts(1);
    world.deploy(manifest("db", 1));
    world.deploy(first.clone());
    world.settle();
    for gone in ["db", "web"] {
        world.accept(delete(gone));
    }
    world.plan_all();
    world.deploy(changed(&first, "other"));
    world.settle_for(3600);
    assert_eq!(world.state.service_version("web", 3).unwrap().cause, "auto-revert to 1");
    assert_eq!((world.service("web").version, world.status("web")), (3, DeploymentStatus::Failed));
    assert!(world.reason("web").contains("needs db, which does not exist"), "{}", world.reason("web"));
}

#[test]
fn a_restart_that_fails_leaves_what_ran_before_alone() {
    let first = manifest("web", 2);
    let mut world = deployed(&first);
    world.sick.push(("web".into(), 2));
    world.accept(restart("web"));
    world.settle_for(3600);
    assert_eq!((world.service("web").version, world.status("web")), (2, DeploymentStatus::Failed));
    assert_eq!((by_version(&world, "web"), world.ready("web")), (vec![(1, 2), (2, 1)], 2));
}

#[test]
fn an_end_that_is_no_longer_true_is_not_said() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("web", 1));
    world.plan_all();
    world.say(1, running(true));
    let success = world.steps();
    assert!(matches!(success[..], [Step::SetDeployment(_)]));
    world.say(1, running(false));
    world.commit(success);
    assert_eq!((world.status("web"), world.service("web").stable_version), (DeploymentStatus::Running, 0));
}

#[test]
fn a_failure_that_was_overtaken_by_success_reverts_nothing() {
    let first = manifest("web", 1);
    let mut world = deployed(&first);
    world.sick.push(("web".into(), 2));
    world.deploy(changed(&first, "slow"));
    world.settle();
    world.now += 120 * SECOND;
    let failure = world.steps();
    assert!(matches!(failure[..], [Step::Revert(_)]));
    let new = world.wanted("web").into_iter().find(|instance| instance.template_version == 2).unwrap();
    world.say(new.id, running(true));
    world.commit(failure);
    assert_eq!(world.service("web").version, 2);
    world.sick.clear();
    world.settle();
    assert_eq!(
        (world.status("web"), by_version(&world, "web")),
        (DeploymentStatus::Successful, vec![(2, 1)])
    );
}

/// A plan stops one ready old instance; then another old one turns unready before it is committed.
fn stop_after_another_turned_unready(first: &pb::Manifest) -> World {
    let mut world = deployed(first);
    world.deploy(changed(first, "two"));
    let steps = loop {
        let steps = world.steps();
        if steps.iter().any(|step| matches!(step, Step::Stop(_))) {
            break steps;
        }
        world.commit(steps);
        world.agents();
    };
    let stopped_by = |step: &Step| match step {
        Step::Stop(stop) => Some(stop.instance_id),
        Step::Place(_)
        | Step::SetDeployment(_)
        | Step::Revert(_)
        | Step::Forget(_)
        | Step::Resize(_)
        | Step::GrantRestart(_)
        | Step::FetchAhead(_)
        | Step::ScheduleRun(_) => None,
    };
    let stopped: Vec<_> = steps.iter().filter_map(stopped_by).collect();
    let other = world
        .wanted("web")
        .into_iter()
        .find(|i| i.template_version == 1 && !stopped.contains(&i.id))
        .unwrap();
    world.say(other.id, running(false));
    let before = world.ready("web");
    world.commit(steps);
    assert_eq!(world.ready("web"), before, "nothing that is ready was stopped");
    world
}

#[test]
fn a_stale_stop_never_takes_a_ready_one_in_place_of_an_unready_one() {
    let mut world = stop_after_another_turned_unready(&manifest("web", 3));
    world.settle();
    assert_eq!(by_version(&world, "web"), [(2, 3)]);
    let mut world = stop_after_another_turned_unready(&with_port(manifest("web", 3), 8080));
    world.settle();
    assert_eq!(by_version(&world, "web"), [(2, 3)]);
}

fn with_canary(manifest: pb::Manifest, canary: u32) -> pb::Manifest {
    with_update(manifest, |update| update.canary = canary)
}

#[test]
fn a_canary_is_said_to_be_ready_in_its_time_though_nothing_more_is_logged() {
    let min_ready = Some(prost_types::Duration { seconds: 2, nanos: 0 });
    let first = with_update(with_canary(manifest("web", 1), 1), |update| update.min_ready = min_ready);
    let mut world = deployed(&first);
    world.deploy(changed(&first, "two"));
    world.plan_once();
    world.agents();
    let logged = world.state.time_unix_ns();
    let waits = |now| nave_orchestrator_core::waits_for(&world.state, "web", now);
    assert_eq!(waits(logged), None);
    assert!(waits(logged + 2 * SECOND).is_some());
}

#[test]
fn canaries_run_beside_the_old_ones_until_a_person_promotes_them() {
    let first = with_canary(manifest("web", 3), 1);
    let mut world = deployed(&first);
    assert_eq!(world.service("web").deployment.as_ref().unwrap().canary, 0, "a first version has none");
    world.deploy(changed(&first, "two"));
    assert!(world.refuse(promote("web")).1.contains("0 of 1 canaries of web are ready"));
    world.settle_for(3600);
    assert_eq!((by_version(&world, "web"), world.ready("web")), (vec![(1, 3), (2, 1)], 4));
    assert_eq!(world.status("web"), DeploymentStatus::Running, "waiting for a person never fails");
    let waits = nave_orchestrator_core::waits_for(&world.state, "web", world.now).unwrap();
    assert_eq!(waits, "1 canary is ready, and the rest of version 2 waits for `nave promote web`");
    // Scaled, it waits on.
    world.accept(scale("web", 4));
    world.settle();
    assert_eq!(by_version(&world, "web"), [(1, 3), (2, 1)], "the canary stands for the fourth");
    world.accept(promote("web"));
    for _ in 0..20 {
        world.plan_once();
        assert!(world.ready("web") >= 4);
        world.agents();
    }
    assert_eq!(by_version(&world, "web"), [(2, 4)]);
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
    assert!(world.refuse(promote("web")).1.contains("no canaries"));
}

#[test]
fn what_goes_back_to_what_runs_has_no_canaries() {
    let first = with_canary(manifest("web", 3), 1);
    let mut world = deployed(&first);
    world.deploy(changed(&first, "bad"));
    world.settle();
    assert_eq!(by_version(&world, "web"), [(1, 3), (2, 1)]);
    world.deploy(first);
    world.settle_for(60);
    assert_eq!(
        (by_version(&world, "web"), world.status("web")),
        (vec![(1, 3)], DeploymentStatus::Successful)
    );
}

#[test]
fn stop_first_canaries_take_the_place_of_old_ones() {
    let first = with_canary(with_port(manifest("web", 3), 8080), 2);
    let mut world = deployed(&first);
    world.deploy(changed(&first, "two"));
    world.settle_for(600);
    assert_eq!((by_version(&world, "web"), world.ready("web")), (vec![(1, 1), (2, 2)], 3));
    world.accept(promote("web"));
    world.settle();
    assert_eq!(by_version(&world, "web"), [(2, 3)]);
}

#[test]
fn a_bad_canary_is_taken_back_and_the_way_back_needs_no_promotion() {
    let first = with_canary(manifest("web", 3), 1);
    let mut world = deployed(&first);
    world.deploy(changed(&first, "two"));
    world.settle_for(3600);
    let canary = world.wanted("web").into_iter().find(|instance| instance.template_version == 2).unwrap();
    world.say(canary.id, running(false));
    world.plan_all();
    assert_eq!(world.service("web").version, 2, "one bad answer after an hour is given its patience");
    world.now += 120 * SECOND;
    world.plan_all();
    assert_eq!(world.service("web").version, 3);
    world.settle();
    assert_eq!(
        (by_version(&world, "web"), world.status("web")),
        (vec![(1, 3)], DeploymentStatus::Successful)
    );
}

#[test]
fn one_that_comes_and_goes_fails_its_version() {
    let first = with_update(manifest("web", 2), |update| {
        update.progress_deadline = seconds(12);
        update.min_ready = seconds(5);
    });
    let mut world = deployed(&first);
    world.deploy(changed(&first, "two"));
    world.plan_all();
    let new = |world: &World| world.wanted("web").into_iter().find(|one| one.template_version == 2);
    let begun = world.now;
    // Ready for 3 s of every 4.
    while let Some(one) = new(&world).filter(|_| world.service("web").version == 2) {
        assert!(world.now < begun + 20 * SECOND, "it goes on for ever");
        world.say(one.id, running((world.now - begun) / SECOND % 4 != 3));
        world.plan_all();
        world.now += SECOND;
    }
    assert!(world.last_event("deployment_failed").contains("no progress in 12 s"));
}

#[test]
fn canaries_that_do_not_all_wait_get_no_more_patience() {
    let first = with_update(with_canary(manifest("web", 3), 2), |update| {
        update.max_parallel = 2;
        update.progress_deadline = seconds(12);
    });
    let mut world = deployed(&first);
    world.deploy(changed(&first, "two"));
    world.plan_all();
    let new: Vec<_> = world.wanted("web").into_iter().filter(|one| one.template_version == 2).collect();
    let [good, bad] = &new[..] else { panic!("{new:?}") };
    let deadline = |world: &World| world.service("web").deployment.clone().unwrap().progress_deadline_unix_ns;
    world.say(good.id, running(true));
    let once = deadline(&world);
    for _ in 0..3 {
        world.now += SECOND;
        world.say(good.id, running(false));
        world.say(good.id, running(true));
        assert_eq!(deadline(&world), once);
    }
    world.say(bad.id, running(true));
    world.now += 3600 * SECOND;
    world.say(bad.id, running(false));
    assert_eq!(deadline(&world), world.now + 12 * SECOND, "a person was waited for");
}

#[test]
fn a_paused_deployment_stands_still_and_never_fails() {
    let first = manifest("web", 3);
    let mut world = deployed(&first);
    assert!(world.refuse(pause("web", true)).1.contains("nothing to pause"));
    world.deploy(changed(&first, "two"));
    world.plan_all();
    world.accept(pause("web", true));
    world.settle_for(3600);
    assert_eq!(
        (by_version(&world, "web"), world.status("web")),
        (vec![(1, 3), (2, 1)], DeploymentStatus::Paused)
    );
    world.accept(scale("web", 2));
    world.settle();
    assert_eq!(world.status("web"), DeploymentStatus::Paused, "scaled, it stays paused");
    let patient = with_update(changed(&first, "two"), |update| update.progress_deadline = seconds(600));
    world.deploy(pb::Manifest { count: 2, ..patient });
    world.settle();
    assert_eq!(
        world.status("web"),
        DeploymentStatus::Paused,
        "so it does after a change that replaces nothing"
    );
    assert!(world.ready("web") >= 2);
    world.accept(pause("web", false));
    world.settle();
    assert_eq!(
        (by_version(&world, "web"), world.status("web")),
        (vec![(2, 2)], DeploymentStatus::Successful)
    );
    assert!(world.refuse(pause("web", false)).1.contains("is not paused"));
}

#[test]
fn what_nothing_probes_is_believed_only_after_a_moment() {
    let first = pb::Manifest { health: None, ..manifest("web", 2) };
    let mut world = World::with_hosts(2);
    world.deploy(first.clone());
    world.settle();
    assert_eq!((world.ready("web"), world.status("web")), (2, DeploymentStatus::Running));
    world.settle_for(1);
    assert_eq!((world.status("web"), world.service("web").stable_version), (DeploymentStatus::Successful, 1));
    // One that ends at once replaces nothing and is never stable.
    world.deploy(changed(&first, "crash"));
    for attempt in 1..6 {
        world.plan_all();
        let new = world.wanted("web").into_iter().find(|i| i.template_version == 2).unwrap();
        world.report(new.host_id, crate::world::report(&new, attempt, running(true)));
        world.plan_all();
        world.now += SECOND / 2;
        world.plan_all();
        assert!(world.ready("web") >= 2);
        let new = world.wanted("web").into_iter().find(|i| i.template_version == 2).unwrap();
        let state = if attempt == 5 { failed() } else { State::BackingOff(BackingOff::default()) };
        world.report(new.host_id, crate::world::report(&new, attempt, state));
    }
    world.settle_for(1);
    let service = world.service("web");
    assert_eq!((service.version, service.stable_version, by_version(&world, "web")), (3, 3, vec![(1, 2)]));
}

#[test]
fn one_that_leaves_its_host_is_said_to_leave_it() {
    let mut world = deployed(&manifest("web", 3));
    world.set_draining("beta", true);
    world.settle();
    assert!(world.last_event("instance_stopping").ends_with(": beta is being drained"));
}
