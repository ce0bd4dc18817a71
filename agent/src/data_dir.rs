//! The agent's directory: made private, locked against a second agent, refused when a newer build wrote it.
//! Only `run` opens it; everybody else gets paths from here.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nave_proto::DATA_FORMAT;
use nix::fcntl::{Flock, FlockArg};

/// The locked directory; dropping it lets another agent in.
#[derive(Debug)]
pub(crate) struct DataDir {
    path: PathBuf,
    lock: Flock<File>,
}

#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("another agent already uses {path}; stop it first, or give this one a data_dir of its own")]
    Locked { path: String },
    #[error(
        "{path} was written by a newer nave (data format {found}, this build reads up to {known}); install that version again"
    )]
    Newer { path: String, found: u32, known: u32 },
    #[error("{path} is not a nave data directory: its file `format` says {found:?}")]
    Strange { path: String, found: String },
    #[error("cannot use {path}")]
    Io { path: String, source: std::io::Error },
}

impl DataDir {
    /// Makes it with mode 0711 (services must reach their own directories below it), locks it and writes
    /// `nave.pid`.
    pub(crate) fn open(path: &Path) -> Result<Self, DataDirError> {
        let io = |path: &Path| {
            let path = path.display().to_string();
            move |source| DataDirError::Io { path, source }
        };
        DirBuilder::new().recursive(true).mode(0o711).create(path).map_err(io(path))?;
        open_to_services(path).map_err(io(path))?;
        // The keeper tells its children only absolute paths.
        let path = &path.canonicalize().map_err(io(path))?;
        let lock_path = path.join("agent.lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(io(&lock_path))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|_| DataDirError::Locked { path: path.display().to_string() })?;
        check_format(path)?;
        let pid = path.join("nave.pid");
        write_atomically(&pid, format!("{}\n", std::process::id()).as_bytes(), 0o644).map_err(io(&pid))?;
        Ok(Self { path: path.clone(), lock })
    }

    /// Names this directory as long as the machine runs: two agents at one place would need one lock. A copy of the
    /// directory is another place, and so is the same one after a reboot. Never 0.
    ///
    /// # Errors
    /// When the lock file cannot be looked at.
    pub(crate) fn place(&self, boot_id: &str) -> std::io::Result<u64> {
        use std::os::unix::fs::MetadataExt as _;
        let lock = self.lock.metadata()?;
        // FNV-1a: the same in every build, which a hasher of the standard library need not be.
        let (device, inode) = (lock.dev().to_le_bytes(), lock.ino().to_le_bytes());
        let bytes = boot_id.bytes().chain(device).chain(inode);
        let hash = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        Ok(bytes.fold(0xcbf2_9ce4_8422_2325, hash).max(1))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
    pub(crate) fn directory(&self) -> PathBuf {
        self.path.join("directory")
    }

    /// As supervised processes see it.
    pub(crate) fn resolv_conf(&self) -> PathBuf {
        self.path.join("resolv.conf")
    }

    pub(crate) fn ledger(&self) -> PathBuf {
        self.path.join("ledger")
    }
    pub(crate) fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    /// Of calls, for the services that want it.
    pub(crate) fn access(&self) -> PathBuf {
        self.path.join("access")
    }
}

/// Services with users of their own pass through to theirs; what is private here is so by its own mode. Whoever made
/// the directory (the keeper, a person) may not have known.
fn open_to_services(path: &Path) -> std::io::Result<()> {
    let found = std::fs::metadata(path)?.permissions().mode() & 0o777;
    match nix::unistd::geteuid().is_root() && found & 0o001 == 0 {
        true => std::fs::set_permissions(path, std::fs::Permissions::from_mode(found | 0o011)),
        false => Ok(()),
    }
}

pub(crate) fn check_format(path: &Path) -> Result<(), DataDirError> {
    let file = path.join("format");
    let shown = path.display().to_string();
    match std::fs::read_to_string(&file) {
        Ok(text) => match text.trim().parse::<u32>() {
            Ok(found) if found <= DATA_FORMAT => Ok(()),
            Ok(found) => Err(DataDirError::Newer { path: shown, found, known: DATA_FORMAT }),
            Err(_) => Err(DataDirError::Strange { path: shown, found: text.trim().to_owned() }),
        },
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            write_atomically(&file, format!("{DATA_FORMAT}\n").as_bytes(), 0o644)
                .map_err(|source| DataDirError::Io { path: file.display().to_string(), source })
        }
        Err(source) => Err(DataDirError::Io { path: file.display().to_string(), source }),
    }
}

/// Replaces a file so that after a crash either the old or the new content is there, never a part.
pub(crate) fn write_atomically(path: &Path, content: &[u8], mode: u32) -> std::io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(mode).open(&temporary)?;
    file.set_permissions(std::fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    sync_folder(path)
}

/// Makes the entry of `path` in its folder durable.
pub(crate) fn sync_folder(path: &Path) -> std::io::Result<()> {
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_refused_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataDir::open(&dir.path().join("data")).unwrap();
        let error = DataDir::open(&dir.path().join("data")).unwrap_err();
        assert!(matches!(error, DataDirError::Locked { .. }), "{error}");
        drop(first);
        DataDir::open(&dir.path().join("data")).unwrap();
    }

    #[test]
    fn a_copy_of_a_directory_and_another_boot_are_another_place() {
        let dir = tempfile::tempdir().unwrap();
        let place =
            |name: &str, boot: &str| DataDir::open(&dir.path().join(name)).unwrap().place(boot).unwrap();
        assert_eq!(place("a", "boot-1"), place("a", "boot-1"), "a restart");
        assert_ne!(place("a", "boot-1"), place("b", "boot-1"));
        assert_ne!(place("a", "boot-1"), place("a", "boot-2"));
        std::fs::rename(dir.path().join("a"), dir.path().join("c")).unwrap();
        assert_ne!(place("a", "boot-1"), place("c", "boot-1"));
    }

    #[test]
    fn a_directory_of_a_newer_build_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("format"), format!("{}\n", DATA_FORMAT + 1)).unwrap();
        let error = DataDir::open(dir.path()).unwrap_err();
        assert!(error.to_string().contains("written by a newer nave"), "{error}");
    }
}
