//! Limits that change while a process runs.

use super::*;

fn with(cpu_millicores: u64, nice: i32) -> pb::Manifest {
    let resources = pb::Resources { cpu_millicores, nice, ..Default::default() };
    pb::Manifest { resources: Some(resources), ..manifest() }
}

impl Scene {
    fn given(&mut self) -> Vec<u64> {
        let cpu = |action: Action| {
            let Action::SetLimits { resources, .. } = action else { return None };
            Some(resources.cpu_millicores)
        };
        self.orders().into_iter().filter_map(cpu).collect()
    }

    fn limits_set(&mut self, refused: &[(&str, bool)]) {
        let refused =
            refused.iter().map(|&(what, may_pass)| LimitRefused { what: what.to_owned(), may_pass });
        self.give(Input::LimitsSet { key: self.supervisor.key(), refused: refused.collect() });
    }

    fn last_note(&self) -> Option<String> {
        self.report().notes.last().map(|note| note.text.clone())
    }
}

#[test]
fn new_limits_are_given_once_and_to_the_process_that_runs() {
    let mut scene = Scene::running(with(100, 0));
    assert_eq!(scene.given(), Vec::<u64>::new(), "it was started with them");
    scene.want(with(200, 0), 1, pb::Desired::Run);
    assert_eq!(scene.given(), [200]);
    scene.limits_set(&[]);
    scene.pass(seconds(100));
    scene.want(with(200, 0), 1, pb::Desired::Run);
    assert_eq!((scene.given(), scene.last_note()), (vec![], None));
    assert!(matches!(scene.seen(), Seen::Running(_)));

    // While it is started: it has those of the order, and gets the newer ones then.
    let mut scene = Scene::new(with(100, 0));
    scene.want(with(300, 0), 1, pb::Desired::Run);
    assert_eq!(scene.given(), Vec::<u64>::new());
    scene.spawned();
    assert_eq!(scene.given(), [300]);

    // What the agent before did is not known.
    scene.restart_agent();
    let key = scene.supervisor.key();
    scene.give(Input::Adopted { key, process: process(101), started_unix_ns: 1 });
    assert_eq!(scene.given(), [300]);
}

#[test]
fn a_refusal_is_noted_once_and_what_may_pass_is_tried_again() {
    let mut scene = Scene::running(with(100, 0));
    scene.want(with(200, 0), 1, pb::Desired::Run);
    scene.limits_set(&[("memory of 8MiB: it uses 20MiB", true)]);
    let note = scene.last_note().unwrap();
    assert_eq!(note, "could not be given a new limit: memory of 8MiB: it uses 20MiB");
    scene.orders();
    scene.pass(Duration::from_millis(29_999));
    assert_eq!(scene.given(), Vec::<u64>::new());
    scene.pass(Duration::from_millis(1));
    assert_eq!(scene.given(), [200]);
    scene.limits_set(&[("memory of 8MiB: it uses 20MiB", true)]);
    assert_eq!(scene.report().notes.len(), 1);
    scene.pass(seconds(30));
    scene.limits_set(&[]);
    assert_eq!(scene.last_note().unwrap(), "has its new limits now");
    scene.orders();
    scene.want(with(300, 0), 1, pb::Desired::Run);
    scene.limits_set(&[("cpu: this host has no controller for it", false)]);
    scene.orders();
    scene.pass(seconds(3_600));
    assert_eq!(scene.given(), Vec::<u64>::new(), "that will not change by itself");
}
