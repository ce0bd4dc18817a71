//! Which cluster a verb speaks to, and as whom: the client file. `nave dev` and `nave init` write one.
//! The environment is read here and nowhere else in this crate, colours and log level apart.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// `client.toml`. PEM values are file names relative to it, or the PEM text itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ClientFile {
    /// Members, each `host:port`.
    pub(crate) addresses: Vec<String>,
    pub(crate) ca: String,
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// A client file as loaded: every PEM value is text.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) path: PathBuf,
    pub(crate) addresses: Vec<String>,
    pub(crate) ca_pem: String,
    pub(crate) certificate_pem: String,
    pub(crate) key_pem: String,
}

impl Context {
    /// Loads what `--context` or `NAVE_CONTEXT` names, else the file in the home directory.
    pub(crate) fn load(chosen: Option<&Path>) -> Result<Self, Failure> {
        match chosen {
            Some(path) => Self::read(path, true),
            None => {
                let path = default_path().ok_or_else(|| no_context("HOME is not set"))?;
                Self::read(&path, false)
            }
        }
    }

    fn read(path: &Path, chosen: bool) -> Result<Self, Failure> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !chosen => {
                return Err(no_context(&format!("there is no {}", path.display())));
            }
            Err(error) => {
                let what = format!("cannot read the client file {}: {}", path.display(), plain(&error));
                return Err(Failure::usage(what).next(HOW_TO_GET_ONE));
            }
        };
        let file: ClientFile = toml::from_str(&text).map_err(|error| {
            Failure::usage(format!("{} is not a valid client file", path.display()))
                .detail(error.to_string().trim_end())
        })?;
        if file.addresses.is_empty() {
            return Err(Failure::usage(format!("{} names no addresses", path.display())));
        }
        if let Some(wrong) = file.addresses.iter().find(|address| !is_address(address)) {
            return Err(Failure::usage(format!("{}: {wrong:?} is not host:port", path.display())));
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        Ok(Self {
            path: path.to_owned(),
            ca_pem: pem(folder, "ca", &file.ca)?,
            certificate_pem: pem(folder, "certificate", &file.certificate)?,
            key_pem: pem(folder, "key", &file.key)?,
            addresses: file.addresses,
        })
    }
}

impl ClientFile {
    /// Has the file at `path` name these members; false: it does already. Its keys stay as they are.
    pub(crate) fn set_addresses(path: &Path, addresses: &[String]) -> Result<bool, Failure> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::refused(format!("cannot read {}: {}", path.display(), plain(&error)))
        })?;
        let mut file: Self = toml::from_str(&text)
            .map_err(|_| Failure::refused(format!("{} is not a valid client file", path.display())))?;
        if file.addresses.iter().collect::<BTreeSet<_>>() == addresses.iter().collect() {
            return Ok(false);
        }
        file.addresses = addresses.to_vec();
        let text = toml::to_string(&file).map_err(anyhow::Error::from)?;
        let comment = "# An operator's way to the cluster: export NAVE_CONTEXT=FILE";
        crate::init::write(path, 0o644, &format!("{comment}\n{text}"))?;
        Ok(true)
    }
}

const HOW_TO_GET_ONE: &str = "`nave dev` starts a cluster on this machine and prints the line to export; for another \
                              cluster, set NAVE_CONTEXT to the client.toml that `nave init` wrote";

fn no_context(why: &str) -> Failure {
    Failure::usage(format!("no cluster chosen: NAVE_CONTEXT is not set and {why}")).next(HOW_TO_GET_ONE)
}

fn pem(folder: &Path, key: &str, value: &str) -> Result<String, Failure> {
    if value.trim_start().starts_with("-----BEGIN ") {
        return Ok(value.to_owned());
    }
    let path = folder.join(value);
    std::fs::read_to_string(&path)
        .map_err(|error| Failure::usage(format!("cannot read {key} {}: {}", path.display(), plain(&error))))
}

/// The error without the number the operating system gives it.
pub(crate) fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    text.to_lowercase()
}

/// `host:port` with a port that can be dialled.
pub(crate) fn is_address(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| {
        let host_ok = !host.is_empty() && !host.contains(['/', ' ']);
        let ipv6_ok = !host.contains(':') || (host.starts_with('[') && host.ends_with(']'));
        host_ok && ipv6_ok && port.parse::<u16>().is_ok_and(|port| port != 0)
    })
}

fn default_path() -> Option<PathBuf> {
    let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let config = config.or_else(|| home().map(|home| home.join(".config")))?;
    Some(config.join("nave/client.toml"))
}

fn home() -> Option<PathBuf> {
    std::env::var_os("HOME").map(PathBuf::from).filter(|path| path.is_absolute())
}

/// Where `nave dev` keeps everything unless told.
pub(crate) fn default_dev_dir() -> Option<PathBuf> {
    let data = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let data = data.or_else(|| home().map(|home| home.join(".local/share")))?;
    Some(data.join("nave/dev"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn files_are_relative_to_the_client_file_and_pem_may_be_inline() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "ca.crt", "the ca");
        write(folder.path(), "me.crt", "my certificate");
        let path = write(
            folder.path(),
            "client.toml",
            "addresses = ['a:1']\nca = 'ca.crt'\ncertificate = 'me.crt'\nkey = '''\n-----BEGIN PRIVATE KEY-----\n'''\n",
        );
        let context = Context::load(Some(&path)).unwrap();
        assert_eq!(context.ca_pem, "the ca");
        assert_eq!(context.certificate_pem, "my certificate");
        assert!(context.key_pem.starts_with("-----BEGIN"));
    }

    #[test]
    fn new_addresses_leave_the_keys_alone() {
        let folder = tempfile::tempdir().unwrap();
        let text = "addresses = ['a:1', 'b:1']\nca = 'ca.crt'\ncertificate = 'me.crt'\nkey = 'me.key'\n";
        let path = write(folder.path(), "client.toml", text);
        let list = |addresses: &[&str]| addresses.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>();
        assert!(!ClientFile::set_addresses(&path, &list(&["b:1", "a:1"])).unwrap());
        assert!(ClientFile::set_addresses(&path, &list(&["a:1", "c:1"])).unwrap());
        let file: ClientFile = toml::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!((file.addresses, file.key.as_str()), (list(&["a:1", "c:1"]), "me.key"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let folder = tempfile::tempdir().unwrap();
        for (text, said) in [
            ("addresses = []\nca=''\ncertificate=''\nkey=''", "names no addresses"),
            ("addresses = ['a']\nca=''\ncertificate=''\nkey=''", "\"a\" is not host:port"),
            ("addreses = ['a:1']", "addreses"),
            ("addresses = ['a:1']\nca='none.crt'\ncertificate=''\nkey=''", "cannot read ca"),
        ] {
            let path = write(folder.path(), "client.toml", text);
            let failure = Context::load(Some(&path)).unwrap_err();
            assert_eq!(failure.exit, crate::failure::Exit::Usage);
            assert!(failure.to_string().contains(said), "{failure}");
        }
    }

    #[test]
    fn a_missing_file_says_how_to_get_one() {
        let failure = Context::load(Some(Path::new("/nonexistent/client.toml"))).unwrap_err();
        assert!(failure.to_string().contains("nave dev"), "{failure}");
        assert!(failure.to_string().contains("no such file"), "{failure}");
    }

    #[test]
    fn addresses_have_a_host_and_a_port() {
        for good in ["a:1", "10.0.0.1:7400", "[::1]:7400"] {
            assert!(is_address(good), "{good}");
        }
        for bad in ["a", "a:", ":1", "a:0", "a:70000", "http://a:1", "::1:7400"] {
            assert!(!is_address(bad), "{bad}");
        }
    }
}
