//! The directories of services and instances, and what becomes of them.
//!
//! `services/<name>` is a service's home and `data/<name>/<ordinal>` its data, kept for ever; `instances/<id>` an
//! instance's own and `run/<id>` what is provided for it, gone with it;
//! `logs/<service>/<id>-<epoch>` its output, of which the last few outlive it. The parents belong to the agent alone
//! and what a service may write lies beside, never above, what we make: so no link of its making can lead us astray.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nave_agent_core::ProcessKey;
use nave_proto::ids::InstanceId;
use tracing::{debug, warn};

use super::heirs;
use crate::clock;
use crate::logs::limits::MAX_AGE;
use crate::logs::source::parse_folder;
use crate::provision::{self, Places};

/// Ended placements whose output is kept, per service: enough to read what a crash loop said.
const ENDED_LOGS_PER_SERVICE: usize = 5;
/// And on the whole host: with 5 segments of 10 MiB each, at most 2.5 GiB.
const ENDED_LOGS: usize = 50;

/// Which logs are not to be removed.
#[derive(Debug, Clone, Default)]
pub(crate) struct KeptLogs {
    /// Placements that may still write.
    pub(crate) alive: BTreeSet<(InstanceId, u64)>,
    /// How old the logs of each service may become; of one that is not named, [`MAX_AGE`].
    pub(crate) max_age: BTreeMap<String, Duration>,
}

/// The agent's directory tree, by name.
#[derive(Debug, Clone)]
pub(crate) struct Directories {
    root: PathBuf,
    /// Of all instances; see `provision::secrets`.
    secrets: PathBuf,
}

/// Of one instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InstanceDirectories {
    pub(crate) home: PathBuf,
    pub(crate) own: PathBuf,
    pub(crate) logs: PathBuf,
    /// Made anew for each start; see `provision`.
    pub(crate) run: PathBuf,
    /// Likewise.
    pub(crate) secrets: PathBuf,
    /// Of one process: its directories `tmp` and `var-tmp` are its /tmp and /var/tmp.
    pub(crate) tmp: PathBuf,
}

impl InstanceDirectories {
    pub(crate) fn places(&self) -> Places<'_> {
        Places { run: &self.run, secrets: &self.secrets }
    }
}

impl Directories {
    pub(crate) fn new(data_dir: &Path) -> Self {
        Self { root: data_dir.to_owned(), secrets: data_dir.join("secrets") }
    }

    /// With the secrets of instances there.
    pub(crate) fn with_secrets(self, secrets: PathBuf) -> Self {
        Self { secrets, ..self }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// What is provided for each instance.
    pub(crate) fn runs(&self) -> PathBuf {
        self.root.join("run")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    pub(crate) fn of(&self, service: &str, instance: InstanceId, key: ProcessKey) -> InstanceDirectories {
        InstanceDirectories {
            home: self.root.join("services").join(service),
            own: self.root.join("instances").join(instance.to_string()),
            run: self.root.join("run").join(instance.to_string()),
            secrets: self.secrets.join(instance.to_string()),
            logs: self.logs().join(service).join(format!("{instance}-{}", key.epoch)),
            tmp: self.root.join("tmp").join(format!("{instance}-{}-{}", key.epoch, key.attempt)),
        }
    }

    /// Makes what a process needs. `owner`: the service's user and group, when it has one of its own.
    pub(crate) fn prepare(
        &self,
        service: &str,
        instance: InstanceId,
        key: ProcessKey,
        owner: Option<(u32, u32)>,
    ) -> io::Result<InstanceDirectories> {
        let dirs = self.of(service, instance, key);
        for parent in ["services", "instances", "run"] {
            // Passed through by services on the way to their own, listed by nobody.
            DirBuilder::new().recursive(true).mode(0o711).create(self.root.join(parent))?;
        }
        make_private(&dirs.home, owner)?;
        make_private(&dirs.own, owner)?;
        DirBuilder::new().recursive(true).mode(0o700).create(&dirs.logs)?;
        Ok(dirs)
    }

    /// A new, empty /tmp and /var/tmp for the process that is about to start.
    pub(crate) fn prepare_tmp(dirs: &InstanceDirectories) -> io::Result<()> {
        // Left by an agent that ended in the middle of this.
        match std::fs::remove_dir_all(&dirs.tmp) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        // The way in leads through the process's own mount alone.
        DirBuilder::new().recursive(true).mode(0o700).create(&dirs.tmp)?;
        for name in ["tmp", "var-tmp"] {
            let path = dirs.tmp.join(name);
            DirBuilder::new().create(&path)?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o1777))?;
        }
        Ok(())
    }

    /// Removes the /tmp of all the instance's processes but one. Nothing should wait for this: the kernel takes a grace
    /// period of some milliseconds for each directory that has something mounted below it.
    pub(crate) fn remove_tmp(&self, instance: InstanceId, keep: Option<ProcessKey>) {
        let of_instance = format!("{instance}-");
        let kept = keep.map(|key| format!("{instance}-{}-{}", key.epoch, key.attempt));
        for folder in folders(&self.root.join("tmp")) {
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            let is_its = name.starts_with(&of_instance) && Some(&*name) != kept.as_deref();
            if is_its && let Err(error) = std::fs::remove_dir_all(&folder) {
                warn!(%instance, path = %folder.display(), %error, "an old /tmp could not be removed");
            }
        }
    }

    /// What outlives all instances of one ordinal of a service; nothing ever removes it.
    pub(crate) fn data(&self, service: &str, ordinal: u32) -> PathBuf {
        self.root.join("data").join(service).join(ordinal.to_string())
    }

    /// Makes that directory, for the service alone.
    pub(crate) fn prepare_data(
        &self,
        service: &str,
        ordinal: u32,
        owner: Option<(u32, u32)>,
    ) -> io::Result<()> {
        let path = self.data(service, ordinal);
        for parent in [self.root.join("data"), self.root.join("data").join(service)] {
            DirBuilder::new().recursive(true).mode(0o711).create(parent)?;
        }
        make_private(&path, owner)
    }

    /// The instance has left this host for good.
    pub(crate) fn forget(&self, instance: InstanceId) {
        let run = self.root.join("run").join(instance.to_string());
        if let Err(error) = provision::remove(&run) {
            warn!(%instance, path = %run.display(), %error, "its files could not be removed");
        }
        let secrets = self.secrets.join(instance.to_string());
        if let Err(error) = provision::secrets::remove(&secrets) {
            warn!(%instance, path = %secrets.display(), %error, "its secrets could not be removed");
        }
        self.remove_tmp(instance, None);
        let own = self.root.join("instances").join(instance.to_string());
        match std::fs::remove_dir_all(&own) {
            Ok(()) => debug!(%instance, "its directory is removed"),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                warn!(%instance, path = %own.display(), %error, "its directory could not be removed")
            }
        }
    }

    /// Removes the output of all but the last ended placements, and of those what is too old.
    pub(crate) fn prune_logs(&self, keep: &KeptLogs) {
        let mut all = Vec::new();
        for service in folders(&self.logs()) {
            let mut ended = folders(&service);
            ended.retain(|folder| {
                let name = folder.file_name().map(|name| name.to_string_lossy().into_owned());
                name.as_deref()
                    .and_then(parse_folder)
                    .is_some_and(|placement| !keep.alive.contains(&placement))
            });
            // Of a process that never said a word there is nothing to keep.
            let (silent, mut ended): (Vec<_>, Vec<_>) =
                ended.into_iter().partition(|folder| is_silent(folder));
            remove(&silent);
            let name = service.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let max_age = keep.max_age.get(&name).copied().unwrap_or(MAX_AGE);
            let (old, kept): (Vec<_>, Vec<_>) =
                ended.into_iter().partition(|folder| is_older(folder, max_age));
            remove(&old);
            ended = kept;
            newest_first(&mut ended);
            let kept = ended.len().min(ENDED_LOGS_PER_SERVICE);
            remove(&ended.split_off(kept));
            all.extend(ended);
        }
        newest_first(&mut all);
        let kept = all.len().min(ENDED_LOGS);
        remove(&all.split_off(kept));
    }
}

/// A directory for one user alone; also when it was there before, and with all that another user had there.
fn make_private(path: &Path, owner: Option<(u32, u32)>) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(e),
    }
    let dir = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_DIRECTORY).open(path)?;
    dir.set_permissions(std::fs::Permissions::from_mode(0o700))?;
    owner.map_or(Ok(()), |owner| heirs::give(&dir, path, owner))
}

fn folders(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Nothing was ever said. While the keeper has it there are FIFOs, also when we do not know of it yet.
fn is_silent(folder: &Path) -> bool {
    std::fs::read_dir(folder).into_iter().flatten().flatten().next().is_none()
}

/// By the newest file in each: the directory's own time does not move with writes.
fn newest_first(folders: &mut [PathBuf]) {
    folders.sort_by_cached_key(|folder| std::cmp::Reverse(written(folder)));
}

fn written(folder: &Path) -> SystemTime {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let times = files.filter_map(|file| file.metadata().ok()?.modified().ok());
    times.max().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// All that was written in it was written before that.
pub(crate) fn is_older(folder: &Path, age: Duration) -> bool {
    let since = written(folder).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now = Duration::from_nanos(u64::try_from(clock::wall_unix_ns()).unwrap_or_default());
    now.saturating_sub(since) > age
}

fn remove(folders: &[PathBuf]) {
    for folder in folders {
        match std::fs::remove_dir_all(folder) {
            Ok(()) => debug!(path = %folder.display(), "old logs removed"),
            Err(error) => warn!(path = %folder.display(), %error, "old logs could not be removed"),
        }
        // The service's folder goes with its last one; while there are others this does nothing.
        let _not_empty = folder.parent().map(std::fs::remove_dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: ProcessKey = ProcessKey { epoch: 1, attempt: 1 };

    #[test]
    fn what_a_process_needs_is_private_and_a_link_in_its_place_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories::new(dir.path());
        let made = directories.prepare("web", InstanceId(1), FIRST, None).unwrap();
        for path in [&made.home, &made.own, &made.logs] {
            assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o700, "{path:?}");
        }
        std::fs::remove_dir(&made.own).unwrap();
        std::os::unix::fs::symlink("/etc", &made.own).unwrap();
        let error = directories.prepare("web", InstanceId(1), FIRST, None).unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR)), "{error}");
    }

    #[test]
    fn a_service_that_was_deleted_and_applied_again_finds_its_data_as_its_own() {
        use std::os::unix::fs::{MetadataExt as _, chown};
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories::new(dir.path());
        let who = directories.data("web", 0).join("who");
        for user in [30_001, 30_002] {
            directories.prepare_data("web", 0, Some((user, user))).unwrap();
            if !who.exists() {
                std::fs::write(&who, "x").unwrap();
                chown(&who, Some(user), Some(user)).unwrap();
            }
            assert_eq!(std::fs::metadata(&who).unwrap().uid(), user);
        }
    }

    #[test]
    fn the_last_few_logs_outlive_their_instances_and_the_living_are_never_touched() {
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories::new(dir.path());
        for id in 1..=12 {
            let made = directories.prepare("web", InstanceId(id), FIRST, None).unwrap();
            let file = std::fs::File::create(made.logs.join("0000000001.log")).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(id)).unwrap();
        }
        directories.prepare("mute", InstanceId(14), FIRST, None).unwrap();
        let for_ever = Duration::from_secs(1 << 40);
        let alive = BTreeSet::from([(InstanceId(1), 1)]);
        let mut keep = KeptLogs { alive, max_age: BTreeMap::from([("web".to_owned(), for_ever)]) };
        directories.prune_logs(&keep);
        assert!(!directories.logs().join("mute").exists(), "silent processes leave nothing");
        let mut left: Vec<String> = folders(&directories.logs().join("web"))
            .iter()
            .map(|folder| folder.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        left.sort();
        assert_eq!(left, ["i-1-1", "i-10-1", "i-11-1", "i-12-1", "i-8-1", "i-9-1"]);
        // All are of 1970.
        keep.max_age.insert("web".to_owned(), Duration::from_secs(3600));
        directories.prune_logs(&keep);
        assert_eq!(folders(&directories.logs().join("web")), [directories.logs().join("web/i-1-1")]);
    }

    #[test]
    fn an_instance_takes_its_directory_along_and_leaves_the_services_data() {
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories::new(dir.path());
        let made = directories.prepare("web", InstanceId(1), FIRST, None).unwrap();
        std::fs::write(made.own.join("scratch"), "x").unwrap();
        directories.forget(InstanceId(1));
        assert!(!made.own.exists() && made.home.exists());
    }

    #[test]
    fn each_process_finds_an_empty_tmp_and_that_of_the_last_one_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories::new(dir.path());
        let of = |attempt| directories.of("web", InstanceId(1), ProcessKey { epoch: 1, attempt });
        Directories::prepare_tmp(&of(1)).unwrap();
        std::fs::write(of(1).tmp.join("tmp/secret"), "x").unwrap();
        Directories::prepare_tmp(&of(1)).unwrap();
        assert!(!of(1).tmp.join("tmp/secret").exists());
        std::fs::write(of(1).tmp.join("tmp/secret"), "x").unwrap();
        let other = directories.of("web", InstanceId(11), FIRST);
        Directories::prepare_tmp(&other).unwrap();
        Directories::prepare_tmp(&of(2)).unwrap();
        directories.remove_tmp(InstanceId(1), Some(ProcessKey { epoch: 1, attempt: 2 }));
        assert!(!of(1).tmp.exists() && other.tmp.exists());
        assert_eq!(
            std::fs::metadata(of(2).tmp.join("var-tmp")).unwrap().permissions().mode() & 0o7777,
            0o1777
        );
        directories.forget(InstanceId(1));
        assert!(!of(2).tmp.exists() && other.tmp.exists());
    }
}
