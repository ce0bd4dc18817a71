//! How many retries are still help and not a storm: a fifth of what was asked in the last ten seconds, and ten a
//! second for those who ask little.

use super::window::Window;
use crate::Monotonic;

/// Retries per hundred requests.
const PERCENT: u64 = 20;
/// Ten a second over the window of ten seconds.
const FLOOR: u64 = 100;

/// One for each caller of a service. Approximate by as many retries as there are workers that ask at the same moment.
#[derive(Debug, Default)]
pub struct RetryBudget(Window);

impl RetryBudget {
    /// A first try was made.
    pub fn request(&self, now: Monotonic) {
        self.0.add(now, 1, 0);
    }

    /// Whether one more retry may be made; it counts when it may.
    pub fn retry(&self, now: Monotonic) -> bool {
        let counts = self.0.sum(now);
        let allowed = counts.marked < FLOOR + counts.all * PERCENT / 100;
        if allowed {
            self.0.add(now, 0, 1);
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn spent(budget: &RetryBudget, now: Monotonic) -> usize {
        (0..10_000).take_while(|_| budget.retry(now)).count()
    }

    #[test]
    fn the_quiet_have_ten_a_second_and_the_busy_a_fifth_more() {
        let budget = RetryBudget::default();
        let now = Monotonic(50_000_000_000);
        assert_eq!(spent(&budget, now), 100);
        (0..1000).for_each(|_| budget.request(now));
        assert_eq!(spent(&budget, now), 200);
        assert_eq!(spent(&budget, now + Duration::from_secs(9)), 0);
        assert_eq!(spent(&budget, now + Duration::from_secs(10)), 100, "what is spent comes back");
    }
}
