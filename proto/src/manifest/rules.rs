//! What makes a manifest possible, whoever wrote it: bounds, names, and parts that contradict each other. Runs on the
//! message with its defaults filled in, in the command line to point at the text and in the hub to trust nobody.
//! What needs the rest of the cluster (a cycle in `needs`, capacity) is not known here.

mod calls;
mod files;
mod health;
mod hooks;
mod isolation;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use prost::Message as _;

use super::MANIFEST_BYTES_MAX;
use super::schedule::Schedule;
use super::tree::{Path, shorten};
use super::values::{format_cpu, format_size};
use crate::constraint::{Constraint, Spread};
use crate::time::{format_duration, from_proto};
use crate::{pb, signals};

/// Most instances of one service.
pub const COUNT_MAX: u32 = 10_000;
const NAME_MAX: usize = 63;
const NEEDS_MAX: usize = 64;
const ALLOW_MAX: usize = 1024;
const PORTS_MAX: usize = 32;
const PORT_NAME_MAX: usize = 32;
const USER_MAX: usize = 32;
const CONSTRAINTS_MAX: usize = 32;
const PRIORITY_MAX: u32 = 100;
/// More cores than any machine has.
const CPU_MAX_MILLICORES: u64 = 4096 * 1000;
/// Under this no program starts.
const MEMORY_MIN_BYTES: u64 = 1 << 20;
/// More memory than any machine has.
const MEMORY_MAX_BYTES: u64 = 1 << 50;
const RESTARTS_MAX: u32 = 10_000;
/// Less would be a file for every few lines.
const LOGS_MIN_BYTES: u64 = 64 * 1024;
const LOGS_MAX_BYTES: u64 = 1 << 40;
const LOGS_AGE_MAX: Duration = Duration::from_secs(3650 * 24 * 3600);
const EXIT_CODE_MAX: u32 = 255;
const PIDS_MAX: u32 = 1 << 22;
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// One reason why a manifest is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The key, as in a file: `ports.http.port`, `needs[1]`; empty for the manifest as a whole.
    pub path: String,
    /// What is wrong with it.
    pub message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path.as_str() {
            "" => f.write_str(&self.message),
            path => write!(f, "{path}: {}", self.message),
        }
    }
}

impl std::error::Error for Violation {}

/// Checks a manifest whose defaults are [filled in](super::fill_defaults); an unset table counts as its default.
/// All violations, in the order of the definition.
pub fn validate(manifest: &pb::Manifest) -> Result<(), Vec<Violation>> {
    let violations = check(manifest);
    if violations.is_empty() {
        return Ok(());
    }
    Err(violations.into_iter().map(|(path, message)| Violation { path: path.to_string(), message }).collect())
}

pub(super) fn check(manifest: &pb::Manifest) -> Vec<(Path, String)> {
    let mut rules = Rules::default();
    let size = manifest.encoded_len();
    if size > MANIFEST_BYTES_MAX {
        rules.broken(
            Path::default(),
            format!("a manifest has at most {MANIFEST_BYTES_MAX} bytes, this one {size}"),
        );
    }
    rules.name(manifest);
    rules.command(&Path::default().key("command"), &manifest.command);
    rules.count(manifest);
    rules.env(manifest);
    rules.user(Path::default().key("user"), &manifest.user);
    rules.working_dir(&manifest.working_dir);
    rules.needs(manifest);
    rules.allow(manifest);
    rules.ports(&manifest.ports);
    rules.health(manifest);
    rules.restart(manifest.restart.as_ref());
    rules.resources(manifest.resources.as_ref());
    rules.update(manifest);
    rules.stop(manifest.stop.as_ref());
    rules.placement(manifest.placement.as_ref());
    rules.job(manifest);
    rules.logs(manifest.logs.as_ref());
    rules.files(manifest);
    rules.isolation(manifest);
    rules.rlimits(manifest);
    rules.hooks(manifest);
    rules.broken
}

#[derive(Default)]
struct Rules {
    broken: Vec<(Path, String)>,
}

impl Rules {
    fn broken(&mut self, path: Path, message: impl Into<String>) {
        self.broken.push((path, message.into()));
    }

    fn at(&mut self, keys: &[&str], message: impl Into<String>) {
        let path = keys.iter().fold(Path::default(), |path, key| path.key(key));
        self.broken(path, message);
    }

    fn name(&mut self, manifest: &pb::Manifest) {
        match manifest.name.as_str() {
            "" => self.at(&["name"], "is missing; give the service a name, such as \"web\""),
            name => {
                if let Some(why) = bad_name(name) {
                    self.at(&["name"], why);
                }
            }
        }
    }

    fn command(&mut self, path: &Path, command: &[String]) {
        if command.is_empty() {
            self.broken(
                path.clone(),
                "is missing; list the program and its arguments, such as [\"sleep\", \"60\"]",
            );
        }
        for (index, argument) in command.iter().enumerate() {
            if argument.contains('\0') {
                self.broken(path.index(index), "has a NUL byte, which no argument can have");
            } else if index == 0 && argument.trim().is_empty() {
                self.broken(path.index(0), "is empty; the first text names the program");
            }
        }
    }

    fn count(&mut self, manifest: &pb::Manifest) {
        if manifest.per_host && manifest.count != 0 {
            self.at(&["count"], "count and per_host contradict each other; leave one of them out");
        } else if manifest.count > COUNT_MAX {
            self.at(&["count"], format!("must be at most {COUNT_MAX}, not {}", manifest.count));
        }
    }

    fn env(&mut self, manifest: &pb::Manifest) {
        for (name, value) in &manifest.env {
            let taken = name.starts_with("NAVE_")
                || name == "NOTIFY_SOCKET"
                || (!manifest.ports.is_empty() && (name == "HOST" || name == "PORT"));
            let mut characters = name.chars();
            let well_formed =
                characters.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
                    && characters.all(|c| c.is_ascii_alphanumeric() || c == '_');
            if !well_formed {
                self.at(&["env", name], "a variable's name has letters, digits and _, and no digit first");
            } else if taken {
                self.at(&["env", name], format!("{name} is set by Nave; choose another name"));
            }
            if value.contains('\0') {
                self.at(&["env", name], "has a NUL byte, which no variable can have");
            }
        }
    }

    fn user(&mut self, path: Path, user: &str) {
        let is_number = user.bytes().all(|byte| byte.is_ascii_digit());
        let is_name = user.len() <= USER_MAX
            && user.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
            && user.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte));
        let possible = user.is_empty() || if is_number { user.parse::<u32>().is_ok() } else { is_name };
        if !possible {
            self.broken(path, format!("{:?} is neither a user's name nor a uid", shorten(user)));
        }
    }

    fn working_dir(&mut self, working_dir: &str) {
        if working_dir.contains('\0') {
            self.at(&["working_dir"], "has a NUL byte, which no path can have");
        } else if !working_dir.is_empty() && !working_dir.starts_with('/') {
            let why = format!("must be absolute, such as \"/srv/web\", not {:?}", shorten(working_dir));
            self.at(&["working_dir"], why);
        }
    }

    fn needs(&mut self, manifest: &pb::Manifest) {
        let path = Path::default().key("needs");
        if manifest.needs.len() > NEEDS_MAX {
            self.broken(path.clone(), format!("at most {NEEDS_MAX} services, not {}", manifest.needs.len()));
        }
        for (index, needed) in manifest.needs.iter().enumerate() {
            let path = path.index(index);
            if let Some(why) = bad_name(needed) {
                self.broken(path, why);
            } else if *needed == manifest.name {
                self.broken(path, format!("{needed:?} needs itself, so it could never start"));
            } else if manifest.needs[..index].contains(needed) {
                self.broken(path, format!("{needed:?} is listed twice"));
            }
        }
    }

    fn allow(&mut self, manifest: &pb::Manifest) {
        let Some(allow) = &manifest.allow else { return };
        let path = Path::default().key("allow");
        if manifest.ports.is_empty() {
            self.broken(
                path.clone(),
                "nobody can call a service without ports; add one, such as [ports.http]",
            );
        }
        if allow.callers.len() > ALLOW_MAX {
            self.broken(path.clone(), format!("at most {ALLOW_MAX} callers, not {}", allow.callers.len()));
        }
        for (index, caller) in allow.callers.iter().enumerate() {
            let path = path.index(index);
            if let Some(why) = bad_caller(caller) {
                self.broken(path, why);
            } else if allow.callers[..index].contains(caller) {
                self.broken(path, format!("{caller:?} is listed twice"));
            }
        }
    }

    fn ports(&mut self, ports: &BTreeMap<String, pb::Port>) {
        if ports.len() > PORTS_MAX {
            self.at(&["ports"], format!("at most {PORTS_MAX} ports, not {}", ports.len()));
        }
        let mut service_ports: BTreeMap<u32, &str> = BTreeMap::new();
        let mut fixed_ports: BTreeMap<u32, &str> = BTreeMap::new();
        for (name, port) in ports {
            self.port(name, port);
            if port.service_port != 0
                && let Some(other) = service_ports.insert(port.service_port, name)
            {
                let why = format!("{} is the service_port of {other:?} too", port.service_port);
                self.at(&["ports", name, "service_port"], why);
            }
            if port.port != 0
                && let Some(other) = fixed_ports.insert(port.port, name)
            {
                self.at(&["ports", name, "port"], format!("{} is the port of {other:?} too", port.port));
            }
        }
    }

    fn port(&mut self, name: &str, port: &pb::Port) {
        let well_formed = (1..=PORT_NAME_MAX).contains(&name.len())
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && !name.ends_with('-')
            && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        if !well_formed {
            let why = format!("a port's name has a-z, 0-9 and -, a letter first, at most {PORT_NAME_MAX}");
            self.at(&["ports", name], why);
        }
        if !matches!(
            pb::Protocol::try_from(port.protocol),
            Ok(pb::Protocol::Http | pb::Protocol::Http2 | pb::Protocol::Grpc | pb::Protocol::Tcp)
        ) {
            self.at(&["ports", name, "protocol"], "is missing; one of http, http2, grpc, tcp");
        } else if port.service_port == 0 {
            let why = "is missing: the port that callers use; only http has a default, 80";
            self.at(&["ports", name, "service_port"], why);
        }
        for (key, number) in [("service_port", port.service_port), ("port", port.port)] {
            if number > 65_535 {
                self.at(&["ports", name, key], format!("must be 1 to 65535, not {number}"));
            }
        }
        if let Some(calls) = &port.calls {
            self.calls(name, port.protocol(), calls);
        }
    }

    fn restart(&mut self, restart: Option<&pb::Restart>) {
        let Some(restart) = restart else { return };
        let budget = ["restart", "budget"];
        if pb::RestartPolicy::try_from(restart.policy).is_err() {
            self.at(&["restart", "policy"], "must be one of always, on-failure, never");
        }
        if restart.budget_window.is_some() {
            match restart.budget_restarts {
                0 => self.at(&budget, "0 restarts are none: set policy = \"never\" instead"),
                1..=RESTARTS_MAX => {}
                restarts => self.at(&budget, format!("at most {RESTARTS_MAX} restarts, not {restarts}")),
            }
        }
        self.duration(&budget, restart.budget_window.as_ref(), Duration::from_secs(1), DAY);
        for (key, codes) in [("success_codes", &restart.success_codes), ("fatal_codes", &restart.fatal_codes)]
        {
            self.exit_codes(key, codes, restart);
        }
    }

    fn exit_codes(&mut self, key: &str, codes: &[u32], restart: &pb::Restart) {
        let path = Path::default().key("restart").key(key);
        for (index, &code) in codes.iter().enumerate() {
            if code > EXIT_CODE_MAX {
                self.broken(path.index(index), format!("an exit code is 0 to {EXIT_CODE_MAX}, not {code}"));
            } else if codes[..index].contains(&code) {
                self.broken(path.index(index), format!("{code} is listed twice"));
            } else if key == "fatal_codes" && code == 0 {
                self.broken(path.index(index), "0 is how a program says that all is well");
            } else if key == "fatal_codes" && restart.success_codes.contains(&code) {
                self.broken(path.index(index), format!("{code} is one of success_codes too"));
            }
        }
    }

    fn resources(&mut self, resources: Option<&pb::Resources>) {
        let Some(resources) = resources else { return };
        let (cpu, cpu_max) = (resources.cpu_millicores, resources.cpu_max_millicores);
        for (key, millicores) in [("cpu", cpu), ("cpu_max", cpu_max)] {
            if millicores > CPU_MAX_MILLICORES {
                let (most, given) = (format_cpu(CPU_MAX_MILLICORES), format_cpu(millicores));
                self.at(&["resources", key], format!("must be at most {most} cores, not {given}"));
            }
        }
        if cpu_max != 0 && cpu_max < cpu {
            let why = format!("{} is less than the {} reserved by cpu", format_cpu(cpu_max), format_cpu(cpu));
            self.at(&["resources", "cpu_max"], why);
        }
        let memory = resources.memory_bytes;
        if memory != 0 && !(MEMORY_MIN_BYTES..=MEMORY_MAX_BYTES).contains(&memory) {
            let (least, most) = (format_size(MEMORY_MIN_BYTES), format_size(MEMORY_MAX_BYTES));
            let why = format!("must be {least} to {most}, not {}", format_size(memory));
            self.at(&["resources", "memory"], why);
        }
        self.soft_memory(resources);
        if resources.pids > PIDS_MAX {
            self.at(&["resources", "pids"], format!("must be at most {PIDS_MAX}, not {}", resources.pids));
        }
        if !(-20..=19).contains(&resources.nice) {
            self.at(&["resources", "nice"], format!("must be -20 to 19, not {}", resources.nice));
        }
        let score = resources.oom_score_adj;
        if !(-1000..=1000).contains(&score) {
            self.at(&["resources", "oom_score_adj"], format!("must be -1000 to 1000, not {score}"));
        }
    }

    fn soft_memory(&mut self, resources: &pb::Resources) {
        let (soft, hard) = (resources.memory_soft_bytes, resources.memory_bytes);
        if soft == 0 {
            return;
        }
        if !(MEMORY_MIN_BYTES..=MEMORY_MAX_BYTES).contains(&soft) {
            let (least, most) = (format_size(MEMORY_MIN_BYTES), format_size(MEMORY_MAX_BYTES));
            let why = format!("must be {least} to {most}, not {}", format_size(soft));
            self.at(&["resources", "memory_soft"], why);
        } else if hard != 0 && soft >= hard {
            let (soft, hard) = (format_size(soft), format_size(hard));
            let why = format!("{soft} is not less than the hard limit, {hard}, so it would never be felt");
            self.at(&["resources", "memory_soft"], why);
        }
    }

    fn update(&mut self, manifest: &pb::Manifest) {
        let Some(update) = &manifest.update else { return };
        if update.max_parallel == 0 {
            self.at(&["update", "max_parallel"], "must be at least 1, or nothing could ever be replaced");
        }
        let min_ready =
            self.duration(&["update", "min_ready"], update.min_ready.as_ref(), Duration::ZERO, HOUR);
        let deadline = self.duration(
            &["update", "progress_deadline"],
            update.progress_deadline.as_ref(),
            Duration::from_secs(1),
            DAY,
        );
        if let (Some(min_ready), Some(deadline)) = (min_ready, deadline)
            && deadline <= min_ready
        {
            let (deadline, min_ready) = (format_duration(deadline), format_duration(min_ready));
            let why =
                format!("{deadline} is not longer than min_ready, {min_ready}, so every update would fail");
            self.at(&["update", "progress_deadline"], why);
        }
        if !manifest.per_host && update.canary > manifest.count {
            let why = format!("must be at most count, {}, not {}", manifest.count, update.canary);
            self.at(&["update", "canary"], why);
        }
    }

    fn stop(&mut self, stop: Option<&pb::Stop>) {
        let Some(stop) = stop else { return };
        match stop.signal {
            18..=22 => {
                let why = format!("{} ends no process; SIGTERM asks it to end", signals::name(stop.signal));
                self.at(&["stop", "signal"], why);
            }
            1..=31 => {}
            signal => {
                self.at(&["stop", "signal"], format!("{signal} is not the number of a signal, 1 to 31"))
            }
        }
        if pb::StopScope::try_from(stop.scope).is_err() {
            self.at(&["stop", "scope"], "must be one of process, group");
        }
        self.duration(&["stop", "grace"], stop.grace.as_ref(), Duration::ZERO, HOUR);
        self.duration(&["stop", "drain_timeout"], stop.drain_timeout.as_ref(), Duration::ZERO, HOUR);
    }

    fn job(&mut self, manifest: &pb::Manifest) {
        if manifest.kind() != pb::Kind::Job {
            if !manifest.schedule.is_empty() {
                self.at(&["schedule"], "only a job has a schedule; say kind = \"job\"");
            }
            if manifest.job.is_some() {
                self.at(&["job"], "is for jobs; say kind = \"job\"");
            }
            return;
        }
        if manifest.per_host {
            self.at(&["per_host"], "a job runs on one host at a time; leave it out");
        } else if manifest.count != 1 {
            self.at(
                &["count"],
                format!("a job has one process at a time, not {}; leave it out", manifest.count),
            );
        }
        if manifest.health.is_some() {
            self.at(&["health"], "a job is done when it ends, nobody asks whether it is ready; leave it out");
        }
        if manifest.update.is_some_and(|update| update.canary != 0) {
            self.at(&["update", "canary"], "a job replaces nothing, so it has no canaries");
        }
        if manifest.restart.as_ref().is_some_and(|restart| restart.policy() == pb::RestartPolicy::Always) {
            self.at(
                &["restart", "policy"],
                "always would never let a job end; on-failure tries again, never does not",
            );
        }
        if !manifest.schedule.is_empty() {
            self.schedule(&manifest.schedule);
        }
    }

    fn schedule(&mut self, text: &str) {
        match Schedule::parse(text) {
            Err(why) => self.at(&["schedule"], why),
            Ok(schedule) if !schedule.is_ever_due() => self.at(
                &["schedule"],
                "is never due: no year has such a day, as none has a 30 February; correct the day or the month",
            ),
            Ok(_) => {}
        }
    }

    fn placement(&mut self, placement: Option<&pb::Placement>) {
        let Some(placement) = placement else { return };
        let constraints = Path::default().key("placement").key("constraints");
        if placement.constraints.len() > CONSTRAINTS_MAX {
            let number = placement.constraints.len();
            self.broken(constraints.clone(), format!("at most {CONSTRAINTS_MAX} constraints, not {number}"));
        }
        for (index, text) in placement.constraints.iter().enumerate() {
            if let Err(error) = text.parse::<Constraint>() {
                self.broken(constraints.index(index), error.to_string());
            }
        }
        if let Err(error) = placement.spread.parse::<Spread>() {
            self.at(&["placement", "spread"], error.to_string());
        }
        if pb::OnDisconnect::try_from(placement.on_disconnect).is_err() {
            self.at(&["placement", "on_disconnect"], "must be one of keep, stop");
        }
        if let Some(priority) = placement.priority.filter(|priority| *priority > PRIORITY_MAX) {
            self.at(&["placement", "priority"], format!("must be at most {PRIORITY_MAX}, not {priority}"));
        }
    }

    fn logs(&mut self, logs: Option<&pb::Logs>) {
        let Some(logs) = logs else { return };
        let bytes = logs.max_size_bytes;
        if bytes != 0 && !(LOGS_MIN_BYTES..=LOGS_MAX_BYTES).contains(&bytes) {
            let (least, most) = (format_size(LOGS_MIN_BYTES), format_size(LOGS_MAX_BYTES));
            let why = format!("must be {least} to {most}, not {}", format_size(bytes));
            self.at(&["logs", "max_size"], why);
        }
        self.duration(&["logs", "max_age"], logs.max_age.as_ref(), Duration::from_secs(1), LOGS_AGE_MAX);
    }

    /// The duration, when it is set and in bounds. Less than a millisecond cannot be written in a file.
    fn duration(
        &mut self,
        keys: &[&str],
        duration: Option<&prost_types::Duration>,
        least: Duration,
        most: Duration,
    ) -> Option<Duration> {
        let given = duration?;
        let Some(duration) = from_proto(given) else {
            self.at(keys, "must not be negative");
            return None;
        };
        if !(least..=most).contains(&duration) {
            let (least, most) = (format_duration(least), format_duration(most));
            self.at(keys, format!("must be {least} to {most}, not {}", format_duration(duration)));
            return None;
        }
        if duration.subsec_nanos() % 1_000_000 != 0 {
            self.at(keys, "must be a whole number of milliseconds");
            return None;
        }
        Some(duration)
    }
}

/// A service's name, or `host/NAME/uid/N`.
fn bad_caller(caller: &str) -> Option<String> {
    let parts: Vec<&str> = caller.split('/').collect();
    match parts.as_slice() {
        [_] => bad_name(caller),
        ["host", host, "uid", uid] if !host.is_empty() && uid.parse::<u32>().is_ok() => None,
        _ => Some(format!(
            "{caller:?} is neither a service nor a user of a host, such as \"host/north/uid/1000\""
        )),
    }
}

/// Why a service cannot have this name: it becomes a DNS label.
fn bad_name(name: &str) -> Option<String> {
    let shown = shorten(name);
    if name.len() > NAME_MAX {
        return Some(format!(
            "{shown:?} is too long: {} characters, at most {NAME_MAX}",
            name.chars().count()
        ));
    }
    if name.is_empty() {
        return Some("a service's name is not empty".to_owned());
    }
    if let Some(wrong) = name.chars().find(|c| !(c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-')) {
        return Some(format!("{shown:?} has {wrong:?}; a service's name has only a-z, 0-9 and -"));
    }
    if name.starts_with('-') || name.ends_with('-') {
        return Some(format!("{shown:?} must begin and end with a letter or digit"));
    }
    None
}
