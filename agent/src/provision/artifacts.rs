//! Artifacts: what a service needs that is too large for its manifest. Fetched and unpacked by a process that belongs
//! to nobody (`stub`), known by their checksum, kept in a cache that all services share and none can write to.
//!
//! `cache/<sha256>.<form>` is complete or not there: it is made beside and renamed. A start makes links to what it
//! names; what no link leads to goes, the least recently used first, when the cache is larger than it may be.

pub(crate) mod cutoff;
mod download;
mod roots;
pub(crate) mod stub;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use nave_proto::ids::InstanceId;
use nave_proto::pb;
use nix::unistd::{Gid, Uid, chown, geteuid, syncfs};
use parking_lot::{Condvar, Mutex};
use sha2::{Digest as _, Sha256};
use tracing::{info, warn};

use super::ProvisionError;
use cutoff::{Cutoff, Watched};

/// The user and group that owns nothing.
pub(crate) const NOBODY: u32 = 65_534;
/// All that is kept, unless what runs needs more.
const CACHE_BYTES_MAX: u64 = 10 << 30;
/// One that was used so lately may be about to be linked to.
const SETTLED: Duration = Duration::from_secs(3600);

/// Whoever waits for another to fetch looks that often whether it shall still wait.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// What a stub may say.
const STUB_BYTES_MAX: u64 = 64 * 1024;

/// How an artifact is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Plain,
    TarGz,
    TarZst,
    Zip,
}

impl Form {
    pub(crate) fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "none" => Self::Plain,
            "tar.gz" => Self::TarGz,
            "tar.zst" => Self::TarZst,
            "zip" => Self::Zip,
            _ => return None,
        })
    }
}

/// The artifacts of one host.
#[derive(Debug)]
pub(crate) struct Artifacts {
    root: PathBuf,
    /// Being made; whoever wants one of them too waits.
    making: Mutex<BTreeSet<String>>,
    made: Condvar,
    /// For starts that have yet to come, by the instance that makes way for them: not to be removed.
    held: Mutex<BTreeMap<InstanceId, BTreeSet<String>>>,
}

impl Artifacts {
    pub(crate) fn new(data_dir: &Path) -> Self {
        let (making, made, held) = Default::default();
        Self { root: data_dir.join("cache"), making, made, held }
    }

    /// Keeps these, when they are there, in place of what was kept for the instance before.
    pub(crate) fn hold(&self, instance: InstanceId, artifacts: &[pb::Artifact]) {
        self.held.lock().insert(instance, artifacts.iter().map(key).collect());
    }

    pub(crate) fn release(&self, instance: InstanceId) {
        self.held.lock().remove(&instance);
    }

    /// Where the artifact is, once it is there: a file, or the directory that it was unpacked to. Blocks, until it is cut
    /// short at the latest.
    pub(crate) fn get(&self, artifact: &pb::Artifact, cutoff: &Cutoff) -> Result<PathBuf, ProvisionError> {
        let key = key(artifact);
        let mut making = self.making.lock();
        while !making.insert(key.clone()) {
            self.made.wait_for(&mut making, LOOK_AGAIN);
            if cutoff.is_cut() {
                return Err(ProvisionError::new(0, cutoff::CUT.to_owned()));
            }
        }
        drop(making);
        let found = self.find_or_make(&key, artifact, cutoff);
        self.making.lock().remove(&key);
        self.made.notify_all();
        found.map_err(|why| ProvisionError::new(0, format!("artifact {}: {why}", artifact.name)))
    }

    fn find_or_make(&self, key: &str, artifact: &pb::Artifact, cutoff: &Cutoff) -> Result<PathBuf, String> {
        let place = self.root.join(key);
        let form = Form::parse(&artifact.archive).ok_or("its form of archive is not known here")?;
        if !place.exists() {
            let beside = self.root.join(format!("{BESIDE}{key}"));
            let made = self.make(&beside, form, artifact, cutoff);
            if made.is_ok() {
                // Whole on the disk before it has its name: it is not looked at again.
                let whole = File::open(&beside).and_then(|folder| Ok(syncfs(folder)?));
                whole.and_then(|()| std::fs::rename(&beside, &place)).map_err(|e| e.to_string())?;
            }
            if let Err(error) = remove(&beside) {
                warn!(path = %beside.display(), %error, "an artifact that was given up could not be removed");
            }
            made?;
            info!(artifact = artifact.name, sha256 = artifact.sha256, "an artifact was fetched");
        }
        // The time of its last use, for those that have to go.
        File::open(&place).and_then(|file| file.set_modified(now())).map_err(|e| e.to_string())?;
        Ok(match form {
            Form::Plain => place.join("file"),
            Form::TarGz | Form::TarZst | Form::Zip => place.join("tree"),
        })
    }

    fn make(
        &self,
        beside: &Path,
        form: Form,
        artifact: &pb::Artifact,
        cutoff: &Cutoff,
    ) -> Result<(), String> {
        let text = |e: io::Error| e.to_string();
        remove(beside).map_err(text)?;
        // Passed through by services on the way to what they link to.
        DirBuilder::new().recursive(true).mode(0o711).create(&self.root).map_err(text)?;
        std::fs::set_permissions(&self.root, Permissions::from_mode(0o711)).map_err(text)?;
        DirBuilder::new().mode(0o711).create(beside).map_err(text)?;
        std::fs::set_permissions(beside, Permissions::from_mode(0o711)).map_err(text)?;
        let packed = beside.join("file");
        let bytes = fetch(artifact, &packed, cutoff)?;
        let size = match form {
            Form::Plain => bytes,
            Form::TarGz | Form::TarZst | Form::Zip => {
                let tree = beside.join("tree");
                unpack(&packed, &artifact.archive, &tree, cutoff)?;
                std::fs::remove_file(&packed).map_err(text)?;
                settle(&tree).map_err(text)?
            }
        };
        std::fs::write(beside.join("bytes"), size.to_string()).map_err(text)
    }

    /// Makes room: what no instance below `runs` links to and none that comes will goes, the least recently used first.
    pub(crate) fn clean(&self, runs: &Path) {
        self.clean_to(runs, CACHE_BYTES_MAX, SETTLED);
    }

    /// An agent that was killed may have left the half of an artifact that nobody wants any more.
    fn remove_halves(&self) {
        for path in entries(&self.root) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let Some(key) = name.strip_prefix(BESIDE) else { continue };
            // As one who makes it does, so that nobody begins to while it goes.
            if self.making.lock().insert(key.to_owned()) {
                if let Err(error) = remove(&path) {
                    warn!(path = %path.display(), %error, "half of an artifact could not be removed");
                }
                self.making.lock().remove(key);
                self.made.notify_all();
            }
        }
    }

    fn clean_to(&self, runs: &Path, bytes_max: u64, settled: Duration) {
        self.remove_halves();
        for key in self.held.lock().values().flatten() {
            // As new as if it were used now: it stays also between the end of who holds it and the start that links to it.
            // What is not there yet is nothing to keep.
            let _touched = File::open(self.root.join(key)).and_then(|place| place.set_modified(now()));
        }
        let mut all: Vec<(SystemTime, u64, PathBuf)> = entries(&self.root)
            .filter(|path| path.join("bytes").exists())
            .filter_map(|path| {
                let used = std::fs::metadata(&path).ok()?.modified().ok()?;
                let bytes = std::fs::read_to_string(path.join("bytes")).ok()?.trim().parse().ok()?;
                Some((used, bytes, path))
            })
            .collect();
        all.sort();
        let mut total: u64 = all.iter().map(|(_, bytes, _)| bytes).sum();
        let linked = linked(runs);
        for (used, bytes, path) in all {
            let is_new = now().duration_since(used).is_ok_and(|since| since < settled);
            if total <= bytes_max || is_new || linked.iter().any(|link| link.starts_with(&path)) {
                continue;
            }
            match remove(&path) {
                Ok(()) => total -= bytes,
                Err(error) => warn!(path = %path.display(), %error, "an artifact could not be removed"),
            }
        }
    }
}

/// What is being made, beside its place in the cache.
const BESIDE: &str = "new-";

/// Its name in the cache.
fn key(artifact: &pb::Artifact) -> String {
    format!("{}.{}", artifact.sha256, artifact.archive)
}

/// Where the links of all instances lead.
fn linked(runs: &Path) -> Vec<PathBuf> {
    let folders = entries(runs).map(|run| run.join("artifacts"));
    folders
        .flat_map(|folder| entries(&folder).collect::<Vec<_>>())
        .filter_map(|link| std::fs::read_link(link).ok())
        .collect()
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn now() -> SystemTime {
    let since = u64::try_from(crate::clock::wall_unix_ns()).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_nanos(since)
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Into a file of ours, while its checksum is made; a wrong one is refused before anybody looks into it.
fn fetch(artifact: &pb::Artifact, into: &Path, cutoff: &Cutoff) -> Result<u64, String> {
    let mut child =
        stub_command(&["fetch"], Path::new("/")).stdin(Stdio::piped()).spawn().map_err(|e| e.to_string())?;
    let watched = cutoff.watch(child.id());
    // Not as an argument: a signed URL would be there for all users of the host to read. One that has ended already says
    // why, and that it heard nothing is the least of it.
    let _ended = child.stdin.take().expect("it is piped").write_all(artifact.url.as_bytes());
    let mut out = child.stdout.take().expect("it is piped");
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o755).open(into).map_err(|e| e.to_string())?;
    let (mut digest, mut bytes, mut buffer) = (Sha256::new(), 0_u64, vec![0; 64 * 1024]);
    let copied = loop {
        match out.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(count) => {
                bytes += count as u64;
                digest.update(&buffer[..count]);
                if let Err(error) = file.write_all(&buffer[..count]) {
                    break Err(error.to_string());
                }
            }
            Err(error) => break Err(error.to_string()),
        }
    };
    drop(out);
    let done = finish(child, watched);
    copied?;
    done.map_err(|why| format!("{}: {why}", artifact.url))?;
    file.set_permissions(Permissions::from_mode(0o755)).map_err(|e| e.to_string())?;
    let found: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    match found == artifact.sha256 {
        true => Ok(bytes),
        false => Err(format!(
            "{} has the sha256 {found}, the manifest says {}: it is not what was meant, or not any more",
            artifact.url, artifact.sha256
        )),
    }
}

fn unpack(packed: &Path, form: &str, tree: &Path, cutoff: &Cutoff) -> Result<(), String> {
    let text = |e: io::Error| e.to_string();
    DirBuilder::new().mode(0o700).create(tree).map_err(text)?;
    if geteuid().is_root() {
        chown(tree, Some(Uid::from_raw(NOBODY)), Some(Gid::from_raw(NOBODY))).map_err(|e| e.to_string())?;
    }
    let archive = File::open(packed).map_err(text)?;
    let child = stub_command(&["unpack", form], tree).stdin(archive).spawn().map_err(text)?;
    let watched = cutoff.watch(child.id());
    finish(child, watched)
}

/// From now on it is ours, and nobody else writes to it. Returns how large it is.
fn settle(path: &Path) -> io::Result<u64> {
    let found = std::fs::symlink_metadata(path)?;
    if geteuid().is_root() {
        std::os::unix::fs::lchown(path, Some(0), Some(0))?;
    }
    if found.is_symlink() {
        return Ok(0);
    }
    if !found.is_dir() {
        std::fs::set_permissions(path, Permissions::from_mode(0o644 | (found.permissions().mode() & 0o111)))?;
        return Ok(found.len());
    }
    std::fs::set_permissions(path, Permissions::from_mode(0o755))?;
    let mut bytes = 0;
    for entry in std::fs::read_dir(path)? {
        bytes += settle(&entry?.path())?;
    }
    Ok(bytes)
}

/// Names the authorities that programs trust, where they are not the host's own; not a setting of ours.
const CA_BUNDLE_VARIABLE: &str = "SSL_CERT_FILE";

/// This program, which becomes nobody before it does anything, with nothing of ours but its orders.
fn stub_command(words: &[&str], folder: &Path) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("nave").arg("artifact-stub").args(words).env_clear().current_dir(folder);
    command.envs(std::env::var_os(CA_BUNDLE_VARIABLE).map(|path| (CA_BUNDLE_VARIABLE, path)));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Waits for its end; what it said last is why it failed.
fn finish(mut child: Child, watched: Watched<'_>) -> Result<(), String> {
    let mut said = Vec::new();
    let stderr = child.stderr.take().expect("it is piped");
    let read = stderr.take(STUB_BYTES_MAX).read_to_end(&mut said);
    // Before it is reaped: a signal after that might be for somebody else.
    let cut = watched.release();
    let status = child.wait().and_then(|status| read.map(|_| status)).map_err(|e| e.to_string())?;
    if cut {
        return Err(cutoff::CUT.to_owned());
    }
    if status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&said);
    let last = said.lines().rev().find(|line| !line.trim().is_empty());
    Err(last.map_or_else(|| status.to_string(), |line| line.chars().take(300).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_linked_to_or_new_stays_and_the_oldest_of_the_rest_go() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = Artifacts::new(dir.path());
        let make = |name: &str, used: u64| {
            let place = dir.path().join("cache").join(name);
            std::fs::create_dir_all(&place).unwrap();
            std::fs::write(place.join("bytes"), "100").unwrap();
            let used = SystemTime::UNIX_EPOCH + Duration::from_secs(used);
            File::open(&place).unwrap().set_modified(used).unwrap();
            place
        };
        let (linked, old, older) = (make("linked", 1), make("old", 3), make("older", 2));
        let fresh = make("fresh", 0);
        File::open(&fresh).unwrap().set_modified(now()).unwrap();
        let runs = dir.path().join("run");
        std::fs::create_dir_all(runs.join("i-1/artifacts")).unwrap();
        std::os::unix::fs::symlink(linked.join("tree"), runs.join("i-1/artifacts/tool")).unwrap();
        artifacts.clean_to(&runs, 300, SETTLED);
        assert!(linked.exists() && fresh.exists() && old.exists() && !older.exists());
        artifacts.clean_to(&runs, 0, SETTLED);
        assert!(linked.exists() && fresh.exists() && !old.exists());
    }

    #[test]
    fn halves_that_a_killed_agent_has_left_go_and_those_under_way_stay() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = Artifacts::new(dir.path());
        let half = |key: &str| dir.path().join("cache").join(format!("{BESIDE}{key}"));
        for key in ["left.zip", "under-way.zip"] {
            std::fs::create_dir_all(half(key).join("tree")).unwrap();
        }
        artifacts.making.lock().insert("under-way.zip".to_owned());
        artifacts.clean(&dir.path().join("run"));
        assert!(!half("left.zip").exists() && half("under-way.zip").exists());
        assert_eq!(artifacts.making.lock().len(), 1);
    }

    #[test]
    fn what_was_fetched_ahead_stays_until_its_start_has_had_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let artifacts = Artifacts::new(dir.path());
        let artifact = pb::Artifact { sha256: "ab".into(), archive: "zip".into(), ..Default::default() };
        let (place, runs) = (dir.path().join("cache/ab.zip"), dir.path().join("run"));
        std::fs::create_dir_all(&place).unwrap();
        std::fs::write(place.join("bytes"), "100").unwrap();
        let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
        File::open(&place).unwrap().set_modified(long_ago).unwrap();
        artifacts.hold(InstanceId(1), &[artifact]);
        artifacts.clean_to(&runs, 0, SETTLED);
        assert!(place.exists(), "held");
        artifacts.release(InstanceId(1));
        artifacts.clean_to(&runs, 0, SETTLED);
        assert!(place.exists(), "who held it has made way a moment ago");
        artifacts.clean_to(&runs, 0, Duration::ZERO);
        assert!(!place.exists());
    }
}
