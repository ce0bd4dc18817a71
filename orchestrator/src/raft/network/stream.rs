//! The pipelined stream of appends to one member.
//!
//! The first request is pulled **before** the connection is touched: openraft sleeps its back-off inside the request
//! stream, so connecting first would retry a dead member 17,000 times a second. A permit per request bounds what is in
//! flight, since HTTP/2 flow control alone would let megabytes pile up. The request stream ends with the response
//! stream, because the next session waits for a lock that it holds.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt as _, stream};
use nave_proto::pb;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::RPCError;
use openraft::raft::{AppendEntriesRequest, StreamAppendResult};
use tokio::sync::{Semaphore, oneshot};
use tonic::{Request, Status};

use super::{Client, unreachable};
use crate::raft::convert;
use crate::raft::types::TypeConfig;

/// Requests in flight to one member; with the byte budget of one (1 MiB) at most 16 MiB. Four were as fast in the spike.
pub(crate) const IN_FLIGHT_MAX: usize = 16;

/// openraft allows 75 ms for opening a stream, which a TLS handshake on a busy machine may exceed.
const OPEN_WITHIN_MIN: Duration = Duration::from_millis(500);

type Answer = Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>;
type Answers<'s> = BoxStream<'s, Answer>;

/// The requests, as a type with a name: an `async fn` that hands a boxed stream to a tonic client does not compile
/// ("higher-ranked lifetime error").
struct Requests(Pin<Box<dyn Stream<Item = pb::AppendRequest> + Send>>);

impl Stream for Requests {
    type Item = pb::AppendRequest;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll_next(cx)
    }
}

pub(super) fn open<'s, S>(
    client: Client,
    input: S,
    within: Duration,
) -> BoxFuture<'s, Result<Answers<'s>, RPCError<TypeConfig>>>
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
{
    let (stop, stopped) = oneshot::channel::<()>();
    let permits = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    let of_requests = permits.clone();
    let requests = input
        .then(move |request| {
            let permits = of_requests.clone();
            async move {
                permits.acquire_owned().await.expect("the semaphore is never closed").forget();
                convert::append_to_pb(request)
            }
        })
        .take_until(stopped);
    Box::pin(exchange(client, Requests(Box::pin(requests)), within.max(OPEN_WITHIN_MIN), stop, permits))
}

async fn exchange<'s>(
    mut client: Client,
    mut requests: Requests,
    within: Duration,
    stop: oneshot::Sender<()>,
    permits: Arc<Semaphore>,
) -> Result<Answers<'s>, RPCError<TypeConfig>> {
    let Some(first) = requests.next().await else {
        return Ok(Box::pin(stream::empty()));
    };
    let requests = Requests(Box::pin(stream::iter([first]).chain(requests)));
    let opened = tokio::time::timeout(within, client.stream_append(Request::new(requests))).await;
    let answers = opened.map_err(|elapsed| unreachable(&elapsed))?.map_err(|status| unreachable(&status))?;
    Ok(Box::pin(answers.into_inner().map(move |answer| {
        let _requests_end_with_this = &stop;
        permits.add_permits(1);
        read(answer)
    })))
}

fn read(answer: Result<pb::AppendResponse, Status>) -> Answer {
    let answer = answer.map_err(|status| unreachable(&status))?;
    if !answer.error.is_empty() {
        return Err(unreachable(&Status::unavailable(answer.error)));
    }
    convert::stream_result_from_pb(&answer).map_err(|error| unreachable(&error))
}
