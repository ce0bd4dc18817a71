//! Waiting on conditions. Nothing in the tests sleeps for a guessed time: a condition is asked again every 20 ms
//! until it holds or a generous limit has passed, and then the test says what it was waiting for.

use std::time::Duration;

use tokio::time::Instant;

const STEP: Duration = Duration::from_millis(20);

/// Blocks until `condition` holds.
///
/// # Panics
/// With `what` when it does not hold within `limit`.
pub fn eventually(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    eventually_some(what, limit, || condition().then_some(()));
}

/// Blocks until `probe` gives a value, and returns it.
///
/// # Panics
/// With `what` when it gives none within `limit`.
pub fn eventually_some<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(Instant::now() < end, "waited {limit:?} in vain: {what}");
        pause(STEP);
    }
}

/// One step of a polling loop; the only place where the harness sleeps.
pub fn pause(step: Duration) {
    #[expect(clippy::disallowed_methods, reason = "polling loop of a blocking test thread")]
    std::thread::sleep(step);
}
