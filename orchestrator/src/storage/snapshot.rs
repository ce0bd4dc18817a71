//! A snapshot as one file, and the directory that keeps the newest.
//!
//! ```text
//! "NAVESNAP"  format u32
//! frame: nave.v1.SnapshotMeta (log id and membership that the rows stand for)
//! frame: key, frame: nave.v1.Row, …        a frame is its length as u32, then its bytes
//! u32::MAX    number of rows u64           SHA-256 of all bytes before it
//! ```
//! Numbers are big-endian. A file is written under a temporary name, synced, renamed, and the directory synced, so a
//! name ending in `.snapshot` is whole unless the disk is at fault; that is checked at start and before an install.

mod format;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

pub(crate) use self::format::{SnapshotReader, SnapshotWriter};
use crate::raft::types::{LogId, SnapshotMeta};
use crate::storage::directory::sync_directory;

const SUFFIX: &str = "snapshot";
const TEMPORARY_SUFFIX: &str = "tmp";

/// An open snapshot file. It stays readable when a newer one takes its place on disk.
#[derive(Debug, Clone)]
pub(crate) struct SnapshotFile {
    file: Arc<File>,
    path: PathBuf,
    size_bytes: u64,
    /// Set while the file has no name of its own yet: received, not yet installed.
    temporary: Option<Arc<TemporaryFile>>,
}

impl SnapshotFile {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let size_bytes = file.metadata()?.len();
        Ok(Self { file: Arc::new(file), path: path.to_owned(), size_bytes, temporary: None })
    }

    /// A file that is deleted with the last clone of this value, unless it is published before.
    pub(crate) fn open_temporary(temporary: TemporaryFile) -> io::Result<Self> {
        let file = Self::open(temporary.path())?;
        Ok(Self { temporary: Some(Arc::new(temporary)), ..file })
    }

    /// When it was last written to, unix nanoseconds; 0 when the file system does not say.
    pub(crate) fn written_unix_ns(&self) -> i64 {
        let modified = self.file.metadata().and_then(|data| data.modified());
        let since = modified.ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
        since.and_then(|since| i64::try_from(since.as_nanos()).ok()).unwrap_or(0)
    }

    /// Gives a temporary file its name, on the same file system; it is synced first. Blocks.
    pub(crate) fn keep_as(&self, path: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, path)?;
        if let Some(temporary) = &self.temporary {
            temporary.published.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// At most `bytes_max` bytes from `offset`; blocks.
    pub(crate) fn read_at(&self, offset: u64, bytes_max: usize) -> io::Result<Vec<u8>> {
        let left = usize::try_from(self.size_bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; left.min(bytes_max)];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// Reads from the beginning; blocks.
    pub(crate) fn reader(&self) -> io::Result<SnapshotReader> {
        SnapshotReader::new(self.file.clone())
    }

    /// Checks the whole file and returns what it says it is; blocks.
    pub(crate) fn verify(&self) -> io::Result<SnapshotMeta> {
        let mut reader = self.reader()?;
        while reader.next_row()?.is_some() {}
        Ok(reader.meta().clone())
    }
}

/// The directory `snapshots`.
#[derive(Debug)]
pub(crate) struct SnapshotDirectory {
    path: PathBuf,
    current: Mutex<Option<(SnapshotMeta, SnapshotFile)>>,
    temporaries: AtomicU64,
}

/// A file that is deleted unless it is published.
#[derive(Debug)]
pub(crate) struct TemporaryFile {
    path: PathBuf,
    published: AtomicBool,
}

impl TemporaryFile {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if !self.published.load(Ordering::Relaxed)
            && let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "temporary snapshot file left behind");
        }
    }
}

impl SnapshotDirectory {
    /// Finds the newest whole snapshot. Unfinished files are deleted; a damaged one is set aside and said so, since the
    /// log and the state database may still hold everything it had (openraft refuses to start when they do not).
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let directory =
            Self { path: path.to_owned(), current: Mutex::new(None), temporaries: AtomicU64::new(0) };
        for entry in fs::read_dir(path)? {
            let file = entry?.path();
            match file.extension().and_then(|suffix| suffix.to_str()) {
                Some(TEMPORARY_SUFFIX) => fs::remove_file(&file)?,
                Some(SUFFIX) => directory.consider(&file)?,
                Some(_) | None => {}
            }
        }
        Ok(directory)
    }

    fn consider(&self, path: &Path) -> io::Result<()> {
        let file = SnapshotFile::open(path)?;
        match file.verify() {
            Ok(meta) => {
                self.take_over(meta, file);
            }
            Err(error) => {
                let aside = path.with_extension("damaged");
                tracing::error!(path = %path.display(), %error, "snapshot damaged, set aside");
                fs::rename(path, aside)?;
            }
        }
        Ok(())
    }

    pub(crate) fn current(&self) -> Option<(SnapshotMeta, SnapshotFile)> {
        self.current.lock().clone()
    }

    /// A new name for a file in the making.
    pub(crate) fn temporary(&self, purpose: &str) -> TemporaryFile {
        let number = self.temporaries.fetch_add(1, Ordering::Relaxed);
        let path = self.path.join(format!("{purpose}-{number}.{TEMPORARY_SUFFIX}"));
        TemporaryFile { path, published: AtomicBool::new(false) }
    }

    /// Makes a finished file durable under its own name, and the current snapshot unless there is a newer one; older
    /// files are deleted. Blocks.
    pub(crate) fn publish(&self, temporary: &TemporaryFile, meta: &SnapshotMeta) -> io::Result<SnapshotFile> {
        File::open(temporary.path())?.sync_all()?;
        let path = self.path.join(file_name(meta.last_log_id.as_ref()));
        fs::rename(temporary.path(), &path)?;
        temporary.published.store(true, Ordering::Relaxed);
        sync_directory(&self.path)?;
        let file = SnapshotFile::open(&path)?;
        self.take_over(meta.clone(), file.clone());
        Ok(file)
    }

    /// Makes `file` this directory's snapshot: a received one gets its name, one from elsewhere is copied, one that is
    /// here already is left alone. Blocks.
    pub(crate) fn adopt(&self, file: &SnapshotFile, meta: &SnapshotMeta) -> io::Result<SnapshotFile> {
        if let Some(temporary) = &file.temporary {
            return self.publish(temporary, meta);
        }
        if file.path.parent() == Some(self.path.as_path()) {
            return Ok(file.clone());
        }
        let temporary = self.temporary("copy");
        fs::copy(&file.path, temporary.path())?;
        self.publish(&temporary, meta)
    }

    fn take_over(&self, meta: SnapshotMeta, file: SnapshotFile) {
        let mut current = self.current.lock();
        let superseded = match &*current {
            Some((newest, _)) if newest.last_log_id > meta.last_log_id => Some(file),
            Some((_, old)) if old.path == file.path => {
                *current = Some((meta, file));
                None
            }
            Some(_) | None => current.replace((meta, file)).map(|(_, old)| old),
        };
        if let Some(old) = superseded
            && let Err(error) = fs::remove_file(&old.path)
        {
            tracing::warn!(path = %old.path.display(), %error, "superseded snapshot not deleted");
        }
    }
}

fn file_name(last: Option<&LogId>) -> String {
    match last {
        Some(id) => format!("{:020}-{}-{}.{SUFFIX}", id.index, id.leader_id.term, id.leader_id.node_id),
        None => format!("empty.{SUFFIX}"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::raft::types::{LeaderId, StoredMembership};

    pub(crate) fn meta(index: u64) -> SnapshotMeta {
        SnapshotMeta {
            last_log_id: Some(LogId::new(LeaderId { term: 2, node_id: 1 }, index)),
            last_membership: StoredMembership::default(),
        }
    }

    fn write(directory: &SnapshotDirectory, index: u64, rows: u8) -> SnapshotFile {
        let temporary = directory.temporary("build");
        let mut writer = SnapshotWriter::create(temporary.path(), &meta(index)).unwrap();
        for row in 0..rows {
            writer.row(&[row], &vec![row; usize::from(row) * 100]).unwrap();
        }
        writer.finish().unwrap();
        directory.publish(&temporary, &meta(index)).unwrap()
    }

    /// A temporary file with a few rows, as an export is.
    pub(crate) fn written(directory: &SnapshotDirectory) -> SnapshotFile {
        let temporary = directory.temporary("export");
        let mut writer = SnapshotWriter::create(temporary.path(), &meta(3)).unwrap();
        writer.row(&[1], &[2; 100]).unwrap();
        writer.finish().unwrap();
        SnapshotFile::open_temporary(temporary).unwrap()
    }

    #[test]
    fn rows_survive_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = write(&SnapshotDirectory::open(dir.path()).unwrap(), 9, 50);
        let mut reader = file.reader().unwrap();
        assert_eq!(reader.meta(), &meta(9));
        for row in 0..50 {
            let (key, value) = reader.next_row().unwrap().unwrap();
            assert_eq!((key, value), (vec![row], vec![row; usize::from(row) * 100]));
        }
        assert_eq!(reader.next_row().unwrap(), None);
    }

    #[test]
    fn the_newest_is_found_again_and_older_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let directory = SnapshotDirectory::open(dir.path()).unwrap();
        let first = write(&directory, 5, 1);
        write(&directory, 7, 2);
        write(&directory, 6, 2);
        fs::write(dir.path().join("build-9.tmp"), "unfinished").unwrap();
        let again = SnapshotDirectory::open(dir.path()).unwrap();
        assert_eq!(again.current().unwrap().0, meta(7));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(first.verify().unwrap(), meta(5), "an open file outlives its name");
    }

    #[test]
    fn every_torn_or_altered_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let directory = SnapshotDirectory::open(dir.path()).unwrap();
        let whole = fs::read(&write(&directory, 5, 4).path).unwrap();
        let other = dir.path().join("other");
        for length in 0..whole.len() {
            fs::write(&other, &whole[..length]).unwrap();
            assert!(SnapshotFile::open(&other).unwrap().verify().is_err(), "cut at {length}");
        }
        for at in 0..whole.len() {
            let mut altered = whole.clone();
            altered[at] ^= 0x40;
            fs::write(&other, &altered).unwrap();
            assert!(SnapshotFile::open(&other).unwrap().verify().is_err(), "altered at {at}");
        }
        let mut longer = whole;
        longer.push(0);
        fs::write(&other, longer).unwrap();
        assert!(SnapshotFile::open(&other).unwrap().verify().is_err(), "one byte more");
    }

    #[test]
    fn a_damaged_snapshot_is_set_aside_at_start() {
        let dir = tempfile::tempdir().unwrap();
        let file = write(&SnapshotDirectory::open(dir.path()).unwrap(), 5, 4);
        let bytes = fs::read(&file.path).unwrap();
        fs::write(&file.path, &bytes[..bytes.len() - 1]).unwrap();
        let directory = SnapshotDirectory::open(dir.path()).unwrap();
        assert!(directory.current().is_none());
        assert!(file.path.with_extension("damaged").exists());
    }
}
