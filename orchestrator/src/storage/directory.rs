//! Whose data directory this is. The file `identity` names cluster, member and format; it is written once, synced, and
//! held under an exclusive lock for as long as the member runs. A directory of another cluster, of another member, of a
//! newer format, or in use by another process is refused before a database is opened.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use nave_proto::DATA_FORMAT;
use nave_proto::ids::{ClusterId, MemberId};

/// Why a data directory was not opened.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    #[error("data directory {path} is in use by another process; stop it first, or choose another data_dir")]
    InUse { path: PathBuf },
    #[error(
        "data directory {path} belongs to {found}, but this member is {expected}; correct data_dir, cluster_id or id, \
         or move the directory away to start this member empty"
    )]
    Foreign { path: PathBuf, found: String, expected: String },
    #[error(
        "data directory {path} has format {found}, this program knows up to {DATA_FORMAT}; \
         start the newer version that wrote it"
    )]
    Newer { path: PathBuf, found: u32 },
    #[error(
        "{path} cannot be read as an identity file ({what}); restore it, or move the data directory away"
    )]
    Unreadable { path: PathBuf, what: String },
    #[error(
        "the member of data directory {path} was removed from its cluster, and its id is not used again; \
         `nave cluster add` makes a new one"
    )]
    Removed { path: PathBuf },
    #[error("data directory {path} cannot be used")]
    Io { path: PathBuf, source: io::Error },
}

/// An open data directory; the lock lasts as long as this value.
#[derive(Debug)]
pub(crate) struct DataDirectory {
    path: PathBuf,
    _locked: File,
}

impl DataDirectory {
    /// Opens `path`, creating it with this identity when it is new.
    pub(crate) fn open(path: &Path, cluster: ClusterId, member: MemberId) -> Result<Self, DirectoryError> {
        let io = |source| DirectoryError::Io { path: path.to_owned(), source };
        fs::create_dir_all(path).map_err(io)?;
        let file_path = path.join("identity");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&file_path)
            .map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DirectoryError::InUse { path: path.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(io)?;
        let own = Identity { format: DATA_FORMAT, cluster, member };
        if text.is_empty() {
            write_identity(&mut file, path, &own).map_err(io)?;
        } else {
            own.check(path, &file_path, &text)?;
        }
        if path.join(REMOVED).exists() {
            return Err(DirectoryError::Removed { path: path.to_owned() });
        }
        for name in ["log", "state", "snapshots"] {
            fs::create_dir_all(path.join(name)).map_err(io)?;
        }
        sync_directory(path).map_err(io)?;
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync_directory(parent).map_err(io)?;
        }
        Ok(Self { path: path.to_owned(), _locked: file })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.path.join("state")
    }

    pub(crate) fn snapshots(&self) -> PathBuf {
        self.path.join("snapshots")
    }
}

/// In the directory of a member that has left its cluster.
const REMOVED: &str = "removed";

/// The directory's member has left its cluster: it is not opened again. Blocks.
pub(crate) fn mark_removed(path: &Path, text: &str) -> io::Result<()> {
    let mut file = File::create(path.join(REMOVED))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    sync_directory(path)
}

/// Makes the names in `path` (created, renamed, removed files) durable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

struct Identity {
    format: u32,
    cluster: ClusterId,
    member: MemberId,
}

impl Identity {
    fn check(&self, path: &Path, file_path: &Path, text: &str) -> Result<(), DirectoryError> {
        let unreadable = |what: String| DirectoryError::Unreadable { path: file_path.to_owned(), what };
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
                .ok_or_else(|| unreadable(format!("no {name}")))
        };
        let format: u32 = field("format")?.parse().map_err(|_| unreadable("bad format".to_owned()))?;
        if format > self.format {
            return Err(DirectoryError::Newer { path: path.to_owned(), found: format });
        }
        let cluster: ClusterId = field("cluster")?.parse().map_err(|e| unreadable(format!("{e}")))?;
        let member: MemberId = field("member")?.parse().map_err(|e| unreadable(format!("{e}")))?;
        if (cluster, member) != (self.cluster, self.member) {
            return Err(DirectoryError::Foreign {
                path: path.to_owned(),
                found: format!("member {member} of cluster {cluster}"),
                expected: format!("member {} of cluster {}", self.member, self.cluster),
            });
        }
        Ok(())
    }
}

/// One small write into an empty file: after a crash it is whole or, on a file system that tears it, refused.
fn write_identity(file: &mut File, path: &Path, identity: &Identity) -> io::Result<()> {
    let text =
        format!("format {}\ncluster {}\nmember {}\n", identity.format, identity.cluster, identity.member);
    file.rewind()?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    sync_directory(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: ClusterId = ClusterId(7);

    fn open(path: &Path, cluster: ClusterId, member: u64) -> Result<DataDirectory, DirectoryError> {
        DataDirectory::open(path, cluster, MemberId(member))
    }

    #[test]
    fn a_directory_knows_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), CLUSTER, 1).unwrap());
        drop(open(dir.path(), CLUSTER, 1).unwrap());
        let error = open(dir.path(), ClusterId(8), 1).unwrap_err().to_string();
        assert!(error.contains("belongs to member m-1 of cluster 0000000000000007"), "{error}");
        assert!(matches!(open(dir.path(), CLUSTER, 2), Err(DirectoryError::Foreign { .. })));
    }

    #[test]
    fn the_directory_of_a_removed_member_is_not_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), CLUSTER, 1).unwrap());
        mark_removed(dir.path(), "removed\n").unwrap();
        let error = open(dir.path(), CLUSTER, 1).unwrap_err().to_string();
        assert!(error.contains("was removed from its cluster"), "{error}");
    }

    #[test]
    fn two_processes_cannot_share_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let _held = open(dir.path(), CLUSTER, 1).unwrap();
        assert!(matches!(open(dir.path(), CLUSTER, 1), Err(DirectoryError::InUse { .. })));
    }

    #[test]
    fn a_newer_format_and_garbage_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path(), CLUSTER, 1).unwrap());
        let file = dir.path().join("identity");
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text.replace(&format!("format {DATA_FORMAT}"), "format 99")).unwrap();
        assert!(matches!(open(dir.path(), CLUSTER, 1), Err(DirectoryError::Newer { found: 99, .. })));
        fs::write(&file, "fro").unwrap();
        assert!(matches!(open(dir.path(), CLUSTER, 1), Err(DirectoryError::Unreadable { .. })));
    }
}
