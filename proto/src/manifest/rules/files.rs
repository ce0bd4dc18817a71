//! Rules for what a process finds beside its command: files, files of variables, secrets.

use std::collections::BTreeSet;

use super::Rules;
use crate::manifest::tree::{Path, shorten};
use crate::pb;

const FILES_MAX: usize = 64;
const SECRETS_MAX: usize = 64;
const ENV_FILES_MAX: usize = 16;
const PATH_MAX: usize = 255;
/// Where the data of each is stands in the service's row.
const DATA_COUNT_MAX: u32 = 256;
const ARTIFACTS_MAX: usize = 32;
const NAME_MAX: usize = 64;

impl Rules {
    pub(super) fn files(&mut self, manifest: &pb::Manifest) {
        let path = Path::default().key("file");
        if manifest.files.len() > FILES_MAX {
            self.broken(path.clone(), format!("at most {FILES_MAX} files, not {}", manifest.files.len()));
        }
        let mut paths = BTreeSet::new();
        for (index, file) in manifest.files.iter().enumerate() {
            self.file(&path.index(index), file);
            let (path, place) = (path.index(index).key("path"), file.path.as_str());
            if !paths.insert(place) {
                self.broken(path, format!("{:?} is the path of another file too", shorten(place)));
            } else if let Some(within) =
                paths.iter().find(|other| is_within(place, other) || is_within(other, place))
            {
                self.broken(
                    path,
                    format!(
                        "{:?} cannot be beside {:?}: one is a directory of the other",
                        shorten(place),
                        shorten(within)
                    ),
                );
            }
        }
        if manifest.data && manifest.count > DATA_COUNT_MAX {
            let why =
                format!("a service with data has at most {DATA_COUNT_MAX} instances, not {}", manifest.count);
            self.at(&["data"], why);
        }
        self.artifacts(&manifest.artifacts);
        self.env_files(&manifest.env_files);
        self.secrets(manifest);
    }

    fn artifacts(&mut self, artifacts: &[pb::Artifact]) {
        let path = Path::default().key("artifact");
        if artifacts.len() > ARTIFACTS_MAX {
            self.broken(path.clone(), format!("at most {ARTIFACTS_MAX} artifacts, not {}", artifacts.len()));
        }
        let mut names = BTreeSet::new();
        for (index, artifact) in artifacts.iter().enumerate() {
            self.artifact(&path.index(index), artifact);
            if !names.insert(&artifact.name) {
                let why = format!("{:?} is the name of another artifact too", shorten(&artifact.name));
                self.broken(path.index(index).key("name"), why);
            }
        }
    }

    fn artifact(&mut self, path: &Path, artifact: &pb::Artifact) {
        if !is_plain_name(&artifact.name) {
            let why = format!(
                "must be a name of letters, digits, . _ and -, at most {NAME_MAX}, no . first: it is found as this in NAVE_ARTIFACTS"
            );
            self.broken(path.key("name"), why);
        }
        let rest =
            ["https://", "http://", "file:///"].iter().find_map(|scheme| artifact.url.strip_prefix(scheme));
        if rest.is_none_or(|rest| {
            rest.is_empty() || artifact.url.chars().any(|c| c.is_whitespace() || c.is_control())
        }) {
            let why = format!("must be an https, http or file:///… URL, not {:?}", shorten(&artifact.url));
            self.broken(path.key("url"), why);
        }
        let is_sum = artifact.sha256.len() == 64
            && artifact.sha256.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if !is_sum {
            let why =
                "must be 64 digits 0-9 a-f, as `sha256sum` prints them: nothing is fetched that is not known";
            self.broken(path.key("sha256"), why);
        }
        if !["none", "tar.gz", "tar.zst", "zip"].contains(&artifact.archive.as_str()) {
            let why =
                format!("must be one of tar.gz, tar.zst, zip, none, not {:?}", shorten(&artifact.archive));
            self.broken(path.key("archive"), why);
        }
    }

    fn file(&mut self, path: &Path, file: &pb::File) {
        if let Some(why) = bad_place(&file.path) {
            self.broken(path.key("path"), why);
        }
        if !file.source.is_empty() {
            self.host_path(path.key("source"), &file.source);
            if !file.content.is_empty() {
                self.broken(
                    path.key("source"),
                    "content and source contradict each other; leave one of them out",
                );
            }
        }
        if file.mode > 0o777 {
            self.broken(path.key("mode"), format!("{:o} is more than permissions, 777 at most", file.mode));
        }
        self.user(path.key("owner"), &file.owner);
    }

    fn env_files(&mut self, env_files: &[String]) {
        let path = Path::default().key("env_file");
        if env_files.len() > ENV_FILES_MAX {
            self.broken(path.clone(), format!("at most {ENV_FILES_MAX} files, not {}", env_files.len()));
        }
        for (index, file) in env_files.iter().enumerate() {
            self.host_path(path.index(index), file);
        }
    }

    fn secrets(&mut self, manifest: &pb::Manifest) {
        let path = Path::default().key("secrets");
        if manifest.secrets.len() > SECRETS_MAX {
            self.broken(
                path.clone(),
                format!("at most {SECRETS_MAX} secrets, not {}", manifest.secrets.len()),
            );
        }
        for (name, source) in &manifest.secrets {
            if !is_plain_name(name) {
                let why = format!(
                    "a secret's name has letters, digits, . _ and -, at most {NAME_MAX}, and no . first"
                );
                self.broken(path.key(name), why);
            }
            self.host_path(path.key(name), source);
        }
    }

    fn host_path(&mut self, path: Path, file: &str) {
        if file.contains('\0') {
            self.broken(path, "has a NUL byte, which no path can have");
        } else if !file.starts_with('/') {
            let why = format!("must be the absolute path of a file on the host, not {:?}", shorten(file));
            self.broken(path, why);
        }
    }
}

/// A name that is one part of a path.
fn is_plain_name(name: &str) -> bool {
    (1..=NAME_MAX).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// Why a file cannot be there.
fn bad_place(path: &str) -> Option<String> {
    let shown = shorten(path);
    if path.is_empty() {
        return Some("is missing; where the file is to be, such as \"app.toml\"".to_owned());
    }
    if path.starts_with('/') {
        return Some(format!("must be relative, not {shown:?}: files are made in the directory NAVE_FILES"));
    }
    if path.len() > PATH_MAX || path.contains('\0') {
        return Some(format!("{shown:?} is no path of at most {PATH_MAX} bytes"));
    }
    let plain = path.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    (!plain).then(|| format!("{shown:?} must go straight down: without empty parts, . and .."))
}

fn is_within(inner: &str, outer: &str) -> bool {
    inner.strip_prefix(outer).is_some_and(|rest| rest.starts_with('/'))
}
