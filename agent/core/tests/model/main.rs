//! A random walk over everything that can happen to a host, checked after every step: never two processes of one
//! instance, no signal to what has ended, budget and back-off kept, an agent that dies at any moment repeats and
//! forgets nothing, and once the faults stop every wish comes true. A failing case is shrunk, and replays.

mod hub;
mod keeper;
mod oracle;
mod world;

use std::time::Duration;

use keeper::Temper;
use nave_agent_core::supervisor::ProbeKind;
use nave_proto::pb;
use oracle::{BUDGET, WINDOW};
use proptest::prelude::*;
use world::World;

const INSTANCES: u64 = 3;

#[derive(Debug, Clone)]
enum Event {
    Turns(usize),
    Pass(u64),
    Exit(u64, i32),
    Next(Temper, usize),
    Probe(u64, bool, bool),
    HookEnds(u64, bool),
    Run(u64),
    Stop(u64),
    Remove(u64),
    StopAll,
    GiveUp,
    PlaceAgain(u64),
    Change(u64),
    /// Something is to be fetched for its successor, or nothing any more.
    Fetch(u64, Option<u64>),
    HubCommits,
    /// Whether the agent hears that the one before is committed.
    Report(bool),
    AgentDies,
    ConnectionLost,
    Reboot,
}

/// Each needs the next one.
fn manifest(instance: u64, health: bool) -> pb::Manifest {
    let seconds = |s| Duration::from_secs(s).try_into().ok();
    let probe =
        pb::Probe { check: Some(pb::probe::Check::Tcp(true)), interval: seconds(1), ..pb::Probe::default() };
    let health =
        health.then(|| pb::Health { ready: Some(probe.clone()), live: Some(probe), ..Default::default() });
    pb::Manifest {
        name: format!("s{instance}"),
        needs: (instance < INSTANCES).then(|| format!("s{}", instance + 1)).into_iter().collect(),
        ports: [("http".to_owned(), pb::Port::default())].into(),
        health,
        restart: Some(pb::Restart {
            policy: pb::RestartPolicy::Always.into(),
            budget_restarts: BUDGET,
            budget_window: WINDOW.try_into().ok(),
            ..Default::default()
        }),
        stop: Some(pb::Stop { signal: 15, grace: seconds(10), ..Default::default() }),
        // The last one has none: nothing runs in its cgroup beside it.
        hooks: (instance < INSTANCES).then(|| pb::Hooks {
            pre_start: hook(),
            post_start: hook(),
            pre_stop: hook(),
            post_stop: hook(),
        }),
        ..pb::Manifest::default()
    }
}

fn hook() -> Option<pb::Hook> {
    let timeout = Duration::from_secs(5).try_into().ok();
    Some(pb::Hook { command: vec!["true".to_owned()], timeout })
}

fn without_hooks(mut wanted: pb::WantedInstance) -> pb::WantedInstance {
    if let Some(manifest) = &mut wanted.manifest {
        manifest.hooks = None;
    }
    wanted
}

fn run(instance: u64, epoch: u64, health: bool) -> pb::WantedInstance {
    pb::WantedInstance {
        instance_id: instance,
        epoch,
        desired: pb::Desired::Run.into(),
        manifest: Some(manifest(instance, health)),
        ..pb::WantedInstance::default()
    }
}

fn happen(world: &mut World, event: &Event, epochs: &mut u64) {
    match *event {
        Event::Turns(turns) => (0..turns).for_each(|_| {
            world.turn();
            world.check_stirred();
            world.check_marks();
        }),
        Event::Pass(ms) => world.pass(Duration::from_millis(ms)),
        Event::Exit(instance, code) => world.exit(instance, code),
        Event::Next(temper, times) => world.keeper.next.extend(vec![temper; times]),
        Event::Probe(instance, live, passed) => {
            world.probe(instance, if live { ProbeKind::Live } else { ProbeKind::Ready }, passed);
        }
        Event::HookEnds(instance, succeeds) => drop(world.hook_ends(instance, succeeds)),
        Event::Run(instance) => {
            *epochs += 1;
            let epoch = *epochs;
            world.wish(instance, |wish| {
                let mut wish = wish.unwrap_or_else(|| run(instance, epoch, true));
                wish.desired = pb::Desired::Run.into();
                Some(wish)
            });
        }
        Event::Stop(instance) => world.wish(instance, |wish| {
            wish.map(|wish| pb::WantedInstance { desired: pb::Desired::Stop.into(), ..wish })
        }),
        Event::StopAll => {
            world.wish_all(|wish| Some(pb::WantedInstance { desired: pb::Desired::Stop.into(), ..wish }))
        }
        Event::GiveUp => world.wish_all(|_| None),
        Event::Remove(instance) => world.wish(instance, |_| None),
        Event::PlaceAgain(instance) => {
            *epochs += 1;
            let epoch = *epochs;
            world.wish(instance, |_| Some(run(instance, epoch, false)));
        }
        Event::Change(instance) => world.wish(instance, |wish| {
            let mut wish = wish?;
            let manifest = wish.manifest.as_mut()?;
            manifest.health = match manifest.health.take() {
                None => manifest_health(),
                Some(_) => None,
            };
            Some(wish)
        }),
        Event::Fetch(instance, template) => world.wish(instance, |wish| {
            let fetch =
                template.map(|template_version| pb::FetchOrder { template_version, ..Default::default() });
            wish.map(|wish| pb::WantedInstance { fetch, ..wish })
        }),
        Event::HubCommits => world.acknowledge_gone(),
        Event::Report(is_heard) => world.report(is_heard),
        Event::AgentDies => world.crash_agent(),
        Event::ConnectionLost => world.lose_connection(),
        Event::Reboot => world.reboot(),
    }
}

fn manifest_health() -> Option<pb::Health> {
    manifest(1, true).health
}

fn instance() -> impl Strategy<Value = u64> {
    1..=INSTANCES
}

fn time() -> impl Strategy<Value = u64> {
    prop_oneof![0..300_u64, 300..15_000_u64, 15_000..120_000_u64]
}

fn temper() -> impl Strategy<Value = Temper> {
    prop_oneof![
        Just(Temper::Polite),
        Just(Temper::Deaf),
        (2..6_u32).prop_map(Temper::Stuck),
        (0..4_u32).prop_map(Temper::Parent),
        Just(Temper::Brief),
        Just(Temper::Busy),
        Just(Temper::Missing),
    ]
}

fn anything() -> impl Strategy<Value = Event> {
    prop_oneof![
        12 => (0..12_usize).prop_map(Event::Turns),
        8 => time().prop_map(Event::Pass),
        6 => (instance(), 0..2_i32).prop_map(|(id, code)| Event::Exit(id, code)),
        5 => (temper(), 1..5_usize).prop_map(|(temper, times)| Event::Next(temper, times)),
        4 => (instance(), any::<bool>(), any::<bool>()).prop_map(|(id, live, ok)| Event::Probe(id, live, ok)),
        5 => (instance(), any::<bool>()).prop_map(|(id, ok)| Event::HookEnds(id, ok)),
        4 => instance().prop_map(Event::Run),
        3 => instance().prop_map(Event::Stop),
        1 => instance().prop_map(Event::Remove),
        3 => Just(Event::StopAll),
        1 => Just(Event::GiveUp),
        2 => instance().prop_map(Event::PlaceAgain),
        1 => instance().prop_map(Event::Change),
        2 => (instance(), prop::option::weighted(0.7, 1..4_u64)).prop_map(|(id, template)| Event::Fetch(id, template)),
        2 => Just(Event::HubCommits),
        2 => any::<bool>().prop_map(Event::Report),
        4 => Just(Event::AgentDies),
        3 => Just(Event::ConnectionLost),
        1 => Just(Event::Reboot),
    ]
}

/// Only exits, time, reports and the agent's death: then every number can be predicted from outside.
fn exits_and_deaths() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0..12_usize).prop_map(Event::Turns),
        4 => time().prop_map(Event::Pass),
        4 => Just(Event::Exit(1, 1)),
        2 => Just(Event::AgentDies),
        1 => Just(Event::ConnectionLost),
        2 => any::<bool>().prop_map(Event::Report),
    ]
}

/// More with PROPTEST_CASES.
fn cases(at_least: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    ProptestConfig {
        cases: default.cases.max(at_least),
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..default
    }
}

proptest! {
    #![proptest_config(cases(3_000))]

    #[test]
    fn whatever_happens_wishes_come_true_and_stops_end_in_gone(
        seed in any::<u64>(),
        events in prop::collection::vec(anything(), 1..80),
    ) {
        let mut world = World::new(seed);
        let mut epochs = 0;
        for event in &events {
            happen(&mut world, event, &mut epochs);
            world.check_stirred();
            world.check_marks();
        }
        world.keeper.behave();
        world.settle();
        world.check_converged();
        for instance in 1..=INSTANCES {
            happen(&mut world, &Event::Stop(instance), &mut epochs);
        }
        world.settle();
        world.check_converged();
        while !world.agent.gone().is_empty() {
            world.acknowledge_gone();
            world.settle();
        }
        prop_assert!(world.keeper.is_empty());
        prop_assert_eq!(world.agent.supervisors().count(), 0);
        prop_assert!(world.on_disk().is_empty(), "left on disk: {:?}", world.on_disk());
    }

    #[test]
    fn an_agent_that_dies_repeats_and_forgets_nothing(
        seed in any::<u64>(),
        events in prop::collection::vec(exits_and_deaths(), 1..80),
    ) {
        let mut world = World::new(seed);
        world.oracle.strict = true;
        world.wish(1, |_| Some(without_hooks(run(1, 1, false))));
        let mut epochs = 1;
        for event in &events {
            happen(&mut world, event, &mut epochs);
            world.check_stirred();
            world.check_marks();
        }
        world.settle();
        world.check_converged();
        world.check_ends();
        let report = world.agent.full_report(nave_agent_core::WallOffset::default()).unwrap().remove(0);
        let ran = world.keeper.ran[&(1, 1)];
        let given_up = world.key(1).is_none();
        prop_assert_eq!(report.restarts, ran - 1, "one restart for each end, but for the last of one given up");
        prop_assert_eq!(given_up, report.observed.unwrap().state.unwrap() == failed(&report.last_exit));
    }
}

fn failed(last_exit: &Option<pb::ExitRecord>) -> pb::observed::State {
    pb::observed::State::Failed(pb::observed::Failed { last_exit: last_exit.clone() })
}
