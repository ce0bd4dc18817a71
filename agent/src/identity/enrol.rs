//! Joining a cluster: a token that pins the cluster's authority is exchanged for a certificate. A hub that cannot be
//! reached is asked again for ever; a token that it refuses is a person's affair and ends the agent.

use std::path::Path;
use std::sync::Arc;

use nave_proto::ids::{ClusterId, HostId};
use nave_proto::pb;
use nave_proto::token::JoinToken;
use nave_tls::{ConnectError, KeyPair, Refusal};
use pb::enroll_service_client::EnrollServiceClient;
use prost::Message as _;
use rand::seq::SliceRandom as _;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use tracing::{info, warn};

use super::{Files, Identity, IdentityError, load_or_make_key, read_token};
use crate::backoff::Backoff;
use crate::config::AgentConfig;
use crate::data_dir::write_atomically;

/// A member has this long; it may have to find a leader first.
const ENROLL_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// One member's answer.
enum Attempt {
    Joined(Box<pb::EnrollResponse>),
    /// Asking again may help.
    Later(String),
    /// Asking again cannot help.
    Never(IdentityError),
}

/// Asks every member of `config.join` in turn until one lets this host in.
pub(crate) async fn enrol(
    data_dir: &Path,
    config: &AgentConfig,
    facts: &pb::HostFacts,
    shutdown: &CancellationToken,
) -> Result<Arc<Identity>, IdentityError> {
    let files = Files::in_dir(data_dir);
    let token_path = config.token_file.as_deref().ok_or(IdentityError::NoToken)?;
    let token = read_token(token_path)?;
    if config.join.is_empty() {
        return Err(IdentityError::NoMembers);
    }
    let key = load_or_make_key(&files)?;
    let asking = ask_all(config, token_path, &token, &key, facts);
    let answer = tokio::select! {
        answer = asking => answer?,
        () = shutdown.cancelled() => return Err(IdentityError::Stopped),
    };
    keep(files, &key, &token, answer)
}

async fn ask_all(
    config: &AgentConfig,
    token_path: &Path,
    token: &JoinToken,
    key: &KeyPair,
    facts: &pb::HostFacts,
) -> Result<pb::EnrollResponse, IdentityError> {
    let mut backoff = Backoff::new();
    let mut said = String::new();
    loop {
        let mut addresses = config.join.clone();
        addresses.shuffle(&mut rand::rng());
        for address in &addresses {
            match ask(address, token_path, token, key, facts).await {
                Attempt::Joined(answer) => return Ok(*answer),
                Attempt::Never(error) => return Err(error),
                Attempt::Later(why) if why != said => {
                    warn!(address, why, "cannot join yet, trying again");
                    said = why;
                }
                Attempt::Later(_) => {}
            }
        }
        tokio::time::sleep(backoff.next()).await;
    }
}

async fn ask(
    address: &str,
    token_path: &Path,
    token: &JoinToken,
    key: &KeyPair,
    facts: &pb::HostFacts,
) -> Attempt {
    let channel = nave_tls::enroll_channel(address, token.ca_sha256);
    let request =
        pb::EnrollRequest { token: token.to_string(), csr_der: key.csr_der(), facts: Some(facts.clone()) };
    let mut request = tonic::Request::new(request);
    request.set_timeout(ENROLL_TIMEOUT);
    let asked = tokio::time::timeout(ENROLL_TIMEOUT, EnrollServiceClient::new(channel).enroll(request)).await;
    match asked {
        Ok(Ok(answer)) => Attempt::Joined(Box::new(answer.into_inner())),
        Ok(Err(status)) => judge(&status, address, token_path, token.cluster),
        Err(_) => Attempt::Later(format!("no answer within {ENROLL_TIMEOUT:?}")),
    }
}

/// Whether a person must act.
fn judge(status: &Status, address: &str, token_path: &Path, cluster: ClusterId) -> Attempt {
    let path = token_path.display().to_string();
    if let Some(connect) = nave_tls::connect_error(status) {
        return match connect {
            ConnectError::Refused {
                refusal: Refusal::OtherAuthority | Refusal::OtherCluster { .. }, ..
            } => {
                let address = address.to_owned();
                Attempt::Never(IdentityError::WrongCluster { path, token: cluster, address })
            }
            other => Attempt::Later(crate::error_chain(other)),
        };
    }
    let message = status.message().to_owned();
    let overloaded = status.get_details_error_info().is_some_and(|info| info.reason == "OVERLOADED");
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated | Code::NotFound => {
            Attempt::Never(IdentityError::TokenRefused { path, message })
        }
        Code::ResourceExhausted if !overloaded => {
            Attempt::Never(IdentityError::TokenRefused { path, message })
        }
        // A name that another host has, labels that are too large …
        Code::InvalidArgument | Code::FailedPrecondition | Code::AlreadyExists => {
            Attempt::Never(IdentityError::Refused { message })
        }
        code => Attempt::Later(format!("{code:?}: {message}")),
    }
}

/// Writes the certificate first and the record, which makes it count, last.
fn keep(
    files: Files,
    key: &KeyPair,
    token: &JoinToken,
    answer: pb::EnrollResponse,
) -> Result<Arc<Identity>, IdentityError> {
    let senseless = |message: String| IdentityError::Answer { message };
    let cluster: ClusterId = answer.cluster_id.parse().map_err(|e| senseless(format!("{e}")))?;
    let host: HostId = answer.host_id.parse().map_err(|e| senseless(format!("{e}")))?;
    let credentials = key.with_certificate(answer.certificate_der, answer.ca_der)?;
    if cluster != token.cluster || credentials.ca_sha256() != token.ca_sha256 {
        return Err(senseless("it is of another cluster than the token".to_owned()));
    }
    if *credentials.role() != nave_tls::Role::Agent(host) {
        return Err(senseless(format!("the certificate is of {}, not of {host}", credentials.role())));
    }
    credentials.save(&files.certificate, &files.key, &files.ca)?;
    let record = pb::AgentIdentityRecord {
        cluster_id: cluster.to_string(),
        host_id: host.to_string(),
        members: answer.members,
        time_floor_unix_ns: answer.hub_time_unix_ns,
    };
    write_atomically(&files.record, &record.encode_to_vec(), 0o600)
        .map_err(|source| IdentityError::Write { path: files.record.display().to_string(), source })?;
    info!(%cluster, %host, "joined the cluster");
    let identity = Identity::new(files, record, cluster, host, credentials);
    identity.hub_clock.heard(answer.hub_time_unix_ns);
    Ok(Arc::new(identity))
}
