//! Makes a failing history shorter: leaves out acts, by halves, quarters and one by one, as long as the same promise is
//! broken. No cleverness; most of a history has nothing to do with its end.

use crate::bug::Bug;
use crate::scenario::Scenario;
use crate::world::Run;

/// Runs spent at most.
const TRIES: usize = 600;

/// What is left of a failing history.
#[derive(Debug)]
pub struct Short {
    /// With its trace.
    pub run: Run,
    pub acts_before: usize,
}

/// Shortens the history of a seed that fails; none when it does not.
#[must_use]
pub fn shorten(seed: u64, bug: Option<Bug>) -> Option<Short> {
    let mut scenario = Scenario::of(seed);
    let acts_before = scenario.acts.len();
    let promise = crate::attempt(&scenario, bug, false).violation?.promise;
    let fails = |scenario: &Scenario| {
        crate::attempt(scenario, bug, false).violation.is_some_and(|violation| violation.promise == promise)
    };
    let mut tries = 0;
    let mut size = scenario.acts.len().div_ceil(2);
    while size > 0 && tries < TRIES {
        let mut from = 0;
        let mut shorter = false;
        while from < scenario.acts.len() && tries < TRIES {
            let mut without = scenario.clone();
            without.acts.drain(from..(from + size).min(scenario.acts.len()));
            tries += 1;
            if fails(&without) {
                scenario = without;
                shorter = true;
            } else {
                from += size;
            }
        }
        if !shorter || size > 1 {
            size /= 2;
        }
    }
    Some(Short { run: crate::attempt(&scenario, bug, true), acts_before })
}
