//! Tables for each rule of the choice, a model that does everything in any order, and a simulated service.

use std::collections::{BTreeMap, BinaryHeap};

use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use super::*;

const START: Monotonic = Monotonic(1_000_000_000_000);
const MS: Duration = Duration::from_millis(1);

fn key(instance: u64) -> EndpointKey {
    EndpointKey { instance: InstanceId(instance), epoch: 1 }
}

fn local(instance: u64) -> EndpointSpec {
    let port = 20_000 + u16::try_from(instance).unwrap();
    let reach = Reach::Local(SocketAddr::from(([127, 0, 0, 1], port)));
    EndpointSpec { key: key(instance), reach, state: EndpointState::Ready, weight: 1 }
}

fn remote(instance: u64) -> EndpointSpec {
    EndpointSpec { reach: Reach::Remote { host: HostId(9), port: 1 }, ..local(instance) }
}

fn balancer(specs: Vec<EndpointSpec>) -> Balancer {
    let balancer = Balancer::new(BalancerSettings::default());
    balancer.update(START, specs);
    balancer
}

fn rng() -> SmallRng {
    SmallRng::seed_from_u64(7)
}

/// How many of `count` picks, each over before the next, go to each instance.
fn shares(balancer: &Balancer, now: Monotonic, count: usize, ask: &Ask<'_>) -> BTreeMap<u64, usize> {
    let mut rng = rng();
    let mut shares = BTreeMap::new();
    for _ in 0..count {
        let pick = balancer.pick(now, &mut rng, ask).unwrap();
        *shares.entry(pick.endpoint().key.instance.0).or_default() += 1;
    }
    shares
}

fn only(balancer: &Balancer, now: Monotonic) -> Vec<u64> {
    shares(balancer, now, 100, &Ask::default()).into_keys().collect()
}

fn fail(balancer: &Balancer, now: Monotonic, instance: u64, outcome: Outcome, times: usize) {
    let tried: Vec<EndpointKey> =
        balancer.view(now).iter().map(|one| one.spec.key).filter(|one| *one != key(instance)).collect();
    for _ in 0..times {
        let ask = Ask { tried: &tried, hash: None };
        balancer.pick(now, &mut rng(), &ask).unwrap().finish(now, outcome, MS);
    }
}

#[test]
fn ready_ones_only_and_a_draining_one_when_nothing_else_is_there() {
    let mut starting = local(1);
    starting.state = EndpointState::Starting;
    let mut draining = local(2);
    draining.state = EndpointState::Draining;
    let balancer = balancer(vec![starting, draining, local(3)]);
    assert_eq!(only(&balancer, START), [3]);
    assert!(balancer.set_state(START, key(3), None));
    assert_eq!(only(&balancer, START), [2]);
    balancer.set_state(START, key(2), None);
    let none = |balancer: &Balancer| balancer.pick(START, &mut rng(), &Ask::default()).unwrap_err();
    assert_eq!(none(&balancer), NoPick::NoneReady);
    balancer.set_state(START, key(1), None);
    assert_eq!(none(&balancer), NoPick::Empty);
    assert!(!balancer.set_state(START, key(4), None), "nobody knows it");
}

#[test]
fn what_was_tried_is_not_tried_again() {
    let balancer = balancer(vec![local(1), remote(2)]);
    let pick = |tried: &[EndpointKey]| balancer.pick(START, &mut rng(), &Ask { tried, hash: None });
    assert_eq!(pick(&[key(1)]).unwrap().endpoint().key, key(2));
    assert_eq!(pick(&[key(1), key(2)]).unwrap_err(), NoPick::AllTried);
}

#[test]
fn this_host_is_preferred_while_it_is_not_clearly_slower() {
    let balancer = balancer(vec![remote(1), local(2), remote(3)]);
    assert_eq!(only(&balancer, START), [2]);
    let mut held = Vec::new();
    let elsewhere = (0..10).any(|_| {
        held.push(balancer.pick(START, &mut rng(), &Ask::default()).unwrap());
        held.last().is_some_and(|pick| pick.endpoint().key != key(2))
    });
    assert!(elsewhere, "an overloaded one is relieved");
    drop(held);
    fail(&balancer, START, 2, Outcome::Failure, 5);
    assert_eq!(only(&balancer, START), [1, 3], "and one that fails is left alone");
}

#[test]
fn weights_and_newness_set_the_shares() {
    let mut heavy = local(1);
    heavy.weight = 3;
    let balancer = balancer(vec![heavy.clone(), local(2), local(3)]);
    let all = shares(&balancer, START, 10_000, &Ask::default());
    // The first of two draws, 3 of 5, since nothing else tells them apart.
    assert!((5_500..6_500).contains(&all[&1]), "{all:?}");
    balancer.update(START, vec![heavy, local(2), local(3), local(4)]);
    let new = |after| shares(&balancer, START + Duration::from_secs(after), 10_000, &Ask::default())[&4];
    assert!((50..400).contains(&new(0)), "a tenth of its share at first: {}", new(0));
    assert!((1_400..2_000).contains(&new(10)), "the whole after a while: {}", new(10));
}

#[test]
fn a_hash_stays_and_only_the_callers_of_one_that_goes_move() {
    let all: Vec<EndpointSpec> = (1..=5).map(local).collect();
    let balancer = balancer(all);
    let place = |hash| {
        let pick = balancer.pick(START, &mut rng(), &Ask { tried: &[], hash: Some(hash) });
        pick.unwrap().endpoint().key.instance.0
    };
    let before: Vec<u64> = (0..1000).map(place).collect();
    assert_eq!(before, (0..1000).map(place).collect::<Vec<_>>());
    for instance in 1..=5 {
        let share = before.iter().filter(|place| **place == instance).count();
        assert!((130..270).contains(&share), "{instance}: {share}");
    }
    balancer.set_state(START, key(2), None);
    for (hash, before) in before.iter().enumerate() {
        let now = place(hash as u64);
        assert!(now == *before || *before == 2, "{hash} moved from {before} to {now}");
    }
}

#[test]
fn failures_of_most_are_the_services_own_but_what_cannot_be_reached_stays_out() {
    let balancer = balancer(vec![local(1), local(2), local(3)]);
    fail(&balancer, START, 1, Outcome::Failure, 5);
    assert_eq!(only(&balancer, START), [2, 3]);
    fail(&balancer, START, 2, Outcome::Unreached, 5);
    assert_eq!(
        only(&balancer, START),
        [1, 3],
        "a third is less than half: all that can be reached are asked"
    );
    fail(&balancer, START, 3, Outcome::Unreached, 5);
    assert_eq!(only(&balancer, START), [1], "never the last");
    assert_eq!(balancer.ejections(), 3);
    balancer.set_state(START, key(1), None);
    let none = balancer.pick(START, &mut rng(), &Ask::default()).unwrap_err();
    let NoPick::AllOut { until: Some(until) } = none else { panic!("{none}") };
    assert!(until > START && until <= START + Duration::from_secs(1));
    // Then one call each, and whoever answers is back.
    let mut probe = balancer.pick(until + MS * 1000, &mut rng(), &Ask::default()).unwrap();
    probe.finish(until + MS * 1000, Outcome::Success, MS);
    assert_eq!(only(&balancer, until), [probe.endpoint().key.instance.0]);
}

#[test]
fn exactly_one_probe_while_others_are_there() {
    let balancer = balancer(vec![local(1), local(2), local(3)]);
    fail(&balancer, START, 1, Outcome::Failure, 5);
    let due = START + Duration::from_secs(1);
    let mut rng = rng();
    let held: Vec<Pick> = (0..50).map(|_| balancer.pick(due, &mut rng, &Ask::default()).unwrap()).collect();
    assert_eq!(held.iter().filter(|pick| pick.endpoint().key == key(1)).count(), 1);
    // A probe that was dropped says nothing, and the next may ask.
    drop(held);
    let again = balancer.pick(due, &mut rng, &Ask::default()).unwrap();
    assert_eq!(again.endpoint().key, key(1));
}

#[test]
fn one_that_stays_is_remembered_and_one_that_was_gone_is_new() {
    let balancer = balancer(vec![local(1), local(2)]);
    fail(&balancer, START, 1, Outcome::Failure, 5);
    let held = balancer.pick(START, &mut rng(), &Ask::default()).unwrap();
    assert_eq!(held.endpoint().key, key(2));
    balancer.update(START, vec![local(2), local(1), local(3)]);
    assert_eq!(balancer.in_flight(InstanceId(2)), 1);
    let ejected =
        |instance| balancer.view(START).iter().any(|one| one.spec.key == key(instance) && one.ejected);
    assert!(ejected(1));
    balancer.set_state(START, key(1), None);
    balancer.update(START, vec![local(2), local(1), local(3)]);
    assert!(!ejected(1), "another process");
    let mut moved = local(2);
    moved.reach = Reach::Local(SocketAddr::from(([127, 0, 0, 1], 999)));
    balancer.update(START, vec![moved]);
    assert_eq!(balancer.in_flight(InstanceId(2)), 0, "another process, on another port");
    drop(held);
    assert_eq!(balancer.in_flight(InstanceId(2)), 0);
}

#[test]
fn large_services_are_drawn_from_by_the_same_rules() {
    let mut all: Vec<EndpointSpec> = (1..=200).map(remote).collect();
    all.extend((201..=240).map(local));
    let balancer = balancer(all.clone());
    assert!(only(&balancer, START).iter().all(|instance| *instance > 200));
    (201..=240).for_each(|instance| {
        balancer.set_state(START, key(instance), None);
    });
    (1..=190).for_each(|instance| {
        balancer.set_state(START, key(instance), Some(EndpointState::Draining));
    });
    let left = shares(&balancer, START, 2_000, &Ask::default());
    assert!(left.keys().all(|instance| (191..=200).contains(instance)), "{left:?}");
    assert_eq!(left.len(), 10);
    fail(&balancer, START, 191, Outcome::Failure, 5);
    assert_eq!(shares(&balancer, START, 2_000, &Ask::default()).len(), 9);
    let after = shares(&balancer, START + Duration::from_secs(2), 2_000, &Ask::default());
    assert!(after.contains_key(&191), "it is probed: {after:?}");
}

/// An open loop: requests come at their times whatever the answers do; each endpoint serves one request at a time.
struct OpenLoop {
    balancer: Balancer,
    rng: SmallRng,
    /// When each endpoint has done all that it was given.
    busy_until: BTreeMap<u64, Monotonic>,
    waiting: BinaryHeap<std::cmp::Reverse<(i64, u64)>>,
    picks: BTreeMap<u64, (Pick, Duration)>,
    shares: BTreeMap<u64, usize>,
}

impl OpenLoop {
    fn run(
        specs: Vec<EndpointSpec>,
        service: impl Fn(u64, &mut SmallRng) -> Duration,
    ) -> BTreeMap<u64, usize> {
        let mut this = Self {
            balancer: balancer(specs),
            rng: rng(),
            busy_until: BTreeMap::new(),
            waiting: BinaryHeap::new(),
            picks: BTreeMap::new(),
            shares: BTreeMap::new(),
        };
        let mut now = START;
        for number in 0..20_000 {
            // 1,000 a second, at random.
            let gap = -this.rng.random::<f64>().max(1e-9).ln() / 1000.0;
            now = now + Duration::from_secs_f64(gap);
            this.answer_until(now);
            let pick = this.balancer.pick(now, &mut this.rng, &Ask::default()).unwrap();
            let instance = pick.endpoint().key.instance.0;
            *this.shares.entry(instance).or_default() += 1;
            let free = this.busy_until.get(&instance).copied().unwrap_or(now).max(now);
            let done = free + service(instance, &mut this.rng);
            this.busy_until.insert(instance, done);
            this.waiting.push(std::cmp::Reverse((done.0, number)));
            this.picks.insert(number, (pick, done.since(now)));
        }
        this.answer_until(Monotonic(i64::MAX));
        assert_eq!(this.balancer.view(now).iter().map(|one| one.in_flight).sum::<u64>(), 0);
        this.shares
    }

    fn answer_until(&mut self, now: Monotonic) {
        while let Some(std::cmp::Reverse((done, number))) = self.waiting.peek().copied() {
            if done > now.0 {
                return;
            }
            self.waiting.pop();
            let (mut pick, took) = self.picks.remove(&number).expect("it waits");
            pick.finish(Monotonic(done), Outcome::Success, took);
        }
    }
}

/// A millisecond, and once in a thousand times a hiccup of ten.
fn normal(rng: &mut SmallRng) -> Duration {
    let hiccup = if rng.random_ratio(1, 1000) { 10.0 } else { 1.0 };
    Duration::from_secs_f64(0.001 * hiccup * (0.7 + 0.6 * rng.random::<f64>()))
}

#[test]
fn one_of_three_that_is_ten_times_slower_gets_at_most_two_percent() {
    let slow = |instance, rng: &mut SmallRng| normal(rng) * if instance == 2 { 10 } else { 1 };
    for specs in [vec![local(1), local(2), local(3)], vec![remote(1), local(2), remote(3)]] {
        let shares = OpenLoop::run(specs, slow);
        assert!(shares.get(&2).copied().unwrap_or_default() <= 400, "{shares:?}");
    }
}

#[test]
fn equals_get_equal_shares() {
    let shares = OpenLoop::run((1..=4).map(local).collect(), |_, rng| normal(rng));
    assert!(shares.values().all(|share| (3_500..6_500).contains(share)), "{shares:?}");
}

#[derive(Debug, Clone)]
enum Step {
    Pick { tried: usize, hash: Option<u64> },
    Finish { which: usize, outcome: Outcome },
    Drop { which: usize },
    State { instance: u64, state: Option<EndpointState> },
    Update { present: Vec<bool> },
    Wait { ms: u64 },
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        2 => Just(Outcome::Success),
        4 => Just(Outcome::Failure),
        1 => Just(Outcome::Overloaded),
        1 => Just(Outcome::Unreached),
        1 => Just(Outcome::Cancelled),
    ]
}

fn state() -> impl Strategy<Value = Option<EndpointState>> {
    prop_oneof![
        Just(None),
        Just(Some(EndpointState::Starting)),
        Just(Some(EndpointState::Ready)),
        Just(Some(EndpointState::Draining)),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        12 => (0..3_usize, proptest::option::weighted(0.1, 0..9_u64))
            .prop_map(|(tried, hash)| Step::Pick { tried, hash }),
        12 => (any::<usize>(), outcome()).prop_map(|(which, outcome)| Step::Finish { which, outcome }),
        2 => any::<usize>().prop_map(|which| Step::Drop { which }),
        2 => (1..=5_u64, state()).prop_map(|(instance, state)| Step::State { instance, state }),
        1 => proptest::collection::vec(any::<bool>(), 5).prop_map(|present| Step::Update { present }),
        2 => (0..3000_u64).prop_map(|ms| Step::Wait { ms }),
    ];
    proptest::collection::vec(step, 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// In any order of events: nobody gets an endpoint that is gone, starting or tried; a draining one only when none
    /// is callable; what is in flight is what is held; never two calls are out to find out about one endpoint.
    #[test]
    fn the_rules_hold_in_any_order(steps in steps(), seed in any::<u64>()) {
        let mut now = START;
        let mut rng = SmallRng::seed_from_u64(seed);
        let balancer = Balancer::new(BalancerSettings { seed, ..BalancerSettings::default() });
        let mut states: BTreeMap<u64, Option<EndpointState>> =
            (1..=5).map(|instance| (instance, Some(EndpointState::Ready))).collect();
        // Epochs tell a placement from the next, as the hub's do.
        let mut epochs: BTreeMap<u64, u64> = (1..=5).map(|instance| (instance, 1)).collect();
        let spec = |instance: u64, epoch: u64, state: EndpointState| EndpointSpec {
            key: EndpointKey { instance: InstanceId(instance), epoch },
            state,
            ..if instance > 3 { remote(instance) } else { local(instance) }
        };
        balancer.update(now, (1..=5).map(|one| spec(one, 1, EndpointState::Ready)).collect());
        let mut held: Vec<Pick> = Vec::new();
        for step in steps {
            match step {
                Step::Pick { tried, hash } => {
                    let tried: Vec<EndpointKey> = held.iter().rev().take(tried).map(|pick| pick.endpoint().key).collect();
                    let ejected = |key| balancer.view(now).iter().any(|one| one.spec.key == key && one.ejected);
                    let before: Vec<EndpointKey> = balancer.view(now).iter()
                        .filter(|one| one.spec.state == EndpointState::Ready && !one.ejected)
                        .map(|one| one.spec.key).filter(|key| !tried.contains(key)).collect();
                    let Ok(pick) = balancer.pick(now, &mut rng, &Ask { tried: &tried, hash }) else {
                        prop_assert!(before.is_empty(), "good ones were there: {before:?}");
                        continue;
                    };
                    let key = pick.endpoint().key;
                    let instance = key.instance.0;
                    prop_assert_eq!(key.epoch, epochs[&instance], "an epoch that is over");
                    prop_assert!(!tried.contains(&key));
                    match states[&instance] {
                        Some(EndpointState::Ready) => {}
                        Some(EndpointState::Draining) => prop_assert!(before.is_empty(), "{before:?} were there"),
                        other => prop_assert!(false, "{key:?} is {other:?}"),
                    }
                    let probes = held.iter().filter(|one| one.is_probe() && one.endpoint().key == key).count();
                    prop_assert!(!pick.is_probe() || probes == 0, "a second probe of {key:?}");
                    prop_assert!(!pick.is_probe() || ejected(key));
                    held.push(pick);
                }
                Step::Finish { which, outcome } if !held.is_empty() => {
                    let which = which % held.len();
                    held.swap_remove(which).finish(now, outcome, MS);
                }
                Step::Drop { which } if !held.is_empty() => drop(held.swap_remove(which % held.len())),
                Step::Finish { .. } | Step::Drop { .. } => {}
                Step::State { instance, state } => {
                    let key = EndpointKey { instance: InstanceId(instance), epoch: epochs[&instance] };
                    if balancer.set_state(now, key, state) {
                        states.insert(instance, state);
                        held.retain(|pick| state.is_some() || pick.endpoint().key != key);
                    }
                }
                Step::Update { present } => {
                    let mut specs = Vec::new();
                    for (instance, present) in (1..).zip(present) {
                        if !present || states[&instance].is_none() {
                            *epochs.get_mut(&instance).unwrap() += 1;
                            held.retain(|pick| pick.endpoint().key.instance.0 != instance);
                        }
                        let state = states[&instance].unwrap_or(EndpointState::Ready);
                        states.insert(instance, present.then_some(state));
                        specs.extend(present.then(|| spec(instance, epochs[&instance], state)));
                    }
                    balancer.update(now, specs);
                }
                Step::Wait { ms } => now = now + MS * u32::try_from(ms).unwrap(),
            }
            for instance in 1..=5 {
                let holds = held.iter().filter(|pick| pick.endpoint().key.instance.0 == instance).count();
                prop_assert_eq!(balancer.in_flight(InstanceId(instance)), holds as u64, "i-{}", instance);
            }
        }
        drop(held);
        prop_assert!(balancer.view(now).iter().all(|one| one.in_flight == 0));
    }
}
