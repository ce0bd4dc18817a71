//! What one process shows to its peers: a key, the certificate issued for it, and the CA it trusts.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use nave_proto::ids::ClusterId;
use parking_lot::RwLock;
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::{RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};
use sha2::{Digest as _, Sha256};

use crate::files::{self, FileError};
use crate::identity::{self, IdentityError, Leaf, Role};
use crate::keys::KeyPair;
use crate::{authority, clock, provider};

/// Key, certificate and CA that do not go together.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file is missing or malformed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The certificate is not one of Nave's.
    #[error("certificate: {0}")]
    Certificate(#[source] IdentityError),
    /// The CA certificate is not one of Nave's.
    #[error("CA certificate: {0}")]
    Ca(#[source] IdentityError),
    /// The certificate was issued for another key.
    #[error("the certificate was issued for another key")]
    OtherKey,
    /// The certificate and the CA are of two clusters.
    #[error("the certificate is of cluster {leaf}, the CA of cluster {ca}")]
    OtherCluster {
        /// The certificate's cluster.
        leaf: ClusterId,
        /// The CA's.
        ca: ClusterId,
    },
    /// [`Credentials::replace`] with those of someone else.
    #[error("credentials of {old} cannot be replaced by those of {new}")]
    OtherRole {
        /// In use.
        old: Role,
        /// Offered.
        new: Role,
    },
}

/// Key, certificate chain and CA of one process. Cloning shares them, and so does every server and channel made
/// from them: [`replace`](Self::replace) changes what all of these show on their next handshake.
#[derive(Clone)]
pub struct Credentials {
    role: Role,
    cluster: ClusterId,
    ca: CertificateDer<'static>,
    roots: Arc<RootCertStore>,
    current: Arc<Reloadable>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("cluster", &self.cluster)
            .field("role", &self.role)
            .field("expires_unix", &self.expires_unix())
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// Joins the three; refused when they do not belong together.
    pub(crate) fn new(
        key: KeyPair,
        certificate: CertificateDer<'static>,
        ca: CertificateDer<'static>,
    ) -> Result<Self, CredentialsError> {
        let leaf = Leaf::parse(&certificate).map_err(CredentialsError::Certificate)?;
        let ca_cluster = identity::ca_cluster(&ca).map_err(CredentialsError::Ca)?;
        if ca_cluster != leaf.cluster {
            return Err(CredentialsError::OtherCluster { leaf: leaf.cluster, ca: ca_cluster });
        }
        if authority::public_key_sha256(&certificate) != Some(key.public_key_sha256()) {
            return Err(CredentialsError::OtherKey);
        }
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone()).map_err(|_| CredentialsError::Ca(IdentityError::Malformed))?;
        let signing_key = provider::provider()
            .key_provider
            .load_private_key(key.private_key_der())
            .map_err(|_| CredentialsError::OtherKey)?;
        let certified = Arc::new(CertifiedKey::new(vec![certificate, ca.clone()], signing_key));
        Ok(Self {
            cluster: leaf.cluster,
            role: leaf.role.clone(),
            ca,
            roots: Arc::new(roots),
            current: Arc::new(Reloadable {
                shown: RwLock::new(Shown { certified, key, leaf }),
                generation: AtomicU64::new(0),
                time_floor_unix: AtomicI64::new(0),
            }),
        })
    }

    /// Reads the three PEM files.
    pub fn load(certificate: &Path, key: &Path, ca: &Path) -> Result<Self, CredentialsError> {
        let leaf = files::read_certificates(certificate)?.swap_remove(0);
        let ca_der = files::read_certificates(ca)?.swap_remove(0);
        Self::new(KeyPair::load(key)?, leaf, ca_der)
    }

    /// Writes the three PEM files, the key mode 0600. The folders must exist.
    pub fn save(&self, certificate: &Path, key: &Path, ca: &Path) -> Result<(), FileError> {
        let (chain, pair) = {
            let shown = self.current.shown.read();
            (shown.certified.cert.clone(), shown.key.clone())
        };
        pair.save(key)?;
        files::write_certificates(ca, std::slice::from_ref(&self.ca))?;
        files::write_certificates(certificate, &chain[..1])
    }

    /// The cluster these are good for.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Who these make the process.
    pub fn role(&self) -> &Role {
        &self.role
    }

    /// The own certificate, DER.
    pub fn certificate_der(&self) -> Vec<u8> {
        self.current.shown.read().certified.cert[0].to_vec()
    }

    /// The CA's certificate, DER.
    pub fn ca_der(&self) -> &[u8] {
        &self.ca
    }

    /// SHA-256 of the CA's certificate.
    pub fn ca_sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.ca).into()
    }

    /// The key in use.
    pub fn key_pair(&self) -> KeyPair {
        self.current.shown.read().key.clone()
    }

    /// A request for another certificate of the same key.
    pub fn csr_der(&self) -> Vec<u8> {
        self.key_pair().csr_der()
    }

    /// End of the certificate's life, seconds since 1970.
    pub fn expires_unix(&self) -> i64 {
        self.current.shown.read().leaf.not_after_unix
    }

    /// Whole life of the certificate in seconds; renew when a third of it is left, by elapsed time.
    pub fn lifetime_seconds(&self) -> u64 {
        let shown = self.current.shown.read();
        u64::try_from(shown.leaf.not_after_unix.saturating_sub(shown.leaf.not_before_unix)).unwrap_or(0)
    }

    /// From now on every server and channel made from these shows `fresh` instead. Same role and same cluster only.
    pub fn replace(&self, fresh: &Self) -> Result<(), CredentialsError> {
        if fresh.cluster != self.cluster || fresh.ca != self.ca {
            return Err(CredentialsError::OtherCluster { leaf: fresh.cluster, ca: self.cluster });
        }
        if fresh.role != self.role {
            return Err(CredentialsError::OtherRole { old: self.role.clone(), new: fresh.role.clone() });
        }
        let shown = fresh.current.shown.read().clone();
        *self.current.shown.write() = shown;
        self.current.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// The hub's time, seconds since 1970: a clock that stands before it (no battery, a bad jump) is not believed
    /// when peers' certificates are judged. It only rises.
    pub fn raise_time_floor(&self, unix_seconds: i64) {
        self.current.time_floor_unix.fetch_max(unix_seconds, Ordering::Relaxed);
    }

    pub(crate) fn roots(&self) -> &Arc<RootCertStore> {
        &self.roots
    }

    pub(crate) fn reloadable(&self) -> &Arc<Reloadable> {
        &self.current
    }
}

/// The certificate being shown at the moment; rustls asks it at each handshake, server and client alike.
pub(crate) struct Reloadable {
    shown: RwLock<Shown>,
    generation: AtomicU64,
    time_floor_unix: AtomicI64,
}

#[derive(Clone)]
struct Shown {
    certified: Arc<CertifiedKey>,
    key: KeyPair,
    leaf: Leaf,
}

impl fmt::Debug for Reloadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloadable").field("leaf", &self.shown.read().leaf).finish_non_exhaustive()
    }
}

impl Reloadable {
    /// Rises with each replacement. Sessions of an older generation must not be resumed: they would show the old
    /// certificate again.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

/// Now, but never before the floor: what rustls judges every certificate by.
impl TimeProvider for Reloadable {
    fn current_time(&self) -> Option<UnixTime> {
        Some(unix_time(clock::unix_seconds().max(self.time_floor_unix.load(Ordering::Relaxed))))
    }
}

pub(crate) fn unix_time(unix_seconds: i64) -> UnixTime {
    UnixTime::since_unix_epoch(std::time::Duration::from_secs(u64::try_from(unix_seconds).unwrap_or(0)))
}

impl ResolvesServerCert for Reloadable {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.shown.read().certified.clone())
    }
}

impl ResolvesClientCert for Reloadable {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.shown.read().certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
