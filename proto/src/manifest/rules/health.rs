//! The rules of `[health]`: each check needs something to check.

use std::time::Duration;

use super::Rules;
use crate::manifest::tree::{Path, shorten};
use crate::pb;
use crate::pb::probe::Check;

const INTERVAL_MIN: Duration = Duration::from_millis(100);
const INTERVAL_MAX: Duration = Duration::from_secs(3600);
const TIMEOUT_MIN: Duration = Duration::from_millis(1);
const TIMEOUT_MAX: Duration = Duration::from_secs(300);
/// Longest path of an http check, in bytes.
const HTTP_PATH_MAX: usize = 2048;

impl Rules {
    pub(super) fn health(&mut self, manifest: &pb::Manifest) {
        let Some(health) = &manifest.health else { return };
        if let Some(probe) = &health.ready {
            self.probe(&["health"], probe, manifest);
        }
        if let Some(probe) = &health.live {
            self.probe(&["health", "live"], probe, manifest);
        }
    }

    fn probe(&mut self, table: &[&str], probe: &pb::Probe, manifest: &pb::Manifest) {
        let key = |key| [table, &[key]].concat();
        self.duration(&key("interval"), probe.interval.as_ref(), INTERVAL_MIN, INTERVAL_MAX);
        self.duration(&key("timeout"), probe.timeout.as_ref(), TIMEOUT_MIN, TIMEOUT_MAX);
        match &probe.check {
            None => self.at(table, "has no check; add one of http, tcp, grpc, exec or notify"),
            Some(Check::Http(path)) => {
                self.http_path(&key("http"), path);
                self.probed_port(table, "http", probe, manifest);
            }
            Some(Check::Tcp(chosen)) => {
                self.chosen(&key("tcp"), *chosen);
                self.probed_port(table, "tcp", probe, manifest);
            }
            Some(Check::Grpc(chosen)) => {
                self.chosen(&key("grpc"), *chosen);
                self.probed_port(table, "grpc", probe, manifest);
            }
            Some(Check::Exec(exec)) => {
                let path = key("exec").iter().fold(Path::default(), |path, key| path.key(key));
                self.command(&path, &exec.command);
                self.no_port(&key("port"), "exec", probe);
            }
            Some(Check::Notify(chosen)) => {
                self.chosen(&key("notify"), *chosen);
                self.no_port(&key("port"), "notify", probe);
            }
        }
    }

    fn chosen(&mut self, keys: &[&str], chosen: bool) {
        if !chosen {
            self.at(keys, "false says nothing here; leave the key out");
        }
    }

    fn http_path(&mut self, keys: &[&str], path: &str) {
        let why = if !path.starts_with('/') {
            format!("must be a path that begins with /, such as \"/healthz\", not {:?}", shorten(path))
        } else if path.len() > HTTP_PATH_MAX {
            format!("a path has at most {HTTP_PATH_MAX} bytes, this one has {}", path.len())
        } else if path.bytes().any(|byte| !byte.is_ascii_graphic()) {
            "has blanks or characters that a URL must escape".to_owned()
        } else {
            return;
        };
        self.at(keys, why);
    }

    fn probed_port(&mut self, table: &[&str], check: &str, probe: &pb::Probe, manifest: &pb::Manifest) {
        if manifest.ports.is_empty() {
            let why = format!("the {check} check needs a port; add one, such as [ports.http]");
            return self.at(&[table, &[check]].concat(), why);
        }
        let names = || manifest.ports.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        if probe.port.is_empty() {
            let why =
                format!("there are several ports; say which one to check with port, one of {}", names());
            return self.at(&[table, &[check]].concat(), why);
        }
        let Some(port) = manifest.ports.get(&probe.port) else {
            let why = format!("there is no port {:?}, only {}", shorten(&probe.port), names());
            return self.at(&[table, &["port"]].concat(), why);
        };
        if check == "http" && port.protocol() == pb::Protocol::Grpc {
            let why = format!("port {:?} speaks grpc; use grpc = true or check another port", probe.port);
            self.at(&[table, &[check]].concat(), why);
        }
    }

    fn no_port(&mut self, keys: &[&str], check: &str, probe: &pb::Probe) {
        if !probe.port.is_empty() {
            self.at(keys, format!("{check} checks no port; leave the key out"));
        }
    }
}
