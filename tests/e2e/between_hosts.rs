//! Promise: a service is called the same way wherever its instances are; who calls is known by the kernel's word, on
//! another host too, and a planned change fails no call.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nave_tests::cluster::SOON;
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::deploy_and_serve::{get, pid};
use crate::manifests::{python, web_with};

/// Of each kind, each with one call under way at a time.
const CALLERS: usize = 2;

/// Answers with the caller's name as its agent gives it.
pub(crate) const CALLED: &str = r#"
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
pub(crate) const CALLER: &str = r#"
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

pub(crate) fn service(name: &str, host: &str, program: &str, port: &str, more: &str) -> String {
    let there = format!("\n[placement]\nconstraints = ['host = \"{host}\"']\n");
    python(name, program, port, more) + &there
}

pub(crate) fn look(cluster: &Cluster, service: &str) -> Option<Value> {
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
    let told = format!("{needs}\nenv = {{ CALLED_URL = \"{}\" }}", cluster.url("called"));
    cluster.apply(&service("stranger", "agent-1", CALLER, http, &told), &["--wait"]).expect(0);
    let said = eventually_some("both are reached", SOON, || {
        look(&cluster, "caller").filter(|said| said["echo"] == 300_000)
    });
    assert_eq!(said["page"], "caller", "the caller's own claim is nothing: {said}");
    let said = look(&cluster, "stranger").expect("it answers");
    assert_eq!(said["page"], "403", "it is not on the list: {said}");
    assert_eq!(said["echo"], 300_000, "who has no list may be called by all: {said}");

    let web = web_with("web", 1, "", "[placement]\nconstraints = ['host = \"agent-2\"']");
    cluster.apply(&web, &["--wait"]).expect(0);
    callers_outlive_the_agent_of_the_other_host(&cluster);
    calls_are_seen(&cluster);
    a_lost_port_is_explained(&cluster);
}

/// In `nave status` and, once a manifest wants it, line by line; which replaces no process.
fn calls_are_seen(cluster: &Cluster) {
    let before = pid(&cluster.wait_ready("web", 1)[0]);
    let tables = "[ports.http.calls]\naccess_log = true\ntimeout = \"10s\"\n\n[placement]\n\
                  constraints = ['host = \"agent-2\"']";
    cluster.apply(&web_with("web", 1, "", tables), &["--wait"]).expect(0);
    let hosts = cluster.json(&["hosts"]);
    let agent = hosts[0]["address"].as_str().expect("an address").to_owned();
    let url = cluster.nave(&["url", "web", "--agent", &agent]).expect(0).stdout;
    let address = url.trim().trim_start_matches("http://").to_owned();
    let logged = eventually_some("calls are logged", SOON, || {
        ask(&address).ok()?;
        let logged = cluster.json(&["logs", "web", "--access"]);
        logged.as_array().filter(|lines| lines.len() > 1).cloned()
    });
    let line: Value = serde_json::from_str(logged[0]["text"].as_str().expect("a text")).expect("JSON");
    assert_eq!((&line["call"], &line["class"]), (&"GET /".into(), &"success".into()), "{line}");
    assert!(line["caller"].as_str().is_some_and(|caller| caller.starts_with("host/")), "{line}");
    let page = cluster.json(&["status", "web"]);
    let traffic = &page["traffic"];
    assert!(traffic["requests"]["success"].as_u64().is_some_and(|calls| calls > 100), "{traffic}");
    assert!(traffic["success_share"].as_f64().is_some_and(|share| share > 0.9), "{traffic}");
    assert!(traffic["p99_seconds"].as_f64() >= traffic["p50_seconds"].as_f64(), "{traffic}");
    assert_eq!(traffic["hosts"], 2, "both were asked: {traffic}");
    assert_eq!(pid(&cluster.wait_ready("web", 1)[0]), before, "no process was replaced");
}

fn a_lost_port_is_explained(cluster: &Cluster) {
    let winner = std::net::TcpListener::bind("0.0.0.0:0").expect("a port");
    let port = winner.local_addr().expect("it is bound").port();
    let tcp = format!("protocol = \"tcp\"\nservice_port = {port}");
    cluster.apply(&service("loser", "agent-2", STREAM, &tcp, ""), &["--wait"]).expect(0);
    let own = format!("process {} (", std::process::id());
    eventually("both hosts say who has the port", SOON, || {
        let hosts = cluster.json(&["hosts"]);
        let says = |host: &Value| {
            let lacks = host["lacks"].as_array().into_iter().flatten().filter_map(Value::as_str);
            lacks.into_iter().any(|lack| lack.starts_with("loser is found at ") && lack.contains(&own))
        };
        hosts.as_array().is_some_and(|hosts| hosts.len() == 2 && hosts.iter().all(says))
    });
}

/// The agent's port is the only way to its host's instances, so it is there while the agent is not.
fn callers_outlive_the_agent_of_the_other_host(cluster: &Cluster) {
    let [web, stream] = ["web", "stream"].map(|name| cluster.address(name).to_string());
    eventually_some("both answer", SOON, || ask(&web).and_then(|_| echo(&stream)).ok());
    let calls = [AtomicUsize::new(0), AtomicUsize::new(0)];
    let more = |cluster: &Cluster| {
        let before = calls.each_ref().map(|calls| calls.load(Ordering::SeqCst));
        eventually("calls are answered", SOON, || {
            before.iter().zip(&calls).all(|(before, calls)| calls.load(Ordering::SeqCst) >= before + 20)
        });
        cluster.agents[1].agent_pid()
    };
    for (signal, cut_max) in [(Signal::SIGTERM, 0), (Signal::SIGKILL, CALLERS)] {
        let over = AtomicBool::new(false);
        let keep_on = |call: &(dyn Fn() -> Result<String, String> + Sync), calls: &AtomicUsize| {
            let mut failures = Vec::new();
            while !over.load(Ordering::SeqCst) {
                failures.extend(call().err());
                calls.fetch_add(1, Ordering::SeqCst);
            }
            failures
        };
        let [pages, streams] = std::thread::scope(|scope| {
            let callers: [Vec<_>; 2] = [
                (0..CALLERS).map(|_| scope.spawn(|| keep_on(&|| ask(&web), &calls[0]))).collect(),
                (0..CALLERS).map(|_| scope.spawn(|| keep_on(&|| echo(&stream), &calls[1]))).collect(),
            ];
            let agent = more(cluster);
            send(agent, signal);
            let changed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                eventually("another agent", SOON, || {
                    cluster.agents[1].pid_file("nave.pid").is_some_and(|now| now != agent && alive(now))
                });
                more(cluster)
            }));
            over.store(true, Ordering::SeqCst);
            changed.expect("the agent is back and calls are answered");
            callers.map(|callers| {
                callers.into_iter().flat_map(|one| one.join().expect("no panic")).collect::<Vec<_>>()
            })
        });
        assert!(pages.is_empty(), "{signal}: a GET may be asked twice: {pages:?}");
        assert!(streams.len() <= cut_max, "{signal}: only what was under way is cut: {streams:?}");
    }
}

#[test]
fn a_planned_change_fails_no_call() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 2 });
    let rules = "[update]\nmax_parallel = 1\nmin_ready = \"500ms\"";
    cluster.apply(&web_with("web", 4, "--greeting one", rules), &["--wait"]).expect(0);
    let address = cluster.address("web").to_string();
    eventually_some("it answers", SOON, || ask(&address).ok());

    let (done, calls) = (AtomicBool::new(false), AtomicUsize::new(0));
    let failures = std::thread::scope(|scope| {
        let ends = Ends(&done);
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
        restart_under_another_leader(&mut cluster);
        cluster.nave(&["drain", "agent-2"]).expect(0);
        eventually_some("the host is empty", SOON, || {
            let rows = cluster.ps("web");
            let moved = rows.iter().filter(|row| row["host"] == "agent-1" && row["ready"] == true).count();
            (moved == 2 && rows.len() == 2).then_some(())
        });
        drop(ends);
        callers.into_iter().flat_map(|caller| caller.join().expect("no panic")).collect::<Vec<_>>()
    });
    let calls = calls.load(Ordering::Relaxed);
    assert!(failures.is_empty(), "{} of {calls} calls failed, the first: {}", failures.len(), failures[0]);
    assert!(calls > 100, "only {calls} calls were made");
}

/// Says so when the test ends, also by a panic: else the callers would go on for ever.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The leader dies before the first of its instances has to go: who it is that has left that one, its successor has to
/// hear from agents that look for another member.
fn restart_under_another_leader(cluster: &mut Cluster) {
    let before: Vec<u32> = cluster.ps("web").iter().map(pid).collect();
    let leader = cluster.wait_for_leader();
    cluster.nave(&["restart", "web"]).expect(0);
    eventually("a replacement begins", SOON, || cluster.ps("web").len() > 2);
    cluster.members[leader].kill();
    eventually("all are replaced", SOON, || {
        let rows = cluster.try_json(&["ps", "web"]);
        let rows = rows.as_ref().and_then(Value::as_array).cloned().unwrap_or_default();
        let new = rows.iter().filter(|row| {
            row["ready"] == true
                && !row["pid"].as_u64().is_some_and(|pid| before.iter().any(|old| u64::from(*old) == pid))
        });
        new.count() == 2 && rows.len() == 2
    });
}

/// A stream of its own, there and back.
fn echo(address: &str) -> Result<String, String> {
    use std::io::{Read as _, Write as _};
    let echo = || {
        let mut stream = std::net::TcpStream::connect(address)?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(b"there and back")?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut heard = String::new();
        stream.read_to_string(&mut heard)?;
        Ok::<_, std::io::Error>(heard)
    };
    match echo() {
        Ok(heard) if heard == "there and back" => Ok(heard),
        Ok(heard) => Err(format!("heard {heard:?}")),
        Err(error) => Err(error.to_string()),
    }
}

/// One call on a connection of its own; `Err`: what came instead of an answer.
pub(crate) fn ask(address: &str) -> Result<String, String> {
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
