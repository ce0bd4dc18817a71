//! `EnrollService`: how a host becomes one of the cluster's and stays it. `Enroll` is the one call a stranger may
//! make; its token is compared here, in constant time, and checked again by the log, which alone counts its uses.
//! `Renew` gives a new certificate to the key that is registered for the host, also when the old one has run out.

use std::sync::Arc;

use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_proto::token::JoinToken;
use nave_tls::{AGENT_VALIDITY, Role};
use pb::command::Body;
use pb::enroll_service_server::EnrollService;
use tonic::{Request, Response, Status};
use tracing::{info, warn};

use crate::api::{Hub, deadline, errors};
use crate::clock;

/// Facts are some hundred bytes; labels are a person's, so they are bounded.
const FACTS_BYTES_MAX: usize = 16 * 1024;

/// The service of this name on one member.
#[derive(Debug)]
pub(crate) struct Enroll {
    hub: Arc<Hub>,
}

impl Enroll {
    pub(crate) fn new(hub: Arc<Hub>) -> Self {
        Self { hub }
    }

    /// Whether this member's state knows the token, with this secret, and it has not ended.
    fn is_good(&self, token: &JoinToken) -> bool {
        let state = self.hub.raft.state();
        let Some(record) = state.token(&token.id) else { return false };
        same(&record.secret_sha256, &token.secret_sha256())
            && record.expires_unix_ns > clock::unix_now_ns()
            && record.uses_left > 0
    }

    /// A certificate that makes the holder of the request's key the agent of this host.
    fn issue(&self, host: HostId, csr_der: &[u8]) -> Result<Vec<u8>, Status> {
        let now = clock::unix_now_ns() / 1_000_000_000;
        let issued = self.hub.authority.issue(&Role::Agent(host), csr_der, AGENT_VALIDITY, now);
        issued.map_err(|error| errors::invalid_field("csr_der", &error.to_string()))
    }
}

#[tonic::async_trait]
impl EnrollService for Enroll {
    async fn enroll(
        &self,
        request: Request<pb::EnrollRequest>,
    ) -> Result<Response<pb::EnrollResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        let pb::EnrollRequest { token, csr_der, facts } = request.into_inner();
        let token: JoinToken = token.parse().map_err(|_| errors::bad_token())?;
        if token.cluster != self.hub.cluster || !same(&token.ca_sha256, &self.hub.authority.sha256()) {
            return Err(errors::bad_token());
        }
        let facts = facts.ok_or_else(|| errors::invalid_field("facts", "are missing"))?;
        check_facts(&facts)?;
        let key = nave_tls::csr_public_key_sha256(&csr_der)
            .map_err(|error| errors::invalid_field("csr_der", &error.to_string()))?;
        // A token made a moment ago may not have reached this member; a stranger's flood must not reach the log.
        if !self.is_good(&token) {
            let fresh = self.hub.raft.linearize(deadline).await;
            if let Err(error) = fresh {
                return Err(errors::read(&error, self.hub.reach().await));
            }
            if self.hub.raft.state().cluster().is_none() {
                return Err(errors::not_begun());
            }
            if !self.is_good(&token) {
                warn!(token = token.id, "enrolment refused");
                return Err(errors::bad_token());
            }
        }
        let name = facts.name.clone();
        let body = Body::RegisterHost(pb::RegisterHost {
            token_id: token.id.clone(),
            public_key_sha256: key.to_vec(),
            facts: Some(facts),
        });
        let committed = self.hub.write_as(format!("token/{}", token.id), None, body, deadline).await?;
        let host = HostId(committed.accepted.host_id);
        let certificate_der = self.issue(host, &csr_der)?;
        info!(%host, name, token = token.id, "host enrolled");
        Ok(Response::new(pb::EnrollResponse {
            cluster_id: self.hub.cluster.to_string(),
            host_id: host.to_string(),
            certificate_der,
            ca_der: self.hub.authority.certificate_der().to_vec(),
            hub_time_unix_ns: clock::unix_now_ns(),
            members: self.hub.member_addresses(),
        }))
    }

    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::RenewResponse>, Status> {
        let Some(identity) = nave_tls::peer_or_expired(&request) else {
            return Err(errors::not_registered("no certificate was shown"));
        };
        let Role::Agent(host) = identity.role else {
            return Err(errors::not_registered("the certificate is not an agent's"));
        };
        let key = nave_tls::csr_public_key_sha256(&request.get_ref().csr_der)
            .map_err(|error| errors::invalid_field("csr_der", &error.to_string()))?;
        if !same(&key, &identity.public_key_sha256) {
            return Err(errors::invalid_field(
                "csr_der",
                "must be made with the key of the certificate shown",
            ));
        }
        let registered = self.hub.raft.state().host(host).map(|record| record.public_key_sha256.clone());
        if !registered.is_some_and(|registered| same(&registered, &key)) {
            warn!(%host, "renewal refused: another key is registered, or none");
            return Err(errors::not_registered(&format!("{host} is not registered with this key")));
        }
        let certificate_der = self.issue(host, &request.get_ref().csr_der)?;
        Ok(Response::new(pb::RenewResponse { certificate_der, hub_time_unix_ns: clock::unix_now_ns() }))
    }
}

/// Whether an agent's facts may enter the log.
pub(crate) fn check_facts(facts: &pb::HostFacts) -> Result<(), Status> {
    use prost::Message as _;
    if facts.encoded_len() > FACTS_BYTES_MAX {
        return Err(errors::invalid_field("facts", "are larger than 16 KiB; use fewer or shorter labels"));
    }
    if facts.name.is_empty() {
        return Err(errors::invalid_field("facts.name", "is empty"));
    }
    Ok(())
}

/// Compares without telling by its time how much is equal.
fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let difference = a.iter().zip(b).fold(0u8, |difference, (a, b)| difference | (a ^ b));
    std::hint::black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_same_only_when_they_are() {
        assert!(same(b"", b"") && same(b"abc", b"abc"));
        assert!(!same(b"abc", b"abd") && !same(b"abc", b"ab") && !same(b"", b"a"));
    }

    #[test]
    fn facts_without_a_name_or_too_large_are_refused() {
        let named = pb::HostFacts { name: "a".to_owned(), ..Default::default() };
        assert_eq!(check_facts(&named).map_err(|status| status.code()), Ok(()));
        assert!(check_facts(&pb::HostFacts::default()).is_err_and(|s| s.message().contains("facts.name")));
        let large = pb::HostFacts { kernel: "x".repeat(FACTS_BYTES_MAX), ..named };
        assert!(check_facts(&large).is_err_and(|s| s.message().contains("16 KiB")));
    }
}
