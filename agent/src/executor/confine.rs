//! What a service is kept from: the keeper's orders for its mounts, capabilities, Landlock and seccomp, out of the
//! manifest's `[isolation]` and what this agent can do.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use nave_proto::limits;
use nave_proto::pb;

use super::directories::InstanceDirectories;
use super::users::RunAs;

/// What a private /tmp would hide.
const TMP: [&str; 2] = ["/tmp", "/var/tmp"];

/// What the orders need to know of one instance.
#[derive(Debug)]
pub(super) struct Surrounded<'a> {
    pub(super) manifest: &'a pb::Manifest,
    pub(super) run_as: &'a RunAs,
    pub(super) dirs: &'a InstanceDirectories,
    pub(super) working_dir: &'a str,
    pub(super) argv: &'a [String],
    pub(super) env: &'a [String],
    /// Where its notify socket is, when it has one.
    pub(super) notify: &'a Path,
    /// Names services, when this host can.
    pub(super) resolv_conf: Option<&'a Path>,
    /// The agent is root.
    pub(super) root: bool,
}

/// Whether its /tmp is its own. `root`: the agent is.
pub(super) fn has_private_tmp(manifest: &pb::Manifest, root: bool) -> bool {
    root && !manifest.isolation.as_ref().is_some_and(|isolation| isolation.shared_tmp)
}

/// Looks at the disk, to see which of the named paths are there. `Err`: what only root can do was asked for.
pub(super) fn sandbox(around: &Surrounded<'_>) -> Result<pb::Sandbox, String> {
    let default = pb::Isolation::default();
    let isolation = around.manifest.isolation.as_ref().unwrap_or(&default);
    if !around.root {
        let asked = [
            ("read_only", isolation.read_only),
            ("hide", !isolation.hide.is_empty()),
            ("capabilities", !isolation.capabilities.is_empty()),
        ];
        if let Some((key, _)) = asked.into_iter().find(|(_, asked)| *asked) {
            return Err(format!(
                "isolation.{key} needs an agent that runs as root, and on this host it does not"
            ));
        }
    }
    let private_tmp = has_private_tmp(around.manifest, around.root);
    let is_root = around.root && around.run_as.ids.is_none_or(|(uid, _)| uid == 0);
    let capabilities: Vec<u32> =
        isolation.capabilities.iter().filter_map(|name| limits::capability_number(name)).collect();
    Ok(pb::Sandbox {
        tmp: if private_tmp { around.dirs.tmp.display().to_string() } else { String::new() },
        keep: if private_tmp { kept(around, isolation) } else { Vec::new() },
        read_only: isolation.read_only,
        hide: isolation.hide.clone(),
        write: writable(around, isolation, private_tmp),
        read: readable(around, isolation),
        landlock: isolation.landlock,
        seccomp: isolation.seccomp,
        // Who asks for root by name wants what root may do, unless it also says which part of it.
        bound_capabilities: around.root && (!is_root || !capabilities.is_empty()),
        capabilities,
        resolv_conf: around
            .resolv_conf
            .filter(|_| around.root && !isolation.host_names)
            .map(|path| path.display().to_string())
            .unwrap_or_default(),
    })
}

/// What the manifest and we name below /tmp has to be there. Of a program or script the whole directory, since such a
/// file is seldom alone.
fn kept(around: &Surrounded<'_>, isolation: &pb::Isolation) -> Vec<String> {
    let values = around.env.iter().filter_map(|pair| Some(pair.split_once('=')?.1));
    let named = around.argv.iter().map(String::as_str).chain(values).chain([around.working_dir]);
    let ours =
        [&around.dirs.home, &around.dirs.own, &around.dirs.run, &around.dirs.secrets].map(PathBuf::from);
    let asked = isolation.read.iter().chain(&isolation.write).map(PathBuf::from);
    let mut paths: BTreeSet<PathBuf> =
        named.map(PathBuf::from).chain(asked).filter_map(|path| whole(&path)).collect();
    paths.extend(
        ours.into_iter()
            .chain(cache(around))
            .chain([around.notify.to_owned()])
            .filter(|path| is_below_tmp(path) && path.exists()),
    );
    paths.into_iter().map(|path| path.display().to_string()).collect()
}

/// The directory of a named file, or the named directory; `None`: it is not below /tmp, or not there.
fn whole(path: &Path) -> Option<PathBuf> {
    if !is_below_tmp(path) || path.components().any(|part| part == std::path::Component::ParentDir) {
        return None;
    }
    let is_dir = std::fs::metadata(path).ok()?.is_dir();
    let parent = path.parent().filter(|parent| !is_dir && is_below_tmp(parent));
    Some(parent.unwrap_or(path).to_owned())
}

fn is_below_tmp(path: &Path) -> bool {
    TMP.iter().any(|tmp| path.starts_with(tmp) && path != Path::new(tmp))
}

/// Besides what was asked for, the files and secrets that are made for it.
fn readable(around: &Surrounded<'_>, isolation: &pb::Isolation) -> Vec<String> {
    if !isolation.landlock {
        return Vec::new();
    }
    let made = [&around.dirs.run, &around.dirs.secrets].into_iter().filter(|path| path.exists());
    let made = made.map(|path| path.display().to_string());
    let cache = cache(around).map(|path| path.display().to_string());
    isolation.read.iter().cloned().chain(made).chain(cache).collect()
}

/// Where its artifacts are: what it finds in NAVE_ARTIFACTS are links.
fn cache(around: &Surrounded<'_>) -> Option<PathBuf> {
    let data_dir = around.dirs.run.parent().and_then(Path::parent)?;
    (!around.manifest.artifacts.is_empty()).then(|| data_dir.join("cache"))
}

fn writable(around: &Surrounded<'_>, isolation: &pb::Isolation, private_tmp: bool) -> Vec<String> {
    if !isolation.read_only && !isolation.landlock {
        return Vec::new();
    }
    let ours = [&around.dirs.home, &around.dirs.own].map(|path| path.display().to_string());
    // Landlock asks for them by name also when they are its own.
    let tmp = TMP.iter().filter(|_| isolation.landlock || !private_tmp).map(|tmp| (*tmp).to_owned());
    let tmp = tmp.filter(|tmp| Path::new(tmp).is_dir());
    let data = around.env.iter().find_map(|pair| pair.strip_prefix("NAVE_DATA=")).map(str::to_owned);
    let data = data.filter(|_| around.manifest.data);
    isolation.write.iter().cloned().chain(ours).chain(data).chain(tmp).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<T>(
        isolation: pb::Isolation,
        root: bool,
        uid: u32,
        look: impl FnOnce(Result<pb::Sandbox, String>) -> T,
    ) -> T {
        let manifest = pb::Manifest { isolation: Some(isolation), ..Default::default() };
        let dirs = InstanceDirectories {
            home: "/data/services/web".into(),
            own: "/data/instances/i-1".into(),
            logs: "/data/logs/web/i-1-1".into(),
            tmp: "/data/tmp/i-1-1-1".into(),
            run: "/data/run/i-1".into(),
            secrets: "/run/nave-7-h-1/secrets/i-1".into(),
        };
        let run_as = RunAs { ids: Some((uid, uid)), ..RunAs::default() };
        look(sandbox(&Surrounded {
            manifest: &manifest,
            run_as: &run_as,
            dirs: &dirs,
            working_dir: "/data/instances/i-1",
            argv: &["/usr/bin/web".to_owned()],
            env: &["HOME=/data/services/web".to_owned()],
            notify: Path::new("/data/notify"),
            resolv_conf: Some(Path::new("/data/resolv.conf")),
            root,
        }))
    }

    #[test]
    fn by_default_a_service_has_its_own_tmp_and_no_capabilities() {
        let sandbox = with(pb::Isolation::default(), true, 30_001, Result::unwrap);
        assert_eq!(sandbox.tmp, "/data/tmp/i-1-1-1");
        assert_eq!((sandbox.bound_capabilities, sandbox.capabilities.len()), (true, 0));
        assert!(!sandbox.read_only && !sandbox.landlock && sandbox.write.is_empty(), "{sandbox:?}");
        let root = with(pb::Isolation::default(), true, 0, Result::unwrap);
        assert!(!root.bound_capabilities, "root asked for by name stays root");
        let unprivileged = with(pb::Isolation::default(), false, 1000, Result::unwrap);
        assert_eq!(unprivileged, pb::Sandbox::default());
    }

    #[test]
    fn what_only_root_can_do_is_refused_rather_than_left_out() {
        let isolation = pb::Isolation { read_only: true, ..Default::default() };
        let refused = with(isolation, false, 1000, Result::unwrap_err);
        assert!(refused.starts_with("isolation.read_only needs an agent that runs as root"), "{refused}");
    }

    #[test]
    fn what_is_named_below_tmp_is_kept_with_its_directory() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let script = dir.path().join("bin/serve.py");
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        std::fs::write(&script, "").unwrap();
        assert_eq!(whole(&script), Some(dir.path().join("bin")));
        assert_eq!(whole(dir.path()), Some(dir.path().to_owned()));
        assert_eq!(whole(Path::new("/tmp/../etc/passwd")), None);
        assert_eq!(whole(Path::new("/tmp")), None);
        assert_eq!(whole(Path::new("/usr/bin")), None);
        assert_eq!(whole(&dir.path().join("not there")), None);
    }
}
