//! etcd beside it, on the same machine with the same load: three members, put of 256 bytes and linearizable get, sent to
//! the leader over as many connections. Its binary is named by `ETCD` or found in `PATH`; said and skipped without.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use nave_tests::machine::free_ports;
use nave_tests::process::Process;
use prost::Message as _;
use tokio::net::TcpStream;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;

use crate::load::{Connection, closed_loop, connections, row, runtime};

// The few fields of etcd's v3 API that the measurement needs, by their public numbers.
#[derive(Clone, PartialEq, prost::Message)]
struct Put {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}
#[derive(Clone, PartialEq, prost::Message)]
struct Range {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}
#[derive(Clone, PartialEq, prost::Message)]
struct Empty {}
#[derive(Clone, PartialEq, prost::Message)]
struct Header {
    #[prost(uint64, tag = "2")]
    member_id: u64,
}
#[derive(Clone, PartialEq, prost::Message)]
struct Status {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

/// Writes and reads of one cluster, as rows of the table.
pub(crate) fn measure(program: &Path, clients: usize) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let ports = free_ports();
    let members = start(program, folder.path(), ports)?;
    runtime()?.block_on(async {
        let leader = leader(ports).await?;
        let mut pids: Vec<u32> = members.iter().map(Process::pid).collect();
        pids.swap(0, usize::from(leader));
        let message = |client, n, out: &mut Vec<u8>| {
            let put = Put { key: format!("w-{client}-{n}").into_bytes(), value: vec![b'x'; 256] };
            put.encode(out).expect("a Vec grows");
        };
        let to = connect(ports + leader, clients, "/etcdserverpb.KV/Put").await?;
        println!("{}", row("etcd put", clients, &closed_loop(clients, to, message, &pids).await?, ""));
        let message = |client, _, out: &mut Vec<u8>| {
            Range { key: format!("w-{client}-1").into_bytes() }.encode(out).expect("a Vec grows");
        };
        let to = connect(ports + leader, clients, "/etcdserverpb.KV/Range").await?;
        println!(
            "{}",
            row("etcd linearizable get", clients, &closed_loop(clients, to, message, &pids).await?, "")
        );
        Ok(())
    })
}

async fn connect(port: u16, clients: usize, path: &str) -> anyhow::Result<Vec<Connection<TcpStream>>> {
    let mut all = Vec::new();
    for _ in 0..connections(clients) {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        all.push(Connection::new(stream, path, "etcd"));
    }
    Ok(all)
}

async fn ask<Q, A>(channel: Channel, path: &'static str, message: Q) -> anyhow::Result<A>
where
    Q: prost::Message + Send + Sync + 'static,
    A: prost::Message + Default + Send + Sync + 'static,
{
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.context("not ready")?;
    let codec = tonic_prost::ProstCodec::<Q, A>::default();
    let answer = grpc.unary(tonic::Request::new(message), PathAndQuery::from_static(path), codec).await?;
    Ok(answer.into_inner())
}

fn channel(port: u16) -> anyhow::Result<Channel> {
    Ok(Channel::from_shared(format!("http://127.0.0.1:{port}"))?.tcp_nodelay(true).connect_lazy())
}

/// Its program.
pub(crate) fn find() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("ETCD").map(PathBuf::from).filter(|path| path.exists()) {
        return Some(path);
    }
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join("etcd")).find(|path| path.exists())
}

fn start(program: &Path, dir: &Path, ports: u16) -> anyhow::Result<Vec<Process>> {
    let peers: Vec<String> = (0..3).map(|k| format!("m{k}=http://127.0.0.1:{}", ports + 10 + k)).collect();
    (0..3u16)
        .map(|k| {
            let mut command = Command::new(program);
            let client = format!("http://127.0.0.1:{}", ports + k);
            let peer = format!("http://127.0.0.1:{}", ports + 10 + k);
            command
                .args(["--name", &format!("m{k}"), "--data-dir"])
                .arg(dir.join(format!("m{k}")))
                .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
                .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
                .args(["--initial-cluster", &peers.join(","), "--log-level", "error"]);
            Process::start("etcd", &mut command, &dir.join("log"))
        })
        .collect()
}

/// Which of the three leads, once one does.
async fn leader(ports: u16) -> anyhow::Result<u16> {
    for _ in 0..200 {
        for k in 0..3 {
            let status =
                ask::<Empty, Status>(channel(ports + k)?, "/etcdserverpb.Maintenance/Status", Empty {}).await;
            if status.is_ok_and(|s| s.leader != 0 && s.header.is_some_and(|h| h.member_id == s.leader)) {
                return Ok(k);
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    anyhow::bail!("etcd elected no leader in 10 s")
}
