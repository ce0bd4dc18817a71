//! What runs only under a lease: started under one, stopped when it ends, started again with the next.

use super::*;

fn single() -> pb::Manifest {
    let placement = pb::Placement { on_disconnect: pb::OnDisconnect::Stop.into(), ..Default::default() };
    pb::Manifest { placement: Some(placement), ..manifest() }
}

impl Scene {
    fn lease(&mut self, hold: u64) -> Monotonic {
        let until = self.now + seconds(hold);
        self.give(Input::Lease { until });
        until
    }

    fn spawned_under(&mut self) -> Option<Option<Monotonic>> {
        self.orders().into_iter().find_map(|action| {
            let Action::Spawn(order) = action else { return None };
            Some(order.deadline.map(|deadline| deadline.at))
        })
    }
}

#[test]
fn nothing_starts_without_a_lease_or_under_one_that_is_about_to_end() {
    let mut scene = Scene::new(single());
    scene.pass(seconds(60));
    assert_eq!(scene.spawned_under(), None);
    assert_eq!(scene.supervisor.next_wake(), None, "it is woken by the lease");
    scene.give(Input::Lease { until: scene.now + Duration::from_millis(900) });
    assert_eq!(scene.spawned_under(), None);
    let until = scene.lease(9);
    assert_eq!(scene.spawned_under(), Some(Some(until)), "the keeper has it from the start");
}

#[test]
fn the_keepers_deadline_moves_with_each_lease_and_never_back() {
    let mut scene = Scene::new(single());
    scene.lease(9);
    scene.spawned();
    scene.orders();
    let mut deadlines = Vec::new();
    for (pass, hold) in [(1, 9), (1, 9), (0, 3)] {
        scene.pass(seconds(pass));
        scene.lease(hold);
        let key = scene.supervisor.key();
        deadlines.extend(scene.orders().into_iter().filter_map(|action| {
            let Action::SetDeadline { key: of, deadline } = action else { return None };
            (of == key).then_some(deadline)
        }));
    }
    let at = |s: u64| Deadline {
        at: Monotonic::BOOT + seconds(s),
        signal: 15,
        scope: SignalScope::Process,
        grace: seconds(10),
    };
    assert_eq!(deadlines, [at(1_010), at(1_011), at(1_011)]);
}

#[test]
fn a_lease_that_ends_stops_it_and_the_next_one_starts_it_without_cost() {
    let mut scene = Scene::new(single());
    scene.lease(9);
    scene.spawned();
    scene.orders();
    scene.pass(seconds(9) - Duration::from_millis(1));
    assert!(scene.signals().is_empty());
    scene.pass(Duration::from_millis(1));
    assert_eq!(scene.signals(), [(15, SignalScope::Process), (18, SignalScope::Process)]);
    // A lease that comes now does not let it live on.
    scene.lease(9);
    assert!(!scene.orders().iter().any(|action| matches!(action, Action::SetDeadline { .. })));
    scene.pass(seconds(10));
    assert_eq!(scene.signals(), [(9, SignalScope::Process), (9, SignalScope::Group)], "after its grace");
    scene.give(Input::Exited(scene.record(pb::ExitCause::Hub, 0, 9)));
    scene.swept();
    assert_eq!(scene.spawned_under(), None, "that lease is over too");
    let until = scene.lease(9);
    assert_eq!(scene.spawned_under(), Some(Some(until)));
    scene.spawned();
    assert_eq!((scene.report().restarts, scene.supervisor.attempt), (0, 2));
    assert_eq!(scene.supervisor.memory.step, 0, "it was no failure of its own");
}

#[test]
fn what_the_keeper_ended_at_its_deadline_waits_for_a_lease_too() {
    let mut scene = Scene::new(single());
    scene.lease(9);
    scene.spawned();
    scene.orders();
    scene.now = scene.now + seconds(9);
    scene.give(Input::Exited(scene.record(pb::ExitCause::Hub, 0, 15)));
    scene.swept();
    scene.pass(seconds(30));
    assert_eq!(scene.spawned_under(), None);
    scene.lease(9);
    assert!(scene.spawned_under().is_some());
}

#[test]
fn a_successor_that_knows_no_lease_leaves_a_running_process_to_the_keeper() {
    let mut scene = Scene::new(single());
    scene.lease(9);
    scene.spawned();
    let ledger = scene.supervisor.ledger();
    let key = scene.supervisor.key();
    let wanted = scene.supervisor.wanted().clone();
    scene.supervisor = Supervisor::restore(wanted, Some(&ledger), BOOT, scene.now);
    scene.orders();
    scene.give(Input::Adopted { key, process: process(101), started_unix_ns: 1 });
    scene.pass(seconds(60));
    assert!(scene.signals().is_empty());
    let until = scene.lease(9);
    let moved =
        |action: &Action| matches!(action, Action::SetDeadline { deadline, .. } if deadline.at == until);
    assert!(scene.orders().iter().any(moved));
}

#[test]
fn a_stop_for_want_of_a_lease_is_remembered_as_one() {
    let mut scene = Scene::new(single());
    scene.lease(9);
    scene.spawned();
    scene.pass(seconds(9));
    let ledger = scene.supervisor.ledger();
    let wanted = scene.supervisor.wanted().clone();
    let restored = Supervisor::restore(wanted, Some(&ledger), BOOT, scene.now);
    let State::Pending(pending) = restored.state else { panic!("the keeper speaks first") };
    assert!(
        matches!(&*pending.recalled, State::Stopping(Stopping { cause: StopCause::Lease, .. })),
        "{pending:?}"
    );
}

#[test]
fn others_know_nothing_of_leases() {
    let mut scene = Scene::running(manifest());
    assert!(!scene.supervisor.needs_lease());
    scene.orders();
    scene.lease(1);
    scene.pass(seconds(100));
    assert!(scene.signals().is_empty());
}
