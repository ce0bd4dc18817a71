//! A real cluster on loopback: `nave init`, members and agents as processes, each with a folder of its own below one
//! temporary folder. At most two clusters run at a time, since the machines that run the tests have two cores.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::machine;
use crate::nave::{self, Output};
use crate::netns::{Namespace, Network};
use crate::process::{self, Process};
use crate::wait::{eventually, eventually_some, pause};

/// Generous: a slow, noisy machine with two cores and two clusters at once.
pub const SOON: Duration = Duration::from_secs(30);

/// What to start.
#[derive(Debug, Clone)]
pub struct Setup {
    pub members: usize,
    pub agents: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Self { members: 3, agents: 1 }
    }
}

/// A running cluster. Dropping it ends everything that it started.
#[derive(Debug)]
pub struct Cluster {
    dir: TempDir,
    pub base_port: u16,
    pub members: Vec<Role>,
    pub agents: Vec<Role>,
    /// With a machine for each member, then for each agent, then for the operator; none: all on loopback.
    network: Option<Network>,
    _turn: Turn,
}

/// One member or one agent: its folder, and its process while it runs.
#[derive(Debug)]
pub struct Role {
    pub name: String,
    pub dir: PathBuf,
    pub port: u16,
    verb: &'static str,
    config: PathBuf,
    /// What runs it: the `nave` under test, or a copy that may be replaced.
    pub program: PathBuf,
    process: Option<Process>,
    /// Where it runs, when the cluster is on a network.
    pub machine: Option<Namespace>,
}

impl Role {
    /// Starts it. Its log goes to `<dir>/log`.
    pub fn start(&mut self) {
        let mut command = Command::new(&self.program);
        command.arg(self.verb).arg("--config").arg(&self.config).env("NAVE_LOG", "info");
        let log = self.dir.join("log");
        let name = &self.name;
        let mut start = || Process::start(name, &mut command, &log).expect("a role starts");
        self.process = Some(match &self.machine {
            Some(machine) => machine.inside(start),
            None => start(),
        });
    }

    /// The process the harness started: a member's own, or an agent's keeper.
    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("the role is running")
    }

    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.ended().is_none())
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// SIGTERM, and waits for the end.
    pub fn terminate(&mut self) -> Option<i32> {
        self.process.take().and_then(|mut process| process.terminate())
    }

    /// The pid in a pid file of this role: `nave.pid` or `keeper.pid`.
    pub fn pid_file(&self, name: &str) -> Option<u32> {
        let data = std::fs::read_to_string(self.dir.join("data").join(name)).ok()?;
        data.trim().parse().ok()
    }

    /// The agent's own process, once it runs.
    pub fn agent_pid(&self) -> u32 {
        eventually_some("the agent writes its pid", SOON, || {
            self.pid_file("nave.pid").filter(|pid| process::alive(*pid))
        })
    }

    /// Rewrites its configuration.
    fn listen_on(&self, host: &str, firewall: bool) -> anyhow::Result<()> {
        let mut table: toml::Table = std::fs::read_to_string(&self.config)?.parse()?;
        table.insert("listen".into(), format!("{host}:{}", self.port).into());
        table.insert("firewall".into(), firewall.into());
        std::fs::write(&self.config, table.to_string()).context("write a configuration")
    }

    /// All it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Cluster {
    /// Starts a cluster and waits until it has a leader and all agents are connected.
    pub fn start(setup: &Setup) -> Self {
        Self::prepare(setup).expect("a cluster can be prepared").run()
    }

    /// The same with a machine of its own for each role, as far as the network is concerned. None, with a printed
    /// reason, where that is not allowed.
    pub fn start_on_network(setup: &Setup) -> Option<Self> {
        let network = Network::of(setup.members + setup.agents + 1)?;
        Some(Self::prepare_on(setup, Some(network)).expect("a cluster can be prepared").run())
    }

    fn run(self) -> Self {
        let mut cluster = self;
        cluster.members.iter_mut().for_each(Role::start);
        cluster.wait_for_leader();
        // One after the other, so that the first agent is the first host, whose addresses `nave url` gives.
        for n in 0..cluster.agents.len() {
            cluster.agents[n].start();
            cluster.wait_for_agents(n + 1);
        }
        cluster
    }

    /// Files and folders only; nothing runs yet.
    pub fn prepare(setup: &Setup) -> anyhow::Result<Self> {
        Self::prepare_on(setup, None)
    }

    fn prepare_on(setup: &Setup, network: Option<Network>) -> anyhow::Result<Self> {
        let turn = Turn::take();
        let dir = tempfile::Builder::new().prefix("nave-").tempdir_in("/tmp").context("make a folder")?;
        let base_port = machine::free_ports();
        let port = |n: usize| base_port + u16::try_from(n).expect("few roles");
        let machine = |n: usize| network.as_ref().map(|network| network.machines[n].clone());
        let host = |n: usize| machine(n).map_or("127.0.0.1".to_owned(), |machine| machine.address);
        let addresses: Vec<String> = (0..setup.members).map(|k| format!("{}:{}", host(k), port(k))).collect();
        let init = dir.path().join("init");
        nave::run(None, &["init", "--members", &addresses.join(","), "--out", path(&init)], None).expect(0);
        let mut members = (0..setup.members)
            .map(|k| member(&init, k, port(k), port(20 + k)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let mut agents = (0..setup.agents)
            .map(|k| agent(dir.path(), &init, &addresses, k, port(10 + k), metrics_port(base_port, k)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        for (n, role) in members.iter_mut().chain(&mut agents).enumerate() {
            role.machine = machine(n);
        }
        for (n, agent) in agents.iter().enumerate().filter(|_| network.is_some()) {
            // A namespace has rules of its own.
            agent.listen_on(&host(setup.members + n), true)?;
        }
        Ok(Self { dir, base_port, members, agents, network, _turn: turn })
    }

    /// Where agent `k` answers `/metrics`, on loopback.
    pub fn agent_metrics_port(&self, k: usize) -> u16 {
        metrics_port(self.base_port, k)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Has an agent run from a copy of the program in its own folder, which a test may replace. Restarts it; nothing of
    /// this cluster should run yet.
    pub fn use_own_program(&mut self, agent: usize) -> anyhow::Result<()> {
        let role = &mut self.agents[agent];
        let copy = role.dir.join("nave");
        std::fs::copy(nave::binary(), &copy).context("copy the program")?;
        role.terminate();
        role.program = copy;
        role.start();
        self.wait_for_agents(self.agents.len());
        Ok(())
    }

    pub fn context(&self) -> PathBuf {
        self.dir.path().join("init/client.toml")
    }

    /// The machines' network.
    ///
    /// # Panics
    /// On a cluster that has none.
    pub fn network(&self) -> &Network {
        self.network.as_ref().expect("started on a network")
    }

    /// The operator's machine, when there is a network.
    pub fn operator(&self) -> Option<Namespace> {
        self.network.as_ref().and_then(|network| network.machines.last().cloned())
    }

    /// What one member alone answers to a listing.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn ask_member(&self, k: usize, args: &[&str]) -> Value {
        self.try_ask_member(k, args).unwrap_or_else(|| panic!("member-{} does not answer {args:?}", k + 1))
    }

    /// The same, none when it does not answer.
    pub fn try_ask_member(&self, k: usize, args: &[&str]) -> Option<Value> {
        let context = self.context().with_file_name(format!("client-{k}.toml"));
        if !context.exists() {
            let mut table: toml::Table = std::fs::read_to_string(self.context()).ok()?.parse().ok()?;
            let address = table["addresses"].as_array()?[k].clone();
            table.insert("addresses".into(), vec![address].into());
            std::fs::write(&context, table.to_string()).expect("a client file can be written");
        }
        let all: Vec<&str> = args.iter().copied().chain(["-o", "json"]).collect();
        let output = self.run_nave(&context, &all, None);
        (output.code == 0).then(|| serde_json::from_str(&output.stdout).ok()).flatten()
    }

    fn run_nave(&self, context: &Path, args: &[&str], input: Option<&str>) -> Output {
        let run = || nave::run(Some(context), args, input);
        match self.operator() {
            Some(machine) => machine.inside(run),
            None => run(),
        }
    }

    /// Runs `nave` as the operator.
    pub fn nave(&self, args: &[&str]) -> Output {
        self.run_nave(&self.context(), args, None)
    }

    /// Runs `nave … -o json`.
    ///
    /// # Panics
    /// When it fails or prints no JSON.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let all: Vec<&str> = args.iter().copied().chain(["-o", "json"]).collect();
        let output = self.nave(&all).expect(0);
        serde_json::from_str(&output.stdout).unwrap_or_else(|e| panic!("no JSON ({e}): {}", output.stdout))
    }

    /// The same, none when the command fails: for polling through faults.
    pub fn try_json(&self, args: &[&str]) -> Option<Value> {
        let all: Vec<&str> = args.iter().copied().chain(["-o", "json"]).collect();
        let output = self.nave(&all);
        (output.code == 0).then(|| serde_json::from_str(&output.stdout).ok()).flatten()
    }

    /// Applies a manifest given as text.
    pub fn apply(&self, manifest: &str, more: &[&str]) -> Output {
        let args: Vec<&str> = ["apply", "-f", "-"].into_iter().chain(more.iter().copied()).collect();
        self.run_nave(&self.context(), &args, Some(manifest))
    }

    /// Rows of `nave ps`.
    /// What callers use, as soon as an agent has it.
    pub fn url(&self, service: &str) -> String {
        eventually_some("the service has an address", SOON, || {
            let said = self.nave(&["url", service]);
            (said.code == 0).then(|| said.stdout.trim().to_owned())
        })
    }

    /// What a connection to a service goes to.
    ///
    /// # Panics
    /// When the service has no port.
    pub fn address(&self, service: &str) -> SocketAddr {
        let url = self.url(service);
        url.rsplit('/').next().and_then(|address| address.parse().ok()).expect("an address in a URL")
    }

    pub fn ps(&self, service: &str) -> Vec<Value> {
        self.try_json(&["ps", service]).and_then(|rows| rows.as_array().cloned()).unwrap_or_default()
    }

    /// Waits until a service has exactly `count` instances, all ready, and returns their rows.
    #[track_caller]
    pub fn wait_ready(&self, service: &str, count: usize) -> Vec<Value> {
        eventually_some(&format!("{count} ready instances of {service}"), SOON, || {
            let rows = self.ps(service);
            (rows.len() == count && rows.iter().all(|row| row["ready"] == true)).then_some(rows)
        })
    }

    /// Name of the leader that all reachable members agree on.
    pub fn leader(&self) -> Option<usize> {
        let status = self.try_json(&["cluster", "status"])?;
        let name = status["leader"].as_str().filter(|name| !name.is_empty())?;
        self.members.iter().position(|member| member.name == name)
    }

    #[track_caller]
    pub fn wait_for_leader(&self) -> usize {
        eventually_some("a leader", SOON, || self.leader())
    }

    #[track_caller]
    pub fn wait_for_agents(&self, count: usize) {
        eventually(&format!("{count} connected agents"), SOON, || {
            self.try_json(&["hosts"]).and_then(|hosts| hosts.as_array().cloned()).is_some_and(|hosts| {
                hosts.iter().filter(|host| host["status"] == "connected").count() == count
            })
        });
    }

    /// Has a member reserved by `nave cluster` with these words (`["add"]`, `["replace", "m-2"]`), and prepares its
    /// folder; nothing is started. Returns its place in `members`.
    pub fn reserve_member(&mut self, words: &[&str]) -> usize {
        let used = |k: &usize| !self.members.iter().any(|member| member.port == self.member_port(*k));
        let k = (0..MEMBERS_MAX).find(used).expect("few members at a time");
        let address = format!("127.0.0.1:{}", self.member_port(k));
        let mut args = vec!["cluster"];
        args.extend(words);
        args.push(&address);
        let said = self.nave(&args).expect(0).stdout;
        let name = said.split(['(', ')']).nth(1).expect("its name in brackets").to_owned();
        let init = self.dir.path().join("init");
        let port = self.member_port(k);
        self.members.push(member_named(&init, name, port, port + 20).expect("a member's folder"));
        self.members.len() - 1
    }

    fn member_port(&self, k: usize) -> u16 {
        self.base_port + u16::try_from(k).expect("few members")
    }

    /// Whether all that `nave cluster status` lists vote, answer and wait for nothing, and there are so many.
    pub fn settled(&self, count: usize) -> bool {
        let Some(status) = self.try_json(&["cluster", "status"]) else { return false };
        let Some(all) = status["members"].as_array() else { return false };
        let fine = |member: &Value| {
            matches!(member["role"].as_str(), Some("leader" | "follower")) && member["note"] == ""
        };
        all.len() == count && all.iter().all(fine)
    }

    /// Stops agents with their services, then members, and returns the members' data folders, quiet on disk.
    pub fn stop_members(&mut self) -> Vec<PathBuf> {
        self.members.iter_mut().for_each(|member| {
            member.terminate();
        });
        self.members.iter().map(|member| member.dir.join("data")).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() && std::env::var_os("NAVE_KEEP").is_some() {
            let kept = std::mem::replace(&mut self.dir, TempDir::new().expect("a folder")).keep();
            eprintln_kept(&kept);
        }
        for agent in &mut self.agents {
            end_services(agent);
        }
        self.members.iter_mut().for_each(Role::kill);
    }
}

#[expect(clippy::print_stderr, reason = "says where a failed test left its files")]
fn eprintln_kept(dir: &Path) {
    eprintln!("kept for inspection: {}", dir.display());
}

/// Ends an agent, its keeper and every process in its cgroup or below its keeper.
fn end_services(agent: &mut Role) {
    let data = agent.dir.join("data");
    agent.kill();
    for name in ["keeper.pid", "nave.pid"] {
        if let Some(pid) = agent.pid_file(name).filter(|pid| belongs_to(*pid, &agent.dir)) {
            process::send(pid, Signal::SIGKILL);
        }
    }
    for pid in processes_of(&data) {
        process::send(pid, Signal::SIGKILL);
    }
}

/// Whether a pid still is a `nave` started with this role's folder.
fn belongs_to(pid: u32, dir: &Path) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| String::from_utf8_lossy(&line).contains(&*dir.to_string_lossy()))
}

/// Service processes of an agent: those whose standard output is a FIFO below its data folder.
pub fn processes_of(data: &Path) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok())
        .filter(|pid| std::fs::read_link(format!("/proc/{pid}/fd/1")).is_ok_and(|out| out.starts_with(data)))
        .filter(|pid| !is_nave(*pid))
        .collect()
}

fn is_nave(pid: u32) -> bool {
    let own = |exe: PathBuf| exe.file_name().is_some_and(|name| name == "nave" || name == "nave (deleted)");
    std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == nave::binary() || own(exe))
}

fn metrics_port(base_port: u16, agent: usize) -> u16 {
    base_port + 30 + u16::try_from(agent).expect("few agents")
}

/// Ports for members: +0 to +9 of a cluster's block.
const MEMBERS_MAX: usize = 10;

fn member(init: &Path, k: usize, port: u16, metrics: u16) -> anyhow::Result<Role> {
    member_named(init, format!("member-{}", k + 1), port, metrics)
}

fn member_named(init: &Path, name: String, port: u16, metrics: u16) -> anyhow::Result<Role> {
    let dir = init.join(&name);
    let config = dir.join("member.toml");
    let text = std::fs::read_to_string(&config).with_context(|| format!("read {}", config.display()))?;
    let mut table: toml::Table = text.parse()?;
    table.insert("metrics_listen".into(), format!("127.0.0.1:{metrics}").into());
    table.insert("data_dir".into(), path(&dir.join("data")).into());
    std::fs::write(&config, table.to_string())?;
    let program = nave::binary();
    Ok(Role { name, dir, port, verb: "orchestrator", config, program, process: None, machine: None })
}

fn agent(
    root: &Path,
    init: &Path,
    members: &[String],
    k: usize,
    port: u16,
    metrics: u16,
) -> anyhow::Result<Role> {
    let name = format!("agent-{}", k + 1);
    let dir = root.join(&name);
    std::fs::create_dir_all(&dir)?;
    let config = dir.join("agent.toml");
    let mut table = toml::Table::new();
    table.insert("data_dir".into(), path(&dir.join("data")).into());
    table.insert("join".into(), members.to_vec().into());
    table.insert("token_file".into(), path(&init.join("join-token")).into());
    table.insert("name".into(), name.clone().into());
    table.insert("listen".into(), format!("127.0.0.1:{port}").into());
    // The machine's own rules are left alone.
    table.insert("firewall".into(), false.into());
    table.insert("metrics_listen".into(), format!("127.0.0.1:{metrics}").into());
    // Clusters of other tests have theirs on this machine too, and their ports differ.
    table.insert("address_prefix".into(), format!("127.{}", 88 + port % 160).into());
    std::fs::write(&config, table.to_string())?;
    let program = nave::binary();
    Ok(Role { name, dir, port, verb: "agent", config, program, process: None, machine: None })
}

fn path(path: &Path) -> &str {
    path.to_str().expect("test folders have plain names")
}

/// A turn to run a cluster: at most two at a time.
#[derive(Debug)]
struct Turn;

static RUNNING: AtomicUsize = AtomicUsize::new(0);
const AT_ONCE: usize = 2;

impl Turn {
    fn take() -> Self {
        while RUNNING
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| (n < AT_ONCE).then_some(n + 1))
            .is_err()
        {
            pause(Duration::from_millis(50));
        }
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        RUNNING.fetch_sub(1, Ordering::SeqCst);
    }
}
