//! The one message with which a member gives up. The first failure wins and is final: writers refuse everything after
//! it, and `RaftHub::failed` hands the message to the root, which ends the process.

use std::io;
use std::sync::Arc;

use tokio::sync::watch;

/// A cell that is empty until something final has happened. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    message: Arc<watch::Sender<Option<Arc<str>>>>,
}

impl Failure {
    pub(crate) fn new() -> Self {
        Self { message: Arc::new(watch::Sender::new(None)) }
    }

    /// Publishes `message` unless an earlier failure has been published.
    pub(crate) fn publish(&self, message: impl Into<String>) {
        self.message.send_if_modified(|current| {
            if current.is_some() {
                return false;
            }
            let message = message.into();
            tracing::error!(message, "this member cannot go on");
            *current = Some(message.into());
            true
        });
    }

    pub(crate) fn get(&self) -> Option<Arc<str>> {
        self.message.borrow().clone()
    }

    /// An error for whoever asks for more work after the failure.
    pub(crate) fn check(&self) -> Result<(), io::Error> {
        self.get().map_or(Ok(()), |message| Err(io::Error::other(message.to_string())))
    }

    /// Publishes a failure when the current scope is left by a panic.
    pub(crate) fn guard<'a>(&'a self, what: &'a str) -> PanicGuard<'a> {
        PanicGuard { failure: self, what }
    }

    /// Resolves once a failure is published.
    pub(crate) async fn wait(&self) -> String {
        let mut receiver = self.message.subscribe();
        receiver
            .wait_for(Option::is_some)
            .await
            .expect("self holds the sender")
            .as_deref()
            .unwrap_or_default()
            .to_owned()
    }
}

/// Whoever waits for the one that panicked would wait for ever.
pub(crate) struct PanicGuard<'a> {
    failure: &'a Failure,
    what: &'a str,
}

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.failure
                .publish(format!("{} panicked; please report this, with this member's output", self.what));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_failure() {
        let failure = Failure::new();
        drop(failure.guard("nobody"));
        failure.check().unwrap();
        let its = failure.clone();
        std::thread::spawn(move || {
            let _guard = its.guard("the writer");
            panic!("on purpose");
        })
        .join()
        .unwrap_err();
        assert!(failure.get().unwrap().starts_with("the writer panicked"));
    }

    #[tokio::test]
    async fn the_first_failure_wins() {
        let failure = Failure::new();
        failure.check().unwrap();
        failure.publish("first");
        failure.publish("second");
        assert_eq!(failure.wait().await, "first");
        assert_eq!(failure.check().unwrap_err().to_string(), "first");
    }
}
