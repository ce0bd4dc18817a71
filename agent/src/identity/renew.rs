//! Renews the certificate when a third of its life is left, counted from the hub's time by elapsed time, so that a
//! jump of the local clock neither skips nor hurries it. Works with a certificate that has already run out.

use std::sync::Arc;
use std::time::Duration;

use nave_proto::pb;
use nave_tls::{ChannelOptions, Expect};
use pb::enroll_service_client::EnrollServiceClient;
use tracing::{info, warn};

use super::Identity;
use crate::backoff::Backoff;
use crate::hub::Members;
use crate::metrics::Metrics;

/// Slept at once, so that a machine that was suspended looks again soon after.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// Also when a certificate is so short-lived that it is always due.
const PAUSE_MIN: Duration = Duration::from_secs(5);
const RENEW_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct RenewTask {
    pub(crate) identity: Arc<Identity>,
    pub(crate) members: Members,
    pub(crate) metrics: Metrics,
}

impl RenewTask {
    /// Runs until it is dropped.
    pub(crate) async fn run(self) {
        let mut backoff = Backoff::new();
        let mut said = String::new();
        loop {
            self.metrics.certificate_expires.set(self.identity.credentials.expires_unix());
            match self.time_left() {
                Some(left) => tokio::time::sleep(left.clamp(PAUSE_MIN, LOOK_AGAIN)).await,
                None => match self.renew().await {
                    Ok(()) => {
                        info!(host = %self.identity.host, "certificate renewed");
                        backoff = Backoff::new();
                        said.clear();
                        tokio::time::sleep(PAUSE_MIN).await;
                    }
                    Err(why) => {
                        if why != said {
                            warn!(why, "the certificate could not be renewed, trying again");
                            said = why;
                        }
                        tokio::time::sleep(backoff.next().max(PAUSE_MIN)).await;
                    }
                },
            }
        }
    }

    /// Until renewal is due; `None`: it is.
    fn time_left(&self) -> Option<Duration> {
        let credentials = &self.identity.credentials;
        let third = i64::try_from(credentials.lifetime_seconds() / 3).unwrap_or(i64::MAX);
        let due = credentials.expires_unix().saturating_sub(third);
        let left = due.saturating_sub(self.identity.hub_clock.now_unix_ns() / 1_000_000_000);
        u64::try_from(left).ok().filter(|left| *left > 0).map(Duration::from_secs)
    }

    async fn renew(&self) -> Result<(), String> {
        let mut last = "no member is known".to_owned();
        for address in self.members.in_random_order() {
            let options = ChannelOptions::default();
            let channel = nave_tls::channel(&address, &self.identity.credentials, Expect::Member, options);
            let request = pb::RenewRequest { csr_der: self.identity.credentials.csr_der() };
            let call = async { EnrollServiceClient::new(channel).renew(request).await };
            last = match tokio::time::timeout(RENEW_TIMEOUT, call).await {
                Ok(Ok(answer)) => {
                    let (identity, answer) = (self.identity.clone(), answer.into_inner());
                    let kept = tokio::task::spawn_blocking(move || {
                        identity.heard(&[], answer.hub_time_unix_ns);
                        identity.renewed(answer.certificate_der).map_err(|e| crate::error_chain(&e))
                    });
                    return kept.await.expect("writing small files does not panic");
                }
                Ok(Err(status)) => crate::hub::explain(&status),
                Err(_) => format!("{address}: no answer within {RENEW_TIMEOUT:?}"),
            };
        }
        Err(last)
    }
}
