//! The cgroup directories of one instance: made before its process, asked who is in them, emptied, removed.
//!
//! The cgroup2 directory (with or without controllers) is the truth about what belongs to an instance: a program may
//! fork twice and leave its session, but not its cgroup. v1 directories are for limits, and stand in where there is
//! no cgroup2. All paths come from the agent, absolute.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nave_proto::pb;

use crate::sys;

/// Rounds of "signal all that are in it": more than a chain of forks can outrun, few enough to end.
const ROUNDS: usize = 8;
/// v1 says "no limit" with a number that no machine has.
const UNLIMITED_BYTES: u64 = 1 << 60;

/// Makes the directories and returns the inode of the cgroup2 one (0: none).
///
/// # Errors
/// The path that could not be made, and why.
pub(crate) fn create(spawn: &pb::Spawn) -> Result<u64, (String, io::Error)> {
    for dir in spawn.cgroup1.iter().chain((!spawn.cgroup2.is_empty()).then_some(&spawn.cgroup2)) {
        fs::create_dir_all(dir).map_err(|error| (dir.clone(), error))?;
    }
    Ok(id(spawn).unwrap_or(0))
}

/// The inode of the cgroup2 directory, if there is one.
pub(crate) fn id(spawn: &pb::Spawn) -> Option<u64> {
    if spawn.cgroup2.is_empty() {
        return None;
    }
    fs::metadata(&spawn.cgroup2).ok().map(|directory| directory.ino())
}

/// The directory that tells who belongs to the instance, if it has any.
fn membership(spawn: &pb::Spawn) -> Option<&Path> {
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

/// Removes the directories, those below first. `Ok(false)`: someone is still in one of them; try again.
///
/// # Errors
/// What will not change by itself, with the path.
pub(crate) fn remove(spawn: &pb::Spawn) -> Result<bool, (String, io::Error)> {
    let mut all = true;
    for dir in spawn.cgroup1.iter().chain((!spawn.cgroup2.is_empty()).then_some(&spawn.cgroup2)) {
        all &= remove_tree(Path::new(dir)).map_err(|error| (dir.clone(), error))?;
    }
    Ok(all)
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

/// How often the kernel has killed someone in the instance's cgroups for want of memory. The caller compares two
/// moments: a directory may serve several attempts.
pub(crate) fn oom_kills(spawn: &pb::Spawn) -> u64 {
    let v2 = (!spawn.cgroup2.is_empty())
        .then(|| fs::read_to_string(Path::new(&spawn.cgroup2).join("memory.events")).ok())
        .flatten()
        .and_then(|events| number_after(&events, "oom_kill"));
    let v1 = spawn.cgroup1.iter().filter_map(|dir| {
        let control = fs::read_to_string(Path::new(dir).join("memory.oom_control")).ok()?;
        // Before 4.13 there is no counter of kills, only one of failures to get memory.
        number_after(&control, "oom_kill").or_else(|| {
            let failures = fs::read_to_string(Path::new(dir).join("memory.failcnt")).ok()?;
            failures.trim().parse().ok()
        })
    });
    v2.into_iter().chain(v1).sum()
}

/// The hard limit of memory, where one is set.
pub(crate) fn memory_limit_bytes(spawn: &pb::Spawn) -> Option<u64> {
    let v2 = (!spawn.cgroup2.is_empty()).then(|| Path::new(&spawn.cgroup2).join("memory.max"));
    let v1 = spawn.cgroup1.iter().map(|dir| Path::new(dir).join("memory.limit_in_bytes"));
    let limits =
        v2.into_iter().chain(v1).filter_map(|file| fs::read_to_string(file).ok()?.trim().parse().ok());
    limits.filter(|limit: &u64| *limit < UNLIMITED_BYTES).min()
}

fn number_after(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_is_found_by_its_whole_name() {
        let events = "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(number_after(events, "oom_kill"), Some(2));
        assert_eq!(number_after(events, "oom"), Some(3));
        assert_eq!(number_after("oom_kill_disable 0\nunder_oom 0\n", "oom_kill"), None);
    }
}
