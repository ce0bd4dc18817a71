//! From the moment an instance is killed to the last request that it would have got. What Nave supervises here only waits;
//! its port is answered by this program, which goes on after the death and so sees every request that still comes: no
//! connection breaks, so nothing but the word of the instance's host keeps requests away. On another host that word is
//! measured where it arrives, at the caller's agent: by its counter of tries on the instance.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nave_tests::process::send;
use nave_tests::wait::pause;
use nave_tests::{Cluster, Setup, eventually};
use nix::sys::signal::Signal;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Handle, Runtime};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use super::generator::{Generator, length};
use super::{address, rounds, spread};

const DEATHS: usize = 50;
const INSTANCES: usize = 3;
const PER_SECOND: u32 = 1_000;
/// Before the next process says that it is there.
const BEGINS_AFTER: &str = "1.5";
/// After a death: requests that come later would be another fault.
const WINDOW: Duration = Duration::from_millis(600);
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn run() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    let cluster = Cluster::start(&Setup { members: 3, agents: 2 });
    cluster.wait_for_agents(2);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut stands = Stands { folder: folder.path().to_owned(), runtime, known: BTreeMap::new() };
    // Which agent the callers' is shows when there is an address.
    cluster.apply(&manifest("probe", "agent-1", folder.path()), &[]).expect(0);
    stands.ready(&cluster, "probe");
    let (_, own) = address(&cluster, "probe")?;
    cluster.nave(&["delete", "probe"]).expect(0);

    println!(
        "| where it was | deaths | last request after: p50 ms | p95 | p99 | longest | calls | failed |\n|---|---|---|---|---|---|---|---|"
    );
    let near = measure(&cluster, &mut stands, own, own)?;
    let far = measure(&cluster, &mut stands, own, 1 - own)?;
    ensure!(near <= 5.0, "on the same host requests went to a dead instance for {near:.1} ms (p99)");
    ensure!(far <= 100.0, "on another host requests went to a dead instance for {far:.1} ms (p99)");
    Ok(())
}

fn manifest(name: &str, host: &str, folder: &Path) -> String {
    // The folder by itself: what a service names below /tmp is there for it.
    let script = format!(
        "sleep {BEGINS_AFTER}; f=$1/$NAVE_INSTANCE; echo $PORT > $f.new; mv $f.new $f; exec sleep infinity"
    );
    format!(
        "name = \"{name}\"\ncommand = [\"sh\", \"-c\", {script:?}, \"sh\", {folder:?}]\ncount = {INSTANCES}\n\
         [ports.main]\nprotocol = \"http\"\nservice_port = 8080\n[health]\nhttp = \"/ready\"\ninterval = \"100ms\"\n\
         [restart]\nbudget = \"1000 in 5m\"\n[placement]\nconstraints = ['host = \"{host}\"']\n"
    )
}

/// Fifty deaths of instances on one host under calls on the host `own`; the 99th of a hundred in milliseconds.
fn measure(cluster: &Cluster, stands: &mut Stands, own: usize, of: usize) -> anyhow::Result<f64> {
    let name = if own == of { "near" } else { "far" };
    cluster.apply(&manifest(name, &cluster.agents[of].name, &stands.folder), &[]).expect(0);
    stands.ready(cluster, name);
    let (address, _) = address(cluster, name)?;
    eventually("the address answers", PATIENCE, || std::net::TcpStream::connect(address).is_ok());
    let load = Generator::start(address, PER_SECOND)?;
    let mut times = Vec::new();
    for round in 0..rounds(DEATHS) {
        stands.ready(cluster, name);
        let row = cluster.wait_ready(name, INSTANCES).remove(round % INSTANCES);
        let instance = row["id"].as_str().context("an instance has an id")?.to_owned();
        let pid = row["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).context("a pid")?;
        let stand = stands.known.remove(&instance).context("its port is answered here")?;
        let calls = load.ended();
        eventually("it is called", PATIENCE, || load.ended() > calls + 100);
        let died = Instant::now();
        send(pid, Signal::SIGKILL);
        stand.shared.is_ready.store(false, Relaxed);
        let last = match own == of {
            true => {
                pause(WINDOW);
                *stand.shared.last.lock()
            }
            false => last_try(metrics_of(cluster, own), &instance, died),
        };
        times.push(last.map_or(Duration::ZERO, |last| last.saturating_duration_since(died)));
        drop(stand);
    }
    let calls = load.stop();
    let failures: Vec<_> = calls.iter().filter_map(|call| call.answer.as_ref().err()).collect();
    let failed = failures.len();
    cluster.nave(&["delete", name]).expect(0);
    let deaths = times.len();
    let [half, high, last, longest] = spread(times);
    let place = if own == of { "on the caller's host" } else { "on another host" };
    println!(
        "| {place} | {deaths} | {half:.2} | {high:.2} | {last:.2} | {longest:.2} | {} | {failed} |",
        calls.len()
    );
    if let Some(first) = failures.first() {
        println!("\nThe first that failed: {first:?}\n");
    }
    Ok(last)
}

fn metrics_of(cluster: &Cluster, agent: usize) -> SocketAddr {
    let port = cluster.agent_metrics_port(agent);
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// When the agent's counter of tries on this instance was last seen to have grown, within the window.
fn last_try(metrics: SocketAddr, instance: &str, died: Instant) -> Option<Instant> {
    let (mut last, mut before) = (None, tries(metrics, instance));
    while died.elapsed() < WINDOW {
        let now = tries(metrics, instance);
        if now != before {
            (last, before) = (Some(Instant::now()), now);
        }
        pause(Duration::from_millis(1));
    }
    last
}

fn tries(metrics: SocketAddr, instance: &str) -> Option<u64> {
    let mut stream = std::net::TcpStream::connect(metrics).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let of = format!("instance=\"{instance}\"");
    let line = |line: &&str| line.starts_with("nave_agent_proxy_tries_total{") && line.contains(&of);
    text.lines().find(line)?.rsplit(' ').next()?.parse().ok()
}

/// This program's answers on the instances' ports.
struct Stands {
    folder: PathBuf,
    runtime: Runtime,
    /// By instance; each new process of one says where it is.
    known: BTreeMap<String, Stand>,
}

#[derive(Debug)]
struct Stand {
    shared: Arc<Shared>,
    serving: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    is_ready: AtomicBool,
    last: Mutex<Option<Instant>>,
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Stands {
    /// Waits until all instances are there and answered for.
    fn ready(&mut self, cluster: &Cluster, service: &str) {
        eventually("all instances are ready", PATIENCE, || {
            self.take_up();
            let rows = cluster.ps(service);
            let known = |id: &str| self.known.contains_key(id);
            rows.iter().filter(|row| row["ready"] == true && row["id"].as_str().is_some_and(known)).count()
                == INSTANCES
        });
    }

    /// Those that have said that they are there since the last time.
    fn take_up(&mut self) {
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let port = std::fs::read_to_string(entry.path()).ok().and_then(|port| port.trim().parse().ok());
            if let Some(port) = port.filter(|_| !name.ends_with(".new"))
                && std::fs::remove_file(entry.path()).is_ok()
            {
                let stand = Stand::new(self.runtime.handle(), port);
                self.known.insert(name, stand);
            }
        }
    }
}

impl Stand {
    fn new(runtime: &Handle, port: u16) -> Self {
        let shared = Arc::new(Shared { is_ready: AtomicBool::new(true), last: Mutex::default() });
        let of = shared.clone();
        let serving = runtime.spawn(async move {
            let listener = loop {
                match TcpListener::bind(("127.0.0.1", port)).await {
                    Ok(listener) => break listener,
                    // One that stood for the process before is on its way out.
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            };
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let of = of.clone();
                connections.spawn(async move {
                    let _gone = converse(stream, &of).await;
                });
            }
        });
        Self { shared, serving }
    }
}

async fn converse(mut stream: TcpStream, of: &Shared) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::new();
    while stream.read_buf(&mut buffer).await? > 0 {
        let came = Instant::now();
        let text = String::from_utf8_lossy(&buffer);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        if body.len() < head.lines().find_map(length).unwrap_or(0) {
            continue;
        }
        let is_check = head.starts_with("GET /ready ");
        let status = if is_check && !of.is_ready.load(Relaxed) { "503 No" } else { "200 OK" };
        if !is_check {
            *of.last.lock() = Some(came);
        }
        buffer.clear();
        stream.write_all(format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").as_bytes()).await?;
    }
    Ok(())
}
