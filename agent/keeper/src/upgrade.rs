//! Becoming another build, and going back when it does not prove itself.
//!
//! Whoever asks (`nave agent upgrade`) has put the new program and a copy of ours beside ours. What is tried is noted
//! in `<data_dir>/keeper.upgrade`; then the new one is renamed over ours and executed in our place: same pid,
//! children, stored descriptors. The new image is on trial until an agent that it started itself has taken over and
//! stayed. An image that cannot start, whose agents end, or whose time is up puts the old program back and becomes
//! that. One that dies on trial is found out by the next keeper, from the same file.

use std::io;
use std::path::{Path, PathBuf};

use nave_proto::pb;
use pb::KeeperErrorKind as Kind;
use pb::KeeperUpgradeState as State;
use pb::keeper_reply::Reply;

use crate::clock::{MS, SECOND, boottime_ns, unix_ns};
use crate::handover::{self, Taken};
use crate::keeper::{Keeper, Source};
use crate::kept::{Asker, Phase};
use crate::output::Output;
use crate::record::RecordFile;
use crate::signal::{refusal, system};

/// For a new agent to come, take over and stay: it needs a second, and the one before may take 20 to end.
const TRIAL_MS: u64 = 30_000;
/// An agent that has taken over and is still there after this has come to stay.
const STAY_NS: i64 = 3 * SECOND;
/// Agents of the new program that may end before it is given up.
const AGENTS_MAX: u32 = 3;

/// What the loop knows of upgrades: the last one, and the one that is to be made.
#[derive(Debug)]
pub(crate) struct Upgrade {
    file: RecordFile,
    last: Option<pb::KeeperUpgradeRecord>,
    pub(crate) wanted: Option<Wanted>,
    trial: Option<Trial>,
}

/// Which program to become, as soon as no stub is on its way to exec.
#[derive(Debug)]
pub(crate) enum Wanted {
    /// The one now at our path (SIGUSR2).
    Again,
    /// The staged one.
    Staged { asker: Asker, upgrade: pb::KeeperUpgrade },
    /// The one before, for this reason.
    Previous(String),
}

#[derive(Debug)]
struct Trial {
    until: i64,
    /// An agent that we started has taken over at this time.
    agent_since: Option<i64>,
    agents_ended: u32,
}

impl Upgrade {
    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be opened or read.
    pub(crate) fn open(data_dir: &Path) -> io::Result<Self> {
        let (file, loaded) = RecordFile::open(&data_dir.join("keeper.upgrade"))?;
        let last = loaded.records.into_iter().next_back();
        Ok(Self { file, last, wanted: None, trial: None })
    }

    fn is_trying(&self) -> bool {
        self.last.as_ref().is_some_and(|last| last.state() == State::Trying)
    }

    fn note(&mut self, record: pb::KeeperUpgradeRecord) -> io::Result<()> {
        self.file.replace(std::slice::from_ref(&record))?;
        self.last = Some(record);
        Ok(())
    }

    /// How the last one came out. A file that cannot be written costs a wrong account of it, no more.
    fn note_end(&mut self, state: State, message: String) {
        self.trial = None;
        let Some(mut record) = self.last.clone() else { return };
        record.set_state(state);
        record.message = message;
        if let Err(error) = self.note(record) {
            crate::say!("the end of the upgrade cannot be noted: {error}");
        }
    }

    /// When [`Keeper::tend_trial`] has something to do.
    pub(crate) fn wake_at(&self) -> Option<i64> {
        let trial = self.trial.as_ref().filter(|_| self.wanted.is_none())?;
        Some(trial.agent_since.map_or(trial.until, |since| since + STAY_NS).min(trial.until))
    }

    /// The agent that we started has asked what runs: it takes over.
    pub(crate) fn agent_took_over(&mut self) {
        if let Some(trial) = &mut self.trial {
            trial.agent_since.get_or_insert_with(boottime_ns);
        }
    }

    /// An agent that we started has ended.
    pub(crate) fn agent_ended(&mut self) {
        if let Some(trial) = &mut self.trial {
            trial.agent_since = None;
            trial.agents_ended += 1;
            if trial.agents_ended >= AGENTS_MAX && self.wanted.is_none() {
                self.wanted = Some(Wanted::Previous("its agent did not stay".to_owned()));
            }
        }
    }
}

/// A keeper that could not start: the image before, when this one is on trial, else the error.
pub(crate) fn fall_back(data_dir: &Path, spare: Option<&Taken>, why: &dyn std::error::Error) {
    let Ok(mut upgrade) = Upgrade::open(data_dir) else { return };
    if !upgrade.is_trying() {
        return;
    }
    let message = match why.source() {
        Some(source) => format!("it could not start: {why}: {source}"),
        None => format!("it could not start: {why}"),
    };
    if let Some(program) = upgrade.put_back(&message) {
        let error = match spare {
            Some(taken) => taken.pass_on(&program),
            None => handover::become_plainly(&program),
        };
        upgrade.note_end(State::Stuck, format!("{message}; the old one cannot be started: {error}"));
    }
}

impl Upgrade {
    /// Puts the old program at its path and notes why. `None`: it could not be, which is noted as well.
    fn put_back(&mut self, why: &str) -> Option<PathBuf> {
        let last = self.last.clone()?;
        let program = PathBuf::from(&last.program);
        crate::say!("the new program is given up: {why}; the old one is put back");
        match std::fs::rename(&last.previous, &program) {
            Ok(()) => {
                self.note_end(State::PutBack, why.to_owned());
                Some(program)
            }
            Err(error) => {
                let message = format!("{why}; {} cannot be put back: {error}", last.previous);
                crate::say!("{message}");
                self.note_end(State::Stuck, message);
                None
            }
        }
    }

    /// At a keeper's start. The image that an upgrade led to begins its trial; one that finds an upgrade on trial
    /// without having been handed anything follows a keeper that died on it, and becomes the image before.
    pub(crate) fn begin(&mut self, handed_over: bool) {
        if !self.is_trying() {
            return;
        }
        if !handed_over && let Some(program) = self.put_back("its keeper ended while it was on trial") {
            let error = handover::become_plainly(&program);
            self.note_end(State::Stuck, format!("the old program cannot be started: {error}"));
        }
        let Some(last) = self.last.as_mut().filter(|last| last.state() == State::Trying) else { return };
        last.to_version = env!("CARGO_PKG_VERSION").to_owned();
        let trial_ms = if last.trial_ms == 0 { TRIAL_MS } else { last.trial_ms };
        let until =
            boottime_ns().saturating_add(i64::try_from(trial_ms).unwrap_or(i64::MAX / MS).saturating_mul(MS));
        self.trial = Some(Trial { until, agent_since: None, agents_ended: 0 });
    }
}

impl Keeper {
    /// Takes the order for an upgrade; it is carried out once no stub is on its way.
    ///
    /// # Errors
    /// `BUSY` while one is under way, `INVALID` for files that cannot be used.
    pub(crate) fn ask_upgrade(
        &mut self,
        asker: Asker,
        upgrade: pb::KeeperUpgrade,
    ) -> Result<(), pb::KeeperError> {
        if self.upgrade.wanted.is_some() || self.upgrade.trial.is_some() {
            return Err(refusal(Kind::Busy, "an upgrade is under way"));
        }
        if self.is_stopping() {
            return Err(refusal(Kind::Invalid, "the keeper is being shut down"));
        }
        for path in [&upgrade.staged, &upgrade.previous].map(Path::new) {
            if path.parent() != self.program.parent() || !path.is_file() {
                let beside = self.program.display();
                let message = format!("{} is no file beside {beside}", path.display());
                return Err(refusal(Kind::Invalid, message));
            }
        }
        self.upgrade.wanted = Some(Wanted::Staged { asker, upgrade });
        Ok(())
    }

    /// What anybody may know.
    pub(crate) fn status(&self) -> pb::KeeperStatus {
        let kept = self.table.values().filter(|kept| kept.process().is_some()).count();
        pb::KeeperStatus {
            keeper_version: env!("CARGO_PKG_VERSION").to_owned(),
            keeper_pid: std::process::id(),
            program: self.program.display().to_string(),
            handover_version: handover::VERSION,
            agent_pid: self.agent.pid().unwrap_or(0),
            kept: u32::try_from(kept).unwrap_or(u32::MAX),
            last_upgrade: self.upgrade.last.clone(),
        }
    }

    /// Becomes another image when that is wanted and nothing stands in its way. Waits for stubs on their way to exec,
    /// whose channels would be lost.
    pub(crate) fn upgrade(&mut self) {
        if self.is_stopping() || self.table.values().any(|kept| matches!(kept.phase, Phase::Starting(..))) {
            return;
        }
        match self.upgrade.wanted.take() {
            None => {}
            Some(Wanted::Again) => {
                let error = self.become_program();
                crate::say!("cannot become {}, going on as before: {error}", self.program.display());
            }
            Some(Wanted::Staged { asker, upgrade }) => {
                let error = self.try_staged(&upgrade);
                crate::say!("no upgrade, going on as before: {}", error.message);
                self.reply(asker, Reply::Error(error), None);
            }
            Some(Wanted::Previous(why)) => {
                let Some(program) = self.upgrade.put_back(&why) else { return };
                // The image before starts its own.
                self.agent.kill();
                self.program = program;
                let error = self.become_program();
                self.upgrade
                    .note_end(State::Stuck, format!("{why}; the old program cannot be started: {error}"));
            }
        }
    }

    /// Returns only when it failed; then everything is as before.
    fn try_staged(&mut self, upgrade: &pb::KeeperUpgrade) -> pb::KeeperError {
        let program = self.program.display().to_string();
        let mut record = pb::KeeperUpgradeRecord {
            program,
            previous: upgrade.previous.clone(),
            from_version: env!("CARGO_PKG_VERSION").to_owned(),
            began_unix_ns: unix_ns(),
            trial_ms: upgrade.trial_ms,
            ..Default::default()
        };
        record.set_state(State::Trying);
        if let Err(error) = self.upgrade.note(record) {
            return system("the upgrade cannot be noted", &error);
        }
        if let Err(error) = std::fs::rename(&upgrade.staged, &self.program) {
            self.upgrade.note_end(State::PutBack, format!("it could not be put in place: {error}"));
            return system("the new program cannot be put in place", &error);
        }
        let error = self.become_program();
        let message = format!("it cannot be executed: {error}");
        match self.upgrade.put_back(&message) {
            Some(_) => system("the new program cannot be executed", &error),
            None => refusal(Kind::System, format!("{message}, and the old one could not be put back")),
        }
    }

    /// Becomes what is at our path. Returns only when that failed; then we go on as before.
    fn become_program(&mut self) -> io::Error {
        self.commit_exits();
        self.ledger.catch_up();
        if self.exits.undurable() || self.ledger.behind() {
            // They are in our memory alone.
            return io::Error::new(io::ErrorKind::StorageFull, "exit records or ledger cannot be written");
        }
        let fresh = match Output::start() {
            Ok(fresh) => fresh,
            Err(error) => return error,
        };
        // What has been read is written before; what has not is in the FIFOs.
        std::mem::replace(&mut self.output, fresh).stop();
        if self.agent_connection.is_some() {
            self.report_dropped();
        }
        let error = handover::become_program(
            &self.program,
            &self.listener,
            &self.lock,
            &self.descriptors,
            self.open_files_soft,
        );
        self.watch(&self.output.descriptor(), Source::Output);
        self.reopen_logs();
        error
    }

    /// Ends a trial whose time has come, well or badly.
    pub(crate) fn tend_trial(&mut self, now: i64) {
        if self.upgrade.wake_at().is_none_or(|at| at > now) {
            return;
        }
        let Some(trial) = &self.upgrade.trial else { return };
        let stayed = trial.agent_since.is_some_and(|since| now - since >= STAY_NS);
        if stayed || self.agent.is_off() {
            crate::say!("upgraded to version {}", env!("CARGO_PKG_VERSION"));
            self.upgrade.note_end(State::Kept, String::new());
        } else {
            self.upgrade.wanted = Some(Wanted::Previous("its agent did not take over in time".to_owned()));
        }
    }
}
