//! Gives a directory with all that is in it to the user that a service runs as now. A service that was deleted and
//! applied again has another uid, and would stand before its own data as a stranger.
//!
//! What is in there was made by whoever ran before, who may have left anything: no link is followed, no mount point is
//! crossed, and only what belonged to that user is given away, each thing looked at and given through one descriptor, so
//! that nothing comes in between. The directory itself is last: a walk that was cut short is done again by the next
//! start. Blocks, for some seconds with a million files.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fstat};
use nix::unistd::{Gid, Uid, fchown, fchownat};
use tracing::info;

/// One descriptor is open at each level, of the 1,024 that a process may have at least.
const DEPTH_MAX: usize = 256;

/// Also of a link, and without reading it.
const ITSELF: OFlag = OFlag::O_PATH.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// From one user and group to another.
#[derive(Debug)]
struct Gift {
    from: (u32, u32),
    to: (u32, u32),
    /// The only mount that it goes through, by its id.
    mount: u64,
    given: u64,
}

/// `top` is a directory, shown to people as `path`. Does nothing to what is in it when it belongs to that user already.
pub(super) fn give(top: &File, path: &Path, to: (u32, u32)) -> io::Result<()> {
    let found = fstat(top)?;
    if found.st_uid != to.0 {
        let from = (found.st_uid, found.st_gid);
        let mut gift = Gift { from, to, mount: mount_of(top.as_fd())?, given: 0 };
        gift.give_entries(top.as_fd(), path, DEPTH_MAX)?;
        if gift.given > 0 {
            let (path, given) = (path.display(), gift.given);
            info!(%path, given, from = from.0, to = to.0, "what the service's user before had is its own now");
        }
    }
    Ok(fchown(top, Some(Uid::from_raw(to.0)), Some(Gid::from_raw(to.1)))?)
}

impl Gift {
    fn give_entries(&mut self, dir: BorrowedFd<'_>, path: &Path, levels: usize) -> io::Result<()> {
        for name in names(dir).map_err(|error| at(path, &error))? {
            let path = path.join(&name);
            // What goes away meanwhile need not be given.
            match openat(dir, name.as_os_str(), ITSELF, Mode::empty()) {
                Ok(entry) => self.give_entry(entry.as_fd(), &path, levels)?,
                Err(Errno::ENOENT) => {}
                Err(errno) => return Err(at(&path, &errno.into())),
            }
        }
        Ok(())
    }

    fn give_entry(&mut self, entry: BorrowedFd<'_>, path: &Path, levels: usize) -> io::Result<()> {
        let failed = |error: io::Error| at(path, &error);
        // First, since whoever serves what is mounted there may not answer.
        if mount_of(entry).map_err(failed)? != self.mount {
            return Ok(());
        }
        let found = fstat(entry).map_err(|errno| failed(errno.into()))?;
        if is_directory(&found) {
            let too_deep =
                || failed(io::Error::other(format!("lies more than {DEPTH_MAX} directories deep")));
            let levels = levels.checked_sub(1).ok_or_else(too_deep)?;
            self.give_entries(entry, path, levels)?;
        }
        if !self.is_meant(&found) {
            return Ok(());
        }
        // A group that was chosen stays.
        let group = (found.st_gid == self.from.1).then_some(Gid::from_raw(self.to.1));
        fchownat(entry, "", Some(Uid::from_raw(self.to.0)), group, AtFlags::AT_EMPTY_PATH)
            .map_err(|errno| failed(errno.into()))?;
        self.given += 1;
        Ok(())
    }

    /// Of root's things not those that have another name, which may be one of the system's: where the kernel lets it
    /// (`fs.protected_hardlinks = 0`), anybody gives them one here.
    fn is_meant(&self, found: &FileStat) -> bool {
        let is_roots = self.from.0 == 0 && !is_directory(found) && found.st_nlink > 1;
        found.st_uid == self.from.0 && !is_roots
    }
}

fn is_directory(found: &FileStat) -> bool {
    found.st_mode & libc::S_IFMT == libc::S_IFDIR
}

/// Through its descriptor: by its path it might be another by now.
fn names(dir: BorrowedFd<'_>) -> io::Result<Vec<OsString>> {
    let entries = std::fs::read_dir(own_descriptor("fd", dir))?;
    entries.map(|entry| Ok(entry?.file_name())).collect()
}

/// A bind mount of the same file system is another one too.
fn mount_of(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let facts = std::fs::read_to_string(own_descriptor("fdinfo", fd))?;
    let id = facts.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    id.ok_or_else(|| io::Error::other("/proc does not say on which mount it is"))
}

fn own_descriptor(folder: &str, fd: BorrowedFd<'_>) -> PathBuf {
    Path::new("/proc/self").join(folder).join(fd.as_raw_fd().to_string())
}

fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{} cannot be given to its user: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, chown, lchown, symlink};
    use std::process::Command;

    use super::*;

    const BEFORE: u32 = 30_001;
    const NOW: u32 = 30_002;
    const ANOTHER: u32 = 30_003;

    /// A directory `top` of the user before, and `outside` of the same; `None`: only root can give things away.
    fn made() -> Option<(tempfile::TempDir, PathBuf, PathBuf)> {
        if !nix::unistd::geteuid().is_root() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let [top, outside] = ["top", "outside"].map(|name| dir.path().join(name));
        for path in [&top, &outside] {
            folder(path, BEFORE);
        }
        Some((dir, top, outside))
    }

    fn folder(path: &Path, owner: u32) {
        std::fs::create_dir_all(path).unwrap();
        chown(path, Some(owner), Some(owner)).unwrap();
    }

    fn file(path: &Path, owner: u32) -> PathBuf {
        std::fs::write(path, "x").unwrap();
        chown(path, Some(owner), Some(owner)).unwrap();
        path.to_owned()
    }

    fn link(path: &Path, target: &Path) -> PathBuf {
        symlink(target, path).unwrap();
        lchown(path, Some(BEFORE), Some(BEFORE)).unwrap();
        path.to_owned()
    }

    fn owner(path: &Path) -> (u32, u32) {
        let found = std::fs::symlink_metadata(path).unwrap();
        (found.uid(), found.gid())
    }

    fn give_to(top: &Path, user: u32) -> io::Result<()> {
        give(&File::open(top).unwrap(), top, (user, user))
    }

    #[test]
    fn all_that_the_user_before_had_is_given_and_nothing_of_others() {
        let Some((_dir, top, outside)) = made() else { return };
        folder(&top.join("a/b"), BEFORE);
        folder(&top.join("a"), BEFORE);
        folder(&top.join("anothers"), ANOTHER);
        let given = [
            file(&top.join("who"), BEFORE),
            file(&top.join("a/b/x"), BEFORE),
            file(&top.join("anothers/x"), BEFORE),
        ];
        let shared = file(&top.join("shared"), BEFORE);
        chown(&shared, None, Some(ANOTHER)).unwrap();
        let kept = [top.join("anothers"), file(&top.join("a/anothers"), ANOTHER)];
        give_to(&top, NOW).unwrap();
        for path in given.iter().chain([&top, &top.join("a"), &top.join("a/b")]) {
            assert_eq!(owner(path), (NOW, NOW), "{path:?}");
        }
        assert_eq!(owner(&shared), (NOW, ANOTHER), "with the group that it chose");
        for path in &kept {
            assert_eq!(owner(path), (ANOTHER, ANOTHER), "{path:?}");
        }
        assert_eq!(owner(&outside), (BEFORE, BEFORE));
    }

    #[test]
    fn what_links_lead_to_outside_stays() {
        let Some((_dir, top, outside)) = made() else { return };
        let precious = file(&outside.join("precious"), BEFORE);
        let anothers = file(&outside.join("anothers"), ANOTHER);
        let links = [link(&top.join("to-file"), &precious), link(&top.join("to-folder"), &outside)];
        std::fs::hard_link(&anothers, top.join("anothers")).unwrap();
        give_to(&top, NOW).unwrap();
        assert_eq!(owner(&precious), (BEFORE, BEFORE));
        assert_eq!(owner(&outside), (BEFORE, BEFORE));
        assert_eq!(owner(&anothers), (ANOTHER, ANOTHER));
        for link in &links {
            assert_eq!(owner(link), (NOW, NOW), "the link itself: {link:?}");
        }
    }

    #[test]
    fn what_root_had_is_given_unless_it_has_another_name() {
        let Some((_dir, top, outside)) = made() else { return };
        let systems = file(&outside.join("systems"), 0);
        chown(&top, Some(0), Some(0)).unwrap();
        let own = file(&top.join("own"), 0);
        std::fs::hard_link(&systems, top.join("systems")).unwrap();
        give_to(&top, NOW).unwrap();
        assert_eq!((owner(&own), owner(&systems)), ((NOW, NOW), (0, 0)));
    }

    #[test]
    fn a_walk_that_did_not_come_to_its_end_is_done_again() {
        let Some((_dir, top, _)) = made() else { return };
        let who = file(&top.join("who"), BEFORE);
        let deep = (0..=DEPTH_MAX).fold(top.join("deep"), |path, _| path.join("d"));
        folder(&deep, BEFORE);
        let error = give_to(&top, NOW).unwrap_err();
        assert!(error.to_string().contains("more than 256 directories deep"), "{error}");
        assert_eq!(owner(&top), (BEFORE, BEFORE), "it is last");
        std::fs::remove_dir_all(top.join("deep")).unwrap();
        // As if it had been given before the walk ended.
        folder(&top.join("half"), NOW);
        let rest = file(&top.join("half/rest"), BEFORE);
        give_to(&top, NOW).unwrap();
        assert_eq!([owner(&top), owner(&who), owner(&rest)], [(NOW, NOW); 3]);
        // Its own things are no longer looked at.
        let back = file(&top.join("back"), BEFORE);
        give_to(&top, NOW).unwrap();
        assert_eq!(owner(&back), (BEFORE, BEFORE));
    }

    #[test]
    fn what_is_mounted_below_it_stays() {
        let Some((_dir, top, outside)) = made() else { return };
        let precious = file(&outside.join("precious"), BEFORE);
        let below = top.join("mounted");
        folder(&below, BEFORE);
        let mount = |program: &str, words: &[&Path]| {
            Command::new(program).args(words).status().is_ok_and(|status| status.success())
        };
        // A bind mount: the same device.
        if !mount("mount", &[Path::new("--bind"), &outside, &below]) {
            return;
        }
        let given = give_to(&top, NOW);
        let is_gone = mount("umount", &[&below]);
        given.unwrap();
        assert!(is_gone);
        assert_eq!([owner(&outside), owner(&precious)], [(BEFORE, BEFORE); 2]);
        assert_eq!(owner(&top), (NOW, NOW));
    }
}
