//! The two calls that have to be cheap, from the bytes of their message to the bytes of their answer.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response, header};
use nave_tls::{PeerIdentity, PeerInfo};
use prost::Message;
use tonic::Status;

use crate::api::gate::Gate;
use crate::api::services::Services;
use crate::api::{access, deadline};

const APPLY: &str = "/nave.v1.ServiceService/ApplyService";
const GET: &str = "/nave.v1.ServiceService/GetService";

/// The largest message taken, as of all calls that are not between members.
const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Before each message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Apply,
    Get,
}

/// What is the same for all calls of one connection.
pub(super) struct Unary {
    shared: Arc<Shared>,
}

struct Shared {
    services: Services,
    /// Of this cluster's.
    identity: Option<PeerIdentity>,
    actor: String,
}

impl Unary {
    pub(super) fn new(gate: &Gate, peer: &PeerInfo) -> Self {
        let valid = peer.identity.as_ref().and_then(PeerIdentity::valid);
        let actor = valid.map_or_else(|| "stranger".to_owned(), |identity| identity.role.to_string());
        let identity = gate.known(peer.identity.as_ref()).cloned();
        Self { shared: Arc::new(Shared { services: gate.services(), identity, actor }) }
    }

    /// Nothing: the call is none of these.
    pub(super) fn method(&self, request: &Request<RecvStream>) -> Option<Method> {
        match request.uri().path() {
            _ if request.method() != http::Method::POST => None,
            APPLY => Some(Method::Apply),
            GET => Some(Method::Get),
            _ => None,
        }
    }

    /// Answers one call. A client that has gone away meanwhile is no error.
    pub(super) fn answer(
        &self,
        method: Method,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
    ) -> impl Future<Output = ()> + Send + use<> {
        let shared = self.shared.clone();
        async move {
            let mut call = pin!(shared.call(method, request));
            let outcome = poll_fn(|cx| match call.as_mut().poll(cx) {
                Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
                // The client no longer wants it, so nobody waits for it.
                Poll::Pending => respond.poll_reset(cx).map(|_| None),
            });
            let sent = match outcome.await {
                Some(Ok(message)) => send(&mut respond, message),
                Some(Err(status)) => refuse(&mut respond, &status),
                None => return,
            };
            if let Err(error) = sent {
                tracing::debug!(%error, "an answer was not taken");
            }
        }
    }
}

impl Shared {
    async fn call(&self, method: Method, request: Request<RecvStream>) -> Result<Bytes, Status> {
        let path = match method {
            Method::Apply => APPLY,
            Method::Get => GET,
        };
        access::decide(path, self.identity.as_ref())
            .inspect_err(|refusal| tracing::debug!(path, reason = refusal.message(), "call refused"))?;
        let deadline = deadline::of_headers(request.headers());
        let message = message(request.into_body()).await?;
        match method {
            Method::Apply => {
                let answer = self.services.apply(self.actor.clone(), deadline, decode(message)?).await?;
                Ok(encode(&answer))
            }
            Method::Get => Ok(encode(&self.services.get(deadline, &decode(message)?).await?)),
        }
    }
}

fn decode<M: Message + Default>(message: Bytes) -> Result<M, Status> {
    M::decode(message).map_err(|error| Status::internal(error.to_string()))
}

/// The one message of a call's body, which is there already, or nearly.
async fn message(mut body: RecvStream) -> Result<Bytes, Status> {
    let mut whole = Bytes::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(|error| Status::cancelled(error.to_string()))?;
        // Fails only when the stream has ended, and that the next chunk tells.
        let _ended = body.flow_control().release_capacity(chunk.len());
        if whole.is_empty() {
            whole = chunk;
        } else {
            let mut longer = BytesMut::from(whole);
            longer.put(chunk);
            whole = longer.freeze();
        }
        if whole.len() > PREFIX_BYTES + MESSAGE_BYTES_MAX {
            return Err(too_large(whole.len()));
        }
    }
    unframed(whole)
}

fn unframed(mut body: Bytes) -> Result<Bytes, Status> {
    if body.len() < PREFIX_BYTES {
        return Err(Status::internal("the call has no message"));
    }
    let compressed = body.get_u8();
    let length = usize::try_from(body.get_u32()).unwrap_or(usize::MAX);
    if compressed != 0 {
        return Err(Status::unimplemented("compressed messages are not taken"));
    }
    if length > MESSAGE_BYTES_MAX {
        return Err(too_large(length));
    }
    if length != body.len() {
        return Err(Status::internal(format!("a message of {length} bytes came as {}", body.len())));
    }
    Ok(body)
}

fn too_large(length: usize) -> Status {
    Status::out_of_range(format!("a message of {length} bytes, the most is {MESSAGE_BYTES_MAX}"))
}

fn encode(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(PREFIX_BYTES + length);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).expect("an answer is far below 4 GiB"));
    message.encode(&mut framed).expect("the buffer grows");
    framed.freeze()
}

fn send(respond: &mut SendResponse<Bytes>, message: Bytes) -> Result<(), h2::Error> {
    let mut head = Response::new(());
    head.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    let mut stream = respond.send_response(head, false)?;
    stream.send_data(message, false)?;
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    stream.send_trailers(trailers)
}

fn refuse(respond: &mut SendResponse<Bytes>, status: &Status) -> Result<(), h2::Error> {
    let head = status.clone().into_http::<()>().map(|_| ());
    respond.send_response(head, true).map(drop)
}
