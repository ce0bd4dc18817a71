//! What a host knows of the cluster's services: who they are, at which address callers find them, and which endpoints
//! stand behind. Plain words between the session that hears them from the hub, the proxy that calls them and the name
//! server that says them; nothing here is protobuf, and nothing knows how an endpoint is reached.

mod known;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nave_proto::ids::{HostId, InstanceId};

pub use known::{Directory, DirectoryChange, DirectoryRefusal};

/// A service that others may call: one with ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub name: Arc<str>,
    /// Second half of its address on every host; see [`crate::address::service_address`].
    pub suffix: u16,
    /// By name.
    pub ports: Vec<Port>,
    /// Services (and `host/<name>/uid/<n>`) that may call it; `None`: all.
    pub allow: Option<Vec<String>>,
    /// By instance and epoch.
    pub endpoints: Vec<Endpoint>,
}

/// One port of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    pub name: Arc<str>,
    pub protocol: Protocol,
    /// Where callers find it on the service's address.
    pub service_port: u16,
    pub rules: PortRules,
}

/// How a port's bytes are to be understood; declared, never guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Http,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// HTTP/2 whose outcome is in the `grpc-status` of the trailers.
    Grpc,
    Tcp,
}

impl Protocol {
    /// As the manifest spells it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Http2 => "http2",
            Self::Grpc => "grpc",
            Self::Tcp => "tcp",
        }
    }

    /// The scheme of a port's URL.
    #[must_use]
    pub const fn scheme(self) -> &'static str {
        match self {
            Self::Http | Self::Http2 => "http",
            Self::Grpc => "grpc",
            Self::Tcp => "tcp",
        }
    }
}

/// What the proxy keeps to while it carries calls to one port. The defaults suit a service that says nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortRules {
    /// From the last byte of the request's head to the last byte of the answer; `None`: as long as it takes, since a
    /// stream or a download may.
    pub request_timeout: Option<Duration>,
    /// Of one try, up to the head of its answer; `None`: none but the whole request's.
    pub try_timeout: Option<Duration>,
    /// To connect to an endpoint.
    pub connect_timeout: Duration,
    /// Of a caller's connection without a request on it, or of a TCP stream without a byte either way.
    pub idle_timeout: Duration,
    /// From the first byte of a request to the last of its head.
    pub header_timeout: Duration,
    /// Of a request's head.
    pub header_bytes_max: usize,
    /// Of a body kept to be sent again.
    pub replay_bytes_max: usize,
    /// Callers' connections to this port on this host; more are closed at once.
    pub connections_max: usize,
    /// Requests under way to this port from this host.
    pub requests_max: usize,
    /// Requests and connections that wait for an endpoint while there is none.
    pub pending_max: usize,
    /// How long they wait.
    pub pending_timeout: Duration,
    /// Tries after the first.
    pub retries_max: u32,
    /// Requests with the same value of this header go to the same endpoint while it is there.
    pub hash_header: Option<Arc<str>>,
    /// One line of the agent's log for each request.
    pub access_log: bool,
}

impl PortRules {
    /// What suits a service that says nothing.
    pub const DEFAULT: Self = Self {
        request_timeout: None,
        try_timeout: None,
        connect_timeout: Duration::from_secs(1),
        // TCP keeps quiet connections for an hour, as pools of databases do; the HTTP engines cap it.
        idle_timeout: Duration::from_secs(3600),
        header_timeout: Duration::from_secs(10),
        header_bytes_max: 64 * 1024,
        replay_bytes_max: 64 * 1024,
        connections_max: 4096,
        requests_max: 4096,
        pending_max: 1024,
        pending_timeout: Duration::from_secs(3),
        retries_max: 3,
        hash_header: None,
        access_log: false,
    };
}

impl Default for PortRules {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Where one placement of an instance answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub instance: InstanceId,
    /// Of the placement: another one of the same instance is another endpoint.
    pub epoch: u64,
    /// Which copy of the service it is, from 0.
    pub ordinal: u32,
    pub host: HostId,
    /// By the port's name, on the host's own loopback.
    pub ports: BTreeMap<Arc<str>, u16>,
    pub state: EndpointState,
}

/// Whether an endpoint may be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EndpointState {
    Starting,
    Ready,
    /// Finishes what it has; new calls go elsewhere while there is an elsewhere.
    Draining,
}

/// Another agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub id: HostId,
    pub name: Arc<str>,
    /// `host:port` of its agent.
    pub address: String,
}
