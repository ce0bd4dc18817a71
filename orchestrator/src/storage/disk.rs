//! Refuses new work before the disk is full. A write that fails ends the member (`failure.rs`); this keeps a margin in
//! front of that, so that a full disk shows as a clear refusal while reads, heartbeats and running processes go on.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// Proposals are refused below this. It holds a second of log at the fastest rate measured (60 MB/s), a flush of
/// each database's memtables (16 MiB) and RocksDB's own files.
pub const FREE_BYTES_MIN: u64 = 64 * 1024 * 1024;

const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// What the last look at the file system said.
#[derive(Debug)]
pub(crate) struct DiskSpace {
    path: PathBuf,
    free_bytes: AtomicU64,
    free_bytes_min: u64,
}

impl DiskSpace {
    pub(crate) fn new(path: &Path, free_bytes_min: u64) -> io::Result<Arc<Self>> {
        let free = free_bytes(path)?;
        Ok(Arc::new(Self { path: path.to_owned(), free_bytes: AtomicU64::new(free), free_bytes_min }))
    }

    /// Free bytes for an unprivileged writer, when last looked at.
    pub(crate) fn free_bytes(&self) -> u64 {
        self.free_bytes.load(Ordering::Relaxed)
    }

    /// `Err` says, in words for the person who must act, why nothing more is accepted.
    pub(crate) fn check(&self) -> Result<(), String> {
        let free = self.free_bytes();
        if free >= self.free_bytes_min {
            return Ok(());
        }
        Err(format!(
            "the disk of {} has {} MiB free and at least {} MiB are needed; free some space, writes are then accepted again",
            self.path.display(),
            free / (1024 * 1024),
            self.free_bytes_min / (1024 * 1024)
        ))
    }

    /// Looks every second until `shutdown`. statvfs does not wait for the disk, so it may run on a worker.
    pub(crate) async fn watch(self: Arc<Self>, shutdown: CancellationToken) {
        let mut full = false;
        while !shutdown.is_cancelled() {
            match free_bytes(&self.path) {
                Ok(free) => self.free_bytes.store(free, Ordering::Relaxed),
                Err(error) => {
                    tracing::warn!(%error, path = %self.path.display(), "free disk space is unknown")
                }
            }
            let now_full = self.check().is_err();
            if now_full != full {
                full = now_full;
                let free_bytes = self.free_bytes();
                if full {
                    tracing::error!(free_bytes, "disk nearly full, refusing writes");
                } else {
                    tracing::info!(free_bytes, "disk has room again, accepting writes");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(POLL_INTERVAL) => {}
                () = shutdown.cancelled() => {}
            }
        }
    }
}

fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(path)?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nearly_full_disk_refuses_in_words() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(DiskSpace::new(dir.path(), 1).unwrap().check(), Ok(()));
        let full = DiskSpace::new(dir.path(), u64::MAX).unwrap();
        assert!(full.check().is_err_and(|text| text.contains("MiB free")));
    }
}
