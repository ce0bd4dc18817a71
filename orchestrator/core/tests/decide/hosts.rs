//! Enrolment, facts, and what losing a host does.

use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_proto::pb::command::Body;
use nave_proto::pb::observed::State;
use nave_proto::pb::{HostStatus, RejectedCode};

use crate::world::{SECOND, World, facts, manifest, running};

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
    let rename = pb::UpdateHost { host_id: 2, facts: Some(facts("alpha")) };
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
    let back = pb::SetHostStatus { host_id: 1, status: HostStatus::Connected.into(), reason: String::new() };
    assert!(world.refuse(Body::SetHostStatus(back)).1.contains("its name alpha is another host's"));
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
    let update = pb::UpdateHost { host_id: 7, facts: Some(facts("a")) };
    assert_eq!(world.refuse(Body::UpdateHost(update)).0, RejectedCode::NotFound);
    let status = pb::SetHostStatus { host_id: 7, status: HostStatus::Lost.into(), reason: String::new() };
    assert_eq!(world.refuse(Body::SetHostStatus(status)).0, RejectedCode::NotFound);
}

#[test]
fn the_same_facts_again_change_nothing() {
    let mut world = World::with_hosts(1);
    let command = world.command(Body::UpdateHost(pb::UpdateHost { host_id: 1, facts: Some(facts("alpha")) }));
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
