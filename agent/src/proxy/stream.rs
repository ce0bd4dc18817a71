//! Streams of bytes between agents: one TLS connection for each, begun by two lines that say for whom it is and who
//! calls, and by one in answer. Until that answer nothing of the caller's has been sent, so a refusal sends it elsewhere.
//!
//! ```text
//! db main 7 2          service, port, instance, epoch
//! web                  the caller; `*`: its agent has held each call against the list itself
//! ok                   or one sentence why not
//! ```

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nave_agent_core::balancer::{Pick, Reach};
use nave_agent_core::directory::Protocol;
use nave_tls::{ClientConnection, TlsConnection};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::dial::{connect, unreached};
use super::route::{Caller, Route};
use super::tcp;
use super::to::To;
use crate::clock;

/// Of either side's words.
const WORDS_BYTES_MAX: usize = 1024;
/// For the caller's agent to say for whom it calls.
const WORDS_TIMEOUT: Duration = Duration::from_secs(5);
const OK: &str = "ok";
/// A connection that carries the calls of many.
const CHECKED: &str = "*";

/// Who calls on a stream.
#[derive(Debug, Clone, Copy)]
pub(crate) enum For<'a> {
    Caller(&'a Caller),
    /// Many, each of whom this agent holds against the service's list itself.
    Checked,
}

/// Says for whom the connection is, and waits for the answer.
///
/// # Errors
/// The other agent refuses, with its reason, or says nothing that is understood.
pub(crate) async fn begin(connection: &mut ClientConnection, to: &To, caller: For<'_>) -> io::Result<()> {
    let words = match caller {
        For::Caller(caller) => format!("{to}\n{caller}\n"),
        For::Checked => format!("{to}\n{CHECKED}\n"),
    };
    connection.write_all(words.as_bytes()).await?;
    connection.flush().await?;
    match line(connection).await? {
        answer if answer == OK => Ok(()),
        refusal => Err(io::Error::new(io::ErrorKind::ConnectionRefused, refusal)),
    }
}

/// Serves a stream of another agent to its end. `find` knows the ports of this host's services.
pub(crate) async fn serve_peer<F>(mut connection: TlsConnection, find: F)
where
    F: Fn(&str, &str) -> Option<Arc<Route>>,
{
    let begun = match timeout(WORDS_TIMEOUT, words(&mut connection)).await {
        Ok(Ok((to, caller))) => open(&find, &to, &caller).await,
        // It has gone, or speaks something else.
        Ok(Err(_)) | Err(_) => return,
    };
    let answer = match &begun {
        Ok(_) => format!("{OK}\n"),
        Err(refusal) => format!("{refusal}\n"),
    };
    let answered = async {
        connection.write_all(answer.as_bytes()).await?;
        connection.flush().await
    };
    if answered.await.is_err() {
        return;
    }
    if let Ok((route, mut pick, stream)) = begun {
        let end = tcp::carry_for_peer(connection, stream, route.rules().idle_timeout).await;
        pick.finish(clock::monotonic(), end, Duration::ZERO);
    }
}

async fn words(connection: &mut TlsConnection) -> io::Result<(To, String)> {
    let to = To::parse(line(connection).await?.as_bytes()).ok_or(io::ErrorKind::InvalidData)?;
    Ok((to, line(connection).await?))
}

/// Whether the stream may begin, and its endpoint's end of it.
async fn open<F>(find: &F, to: &To, caller: &str) -> Result<(Arc<Route>, Pick, TcpStream), String>
where
    F: Fn(&str, &str) -> Option<Arc<Route>>,
{
    let route = find(&to.service, &to.port);
    let route = route.ok_or_else(|| format!("{} has no port {} on this host", to.service, to.port))?;
    if caller == CHECKED && route.protocol == Protocol::Tcp {
        return Err(format!("who calls {} is not said", to.service));
    }
    if caller != CHECKED && !route.allows(&Caller::named(caller)) {
        return Err(format!("{caller} is not allowed to call {}", to.service));
    }
    let pick = route.balancer.local(to.endpoint);
    let mut pick = pick.ok_or_else(|| format!("no instance of {} is ready on this host", to.service))?;
    let Reach::Local(address) = pick.endpoint().reach else {
        return Err(format!("{} is not on this host", to.endpoint.instance));
    };
    let began = Instant::now();
    match connect(address, route.rules().connect_timeout).await {
        Ok(stream) => Ok((route, pick, stream)),
        Err(error) => {
            pick.finish(clock::monotonic(), unreached(pick.endpoint(), &error), began.elapsed());
            Err(format!("{} cannot be reached: {error}", pick.endpoint().key.instance))
        }
    }
}

/// Byte by byte, since what follows belongs to others; a few dozen, out of TLS's own buffer.
async fn line<R: AsyncRead + Unpin>(reader: &mut R) -> io::Result<String> {
    let mut line = Vec::new();
    loop {
        match reader.read_u8().await? {
            b'\n' => return String::from_utf8(line).map_err(|_| io::ErrorKind::InvalidData.into()),
            _ if line.len() >= WORDS_BYTES_MAX => return Err(io::ErrorKind::InvalidData.into()),
            byte => line.push(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::two_hosts::{FAR, TwoHosts, local, remote};
    use tokio::net::TcpListener;
    use tokio::task::JoinSet;

    /// An endpoint that answers each connection with this and what it was told until the caller had no more to say.
    async fn echo(tasks: &mut JoinSet<()>, word: &'static str) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tasks.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut told = Vec::new();
                stream.read_to_end(&mut told).await.unwrap();
                stream.write_all(word.as_bytes()).await.unwrap();
                stream.write_all(&told).await.unwrap();
            }
        });
        address
    }

    /// What a caller hears that says this and closes its half; nothing: it is cut.
    async fn call(tasks: &mut JoinSet<()>, hosts: &TwoHosts, caller: Caller, text: &[u8]) -> Vec<u8> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        tasks.spawn(tcp::serve(hosts.near.clone(), far.unwrap().0, caller));
        let mut near = near.unwrap();
        near.write_all(text).await.unwrap();
        near.shutdown().await.unwrap();
        let mut heard = Vec::new();
        // One that is refused may be reset, since nobody reads what it says.
        timeout(Duration::from_secs(30), near.read_to_end(&mut heard)).await.unwrap().ok();
        heard
    }

    #[tokio::test]
    async fn bytes_cross_and_each_half_closes_on_its_own() {
        let (mut tasks, hosts) = (JoinSet::new(), TwoHosts::new(FAR, Protocol::Tcp).await);
        hosts.near.update(vec![remote(1)]);
        hosts.far.update(vec![local(1, echo(&mut tasks, "there ").await)]);
        assert_eq!(call(&mut tasks, &hosts, Caller::Unknown, b"and back").await, b"there and back");
        let much = vec![b'x'; 3_000_000];
        let heard = call(&mut tasks, &hosts, Caller::Unknown, &much).await;
        assert_eq!(heard.len(), 6 + much.len());
    }

    #[tokio::test]
    async fn a_stream_that_is_refused_goes_elsewhere_or_ends() {
        let (mut tasks, hosts) = (JoinSet::new(), TwoHosts::new(FAR, Protocol::Tcp).await);
        let here = echo(&mut tasks, "here ").await;
        hosts.near.update(vec![remote(1), local(2, here)]);
        // The far host knows of no instance any more.
        for _ in 0..8 {
            assert_eq!(call(&mut tasks, &hosts, Caller::Unknown, b"x").await, b"here x");
        }
        let there = echo(&mut tasks, "there ").await;
        hosts.far.update(vec![local(1, there)]);
        hosts.far.set_allow(Some(vec!["jobs".to_owned()]));
        hosts.near.update(vec![remote(1)]);
        assert_eq!(call(&mut tasks, &hosts, Caller::named("web"), b"x").await, b"", "the callee's list");
        assert_eq!(call(&mut tasks, &hosts, Caller::named("jobs"), b"x").await, b"there x");
    }
}
