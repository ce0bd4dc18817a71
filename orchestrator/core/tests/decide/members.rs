//! Members reserved, settled and retired: ids that never come back, and requests that may be repeated.

use nave_proto::pb;
use nave_proto::pb::RejectedCode;
use nave_proto::pb::change_member::Change;
use nave_proto::pb::command::Body;

use crate::world::World;

fn change(id_floor: u64, change: Change) -> Body {
    Body::ChangeMember(pb::ChangeMember { id_floor, change: Some(change) })
}

fn reserve(floor: u64, address: &str, replaces: u64) -> Body {
    let (name, address) = (String::new(), address.to_owned());
    change(floor, Change::Reserve(pb::ReserveMember { name, address, replaces }))
}

fn settle(id: u64) -> Body {
    change(0, Change::Settle(pb::SettleMember { id }))
}

fn retire(floor: u64, id: u64) -> Body {
    change(floor, Change::Retire(pb::RetireMember { id }))
}

fn cluster(world: &World) -> pb::ClusterRecord {
    world.state.cluster().unwrap().clone()
}

#[test]
fn ids_are_never_used_twice() {
    let mut world = World::new();
    assert_eq!(world.accept(reserve(4, "a:1", 0)).member_id, 4);
    assert_eq!(world.accept(retire(4, 4)).member_id, 4);
    assert_eq!(
        world.accept(reserve(4, "a:1", 0)).member_id,
        5,
        "the membership does not know of m-4 any more"
    );
    assert_eq!(world.accept(reserve(9, "b:1", 0)).member_id, 9, "the membership knows of m-8");
    assert_eq!(cluster(&world).retired_members, [4]);
}

#[test]
fn the_same_request_gets_the_same_member() {
    let mut world = World::new();
    let first = world.accept(reserve(4, "a:1", 2));
    let again = world.accept(reserve(4, "a:1", 2));
    assert_eq!((again.member_id, again.duplicate), (first.member_id, true));
    assert_eq!(world.refuse(reserve(4, "a:1", 3)).0, RejectedCode::Conflict, "another place");
    assert_eq!(world.refuse(reserve(4, "b:1", 2)).0, RejectedCode::Conflict, "that place is being taken");
    assert!(world.accept(retire(4, first.member_id)).member_id == first.member_id);
    assert!(world.accept(retire(4, first.member_id)).duplicate);
}

#[test]
fn a_settled_replacement_retires_the_old_one_and_an_abandoned_one_does_not() {
    let mut world = World::new();
    let new = world.accept(reserve(4, "a:1", 2)).member_id;
    world.accept(settle(new));
    assert_eq!((cluster(&world).joining.len(), cluster(&world).retired_members), (0, vec![2]));
    assert_eq!(world.refuse(settle(new)).0, RejectedCode::NotFound);
    let next = world.accept(reserve(4, "b:1", 3)).member_id;
    world.accept(retire(4, next));
    assert_eq!(cluster(&world).retired_members, [2, next]);
}

#[test]
fn a_founding_member_can_be_retired_and_a_stranger_cannot() {
    let mut world = World::new();
    assert_eq!(world.refuse(retire(4, 4)).0, RejectedCode::NotFound);
    world.accept(retire(4, 3));
    assert_eq!(
        world.accept(reserve(3, "a:1", 0)).member_id,
        4,
        "m-3 has left the membership, its id stays known"
    );
}

#[test]
fn only_so_many_join_at_once() {
    let mut world = World::new();
    for number in 0..nave_orchestrator_core::limits::MEMBERS_JOINING_MAX {
        world.accept(reserve(4, &format!("a:{}", number + 1), 0));
    }
    assert_eq!(world.refuse(reserve(4, "z:1", 0)).0, RejectedCode::Exhausted);
}
