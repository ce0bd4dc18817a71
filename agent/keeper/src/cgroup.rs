//! The cgroup directories of one instance: made before its process, asked who is in them, emptied, removed.
//!
//! The cgroup2 directory (with or without controllers) is the truth about what belongs to an instance: a program may
//! fork twice and leave its session, but not its cgroup. v1 directories are for limits, and stand in where there is
//! no cgroup2. All paths come from the agent, absolute.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nave_proto::pb;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::oom::Counters;
use crate::sys;

/// Tries to make a directory below others that somebody may be removing.
const TRIES: usize = 4;
/// Rounds of "signal all that are in it": more than a chain of forks can outrun, few enough to end.
const ROUNDS: usize = 8;
const OOM_CONTROL: &str = "memory.oom_control";
/// v1 says "no limit" with a number that no machine has.
const UNLIMITED_BYTES: u64 = 1 << 60;

/// Makes the directories and returns the inode of the cgroup2 one (0: none).
///
/// # Errors
/// The path that could not be made, and why.
pub(crate) fn create(spawn: &pb::Spawn) -> Result<u64, (String, io::Error)> {
    for dir in spawn.cgroup1.iter().chain((!spawn.cgroup2.is_empty()).then_some(&spawn.cgroup2)) {
        make(Path::new(dir)).map_err(|error| (dir.clone(), error))?;
    }
    Ok(id(spawn).unwrap_or(0))
}

/// Makes a directory and those above it, also when one of those is removed meanwhile: as long as it is empty, whoever
/// forgets the last instance of the same service may do that.
///
/// # Errors
/// Why it cannot be made.
pub fn make(dir: &Path) -> io::Result<()> {
    let mut made = fs::create_dir_all(dir);
    for _ in 1..TRIES {
        match &made {
            Err(error) if error.kind() == io::ErrorKind::NotFound => made = fs::create_dir_all(dir),
            _ => break,
        }
    }
    made
}

/// The inode of the cgroup2 directory, if there is one.
pub(crate) fn id(spawn: &pb::Spawn) -> Option<u64> {
    if spawn.cgroup2.is_empty() {
        return None;
    }
    fs::metadata(&spawn.cgroup2).ok().map(|directory| directory.ino())
}

/// Whether the directory that tells who belongs to the instance is named after it and its placement, as the agent names
/// those of instances.
pub(crate) fn is_own(spawn: &pb::Spawn) -> bool {
    let name = format!("i-{}-{}", spawn.instance_id, spawn.epoch);
    membership(spawn).and_then(Path::file_name).is_some_and(|last| last == name.as_str())
}

/// The directory that tells who belongs to the instance, if it has any.
pub(crate) fn membership(spawn: &pb::Spawn) -> Option<&Path> {
    let dir = if spawn.cgroup2.is_empty() { spawn.cgroup1.first()? } else { &spawn.cgroup2 };
    Some(Path::new(dir))
}

/// Everyone in the instance's cgroup and those below it. Empty when it does not exist.
pub(crate) fn members(spawn: &pb::Spawn) -> BTreeSet<u32> {
    let mut pids = BTreeSet::new();
    if let Some(dir) = membership(spawn) {
        collect(dir, &mut pids);
    }
    pids
}

/// Whether a process is in this very directory.
pub(crate) fn is_in(dir: &str, pid: u32) -> bool {
    let text = fs::read_to_string(Path::new(dir).join("cgroup.procs")).unwrap_or_default();
    text.lines().any(|line| line.parse() == Ok(pid))
}

/// The cgroup2 directory, for a child to be made in; none when there is none, or none that is safe for that.
///
/// A kernel that knows `cgroup.kill` takes a child made in a cgroup (`CLONE_INTO_CGROUP`) for one that slipped past a
/// kill when that cgroup has been killed before and its parent's has not (`kill_seq` in kernel/cgroup/cgroup.c), and
/// kills it. So each process gets a directory that is new: the one that its predecessor left, empty, is removed by
/// [`make_way`] first.
pub(crate) fn open(spawn: &pb::Spawn, way: &Way) -> Option<fs::File> {
    match way {
        Way::Clear if !spawn.cgroup2.is_empty() => fs::File::open(&spawn.cgroup2).ok(),
        Way::Clear | Way::Used => None,
    }
}

/// Whether the cgroup2 directory to be made is a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Clear,
    /// It is there and not to be removed: somebody is in it, or in a directory below.
    Used,
}

/// Removes what an earlier process left of its cgroup2 directory. Before [`create`].
pub(crate) fn make_way(spawn: &pb::Spawn) -> Way {
    if spawn.cgroup2.is_empty() {
        return Way::Clear;
    }
    match remove_tree(Path::new(&spawn.cgroup2)) {
        Ok(true) => Way::Clear,
        Ok(false) | Err(_) => Way::Used,
    }
}

fn collect(dir: &Path, pids: &mut BTreeSet<u32>) {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0));
    for below in subdirectories(dir) {
        collect(&below, pids);
    }
}

/// Whether there is a directory that tells who belongs to the instance.
pub(crate) fn is_known(spawn: &pb::Spawn) -> bool {
    membership(spawn).is_some_and(Path::exists)
}

/// Whether anyone is in it, at the price of one small file.
pub(crate) fn is_populated(spawn: &pb::Spawn) -> bool {
    let Some(dir) = membership(spawn) else { return false };
    match fs::read_to_string(dir.join("cgroup.events")) {
        Ok(events) => number_after(&events, "populated") == Some(1),
        Err(_) => !members(spawn).is_empty(),
    }
}

/// Signals everyone in the cgroup (SIGKILL through `cgroup.kill` where the kernel has it) and returns how many there
/// were. The caller has checked that the directory is still the one of the instance.
pub(crate) fn signal(spawn: &pb::Spawn, signal: i32) -> usize {
    let count = members(spawn).len();
    if count == 0 {
        return 0;
    }
    if signal == libc::SIGKILL
        && !spawn.cgroup2.is_empty()
        && fs::write(Path::new(&spawn.cgroup2).join("cgroup.kill"), "1").is_ok()
    {
        return count;
    }
    // One round for a signal that may be handled; for KILL until nobody new is found.
    let rounds = if signal == libc::SIGKILL { ROUNDS } else { 1 };
    let mut done = BTreeSet::new();
    for _ in 0..rounds {
        let fresh: Vec<u32> = members(spawn).difference(&done).copied().collect();
        if fresh.is_empty() {
            break;
        }
        let held: Vec<_> = fresh.iter().filter_map(|pid| Some((*pid, sys::pidfd_open(*pid).ok()?))).collect();
        // Whoever is still in the cgroup now that we hold its descriptor is the one we mean; a pid that was given to
        // a stranger between the two looks is no longer in the list.
        let still = members(spawn);
        for (pid, pidfd) in held.iter().filter(|(pid, _)| still.contains(pid)) {
            let _ = sys::pidfd_signal(pidfd.as_fd(), signal, false);
            done.insert(*pid);
        }
    }
    count
}

/// Removes the directories, those below first, and the service's and the host's above when they are empty. `Ok(false)`:
/// someone is still in one of them; try again.
///
/// # Errors
/// What will not change by itself, with the path.
pub(crate) fn remove(spawn: &pb::Spawn) -> Result<bool, (String, io::Error)> {
    let mut all = true;
    for dir in spawn.cgroup1.iter().chain((!spawn.cgroup2.is_empty()).then_some(&spawn.cgroup2)) {
        all &= remove_tree(Path::new(dir)).map_err(|error| (dir.clone(), error))?;
        remove_above(Path::new(dir), &spawn.service);
    }
    Ok(all)
}

/// `<host's>/<service>/<instance>` is how the agent names them; above the host's none is ours.
fn remove_above(dir: &Path, service: &str) {
    let of_service = dir.parent().filter(|above| above.file_name().is_some_and(|name| name == service));
    // The kernel refuses to remove what is in use.
    if let Some(of_service) = of_service
        && fs::remove_dir(of_service).is_ok()
        && let Some(of_host) = of_service.parent()
        && of_host.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"nave-"))
    {
        let _in_use = fs::remove_dir(of_host);
    }
}

/// Kills whoever is in a cgroup2 directory and those below, and removes it. `Ok(false)`: somebody has not ended yet.
///
/// # Errors
/// When it cannot be removed for another reason.
pub fn clear(dir: &Path) -> io::Result<bool> {
    let of = pb::Spawn { cgroup2: dir.display().to_string(), ..Default::default() };
    signal(&of, libc::SIGKILL);
    remove_tree(dir)
}

fn remove_tree(dir: &Path) -> io::Result<bool> {
    let mut all = true;
    for below in subdirectories(dir) {
        all &= remove_tree(&below)?;
    }
    match fs::remove_dir(dir) {
        Ok(()) => Ok(all),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(all),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOTEMPTY)) => Ok(false),
        Err(error) => Err(error),
    }
}

fn subdirectories(dir: &Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// What the kernel counts of the instance's memory. The caller compares two moments: a directory may serve several
/// attempts.
pub(crate) fn oom(spawn: &pb::Spawn) -> Counters {
    let mut counters = Counters::default();
    if !spawn.cgroup2.is_empty()
        && let Ok(events) = fs::read_to_string(Path::new(&spawn.cgroup2).join("memory.events"))
    {
        counters.kills += number_after(&events, "oom_kill").unwrap_or(0);
        counters.at_limit += number_after(&events, "oom").unwrap_or(0);
    }
    for dir in spawn.cgroup1.iter().map(Path::new) {
        let control = fs::read_to_string(dir.join(OOM_CONTROL)).unwrap_or_default();
        counters.kills += number_after(&control, "oom_kill").unwrap_or(0);
    }
    counters
}

/// v1 counts in no file that is to be relied upon how often a group had no room below a limit of its own or of one above
/// it (`memory.failcnt` leaves out the limit with swap): the kernel counts this up instead.
pub(crate) fn at_limit_events(spawn: &pb::Spawn) -> Option<EventFd> {
    let dir = spawn.cgroup1.iter().map(Path::new).find(|dir| dir.join(OOM_CONTROL).exists())?;
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).ok()?;
    let control = fs::File::open(dir.join(OOM_CONTROL)).ok()?;
    let order = format!("{} {}", event.as_fd().as_raw_fd(), control.as_raw_fd());
    fs::write(dir.join("cgroup.event_control"), order).ok()?;
    Some(event)
}

/// The hard limit of memory, where one is set and, as far as the kernel says, was ever met.
pub(crate) fn met_limit_bytes(spawn: &pb::Spawn) -> Option<u64> {
    let read = |file: PathBuf| fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    let v2 = (!spawn.cgroup2.is_empty()).then(|| Path::new(&spawn.cgroup2).join("memory.max"));
    let v2 = v2.and_then(read).map(|limit| (limit, u64::MAX));
    let v1 = spawn.cgroup1.iter().map(Path::new).filter_map(|dir| {
        let most = read(dir.join("memory.max_usage_in_bytes")).unwrap_or(u64::MAX);
        Some((read(dir.join("memory.limit_in_bytes"))?, most))
    });
    // The last charge that was refused may have been some pages.
    let met = |(limit, most): &(u64, u64)| *limit < UNLIMITED_BYTES && *most >= limit / 16 * 15;
    v2.into_iter().chain(v1).filter(met).map(|(limit, _)| limit).min()
}

fn number_after(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_and_what_they_were_for_are_read_from_either_hierarchy() {
        let dir = tempfile::tempdir().unwrap();
        let put = |group: &str, file: &str, text: &str| {
            fs::create_dir_all(dir.path().join(group)).unwrap();
            fs::write(dir.path().join(group).join(file), text).unwrap();
        };
        let group = |name: &str| dir.path().join(name).display().to_string();
        put("v2", "memory.events", "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 1\n");
        let v2 = pb::Spawn { cgroup2: group("v2"), ..Default::default() };
        assert_eq!(oom(&v2), Counters { kills: 2, at_limit: 3 });
        put("memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n");
        let cgroup1 = vec![group("cpu"), group("memory")];
        let v1 = pb::Spawn { cgroup2: group("unified"), cgroup1, ..Default::default() };
        assert_eq!(oom(&v1), Counters { kills: 4, at_limit: 0 });
        assert_eq!(oom(&pb::Spawn::default()), Counters::default());
        // Once below it, as when a group above has met its own, and once at it.
        put("memory", "memory.limit_in_bytes", "64000000\n");
        for (most, met) in [("30000000", None), ("63999000", Some(64_000_000))] {
            put("memory", "memory.max_usage_in_bytes", most);
            assert_eq!(met_limit_bytes(&v1), met, "{most}");
        }
        put("v2", "memory.max", "32000000\n");
        assert_eq!(met_limit_bytes(&v2), Some(32_000_000));
        put("v2", "memory.max", "max\n");
        assert_eq!(met_limit_bytes(&v2), None);
    }

    #[test]
    fn the_counter_is_found_by_its_whole_name() {
        let events = "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(number_after(events, "oom_kill"), Some(2));
        assert_eq!(number_after(events, "oom"), Some(3));
        assert_eq!(number_after("oom_kill_disable 0\nunder_oom 0\n", "oom_kill"), None);
    }
}
