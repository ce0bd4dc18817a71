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
/// 0 to 2 are the standard ones.
const NOTIFY_FD_MIN: u32 = 3;
const NOTIFY_FD_MAX: u32 = 255;
/// A compiled pattern, in bytes; an ordinary one takes some KiB.
pub(crate) const PATTERN_SIZE_MAX: usize = 256 * 1024;
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
        let grace = health.start_grace.as_ref();
        self.duration(&["health", "start_grace"], grace, Duration::ZERO, INTERVAL_MAX);
        if grace.is_some() && health.live.is_none() {
            self.at(&["health", "start_grace"], "says nothing without [health.live]");
        }
    }

    fn probe(&mut self, table: &[&str], probe: &pb::Probe, manifest: &pb::Manifest) {
        let key = |key| [table, &[key]].concat();
        self.duration(&key("interval"), probe.interval.as_ref(), INTERVAL_MIN, INTERVAL_MAX);
        self.duration(&key("timeout"), probe.timeout.as_ref(), TIMEOUT_MIN, TIMEOUT_MAX);
        match &probe.check {
            None => {
                self.at(table, "has no check; add one of http, tcp, grpc, exec, notify, notify_fd or log")
            }
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
            Some(Check::NotifyFd(number)) => {
                if !(NOTIFY_FD_MIN..=NOTIFY_FD_MAX).contains(number) {
                    let why = format!("must be {NOTIFY_FD_MIN} to {NOTIFY_FD_MAX}, not {number}");
                    self.at(&key("notify_fd"), why);
                }
                self.said_once(table, "notify_fd");
                self.no_port(&key("port"), "notify_fd", probe);
            }
            Some(Check::Log(pattern)) => {
                self.pattern(&key("log"), pattern);
                self.said_once(table, "log");
                self.no_port(&key("port"), "log", probe);
            }
        }
    }

    /// What is said once, at the start, cannot show that a process still lives.
    fn said_once(&mut self, table: &[&str], check: &str) {
        if table.contains(&"live") {
            self.at(&[table, &[check]].concat(), "is said once, so it can only tell readiness");
        }
    }

    fn pattern(&mut self, keys: &[&str], pattern: &str) {
        let built = regex::RegexBuilder::new(pattern).size_limit(PATTERN_SIZE_MAX).build();
        if pattern.is_empty() {
            self.at(keys, "is empty, so any line would match");
        } else if let Err(error) = built {
            let why = error.to_string().lines().last().unwrap_or_default().to_owned();
            self.at(keys, format!("is not a regular expression: {why}"));
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
