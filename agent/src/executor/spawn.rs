//! From "start this instance" to the keeper's orders: user, directories, environment, arguments, cgroups. Touches the
//! disk and the user database, so it runs where blocking is allowed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nave_agent_core::env::{EnvironmentInput, UnknownName, arguments, environment};
use nave_agent_core::supervisor::Deadline;
use nave_agent_core::supervisor::HookOrder;
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

use super::confine::{self, Surrounded};
use super::directories::Directories;
use super::users::{self, RunAs};
use crate::cgroups::{Cgroups, InstanceCgroup};
use crate::command::ServiceCommand;
use crate::directory::Ways;
use crate::dns::Resolver;
use crate::logs::limits::log_limits;
use crate::logs::source::LinesSince;
use crate::notes::Notes;
use crate::notify::NotifySockets;
use crate::probes::LogCheck;
use crate::provision::artifacts::Artifacts;
use crate::provision::artifacts::cutoff::Cutoff;
use crate::provision::{self, ProvisionError, env_file};

/// Open files that a service may have unless the machine allows fewer; what modern servers expect.
const OPEN_FILES_SOFT: u64 = 65_536;

/// What people call the place of a process's arguments.
const IN_COMMAND: &str = "command";

/// Of a note to people.
const ABOUT_UNIT: &str = "unit";

/// What all spawns on this host have in common.
#[derive(Debug)]
pub(crate) struct SpawnContext {
    pub(crate) cluster: ClusterId,
    pub(crate) host_name: String,
    pub(crate) directories: Directories,
    pub(crate) cgroups: Cgroups,
    pub(crate) notify: NotifySockets,
    pub(crate) artifacts: Artifacts,
    /// To the services that a process may call.
    ways: Option<Ways>,
    /// Mounted over the processes' own, when this host answers names.
    resolv_conf: Resolver,
    /// What this host's people are told.
    notes: Notes,
    /// The agent's own user, for services that run as it.
    own_user: String,
    /// A directory on the way to the services' own that other users may not pass.
    closed: Option<PathBuf>,
}

/// A process's surroundings, the same for its start and for commands that probe it.
#[derive(Debug)]
struct Surroundings {
    env: BTreeMap<String, String>,
    unknown: BTreeSet<UnknownName>,
    working_dir: String,
}

/// Whose program.
struct Of<'a> {
    instance: InstanceId,
    wanted: &'a pb::WantedInstance,
    ports: &'a BTreeMap<String, u16>,
    key: ProcessKey,
}

/// Orders, and the names in their command that nobody knows.
struct Made {
    spawn: pb::Spawn,
    unknown: BTreeSet<UnknownName>,
}

/// As the keeper is told.
pub(super) fn deadline(instance: InstanceId, key: ProcessKey, deadline: Deadline) -> pb::SetDeadline {
    pb::SetDeadline {
        instance_id: instance.0,
        epoch: key.epoch,
        boottime_ns: deadline.at.as_nanos(),
        grace_ms: u64::try_from(deadline.grace.as_millis()).unwrap_or(u64::MAX),
        signal: deadline.signal,
        scope: pb::SignalScope::from(deadline.scope).into(),
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
        Self {
            cluster,
            host_name,
            directories,
            cgroups,
            notify,
            artifacts,
            ways: None,
            resolv_conf: Resolver::default(),
            notes: Notes::default(),
            own_user,
            closed,
        }
    }

    /// With the ways to other services, which every process is told.
    pub(crate) fn with_ways(self, ways: Ways, resolv_conf: Resolver) -> Self {
        Self { ways: Some(ways), resolv_conf, ..self }
    }

    /// With what people are told.
    pub(crate) fn with_notes(self, notes: Notes) -> Self {
        Self { notes, ..self }
    }

    /// Tells people whether systemd can start the agent's unit again. Blocks.
    pub(crate) fn tell_of_unit(&self) {
        match self.cgroups.unit_lack() {
            Some(lack) => self.notes.say(ABOUT_UNIT, lack),
            None => self.notes.unsay(ABOUT_UNIT),
        }
    }

    /// Makes what an attempt needs: directories, artifacts, files, its /tmp. Returns all names without a value that it
    /// asks for. Blocks, until it is cut short at the latest.
    pub(crate) fn prepare(
        &self,
        instance: InstanceId,
        order: &SpawnOrder,
        cutoff: &Cutoff,
    ) -> Result<BTreeSet<UnknownName>, SpawnError> {
        let wanted = &order.wanted;
        let manifest = manifest_of(wanted)?;
        let (name, of) = (&manifest.name, Of { instance, wanted, ports: &order.ports, key: order.key });
        let run_as = run_as(wanted)?;
        let dirs = self
            .directories
            .prepare(name, instance, order.key, run_as.ids)
            .map_err(|e| cannot_make("its directories", &e))?;
        if manifest.data {
            self.directories
                .prepare_data(name, wanted.ordinal, run_as.ids)
                .map_err(|e| cannot_make("its data directory", &e))?;
        }
        let Surroundings { env, mut unknown, .. } = self.process_env(&of, &run_as)?;
        unknown.append(&mut arguments(IN_COMMAND, &manifest.command, &env).unknown);
        let provided =
            provision::provide(&self.artifacts, cutoff, dirs.places(), manifest, &env, run_as.ids)?;
        unknown.extend(provided);
        if confine::has_private_tmp(manifest, geteuid().is_root()) {
            Directories::prepare_tmp(&dirs).map_err(|e| cannot_make("its /tmp", &e))?;
        }
        Ok(unknown)
    }

    /// All that the keeper needs to know, after what the attempt needs is made; with the names without a value that
    /// making it has found just now. Blocks.
    pub(crate) fn orders(
        &self,
        instance: InstanceId,
        order: &SpawnOrder,
    ) -> Result<(pb::Spawn, BTreeSet<UnknownName>), SpawnError> {
        let unknown = match order.prepared {
            true => BTreeSet::new(),
            false => self.prepare(instance, order, &Cutoff::default())?,
        };
        let manifest = manifest_of(&order.wanted)?;
        let of = Of { instance, wanted: &order.wanted, ports: &order.ports, key: order.key };
        let run_as = run_as(&order.wanted)?;
        let around = self.process_env(&of, &run_as)?;
        let Made { spawn, unknown: _ } = self.spawn_of(&of, run_as, around, IN_COMMAND, &manifest.command)?;
        let logs = log_limits(manifest);
        let notify_fd = crate::notify::line_descriptor(manifest);
        let spawn = pb::Spawn {
            log_dir: self.directories.of(&manifest.name, instance, order.key).logs.display().to_string(),
            log_segment_bytes: logs.segment_bytes,
            log_segments: logs.segments,
            log_age_ms: logs.age_ms,
            notify_fifo: notify_fd
                .map(|_| self.notify.fifo(instance).display().to_string())
                .unwrap_or_default(),
            notify_fd: notify_fd.unwrap_or_default(),
            deadline: order.deadline.map(|at| deadline(instance, order.key, at)),
            ..spawn
        };
        Ok((spawn, unknown))
    }

    /// What any program of an instance runs with: its process, and commands before, beside and after it. `place`: where its
    /// command is written.
    fn spawn_of(
        &self,
        of: &Of<'_>,
        run_as: RunAs,
        around: Surroundings,
        place: &str,
        command: &[String],
    ) -> Result<Made, SpawnError> {
        let manifest = manifest_of(of.wanted)?;
        let argv = arguments(place, command, &around.env);
        let env = pairs(&around.env);
        let resources = manifest.resources.unwrap_or_default();
        let group = self.group(of, manifest);
        let sandbox = confine::sandbox(&Surrounded {
            manifest,
            run_as: &run_as,
            dirs: &self.directories.of(&manifest.name, of.instance, of.key),
            working_dir: &around.working_dir,
            argv: &argv.value,
            env: &env,
            notify: self.notify.dir(),
            resolv_conf: self.resolv_conf.get().map(PathBuf::as_path),
            root: geteuid().is_root(),
        })
        .map_err(|message| error(SpawnErrorKind::Exec, message))?;
        let (uid, gid) = run_as.ids.unwrap_or_default();
        let spawn = pb::Spawn {
            instance_id: of.instance.0,
            epoch: of.key.epoch,
            attempt: of.key.attempt,
            service: manifest.name.clone(),
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
            rlimits: rlimits(manifest),
            nice: resources.nice,
            oom_score_adj: resources.oom_score_adj,
            no_new_privileges: !new_privileges(manifest),
            sandbox: Some(sandbox),
            ..pb::Spawn::default()
        };
        Ok(Made { spawn, unknown: argv.unknown })
    }

    fn group(&self, of: &Of<'_>, manifest: &pb::Manifest) -> InstanceCgroup {
        let name = format!("{}-{}", of.instance, of.key.epoch);
        self.cgroups.instance(&manifest.name, &name, &manifest.resources.unwrap_or_default())
    }

    /// What only the process itself is told besides.
    fn process_env(&self, of: &Of<'_>, run_as: &RunAs) -> Result<Surroundings, SpawnError> {
        let mut around = self.surroundings(of, run_as)?;
        let manifest = manifest_of(of.wanted)?;
        if NotifySockets::is_wanted(manifest) {
            let socket = self.notify.path(of.instance).display().to_string();
            around.env.insert("NOTIFY_SOCKET".to_owned(), socket);
        }
        if let Some(period) = nave_agent_core::supervisor::watchdog(manifest) {
            around.env.insert("WATCHDOG_USEC".to_owned(), period.as_micros().to_string());
        }
        Ok(around)
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
    ) -> Result<ServiceCommand, String> {
        let of = Of { instance: InstanceId(wanted.instance_id), wanted, ports, key };
        let made = self.command(&of, "health", command).map_err(|error| error.message)?;
        Ok(service_command(made.spawn, beside, false))
    }

    /// A hook, and the names in it that nobody knows. Makes its cgroup, with the instance's when that is not there yet.
    /// Blocks.
    pub(crate) fn hook_command(
        &self,
        instance: InstanceId,
        order: &HookOrder,
    ) -> Result<(ServiceCommand, BTreeSet<UnknownName>), String> {
        let of = Of { instance, wanted: &order.wanted, ports: &order.ports, key: order.key };
        let place = format!("hooks.{}", order.hook);
        let Made { mut spawn, unknown } =
            self.command(&of, &place, &order.command).map_err(|error| error.message)?;
        let alone = order.beside.is_none();
        if let Some(group) = self.hook_group(instance, &order.wanted, order.key) {
            spawn.cgroup2 = group.display().to_string();
        }
        for dir in spawn.cgroup1.iter().chain((!spawn.cgroup2.is_empty()).then_some(&spawn.cgroup2)) {
            nave_keeper::make_cgroup(Path::new(dir))
                .map_err(|error| format!("cannot make the cgroup {dir}: {error}"))?;
        }
        for file in spawn.cgroup_files.iter().filter(|_| alone) {
            if let Err(error) = std::fs::write(&file.path, &file.value)
                && file.required
            {
                return Err(format!("cannot write {:?} to {}: {error}", file.value, file.path));
            }
        }
        Ok((service_command(spawn, order.beside.clone(), alone), unknown))
    }

    /// The cgroup of an instance's hooks; none where there is no cgroup2.
    pub(crate) fn hook_group(
        &self,
        instance: InstanceId,
        wanted: &pb::WantedInstance,
        key: ProcessKey,
    ) -> Option<PathBuf> {
        let manifest = wanted.manifest.as_ref()?;
        let ports = BTreeMap::new();
        let group = self.group(&Of { instance, wanted, ports: &ports, key }, manifest);
        (!group.cgroup2.is_empty()).then(|| Path::new(&group.cgroup2).join("hook"))
    }

    fn command(&self, of: &Of<'_>, place: &str, command: &[String]) -> Result<Made, SpawnError> {
        let run_as = run_as(of.wanted)?;
        let around = self.surroundings(of, &run_as)?;
        self.spawn_of(of, run_as, around, place, command)
    }

    fn surroundings(&self, of: &Of<'_>, run_as: &RunAs) -> Result<Surroundings, ProvisionError> {
        let &Of { instance, wanted, ports, key } = of;
        let default = pb::Manifest::default();
        let manifest = wanted.manifest.as_ref().unwrap_or(&default);
        let dirs = self.directories.of(&manifest.name, instance, key);
        let user = match (run_as.name.as_str(), run_as.ids) {
            ("", None) => self.own_user.clone(),
            ("", Some(_)) => format!("nave-{}", manifest.name),
            (name, _) => name.to_owned(),
        };
        let mut given = self.ways.as_ref().map(|ways| ways.variables(manifest)).unwrap_or_default();
        given.extend(env_file::read_all(&manifest.env_files)?);
        let data = self.directories.data(&manifest.name, wanted.ordinal);
        given.extend(provision::variables(&dirs.places(), &data, manifest));
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

fn manifest_of(wanted: &pb::WantedInstance) -> Result<&pb::Manifest, SpawnError> {
    wanted.manifest.as_ref().ok_or_else(|| error(SpawnErrorKind::Invalid, "no manifest came"))
}

fn run_as(wanted: &pb::WantedInstance) -> Result<RunAs, SpawnError> {
    let user = wanted.manifest.as_ref().map(|manifest| manifest.user.as_str()).unwrap_or_default();
    users::resolve(user, wanted.uid).map_err(|message| error(SpawnErrorKind::Exec, message))
}

/// `alone`: there is no process yet, or no more.
fn service_command(spawn: pb::Spawn, beside: Option<pb::ProcessIdentity>, alone: bool) -> ServiceCommand {
    let (command, env, working_dir) = (spawn.argv.clone(), spawn.env.clone(), spawn.working_dir.clone());
    let orders = pb::ExecOrders { spawn: Some(spawn), beside, alone, ..pb::ExecOrders::default() };
    ServiceCommand { command, env, working_dir, orders: orders.encode_to_vec() }
}

impl From<ProvisionError> for SpawnError {
    fn from(error: ProvisionError) -> Self {
        Self { kind: SpawnErrorKind::System, errno: error.errno, message: error.message }
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
            prepared: false,
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
        let (orders, unknown) = context(dir.path()).orders(InstanceId(42), &order(manifest)).unwrap();
        assert_eq!(unknown, BTreeSet::new());
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
    fn names_without_a_value_are_told_with_their_places_once_for_a_start() {
        let dir = tempfile::tempdir().unwrap();
        let manifest = pb::Manifest {
            command: vec!["serve".into(), "${NOPE}".into()],
            env: [("URL".to_owned(), "http://${WHO}".to_owned())].into(),
            files: vec![pb::File {
                path: "app.toml".into(),
                content: "${NOPE} $${IT}".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let (context, order) = (context(dir.path()), order(manifest));
        let (orders, unknown) = context.orders(InstanceId(42), &order).unwrap();
        let told: Vec<_> = unknown.iter().map(|one| (one.place.as_str(), one.name.as_str())).collect();
        assert_eq!(told, [("command", "NOPE"), ("env URL", "WHO"), ("file app.toml", "NOPE")]);
        assert_eq!(orders.argv, ["serve", "${NOPE}"]);

        let made = context.prepare(InstanceId(42), &order, &Cutoff::default()).unwrap();
        let prepared = SpawnOrder { prepared: true, ..order };
        let (_, again) = context.orders(InstanceId(42), &prepared).unwrap();
        assert_eq!((made, again), (unknown, BTreeSet::new()));
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
