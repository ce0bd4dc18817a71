//! The agent as the keeper's child: started, started again, never two at a time.
//!
//! A keeper that takes over from one that was killed finds that one's agent still running. It adopts it, so that open
//! traffic goes on; one that does not say hello in time is ended and replaced.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nave_proto::pb;
use pb::keeper_ledger_record::Record;

use crate::clock::{MS, SECOND, boottime_ns};
use crate::identity::{self, Found, Stat};
use crate::keeper::{Keeper, Source};
use crate::reap::describe_status;
use crate::sys;

const FIRST_DELAY_NS: i64 = 100 * MS;
const LAST_DELAY_NS: i64 = 5 * SECOND;
/// Having run this long, it is started at once the next time: it has taken everything up and served, and each moment
/// without it is one in which its host's calls wait.
const STEADY_NS: i64 = 2 * SECOND;
/// For an adopted agent to find the new keeper's socket.
const HELLO_WITHIN_NS: i64 = 10 * SECOND;
/// From SIGTERM to SIGKILL: its streams drain, its spool is flushed.
const GRACE_NS: i64 = 10 * SECOND;

/// The agent's process, or the wait for the next one.
#[derive(Debug)]
pub(crate) struct Agent {
    command: Vec<OsString>,
    state: State,
    /// Before the next start.
    delay_ns: i64,
    stopping: bool,
    /// It ends by itself, after its services.
    rests: bool,
}

#[derive(Debug)]
enum State {
    /// None, and none to come.
    Off,
    Waiting {
        until: i64,
    },
    Running {
        pid: u32,
        pidfd: OwnedFd,
        since: i64,
        /// Started by this image of the keeper.
        ours: bool,
        /// When it is signalled next: an adopted one without a hello, or one that is being stopped.
        signal_at: Option<i64>,
        termed: bool,
    },
}

impl Agent {
    pub(crate) fn new(command: Vec<OsString>) -> Self {
        let state = if command.is_empty() { State::Off } else { State::Waiting { until: 0 } };
        Self { command, state, delay_ns: 0, stopping: false, rests: false }
    }

    pub(crate) fn pid(&self) -> Option<u32> {
        match &self.state {
            State::Running { pid, .. } => Some(*pid),
            State::Off | State::Waiting { .. } => None,
        }
    }

    /// Whether it is gone and stays so.
    pub(crate) fn is_off(&self) -> bool {
        matches!(self.state, State::Off)
    }

    /// When [`Keeper::tend_agent`] has something to do.
    pub(crate) fn wake_at(&self) -> Option<i64> {
        match &self.state {
            State::Off => None,
            State::Waiting { until } => Some(*until),
            State::Running { signal_at, .. } => *signal_at,
        }
    }

    /// It has found us.
    pub(crate) fn said_hello(&mut self) {
        if let State::Running { signal_at, termed: false, .. } = &mut self.state {
            *signal_at = None;
        }
    }

    /// Whether this image of the keeper has started it.
    pub(crate) fn is_ours(&self) -> bool {
        matches!(self.state, State::Running { ours: true, .. })
    }

    /// Ends it at once; another follows.
    pub(crate) fn kill(&self) {
        if let State::Running { pidfd, .. } = &self.state {
            let _ = sys::pidfd_signal(pidfd.as_fd(), libc::SIGKILL, false);
        }
    }

    /// Has it end all services as their manifests say, and then itself, for good. `false`: there is none. One of a build
    /// that does not know the signal ends of it, and the rest is ours as ever.
    pub(crate) fn rest(&mut self) -> bool {
        let State::Running { pidfd, termed: false, signal_at, .. } = &mut self.state else { return false };
        *signal_at = None;
        self.stopping = true;
        self.rests = true;
        sys::pidfd_signal(pidfd.as_fd(), libc::SIGUSR1, false).is_ok()
    }

    /// Ends it for good.
    pub(crate) fn stop(&mut self) {
        if self.stopping && !std::mem::take(&mut self.rests) {
            return;
        }
        self.stopping = true;
        match &mut self.state {
            State::Running { signal_at, .. } => *signal_at = Some(0),
            State::Off | State::Waiting { .. } => self.state = State::Off,
        }
    }

    fn start(&self) -> io::Result<(u32, OwnedFd)> {
        let (program, arguments) = self.command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        // A group of its own: a Ctrl-C on the keeper's terminal reaches the keeper, which decides what that means.
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).process_group(0);
        let child = sys::with_default_signals(&mut command).spawn()?;
        let pid = child.id();
        Ok((pid, sys::pidfd_open(pid)?))
    }

    fn ended(&mut self, now: i64) {
        if let State::Running { since, .. } = &self.state
            && now - since >= STEADY_NS
        {
            self.delay_ns = 0;
        }
        self.wait(now);
    }

    fn wait(&mut self, now: i64) {
        if self.stopping {
            self.state = State::Off;
            return;
        }
        self.state = State::Waiting { until: now + self.delay_ns };
        self.delay_ns =
            if self.delay_ns == 0 { FIRST_DELAY_NS } else { (2 * self.delay_ns).min(LAST_DELAY_NS) };
    }
}

impl Keeper {
    /// Looks for the agent that the ledger knows.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub(crate) fn adopt_agent(&mut self) -> io::Result<()> {
        let Some(identity) = self.ledger.content().agent.clone() else { return Ok(()) };
        if self.agent.is_off() || identity.boot_id != self.boot_id {
            return Ok(());
        }
        let Found::Running(pidfd, stat) = identity::find(&identity)? else { return Ok(()) };
        let now = boottime_ns();
        if stat.parent != std::process::id() {
            self.watch(&pidfd, Source::Agent);
        }
        self.agent.state = State::Running {
            pid: identity.pid,
            pidfd,
            since: now,
            ours: false,
            signal_at: Some(if runs(identity.pid, &self.agent.command) {
                now + HELLO_WITHIN_NS
            } else {
                now
            }),
            termed: false,
        };
        Ok(())
    }

    /// Starts or signals the agent when it is time to.
    pub(crate) fn tend_agent(&mut self, now: i64) {
        if self.agent.wake_at().is_none_or(|at| at > now) {
            return;
        }
        match &mut self.agent.state {
            State::Off => {}
            State::Waiting { .. } => self.start_agent(now),
            State::Running { pid, pidfd, signal_at, termed, .. } => {
                let signal = if *termed { libc::SIGKILL } else { libc::SIGTERM };
                if !self.agent.stopping && !*termed {
                    crate::say!(
                        "agent {pid} was adopted and has not said hello, or is of another program; it is being replaced"
                    );
                }
                let _ = sys::pidfd_signal(pidfd.as_fd(), signal, false);
                *termed = true;
                *signal_at = Some(now + GRACE_NS);
            }
        }
    }

    fn start_agent(&mut self, now: i64) {
        match self.agent.start() {
            Ok((pid, pidfd)) => {
                // A keeper killed before this line leaves an agent that the next one does not know; it ends with its
                // connection, which the next agent's hello cuts.
                let start_ticks = Stat::read(pid).map_or(0, |stat| stat.start_ticks);
                self.ledger.note(Record::Agent(self.identity_of(pid, start_ticks, 0)));
                self.agent.state =
                    State::Running { pid, pidfd, since: now, ours: true, signal_at: None, termed: false };
            }
            Err(error) => {
                let program = self.agent.command.first().map(|program| program.to_string_lossy());
                crate::say!("cannot start the agent {}: {error}", program.unwrap_or_default());
                self.agent.wait(now);
            }
        }
    }

    fn note_trial(&mut self) {
        if self.agent.is_ours() {
            self.upgrade.agent_ended();
        }
    }

    /// It was reaped.
    pub(crate) fn agent_ended(&mut self, status: i32) {
        self.note_trial();
        if !self.agent.stopping {
            crate::say!("agent {}, starting it again", describe_status(status));
        }
        self.agent.ended(boottime_ns());
    }

    /// An adopted one's descriptor says that it has ended.
    pub(crate) fn adopted_agent_ended(&mut self) {
        if let State::Running { pidfd, .. } = &self.agent.state {
            let _ = self.epoll.delete(pidfd);
            if !self.agent.stopping {
                crate::say!("agent ended, starting it again");
            }
            self.agent.ended(boottime_ns());
        }
    }
}

/// Whether a process runs the program that the agent is started with. One that was replaced on the disk since is
/// another. Where the command is no path, or nothing can be seen, it is believed to.
fn runs(pid: u32, command: &[OsString]) -> bool {
    let Some(program) = command.first().map(Path::new).filter(|program| program.is_absolute()) else {
        return true;
    };
    match (std::fs::metadata(format!("/proc/{pid}/exe")), std::fs::metadata(program)) {
        (Ok(running), Ok(wanted)) => (running.dev(), running.ino()) == (wanted.dev(), wanted.ino()),
        (Err(_), _) | (_, Err(_)) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_come_at_once_then_ever_later_and_at_once_again_after_a_steady_run() {
        let mut agent = Agent::new(vec!["agent".into()]);
        let mut waits = Vec::new();
        let mut run = |agent: &mut Agent, ran: i64| {
            let pidfd = sys::pidfd_open(std::process::id()).unwrap();
            agent.state =
                State::Running { pid: 1, pidfd, since: 100, ours: true, signal_at: None, termed: false };
            agent.ended(100 + ran);
            waits.push((agent.wake_at().unwrap() - 100 - ran) / MS);
        };
        for _ in 0..9 {
            run(&mut agent, 0);
        }
        run(&mut agent, STEADY_NS);
        run(&mut agent, 0);
        assert_eq!(waits, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 0, 100]);
    }
}
