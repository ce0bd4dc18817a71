//! For tests: an address that nobody listens on.

use std::net::SocketAddr;

use tokio::net::TcpSocket;

/// Held, so that no other test gets the port meanwhile.
#[derive(Debug)]
pub(crate) struct Nobody {
    pub(crate) address: SocketAddr,
    _held: TcpSocket,
}

impl Nobody {
    pub(crate) fn new() -> Self {
        let held = TcpSocket::new_v4().unwrap();
        held.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        Self { address: held.local_addr().unwrap(), _held: held }
    }
}
