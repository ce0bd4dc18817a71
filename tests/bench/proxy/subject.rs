//! Who is measured, and what stands behind.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use nave_tests::machine::free_ports;
use nave_tests::process::{Process, cpu_seconds, resident_bytes};
use nave_tests::wait::eventually;
use nave_tests::{Cluster, Setup};

use super::SOURCE;
use super::load::Load;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const SOON: Duration = Duration::from_secs(20);

/// A program in front of the backend, or nobody.
pub(super) struct Subject {
    host: IpAddr,
    pub(super) port: u16,
    pids: Vec<u32>,
    process: Option<Process>,
}

/// Told to end, for a killed nginx leaves its workers behind.
impl Drop for Subject {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            process.terminate();
        }
    }
}

impl Subject {
    pub(super) fn direct(backend: &Backend, load: Load) -> anyhow::Result<Self> {
        Ok(Self { host: LOOPBACK, port: backend.port(load)?, pids: Vec::new(), process: None })
    }

    fn at(address: SocketAddr, pids: Vec<u32>) -> Self {
        Self { host: address.ip(), port: address.port(), pids, process: None }
    }

    /// Waits until it listens; its workers count as it does.
    pub(super) fn started(process: Process, port: u16) -> Self {
        listens(port);
        let pids = family(process.pid());
        Self { host: LOOPBACK, port, pids, process: Some(process) }
    }

    pub(super) fn host(&self) -> IpAddr {
        self.host
    }

    pub(super) fn cpu_seconds(&self) -> f64 {
        self.pids.iter().map(|pid| cpu_seconds(*pid)).sum()
    }

    #[expect(clippy::cast_precision_loss, reason = "memory sizes stay far below 2^52")]
    pub(super) fn resident_mebibytes(&self) -> f64 {
        self.pids.iter().map(|pid| resident_bytes(*pid)).sum::<u64>() as f64 / f64::from(1 << 20)
    }
}

fn listens(port: u16) {
    eventually(&format!("port {port} is listened on"), SOON, || {
        std::net::TcpStream::connect((LOOPBACK, port)).is_ok()
    });
}

/// A process and its children.
fn family(pid: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|child| child.parse().ok());
    std::iter::once(pid).chain(children).collect()
}

/// A program by its name.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&folders).chain([PathBuf::from("/usr/sbin")]);
    folders.map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// nginx for requests and a source of bytes: services of a member and an agent. Whoever is measured calls the same
/// processes, so what Nave does to its services (a cgroup, a weight) is the same for all.
pub(super) struct Backend {
    cluster: Cluster,
    /// For whoever comes in front.
    base: u16,
}

impl Backend {
    pub(super) fn start(folder: &Path) -> anyhow::Result<Self> {
        let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
        cluster.wait_for_agents(1);
        for load in [Load::Http1, Load::Http2, Load::Tcp] {
            cluster.apply(&manifest(folder, load)?, &["--wait"]).expect(0);
        }
        Ok(Self { cluster, base: free_ports() })
    }

    /// Of the process itself, on this host's loopback.
    pub(super) fn port(&self, load: Load) -> anyhow::Result<u16> {
        let rows = self.cluster.try_json(&["endpoints", load.service()]);
        let port = rows.as_ref().and_then(|rows| rows[0]["port"].as_u64());
        Ok(u16::try_from(port.context("the backend has no port")?)?)
    }

    /// At the service's address.
    pub(super) fn through_nave(&self, load: Load) -> Subject {
        Subject::at(self.cluster.address(load.service()), vec![self.cluster.agents[0].agent_pid()])
    }

    /// For whoever comes in front, the first of them and so on.
    pub(super) fn free_port(&self, number: u16) -> u16 {
        self.base + number
    }
}

/// One worker that answers everything with 1 KiB.
fn nginx(load: Load, port: &str) -> String {
    let (kind, body) = (if load == Load::Http2 { " http2" } else { "" }, "x".repeat(1024));
    format!(
        "daemon off; worker_processes 1; pid /tmp/nave-bench-{port}.pid; error_log stderr crit;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 60s;
  client_body_temp_path /tmp; proxy_temp_path /tmp; fastcgi_temp_path /tmp; uwsgi_temp_path /tmp; scgi_temp_path /tmp;
  server {{ listen 127.0.0.1:{port}{kind}; location / {{ return 200 \"{body}\"; }} }}
}}
"
    )
}

fn manifest(folder: &Path, load: Load) -> anyhow::Result<String> {
    let (service, protocol) = match load {
        Load::Http1 => (load.service(), "http"),
        Load::Http2 => (load.service(), "http2"),
        Load::Tcp => (load.service(), "tcp"),
    };
    let command = if load == Load::Tcp {
        format!("[{:?}, {SOURCE:?}]", std::env::current_exe()?)
    } else {
        let template = folder.join(format!("{service}.template"));
        std::fs::write(&template, nginx(load, "@PORT@"))?;
        let program = find("nginx").unwrap_or_default();
        // Named one by one: what a service names below /tmp is there for it.
        let line = "sed s/@PORT@/$PORT/ $1 > /tmp/nginx.conf && exec $2 -c /tmp/nginx.conf -e stderr";
        format!("[\"sh\", \"-c\", {line:?}, \"sh\", {template:?}, {program:?}]")
    };
    Ok(format!(
        "name = \"{service}\"\ncommand = {command}\n[ports.main]\nprotocol = \"{protocol}\"\nservice_port = 8080\n\
         [health]\ntcp = true\n"
    ))
}
