//! Says when a service is about to run out of the memory that it may use, before the kernel kills it.
//!
//! The kernel wakes us, so a service that stays within its limit costs nothing: v2 by its counters of how often a limit
//! was met, v1 by an event when usage passes a threshold. What is told counts only what the kernel cannot take back,
//! since a full page cache is no shortage.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nave_agent_core::{Input, ProcessKey};
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tracing::debug;

use crate::cgroups::InstanceCgroup;

/// v1 wakes us when usage passes this part of the limit.
const WAKE_AT_PERCENT: u64 = 90;
/// Told when what cannot be taken back is at least this part of the limit.
const SHORT_AT_PERCENT: u64 = 80;
/// One that stays short is not told of again before this.
const QUIET: Duration = Duration::from_secs(60);
/// Between two looks while the kernel keeps waking us.
const PAUSE: Duration = Duration::from_millis(100);

/// Who watches; dropping it ends them.
#[derive(Debug)]
pub(crate) struct Pressure {
    inputs: mpsc::Sender<(InstanceId, Input)>,
    tasks: JoinSet<()>,
    running: BTreeMap<InstanceId, (ProcessKey, AbortHandle)>,
}

impl Pressure {
    pub(crate) fn new(inputs: mpsc::Sender<(InstanceId, Input)>) -> Self {
        Self { inputs, tasks: JoinSet::new(), running: BTreeMap::new() }
    }

    /// Watches the memory of process `key` instead of that of an earlier one; without a limit there is nothing to watch.
    pub(crate) fn watch(
        &mut self,
        instance: InstanceId,
        key: ProcessKey,
        group: &InstanceCgroup,
        resources: &pb::Resources,
    ) {
        if self.running.get(&instance).is_some_and(|(known, _)| *known == key) {
            return;
        }
        self.stop(instance);
        let limits = [resources.memory_soft_bytes, resources.memory_bytes];
        let Some(limit_bytes) = limits.into_iter().find(|bytes| *bytes > 0) else { return };
        match Watched::open(group, limit_bytes) {
            Ok(Some(watched)) => {
                let task = self.tasks.spawn(watch(watched, limit_bytes, instance, key, self.inputs.clone()));
                self.running.insert(instance, (key, task));
            }
            Ok(None) => {} // no memory controller; `nave hosts` says so
            Err(error) => debug!(%instance, %error, "its memory cannot be watched"),
        }
    }

    pub(crate) fn stop(&mut self, instance: InstanceId) {
        if let Some((_, task)) = self.running.remove(&instance) {
            task.abort();
        }
        while self.tasks.try_join_next().is_some() {}
    }
}

/// What wakes us, and where to look then.
#[derive(Debug)]
enum Watched {
    V1 { dir: PathBuf, threshold: AsyncFd<EventFd> },
    V2 { dir: PathBuf, events: AsyncFd<File> },
}

impl Watched {
    #[expect(
        deprecated,
        reason = "the new way is an unsafe one; both descriptors are owned here and not replaced"
    )]
    fn open(group: &InstanceCgroup, limit_bytes: u64) -> io::Result<Option<Self>> {
        let v1 = group.cgroup1.iter().map(Path::new).find(|dir| dir.join("memory.usage_in_bytes").exists());
        if let Some(dir) = v1 {
            let threshold = AsyncFd::with_interest(threshold(dir, limit_bytes)?, Interest::READABLE)?;
            return Ok(Some(Self::V1 { dir: dir.to_owned(), threshold }));
        }
        let dir = PathBuf::from(&group.cgroup2);
        match File::open(dir.join("memory.events")) {
            Ok(file) => Ok(Some(Self::V2 { dir, events: AsyncFd::with_interest(file, Interest::PRIORITY)? })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits for the kernel's word.
    async fn woken(&self) -> io::Result<()> {
        match self {
            Self::V1 { threshold, .. } => {
                let mut ready = threshold.readable().await?;
                match threshold.get_ref().read() {
                    Ok(_) | Err(nix::errno::Errno::EAGAIN) => ready.clear_ready(),
                    Err(error) => return Err(error.into()),
                }
            }
            Self::V2 { events, .. } => {
                let mut ready = events.ready(Interest::PRIORITY).await?;
                // Reading is what lets the kernel wake us again.
                let mut counters = [0; 512];
                std::os::unix::fs::FileExt::read_at(events.get_ref(), &mut counters, 0)?;
                ready.clear_ready();
            }
        }
        Ok(())
    }

    /// Bytes that the kernel cannot take back; nothing when the group is gone.
    fn held_bytes(&self) -> Option<u64> {
        match self {
            Self::V1 { dir, .. } => held_bytes(false, dir),
            Self::V2 { dir, .. } => held_bytes(true, dir),
        }
    }
}

/// Bytes that the kernel cannot take back from a group; nothing when it is gone.
pub(crate) fn held_bytes(v2: bool, dir: &Path) -> Option<u64> {
    let names = if v2 { ["anon", "shmem"] } else { ["total_rss", "total_shmem"] };
    Some(sum(&std::fs::read_to_string(dir.join("memory.stat")).ok()?, names))
}

fn sum(stat: &str, names: [&str; 2]) -> u64 {
    let values =
        stat.lines().filter_map(|line| line.split_once(' ')).filter(|(name, _)| names.contains(name));
    values.filter_map(|(_, value)| value.trim().parse::<u64>().ok()).sum()
}

/// v1's way: the kernel counts an eventfd up when usage passes the threshold, either way.
fn threshold(dir: &Path, limit_bytes: u64) -> io::Result<EventFd> {
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
    let usage: OwnedFd = File::open(dir.join("memory.usage_in_bytes"))?.into();
    let bytes = limit_bytes / 100 * WAKE_AT_PERCENT;
    let order = format!("{} {} {bytes}", std::os::fd::AsFd::as_fd(&event).as_raw_fd(), usage.as_raw_fd());
    std::fs::write(dir.join("cgroup.event_control"), order)?;
    Ok(event)
}

async fn watch(
    watched: Watched,
    limit_bytes: u64,
    instance: InstanceId,
    key: ProcessKey,
    inputs: mpsc::Sender<(InstanceId, Input)>,
) {
    while watched.woken().await.is_ok() {
        let Some(used_bytes) = watched.held_bytes() else { return };
        let mut pause = PAUSE;
        if used_bytes >= limit_bytes / 100 * SHORT_AT_PERCENT {
            let input = Input::MemoryShort { key, used_bytes, limit_bytes };
            if inputs.send((instance, input)).await.is_err() {
                return;
            }
            pause = QUIET;
        }
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_cannot_be_taken_back_counts() {
        let v1 = "cache 900\nrss 5\ntotal_cache 900\ntotal_rss 40\ntotal_shmem 2\n";
        assert_eq!(sum(v1, ["total_rss", "total_shmem"]), 42);
        assert_eq!(sum("anon 7\nfile 100\nshmem 1\n", ["anon", "shmem"]), 8);
    }
}
