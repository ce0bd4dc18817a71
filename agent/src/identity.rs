//! Who this agent is: its key, its certificate, its host id and its cluster, kept in the data directory.
//!
//! The key is made once and kept for ever, and the hub knows the host by it; so an enrolment that was cut off, or
//! repeated with another token, gives the same host id again. The certificate is short-lived and renewed.

mod enrol;
mod renew;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nave_proto::ids::{ClusterId, HostId};
use nave_proto::pb;
use nave_proto::token::JoinToken;
use nave_tls::{Credentials, CredentialsError, FileError, KeyPair};
use parking_lot::Mutex;
use prost::Message as _;
use tracing::warn;

use crate::clock::HubClock;
use crate::config::AgentConfig;
use crate::data_dir::write_atomically;

pub(crate) use enrol::enrol;
pub(crate) use renew::RenewTask;

/// Why this host has no identity. `is_permanent` errors stay until a person acts.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error(
        "this host has not joined a cluster yet and has no token_file; create a token with `nave token create`, put it in a file, and give that file's path"
    )]
    NoToken,
    #[error("cannot read the join token in {path}; create one with `nave token create`")]
    TokenFile { path: String, source: std::io::Error },
    #[error("{path}: {message}; create a new token with `nave token create`")]
    TokenText { path: String, message: String },
    #[error("no hub member to join: `join` is empty")]
    NoMembers,
    #[error(
        "the hub refused the join token in {path}: {message}; put a new one (`nave token create`) in that file"
    )]
    TokenRefused { path: String, message: String },
    #[error(
        "the join token in {path} is of cluster {token}, but {address} is not a member of that cluster; check the addresses in `join`, or create a token there with `nave token create`"
    )]
    WrongCluster { path: String, token: ClusterId, address: String },
    #[error("the hub refused this host: {message}")]
    Refused { message: String },
    #[error(
        "{data_dir} belongs to host {host} of cluster {ours}, but the join token is of cluster {token}; give this agent a data_dir of its own, or, to leave the old cluster for good, stop its services and remove {data_dir}"
    )]
    OtherCluster { data_dir: String, host: HostId, ours: ClusterId, token: ClusterId },
    #[error(
        "the identity in {path} is damaged: {message}; restore it from a backup, or remove {path} and join again with a new token (the host keeps its id as long as agent.key is there)"
    )]
    Damaged { path: String, message: String },
    #[error("the hub's answer to the enrolment makes no sense: {message}")]
    Answer { message: String },
    #[error("key and certificate")]
    Credentials(#[from] CredentialsError),
    #[error("key files")]
    File(#[from] FileError),
    #[error("cannot write {path}")]
    Write { path: String, source: std::io::Error },
    #[error("stopped before this host had joined")]
    Stopped,
}

/// The files of one identity.
#[derive(Debug)]
struct Files {
    record: PathBuf,
    key: PathBuf,
    certificate: PathBuf,
    ca: PathBuf,
}

impl Files {
    fn in_dir(dir: &Path) -> Self {
        Self {
            record: dir.join("identity"),
            key: dir.join("agent.key"),
            certificate: dir.join("agent.crt"),
            ca: dir.join("ca.crt"),
        }
    }
}

/// Shared by all who speak for this host.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) cluster: ClusterId,
    pub(crate) host: HostId,
    pub(crate) credentials: Credentials,
    pub(crate) hub_clock: HubClock,
    files: Files,
    record: Mutex<pb::AgentIdentityRecord>,
}

impl Identity {
    /// The identity on disk, if this host has joined. A token of another cluster beside it is refused.
    pub(crate) fn load(data_dir: &Path, config: &AgentConfig) -> Result<Option<Arc<Self>>, IdentityError> {
        let files = Files::in_dir(data_dir);
        let bytes = match std::fs::read(&files.record) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(damaged(&files.record, source)),
        };
        let record =
            pb::AgentIdentityRecord::decode(bytes.as_slice()).map_err(|e| damaged(&files.record, e))?;
        let cluster: ClusterId = record.cluster_id.parse().map_err(|e| damaged(&files.record, e))?;
        let host: HostId = record.host_id.parse().map_err(|e| damaged(&files.record, e))?;
        refuse_other_cluster(data_dir, config, cluster, host)?;
        let credentials = Credentials::load(&files.certificate, &files.key, &files.ca)
            .map_err(|e| damaged(&files.record, crate::error_chain(&e)))?;
        if credentials.cluster() != cluster || *credentials.role() != nave_tls::Role::Agent(host) {
            let message =
                format!("agent.crt is of {} in cluster {}", credentials.role(), credentials.cluster());
            return Err(damaged(&files.record, message));
        }
        Ok(Some(Arc::new(Self::new(files, record, cluster, host, credentials))))
    }

    fn new(
        files: Files,
        record: pb::AgentIdentityRecord,
        cluster: ClusterId,
        host: HostId,
        credentials: Credentials,
    ) -> Self {
        let floor = record.time_floor_unix_ns;
        credentials.raise_time_floor(floor / 1_000_000_000);
        Self {
            cluster,
            host,
            credentials,
            hub_clock: HubClock::new(floor),
            files,
            record: Mutex::new(record),
        }
    }

    /// Hub members as last heard, `host:port` each.
    pub(crate) fn members(&self) -> Vec<String> {
        self.record.lock().members.clone()
    }

    /// What a hub said of itself: its members (when it named any) and its time.
    pub(crate) fn heard(&self, members: &[String], hub_time_unix_ns: i64) {
        self.hub_clock.heard(hub_time_unix_ns);
        self.credentials.raise_time_floor(hub_time_unix_ns / 1_000_000_000);
        let mut record = self.record.lock();
        record.time_floor_unix_ns = record.time_floor_unix_ns.max(hub_time_unix_ns);
        if !members.is_empty() {
            record.members = members.to_vec();
        }
        if let Err(error) = write_atomically(&self.files.record, &record.encode_to_vec(), 0o600) {
            warn!(%error, path = %self.files.record.display(), "the member list could not be kept on disk");
        }
    }

    /// From now on every connection shows the new certificate.
    fn renewed(&self, certificate_der: Vec<u8>) -> Result<(), IdentityError> {
        let key = self.credentials.key_pair();
        let fresh = key.with_certificate(certificate_der, self.credentials.ca_der())?;
        fresh.save(&self.files.certificate, &self.files.key, &self.files.ca)?;
        self.credentials.replace(&fresh)?;
        Ok(())
    }
}

/// The one key of this host.
fn load_or_make_key(files: &Files) -> Result<KeyPair, IdentityError> {
    if files.key.exists() {
        return Ok(KeyPair::load(&files.key)?);
    }
    let key = KeyPair::generate();
    key.save(&files.key)?;
    Ok(key)
}

fn read_token(path: &Path) -> Result<JoinToken, IdentityError> {
    let shown = path.display().to_string();
    let text = std::fs::read_to_string(path)
        .map_err(|source| IdentityError::TokenFile { path: shown.clone(), source })?;
    text.trim().parse().map_err(|e: nave_proto::token::ParseTokenError| IdentityError::TokenText {
        path: shown,
        message: e.to_string(),
    })
}

/// Once joined, the token is of no more use, and may be gone; but one of another cluster is a mistake to speak of.
fn refuse_other_cluster(
    data_dir: &Path,
    config: &AgentConfig,
    ours: ClusterId,
    host: HostId,
) -> Result<(), IdentityError> {
    let Some(Ok(token)) = config.token_file.as_deref().map(read_token) else { return Ok(()) };
    if token.cluster == ours {
        return Ok(());
    }
    let data_dir = data_dir.display().to_string();
    Err(IdentityError::OtherCluster { data_dir, host, ours, token: token.cluster })
}

fn damaged(path: &Path, message: impl ToString) -> IdentityError {
    IdentityError::Damaged { path: path.display().to_string(), message: message.to_string() }
}
