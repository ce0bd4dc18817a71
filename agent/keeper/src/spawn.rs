//! Starting a process: directories, output, orders, fork, and the word of the stub.
//!
//! Nothing here waits. The stub is let go once the ledger knows it, reports through its channel, and is killed when it
//! takes too long. Every spawn that is not refused (`BUSY`, `INVALID`) has exactly one exit record in the end, also
//! when nothing could be started.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nave_proto::pb;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use pb::KeeperErrorKind as Kind;
use pb::keeper_ledger_record::Record;
use pb::keeper_reply::Reply;
use prost::Message;

use crate::ahead::{Ahead, Start};
use crate::cgroup;
use crate::clock::{SECOND, boottime_ns, unix_ns};
use crate::fifo;
use crate::handover;
use crate::identity::Stat;
use crate::keeper::{Keeper, Source};
use crate::kept::{Asker, Ended, Kept, Phase, Process, Starting, log_limits};
use crate::ledger::{Key, strip};
use crate::oom::Oom;
use crate::signal::refusal;
use crate::stub::{Failure, Step};
use crate::sys;

/// From fork to exec it takes some milliseconds; a stub that takes this long hangs in a file system.
const EXEC_TIMEOUT_NS: i64 = 10 * SECOND;

impl Keeper {
    /// Starts a process; the reply comes when its program runs or cannot.
    ///
    /// # Errors
    /// `BUSY` and `INVALID`: nothing was done, and no exit record follows.
    pub(crate) fn spawn(&mut self, asker: Asker, mut spawn: pb::Spawn) -> Result<(), pb::KeeperError> {
        self.check_spawn(&spawn)?;
        if self.open_files_soft != 0
            && !spawn.rlimits.iter().any(|limit| limit.resource == libc::RLIMIT_NOFILE)
            && let Ok((_, hard)) = sys::resource_limit(libc::RLIMIT_NOFILE)
        {
            // The keeper raised its own; a program that uses select() must not inherit that.
            let (resource, soft) = (libc::RLIMIT_NOFILE, self.open_files_soft);
            spawn.rlimits.push(pb::Rlimit { resource, soft, hard });
        }
        let key = Key { instance_id: spawn.instance_id, epoch: spawn.epoch };
        let started = self.fork_stub(&spawn);
        strip(&mut spawn);
        let before = self.table.remove(&key);
        let deadline = spawn.deadline.or_else(|| before.and_then(|before| before.deadline));
        let kept = |phase| Kept {
            spawn: spawn.clone(),
            phase,
            deadline,
            deadline_begun: false,
            ladder: None,
            forgetting: None,
        };
        match started {
            Ok((process, channel)) => {
                self.note_started(&spawn, &process.identity, process.started_unix_ns, process.oom.note());
                self.pids.insert(process.identity.pid, key);
                self.watch(&channel, Source::Channel(process.identity.pid));
                // Noted: let it go.
                let _ = sys::send(channel.as_fd(), b"!", &[]);
                let give_up_at = process.started_boottime_ns + EXEC_TIMEOUT_NS;
                let starting = Starting { channel, asker: Some(asker), give_up_at, failure: None };
                self.table.insert(key, kept(Phase::Starting(process, starting)));
            }
            Err(failure) => {
                let identity = self.identity_of(0, 0, cgroup::id(&spawn).unwrap_or(0));
                let now = unix_ns();
                self.note_started(&spawn, &identity, now, 0);
                let ended = Ended { process: identity, started_unix_ns: now, stranger: false };
                self.table.insert(key, kept(Phase::Ended(ended)));
                self.add_exit(pb::ExitRecord {
                    started_unix_ns: now,
                    ended_unix_ns: now,
                    ..never_ran(&spawn, &failure)
                });
                self.reply(asker, Reply::Error(exec_error(&failure)), None);
            }
        }
        Ok(())
    }

    fn note_started(
        &mut self,
        spawn: &pb::Spawn,
        process: &pb::ProcessIdentity,
        started_unix_ns: i64,
        oom_kills: u64,
    ) {
        let spawn = Some(spawn.clone());
        self.ledger.note(Record::Started(pb::KeptSpawn {
            spawn,
            process: Some(process.clone()),
            started_unix_ns,
            oom_kills,
        }));
    }

    fn check_spawn(&self, spawn: &pb::Spawn) -> Result<(), pb::KeeperError> {
        let invalid = |message: &str| Err(refusal(Kind::Invalid, message));
        let busy = |message: String| Err(refusal(Kind::Busy, message));
        let paths = [&spawn.cgroup2, &spawn.log_dir, &spawn.working_dir, &spawn.notify_fifo];
        if spawn.argv.first().is_none_or(String::is_empty) {
            return invalid("argv names no program");
        }
        if spawn.argv.iter().chain(&spawn.env).chain(paths).any(|text| text.contains('\0')) {
            return invalid("argv, env or a path has a zero byte");
        }
        if paths.into_iter().chain(&spawn.cgroup1).any(|path| !path.is_empty() && !path.starts_with('/')) {
            return invalid("a path is not absolute");
        }
        if self.is_stopping() {
            return invalid("the keeper is being shut down");
        }
        let has_passed = |deadline: pb::SetDeadline| deadline.boottime_ns <= boottime_ns();
        if spawn.deadline.is_some_and(has_passed) {
            return invalid("its deadline has passed");
        }
        let (instance, epoch, attempt) = (spawn.instance_id, spawn.epoch, spawn.attempt);
        for (key, kept) in self.table.iter().filter(|(key, _)| key.instance_id == instance) {
            if let Some(process) = kept.process() {
                return busy(format!("instance {instance} runs already, with pid {}", process.identity.pid));
            }
            if key.epoch != epoch {
                continue;
            }
            if kept.spawn.attempt >= attempt {
                return busy(format!(
                    "attempt {} of instance {instance} was made already",
                    kept.spawn.attempt
                ));
            }
            if kept.forgetting.is_some() {
                return busy(format!("instance {instance} is being forgotten"));
            }
            if spawn.deadline.is_none() && kept.deadline.is_some_and(has_passed) {
                return invalid("its deadline has passed");
            }
        }
        if self.exits.holds(instance, epoch, attempt) {
            return busy(format!("attempt {attempt} of instance {instance} has ended already"));
        }
        if cgroup::is_populated(spawn) {
            // Killing is for what is proven to be ours; the rest is for a person to look at.
            let ours = |kept: &&Kept| kept.spawn.cgroup2 == spawn.cgroup2 && kept.is_leftover();
            let count = cgroup::members(spawn).len();
            return busy(match self.table.values().find(ours) {
                Some(leftover) => {
                    cgroup::signal(&leftover.spawn, libc::SIGKILL);
                    format!(
                        "{count} processes of the last attempt are still there; they are being killed, try again"
                    )
                }
                // Their record is lost. Nobody but this instance has a cgroup of this name.
                None if cgroup::is_own(spawn) => {
                    cgroup::signal(spawn, libc::SIGKILL);
                    format!(
                        "{count} processes that no keeper noted are in its cgroup; they are being killed, try again"
                    )
                }
                None => format!("cgroup {} holds {count} processes that no keeper noted", spawn.cgroup2),
            });
        }
        Ok(())
    }

    fn fork_stub(&mut self, spawn: &pb::Spawn) -> Result<(Process, OwnedFd), Failure> {
        let way = cgroup::make_way(spawn);
        let cgroup_id =
            cgroup::create(spawn).map_err(|(dir, error)| Failure::new(Step::CgroupMake, error, dir))?;
        let [stdout, stderr] =
            self.output_for(spawn).map_err(|error| Failure::new(Step::Output, error, &spawn.log_dir))?;
        let stub = |error: io::Error| Failure::new(Step::Stub, error, "");
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|error| stub(error.into()))?;
        set_nonblocking(&ours).map_err(stub)?;
        let orders = pb::ExecOrders {
            spawn: Some(spawn.clone()),
            error_fd: number(&theirs),
            stdout_fd: number(&stdout),
            stderr_fd: number(&stderr),
            beside: None,
            alone: false,
        };
        let memory = handover::sealed("nave-exec-orders", &orders.encode_to_vec()).map_err(stub)?;
        let argv: Vec<CString> = self
            .stub_command
            .iter()
            .map(|argument| argument.as_bytes().to_vec())
            .chain([number(&memory).to_string().into_bytes()])
            .map(CString::new)
            .collect::<Result<_, _>>()
            .map_err(|_| stub(io::ErrorKind::InvalidInput.into()))?;
        let oom = Oom::new(spawn, None);
        let inherit = [memory.as_fd(), theirs.as_fd(), stdout.as_fd(), stderr.as_fd()];
        let group = cgroup::open(spawn, &way);
        let group = group.as_ref().map(AsFd::as_fd);
        let start = Start {
            orders: memory.as_fd(),
            channel: theirs.as_fd(),
            output: [stdout.as_fd(), stderr.as_fd()],
            cgroup: group,
        };
        let pid = match self.copy_ahead(&start) {
            Some(pid) => pid,
            None => sys::fork_exec(&argv[0], &argv, &inherit, group, theirs.as_fd(), Step::Stub as u8)
                .map_err(stub)?,
        };
        // From here on a failure drops our end of the channel, which ends the stub.
        let pidfd = sys::pidfd_open(pid).map_err(stub)?;
        let stat = Stat::read(pid).map_err(stub)?;
        let process = Process {
            identity: self.identity_of(pid, stat.start_ticks, cgroup_id),
            pidfd,
            adopted: false,
            started_unix_ns: unix_ns(),
            started_boottime_ns: boottime_ns(),
            cause: None,
            oom,
            unknown_at: None,
        };
        Ok((process, ours))
    }

    /// Of the stub that waits; when there is none, or it cannot, one is loaded for this start alone.
    fn copy_ahead(&mut self, start: &Start<'_>) -> Option<u32> {
        if self.ahead.is_none() {
            self.ahead = Ahead::start(&self.stub_command).ok();
        }
        match self.ahead.as_ref()?.copy(start) {
            Ok(pid) => Some(pid),
            Err(error) => {
                crate::say!("a process is started without the stub that waits: {error}");
                self.ahead = None;
                None
            }
        }
    }

    /// The two ends to write to, with a log behind them.
    fn output_for(&mut self, spawn: &pb::Spawn) -> io::Result<[OwnedFd; 2]> {
        if spawn.log_dir.is_empty() {
            let null = OwnedFd::from(OpenOptions::new().write(true).open("/dev/null")?);
            return Ok([null.try_clone()?, null]);
        }
        self.open_log(spawn)?;
        let owner = spawn.set_user.then_some((spawn.uid, spawn.gid));
        fifo::writing_ends(Path::new(&spawn.log_dir), owner)
    }

    /// Has the log of this spawn read, if it is not already.
    pub(crate) fn open_log(&mut self, spawn: &pb::Spawn) -> io::Result<()> {
        if !spawn.log_dir.is_empty() && !self.logs.contains_key(&spawn.log_dir) {
            let dir = Path::new(&spawn.log_dir);
            let log = self.output.open(dir, log_limits(spawn))?;
            self.logs.insert(spawn.log_dir.clone(), log);
        }
        Ok(())
    }

    /// Hears what a stub has to say, if anything.
    pub(crate) fn hear_stub(&mut self, pid: u32) {
        let Some(key) = self.pids.get(&pid).copied() else { return };
        let Some(kept) = self.table.get_mut(&key) else { return };
        let Phase::Starting(_, starting) = &mut kept.phase else { return };
        let mut report = [0; 2048];
        match sys::receive(starting.channel.as_fd(), &mut report) {
            Ok((0, _)) if starting.failure.is_none() => self.runs(key),
            Ok((count, _)) if count > 0 => {
                starting.failure = Failure::decode(&report[..count]);
                // Its end follows at once and has the reply with it; until then the socket would only wake us.
                let _ = self.epoll.delete(&starting.channel);
            }
            Ok(_) | Err(_) => {}
        }
    }

    /// The program runs: tell who asked.
    fn runs(&mut self, key: Key) {
        let Some(mut kept) = self.table.remove(&key) else { return };
        if let Phase::Starting(process, starting) = kept.phase {
            let _ = self.epoll.delete(&starting.channel);
            if let Some(asker) = starting.asker {
                let spawned = pb::Spawned {
                    process: Some(process.identity.clone()),
                    started_unix_ns: process.started_unix_ns,
                };
                self.reply(asker, Reply::Spawned(spawned), None);
            }
            kept.phase = Phase::Running(process);
        }
        self.table.insert(key, kept);
    }

    /// A stub that hangs is killed; its end is reported as a failure to start.
    pub(crate) fn give_up_stub(&mut self, key: Key) {
        let Some(kept) = self.table.get_mut(&key) else { return };
        let Phase::Starting(process, starting) = &mut kept.phase else { return };
        starting.give_up_at = i64::MAX;
        let _ = sys::pidfd_signal(process.pidfd.as_fd(), libc::SIGKILL, false);
        let failure =
            Failure::new(Step::Stub, io::Error::from_raw_os_error(libc::ETIMEDOUT), "(it hangs before exec)");
        let asker = starting.asker.take();
        let error = exec_error(&failure);
        starting.failure = Some(failure);
        if let Some(asker) = asker {
            self.reply(asker, Reply::Error(error), None);
        }
    }
}

/// The reply for a program that does not run.
pub(crate) fn exec_error(failure: &Failure) -> pb::KeeperError {
    pb::KeeperError { kind: Kind::Exec.into(), errno: failure.errno, message: failure.to_string() }
}

/// The exit record of a program that did not run, without its times.
pub(crate) fn never_ran(spawn: &pb::Spawn, failure: &Failure) -> pb::ExitRecord {
    pb::ExitRecord {
        instance_id: spawn.instance_id,
        service: spawn.service.clone(),
        epoch: spawn.epoch,
        attempt: spawn.attempt,
        cause: pb::ExitCause::ExecError.into(),
        errno: failure.errno,
        message: failure.to_string(),
        ..Default::default()
    }
}

fn number(fd: &OwnedFd) -> u32 {
    use std::os::fd::AsRawFd;
    fd.as_raw_fd().unsigned_abs()
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(())
}
