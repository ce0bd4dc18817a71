//! A view of the file system of its own: a private /tmp, read-only parts, hidden parts. Mounts of the host still come
//! in, none goes out, and all of it is gone with the last process in it.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nave_proto::pb;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statvfs::{FsFlags, statvfs};

use crate::identity::Stat;
use crate::stub::{Failure, Step};
use crate::sys;

/// Stay writable in a read-only system: they hold no files of the machine's own.
const NEVER_READ_ONLY: [&str; 3] = ["/proc", "/dev/shm", "/dev/mqueue"];
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// What becomes of the directories in `Sandbox.tmp`.
const TMP: [(&str, &str); 2] = [("tmp", "/tmp"), ("var-tmp", "/var/tmp")];

/// Makes the mounts that `sandbox` asks for, in a mount namespace of this process's own; needs root. Nothing asked,
/// nothing done.
pub(crate) fn make_mounts(sandbox: &pb::Sandbox) -> Result<(), Failure> {
    if !has_mounts(sandbox) {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS).map_err(|error| Failure::new(Step::Namespace, error, ""))?;
    let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, slave, None::<&str>)
        .map_err(|error| Failure::new(Step::Namespace, error, ""))?;
    // Held open before anything is covered: it may lie below /tmp.
    let resolv_conf = resolv_conf(sandbox)?;
    if !sandbox.tmp.is_empty() {
        private_tmp(Path::new(&sandbox.tmp), &sandbox.keep)?;
    }
    if sandbox.read_only {
        read_only(sandbox)?;
    }
    if let Some(own) = resolv_conf {
        bind(Path::new(&format!("/proc/self/fd/{}", own.as_raw_fd())), Path::new(RESOLV_CONF))?;
    }
    sandbox.hide.iter().try_for_each(|path| hide(Path::new(path)))
}

/// What is to become /etc/resolv.conf. A machine without one has no use for ours either.
fn resolv_conf(sandbox: &pb::Sandbox) -> Result<Option<File>, Failure> {
    if sandbox.resolv_conf.is_empty() || !Path::new(RESOLV_CONF).is_file() {
        return Ok(None);
    }
    let own = Path::new(&sandbox.resolv_conf);
    File::open(own).map(Some).map_err(|error| failed(error, own))
}

/// Enters the mounts that were made for a process of the same sandbox, if it still runs.
pub(crate) fn join_mounts(sandbox: &pb::Sandbox, of: Option<&pb::ProcessIdentity>) -> Result<(), Failure> {
    if !has_mounts(sandbox) {
        return Ok(());
    }
    let failed = |error: io::Error| Failure::new(Step::Namespace, error, "");
    let gone = || failed(io::Error::from_raw_os_error(libc::ESRCH));
    let of = of.ok_or_else(gone)?;
    let mounts = File::open(format!("/proc/{}/ns/mnt", of.pid)).map_err(failed)?;
    // Looked at after the file is open: whoever has the pid now had it then.
    if Stat::read(of.pid).map_err(failed)?.start_ticks != of.start_ticks {
        return Err(gone());
    }
    setns(mounts, CloneFlags::CLONE_NEWNS).map_err(|error| failed(error.into()))
}

fn has_mounts(sandbox: &pb::Sandbox) -> bool {
    !sandbox.tmp.is_empty()
        || sandbox.read_only
        || !sandbox.hide.is_empty()
        || !sandbox.resolv_conf.is_empty()
}

/// Own directories in place of /tmp and /var/tmp. They are new, so nobody can have put links into them.
fn private_tmp(own: &Path, keep: &[String]) -> Result<(), Failure> {
    let mut sources = Vec::new();
    // A machine without /var/tmp needs none of its own either.
    for (name, place) in
        TMP.map(|(name, place)| (name, Path::new(place))).into_iter().filter(|(_, place)| place.is_dir())
    {
        let source = own.join(name);
        for kept in outermost(keep, place) {
            let at = source.join(kept.strip_prefix(place).expect("outermost() filters by this prefix"));
            make_place(&source, &kept, &at).map_err(|error| failed(error, &at))?;
            bind(&kept, &at)?;
        }
        sources.push((File::open(&source).map_err(|error| failed(error, &source))?, place));
    }
    // Both are held open before the first is covered: the agent's own directory may lie below either.
    sources.iter().try_for_each(|(source, place)| {
        bind(Path::new(&format!("/proc/self/fd/{}", source.as_raw_fd())), place)
    })
}

/// The paths below `place`, without those that lie below another of them.
fn outermost(paths: &[String], place: &Path) -> Vec<PathBuf> {
    let mut chosen: Vec<PathBuf> = Vec::new();
    // Sorted, so that a directory comes before what is in it.
    for path in paths.iter().map(PathBuf::from).collect::<BTreeSet<_>>() {
        if path.starts_with(place) && path != place && !chosen.iter().any(|outer| path.starts_with(outer)) {
            chosen.push(path);
        }
    }
    chosen
}

/// An empty directory or file to mount `original` on, with the directories on the way, which all may pass.
fn make_place(root: &Path, original: &Path, at: &Path) -> io::Result<()> {
    let is_dir = fs::metadata(original)?.is_dir();
    let below = at.strip_prefix(root).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut path = root.to_owned();
    for part in below
        .parent()
        .into_iter()
        .flat_map(Path::components)
        .chain(below.file_name().filter(|_| is_dir).map(std::path::Component::Normal))
    {
        path.push(part);
        match DirBuilder::new().mode(0o755).create(&path) {
            // The umask is the keeper's.
            Ok(()) => fs::set_permissions(&path, Permissions::from_mode(0o755))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    if !is_dir {
        File::create(at)?;
    }
    Ok(())
}

fn read_only(sandbox: &pb::Sandbox) -> Result<(), Failure> {
    let own_tmp = TMP.iter().filter(|_| !sandbox.tmp.is_empty()).map(|(_, place)| *place);
    let always = NEVER_READ_ONLY.into_iter().chain(own_tmp).map(Path::new).filter(|path| path.exists());
    let asked: Vec<&Path> = sandbox.write.iter().map(Path::new).collect();
    let mut writable = Vec::new();
    for path in always.chain(asked) {
        let flags = statvfs(path).map_err(|error| failed(error, path))?;
        bind(path, path)?;
        // What was read-only before stays so.
        if !flags.flags().contains(FsFlags::ST_RDONLY) {
            writable.push(path);
        }
    }
    sys::set_read_only(c"/", true, true).map_err(|error| failed(error, Path::new("/")))?;
    for path in writable {
        let name = c_path(path)?;
        sys::set_read_only(&name, false, false).map_err(|error| failed(error, path))?;
    }
    Ok(())
}

/// Something empty that nobody may enter in its place. What is not there need not be hidden.
fn hide(path: &Path) -> Result<(), Failure> {
    let Ok(data) = fs::metadata(path) else { return Ok(()) };
    if !data.is_dir() {
        return bind(Path::new("/dev/null"), path);
    }
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("nave-hidden"), path, Some("tmpfs"), flags, Some("mode=000,size=4k,nr_inodes=1"))
        .map_err(|error| failed(error, path))
}

fn bind(from: &Path, at: &Path) -> Result<(), Failure> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(from), at, None::<&str>, flags, None::<&str>).map_err(|error| failed(error, at))
}

fn c_path(path: &Path) -> Result<std::ffi::CString, Failure> {
    use std::os::unix::ffi::OsStrExt as _;
    std::ffi::CString::new(path.as_os_str().as_bytes())
        .map_err(|_| failed(io::Error::from(io::ErrorKind::InvalidInput), path))
}

fn failed(error: impl Into<io::Error>, path: &Path) -> Failure {
    Failure::new(Step::Mount, error, path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_is_kept_only_the_outermost_is_mounted() {
        let keep = ["/tmp/b/c", "/tmp/a", "/tmp/b", "/tmp", "/tmpfoo", "/var/tmp/x", "/tmp/ab"];
        let keep = keep.map(str::to_owned);
        let names = |place| outermost(&keep, Path::new(place));
        assert_eq!(names("/tmp"), ["/tmp/a", "/tmp/ab", "/tmp/b"].map(PathBuf::from));
        assert_eq!(names("/var/tmp"), [PathBuf::from("/var/tmp/x")]);
    }
}
