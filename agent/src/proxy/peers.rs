//! The other hosts' agents: where they are, and the connections to them. Between agents everything is under TLS that both
//! ends prove themselves by; the callee's agent is the only way to an instance of its host.
//!
//! A request of HTTP/1.1 travels as it is on a connection of its own for as long as it lasts, from a pool that all
//! callers of a host share: nothing waits behind another's download, and neither end translates. (Streams of one HTTP/2
//! connection would need fewer sockets, and all wait for one lost packet.)

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use nave_agent_core::directory::Host;
use nave_proto::ids::HostId;
use nave_tls::{ClientConnection, Credentials, Dialer, Expect};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::http1::Pool;
use super::stream::{For, begin};
use super::to::To;

/// ALPN: requests of HTTP/1.1, each with a `Nave-To`.
pub(crate) const HTTP1: &[u8] = b"nave-http1";
/// ALPN: bytes both ways, after the words of [`stream`](super::stream).
pub(crate) const STREAM: &[u8] = b"nave-stream";
/// To connect to another host, TCP and TLS together. A site's round trip is a millisecond; what takes longer than this
/// is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Connections for requests that are opened to one host at a time. More would take each other's time until none is done
/// within its own, and meanwhile others come free.
const DIALS_MAX: usize = 16;

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    credentials: Option<Credentials>,
    hosts: ArcSwap<BTreeMap<HostId, Arc<Peer>>>,
    /// Connections of HTTP/1.1 that wait for their next request.
    pub(crate) idle: Pool<HostId>,
}

#[derive(Debug)]
struct Peer {
    address: String,
    http1: Dialer,
    dials: Arc<Semaphore>,
    stream: Dialer,
}

impl Peers {
    /// `credentials`: this agent's own.
    pub(crate) fn new(credentials: Credentials) -> Self {
        Self { credentials: Some(credentials), ..Self::default() }
    }

    /// The hosts are now these. Connections to one whose address has changed are not used again.
    pub(crate) fn set(&self, hosts: &[Host]) {
        let Some(credentials) = &self.credentials else { return };
        let before = self.hosts.load_full();
        let peer = |host: &Host| {
            let known = before.get(&host.id).filter(|peer| peer.address == host.address);
            known.cloned().unwrap_or_else(|| Arc::new(Peer::new(host, credentials)))
        };
        let now: BTreeMap<HostId, Arc<Peer>> = hosts.iter().map(|host| (host.id, peer(host))).collect();
        self.idle.keep(|host| match (before.get(&host), now.get(&host)) {
            (Some(before), Some(now)) => Arc::ptr_eq(before, now),
            _ => false,
        });
        self.hosts.store(Arc::new(now));
    }

    /// A turn to open a connection for requests: a burst opens some, and its other calls take those that come free.
    ///
    /// # Errors
    /// The host is not known, or there was no turn in time.
    pub(crate) async fn turn(&self, host: HostId) -> io::Result<OwnedSemaphorePermit> {
        let turn = timeout(CONNECT_TIMEOUT, self.peer(host)?.dials.clone().acquire_owned()).await;
        Ok(turn.map_err(|_| io::ErrorKind::TimedOut)?.expect("it is never closed"))
    }

    /// A new connection for requests to instances of this host.
    ///
    /// # Errors
    /// The host is not known, or its agent does not answer, or is another.
    pub(crate) async fn http1(&self, host: HostId) -> io::Result<ClientConnection> {
        connect(&self.peer(host)?.http1).await
    }

    /// A stream to an endpoint of this host.
    ///
    /// # Errors
    /// As for [`http1`](Self::http1), or its agent refuses: nothing of the caller's was sent.
    pub(crate) async fn stream(
        &self,
        host: HostId,
        to: &To,
        caller: For<'_>,
    ) -> io::Result<ClientConnection> {
        let mut connection = connect(&self.peer(host)?.stream).await?;
        let begun = timeout(CONNECT_TIMEOUT, begin(&mut connection, to, caller)).await;
        begun.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        Ok(connection)
    }

    fn peer(&self, host: HostId) -> io::Result<Arc<Peer>> {
        let peer = self.hosts.load().get(&host).cloned();
        peer.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{host} is not known")))
    }
}

async fn connect(dialer: &Dialer) -> io::Result<ClientConnection> {
    dialer.connect().await.map_err(|error| io::Error::new(io::ErrorKind::ConnectionRefused, error))
}

impl Peer {
    fn new(host: &Host, credentials: &Credentials) -> Self {
        let dialer = |protocol| {
            Dialer::new(&host.address, credentials, Expect::Agent(host.id), protocol, CONNECT_TIMEOUT)
        };
        let dials = Arc::new(Semaphore::new(DIALS_MAX));
        Self { address: host.address.clone(), http1: dialer(HTTP1), dials, stream: dialer(STREAM) }
    }
}
