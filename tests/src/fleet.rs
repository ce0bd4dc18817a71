//! A fleet of simulated agents: each enrols with a key of its own and keeps a real session over a TLS connection of
//! its own, exactly as an agent does (hello, a beat each second, one report under way at a time); only the processes
//! are faked, at the last step: what is wanted is running and ready at once, what is to stop is gone at once.

mod agent;
mod instances;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use nave_proto::pb;
use nave_proto::pb::enroll_service_client::EnrollServiceClient;
use nave_proto::token::JoinToken;
use nave_tls::KeyPair;
use tokio::task::JoinSet;

pub use agent::SimulatedAgent;

/// Enrolments under way at once: enough to keep three members busy.
const ENROLMENTS: usize = 64;

/// What the fleet has seen so far, over all its agents.
#[derive(Debug, Default)]
pub struct Seen {
    /// Sessions that were welcomed and have not ended.
    pub sessions: AtomicU64,
    /// Sessions that ended, for whatever reason.
    pub ended: AtomicU64,
    /// Instances that agents were told to run and run.
    pub running: AtomicU64,
    /// Reports of the hub's acknowledgement: instances whose `running` is committed.
    pub acknowledged: AtomicU64,
    /// Messages from the hub.
    pub messages: AtomicU64,
    /// Those that are of the directory, and the endpoints in them.
    pub directory_updates: AtomicU64,
    pub endpoints: AtomicU64,
}

impl Seen {
    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}

/// Agents with their sessions; dropping it ends them.
#[derive(Debug)]
pub struct Fleet {
    agents: Vec<Arc<SimulatedAgent>>,
    sessions: JoinSet<()>,
    pub seen: Arc<Seen>,
}

/// What every simulated host has: room for hundreds of small instances.
fn facts(number: usize) -> pb::HostFacts {
    pb::HostFacts {
        name: format!("sim-{number:05}"),
        address: format!("10.{}.{}.{}:7410", number >> 16, (number >> 8) & 255, number & 255),
        cpu_millicores: 64_000,
        memory_bytes: 256 << 30,
        labels: [("zone".to_owned(), format!("z{}", number % 3))].into(),
        os: "linux".to_owned(),
        arch: "x86_64".to_owned(),
        agent_version: "simulated".to_owned(),
        address_prefix: "127.88".to_owned(),
        boot_id: format!("boot-{number}"),
        ..Default::default()
    }
}

impl Fleet {
    /// Enrols `count` hosts with one token. Must be called inside a tokio runtime.
    pub async fn enrol(count: usize, token: &str, members: &[String]) -> anyhow::Result<Self> {
        let parsed: JoinToken = token.trim().parse().context("the join token")?;
        let channels: Vec<_> =
            members.iter().map(|address| nave_tls::enroll_channel(address, parsed.ca_sha256)).collect();
        let one = |number: usize| {
            let mut client = EnrollServiceClient::new(channels[number % channels.len()].clone());
            let token = token.trim().to_owned();
            async move {
                let (key, facts) = (KeyPair::generate(), facts(number));
                let request = pb::EnrollRequest { token, csr_der: key.csr_der(), facts: Some(facts.clone()) };
                let answer = client.enroll(request).await.context("enrol")?.into_inner();
                SimulatedAgent::new(&key, answer, facts, number).map(Arc::new)
            }
        };
        let agents = stream::iter(0..count).map(one).buffered(ENROLMENTS).try_collect().await?;
        Ok(Self { agents, sessions: JoinSet::new(), seen: Arc::default() })
    }

    /// Opens all sessions; each is begun again when it ends.
    pub fn connect(&mut self) {
        for agent in &self.agents {
            self.sessions.spawn(Arc::clone(agent).run(Arc::clone(&self.seen)));
        }
    }

    pub fn len(&self) -> usize {
        self.agents.len()
    }

    pub fn is_empty(&self) -> bool {
        self.agents.is_empty()
    }
}
