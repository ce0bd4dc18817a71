//! Processes that say themselves how they are (`health = { notify = true }`, sd_notify; `notify_fd`, s6).
//!
//! One datagram socket for each process, which only its own user may write to; the cgroup of the sender tells it from
//! other instances of that user. Beside it the FIFOs of those that write a line to a descriptor. Both are made before the
//! process starts and kept until its placement ends, with the keeper as well ([`Ears`]): many programs connect once and
//! never again.

mod ears;
mod hearing;
mod message;

use std::collections::BTreeMap;
use std::fs::{DirBuilder, OpenOptions, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, chown};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use nave_agent_core::{Input, ProcessKey};
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::PassCred;
use nix::sys::stat::Mode;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

pub(crate) use ears::{EarName, Ears, Way};
use hearing::Hearing;
pub(crate) use hearing::Said;

use crate::keeper::KeeperHandle;

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
    said: mpsc::Sender<Said>,
    keeper: KeeperHandle,
    ears: Ears,
    tasks: JoinSet<()>,
    running: BTreeMap<(InstanceId, Way), (ProcessKey, AbortHandle)>,
}

/// Who may speak.
#[derive(Debug, Clone, Default)]
pub(crate) struct Speaker {
    /// Uid and gid; nothing: the agent's own.
    pub(crate) owner: Option<(u32, u32)>,
    /// The cgroup's name; nothing where there are none.
    pub(crate) group: Option<String>,
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

    /// For a process that writes a line to a descriptor.
    pub(crate) fn fifo(&self, instance: InstanceId) -> PathBuf {
        self.dir.join(format!("{instance}.ready"))
    }

    /// Anew, in place of what an earlier process may have left. `fresh`: no process has it open.
    fn make(&self, name: EarName, owner: Option<(u32, u32)>, fresh: bool) -> io::Result<OwnedFd> {
        DirBuilder::new().recursive(true).mode(0o711).create(&self.dir)?;
        match name.way {
            Way::Socket => self.bind(name.instance, owner),
            Way::Line => self.open_fifo(name.instance, fresh),
        }
    }

    fn bind(&self, instance: InstanceId, owner: Option<(u32, u32)>) -> io::Result<OwnedFd> {
        let path = self.path(instance);
        // That there is none is the usual case.
        let _none = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path)?;
        setsockopt(&socket, PassCred, &true)?;
        socket.set_nonblocking(true)?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        if let Some((uid, gid)) = owner {
            chown(&path, Some(uid), Some(gid))?;
        }
        Ok(socket.into())
    }

    fn open_fifo(&self, instance: InstanceId, fresh: bool) -> io::Result<OwnedFd> {
        let path = self.fifo(instance);
        if fresh {
            // That there is none is the usual case.
            let _none = std::fs::remove_file(&path);
            nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        }
        let mut options = OpenOptions::new();
        Ok(options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?.into())
    }

    pub(crate) fn remove(&self, instance: InstanceId) {
        // That there is none is the usual case.
        let _none = std::fs::remove_file(self.path(instance));
        let _none = std::fs::remove_file(self.fifo(instance));
    }
}

impl NotifyTasks {
    pub(crate) fn new(
        keeper: KeeperHandle,
        ears: Ears,
        said: mpsc::Sender<Said>,
        inputs: mpsc::Sender<(InstanceId, Input)>,
    ) -> Self {
        Self { inputs, said, keeper, ears, tasks: JoinSet::new(), running: BTreeMap::new() }
    }

    /// What a process that is yet to start will speak into; the keeper is to have it before. Returns what there was for
    /// earlier ones, which the keeper is to close.
    pub(crate) fn make(
        &mut self,
        sockets: &NotifySockets,
        name: EarName,
        speaker: &Speaker,
    ) -> io::Result<Vec<EarName>> {
        let before = self.end(|other| (other.instance, other.way) == (name.instance, name.way));
        self.ears.open(name, sockets.make(name, speaker.owner, true)?);
        Ok(before)
    }

    /// Hears a process that runs. Already heard: nothing to do.
    pub(crate) fn hear(&mut self, sockets: &NotifySockets, name: EarName, speaker: Speaker) {
        let place = (name.instance, name.way);
        if self.running.get(&place).is_some_and(|(known, _)| *known == name.key) {
            return;
        }
        let sockets = sockets.clone();
        let (ears, keeper) = (self.ears.clone(), self.keeper.clone());
        let (said, inputs) = (self.said.clone(), self.inputs.clone());
        let hearing = Hearing { name, group: speaker.group, ears, keeper, said, inputs };
        let anew = move || sockets.make(name, speaker.owner, false);
        let task = self.tasks.spawn(hearing.run(anew));
        if let Some((_, old)) = self.running.insert(place, (name.key, task)) {
            old.abort();
        }
        while self.tasks.try_join_next().is_some() {}
    }

    /// A placement has ended. Returns what the keeper is to close.
    pub(crate) fn stop(&mut self, sockets: &NotifySockets, instance: InstanceId, epoch: u64) -> Vec<EarName> {
        let closed = self.end(|name| name.instance == instance && name.key.epoch <= epoch);
        if !closed.is_empty() {
            sockets.remove(instance);
        }
        closed
    }

    /// Closes what belongs to no process that is known. Returns what is still open.
    pub(crate) fn retain(&mut self, wanted: &[EarName]) -> Ears {
        self.end(|name| !wanted.contains(name));
        self.ears()
    }

    pub(crate) fn ears(&self) -> Ears {
        self.ears.clone()
    }

    fn end(&mut self, goes: impl Fn(&EarName) -> bool) -> Vec<EarName> {
        self.running.retain(|&(instance, way), (key, task)| {
            let stays = !goes(&EarName { instance, key: *key, way });
            if !stays {
                task.abort();
            }
            stays
        });
        while self.tasks.try_join_next().is_some() {}
        self.ears.close(goes)
    }
}

/// The number under which a process expects the descriptor to write its line to.
pub(crate) fn line_descriptor(manifest: &pb::Manifest) -> Option<u32> {
    match manifest.health.as_ref()?.ready.as_ref()?.check {
        Some(pb::probe::Check::NotifyFd(number)) => Some(number),
        _ => None,
    }
}

/// How the process of an instance says how it is, by its manifest.
pub(crate) fn ears_of(instance: InstanceId, key: ProcessKey, manifest: &pb::Manifest) -> Vec<EarName> {
    let socket = NotifySockets::is_wanted(manifest).then_some(Way::Socket);
    let line = line_descriptor(manifest).map(|_| Way::Line);
    socket.into_iter().chain(line).map(|way| EarName { instance, key, way }).collect()
}

#[cfg(test)]
mod tests;
