//! The directory's file: one record, replaced as a whole, at a bounded rate. It is a memory of what the hub has said, so
//! one that is torn, or of a newer build, costs only what the next session tells anyway.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nave_agent_core::directory::Directory;
use nave_proto::pb;
use prost::Message as _;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::DirectoryHandle;
use crate::data_dir::write_atomically;

/// Between two writes, in times of what the last one took, so that they cost 2 % of the disk's time at most: 5,000
/// endpoints are some 300 KiB and 10 ms.
const REST_FACTOR: u32 = 50;
const REST_MIN: Duration = Duration::from_millis(200);
const REST_MAX: Duration = Duration::from_secs(10);

/// Writes the directory down.
#[derive(Debug)]
pub(crate) struct Store {
    path: PathBuf,
    directory: DirectoryHandle,
    changed: watch::Receiver<u64>,
}

impl Store {
    pub(crate) fn new(path: PathBuf, directory: DirectoryHandle) -> Self {
        let changed = directory.shared.revision.subscribe();
        Self { path, directory, changed }
    }

    /// What was written down last; nothing when there is none, or none that can be used. Blocks.
    pub(crate) fn read(path: &Path) -> Directory {
        let mut directory = Directory::default();
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return directory,
            Err(error) => {
                warn!(path = %path.display(), %error, "the directory cannot be read; the hub tells it again");
                return directory;
            }
        };
        let record = pb::DirectoryRecord::decode(bytes.as_slice()).ok().and_then(|record| record.whole);
        match record.map(|whole| directory.apply(whole)) {
            Some(Ok(_)) => {}
            Some(Err(_)) | None => {
                warn!(path = %path.display(), "the directory's file makes no sense; the hub tells it again");
            }
        }
        directory
    }

    /// Writes what is new, until `shutdown`, and once more then.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let mut failing = false;
        loop {
            let ends = tokio::select! {
                changed = self.changed.changed() => changed.is_err(),
                () = shutdown.cancelled() => !self.changed.has_changed().unwrap_or(false),
            };
            if ends {
                return;
            }
            self.changed.mark_unchanged();
            let began = Instant::now();
            let written = self.write().await;
            let rest = (began.elapsed() * REST_FACTOR).clamp(REST_MIN, REST_MAX);
            if let Err(error) = &written
                && !failing
            {
                warn!(path = %self.path.display(), %error, "the directory cannot be written down");
            }
            failing = written.is_err();
            tokio::select! {
                () = tokio::time::sleep(rest) => {}
                () = shutdown.cancelled() => {}
            }
        }
    }

    async fn write(&self) -> std::io::Result<()> {
        let (path, directory) = (self.path.clone(), self.directory.clone());
        let written = tokio::task::spawn_blocking(move || {
            let record = pb::DirectoryRecord { whole: Some(directory.read(Directory::whole)) };
            write_atomically(&path, &record.encode_to_vec(), 0o600)
        });
        written.await.map_err(std::io::Error::other)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::Asks;

    fn update(revision: u64) -> pb::DirectoryUpdate {
        let port = pb::Port { service_port: 80, ..Default::default() };
        let service = pb::DirectoryService {
            name: "web".to_owned(),
            address_suffix: 5,
            ports: [("http".to_owned(), port)].into(),
            allow: None,
        };
        let services = vec![service];
        pb::DirectoryUpdate {
            incarnation: 1,
            revision,
            whole: true,
            everything: true,
            services,
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn what_the_hub_said_last_is_known_at_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("directory");
        assert_eq!(Store::read(&path), Directory::default());
        let directory = DirectoryHandle::new(Directory::default(), Asks::default());
        let shutdown = CancellationToken::new();
        let store = Store::new(path.clone(), directory.clone());
        let mut running = tokio::task::JoinSet::new();
        running.spawn(store.run(shutdown.clone()));
        directory.take(update(3)).unwrap();
        let written = async {
            while Store::read(&path).revision() != 3 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), written).await.unwrap();
        directory.take(update(4)).unwrap();
        shutdown.cancel();
        running.join_next().await.unwrap().unwrap();
        let read = Store::read(&path);
        assert_eq!((read.revision(), read.service("web").unwrap().suffix), (4, 5));
        std::fs::write(&path, b"not a directory").unwrap();
        assert_eq!(Store::read(&path), Directory::default());
    }
}
