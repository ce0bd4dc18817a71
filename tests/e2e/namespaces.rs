//! Promise: between hosts that are machines of their own, as far as the network is concerned, a caller is who its kernel
//! says, strangers are not answered, an instance's own port is nobody's but its service's, and neither many connections
//! nor much traffic at once harm other calls. gRPC keeps its statuses.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use nave_proto::ids::HostId;
use nave_tests::cluster::SOON;
use nave_tests::nave::run;
use nave_tests::netns::Namespace;
use nave_tests::{Cluster, Setup, eventually_some};
use nave_tls::{Credentials, Dialer, Expect};
use tokio::time::Instant;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::between_hosts::{CALLED, CALLER, ask, look, service};
use crate::manifests::web_with;
use crate::strangers::agent_credentials;

const CONNECTIONS: usize = 1000;
const BULK_BYTES: usize = 192 * 1024 * 1024;
/// Of a small call beside much traffic; a second on a quiet machine would be far too long already.
const SMALL_CALL: Duration = Duration::from_secs(5);
/// Where the test itself answers, in the place of an instance.
const GRPC_PORT: u16 = 9_999;

/// Sends back what it was told, once all of it is there; to `bulk` much.
const MANY: &str = r#"
import asyncio, os
async def serve(reader, writer):
    told = await reader.read()
    if told == b"bulk":
        for _ in range(int(os.environ["BULK_BYTES"]) // 65536):
            writer.write(b"x" * 65536)
            await writer.drain()
    else:
        writer.write(told)
    await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(serve, os.environ["HOST"], int(os.environ["PORT"]), backlog=2048)
    await server.serve_forever()
asyncio.run(main())
"#;

#[test]
fn calls_between_machines_are_safe_and_do_not_harm_each_other() {
    let Some(cluster) = Cluster::start_on_network(&Setup { members: 1, agents: 2 }) else { return };
    let (near, far) = (&cluster.agents[0], &cluster.agents[1]);
    let (near, far_port) = (near.machine.clone().expect("on a network"), far.port);
    let far = far.machine.clone().expect("on a network");

    let http = "protocol = \"http\"";
    cluster.apply(&service("called", "agent-2", CALLED, http, "allow = [\"caller\"]"), &["--wait"]).expect(0);
    cluster
        .apply(
            &service(
                "many",
                "agent-2",
                MANY,
                "protocol = \"tcp\"\nservice_port = 9000",
                &format!("env = {{ BULK_BYTES = \"{BULK_BYTES}\" }}"),
            ),
            &["--wait"],
        )
        .expect(0);
    cluster
        .apply(&web_with("web", 1, "", "[placement]\nconstraints = ['host = \"agent-2\"']"), &["--wait"])
        .expect(0);
    cluster.apply(&grpc_manifest(), &["--wait"]).expect(0);
    // It talks to `called` and, in the place of `stream`, to `many`.
    let many = address(&cluster, "many");
    let told = format!("needs = [\"called\", \"many\"]\nenv = {{ STREAM_ADDR = \"{many}\" }}");
    cluster.apply(&service("caller", "agent-1", CALLER, http, &told), &["--wait"]).expect(0);

    identity_is_the_kernels_word(&cluster, &near);
    strangers_are_not_answered(&cluster, &near, &format!("{}:{far_port}", far.address));
    an_instances_port_is_its_own(&cluster, &far);
    near.inside(|| many_connections_at_once(&many));
    let web = address(&cluster, "web");
    near.inside(|| much_traffic_stalls_no_small_call(&many, &web));
    grpc_keeps_its_statuses(&address(&cluster, "statuses"), &near, &far);
}

/// As callers on the near machine find it.
fn address(cluster: &Cluster, service: &str) -> String {
    let hosts = cluster.json(&["hosts"]);
    let near = hosts.as_array().expect("rows").iter().find(|host| host["name"] == "agent-1");
    let agent = near.and_then(|host| host["address"].as_str()).expect("an address").to_owned();
    let url = cluster.nave(&["url", service, "--agent", &agent]).expect(0).stdout;
    url.trim().rsplit('/').next().expect("an address in a URL").to_owned()
}

fn grpc_manifest() -> String {
    format!(
        "name = \"statuses\"\ncommand = [\"sleep\", \"infinity\"]\nuser = \"root\"\n\n[ports.main]\n\
         protocol = \"grpc\"\nservice_port = 9001\nport = {GRPC_PORT}\n\n[placement]\n\
         constraints = ['host = \"agent-2\"']\n"
    )
}

fn identity_is_the_kernels_word(cluster: &Cluster, near: &Namespace) {
    let said = eventually_some("both are reached", SOON, || {
        near.inside(|| look(cluster, "caller")).filter(|said| said["echo"] == 300_000)
    });
    assert_eq!(said["page"], "caller", "its own claim to be root is nothing: {said}");
    let called = address(cluster, "called");
    let refused = near.inside(|| ask(&called)).expect_err("the test is no service");
    assert!(refused.starts_with("HTTP/1.1 403 "), "{refused}");
}

/// Neither plain text, nor another cluster's certificate, nor one of this cluster that is no agent's.
fn strangers_are_not_answered(cluster: &Cluster, near: &Namespace, far: &str) {
    let request =
        b"GET / HTTP/1.1\r\nHost: called\r\nNave-To: called main 1 1\r\nNave-Caller: caller\r\n\r\n";
    let heard = near.inside(|| {
        let mut stream = TcpStream::connect(far).expect("the port is open");
        stream.set_read_timeout(Some(SOON)).expect("set");
        let mut heard = Vec::new();
        let _cut = stream.write_all(request).and_then(|()| stream.read_to_end(&mut heard).map(|_| ()));
        heard
    });
    assert!(!heard.starts_with(b"HTTP/"), "{}", String::from_utf8_lossy(&heard));

    let other = tempfile::tempdir().expect("a folder");
    let out = other.path().join("other");
    run(None, &["init", "--members", "127.0.0.1:1", "--out", out.to_str().expect("plain")], None).expect(0);
    let hosts = cluster.json(&["hosts"]);
    let far_host = hosts.as_array().expect("rows").iter().find(|host| host["name"] == "agent-2");
    let far_host: HostId = far_host.and_then(|host| host["id"].as_str()?.parse().ok()).expect("an id");
    let foreign = operator(&out.join("client.toml"));
    let own_operator = operator(&cluster.context());
    let own_agent = agent_credentials(&cluster.agents[0].dir.join("data"));
    for (credentials, is_answered) in [(own_agent, true), (own_operator, false), (foreign, false)] {
        let answer = near.inside(|| call_agent(far, &credentials, far_host, request));
        assert_eq!(answer.starts_with("HTTP/1.1 "), is_answered, "{credentials:?} heard {answer:?}");
    }
}

fn operator(context: &std::path::Path) -> Credentials {
    let table: toml::Table = std::fs::read_to_string(context).expect("a file").parse().expect("TOML");
    let dir = tempfile::tempdir().expect("a folder");
    let file = |key: &str| {
        let said = table[key].as_str().expect("PEM, or the name of a file with it");
        if !said.contains("-----BEGIN") {
            return context.with_file_name(said);
        }
        let path = dir.path().join(key);
        std::fs::write(&path, said).expect("it is written");
        path
    };
    Credentials::load(&file("certificate"), &file("key"), &file("ca")).expect("credentials")
}

/// What an agent answers to whoever speaks as another agent does; nothing when it does not.
fn call_agent(address: &str, credentials: &Credentials, host: HostId, request: &[u8]) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let call = async {
        let dialer = Dialer::new(address, credentials, Expect::Agent(host), b"nave-http1", SOON);
        let mut connection = dialer.connect().await.ok()?;
        connection.write_all(request).await.ok()?;
        let mut heard = vec![0; 4096];
        let length = connection.read(&mut heard).await.ok()?;
        Some(String::from_utf8_lossy(&heard[..length]).into_owned())
    };
    runtime.block_on(async { tokio::time::timeout(SOON, call).await.ok().flatten() }).unwrap_or_default()
}

/// Root and the service's own user get to it, nobody else.
fn an_instances_port_is_its_own(cluster: &Cluster, far: &Namespace) {
    let row = cluster.wait_ready("web", 1).remove(0);
    let port = row["ports"]["http"].as_u64().expect("a port").to_string();
    let pid = row["pid"].as_u64().expect("a pid");
    let own: u32 = {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).expect("a user");
        line.split_whitespace().next().and_then(|uid| uid.parse().ok()).expect("a number")
    };
    assert_ne!(own, 0, "it has a user of its own");
    let connects = |uid: u32| {
        let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port}");
        let connect = || Command::new("bash").args(["-c", &script]).uid(uid).output().expect("bash").status;
        far.inside(connect).success()
    };
    eventually_some("others are kept out", SOON, || (!connects(own + 1)).then_some(()));
    assert!(connects(own), "its own user");
    assert!(connects(0), "an operator who looks for a fault");
    let tables = far.inside(|| Command::new("nft").args(["list", "tables"]).output().expect("nft").stdout);
    let tables = String::from_utf8_lossy(&tables).into_owned();
    assert_eq!(tables.lines().filter(|line| line.contains("nave_")).count(), 1, "{tables}");
}

fn many_connections_at_once(address: &str) {
    let text = |number: usize| format!("caller {number}");
    let mut streams: Vec<TcpStream> = (0..CONNECTIONS)
        .map(|number| {
            let stream =
                TcpStream::connect(address).unwrap_or_else(|why| panic!("connection {number}: {why}"));
            stream.set_read_timeout(Some(SOON)).expect("set");
            stream
        })
        .collect();
    for (number, stream) in streams.iter_mut().enumerate() {
        stream.write_all(text(number).as_bytes()).expect("it is open");
        stream.shutdown(std::net::Shutdown::Write).expect("it is open");
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let mut heard = String::new();
        stream.read_to_string(&mut heard).expect("an answer");
        assert_eq!(heard, text(number));
    }
}

fn much_traffic_stalls_no_small_call(bulk: &str, small: &str) {
    let (done, is_done) = mpsc::channel();
    std::thread::scope(|scope| {
        let download = {
            let mut stream = TcpStream::connect(bulk).expect("it is there");
            stream.set_read_timeout(Some(SOON)).expect("set");
            stream
                .write_all(b"bulk")
                .and_then(|()| stream.shutdown(std::net::Shutdown::Write))
                .expect("open");
            stream
        };
        let mut download = download;
        scope.spawn(move || {
            let mut total = 0;
            let mut part = vec![0; 65536];
            while let Ok(length @ 1..) = download.read(&mut part) {
                total += length;
            }
            done.send(total)
        });
        let (mut calls, mut slowest) = (0, Duration::ZERO);
        let total = loop {
            let begun = Instant::now();
            ask(small).expect("a small call is answered");
            slowest = slowest.max(begun.elapsed());
            calls += 1;
            if let Ok(total) = is_done.try_recv() {
                break total;
            }
        };
        assert_eq!(total, BULK_BYTES, "all of it came");
        assert!(calls >= 5, "only {calls} small calls were made beside it");
        assert!(slowest < SMALL_CALL, "one of {calls} small calls took {slowest:?}");
    });
}

/// The test answers in the place of the instance, on its machine.
fn grpc_keeps_its_statuses(address: &str, near: &Namespace, far: &Namespace) {
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let (bound, is_bound) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            far.inside(move || {
                runtime().block_on(async {
                    let listener = tokio::net::TcpListener::bind(("127.0.0.1", GRPC_PORT)).await;
                    let incoming =
                        tokio_stream::wrappers::TcpListenerStream::new(listener.expect("it is free"));
                    let (_reporter, health) = tonic_health::server::health_reporter();
                    bound.send(()).expect("it is waited for");
                    let served = tonic::transport::Server::builder().add_service(health);
                    served.serve_with_incoming_shutdown(incoming, async { drop(stopped.await) }).await
                })
            })
        });
        is_bound.recv_timeout(SOON).expect("the server begins");
        let (known, unknown) = near.inside(|| {
            runtime().block_on(async {
                let channel =
                    tonic::transport::Endpoint::from_shared(format!("http://{address}")).expect("a URL");
                let mut client = HealthClient::new(channel.connect_lazy());
                let known = client.check(HealthCheckRequest { service: String::new() }).await;
                let unknown = client.check(HealthCheckRequest { service: "nothing".to_owned() }).await;
                (known, unknown)
            })
        });
        let _stopped = stop.send(());
        assert_eq!(known.expect("it is answered").into_inner().status, 1, "serving");
        let status = unknown.expect_err("nobody has that name");
        assert_eq!(status.code(), tonic::Code::NotFound, "{status:?}");
        assert!(status.message().contains("not registered"), "the server's own words: {status:?}");
    });
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}
