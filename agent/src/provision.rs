//! What a process finds beside its command: files from its manifest, secrets from this host, and variables that say
//! where they are.
//!
//! It lies in `run/<instance>`, and secrets in a directory in memory; both are made anew for each start and gone with the
//! instance. Until one is whole nobody but the agent may pass into it, then its service alone; the service owns the
//! directory but never its parent, so no link of its making can lead us astray when it is removed. A secret goes from a
//! file of this host into that directory: never to the hub, into a log or into a message.

pub(crate) mod artifacts;
pub(crate) mod env_file;
pub(crate) mod secrets;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nave_agent_core::env::{UnknownName, arguments};
use nave_proto::pb;
use nix::unistd::{Gid, Uid, chown, fchown};

use crate::executor::users;
use artifacts::Artifacts;
use artifacts::cutoff::Cutoff;

const FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;
const SECRET_BYTES_MAX: u64 = 1024 * 1024;
const FILE_MODE: u32 = 0o644;
const SECRET_MODE: u32 = 0o400;

/// Why something that the manifest names cannot be had. For people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ProvisionError {
    /// 0 when there is none.
    pub(crate) errno: i32,
    pub(crate) message: String,
}

impl ProvisionError {
    fn new(errno: i32, message: String) -> Self {
        Self { errno, message }
    }

    fn io(what: &str, path: &Path, error: &io::Error) -> Self {
        Self::new(error.raw_os_error().unwrap_or_default(), format!("{what} {}: {error}", path.display()))
    }
}

/// The directories of one instance's things.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Places<'a> {
    pub(crate) run: &'a Path,
    pub(crate) secrets: &'a Path,
}

/// The variables that say where an instance's things are; only of what its manifest asks for.
pub(crate) fn variables(
    places: &Places<'_>,
    data: &Path,
    manifest: &pb::Manifest,
) -> BTreeMap<String, String> {
    let run = places.run;
    let text = |path: PathBuf| path.display().to_string();
    let mut variables = BTreeMap::new();
    if !manifest.files.is_empty() {
        variables.insert("NAVE_FILES".to_owned(), text(run.join("files")));
    }
    if !manifest.artifacts.is_empty() {
        variables.insert("NAVE_ARTIFACTS".to_owned(), text(run.join("artifacts")));
    }
    if !manifest.secrets.is_empty() {
        variables.insert("NAVE_SECRETS".to_owned(), text(places.secrets.to_owned()));
    }
    if manifest.data {
        variables.insert("NAVE_DATA".to_owned(), text(data.to_owned()));
    }
    variables
}

/// Fetches artifacts, then makes files and secrets of one start, after taking away those of the last. `owner`: the
/// service's user and group, when it has one of its own. Returns the names that templates asked for and nobody knows.
pub(crate) fn provide(
    artifacts: &Artifacts,
    cutoff: &Cutoff,
    Places { run, secrets }: Places<'_>,
    manifest: &pb::Manifest,
    env: &BTreeMap<String, String>,
    owner: Option<(u32, u32)>,
) -> Result<BTreeSet<UnknownName>, ProvisionError> {
    let fetched: Vec<(&str, PathBuf)> = manifest
        .artifacts
        .iter()
        .map(|artifact| Ok((artifact.name.as_str(), artifacts.get(artifact, cutoff)?)))
        .collect::<Result<_, ProvisionError>>()?;
    remove(run).map_err(|e| ProvisionError::io("its old files cannot be removed:", run, &e))?;
    secrets::remove(secrets)
        .map_err(|e| ProvisionError::io("its old secrets cannot be removed:", secrets, &e))?;
    provide_secrets(secrets, manifest, owner)?;
    let mut unknown = BTreeSet::new();
    if manifest.files.is_empty() && fetched.is_empty() {
        return Ok(unknown);
    }
    let made = |e: io::Error| ProvisionError::io("its files cannot be made:", run, &e);
    DirBuilder::new().mode(0o700).create(run).map_err(made)?;
    if !fetched.is_empty() {
        let folder = run.join("artifacts");
        DirBuilder::new().mode(0o755).create(&folder).map_err(made)?;
        std::fs::set_permissions(&folder, Permissions::from_mode(0o755)).map_err(made)?;
        for (name, place) in fetched {
            std::os::unix::fs::symlink(place, folder.join(name)).map_err(made)?;
        }
    }
    for file in &manifest.files {
        let content = content(file, env, &mut unknown)?;
        let owner = file_owner(file, owner)?;
        let path = run.join("files").join(&file.path);
        let mode = if file.mode == 0 { FILE_MODE } else { file.mode };
        write(&run.join("files"), &path, &content, mode, owner)
            .map_err(|e| ProvisionError::io("file", Path::new(&file.path), &e))?;
    }
    // Last: from here on the service may look at what is there, and we do not touch it any more.
    if let Some((uid, gid)) = owner {
        chown(run, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).map_err(|e| made(e.into()))?;
    }
    Ok(unknown)
}

/// Reads what a start would read from this host, and keeps nothing of it: the start would fail as this does.
pub(crate) fn look(order: &pb::FetchOrder) -> Result<(), ProvisionError> {
    env_file::read_all(&order.env_files)?;
    for (name, source) in &order.secrets {
        read_secret(name, source)?;
    }
    for file in &order.files {
        content(file, &BTreeMap::new(), &mut BTreeSet::new())?;
    }
    Ok(())
}

fn provide_secrets(
    folder: &Path,
    manifest: &pb::Manifest,
    owner: Option<(u32, u32)>,
) -> Result<(), ProvisionError> {
    if manifest.secrets.is_empty() {
        return Ok(());
    }
    let made = |e: io::Error| ProvisionError::io("its secrets cannot be made:", folder, &e);
    secrets::make(folder).map_err(made)?;
    for (name, source) in &manifest.secrets {
        let content = read_secret(name, source)?;
        write_file(&folder.join(name), &content, SECRET_MODE, owner)
            .map_err(|e| ProvisionError::io("secret", Path::new(name), &e))?;
    }
    if let Some((uid, gid)) = owner {
        chown(folder, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).map_err(|e| made(e.into()))?;
    }
    Ok(())
}

/// The path is the operator's; what is in the file is nobody's business.
fn read_secret(name: &str, source: &str) -> Result<Vec<u8>, ProvisionError> {
    read_host_file(&format!("secret {name}:"), Path::new(source), SECRET_BYTES_MAX)
}

/// Takes all of it away.
pub(crate) fn remove(run: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(run) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn content(
    file: &pb::File,
    env: &BTreeMap<String, String>,
    unknown: &mut BTreeSet<UnknownName>,
) -> Result<Vec<u8>, ProvisionError> {
    let place = format!("file {}", file.path);
    let what = format!("{place}:");
    let bytes = match file.source.as_str() {
        "" => file.content.clone().into_bytes(),
        source => read_host_file(&what, Path::new(source), FILE_BYTES_MAX)?,
    };
    if file.verbatim {
        return Ok(bytes);
    }
    let text = String::from_utf8(bytes).map_err(|_| {
        ProvisionError::new(
            0,
            format!("{what} is not text in UTF-8; set template = false to take it as it is"),
        )
    })?;
    let mut expanded = arguments(&place, &[text], env);
    unknown.append(&mut expanded.unknown);
    Ok(expanded.value.pop().unwrap_or_default().into_bytes())
}

fn file_owner(file: &pb::File, service: Option<(u32, u32)>) -> Result<Option<(u32, u32)>, ProvisionError> {
    if file.owner.is_empty() {
        return Ok(service);
    }
    let owner = users::resolve(&file.owner, 0)
        .map_err(|why| ProvisionError::new(0, format!("file {}: its owner: {why}", file.path)))?;
    Ok(owner.ids)
}

/// A file that is not there yet, below `root`, with the directories on the way.
fn write(root: &Path, path: &Path, content: &[u8], mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
    let folder = path.parent().unwrap_or(root);
    DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    for made in folder.ancestors().take_while(|made| made.starts_with(root)) {
        std::fs::set_permissions(made, Permissions::from_mode(0o755))?;
    }
    write_file(path, content, mode, owner)
}

fn write_file(path: &Path, content: &[u8], mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .custom_flags(libc::O_NOFOLLOW)
        .mode(0o600)
        .open(path)?;
    file.write_all(content)?;
    if let Some((uid, gid)) = owner {
        fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    file.set_permissions(Permissions::from_mode(mode))
}

/// A regular file of this host, of bounded size; a FIFO or a device in its place is never waited for.
fn read_host_file(what: &str, path: &Path, bytes_max: u64) -> Result<Vec<u8>, ProvisionError> {
    let failed = |e: io::Error| ProvisionError::io(what, path, &e);
    let file: File =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    if !found.is_file() {
        return Err(ProvisionError::new(0, format!("{what} {} is not a file", path.display())));
    }
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > bytes_max {
        let message = format!("{what} {} has more than {bytes_max} bytes", path.display());
        return Err(ProvisionError::new(0, message));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, content: &str) -> pb::File {
        pb::File { path: path.into(), content: content.into(), ..pb::File::default() }
    }

    fn env() -> BTreeMap<String, String> {
        [("PORT".to_owned(), "20001".to_owned())].into()
    }

    fn none() -> Artifacts {
        Artifacts::new(Path::new("/nowhere"))
    }

    fn places<'a>(run: &'a Path, secrets: &'a Path) -> Places<'a> {
        Places { run, secrets }
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn files_are_made_from_their_templates_and_secrets_for_one_reader() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        std::fs::write(&source, "taken ${PORT} ${NOBODY}").unwrap();
        let source = source.display().to_string();
        let run = dir.path().join("i-1");
        let secrets = dir.path().join("secrets/i-1");
        let manifest = pb::Manifest {
            files: vec![
                pb::File { mode: 0o600, ..file("conf/app.toml", "port = ${PORT}\n") },
                pb::File { source: source.clone(), ..file("taken", "") },
                pb::File { source: source.clone(), verbatim: true, ..file("as-it-is", "") },
            ],
            secrets: [("password".to_owned(), source)].into(),
            ..pb::Manifest::default()
        };
        let own = Some((nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()));
        for _start in 0..2 {
            let unknown =
                provide(&none(), &Cutoff::default(), places(&run, &secrets), &manifest, &env(), own).unwrap();
            let asked = UnknownName { place: "file taken".into(), name: "NOBODY".into() };
            assert_eq!(unknown, [asked].into());
        }
        let read = |path: &str| std::fs::read_to_string(run.join(path)).unwrap();
        assert_eq!(read("files/conf/app.toml"), "port = 20001\n");
        assert_eq!(read("files/taken"), "taken 20001 ${NOBODY}");
        assert_eq!(read("files/as-it-is"), "taken ${PORT} ${NOBODY}");
        let secret = secrets.join("password");
        assert_eq!(std::fs::read_to_string(&secret).unwrap(), "taken ${PORT} ${NOBODY}");
        assert!(!run.join("secrets").exists());
        assert_eq!(mode(&run), 0o700);
        assert_eq!(mode(&run.join("files/conf/app.toml")), 0o600);
        assert_eq!(mode(&run.join("files/taken")), 0o644);
        assert_eq!((mode(&secrets), mode(&secret)), (0o700, 0o400));
        provide(&none(), &Cutoff::default(), places(&run, &secrets), &pb::Manifest::default(), &env(), own)
            .unwrap();
        assert!(!run.exists() && !secrets.exists(), "what is no longer asked for goes");
    }

    #[test]
    fn a_link_that_the_service_left_is_removed_and_never_followed() {
        let dir = tempfile::tempdir().unwrap();
        let precious = dir.path().join("precious");
        std::fs::create_dir(&precious).unwrap();
        std::fs::write(precious.join("app.toml"), "precious").unwrap();
        let run = dir.path().join("i-1");
        let secrets = dir.path().join("secrets/i-1");
        std::fs::create_dir(&run).unwrap();
        std::os::unix::fs::symlink(&precious, run.join("files")).unwrap();
        let manifest = pb::Manifest { files: vec![file("app.toml", "new")], ..pb::Manifest::default() };
        provide(&none(), &Cutoff::default(), places(&run, &secrets), &manifest, &env(), None).unwrap();
        assert_eq!(std::fs::read_to_string(precious.join("app.toml")).unwrap(), "precious");
        assert_eq!(std::fs::read_to_string(run.join("files/app.toml")).unwrap(), "new");
    }

    #[test]
    fn what_cannot_be_read_is_said_with_its_name_and_without_its_content() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("i-1");
        let secrets = dir.path().join("secrets/i-1");
        let absent = dir.path().join("absent").display().to_string();
        let manifest =
            pb::Manifest { secrets: [("password".to_owned(), absent)].into(), ..pb::Manifest::default() };
        let error = provide(&none(), &Cutoff::default(), places(&run, &secrets), &manifest, &env(), None)
            .unwrap_err();
        assert_eq!(error.errno, libc::ENOENT);
        assert!(error.message.starts_with("secret password: /"), "{error}");
        let folder = dir.path().display().to_string();
        let manifest = pb::Manifest {
            files: vec![pb::File { source: folder, ..file("a", "") }],
            ..pb::Manifest::default()
        };
        let error = provide(&none(), &Cutoff::default(), places(&run, &secrets), &manifest, &env(), None)
            .unwrap_err();
        assert!(error.message.ends_with("is not a file"), "{error}");
    }

    #[test]
    fn what_a_start_would_lack_is_found_before_in_the_same_words() {
        let dir = tempfile::tempdir().unwrap();
        let (run, secrets) = (dir.path().join("i-1"), dir.path().join("secrets/i-1"));
        let [there, absent] = ["there", "absent"].map(|name| dir.path().join(name).display().to_string());
        std::fs::write(&there, "A=1\n").unwrap();
        let source = |path: &str| pb::File { source: path.to_owned(), ..file("a", "") };
        let order = |env_file: &str, secret: &str, file: &str| pb::FetchOrder {
            env_files: vec![env_file.to_owned()],
            secrets: [("password".to_owned(), secret.to_owned())].into(),
            files: vec![source(file)],
            ..pb::FetchOrder::default()
        };
        look(&order(&there, &there, &there)).unwrap();
        assert!(!run.exists() && !secrets.exists(), "nothing is kept");
        let error = look(&order(&absent, &there, &there)).unwrap_err();
        assert_eq!(Err(error), env_file::read_all(std::slice::from_ref(&absent)).map(drop));
        for order in [order(&there, &absent, &there), order(&there, &there, &absent)] {
            let manifest = pb::Manifest {
                secrets: order.secrets.clone(),
                files: order.files.clone(),
                ..pb::Manifest::default()
            };
            let started =
                provide(&none(), &Cutoff::default(), places(&run, &secrets), &manifest, &env(), None);
            assert_eq!(look(&order).unwrap_err(), started.unwrap_err());
        }
        std::fs::write(&there, b"A=\xff\n").unwrap();
        let error = look(&order(&there, &there, &there)).unwrap_err();
        assert!(error.message.ends_with("is not text in UTF-8"), "{error}");
    }
}
