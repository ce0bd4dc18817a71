//! A connection to or from whoever: in the clear on this host, under TLS between agents.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use nave_tls::ClientConnection;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// A connection that we opened.
#[derive(Debug)]
pub(crate) enum Wire {
    /// To an endpoint on this host.
    Local(TcpStream),
    /// To the agent of another.
    Peer(Box<ClientConnection>),
}

impl Wire {
    /// Nothing has come that is not read yet, not even an end. Asks no kernel, only what the runtime knows.
    pub(crate) fn is_quiet(&self) -> bool {
        match self {
            Self::Local(stream) => {
                stream.poll_read_ready(&mut Context::from_waker(Waker::noop())).is_pending()
            }
            Self::Peer(connection) => connection.is_quiet(),
        }
    }

    /// Watched by the thread that asks from now on. One to another agent is left where it is: it works from here too, at
    /// the price of a wake-up for what comes, and to begin another costs two round trips and a handshake.
    ///
    /// # Errors
    /// It is of no more use.
    pub(crate) fn watched_here(self) -> io::Result<Self> {
        match self {
            Self::Local(stream) => Ok(Self::Local(TcpStream::from_std(stream.into_std()?)?)),
            peer @ Self::Peer(_) => Ok(peer),
        }
    }

    /// An agent of this cluster is at the other end.
    pub(crate) fn is_peer(&self) -> bool {
        matches!(self, Self::Peer(_))
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Local(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Peer(connection) => Pin::new(connection).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Local(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Peer(connection) => Pin::new(connection).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Local(stream) => Pin::new(stream).poll_flush(cx),
            Self::Peer(connection) => Pin::new(connection).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Local(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Peer(connection) => Pin::new(connection).poll_shutdown(cx),
        }
    }
}
