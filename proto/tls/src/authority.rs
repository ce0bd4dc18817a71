//! The cluster's certificate authority: one self-signed P-256 certificate whose key every member holds.
//!
//! Members hold the key so that each can mint its own leaf at start: a cluster that was off for a year starts.
//! The price, said in the docs, is that a stolen member disk is a stolen CA.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nave_proto::ids::ClusterId;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
    SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};
use sha2::{Digest as _, Sha256};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer as _;

use crate::credentials::Credentials;
use crate::files::{self, FileError};
use crate::identity::{self, Role};
use crate::keys::KeyPair;
use crate::{clock, provider};

/// How long a member's leaf is good for; it mints another well before.
pub const MEMBER_VALIDITY: Duration = Duration::from_secs(24 * 60 * 60);
/// How long an agent's leaf is good for; it renews well before.
pub const AGENT_VALIDITY: Duration = Duration::from_secs(24 * 60 * 60);
/// How long an operator's certificate is good for: nobody renews it unasked, so a year.
pub const OPERATOR_VALIDITY: Duration = Duration::from_secs(365 * 24 * 60 * 60);

const CA_VALIDITY: Duration = Duration::from_secs(20 * 365 * 24 * 60 * 60);
/// Certificates begin this much before now, for peers whose clock is behind.
const BACKDATE: Duration = Duration::from_secs(60 * 60);
/// DER of a P-256 SubjectPublicKeyInfo up to the key bits (algorithm, curve, and the uncompressed point's mark).
const P256_SPKI_PREFIX: [u8; 27] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04,
];
const P256_SPKI_BYTES: usize = 91;

/// File names that [`Authority::save`] uses.
const CA_CERTIFICATE_FILE: &str = "ca.pem";
const CA_KEY_FILE: &str = "ca.key";

/// A certificate that was not issued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IssueError {
    /// Not PKCS#10, or its signature does not fit its key.
    #[error("the certificate request is malformed: {0}")]
    Request(String),
    /// Another kind of key.
    #[error("the certificate request has a key that is not P-256")]
    Key,
    /// The names or dates cannot be written into a certificate.
    #[error("the certificate cannot be made: {0}")]
    Certificate(String),
}

/// The cluster's CA: certificate and key. Cloning shares it.
#[derive(Clone)]
pub struct Authority {
    inner: Arc<Inner>,
}

struct Inner {
    cluster: ClusterId,
    certificate: CertificateDer<'static>,
    key: KeyPair,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("cluster", &self.inner.cluster).finish_non_exhaustive()
    }
}

impl Authority {
    /// A new CA for a new cluster, valid for 20 years from this machine's now.
    pub fn generate(cluster: ClusterId) -> Self {
        let key = KeyPair::generate();
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(&format!("Nave cluster {cluster}"));
        params.subject_alt_names = vec![san(&identity::uri(cluster, None)).expect("a cluster id is ASCII")];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params, clock::unix_seconds(), CA_VALIDITY);
        let certificate = params.self_signed(key.inner()).expect("these parameters can be signed");
        let certificate = certificate.der().clone();
        Self { inner: Arc::new(Inner { cluster, certificate, key }) }
    }

    /// Reads the CA from its two files; they must belong together.
    pub fn load(certificate: &Path, key: &Path) -> Result<Self, FileError> {
        let der = files::read_certificates(certificate)?.swap_remove(0);
        let cluster = identity::ca_cluster(&der)
            .map_err(|error| FileError::malformed(certificate, "CA certificate", error))?;
        let pair = KeyPair::load(key)?;
        if public_key_sha256(&der) != Some(pair.public_key_sha256()) {
            return Err(FileError::malformed(
                key,
                "private key",
                format!("it does not belong to the certificate in {}", certificate.display()),
            ));
        }
        Ok(Self { inner: Arc::new(Inner { cluster, certificate: der, key: pair }) })
    }

    /// Writes `ca.pem` and, mode 0600, `ca.key` into `directory`, which must exist.
    pub fn save(&self, directory: &Path) -> Result<(), FileError> {
        self.inner.key.save(&directory.join(CA_KEY_FILE))?;
        files::write_certificates(
            &directory.join(CA_CERTIFICATE_FILE),
            std::slice::from_ref(&self.inner.certificate),
        )
    }

    /// The cluster whose CA this is.
    pub fn cluster(&self) -> ClusterId {
        self.inner.cluster
    }

    /// The CA's certificate.
    pub fn certificate_der(&self) -> &[u8] {
        &self.inner.certificate
    }

    /// SHA-256 of the CA's certificate, which join tokens pin.
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.inner.certificate).into()
    }

    /// A certificate for the key of a request (PKCS#10, DER), in `role`'s name; whatever names the request asks
    /// for are ignored. Valid from an hour before `now_unix` (seconds) until `validity` after it.
    pub fn issue(
        &self,
        role: &Role,
        csr_der: &[u8],
        validity: Duration,
        now_unix: i64,
    ) -> Result<Vec<u8>, IssueError> {
        let spki = csr_public_key(csr_der)?;
        let key = SubjectPublicKeyInfo::from_der(&spki).map_err(|_| IssueError::Key)?;
        self.sign(role, &key, validity, now_unix).map(|der| der.to_vec())
    }

    /// A new key with its certificate; see [`issue`](Self::issue).
    pub fn issue_new(
        &self,
        role: Role,
        validity: Duration,
        now_unix: i64,
    ) -> Result<Credentials, IssueError> {
        let key = KeyPair::generate();
        let certificate = self.sign(&role, key.inner(), validity, now_unix)?;
        Credentials::new(key, certificate, self.inner.certificate.clone())
            .map_err(|error| IssueError::Certificate(error.to_string()))
    }

    fn sign(
        &self,
        role: &Role,
        key: &impl PublicKeyData,
        validity: Duration,
        now_unix: i64,
    ) -> Result<CertificateDer<'static>, IssueError> {
        let failed = |error: rcgen::Error| IssueError::Certificate(error.to_string());
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(&role.to_string());
        params.subject_alt_names = vec![san(&identity::uri(self.inner.cluster, Some(role))).map_err(failed)?];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(random_serial());
        set_validity(&mut params, now_unix, validity);
        let issuer =
            Issuer::from_ca_cert_der(&self.inner.certificate, self.inner.key.inner()).map_err(failed)?;
        let certificate = params.signed_by(key, &issuer).map_err(failed)?;
        Ok(certificate.der().clone())
    }
}

/// SHA-256 of the public key in a request (PKCS#10, DER), what the hub registers for a host. The request's
/// signature is checked, so that whoever sends it holds the key.
pub fn csr_public_key_sha256(csr_der: &[u8]) -> Result<[u8; 32], IssueError> {
    csr_public_key(csr_der).map(|spki| Sha256::digest(spki).into())
}

/// The SubjectPublicKeyInfo of a request whose signature fits, when it is a P-256 key.
fn csr_public_key(csr_der: &[u8]) -> Result<Vec<u8>, IssueError> {
    let malformed = |error: String| IssueError::Request(error);
    let (rest, request) =
        X509CertificationRequest::from_der(csr_der).map_err(|error| malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(malformed("bytes after its end".into()));
    }
    let spki = request.certification_request_info.subject_pki.raw;
    if spki.len() != P256_SPKI_BYTES || !spki.starts_with(&P256_SPKI_PREFIX) {
        return Err(IssueError::Key);
    }
    CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der))
        .map_err(|error| malformed(error.to_string()))?;
    Ok(spki.to_vec())
}

pub(crate) fn public_key_sha256(certificate: &CertificateDer<'_>) -> Option<[u8; 32]> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(Sha256::digest(parsed.public_key().raw).into())
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn san(uri: &str) -> Result<SanType, rcgen::Error> {
    Ok(SanType::URI(uri.try_into()?))
}

/// Positive and at most 16 bytes, as RFC 5280 4.1.2.2 asks for.
fn random_serial() -> SerialNumber {
    let mut bytes = provider::random::<16>();
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn set_validity(params: &mut CertificateParams, now_unix: i64, validity: Duration) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let now = Duration::from_secs(u64::try_from(now_unix).unwrap_or(0));
    params.not_before = epoch + now.saturating_sub(BACKDATE);
    params.not_after = epoch + (now + validity);
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use nave_proto::ids::{HostId, MemberId};

    use super::*;
    use crate::identity::Leaf;

    const CLUSTER: ClusterId = ClusterId(0xfeed);
    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn a_leaf_says_who_it_is_from_an_hour_before_until_its_end() {
        let authority = Authority::generate(CLUSTER);
        let key = KeyPair::generate();
        let der = authority.issue(&Role::Agent(HostId(3)), &key.csr_der(), DAY, 1_800_000_000).unwrap();
        let leaf = Leaf::parse(&der.into()).unwrap();
        assert_eq!(leaf.cluster, CLUSTER);
        assert_eq!(leaf.role, Role::Agent(HostId(3)));
        assert_eq!(leaf.public_key_sha256, key.public_key_sha256());
        assert_eq!(leaf.not_before_unix, 1_800_000_000 - 3600);
        assert_eq!(leaf.not_after_unix, 1_800_000_000 + 86_400);
        assert_eq!(csr_public_key_sha256(&key.csr_der()), Ok(key.public_key_sha256()));
    }

    #[test]
    fn a_request_that_was_tampered_with_is_refused() {
        let authority = Authority::generate(CLUSTER);
        let mut csr = KeyPair::generate().csr_der();
        let last = csr.len() - 1;
        csr[last] ^= 1;
        let error = authority.issue(&Role::Agent(HostId(3)), &csr, DAY, 0).unwrap_err();
        assert!(matches!(error, IssueError::Request(_)), "{error}");
        assert!(matches!(csr_public_key_sha256(b"garbage"), Err(IssueError::Request(_))));
    }

    #[test]
    fn another_kind_of_key_is_refused() {
        let other = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let csr = CertificateParams::default().serialize_request(&other).unwrap();
        assert_eq!(csr_public_key_sha256(csr.der()), Err(IssueError::Key));
    }

    #[test]
    fn the_authority_survives_its_files_and_its_key_is_its_owners_alone() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::generate(CLUSTER);
        authority.save(directory.path()).unwrap();
        let key_path = directory.path().join("ca.key");
        assert_eq!(std::fs::metadata(&key_path).unwrap().permissions().mode() & 0o777, 0o600);
        let again = Authority::load(&directory.path().join("ca.pem"), &key_path).unwrap();
        assert_eq!(again.sha256(), authority.sha256());
        assert_eq!(again.cluster(), CLUSTER);
        let credentials = again.issue_new(Role::Member(MemberId(1)), DAY, clock::unix_seconds()).unwrap();
        assert_eq!(credentials.role(), &Role::Member(MemberId(1)));
    }

    #[test]
    fn a_key_of_another_authority_is_refused_at_load() {
        let directory = tempfile::tempdir().unwrap();
        Authority::generate(CLUSTER).save(directory.path()).unwrap();
        KeyPair::generate().save(&directory.path().join("ca.key")).unwrap();
        let error =
            Authority::load(&directory.path().join("ca.pem"), &directory.path().join("ca.key")).unwrap_err();
        assert!(error.to_string().contains("does not belong to the certificate"), "{error}");
    }
}
