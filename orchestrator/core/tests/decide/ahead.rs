//! What a successor needs is fetched before the old instance of a stop-first service is stopped.

use nave_orchestrator_core::explain;
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use nave_proto::pb::DeploymentStatus;
use nave_proto::pb::command::Body;
use nave_proto::pb::plan_step::Step;

use crate::world::{
    SECOND, World, changed, manifest, pause, promote, report, restart, running, scale, with_artifact,
    with_port, with_update,
};

/// `web` on a fixed port, with an artifact, ready, on the first of so many hosts.
fn deployed(count: u32, hosts: usize) -> (World, pb::Manifest) {
    let first = with_artifact(with_port(manifest("web", count), 8080), "one");
    let mut world = World::with_hosts(hosts);
    world.deploy(first.clone());
    world.settle_for(60);
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
    (world, first)
}

fn next(first: &pb::Manifest, sum: &str) -> pb::Manifest {
    with_artifact(changed(first, sum), sum)
}

/// Instances that are to fetch and have not.
fn fetching(world: &World) -> Vec<u64> {
    let open = |i: &pb::InstanceRecord| i.fetch.as_ref().is_some_and(|fetch| !fetch.done);
    world.wanted("web").iter().filter(|i| open(i)).map(|i| i.id).collect()
}

fn stopping(world: &World) -> Vec<u64> {
    let stops = |i: &&std::sync::Arc<pb::InstanceRecord>| i.desired() == pb::Desired::Stop;
    world.state.instances_of("web").filter(stops).map(|i| i.id).collect()
}

/// The agent of one says how far its fetch for this template is.
fn say(world: &mut World, id: u64, template_version: u64, problem: &str) {
    let instance = world.state.instance(InstanceId(id)).unwrap().clone();
    let (done, problem) = (problem.is_empty(), problem.to_owned());
    let fetch = Some(pb::FetchState { template_version, done, problem });
    let said = report(&instance, instance.attempt.max(1), running(true));
    world.report(instance.host_id, pb::InstanceReport { fetch, ..said });
}

#[test]
fn the_old_one_runs_on_until_its_host_has_what_the_new_one_needs() {
    let (mut world, first) = deployed(3, 5);
    let hosts = world.hosts_of("web");
    world.deploy(next(&first, "two"));
    for _ in 0..3 {
        world.plan_all();
        let one = fetching(&world);
        assert_eq!((one.len(), stopping(&world).len(), world.ready("web")), (1, 0, 3), "max_parallel is 1");
        let why = explain(&world.state, "web").join("\n");
        assert!(why.contains(&format!("(i-{}) runs on until", one[0])), "{why}");
        say(&mut world, one[0], 2, "");
        assert!(world.last_event("instance_fetched").contains(&format!("(i-{})", one[0])));
        world.plan_all();
        assert_eq!(stopping(&world), one, "now it may go");
        assert_eq!(world.wanted("web").iter().filter(|i| i.template_version == 2 && !is_ready(i)).count(), 0);
        world.agents();
        world.plan_all();
        world.agents();
    }
    world.settle();
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
    assert_eq!(world.hosts_of("web"), hosts, "each came where its artifacts are, though others were free");
    assert!(world.service("web").fetched_hosts.is_empty());
}

fn is_ready(instance: &pb::InstanceRecord) -> bool {
    use pb::observed::State;
    let state = instance.observed.as_ref().and_then(|observed| observed.state.as_ref());
    matches!(state, Some(State::Running(running)) if running.ready)
}

#[test]
fn as_many_fetch_at_a_time_as_may_be_replaced_at_a_time() {
    let first = pb::Manifest { per_host: true, ..with_artifact(manifest("web", 0), "one") };
    let first = with_update(first, |update| update.max_parallel = 2);
    let mut world = World::with_hosts(5);
    world.deploy(first.clone());
    world.settle();
    world.deploy(next(&first, "two"));
    world.plan_all();
    let two = fetching(&world);
    assert_eq!(two.len(), 2);
    say(&mut world, two[1], 2, "");
    world.plan_all();
    assert_eq!(
        (stopping(&world), world.ready("web")),
        (vec![two[1]], 4),
        "the one whose artifacts are there"
    );
    world.settle();
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
    assert_eq!(world.hosts_of("web"), ["alpha", "beta", "delta", "epsilon", "gamma"]);
}

#[test]
fn what_cannot_be_fetched_costs_the_deployment_and_no_instance() {
    let (mut world, first) = deployed(2, 3);
    let before: Vec<u64> = world.wanted("web").iter().map(|i| i.id).collect();
    world.unfetched.push(("web".into(), 2, "artifact tool: the sum is another".into()));
    world.deploy(next(&first, "two"));
    for _ in 0..12 {
        world.settle();
        assert_eq!((stopping(&world).len(), world.ready("web")), (0, 2));
        world.now += 9 * SECOND;
    }
    let why = explain(&world.state, "web");
    let sentence = "cannot fetch what version 2 needs: artifact tool: the sum is another";
    assert!(why.iter().any(|why| why.contains("runs on, since") && why.ends_with(sentence)), "{why:?}");
    assert!(world.last_event("instance_fetch_failed").ends_with("artifact tool: the sum is another"));
    world.settle_for(20);
    let service = world.service("web");
    assert_eq!((service.version, world.status("web")), (3, DeploymentStatus::Successful), "reverted");
    assert!(
        world.last_event("deployment_failed").contains(sentence),
        "{}",
        world.last_event("deployment_failed")
    );
    assert_eq!(world.wanted("web").iter().map(|i| i.id).collect::<Vec<_>>(), before);
    assert!(world.wanted("web").iter().all(|i| i.fetch.is_none()), "nobody fetches it any longer");
}

#[test]
fn without_auto_revert_it_fails_and_the_fetch_ends_with_it() {
    let (mut world, first) = deployed(2, 2);
    world.unfetched.push(("web".into(), 2, "artifact tool: gone".into()));
    world.deploy(with_update(next(&first, "two"), |update| update.auto_revert = false));
    world.settle_for(300);
    assert_eq!((world.status("web"), world.ready("web")), (DeploymentStatus::Failed, 2));
    assert!(world.reason("web").contains("artifact tool: gone"), "{}", world.reason("web"));
    assert!(world.wanted("web").iter().all(|i| i.fetch.is_none()));
}

#[test]
fn a_fetch_that_takes_its_time_gives_the_deployment_its_patience_again() {
    let (mut world, first) = deployed(1, 1);
    world.deploy(next(&first, "two"));
    world.plan_all();
    world.now += 115 * SECOND;
    let one = fetching(&world)[0];
    say(&mut world, one, 2, "");
    world.plan_all();
    world.agents();
    world.plan_all();
    world.now += 60 * SECOND;
    world.settle();
    assert_eq!((world.service("web").version, world.status("web")), (2, DeploymentStatus::Successful));
}

#[test]
fn nobody_waits_for_an_agent_that_says_nothing_of_fetches() {
    let (mut world, first) = deployed(2, 2);
    world.update_facts("alpha", |facts| facts.capabilities.clear());
    world.deploy(next(&first, "two"));
    world.plan_all();
    let beta = world.host_id("beta").0;
    let of_beta = |world: &World| world.wanted("web").iter().find(|i| i.host_id == beta).unwrap().id;
    let id = of_beta(&world);
    assert_eq!((fetching(&world), stopping(&world)), (vec![], vec![3 - id]), "that of alpha goes at once");
    world.agents();
    world.plan_all();
    world.agents();
    world.plan_all();
    assert_eq!(fetching(&world), [id]);
    // An older agent takes the place of the one that was asked.
    world.update_facts("beta", |facts| facts.capabilities.clear());
    world.plan_all();
    assert_eq!(stopping(&world), [id]);
}

#[test]
fn what_is_there_already_is_waited_for_by_nobody() {
    let (mut world, first) = deployed(2, 4);
    let hosts = world.hosts_of("web");
    world.deploy(changed(&first, "another command"));
    world.plan_all();
    assert_eq!((fetching(&world).len(), stopping(&world).len()), (0, 1));
    world.settle();
    assert_eq!(world.hosts_of("web"), hosts, "and the new ones come to where it is");
}

#[test]
fn what_makes_way_for_nobody_goes_at_once() {
    let (mut world, first) = deployed(3, 3);
    world.deploy(pb::Manifest { count: 1, ..next(&first, "two") });
    world.plan_all();
    assert_eq!((fetching(&world).len(), stopping(&world).len(), world.ready("web")), (1, 2, 1));
}

#[test]
fn one_that_leaves_its_host_is_not_waited_for_and_another_takes_its_turn() {
    let (mut world, first) = deployed(2, 4);
    world.deploy(next(&first, "two"));
    world.plan_all();
    let one = fetching(&world)[0];
    let host = world.state.instance(InstanceId(one)).unwrap().host_id;
    let host = world.state.hosts().find(|record| record.id == host).unwrap().facts.clone().unwrap().name;
    world.set_draining(&host, true);
    world.plan_all();
    assert_eq!(stopping(&world), [one], "its successor goes elsewhere and fetches there");
    world.lose(&host);
    world.settle();
    assert_eq!((world.ready("web"), world.status("web")), (2, DeploymentStatus::Successful));
}

#[test]
fn a_pause_holds_what_has_been_fetched_for() {
    let (mut world, first) = deployed(1, 1);
    world.deploy(next(&first, "two"));
    world.plan_all();
    world.accept(pause("web", true));
    let one = fetching(&world)[0];
    say(&mut world, one, 2, "");
    world.settle_for(3600);
    assert_eq!((stopping(&world).len(), world.ready("web")), (0, 1));
    // A change that replaces no process asks for nothing anew.
    world.accept(scale("web", 1));
    world.accept(pause("web", false));
    world.plan_all();
    assert_eq!(stopping(&world), [one]);
}

#[test]
fn a_newer_version_takes_back_what_was_asked_for_the_one_before() {
    let (mut world, first) = deployed(1, 1);
    world.deploy(next(&first, "two"));
    world.plan_all();
    let one = fetching(&world)[0];
    world.deploy(next(&first, "three"));
    assert_eq!(fetching(&world), Vec::<u64>::new());
    world.plan_all();
    say(&mut world, one, 2, "");
    world.plan_all();
    assert_eq!((fetching(&world), stopping(&world)), (vec![one], vec![]), "that was for the second");
    say(&mut world, one, 3, "");
    world.plan_all();
    assert_eq!(stopping(&world), [one]);
}

#[test]
fn canaries_alone_fetch_before_the_promotion() {
    let (mut world, first) = deployed(3, 3);
    world.deploy(with_update(next(&first, "two"), |update| update.canary = 1));
    world.plan_all();
    assert_eq!(fetching(&world).len(), 1);
    world.settle();
    assert_eq!(world.wanted("web").iter().filter(|i| i.template_version == 2).count(), 1);
    assert_eq!(fetching(&world).len(), 0, "the others wait for the promotion first");
    world.accept(promote("web"));
    world.plan_all();
    assert_eq!((fetching(&world).len(), world.ready("web")), (1, 3));
    world.settle();
    assert_eq!(world.status("web"), DeploymentStatus::Successful);
}

#[test]
fn an_old_stop_spares_one_whose_fetch_was_taken_back() {
    let (mut world, first) = deployed(1, 1);
    world.deploy(next(&first, "two"));
    world.plan_all();
    let one = fetching(&world)[0];
    say(&mut world, one, 2, "");
    let stale = world.steps();
    assert!(stale.iter().any(|step| matches!(step, Step::Stop(_))));
    world.deploy(next(&first, "three"));
    world.commit(stale);
    assert_eq!(stopping(&world), Vec::<u64>::new());
    // A member of a build before stopped what it stopped, and still does when its log is read.
    let epoch = world.state.instance(InstanceId(one)).unwrap().epoch;
    let stop = pb::StopInstance { instance_id: one, epoch, reason: "replaced".into() };
    let steps = vec![pb::PlanStep { step: Some(Step::Stop(stop)) }];
    let command = world.command(Body::CommitPlan(pb::CommitPlan { steps }));
    world.apply(pb::Command { written_by: 5, ..command });
    assert_eq!(stopping(&world), [one]);
}

#[test]
fn a_place_is_kept_only_while_the_old_one_may_still_leave_it() {
    let (mut world, first) = deployed(1, 2);
    let host = world.hosts_of("web");
    world.deploy(next(&first, "two"));
    world.plan_all();
    let one = fetching(&world)[0];
    say(&mut world, one, 2, "");
    world.plan_all();
    assert_eq!((stopping(&world), world.wanted("web").len()), (vec![one], 0), "the other host is free");
    world.now += 79 * SECOND;
    world.plan_all();
    assert_eq!(world.wanted("web").len(), 0);
    world.now += SECOND;
    world.plan_all();
    assert_ne!(world.hosts_of("web"), host, "it does not end, so the new one goes elsewhere");
}

/// `web` on a fixed port, of which the rest is given.
fn on_a_port(rest: pb::Manifest) -> pb::Manifest {
    let web = with_port(manifest("web", 1), 8080);
    pb::Manifest { env_files: rest.env_files, secrets: rest.secrets, files: rest.files, ..web }
}

fn reading() -> [pb::Manifest; 3] {
    let file = pb::File { path: "a".into(), source: "/etc/a".into(), ..Default::default() };
    [
        pb::Manifest { env_files: vec!["/etc/web.env".into()], ..Default::default() },
        pb::Manifest { secrets: [("key".into(), "/etc/key".into())].into(), ..Default::default() },
        pb::Manifest { files: vec![file], ..Default::default() },
    ]
}

#[test]
fn what_it_reads_is_looked_for_before_the_stop_though_the_old_one_read_it_too() {
    for rest in reading() {
        let mut world = World::with_hosts(2);
        world.deploy(on_a_port(rest));
        world.settle_for(60);
        let host = world.hosts_of("web");
        world.unfetched.push(("web".into(), 2, "env_file /etc/web.env: no such file".into()));
        world.accept(restart("web"));
        for _ in 0..3 {
            world.settle();
            assert_eq!((stopping(&world).len(), world.ready("web")), (0, 1));
        }
        let why = explain(&world.state, "web").join("\n");
        assert!(why.contains("cannot fetch what version 2 needs: env_file /etc/web.env"), "{why}");
        world.unfetched.clear();
        world.settle();
        let service = world.service("web");
        assert_eq!((service.version, world.status("web")), (2, DeploymentStatus::Successful));
        assert_eq!(world.hosts_of("web"), host, "where it was read");
    }
}

#[test]
fn what_the_hub_has_in_full_is_looked_for_by_nobody() {
    let file = pb::File { path: "a".into(), content: "b".into(), ..Default::default() };
    let mut world = World::with_hosts(1);
    world.deploy(on_a_port(pb::Manifest { files: vec![file], ..Default::default() }));
    world.settle();
    world.accept(restart("web"));
    world.plan_all();
    assert_eq!((fetching(&world).len(), stopping(&world).len()), (0, 1));
}

#[test]
fn a_member_that_knows_no_better_is_not_left_behind() {
    let [rest, ..] = reading();
    let mut world = World::of_format(7);
    world.join("alpha");
    world.deploy(on_a_port(rest));
    world.settle();
    world.accept(restart("web"));
    world.plan_all();
    assert_eq!((fetching(&world).len(), stopping(&world).len()), (0, 1), "as all members do it");
    world.settle();
    world.accept(Body::AgreeFormat(pb::AgreeFormat { format: 8 }));
    world.accept(restart("web"));
    world.plan_all();
    assert_eq!((fetching(&world).len(), stopping(&world).len()), (1, 0));
}
