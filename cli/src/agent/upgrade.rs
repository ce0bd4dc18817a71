//! `nave agent upgrade`: another program for the keeper and agent that run here, without ending a process.
//!
//! Everything that can be known before is asked before: the new program must run, understand the running one's flags
//! and read what that wrote. Then the keeper becomes it and has it on trial (see `nave_keeper`'s upgrade.rs); this
//! command looks on and says how it came out. Interrupting it does no harm.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::Context as _;
use nave_keeper::client::{Client, ClientError, socket_path};
use nave_proto::pb;
use pb::KeeperUpgradeState as State;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::time::Instant;

use super::prove::Proof;
use super::stage::Stage;
use crate::args;
use crate::context::plain;
use crate::failure::{Exit, Failure};
use crate::{out, roles};

/// For one answer of the keeper: its turns are short, but its disk may be slow.
const ANSWER: Duration = Duration::from_secs(10);
/// The keeper gives the new program half a minute; then it is back, or something is badly wrong.
const OUTCOME: Duration = Duration::from_secs(90);
/// For a service manager to start a keeper that has ended.
const RETURN: Duration = Duration::from_secs(30);
const STEP: Duration = Duration::from_millis(100);
/// A program that does not answer by then hangs.
const PROOF: Duration = Duration::from_secs(30);

pub(super) fn run(args: &args::AgentUpgrade) -> Result<(), Failure> {
    let data_dir = data_dir(args)?;
    let _alone = alone(&data_dir)?;
    let mut client = connect(&data_dir)?;
    let before = client.status().map_err(|error| match error {
        ClientError::Unsupported => Failure::refused("the keeper that runs is too old to be upgraded in place")
            .next(
                "put the new program in its place and restart the agent's unit, with cgroup v2 as docs/operating.md \
                 says under \"Units of earlier versions\": services go on",
            ),
        error => unreachable(&error),
    })?;
    if last_state(&before) == State::Trying {
        return Err(Failure::refused("another upgrade of this keeper is on trial").next("wait half a minute"));
    }
    let keeper = Keeper::of(before.keeper_pid)?;
    let new = match &args.program {
        Some(program) => program.clone(),
        None => std::env::current_exe().context("find this program")?,
    };
    let stage = Stage::make(&new, Path::new(&before.program), before.keeper_pid)?;
    let proof = prove(&stage.staged, &keeper)?;
    if proof.handover != before.handover_version {
        return Err(Failure::refused(format!(
            "version {} cannot take over from version {} (handover {} and {})",
            proof.version, before.keeper_version, proof.handover, before.handover_version
        ))
        .next("upgrade to a version between the two first"));
    }
    out::note(format_args!(
        "version {} runs here and reads what version {} wrote ({} processes); the keeper becomes it",
        proof.version, before.keeper_version, proof.processes
    ));
    match client.upgrade(&stage.staged, &stage.previous, None) {
        Ok(()) => {}
        Err(ClientError::Refused(error)) => {
            return Err(Failure::refused(format!("nothing was changed: {}", error.message)));
        }
        Err(error) => return Err(unreachable(&error)),
    }
    drop(client);
    report(&before, outcome(&data_dir, &keeper)?)
}

fn data_dir(args: &args::AgentUpgrade) -> Result<PathBuf, Failure> {
    match (&args.data_dir, &args.config) {
        (Some(dir), _) => Ok(dir.clone()),
        (None, Some(_)) => {
            let agent = args::Agent { config: args.config.clone(), ..args::Agent::default() };
            Ok(roles::agent_config(&agent)?.data_dir)
        }
        (None, None) => Err(Failure::usage("--config or --data-dir is missing")),
    }
}

/// One upgrade at a time: a second would overwrite what the first may put back.
fn alone(data_dir: &Path) -> Result<File, Failure> {
    let path = data_dir.join("upgrade.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| Failure::refused(format!("cannot use {}: {}", path.display(), plain(&error))))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(_) => {
            Err(Failure::refused(format!("another `nave agent upgrade` works in {}", data_dir.display())))
        }
    }
}

fn connect(data_dir: &Path) -> Result<Client, Failure> {
    let client = try_connect(data_dir).map_err(|error| {
        Failure::refused(format!("no keeper answers in {}: {}", data_dir.display(), plain(&error)))
            .next("is the agent running, and is this its --config or --data-dir?")
    })?;
    Ok(client)
}

fn try_connect(data_dir: &Path) -> std::io::Result<Client> {
    let client = Client::connect(&socket_path(data_dir))?;
    client.set_timeout(Some(ANSWER))?;
    Ok(client)
}

fn unreachable(error: &ClientError) -> Failure {
    Failure::new(Exit::Unknown, format!("the keeper does not answer: {error}"))
}

fn last_state(status: &pb::KeeperStatus) -> State {
    status.last_upgrade.as_ref().map_or(State::Unspecified, pb::KeeperUpgradeRecord::state)
}

/// The keeper's process, however its program changes.
struct Keeper {
    pid: u32,
    /// With the pid, who it is.
    start: Option<String>,
    process: OwnedFd,
    arguments: Vec<OsString>,
    working_dir: PathBuf,
}

impl Keeper {
    fn of(pid: u32) -> Result<Self, Failure> {
        let number =
            i32::try_from(pid).ok().and_then(Pid::from_raw).context("the keeper's pid makes no sense")?;
        let process = pidfd_open(number, PidfdFlags::empty()).context("look at the keeper's process")?;
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).context("read the keeper's command line")?;
        let working_dir =
            std::fs::read_link(format!("/proc/{pid}/cwd")).context("find its working directory")?;
        let words = line.split(|byte| *byte == 0).filter(|word| !word.is_empty());
        let arguments = words.map(|word| OsString::from_vec(word.to_vec())).collect();
        Ok(Self { pid, start: start_of(pid), process, arguments, working_dir })
    }

    fn runs(&self) -> bool {
        self.start.is_some() && start_of(self.pid) == self.start
    }
}

/// The start time of a process that has not ended.
fn start_of(pid: u32) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    // Fields 3 and 22 of proc(5).
    (*fields.first()? != "Z").then(|| fields.get(19).map(|start| (*start).to_owned()))?
}

/// Asks the new program, with the flags of the one that runs.
fn prove(program: &Path, keeper: &Keeper) -> Result<Proof, Failure> {
    let failed = |why: String| {
        Failure::refused(format!("the new program does not prove itself: {why}"))
            .detail("nothing was changed")
    };
    // `nave agent FLAGS`.
    let flags = keeper.arguments.get(2..).unwrap_or_default();
    let mut child = Command::new(program)
        .args(["agent", "prove"])
        .args(flags)
        .current_dir(&keeper.working_dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(plain(&error)))?;
    let began = Instant::now();
    let status = loop {
        match child.try_wait().context("wait for the new program")? {
            Some(status) => break status,
            None if began.elapsed() > PROOF => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(format!("it has not answered after {} s", PROOF.as_secs())));
            }
            None => pause(),
        }
    };
    // Both are far below what a pipe holds.
    let (mut said, mut complaint) = (String::new(), String::new());
    let _ = child.stdout.take().map(|mut out| out.read_to_string(&mut said));
    let _ = child.stderr.take().map(|mut out| out.read_to_string(&mut complaint));
    if !status.success() {
        return Err(failed(format!("{status}")).details(complaint.lines().take(10).map(str::to_owned)));
    }
    serde_json::from_str(said.trim()).map_err(|_| failed(format!("it answers {:?}", said.trim())))
}

/// Looks on until the trial is over.
fn outcome(data_dir: &Path, keeper: &Keeper) -> Result<pb::KeeperStatus, Failure> {
    let began = Instant::now();
    let mut gone_since: Option<Instant> = None;
    loop {
        let status = try_connect(data_dir).ok().and_then(|mut client| client.status().ok());
        match status {
            Some(status) if last_state(&status) != State::Trying => return Ok(status),
            Some(_) => gone_since = None,
            None if !keeper.runs() => {
                let since = *gone_since.get_or_insert_with(Instant::now);
                if since.elapsed() > RETURN {
                    return Err(dead(keeper));
                }
            }
            None => {}
        }
        if began.elapsed() > OUTCOME && gone_since.is_none() {
            // Hung, before it could go back by itself: the next keeper does.
            out::note("the new keeper does not answer and is killed; services go on");
            let _ = pidfd_send_signal(&keeper.process, Signal::KILL);
            gone_since = Some(Instant::now());
        }
        pause();
    }
}

fn dead(keeper: &Keeper) -> Failure {
    let command: Vec<_> = keeper.arguments.iter().map(|word| word.to_string_lossy()).collect();
    Failure::refused("the keeper ended while the new program was on trial, and nobody has started it again")
        .detail("services go on; the next keeper puts the old program back and adopts them")
        .next(format!("start it again, in {}: {}", keeper.working_dir.display(), command.join(" ")))
}

fn report(before: &pb::KeeperStatus, after: pb::KeeperStatus) -> Result<(), Failure> {
    let last = after.last_upgrade.unwrap_or_default();
    match last.state() {
        State::Kept => {
            out::line(format_args!(
                "upgraded from version {} to {}: keeper {}, {} processes kept",
                before.keeper_version, after.keeper_version, after.keeper_pid, after.kept
            ));
            Ok(())
        }
        State::PutBack => Err(Failure::refused(format!(
            "the new program was put back: {}; version {} runs on, {} processes kept",
            last.message, after.keeper_version, after.kept
        ))),
        State::Stuck => Err(Failure::refused(last.message)
            .next(format!("mend {} and restart the agent; services go on", after.program))),
        State::Unspecified | State::Trying => {
            Err(Failure::new(Exit::Unknown, "the keeper does not know how the upgrade came out"))
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "this command has no runtime and nothing else to do")]
fn pause() {
    sleep(STEP);
}
