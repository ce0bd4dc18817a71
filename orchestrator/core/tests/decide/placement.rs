//! Where instances go, where they may not, and what is said when there is no place.

use std::time::Duration;

use nave_orchestrator_core::{ClusterState, PlanCursor, explain, limits, plan, plan_dirty};
use nave_proto::ids::HostId;
use nave_proto::lease;
use nave_proto::pb;
use nave_proto::pb::HostStatus;
use nave_proto::pb::command::Body;
use nave_proto::pb::plan_step::Step;

use crate::world::{
    MIB, SECOND, World, apply, changed, delete, failed, manifest, running, scale, seconds, with_constraint,
    with_cpu, with_port, with_update,
};

fn with_memory(manifest: pb::Manifest, memory_bytes: u64) -> pb::Manifest {
    let resources = pb::Resources { memory_bytes, ..manifest.resources.unwrap_or_default() };
    pb::Manifest { resources: Some(resources), ..manifest }
}

fn with_spread(manifest: pb::Manifest, spread: &str) -> pb::Manifest {
    let placement = pb::Placement { spread: spread.into(), ..Default::default() };
    pb::Manifest { placement: Some(placement), ..manifest }
}

fn per_host(manifest: pb::Manifest) -> pb::Manifest {
    pb::Manifest { per_host: true, ..manifest }
}

fn unplaced(world: &World, service: &str) -> Vec<String> {
    let plan = plan(&world.state, world.now);
    let found = plan.unplaced.into_iter().find(|unplaced| unplaced.service == service);
    found.map_or_else(Vec::new, |unplaced| unplaced.reasons)
}

#[test]
fn instances_spread_over_hosts() {
    let mut world = World::with_hosts(3);
    world.deploy(manifest("web", 4));
    world.plan_all();
    assert_eq!(world.hosts_of("web"), ["alpha", "alpha", "beta", "gamma"]);
    assert_eq!(world.wanted("web").iter().map(|i| i.ordinal).collect::<Vec<_>>(), [0, 1, 2, 3]);
    world.deploy(manifest("api", 1));
    world.plan_all();
    assert_eq!(world.hosts_of("api"), ["beta"], "the host with fewer of all services");
}

#[test]
fn instances_spread_over_a_label_first() {
    let mut world = World::with_hosts(3);
    for (host, zone) in [("alpha", "a"), ("beta", "a"), ("gamma", "b")] {
        world.update_facts(host, |facts| {
            facts.labels.insert("zone".into(), zone.into());
        });
    }
    world.deploy(with_spread(manifest("web", 4), "label.zone"));
    world.plan_all();
    assert_eq!(world.hosts_of("web"), ["alpha", "beta", "gamma", "gamma"]);
}

#[test]
fn a_host_is_filled_to_what_it_has_and_not_beyond() {
    let mut world = World::with_hosts(2);
    world.deploy(with_memory(with_cpu(manifest("web", 9), 1000), 2048 * MIB));
    world.plan_all();
    assert_eq!(world.wanted("web").len(), 4);
    let alpha = world.state.reserved(world.host_id("alpha"));
    assert_eq!((alpha.cpu_millicores, alpha.memory_bytes), (2000, 4096 * MIB));
    assert_eq!(
        unplaced(&world, "web"),
        [
            "2 of 2 hosts lack memory: need 2048 MiB, most free is 0 bytes on alpha",
            "nearest miss: alpha lacks 2048 MiB"
        ]
    );
    assert_eq!(world.steps(), []);
}

#[test]
fn a_plan_gives_room_away_once() {
    let mut world = World::with_hosts(1);
    for name in ["a", "b", "c"] {
        world.deploy(with_cpu(manifest(name, 1), 2000));
    }
    assert_eq!(world.steps().len(), 2);
    world.plan_all();
    assert_eq!(unplaced(&world, "c"), ["the only host lacks cpu: need 2.0 cores, most free is 0.0 on alpha"]);
    world.accept(delete("a"));
    world.settle();
    assert_eq!(world.ready("c"), 1, "what waited for room gets it");
}

#[test]
fn constraints_choose_hosts_and_each_unmet_one_is_counted() {
    let mut world = World::with_hosts(3);
    world.update_facts("gamma", |facts| {
        facts.labels.insert("zone".into(), "b".into());
        facts.arch = "aarch64".into();
    });
    world.deploy(with_constraint(manifest("web", 2), "label.zone != \"b\""));
    world.deploy(with_constraint(manifest("only", 2), "host = \"beta\""));
    world.deploy(with_constraint(manifest("arm", 1), "arch = \"aarch64\""));
    world.plan_all();
    assert_eq!(world.hosts_of("web"), ["alpha", "beta"]);
    assert_eq!(world.hosts_of("only"), ["beta", "beta"]);
    assert_eq!(world.hosts_of("arm"), ["gamma"]);
    world.deploy(with_constraint(manifest("none", 1), "label.disk = \"ssd\""));
    world.plan_all();
    assert_eq!(unplaced(&world, "none"), ["3 of 3 hosts do not meet label.disk = \"ssd\""]);
    world.update_facts("beta", |facts| {
        facts.labels.insert("disk".into(), "ssd".into());
    });
    world.plan_all();
    assert_eq!(world.hosts_of("none"), ["beta"]);
}

#[test]
fn a_constraint_that_a_host_no_longer_meets_moves_what_is_there() {
    let mut world = World::with_hosts(2);
    world.deploy(manifest("web", 2));
    world.settle();
    world.deploy(with_constraint(manifest("web", 2), "host != \"beta\""));
    assert_eq!(world.service("web").template_version, 1, "no new processes for their own sake");
    world.settle();
    assert_eq!(world.hosts_of("web"), ["alpha", "alpha"]);
    assert_eq!(world.wanted("web")[0].id, 1, "what may stay stays");
}

#[test]
fn a_fixed_port_is_taken_once_per_host_by_whomever() {
    let mut world = World::with_hosts(2);
    world.deploy(with_port(manifest("web", 3), 8080));
    world.plan_all();
    assert_eq!(world.hosts_of("web"), ["alpha", "beta"]);
    assert_eq!(unplaced(&world, "web"), ["2 of 2 hosts already have port 8080 in use"]);
    world.deploy(with_port(manifest("other", 1), 8080));
    world.plan_all();
    assert_eq!(world.wanted("other").len(), 0);
    world.deploy(with_port(manifest("dynamic", 4), 0));
    world.plan_all();
    assert_eq!(world.wanted("dynamic").len(), 4);
}

#[test]
fn per_host_follows_the_hosts() {
    let mut world = World::with_hosts(2);
    world.deploy(per_host(with_constraint(manifest("agentd", 0), "host != \"gamma\"")));
    world.settle();
    assert_eq!(world.hosts_of("agentd"), ["alpha", "beta"]);
    assert_eq!(world.status("agentd"), pb::DeploymentStatus::Successful);
    world.join("gamma");
    world.join("delta");
    world.settle();
    assert_eq!(world.hosts_of("agentd"), ["alpha", "beta", "delta"]);
    world.lose("alpha");
    world.settle();
    assert_eq!(world.hosts_of("agentd"), ["alpha", "beta", "delta"], "it comes back with its host");
    assert_eq!(world.ready("agentd"), 2);
    world.set_status("alpha", HostStatus::Connected);
    world.settle();
    assert_eq!(world.ready("agentd"), 3);
    assert!(world.wanted("agentd").iter().all(|instance| instance.epoch == 1));
    world.set_draining("beta", true);
    world.settle();
    assert_eq!(world.hosts_of("agentd"), ["alpha", "delta"]);
}

#[test]
fn count_and_per_host_turn_into_each_other() {
    let mut world = World::with_hosts(2);
    world.deploy(manifest("web", 5));
    world.settle();
    world.deploy(per_host(manifest("web", 5)));
    world.settle();
    assert_eq!(world.hosts_of("web"), ["alpha", "beta"]);
    world.deploy(manifest("web", 3));
    world.settle();
    assert_eq!(world.ready("web"), 3);
}

#[test]
fn lost_instances_are_placed_again_under_the_next_epoch() {
    let mut world = World::with_hosts(3);
    world.deploy(manifest("web", 3));
    world.settle();
    let before = world.wanted("web");
    world.lose("beta");
    world.settle();
    let after = world.wanted("web");
    assert_eq!(world.hosts_of("web"), ["alpha", "alpha", "gamma"]);
    let epochs = |instances: &[pb::InstanceRecord]| {
        instances.iter().map(|i| (i.id, i.ordinal, i.epoch)).collect::<Vec<_>>()
    };
    assert_eq!(epochs(&before), [(1, 0, 1), (2, 1, 1), (3, 2, 1)]);
    assert_eq!(epochs(&after), [(1, 0, 1), (2, 1, 2), (3, 2, 1)]);
    world.set_status("beta", HostStatus::Connected);
    assert_eq!(world.steps(), [], "nothing moves back");
}

#[test]
fn what_must_never_run_twice_waits_until_its_old_host_has_stopped_it() {
    let mut world = World::with_hosts(2);
    let placement = pb::Placement { on_disconnect: pb::OnDisconnect::Stop.into(), ..Default::default() };
    let stop = pb::Stop { signal: 15, grace: seconds(20), ..Default::default() };
    world.deploy(pb::Manifest { placement: Some(placement), stop: Some(stop), ..manifest("db", 1) });
    world.settle();
    let host = world.hosts_of("db").remove(0);
    world.lose(&host);
    let id = world.wanted("db")[0].host_id;
    let fence = lease::fence(Duration::from_secs(20));
    // A wall clock that jumps a year opens nothing.
    world.now += 365 * 86_400 * SECOND;
    assert_eq!(world.steps(), []);
    world.lease_over(HostId(id), fence - Duration::from_millis(1));
    assert_eq!(world.steps(), []);
    // A plan made by a hurried leader is refused as well.
    let place = pb::Place {
        service: "db".into(),
        version: 1,
        host_id: 2,
        instance_id: 1,
        expected_epoch: 1,
        ordinal: 0,
        run: 0,
    };
    world.commit(vec![Step::Place(place)]);
    assert_eq!(world.wanted("db")[0].epoch, 1);
    world.lease_over(HostId(id), fence + Duration::from_millis(1));
    world.settle();
    assert_eq!((world.wanted("db")[0].epoch, world.ready("db")), (2, 1));
}

#[test]
fn what_was_stopping_on_a_lost_host_is_forgotten() {
    let mut world = World::with_hosts(2);
    world.deploy(manifest("web", 2));
    world.settle();
    world.accept(delete("web"));
    world.plan_all();
    world.lose("alpha");
    world.settle();
    assert!(world.state.service("web").is_none());
    assert!(world.last_event("instance_forgotten").contains("forgotten with its lost host alpha"));
}

#[test]
fn needs_hold_back_until_one_is_ready_and_say_so() {
    let mut world = World::with_hosts(1);
    world.deploy(pb::Manifest { needs: vec!["db".into()], ..manifest("web", 2) });
    world.plan_all();
    assert_eq!(world.wanted("web").len(), 0);
    assert_eq!(unplaced(&world, "web"), ["needs db, which does not exist; apply its manifest"]);
    world.deploy(manifest("db", 2));
    world.plan_all();
    assert_eq!(
        explain(&world.state, "web"),
        ["2 instances cannot be placed: needs db, which has no ready instance; `nave status db` says why"]
    );
    world.say(1, running(true));
    world.plan_all();
    assert_eq!(world.wanted("web").len(), 2);
    world.say(1, running(false));
    world.plan_all();
    assert_eq!(world.wanted("web").len(), 2, "what runs is left alone");
}

#[test]
fn a_service_is_stopped_before_what_it_needs() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("db", 1));
    world.deploy(pb::Manifest { needs: vec!["db".into()], ..manifest("web", 1) });
    world.settle();
    world.accept(delete("db"));
    world.accept(delete("web"));
    world.plan_all();
    assert_eq!((world.wanted("db").len(), world.wanted("web").len()), (1, 0));
    assert_eq!(explain(&world.state, "db"), ["web, which needs it, is stopped first"]);
    world.settle();
    assert!(world.state.service("db").is_none());
}

#[test]
fn what_is_scaled_to_none_stops_after_what_needs_it() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("db", 2));
    world.deploy(pb::Manifest { needs: vec!["db".into()], ..manifest("web", 1) });
    world.settle();
    world.accept(scale("db", 0));
    world.accept(scale("web", 0));
    world.plan_all();
    assert_eq!((world.wanted("db").len(), world.wanted("web").len()), (2, 0));
    assert_eq!(explain(&world.state, "db"), ["web, which needs it, is stopped first"]);
    // A version's own patience has no part in that.
    world.now += 200 * SECOND;
    world.plan_all();
    assert_eq!((world.wanted("db").len(), world.status("db")), (2, pb::DeploymentStatus::Running));
    world.settle();
    assert_eq!((world.wanted("db").len(), world.status("db")), (0, pb::DeploymentStatus::Successful));
}

#[test]
fn what_is_needed_waits_only_for_what_goes_too_and_not_for_ever() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("db", 1));
    world.deploy(pb::Manifest { needs: vec!["db".into()], ..manifest("web", 1) });
    world.settle();
    world.accept(scale("db", 0));
    world.plan_all();
    assert_eq!((world.wanted("db").len(), world.wanted("web").len()), (0, 1), "web stays, so it has no say");
    world.accept(scale("db", 1));
    world.settle();
    world.accept(delete("db"));
    world.accept(delete("web"));
    world.plan_all();
    world.deploy(manifest("web", 1));
    world.plan_all();
    assert_eq!(world.wanted("db").len(), 0, "brought back, and it needs nothing now");
    world.settle();
    world.deploy(manifest("db", 1));
    world.deploy(pb::Manifest { needs: vec!["db".into()], ..manifest("web", 1) });
    world.settle();
    world.accept(delete("web"));
    world.accept(scale("db", 0));
    world.plan_all();
    assert_eq!(plan(&world.state, world.now).wake_at, Some(world.now + limits::NEEDED_STOP_WAIT_NS));
    world.now += limits::NEEDED_STOP_WAIT_NS;
    world.plan_all();
    assert_eq!(world.wanted("db").len(), 0, "web does not end");
}

#[test]
fn scaling_down_stops_the_unready_then_the_highest() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("web", 5));
    world.settle();
    world.say(2, running(false));
    world.accept(scale("web", 3));
    world.plan_all();
    assert_eq!(world.wanted("web").iter().map(|i| i.ordinal).collect::<Vec<_>>(), [0, 2, 3]);
    world.settle();
    world.accept(scale("web", 4));
    world.settle();
    assert_eq!(
        world.wanted("web").iter().map(|i| i.ordinal).collect::<Vec<_>>(),
        [0, 2, 3, 1],
        "the gap first"
    );
}

#[test]
fn a_stale_plan_does_no_harm() {
    let mut world = World::with_hosts(2);
    world.deploy(with_cpu(manifest("web", 2), 3000));
    let stale = world.steps();
    world.commit(stale.clone());
    world.commit(stale.clone());
    assert_eq!(world.wanted("web").len(), 2, "the same plan twice places once");
    world.deploy(with_cpu(changed(&manifest("web", 4), "other"), 100));
    world.commit(stale);
    assert_eq!(world.wanted("web").len(), 2, "a plan for an older version places nothing");
}

#[test]
fn a_plan_for_a_host_that_is_gone_or_full_places_nothing() {
    let mut world = World::with_hosts(1);
    world.deploy(with_cpu(manifest("web", 1), 3000));
    let stale = world.steps();
    world.update_facts("alpha", |facts| facts.cpu_millicores = 1000);
    world.commit(stale.clone());
    assert_eq!(world.wanted("web").len(), 0);
    world.update_facts("alpha", |facts| facts.cpu_millicores = 4000);
    world.lose("alpha");
    world.commit(stale.clone());
    assert_eq!(world.wanted("web").len(), 0);
    world.set_status("alpha", HostStatus::Connected);
    world.accept(delete("web"));
    world.commit(stale);
    assert!(world.state.service("web").is_none());
}

#[test]
fn a_stop_that_would_take_too_much_is_skipped() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("web", 3));
    world.settle();
    world.accept(scale("web", 2));
    let steps = world.steps();
    world.say(1, running(false));
    world.commit(steps);
    assert_eq!(world.ready("web"), 2, "the third turned out to be needed");
    world.plan_all();
    assert_eq!(world.wanted("web").iter().map(|i| i.id).collect::<Vec<_>>(), [2, 3]);
}

#[test]
fn slices_add_up_to_the_whole() {
    let mut world = World::with_hosts(2);
    for name in ["a", "b", "c"] {
        world.deploy(manifest(name, 5));
    }
    let mut cursor = PlanCursor::default();
    let mut sizes = Vec::new();
    loop {
        let slice = plan_dirty(&world.state, &mut cursor, world.now, 4);
        if slice.steps.is_empty() && !slice.more {
            break;
        }
        sizes.push(slice.steps.len());
        world.commit(slice.steps.into_iter().map(|step| step.step.unwrap()).collect());
    }
    assert!(sizes.iter().all(|size| *size <= 4), "{sizes:?}");
    assert_eq!(world.state.instances().len(), 15);
    world.steps();
}

#[test]
fn a_lost_proposal_is_planned_again() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("web", 1));
    let lost = world.steps();
    assert_eq!(world.steps(), lost, "nothing was applied, so it is still to do");
}

#[test]
fn an_instance_that_gave_up_moves_after_a_while_each_time_longer() {
    let mut world = World::with_hosts(2);
    world.deploy(manifest("web", 1));
    world.settle();
    let first = world.hosts_of("web");
    world.say(1, failed());
    assert_eq!(world.steps(), []);
    world.now += 30 * SECOND;
    world.plan_all();
    let second = world.hosts_of("web");
    assert_ne!(first, second, "another host first");
    assert_eq!((world.wanted("web")[0].epoch, world.wanted("web")[0].reschedules), (2, 1));
    world.say(1, failed());
    world.now += 30 * SECOND;
    assert_eq!(world.steps(), []);
    world.now += 30 * SECOND;
    world.plan_all();
    assert_eq!(world.wanted("web")[0].epoch, 3);
    assert!(world.last_event("instance_placed").contains("since it gave up on"));
}

#[test]
fn without_hosts_the_way_to_one_is_named() {
    let mut world = World::new();
    world.deploy(manifest("web", 1));
    assert!(unplaced(&world, "web")[0].starts_with("no host has joined yet; `nave token create`"));
    world.join("alpha");
    world.settle();
    assert_eq!((world.ready("web"), explain(&world.state, "web").len()), (1, 0));
}

#[test]
fn explain_tells_of_each_instance_that_is_not_ready() {
    let mut world = World::with_hosts(1);
    world.deploy(with_update(manifest("web", 2), |update| update.auto_revert = false));
    world.plan_all();
    world.say(2, running(false));
    assert_eq!(
        explain(&world.state, "web"),
        [
            "web.0 (i-1) on alpha is placed and has not been started yet",
            "web.1 (i-2) on alpha runs and is not ready",
        ]
    );
    assert!(explain(&world.state, "nope").is_empty());
}

#[test]
fn a_slice_looks_at_so_many_services_and_the_next_goes_on() {
    let mut state = ClusterState::new();
    let command = |body| pb::Command { time_unix_ns: 1, body: Some(body), ..Default::default() };
    state.apply(1, command(Body::InitCluster(pb::InitCluster::default())));
    let count = u64::try_from(limits::LOOKS_PER_SLICE).unwrap() + 10;
    for index in 0..count {
        state.apply(index + 2, command(apply(manifest(&format!("s{index:05}"), 1))));
    }
    let mut cursor = PlanCursor::default();
    let first = plan_dirty(&state, &mut cursor, 1, usize::MAX);
    assert_eq!((first.unplaced.len(), first.more), (limits::LOOKS_PER_SLICE, true));
    let second = plan_dirty(&state, &mut cursor, 1, usize::MAX);
    assert_eq!((second.unplaced.len(), second.more), (10, false));
    assert_eq!(plan_dirty(&state, &mut cursor, 1, usize::MAX).unplaced, []);
}

#[test]
fn a_placement_of_an_older_epoch_is_skipped() {
    let mut world = World::with_hosts(3);
    world.deploy(manifest("db", 1));
    world.settle();
    let place_on = |name: &str, world: &World| pb::Place {
        service: "db".into(),
        version: 1,
        host_id: world.host_id(name).0,
        instance_id: 1,
        expected_epoch: 1,
        ordinal: 0,
        run: 0,
    };
    world.lose("alpha");
    world.commit(vec![Step::Place(place_on("beta", &world))]);
    assert_eq!((world.hosts_of("db"), world.wanted("db")[0].epoch), (vec!["beta".to_owned()], 2));
    world.lose("beta");
    world.commit(vec![Step::Place(place_on("gamma", &world))]);
    assert_eq!(world.wanted("db")[0].epoch, 2);
}

#[test]
fn room_that_a_plan_gave_away_in_vain_is_given_anew() {
    let mut world = World::with_hosts(1);
    for name in ["a", "b"] {
        world.deploy(with_cpu(manifest(name, 1), 3000));
    }
    assert_eq!(world.steps().len(), 1, "for a; b finds no room");
    world.accept(delete("a"));
    assert_eq!(world.steps().len(), 1, "for b, though no room has come free");
}

#[test]
fn where_room_is_scarce_the_higher_priority_is_placed_first() {
    let with_priority = |name: &str, priority| {
        let placement = pb::Placement { priority, ..Default::default() };
        pb::Manifest { placement: Some(placement), ..with_cpu(manifest(name, 1), 3000) }
    };
    let mut world = World::with_hosts(1);
    for (name, priority) in [("a-low", Some(10)), ("b-usual", None), ("c-high", Some(90))] {
        world.deploy(with_priority(name, priority));
    }
    world.settle();
    assert_eq!(world.ready("c-high"), 1);
    world.accept(delete("c-high"));
    world.settle();
    assert_eq!((world.ready("b-usual"), world.ready("a-low")), (1, 0), "unset counts as 50");
    world.deploy(with_priority("d-highest", Some(100)));
    world.settle();
    assert_eq!((world.ready("b-usual"), world.ready("d-highest")), (1, 0), "nothing that runs gives way");
    world.deploy(with_priority("a-low", Some(100)));
    world.accept(delete("b-usual"));
    world.settle();
    assert_eq!(world.ready("a-low"), 1, "of equals the first by name, at its new priority");
}

#[test]
fn a_host_that_has_less_than_before_keeps_what_runs_and_takes_nothing_new() {
    let mut world = World::with_hosts(2);
    world.deploy(with_memory(with_cpu(manifest("web", 4), 1000), 1024 * MIB));
    world.settle();
    world.update_facts("alpha", |facts| (facts.cpu_millicores, facts.memory_bytes) = (1000, 512 * MIB));
    assert_eq!(world.steps(), []);
    world.deploy(with_cpu(manifest("api", 3), 1000));
    world.settle();
    assert_eq!(
        (world.hosts_of("web"), world.ready("web")),
        (["alpha", "alpha", "beta", "beta"].map(str::to_owned).to_vec(), 4)
    );
    assert_eq!(world.hosts_of("api"), ["beta", "beta"]);
    assert_eq!(
        unplaced(&world, "api"),
        [
            "2 of 2 hosts lack cpu: need 1.0 cores, most free is 0.0 on alpha",
            "nearest miss: alpha lacks 1.0 cores",
        ]
    );
    world.update_facts("alpha", |facts| facts.cpu_millicores = 3000);
    world.settle();
    assert_eq!(world.ready("api"), 3);
}

#[test]
fn the_host_that_misses_by_least_is_named() {
    let mut world = World::with_hosts(3);
    world.update_facts("beta", |facts| facts.memory_bytes = 1536 * MIB);
    world.update_facts("gamma", |facts| {
        facts.labels.insert("zone".into(), "b".into());
    });
    world.update_facts("alpha", |facts| (facts.cpu_millicores, facts.memory_bytes) = (2000, 1024 * MIB));
    world.deploy(with_memory(
        with_constraint(with_cpu(manifest("web", 1), 3000), "label.zone != \"b\""),
        2048 * MIB,
    ));
    assert_eq!(
        explain(&world.state, "web"),
        [
            "1 instance cannot be placed: 1 of 3 hosts does not meet label.zone != \"b\"",
            "1 instance cannot be placed: 1 of 3 hosts lacks cpu: need 3.0 cores, most free is 2.0 on alpha",
            "1 instance cannot be placed: 1 of 3 hosts lacks memory: need 2048 MiB, most free is 1536 MiB on beta",
            "1 instance cannot be placed: nearest miss: beta lacks 512 MiB",
        ]
    );
}

#[test]
fn a_host_that_was_lost_takes_new_instances_after_all_others_for_a_while() {
    let mut world = World::with_hosts(2);
    world.lose("alpha");
    world.set_status("alpha", HostStatus::Connected);
    world.deploy(with_cpu(manifest("web", 5), 1000));
    world.settle();
    assert_eq!(
        world.hosts_of("web"),
        ["alpha", "beta", "beta", "beta", "beta"],
        "only what has no room elsewhere"
    );
    world.now += limits::UNSTEADY_NS;
    world.deploy(manifest("api", 2));
    world.settle();
    assert_eq!(world.hosts_of("api"), ["alpha", "beta"]);
}

/// Loses the host of the only instance of a service, which then returns, every few seconds.
#[test]
fn hosts_that_come_and_go_move_an_instance_ever_more_seldom() {
    let mut world = World::with_hosts(3);
    world.deploy(manifest("web", 1));
    world.settle();
    let until = world.now + 3600 * SECOND;
    while world.now < until {
        let host = world.hosts_of("web").remove(0);
        world.lose(&host);
        world.now += 3 * SECOND;
        world.settle();
        world.set_status(&host, HostStatus::Connected);
        world.now += 2 * SECOND;
        world.settle();
    }
    let flapped = &world.wanted("web")[0];
    // Three moves, until its host returns before it is its turn; and the same again every ten minutes.
    assert!((3..=25).contains(&flapped.epoch), "{} epochs in 720 losses", flapped.epoch);
    assert_eq!(world.ready("web"), 1);
    world.now += limits::LOSS_MEMORY_NS;
    let host = world.hosts_of("web").remove(0);
    world.lose(&host);
    world.settle();
    assert_eq!(world.ready("web"), 1, "after ten quiet minutes it moves at once again");
}

#[test]
fn an_instance_whose_hosts_all_die_waits_longer_each_time() {
    let mut world = World::with_hosts(2);
    world.deploy(manifest("web", 1));
    world.settle();
    let mut waits = Vec::new();
    for _ in 0..6 {
        let host = world.hosts_of("web").remove(0);
        world.lose(&host);
        let lost_at = world.now;
        let epoch = world.wanted("web")[0].epoch;
        while world.wanted("web")[0].epoch == epoch {
            world.settle();
            world.now = plan(&world.state, world.now).wake_at.unwrap_or(world.now).max(world.now);
        }
        waits.push((world.wanted("web")[0].placed_unix_ns - lost_at) / SECOND);
        world.set_status(&host, HostStatus::Connected);
    }
    assert_eq!(waits, [0, 1, 2, 4, 8, 16]);
}

#[test]
fn a_placement_for_an_epoch_that_is_over_is_skipped() {
    let mut world = World::with_hosts(2);
    world.deploy(manifest("web", 1));
    world.settle();
    world.say(1, failed());
    world.now += 30 * SECOND;
    let stale = world.steps();
    assert!(matches!(stale[..], [Step::Place(_)]));
    world.commit(stale.clone());
    assert_eq!(world.wanted("web")[0].epoch, 2);
    world.say(1, failed());
    world.now += 60 * SECOND;
    world.commit(stale);
    assert_eq!(world.wanted("web")[0].epoch, 2, "it gave up again, but this step is about the time before");
    world.plan_all();
    assert_eq!(world.wanted("web")[0].epoch, 3);
}

/// Each step of one command is held to the rules as those before it have left things.
#[test]
fn steps_of_one_command_count_together() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("web", 2));
    let place = |version| {
        move |ordinal| {
            let (service, host_id) = ("web".to_owned(), 1);
            Step::Place(pb::Place { service, version, host_id, ordinal, ..Default::default() })
        }
    };
    world.commit((0..5).map(place(1)).collect());
    assert_eq!(world.wanted("web").len(), 2, "two are wanted, whatever else is in the plan");
    world.accept(scale("web", 4));
    world.commit([7, 7].map(place(2)).into());
    assert_eq!(world.wanted("web").len(), 3, "an ordinal is given away once");
    world.settle();
    world.accept(scale("web", 3));
    let stop = |instance_id| Step::Stop(pb::StopInstance { instance_id, epoch: 1, reason: String::new() });
    world.commit((1..=4).map(stop).collect());
    assert_eq!(world.ready("web"), 3);
    world.deploy(changed(&manifest("web", 3), "two"));
    world.commit((1..=4).map(stop).collect());
    assert_eq!(world.ready("web"), 3, "no new one stands for any of them");
}
