//! A connection to an endpoint: picks, connects, and goes on to the next while nothing was sent, since that is safe
//! whatever the protocol.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nave_agent_core::balancer::{Ask, NoPick, Outcome, Pick, Reach};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::route::{Route, Tries};
use crate::clock;

/// Connected, and nothing sent yet.
#[derive(Debug)]
pub(crate) struct Dialled {
    pub(crate) pick: Pick,
    pub(crate) stream: TcpStream,
    /// How long the connect took.
    pub(crate) took: Duration,
}

/// Connects to where the pick says, within the port's time-out.
///
/// # Errors
/// As connect; `TimedOut`.
pub(crate) async fn connect(reach: &Reach, within: Duration) -> io::Result<TcpStream> {
    let stream = match reach {
        Reach::Local(address) => match timeout(within, TcpStream::connect(*address)).await {
            Ok(connected) => connected?,
            Err(_) => return Err(io::Error::new(io::ErrorKind::TimedOut, "connect timed out")),
        },
        Reach::Remote { host, .. } => {
            let why = format!("{host} cannot be reached by this agent");
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
    };
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A connection to one of the endpoints. `tries` has those that failed, also from before.
///
/// # Errors
/// Nobody is left to try, or there was nobody within the wait.
pub(crate) async fn dial(
    route: &Arc<Route>,
    tries: &mut Tries,
    hash: Option<u64>,
    deadline: Option<Instant>,
) -> Result<Dialled, NoPick> {
    let rules = route.rules();
    loop {
        let ask = Ask { tried: tries.keys(), hash };
        let mut pick = route.pick(&ask, deadline).await?;
        let begun = Instant::now();
        match connect(&pick.endpoint().reach, rules.connect_timeout).await {
            Ok(stream) => return Ok(Dialled { pick, stream, took: begun.elapsed() }),
            Err(error) => {
                pick.finish(clock::monotonic(), Outcome::Unreached, begun.elapsed());
                route.meter.tried(pick.endpoint().key, true);
                tries.add(pick.endpoint(), &error);
                if tries.len() > usize::try_from(rules.retries_max).unwrap_or(usize::MAX) {
                    return Err(NoPick::AllTried);
                }
                route.meter.retried();
            }
        }
    }
}
