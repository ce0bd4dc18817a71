//! Which service a cgroup belongs to, by the inode of its directory. The directories are the truth, as for everything
//! that asks what a process belongs to: nothing is noted when a process starts, the tree is read when an inode is asked
//! for that is not known. The kernel gives no inode of a cgroup twice (kernfs counts generations), so what is known stays
//! true when a directory has gone.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::DirEntryExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Strangers ask as well, and are in no directory of ours: the tree, some milliseconds for a thousand processes, is read
/// at most this often for inodes that were not in it. What has just started has been asked for before it is read, since
/// its process makes no connection earlier than its directory.
const READ_AGAIN: Duration = Duration::from_millis(200);
/// Strangers that are remembered as such until the tree is read again.
const STRANGERS_MAX: usize = 1024;
/// A service may make groups of its own below ours.
const DEPTH_MAX: usize = 8;

/// See the module's description.
#[derive(Debug)]
pub(super) struct Groups {
    /// `…/nave-<cluster>-<host>`; their directories are named as the services are.
    folders: Vec<PathBuf>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    services: HashMap<u64, Arc<str>>,
    strangers: HashMap<u64, Instant>,
}

impl Groups {
    pub(super) fn new(folders: Vec<PathBuf>) -> Self {
        Self { folders, known: Mutex::default() }
    }

    /// The service whose process is in this cgroup.
    pub(super) fn service(&self, cgroup: u64) -> Option<Arc<str>> {
        let mut known = self.known.lock();
        if let Some(service) = known.services.get(&cgroup) {
            return Some(service.clone());
        }
        let now = Instant::now();
        if known.strangers.get(&cgroup).is_some_and(|looked| now - *looked < READ_AGAIN) {
            return None;
        }
        known.services = self.read();
        let service = known.services.get(&cgroup).cloned();
        if service.is_none() {
            if known.strangers.len() >= STRANGERS_MAX {
                known.strangers.clear();
            }
            known.strangers.insert(cgroup, now);
        }
        service
    }

    fn read(&self) -> HashMap<u64, Arc<str>> {
        let mut found = HashMap::new();
        for (path, inode) in self.folders.iter().flat_map(|folder| directories(folder)) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let service = Arc::<str>::from(&*name);
            found.insert(inode, service.clone());
            collect(&path, &service, DEPTH_MAX, &mut found);
        }
        found
    }
}

fn collect(folder: &Path, service: &Arc<str>, depth: usize, found: &mut HashMap<u64, Arc<str>>) {
    for (path, inode) in directories(folder) {
        found.insert(inode, service.clone());
        if depth > 0 {
            collect(&path, service, depth - 1, found);
        }
    }
}

fn directories(folder: &Path) -> impl Iterator<Item = (PathBuf, u64)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| (entry.path(), entry.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_directory_is_of_the_service_that_it_lies_below() {
        let root = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(&path).unwrap();
            fs::metadata(path).unwrap().ino()
        };
        let groups = Groups::new(vec![root.path().join("not there"), root.path().to_owned()]);
        let (web, deep) = (make("web/i-1-1"), make("web/i-1-1/own/deeper"));
        assert_eq!(groups.service(web).as_deref(), Some("web"));
        assert_eq!(groups.service(deep).as_deref(), Some("web"));
        let stranger = fs::metadata(root.path()).unwrap().ino();
        assert_eq!(groups.service(stranger), None);
        let jobs = make("jobs/i-2-1");
        assert_eq!(groups.service(jobs).as_deref(), Some("jobs"), "what is new is found at once");
        // An inode that was a stranger's may be given to a new directory.
        assert_eq!(groups.service(jobs + 1_000_000), None);
        tokio::time::advance(READ_AGAIN).await;
        assert_eq!(groups.service(jobs).as_deref(), Some("jobs"));
    }
}
