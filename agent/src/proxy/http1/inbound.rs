//! Requests that other agents send to instances of this host. The balancer of the caller's host has chosen; here the
//! caller's name, which its agent vouches for, is held against the service's list, and an instance that is no longer
//! ready is stood in for by another one of this host. What reaches no process is said to have reached none, so that the
//! caller's agent may go elsewhere with it.

use std::sync::Arc;

use nave_agent_core::balancer::Pick;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use super::connection::{After, Calling, Client};
use super::exchange::Exchange;
use super::refusal::Refusal;
use super::request::Request;
use crate::proxy::meter::Refusal as Why;
use crate::proxy::route::{Caller, Route};
use crate::proxy::to::To;

/// How a head is read before it is known whom it is for.
const RULES: nave_agent_core::directory::PortRules = nave_agent_core::directory::PortRules::DEFAULT;

/// When this agent ends: the answers from then on say that they are the last, and then, what waits is closed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ending {
    pub(crate) last_answers: CancellationToken,
    pub(crate) closes: CancellationToken,
}

/// Serves a connection of another agent until it ends. `find` knows the ports of this host's services.
///
/// A connection on which nothing was begun is closed with a farewell, one that is cut without: so the other agent knows
/// whether a request that got no answer may be sent again.
pub(crate) async fn serve_peer<S, F>(stream: S, find: F, ending: Ending)
where
    S: AsyncRead + AsyncWrite + Unpin,
    F: Fn(&str, &str) -> Option<Arc<Route>>,
{
    let mut client = Client::new(stream, RULES.header_bytes_max);
    let mut outgoing = Vec::with_capacity(1024);
    loop {
        let next = tokio::select! {
            biased;
            next = client.next(&RULES, &[], true, &mut outgoing) => next,
            () = ending.closes.cancelled() => return client.linger().await,
        };
        let request = match next {
            Ok(request) => request,
            Err(None) => return,
            Err(Some(refusal)) => {
                client.refuse(&refusal, false, false).await;
                return;
            }
        };
        let keep_alive = request.keep_alive && !ending.last_answers.is_cancelled();
        let after = match admit(&find, &request) {
            Ok((route, caller, pick)) => {
                let (rules, calling) = (route.rules(), Calling::of_peer(&route, &caller));
                let exchange =
                    Exchange::given(&route, &rules, &calling, request, &mut outgoing, keep_alive, pick);
                exchange.run(&mut client).await
            }
            // What is left of its body would have to be read first.
            Err(refusal) => {
                let whole = request.framing == super::framing::Framing::None;
                client.refuse(&refusal, keep_alive && whole, request.head_only).await
            }
        };
        match after {
            After::Next => client.shrink(),
            After::Close => return client.close().await,
            After::Cut => return,
        }
    }
}

/// Whether the request may go on, and to whom.
fn admit<F>(find: &F, request: &Request) -> Result<(Arc<Route>, Caller, Pick), Refusal>
where
    F: Fn(&str, &str) -> Option<Arc<Route>>,
{
    let Some(to) = &request.to else {
        return Err(Refusal::new(400, Why::Malformed, "nave: an agent's request says not whom it is for"));
    };
    let not_here = |what: String| {
        let text = format!("nave: {what} on this host");
        Refusal { not_processed: true, ..Refusal::new(503, Why::NoEndpoint, text) }
    };
    let To { service, port, endpoint } = to;
    let route = find(service, port).ok_or_else(|| not_here(format!("{service} has no port {port}")))?;
    let caller = Caller::named(request.caller.as_deref().unwrap_or_default());
    if !route.allows(&caller) {
        let text = format!("nave: {caller} is not allowed to call {service}");
        return Err(Refusal::new(403, Why::NotAllowed, text));
    }
    let pick = route.balancer.local(*endpoint);
    let pick = pick.ok_or_else(|| not_here(format!("no instance of {service} is ready")))?;
    Ok((route, caller, pick))
}
