//! A whole agent between a hub and a keeper that only pretend: what it says to the one and asks of the other, through
//! its own restarts and the hub's absence. Real processes are the business of `tests/e2e`.

#![expect(clippy::unwrap_used, reason = "a fake that cannot go on fails the test")]

mod fake_hub;
mod fake_keeper;

use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use nave_agent::{AgentConfig, RunError, run};
use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_tls::{ChannelOptions, Expect, Role};
use pb::agent_service_client::AgentServiceClient;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use fake_hub::FakeHub;
use fake_keeper::FakeKeeper;

/// A port that nobody listens on, below those that the kernel gives away (32768 and up), so that nobody is given it
/// in the meantime.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let mut ports = std::iter::repeat_with(|| 4_000 + NEXT.fetch_add(1, Ordering::Relaxed) % 2_000);
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).unwrap()
}

fn config(dir: &Path, hub: &str, token: &str) -> AgentConfig {
    let token_file = dir.join("token");
    std::fs::write(&token_file, token).unwrap();
    let mut config = AgentConfig::new(dir.join("data"), vec![hub.to_owned()]);
    config.token_file = Some(token_file);
    config.name = "north".into();
    config.firewall = false;
    config.listen = ([127, 0, 0, 1], free_port()).into();
    config.metrics_listen = ([127, 0, 0, 1], free_port()).into();
    config
}

struct Agent {
    tasks: JoinSet<Result<(), RunError>>,
    shutdown: CancellationToken,
}

impl Agent {
    fn start(config: &AgentConfig) -> Self {
        let shutdown = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(run(config.clone(), shutdown.clone(), CancellationToken::new()));
        Self { tasks, shutdown }
    }

    /// Its result, when it ends by itself.
    async fn end(mut self) -> Result<(), RunError> {
        self.tasks.join_next().await.unwrap().unwrap()
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.end().await.unwrap();
    }
}

fn wanted(id: u64, desired: pb::Desired) -> pb::WantedInstance {
    let ports = [("http".to_owned(), pb::Port { protocol: pb::Protocol::Http.into(), ..Default::default() })];
    let manifest = pb::Manifest {
        name: "web".into(),
        command: vec!["serve".into(), "${PORT}".into()],
        ports: ports.into(),
        ..Default::default()
    };
    pb::WantedInstance {
        instance_id: id,
        epoch: 1,
        version: 1,
        desired: desired.into(),
        manifest: Some(manifest),
        ..Default::default()
    }
}

/// Waits for what can only be looked at.
async fn until(what: &str, is: impl Fn() -> bool) {
    let looked = tokio::time::timeout(Duration::from_secs(20), async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(looked.await.is_ok(), "not seen: {what}");
}

/// The pid of a running and ready instance.
fn ready(heard: &fake_hub::Heard, instance: u64) -> Option<u32> {
    match &heard.reports.get(&instance)?.observed.as_ref()?.state {
        Some(pb::observed::State::Running(running)) if running.ready => Some(running.process.as_ref()?.pid),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_joins_runs_what_is_wanted_and_its_successor_adopts_it() {
    let dir = tempfile::tempdir().unwrap();
    let hub = FakeHub::new(1);
    let (_running, address) = hub.run().await;
    let config = config(dir.path(), &address, &hub.token().to_string());
    let keeper = FakeKeeper::start(&config.data_dir);
    hub.want(vec![wanted(42, pb::Desired::Run), wanted(43, pb::Desired::Run)]);

    let first = Agent::start(&config);
    let pid = hub.heard("42 ready", |heard| ready(heard, 42)).await;
    hub.heard("43 ready", |heard| ready(heard, 43)).await;
    hub.heard("facts", |heard| heard.facts.clone().filter(|facts| facts.name == "north")).await;
    hub.heard("the generation", |heard| (heard.acknowledged == 2).then_some(())).await;
    hub.heard("beats", |heard| (heard.beats >= 2).then_some(())).await;
    let spawn = keeper.kept.lock().spawns[0].clone();
    let port = spawn.argv[1].parse::<u16>().unwrap();
    assert!((config.port_min..=config.port_max).contains(&port), "{:?}", spawn.argv);
    assert!(spawn.env.contains(&format!("NAVE_PORT_HTTP={port}")), "{:?}", spawn.env);
    first.stop().await;

    // One of them ends while there is no agent.
    keeper.end(43, 7);
    let second = Agent::start(&config);
    let hello = hub.heard("a second hello", |heard| heard.hellos.get(1).cloned()).await;
    assert_eq!((hello.host_id.as_str(), hello.generation), ("h-1", 2));
    let (attempt, exit) = hub
        .heard("43 again", |heard| {
            let report = heard.reports.get(&43)?;
            ready(heard, 43).filter(|_| report.attempt == 2)?;
            Some((report.attempt, report.last_exit.clone()))
        })
        .await;
    assert_eq!((attempt, exit.unwrap().code), (2, 7), "how it ended is known");
    assert_eq!(hub.heard("42 still ready", |heard| ready(heard, 42)).await, pid);
    let attempts = |id| keeper.kept.lock().spawns.iter().filter(|spawn| spawn.instance_id == id).count();
    assert_eq!((attempts(42), attempts(43)), (1, 2), "what runs is adopted, never started twice");
    until("the exit is acknowledged, once it is in the ledger", || keeper.kept.lock().acknowledged == 1)
        .await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_works_on_while_the_hub_is_away() {
    let dir = tempfile::tempdir().unwrap();
    let hub = FakeHub::new(2);
    let (running, address) = hub.run().await;
    let config = config(dir.path(), &address, &hub.token().to_string());
    let keeper = FakeKeeper::start(&config.data_dir);
    hub.want(vec![wanted(42, pb::Desired::Run)]);
    let agent = Agent::start(&config);
    let pid = hub.heard("42 ready", |heard| ready(heard, 42)).await;
    drop(running);
    keeper.end(42, 1);
    until("a second process", || keeper.kept.lock().spawns.len() == 2).await;
    // The hub is back, and hears what became of it.
    let (_running, _) = hub.run().await;
    let again = hub.heard("42 ready again", |heard| ready(heard, 42).filter(|now| *now != pid)).await;
    assert_ne!(again, pid);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stopped_is_reported_ended_then_gone_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let hub = FakeHub::new(3);
    let (_running, address) = hub.run().await;
    let config = config(dir.path(), &address, &hub.token().to_string());
    let _keeper = FakeKeeper::start(&config.data_dir);
    hub.want(vec![wanted(42, pb::Desired::Run)]);
    let agent = Agent::start(&config);
    hub.heard("42 ready", |heard| ready(heard, 42)).await;
    let own = config.data_dir.join("instances/i-42");
    assert!(own.is_dir());
    hub.want(vec![wanted(42, pb::Desired::Stop)]);
    hub.heard("42 gone", |heard| heard.gone.contains(&42).then_some(())).await;
    until("its directory is removed", || !own.exists()).await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_are_for_members_and_operators_only() {
    let dir = tempfile::tempdir().unwrap();
    let hub = FakeHub::new(4);
    let (_running, address) = hub.run().await;
    let config = config(dir.path(), &address, &hub.token().to_string());
    let _keeper = FakeKeeper::start(&config.data_dir);
    let agent = Agent::start(&config);
    hub.heard("a hello", |heard| heard.hellos.first().cloned()).await;
    let logs = config.data_dir.join("logs/web/i-1-1");
    std::fs::create_dir_all(&logs).unwrap();
    std::fs::write(logs.join("0000000001.log"), "1970-01-01T00:00:01Z stdout F hello\n").unwrap();
    let ask = async |role: Role, expect: Expect| {
        let credentials = hub.credentials(role);
        let channel =
            nave_tls::channel(&config.listen.to_string(), &credentials, expect, ChannelOptions::default());
        let request = pb::ReadHostLogsRequest { service: "web".into(), ..Default::default() };
        let mut lines = AgentServiceClient::new(channel).read_host_logs(request).await?.into_inner();
        lines.message().await
    };
    let host = Expect::Agent(HostId(1));
    let answer = ask(Role::Operator("ann".into()), host).await.unwrap().unwrap();
    assert_eq!((&answer.lines[0].text[..], answer.lines[0].host.as_str()), (&b"hello"[..], "north"));
    let refused = ask(Role::Agent(HostId(2)), host).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_is_told_what_to_do_when_joining_cannot_work() {
    let dir = tempfile::tempdir().unwrap();
    let (hub, other) = (FakeHub::new(5), FakeHub::new(6));
    let (_running, address) = hub.run().await;
    let mut config = config(dir.path(), &address, &hub.token().to_string());
    let keeper = FakeKeeper::start(&config.data_dir);
    let end = async |config: &AgentConfig, token: &str| {
        std::fs::write(config.token_file.as_ref().unwrap(), token).unwrap();
        let error = Agent::start(config).end().await.unwrap_err();
        assert!(error.is_permanent(), "{error}");
        error.to_string()
    };
    let said = end(&config, "nave-join.12").await;
    assert!(said.contains("cut short") && said.contains("nave token create"), "{said}");
    let mut used_up = hub.token();
    used_up.secret = "0".repeat(40);
    let said = end(&config, &used_up.to_string()).await;
    assert!(said.contains("the token has expired") && said.contains("nave token create"), "{said}");
    let said = end(&config, &other.token().to_string()).await;
    assert!(said.contains("is not a member of that cluster"), "{said}");

    // Once joined, a token of another cluster is a mistake to speak of, and none is needed.
    std::fs::write(config.token_file.as_ref().unwrap(), hub.token().to_string()).unwrap();
    let agent = Agent::start(&config);
    hub.heard("a hello", |heard| heard.hellos.first().cloned()).await;
    agent.stop().await;
    let said = end(&config, &other.token().to_string()).await;
    assert!(
        said.contains("belongs to host h-1 of cluster") && said.contains("data_dir of its own"),
        "{said}"
    );
    config.token_file = None;
    let agent = Agent::start(&config);
    hub.heard("another hello", |heard| heard.hellos.get(1).cloned()).await;
    agent.stop().await;
    drop(keeper);
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_ledgers_are_used_as_far_as_they_are_whole_and_the_hub_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let hub = FakeHub::new(8);
    let (_running, address) = hub.run().await;
    let config = config(dir.path(), &address, &hub.token().to_string());
    let keeper = FakeKeeper::start(&config.data_dir);
    hub.want(vec![wanted(42, pb::Desired::Run)]);
    let agent = Agent::start(&config);
    hub.heard("42 ready", |heard| ready(heard, 42)).await;
    agent.stop().await;

    let ledger = config.data_dir.join("ledger");
    let mut bytes = std::fs::read(&ledger).unwrap();
    // Behind what says which file it is and the first record's length and sum: what is wanted is lost.
    let damaged = 8 + 8 + 1;
    bytes[damaged] ^= 1;
    std::fs::write(&ledger, &bytes).unwrap();
    keeper.kept.lock().damages = vec!["exits: 7 bytes of it were torn".to_owned()];
    let agent = Agent::start(&config);
    hub.heard("what was damaged", |heard| {
        let lacks = &heard.facts.as_ref()?.lacks;
        let said = |what: &str| lacks.iter().any(|lack| lack.contains(what));
        (said("/ledger: ") && said("exits: 7 bytes")).then_some(())
    })
    .await;
    hub.heard("42 still ready", |heard| ready(heard, 42)).await;
    assert_eq!(keeper.kept.lock().spawns.len(), 1, "it is adopted all the same");
    until("it is written anew without the damage", || {
        std::fs::read(&ledger).unwrap().get(..=damaged) != bytes.get(..=damaged)
    })
    .await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = config(dir.path(), "127.0.0.1:1", "x");
    config.listen = taken.local_addr().unwrap();
    // It is asked first: it may hold the port for the agent.
    let _keeper = FakeKeeper::start(&config.data_dir);
    let error = Agent::start(&config).end().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "listen = {} cannot be used: another program has that port; stop it, or set listen to a free one",
            config.listen
        )
    );
}
