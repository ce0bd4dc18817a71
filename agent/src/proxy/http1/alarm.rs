//! One timer for a whole connection. Arming and reaching into the runtime's timer for each request would cost more than
//! parsing it: here a later deadline only notes the time, and the timer, when it goes off too early, is set again.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

/// Longer than any connection lives: the timer's wheel ends somewhere.
const FAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// The deadline has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Expired;

#[derive(Debug)]
pub(super) struct Alarm {
    sleep: Pin<Box<Sleep>>,
}

impl Alarm {
    pub(super) fn new() -> Self {
        Self { sleep: Box::pin(sleep_until(Instant::now() + FAR)) }
    }

    /// Ready once `due` has passed.
    pub(super) fn poll(&mut self, due: Instant, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.sleep.deadline() > due {
                self.sleep.as_mut().reset(due);
            }
            if self.sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() >= due {
                return Poll::Ready(());
            }
            self.sleep.as_mut().reset(due);
        }
    }

    /// What the future yields, unless `due` comes first; the future is asked first. Cancel-safe as the future is.
    pub(super) async fn within<F: Future>(&mut self, due: Instant, future: F) -> Result<F::Output, Expired> {
        let mut future = pin!(future);
        std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Ok(output)),
            Poll::Pending => self.poll(due, cx).map(|()| Err(Expired)),
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_later_deadline_is_kept_though_the_timer_was_set_for_an_earlier_one() {
        let mut alarm = Alarm::new();
        let begin = Instant::now();
        let never = std::future::pending::<()>;
        for seconds in [5, 20, 21, 22] {
            let due = begin + Duration::from_secs(seconds);
            assert_eq!(alarm.within(due, never()).await, Err(Expired));
            assert!(Instant::now() >= due && Instant::now() < due + Duration::from_millis(10));
        }
        let due = Instant::now() + Duration::from_secs(100);
        assert_eq!(alarm.within(due, std::future::ready(7)).await, Ok(7));
        let sooner = Instant::now() + Duration::from_secs(1);
        assert_eq!(alarm.within(sooner, never()).await, Err(Expired));
        assert!(Instant::now() < due);
    }
}
