//! Whether the server that answered is the one that was meant.

use std::sync::Arc;

use nave_proto::ids::ClusterId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sha2::{Digest as _, Sha256};

use crate::client::Expect;
use crate::connect_error::Refusal;
use crate::identity::{self, Leaf};
use crate::provider::provider;

/// What a client goes by.
#[derive(Debug)]
pub(crate) enum Trust {
    /// The own cluster's CA, and a certain peer.
    Cluster { cluster: ClusterId, roots: Arc<RootCertStore>, expect: Expect },
    /// A CA known by its hash alone, and any member.
    Pinned { ca_sha256: [u8; 32] },
}

#[derive(Debug)]
pub(crate) struct ServerVerifier {
    trust: Trust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerVerifier {
    pub(crate) fn new(trust: Trust) -> Self {
        Self { trust, algorithms: provider().signature_verification_algorithms }
    }

    fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let leaf = Leaf::parse(end_entity).map_err(|_| refuse(Refusal::NotNave))?;
        match &self.trust {
            Trust::Cluster { cluster, roots, expect } => {
                if leaf.cluster != *cluster {
                    return Err(refuse(Refusal::OtherCluster { ours: *cluster, theirs: leaf.cluster }));
                }
                self.verify_chain(end_entity, intermediates, roots, now)?;
                expect_role(*expect, &leaf)
            }
            Trust::Pinned { ca_sha256 } => {
                let ca = intermediates
                    .iter()
                    .find(|der| <[u8; 32]>::from(Sha256::digest(der)) == *ca_sha256)
                    .ok_or_else(|| refuse(Refusal::OtherAuthority))?;
                if identity::ca_cluster(ca) != Ok(leaf.cluster) {
                    return Err(refuse(Refusal::OtherAuthority));
                }
                let mut roots = RootCertStore::empty();
                roots.add(ca.clone().into_owned())?;
                self.verify_chain(end_entity, intermediates, &roots, now)?;
                expect_role(Expect::Member, &leaf)
            }
        }
    }

    fn verify_chain(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        roots: &RootCertStore,
        now: UnixTime,
    ) -> Result<(), Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            roots,
            intermediates,
            now,
            self.algorithms.all,
        )
        .map_err(|error| match error {
            // The cluster id is right and the signature is not: a CA that claims another's id.
            Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
                refuse(Refusal::NotVouchedFor)
            }
            Error::InvalidCertificate(
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. },
            ) => refuse(Refusal::OutOfDate),
            other => other,
        })
    }
}

fn expect_role(expect: Expect, leaf: &Leaf) -> Result<(), Error> {
    if expect.accepts(&leaf.role) {
        Ok(())
    } else {
        Err(refuse(Refusal::WrongPeer { expected: expect, found: leaf.role.clone() }))
    }
}

fn refuse(refusal: Refusal) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(end_entity, intermediates, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
