//! Private keys: P-256, PKCS#8 PEM on disk, never printed.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use rcgen::{CertificateParams, DistinguishedName, PKCS_ECDSA_P256_SHA256, PublicKeyData as _};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest as _, Sha256};

use crate::credentials::{Credentials, CredentialsError};
use crate::files::{self, FileError};

/// A key that cannot be made or used.
#[derive(Debug, thiserror::Error)]
#[error("private key: {0}")]
pub struct KeyError(pub(crate) String);

/// A P-256 key. Cloning shares it.
#[derive(Clone)]
pub struct KeyPair {
    inner: Arc<rcgen::KeyPair>,
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyPair").finish_non_exhaustive()
    }
}

impl KeyPair {
    /// A new key from the operating system's randomness.
    pub fn generate() -> Self {
        let inner =
            rcgen::KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("P-256 keys can be generated");
        Self { inner: Arc::new(inner) }
    }

    /// Reads a PKCS#8 PEM text.
    pub fn from_pem(text: &str) -> Result<Self, KeyError> {
        rcgen::KeyPair::from_pkcs8_pem_and_sign_algo(text, &PKCS_ECDSA_P256_SHA256)
            .map(|inner| Self { inner: Arc::new(inner) })
            .map_err(|error| KeyError(format!("not a P-256 key in PKCS#8 PEM ({error})")))
    }

    /// Reads a key file; warns when others can read it too.
    pub fn load(path: &Path) -> Result<Self, FileError> {
        Self::from_pem(&files::read_key(path)?)
            .map_err(|error| FileError::malformed(path, "private key", error.0))
    }

    /// Writes the key, mode 0600, replacing the file in one step.
    pub fn save(&self, path: &Path) -> Result<(), FileError> {
        files::write_key(path, &self.inner.serialize_pem())
    }

    /// PKCS#8 PEM.
    pub fn to_pem(&self) -> String {
        self.inner.serialize_pem().replace("\r\n", "\n")
    }

    /// A certificate request (PKCS#10) that proves possession of the key and asks for no name: the hub writes those.
    pub fn csr_der(&self) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(&*self.inner).expect("a request without names can be signed");
        request.der().to_vec()
    }

    /// SHA-256 of the SubjectPublicKeyInfo, as in [`PeerIdentity`](crate::PeerIdentity).
    pub fn public_key_sha256(&self) -> [u8; 32] {
        Sha256::digest(self.inner.subject_public_key_info()).into()
    }

    /// Joins the key with the certificate issued for it. Refused when they do not belong together.
    pub fn with_certificate(
        &self,
        certificate_der: impl Into<Vec<u8>>,
        ca_der: impl Into<Vec<u8>>,
    ) -> Result<Credentials, CredentialsError> {
        Credentials::new(
            self.clone(),
            CertificateDer::from(certificate_der.into()),
            CertificateDer::from(ca_der.into()),
        )
    }

    pub(crate) fn inner(&self) -> &rcgen::KeyPair {
        &self.inner
    }

    pub(crate) fn private_key_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.inner.serialize_der().into())
    }
}
