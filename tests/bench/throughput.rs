//! Writes and linearizable reads per second through the gRPC API of a three-member cluster, fsync on, TLS on.
//! A write is the apply of a distinct service with count 0; a read asks for one service linearizably.

use std::sync::Arc;

use nave_proto::pb;
use nave_proto::pb::service_service_client::ServiceServiceClient;
use nave_tests::api::{Api, idle_manifest};
use nave_tests::process::cpu_seconds;
use nave_tests::{Cluster, Setup};

use crate::load::{HEAD, closed_loop, connections, row, runtime};

pub(crate) fn run() -> anyhow::Result<()> {
    println!("{HEAD}");
    for clients in client_counts() {
        let mut cluster = Cluster::start(&Setup { members: 3, agents: 0 });
        let leader = cluster.wait_for_leader();
        let pids: Vec<u32> = cluster.members.iter_mut().map(|member| member.process().pid()).collect();
        let runtime = runtime()?;
        let apis = {
            let _inside = runtime.enter();
            let all: anyhow::Result<Vec<Api>> =
                (0..connections(clients)).map(|_| Api::open(&cluster.context())).collect();
            Arc::new(all?)
        };
        runtime.block_on(until_written(&apis[0], leader))?;
        let before = counters(&cluster, &pids);
        let writing = apis.clone();
        let writes = runtime.block_on(closed_loop(clients, move |client, n| {
            write(writing[client % writing.len()].services(leader), format!("w-{client}-{n}"))
        }));
        let after = counters(&cluster, &pids);
        println!("{}", row("write", clients, &writes, &per_fsync(&before, &after)));
        let reads = runtime.block_on(closed_loop(clients, move |client, _| {
            read(apis[client % apis.len()].services(leader), format!("w-{client}-1"))
        }));
        println!("{}", row("linearizable read", clients, &reads, ""));
    }
    Ok(())
}

/// A cluster that has just begun may put off its first write.
async fn until_written(api: &Api, leader: usize) -> anyhow::Result<()> {
    let mut tries = 0;
    while let Err(status) = api.write(leader, "first", None).await {
        tries += 1;
        anyhow::ensure!(tries < 100, "no write is taken: {status}");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    Ok(())
}

/// One number on the command line measures that many clients only.
fn client_counts() -> Vec<usize> {
    std::env::args()
        .nth(2)
        .and_then(|count| count.parse().ok())
        .map_or_else(|| vec![1, 64, 512], |count| vec![count])
}

async fn write(mut client: ServiceServiceClient<tonic::transport::Channel>, name: String) -> bool {
    let request = pb::ApplyServiceRequest { manifest: Some(idle_manifest_named(name)), ..Default::default() };
    client.apply_service(request).await.is_ok()
}

async fn read(mut client: ServiceServiceClient<tonic::transport::Channel>, name: String) -> bool {
    client.get_service(pb::GetServiceRequest { name, linearizable: true }).await.is_ok()
}

/// The parser's work is not measured: a client parses its own manifests.
fn idle_manifest_named(name: String) -> pb::Manifest {
    static SHAPE: std::sync::OnceLock<pb::Manifest> = std::sync::OnceLock::new();
    let shape = SHAPE.get_or_init(|| idle_manifest("shape"));
    pb::Manifest { name, ..shape.clone() }
}

/// Of one member, so far.
struct Counters {
    entries: f64,
    fsyncs: f64,
    cpu_seconds: f64,
}

fn counters(cluster: &Cluster, pids: &[u32]) -> Vec<Counters> {
    (0u16..).zip(pids).map(|(k, pid)| scrape(cluster.base_port + 20 + k, *pid)).collect()
}

/// Entries and fsyncs are from its `/metrics`.
fn scrape(port: u16, pid: u32) -> Counters {
    use std::io::{Read as _, Write as _};
    let mut text = String::new();
    if let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", port)) {
        let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let _ = stream.read_to_string(&mut text);
    }
    let value = |part: &str| {
        let line = text.lines().find(|line| !line.starts_with('#') && line.contains(part));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0.0)
    };
    let cpu_seconds = cpu_seconds(pid);
    Counters { entries: value("nave_log_entries_total"), fsyncs: value("nave_log_fsyncs_total"), cpu_seconds }
}

fn per_fsync(before: &[Counters], after: &[Counters]) -> String {
    let each = |of: fn(&Counters, &Counters) -> f64| {
        let all = before.iter().zip(after).map(|(before, after)| format!("{:.1}", of(before, after)));
        all.collect::<Vec<_>>().join(" ")
    };
    let entries = each(|b, a| (a.entries - b.entries) / (a.fsyncs - b.fsyncs).max(1.0));
    let cpu = each(|b, a| (a.cpu_seconds - b.cpu_seconds) * 1e6 / (a.entries - b.entries).max(1.0));
    format!("by member: entries per fsync {entries}; CPU µs per write {cpu}")
}
