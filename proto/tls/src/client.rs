//! The client's side: channels that know whom they must find at the other end, by SAN URI and not by DNS name.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nave_proto::ids::{HostId, MemberId};
use parking_lot::Mutex;
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls_pki_types::{DnsName, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use crate::clock;
use crate::connect_error::ConnectError;
use crate::credentials::{Credentials, unix_time};
use crate::identity::Role;
use crate::provider::provider;
use crate::server_verifier::{ServerVerifier, Trust};

/// What tonic speaks.
const HTTP2: &[u8] = b"h2";

/// Whom a client must find at the other end; anyone else is refused before a byte is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Expect {
    /// Any member of the cluster.
    Member,
    /// This member.
    MemberId(MemberId),
    /// This host's agent.
    Agent(HostId),
    /// The agent of whatever host answers there: for an address that only this machine's can have.
    AnyAgent,
}

impl Expect {
    pub(crate) fn accepts(self, role: &Role) -> bool {
        match (self, role) {
            (Self::Member, Role::Member(_)) => true,
            (Self::MemberId(expected), Role::Member(found)) => expected == *found,
            (Self::Agent(expected), Role::Agent(found)) => expected == *found,
            (Self::AnyAgent, Role::Agent(_)) => true,
            _ => false,
        }
    }
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Member => f.write_str("a member"),
            Self::MemberId(id) => write!(f, "member/{id}"),
            Self::Agent(id) => write!(f, "agent/{id}"),
            Self::AnyAgent => f.write_str("an agent"),
        }
    }
}

/// How a channel behaves. The defaults suit calls between machines of one site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChannelOptions {
    /// TCP and TLS together.
    pub connect_timeout: Duration,
    /// An HTTP/2 PING this often; `None`: never, and a dead peer is noticed by the calls' own deadlines.
    pub keep_alive_interval: Option<Duration>,
    /// A PING not answered for this long ends the connection.
    pub keep_alive_timeout: Duration,
    /// PING also while no call is under way.
    pub keep_alive_while_idle: bool,
    /// Calls under way at once; more wait in the client. `None`: as many as the server allows.
    pub concurrency_limit: Option<usize>,
    /// HTTP/2 flow-control window of one stream, in bytes.
    pub stream_window_bytes: u32,
    /// HTTP/2 flow-control window of the connection, in bytes.
    pub connection_window_bytes: u32,
}

impl Default for ChannelOptions {
    /// 3 s to connect; a PING each 5 s, idle or not, 3 s for its answer; windows of 1 MiB and 4 MiB (a site's
    /// 1 Gbit/s times 10 ms is 1.25 MB).
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(3),
            keep_alive_interval: Some(Duration::from_secs(5)),
            keep_alive_timeout: Duration::from_secs(3),
            keep_alive_while_idle: true,
            concurrency_limit: None,
            stream_window_bytes: 1 << 20,
            connection_window_bytes: 4 << 20,
        }
    }
}

impl ChannelOptions {
    fn endpoint(&self) -> Endpoint {
        // The name is what servers see as `:authority`; the connector knows the address.
        let mut endpoint = Endpoint::from_static("http://nave")
            .keep_alive_timeout(self.keep_alive_timeout)
            .keep_alive_while_idle(self.keep_alive_while_idle)
            .initial_stream_window_size(self.stream_window_bytes)
            .initial_connection_window_size(self.connection_window_bytes);
        if let Some(interval) = self.keep_alive_interval {
            endpoint = endpoint.http2_keep_alive_interval(interval);
        }
        if let Some(limit) = self.concurrency_limit {
            endpoint = endpoint.concurrency_limit(limit);
        }
        endpoint
    }
}

/// A channel to `address` (`host:port`), connected at its first call and again after each loss. Must be called
/// within a tokio runtime. Sessions are resumed, but never past a [`Credentials::replace`].
pub fn channel(address: &str, credentials: &Credentials, expect: Expect, options: ChannelOptions) -> Channel {
    let connector = Connector {
        address: address.into(),
        timeout: options.connect_timeout,
        tls: Arc::new(Tls::Credentials {
            credentials: credentials.clone(),
            expect,
            protocol: HTTP2,
            cached: Mutex::new(None),
        }),
    };
    connector.channel(options)
}

/// Connections that are not tonic channels, to one peer in one protocol. Cheap to clone; clones share their sessions.
#[derive(Clone)]
pub struct Dialer(Connector);

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialer").field("address", &self.0.address).finish_non_exhaustive()
    }
}

impl Dialer {
    /// To `address` (`host:port`), where whom `expect` says must be found, speaking `protocol` (an ALPN name). A
    /// connection that is not there within `timeout`, TCP and TLS together, is given up. Sessions are resumed, but never
    /// past a [`Credentials::replace`].
    pub fn new(
        address: &str,
        credentials: &Credentials,
        expect: Expect,
        protocol: &'static [u8],
        timeout: Duration,
    ) -> Self {
        let (credentials, cached) = (credentials.clone(), Mutex::new(None));
        let tls = Tls::Credentials { credentials, expect, protocol, cached };
        Self(Connector { address: address.into(), timeout, tls: Arc::new(tls) })
    }

    /// A connection after its handshake.
    ///
    /// # Errors
    /// Nobody answers, or not whom we expect, or not in that protocol. That the peer refuses our own certificate is told
    /// by the first read.
    pub async fn connect(&self) -> Result<ClientConnection, ConnectError> {
        self.0.connect_in_time().await
    }
}

/// A channel without a client certificate, for `Enroll`: the server must be a member whose chain ends in the CA
/// certificate with this SHA-256.
pub fn enroll_channel(address: &str, ca_sha256: [u8; 32]) -> Channel {
    let options = ChannelOptions::default();
    let connector = Connector {
        address: address.into(),
        timeout: options.connect_timeout,
        tls: Arc::new(Tls::Enroll(pinned_config(ca_sha256))),
    };
    connector.channel(options)
}

/// The TLS configuration of one kind of connection, for connections that are not tonic channels. It shows whatever
/// certificate `credentials` hold at each handshake; sessions are not resumed.
pub fn client_config(credentials: &Credentials, expect: Expect) -> ClientConfig {
    let trust = Trust::Cluster { cluster: credentials.cluster(), roots: credentials.roots().clone(), expect };
    let mut config = ClientConfig::builder_with_details(provider(), credentials.reloadable().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3 suites")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier::new(trust)))
        .with_client_cert_resolver(credentials.reloadable().clone());
    finish(&mut config);
    config
}

fn pinned_config(ca_sha256: [u8; 32]) -> Arc<ClientConfig> {
    let mut config = ClientConfig::builder_with_details(provider(), Arc::new(SystemTime))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("the provider has TLS 1.3 suites")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier::new(Trust::Pinned { ca_sha256 })))
        .with_no_client_auth();
    finish(&mut config);
    Arc::new(config)
}

fn finish(config: &mut ClientConfig) {
    config.alpn_protocols = vec![HTTP2.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
}

#[derive(Debug)]
struct SystemTime;

impl rustls::time_provider::TimeProvider for SystemTime {
    fn current_time(&self) -> Option<rustls_pki_types::UnixTime> {
        Some(unix_time(clock::unix_seconds()))
    }
}

enum Tls {
    Credentials {
        credentials: Credentials,
        expect: Expect,
        protocol: &'static [u8],
        cached: Mutex<Option<(u64, Arc<ClientConfig>)>>,
    },
    Enroll(Arc<ClientConfig>),
}

impl Tls {
    /// A session begun with an older certificate would, resumed, show that one again: a new generation of
    /// credentials begins with an empty session store.
    fn config(&self) -> Arc<ClientConfig> {
        match self {
            Self::Enroll(config) => config.clone(),
            Self::Credentials { credentials, expect, protocol, cached } => {
                let generation = credentials.reloadable().generation();
                let mut cached = cached.lock();
                match &*cached {
                    Some((of, config)) if *of == generation => config.clone(),
                    _ => {
                        let mut config = client_config(credentials, *expect);
                        config.alpn_protocols = vec![protocol.to_vec()];
                        // One server, so one entry with its few tickets.
                        config.resumption = Resumption::in_memory_sessions(1);
                        let config = Arc::new(config);
                        *cached = Some((generation, config.clone()));
                        config
                    }
                }
            }
        }
    }
}

#[derive(Clone)]
struct Connector {
    address: Arc<str>,
    timeout: Duration,
    tls: Arc<Tls>,
}

impl Connector {
    fn channel(self, options: ChannelOptions) -> Channel {
        options.endpoint().connect_with_connector_lazy(tower::service_fn(move |_uri: http::Uri| {
            let connector = self.clone();
            async move { connector.connect_in_time().await.map(TokioIo::new) }
        }))
    }

    async fn connect_in_time(&self) -> Result<ClientConnection, ConnectError> {
        tokio::time::timeout(self.timeout, self.connect())
            .await
            .map_err(|_| ConnectError::Timeout { address: self.address.to_string(), after: self.timeout })?
    }

    async fn connect(&self) -> Result<ClientConnection, ConnectError> {
        let address = || self.address.to_string();
        if !is_host_and_port(&self.address) {
            return Err(ConnectError::Address { address: address() });
        }
        let unreachable = |source| ConnectError::Unreachable { address: address(), source };
        let tcp = TcpStream::connect(&*self.address).await.map_err(unreachable)?;
        tcp.set_nodelay(true).map_err(unreachable)?;
        // No names are checked; rustls wants one as the key of its session store.
        let name = ServerName::DnsName(DnsName::try_from("nave").expect("a valid name"));
        let stream = TlsConnector::from(self.tls.config())
            .connect(name, tcp)
            .await
            .map_err(|error| ConnectError::of_handshake(address(), error))?;
        Ok(ClientConnection { stream })
    }
}

fn is_host_and_port(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

/// A connection that we opened. In TLS 1.3 a server's verdict on our certificate arrives with the first read: said here
/// in plain words.
#[derive(Debug)]
pub struct ClientConnection {
    stream: TlsStream<TcpStream>,
}

impl ClientConnection {
    /// Whether nothing has come from the peer that is not read yet, not even its end; asks no kernel, only what the
    /// runtime knows.
    pub fn is_quiet(&self) -> bool {
        let mut context = Context::from_waker(std::task::Waker::noop());
        self.stream.get_ref().0.poll_read_ready(&mut context).is_pending()
    }
}

impl AsyncRead for ClientConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf).map_err(crate::connect_error::explain_alert)
    }
}

impl AsyncWrite for ClientConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
