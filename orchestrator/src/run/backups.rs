//! Snapshots for the day when everything else is gone: each member writes one into its data directory from time to
//! time and keeps the newest few. They are the files of `nave cluster snapshot`, and copying them elsewhere is the
//! person's part. One that cannot be written is said and tried again; it never takes the member down.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::sleep;
use tracing::{error, info, warn};

use crate::api::Hub;
use crate::clock;
use crate::config::{MemberConfig, SnapshotConfig};
use crate::storage::directory::sync_directory;
use crate::storage::snapshot::SnapshotFile;

/// How often it is looked whether one is due: the machine may have slept.
const LOOK: Duration = Duration::from_secs(10);
const SUFFIX: &str = "snapshot";

/// Writes and prunes until the member stops.
pub(super) async fn run(hub: Arc<Hub>, config: MemberConfig) -> Result<(), String> {
    let folder = config.data_dir.join("backups");
    let mut backups = Backups { folder, settings: config.snapshots, newest: None };
    backups.newest = backups.list().ok().and_then(|files| files.last().map(|path| taken_at(path)));
    hub.backup_unix_ns.store(backups.newest.unwrap_or(0), Ordering::Relaxed);
    let look = LOOK.min(backups.settings.every);
    loop {
        tokio::select! {
            () = hub.stop.cancelled() => return Ok(()),
            () = sleep(look) => {}
        }
        if backups.is_due(clock::unix_now_ns()) && hub.raft.state().cluster().is_some() {
            backups.take(&hub).await;
        }
    }
}

struct Backups {
    folder: PathBuf,
    settings: SnapshotConfig,
    /// When the newest was taken, unix nanoseconds.
    newest: Option<i64>,
}

impl Backups {
    fn is_due(&self, now: i64) -> bool {
        let every = i64::try_from(self.settings.every.as_nanos()).unwrap_or(i64::MAX);
        // A clock that went back must not put it off for ever.
        self.settings.keep > 0 && self.newest.is_none_or(|newest| now - newest >= every || now < newest)
    }

    async fn take(&mut self, hub: &Hub) {
        let now = clock::unix_now_ns();
        self.newest = Some(now);
        let exported = match hub.raft.export_snapshot().await {
            Ok(exported) => exported,
            Err(error) => return warn!(%error, "no scheduled snapshot could be written, trying again later"),
        };
        let (folder, keep) = (self.folder.clone(), self.settings.keep);
        let kept = tokio::task::spawn_blocking(move || keep_newest(&exported, &folder, now, keep)).await;
        match kept.map_err(io::Error::other).and_then(|kept| kept) {
            Ok(path) => {
                hub.backup_unix_ns.store(now, Ordering::Relaxed);
                info!(path = %path.display(), "scheduled snapshot written");
            }
            Err(error) => {
                error!(%error, folder = %self.folder.display(), "no scheduled snapshot could be kept")
            }
        }
    }

    fn list(&self) -> io::Result<Vec<PathBuf>> {
        list(&self.folder)
    }
}

/// Oldest first: names begin with the time.
fn list(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path()));
    let mut files: Vec<_> = entries.collect::<io::Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|suffix| suffix == SUFFIX));
    files.sort();
    Ok(files)
}

/// The time in a file's name; 0 for one that somebody else put there.
fn taken_at(path: &Path) -> i64 {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    stem.parse().unwrap_or(0)
}

/// Gives a snapshot its name in `folder` and deletes the oldest there. Durable on return; blocks.
fn keep_newest(exported: &SnapshotFile, folder: &Path, now: i64, keep: usize) -> io::Result<PathBuf> {
    exported.verify()?;
    fs::create_dir_all(folder)?;
    let path = folder.join(format!("{now:020}.{SUFFIX}"));
    exported.keep_as(&path)?;
    sync_directory(folder)?;
    let files = list(folder)?;
    for old in &files[..files.len().saturating_sub(keep)] {
        fs::remove_file(old)?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::snapshot::SnapshotDirectory;
    use crate::storage::snapshot::tests::written;

    fn backups(folder: &Path) -> Backups {
        let settings = SnapshotConfig { every: Duration::from_secs(60), keep: 2 };
        Backups { folder: folder.to_owned(), settings, newest: None }
    }

    #[test]
    fn the_newest_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let directory = SnapshotDirectory::open(dir.path()).unwrap();
        let folder = dir.path().join("backups");
        for now in [5, 600, 7000] {
            let path = keep_newest(&written(&directory), &folder, now, 2).unwrap();
            assert_eq!(taken_at(&path), now);
            SnapshotFile::open(&path).unwrap().verify().unwrap();
        }
        let times: Vec<_> = list(&folder).unwrap().iter().map(|path| taken_at(path)).collect();
        assert_eq!(times, [600, 7000]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn one_is_due_when_the_newest_is_old_or_from_the_future() {
        let mut backups = backups(Path::new("nowhere"));
        let minute = 60_000_000_000;
        assert!(backups.is_due(0));
        backups.newest = Some(minute);
        assert!(!backups.is_due(2 * minute - 1) && backups.is_due(2 * minute) && backups.is_due(minute - 1));
        backups.settings.keep = 0;
        assert!(!backups.is_due(10 * minute));
    }
}
