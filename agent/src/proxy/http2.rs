//! The engine for HTTP/2 and gRPC: each call of a caller's connection goes to an endpoint of its own choice, over
//! connections that all callers share, so that one long-lived client spreads over all instances.
//!
//! [`serve`] takes a caller's connection; [`call`] one request; [`pool`] has the connections to endpoints; [`body`]
//! moves bytes both ways under flow control and keeps what may have to be sent again; [`grpc`] reads the outcome where
//! gRPC puts it.

mod body;
mod call;
mod grpc;
mod pool;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::server::{self, Connection};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::debug;

pub(crate) use pool::Pool;

use super::meter::Refusal;
use super::route::{Caller, Route};
use call::{Call, Calling};

/// Of each stream towards us, and of a whole connection: never equal, since then one stream that nobody reads takes the
/// whole connection's room and all others stand still.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 2 * 1024 * 1024;
/// Calls at a time on one connection of a caller.
const STREAMS_MAX: u32 = 1000;
/// What of an answer waits for a slow caller, on each stream.
const SEND_BUFFER_BYTES: usize = 256 * 1024;
/// As towards endpoints (see `pool`): a stream's window of frames of nine bytes is 7.5 MB.
const FRAME_BUDGET_BYTES: usize = 16 * 1024 * 1024;
/// How long a caller may be silent, whatever the port allows.
const IDLE_MAX: Duration = Duration::from_secs(600);
/// For a caller to hear that its idle connection ends.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Serves one caller's connection. Once `drain` is set it says so to the caller, and ends with the last of its calls.
pub(crate) async fn serve(route: Arc<Route>, stream: TcpStream, caller: Caller, drain: CancellationToken) {
    let rules = route.rules();
    let header_bytes_max = u32::try_from(rules.header_bytes_max).unwrap_or(u32::MAX);
    let mut builder = server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(header_bytes_max)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .data_frame_budget(FRAME_BUDGET_BYTES);
    let connection = match timeout(rules.header_timeout, builder.handshake::<_, Bytes>(stream)).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            debug!(service = %route.service, %error, "a caller does not speak HTTP/2");
            return route.meter.refused(Refusal::Malformed);
        }
        Err(_) => return route.meter.refused(Refusal::HeaderTimeout),
    };
    let calling = Arc::new(Calling::new(&route, caller));
    accept(&route, connection, &calling, &drain).await;
}

async fn accept(
    route: &Arc<Route>,
    mut connection: Connection<TcpStream, Bytes>,
    calling: &Arc<Calling>,
    drain: &CancellationToken,
) {
    // They end with the connection: nobody waits for their answers any more.
    let mut calls = JoinSet::new();
    let mut last_call = Instant::now();
    let mut is_draining = false;
    loop {
        let idle_until = last_call + route.rules().idle_timeout.min(IDLE_MAX);
        let accepted = tokio::select! {
            accepted = timeout_at(idle_until, connection.accept()) => accepted,
            Some(_) = calls.join_next() => {
                last_call = Instant::now();
                continue;
            }
            () = drain.cancelled(), if !is_draining => {
                is_draining = true;
                connection.graceful_shutdown();
                continue;
            }
        };
        match accepted {
            Ok(Some(Ok((request, respond)))) => {
                last_call = Instant::now();
                let call = Call::new(route.clone(), calling.clone(), request, respond);
                calls.spawn(call.run());
            }
            Ok(Some(Err(error))) => {
                debug!(service = %route.service, %error, "a caller's connection broke");
                if error.is_library() && !error.is_io() {
                    route.meter.refused(Refusal::Malformed);
                }
                return;
            }
            Ok(None) => return,
            Err(_) if !calls.is_empty() => last_call = Instant::now(),
            Err(_) => {
                route.meter.refused(Refusal::Idle);
                connection.graceful_shutdown();
                // What it says now is its last word.
                let _gone = timeout(LAST_WORD, connection.accept()).await;
                return;
            }
        }
    }
}
