//! Promise: callers speak through a service's address as they would to the program itself, whatever they are written in.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use futures::{SinkExt as _, StreamExt as _};
use nave_tests::nave::speaker;
use nave_tests::{Cluster, Setup};
use serde_json::Value;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::manifests::python;

/// Says what it was asked, byte for byte where it matters, and on which connection.
const PAGE: &str = r#"
import hashlib, http.server, json, os
class Say(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            whole = b""
            while size := int(self.rfile.readline(), 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    def answer(self):
        body = self.body()
        said = json.dumps({"method": self.command, "path": self.path, "headers": self.headers.items(),
                           "length": len(body), "sha256": hashlib.sha256(body).hexdigest()}).encode()
        self.send_response(201 if self.command == "POST" else 200, "As Said")
        self.send_header("X-oDD-cAsE", "kept")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(said)
    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer
http.server.ThreadingHTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Say).serve_forever()
"#;

/// Fifty requests on one connection, one with a body of unknown length.
const PYTHON: &str = r#"
import http.client, json, sys
line = http.client.HTTPConnection(sys.argv[1], timeout=20)
line.connect()
socket = line.sock
for turn in range(50):
    line.request("GET", f"/turn/{turn}")
    assert json.loads(line.getresponse().read())["path"] == f"/turn/{turn}"
line.request("PUT", "/chunks", body=(b"x" * 1000 for _ in range(100)), encode_chunked=True,
             headers={"Transfer-Encoding": "chunked"})
said = json.loads(line.getresponse().read())
assert said["length"] == 100_000, said
assert line.sock is socket, "the connection was kept"
print("well")
"#;

/// Forty requests at a time, on connections that are kept.
const NODE: &str = r#"
const http = require("http"), url = process.argv[1];
const agent = new http.Agent({ keepAlive: true, maxSockets: 8 });
const ask = (turn) => new Promise((done, failed) => {
  const request = http.request(url + "/turn/" + turn, { agent, method: "POST" }, (answer) => {
    let text = ""; answer.on("data", (part) => text += part);
    answer.on("end", () => done([answer.statusCode, answer.statusMessage, JSON.parse(text).length]));
  });
  request.on("error", failed); request.end("y".repeat(turn));
});
Promise.all([...Array(40).keys()].map(ask)).then((all) => {
  all.forEach(([status, message, length], turn) => {
    if (status !== 201 || message !== "As Said" || length !== turn) throw new Error([turn, status, message, length]);
  });
  agent.destroy(); console.log("well");
});
"#;

#[test]
fn curl_python_node_grpc_and_websocket_speak_as_ever() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let http = "protocol = \"http\"";
    cluster.apply(&python("page", PAGE, http, ""), &["--wait"]).expect(0);
    cluster.apply(&spoken("talk", "grpc", "protocol = \"grpc\"\nservice_port = 5005"), &["--wait"]).expect(0);
    cluster.apply(&spoken("socket", "websocket", http), &["--wait"]).expect(0);
    let page = cluster.url("page");
    curl_gets_what_it_asked_for(&page, cluster.dir());
    curl_keeps_its_connection(&page);
    let address = cluster.address("page").to_string();
    assert_eq!(run(Command::new("python3").args(["-c", PYTHON, &address])), "well\n");
    match Command::new("node").arg("--version").output() {
        Ok(_) => assert_eq!(run(Command::new("node").args(["-e", NODE, &page])), "well\n"),
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "there is no node here"),
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(grpc_is_explored(format!("http://{}", cluster.address("talk"))));
    runtime.block_on(a_websocket_echoes(format!("ws://{}/chat", cluster.address("socket"))));
}

fn spoken(name: &str, language: &str, port: &str) -> String {
    format!(
        "name = \"{name}\"\ncommand = [\"{}\", \"{language}\"]\ncount = 2\n\n[ports.main]\n{port}\n\n\
         [health]\ntcp = true\ninterval = \"100ms\"\n",
        speaker().display()
    )
}

fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().expect("it can be started");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn curl(words: &[&str]) -> (String, String) {
    let said = run(Command::new("curl").args(["-sS", "-i", "--max-time", "20"]).args(words));
    // The answer after "100 Continue" is the one that counts.
    let said = said.split_once("HTTP/1.1 100 Continue\r\n\r\n").map_or(said.as_str(), |(_, rest)| rest);
    let (head, body) = said.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {said}"));
    (head.to_owned(), body.to_owned())
}

fn curl_gets_what_it_asked_for(page: &str, dir: &Path) {
    let (head, body) = curl(&["-H", "x-MIXED-Case: As It Is", &format!("{page}/a%2fb?c=d&&e")]);
    assert!(head.starts_with("HTTP/1.1 200 As Said\r\n") && head.contains("\r\nX-oDD-cAsE: kept"), "{head}");
    let said: Value = serde_json::from_str(&body).expect("it answers in JSON");
    assert_eq!(said["path"], "/a%2fb?c=d&&e", "{said}");
    let headers = said["headers"].as_array().expect("a list").iter();
    assert!(headers.clone().any(|pair| pair[0] == "x-MIXED-Case" && pair[1] == "As It Is"), "{said}");
    let is_host = |pair: &Value| pair[0] == "Host" && page.contains(pair[1].as_str().unwrap_or("?"));
    assert!(headers.clone().any(is_host), "{said}");

    let (head, body) = curl(&["--head", page]);
    assert!(head.starts_with("HTTP/1.1 200 ") && body.is_empty(), "{head} {body}");

    let file = dir.join("upload");
    let mut upload = std::fs::File::create(&file).expect("a file");
    upload.write_all(&vec![7; 3 << 20]).expect("3 MiB");
    let of_file = run(Command::new("sha256sum").arg(&file));
    let file = file.display();
    for words in [
        ["--data-binary", &format!("@{file}"), "-H", "Expect: 100-continue"],
        ["--data-binary", &format!("@{file}"), "-H", "Transfer-Encoding: chunked"],
    ] {
        let (head, body) = curl(&[&words[..], &[page]].concat());
        assert!(head.starts_with("HTTP/1.1 201 "), "{head}");
        let said: Value = serde_json::from_str(&body).expect("it answers in JSON");
        assert!(of_file.starts_with(said["sha256"].as_str().unwrap_or("?")), "{words:?}: {said}");
    }
}

fn curl_keeps_its_connection(page: &str) {
    let said = run(Command::new("curl").args(["-sS", "-w", "%{num_connects}\n"]).args([
        "-o",
        "/dev/null",
        page,
        "-o",
        "/dev/null",
        &format!("{page}/again"),
    ]));
    assert_eq!(said, "1\n0\n", "one connection for both");
}

/// As grpcurl does: what is there, what it is made of, and then a call.
async fn grpc_is_explored(url: String) {
    let channel = tonic::transport::Endpoint::new(url).expect("a URL").connect().await.expect("it answers");
    let mut reflection = ServerReflectionClient::new(channel.clone());
    let questions = [
        MessageRequest::ListServices(String::new()),
        MessageRequest::FileContainingSymbol("grpc.health.v1.Health".into()),
    ];
    let asked = questions
        .map(|question| ServerReflectionRequest { message_request: Some(question), ..Default::default() });
    let answers = reflection.server_reflection_info(tokio_stream::iter(asked)).await.expect("it is a stream");
    let answers: Vec<_> =
        answers.into_inner().map(|answer| answer.expect("an answer").message_response).collect().await;
    let [
        Some(MessageResponse::ListServicesResponse(list)),
        Some(MessageResponse::FileDescriptorResponse(files)),
    ] = answers.as_slice()
    else {
        panic!("{answers:?}");
    };
    assert!(list.service.iter().any(|service| service.name == "grpc.health.v1.Health"), "{list:?}");
    assert!(!files.file_descriptor_proto.is_empty());

    let mut health = HealthClient::new(channel);
    let ask = |service: &str| HealthCheckRequest { service: service.into() };
    let said = health.check(ask("spoken")).await.expect("it is known").into_inner();
    assert_eq!(said.status(), ServingStatus::Serving);
    let status = health.check(ask("unspoken")).await.expect_err("nobody has heard of it");
    assert_eq!((status.code(), status.message()), (Code::NotFound, "service not registered"));
    let mut watch = health.watch(ask("spoken")).await.expect("it is a stream").into_inner();
    let first = watch.message().await.expect("it is open").expect("the status is said at once");
    assert_eq!(first.status(), ServingStatus::Serving);
}

async fn a_websocket_echoes(url: String) {
    let (mut socket, answer) = tokio_tungstenite::connect_async(url).await.expect("it is upgraded");
    assert_eq!(answer.status().as_u16(), 101);
    for message in [Message::text("hello"), Message::binary(vec![3; 300_000])] {
        socket.send(message.clone()).await.expect("it is open");
        assert_eq!(socket.next().await.expect("it is open").expect("a message"), message);
    }
    socket.send(Message::Ping(b"there?".as_slice().into())).await.expect("it is open");
    let pong = socket.next().await.expect("it is open").expect("a message");
    assert_eq!(pong, Message::Pong(b"there?".as_slice().into()));
    let frame = CloseFrame { code: 4321.into(), reason: "enough".into() };
    socket.close(Some(frame.clone())).await.expect("it is open");
    let last = socket.next().await.expect("it answers").expect("a message");
    assert_eq!(last, Message::Close(Some(frame)), "the program's own answer to the close");
}
