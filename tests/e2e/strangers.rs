//! Promise (invariant 9): no peer without a certificate of the cluster is answered, no agent speaks for another host,
//! and a token that expired, was revoked or is made up opens nothing.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_tests::cluster::SOON;
use nave_tests::nave::{binary, run};
use nave_tests::process::{self, Process};
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nave_tls::{ChannelOptions, Credentials, Expect};

use crate::manifests::sleeper;

#[test]
fn an_operator_of_another_cluster_is_refused() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 0 });
    let other = tempfile::tempdir().expect("a folder");
    let out = other.path().join("other");
    let address = format!("127.0.0.1:{}", cluster.members[0].port);
    run(None, &["init", "--members", &address, "--out", out.to_str().expect("plain")], None).expect(0);

    let output = run(Some(&out.join("client.toml")), &["services"], None);

    assert_eq!(output.code, 3, "{}", output.text());
    assert!(
        output.stderr.contains("another cluster") || output.stderr.contains("certificate"),
        "{}",
        output.stderr
    );
}

#[test]
fn plain_text_and_garbage_get_no_answer_and_disturb_nobody() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    for port in [cluster.members[0].port, cluster.agents[0].port] {
        for garbage in
            [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0u8; 4096], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
        {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the port is open");
            stream.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
            let _ = stream.write_all(garbage);
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            let text = String::from_utf8_lossy(&answer).into_owned();
            assert!(!text.contains("HTTP/1.1 200") && !text.contains("grpc"), "{text}");
        }
    }
    cluster.apply(&sleeper("sleeper", 1), &["--wait"]).expect(0);
}

#[test]
fn an_agent_cannot_speak_for_another_host() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 2 });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let credentials = agent_credentials(&cluster.agents[0].dir.join("data"));
    let hosts = cluster.json(&["hosts"]);
    let host = |name: &str| {
        let row = hosts.as_array().expect("rows").iter().find(|row| row["name"] == name).expect("the host");
        row["id"].as_str().expect("an id").parse::<HostId>().expect("a host id")
    };
    let address = format!("127.0.0.1:{}", cluster.members[0].port);

    let refusal = runtime.block_on(async {
        let channel = nave_tls::channel(&address, &credentials, Expect::Member, ChannelOptions::default());
        let mut client = pb::agent_session_client::AgentSessionClient::new(channel.clone());
        let hello = pb::Hello { host_id: host("agent-2").to_string(), ..Default::default() };
        let message = pb::AgentMessage { message: Some(pb::agent_message::Message::Hello(hello)) };
        let session = client.open_session(tokio_stream::iter([message])).await;
        let refused = match session {
            Err(status) => status,
            Ok(stream) => stream.into_inner().message().await.expect_err("the session is refused"),
        };
        // Nor may it do what only people may.
        let mut services = pb::service_service_client::ServiceServiceClient::new(channel);
        let delete = pb::DeleteServiceRequest { name: "web".into(), ..Default::default() };
        let denied = services.delete_service(delete).await.expect_err("agents delete nothing");
        (refused, denied)
    });
    assert_eq!(refusal.0.code(), tonic::Code::PermissionDenied, "{:?}", refusal.0);
    assert_eq!(refusal.1.code(), tonic::Code::PermissionDenied, "{:?}", refusal.1);
}

pub(crate) fn agent_credentials(data: &Path) -> Credentials {
    eventually_some("the agent keeps its certificate", SOON, || {
        Credentials::load(&data.join("agent.crt"), &data.join("agent.key"), &data.join("ca.crt")).ok()
    })
}

#[test]
fn tokens_that_expired_were_revoked_or_made_up_enrol_nobody() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 0 });
    let expired = token(&cluster, &["token", "create", "--ttl", "1s"]);
    let revoked = token(&cluster, &["token", "create"]);
    let id = revoked.split('.').nth(3).expect("the id").to_owned();
    cluster.nave(&["token", "revoke", &id]).expect(0);
    let mut made_up = token(&cluster, &["token", "create"]);
    made_up.replace_range(made_up.len() - 4.., "aaaa");
    nave_tests::wait::pause(Duration::from_millis(1100)); // the shortest life a token can have

    for (name, token) in [("expired", expired), ("revoked", revoked), ("made-up", made_up)] {
        let said = refused_agent(&cluster, name, &token);
        assert!(said.contains("token"), "{name}: {said}");
    }
    assert_eq!(cluster.json(&["hosts"]).as_array().map(Vec::len), Some(0));
    an_agent_that_waits_for_its_hub_ends_when_no_keeper_comes_back(&cluster);
}

/// Nobody would end it any more, and it has the data directory and the ports that the next one needs.
fn an_agent_that_waits_for_its_hub_ends_when_no_keeper_comes_back(cluster: &Cluster) {
    let dir = cluster.dir().join("waits");
    std::fs::create_dir_all(&dir).expect("a folder");
    std::fs::write(dir.join("token"), token(cluster, &["token", "create"])).expect("written");
    let nobody =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address");
    let mut command = Command::new(binary());
    command
        .args(["agent", "--join", &nobody.to_string()])
        .args(["--token-file", dir.join("token").to_str().expect("plain")])
        .args(["--data-dir", dir.join("data").to_str().expect("plain")]);
    let keeper = Process::start("waits", &mut command, &dir.join("log")).expect("it starts");
    let agent: u32 = eventually_some("the agent waits for its hub", SOON, || {
        let log = std::fs::read_to_string(dir.join("log")).ok()?;
        let pid = std::fs::read_to_string(dir.join("data/nave.pid")).ok()?;
        log.contains("cannot join yet").then(|| pid.trim().parse().ok())?
    });
    drop(keeper); // kill -9
    eventually("the agent ends, too", SOON, || !process::alive(agent));
}

fn token(cluster: &Cluster, args: &[&str]) -> String {
    let output = cluster.nave(args).expect(0);
    let text = output.stdout.split_whitespace().find(|word| word.starts_with("nave-join.")).expect("a token");
    text.to_owned()
}

/// Starts an agent with this token and returns what it says, once it says anything of the token.
fn refused_agent(cluster: &Cluster, name: &str, token: &str) -> String {
    let dir = cluster.dir().join(name);
    std::fs::create_dir_all(&dir).expect("a folder");
    std::fs::write(dir.join("token"), token).expect("written");
    let mut command = Command::new(binary());
    command
        .args(["agent", "--join", &format!("127.0.0.1:{}", cluster.members[0].port)])
        .args(["--token-file", dir.join("token").to_str().expect("plain")])
        .args(["--data-dir", dir.join("data").to_str().expect("plain")]);
    let log = dir.join("log");
    let _process = Process::start(name, &mut command, &log).expect("it starts");
    eventually_some("the refusal is said", SOON, || {
        let text = std::fs::read_to_string(&log).ok()?;
        (text.contains("token")
            && (text.contains("refused")
                || text.contains("expired")
                || text.contains("revoked")
                || text.contains("not valid")))
        .then_some(text)
    })
}
