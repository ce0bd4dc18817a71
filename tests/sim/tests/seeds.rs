//! A fixed number of worlds, the same each time; `nave-sim --seeds 100000` runs more.

use std::sync::atomic::{AtomicU64, Ordering};

use nave_sim::{Bug, Violation, run, told};

/// About half a minute on two busy cores.
const SEEDS: u64 = 300;
/// Each mistake made on purpose has to be noticed within so many worlds.
const NOTICED_WITHIN: u64 = 400;

/// The first seed of these that breaks a promise for which `counts`.
fn broken(seeds: u64, bug: Option<Bug>, counts: fn(&Violation) -> bool) -> Option<(u64, Violation)> {
    let next = AtomicU64::new(1);
    let look = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed > seeds {
                return None;
            }
            if let Some(violation) = run(seed, bug, false).violation.filter(counts) {
                next.store(seeds + 1, Ordering::Relaxed);
                return Some((seed, violation));
            }
        }
    };
    std::thread::scope(|scope| {
        let others = scope.spawn(look);
        let mine = look();
        mine.or(others.join().expect("a world does not panic"))
    })
}

#[test]
fn no_promise_is_broken() {
    if let Some((seed, violation)) = broken(SEEDS, None, |_| true) {
        panic!(
            "{}; replay with `cargo run --release -p nave-sim -- --seed {seed} --short`",
            told(&violation)
        );
    }
}

#[test]
fn the_same_seed_gives_the_same_history() {
    for seed in [3, 14, 159] {
        let (one, other) = (run(seed, None, true), run(seed, None, true));
        assert!(one.trace.len() > 20, "seed {seed}: {:?}", one.trace);
        assert_eq!(one.trace, other.trace, "seed {seed}");
    }
}

#[test]
fn agents_that_do_not_check_the_epoch_are_noticed() {
    assert!(broken(NOTICED_WITHIN, Some(Bug::EpochNotChecked), |_| true).is_some());
}

#[test]
fn a_deadline_that_ignores_the_grace_is_noticed() {
    let twice = |violation: &Violation| violation.promise == "stop means never twice";
    assert!(broken(NOTICED_WITHIN, Some(Bug::DeadlineIgnoresGrace), twice).is_some());
}

#[test]
fn a_plan_that_forgets_a_drain_is_noticed() {
    assert!(broken(NOTICED_WITHIN, Some(Bug::PlanForgetsDrain), |_| true).is_some());
}
