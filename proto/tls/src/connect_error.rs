//! Why a connection could not be made, in words that a person can act on.

use std::error::Error as StdError;
use std::io;
use std::time::Duration;

use nave_proto::ids::ClusterId;
use rustls::{AlertDescription, CertificateError, Error, OtherError};

use crate::client::Expect;
use crate::identity::Role;

/// A connection that was not made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Not `host:port`.
    #[error("{address:?} is not an address of the form host:port")]
    Address {
        /// As given.
        address: String,
    },
    /// No TCP connection.
    #[error("cannot connect to {address}")]
    Unreachable {
        /// host:port
        address: String,
        /// What the kernel or the resolver said.
        source: io::Error,
    },
    /// Too slow.
    #[error("no answer from {address} within {after:?}")]
    Timeout {
        /// host:port
        address: String,
        /// The limit.
        after: Duration,
    },
    /// The server is not the one that was meant.
    #[error("refused the server at {address}: {refusal}")]
    Refused {
        /// host:port
        address: String,
        /// Why.
        refusal: Refusal,
    },
    /// The handshake failed for another reason.
    #[error("no TLS connection with {address}")]
    Handshake {
        /// host:port
        address: String,
        /// What TLS said.
        source: io::Error,
    },
}

/// Why a server was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A Nave cluster, but not this one.
    #[error("the server belongs to another cluster (it is of {theirs}, we are of {ours})")]
    OtherCluster {
        /// The own cluster.
        ours: ClusterId,
        /// The server's.
        theirs: ClusterId,
    },
    /// It claims this cluster, and this cluster's CA did not sign it.
    #[error("the server's certificate was not issued by this cluster's authority")]
    NotVouchedFor,
    /// Its CA is not the pinned one.
    #[error(
        "the server's authority is not the one that the join token names; is the token of another cluster?"
    )]
    OtherAuthority,
    /// Not one of Nave's certificates.
    #[error("the server is not part of a Nave cluster")]
    NotNave,
    /// Run out, or not valid yet.
    #[error("the server's certificate has run out or is not valid yet; compare the clocks of both machines")]
    OutOfDate,
    /// Of this cluster, but someone else.
    #[error("expected {expected}, found {found}")]
    WrongPeer {
        /// Who was meant.
        expected: Expect,
        /// Who answered.
        found: Role,
    },
}

impl ConnectError {
    pub(crate) fn of_handshake(address: String, source: io::Error) -> Self {
        match refusal(&source) {
            Some(refusal) => Self::Refused { address, refusal },
            None => Self::Handshake { address, source: explain_alert(source) },
        }
    }
}

/// The reason behind a failed call, when it is that no connection could be made: such a call was certainly never
/// sent. Finds it in a `tonic::Status` as well as in a transport error.
pub fn connect_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a ConnectError> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

fn refusal(error: &io::Error) -> Option<Refusal> {
    match error.get_ref()?.downcast_ref()? {
        Error::InvalidCertificate(CertificateError::Other(OtherError(other))) => {
            other.downcast_ref().cloned()
        }
        _ => None,
    }
}

/// A TLS alert about our certificate, in words.
pub(crate) fn explain_alert(error: io::Error) -> io::Error {
    let alert = match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(Error::AlertReceived(alert)) => *alert,
        _ => return error,
    };
    let why = match alert {
        AlertDescription::CertificateRequired => "the server wants a certificate and we have none",
        AlertDescription::CertificateExpired => "the server refused our certificate: it has run out",
        AlertDescription::UnknownCA
        | AlertDescription::BadCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::DecryptError
        | AlertDescription::AccessDenied => "the server refused our certificate: is it of another cluster?",
        _ => return error,
    };
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}
