//! Writes and linearizable reads per second through the gRPC API of a three-member cluster, fsync on, TLS on.
//! A write is the apply of a distinct service with count 0; a read asks for one service linearizably.

use std::time::Duration;

use nave_proto::pb;
use nave_tests::api::{Api, idle_manifest};
use nave_tests::{Cluster, Setup};
use nave_tls::{ClientConnection, Dialer, Expect};
use prost::Message as _;

use crate::etcd;
use crate::load::{Connection, HEAD, closed_loop, connections, row, runtime};

const APPLY: &str = "/nave.v1.ServiceService/ApplyService";
const GET: &str = "/nave.v1.ServiceService/GetService";
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

pub(crate) fn run() -> anyhow::Result<()> {
    let etcd = etcd::find();
    println!("{HEAD}");
    for clients in client_counts() {
        measure(clients)?;
        if let Some(program) = &etcd {
            etcd::measure(program, clients)?;
        }
    }
    if etcd.is_none() {
        println!("\nNot beside etcd: none was found (set ETCD to its path, or install etcd-server).");
    }
    Ok(())
}

fn measure(clients: usize) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 0 });
    let leader = cluster.wait_for_leader();
    let mut pids: Vec<u32> = cluster.members.iter_mut().map(|member| member.process().pid()).collect();
    pids.swap(0, leader);
    runtime()?.block_on(async {
        let api = Api::open(&cluster.context())?;
        until_written(&api, leader).await?;
        let to_leader = api.dialer(leader, Expect::Member, CONNECT_WITHIN);
        let before = counters(&cluster);
        let shape = Shape::new();
        let message = move |client, n, out: &mut Vec<u8>| shape.apply(&format!("w-{client}-{n}"), out);
        let writes = closed_loop(clients, connect(&to_leader, clients, APPLY).await?, message, &pids).await?;
        println!("{}", row("Nave write", clients, &writes, &per_fsync(&before, &counters(&cluster))));
        let message = |client, _, out: &mut Vec<u8>| {
            let request = pb::GetServiceRequest { name: format!("w-{client}-1"), linearizable: true };
            request.encode(out).expect("a Vec grows");
        };
        let reads = closed_loop(clients, connect(&to_leader, clients, GET).await?, message, &pids).await?;
        println!("{}", row("Nave linearizable read", clients, &reads, ""));
        Ok(())
    })
}

async fn connect(
    to: &Dialer,
    clients: usize,
    path: &str,
) -> anyhow::Result<Vec<Connection<ClientConnection>>> {
    let mut all = Vec::new();
    for _ in 0..connections(clients) {
        all.push(Connection::new(to.connect().await?, path, "nave"));
    }
    Ok(all)
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

/// An `ApplyServiceRequest` but for the service's name: a client makes its own manifests, and that is not measured.
struct Shape(Vec<u8>);

impl Shape {
    fn new() -> Self {
        let mut manifest = idle_manifest("shape");
        manifest.name.clear();
        Self(manifest.encode_to_vec())
    }

    fn apply(&self, name: &str, out: &mut Vec<u8>) {
        use prost::encoding::{WireType, encode_key, encode_varint};
        let manifest = 2 + name.len() + self.0.len();
        encode_key(1, WireType::LengthDelimited, out);
        encode_varint(manifest as u64, out);
        encode_key(1, WireType::LengthDelimited, out);
        encode_varint(name.len() as u64, out);
        out.extend(name.as_bytes());
        out.extend(&self.0);
    }
}

/// Of one member, so far.
struct Counters {
    entries: f64,
    fsyncs: f64,
}

fn counters(cluster: &Cluster) -> Vec<Counters> {
    (0u16..).take(cluster.members.len()).map(|k| scrape(cluster.base_port + 20 + k)).collect()
}

/// From its `/metrics`.
fn scrape(port: u16) -> Counters {
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
    Counters { entries: value("nave_log_entries_total"), fsyncs: value("nave_log_fsyncs_total") }
}

fn per_fsync(before: &[Counters], after: &[Counters]) -> String {
    let each = |(before, after): (&Counters, &Counters)| {
        format!("{:.1}", (after.entries - before.entries) / (after.fsyncs - before.fsyncs).max(1.0))
    };
    let all: Vec<String> = before.iter().zip(after).map(each).collect();
    format!("entries per fsync, by member: {}", all.join(" "))
}
