//! The sockets of processes that say themselves that they are ready (`health = { notify = true }`, sd_notify).
//!
//! One datagram socket per instance, which only its own user may write to; the cgroup of the sender tells it from other
//! instances of that user. It is bound before the process starts, and again by the next agent. Beside it the FIFOs of
//! those that write a line to a descriptor (`notify_fd`, s6).

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nave_agent_core::supervisor::Notification;
use nave_agent_core::{Input, ProcessKey};
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use nix::sys::socket::sockopt::PassCred;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt};
use nix::sys::stat::Mode;
use tokio::io::{AsyncReadExt as _, Interest};
use tokio::net::UnixDatagram;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tracing::warn;

/// systemd's own bound for a message.
const MESSAGE_BYTES_MAX: usize = 4096;
/// A status line for tables, not an essay.
const STATUS_CHARS_MAX: usize = 200;
/// A socket's path has room for 108 bytes.
const SOCKET_PATH_BYTES_MAX: usize = 100;

/// Where the sockets are.
#[derive(Debug, Clone)]
pub(crate) struct NotifySockets {
    dir: PathBuf,
}

/// Who listens to them.
#[derive(Debug)]
pub(crate) struct NotifyTasks {
    inputs: mpsc::Sender<(InstanceId, Input)>,
    tasks: JoinSet<()>,
    running: BTreeMap<InstanceId, (ProcessKey, AbortHandle)>,
    lines: BTreeMap<InstanceId, (ProcessKey, AbortHandle)>,
}

impl NotifySockets {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Beside the other data when the path is short enough and open to services, else in /run or /tmp.
    pub(crate) fn for_host(data_dir: &Path, name: &str, closed: bool) -> Self {
        let plain = data_dir.join("notify");
        let fits = plain.as_os_str().len() + "/i-4294967296".len() <= SOCKET_PATH_BYTES_MAX;
        match (fits && !closed, nix::unistd::geteuid()) {
            (true, _) => Self::new(plain),
            (false, user) if user.is_root() => Self::new(Path::new("/run").join(name).join("notify")),
            (false, user) => Self::new(PathBuf::from(format!("/tmp/{name}-{user}/notify"))),
        }
    }

    pub(crate) fn is_wanted(manifest: &pb::Manifest) -> bool {
        let by_notify = |probe: &Option<pb::Probe>| {
            let check = probe.as_ref().and_then(|probe| probe.check.as_ref());
            matches!(check, Some(pb::probe::Check::Notify(true)))
        };
        manifest.health.as_ref().is_some_and(|health| by_notify(&health.ready) || by_notify(&health.live))
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn path(&self, instance: InstanceId) -> PathBuf {
        self.dir.join(instance.to_string())
    }

    /// Anew, in place of what an earlier agent may have left.
    fn bind(&self, instance: InstanceId, owner: Option<(u32, u32)>) -> io::Result<UnixDatagram> {
        DirBuilder::new().recursive(true).mode(0o711).create(&self.dir)?;
        let path = self.path(instance);
        self.remove(instance);
        let socket = UnixDatagram::bind(&path)?;
        setsockopt(&socket, PassCred, &true)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        if let Some((uid, gid)) = owner {
            chown(&path, Some(uid), Some(gid))?;
        }
        Ok(socket)
    }

    /// For a process that writes a line to a descriptor.
    pub(crate) fn fifo(&self, instance: InstanceId) -> PathBuf {
        self.dir.join(format!("{instance}.ready"))
    }

    /// A new one for a process that is yet to start; for one that runs, the one that it has open.
    fn open_fifo(&self, instance: InstanceId, fresh: bool) -> io::Result<pipe::Receiver> {
        let path = self.fifo(instance);
        if fresh {
            DirBuilder::new().recursive(true).mode(0o711).create(&self.dir)?;
            // That there is none is the usual case.
            let _none = std::fs::remove_file(&path);
            nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        }
        pipe::OpenOptions::new().read_write(true).open_receiver(&path)
    }

    pub(crate) fn remove(&self, instance: InstanceId) {
        // That there is none is the usual case.
        let _none = std::fs::remove_file(self.path(instance));
        let _none = std::fs::remove_file(self.fifo(instance));
    }
}

impl NotifyTasks {
    pub(crate) fn new(inputs: mpsc::Sender<(InstanceId, Input)>) -> Self {
        Self { inputs, tasks: JoinSet::new(), running: BTreeMap::new(), lines: BTreeMap::new() }
    }

    /// Listens for the process `key`, instead of any earlier one. Already listening for it: nothing to do.
    pub(crate) fn listen(
        &mut self,
        sockets: &NotifySockets,
        instance: InstanceId,
        key: ProcessKey,
        owner: Option<(u32, u32)>,
    ) -> io::Result<()> {
        if self.running.get(&instance).is_some_and(|(known, _)| *known == key) {
            return Ok(());
        }
        let socket = sockets.bind(instance, owner)?;
        let task = self.tasks.spawn(hear(socket, instance, key, self.inputs.clone()));
        if let Some((_, old)) = self.running.insert(instance, (key, task)) {
            old.abort();
        }
        while self.tasks.try_join_next().is_some() {}
        Ok(())
    }

    /// The same for one that writes a line.
    pub(crate) fn hear_line(
        &mut self,
        sockets: &NotifySockets,
        instance: InstanceId,
        key: ProcessKey,
        fresh: bool,
    ) -> io::Result<()> {
        if self.lines.get(&instance).is_some_and(|(known, _)| *known == key) {
            return Ok(());
        }
        let fifo = sockets.open_fifo(instance, fresh)?;
        let task = self.tasks.spawn(hear_line(fifo, instance, key, self.inputs.clone()));
        if let Some((_, old)) = self.lines.insert(instance, (key, task)) {
            old.abort();
        }
        Ok(())
    }

    pub(crate) fn stop(&mut self, sockets: &NotifySockets, instance: InstanceId) {
        let heard = [self.running.remove(&instance), self.lines.remove(&instance)];
        for (_, task) in heard.into_iter().flatten() {
            task.abort();
            sockets.remove(instance);
        }
        while self.tasks.try_join_next().is_some() {}
    }
}

async fn hear(
    socket: UnixDatagram,
    instance: InstanceId,
    key: ProcessKey,
    inputs: mpsc::Sender<(InstanceId, Input)>,
) {
    let mut buffer = [0; MESSAGE_BYTES_MAX];
    while let Ok((length, sender)) = receive(&socket, &mut buffer).await {
        if !sender.is_none_or(|pid| is_of(pid, instance, key)) {
            warn!(%instance, pid = sender, "a process of another instance spoke for this one and was not heard");
            continue;
        }
        for message in parse(&buffer[..length]) {
            if inputs.send((instance, Input::Notify { key, message })).await.is_err() {
                return;
            }
        }
    }
}

/// A message and the pid of its sender.
async fn receive(socket: &UnixDatagram, buffer: &mut [u8]) -> io::Result<(usize, Option<i32>)> {
    socket
        .async_io(Interest::READABLE, || {
            let mut control = nix::cmsg_space!(UnixCredentials);
            let mut parts = [io::IoSliceMut::new(buffer)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
            let pid = message.cmsgs().ok().into_iter().flatten().find_map(|part| match part {
                ControlMessageOwned::ScmCredentials(sender) => Some(sender.pid()),
                _ => None,
            });
            Ok((message.bytes, pid))
        })
        .await
}

/// Whether a process is in the cgroup of this placement. One that has ended already was let in by the socket's owner
/// alone, as was one on a host without cgroups.
fn is_of(pid: i32, instance: InstanceId, key: ProcessKey) -> bool {
    let Ok(groups) = std::fs::read_to_string(format!("/proc/{pid}/cgroup")) else { return true };
    is_in(&groups, &format!("{instance}-{}", key.epoch))
}

fn is_in(groups: &str, name: &str) -> bool {
    let mut ours = groups.lines().filter(|line| line.contains("/nave-")).peekable();
    ours.peek().is_none() || ours.any(|line| line.split('/').any(|part| part == name))
}

/// Reads on for as long as the process may write; the first line says that it is ready.
async fn hear_line(
    mut fifo: pipe::Receiver,
    instance: InstanceId,
    key: ProcessKey,
    inputs: mpsc::Sender<(InstanceId, Input)>,
) {
    let mut buffer = [0; 256];
    while let Ok(length) = fifo.read(&mut buffer).await {
        if buffer[..length].contains(&b'\n') {
            let input = Input::Notify { key, message: Notification::Ready };
            if inputs.send((instance, input)).await.is_err() {
                return;
            }
        }
    }
}

/// The number under which a process expects the descriptor to write its line to.
pub(crate) fn line_descriptor(manifest: &pb::Manifest) -> Option<u32> {
    match manifest.health.as_ref()?.ready.as_ref()?.check {
        Some(pb::probe::Check::NotifyFd(number)) => Some(number),
        _ => None,
    }
}

/// Newline-separated `NAME=value`; what is not known is passed over.
fn parse(message: &[u8]) -> Vec<Notification> {
    let text = String::from_utf8_lossy(message);
    text.lines()
        .filter_map(|line| match line.split_once('=')? {
            ("READY", "1") => Some(Notification::Ready),
            ("STOPPING", "1") => Some(Notification::Stopping),
            ("RELOADING", "1") => Some(Notification::Reloading),
            ("WATCHDOG", "1") => Some(Notification::Watchdog),
            ("WATCHDOG", "trigger") => Some(Notification::WatchdogTrigger),
            ("EXTEND_TIMEOUT_USEC", more) => {
                Some(Notification::ExtendTimeout(Duration::from_micros(more.parse().ok()?)))
            }
            ("MAINPID", pid) => Some(Notification::MainPid(pid.parse().ok()?)),
            ("STATUS", status) => Some(Notification::Status(status.chars().take(STATUS_CHARS_MAX).collect())),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_words_are_understood_and_others_passed_over() {
        let said = parse(b"STATUS=loading 3 of 7\nMAINPID=12\nREADY=1\nREADY=0\nnonsense\n");
        let main_pid = Notification::MainPid(12);
        assert_eq!(said, [Notification::Status("loading 3 of 7".into()), main_pid, Notification::Ready]);
        let said =
            parse(b"RELOADING=1\nWATCHDOG=1\nWATCHDOG=trigger\nEXTEND_TIMEOUT_USEC=1500000\nWATCHDOG=2\n");
        let more = Notification::ExtendTimeout(Duration::from_millis(1500));
        assert_eq!(
            said,
            [Notification::Reloading, Notification::Watchdog, Notification::WatchdogTrigger, more]
        );
        assert_eq!(parse(b"\xff\xfe\0"), []);
    }

    #[test]
    fn a_sender_is_known_by_its_cgroup() {
        let groups = "4:memory:/nave-00c1-h-3/web/i-42-1\n0::/nave-00c1-h-3/web/i-42-1\n";
        assert!(is_in(groups, "i-42-1"));
        assert!(!is_in(groups, "i-4-1") && !is_in(groups, "i-42-2"));
        assert!(is_in("0::/user.slice\n", "i-42-1"), "no group of ours: the socket's mode has to do");
    }

    #[tokio::test]
    async fn a_line_on_the_fifo_says_that_a_process_is_ready_and_no_part_of_one_does() {
        use std::io::Write as _;
        let dir = tempfile::tempdir().unwrap();
        let sockets = NotifySockets::new(dir.path().join("notify"));
        let (inputs, mut heard) = mpsc::channel(4);
        let mut tasks = NotifyTasks::new(inputs);
        let (instance, key) = (InstanceId(42), ProcessKey { epoch: 1, attempt: 1 });
        tasks.hear_line(&sockets, instance, key, true).unwrap();
        let open =
            || std::fs::OpenOptions::new().read(true).write(true).open(sockets.fifo(instance)).unwrap();
        let mut process = open();
        process.write_all(b"almost").unwrap();
        tokio::time::timeout(Duration::from_millis(50), heard.recv()).await.unwrap_err();
        process.write_all(b" there\n").unwrap();
        assert_eq!(heard.recv().await, Some((instance, Input::Notify { key, message: Notification::Ready })));
    }

    #[tokio::test]
    async fn what_a_process_says_reaches_the_main_loop_with_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let sockets = NotifySockets::new(dir.path().join("notify"));
        let (inputs, mut heard) = mpsc::channel(4);
        let mut tasks = NotifyTasks::new(inputs);
        let instance = InstanceId(42);
        for attempt in 1..=2 {
            let key = ProcessKey { epoch: 1, attempt };
            tasks.listen(&sockets, instance, key, None).unwrap();
            let speaker = UnixDatagram::unbound().unwrap();
            speaker.send_to(b"READY=1", sockets.path(instance)).await.unwrap();
            let expected = (instance, Input::Notify { key, message: Notification::Ready });
            assert_eq!(heard.recv().await, Some(expected));
        }
        tasks.stop(&sockets, instance);
        assert!(!sockets.path(instance).exists());
    }
}
