//! A whole fleet on one machine: simulated agents with real sessions on three members, and services whose instances
//! are placed, told to the agents, reported as running and seen so by people. `nave-bench fleet [AGENTS] [INSTANCES]`.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nave_proto::pb;
use nave_proto::pb::cluster_service_client::ClusterServiceClient;
use nave_tests::api::Api;
use nave_tests::fleet::{Fleet, Seen};
use nave_tests::process::{cpu_seconds, resident_bytes};
use nave_tests::{Cluster, Setup};
use tokio::time::{Instant, sleep};
use tonic::Code;

use crate::load::runtime;

const AGENTS: usize = 5_000;
const INSTANCES: u64 = 100_000;
/// Instances of one service.
const PER_SERVICE: u64 = 200;
/// Services applied at once.
const APPLIES: usize = 16;
const QUIET: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(900);

pub(crate) fn run() -> anyhow::Result<()> {
    let agents = argument(2).unwrap_or(AGENTS);
    let instances = argument(3).map_or(INSTANCES, |count| count as u64);
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 0 });
    let leader = cluster.wait_for_leader();
    let pids: Vec<u32> = cluster.members.iter_mut().map(|member| member.process().pid()).collect();
    let addresses: Vec<String> = (0..3u16).map(|k| format!("127.0.0.1:{}", cluster.base_port + k)).collect();
    runtime()?.block_on(async {
        let api = Api::open(&cluster.context())?;
        println!("| what | seconds | members' CPU seconds | members' resident MiB |\n|---|---|---|---|");
        let mut meter = Meter::new(pids);
        let token = token(&api, leader).await?;
        let mut fleet = Fleet::enrol(agents, &token, &addresses).await?;
        meter.row(&format!("{agents} agents enrolled"));
        fleet.connect();
        until("all sessions are open", || Seen::get(&fleet.seen.sessions) == agents as u64).await?;
        meter.row(&format!("{agents} sessions open"));
        let idle = meter.quiet("idle, no instances").await;

        place(&api, leader, instances, PER_SERVICE).await?;
        meter.lap(&format!("{} services applied", instances.div_ceil(PER_SERVICE)));
        until("all instances are told", || Seen::get(&fleet.seen.running) >= instances).await?;
        meter.lap(&format!("{instances} instances placed and told to their agents"));
        until("all are acknowledged", || Seen::get(&fleet.seen.acknowledged) >= instances).await?;
        meter.lap("their reports committed");
        seen_ready(&api, leader, instances).await?;
        meter.row("all seen ready through the API (from the first apply)");
        sleep(Duration::from_secs(5)).await;
        let full = meter.quiet(&format!("idle, {instances} instances")).await;
        println!(
            "\nmessages of the directory: {}, endpoints in them: {}",
            Seen::get(&fleet.seen.directory_updates),
            Seen::get(&fleet.seen.endpoints)
        );
        println!("sessions that ended on the way: {}", Seen::get(&fleet.seen.ended));
        println!("idle members' CPU % of one core: {idle:.1} without instances, {full:.1} with");
        Ok(())
    })
}

fn argument(at: usize) -> Option<usize> {
    std::env::args().nth(at)?.parse().ok()
}

pub(crate) async fn token(api: &Api, leader: usize) -> anyhow::Result<String> {
    let call = || {
        let mut client = ClusterServiceClient::new(api.channel(leader));
        async move { client.create_token(pb::CreateTokenRequest { ttl: None, uses: 1_000_000 }).await }
    };
    let answer = until_answered("a token", call).await?;
    Ok(answer.token)
}

/// Applies the services, some at a time.
pub(crate) async fn place(api: &Api, leader: usize, instances: u64, per_service: u64) -> anyhow::Result<()> {
    use futures::{StreamExt as _, TryStreamExt as _, stream};
    let services = instances.div_ceil(per_service);
    let one = |n: u64| {
        let count = per_service.min(instances - n * per_service);
        let client = api.services(leader);
        async move {
            let text = format!(
                "name = \"svc-{n}\"\ncommand = [\"/usr/bin/svc\"]\ncount = {count}\n[resources]\ncpu = 0.1\nmemory = \"64MiB\"\n[ports.http]\nprotocol = \"http\"\n"
            );
            let manifest = nave_proto::manifest::parse(&text, nave_proto::manifest::Format::Toml, "svc.toml")
                .map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
            let request_id = Some(pb::RequestId { client_id: format!("fleet-{n}"), serial: 1 });
            let request = pb::ApplyServiceRequest {
                manifest: Some(Box::new(manifest)),
                request_id,
                ..Default::default()
            };
            // As the command line does: the same request again until its fate is known.
            until_answered("apply", || {
                let (mut client, request) = (client.clone(), request.clone());
                async move { client.apply_service(request).await }
            })
            .await?;
            anyhow::Ok(())
        }
    };
    stream::iter(0..services).map(one).buffer_unordered(APPLIES).try_collect::<Vec<()>>().await?;
    Ok(())
}

/// Repeats a call that members under full load may put off.
async fn until_answered<T, F>(what: &str, call: impl Fn() -> F) -> anyhow::Result<T>
where
    F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
{
    let end = Instant::now() + PATIENCE;
    loop {
        match call().await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => {
                let again = matches!(
                    status.code(),
                    Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted
                );
                ensure!(again && Instant::now() < end, "{what}: {status}");
            }
        }
        sleep(LOOK).await;
    }
}

pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        ensure!(Instant::now() < end, "waited {PATIENCE:?} in vain: {what}");
        sleep(LOOK).await;
    }
    Ok(())
}

/// Asks as a person would, linearizably.
async fn seen_ready(api: &Api, leader: usize, instances: u64) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let request = pb::ListServicesRequest { linearizable: true };
        let mut client = api.services(leader);
        let services =
            client.list_services(request).await.context("list the services")?.into_inner().services;
        let ready: u64 = services.iter().map(|service| u64::from(service.ready)).sum();
        if ready >= instances {
            return Ok(());
        }
        ensure!(Instant::now() < end, "only {ready} of {instances} instances are ready");
        sleep(LOOK * 4).await;
    }
}

/// Time, and the members' CPU and memory, from row to row.
struct Meter {
    pids: Vec<u32>,
    since: Instant,
    cpu: Vec<f64>,
}

impl Meter {
    fn new(pids: Vec<u32>) -> Self {
        let cpu = pids.iter().map(|pid| cpu_seconds(*pid)).collect();
        Self { pids, since: Instant::now(), cpu }
    }

    /// Prints a row and begins anew.
    fn row(&mut self, what: &str) {
        self.lap(what);
        *self = Self::new(std::mem::take(&mut self.pids));
    }

    /// Prints a row and goes on counting.
    fn lap(&self, what: &str) {
        let each = self.pids.iter().zip(&self.cpu);
        let cpu: Vec<String> =
            each.map(|(pid, before)| format!("{:.1}", cpu_seconds(*pid) - before)).collect();
        let resident: Vec<String> =
            self.pids.iter().map(|pid| (resident_bytes(*pid) >> 20).to_string()).collect();
        let seconds = self.since.elapsed().as_secs_f64();
        println!("| {what} | {seconds:.1} | {} | {} |", cpu.join(" "), resident.join(" "));
    }

    /// Nothing happens for a while; the CPU of all members in percent of one core.
    async fn quiet(&mut self, what: &str) -> f64 {
        *self = Self::new(std::mem::take(&mut self.pids));
        sleep(QUIET).await;
        let used: f64 = self.pids.iter().zip(&self.cpu).map(|(pid, before)| cpu_seconds(*pid) - before).sum();
        let share = used / self.since.elapsed().as_secs_f64() * 100.0;
        self.row(what);
        share
    }
}
