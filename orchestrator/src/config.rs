//! The configuration of one member: a TOML file written by `nave init` or `nave dev`, read once at start.
//! It is checked wholly before a port opens, so that a wrong value is told at once and by its name, never by a
//! subsystem that fails later. Called by the command line; what it leaves out is anything the hub itself decides.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nave_proto::ids::{ClusterId, MemberId};
use serde::{Deserialize, Serialize};

use crate::raft::SnapshotSettings;

/// Raft works best with three or five; more than seven voters only cost latency.
pub(crate) const MEMBERS_MAX: usize = 7;

/// Scheduled snapshots are whole states: more often they would only wear the disk.
const BACKUPS_EVERY_MIN: Duration = Duration::from_secs(1);

/// One member of the hub.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberConfig {
    /// This member's id, as in `members`, for instance `m-1`.
    #[serde(with = "as_text")]
    pub id: MemberId,
    /// This member's name, as in `members`.
    pub name: String,
    /// Sixteen hexadecimal digits, the same on every member.
    #[serde(with = "as_text")]
    pub cluster_id: ClusterId,
    /// Log, state and snapshots; created when missing.
    pub data_dir: PathBuf,
    /// Where the gRPC API, the agents' sessions and Raft are served.
    pub listen: SocketAddr,
    /// `host:port` under which the others reach this member, as in `members`.
    pub advertise: String,
    /// `/metrics` and `/healthz` in plain HTTP, on a loopback address only; left out: not served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<SocketAddr>,
    /// The cluster's CA certificate, PEM.
    pub ca_cert: PathBuf,
    /// The cluster's CA key, PEM, readable by its owner only. Each member mints its own certificate with it.
    pub ca_key: PathBuf,
    /// This member is added to a cluster that exists: it begins none of its own, and waits until it is added.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub join: bool,
    /// The members a new cluster begins with, this one included; the same list in every member's file. With
    /// `join`: whom to ask, beside this one, whether this member has been removed.
    pub members: Vec<MemberEntry>,
    /// Scheduled snapshots in `DATA_DIR/backups`.
    #[serde(default)]
    pub snapshots: SnapshotConfig,
    /// How much of the log is kept.
    #[serde(default)]
    pub log: LogConfig,
    /// The first join token of a new cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootstrap: Option<Bootstrap>,
}

/// Scheduled snapshots, for a restore: what `nave cluster snapshot` writes, without anybody asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SnapshotConfig {
    /// Time between two; for instance `1h`, which is the default.
    #[serde(with = "as_duration")]
    pub every: Duration,
    /// The newest are kept, 6 by default; 0: none are taken.
    pub keep: usize,
}

impl Default for SnapshotConfig {
    /// A registry of 10,000 services is some 20 MB.
    fn default() -> Self {
        Self { every: Duration::from_secs(3600), keep: 6 }
    }
}

/// The log beyond the newest snapshot of Raft's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Log entries between two of Raft's snapshots, which bound the log and serve members that are far behind.
    pub entries_between_snapshots: u64,
    /// Entries of those that stay in the log, so that a member that was away for less is served from it.
    pub entries_kept: u64,
}

impl Default for LogConfig {
    fn default() -> Self {
        let SnapshotSettings { entries_between, entries_kept, .. } = SnapshotSettings::default();
        Self { entries_between_snapshots: entries_between, entries_kept }
    }
}

/// One member as the others see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberEntry {
    /// For instance `m-1`; never used again for another member.
    #[serde(with = "as_text")]
    pub id: MemberId,
    /// Unique in the cluster.
    pub name: String,
    /// `host:port`.
    pub address: String,
}

/// The first join token: only the hash of its secret, so that the file need not be kept secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bootstrap {
    /// The token's id.
    pub token_id: String,
    /// SHA-256 of the token's secret, 64 hexadecimal digits.
    pub token_sha256: String,
    /// When the token ends, in seconds since 1970.
    pub token_expires_unix: i64,
}

/// Why a configuration cannot be used. The text says which value and what it should be.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the member's configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file is not TOML of the right shape; the source names line and column.
    #[error("{path} is not a member's configuration")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// Values that contradict each other or cannot be, one sentence each.
    #[error("the member's configuration cannot be used: {}", .0.join("; "))]
    Invalid(Vec<String>),
}

impl MemberConfig {
    /// Reads a file; relative paths in it are relative to the file's folder. Checks everything.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let mut config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        for file in [&mut config.data_dir, &mut config.ca_cert, &mut config.ca_key] {
            *file = folder.join(&*file);
        }
        config.check()?;
        Ok(config)
    }

    /// Checks the values against each other and that the named files are there.
    pub fn check(&self) -> Result<(), ConfigError> {
        let mut wrong = self.contradictions();
        for (key, file) in [("ca_cert", &self.ca_cert), ("ca_key", &self.ca_key)] {
            if !file.is_file() {
                wrong.push(format!("{key} = {file:?} is not a file; `nave init` writes it"));
            }
        }
        if wrong.is_empty() { Ok(()) } else { Err(ConfigError::Invalid(wrong)) }
    }

    /// All that is wrong with the values themselves.
    fn contradictions(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        if self.name.is_empty() {
            wrong.push("name is empty".to_owned());
        }
        // One that takes another's place stands beside it for a while.
        let most = MEMBERS_MAX + usize::from(self.join);
        if self.members.is_empty() || self.members.len() > most {
            wrong.push(format!("members lists {}, it must list 1 to {most}", self.members.len()));
        }
        if self.join && self.members.len() < 2 {
            wrong.push(
                "join = true, but members lists no other; `nave cluster add` writes such a file".to_owned(),
            );
        }
        if self.join && self.bootstrap.is_some() {
            wrong.push(
                "join and bootstrap exclude each other: a member that joins begins no cluster".to_owned(),
            );
        }
        let mut ids = BTreeSet::new();
        let mut names = BTreeSet::new();
        let mut addresses = BTreeSet::new();
        for member in &self.members {
            if member.id.0 == 0 {
                wrong.push("members lists m-0; ids begin at m-1".to_owned());
            }
            if !ids.insert(member.id) {
                wrong.push(format!("members lists {} twice", member.id));
            }
            if !names.insert(&member.name) {
                wrong.push(format!("members lists the name {:?} twice", member.name));
            }
            if !addresses.insert(&member.address) {
                wrong.push(format!("members lists the address {} twice", member.address));
            }
            if !is_host_port(&member.address) {
                wrong.push(format!("the address {:?} of {} is not host:port", member.address, member.id));
            }
        }
        match self.members.iter().find(|member| member.id == self.id) {
            None => wrong.push(format!("id is {}, which members does not list", self.id)),
            Some(own) => {
                if own.name != self.name {
                    wrong.push(format!(
                        "name is {:?}, but members calls {} {:?}",
                        self.name, self.id, own.name
                    ));
                }
                if own.address != self.advertise {
                    wrong.push(format!(
                        "advertise is {:?}, but members gives {} the address {:?}",
                        self.advertise, self.id, own.address
                    ));
                }
            }
        }
        if let Some(metrics) = self.metrics_listen {
            if !metrics.ip().is_loopback() {
                wrong.push(format!(
                    "metrics_listen = {metrics} is not a loopback address; metrics are plain text, use 127.0.0.1:{}",
                    metrics.port()
                ));
            }
            if metrics.port() == self.listen.port() && metrics.port() != 0 {
                wrong.push(format!("listen and metrics_listen both use port {}", metrics.port()));
            }
        }
        if self.snapshots.every < BACKUPS_EVERY_MIN {
            wrong.push("snapshots.every is below 1s".to_owned());
        }
        if self.log.entries_between_snapshots == 0 {
            wrong.push("log.entries_between_snapshots is 0".to_owned());
        }
        if let Some(bootstrap) = &self.bootstrap {
            if bootstrap.token_id.is_empty() {
                wrong.push("bootstrap.token_id is empty".to_owned());
            }
            if bootstrap.secret_sha256().is_none() {
                wrong.push("bootstrap.token_sha256 is not 64 hexadecimal digits".to_owned());
            }
        }
        wrong
    }
}

impl Bootstrap {
    /// The hash as bytes; nothing when it is not 64 hexadecimal digits.
    pub fn secret_sha256(&self) -> Option<[u8; 32]> {
        let mut bytes = [0; 32];
        if self.token_sha256.len() != 64 || !self.token_sha256.is_ascii() {
            return None;
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(self.token_sha256.get(2 * index..2 * index + 2)?, 16).ok()?;
        }
        Some(bytes)
    }

    /// The hash of a secret as it is written in the file.
    pub fn hex(sha256: &[u8; 32]) -> String {
        let mut text = String::with_capacity(64);
        for byte in sha256 {
            write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        }
        text
    }
}

/// `host:port` with a port that can be dialled.
pub(crate) fn is_host_port(text: &str) -> bool {
    text.rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0))
}

/// Ids are written as people see them.
mod as_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<T: Display, S: Serializer>(id: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// Durations are written as in manifests: `1h30m`.
mod as_duration {
    use std::time::Duration;

    use nave_proto::time::{format_duration, parse_duration};
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format_duration(*duration))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        parse_duration(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> MemberConfig {
        let entry = |id: u64, port: u16| MemberEntry {
            id: MemberId(id),
            name: format!("member-{id}"),
            address: format!("10.0.0.{id}:{port}"),
        };
        MemberConfig {
            id: MemberId(1),
            name: "member-1".to_owned(),
            cluster_id: ClusterId(7),
            data_dir: "data".into(),
            listen: "0.0.0.0:7400".parse().unwrap(),
            advertise: "10.0.0.1:7400".to_owned(),
            metrics_listen: Some("127.0.0.1:7480".parse().unwrap()),
            ca_cert: "ca.pem".into(),
            ca_key: "ca.key".into(),
            join: false,
            snapshots: SnapshotConfig { every: Duration::from_secs(5400), keep: 2 },
            log: LogConfig::default(),
            members: vec![entry(1, 7400), entry(2, 7400), entry(3, 7400)],
            bootstrap: Some(Bootstrap {
                token_id: "t1".to_owned(),
                token_sha256: "ab".repeat(32),
                token_expires_unix: 1,
            }),
        }
    }

    #[test]
    fn a_configuration_survives_its_own_text() {
        let text = toml::to_string(&good()).unwrap();
        assert!(text.contains("id = \"m-1\"") && text.contains("every = \"1h30m\""), "{text}");
        assert_eq!(toml::from_str::<MemberConfig>(&text).unwrap(), good());
    }

    #[test]
    fn paths_are_relative_to_the_file_and_missing_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("member.toml");
        std::fs::write(&file, toml::to_string(&good()).unwrap()).unwrap();
        let error = MemberConfig::load(&file).unwrap_err().to_string();
        assert!(error.contains("ca_cert") && error.contains("ca_key"), "{error}");
        for name in ["ca.pem", "ca.key"] {
            std::fs::write(folder.path().join(name), "x").unwrap();
        }
        let config = MemberConfig::load(&file).unwrap();
        assert_eq!(config.data_dir, folder.path().join("data"));
    }

    #[test]
    fn contradictions_are_told_by_name() {
        type Change = fn(&mut MemberConfig);
        let table: [(Change, &str); 12] = [
            (|c| c.snapshots.every = Duration::ZERO, "snapshots.every is below 1s"),
            (|c| c.join = true, "join and bootstrap exclude each other"),
            (|c| (c.join, c.members) = (true, c.members[..1].to_vec()), "members lists no other"),
            (|c| c.id = MemberId(9), "id is m-9, which members does not list"),
            (|c| c.name = "x".to_owned(), "members calls m-1 \"member-1\""),
            (|c| c.advertise = "10.0.0.9:1".to_owned(), "advertise is \"10.0.0.9:1\""),
            (|c| c.members[1].id = MemberId(1), "members lists m-1 twice"),
            (|c| c.members[1].name = "member-1".to_owned(), "the name \"member-1\" twice"),
            (|c| c.members[2].address = "nowhere".to_owned(), "is not host:port"),
            (|c| c.metrics_listen = Some("0.0.0.0:1".parse().unwrap()), "not a loopback address"),
            (|c| c.metrics_listen = Some("127.0.0.1:7400".parse().unwrap()), "both use port 7400"),
            (|c| c.bootstrap.as_mut().unwrap().token_sha256 = "zz".repeat(32), "64 hexadecimal digits"),
        ];
        assert_eq!(good().contradictions(), Vec::<String>::new());
        for (change, expected) in table {
            let mut config = good();
            change(&mut config);
            let wrong = config.contradictions().join("; ");
            assert!(wrong.contains(expected), "{wrong:?} does not say {expected:?}");
        }
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let text = format!("{}\nsurprise = 1\n", "id = \"m-1\"");
        let error = toml::from_str::<MemberConfig>(&text).unwrap_err().to_string();
        assert!(error.contains("surprise") && error.contains("line 2"), "{error}");
    }
}
