//! The agent's one configuration file, parsed and cross-checked wholly before anything is opened.
//! The cli writes such files too (`nave dev`, `nave init`), which is why it serializes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What `nave agent --config FILE` reads. Relative paths are relative to the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// Identity, ledger, logs and the services' own directories; kept over restarts and upgrades.
    pub data_dir: PathBuf,
    /// Hub members to ask first, each `host:port`; later the list that the hub sends is used as well.
    pub join: Vec<String>,
    /// File with the join token; read only while this host has not enrolled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// Unique in the cluster. Default: the machine's host name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The agent's own API, for members and operators.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// `host:port` at which others reach `listen`. Default: this machine's address on the way to the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// Plain text `/metrics` and `/healthz`; loopback only.
    #[serde(default = "default_metrics_listen")]
    pub metrics_listen: SocketAddr,
    /// For placement constraints, e.g. `zone = "a"`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// First half of the services' addresses on this host, `127.N`.
    #[serde(default = "default_address_prefix")]
    pub address_prefix: String,
    /// Answers names such as `web.nave.internal` on port 53 of its prefix's first address, where it may listen there, and
    /// as root gives services a resolver that asks it first.
    #[serde(default = "default_dns")]
    pub dns: bool,
    /// As root, a table of nftables that lets only the agent and the service itself connect to an instance's own port.
    #[serde(default = "default_firewall")]
    pub firewall: bool,
    /// CPU for services in thousandths of a core; 0: all of the machine's.
    #[serde(default)]
    pub cpu_millicores: u64,
    /// Memory for services in bytes; 0: the machine's, less a reserve.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Ports that instances get, first and last. Outside `ip_local_port_range`, so that no outgoing
    /// connection takes them.
    #[serde(default = "default_port_min")]
    pub port_min: u16,
    #[serde(default = "default_port_max")]
    pub port_max: u16,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {path}")]
    Read { path: String, source: std::io::Error },
    #[error("{path} is not a valid agent configuration: {message}")]
    Parse { path: String, message: String },
    #[error("{key}: {message}")]
    Invalid { key: &'static str, message: String },
}

impl AgentConfig {
    /// A configuration with every default, for the callers that build one in memory.
    pub fn new(data_dir: PathBuf, join: Vec<String>) -> Self {
        Self {
            data_dir,
            join,
            token_file: None,
            name: String::new(),
            listen: default_listen(),
            advertise: None,
            metrics_listen: default_metrics_listen(),
            labels: BTreeMap::new(),
            address_prefix: default_address_prefix(),
            dns: default_dns(),
            firewall: default_firewall(),
            cpu_millicores: 0,
            memory_bytes: 0,
            port_min: default_port_min(),
            port_max: default_port_max(),
        }
    }

    /// Reads, resolves relative paths and checks.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: shown.clone(), source })?;
        let mut config: Self = toml::from_str(&text)
            .map_err(|e| ConfigError::Parse { path: shown, message: e.to_string().trim_end().to_owned() })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        config.data_dir = folder.join(&config.data_dir);
        config.token_file = config.token_file.map(|file| folder.join(file));
        config.check()?;
        Ok(config)
    }

    /// The cross-checks alone; `load` and `run` both make them.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.data_dir.as_os_str().is_empty() {
            return Err(invalid("data_dir", "must name a directory"));
        }
        for address in &self.join {
            check_address("join", address)?;
        }
        if let Some(address) = &self.advertise {
            check_address("advertise", address)?;
            if address.starts_with("0.0.0.0:") || address.starts_with("[::]:") {
                return Err(invalid("advertise", "must be an address that other machines can dial"));
            }
        }
        if !self.metrics_listen.ip().is_loopback() {
            return Err(invalid(
                "metrics_listen",
                &format!(
                    "{} is not a loopback address; metrics are served without TLS, so only to this machine, e.g. 127.0.0.1:7490",
                    self.metrics_listen
                ),
            ));
        }
        if self.port_min < 1024 || self.port_max < self.port_min {
            return Err(invalid(
                "port_min",
                "ports must be a range of 1024..=65535 with port_min <= port_max",
            ));
        }
        check_prefix(&self.address_prefix)?;
        if !self.name.is_empty() && !is_host_name(&self.name) {
            return Err(invalid(
                "name",
                "must be 1 to 63 of letters, digits, '-', '.' and '_', beginning with a letter or digit",
            ));
        }
        Ok(())
    }
}

/// A name that the hub accepts for a host and that is safe in paths and tables.
pub(crate) fn is_host_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

fn invalid(key: &'static str, message: &str) -> ConfigError {
    ConfigError::Invalid { key, message: message.to_owned() }
}

fn check_address(key: &'static str, address: &str) -> Result<(), ConfigError> {
    let well_formed = address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok_and(|port| port != 0)
    });
    match well_formed {
        true => Ok(()),
        false => Err(invalid(key, &format!("{address:?} is not host:port, for instance hub1.example:7400"))),
    }
}

fn check_prefix(prefix: &str) -> Result<(), ConfigError> {
    let second = prefix.strip_prefix("127.").and_then(|rest| rest.parse::<u8>().ok());
    match second {
        // 127.0 holds localhost itself and what distributions put beside it.
        Some(1..) => Ok(()),
        Some(0) | None => Err(invalid(
            "address_prefix",
            &format!("{prefix:?} is not 127.N with N from 1 to 255, like 127.88"),
        )),
    }
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 7410))
}
fn default_metrics_listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7490))
}
fn default_dns() -> bool {
    true
}

fn default_firewall() -> bool {
    true
}

fn default_address_prefix() -> String {
    "127.88".to_owned()
}
fn default_port_min() -> u16 {
    20_000
}
fn default_port_max() -> u16 {
    32_000
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<AgentConfig, String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agent.toml");
        std::fs::write(&file, text).unwrap();
        AgentConfig::load(&file)
            .map(|mut config| {
                config.data_dir = config.data_dir.strip_prefix(dir.path()).unwrap().to_owned();
                config
            })
            .map_err(|e| e.to_string())
    }

    #[test]
    fn the_smallest_file_gets_the_documented_defaults() {
        let config = parse("data_dir = 'data'\njoin = ['10.0.0.1:7400']\n").unwrap();
        assert_eq!(config, AgentConfig::new("data".into(), vec!["10.0.0.1:7400".into()]));
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let mut config = AgentConfig::new("data".into(), vec!["hub:7400".into()]);
        config.labels.insert("zone".into(), "a".into());
        assert_eq!(parse(&toml::to_string(&config).unwrap()).unwrap(), config);
    }

    #[test]
    fn mistakes_name_their_key() {
        let base = "data_dir = 'data'\njoin = ['h:1']\n";
        for (extra, said) in [
            ("metrics_listen = '0.0.0.0:7490'", "metrics_listen: 0.0.0.0:7490 is not a loopback"),
            ("advertise = 'host'", "advertise: \"host\" is not host:port"),
            ("advertise = '0.0.0.0:7410'", "advertise: must be an address"),
            ("address_prefix = '10.0'", "address_prefix: \"10.0\""),
            ("address_prefix = '127.0'", "address_prefix: \"127.0\""),
            ("port_min = 30000\nport_max = 20000", "port_min: "),
            ("name = 'a b'", "name: "),
            ("datadir = 'x'", "unknown field `datadir`"),
        ] {
            let error = parse(&format!("{base}{extra}\n")).unwrap_err();
            assert!(error.contains(said), "{extra}: {error}");
        }
    }
}
