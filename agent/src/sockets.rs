//! The agent's own sockets that outlive it: its port, where other hosts call, and those of its name server. The keeper
//! holds a second end of each, and so does this process while it waits for its next keeper: whoever calls in between
//! waits in the socket's backlog, and nobody is refused.
//!
//! The proxy's listeners, which come and go with services, see to themselves.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener, UdpSocket as StdUdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};

use tokio::net::{TcpListener, TcpSocket, UdpSocket};
use tracing::warn;

use crate::keeper::{CallError, KeeperHandle};

/// Callers that wait while no agent takes them.
const BACKLOG: u32 = 4096;
/// What the keeper calls them.
const NAME_PREFIX: &str = "agent/";

/// See the module's description.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    /// In use, by the keeper's name for it.
    own: BTreeMap<String, OwnedFd>,
    /// Of the agent before, not asked for yet.
    inherited: BTreeMap<String, OwnedFd>,
}

impl Sockets {
    /// Takes what the keeper holds of the agent before.
    ///
    /// # Errors
    /// The keeper is lost. One that holds no descriptors is none.
    pub(crate) async fn inherit(&mut self, keeper: &KeeperHandle) -> Result<(), CallError> {
        let names = keeper.descriptors().await.or_else(unless_lost)?;
        for name in names.into_iter().filter(|name| name.starts_with(NAME_PREFIX)) {
            if self.own.contains_key(&name) {
                continue;
            }
            match keeper.take_descriptor(name.clone()).await {
                Ok(socket) => drop(self.inherited.insert(name, socket)),
                Err(CallError::Lost) => return Err(CallError::Lost),
                Err(error) => warn!(name, ?error, "a socket of the agent before cannot be had"),
            }
        }
        Ok(())
    }

    /// The listener for `what` at this address: the one that is there already, or a new one.
    ///
    /// # Errors
    /// As of a bind.
    pub(crate) fn tcp(&mut self, what: &str, address: SocketAddr) -> io::Result<TcpListener> {
        let name = format!("{NAME_PREFIX}{what}/tcp/{address}");
        if let Some(listener) = self.known(&name)?.map(StdListener::from)
            && is_at(listener.local_addr(), address)
        {
            listener.set_nonblocking(true)?;
            return TcpListener::from_std(listener);
        }
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4()?,
            SocketAddr::V6(_) => TcpSocket::new_v6()?,
        };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let listener = socket.listen(BACKLOG)?;
        self.own.insert(name, listener.as_fd().try_clone_to_owned()?);
        Ok(listener)
    }

    /// The same for datagrams.
    ///
    /// # Errors
    /// As of a bind.
    pub(crate) fn udp(&mut self, what: &str, address: SocketAddr) -> io::Result<UdpSocket> {
        let name = format!("{NAME_PREFIX}{what}/udp/{address}");
        if let Some(socket) = self.known(&name)?.map(StdUdpSocket::from)
            && is_at(socket.local_addr(), address)
        {
            socket.set_nonblocking(true)?;
            return UdpSocket::from_std(socket);
        }
        let socket = StdUdpSocket::bind(address)?;
        socket.set_nonblocking(true)?;
        self.own.insert(name, socket.as_fd().try_clone_to_owned()?);
        UdpSocket::from_std(socket)
    }

    fn known(&mut self, name: &str) -> io::Result<Option<OwnedFd>> {
        if let Some(socket) = self.inherited.remove(name) {
            self.own.insert(name.to_owned(), socket);
        }
        self.own.get(name).map(OwnedFd::try_clone).transpose()
    }

    /// The keeper holds these now, and none that nobody has asked for.
    ///
    /// # Errors
    /// The keeper is lost. One that does not hold them is complained of.
    pub(crate) async fn keep(&mut self, keeper: &KeeperHandle) -> Result<(), CallError> {
        self.inherited.clear();
        let held = keeper.descriptors().await.or_else(unless_lost)?;
        for name in held.iter().filter(|name| name.starts_with(NAME_PREFIX)) {
            if !self.own.contains_key(name) {
                keeper.drop_descriptor(name.clone()).await.or_else(unless_lost)?;
            }
        }
        for (name, socket) in &self.own {
            let Ok(socket) = socket.try_clone() else {
                warn!(name, "no descriptor is left to keep a socket with");
                continue;
            };
            match keeper.store_descriptor(name.clone(), socket).await {
                Ok(()) => {}
                Err(CallError::Lost) => return Err(CallError::Lost),
                Err(error) => {
                    warn!(name, ?error, "the keeper does not hold this: a restart refuses its callers");
                }
            }
        }
        Ok(())
    }
}

/// A keeper of another build may hold nothing; sockets that end with the agent are better than none.
fn unless_lost<T: Default>(error: CallError) -> Result<T, CallError> {
    match error {
        CallError::Lost => Err(CallError::Lost),
        CallError::Refused(_) | CallError::Unsupported => Ok(T::default()),
    }
}

/// Port 0 was any.
fn is_at(own: io::Result<SocketAddr>, wanted: SocketAddr) -> bool {
    own.is_ok_and(|own| own.ip() == wanted.ip() && (own.port() == wanted.port() || wanted.port() == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_there_for_the_next_who_asks() {
        let mut sockets = Sockets::default();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let first = sockets.tcp("listen", any).unwrap();
        let address = first.local_addr().unwrap();
        drop(first);
        let waiting = tokio::net::TcpStream::connect(address).await.unwrap();
        let again = sockets.tcp("listen", any).unwrap();
        assert_eq!(again.local_addr().unwrap(), address);
        let (_, from) = again.accept().await.unwrap();
        assert_eq!(from, waiting.local_addr().unwrap(), "who came in between has waited");

        let first = sockets.udp("dns", any).unwrap();
        let address = first.local_addr().unwrap();
        drop(first);
        let asking = UdpSocket::bind(any).await.unwrap();
        asking.send_to(b"?", address).await.unwrap();
        let mut heard = [0; 8];
        let again = sockets.udp("dns", any).unwrap();
        let heard_from =
            tokio::time::timeout(std::time::Duration::from_secs(10), again.recv_from(&mut heard));
        let (length, _) = heard_from.await.unwrap().unwrap();
        assert_eq!(&heard[..length], b"?");
    }

    #[tokio::test]
    async fn what_the_agent_before_had_is_taken_over_with_who_waits_in_it() {
        let free = || StdListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
        let (listen, dns) = (free(), free());
        let mut before = Sockets::default();
        before.tcp("listen", listen).unwrap();
        before.udp("dns", dns).unwrap();
        let waiting = tokio::net::TcpStream::connect(listen).await.unwrap();
        // As the keeper gives them out.
        let mut next = Sockets { inherited: before.own, ..Sockets::default() };
        let taken = next.tcp("listen", listen).unwrap();
        let accepted = tokio::time::timeout(std::time::Duration::from_secs(10), taken.accept()).await;
        assert_eq!(accepted.unwrap().unwrap().1, waiting.local_addr().unwrap());
        assert_eq!(next.udp("dns", dns).unwrap().local_addr().unwrap(), dns);
        assert!(next.inherited.is_empty() && next.own.len() == 2, "the keeper after this one gets both");
    }

    #[tokio::test]
    async fn a_socket_of_another_address_is_not_taken_for_it() {
        let mut sockets = Sockets::default();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let wrong = StdListener::bind(any).unwrap();
        let wrong_address = wrong.local_addr().unwrap();
        let right = StdListener::bind(any).unwrap().local_addr().unwrap();
        sockets.inherited.insert(format!("agent/listen/tcp/{right}"), wrong.into());
        assert_eq!(sockets.tcp("listen", right).unwrap().local_addr().unwrap(), right);
        assert_ne!(right, wrong_address);
    }
}
