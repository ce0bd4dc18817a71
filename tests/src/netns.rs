//! Machines of their own for a test's processes, as far as the network is concerned: network namespaces joined by a
//! bridge. Only the network is split: files, `/sys/fs/cgroup` and process ids stay the machine's.
//!
//! Namespaces have no names: a descriptor keeps each alive, and it goes with the last process inside. So parallel runs
//! cannot collide, and a test that dies leaves nothing behind but what its processes hold. The bridge has a namespace of
//! its own, so the machine's network is not touched at all. Faults are nftables rules at the receiver, so each way of
//! each link is cut alone; this kernel has no netem.
//!
//! A child is started from a thread that has entered its namespace, since a child inherits that of the thread.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use nix::sched::{CloneFlags, setns, unshare};
use parking_lot::Mutex;

/// One machine's network. Cheap to clone; alive as long as a clone or a process inside.
#[derive(Debug, Clone)]
pub struct Namespace {
    descriptor: Arc<File>,
    /// `10.77.0.N`, the same in every run: nobody outside sees it.
    pub address: String,
}

impl Namespace {
    fn new(address: String) -> anyhow::Result<Self> {
        let made = std::thread::spawn(|| -> anyhow::Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
            let file = File::open("/proc/thread-self/ns/net").context("open the namespace")?;
            run("ip", &["link", "set", "lo", "up"])?;
            Ok(file)
        });
        let file = made.join().map_err(|_| anyhow::anyhow!("the thread that makes a namespace died"))??;
        Ok(Self { descriptor: Arc::new(file), address })
    }

    /// Runs `work` on a thread inside; what it starts is inside too.
    ///
    /// # Panics
    /// When `work` panics, or the namespace cannot be entered.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter();
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread inside for good: for threads of a runtime.
    ///
    /// # Panics
    /// When that is not allowed.
    pub fn enter(&self) {
        setns(&*self.descriptor, CloneFlags::CLONE_NEWNET).expect("a namespace that was made can be entered");
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.descriptor.as_raw_fd())
    }
}

/// Machines on one bridge.
#[derive(Debug)]
pub struct Network {
    _switch: Namespace,
    pub machines: Vec<Namespace>,
    /// (from, to): what `from` sends does not reach `to`.
    cuts: Mutex<BTreeSet<(usize, usize)>>,
}

impl Network {
    /// So many machines; none, with a printed reason, where it is not allowed.
    pub fn of(machines: usize) -> Option<Self> {
        match Self::make(machines) {
            Ok(network) => Some(network),
            Err(error) => {
                skipped(&error);
                None
            }
        }
    }

    fn make(machines: usize) -> anyhow::Result<Self> {
        ensure!(crate::machine::is_root(), "network namespaces need root");
        run("nft", &["--version"])?;
        let switch = Namespace::new("none".to_owned())?;
        switch.inside(|| {
            run("ip", &["link", "add", "bridge", "type", "bridge"])?;
            run("ip", &["link", "set", "bridge", "up"])
        })?;
        let machines =
            (0..machines).map(|index| machine(&switch, index)).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self { _switch: switch, machines, cuts: Mutex::default() })
    }

    /// What `from` sends no longer reaches `to`.
    pub fn cut(&self, from: usize, to: usize) {
        self.change(to, |cuts| {
            cuts.insert((from, to));
        });
    }

    /// Nothing passes between one machine and others, either way.
    pub fn isolate(&self, machine: usize, others: impl IntoIterator<Item = usize>) {
        for other in others.into_iter().filter(|other| *other != machine) {
            self.cut(machine, other);
            self.cut(other, machine);
        }
    }

    /// Everything passes again.
    pub fn heal(&self) {
        for machine in 0..self.machines.len() {
            self.change(machine, |cuts| cuts.retain(|(_, to)| *to != machine));
        }
    }

    /// Puts a receiver's rules in force, all at once.
    fn change(&self, to: usize, change: impl FnOnce(&mut BTreeSet<(usize, usize)>)) {
        let mut cuts = self.cuts.lock();
        let before = cuts.clone();
        change(&mut cuts);
        if *cuts == before {
            return;
        }
        let sources: Vec<&str> = cuts
            .iter()
            .filter(|(_, receiver)| *receiver == to)
            .map(|(from, _)| self.machines[*from].address.as_str())
            .collect();
        let rule = match sources.is_empty() {
            true => String::new(),
            false => format!("add rule ip nave in ip saddr {{ {} }} drop\n", sources.join(", ")),
        };
        let text = format!(
            "add table ip nave\nadd chain ip nave in {{ type filter hook input priority 0; }}\nflush chain ip nave in\n{rule}"
        );
        self.machines[to].inside(|| nft(&text)).expect("rules can be set in a namespace of ours");
    }
}

/// A namespace with an end of a cable whose other end is in the bridge.
fn machine(switch: &Namespace, index: usize) -> anyhow::Result<Namespace> {
    let machine = Namespace::new(format!("10.77.0.{}", index + 1))?;
    let port = format!("port{index}");
    let (path, address) = (machine.path(), format!("{}/24", machine.address));
    switch.inside(|| {
        run("ip", &["link", "add", &port, "type", "veth", "peer", "name", "eth", "netns", &path])?;
        run("ip", &["link", "set", &port, "master", "bridge", "up"])
    })?;
    machine.inside(|| {
        run("ip", &["address", "add", &address, "dev", "eth"])?;
        run("ip", &["link", "set", "eth", "up"])
    })?;
    Ok(machine)
}

fn run(program: &str, args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program).args(args).output().with_context(|| format!("start {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {}", args.join(" "), said.trim());
    Ok(())
}

fn nft(text: &str) -> anyhow::Result<()> {
    let mut child =
        Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("nft has an input")?.write_all(text.as_bytes())?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "nft: {}", said.trim());
    Ok(())
}

#[expect(clippy::print_stderr, reason = "a test that was skipped must say so")]
fn skipped(error: &anyhow::Error) {
    eprintln!("SKIPPED: {error:#}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    fn reaches(network: &Network, from: usize, to: usize) -> bool {
        let address = format!("{}:9", network.machines[to].address);
        let address = address.parse().unwrap();
        network.machines[from]
            .inside(|| TcpStream::connect_timeout(&address, Duration::from_millis(400)).is_ok())
    }

    #[test]
    fn each_way_of_each_link_is_cut_alone_and_heals() {
        let Some(network) = Network::of(3) else { return };
        let _listeners: Vec<TcpListener> = network
            .machines
            .iter()
            .map(|machine| machine.inside(|| TcpListener::bind((machine.address.as_str(), 9)).unwrap()))
            .collect();
        assert!(reaches(&network, 0, 1) && reaches(&network, 1, 2) && reaches(&network, 2, 0));
        network.isolate(0, [1]);
        assert!(!reaches(&network, 0, 1) && !reaches(&network, 1, 0), "nothing passes");
        assert!(reaches(&network, 0, 2) && reaches(&network, 1, 2), "the others are not concerned");
        network.heal();
        assert!(reaches(&network, 0, 1) && reaches(&network, 1, 0));
        // One way: the answer does not come back, so no connection either; but what 2 hears shows the difference.
        network.cut(0, 1);
        assert!(!reaches(&network, 0, 1) && reaches(&network, 2, 1));
        assert!(std::path::Path::new("/sys/fs/cgroup").exists());
    }
}
