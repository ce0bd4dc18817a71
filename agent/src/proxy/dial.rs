//! A connection to an endpoint: picks, connects, and goes on to the next while nothing was sent, since that is safe
//! whatever the protocol.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nave_agent_core::balancer::{EndpointSpec, NoPick, Outcome, Pick, Reach};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::route::{Caller, Route};
use super::stream::For;
use super::to::To;
use super::tries::Tries;
use super::wire::Wire;
use crate::clock;

/// Connected, and nothing sent yet.
#[derive(Debug)]
pub(crate) struct Dialled {
    pub(crate) pick: Pick,
    pub(crate) stream: Wire,
    /// How long the connect took.
    pub(crate) took: Duration,
}

/// Connects to an endpoint of this host, within the port's time-out.
///
/// # Errors
/// As connect; `TimedOut`.
pub(crate) async fn connect(address: SocketAddr, within: Duration) -> io::Result<TcpStream> {
    let stream = match timeout(within, TcpStream::connect(address)).await {
        Ok(connected) => connected?,
        Err(_) => return Err(io::Error::new(io::ErrorKind::TimedOut, "connect timed out")),
    };
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// What a connect that failed says of the endpoint. On this host only one whose queue of connections is full lets a
/// connect time out: it is there, and busy.
pub(crate) fn unreached(endpoint: &EndpointSpec, error: &io::Error) -> Outcome {
    match (&endpoint.reach, error.kind()) {
        (Reach::Local(_), io::ErrorKind::TimedOut) => Outcome::Overloaded,
        _ => Outcome::Unreached,
    }
}

/// Connects to an endpoint, on whichever host it is. To another host that is a stream of the caller's own.
///
/// # Errors
/// As connect; or the other host's agent refuses.
pub(crate) async fn reach(
    route: &Route,
    endpoint: &EndpointSpec,
    caller: For<'_>,
    within: Duration,
) -> io::Result<Wire> {
    match endpoint.reach {
        Reach::Local(address) => connect(address, within).await.map(Wire::Local),
        Reach::Remote { host, .. } => {
            let (service, port) = (route.service.to_string(), route.port.to_string());
            let to = To { service, port, endpoint: endpoint.key };
            let stream = route.peers.stream(host, &to, caller).await?;
            Ok(Wire::Peer(Box::new(stream)))
        }
    }
}

/// A connection to one of the endpoints. `tries` has those that failed, also from before.
///
/// # Errors
/// Nobody is left to try, or there was nobody within the wait.
pub(crate) async fn dial(
    route: &Arc<Route>,
    caller: &Caller,
    tries: &mut Tries,
    hash: Option<u64>,
    deadline: Option<Instant>,
) -> Result<Dialled, NoPick> {
    let rules = route.rules();
    loop {
        let mut pick = route.next(tries, hash, deadline).await?;
        let begun = Instant::now();
        match reach(route, pick.endpoint(), For::Caller(caller), rules.connect_timeout).await {
            Ok(stream) => return Ok(Dialled { pick, stream, took: begun.elapsed() }),
            Err(error) => {
                pick.finish(clock::monotonic(), unreached(pick.endpoint(), &error), begun.elapsed());
                route.meter.tried(pick.endpoint().key, true);
                tries.add(pick.endpoint(), &error, true);
                let retries_max = usize::try_from(rules.retries_max).unwrap_or(usize::MAX);
                if !tries.may_go_on(retries_max, rules.pending_timeout) {
                    return Err(NoPick::AllTried);
                }
                route.meter.retried();
            }
        }
    }
}
