//! Where the secrets of instances lie: in memory, so that what an operator hands a service is on no disk of ours, not after
//! a loss of power and not on a disk that was sold. One directory of this agent on a tmpfs of the host, below it one for
//! each instance. A host that swaps may still write such pages out, unless its swap is encrypted.
//!
//! Where there is no such place (or a stranger has taken the name), secrets go beside the other data of the agent, and
//! `nave hosts` says so.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::unistd::geteuid;

/// Said of a host that has none.
const ON_DISK: &str =
    "secrets of services are kept on the disk: neither /run nor /dev/shm is in memory and ours to write to";

/// A directory in memory that this agent may make its own in; none: there is no such place.
pub(crate) fn memory() -> Option<&'static Path> {
    let places = if geteuid().is_root() { ["/run", "/dev/shm"].as_slice() } else { &["/dev/shm"] };
    places.iter().map(Path::new).find(|place| is_in_memory(place))
}

/// Whether what is written there is in memory alone.
pub(crate) fn is_in_memory(place: &Path) -> bool {
    statfs(place).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC)
}

/// The directory of all instances' secrets of the agent of that name; with what is to be said of this host when it is on
/// the disk.
pub(crate) fn root(data_dir: &Path, memory: Option<&Path>, name: &str) -> (PathBuf, Option<String>) {
    let user = geteuid();
    let on_disk = data_dir.join("secrets");
    let Some(place) = memory else { return (on_disk, Some(ON_DISK.to_owned())) };
    let folder = match user.is_root() {
        true => place.join(name),
        false => place.join(format!("{name}-{user}")),
    };
    if is_ours_or_nobodys(&folder) {
        return (folder.join("secrets"), None);
    }
    let why = format!(
        "secrets of services are kept on the disk: {} belongs to somebody else or others may write to it; remove it \
         and start the agent again",
        folder.display()
    );
    (on_disk, Some(why))
}

/// In a directory that all may write to, the name may be somebody else's.
fn is_ours_or_nobodys(folder: &Path) -> bool {
    match std::fs::symlink_metadata(folder) {
        Ok(found) => found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & 0o022 == 0,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Makes the directory of one instance, for nobody but the agent yet. Services pass through those above it on the way to
/// their own, and list none.
pub(crate) fn make(folder: &Path) -> io::Result<()> {
    if let Some(root) = folder.parent() {
        DirBuilder::new().recursive(true).mode(0o711).create(root)?;
        if let Some(above) = root.parent().filter(|above| !is_ours_or_nobodys(above)) {
            let why = format!("{} belongs to somebody else or others may write to it", above.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
    }
    DirBuilder::new().mode(0o700).create(folder)
}

/// Takes it away, and with the last one what is above it in memory.
pub(crate) fn remove(folder: &Path) -> io::Result<()> {
    super::remove(folder)?;
    for above in folder.ancestors().skip(1).take(2).filter(|above| is_in_memory(above)) {
        // While there are others this does nothing.
        let _not_empty = std::fs::remove_dir(above);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_name_that_is_a_strangers_or_open_to_others_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let data = Path::new("/data");
        let of = |place: &Path| root(data, Some(place), "nave-7-h-1");
        let (root_dir, said) = of(dir.path());
        assert_eq!(said, None, "nothing is amiss");
        assert!(root_dir.starts_with(dir.path()) && root_dir.ends_with("secrets"), "{root_dir:?}");
        let folder = root_dir.parent().unwrap().to_owned();
        std::fs::create_dir(&folder).unwrap();
        assert_eq!(of(dir.path()), (root_dir.clone(), None), "our own");
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o777)).unwrap();
        let on_disk = |(place, said): (PathBuf, Option<String>)| {
            assert_eq!(place, data.join("secrets"));
            said.expect("never without a word")
        };
        assert!(on_disk(of(dir.path())).contains(&folder.display().to_string()));
        let error = make(&root_dir.join("i-1")).unwrap_err();
        assert!(error.to_string().contains("somebody else"), "taken in between: {error}");
        std::fs::remove_dir_all(&folder).unwrap();
        std::os::unix::fs::symlink("/etc", &folder).unwrap();
        on_disk(of(dir.path()));
        assert_eq!(on_disk(root(data, None, "nave-7-h-1")), ON_DISK);
    }

    #[test]
    fn a_disk_is_told_from_memory_and_the_last_instance_leaves_nothing_there() {
        assert!(!is_in_memory(Path::new("/proc")));
        let Some(memory) = memory().filter(|place| is_in_memory(place)) else { return };
        let dir = tempfile::tempdir_in(memory).unwrap();
        let (root, _) = root(Path::new("/data"), Some(dir.path()), "nave-7-h-1");
        for id in ["i-1", "i-2"] {
            make(&root.join(id)).unwrap();
            std::fs::write(root.join(id).join("password"), "x").unwrap();
        }
        remove(&root.join("i-1")).unwrap();
        assert!(root.join("i-2/password").exists());
        remove(&root.join("i-2")).unwrap();
        assert!(!root.parent().unwrap().exists());
    }
}
