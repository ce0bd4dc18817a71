//! The next keeper: after kill -9, after a reboot, after an upgrade; and what it must never do.

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;

use nave_proto::pb;
use nix::sys::signal::Signal;
use pb::ExitCause;
use pb::SignalScope::{Cgroup, Group, Process};
use pb::keeper_ledger_record::Record;
use pb::keeper_request::Request;
use prost::Message;

use crate::harness::{Host, eventually, kill, runs, signal_request};

const NO_AGENT: &[&str] = &[];

#[test]
fn it_adopts_what_runs_and_knows_how_it_ends() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let gate = host.gate("go");
    let pid = agent.spawn(&host.script(1, &format!("echo one; {} echo two; exit 9", gate.wait())));
    let lost = agent.spawn(&host.script(2, "exec sleep 1000"));
    let ended = agent.spawn(&host.script(3, "exit 4"));
    assert_eq!(agent.exit(3).code, 4);
    host.line(1, "one");
    host.kill_keeper();
    kill(lost, Signal::SIGKILL);
    eventually("its end", || (!runs(lost)).then_some(()));
    assert!(runs(pid));

    host.start_keeper(NO_AGENT);
    let mut agent = host.agent();
    let kept = agent.kept(1).unwrap();
    assert_eq!((kept.process.unwrap().pid, kept.adopted, kept.leftover), (pid, true, false));
    let exit = agent.exit(3);
    assert_eq!((exit.code, exit.process.unwrap().pid), (4, ended), "not acknowledged: told again");
    let exit = agent.exit(2);
    // Whether its last word can still be had depends on how soon init reaps.
    match exit.cause() {
        ExitCause::Signal => assert_eq!(exit.signal, libc::SIGKILL),
        cause => {
            assert_eq!((cause, exit.message.as_str()), (ExitCause::Unspecified, "ended while no keeper ran"))
        }
    }
    gate.open();
    let exit = agent.exit(1);
    assert_eq!((exit.cause(), exit.code), (ExitCause::Exit, 9), "{exit:?}");
    assert!(exit.sequence > 2, "sequences go on");
    host.line(1, "two");
}

#[test]
fn it_signals_what_it_adopted() {
    let mut host = Host::start();
    let mut agent = host.agent();
    for instance in 1..=3 {
        agent.spawn(&host.script(instance, "exec sleep 1000"));
    }
    host.kill_keeper();
    host.start_keeper(NO_AGENT);
    let mut agent = host.agent();
    for (instance, scope) in [(1, Process), (2, Group), (3, Cgroup)] {
        agent.signal(instance, libc::SIGTERM, scope);
        let exit = agent.exit(instance);
        assert_eq!((exit.cause(), exit.signal), (ExitCause::Signal, libc::SIGTERM), "{exit:?}");
    }
}

#[test]
fn exits_are_repeated_until_acknowledged() {
    let mut host = Host::start();
    let mut agent = host.agent();
    for instance in 1..=3 {
        agent.spawn(&host.script(instance, &format!("exit {instance}")));
    }
    let mut sequences: Vec<u64> = (1..=3).map(|instance| agent.exit(instance).sequence).collect();
    sequences.sort_unstable();
    assert_eq!(sequences, [1, 2, 3]);
    let mut agent = host.agent();
    let again: Vec<u64> = (1..=3).map(|instance| agent.exit(instance).sequence).collect();
    assert_eq!(again.iter().max(), Some(&3));
    agent.acknowledge(2);
    host.kill_keeper();
    host.start_keeper(NO_AGENT);
    let mut agent = host.agent();
    let pb::keeper_reply::Reply::Exited(exit) = agent.event() else { panic!("no exit") };
    assert_eq!(exit.sequence, 3, "only what was not acknowledged");
    agent.acknowledge(3);
    agent.spawn(&host.script(4, "exit 0"));
    assert_eq!(agent.exit(4).sequence, 4);
}

#[test]
fn a_torn_ledger_costs_only_its_torn_end() {
    let mut host = Host::start();
    let pid = host.agent().spawn(&host.script(1, "exec sleep 1000"));
    host.kill_keeper();
    let ledger = host.data_dir().join("keeper.ledger");
    let mut file = fs::File::options().append(true).open(&ledger).unwrap();
    file.write_all(&[40, 0, 0, 0, 1, 2, 3]).unwrap();
    host.start_keeper(NO_AGENT);
    assert_eq!(host.agent().kept(1).unwrap().process.unwrap().pid, pid);
    assert!(host.said().contains("7 bytes of it were torn or damaged"), "{}", host.said());
}

/// A ledger as another keeper would have left it.
fn write_ledger(host: &Host, spawn: &pb::Spawn, process: pb::ProcessIdentity) {
    fs::create_dir_all(host.data_dir()).unwrap();
    let (spawn, process) = (Some(spawn.clone()), Some(process));
    let started = pb::KeptSpawn { spawn, process, started_unix_ns: 1, ..Default::default() };
    let body = pb::KeeperLedgerRecord { record: Some(Record::Started(started)) }.encode_to_vec();
    let crc = !body.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    });
    let mut bytes = u32::try_from(body.len()).unwrap().to_le_bytes().to_vec();
    bytes.extend(crc.to_le_bytes());
    bytes.extend(body);
    fs::write(host.data_dir().join("keeper.ledger"), bytes).unwrap();
}

struct Stranger(std::process::Child);

impl Stranger {
    fn start() -> Self {
        Self(std::process::Command::new("sleep").arg("1000").spawn().unwrap())
    }

    fn identity(&self) -> pb::ProcessIdentity {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let start = stat.rsplit_once(") ").unwrap().1.split(' ').nth(19).unwrap();
        pb::ProcessIdentity {
            pid: self.0.id(),
            start_ticks: start.parse().unwrap(),
            boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned(),
            cgroup_id: 0,
        }
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_stranger_with_the_pid_is_never_signalled() {
    let stranger = Stranger::start();
    let truth = stranger.identity();
    let mut host = Host::off();
    let plain = pb::Spawn { cgroup2: String::new(), ..host.script(1, "") };
    let with_cgroup = host.script(1, "");
    let another_start = pb::ProcessIdentity { start_ticks: truth.start_ticks - 1, ..truth.clone() };
    let another_cgroup = pb::ProcessIdentity { cgroup_id: 1, ..truth.clone() };
    for (spawn, identity) in [(&plain, another_start), (&with_cgroup, another_cgroup)] {
        write_ledger(&host, spawn, identity.clone());
        host.start_keeper(NO_AGENT);
        let mut agent = host.agent();
        let is_it = identity.start_ticks == truth.start_ticks;
        assert_eq!(agent.kept(1).is_some(), is_it, "one with another start is not it, and has ended");
        for scope in [Process, Group] {
            for signal in [libc::SIGTERM, libc::SIGKILL] {
                let error = agent.refused(signal_request(1, signal, scope));
                assert_eq!(error.kind(), pb::KeeperErrorKind::Stranger, "{error:?}");
            }
        }
        agent.refused(signal_request(1, libc::SIGKILL, Cgroup));
        assert!(runs(truth.pid));
        host.kill_keeper();
        let _ = fs::remove_file(host.data_dir().join("exits"));
    }
}

#[test]
fn a_reboot_voids_everything() {
    let stranger = Stranger::start();
    let mut host = Host::off();
    let spawn = host.script(1, "");
    let boot_id = "00000000-0000-4000-8000-000000000000".to_owned();
    write_ledger(&host, &spawn, pb::ProcessIdentity { boot_id, ..stranger.identity() });
    host.start_keeper(NO_AGENT);
    let mut agent = host.agent();
    let exit = agent.exit(1);
    assert_eq!((exit.cause(), exit.message.as_str()), (ExitCause::Unspecified, "host rebooted"));
    assert!(agent.kept(1).is_none());
    assert_eq!(agent.refused(signal_request(1, 9, Process)).kind(), pb::KeeperErrorKind::Stranger);
    assert!(runs(stranger.0.id()));
    agent.spawn(&pb::Spawn { attempt: 2, ..host.script(1, "exec sleep 1000") });
}

#[test]
fn an_upgrade_keeps_pid_children_descriptors_and_causes() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let gate = host.gate("go");
    let pid = agent.spawn(&host.script(1, &format!("{} exit 6", gate.wait())));
    let other =
        agent.spawn(&host.script(2, "trap 'sleep 0.5; exit 0' TERM; echo up; while :; do sleep 0.05; done"));
    host.line(2, "up");
    let (_near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let store = Request::StoreDescriptor(pb::StoreDescriptor { name: "kept".to_owned(), speaker: None });
    agent.client.request(store, Some(far.as_fd())).unwrap();
    let stop = pb::Signal { cause: ExitCause::Hub.into(), ..term(2) };
    agent.done(Request::Signal(stop));
    kill(host.keeper_pid(), Signal::SIGUSR2);
    eventually("the old image's end", || agent.client.list().is_err().then_some(()));
    let mut agent = host.agent();
    let kept = agent.kept(1).unwrap();
    assert_eq!((kept.process.unwrap().pid, kept.adopted), (pid, false), "still its child");
    let take = Request::TakeDescriptor(pb::TakeDescriptor { name: "kept".to_owned() });
    let (_, taken) = agent.client.request(take, None).unwrap();
    assert!(taken.is_some());
    gate.open();
    let exit = agent.exit(1);
    assert_eq!((exit.cause(), exit.code), (ExitCause::Exit, 6));
    let exit = agent.exit(2);
    assert_eq!((exit.cause(), exit.process.unwrap().pid), (ExitCause::Hub, other));
    let descriptors = descriptors(host.keeper_pid());
    kill(host.keeper_pid(), Signal::SIGUSR2);
    eventually("the old image's end", || agent.client.list().is_err().then_some(()));
    let mut agent = host.agent();
    agent.client.list().unwrap();
    // A folder of output may be open for a moment, for a look at what is there.
    let all = format!("no more descriptors than {descriptors:#?}");
    eventually(&all, || (self::descriptors(host.keeper_pid()).len() <= descriptors.len()).then_some(()));
}

/// What each of a process is open on.
fn descriptors(pid: u32) -> Vec<String> {
    let open = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|one| fs::read_link(one.unwrap().path()).ok());
    let mut open: Vec<String> = open.map(|path| path.display().to_string()).collect();
    open.sort();
    open
}

fn term(instance_id: u64) -> pb::Signal {
    let scope = Process.into();
    pb::Signal { instance_id, epoch: 1, attempt: 1, signal: libc::SIGTERM, scope, cause: 0 }
}

fn boottime_ns() -> i64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).unwrap();
    now.tv_sec() * 1_000_000_000 + now.tv_nsec()
}

fn deadline(instance_id: u64, boottime_ns: i64) -> Request {
    let deadline =
        pb::SetDeadline { instance_id, epoch: 1, boottime_ns, grace_ms: 200, ..Default::default() };
    Request::SetDeadline(deadline)
}

#[test]
fn a_deadline_is_kept_without_agent_and_over_the_end_of_the_keeper() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let stubborn = "trap '' TERM; (setsid sleep 1000 &); echo up; while :; do sleep 0.05; done";
    let pid = agent.spawn(&host.script(1, stubborn));
    let spared = agent.spawn(&host.script(2, "exec sleep 1000"));
    host.line(1, "up");
    let at = boottime_ns() + 700_000_000;
    agent.done(deadline(1, at));
    agent.done(deadline(2, at));
    agent.done(deadline(2, 0));
    drop(agent);
    host.kill_keeper();
    host.start_keeper(NO_AGENT);
    eventually("its end", || (!runs(pid)).then_some(()));
    assert!(boottime_ns() >= at + 200_000_000, "not before deadline and grace");
    let mut agent = host.agent();
    let exit = agent.exit(1);
    assert_eq!((exit.cause(), exit.signal), (ExitCause::Hub, libc::SIGKILL), "{exit:?}");
    assert!(exit.message.contains("deadline"), "{exit:?}");
    eventually("the end of what it left", || agent.kept(1).is_none().then_some(()));
    assert!(runs(spared), "its deadline was taken back");
    let late = pb::Spawn { attempt: 2, ..host.script(1, "exec sleep 1000") };
    let error = agent.refused(Request::Spawn(late.clone()));
    assert!(error.message.contains("deadline has passed"), "{error:?}");
    agent.done(deadline(1, boottime_ns() + 60_000_000_000));
    agent.spawn(&late);
}
