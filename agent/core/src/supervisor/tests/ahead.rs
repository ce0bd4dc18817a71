//! What a successor needs is fetched while the instance runs.

use super::*;

fn order(template_version: u64) -> Option<pb::FetchOrder> {
    let artifact = pb::Artifact { name: "tool".to_owned(), ..Default::default() };
    Some(pb::FetchOrder { template_version, artifacts: vec![artifact], ..Default::default() })
}

impl Scene {
    fn want_fetched(&mut self, template_version: Option<u64>) {
        let fetch = template_version.and_then(order);
        let wanted = pb::WantedInstance { fetch, ..self.supervisor.wanted.clone() };
        self.give(Input::Wanted(Box::new(wanted)));
    }

    fn fetched(&mut self, template_version: u64, problem: Option<&str>) {
        let result = problem.map_or(Ok(()), |problem| Err(problem.to_owned()));
        self.give(Input::Fetched { template_version, result });
    }

    /// Templates that were ordered, 0 for one that was taken back.
    fn fetches(&mut self) -> Vec<u64> {
        let template = |action: Action| {
            if let Action::FetchAhead(order) = &action {
                return Some(order.template_version);
            }
            (action == Action::CancelFetch).then_some(0)
        };
        self.orders().into_iter().filter_map(template).collect()
    }

    fn said(&self) -> Option<(u64, bool, String)> {
        self.report().fetch.map(|fetch| (fetch.template_version, fetch.done, fetch.problem))
    }
}

#[test]
fn it_is_ordered_once_and_told_when_it_is_done() {
    let mut scene = Scene::running(manifest());
    assert_eq!((scene.fetches(), scene.said()), (vec![], None));
    scene.want_fetched(Some(2));
    assert_eq!((scene.fetches(), scene.said()), (vec![2], None));
    scene.pass(seconds(500));
    scene.want_fetched(Some(2));
    assert_eq!(scene.fetches(), Vec::<u64>::new());
    scene.fetched(1, None);
    assert_eq!(scene.said(), None, "that is of another");
    scene.fetched(2, None);
    assert_eq!(scene.said(), Some((2, true, String::new())));
    assert!(matches!(scene.seen(), Seen::Running(_)), "it runs on");

    // The agent that comes next finds it again, and says nothing until it has.
    scene.restart_agent();
    scene.adopt();
    assert_eq!((scene.fetches(), scene.said()), (vec![2], None));
    scene.fetched(2, None);
    assert_eq!(scene.said(), Some((2, true, String::new())));

    scene.want_fetched(Some(3));
    assert_eq!((scene.fetches(), scene.said()), (vec![3], None), "another successor");
    scene.give(Input::Forget);
    assert_eq!((scene.fetches(), scene.said()), (vec![0], None), "the hub names it no longer");
}

#[test]
fn what_fails_is_told_and_tried_again_later_and_later() {
    let mut scene = Scene::running(manifest());
    scene.want_fetched(Some(2));
    assert_eq!(scene.fetches(), [2]);
    let mut last = Duration::ZERO;
    for try_number in 0..9 {
        scene.fetched(2, Some("artifact tool: gone"));
        assert_eq!(scene.said(), Some((2, false, "artifact tool: gone".to_owned())), "{try_number}");
        let wait = scene.supervisor.next_wake().expect("it tries again").since(scene.now);
        assert!(wait <= FETCH_RETRY_MAX.mul_f64(1.2), "{wait:?}");
        assert!(try_number > 6 || wait > last, "{wait:?} after {last:?}");
        last = wait;
        scene.pass(wait / 2);
        assert_eq!(scene.fetches(), Vec::<u64>::new());
        scene.pass(wait / 2 + Duration::from_millis(1));
        assert_eq!(scene.fetches(), [2]);
        assert_eq!(scene.said(), Some((2, false, "artifact tool: gone".to_owned())), "until it is better");
    }
    scene.fetched(2, None);
    assert_eq!(scene.said(), Some((2, true, String::new())));

    scene.want_fetched(None);
    assert_eq!((scene.fetches(), scene.said()), (vec![0], None), "it is wanted no longer");
    scene.fetched(2, None);
    assert_eq!(scene.said(), None, "a late word");
}
