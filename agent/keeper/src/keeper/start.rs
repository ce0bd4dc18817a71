//! A keeper's first moments: alone in its data directory, on its socket, and with what an earlier one left.

use std::ffi::OsString;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nave_proto::pb;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::{Mode as FileMode, umask};
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};

use super::{Keeper, Mode, Source, cannot};
use crate::agent::Agent;
use crate::clock::{boottime_ns, unix_ns};
use crate::descriptors::Descriptors;
use crate::exits::Exits;
use crate::handover::Taken;
use crate::identity::{self, Found, started_boottime_ns};
use crate::kept::{Cause, Ended, Kept, Phase, Process};
use crate::ledger::{Key, Ledger, Noted};
use crate::oom::Oom;
use crate::output::Output;
use crate::upgrade::Upgrade;
use crate::{KeeperError, KeeperOptions, client, sys};

impl Keeper {
    pub(super) fn start(
        options: KeeperOptions,
        stub_command: Vec<OsString>,
        taken: Option<Taken>,
    ) -> Result<Self, KeeperError> {
        // Before any thread: threads inherit the mask, and a signal that nobody blocks ends the process.
        let signals = block_signals().map_err(cannot("receive signals"))?;
        let data_dir = make_data_dir(&options.data_dir).map_err(file(&options.data_dir))?;
        let handed_over = taken.is_some();
        let (lock, listener, descriptors, open_files_soft) = match taken {
            Some(taken) => {
                let listener = Some(UnixListener::from(taken.listener));
                (taken.lock, listener, taken.descriptors, taken.open_files_soft)
            }
            None => (lock(&data_dir)?, None, Descriptors::default(), raise_open_files()),
        };
        let path = data_dir.join("keeper.upgrade");
        let mut upgrade = Upgrade::open(&data_dir).map_err(file(&path))?;
        upgrade.begin(handed_over);
        let pid_file = data_dir.join("keeper.pid");
        write_pid(&pid_file).map_err(file(&pid_file))?;
        nix::sys::prctl::set_child_subreaper(true)
            .map_err(|error| cannot("adopt the orphans of services")(error.into()))?;
        let socket = client::socket_path(&data_dir);
        let listener = match listener {
            Some(listener) => listener,
            None => listen(&socket).map_err(file(&socket))?,
        };
        let path = data_dir.join("keeper.ledger");
        let (ledger, lost_bytes) = Ledger::open(&path).map_err(file(&path))?;
        let mut damages: Vec<String> = lost(&path, lost_bytes).into_iter().collect();
        let path = data_dir.join("exits");
        let (exits, lost_bytes) =
            Exits::open(&path, ledger.content().acknowledged_sequence).map_err(file(&path))?;
        damages.extend(lost(&path, lost_bytes));
        damages.iter().for_each(|damage| crate::say!("{damage}"));
        let noted_sequence = ledger.content().acknowledged_sequence;

        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|e| cannot("wait for events")(e.into()))?;
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer =
            TimerFd::new(ClockId::CLOCK_BOOTTIME, flags).map_err(|e| cannot("make a timer")(e.into()))?;
        let mut keeper = Self {
            socket,
            lock,
            program: program(),
            stub_command,
            ahead: None,
            boot_id: identity::boot_id().map_err(cannot("read the boot id"))?,
            open_files_soft,
            epoll,
            signals,
            timer,
            timer_at: None,
            listener,
            connections: std::collections::BTreeMap::new(),
            last_connection: 0,
            agent_connection: None,
            table: std::collections::BTreeMap::new(),
            pids: std::collections::BTreeMap::new(),
            ledger,
            exits,
            noted_sequence,
            told_sequence: 0,
            exits_retry_at: 0,
            ledger_retry_at: 0,
            output: Output::start().map_err(cannot("start the output threads"))?,
            logs: std::collections::BTreeMap::new(),
            dropped_report_at: None,
            descriptors,
            ears: std::collections::BTreeMap::new(),
            last_ear: 0,
            agent: Agent::new(options.agent_command),
            mode: Mode::Running,
            upgrade,
            damages,
            slim_at: Some(boottime_ns() + super::due::SLIM_AFTER_NS),
            data_dir,
        };
        keeper.watch(&keeper.signals, Source::Signals);
        keeper.watch(&keeper.timer, Source::Timer);
        keeper.watch(&keeper.listener, Source::Listener);
        keeper.watch(&keeper.output.descriptor(), Source::Output);
        keeper.open_ears();
        // What cannot be looked at may run: the next keeper, or this one's next try, is to see it.
        keeper.adopt_all().map_err(cannot("look at the processes of the keeper before"))?;
        keeper.adopt_agent().map_err(cannot("look at the agent of the keeper before"))?;
        Ok(keeper)
    }

    /// Takes over what the ledger knows.
    fn adopt_all(&mut self) -> io::Result<()> {
        let noted: Vec<(Key, Noted)> =
            self.ledger.content().kept.iter().map(|(key, noted)| (*key, noted.clone())).collect();
        for (key, noted) in noted {
            self.adopt(key, noted)?;
        }
        self.reopen_logs();
        Ok(())
    }

    fn adopt(&mut self, key: Key, noted: Noted) -> io::Result<()> {
        let Noted { started, exited, signalled, deadline } = noted;
        let (Some(spawn), Some(identity)) = (started.spawn, started.process) else { return Ok(()) };
        // Written by the keeper before, which did not come to note it in the ledger.
        let exited = exited || self.exits.holds(key.instance_id, key.epoch, spawn.attempt);
        let rebooted = identity.boot_id != self.boot_id;
        let ended = |stranger| {
            let (process, started_unix_ns) = (identity.clone(), started.started_unix_ns);
            Phase::Ended(Ended { process, started_unix_ns, stranger })
        };
        let (phase, lost) = if exited {
            (ended(false), None)
        } else if rebooted {
            (ended(true), Some("host rebooted"))
        } else {
            match identity::find(&identity)? {
                Found::Running(pidfd, stat) | Found::Zombie(pidfd, stat) => {
                    let adopted = stat.parent != std::process::id();
                    if adopted {
                        // A zombie is seen at once, by the same way as one that ends later.
                        self.watch(&pidfd, Source::Process(identity.pid));
                    }
                    self.pids.insert(identity.pid, key);
                    let cause = signalled.map(|signal| Cause { cause: signal.cause(), message: "" });
                    let process = Process {
                        identity: identity.clone(),
                        pidfd,
                        adopted,
                        started_unix_ns: started.started_unix_ns,
                        started_boottime_ns: started_boottime_ns(stat.start_ticks),
                        cause,
                        oom: Oom::new(&spawn, started.oom_kills.checked_sub(1)),
                        unknown_at: None,
                    };
                    (Phase::Running(process), None)
                }
                Found::Gone => (ended(false), Some("ended while no keeper ran")),
                Found::Stranger => (ended(true), Some("ended while no keeper ran")),
            }
        };
        if let Some(message) = lost {
            let ran = boottime_ns() - started_boottime_ns(identity.start_ticks);
            self.add_exit(pb::ExitRecord {
                instance_id: key.instance_id,
                service: spawn.service.clone(),
                epoch: key.epoch,
                attempt: spawn.attempt,
                process: Some(identity.clone()),
                message: message.to_owned(),
                started_unix_ns: started.started_unix_ns,
                ended_unix_ns: unix_ns(),
                ran_ms: if rebooted { 0 } else { u64::try_from(ran / crate::clock::MS).unwrap_or(0) },
                ..Default::default()
            });
        }
        let deadline = deadline.filter(|_| !rebooted);
        let kept = Kept { spawn, phase, deadline, deadline_begun: false, ladder: None, forgetting: None };
        self.table.insert(key, kept);
        Ok(())
    }
}

fn file(path: &Path) -> impl FnOnce(io::Error) -> KeeperError {
    let path = path.to_path_buf();
    move |source| KeeperError::File { path, source }
}

/// What to tell people of a file that was not whole.
fn lost(path: &Path, bytes: u64) -> Option<String> {
    (bytes > 0).then(|| {
        format!("{}: {bytes} bytes of it were torn or damaged and are not used, the rest is", path.display())
    })
}

fn block_signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR2] {
        set.add(signal);
    }
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

/// Its absolute path.
fn make_data_dir(path: &Path) -> io::Result<PathBuf> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    path.canonicalize()
}

fn lock(data_dir: &Path) -> Result<OwnedFd, KeeperError> {
    let path = data_dir.join("keeper.lock");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let opened: File = options.open(&path).map_err(file(&path))?;
    let duplicate = OwnedFd::from(opened.try_clone().map_err(file(&path))?);
    match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
        Ok(locked) => {
            // The lock belongs to the open file, which the duplicate keeps open; unlocking is left to the kernel.
            std::mem::forget(locked);
            Ok(duplicate)
        }
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            let pid = std::fs::read_to_string(data_dir.join("keeper.pid")).ok();
            let pid = pid.and_then(|text| text.trim().parse().ok());
            Err(KeeperError::Held { data_dir: data_dir.to_path_buf(), pid })
        }
        Err((_, error)) => Err(file(&path)(error.into())),
    }
}

/// Each process costs six descriptors. Returns the soft limit of before.
fn raise_open_files() -> u64 {
    let Ok((soft, hard)) = sys::resource_limit(libc::RLIMIT_NOFILE) else { return 0 };
    match sys::set_resource_limit(libc::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => soft,
        Err(_) => 0,
    }
}

/// Whole at every moment, for whoever reads it.
fn write_pid(path: &Path) -> io::Result<()> {
    let beside = path.with_extension("pid.new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o644).custom_flags(libc::O_NOFOLLOW);
    writeln!(options.open(&beside)?, "{}", std::process::id())?;
    std::fs::rename(&beside, path)
}

/// Where this program is; a newer one is put there by renaming, which /proc/self/exe would not follow.
fn program() -> PathBuf {
    let link = std::fs::read_link("/proc/self/exe").unwrap_or_else(|_| PathBuf::from("/proc/self/exe"));
    link.to_str().and_then(|text| text.strip_suffix(" (deleted)")).map_or(link.clone(), PathBuf::from)
}

fn listen(socket: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = socket.parent().filter(|parent| parent.starts_with("/tmp")) {
        private_directory(parent)?;
    }
    match std::fs::remove_file(socket) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let before = umask(FileMode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(socket);
    umask(before);
    let listener = listener?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// In a directory that all may write to, the name may be somebody else's.
fn private_directory(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let data = std::fs::symlink_metadata(path)?;
    let ours = data.is_dir() && data.uid() == nix::unistd::geteuid().as_raw();
    if ours { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}
