//! The agent's name server, on the first address of its prefix (`127.88.0.1:53`), UDP and TCP: names of services, from
//! the directory, which is there without a hub too. `answer.rs` decides; here are sockets, and their bounds.

mod answer;
mod naming;
pub(crate) mod resolv;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use nave_agent_core::address::service_address;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::directory::Ways;
use crate::sockets::Sockets;
use answer::Names;
pub(crate) use naming::{Begun, Naming, Resolver};

const PORT: u16 = 53;
/// A question has some 100 bytes; a longer packet is none.
const QUERY_BYTES_MAX: usize = 4096;
/// Resolvers use TCP after an answer that was cut, which ours never are.
const CONNECTIONS_MAX: usize = 32;
const CONNECTION_IDLE: Duration = Duration::from_secs(5);

/// Where it listens.
pub(crate) fn address(prefix: [u8; 2]) -> Ipv4Addr {
    Ipv4Addr::new(prefix[0], prefix[1], 0, 1)
}

/// Bound, and not serving yet.
#[derive(Debug)]
pub(crate) struct DnsServer {
    udp: UdpSocket,
    tcp: TcpListener,
    names: Arc<HostNames>,
}

#[derive(Debug)]
struct HostNames {
    prefix: [u8; 2],
    ways: Ways,
}

impl Names for HostNames {
    fn address(&self, service: &str) -> Option<Ipv4Addr> {
        service_address(self.prefix, self.ways.suffix(service)?.into())
    }

    fn port(&self, service: &str, port: &str) -> Option<u16> {
        let callable = self.ways.to(service)?;
        callable.ports.iter().find(|one| *one.name == *port).map(|one| one.address.port())
    }

    fn single(&self, service: &str, ordinal: &str) -> Option<Ipv4Addr> {
        self.ways.single(service, Self::ordinal(ordinal)?)
    }

    fn single_port(&self, service: &str, ordinal: &str, port: &str) -> Option<u16> {
        self.ways.single_port(service, Self::ordinal(ordinal)?, port)
    }
}

impl HostNames {
    fn ordinal(ordinal: &str) -> Option<u32> {
        // One number has one name.
        ordinal.parse().ok().filter(|number: &u32| number.to_string() == ordinal)
    }
}

impl DnsServer {
    /// # Errors
    /// Another program has the port, or this agent may not listen there.
    fn bind_at(at: SocketAddr, sockets: &mut Sockets, prefix: [u8; 2], ways: Ways) -> std::io::Result<Self> {
        let udp = sockets.udp("dns", at)?;
        let tcp = sockets.tcp("dns", udp.local_addr()?)?;
        Ok(Self { udp, tcp, names: Arc::new(HostNames { prefix, ways }) })
    }

    /// Answers until `shutdown`.
    pub(crate) async fn serve(self, shutdown: CancellationToken) {
        let (connections, room) = (TaskTracker::new(), Arc::new(Semaphore::new(CONNECTIONS_MAX)));
        let mut buffer = [0; QUERY_BYTES_MAX];
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                received = self.udp.recv_from(&mut buffer) => match received {
                    Ok((length, from)) => {
                        if let Some(answer) = answer::answer(&*self.names, &buffer[..length]) {
                            // One that cannot be sent now is asked for again.
                            let _sent = self.udp.try_send_to(&answer, from);
                        }
                    }
                    // Of a client that is gone; the socket is as good as before.
                    Err(error) => debug!(%error, "a question could not be received"),
                },
                accepted = self.tcp.accept() => {
                    // Too many: this one is closed.
                    if let (Ok((stream, _)), Ok(permit)) = (accepted, room.clone().try_acquire_owned()) {
                        let (names, shutdown) = (self.names.clone(), shutdown.clone());
                        connections.spawn(async move {
                            tokio::select! {
                                _ = converse(stream, &names) => {}
                                () = shutdown.cancelled() => {}
                            }
                            drop(permit);
                        });
                    }
                }
            }
        }
        connections.close();
        connections.wait().await;
    }
}

/// Questions one after another, each behind its length.
async fn converse(mut stream: TcpStream, names: &HostNames) -> std::io::Result<()> {
    let mut query = vec![0; QUERY_BYTES_MAX];
    loop {
        let turn = async {
            let length = usize::from(stream.read_u16().await?);
            let Some(query) = query.get_mut(..length) else {
                return Err(std::io::ErrorKind::InvalidData.into());
            };
            stream.read_exact(query).await?;
            let answer = answer::answer(names, query).ok_or(std::io::ErrorKind::InvalidData)?;
            let length = u16::try_from(answer.len()).map_err(std::io::Error::other)?;
            stream.write_all(&[&length.to_be_bytes(), answer.as_slice()].concat()).await
        };
        tokio::time::timeout(CONNECTION_IDLE, turn).await??;
    }
}
