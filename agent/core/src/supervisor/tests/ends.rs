//! Every end is told, however long the hub does not listen.

use super::super::ends::ENDS_MAX;
use super::*;

impl Scene {
    /// Runs again, whatever it waits for.
    fn runs_again(&mut self) {
        self.pass(seconds(40));
        self.spawned();
    }

    /// Codes of the ends that a report tells.
    fn codes(&self) -> Vec<i32> {
        self.report().ends.into_iter().map(|end| end.exit.unwrap().code).collect()
    }

    fn newest(&self) -> u64 {
        self.report().ends.last().unwrap().number
    }

    /// The hub commits what it was last told of.
    fn committed(&mut self) {
        let newest = self.newest();
        self.supervisor.ends_told(newest);
    }
}

/// Of which no number of ends is too many.
fn tireless() -> pb::Manifest {
    let restart = pb::Restart {
        budget_restarts: 1000,
        budget_window: seconds(300).try_into().ok(),
        ..manifest().restart.unwrap()
    };
    pb::Manifest { restart: Some(restart), ..manifest() }
}

#[test]
fn ends_are_told_until_the_hub_has_them_and_survive_the_agent() {
    let mut scene = Scene::running(manifest());
    for code in 1..=3 {
        scene.exit(code);
        scene.runs_again();
    }
    assert_eq!(scene.codes(), [1, 2, 3]);
    scene.restart_agent();
    scene.adopt();
    scene.exit(4);
    scene.runs_again();
    assert_eq!(scene.codes(), [1, 2, 3, 4]);
    let told = scene.newest();
    scene.exit(5);
    scene.supervisor.ends_told(told);
    assert_eq!(scene.codes(), [5], "the report was made before that one");
    assert_eq!(scene.report().last_exit.unwrap().code, 5);
}

#[test]
fn numbers_go_on_when_all_was_told() {
    let mut scene = Scene::running(manifest());
    scene.exit(1);
    let first = scene.newest();
    scene.committed();
    assert_eq!(scene.codes(), [0_i32; 0]);
    scene.runs_again();
    scene.restart_agent();
    scene.adopt();
    scene.exit(2);
    assert!(scene.newest() > first, "else the hub takes it for one that it has");
    scene.committed();
    let orders = scene.orders().len();
    scene.give(Input::Exited(scene.record(pb::ExitCause::Exit, 2, 0)));
    assert_eq!((scene.codes(), scene.orders().len() < orders), (vec![], true), "told twice, by the keeper");
}

#[test]
fn what_the_hub_has_is_no_news() {
    let mut scene = Scene::running(manifest());
    scene.exit(1);
    scene.runs_again();
    scene.orders();
    scene.committed();
    scene.give(Input::Tick);
    assert_eq!(scene.orders(), [], "neither for it nor for the ledger");
}

#[test]
fn our_own_note_of_an_end_gives_way_to_the_keepers_record() {
    let mut scene = Scene::new(manifest());
    scene.spawn_failed(SpawnErrorKind::System, 12, "cannot fork");
    let number = scene.newest();
    let record = pb::ExitRecord {
        message: "cannot fork: out of memory".to_owned(),
        ..scene.record(pb::ExitCause::ExecError, 0, 0)
    };
    scene.give(Input::Exited(record));
    let [end] = scene.report().ends.try_into().unwrap();
    assert_eq!((end.number, end.exit.unwrap().message.as_str()), (number, "cannot fork: out of memory"));
}

#[test]
fn too_many_to_keep_are_counted() {
    let mut scene = Scene::running(tireless());
    let lost = 7;
    let all = ENDS_MAX + lost;
    for code in 1..=all {
        scene.exit(i32::try_from(code).unwrap());
        scene.runs_again();
    }
    let ends = scene.report().ends;
    assert_eq!((ends.len(), ends[0].lost), (ENDS_MAX, lost as u64));
    assert_eq!(ends[0].exit.as_ref().unwrap().code, i32::try_from(lost).unwrap() + 1);
    assert!(ends[1..].iter().all(|end| end.lost == 0));
    scene.committed();
    scene.exit(99);
    assert_eq!(scene.report().ends[0].lost, 0, "what was missing was told as well");
}

#[test]
fn a_ledger_of_many_ends_stays_small() {
    let mut scene = Scene::running(tireless());
    for _ in 0..2 * ENDS_MAX {
        let message = "ü".repeat(10_000);
        let exit = pb::ExitRecord { message, ..scene.record(pb::ExitCause::Oom, 0, 9) };
        scene.give(Input::Exited(exit));
        scene.swept();
        scene.runs_again();
    }
    let ends = scene.supervisor.ledger().ends;
    assert_eq!(ends.len(), ENDS_MAX);
    for exit in ends.into_iter().filter_map(|end| end.exit) {
        assert!(exit.message.chars().count() <= 200 && exit.service.is_empty(), "{exit:?}");
        assert_eq!(exit.process, None);
    }
}

#[test]
fn an_end_and_what_went_before_it_have_numbers_in_their_order() {
    let mut scene = Scene::running(manifest());
    let key = scene.supervisor.key();
    scene.give(Input::OomOutlived { key, kills: 1, limit_bytes: 64 << 20 });
    scene.give(Input::OomOutlived { key: ProcessKey { attempt: 9, ..key }, kills: 1, limit_bytes: 0 });
    scene.exit(1);
    scene.runs_again();
    let key = scene.supervisor.key();
    scene.give(Input::OomOutlived { key, kills: 3, limit_bytes: 0 });
    let report = scene.report();
    let texts: Vec<_> = report.notes.iter().map(|note| note.text.as_str()).collect();
    let expected = [
        "had a child killed at the memory limit of 64MiB",
        "had 3 children killed as the host ran out of memory",
    ];
    assert_eq!(texts, expected);
    let end = report.ends[0].number;
    assert!(report.notes[0].number < end && end < report.notes[1].number, "{report:?}");
}
