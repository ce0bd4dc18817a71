//! The manifest as a document: the same keys that `definition` reads, as serde structs. They print a manifest and
//! are the source of the JSON Schema, whose descriptions are the comments here.

mod convert;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;

use crate::pb;

/// One service: what to run, how many, where, and how to treat it.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Nave manifest")]
pub(super) struct Document {
    /// Name of the service, and of its DNS entry. a-z, 0-9 and -, at most 63 characters.
    #[schemars(regex(pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"))]
    pub(super) name: String,
    /// Program and arguments. `${HOST}`, `${PORT}` and the like are replaced from the process's environment.
    #[schemars(length(min = 1))]
    command: Vec<String>,
    /// Instances wanted; 1 by default, 0 keeps the service and runs none. Not together with `per_host`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 10_000))]
    count: Option<u32>,
    /// One instance on each host that fits, now and later.
    #[serde(skip_serializing_if = "Option::is_none")]
    per_host: Option<bool>,
    /// `service`, the default, runs until it is stopped; `job` runs to completion, once for each run.
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<KindWord>,
    /// When a job runs: minute, hour, day, month, weekday and a time zone (UTC by default), `30 2 * * * Europe/Berlin`.
    /// Without it a job runs once for each change of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    schedule: Option<String>,
    /// Environment variables. Whole numbers and booleans are taken as text.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    #[schemars(with = "BTreeMap<String, EnvValue>")]
    env: BTreeMap<String, String>,
    /// Files on the host with more variables, a NAME=value on each line; `env` wins over them.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    env_file: Vec<String>,
    /// A directory that outlives the instance, NAVE_DATA; the instance is placed where it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<bool>,
    /// User that the process runs as, by name or uid. By default a uid of the service's own when the agent is root,
    /// else the agent's user.
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<String>,
    /// Absolute directory that the process starts in. By default a directory of the instance's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^/"))]
    working_dir: Option<String>,
    /// Services that must have a ready instance before this one is started; stopped after it.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    needs: Vec<String>,
    /// Who may call this service: services by name, and users outside Nave as `host/NAME/uid/N`. By default all of them;
    /// an empty list lets nobody in.
    #[serde(skip_serializing_if = "Option::is_none")]
    allow: Option<Vec<String>>,
    /// Ports by name. The process gets HOST, PORT (of the first) and NAVE_PORT_NAME, and listens there.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    ports: BTreeMap<String, PortDocument>,
    /// When an instance is ready, and with `live` when it is stuck. By default it is ready as soon as it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    health: Option<HealthDocument>,
    /// Whether a process that ended is started again.
    #[serde(skip_serializing_if = "Option::is_none")]
    restart: Option<RestartDocument>,
    /// What an instance may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    resources: Option<ResourcesDocument>,
    /// How instances of one version are replaced by those of the next. Does not slow down a first version.
    #[serde(skip_serializing_if = "Option::is_none")]
    update: Option<UpdateDocument>,
    /// How a process is asked to end.
    #[serde(skip_serializing_if = "Option::is_none")]
    stop: Option<StopDocument>,
    /// On which hosts instances may run.
    #[serde(skip_serializing_if = "Option::is_none")]
    placement: Option<PlacementDocument>,
    /// How much of each instance's output its host keeps.
    #[serde(skip_serializing_if = "Option::is_none")]
    logs: Option<LogsDocument>,
    /// What a job does when runs come too close or too late.
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<JobDocument>,
    /// Secrets by name, each from a file on the host; found in the directory NAVE_SECRETS, readable by the service alone.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    secrets: BTreeMap<String, String>,
    /// What is fetched to the host before an instance starts, found in the directory NAVE_ARTIFACTS.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    artifact: Vec<ArtifactDocument>,
    /// Files that an instance finds in the directory NAVE_FILES, made anew for each start.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    file: Vec<FileDocument>,
    /// What a process may see and do. By default it has a /tmp of its own, no new privileges and no capabilities.
    #[serde(skip_serializing_if = "Option::is_none")]
    isolation: Option<IsolationDocument>,
    /// Limits of the process by name, as `ulimit` and systemd have them: `nofile = 65536`, `core = "unlimited"`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    #[schemars(with = "BTreeMap<String, RlimitValue>")]
    rlimits: BTreeMap<String, RlimitValue>,
    /// Commands at the turns of a process's life, each run as the process itself is.
    #[serde(skip_serializing_if = "Option::is_none")]
    hooks: Option<HooksDocument>,
}

/// A whole number, a size, or `unlimited`.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
enum RlimitValue {
    Number(i64),
    Text(String),
}

/// The value of an environment variable.
#[derive(JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "read by the schema generator alone")]
enum EnvValue {
    Text(String),
    Number(i64),
    Flag(bool),
}

/// One port that instances listen on.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PortDocument {
    /// What is spoken there.
    protocol: ProtocolWord,
    /// What callers use on the service's own address; 80 by default for http, else required.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65_535))]
    service_port: Option<u32>,
    /// The instance's own port, when it cannot be told another. By default the agent picks one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65_535))]
    port: Option<u32>,
    /// How the agents carry calls to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    calls: Option<CallsDocument>,
}

/// How agents carry calls to a port. Numbers are of each calling host by itself. A change replaces no process.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct CallsDocument {
    /// Of a whole call, with all its tries and its answer; none by default. Not of tcp.
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<DurationText>,
    /// Of one try, up to the head of its answer; 60s of http by default, else none. Not of tcp.
    #[serde(skip_serializing_if = "Option::is_none")]
    try_timeout: Option<DurationText>,
    /// Of a connection on which nothing happens; 10m by default and at most, of tcp 1h by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    idle_timeout: Option<DurationText>,
    /// Callers' connections at a time; 4096 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    max_connections: Option<u32>,
    /// Calls under way at a time; 4096 by default. Not of tcp.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    max_requests: Option<u32>,
    /// Calls that wait while there is no instance; 1024 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1_000_000))]
    max_pending: Option<u32>,
    /// Most tries after the first, on other instances; 3 by default, 0 for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 10))]
    retries: Option<u32>,
    /// Calls with the same value of this header go to the same instance while it is there. Not of tcp.
    #[serde(skip_serializing_if = "Option::is_none")]
    hash_header: Option<String>,
    /// A line for each call, in `nave logs SERVICE --access`; false by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    access_log: Option<bool>,
}

/// A choice of words, written as itself and described as an enumeration.
macro_rules! word {
    ($(#[$doc:meta])* $name:ident, [$($word:literal),+]) => {
        $(#[$doc])*
        #[derive(Debug, Serialize)]
        #[serde(transparent)]
        struct $name(&'static str);

        impl JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn inline_schema() -> bool {
                true
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "enum": [$($word),+] })
            }
        }
    };
}
word!(ProtocolWord, ["http", "http2", "grpc", "tcp"]);
word!(PolicyWord, ["always", "on-failure", "never"]);
word!(KindWord, ["service", "job"]);
word!(OverlapWord, ["skip", "queue", "replace"]);
word!(MissedWord, ["skip", "run"]);
word!(OnDisconnectWord, ["keep", "stop"]);
word!(ScopeWord, ["process", "group"]);
word!(SeccompWord, ["standard", "offline"]);

/// A duration: `500ms`, `10s`, `2m`, `1h30m`.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(transparent)]
#[schemars(inline)]
struct DurationText(
    #[schemars(regex(pattern = "^([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?$"), length(min = 2))]
    String,
);

/// Readiness: exactly one of `http`, `tcp`, `grpc`, `exec`, `notify`, `notify_fd`, `log`. `live` adds liveness.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct HealthDocument {
    /// Path that must answer with a status of 200 to 399.
    #[serde(skip_serializing_if = "Option::is_none")]
    http: Option<String>,
    /// The port must accept a connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    tcp: Option<bool>,
    /// `grpc.health.v1` must say SERVING.
    #[serde(skip_serializing_if = "Option::is_none")]
    grpc: Option<bool>,
    /// Command that must exit with 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    exec: Option<Vec<String>>,
    /// The process says READY=1 as with systemd's sd_notify.
    #[serde(skip_serializing_if = "Option::is_none")]
    notify: Option<bool>,
    /// Number of a descriptor to which the process writes a line once it is ready, as with s6.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 3, max = 255))]
    notify_fd: Option<u32>,
    /// Regular expression; a line of the output that matches it says that the process is ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    log: Option<String>,
    /// Name of the port to check; needed when it is not clear.
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<String>,
    /// Time between two checks; 1s by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    interval: Option<DurationText>,
    /// A check that takes longer has failed; 500ms by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<DurationText>,
    /// Failures of `live` this soon after the start do not count; 10s by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    start_grace: Option<DurationText>,
    /// A process that fails this is stopped and started again.
    #[serde(skip_serializing_if = "Option::is_none")]
    live: Option<ProbeDocument>,
}

/// Liveness: exactly one of `http`, `tcp`, `grpc`, `exec`, `notify`.
#[derive(Debug, Default, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ProbeDocument {
    /// Path that must answer with a status of 200 to 399.
    #[serde(skip_serializing_if = "Option::is_none")]
    http: Option<String>,
    /// The port must accept a connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    tcp: Option<bool>,
    /// `grpc.health.v1` must say SERVING.
    #[serde(skip_serializing_if = "Option::is_none")]
    grpc: Option<bool>,
    /// Command that must exit with 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    exec: Option<Vec<String>>,
    /// The process feeds the watchdog with WATCHDOG=1 as with systemd's sd_notify.
    #[serde(skip_serializing_if = "Option::is_none")]
    notify: Option<bool>,
    /// Name of the port to check; needed when it is not clear.
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<String>,
    /// Time between two checks; 1s by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    interval: Option<DurationText>,
    /// A check that takes longer has failed; 500ms by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<DurationText>,
}

/// Whether a process that ended is started again.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct RestartDocument {
    /// `always` by default; `on-failure` leaves a process that exited with 0 alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<PolicyWord>,
    /// Restarts within a time, `10 in 5m` by default; beyond it the instance is given up as failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^[0-9]+ in ([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?([0-9]+ms)?$"))]
    budget: Option<String>,
    /// Exit codes that are no failure; 0 always is none.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    success_codes: Vec<u32>,
    /// Exit codes after which it is not started again, since it would only fail again: the instance is failed.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    fatal_codes: Vec<u32>,
}

/// What an instance may use.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ResourcesDocument {
    /// Cores reserved when placing, and the instance's weight when cores are short.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.001, max = 4096.0))]
    cpu: Option<f64>,
    /// Cores that it can never exceed; no limit by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.001, max = 4096.0))]
    cpu_max: Option<f64>,
    /// Memory reserved when placing and its hard limit: `128MiB`. None by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^[0-9]+([.][0-9]+)? ?([KMGT]iB|[kMGT]B|B)$"))]
    memory: Option<String>,
    /// Memory beyond which the kernel takes back first, and pressure is reported: `96MiB`. None by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^[0-9]+([.][0-9]+)? ?([KMGT]iB|[kMGT]B|B)$"))]
    memory_soft: Option<String>,
    /// Processes and threads that it may have; 16384 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4_194_304))]
    pids: Option<u32>,
    /// Niceness, -20 to 19; 0 by default. Below 0 the agent must be root.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -20, max = 19))]
    nice: Option<i32>,
    /// How gladly the kernel kills it when the host runs out of memory, -1000 (never) to 1000; 0 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -1000, max = 1000))]
    oom_score_adj: Option<i32>,
}

/// How instances of one version are replaced by those of the next.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct UpdateDocument {
    /// Instances replaced at once; 1 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    max_parallel: Option<u32>,
    /// How long a new instance must have been ready before the next is replaced; 0s by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    min_ready: Option<DurationText>,
    /// Without another ready instance for this long the update has failed; 2m by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    progress_deadline: Option<DurationText>,
    /// Go back to the last version that worked when an update fails; true by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    auto_revert: Option<bool>,
    /// Instances of the new version that run and wait for `nave promote` before the rest follows; 0 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    canary: Option<u32>,
}

/// How a process is asked to end.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct StopDocument {
    /// Name of the signal that asks it; SIGTERM by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^(SIG)?[A-Z0-9]+$"))]
    signal: Option<String>,
    /// Whom the signal goes to: the process (by default) or its process group.
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<ScopeWord>,
    /// Time it has before SIGKILL; 10s by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    grace: Option<DurationText>,
    /// Time that calls under way have to end before the signal; 30s by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    drain_timeout: Option<DurationText>,
}

/// What a job does when runs come too close or too late.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct JobDocument {
    /// A run that is due while the one before goes on: `skip` it, the default, `queue` it (at most one waits), or
    /// `replace` the one before, which is stopped first.
    #[serde(skip_serializing_if = "Option::is_none")]
    overlap: Option<OverlapWord>,
    /// Runs that were due while no hub could start them: `skip` them, the default, or `run` once for all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    missed: Option<MissedWord>,
}

/// On which hosts instances may run.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct PlacementDocument {
    /// Conditions that a host must meet, each of them: `os = "linux"`, `label.zone != "b"`.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    constraints: Vec<String>,
    /// What instances are spread over: `host`, the default, or `label.NAME`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^(host|label[.][A-Za-z0-9._/-]+)$"))]
    spread: Option<String>,
    /// What a host that is cut off from the hub does with its instances: `keep` them, the default, or `stop` them,
    /// for services that must never run twice.
    #[serde(skip_serializing_if = "Option::is_none")]
    on_disconnect: Option<OnDisconnectWord>,
    /// Where room is scarce, services with a higher one are placed first: 0 to 100, 50 by default. What runs is never
    /// stopped for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100))]
    priority: Option<u32>,
}

/// What is fetched to the host before an instance starts.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ArtifactDocument {
    /// Of the file or directory in NAVE_ARTIFACTS.
    #[schemars(regex(pattern = "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"))]
    name: String,
    /// Where it is fetched from: http, https or file.
    #[schemars(regex(pattern = "^(https?|file)://"))]
    url: String,
    /// Checksum of what is fetched.
    #[schemars(regex(pattern = "^[0-9a-f]{64}$"))]
    sha256: String,
    /// How it is packed: `tar.gz`, `tar.zst`, `zip` or `none`; by default as the URL ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    archive: Option<String>,
}

/// A file that an instance finds below NAVE_FILES: of exactly one of `content` and `source`.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct FileDocument {
    /// Relative to NAVE_FILES.
    path: String,
    /// What is in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    /// A file on the host that it is made of.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^/"))]
    source: Option<String>,
    /// Whether `${NAME}` is replaced from the process's environment, as in `command`; true by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    template: Option<bool>,
    /// Permissions in octal digits; 0644 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^0?[0-7]{3}$"))]
    mode: Option<String>,
    /// User that it belongs to; by default the service's.
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
}

/// How much of each instance's output its host keeps.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct LogsDocument {
    /// Beyond it the oldest lines go: `50MiB` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^[0-9]+([.][0-9]+)? ?([KMGT]iB|[kMGT]B|B)$"))]
    max_size: Option<String>,
    /// Lines go when they are older, give or take an eighth: 30d by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_age: Option<DurationText>,
}

/// What a process may see and do.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct IsolationDocument {
    /// A /tmp and /var/tmp of its own, gone with the process; true by default. What the manifest names below /tmp
    /// is there all the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    private_tmp: Option<bool>,
    /// Names such as `web.nave.internal` resolve, by an /etc/resolv.conf of its own; true by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    service_names: Option<bool>,
    /// Whether setuid programs and file capabilities work; false by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    new_privileges: Option<bool>,
    /// Capabilities that it has although it is not root: `NET_BIND_SERVICE`. None by default.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    capabilities: Vec<String>,
    /// The whole file system is read-only, but for its own directories, /tmp and `write`.
    #[serde(skip_serializing_if = "Option::is_none")]
    read_only: Option<bool>,
    /// Paths that look empty to it and cannot be entered.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    hide: Vec<String>,
    /// It reaches nothing but the system's own directories, its own, `read` and `write`.
    #[serde(skip_serializing_if = "Option::is_none")]
    landlock: Option<bool>,
    /// Paths that it may read, with `landlock`.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    read: Vec<String>,
    /// Paths that it may write, with `landlock` or `read_only`.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    write: Vec<String>,
    /// System calls that it is refused: `standard` those that administer the machine or look into other processes,
    /// `offline` network sockets as well. None by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    seccomp: Option<SeccompWord>,
}

/// Commands at the turns of a process's life, with its user, environment, limits and view of the files.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct HooksDocument {
    /// Before each start, once files and artifacts are in place. When it fails, so has the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pre_start: Option<HookDocument>,
    /// Once the process runs, beside it. Its failure is noted, and ends nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    post_start: Option<HookDocument>,
    /// Before the stop signal; its time is part of `stop.grace`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pre_stop: Option<HookDocument>,
    /// After each end, however it came, and before the next start.
    #[serde(skip_serializing_if = "Option::is_none")]
    post_stop: Option<HookDocument>,
}

/// One such command.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct HookDocument {
    /// Program and arguments; variables are replaced as in `command`.
    #[schemars(length(min = 1))]
    command: Vec<String>,
    /// When it takes longer it is killed with all that it has started, and has failed; 30s by default, of `pre_stop` 5s
    /// but at most half of `stop.grace`.
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout: Option<DurationText>,
}

/// The manifest as a TOML file that [`parse`](super::parse) reads back to the same.
pub fn to_toml(manifest: &pb::Manifest) -> String {
    toml::to_string(&Document::from(manifest)).expect("a document is a TOML table")
}

/// The manifest as JSON that [`parse`](super::parse) reads back to the same.
pub fn to_json(manifest: &pb::Manifest) -> serde_json::Value {
    serde_json::to_value(Document::from(manifest)).expect("a document is a JSON object")
}

/// The JSON Schema of a manifest file, for editors. It says less than the parser: what two keys have to do with each
/// other is not in it.
pub fn json_schema() -> serde_json::Value {
    let mut schema = serde_json::Value::from(schemars::schema_for!(Document));
    tidy(&mut schema);
    schema
}

/// A key that may be left out is not a key that may be null; descriptions have no line ends of the source.
fn tidy(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Array(items) => items.iter_mut().for_each(tidy),
        serde_json::Value::Object(object) => {
            if let Some(serde_json::Value::String(text)) = object.get_mut("description") {
                *text = text.replace('\n', " ");
            }
            let is_null = |value: &serde_json::Value| value == "null" || value["type"] == "null";
            for key in ["type", "anyOf"] {
                if let Some(serde_json::Value::Array(choices)) = object.get_mut(key) {
                    choices.retain(|choice| !is_null(choice));
                }
            }
            if let Some(serde_json::Value::Array(types)) = object.get("type")
                && let [only] = &types[..]
            {
                let only = only.clone();
                object.insert("type".to_owned(), only);
            }
            if let Some(serde_json::Value::Array(choices)) = object.get("anyOf")
                && let [serde_json::Value::Object(only)] = &choices[..]
            {
                let only = only.clone();
                object.remove("anyOf");
                object.extend(only);
            }
            object.values_mut().for_each(tidy);
        }
        _ => {}
    }
}
