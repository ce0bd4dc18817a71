//! Enrolment, facts, and what losing a host does.

use std::time::Duration;

use nave_orchestrator_core::leaving;
use nave_orchestrator_core::limits::NEEDED_STOP_WAIT_NS;
use nave_proto::ids::HostId;
use nave_proto::lease;
use nave_proto::pb;
use nave_proto::pb::command::Body;
use nave_proto::pb::observed::State;
use nave_proto::pb::{HostStatus, RejectedCode};

use crate::world::{
    SECOND, World, changed, facts, failed, forget, manifest, running, status_of, with_cpu, with_port,
    with_update,
};

fn register(token: &str, key: u8, name: &str) -> Body {
    Body::RegisterHost(pb::RegisterHost {
        token_id: token.into(),
        public_key_sha256: vec![key; 32],
        facts: Some(facts(name)),
    })
}

fn token(id: &str, uses_left: u32, expires_unix_ns: i64) -> Body {
    let token = pb::TokenRecord { id: id.into(), uses_left, expires_unix_ns, ..Default::default() };
    Body::CreateToken(pb::CreateToken { token: Some(token) })
}

#[test]
fn a_token_admits_as_often_as_it_says_until_it_expires() {
    let mut world = World::new();
    world.accept(token("one", 1, world.now + 10 * SECOND));
    assert_eq!(world.refuse(register("none", 1, "alpha")).0, RejectedCode::NotFound);
    assert_eq!(world.accept(register("one", 1, "alpha")).host_id, 1);
    assert_eq!(world.state.token("one").unwrap().uses_left, 0);
    let (code, message) = world.refuse(register("one", 2, "beta"));
    assert_eq!(code, RejectedCode::Expired);
    assert!(message.contains("used up; `nave token create`"), "{message}");
    world.now += 10 * SECOND;
    assert!(world.refuse(register("one", 1, "alpha")).1.contains("has expired"));
    world.accept(Body::RevokeToken(pb::RevokeToken { id: "one".into() }));
    assert_eq!(world.refuse(register("one", 1, "alpha")).0, RejectedCode::NotFound);
}

#[test]
fn the_same_key_keeps_its_host_and_costs_no_use() {
    let mut world = World::new();
    world.accept(token("one", 1, i64::MAX));
    world.accept(register("one", 1, "alpha"));
    assert_eq!(world.accept(register("one", 1, "alpha")).host_id, 1, "also with the last use gone");
    assert_eq!(world.accept(register("t", 1, "renamed")).host_id, 1);
    assert_eq!(world.state.hosts().len(), 1);
    assert_eq!(world.state.token("t").unwrap().uses_left, 1000);
    assert_eq!(world.host_id("renamed"), HostId(1));
    assert!(world.state.host_by_name("alpha").is_none());
    assert_eq!(world.state.host_by_key(&[1; 32]).unwrap().id, 1);
}

#[test]
fn a_name_belongs_to_one_living_host() {
    let mut world = World::new();
    world.accept(register("t", 1, "alpha"));
    world.accept(register("t", 2, "beta"));
    let (code, message) = world.refuse(register("t", 3, "alpha"));
    assert_eq!(code, RejectedCode::Conflict);
    assert!(message.contains("the name alpha belongs to h-1"), "{message}");
    assert_eq!(world.refuse(register("t", 2, "alpha")).0, RejectedCode::Conflict, "by renaming neither");
    let rename = pb::UpdateHost { host_id: 2, facts: Some(facts("alpha")), session: 0 };
    assert_eq!(world.refuse(Body::UpdateHost(rename)).0, RejectedCode::Conflict);
}

#[test]
fn a_lost_host_gives_its_name_up_and_is_forgotten_once_empty() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("web", 1));
    world.settle();
    world.lose("alpha");
    assert_eq!(world.accept(register("t", 9, "alpha")).host_id, 2);
    assert_eq!(world.host_id("alpha"), HostId(2));
    assert!(
        world.refuse(status_of(1, HostStatus::Connected, "")).1.contains("its name alpha is another host's")
    );
    assert!(world.state.host(HostId(1)).is_some(), "it still has an instance");
    world.settle();
    assert_eq!(world.wanted("web")[0].host_id, 2);
    assert!(world.state.host(HostId(1)).is_none());
    world.lose("alpha");
    assert_eq!(world.accept(register("t", 8, "alpha")).host_id, 3, "ids are never used twice");
}

#[test]
fn what_a_host_says_of_itself_must_have_a_name_and_a_key() {
    let mut world = World::new();
    let nameless = pb::HostFacts::default();
    for (key, facts) in [(vec![1; 32], Some(nameless)), (vec![1; 32], None), (vec![1; 3], Some(facts("a")))] {
        let register = pb::RegisterHost { token_id: "t".into(), public_key_sha256: key, facts };
        assert_eq!(world.refuse(Body::RegisterHost(register)).0, RejectedCode::Invalid);
    }
    let update = pb::UpdateHost { host_id: 7, facts: Some(facts("a")), session: 0 };
    assert_eq!(world.refuse(Body::UpdateHost(update)).0, RejectedCode::NotFound);
    assert_eq!(world.refuse(status_of(7, HostStatus::Lost, "")).0, RejectedCode::NotFound);
}

#[test]
fn the_same_facts_again_change_nothing() {
    let mut world = World::with_hosts(1);
    let command = world.command(Body::UpdateHost(pb::UpdateHost {
        host_id: 1,
        facts: Some(facts("alpha")),
        session: 0,
    }));
    assert!(world.apply(command).changes.is_empty());
    world.set_status("alpha", HostStatus::Connected);
    assert_eq!(world.last_event("host_connected"), "");
}

#[test]
fn a_lost_host_takes_its_instances_with_it_until_it_reports_again() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("web", 2));
    world.settle();
    assert_eq!(world.ready("web"), 2);
    world.lose("alpha");
    assert_eq!(world.ready("web"), 0);
    let lost = &world.wanted("web")[0];
    assert!(matches!(lost.observed.as_ref().unwrap().state, Some(State::Lost(_))));
    assert_eq!((lost.ready_since_unix_ns, lost.endpoint()), (0, pb::EndpointState::Unspecified));
    assert!(
        world.last_event("host_lost").contains("alpha (h-1) is lost, and 2 instances with it: in a test")
    );
    let report = pb::ReportInstances { host_id: 1, ..Default::default() };
    assert_eq!(world.refuse(Body::ReportInstances(report)).0, RejectedCode::Conflict, "say hello first");
    world.set_status("alpha", HostStatus::Connected);
    assert!(matches!(world.wanted("web")[0].observed.as_ref().unwrap().state, Some(State::Unknown(_))));
    world.say(1, running(true));
    assert_eq!(world.ready("web"), 1);
    assert_eq!(world.wanted("web")[0].epoch, 1, "nothing was placed again, the host was back in time");
}

#[test]
fn a_drained_host_is_emptied_and_told_so_and_an_undrained_one_is_open_again() {
    let mut world = World::with_hosts(2);
    world.deploy(manifest("web", 3));
    world.settle();
    world.set_draining("alpha", true);
    assert_eq!(
        world.last_event("host_draining"),
        "alpha (h-1) is being drained, 2 instances have to leave it: in a test"
    );
    assert_eq!(world.state.host(HostId(1)).unwrap().drain_reason, "in a test");
    world.plan_all();
    assert_eq!(world.last_event("host_drained"), "", "only the agent's word ends it");
    world.settle();
    assert_eq!((world.hosts_of("web"), world.ready("web")), (vec!["beta".to_owned(); 3], 3));
    assert_eq!(world.last_event("host_drained"), "alpha (h-1) is drained, nothing runs there any more");
    world.set_draining("alpha", false);
    assert_eq!(world.last_event("host_undrained"), "alpha (h-1) is open again: in a test");
    assert_eq!(world.steps(), [], "nothing moves back by itself");
    world.deploy(manifest("api", 1));
    world.settle();
    assert_eq!(world.hosts_of("api"), ["alpha"]);
    let again =
        world.command(Body::SetHostDraining(pb::SetHostDraining { host_id: 1, ..Default::default() }));
    assert!(world.apply(again).changes.is_empty(), "undrained already");
}

#[test]
fn a_host_that_is_given_up_is_replaced_and_its_key_opens_nothing() {
    for status in [HostStatus::Silent, HostStatus::Lost] {
        let mut world = World::with_hosts(2);
        world.deploy(manifest("web", 2));
        world.deploy(pb::Manifest { per_host: true, ..manifest("agentd", 0) });
        world.settle();
        world.set_status("alpha", status);
        let key = world.state.host(HostId(1)).unwrap().public_key_sha256.clone();
        world.forget("alpha");
        assert_eq!(
            world.last_event("host_forgotten"),
            "alpha (h-1) is given up for good: the machine burnt",
            "{status:?}"
        );
        assert!(world.state.host_by_key(&key).is_none());
        assert!(world.state.host_by_name("alpha").is_none());
        assert!(world.state.host(HostId(1)).is_some(), "its instances have yet to leave it");
        for body in [
            forget(1),
            Body::SetHostDraining(pb::SetHostDraining { host_id: 1, draining: true, ..Default::default() }),
            Body::UpdateHost(pb::UpdateHost { host_id: 1, facts: Some(facts("alpha")), session: 0 }),
            status_of(1, HostStatus::Connected, ""),
        ] {
            assert_eq!(world.refuse(body).0, RejectedCode::NotFound);
        }
        world.settle();
        assert!(world.state.host(HostId(1)).is_none());
        assert_eq!(world.hosts_of("web"), ["beta", "beta"]);
        assert_eq!(world.hosts_of("agentd"), ["beta"], "it does not wait for a host that never returns");
        assert_eq!(world.join("alpha"), HostId(3), "the same key joins as a new host");
    }
}

#[test]
fn what_must_never_run_twice_outlives_its_host_until_it_must_have_ended() {
    let mut world = World::with_hosts(2);
    let placement = pb::Placement { on_disconnect: pb::OnDisconnect::Stop.into(), ..Default::default() };
    world.deploy(pb::Manifest { placement: Some(placement), ..manifest("db", 1) });
    world.settle();
    let host = world.hosts_of("db").remove(0);
    world.set_status(&host, HostStatus::Silent);
    world.now += 100 * SECOND;
    let id = world.host_id(&host);
    world.forget(&host);
    world.settle();
    assert_eq!(world.wanted("db")[0].epoch, 1);
    assert!(world.state.host(id).unwrap().forgotten);
    let grace = Duration::from_secs(10);
    world.lease_over(id, lease::fence(grace) - Duration::from_millis(1));
    world.settle();
    assert_eq!(world.wanted("db")[0].epoch, 1);
    world.lease_over(id, lease::fence(grace) + Duration::from_millis(1));
    world.settle();
    assert_eq!((world.wanted("db")[0].epoch, world.ready("db")), (2, 1));
    assert!(world.state.host(id).is_none());
}

#[test]
fn a_connected_host_is_given_up_only_when_drained_and_empty() {
    let mut world = World::with_hosts(2);
    world.deploy(manifest("web", 2));
    world.settle();
    let (code, message) = world.refuse(forget(1));
    assert_eq!(code, RejectedCode::Conflict);
    assert!(
        message.starts_with("alpha (h-1) is connected; empty it with `nave drain alpha` first"),
        "{message}"
    );
    world.set_draining("alpha", true);
    assert!(world.refuse(forget(1)).1.contains("1 instance has still to leave; wait"), "not yet");
    world.settle();
    world.forget("alpha");
    assert!(world.state.host(HostId(1)).is_none(), "at once, for nothing is left on it");
    assert_eq!(world.refuse(forget(1)).0, RejectedCode::NotFound);
}

#[test]
fn names_pass_between_lost_hosts_and_their_successors() {
    let mut world = World::with_hosts(2);
    let placement = pb::Placement { on_disconnect: pb::OnDisconnect::Stop.into(), ..Default::default() };
    world.deploy(pb::Manifest { placement: Some(placement), ..manifest("db", 2) });
    world.settle();
    world.lose("alpha");
    world.accept(register("t", 9, "alpha"));
    assert_eq!(world.host_id("alpha"), HostId(3));
    world.lose("alpha");
    world.forget("alpha");
    assert_eq!(world.host_id("alpha"), HostId(1), "with its successor gone the lost host has its name again");
    world.set_status("alpha", HostStatus::Connected);
    world.settle();
    assert_eq!(world.ready("db"), 2);
}

fn waits(world: &World, host: u64) -> Vec<String> {
    leaving(&world.state, HostId(host)).into_iter().map(|leaving| leaving.waits_for).collect()
}

#[test]
fn a_drain_says_what_each_instance_waits_for() {
    let mut world = World::with_hosts(2);
    world.deploy(with_cpu(manifest("web", 3), 1000));
    world.deploy(with_cpu(manifest("big", 2), 2000));
    world.deploy(pb::Manifest { per_host: true, ..manifest("agentd", 0) });
    world.settle();
    world.set_draining("alpha", true);
    let told = waits(&world, 1);
    assert_eq!(told.len(), 4, "{told:?}");
    assert!(told.contains(&"agentd.0 (i-1) is stopped next".to_owned()), "{told:?}");
    let no_place = "big.0 (i-3) has no other place: 1 of 2 hosts is draining; 1 of 2 hosts lacks cpu: need 2.0 cores, \
                    most free is 1.0 on beta";
    assert!(told.iter().any(|told| told.starts_with(no_place)), "{told:?}");
    world.plan_all();
    let told = waits(&world, 1);
    assert!(told.contains(&"agentd.0 (i-1) is being stopped".to_owned()), "{told:?}");
    let waits_for = "waits for its replacement: web.3 (i-8) on beta is placed and has not been started yet";
    assert!(told.iter().any(|told| told.contains(waits_for)), "{told:?}");
    world.join("gamma");
    world.settle();
    assert_eq!(waits(&world, 1), [""; 0]);
}

#[test]
fn a_drain_moves_a_service_with_a_fixed_port_one_after_another() {
    let mut world = World::with_hosts(4);
    world.deploy(with_port(manifest("web", 2), 8080));
    world.settle();
    assert_eq!(world.hosts_of("web"), ["alpha", "beta"]);
    world.set_draining("alpha", true);
    world.set_draining("beta", true);
    for _ in 0..20 {
        world.plan_once();
        assert!(world.ready("web") >= 1, "max_parallel is 1");
        world.agents();
    }
    assert_eq!((world.hosts_of("web"), world.ready("web")), (vec!["delta".into(), "gamma".into()], 2));
}

#[test]
fn a_drain_does_not_take_what_the_only_other_place_cannot_give() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("web", 2));
    world.settle();
    world.set_draining("alpha", true);
    world.settle_for(600);
    assert_eq!(world.ready("web"), 2, "nothing running is harmed while there is nowhere to go");
    assert_eq!(world.status("web"), pb::DeploymentStatus::Successful);
}

#[test]
fn a_failed_version_holds_up_no_drain() {
    let first = with_update(manifest("web", 2), |update| update.auto_revert = false);
    let mut world = World::with_hosts(2);
    world.deploy(first.clone());
    world.settle();
    world.deploy(changed(&first, "crash"));
    world.plan_all();
    let new = world.wanted("web").into_iter().find(|instance| instance.template_version == 2).unwrap();
    world.say(new.id, failed());
    world.plan_all();
    world.set_draining("beta", true);
    world.plan_all();
    assert!(waits(&world, 2).iter().any(|told| told.contains("waits for its replacement: web.")));
    for _ in 0..10 {
        world.plan_once();
        assert!(world.ready("web") >= 2);
        world.agents();
    }
    assert_eq!(waits(&world, 2), [] as [String; 0]);
    assert_eq!((world.status("web"), world.ready("web")), (pb::DeploymentStatus::Failed, 2));
    let old = world.wanted("web").into_iter().filter(|instance| instance.template_version == 1);
    assert!(
        old.clone().all(|instance| instance.version == 1) && old.count() == 2,
        "as the version that works"
    );
    assert!(world.last_event("instance_stopping").ends_with("beta is being drained"));
}

/// A database and what needs it, one of each on every host, or as many as said.
fn with_needs(hosts: usize, per_host: bool) -> World {
    let mut world = World::with_hosts(hosts);
    let each = |name| pb::Manifest { per_host, ..manifest(name, 1) };
    world.deploy(each("db"));
    world.deploy(pb::Manifest { needs: vec!["db".into()], ..each("web") });
    world.settle();
    world
}

fn left_on(world: &World, host: &str, service: &str) -> usize {
    let host = world.host_id(host).0;
    world.wanted(service).iter().filter(|instance| instance.host_id == host).count()
}

#[test]
fn what_is_needed_leaves_a_drained_host_last() {
    let mut world = with_needs(2, true);
    world.set_draining("alpha", true);
    world.plan_all();
    assert_eq!((left_on(&world, "alpha", "web"), left_on(&world, "alpha", "db")), (0, 1));
    let told = waits(&world, world.host_id("alpha").0);
    assert!(
        told.iter().any(|t| t.ends_with("stays until web, which needs it, is gone from here")),
        "{told:?}"
    );
    world.settle();
    assert_eq!(waits(&world, world.host_id("alpha").0), [] as [String; 0]);
    // Brought back in between, all of it stays.
    world.set_draining("beta", true);
    world.plan_all();
    world.set_draining("beta", false);
    world.settle();
    assert_eq!((left_on(&world, "beta", "web"), left_on(&world, "beta", "db")), (1, 1));
}

#[test]
fn a_drain_moves_what_is_needed_after_what_needs_it() {
    // With a fixed port it has to stop before it can start elsewhere, which what needs it has done by then.
    for fixed in [false, true] {
        let mut world = World::with_hosts(2);
        world.update_facts("beta", |facts| facts.cpu_millicores = 0);
        let db = with_cpu(manifest("db", 1), 100);
        world.deploy(if fixed { with_port(db, 8080) } else { db });
        world.deploy(pb::Manifest { needs: vec!["db".into()], ..with_cpu(manifest("web", 1), 100) });
        world.settle();
        world.update_facts("beta", |facts| facts.cpu_millicores = 4000);
        world.set_draining("alpha", true);
        for _ in 0..10 {
            world.plan_once();
            let (web, db) = (left_on(&world, "alpha", "web"), left_on(&world, "alpha", "db"));
            assert!(web == 0 || db == 1, "the database left first");
            world.agents();
        }
        let moved = (left_on(&world, "beta", "web"), left_on(&world, "beta", "db"));
        assert_eq!((moved, waits(&world, world.host_id("alpha").0)), ((1, 1), Vec::new()), "{fixed}");
    }
}

#[test]
fn a_drain_does_not_wait_for_ever_for_what_cannot_leave() {
    let mut world = World::with_hosts(2);
    world.update_facts("beta", |facts| facts.cpu_millicores = 100);
    world.deploy(with_cpu(manifest("db", 1), 100));
    let web = with_cpu(manifest("web", 1), 1000);
    world.deploy(pb::Manifest { needs: vec!["db".into()], ..web });
    world.settle();
    let db = world.wanted("db")[0].id;
    if left_on(&world, "alpha", "db") == 0 {
        world.set_draining("beta", true);
        world.settle();
        world.set_draining("beta", false);
    }
    world.set_draining("alpha", true);
    world.settle();
    assert_eq!((left_on(&world, "alpha", "db"), left_on(&world, "alpha", "web")), (1, 1));
    world.settle_for(NEEDED_STOP_WAIT_NS / SECOND);
    assert_eq!((left_on(&world, "alpha", "db"), left_on(&world, "alpha", "web")), (0, 1), "db was {db}");
}

#[test]
fn what_is_not_ready_leaves_a_drained_host_though_others_need_it() {
    let mut world = World::with_hosts(2);
    world.update_facts("beta", |facts| facts.cpu_millicores = 0);
    // It has to stop here before it can start there, and what needs it moves only once it is ready.
    let template = world.deploy(with_port(with_cpu(manifest("db", 1), 100), 8080));
    world.deploy(pb::Manifest { needs: vec!["db".into()], ..with_cpu(manifest("web", 1), 100) });
    world.settle();
    world.update_facts("beta", |facts| facts.cpu_millicores = 4000);
    world.sick.push(("db".into(), template));
    world.say(world.wanted("db")[0].id, running(false));
    world.set_draining("alpha", true);
    world.settle();
    assert_eq!((left_on(&world, "alpha", "db"), left_on(&world, "alpha", "web")), (0, 1));
    world.sick.clear();
    world.settle();
    assert_eq!(waits(&world, world.host_id("alpha").0), [] as [String; 0]);
}

#[test]
fn a_drain_waits_for_what_the_service_needs() {
    let mut world = World::with_hosts(2);
    world.deploy(manifest("db", 1));
    world.deploy(pb::Manifest { needs: vec!["db".into()], ..manifest("web", 1) });
    world.settle();
    let db = world.wanted("db")[0].id;
    let host = world.hosts_of("web").remove(0);
    world.say(db, running(false));
    world.set_draining(&host, true);
    world.plan_all();
    assert_eq!(world.ready("web"), 1, "its replacement could not start, so it stays");
    let told = waits(&world, world.host_id(&host).0);
    assert!(
        told.iter().any(|told| told.contains("has no other place: needs db, which has no ready")),
        "{told:?}"
    );
}
