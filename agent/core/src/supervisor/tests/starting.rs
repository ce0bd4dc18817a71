//! Starting: the keeper's word, ports, attempts.

use super::*;

#[test]
fn nothing_is_done_before_the_keepers_word() {
    let mut supervisor = Supervisor::new(wanted(manifest(), 1, pb::Desired::Run), BOOT, Monotonic(0));
    let orders = supervisor.step(Monotonic(1), &mut StdRng::seed_from_u64(1), Input::Tick);
    assert!(
        !orders.iter().any(|action| matches!(action, Action::Spawn(_) | Action::PickPorts { .. })),
        "{orders:?}"
    );
    assert!(matches!(supervisor.state, State::Pending(_)));
}

#[test]
fn the_attempt_is_on_disk_before_the_order_is_given() {
    let mut scene = Scene::new(manifest());
    let orders = scene.orders();
    let persist =
        position(&orders, |action| matches!(action, Action::Persist(ledger) if ledger.attempt == 1));
    let spawn = position(&orders, |action| matches!(action, Action::Spawn(order) if order.key.attempt == 1));
    assert!(persist < spawn);
}

#[test]
fn without_a_probe_it_is_ready_once_exec_has_succeeded() {
    let mut scene = Scene::new(manifest());
    assert!(!scene.is_ready());
    scene.spawned();
    assert!(scene.is_ready());
    assert!(matches!(scene.seen(), Seen::Running(pb::observed::Running { ready: true, .. })));
}

#[test]
fn fixed_ports_are_asked_for_by_number_and_dynamic_ones_by_name() {
    let mut scene = Scene::new(with_port(0));
    let dynamic = Action::PickPorts { fixed: BTreeMap::new(), dynamic: vec!["http".to_owned()] };
    assert!(scene.orders().contains(&dynamic));
    let mut scene = Scene::new(with_port(8_080));
    let fixed = Action::PickPorts { fixed: BTreeMap::from([("http".to_owned(), 8_080)]), dynamic: vec![] };
    assert!(scene.orders().contains(&fixed));
}

#[test]
fn ports_are_kept_over_a_restart_but_not_after_a_quick_exit_or_a_clash() {
    let table = [
        (seconds(20), 1, "", false),
        (seconds(20), 1, "bind: Address already in use", true),
        (seconds(1), 1, "", true),
        (seconds(1), 0, "", false),
    ];
    for (uptime, code, message, picks) in table {
        let mut scene = Scene::running(with_port(0));
        scene.pass(uptime);
        scene.orders();
        let exit =
            pb::ExitRecord { message: message.to_owned(), ..scene.record(pb::ExitCause::Exit, code, 0) };
        scene.give(Input::Exited(exit));
        scene.swept();
        scene.pass(seconds(1));
        let picked = scene.orders().iter().any(|action| matches!(action, Action::PickPorts { .. }));
        assert_eq!(picked, picks, "uptime {uptime:?}, status {code}, {message:?}");
    }
}

#[test]
fn a_taken_port_is_the_reason_and_ends_in_failed() {
    let mut scene = Scene::new(with_port(8_080));
    for _ in 0..11 {
        assert_eq!(scene.supervisor.state, State::Starting(Starting::PickingPorts));
        scene.give(Input::PortClash { message: "port 8080 (http) is taken by nginx (pid 7)".to_owned() });
        let reason = scene.report().reason;
        assert!(reason.contains("port 8080 (http) is taken by nginx (pid 7)"), "{reason}");
        scene.pass(scene.supervisor.next_wake().map_or(Duration::ZERO, |at| at.since(scene.now)));
    }
    assert!(matches!(scene.seen(), Seen::Failed(_)));
}

#[test]
fn names_without_a_value_are_in_its_history_once_a_start() {
    use crate::env::UnknownName;
    let unknown = |count: usize| {
        let name = |n: usize| UnknownName { place: format!("file {n}"), name: "NOPE".to_owned() };
        (1..=count).map(name).collect()
    };
    let mut scene = Scene::new(manifest());
    let key = scene.supervisor.key();
    scene.give(Input::NamesUnknown { key, names: unknown(2) });
    scene.give(Input::NamesUnknown { key: ProcessKey { attempt: 7, ..key }, names: unknown(1) });
    scene.spawned();
    let notes = scene.report().notes;
    let [note] = notes.as_slice() else { panic!("one note: {notes:?}") };
    assert_eq!(note.kind, "instance_names_unknown");
    assert!(note.text.starts_with("has no value for ${NOPE} in file 1, ${NOPE} in file 2 (left as written"));
    assert!(note.text.contains("write $${NAME}"), "{}", note.text);
    let logged = scene
        .orders()
        .into_iter()
        .any(|action| matches!(action, Action::Log { level: Level::Warn, message } if message == note.text));
    assert!(logged);

    scene.pass(seconds(60));
    scene.exit(1);
    let key = scene.supervisor.key();
    scene.give(Input::NamesUnknown { key, names: unknown(9) });
    let text = scene.report().notes.pop().unwrap().text;
    assert!(text.contains("in file 5 and 4 more (left"), "{text}");
}
