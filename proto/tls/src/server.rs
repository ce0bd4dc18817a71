//! The server's side of a handshake: who may connect at all.

use std::sync::Arc;

use nave_proto::ids::ClusterId;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, ServerConfig,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, UnixTime};
use tracing::debug;

use crate::credentials::{Credentials, unix_time};
use crate::identity::Leaf;
use crate::provider::provider;

/// Whom a listener lets in besides holders of a valid certificate of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClientPolicy {
    /// Those without a certificate: `Enroll` needs it. Every other call must ask [`peer`](crate::peer).
    pub anonymous: bool,
    /// Those whose certificate of this cluster has run out: `Renew` needs it. They are flagged
    /// [`expired`](crate::PeerIdentity::expired), and [`peer`](crate::peer) does not show them.
    pub expired: bool,
}

/// The configuration of a listener: TLS 1.3, HTTP/2, our own certificate as it is at each handshake.
pub fn server_config(credentials: &Credentials, clients: ClientPolicy) -> Arc<ServerConfig> {
    server_config_of(credentials, clients, &[b"h2"])
}

/// The same for a listener that speaks these protocols, by their ALPN names, the first ones rather;
/// [`TlsConnection::protocol`](crate::TlsConnection::protocol) says which it is.
pub fn server_config_of(
    credentials: &Credentials,
    clients: ClientPolicy,
    protocols: &[&[u8]],
) -> Arc<ServerConfig> {
    let chain = WebPkiClientVerifier::builder_with_provider(credentials.roots().clone(), provider())
        .build()
        .expect("there is one root");
    let verifier = ClientVerifier { chain, policy: clients, cluster: credentials.cluster() };
    let mut config = ServerConfig::builder_with_details(provider(), credentials.reloadable().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3 suites")
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(credentials.reloadable().clone());
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    Arc::new(config)
}

/// The chain is webpki's business; ours is the policy, and that the certificate names someone of this cluster.
#[derive(Debug)]
struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    policy: ClientPolicy,
    cluster: ClusterId,
}

#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("a certificate of cluster {0}")]
    OtherCluster(ClusterId),
    #[error("{0}")]
    Identity(#[from] crate::identity::IdentityError),
}

impl ClientVerifier {
    fn verify_chain(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        leaf: &Leaf,
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match self.chain.verify_client_cert(end_entity, intermediates, now) {
            Err(Error::InvalidCertificate(
                CertificateError::Expired | CertificateError::ExpiredContext { .. },
            )) if self.policy.expired => {
                // Everything but the date must hold: judged as of the last second of its life.
                let last_second = unix_time(leaf.not_after_unix);
                self.chain.verify_client_cert(end_entity, intermediates, last_second)
            }
            verdict => verdict,
        }
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        !self.policy.anonymous
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let leaf = Leaf::parse(end_entity).map_err(|error| refuse(error.into()))?;
        if leaf.cluster != self.cluster {
            return Err(refuse(Refused::OtherCluster(leaf.cluster)));
        }
        self.verify_chain(end_entity, intermediates, &leaf, now)
            .inspect_err(|error| debug!(role = %leaf.role, %error, "client certificate refused"))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

fn refuse(reason: Refused) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(reason))))
}
