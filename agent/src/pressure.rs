//! Says when a service is about to run out of the memory that it may use, before the kernel kills it.
//!
//! An instance without a limit costs nothing. Of one that has limits the usage is read, one small file, as often as the
//! room that is left asks for (`nave_agent_core::Shortage` decides), and what its caches are of it only when it is near
//! one, since a full page cache is no shortage. Where the kernel wakes us (v1 by a threshold, v2 by its counters of how
//! often a limit was met) the look is taken at once.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nave_agent_core::{Input, Monotonic, ProcessKey, Shortage};
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use tracing::debug;

use crate::cgroups::InstanceCgroup;
use crate::clock;

/// v1 wakes us when usage passes this part of a limit.
const WAKE_AT_PERCENT: u64 = 90;
/// A group full of caches meets its limit all the time; after a look that the kernel asked for it is not heard for so long.
const DEAF: Duration = Duration::from_secs(1);
/// Looks are taken at whole multiples of this, so that those of many instances share a wake-up of the agent.
const TICK_NS: i64 = 250_000_000;

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
        let limits: Vec<u64> = limits.into_iter().filter(|bytes| *bytes > 0).collect();
        if limits.is_empty() {
            return;
        }
        match Watched::open(group, &limits) {
            Ok(Some(watched)) => {
                let task = self.tasks.spawn(watch(watched, instance, key, self.inputs.clone()));
                self.running.insert(instance, (key, task));
            }
            Ok(None) => {} // no memory controller; `nave hosts` says so
            Err(error) => debug!(%instance, %error, "its memory cannot be watched"),
        }
    }

    /// That process has ended.
    pub(crate) fn ended(&mut self, instance: InstanceId, key: ProcessKey) {
        if self.running.get(&instance).is_some_and(|(known, _)| *known == key) {
            self.stop(instance);
        }
    }

    pub(crate) fn stop(&mut self, instance: InstanceId) {
        if let Some((_, task)) = self.running.remove(&instance) {
            task.abort();
        }
        while self.tasks.try_join_next().is_some() {}
    }
}

/// One group, and how it stands with its limits.
#[derive(Debug)]
struct Watched {
    dir: PathBuf,
    v2: bool,
    /// Caches and all.
    usage: File,
    limits: Vec<Shortage>,
    /// None: it does not speak of this group.
    kernel: Option<Kernel>,
}

/// Its word that a look is due.
#[derive(Debug)]
enum Kernel {
    Threshold(AsyncFd<EventFd>),
    Events(AsyncFd<File>),
}

impl Watched {
    /// None: there is no memory controller.
    fn open(group: &InstanceCgroup, limits: &[u64]) -> io::Result<Option<Self>> {
        let v1 = group.cgroup1.iter().map(Path::new).find(|dir| dir.join(usage_file(false)).exists());
        let (dir, v2) = v1.map_or((Path::new(&group.cgroup2), true), |dir| (dir, false));
        let usage = match File::open(dir.join(usage_file(v2))) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            usage => usage?,
        };
        let kernel = if v2 { Kernel::events(dir) } else { Kernel::threshold(dir, limits) };
        let kernel =
            kernel.inspect_err(|error| debug!(?dir, %error, "the kernel will not speak of its memory"));
        let limits = limits.iter().copied().map(Shortage::new).collect();
        Ok(Some(Self { dir: dir.to_owned(), v2, usage, limits, kernel: kernel.ok() }))
    }

    /// Bytes that the kernel cannot take back, or somewhat more while there is room; nothing when the group is gone.
    fn held_bytes(&self) -> Option<u64> {
        let mut digits = [0; 32];
        let length = self.usage.read_at(&mut digits, 0).ok()?;
        let used: u64 = std::str::from_utf8(&digits[..length]).ok()?.trim().parse().ok()?;
        if self.limits.iter().all(|limit| limit.is_well_above(used)) {
            return Some(used);
        }
        let caches = match self.v2 {
            true => ["inactive_file", "active_file"],
            false => ["total_inactive_file", "total_active_file"],
        };
        let stat = std::fs::read_to_string(self.dir.join("memory.stat")).ok()?;
        Some(used.saturating_sub(sum(&stat, caches)))
    }

    /// Waits until it is time for the next look, or until the kernel asks for one; true then. `asked`: so it did for the
    /// last one.
    async fn wait(&mut self, next: Duration, asked: bool) -> bool {
        let until = Instant::now() + at_a_tick(clock::monotonic(), next);
        if asked {
            tokio::time::sleep(next.min(DEAF)).await;
        }
        let Some(kernel) = &self.kernel else {
            tokio::time::sleep_until(until).await;
            return false;
        };
        let woken = tokio::select! {
            woken = kernel.woken() => woken,
            () = tokio::time::sleep_until(until) => return false,
        };
        if woken.is_err() {
            self.kernel = None;
        }
        true
    }
}

impl Kernel {
    /// v1's way: the kernel counts an eventfd up when usage passes a threshold, either way.
    #[expect(
        deprecated,
        reason = "the new way is an unsafe one; the descriptor is owned here and not replaced"
    )]
    fn threshold(dir: &Path, limits: &[u64]) -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let usage: OwnedFd = File::open(dir.join(usage_file(false)))?.into();
        for limit in limits {
            let bytes = limit / 100 * WAKE_AT_PERCENT;
            let fd = std::os::fd::AsFd::as_fd(&event).as_raw_fd();
            std::fs::write(dir.join("cgroup.event_control"), format!("{fd} {} {bytes}", usage.as_raw_fd()))?;
        }
        Ok(Self::Threshold(AsyncFd::with_interest(event, Interest::READABLE)?))
    }

    #[expect(
        deprecated,
        reason = "the new way is an unsafe one; the descriptor is owned here and not replaced"
    )]
    fn events(dir: &Path) -> io::Result<Self> {
        let events = File::open(dir.join("memory.events"))?;
        Ok(Self::Events(AsyncFd::with_interest(events, Interest::PRIORITY)?))
    }

    /// Waits for its word. Cancel-safe.
    async fn woken(&self) -> io::Result<()> {
        match self {
            Self::Threshold(event) => {
                let mut ready = event.readable().await?;
                match event.get_ref().read() {
                    Ok(_) | Err(nix::errno::Errno::EAGAIN) => ready.clear_ready(),
                    Err(error) => return Err(error.into()),
                }
            }
            Self::Events(events) => {
                let mut ready = events.ready(Interest::PRIORITY).await?;
                // Reading is what lets the kernel wake us again.
                let mut counters = [0; 512];
                events.get_ref().read_at(&mut counters, 0)?;
                ready.clear_ready();
            }
        }
        Ok(())
    }
}

fn usage_file(v2: bool) -> &'static str {
    if v2 { "memory.current" } else { "memory.usage_in_bytes" }
}

/// As long as that, and on to the next tick.
fn at_a_tick(now: Monotonic, next: Duration) -> Duration {
    let over = (now + next).as_nanos().rem_euclid(TICK_NS);
    let rest = if over == 0 { 0 } else { TICK_NS - over };
    next + Duration::from_nanos(rest.unsigned_abs())
}

/// Bytes of a group that are sure not to be taken back; nothing when it is gone.
pub(crate) fn held_bytes(v2: bool, dir: &Path) -> Option<u64> {
    let names = if v2 { ["anon", "shmem"] } else { ["total_rss", "total_shmem"] };
    Some(sum(&std::fs::read_to_string(dir.join("memory.stat")).ok()?, names))
}

fn sum(stat: &str, names: [&str; 2]) -> u64 {
    let values =
        stat.lines().filter_map(|line| line.split_once(' ')).filter(|(name, _)| names.contains(name));
    values.filter_map(|(_, value)| value.trim().parse::<u64>().ok()).sum()
}

async fn watch(
    mut watched: Watched,
    instance: InstanceId,
    key: ProcessKey,
    inputs: mpsc::Sender<(InstanceId, Input)>,
) {
    let mut asked = false;
    while let Some(used_bytes) = watched.held_bytes() {
        let now = clock::monotonic();
        let mut next = Duration::MAX;
        for shortage in &mut watched.limits {
            let look = shortage.look(now, used_bytes);
            next = next.min(look.next);
            let limit_bytes = shortage.limit_bytes();
            let input = Input::MemoryShort { key, used_bytes, limit_bytes };
            if look.say && inputs.send((instance, input)).await.is_err() {
                return;
            }
        }
        asked = watched.wait(next, asked).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A group made of plain files.
    fn put(dir: &Path, usage: u64, stat: &str) {
        for (v2, prefix) in [(true, "v2"), (false, "v1")] {
            fs::create_dir_all(dir.join(prefix)).unwrap();
            let file = |name: &str| dir.join(prefix).join(name);
            let stat = if v2 { stat.to_owned() } else { stat.replace("inactive", "total_inactive") };
            fs::write(file("memory.stat"), stat).unwrap();
            fs::write(file(usage_file(v2)), format!("{usage}\n")).unwrap();
        }
    }

    fn group(dir: &Path, v2: bool) -> InstanceCgroup {
        let path = |name: &str| dir.join(name).display().to_string();
        match v2 {
            true => InstanceCgroup { cgroup2: path("v2"), ..Default::default() },
            // As on a machine where the other has no controllers.
            false => {
                InstanceCgroup { cgroup2: path("none"), cgroup1: vec![path("v1")], ..Default::default() }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_cache_is_no_shortage_and_what_grows_behind_it_is_seen() {
        for v2 in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            put(dir.path(), 99_000, "inactive_file 70000\n");
            let (inputs, mut told) = mpsc::channel(8);
            let mut pressure = Pressure::new(inputs);
            let (instance, key) = (InstanceId(1), ProcessKey { epoch: 1, attempt: 1 });
            let resources =
                pb::Resources { memory_bytes: 100_000, memory_soft_bytes: 50_000, ..Default::default() };
            pressure.watch(instance, key, &group(dir.path(), v2), &resources);
            assert_eq!(pressure.running.len(), 1);
            let silent = tokio::time::timeout(Duration::from_secs(60), told.recv()).await;
            silent.unwrap_err();
            for (cache, used_bytes, limit_bytes) in [(52_000, 47_000, 50_000), (8_000, 91_000, 100_000)] {
                put(dir.path(), 99_000, &format!("inactive_file {cache}\n"));
                let short = Input::MemoryShort { key, used_bytes, limit_bytes };
                assert_eq!(told.recv().await, Some((instance, short)), "v2: {v2}");
            }
            pressure.ended(instance, ProcessKey { attempt: 2, ..key });
            assert_eq!(pressure.running.len(), 1, "an end of another");
            pressure.ended(instance, key);
            assert!(pressure.running.is_empty());
        }
    }

    #[test]
    fn looks_fall_on_ticks() {
        let (second, quarter) = (Duration::from_secs(1), Duration::from_nanos(TICK_NS.unsigned_abs()));
        assert_eq!(at_a_tick(Monotonic::BOOT + quarter, second), second);
        let just_after = Monotonic::BOOT + quarter + Duration::from_nanos(1);
        assert_eq!(at_a_tick(just_after, second), second + quarter - Duration::from_nanos(1));
    }

    #[test]
    fn only_what_cannot_be_taken_back_counts() {
        let v1 = "cache 900\nrss 5\ntotal_cache 900\ntotal_rss 40\ntotal_shmem 2\n";
        assert_eq!(sum(v1, ["total_rss", "total_shmem"]), 42);
        assert_eq!(sum("anon 7\nfile 100\nshmem 1\n", ["anon", "shmem"]), 8);
    }
}
