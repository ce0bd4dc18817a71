//! Three instances on two hosts under 2,000 calls a second, one of ten a POST, while one kind of change happens again and
//! again. Planned changes may fail nothing; a killed instance only a POST that it had been sent; a killed agent only
//! what was under way through it, and nobody is ever refused; agents with all instances here and with all there. No POST may be done twice. `nave-bench calls through 3
//! drained` is three rounds of the one with this word.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::ensure;
use nave_tests::process::{alive, send};
use nave_tests::wait::pause;
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::generator::{Call, Failed, Generator};
use super::{ANSWER, address, rounds, spread};

const ROUNDS: usize = 20;
const PER_SECOND: u32 = 2_000;
/// Before the first change and after each: some thousand calls in which nothing happens.
const BETWEEN: Duration = Duration::from_millis(700);
/// After the kill of an agent, so that each has lived for longer than the two seconds within which its keeper takes an
/// end for one of a row, and waits before it starts the next.
const AFTER_KILL: Duration = Duration::from_millis(2_500);
const PATIENCE: Duration = Duration::from_secs(120);
const INSTANCES: usize = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Nothing,
    InstanceKilled,
    Update,
    Drain,
    /// In turn: the callers', whose connections are its own, and the other.
    AgentRestarted(Place),
    AgentKilled(Place),
    LeaderKilled,
}

/// Where all instances are, as the callers see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Here,
    There,
}

impl Change {
    const ALL: [Self; 9] = [
        Self::Nothing,
        Self::InstanceKilled,
        Self::Update,
        Self::Drain,
        Self::AgentRestarted(Place::Here),
        Self::AgentRestarted(Place::There),
        Self::AgentKilled(Place::Here),
        Self::AgentKilled(Place::There),
        Self::LeaderKilled,
    ];

    const fn place(self) -> Option<Place> {
        match self {
            Self::AgentRestarted(place) | Self::AgentKilled(place) => Some(place),
            _ => None,
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::InstanceKilled => "an instance is killed",
            Self::Update => "a rolling update",
            Self::Drain => "a host is drained",
            Self::AgentRestarted(Place::Here) => "an agent is restarted, instances on the callers' host",
            Self::AgentRestarted(Place::There) => "an agent is restarted, instances on the other host",
            Self::AgentKilled(Place::Here) => "an agent is killed, instances on the callers' host",
            Self::AgentKilled(Place::There) => "an agent is killed, instances on the other host",
            Self::LeaderKilled => "the hub's leader is killed",
        }
    }
}

pub(crate) fn run() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    // Services have users of their own.
    std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 2 });
    cluster.wait_for_agents(2);
    cluster.apply(&manifest(folder.path(), 0, None)?, &["--wait"]).expect(0);
    let (address, own) = address(&cluster, "calls")?;
    eventually("the address answers", PATIENCE, || std::net::TcpStream::connect(address).is_ok());
    println!(
        "| under 2,000 calls/s | times | calls | failed | of these POSTs that an instance had got | refused | p50 ms | p99 ms | longest ms |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let mut wrong = Vec::new();
    let only = std::env::args().nth(4);
    let wanted = |change: &Change| only.as_ref().is_none_or(|only| change.name().contains(only.as_str()));
    for change in Change::ALL.into_iter().filter(wanted) {
        let host = change.place().map(|place| match place {
            Place::Here => cluster.agents[own].name.clone(),
            Place::There => cluster.agents[1 - own].name.clone(),
        });
        if let Some(host) = &host {
            cluster.apply(&manifest(folder.path(), 0, Some(host))?, &["--wait"]).expect(0);
        }
        for file in std::fs::read_dir(folder.path())? {
            std::fs::File::create(file?.path())?;
        }
        let load = Generator::start(address, PER_SECOND)?;
        pause(BETWEEN);
        let times = rounds(ROUNDS);
        for round in 0..times {
            make(change, &mut cluster, folder.path(), round)?;
            pause(if matches!(change, Change::AgentKilled(_)) { AFTER_KILL } else { BETWEEN });
        }
        let calls = load.stop();
        wrong.extend(row(change, times, calls, &posts(folder.path())?));
        if host.is_some() {
            cluster.apply(&manifest(folder.path(), 0, None)?, &["--wait"]).expect(0);
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// `host`: where all instances have to be.
fn manifest(folder: &Path, version: usize, host: Option<&str>) -> anyhow::Result<String> {
    let place = host.map(|host| format!("[placement]\nconstraints = ['host = \"{host}\"']\n"));
    let program = std::env::current_exe()?;
    Ok(format!(
        "name = \"calls\"\ncommand = [{program:?}, {ANSWER:?}, {folder:?}]\ncount = {INSTANCES}\n\
         env = {{ VERSION = \"{version}\" }}\n[ports.main]\nprotocol = \"http\"\nservice_port = 8080\n\
         [health]\nhttp = \"/ready\"\ninterval = \"200ms\"\n[restart]\nbudget = \"1000 in 5m\"\n\
         [update]\nmin_ready = \"100ms\"\n{}",
        place.unwrap_or_default()
    ))
}

fn make(change: Change, cluster: &mut Cluster, folder: &Path, round: usize) -> anyhow::Result<()> {
    let agent = round % cluster.agents.len();
    match change {
        Change::Nothing => {}
        Change::InstanceKilled => {
            let row = cluster.wait_ready("calls", INSTANCES).remove(round % INSTANCES);
            let pid = pid(&row);
            send(pid, Signal::SIGKILL);
            eventually("all are ready again", PATIENCE, || {
                let rows = cluster.ps("calls");
                let ready = rows.iter().filter(|row| row["ready"] == true && self::pid(row) != pid);
                ready.count() == INSTANCES
            });
        }
        Change::Update => {
            cluster.apply(&manifest(folder, round + 1, None)?, &["--wait"]).expect(0);
        }
        Change::Drain => {
            let name = cluster.agents[agent].name.clone();
            cluster.nave(&["drain", &name, "--wait"]).expect(0);
            cluster.nave(&["undrain", &name]).expect(0);
        }
        Change::AgentRestarted(_) => replace(cluster, agent, Signal::SIGTERM),
        Change::AgentKilled(_) => replace(cluster, agent, Signal::SIGKILL),
        Change::LeaderKilled => {
            let leader = cluster.wait_for_leader();
            cluster.members[leader].kill();
            let next = eventually_some("another leader", PATIENCE, || {
                cluster.leader().filter(|next| *next != leader)
            });
            cluster.members[leader].start();
            eventually("the member is back", PATIENCE, || {
                cluster.leader() == Some(next) && cluster.settled(3)
            });
        }
    }
    Ok(())
}

/// Ends an agent, which its keeper starts again, and waits until the hub hears from it.
fn replace(cluster: &Cluster, agent: usize, signal: Signal) {
    let before = cluster.agents[agent].agent_pid();
    send(before, signal);
    eventually("another agent", PATIENCE, || {
        cluster.agents[agent].pid_file("nave.pid").is_some_and(|now| now != before && alive(now))
    });
    cluster.wait_for_agents(cluster.agents.len());
    cluster.wait_ready("calls", INSTANCES);
}

fn pid(row: &Value) -> u32 {
    row["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).unwrap_or_default()
}

/// How often each POST was done.
fn posts(folder: &Path) -> anyhow::Result<BTreeMap<u64, usize>> {
    let mut done = BTreeMap::new();
    for file in std::fs::read_dir(folder)? {
        let text = std::fs::read_to_string(file?.path())?;
        for number in text.lines().filter_map(|line| line.strip_prefix('/')?.parse().ok()) {
            *done.entry(number).or_default() += 1;
        }
    }
    Ok(done)
}

/// Prints what came of it; returns what must not be.
fn row(change: Change, times: usize, calls: Vec<Call>, posts: &BTreeMap<u64, usize>) -> Vec<String> {
    let failed: Vec<&Call> = calls.iter().filter(|call| call.answer.is_err()).collect();
    let refused = failed.iter().filter(|call| matches!(call.answer, Err(Failed::Refused(_)))).count();
    let excused = failed.iter().filter(|call| was_sent(call, posts)).count();
    let wrong: Vec<&&Call> = failed
        .iter()
        .filter(|call| match change {
            Change::InstanceKilled => !was_sent(call, posts),
            // Cut by the agent's end; of one on the other host, its instance's answer is lost to a POST.
            Change::AgentKilled(_) => !matches!(call.answer, Err(Failed::Cut(_))) && !was_sent(call, posts),
            _ => true,
        })
        .collect();
    let mut said: Vec<String> = Vec::new();
    let mut kinds: BTreeMap<String, (usize, u64)> = BTreeMap::new();
    for call in &wrong {
        let kind = format!("{} {:?}", if call.is_post { "POST" } else { "GET" }, call.answer);
        kinds.entry(kind).or_insert((0, call.number)).0 += 1;
    }
    for (kind, (count, first)) in kinds {
        said.push(format!("{}: {count} calls (the first has number {first}): {kind}", change.name()));
    }
    let twice = posts.values().filter(|count| **count > 1).count();
    if twice > 0 {
        said.push(format!("{}: {twice} POSTs were done twice", change.name()));
    }
    let (all, failed) = (calls.len(), failed.len());
    let [half, _, last, longest] = spread(calls.into_iter().map(|call| call.took).collect());
    println!(
        "| {} | {times} | {all} | {failed} | {excused} | {refused} | {half:.2} | {last:.1} | {longest:.0} |",
        change.name()
    );
    said
}

/// A POST that an instance has had, or may have had: its connection ended after it was sent there.
fn was_sent(call: &Call, posts: &BTreeMap<u64, usize>) -> bool {
    let by_word = matches!(&call.answer, Err(Failed::Status(502, text)) if text.contains("it closed "));
    call.is_post && (posts.contains_key(&call.number) || by_word)
}
