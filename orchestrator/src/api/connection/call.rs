//! One call through the gate: its body and its answer's, under flow control, until either side is done.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::future::Either;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use nave_tls::PeerInfo;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service as _;

use crate::api::deadline;
use crate::api::gate::Gate;

/// Answers one call; ends early when the client no longer wants it.
pub(super) async fn answer(
    mut gate: Gate,
    peer: Arc<PeerInfo>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let mut request = request.map(|body| Body::new(Incoming { body, ended: false }));
    request.extensions_mut().insert(PeerInfo::clone(&peer));
    let allowed = deadline::allowed(request.headers());
    let response = {
        let called = pin!(within(allowed, gate.call(request)));
        let given_up = pin!(poll_fn(|cx| respond.poll_reset(cx)));
        match futures::future::select(called, given_up).await {
            Either::Left((response, _)) => response,
            Either::Right(_) => return,
        }
    };
    let (head, body) = response.into_parts();
    let is_all = http_body::Body::is_end_stream(&body);
    let sent = match respond.send_response(Response::from_parts(head, ()), is_all) {
        Ok(_) if is_all => return,
        Ok(stream) => send(stream, body).await,
        Err(error) => Err(error),
    };
    if let Err(error) = sent {
        tracing::debug!(%error, "an answer was not taken");
    }
}

/// What the client allows is also kept here, so that nothing goes on for nobody.
async fn within(
    allowed: Option<std::time::Duration>,
    answer: impl Future<Output = Result<Response<Body>, Infallible>>,
) -> Response<Body> {
    let Some(allowed) = allowed else {
        let Ok(response) = answer.await;
        return response;
    };
    match tokio::time::timeout(allowed, answer).await {
        Ok(Ok(response)) => response,
        Err(_) => Status::cancelled("the time that the client allowed is over").into_http(),
    }
}

/// Sends a body as the client takes it.
async fn send(mut stream: SendStream<Bytes>, body: Body) -> Result<(), h2::Error> {
    let mut body = pin!(body);
    loop {
        let frame = poll_fn(|cx| match stream.poll_reset(cx) {
            Poll::Ready(reset) => Poll::Ready(Err(reset)),
            Poll::Pending => http_body::Body::poll_frame(body.as_mut(), cx).map(Ok),
        });
        let frame = match frame.await {
            Ok(Some(Ok(frame))) => frame,
            // Our services end their streams with trailers.
            Ok(None) => return stream.send_data(Bytes::new(), true),
            Ok(Some(Err(status))) => return stream.send_trailers(trailers_of(&status)),
            Err(reset) => return reset.map(drop),
        };
        match frame.into_data() {
            Ok(data) => send_all(&mut stream, data).await?,
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    return stream.send_trailers(trailers);
                }
            }
        }
    }
}

fn trailers_of(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    if status.add_header(&mut trailers).is_err() {
        trailers.insert("grpc-status", http::HeaderValue::from_static("13"));
    }
    trailers
}

async fn send_all(stream: &mut SendStream<Bytes>, mut data: Bytes) -> Result<(), h2::Error> {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let capacity = poll_fn(|cx| {
            if let Poll::Ready(reset) = stream.poll_reset(cx) {
                return Poll::Ready(Err(reset.map_or_else(|error| error, h2::Error::from)));
            }
            match ready!(stream.poll_capacity(cx)) {
                Some(capacity) => Poll::Ready(capacity),
                None => Poll::Ready(Err(h2::Error::from(Reason::CANCEL))),
            }
        })
        .await?;
        let part = data.split_to(capacity.min(data.len()));
        stream.send_data(part, false)?;
    }
    Ok(())
}

/// A request's body for tonic; what is taken from it makes room for more.
struct Incoming {
    body: RecvStream,
    ended: bool,
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let broken = |error: h2::Error| Some(Err(Status::from_error(Box::new(error))));
        if self.ended {
            return Poll::Ready(None);
        }
        match ready!(self.body.poll_data(cx)) {
            Some(Ok(data)) => {
                // Fails only when the stream has ended, and that the next look tells.
                let _ended = self.body.flow_control().release_capacity(data.len());
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Some(Err(error)) => {
                self.ended = true;
                // The client is done with sending and has the answer already, or wants none.
                match error.reason() {
                    Some(Reason::NO_ERROR | Reason::CANCEL) => Poll::Ready(None),
                    _ => Poll::Ready(broken(error)),
                }
            }
            None => {
                let trailers = ready!(self.body.poll_trailers(cx));
                self.ended = true;
                match trailers {
                    Ok(trailers) => Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers)))),
                    Err(error) => Poll::Ready(broken(error)),
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.body.is_end_stream()
    }
}
