//! Who a certificate speaks for. Parsed once per connection, from the SAN URI and nothing else.

use std::fmt;
use std::str::FromStr;

use nave_proto::ids::{ClusterId, HostId, MemberId};
use rustls_pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

const SCHEME: &str = "nave://";
/// Longest operator name, in bytes.
const OPERATOR_NAME_MAX: usize = 64;

/// What a certificate makes its holder. `Display` is the actor's text in events: `agent/h-3`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// One of the hub's processes.
    Member(MemberId),
    /// The agent of one host.
    Agent(HostId),
    /// A person or a script in front of the cluster.
    Operator(String),
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Member(id) => write!(f, "member/{id}"),
            Self::Agent(id) => write!(f, "agent/{id}"),
            Self::Operator(name) => write!(f, "operator/{name}"),
        }
    }
}

impl FromStr for Role {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let wrong = || IdentityError::Uri(text.to_owned());
        let (kind, name) = text.split_once('/').ok_or_else(wrong)?;
        match kind {
            "member" => name.parse().map(Self::Member).map_err(|_| wrong()),
            "agent" => name.parse().map(Self::Agent).map_err(|_| wrong()),
            "operator" if is_operator_name(name) => Ok(Self::Operator(name.to_owned())),
            _ => Err(wrong()),
        }
    }
}

/// Letters, digits, `.`, `_`, `-` and `@`, 1 to 64 bytes: what needs no escaping in a URI.
fn is_operator_name(name: &str) -> bool {
    (1..=OPERATOR_NAME_MAX).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte))
}

/// A certificate that names no one in a Nave cluster.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not DER, or not a certificate.
    #[error("not an X.509 certificate")]
    Malformed,
    /// No SAN URI beginning `nave://`, or more than one.
    #[error("the certificate was not issued by a Nave cluster")]
    NotNave,
    /// A SAN URI of an unknown form.
    #[error("{0:?} names no member, agent or operator")]
    Uri(String),
}

/// The other end of a connection, as its certificate says and the CA vouches for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The cluster whose CA issued it.
    pub cluster: ClusterId,
    /// What it may claim to be.
    pub role: Role,
    /// SHA-256 of the SubjectPublicKeyInfo in DER; what the hub registers for a host.
    pub public_key_sha256: [u8; 32],
    /// Its certificate had run out when the connection was accepted: good for `Renew` and nothing else.
    pub expired: bool,
}

impl PeerIdentity {
    /// This identity unless its certificate had run out; every call but `Renew` goes through here.
    pub fn valid(&self) -> Option<&Self> {
        (!self.expired).then_some(self)
    }

    /// The member's id, when it is a valid member.
    pub fn member(&self) -> Option<MemberId> {
        match (self.expired, &self.role) {
            (false, Role::Member(id)) => Some(*id),
            _ => None,
        }
    }

    /// The host's id, when it is a valid agent.
    pub fn agent(&self) -> Option<HostId> {
        match (self.expired, &self.role) {
            (false, Role::Agent(id)) => Some(*id),
            _ => None,
        }
    }

    /// The operator's name, when it is a valid operator.
    pub fn operator(&self) -> Option<&str> {
        match (self.expired, &self.role) {
            (false, Role::Operator(name)) => Some(name),
            _ => None,
        }
    }
}

/// What this crate needs of a leaf certificate.
#[derive(Debug, Clone)]
pub(crate) struct Leaf {
    pub(crate) cluster: ClusterId,
    pub(crate) role: Role,
    pub(crate) public_key_sha256: [u8; 32],
    pub(crate) not_before_unix: i64,
    pub(crate) not_after_unix: i64,
}

impl Leaf {
    /// Reads the names and dates; whether the CA vouches for them is checked elsewhere.
    pub(crate) fn parse(der: &CertificateDer<'_>) -> Result<Self, IdentityError> {
        let (_, certificate) = X509Certificate::from_der(der).map_err(|_| IdentityError::Malformed)?;
        let (cluster, path) = cluster_and_path(&certificate)?;
        let role = path.ok_or(IdentityError::NotNave)?.parse()?;
        Ok(Self {
            cluster,
            role,
            public_key_sha256: Sha256::digest(certificate.public_key().raw).into(),
            not_before_unix: certificate.validity().not_before.timestamp(),
            not_after_unix: certificate.validity().not_after.timestamp(),
        })
    }

    pub(crate) fn identity(&self, now_unix: u64) -> PeerIdentity {
        PeerIdentity {
            cluster: self.cluster,
            role: self.role.clone(),
            public_key_sha256: self.public_key_sha256,
            expired: i64::try_from(now_unix).unwrap_or(i64::MAX) > self.not_after_unix,
        }
    }
}

/// The cluster that a CA certificate belongs to; a leaf is refused.
pub(crate) fn ca_cluster(der: &CertificateDer<'_>) -> Result<ClusterId, IdentityError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| IdentityError::Malformed)?;
    match cluster_and_path(&certificate)? {
        (cluster, None) if certificate.is_ca() => Ok(cluster),
        _ => Err(IdentityError::NotNave),
    }
}

/// The URI that goes into a certificate: a role's, or with `None` the CA's own.
pub(crate) fn uri(cluster: ClusterId, role: Option<&Role>) -> String {
    match role {
        Some(role) => format!("{SCHEME}{cluster}/{role}"),
        None => format!("{SCHEME}{cluster}"),
    }
}

fn cluster_and_path(certificate: &X509Certificate<'_>) -> Result<(ClusterId, Option<String>), IdentityError> {
    let names = certificate.subject_alternative_name().map_err(|_| IdentityError::Malformed)?;
    let mut uris =
        names.iter().flat_map(|extension| &extension.value.general_names).filter_map(|name| match name {
            GeneralName::URI(uri) => uri.strip_prefix(SCHEME),
            _ => None,
        });
    let (Some(uri), None) = (uris.next(), uris.next()) else { return Err(IdentityError::NotNave) };
    let (cluster, path) = match uri.split_once('/') {
        Some((cluster, path)) => (cluster, Some(path.to_owned())),
        None => (uri, None),
    };
    let cluster = cluster.parse().map_err(|_| IdentityError::Uri(format!("{SCHEME}{uri}")))?;
    Ok((cluster, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_survive_their_own_text() {
        for role in [
            Role::Member(MemberId(1)),
            Role::Agent(HostId(3)),
            Role::Operator("ada.lovelace@example.org".into()),
        ] {
            assert_eq!(role.to_string().parse(), Ok(role));
        }
    }

    #[test]
    fn a_role_that_is_not_exactly_one_is_refused() {
        for text in
            ["", "member", "member/h-1", "agent/3", "agent/h-3/x", "operator/", "operator/a b", "root/x"]
        {
            assert_eq!(text.parse::<Role>(), Err(IdentityError::Uri(text.into())), "{text}");
        }
    }
}
