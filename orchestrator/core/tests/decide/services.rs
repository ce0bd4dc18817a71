//! Apply, delete, scale, restart, roll back: what each answers, which versions and rows they make.

use nave_orchestrator_core::limits;
use nave_proto::pb;
use nave_proto::pb::RejectedCode;
use nave_proto::pb::apply_service_response::Outcome;
use nave_proto::pb::command::Body;

use crate::world::{World, apply, changed, delete, manifest, restart, rollback, scale, with_port};

fn expecting(manifest: pb::Manifest, version: u64) -> Body {
    Body::ApplyService(pb::ApplyService {
        manifest: Some(Box::new(manifest)),
        expected_version: Some(version),
    })
}

fn needing(name: &str, needs: &[&str]) -> pb::Manifest {
    let needs = needs.iter().map(|name| (*name).to_owned()).collect();
    pb::Manifest { needs, ..manifest(name, 1) }
}

#[test]
fn versions_rise_with_changes_and_not_without() {
    let mut world = World::new();
    let first = manifest("web", 0);
    let mut outcome = |body| {
        let accepted = world.accept(body);
        (accepted.version, accepted.outcome())
    };
    assert_eq!(outcome(apply(first.clone())), (1, Outcome::Created));
    assert_eq!(outcome(apply(first.clone())), (1, Outcome::Unchanged));
    assert_eq!(outcome(apply(changed(&first, "other"))), (2, Outcome::Updated));
    assert_eq!(outcome(scale("web", 3)), (3, Outcome::Updated));
    assert_eq!(outcome(scale("web", 3)), (3, Outcome::Unchanged));
    assert_eq!(outcome(restart("web")), (4, Outcome::Updated));
    assert_eq!(outcome(rollback("web", 1)), (5, Outcome::Updated));
    assert_eq!(outcome(rollback("web", 5)), (5, Outcome::Unchanged));
    let causes: Vec<_> = world.state.service_versions("web").map(|version| version.cause.clone()).collect();
    assert_eq!(causes, ["apply", "apply", "scale", "restart", "rollback to 1"]);
    assert!(world.state.service_versions("web").all(|version| version.manifest.is_some()));
    assert_eq!(world.state.manifest("web", 2).unwrap().command, ["other"]);
}

#[test]
fn template_changes_only_with_what_a_process_is_started_with() {
    let mut world = World::with_hosts(1);
    let first = manifest("web", 1);
    world.deploy(first.clone());
    world.settle();
    let template = |world: &World| world.service("web").template_version;
    world.accept(scale("web", 2));
    assert_eq!(template(&world), 1);
    world.deploy(pb::Manifest { needs: vec!["db".into()], count: 2, ..first.clone() });
    assert_eq!(template(&world), 1);
    assert_eq!(
        world.wanted("web").iter().map(|i| i.version).collect::<Vec<_>>(),
        [3],
        "relabelled as it runs"
    );
    world.accept(restart("web"));
    assert_eq!(template(&world), 4);
    world.deploy(changed(&first, "other"));
    assert_eq!(template(&world), 5);
}

#[test]
fn going_back_while_old_instances_still_run_takes_them_over() {
    let mut world = World::with_hosts(1);
    let first = manifest("web", 2);
    world.deploy(first.clone());
    world.settle();
    world.deploy(changed(&first, "other"));
    world.plan_all();
    world.deploy(first);
    let service = world.service("web");
    assert_eq!((service.version, service.template_version), (3, 1));
    let kept = world
        .wanted("web")
        .iter()
        .filter(|i| i.version == 3 && i.epoch == 1 && i.template_version == 1)
        .count();
    assert_eq!(kept, 2);
    world.settle();
    assert_eq!(world.wanted("web").len(), 2);
    assert!(world.wanted("web").iter().all(|instance| instance.id <= 2), "nothing was started anew");
}

#[test]
fn expected_version_guards_against_others() {
    let mut world = World::with_hosts(1);
    let (code, message) = world.refuse(expecting(manifest("web", 1), 3));
    assert_eq!(
        (code, message.as_str()),
        (RejectedCode::Conflict, "web does not exist, so it is not at version 3")
    );
    world.accept(expecting(manifest("web", 1), 0));
    assert_eq!(world.refuse(expecting(manifest("web", 2), 0)).1, "web exists, at version 1");
    assert_eq!(world.refuse(expecting(manifest("web", 2), 2)).1, "web is at version 1, not 2");
    world.accept(expecting(manifest("web", 2), 1));
    world.settle();
    world.accept(delete("web"));
    assert_eq!(world.refuse(expecting(manifest("web", 2), 0)).1, "web is still being deleted");
}

#[test]
fn a_cycle_in_needs_is_refused_by_its_names() {
    let mut world = World::new();
    world.deploy(needing("a", &["b"]));
    world.deploy(needing("b", &["x", "c"]));
    for (name, needs, path) in
        [("c", &["a"][..], "c -> a -> b -> c"), ("c", &["y", "b"], "c -> b -> c"), ("c", &["c"], "c -> c")]
    {
        let (code, message) = world.refuse(apply(needing(name, needs)));
        assert_eq!(code, RejectedCode::Invalid);
        assert!(message.contains(&format!("cycle: {path};")), "{message}");
    }
    world.deploy(needing("c", &["d"]));
    world.deploy(needing("a", &["b", "c"]));
    let needing_b: Vec<_> = world.state.services_needing("b").collect();
    assert_eq!(needing_b, ["a"]);
}

#[test]
fn a_service_is_gone_with_its_last_instance_and_can_come_back_before() {
    let mut world = World::with_hosts(2);
    world.deploy(manifest("web", 2));
    world.settle();
    world.accept(delete("web"));
    assert!(world.service("web").deleting);
    assert_eq!(world.accept(delete("web")).outcome(), Outcome::Unchanged);
    for body in [scale("web", 5), restart("web"), rollback("web", 1)] {
        assert_eq!(world.refuse(body).0, RejectedCode::Conflict);
    }
    world.plan_all();
    assert_eq!(world.deploy(manifest("web", 2)), 2, "un-deleted, though the manifest is the same");
    world.settle();
    assert_eq!((world.ready("web"), world.service("web").deleting), (2, false));
    world.accept(delete("web"));
    world.settle();
    assert!(world.state.service("web").is_none());
    assert_eq!(world.state.service_versions("web").count(), 0);
    assert!(world.last_event("service_deleted").contains("web is gone"));
    assert_eq!(world.deploy(manifest("web", 1)), 1, "a new life begins at version 1");
}

#[test]
fn a_service_without_instances_is_deleted_at_once() {
    let mut world = World::new();
    world.deploy(manifest("web", 0));
    world.accept(delete("web"));
    assert!(world.state.service("web").is_none());
    assert_eq!(world.refuse(delete("web")).0, RejectedCode::NotFound);
}

#[test]
fn a_service_that_wants_nothing_is_done_as_it_is_applied() {
    let mut world = World::new();
    world.deploy(manifest("web", 0));
    assert_eq!(world.status("web"), pb::DeploymentStatus::Successful);
    assert_eq!(world.service("web").stable_version, 1);
    assert_eq!(world.steps(), []);
}

#[test]
fn applying_without_instances_touches_few_rows() {
    let mut world = World::new();
    let request_id = Some(pb::RequestId { client_id: "c".into(), serial: 1 });
    let command = pb::Command { request_id, ..world.command(apply(manifest("web", 0))) };
    let applied = world.apply(command);
    let keys: Vec<u8> = applied.changes.iter().map(|change| change.key()[0]).collect();
    assert_eq!(keys, [2, 3, 6, 8], "service, version, event, dedup");
}

#[test]
fn versions_are_kept_by_number_and_the_stable_one_with_them() {
    let mut world = World::with_hosts(1);
    let first = manifest("web", 1);
    world.deploy(first.clone());
    world.settle();
    assert_eq!(world.service("web").stable_version, 1);
    world.sick = (2..40).map(|template| ("web".into(), template)).collect();
    for number in 0..20 {
        world.deploy(changed(&first, &format!("v{number}")));
        world.settle();
    }
    let kept: Vec<_> = world.state.service_versions("web").map(|version| version.version).collect();
    assert_eq!(kept[0], 1, "the stable one, which also runs");
    assert_eq!(kept[1..], (12..=21).collect::<Vec<_>>());
    assert_eq!(world.service("web").oldest_version, 1);
    assert_eq!(kept.len(), limits::VERSIONS_KEPT + 1);
}

#[test]
fn rollback_goes_to_the_last_stable_version_that_differs() {
    let mut world = World::with_hosts(1);
    let first = manifest("web", 1);
    world.deploy(first.clone());
    let (code, message) = world.refuse(rollback("web", 0));
    assert_eq!(code, RejectedCode::NotFound);
    assert!(message.contains("no earlier version that was fully ready"), "{message}");
    world.settle();
    world.deploy(changed(&first, "two"));
    world.settle();
    world.accept(restart("web"));
    world.settle();
    world.accept(rollback("web", 0));
    assert_eq!(world.service("web").manifest.as_ref().unwrap().command, ["serve"]);
    assert!(world.refuse(rollback("web", 99)).1.contains("no version 99; kept are 1, 2, 3, 4"));
}

#[test]
fn scaling_what_cannot_be_scaled_is_refused() {
    let mut world = World::new();
    world.deploy(pb::Manifest { per_host: true, ..manifest("agentd", 0) });
    assert!(world.refuse(scale("agentd", 3)).1.contains("once per host"));
    assert_eq!(world.refuse(scale("nope", 3)).0, RejectedCode::NotFound);
    world.deploy(manifest("web", 1));
    assert_eq!(world.refuse(scale("web", limits::COUNT_MAX + 1)).0, RejectedCode::Invalid);
    let many = manifest("many", limits::COUNT_MAX + 1);
    assert_eq!(world.refuse(apply(many)).0, RejectedCode::Invalid);
    assert_eq!(world.refuse(apply(pb::Manifest::default())).0, RejectedCode::Invalid);
}

#[test]
fn addresses_and_uids_are_allotted_once_needed_and_rest_before_reuse() {
    let mut world = World::new();
    world.deploy(with_port(manifest("idle", 0), 0));
    assert_eq!((world.service("idle").address_suffix, world.service("idle").uid), (0, 0));
    world.deploy(manifest("portless", 1));
    world.deploy(with_port(pb::Manifest { user: "www".into(), ..manifest("web", 1) }, 0));
    let portless = (world.service("portless").address_suffix, world.service("portless").uid);
    let web = (world.service("web").address_suffix, world.service("web").uid);
    assert_eq!(portless, (0, *limits::UIDS.start()));
    assert_eq!(web, (*limits::ADDRESS_SUFFIXES.start(), 0));
    world.accept(scale("idle", 1));
    let idle = (world.service("idle").address_suffix, world.service("idle").uid);
    assert_eq!(idle, (web.0 + 1, portless.1 + 1));
    world.accept(delete("web"));
    world.deploy(with_port(manifest("next", 1), 0));
    assert_eq!(world.service("next").address_suffix, idle.0 + 1, "a freed one is not the next one");
    world.deploy(with_port(manifest("idle", 5), 0));
    assert_eq!(world.service("idle").address_suffix, idle.0, "kept over versions");
}
