//! The sockets of processes that say themselves that they are ready (`health = { notify = true }`, sd_notify).
//!
//! One datagram socket per instance, which only its own user may write to; so who speaks is known by the socket, and
//! no credentials have to be looked at. It is bound before the process starts, and again by the next agent.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use nave_agent_core::supervisor::Notification;
use nave_agent_core::{Input, ProcessKey};
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use tokio::net::UnixDatagram;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

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
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        if let Some((uid, gid)) = owner {
            chown(&path, Some(uid), Some(gid))?;
        }
        Ok(socket)
    }

    pub(crate) fn remove(&self, instance: InstanceId) {
        // That there is none is the usual case.
        let _none = std::fs::remove_file(self.path(instance));
    }
}

impl NotifyTasks {
    pub(crate) fn new(inputs: mpsc::Sender<(InstanceId, Input)>) -> Self {
        Self { inputs, tasks: JoinSet::new(), running: BTreeMap::new() }
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

    pub(crate) fn stop(&mut self, sockets: &NotifySockets, instance: InstanceId) {
        if let Some((_, task)) = self.running.remove(&instance) {
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
    while let Ok(length) = socket.recv(&mut buffer).await {
        for message in parse(&buffer[..length]) {
            if inputs.send((instance, Input::Notify { key, message })).await.is_err() {
                return;
            }
        }
    }
}

/// Newline-separated `NAME=value`; what is not known is passed over.
fn parse(message: &[u8]) -> Vec<Notification> {
    let text = String::from_utf8_lossy(message);
    text.lines()
        .filter_map(|line| match line.split_once('=')? {
            ("READY", "1") => Some(Notification::Ready),
            ("STOPPING", "1") => Some(Notification::Stopping),
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
        assert_eq!(said, [Notification::Status("loading 3 of 7".into()), Notification::Ready]);
        assert_eq!(parse(b"\xff\xfe\0"), []);
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
