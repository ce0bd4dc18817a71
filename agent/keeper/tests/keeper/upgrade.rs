//! An upgrade on trial: kept when it proves itself, put back in every way that it can fail. Children, pid and stored
//! descriptors stay, whichever way it goes.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use nave_keeper::client::ClientError;
use nave_proto::pb;
use nix::sys::signal::Signal;
use pb::KeeperUpgradeState as State;
use pb::keeper_request::Request;

use crate::harness::{Agent, Gate, Host, eventually, kill, runs, state};

/// Its program shows as another than its command's, so that an adopted one is replaced at once. It ends at its start
/// once `flag` exists.
fn an_agent(flag: &Path) -> [String; 3] {
    let script = format!("test -e {} && exit 1; exec sleep 1000", flag.display());
    ["/bin/sh".to_owned(), "-c".to_owned(), script]
}

/// A host whose keeper can be upgraded, with a process that ends with 7 when the gate opens and a stored descriptor.
struct Upgradable {
    host: Host,
    command: [String; 3],
    process: u32,
    gate: Gate,
    before: u64,
}

impl Upgradable {
    fn start() -> Self {
        let mut host = Host::off();
        host.program = host.copy_of_program("keeper");
        let command = an_agent(&host.dir.path().join("broken"));
        host.start_keeper(&command);
        let mut agent = host.agent();
        let gate = host.gate("go");
        let process = agent.spawn(&host.script(1, &format!("{} exit 7", gate.wait())));
        let (_near, far) = std::os::unix::net::UnixStream::pair().unwrap();
        let store = Request::StoreDescriptor(pb::StoreDescriptor { name: "kept".to_owned(), speaker: None });
        agent.client.request(store, Some(far.as_fd())).unwrap();
        eventually("an agent", || agent_of(&host));
        let before = inode(&host.program);
        Self { host, command, process, gate, before }
    }

    /// Stages a copy of the program, changed by `change`, and asks for it.
    fn upgrade(&self, change: impl FnOnce(&Path)) -> Result<(), pb::KeeperError> {
        let staged = self.host.copy_of_program("keeper.new");
        let previous = self.host.copy_of_program("keeper.previous");
        change(&staged);
        let done = self.host.connect().upgrade(&staged, &previous, Some(Duration::from_secs(20)));
        match done {
            Err(ClientError::Refused(error)) => Err(error),
            done => {
                done.unwrap();
                Ok(())
            }
        }
    }

    fn last(&self) -> pb::KeeperUpgradeRecord {
        self.host.status().last_upgrade.unwrap_or_default()
    }

    /// Waits for the end of the trial, and looks whether all is still there.
    fn ends(&self, wanted: State) -> String {
        let last = eventually("the end of the trial", || {
            let last = self.last();
            (last.state() != State::Trying).then_some(last)
        });
        assert_eq!(last.state(), wanted, "{last:?}");
        let (program, before) = (inode(&self.host.program), self.before);
        assert_ne!(program, before, "either a new one or the copy of the old one");
        let running = fs::metadata(format!("/proc/{}/exe", self.host.keeper_pid())).unwrap().ino();
        assert_eq!(running, program, "what runs is what is there");
        last.message
    }

    fn all_is_kept(&self) -> Agent {
        let mut agent = self.host.agent();
        let kept = agent.kept(1).unwrap();
        assert_eq!((kept.process.unwrap().pid, kept.adopted), (self.process, false), "still its child");
        let take = Request::TakeDescriptor(pb::TakeDescriptor { name: "kept".to_owned() });
        let (_, taken) = agent.client.request(take, None).unwrap();
        assert!(taken.is_some());
        self.gate.open();
        let exit = agent.exit(1);
        assert_eq!((exit.cause(), exit.code), (pb::ExitCause::Exit, 7));
        agent
    }
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

fn agent_of(host: &Host) -> Option<u32> {
    let pid = host.status().agent_pid;
    (pid != 0 && runs(pid)).then_some(pid)
}

/// The same program but for some bytes.
fn patch(program: &Path, from: &[u8], to: &[u8]) {
    let mut bytes = fs::read(program).unwrap();
    let places: Vec<usize> =
        (0..bytes.len() - from.len()).filter(|at| bytes[*at..].starts_with(from)).collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
    fs::write(program, bytes).unwrap();
}

#[test]
fn one_whose_agent_takes_over_is_kept() {
    let upgradable = Upgradable::start();
    let before = agent_of(&upgradable.host).unwrap();
    upgradable.upgrade(|_| {}).unwrap();
    eventually("an agent of the new program", || agent_of(&upgradable.host).filter(|pid| *pid != before));
    let mut agent = upgradable.host.agent();
    assert!(agent.kept(1).is_some());
    upgradable.ends(State::Kept);
    drop(agent);
    upgradable.all_is_kept();
}

#[test]
fn one_whose_agents_do_not_stay_is_put_back() {
    let upgradable = Upgradable::start();
    fs::write(upgradable.host.dir.path().join("broken"), "").unwrap();
    upgradable.upgrade(|_| {}).unwrap();
    let why = upgradable.ends(State::PutBack);
    assert!(why.contains("did not stay"), "{why}");
    fs::remove_file(upgradable.host.dir.path().join("broken")).unwrap();
    upgradable.all_is_kept();
    eventually("the old program's agent", || agent_of(&upgradable.host));
}

#[test]
fn one_that_does_not_know_the_handover_is_put_back() {
    let upgradable = Upgradable::start();
    upgradable.upgrade(|staged| patch(staged, b"nave-keeper-handover", b"nave-keeper-sometime")).unwrap();
    let why = upgradable.ends(State::PutBack);
    assert!(why.contains("could not start"), "{why}");
    upgradable.all_is_kept();
}

#[test]
fn one_that_dies_on_trial_is_put_back_by_the_next_keeper() {
    let mut upgradable = Upgradable::start();
    upgradable.upgrade(|_| {}).unwrap();
    let tried = inode(&upgradable.host.program);
    eventually("the new image", || (upgradable.last().state() == State::Trying).then_some(()));
    upgradable.host.kill_keeper();
    let command = upgradable.command.clone();
    upgradable.host.start_keeper(&command);
    let why = upgradable.ends(State::PutBack);
    assert!(why.contains("ended while it was on trial"), "{why}");
    assert_ne!(inode(&upgradable.host.program), tried);
    assert_ne!(state(upgradable.process), None, "the process lives on");
    let kept = upgradable.host.agent().kept(1).unwrap();
    assert_eq!(kept.process.unwrap().pid, upgradable.process);
}

#[test]
fn one_that_cannot_be_executed_is_refused_and_nothing_changes() {
    let upgradable = Upgradable::start();
    let mut agent = upgradable.host.agent();
    let error = upgradable.upgrade(|staged| fs::write(staged, "no program\n").unwrap()).unwrap_err();
    assert!(error.message.contains("cannot be executed"), "{error:?}");
    assert_eq!(upgradable.last().state(), State::PutBack);
    assert!(agent.kept(1).is_some(), "not even the agent's connection");
    upgradable.all_is_kept();
    let missing = pb::KeeperUpgrade { staged: "/nowhere".to_owned(), ..Default::default() };
    let error = upgradable.host.connect().request(Request::Upgrade(missing), None).unwrap_err();
    assert!(error.to_string().contains("no file beside"), "{error}");
}

/// What was read is written before, what was not stays in the FIFO.
#[test]
fn no_line_is_lost_or_doubled_over_upgrades() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let script =
        "i=0; while test $i -lt 20000; do echo line $i; i=$((i+1)); done; echo done; exec sleep 1000";
    agent.spawn(&host.script(1, script));
    for _ in 0..5 {
        kill(host.keeper_pid(), Signal::SIGUSR2);
        eventually("the next image", || agent.client.list().is_err().then_some(()));
        agent = host.agent();
    }
    host.line(1, "done");
    let lines: Vec<String> = whole_lines(&host.log(1));
    let wanted: Vec<String> = (0..20_000).map(|i| format!("line {i}")).chain(["done".to_owned()]).collect();
    assert_eq!(lines.len(), wanted.len());
    assert!(lines == wanted, "in order");
}

/// A line that the change of images cut in two is written as a part and its rest.
fn whole_lines(records: &[String]) -> Vec<String> {
    let (mut lines, mut begun) = (Vec::new(), String::new());
    for record in records {
        if let Some(part) = record.strip_prefix("stdout P ") {
            begun.push_str(part);
        } else {
            let rest = record.strip_prefix("stdout F ").unwrap_or(record);
            lines.push(std::mem::take(&mut begun) + rest);
        }
    }
    lines
}

#[test]
fn a_second_one_waits_for_the_first() {
    let upgradable = Upgradable::start();
    upgradable.upgrade(|_| {}).unwrap();
    eventually("the new image", || (upgradable.last().state() == State::Trying).then_some(()));
    let error = upgradable.upgrade(|_| {}).unwrap_err();
    assert!(error.message.contains("under way"), "{error:?}");
}
