//! Removes directories that nobody is in any more. The keeper removes an instance's with its processes; what only hooks
//! were in it does not know, and the directories above, one for each service, outlive their last instance. All is done
//! with rmdir, which the kernel refuses for whatever is in use.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::{Cgroups, Place};

/// Links of a directory without one below it.
const LINKS_OF_EMPTY: u64 = 2;

impl Cgroups {
    /// Removes what is left of the placement `name`, then what has become empty above it. Blocks.
    pub(crate) fn tidy(&self, name: &str) {
        for folder in self.all_folders() {
            for service in directories(&folder) {
                remove_all(&service.join(name));
                if is_empty(&service) {
                    let _in_use = fs::remove_dir(service);
                }
            }
            let _in_use = fs::remove_dir(folder);
        }
    }

    /// Of every hierarchy.
    fn all_folders(&self) -> BTreeSet<PathBuf> {
        let v1 = self.places.iter().filter_map(|(_, place)| match place {
            Place::V1(own) => Some(own.join(&self.folder)),
            Place::V2 | Place::Nowhere(_) => None,
        });
        self.folders().into_iter().chain(v1).collect()
    }
}

/// Removes a folder and whatever is empty in it.
pub(super) fn remove_all(folder: &Path) {
    for below in directories(folder) {
        remove_all(&below);
    }
    let _in_use = fs::remove_dir(folder);
}

/// The services that have groups in a folder.
pub(super) fn services(folder: &Path) -> Vec<String> {
    let names = directories(folder).filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()));
    names.collect::<BTreeSet<_>>().into_iter().collect()
}

fn directories(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path())
}

/// Cheaper than being refused: that takes the kernel's lock of all cgroups.
fn is_empty(dir: &Path) -> bool {
    fs::metadata(dir).is_ok_and(|found| found.nlink() <= LINKS_OF_EMPTY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroups::Controller;

    #[test]
    fn the_last_instance_takes_the_directories_above_along_in_every_hierarchy() {
        let dir = tempfile::tempdir().unwrap();
        let at = |place: &str| dir.path().join(place);
        let cgroups = Cgroups {
            v2: Ok(at("unified")),
            places: vec![
                (Controller::Cpu, Place::V1(at("cpu"))),
                (Controller::Memory, Place::V1(at("memory"))),
                (Controller::Pids, Place::Nowhere("there is none".into())),
            ],
            folder: "nave-c-h".into(),
            former: None,
        };
        let hierarchies = ["unified", "cpu", "memory"];
        for hierarchy in hierarchies {
            for name in ["web/i-1-1/hook", "web/i-2-1", "jobs/i-3-1", "gone"] {
                fs::create_dir_all(at(hierarchy).join("nave-c-h").join(name)).unwrap();
            }
        }
        let left = |hierarchy: &str| services(&at(hierarchy).join("nave-c-h"));
        cgroups.tidy("i-1-1");
        for hierarchy in hierarchies {
            assert_eq!(left(hierarchy), ["jobs", "web"], "{hierarchy}: what an earlier agent left goes too");
            assert!(!at(hierarchy).join("nave-c-h/web/i-1-1").exists());
        }
        cgroups.tidy("i-2-1");
        assert_eq!(left("memory"), ["jobs"]);
        cgroups.tidy("i-3-1");
        for hierarchy in hierarchies {
            assert!(at(hierarchy).exists() && !at(hierarchy).join("nave-c-h").exists(), "{hierarchy}");
        }
    }
}
