//! Who this member is on the wire. It holds the CA's key and mints its own certificate at every start, so a cluster
//! that was off for a year starts; and again before the certificate runs out, by elapsed time, for all servers and
//! channels at once.

use std::time::Duration;

use nave_proto::ids::MemberId;
use nave_tls::{Authority, Credentials, MEMBER_VALIDITY, Role};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::RunError;
use crate::clock;
use crate::config::MemberConfig;

/// A third of the life: two mints may fail to be noticed before anyone is refused.
const MINT_EVERY: Duration = Duration::from_secs(MEMBER_VALIDITY.as_secs() / 3);

/// The CA, checked to be this cluster's, and a fresh certificate of it.
pub(crate) fn load(config: &MemberConfig) -> Result<(Authority, Credentials), RunError> {
    let authority = Authority::load(&config.ca_cert, &config.ca_key).map_err(RunError::Authority)?;
    if authority.cluster() != config.cluster_id {
        return Err(RunError::OtherCluster {
            configured: config.cluster_id,
            found: authority.cluster(),
            ca_cert: config.ca_cert.clone(),
        });
    }
    let credentials = mint(&authority, config.id).map_err(RunError::Mint)?;
    Ok((authority, credentials))
}

fn mint(authority: &Authority, id: MemberId) -> Result<Credentials, nave_tls::IssueError> {
    authority.issue_new(Role::Member(id), MEMBER_VALIDITY, clock::unix_now_ns() / 1_000_000_000)
}

/// Mints again and again until the member stops.
pub(super) async fn keep_fresh(
    id: MemberId,
    authority: Authority,
    credentials: Credentials,
    stop: CancellationToken,
) -> Result<(), String> {
    loop {
        tokio::select! {
            () = tokio::time::sleep(MINT_EVERY) => {}
            () = stop.cancelled() => return Ok(()),
        }
        let fresh = mint(&authority, id).map_err(|error| format!("cannot mint a certificate: {error}"))?;
        credentials.replace(&fresh).map_err(|error| format!("cannot use the new certificate: {error}"))?;
        info!(expires_unix = credentials.expires_unix(), "minted a new certificate");
    }
}

#[cfg(test)]
mod tests {
    use nave_proto::ids::ClusterId;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_certificate_is_replaced_before_it_runs_out() {
        let authority = Authority::generate(ClusterId(7));
        let credentials = mint(&authority, MemberId(1)).unwrap();
        let first = credentials.certificate_der();
        let stop = CancellationToken::new();
        let keeper = keep_fresh(MemberId(1), authority, credentials.clone(), stop.clone());
        let watcher = async {
            while credentials.certificate_der() == first {
                tokio::time::sleep(Duration::from_secs(60)).await;
            }
            stop.cancel();
        };
        let (kept, ()) = tokio::join!(keeper, watcher);
        assert_eq!(kept, Ok(()));
        assert!(MINT_EVERY < MEMBER_VALIDITY / 2);
    }
}
