//! The half of artifacts that touches what strangers have made: fetches a URL, unpacks an archive. It runs as a process
//! of its own that belongs to nobody, `nave artifact-stub`, so that a mistake in here, or in a library that reads
//! archives, can neither read nor write anything that matters. What it fetched is judged by the agent, by its checksum.
//!
//! Of an archive it makes plain files, directories, and links that lead downwards or sideways within it. Anything else
//! ends it: paths that lead out, links that do, names that come twice, devices, hard links, and more than the bounds.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;

use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};

use super::download::download;
use super::{Form, NOBODY};

/// What one archive may take of the disk.
const UNPACKED_BYTES_MAX: u64 = 8 << 30;
const ENTRIES_MAX: usize = 200_000;
/// Links are short; a longer one is meant to do harm.
const LINK_BYTES_MAX: u64 = 4096;
/// Longer than any URL is.
const URL_BYTES_MAX: u64 = 64 * 1024;

/// `fetch` reads a URL from stdin and writes what it leads to to stdout; `unpack FORM` reads stdin, a file, and makes
/// what is in it in the working directory. The last line on stderr says what went wrong. `ca_bundle`: what SSL_CERT_FILE
/// names.
pub fn artifact_stub_main(
    arguments: impl Iterator<Item = OsString>,
    ca_bundle: Option<OsString>,
) -> ExitCode {
    let arguments: Vec<String> = arguments.filter_map(|argument| argument.into_string().ok()).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ca_bundle = ca_bundle.filter(|path| !path.is_empty()).map(PathBuf::from);
    if let Err(error) = become_nobody() {
        let _nobody_reads = writeln!(io::stderr(), "cannot become nobody: {error}");
        return ExitCode::FAILURE;
    }
    match guarded(|| perform(&words, ca_bundle.as_deref())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            let _nobody_reads = writeln!(io::stderr(), "{why}");
            ExitCode::FAILURE
        }
    }
}

fn perform(words: &[&str], ca_bundle: Option<&Path>) -> Result<(), String> {
    match words {
        ["fetch"] => download(&url_told()?, ca_bundle, &mut io::stdout().lock()),
        ["unpack", form] => match Form::parse(form) {
            Some(form) => stdin().and_then(|archive| unpack(archive, form, Path::new("."))),
            None => Err(format!("{form:?} is no form of archive")),
        },
        _ => Err("usage: artifact-stub fetch <URL | unpack FORM <ARCHIVE".to_owned()),
    }
}

/// A mistake in here, or in a library, fails as anything else does: with what it says. Nothing that it leaves half done
/// is looked at afterwards.
fn guarded(work: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it does not say which");
        // In one line, since the last one is read.
        let text = text.lines().map(str::trim).collect::<Vec<_>>().join(" ");
        Err(format!("met a mistake in Nave, please report it: {text}"))
    })
}

/// For good: a process that has given up its user cannot take it back. An agent that is not root has nothing to give.
fn become_nobody() -> nix::Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    setgroups(&[])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)
}

fn stdin() -> Result<File, String> {
    io::stdin().as_fd().try_clone_to_owned().map(File::from).map_err(|e| e.to_string())
}

fn url_told() -> Result<String, String> {
    let mut url = String::new();
    io::stdin().lock().take(URL_BYTES_MAX).read_to_string(&mut url).map_err(|e| e.to_string())?;
    Ok(url)
}

/// Makes what is in the archive below `root`, which is empty.
pub(super) fn unpack(archive: File, form: Form, root: &Path) -> Result<(), String> {
    let mut tree = Tree::new(root, UNPACKED_BYTES_MAX, ENTRIES_MAX);
    match form {
        Form::Plain => Err("there is nothing to unpack in a plain file".to_owned()),
        Form::TarGz => untar(flate2::read::MultiGzDecoder::new(archive), &mut tree),
        Form::TarZst => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(archive).map_err(|e| e.to_string())?;
            untar(decoder, &mut tree)
        }
        Form::Zip => unzip(archive, &mut tree),
    }
}

fn untar(archive: impl Read, tree: &mut Tree) -> Result<(), String> {
    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries().map_err(|e| e.to_string())? {
        let mut entry = entry.map_err(|e| e.to_string())?;
        let path = entry.path().map_err(|e| e.to_string())?.into_owned();
        let kind = entry.header().entry_type();
        let mode = entry.header().mode().unwrap_or(0o644);
        match kind {
            tar::EntryType::Regular | tar::EntryType::Continuous => tree.file(&path, mode, &mut entry)?,
            tar::EntryType::Directory => tree.directory(&path)?,
            tar::EntryType::Symlink => {
                let target = entry.link_name().map_err(|e| e.to_string())?.unwrap_or_default().into_owned();
                tree.link(&path, &target)?;
            }
            tar::EntryType::XGlobalHeader => {}
            other => return Err(format!("{} is a {other:?}, which is not unpacked", path.display())),
        }
    }
    Ok(())
}

fn unzip(archive: File, tree: &mut Tree) -> Result<(), String> {
    let mut archive = zip::ZipArchive::new(archive).map_err(|e| e.to_string())?;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(|e| e.to_string())?;
        let path = PathBuf::from(entry.name());
        let mode = entry.unix_mode().unwrap_or(0o644);
        if mode & libc::S_IFMT == libc::S_IFLNK {
            let mut target = String::new();
            entry.by_ref().take(LINK_BYTES_MAX).read_to_string(&mut target).map_err(|e| e.to_string())?;
            tree.link(&path, Path::new(&target))?;
        } else if entry.is_dir() {
            tree.directory(&path)?;
        } else {
            tree.file(&path, mode, &mut entry)?;
        }
    }
    Ok(())
}

/// What has been unpacked so far, and how much more may be.
#[derive(Debug)]
struct Tree {
    root: PathBuf,
    links: BTreeSet<PathBuf>,
    bytes_left: u64,
    entries_left: usize,
    bytes_max: u64,
    entries_max: usize,
}

impl Tree {
    fn new(root: &Path, bytes_max: u64, entries_max: usize) -> Self {
        let (root, links) = (root.to_owned(), BTreeSet::new());
        Self { root, links, bytes_left: bytes_max, entries_left: entries_max, bytes_max, entries_max }
    }

    fn directory(&mut self, path: &Path) -> Result<(), String> {
        let inside = self.admit(path)?;
        self.make_folders(&inside)
    }

    fn file(&mut self, path: &Path, mode: u32, content: &mut impl Read) -> Result<(), String> {
        let inside = self.admit(path)?;
        self.make_folders(inside.parent().unwrap_or(Path::new("")))?;
        // For all to read, for its owner alone to write, never setuid.
        let mode = 0o644 | (mode & 0o111);
        let failed = |e: io::Error| format!("{}: {e}", path.display());
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .custom_flags(libc::O_NOFOLLOW)
            .mode(mode)
            .open(self.root.join(&inside))
            .map_err(failed)?;
        let copied = io::copy(&mut content.take(self.bytes_left + 1), &mut file).map_err(failed)?;
        let Some(left) = self.bytes_left.checked_sub(copied) else {
            return Err(format!("unpacks to more than {} bytes", self.bytes_max));
        };
        self.bytes_left = left;
        Ok(())
    }

    fn link(&mut self, path: &Path, target: &Path) -> Result<(), String> {
        let inside = self.admit(path)?;
        let folder = inside.parent().unwrap_or(Path::new("")).to_owned();
        // Upwards first and only as far as the top, then down: then no link on the way can make it lead out.
        let mut depth = folder.components().count();
        let mut down = false;
        for component in target.components() {
            match component {
                Component::CurDir => {}
                Component::ParentDir if !down && depth > 0 => depth -= 1,
                Component::Normal(_) => down = true,
                Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                    return Err(format!(
                        "{} is a link to {}, which leads out",
                        path.display(),
                        target.display()
                    ));
                }
            }
        }
        self.make_folders(&folder)?;
        std::os::unix::fs::symlink(target, self.root.join(&inside))
            .map_err(|e| format!("{}: {e}", path.display()))?;
        self.links.insert(inside);
        Ok(())
    }

    /// The path without its dots, when it stays inside and goes through no link.
    fn admit(&mut self, path: &Path) -> Result<PathBuf, String> {
        self.entries_left = self
            .entries_left
            .checked_sub(1)
            .ok_or_else(|| format!("has more than {} entries", self.entries_max))?;
        let mut inside = PathBuf::new();
        for component in path.components() {
            match component {
                Component::CurDir => {}
                Component::Normal(name) => inside.push(name),
                Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                    return Err(format!("{} leads out of the archive", path.display()));
                }
            }
        }
        if let Some(link) = inside.ancestors().find(|above| self.links.contains(*above)) {
            return Err(format!("{} goes through the link {}", path.display(), link.display()));
        }
        Ok(inside)
    }

    fn make_folders(&self, folder: &Path) -> Result<(), String> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(self.root.join(folder))
            .map_err(|e| format!("{}: {e}", folder.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar_of(entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, kind, text) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o4755);
            // Written as they are: the builder refuses what we must refuse.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            let content: &[u8] = match kind {
                tar::EntryType::Symlink | tar::EntryType::Link => {
                    header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
                    b""
                }
                _ => text.as_bytes(),
            };
            header.set_size(content.len() as u64);
            header.set_cksum();
            builder.append(&header, content).unwrap();
        }
        builder.into_inner().unwrap()
    }

    use tar::EntryType::{Char, Directory, Link, Regular, Symlink};

    #[test]
    fn an_archive_becomes_its_tree() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = tar_of(&[
            ("./bin/", Directory, ""),
            ("./bin/tool", Regular, "run"),
            ("lib/a/b", Regular, "b"),
            ("current", Symlink, "lib/a"),
            ("lib/a/up", Symlink, "../../bin/tool"),
        ]);
        untar(bytes.as_slice(), &mut Tree::new(dir.path(), 1000, 10)).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("current/b")).unwrap(), "b");
        assert_eq!(std::fs::read_to_string(dir.path().join("lib/a/up")).unwrap(), "run");
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(dir.path().join("bin/tool")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777 & !0o022, 0o755, "executable and not setuid");
    }

    #[test]
    fn a_mistake_of_ours_is_a_failure_that_says_which() {
        let word = "of\n  two lines";
        let failed = guarded(|| panic!("a mistake {word}")).unwrap_err();
        assert_eq!(failed, "met a mistake in Nave, please report it: a mistake of two lines");
        assert!(guarded(|| panic!("plain")).unwrap_err().ends_with(": plain"));
        assert_eq!(guarded(|| Err("no".to_owned())), Err("no".to_owned()));
    }

    #[test]
    fn what_is_meant_to_do_harm_is_refused() {
        for (entries, why) in [
            (vec![("../out", Regular, "x")], "leads out of the archive"),
            (vec![("a/../../out", Regular, "x")], "leads out of the archive"),
            (vec![("/etc/out", Regular, "x")], "leads out of the archive"),
            (vec![("a", Symlink, "/etc")], "which leads out"),
            (vec![("a", Symlink, "..")], "which leads out"),
            (vec![("d/a", Symlink, "../..")], "which leads out"),
            (vec![("d/x", Symlink, ".."), ("y", Symlink, "d/x/..")], "which leads out"),
            (vec![("d/x", Symlink, ".."), ("d/e/y", Symlink, "../x/..")], "which leads out"),
            (vec![("a", Symlink, "b"), ("a/out", Regular, "x")], "goes through the link a"),
            (vec![("a", Symlink, "b"), ("a", Regular, "x")], "goes through the link a"),
            (vec![("a", Regular, "x"), ("a", Regular, "y")], "File exists"),
            (vec![("a", Link, "/etc/passwd")], "which is not unpacked"),
            (vec![("a", Char, "")], "which is not unpacked"),
            (vec![("a", Regular, "12345"), ("b", Regular, "678901")], "more than 10 bytes"),
            (
                vec![("a", Directory, ""), ("b", Directory, ""), ("c", Directory, ""), ("d", Directory, "")],
                "more than 3 entries",
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().join("root");
            std::fs::create_dir(&root).unwrap();
            let error = untar(tar_of(&entries).as_slice(), &mut Tree::new(&root, 10, 3)).unwrap_err();
            assert!(error.contains(why), "{entries:?}: {error}");
            assert_eq!(
                std::fs::read_dir(dir.path()).unwrap().count(),
                1,
                "{entries:?} left something outside"
            );
        }
    }
}
