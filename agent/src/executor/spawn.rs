//! From "start this instance" to the keeper's orders: user, directories, environment, arguments, cgroups. Touches the
//! disk and the user database, so it runs where blocking is allowed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use nave_agent_core::env::{EnvironmentInput, arguments, environment};
use nave_agent_core::supervisor::Deadline;
use nave_agent_core::supervisor::State;
use nave_agent_core::supervisor::{SpawnError, SpawnErrorKind, SpawnOrder};
use nave_agent_core::{ProcessKey, Supervisor};
use nave_proto::ids::{ClusterId, InstanceId};
use nave_proto::{limits, pb};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{User, geteuid};
use parking_lot::Mutex;
use prost::Message as _;
use regex::Regex;
use tracing::warn;

use super::confine::{self, Surrounded};
use super::directories::Directories;
use super::users::{self, RunAs};
use crate::cgroups::Cgroups;
use crate::logs::limits::log_limits;
use crate::logs::source::LinesSince;
use crate::notify::NotifySockets;
use crate::probes::{ExecCheck, LogCheck};
use crate::provision::artifacts::Artifacts;
use crate::provision::{self, ProvisionError, env_file};

/// Open files that a service may have unless the machine allows fewer; what modern servers expect.
const OPEN_FILES_SOFT: u64 = 65_536;

/// What all spawns on this host have in common.
#[derive(Debug)]
pub(crate) struct SpawnContext {
    pub(crate) cluster: ClusterId,
    pub(crate) host_name: String,
    pub(crate) directories: Directories,
    pub(crate) cgroups: Cgroups,
    pub(crate) notify: NotifySockets,
    pub(crate) artifacts: Artifacts,
    /// The agent's own user, for services that run as it.
    own_user: String,
    /// A directory on the way to the services' own that other users may not pass.
    closed: Option<PathBuf>,
}

/// A process's surroundings, the same for its start and for commands that probe it.
#[derive(Debug)]
struct Surroundings {
    env: BTreeMap<String, String>,
    unknown: BTreeSet<String>,
    working_dir: String,
}

/// As the keeper is told.
pub(super) fn deadline(instance: InstanceId, key: ProcessKey, deadline: Deadline) -> pb::SetDeadline {
    pb::SetDeadline {
        instance_id: instance.0,
        epoch: key.epoch,
        boottime_ns: deadline.at.as_nanos(),
        grace_ms: u64::try_from(deadline.grace.as_millis()).unwrap_or(u64::MAX),
        signal: deadline.signal,
    }
}

impl SpawnContext {
    pub(crate) fn new(
        cluster: ClusterId,
        host_name: String,
        directories: Directories,
        cgroups: Cgroups,
        notify: NotifySockets,
        closed: Option<PathBuf>,
    ) -> Self {
        let own_user =
            User::from_uid(geteuid()).ok().flatten().map_or_else(|| geteuid().to_string(), |user| user.name);
        let artifacts = Artifacts::new(directories.root());
        Self { cluster, host_name, directories, cgroups, notify, artifacts, own_user, closed }
    }

    /// Makes directories and looks up users; then all is said that the keeper needs. Blocks.
    pub(crate) fn orders(&self, instance: InstanceId, order: &SpawnOrder) -> Result<pb::Spawn, SpawnError> {
        let wanted = &order.wanted;
        let manifest =
            wanted.manifest.as_ref().ok_or_else(|| error(SpawnErrorKind::Invalid, "no manifest came"))?;
        let run_as =
            users::resolve(&manifest.user, wanted.uid).map_err(|m| error(SpawnErrorKind::Exec, m))?;
        let name = &manifest.name;
        let dirs = self
            .directories
            .prepare(name, instance, order.key, run_as.ids)
            .map_err(|e| cannot_make("its directories", &e))?;
        let mut around = self
            .surroundings(instance, wanted, &order.ports, &run_as, order.key)
            .map_err(|e| SpawnError { kind: SpawnErrorKind::System, errno: e.errno, message: e.message })?;
        if NotifySockets::is_wanted(manifest) {
            let socket = self.notify.path(instance).display().to_string();
            around.env.insert("NOTIFY_SOCKET".to_owned(), socket);
        }
        if let Some(period) = nave_agent_core::supervisor::watchdog(manifest) {
            around.env.insert("WATCHDOG_USEC".to_owned(), period.as_micros().to_string());
        }
        let notify_fd = crate::notify::line_descriptor(manifest);
        if manifest.data {
            self.directories.prepare_data(name, wanted.ordinal, run_as.ids).map_err(|e| SpawnError {
                kind: SpawnErrorKind::System,
                errno: e.raw_os_error().unwrap_or_default(),
                message: format!("its data directory cannot be made: {e}"),
            })?;
        }
        let of_files = provision::provide(&self.artifacts, &dirs.run, manifest, &around.env, run_as.ids)
            .map_err(|e| SpawnError { kind: SpawnErrorKind::System, errno: e.errno, message: e.message })?;
        let argv = arguments(&manifest.command, &around.env);
        let unknown: BTreeSet<_> = around.unknown.union(&argv.unknown).chain(&of_files).cloned().collect();
        if !unknown.is_empty() {
            warn!(service = name, %instance, ?unknown, "variables without a value are left as they are written");
        }
        let group = self.cgroups.instance(
            name,
            &format!("{instance}-{}", order.key.epoch),
            &manifest.resources.unwrap_or_default(),
        );
        let (uid, gid) = run_as.ids.unwrap_or_default();
        let logs = log_limits(manifest);
        let resources = manifest.resources.unwrap_or_default();
        let env = pairs(&around.env);
        let sandbox = confine::sandbox(&Surrounded {
            manifest,
            run_as: &run_as,
            dirs: &dirs,
            working_dir: &around.working_dir,
            argv: &argv.value,
            env: &env,
            notify: self.notify.dir(),
            root: geteuid().is_root(),
        })
        .map_err(|message| error(SpawnErrorKind::Exec, message))?;
        if !sandbox.tmp.is_empty() {
            Directories::prepare_tmp(&dirs).map_err(|e| cannot_make("its /tmp", &e))?;
        }
        Ok(pb::Spawn {
            instance_id: instance.0,
            epoch: order.key.epoch,
            attempt: order.key.attempt,
            service: name.clone(),
            argv: argv.value,
            env,
            working_dir: around.working_dir,
            uid,
            gid,
            set_user: run_as.ids.is_some(),
            groups: run_as.groups,
            cgroup2: group.cgroup2,
            cgroup1: group.cgroup1,
            cgroup_files: group.files,
            log_dir: dirs.logs.display().to_string(),
            log_segment_bytes: logs.segment_bytes,
            log_segments: logs.segments,
            log_age_ms: logs.age_ms,
            rlimits: rlimits(manifest),
            nice: resources.nice,
            oom_score_adj: resources.oom_score_adj,
            no_new_privileges: !new_privileges(manifest),
            sandbox: Some(sandbox),
            notify_fifo: notify_fd
                .map(|_| self.notify.fifo(instance).display().to_string())
                .unwrap_or_default(),
            notify_fd: notify_fd.unwrap_or_default(),
            deadline: order.deadline.map(|at| deadline(instance, order.key, at)),
            ..pb::Spawn::default()
        })
    }

    /// A look at the output of the process that runs.
    pub(crate) fn log_check(&self, supervisor: &Supervisor, pattern: &str) -> Result<LogCheck, String> {
        let State::Running(running) = supervisor.state() else { return Err("it does not run".to_owned()) };
        let service = supervisor.wanted().manifest.as_ref().map_or("", |manifest| manifest.name.as_str());
        let dir = self.directories.logs().join(service);
        let lines = LinesSince::new(&dir, supervisor.instance(), running.started_unix_ns);
        let pattern = Regex::new(pattern).map_err(|error| error.to_string())?;
        Ok(LogCheck { pattern, lines: Arc::new(Mutex::new(lines)) })
    }

    /// A command that looks at a running instance from where the instance stands.
    pub(crate) fn exec_check(
        &self,
        wanted: &pb::WantedInstance,
        key: ProcessKey,
        beside: Option<pb::ProcessIdentity>,
        ports: &BTreeMap<String, u16>,
        command: &[String],
    ) -> Result<ExecCheck, String> {
        let instance = InstanceId(wanted.instance_id);
        let user = wanted.manifest.as_ref().map(|manifest| manifest.user.as_str()).unwrap_or_default();
        let run_as = users::resolve(user, wanted.uid)?;
        let around = self.surroundings(instance, wanted, ports, &run_as, key).map_err(|e| e.message)?;
        let default = pb::Manifest::default();
        let manifest = wanted.manifest.as_ref().unwrap_or(&default);
        let dirs = self.directories.of(&manifest.name, instance, key);
        let (command, env) = (arguments(command, &around.env).value, pairs(&around.env));
        let sandbox = confine::sandbox(&Surrounded {
            manifest,
            run_as: &run_as,
            dirs: &dirs,
            working_dir: &around.working_dir,
            argv: &command,
            env: &env,
            notify: self.notify.dir(),
            root: geteuid().is_root(),
        })?;
        let group = self.cgroups.instance(
            &manifest.name,
            &format!("{instance}-{}", key.epoch),
            &pb::Resources::default(),
        );
        let (uid, gid) = run_as.ids.unwrap_or_default();
        let spawn = pb::Spawn {
            argv: command.clone(),
            env: env.clone(),
            working_dir: around.working_dir.clone(),
            uid,
            gid,
            set_user: run_as.ids.is_some(),
            groups: run_as.groups,
            cgroup2: group.cgroup2,
            cgroup1: group.cgroup1,
            no_new_privileges: !new_privileges(manifest),
            sandbox: Some(sandbox),
            ..pb::Spawn::default()
        };
        let orders = pb::ExecOrders { spawn: Some(spawn), beside, ..pb::ExecOrders::default() };
        Ok(ExecCheck { command, env, working_dir: around.working_dir, orders: orders.encode_to_vec() })
    }

    fn surroundings(
        &self,
        instance: InstanceId,
        wanted: &pb::WantedInstance,
        ports: &BTreeMap<String, u16>,
        run_as: &RunAs,
        key: ProcessKey,
    ) -> Result<Surroundings, ProvisionError> {
        let default = pb::Manifest::default();
        let manifest = wanted.manifest.as_ref().unwrap_or(&default);
        let dirs = self.directories.of(&manifest.name, instance, key);
        let user = match (run_as.name.as_str(), run_as.ids) {
            ("", None) => self.own_user.clone(),
            ("", Some(_)) => format!("nave-{}", manifest.name),
            (name, _) => name.to_owned(),
        };
        let mut given = env_file::read_all(&manifest.env_files)?;
        let data = self.directories.data(&manifest.name, wanted.ordinal);
        given.extend(provision::variables(&dirs.run, &data, manifest));
        let expanded = environment(&EnvironmentInput {
            given: &given,
            manifest,
            ports,
            instance,
            ordinal: wanted.ordinal,
            version: wanted.version,
            host: &self.host_name,
            cluster: self.cluster,
            user: &user,
            home: &dirs.home.display().to_string(),
        });
        let working_dir = match manifest.working_dir.as_str() {
            // Better at the root than not at all; `facts.lacks` says so.
            "" if run_as.ids.is_some() && self.closed.is_some() => "/".to_owned(),
            "" => dirs.own.display().to_string(),
            given => given.to_owned(),
        };
        Ok(Surroundings { env: expanded.value, unknown: expanded.unknown, working_dir })
    }
}

fn pairs(env: &BTreeMap<String, String>) -> Vec<String> {
    env.iter().map(|(name, value)| format!("{name}={value}")).collect()
}

fn error(kind: SpawnErrorKind, message: impl Into<String>) -> SpawnError {
    SpawnError { kind, errno: 0, message: message.into() }
}

fn new_privileges(manifest: &pb::Manifest) -> bool {
    manifest.isolation.as_ref().is_some_and(|isolation| isolation.new_privileges)
}

fn cannot_make(what: &str, error: &std::io::Error) -> SpawnError {
    SpawnError {
        kind: SpawnErrorKind::System,
        errno: error.raw_os_error().unwrap_or_default(),
        message: format!("{what} cannot be made: {error}"),
    }
}

/// Those of the manifest, and open files in any case.
fn rlimits(manifest: &pb::Manifest) -> Vec<pb::Rlimit> {
    let named = manifest.rlimits.iter().filter_map(|(name, &limit)| {
        Some(pb::Rlimit { resource: limits::rlimit_number(name)?, soft: limit, hard: limit })
    });
    let open_files = open_files().filter(|_| !manifest.rlimits.contains_key("nofile"));
    named.chain(open_files).collect()
}

fn open_files() -> Option<pb::Rlimit> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    Some(pb::Rlimit { resource: libc::RLIMIT_NOFILE, soft: OPEN_FILES_SOFT.min(hard), hard })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(dir: &std::path::Path) -> SpawnContext {
        SpawnContext::new(
            ClusterId(7),
            "north".into(),
            Directories::new(dir),
            Cgroups::detect(&[]),
            NotifySockets::new(dir.join("notify")),
            users::closed_to_others(dir).map(ToOwned::to_owned),
        )
    }

    fn order(manifest: pb::Manifest) -> SpawnOrder {
        let manifest = pb::Manifest { name: "web".into(), ..manifest };
        SpawnOrder {
            key: ProcessKey { epoch: 3, attempt: 2 },
            deadline: None,
            wanted: pb::WantedInstance {
                instance_id: 42,
                epoch: 3,
                manifest: Some(manifest),
                ..Default::default()
            },
            ports: [("http".to_owned(), 20_001)].into(),
        }
    }

    #[test]
    fn orders_hold_the_expanded_command_and_a_clean_environment() {
        let dir = tempfile::tempdir().unwrap();
        let manifest =
            pb::Manifest { command: vec!["serve".into(), "${HOST}:${PORT}".into()], ..Default::default() };
        let orders = context(dir.path()).orders(InstanceId(42), &order(manifest)).unwrap();
        assert_eq!(orders.argv, ["serve", "127.0.0.1:20001"]);
        assert_eq!((orders.instance_id, orders.epoch, orders.attempt), (42, 3, 2));
        assert!(orders.env.contains(&"NAVE_PORT_HTTP=20001".to_owned()), "{:?}", orders.env);
        assert!(!orders.env.iter().any(|pair| pair.starts_with("CARGO")), "{:?}", orders.env);
        assert!(!orders.env.iter().any(|pair| pair.starts_with("NOTIFY_SOCKET")), "{:?}", orders.env);
        assert!(!orders.set_user);
        assert_eq!(orders.log_dir, dir.path().join("logs/web/i-42-3").display().to_string());
        assert_eq!(orders.working_dir, dir.path().join("instances/i-42").display().to_string());
        assert!(std::path::Path::new(&orders.working_dir).is_dir());
    }

    #[test]
    fn a_user_that_does_not_exist_is_the_reason_of_the_failure() {
        let dir = tempfile::tempdir().unwrap();
        let manifest =
            pb::Manifest { command: vec!["true".into()], user: "no-such-user".into(), ..Default::default() };
        let error = context(dir.path()).orders(InstanceId(42), &order(manifest)).unwrap_err();
        assert_eq!(error.kind, SpawnErrorKind::Exec);
        assert!(error.message.contains("no-such-user"), "{}", error.message);
    }
}
