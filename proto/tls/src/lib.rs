//! Mutual TLS between the parts of a cluster: who signs, who may connect, and how a connection learns its peer.
//!
//! Every identity is a SAN URI, `nave://<cluster>/member/m-1`, and nothing else in a certificate is looked at:
//! no DNS names, so an address may change without a new certificate. One CA per cluster; its key is held by every
//! member ([`Authority`]). Leaves are short-lived and swapped in place ([`Credentials::replace`]).
//!
//! Used by the hub, the agent and the command line. It moves bytes and says who sent them; what a role may do is
//! decided by the API that is called, through [`peer`].

mod authority;
mod client;
mod clock;
mod connect_error;
mod credentials;
mod files;
mod identity;
mod incoming;
mod keys;
mod provider;
mod server;
mod server_verifier;

pub use authority::{
    AGENT_VALIDITY, Authority, IssueError, MEMBER_VALIDITY, OPERATOR_VALIDITY, csr_public_key_sha256,
};
pub use client::{ChannelOptions, ClientConnection, Dialer, Expect, channel, client_config, enroll_channel};
pub use connect_error::{ConnectError, Refusal, connect_error};
pub use credentials::{Credentials, CredentialsError};
pub use files::FileError;
pub use identity::{IdentityError, PeerIdentity, Role};
pub use incoming::{IncomingLimits, PeerInfo, TlsConnection, incoming, peer, peer_info, peer_or_expired};
pub use keys::{KeyError, KeyPair};
pub use server::{ClientPolicy, server_config, server_config_of};
