//! Promise: a service is called the same way wherever its instances are; who calls is known by the kernel's word, on
//! another host too, and a planned change fails no call.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nave_tests::cluster::SOON;
use nave_tests::{Cluster, Setup, eventually_some};
use serde_json::Value;

use crate::deploy_and_serve::get;
use crate::manifests::web_with;

/// Answers with the caller's name as its agent gives it.
const CALLED: &str = r#"
import http.server, os
class Say(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.headers.get("Nave-Caller", "nobody").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Say).serve_forever()
"#;

/// Sends back what it is sent, once the caller has closed its half.
const STREAM: &str = r#"
import os, socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        told = b""
        while part := self.request.recv(65536):
            told += part
        self.request.sendall(told)
class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
Server((os.environ["HOST"], int(os.environ["PORT"])), Echo).serve_forever()
"#;

/// Calls both, claims to be somebody else, and says what came of it.
const CALLER: &str = r#"
import http.server, json, os, socket, urllib.request, urllib.error
def page(url):
    try:
        ask = urllib.request.Request(url + "/", headers={"Nave-Caller": "root"})
        return urllib.request.urlopen(ask, timeout=10).read().decode()
    except urllib.error.HTTPError as error:
        return str(error.code)
    except OSError as error:
        return str(error)
def echo(address):
    host, port = address.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=10) as stream:
            stream.sendall(b"x" * 300000)
            stream.shutdown(socket.SHUT_WR)
            total = 0
            while part := stream.recv(65536):
                total += len(part)
            return total
    except OSError as error:
        return str(error)
class Look(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"page": page(os.environ["CALLED_URL"]), "echo": echo(os.environ["STREAM_ADDR"])}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Look).serve_forever()
"#;

fn service(name: &str, host: &str, program: &str, port: &str, more: &str) -> String {
    format!(
        "name = \"{name}\"\ncommand = [\"python3\", \"-c\", '''{program}''']\n{more}\n[ports.main]\n{port}\n\
         [health]\ntcp = true\ninterval = \"100ms\"\n\n[placement]\nconstraints = ['host = \"{host}\"']\n"
    )
}

fn look(cluster: &Cluster, service: &str) -> Option<Value> {
    let port = cluster.ps(service).first()?["ports"]["main"].as_u64()?;
    serde_json::from_str(&get(port, "/")?).ok()
}

#[test]
fn a_call_finds_its_service_on_another_host_and_says_who_calls() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 2 });
    let http = "protocol = \"http\"";
    let called = service("called", "agent-2", CALLED, http, "allow = [\"caller\"]");
    cluster.apply(&called, &["--wait"]).expect(0);
    let stream = service("stream", "agent-2", STREAM, "protocol = \"tcp\"\nservice_port = 9000", "");
    cluster.apply(&stream, &["--wait"]).expect(0);
    let needs = "needs = [\"called\", \"stream\"]";
    cluster.apply(&service("caller", "agent-1", CALLER, http, needs), &["--wait"]).expect(0);
    // It is told no address of what it may not call, and has it from elsewhere.
    let url = cluster.nave(&["url", "called"]).expect(0).stdout;
    let told = format!("{needs}\nenv = {{ CALLED_URL = \"{}\" }}", url.trim());
    cluster.apply(&service("stranger", "agent-1", CALLER, http, &told), &["--wait"]).expect(0);
    let said = eventually_some("both are reached", SOON, || {
        look(&cluster, "caller").filter(|said| said["echo"] == 300_000)
    });
    assert_eq!(said["page"], "caller", "the caller's own claim is nothing: {said}");
    let said = look(&cluster, "stranger").expect("it answers");
    assert_eq!(said["page"], "403", "it is not on the list: {said}");
    assert_eq!(said["echo"], 300_000, "who has no list may be called by all: {said}");
}

#[test]
fn a_planned_change_fails_no_call() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 2 });
    let rules = "[update]\nmax_parallel = 1\nmin_ready = \"500ms\"";
    cluster.apply(&web_with("web", 4, "--greeting one", rules), &["--wait"]).expect(0);
    let url = cluster.nave(&["url", "web"]).expect(0).stdout.trim().to_owned();
    let address = url.trim_start_matches("http://").to_owned();
    eventually_some("it answers", SOON, || ask(&address).ok());

    let (done, calls) = (AtomicBool::new(false), AtomicUsize::new(0));
    let failures = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut failures = Vec::new();
                    while !done.load(Ordering::Relaxed) {
                        calls.fetch_add(1, Ordering::Relaxed);
                        failures.extend(ask(&address).err());
                    }
                    failures
                })
            })
            .collect();
        cluster.nave(&["restart", "web", "--wait"]).expect(0);
        cluster.apply(&web_with("web", 4, "--greeting two", rules), &["--wait"]).expect(0);
        cluster.nave(&["scale", "web", "2"]).expect(0);
        cluster.wait_ready("web", 2);
        cluster.nave(&["drain", "agent-2"]).expect(0);
        eventually_some("the host is empty", SOON, || {
            let rows = cluster.ps("web");
            let moved = rows.iter().filter(|row| row["host"] == "agent-1" && row["ready"] == true).count();
            (moved == 2 && rows.len() == 2).then_some(())
        });
        done.store(true, Ordering::Relaxed);
        callers.into_iter().flat_map(|caller| caller.join().expect("no panic")).collect::<Vec<_>>()
    });
    let calls = calls.load(Ordering::Relaxed);
    assert!(failures.is_empty(), "{} of {calls} calls failed, the first: {}", failures.len(), failures[0]);
    assert!(calls > 100, "only {calls} calls were made");
}

/// One call on a connection of its own; `Err`: what came instead of an answer.
fn ask(address: &str) -> Result<String, String> {
    use std::io::{Read as _, Write as _};
    let ask = || {
        let mut stream = std::net::TcpStream::connect(address)?;
        stream.set_read_timeout(Some(SOON))?;
        write!(stream, "GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok::<_, std::io::Error>(answer)
    };
    match ask() {
        Ok(answer) if answer.starts_with("HTTP/1.1 200 ") => Ok(answer),
        Ok(answer) => Err(answer),
        Err(error) => Err(error.to_string()),
    }
}
