//! Accepting connections: handshakes run beside each other, bounded in number and time, so that a slow or hostile
//! client costs one slot for five seconds and nobody else anything.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::identity::{Leaf, PeerIdentity};

/// Bounds of one listener.
#[derive(Debug, Clone, Copy)]
pub struct IncomingLimits {
    /// Handshakes under way at once; the rest wait in the kernel's backlog.
    pub handshakes: usize,
    /// A handshake that takes longer is dropped.
    pub handshake_timeout: Duration,
    /// Open connections; the listener pauses at this number.
    pub connections: usize,
}

impl Default for IncomingLimits {
    /// 256 handshakes (at 5 s each, 50 a second even when all clients stall), 16384 connections.
    fn default() -> Self {
        Self { handshakes: 256, handshake_timeout: Duration::from_secs(5), connections: 16_384 }
    }
}

/// After an accept error such as "too many open files", which would otherwise spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// For handshakes that have begun, once nothing more is taken.
const LAST_HANDSHAKES: Duration = Duration::from_millis(500);

/// What a request's extensions hold about the connection that it came on.
#[derive(Debug, Clone)]
pub struct PeerInfo {
    /// `None`: no certificate was shown (possible only where the policy allows it).
    pub identity: Option<PeerIdentity>,
    /// The other end of the TCP connection.
    pub remote: SocketAddr,
}

/// The valid identity behind a request. `None` for strangers and for those whose certificate has run out.
pub fn peer<T>(request: &tonic::Request<T>) -> Option<&PeerIdentity> {
    peer_or_expired(request).and_then(PeerIdentity::valid)
}

/// The identity behind a request, run out or not: for `Renew` alone.
pub fn peer_or_expired<T>(request: &tonic::Request<T>) -> Option<&PeerIdentity> {
    peer_info(request).and_then(|info| info.identity.as_ref())
}

/// Whatever is known of the connection behind a request; `None` when it did not come through [`incoming`].
pub fn peer_info<T>(request: &tonic::Request<T>) -> Option<&PeerInfo> {
    request.extensions().get::<PeerInfo>()
}

/// A connection after its handshake.
#[derive(Debug)]
pub struct TlsConnection {
    stream: TlsStream<TcpStream>,
    info: PeerInfo,
    _slot: OwnedSemaphorePermit,
}

impl TlsConnection {
    /// Who is at the other end.
    pub fn info(&self) -> &PeerInfo {
        &self.info
    }

    /// What it speaks, by its ALPN name; `None`: the client named nothing.
    pub fn protocol(&self) -> Option<&[u8]> {
        self.stream.get_ref().1.alpn_protocol()
    }
}

impl Connected for TlsConnection {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.info.clone()
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for TlsConnection {
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

/// Connections whose handshake succeeded, for `Server::serve_with_incoming`. Failed handshakes are logged at debug
/// and end only themselves; the stream yields no errors of its own. After `shutdown` nothing new is taken, and it ends with
/// the last handshake under way: who has been taken is not sent away.
pub fn incoming(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    limits: IncomingLimits,
    shutdown: CancellationToken,
) -> impl Stream<Item = io::Result<TlsConnection>> + Send + 'static {
    let acceptor = Acceptor {
        listener: Some(listener),
        config,
        slots: Arc::new(Semaphore::new(limits.connections.max(1))),
        limits,
        handshakes: JoinSet::new(),
        not_before: None,
        shutdown,
        ends_at: None,
    };
    futures::stream::unfold(acceptor, |mut acceptor| async move {
        acceptor.next().await.map(|connection| (Ok(connection), acceptor))
    })
}

struct Acceptor {
    /// Until nothing is taken any more.
    listener: Option<TcpListener>,
    config: Arc<ServerConfig>,
    slots: Arc<Semaphore>,
    limits: IncomingLimits,
    handshakes: JoinSet<Option<TlsConnection>>,
    not_before: Option<Instant>,
    shutdown: CancellationToken,
    /// Nothing is taken any more, and what has begun has so long.
    ends_at: Option<Instant>,
}

impl Acceptor {
    async fn next(&mut self) -> Option<TlsConnection> {
        let shutdown = self.shutdown.clone();
        loop {
            if self.ends_at.is_some() && self.handshakes.is_empty() {
                return None;
            }
            let accepting = self.listener.is_some() && self.handshakes.len() < self.limits.handshakes;
            tokio::select! {
                biased;
                () = shutdown.cancelled(), if self.ends_at.is_none() => {
                    self.listener = None;
                    self.ends_at = Some(Instant::now() + LAST_HANDSHAKES);
                }
                () = ended(self.ends_at) => return None,
                Some(done) = self.handshakes.join_next() => {
                    if let Ok(Some(connection)) = done {
                        return Some(connection);
                    }
                }
                accepted = accept(self.listener.as_ref(), &self.slots, self.not_before), if accepting => {
                    self.not_before = None;
                    match accepted {
                        Ok((stream, remote, slot)) => {
                            let (config, timeout) = (self.config.clone(), self.limits.handshake_timeout);
                            self.handshakes.spawn(handshake(config, stream, remote, slot, timeout));
                        }
                        Err(error) if is_of_one_connection(&error) => debug!(%error, "connection lost before accept"),
                        Err(error) => {
                            warn!(%error, "cannot accept connections, trying again");
                            self.not_before = Some(Instant::now() + ACCEPT_BACKOFF);
                        }
                    }
                }
            }
        }
    }
}

async fn ended(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Cancel-safe: a slot taken for a connection that has not come yet is given back.
async fn accept(
    listener: Option<&TcpListener>,
    slots: &Arc<Semaphore>,
    not_before: Option<Instant>,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    if let Some(not_before) = not_before {
        tokio::time::sleep_until(not_before).await;
    }
    let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
    let Some(listener) = listener else { return std::future::pending().await };
    let (stream, remote) = listener.accept().await?;
    Ok((stream, remote, slot))
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused
    )
}

async fn handshake(
    config: Arc<ServerConfig>,
    stream: TcpStream,
    remote: SocketAddr,
    slot: OwnedSemaphorePermit,
    timeout: Duration,
) -> Option<TlsConnection> {
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%remote, %error, "connection lost before its handshake");
        return None;
    }
    match tokio::time::timeout(timeout, TlsAcceptor::from(config.clone()).accept(stream)).await {
        Ok(Ok(stream)) => {
            let identity = identity_of(&stream, &config);
            Some(TlsConnection { stream, info: PeerInfo { identity, remote }, _slot: slot })
        }
        Ok(Err(error)) => {
            debug!(%remote, %error, "handshake failed");
            None
        }
        Err(_) => {
            debug!(%remote, "handshake timed out");
            None
        }
    }
}

/// Of a full handshake or a resumed session alike, so a resumed one runs out like any other.
fn identity_of(stream: &TlsStream<TcpStream>, config: &ServerConfig) -> Option<PeerIdentity> {
    let leaf = stream.get_ref().1.peer_certificates()?.first()?;
    let leaf = Leaf::parse(leaf).expect("the verifier has parsed this certificate");
    let now = config.time_provider.current_time().expect("our time provider always knows the time");
    Some(leaf.identity(now.as_secs()))
}
