//! The loop: one thread, one epoll, everything that can happen as a [`Source`].
//!
//! A turn handles what is ready, then what is due, then writes and tells the exits of the turn. Nothing in it waits
//! for anyone but the disk of the exit records. Starting up is in `start`, requests in `request`, timers in `due`.

mod due;
mod listen;
mod request;
mod start;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use nave_proto::pb;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signalfd::SignalFd;
use nix::sys::timerfd::TimerFd;
use pb::keeper_reply::Reply;

use crate::agent::Agent;
use crate::ahead::Ahead;
use crate::clock::boottime_ns;
use crate::connection::Connection;
use crate::descriptors::Descriptors;
use crate::exits::Exits;
use crate::handover;
use crate::kept::{Asker, Kept};
use crate::ledger::{Key, Ledger};
use crate::memory;
use crate::output::{Event, OpenLog, Output};
use crate::upgrade::{self, Upgrade, Wanted};
use crate::{KeeperError, KeeperOptions};

/// Peers at a time: an agent, the one before it, and a few commands.
const CONNECTIONS_MAX: usize = 16;

/// Everything a keeper has.
#[derive(Debug)]
pub(crate) struct Keeper {
    pub(crate) data_dir: PathBuf,
    pub(crate) socket: PathBuf,
    pub(crate) lock: OwnedFd,
    /// Of this program, for becoming its successor.
    pub(crate) program: PathBuf,
    pub(crate) stub_command: Vec<OsString>,
    /// None: not needed yet, or it has ended.
    pub(crate) ahead: Option<Ahead>,
    pub(crate) boot_id: String,
    /// The soft limit of open files before the keeper raised its own; 0: unknown.
    pub(crate) open_files_soft: u64,

    pub(crate) epoll: Epoll,
    pub(crate) signals: SignalFd,
    pub(crate) timer: TimerFd,
    pub(crate) timer_at: Option<i64>,
    pub(crate) listener: UnixListener,
    pub(crate) connections: BTreeMap<u32, Connection>,
    pub(crate) last_connection: u32,
    pub(crate) agent_connection: Option<u32>,

    pub(crate) table: BTreeMap<Key, Kept>,
    /// Of processes whose end is not known yet.
    pub(crate) pids: BTreeMap<u32, Key>,
    pub(crate) ledger: Ledger,
    pub(crate) exits: Exits,
    /// Exits up to this one are in the ledger.
    pub(crate) noted_sequence: u64,
    /// Exits up to this one were sent on the agent's connection.
    pub(crate) told_sequence: u64,
    pub(crate) exits_retry_at: i64,
    pub(crate) ledger_retry_at: i64,

    pub(crate) output: Output,
    /// By directory.
    pub(crate) logs: BTreeMap<String, OpenLog>,
    pub(crate) dropped_report_at: Option<i64>,
    pub(crate) descriptors: Descriptors,
    /// Those that we read ourselves, by what the loop calls them.
    pub(crate) ears: BTreeMap<u32, String>,
    pub(crate) last_ear: u32,
    pub(crate) agent: Agent,
    pub(crate) mode: Mode,
    pub(crate) upgrade: Upgrade,
    /// What was not whole of its own files, each a sentence for people.
    pub(crate) damages: Vec<String>,
    /// When to let go of memory: set by what happens, so that nothing happens in an idle keeper.
    pub(crate) slim_at: Option<i64>,
}

#[derive(Debug)]
pub(crate) enum Mode {
    Running,
    Stopping(Stopping),
}

/// On the way to the end: services (if asked), their cgroups, the agent, then us.
#[derive(Debug)]
pub(crate) struct Stopping {
    asker: Option<Asker>,
    services: bool,
    /// The agent ends the services until then; the grace that what is left gets after it.
    orderly: Option<(i64, i64)>,
    look_at: i64,
    /// Empty cgroup directories that will not go are left after this.
    cgroups_until: i64,
}

/// What an epoll event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Signals,
    Listener,
    Timer,
    Output,
    /// An agent that is not our child has ended.
    Agent,
    Connection(u32),
    /// A process that is not our child has ended.
    Process(u32),
    /// The stub of this pid.
    Channel(u32),
    /// A socket that processes speak into.
    Ear(u32),
}

impl Source {
    pub(crate) fn token(self) -> u64 {
        let (kind, number) = match self {
            Self::Signals => (0, 0),
            Self::Listener => (1, 0),
            Self::Timer => (2, 0),
            Self::Output => (3, 0),
            Self::Agent => (4, 0),
            Self::Connection(number) => (5, number),
            Self::Process(number) => (6, number),
            Self::Channel(number) => (7, number),
            Self::Ear(number) => (8, number),
        };
        (kind << 32) | u64::from(number)
    }

    fn from_token(token: u64) -> Option<Self> {
        let number = u32::try_from(token & u64::from(u32::MAX)).ok()?;
        Some(match token >> 32 {
            0 => Self::Signals,
            1 => Self::Listener,
            2 => Self::Timer,
            3 => Self::Output,
            4 => Self::Agent,
            5 => Self::Connection(number),
            6 => Self::Process(number),
            7 => Self::Channel(number),
            8 => Self::Ear(number),
            _ => return None,
        })
    }
}

/// A keeper's whole life. One that follows on an upgrade and cannot start becomes the image before.
pub(crate) fn run(options: KeeperOptions, stub_command: Vec<OsString>) -> Result<(), KeeperError> {
    let data_dir = options.data_dir.clone();
    let taken =
        handover::take().map_err(cannot("take over from the keeper before")).inspect_err(|error| {
            upgrade::fall_back(&data_dir, None, error);
        })?;
    let spare = taken.as_ref().and_then(|taken| taken.try_clone().ok());
    let started = Keeper::start(options, stub_command, taken);
    let mut keeper = started.inspect_err(|error| {
        // Held by ourselves: a build that did not know what to do with the handover, which is still there.
        let ignored = matches!(error, KeeperError::Held { pid: Some(pid), .. } if *pid == std::process::id());
        if spare.is_some() || ignored {
            upgrade::fall_back(&data_dir, spare.as_ref(), error);
        }
    })?;
    drop(spare);
    keeper.turn_until_the_end();
    keeper.end();
    Ok(())
}

impl Keeper {
    fn turn_until_the_end(&mut self) {
        let mut ready = [EpollEvent::empty(); 32];
        // What happened before there was a loop.
        self.reap();
        let _ = memory::release_startup_pages();
        loop {
            self.do_what_is_due();
            self.commit_exits();
            if self.is_stopped() {
                return;
            }
            if self.upgrade.wanted.is_some() {
                self.upgrade();
            }
            self.set_timer();
            let count = match self.epoll.wait(&mut ready, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(error) => {
                    crate::say!("cannot wait for events: {error}");
                    return;
                }
            };
            for event in &ready[..count] {
                if let Some(source) = Source::from_token(event.data()) {
                    self.handle(source, event.events());
                }
            }
        }
    }

    fn handle(&mut self, source: Source, events: EpollFlags) {
        if source != Source::Timer && self.slim_at.is_none() {
            self.slim_at = Some(boottime_ns() + due::SLIM_AFTER_NS);
        }
        match source {
            Source::Signals => self.take_signals(),
            Source::Listener => self.accept(),
            Source::Timer => {
                let _ = self.timer.wait();
                self.timer_at = None;
            }
            Source::Output => self.hear_output(),
            Source::Agent => self.adopted_agent_ended(),
            Source::Connection(number) => self.serve(number, events),
            Source::Process(pid) => self.adopted_ended(pid),
            Source::Channel(pid) => self.hear_stub(pid),
            Source::Ear(number) => self.hear(number),
        }
    }

    fn take_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            match i32::try_from(signal.ssi_signo) {
                Ok(libc::SIGCHLD) => self.reap(),
                Ok(libc::SIGTERM | libc::SIGINT) => self.stop(None, false, 0, 0),
                Ok(libc::SIGUSR2) => {
                    self.upgrade.wanted.get_or_insert(Wanted::Again);
                }
                // SIGHUP: a closed terminal is no reason to do anything.
                Ok(_) | Err(_) => {}
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.connections.len() >= CONNECTIONS_MAX {
                continue;
            }
            let Ok(connection) = Connection::new(stream) else { continue };
            self.last_connection = self.last_connection.wrapping_add(1);
            self.watch(&connection.descriptor(), Source::Connection(self.last_connection));
            self.connections.insert(self.last_connection, connection);
        }
    }

    fn serve(&mut self, number: u32, events: EpollFlags) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        if events.contains(EpollFlags::EPOLLOUT) && connection.flush().is_err() {
            return self.disconnect(number);
        }
        if events.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            let mut alive = connection.fill().is_ok();
            // A request may end its own connection, or close another.
            while let Some(connection) = self.connections.get_mut(&number) {
                match connection.next_request() {
                    Ok(Some(request)) => self.answer(number, request),
                    Ok(None) => break,
                    Err(error) => {
                        crate::say!("a peer on the socket was cut off: {error}");
                        alive = false;
                        break;
                    }
                }
            }
            if !alive {
                return self.disconnect(number);
            }
        }
        self.watch_writing(number);
    }

    /// Waits for room to write exactly when something waits to be written.
    fn watch_writing(&mut self, number: u32) {
        if let Some(connection) = self.connections.get(&number) {
            let mut flags = EpollFlags::EPOLLIN;
            flags.set(EpollFlags::EPOLLOUT, connection.has_unsent());
            let mut event = EpollEvent::new(flags, Source::Connection(number).token());
            let _ = self.epoll.modify(connection.descriptor(), &mut event);
        }
    }

    fn disconnect(&mut self, number: u32) {
        if let Some(connection) = self.connections.remove(&number) {
            let _ = self.epoll.delete(connection.descriptor());
        }
        if self.agent_connection == Some(number) {
            self.agent_connection = None;
            self.open_ears();
        }
    }

    /// Sends on a connection, if it still is one.
    pub(crate) fn send(&mut self, number: u32, reply: &pb::KeeperReply, descriptor: Option<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&number) else { return };
        match connection.send(reply, descriptor) {
            Ok(()) if connection.has_unsent() => self.watch_writing(number),
            Ok(()) => {}
            Err(_) => self.disconnect(number),
        }
    }

    pub(crate) fn reply(&mut self, asker: Asker, reply: Reply, descriptor: Option<OwnedFd>) {
        self.send(asker.connection, &pb::KeeperReply { id: asker.id, reply: Some(reply) }, descriptor);
    }

    pub(crate) fn watch(&self, fd: &impl AsFd, source: Source) {
        if let Err(error) = self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, source.token())) {
            crate::say!("cannot watch {source:?}: {error}");
        }
    }

    pub(crate) fn identity_of(&self, pid: u32, start_ticks: u64, cgroup_id: u64) -> pb::ProcessIdentity {
        pb::ProcessIdentity { pid, start_ticks, boot_id: self.boot_id.clone(), cgroup_id }
    }

    fn hear_output(&mut self) {
        while let Some(Event::Closed(log)) = self.output.take_event() {
            self.log_closed(log);
        }
        if self.output.take_dropped() && self.dropped_report_at.is_none() {
            self.dropped_report_at = Some(boottime_ns() + due::DROPPED_REPORT_NS);
        }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        matches!(self.mode, Mode::Stopping(_))
    }

    /// Reads the logs of all that is kept.
    pub(crate) fn reopen_logs(&mut self) {
        self.logs.clear();
        let spawns: Vec<pb::Spawn> = self.table.values().map(|kept| kept.spawn.clone()).collect();
        for spawn in spawns {
            if let Err(error) = self.open_log(&spawn) {
                crate::say!("output of {} in {} cannot be read: {error}", spawn.service, spawn.log_dir);
            }
        }
    }

    /// Leaves no trace but what the next keeper needs.
    fn end(self) {
        self.output.stop();
        let _ = std::fs::remove_file(&self.socket);
        let _ = std::fs::remove_file(self.data_dir.join("keeper.pid"));
    }
}

/// For `?` on what the keeper cannot do without.
fn cannot(what: &'static str) -> impl FnOnce(io::Error) -> KeeperError {
    move |source| KeeperError::System { what, source }
}
