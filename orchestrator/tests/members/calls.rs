//! What a member's port makes of calls that no tonic client would send: in pieces, damaged, through a window of a few
//! bytes, given up half-way.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use http::Request;
use nave_proto::pb;
use nave_tls::{Credentials, Dialer, Expect, Role};
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tonic::Code;

use crate::harness::{Cluster, PATIENCE, apply, manifest};

const APPLY: &str = "/nave.v1.ServiceService/ApplyService";
const GET: &str = "/nave.v1.ServiceService/GetService";
const LIST: &str = "/nave.v1.ServiceService/ListServices";
const WATCH: &str = "/nave.v1.ServiceService/Watch";
/// Far less than any answer.
const WINDOW_BYTES: u32 = 16;

/// An HTTP/2 connection of our own.
struct Raw {
    requests: SendRequest<Bytes>,
    _driver: JoinSet<()>,
}

/// How a call ended, and its message.
#[derive(Debug, PartialEq)]
struct Answer {
    code: Code,
    message: Bytes,
}

impl Raw {
    async fn open(cluster: &Cluster, credentials: &Credentials) -> Self {
        let dialer = Dialer::new(cluster.address(0), credentials, Expect::Member, b"h2", PATIENCE);
        let stream = dialer.connect().await.expect("the connection holds");
        let mut builder = h2::client::Builder::new();
        let (requests, connection) =
            builder.initial_window_size(WINDOW_BYTES).handshake(stream).await.expect("the connection holds");
        let mut driver = JoinSet::new();
        driver.spawn(async move { drop(connection.await) });
        Self { requests, _driver: driver }
    }

    async fn call(&self, path: &str, body: &[Bytes]) -> Answer {
        tokio::time::timeout(PATIENCE, self.exchange(path, body)).await.expect("an answer in time")
    }

    async fn exchange(&self, path: &str, body: &[Bytes]) -> Answer {
        let mut requests = self.requests.clone().ready().await.expect("the connection holds");
        let (response, mut sink) =
            requests.send_request(request(path), body.is_empty()).expect("the connection holds");
        for (index, chunk) in body.iter().enumerate() {
            // Each in a frame of its own, and most in a packet of its own.
            sink.send_data(chunk.clone(), index + 1 == body.len()).expect("the connection holds");
            tokio::task::yield_now().await;
        }
        let (head, mut source) = response.await.expect("the connection holds").into_parts();
        let mut whole = BytesMut::new();
        while let Some(chunk) = source.data().await {
            let chunk = chunk.expect("the connection holds");
            source.flow_control().release_capacity(chunk.len()).expect("the connection holds");
            whole.extend_from_slice(&chunk);
        }
        let trailers = source.trailers().await.expect("the connection holds").unwrap_or(head.headers);
        let status = tonic::Status::from_header_map(&trailers).expect("every answer has a status");
        // Behind the message's prefix; a refusal has neither.
        let prefix = whole.len().min(5);
        Answer { code: status.code(), message: whole.freeze().slice(prefix..) }
    }
}

fn request(path: &str) -> Request<()> {
    let request = Request::post(format!("http://nave{path}"));
    request.header("content-type", "application/grpc").header("te", "trailers").body(()).expect("a good head")
}

/// How many the member serves now, by its own count.
async fn watchers(cluster: &Cluster) -> u64 {
    let address = cluster.members[0].config.metrics_listen.expect("the harness sets it");
    let mut stream = TcpStream::connect(address).await.expect("the connection holds");
    let request = "GET /metrics HTTP/1.1\r\nHost: member\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.expect("the connection holds");
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("the connection holds");
    let line = text.lines().find_map(|line| line.strip_prefix("nave_watchers "));
    line.expect("it is among the metrics").parse().expect("a number")
}

fn framed(compressed: u8, length: u32, message: &[u8]) -> Bytes {
    let mut body = BytesMut::from(&[compressed][..]);
    body.extend_from_slice(&length.to_be_bytes());
    body.extend_from_slice(message);
    body.freeze()
}

fn whole(message: &impl prost::Message) -> Bytes {
    let message = message.encode_to_vec();
    framed(0, u32::try_from(message.len()).expect("a short message"), &message)
}

fn in_pieces(body: &Bytes) -> Vec<Bytes> {
    (0..body.len()).map(|at| body.slice(at..=at)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_taken_in_pieces_and_what_is_no_call_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(folder.path(), 1).await;
    let operator = cluster.credentials(Role::Operator("ann".to_owned()));
    let raw = Raw::open(&cluster, &operator).await;

    let applied = raw.call(APPLY, &in_pieces(&whole(&apply(manifest("web", 0))))).await;
    assert_eq!(applied.code, Code::Ok);
    let applied = pb::ApplyServiceResponse::decode(applied.message).unwrap();
    assert_eq!((applied.version, applied.outcome()), (1, pb::apply_service_response::Outcome::Created));

    // Answers are longer than the window, of the calls that the connection answers itself and of those it hands on.
    let get = pb::GetServiceRequest { name: "web".to_owned(), linearizable: true };
    let got = raw.call(GET, &[whole(&get)]).await;
    let got = pb::GetServiceResponse::decode(got.message).unwrap();
    assert_eq!(got.service.map(|service| (service.name, service.version)), Some(("web".to_owned(), 1)));
    let listed = raw.call(LIST, &in_pieces(&whole(&pb::ListServicesRequest { linearizable: true }))).await;
    let listed = pb::ListServicesResponse::decode(listed.message).unwrap();
    assert_eq!(listed.services.len(), 1);

    let message = get.encode_to_vec();
    let length = u32::try_from(message.len()).unwrap();
    for (body, expected) in [
        (vec![], Code::Internal),
        (vec![Bytes::from_static(b"\0\0")], Code::Internal),
        (vec![framed(1, length, &message)], Code::Unimplemented),
        (vec![framed(0, length + 1, &message)], Code::Internal),
        (vec![framed(0, length - 1, &message)], Code::Internal),
        (vec![framed(0, length, &vec![0xff; message.len()])], Code::Internal),
        (vec![framed(0, u32::MAX, &message)], Code::OutOfRange),
        (vec![framed(0, length, &message)], Code::Ok),
    ] {
        assert_eq!(raw.call(GET, &body).await.code, expected, "{body:?}");
    }
    assert_eq!(raw.call("/nave.v1.ServiceService/Guess", &[whole(&get)]).await.code, Code::Unimplemented);
    let missing = pb::GetServiceRequest { name: "nobody".to_owned(), linearizable: false };
    assert_eq!(raw.call(GET, &[whole(&missing)]).await.code, Code::NotFound);

    // Another part of the cluster may not call what is the operators'.
    let member = Raw::open(&cluster, &cluster.credentials(Role::Member(nave_proto::ids::MemberId(1)))).await;
    for path in [APPLY, GET, LIST] {
        assert_eq!(member.call(path, &[whole(&get)]).await.code, Code::PermissionDenied, "{path}");
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_gives_up_makes_room_for_more() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(folder.path(), 1).await;
    let raw = Raw::open(&cluster, &cluster.credentials(Role::Operator("ann".to_owned()))).await;
    let before = watchers(&cluster).await;
    // Twice as many as a connection may have at once.
    for _ in 0..2048 {
        let mut requests =
            tokio::time::timeout(PATIENCE, raw.requests.clone().ready()).await.expect("room").unwrap();
        let (watching, mut sink) = requests.send_request(request(WATCH), false).unwrap();
        sink.send_data(whole(&pb::WatchRequest::default()), true).unwrap();
        let answer = tokio::time::timeout(PATIENCE, watching).await.expect("an answer").unwrap();
        assert_eq!(answer.status(), 200);
        // Dropping both halves is a reset.
    }
    let ended = async {
        while watchers(&cluster).await > before {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ended).await.expect("each has ended on the other side, too");
    let get = pb::GetServiceRequest { name: "nobody".to_owned(), linearizable: true };
    assert_eq!(raw.call(GET, &[whole(&get)]).await.code, Code::NotFound);
    // A call that is not sent to its end holds up nobody, and not the member's end either.
    let mut requests = raw.requests.clone().ready().await.unwrap();
    let (_answer, mut sink) = requests.send_request(request(APPLY), false).unwrap();
    sink.send_data(whole(&apply(manifest("web", 0))).slice(..9), false).unwrap();
    tokio::time::timeout(Duration::from_secs(20), cluster.end()).await.expect("it ends in time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_read_of_requests_makes_room_for_more() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(folder.path(), 1).await;
    let operator = Raw::open(&cluster, &cluster.credentials(Role::Operator("ann".to_owned()))).await;
    let member = Raw::open(&cluster, &cluster.credentials(Role::Member(nave_proto::ids::MemberId(1)))).await;
    let garbage = vec![0xff; 500_000];
    let body = framed(0, u32::try_from(garbage.len()).unwrap(), &garbage);
    // Three times what a connection may have under way; of the refused ones nobody reads the body.
    for _ in 0..24 {
        assert_eq!(operator.call(APPLY, std::slice::from_ref(&body)).await.code, Code::Internal);
        assert_eq!(operator.call(LIST, std::slice::from_ref(&body)).await.code, Code::Internal);
        assert_eq!(member.call(APPLY, std::slice::from_ref(&body)).await.code, Code::PermissionDenied);
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_answers_no_pings_is_let_go() {
    let folder = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(folder.path(), 1).await;
    let operator = cluster.credentials(Role::Operator("ann".to_owned()));
    let quiet = Raw::open(&cluster, &operator).await;
    let dialer = Dialer::new(cluster.address(0), &operator, Expect::Member, b"h2", PATIENCE);
    let mut deaf = dialer.connect().await.unwrap();
    // The preface and empty settings; from here on it hears and says nothing.
    deaf.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut heard = Vec::new();
    // However it ends: with a word of farewell, or cut off.
    let _ended = tokio::time::timeout(PATIENCE, deaf.read_to_end(&mut heard)).await.expect("its end");
    assert!(heard.windows(4).any(|kind| kind == [8, 6, 0, 0]), "it was asked: {heard:?}");
    // One that has nothing to say but answers stays.
    let get = pb::GetServiceRequest { name: "nobody".to_owned(), linearizable: true };
    assert_eq!(quiet.call(GET, &[whole(&get)]).await.code, Code::NotFound);
    cluster.end().await;
}
