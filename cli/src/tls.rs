//! A client file's PEM texts as credentials, and channels to members made with them.

use std::time::Duration;

use nave_proto::ids::HostId;
use nave_tls::{ChannelOptions, Credentials, Expect, KeyPair};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use tonic::transport::Channel;

use crate::context::Context;
use crate::failure::Failure;

/// A person's patience with an address that does not answer; the others are tried after it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// The operator that the client file speaks for.
pub(crate) fn operator(context: &Context) -> Result<Credentials, Failure> {
    let wrong =
        |key: &str, what: String| Failure::usage(format!("{}: {key}: {what}", context.path.display()));
    let ca = certificate(&context.ca_pem).map_err(|what| wrong("ca", what))?;
    let own = certificate(&context.certificate_pem).map_err(|what| wrong("certificate", what))?;
    let key = KeyPair::from_pem(&context.key_pem).map_err(|error| wrong("key", error.to_string()))?;
    let credentials =
        key.with_certificate(own, ca).map_err(|error| wrong("certificate", error.to_string()))?;
    if credentials.expires_unix() <= crate::clock::now_unix() {
        return Err(wrong("certificate", "it has expired".to_owned())
            .next("a member's operator can issue another; `nave init` and `nave dev` make the first"));
    }
    Ok(credentials)
}

fn certificate(pem: &str) -> Result<Vec<u8>, String> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map(|der| der.to_vec())
        .map_err(|error| format!("not a certificate in PEM ({error})"))
}

/// A lazy channel to the agent of a host; needs a tokio runtime.
pub(crate) fn agent_channel(address: &str, host: HostId, credentials: &Credentials) -> Channel {
    let options = ChannelOptions { connect_timeout: CONNECT_TIMEOUT, ..ChannelOptions::default() };
    nave_tls::channel(address, credentials, Expect::Agent(host), options)
}

/// A lazy channel to this machine's agent, whichever host it is; needs a tokio runtime.
pub(crate) fn own_agent_channel(address: &str, credentials: &Credentials) -> Channel {
    let options = ChannelOptions { connect_timeout: CONNECT_TIMEOUT, ..ChannelOptions::default() };
    nave_tls::channel(address, credentials, Expect::AnyAgent, options)
}

/// A lazy channel to whichever member listens there; needs a tokio runtime.
pub(crate) fn member_channel(address: &str, credentials: &Credentials) -> Channel {
    let options = ChannelOptions { connect_timeout: CONNECT_TIMEOUT, ..ChannelOptions::default() };
    nave_tls::channel(address, credentials, Expect::Member, options)
}
