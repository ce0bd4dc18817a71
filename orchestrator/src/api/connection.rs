//! One connection to a member's port, from its handshake to its end, on the h2 crate itself.
//!
//! The two calls that people's programs make by the thousand, `ApplyService` and `GetService`, are taken and answered in
//! the connection's own task (`unary`): what has come together is taken together, what is ready is answered together,
//! and a call costs neither a task nor a walk through the layers of a general server. All other calls are tasks of
//! their own and go through the gate (`call`).

mod call;
mod unary;

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use h2::server;
use h2::{Ping, PingPong};
use nave_tls::TlsConnection;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use self::unary::Unary;
use crate::api::gate::Gate;

/// Calls under way on one connection. A client library that multiplexes keeps at most this many; 512 clients on one
/// channel fit twice.
const STREAMS_PER_CONNECTION_MAX: u32 = 1024;
/// A stream's window: a Raft append of 1 MiB and a page of a listing pass without waiting for a round trip.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// A connection's window. What a connection may make us hold is this much at most, 4 MiB.
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
/// What of an answer waits for a slow client, on each stream.
const SEND_BUFFER_BYTES: usize = 400 * 1024;
/// Of one request's head.
const HEADER_BYTES_MAX: u32 = 16 * 1024;
/// A peer that vanished without a word is noticed after interval and time-out.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// For the preface, which a client sends with its first call or before.
const PREFACE_WITHIN: Duration = Duration::from_secs(10);

/// Serves the calls of one connection until it ends. After `stop` nothing new is taken, and it ends with its last call.
pub(crate) async fn serve(stream: TlsConnection, gate: Gate, stop: CancellationToken) {
    let peer = stream.info().clone();
    let remote = peer.remote;
    let mut builder = server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_header_list_size(HEADER_BYTES_MAX);
    let mut connection = match timeout(PREFACE_WITHIN, builder.handshake::<_, Bytes>(stream)).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return debug!(%remote, %error, "a client does not speak HTTP/2"),
        Err(_) => return debug!(%remote, "a client says nothing"),
    };
    let mut silence = pin!(silence(connection.ping_pong()));
    let mut stopping = pin!(stop.cancelled());
    let mut is_stopping = false;
    let unary = Unary::new(&gate, &peer);
    let peer = Arc::new(peer);
    // Both end with the connection: nobody waits for their answers any more.
    let mut answers = FuturesUnordered::new();
    let mut calls = JoinSet::new();
    let ended = poll_fn(|cx| {
        if !is_stopping && stopping.as_mut().poll(cx).is_ready() {
            is_stopping = true;
            connection.graceful_shutdown();
        }
        if silence.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(None));
        }
        while let Poll::Ready(Some(ended)) = calls.poll_join_next(cx) {
            note_panic(ended);
        }
        loop {
            // All that is ready first, so that it is sent as one.
            while let Poll::Ready(Some(())) = answers.poll_next_unpin(cx) {}
            match connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => match unary.method(&request) {
                    Some(method) => answers.push(unary.answer(method, request, respond)),
                    None => drop(calls.spawn(call::answer(gate.clone(), peer.clone(), request, respond))),
                },
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(Some(error))),
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Pending => break,
            }
        }
        Poll::Pending
    });
    match ended.await {
        Ok(()) => {}
        Err(Some(error)) => debug!(%remote, %error, "connection ended"),
        Err(None) => debug!(%remote, "a client answers no pings"),
    }
}

/// Returns when the peer has not answered a ping.
async fn silence(pings: Option<PingPong>) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        sleep(KEEP_ALIVE_INTERVAL).await;
        match timeout(KEEP_ALIVE_TIMEOUT, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection has ended, and says so itself.
            Ok(Err(_)) => return std::future::pending().await,
            Err(_) => return,
        }
    }
}

/// What ends a call or a connection by mistake is said.
pub(crate) fn note_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a call panicked; please report this, with this member's output");
    }
}
