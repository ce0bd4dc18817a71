//! Connections to the other members, one lazy channel per member and purpose, kept for as long as the address stays.
//! openraft asks for a new client at every election and whenever a stream is rebuilt; without this each would pay for a
//! TLS handshake. Purposes do not share a connection, so that a heartbeat never waits behind a snapshot's bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use nave_proto::ids::MemberId;
use nave_tls::{ChannelOptions, Credentials, Expect};
use parking_lot::Mutex;
use tonic::transport::Channel;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Purpose {
    Append,
    /// Heartbeats, votes and transfers: small, and late is as good as lost.
    Heartbeat,
    Snapshot,
    /// Forwarded proposals and read indexes.
    Forward,
}

#[derive(Debug)]
pub(crate) struct Channels {
    credentials: Credentials,
    open: Mutex<BTreeMap<(MemberId, Purpose), (String, Channel)>>,
}

impl Channels {
    pub(crate) fn new(credentials: Credentials) -> Self {
        Self { credentials, open: Mutex::default() }
    }

    /// Closes the channels to all others.
    pub(crate) fn retain(&self, members: &BTreeSet<MemberId>) {
        self.open.lock().retain(|(member, _), _| members.contains(member));
    }

    /// The channel to a member; connects at its first call. Must be called within the runtime.
    pub(crate) fn get(&self, member: MemberId, address: &str, purpose: Purpose) -> Channel {
        let mut open = self.open.lock();
        if let Some((known, channel)) = open.get(&(member, purpose))
            && known == address
        {
            return channel.clone();
        }
        let channel =
            nave_tls::channel(address, &self.credentials, Expect::MemberId(member), options(purpose));
        open.insert((member, purpose), (address.to_owned(), channel.clone()));
        channel
    }
}

fn options(purpose: Purpose) -> ChannelOptions {
    let ms = Duration::from_millis;
    let (connect, ping, answer) = match purpose {
        // A stream of appends has no time-out of its own: only the pings notice that the peer is gone.
        Purpose::Append | Purpose::Heartbeat => (ms(500), ms(200), ms(300)),
        // Losing this connection makes the outcome of what was forwarded unknown, so it is not given up lightly.
        Purpose::Forward => (ms(500), ms(500), ms(1000)),
        Purpose::Snapshot => (ms(2000), ms(1000), ms(5000)),
    };
    ChannelOptions {
        connect_timeout: connect,
        keep_alive_interval: Some(ping),
        keep_alive_timeout: answer,
        keep_alive_while_idle: true,
        ..ChannelOptions::default()
    }
}
