//! The one definition of the manifest's keys: from a tree to the message. `document` describes the same keys for the
//! JSON Schema and for printing; a test holds the two together.

use std::collections::BTreeMap;

use super::reader::{Field, Problems, Table};
use super::tree::{Path, Spanned, Value};
use super::values;
use crate::pb;
use crate::pb::probe::Check;
use crate::time::to_proto;
use crate::{limits, signals, words};

type Keys = &'static [&'static str];

pub(super) const ROOT: Keys = &[
    "name",
    "command",
    "count",
    "per_host",
    "kind",
    "schedule",
    "env",
    "user",
    "working_dir",
    "needs",
    "allow",
    "ports",
    "health",
    "restart",
    "resources",
    "update",
    "stop",
    "placement",
    "logs",
    "file",
    "env_file",
    "data",
    "secrets",
    "isolation",
    "rlimits",
    "artifact",
    "job",
    "hooks",
];
pub(super) const PORT: Keys = &["protocol", "service_port", "port", "calls"];
pub(super) const CALLS: Keys = &[
    "timeout",
    "try_timeout",
    "idle_timeout",
    "max_connections",
    "max_requests",
    "max_pending",
    "retries",
    "hash_header",
    "access_log",
];
pub(super) const PROBE: Keys = &["http", "tcp", "grpc", "exec", "notify", "port", "interval", "timeout"];
pub(super) const HEALTH: Keys = &[
    "http",
    "tcp",
    "grpc",
    "exec",
    "notify",
    "notify_fd",
    "log",
    "port",
    "interval",
    "timeout",
    "start_grace",
    "live",
];
pub(super) const RESTART: Keys = &["policy", "budget", "success_codes", "fatal_codes"];
pub(super) const RESOURCES: Keys =
    &["cpu", "cpu_max", "memory", "memory_soft", "pids", "nice", "oom_score_adj"];
pub(super) const UPDATE: Keys = &["max_parallel", "min_ready", "progress_deadline", "auto_revert", "canary"];
pub(super) const STOP: Keys = &["signal", "scope", "grace", "drain_timeout"];
pub(super) const JOB: Keys = &["overlap", "missed"];
pub(super) const PLACEMENT: Keys = &["constraints", "spread", "on_disconnect", "priority"];
pub(super) const ARTIFACT: Keys = &["name", "url", "sha256", "archive"];
pub(super) const FILE: Keys = &["path", "content", "source", "template", "mode", "owner"];
pub(super) const HOOKS: Keys = &["pre_start", "post_start", "pre_stop", "post_stop"];
pub(super) const HOOK: Keys = &["command", "timeout"];
pub(super) const LOGS: Keys = &["max_size", "max_age"];
pub(super) const ISOLATION: Keys = &[
    "private_tmp",
    "service_names",
    "new_privileges",
    "capabilities",
    "read_only",
    "hide",
    "landlock",
    "read",
    "write",
    "seccomp",
];

/// Every table with its name, to say where a key belongs.
pub(super) const TABLES: [(&str, Keys); 18] = [
    ("the top of the file", ROOT),
    ("[ports.NAME]", PORT),
    ("[ports.NAME.calls]", CALLS),
    ("[health]", HEALTH),
    ("[health.live]", PROBE),
    ("[restart]", RESTART),
    ("[resources]", RESOURCES),
    ("[update]", UPDATE),
    ("[stop]", STOP),
    ("[placement]", PLACEMENT),
    ("[job]", JOB),
    ("[logs]", LOGS),
    ("[[file]]", FILE),
    ("[[artifact]]", ARTIFACT),
    ("[isolation]", ISOLATION),
    ("[rlimits]", crate::limits::RLIMIT_NAMES),
    ("[hooks]", HOOKS),
    ("[hooks.NAME]", HOOK),
];

/// Other systems' words for ours.
const SYNONYMS: [(&str, &str); 51] = [
    ("cmd", "command"),
    ("args", "command"),
    ("exec_start", "command"),
    ("replicas", "count"),
    ("instances", "count"),
    ("scale", "count"),
    ("daemon", "per_host"),
    ("environment", "env"),
    ("cwd", "working_dir"),
    ("workdir", "working_dir"),
    ("working_directory", "working_dir"),
    ("depends_on", "needs"),
    ("requires", "needs"),
    ("allowed_callers", "allow"),
    ("intentions", "allow"),
    ("drain", "drain_timeout"),
    ("healthcheck", "health"),
    ("check", "health"),
    ("limits", "resources"),
    ("cpus", "cpu"),
    ("mem", "memory"),
    ("ram", "memory"),
    ("timeout", "grace"),
    ("host_port", "port"),
    ("logging", "logs"),
    ("files", "file"),
    ("artifacts", "artifact"),
    ("checksum", "sha256"),
    ("sha", "sha256"),
    ("unpack", "archive"),
    ("configs", "file"),
    ("env_files", "env_file"),
    ("environment_file", "env_file"),
    ("secret", "secrets"),
    ("volumes", "data"),
    ("inline", "content"),
    ("permissions", "mode"),
    ("log", "logs"),
    ("size", "max_size"),
    ("retention", "max_age"),
    ("keep", "max_age"),
    ("ulimits", "rlimits"),
    ("sandbox", "isolation"),
    ("security", "isolation"),
    ("start_period", "start_grace"),
    ("initial_delay", "start_grace"),
    ("lifecycle", "hooks"),
    ("exec_start_pre", "pre_start"),
    ("exec_start_post", "post_start"),
    ("exec_stop_post", "post_stop"),
    ("kill_mode", "scope"),
];

const CHECKS: Keys = &["http", "tcp", "grpc", "exec", "notify", "notify_fd", "log"];
const CHECKS_TEXT: &str = "http, tcp, grpc, exec, notify, notify_fd or log";
const LIVE_CHECKS_TEXT: &str = "http, tcp, grpc, exec or notify";

pub(super) fn manifest(document: &Spanned, problems: &mut Problems) -> pb::Manifest {
    let mut manifest = pb::Manifest::default();
    let example = "such as name = \"web\"";
    let Some(table) = Table::open(document, Path::default(), example, problems) else { return manifest };
    unknown_keys(&table, ROOT, problems);
    let field = |key| table.field(key);

    manifest.name = field("name").and_then(|field| field.text(problems)).unwrap_or_default().to_owned();
    manifest.command = field("command").map(|field| command(&field, problems)).unwrap_or_default();
    manifest.per_host = field("per_host").and_then(|field| field.flag(problems)).unwrap_or(false);
    manifest.count = count(&table, manifest.per_host, problems);
    manifest.env = field("env").map(|field| env(&field, problems)).unwrap_or_default();
    manifest.user = field("user").and_then(|field| field.text(problems)).unwrap_or_default().to_owned();
    manifest.working_dir =
        field("working_dir").and_then(|field| field.text(problems)).unwrap_or_default().to_owned();
    manifest.needs =
        field("needs").map(|field| field.texts(problems, "such as [\"db\"]")).unwrap_or_default();
    manifest.allow = field("allow")
        .map(|field| pb::AllowedCallers { callers: field.texts(problems, "such as [\"web\"]") });
    manifest.ports = field("ports").map(|field| ports(&field, problems)).unwrap_or_default();
    manifest.health = field("health").and_then(|field| health(&field, problems));
    manifest.restart = field("restart").and_then(|field| restart(&field, problems));
    manifest.resources = field("resources").and_then(|field| resources(&field, problems));
    manifest.update = field("update").and_then(|field| update(&field, problems));
    manifest.stop = field("stop").and_then(|field| stop(&field, problems));
    manifest.kind = field("kind")
        .and_then(|field| field.word(problems, &["service", "job"], words::parse_kind))
        .unwrap_or_default()
        .into();
    manifest.schedule =
        field("schedule").and_then(|field| field.text(problems)).unwrap_or_default().to_owned();
    manifest.job = field("job").and_then(|field| job(&field, problems));
    manifest.placement = field("placement").and_then(|field| placement(&field, problems));
    manifest.artifacts = field("artifact").map(|field| artifacts(&field, problems)).unwrap_or_default();
    manifest.files = field("file").map(|field| files(&field, problems)).unwrap_or_default();
    manifest.env_files = field("env_file")
        .map(|field| field.texts(problems, "such as [\"/etc/web.env\"]"))
        .unwrap_or_default();
    manifest.data = field("data").and_then(|field| field.flag(problems)).unwrap_or(false);
    manifest.secrets = field("secrets").map(|field| secrets(&field, problems)).unwrap_or_default();
    manifest.logs = field("logs").and_then(|field| logs(&field, problems));
    manifest.isolation = field("isolation").and_then(|field| isolation(&field, problems));
    manifest.hooks = field("hooks").and_then(|field| hooks(&field, problems));
    manifest.rlimits = field("rlimits").map(|field| rlimits(&field, problems)).unwrap_or_default();
    manifest
}

fn command(field: &Field<'_>, problems: &mut Problems) -> Vec<String> {
    if let Value::Str(text) = &field.value.value {
        let words: Vec<&str> = text.split_whitespace().collect();
        field.refuse(problems, format!("must be a list, one text for each argument, such as {words:?}"));
        return Vec::new();
    }
    field.texts(problems, "such as [\"/usr/bin/env\", \"true\"]")
}

/// One when nothing is said. Said beside `per_host` it is a contradiction.
fn count(table: &Table<'_>, per_host: bool, problems: &mut Problems) -> u32 {
    match table.field("count") {
        None => u32::from(!per_host),
        Some(field) if per_host => {
            field.refuse(problems, "count and per_host = true contradict each other; leave one of them out");
            0
        }
        Some(field) => field.whole(problems).unwrap_or(1),
    }
}

/// Whole numbers and booleans are taken as written; fractions are not, since 1.10 would become 1.1.
fn env(field: &Field<'_>, problems: &mut Problems) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    let Some(table) = field.table("such as { LOG_LEVEL = \"info\" }", problems) else { return env };
    for field in table.fields() {
        let text = match &field.value.value {
            Value::Str(text) => text.clone(),
            Value::Int(number) => number.to_string(),
            Value::Bool(value) => value.to_string(),
            other => {
                field.refuse(problems, format!("must be text in quotes, not {}", other.describe()));
                continue;
            }
        };
        env.insert(field.key.to_owned(), text);
    }
    env
}

fn ports(field: &Field<'_>, problems: &mut Problems) -> BTreeMap<String, pb::Port> {
    let mut ports = BTreeMap::new();
    let Some(table) = field.table("such as [ports.http]", problems) else { return ports };
    for field in table.fields() {
        if PORT.contains(&field.key) && !matches!(field.value.value, Value::Table(_)) {
            field.refuse(
                problems,
                format!("a port has a name of its own; write [ports.http] above {}", field.key),
            );
            continue;
        }
        if let Some(port) = port(&field, problems) {
            ports.insert(field.key.to_owned(), port);
        }
    }
    ports
}

fn port(field: &Field<'_>, problems: &mut Problems) -> Option<pb::Port> {
    let table = field.table("such as { protocol = \"http\" }", problems)?;
    unknown_keys(&table, PORT, problems);
    let number = |key, problems: &mut Problems| table.field(key).and_then(|field| field.whole(problems));
    Some(pb::Port {
        protocol: table
            .field("protocol")
            .and_then(|field| protocol(&field, problems))
            .unwrap_or_default()
            .into(),
        service_port: number("service_port", problems).unwrap_or(0),
        port: table
            .field("port")
            .and_then(|field| {
                let port = field.whole(problems)?;
                if port == 0 {
                    field.refuse(
                        problems,
                        "0 is not a port; leave the key out for a port that the agent picks",
                    );
                }
                Some(port)
            })
            .unwrap_or(0),
        calls: table.field("calls").and_then(|field| calls(&field, problems)),
    })
}

fn calls(field: &Field<'_>, problems: &mut Problems) -> Option<pb::Calls> {
    let table = field.table("such as { timeout = \"5s\" }", problems)?;
    unknown_keys(&table, CALLS, problems);
    let duration = |key, problems: &mut Problems| {
        table.field(key).and_then(|field| field.duration(problems)).map(to_proto)
    };
    let number = |key, problems: &mut Problems| table.field(key).and_then(|field| field.whole(problems));
    let hash_header = table.field("hash_header").and_then(|field| field.text(problems));
    Some(pb::Calls {
        timeout: duration("timeout", problems),
        try_timeout: duration("try_timeout", problems),
        idle_timeout: duration("idle_timeout", problems),
        max_connections: number("max_connections", problems),
        max_requests: number("max_requests", problems),
        max_pending: number("max_pending", problems),
        retries: number("retries", problems),
        hash_header: hash_header.unwrap_or_default().to_owned(),
        access_log: table.field("access_log").and_then(|field| field.flag(problems)).unwrap_or(false),
    })
}

fn protocol(field: &Field<'_>, problems: &mut Problems) -> Option<pb::Protocol> {
    match field.text(problems)? {
        "udp" => {
            field.refuse(
                problems,
                "udp is not supported: Nave balances connections, and udp has none; use http, http2, grpc or tcp",
            );
            None
        }
        "https" | "tls" => {
            field.refuse(
                problems,
                "services speak plain http to their own host, Nave encrypts between hosts; use http, \
                 or tcp when the process does its own TLS",
            );
            None
        }
        _ => field.word(problems, &["http", "http2", "grpc", "tcp"], words::parse_protocol),
    }
}

fn health(field: &Field<'_>, problems: &mut Problems) -> Option<pb::Health> {
    let table = field.table("such as { http = \"/\" }", problems)?;
    unknown_keys(&table, HEALTH, problems);
    let live = table.field("live");
    let says_something = table.fields().any(|field| !["live", "start_grace"].contains(&field.key));
    let ready =
        if says_something || live.is_none() { probe(&table, field, CHECKS_TEXT, problems) } else { None };
    let live = live.and_then(|field| {
        let table = field.table("such as { http = \"/\" }", problems)?;
        unknown_keys(&table, PROBE, problems);
        probe(&table, &field, LIVE_CHECKS_TEXT, problems)
    });
    let start_grace = table.field("start_grace").and_then(|field| field.duration(problems)).map(to_proto);
    Some(pb::Health { ready, live, start_grace })
}

fn probe(table: &Table<'_>, field: &Field<'_>, checks: &str, problems: &mut Problems) -> Option<pb::Probe> {
    let mut given = table.fields().filter(|field| CHECKS.contains(&field.key));
    let Some(chosen) = given.next() else {
        if !problems.covers(&table.path) {
            problems.add(field.key_at, field.path.clone(), format!("has no check; add one of {checks}"));
        }
        return None;
    };
    for second in given {
        second.refuse(problems, format!("a second check beside {}; keep one of the two", chosen.key));
    }
    let check = match chosen.key {
        "http" => Check::Http(chosen.text(problems)?.to_owned()),
        "tcp" => Check::Tcp(chosen.chosen(problems)?),
        "grpc" => Check::Grpc(chosen.chosen(problems)?),
        "exec" => Check::Exec(pb::ExecCheck { command: command(&chosen, problems) }),
        "notify_fd" => Check::NotifyFd(chosen.whole(problems)?),
        "log" => Check::Log(chosen.text(problems)?.to_owned()),
        _ => Check::Notify(chosen.chosen(problems)?),
    };
    Some(pb::Probe {
        check: Some(check),
        port: table.field("port").and_then(|field| port_name(&field, problems)).unwrap_or_default(),
        interval: table.field("interval").and_then(|field| field.duration(problems)).map(to_proto),
        timeout: table.field("timeout").and_then(|field| field.duration(problems)).map(to_proto),
    })
}

fn port_name(field: &Field<'_>, problems: &mut Problems) -> Option<String> {
    if let Value::Int(number) = field.value.value {
        field.refuse(problems, format!("must be the name of one of [ports], not the number {number}"));
        return None;
    }
    field.text(problems).map(str::to_owned)
}

fn restart(field: &Field<'_>, problems: &mut Problems) -> Option<pb::Restart> {
    let table = field.table("such as { policy = \"always\" }", problems)?;
    unknown_keys(&table, RESTART, problems);
    let policy = table.field("policy").and_then(|field| {
        field.word(problems, &["always", "on-failure", "never"], words::parse_restart_policy)
    });
    let budget = table.field("budget").and_then(|field| {
        field.parsed(problems, "a budget in quotes, such as \"10 in 5m\"", values::parse_budget)
    });
    Some(pb::Restart {
        policy: policy.unwrap_or_default().into(),
        budget_restarts: budget.map_or(0, |(restarts, _)| restarts),
        budget_window: budget.map(|(_, window)| to_proto(window)),
        success_codes: exit_codes(&table, "success_codes", problems),
        fatal_codes: exit_codes(&table, "fatal_codes", problems),
    })
}

fn exit_codes(table: &Table<'_>, key: &str, problems: &mut Problems) -> Vec<u32> {
    table.field(key).map(|field| field.wholes(problems, "such as [0, 143]")).unwrap_or_default()
}

fn resources(field: &Field<'_>, problems: &mut Problems) -> Option<pb::Resources> {
    let table = field.table("such as { memory = \"128MiB\" }", problems)?;
    unknown_keys(&table, RESOURCES, problems);
    let cpu = |key, problems: &mut Problems| {
        let field = table.field(key)?;
        let cores = field.number(problems, "a number of cores, such as 0.5")?;
        match values::parse_cpu(cores) {
            Ok(0) => field.refuse(problems, "0 cores is nothing; leave the key out to reserve none"),
            Ok(millicores) => return Some(millicores),
            Err(message) => field.refuse(problems, message),
        }
        None
    };
    let size = |key, problems: &mut Problems| {
        let field = table.field(key)?;
        match field.parsed(problems, "a size in quotes, such as \"128MiB\"", values::parse_size)? {
            0 => field.refuse(problems, "0 bytes is nothing; leave the key out for no limit"),
            bytes => return Some(bytes),
        }
        None
    };
    let pids = table.field("pids").and_then(|field| match field.whole(problems)? {
        0 => {
            field.refuse(problems, "0 processes are none; leave the key out for the default");
            None
        }
        pids => Some(pids),
    });
    let signed = |key, problems: &mut Problems| table.field(key).and_then(|field| field.signed(problems));
    Some(pb::Resources {
        cpu_millicores: cpu("cpu", problems).unwrap_or(0),
        cpu_max_millicores: cpu("cpu_max", problems).unwrap_or(0),
        memory_bytes: size("memory", problems).unwrap_or(0),
        memory_soft_bytes: size("memory_soft", problems).unwrap_or(0),
        pids: pids.unwrap_or(0),
        nice: signed("nice", problems).unwrap_or(0),
        oom_score_adj: signed("oom_score_adj", problems).unwrap_or(0),
    })
}

fn update(field: &Field<'_>, problems: &mut Problems) -> Option<pb::Update> {
    let table = field.table("such as { max_parallel = 1 }", problems)?;
    unknown_keys(&table, UPDATE, problems);
    let duration = |key, problems: &mut Problems| {
        table.field(key).and_then(|field| field.duration(problems)).map(to_proto)
    };
    let max_parallel = table.field("max_parallel").and_then(|field| match field.whole(problems)? {
        0 => {
            field.refuse(problems, "must be at least 1, or nothing could ever be replaced");
            None
        }
        number => Some(number),
    });
    Some(pb::Update {
        max_parallel: max_parallel.unwrap_or(0),
        min_ready: duration("min_ready", problems),
        progress_deadline: duration("progress_deadline", problems),
        auto_revert: table.field("auto_revert").and_then(|field| field.flag(problems)).unwrap_or(true),
        canary: table.field("canary").and_then(|field| field.whole(problems)).unwrap_or(0),
    })
}

fn stop(field: &Field<'_>, problems: &mut Problems) -> Option<pb::Stop> {
    let table = field.table("such as { grace = \"10s\" }", problems)?;
    unknown_keys(&table, STOP, problems);
    let signal = table.field("signal").and_then(|field| {
        field.parsed(problems, "a signal's name in quotes, such as \"SIGTERM\"", |name| {
            signals::number(name).ok_or_else(|| match nearest(&name.to_ascii_uppercase(), signals::names()) {
                Some(meant) => format!("{name:?} is not a signal; did you mean {meant:?}?"),
                None => format!("{name:?} is not a signal, such as \"SIGTERM\""),
            })
        })
    });
    let scope = table
        .field("scope")
        .and_then(|field| field.word(problems, &["process", "group"], words::parse_stop_scope));
    Some(pb::Stop {
        signal: signal.unwrap_or(0),
        scope: scope.unwrap_or_default().into(),
        grace: table.field("grace").and_then(|field| field.duration(problems)).map(to_proto),
        drain_timeout: table.field("drain_timeout").and_then(|field| field.duration(problems)).map(to_proto),
    })
}

fn job(field: &Field<'_>, problems: &mut Problems) -> Option<pb::Job> {
    let table = field.table("such as { overlap = \"skip\" }", problems)?;
    unknown_keys(&table, JOB, problems);
    let overlap = table
        .field("overlap")
        .and_then(|field| field.word(problems, &["skip", "queue", "replace"], words::parse_overlap));
    let missed =
        table.field("missed").and_then(|field| field.word(problems, &["skip", "run"], words::parse_missed));
    Some(pb::Job { overlap: overlap.unwrap_or_default().into(), missed: missed.unwrap_or_default().into() })
}

fn placement(field: &Field<'_>, problems: &mut Problems) -> Option<pb::Placement> {
    let table = field.table("such as { spread = \"host\" }", problems)?;
    unknown_keys(&table, PLACEMENT, problems);
    let constraints = table.field("constraints");
    let on_disconnect = table
        .field("on_disconnect")
        .and_then(|field| field.word(problems, &["keep", "stop"], words::parse_on_disconnect));
    Some(pb::Placement {
        constraints: constraints
            .map(|field| field.texts(problems, r#"such as ['os = "linux"']"#))
            .unwrap_or_default(),
        spread: table.field("spread").and_then(|field| field.text(problems)).unwrap_or_default().to_owned(),
        on_disconnect: on_disconnect.unwrap_or_default().into(),
        priority: table.field("priority").and_then(|field| field.whole(problems)),
    })
}

fn artifacts(field: &Field<'_>, problems: &mut Problems) -> Vec<pb::Artifact> {
    let tables = field.tables(problems, "such as [[artifact]]");
    let text = |table: &Table<'_>, key, problems: &mut Problems| {
        table.field(key).and_then(|field| field.text(problems)).unwrap_or_default().to_owned()
    };
    let artifact = |table: &Table<'_>, problems: &mut Problems| {
        unknown_keys(table, ARTIFACT, problems);
        pb::Artifact {
            name: text(table, "name", problems),
            url: text(table, "url", problems),
            sha256: text(table, "sha256", problems),
            archive: text(table, "archive", problems),
        }
    };
    tables.iter().map(|table| artifact(table, problems)).collect()
}

fn files(field: &Field<'_>, problems: &mut Problems) -> Vec<pb::File> {
    let tables = field.tables(problems, "such as [[file]]");
    tables.iter().map(|table| file(table, problems)).collect()
}

fn file(table: &Table<'_>, problems: &mut Problems) -> pb::File {
    unknown_keys(table, FILE, problems);
    let text = |key, problems: &mut Problems| {
        table.field(key).and_then(|field| field.text(problems)).unwrap_or_default().to_owned()
    };
    let content = text("content", problems);
    let source = table.field("source");
    if table.field("content").is_none() && source.is_none() {
        problems.add(table.at, table.path.clone(), "has nothing to be made of; add content or source");
    }
    if table.field("content").is_some()
        && let Some(source) = &source
    {
        source.refuse(problems, "content and source contradict each other; leave one of them out");
    }
    let mode = table.field("mode").and_then(|field| {
        field.parsed(problems, "octal digits in quotes, such as \"0644\"", values::parse_mode)
    });
    let template = table.field("template").and_then(|field| field.flag(problems)).unwrap_or(true);
    pb::File {
        path: text("path", problems),
        content,
        source: text("source", problems),
        verbatim: !template,
        mode: mode.unwrap_or(0),
        owner: text("owner", problems),
    }
}

fn secrets(field: &Field<'_>, problems: &mut Problems) -> BTreeMap<String, String> {
    let mut secrets = BTreeMap::new();
    let Some(table) = field.table("such as { password = \"/etc/nave/secrets/web\" }", problems) else {
        return secrets;
    };
    for field in table.fields() {
        if let Some(path) = field.text(problems) {
            secrets.insert(field.key.to_owned(), path.to_owned());
        }
    }
    secrets
}

fn logs(field: &Field<'_>, problems: &mut Problems) -> Option<pb::Logs> {
    let table = field.table("such as { max_size = \"50MiB\" }", problems)?;
    unknown_keys(&table, LOGS, problems);
    let max_size = table.field("max_size").and_then(|field| {
        match field.parsed(problems, "a size in quotes, such as \"50MiB\"", values::parse_size)? {
            0 => field.refuse(problems, "0 bytes hold no line; leave the key out for 50MiB"),
            bytes => return Some(bytes),
        }
        None
    });
    Some(pb::Logs {
        max_size_bytes: max_size.unwrap_or(0),
        max_age: table.field("max_age").and_then(|field| field.duration(problems)).map(to_proto),
    })
}

fn isolation(field: &Field<'_>, problems: &mut Problems) -> Option<pb::Isolation> {
    let table = field.table("such as { read_only = true }", problems)?;
    unknown_keys(&table, ISOLATION, problems);
    let flag = |key, problems: &mut Problems| table.field(key).and_then(|field| field.flag(problems));
    let paths = |key, problems: &mut Problems| {
        table.field(key).map(|field| field.texts(problems, "such as [\"/srv\"]")).unwrap_or_default()
    };
    let seccomp = table
        .field("seccomp")
        .and_then(|field| field.word(problems, &["standard", "offline"], words::parse_seccomp));
    let capabilities = table
        .field("capabilities")
        .map(|field| field.texts(problems, "such as [\"NET_BIND_SERVICE\"]"))
        .unwrap_or_default();
    Some(pb::Isolation {
        shared_tmp: !flag("private_tmp", problems).unwrap_or(true),
        host_names: !flag("service_names", problems).unwrap_or(true),
        new_privileges: flag("new_privileges", problems).unwrap_or(false),
        capabilities: capabilities.into_iter().map(|name| limits::capability_name(&name)).collect(),
        read_only: flag("read_only", problems).unwrap_or(false),
        hide: paths("hide", problems),
        landlock: flag("landlock", problems).unwrap_or(false),
        read: paths("read", problems),
        write: paths("write", problems),
        seccomp: seccomp.unwrap_or_default().into(),
    })
}

fn hooks(field: &Field<'_>, problems: &mut Problems) -> Option<pb::Hooks> {
    let table = field.table("such as { pre_start = { command = [\"/srv/migrate\"] } }", problems)?;
    unknown_keys(&table, HOOKS, problems);
    let hook = |key, problems: &mut Problems| table.field(key).and_then(|field| hook(&field, problems));
    Some(pb::Hooks {
        pre_start: hook("pre_start", problems),
        post_start: hook("post_start", problems),
        pre_stop: hook("pre_stop", problems),
        post_stop: hook("post_stop", problems),
    })
}

fn hook(field: &Field<'_>, problems: &mut Problems) -> Option<pb::Hook> {
    let table = field.table("such as { command = [\"/srv/migrate\"], timeout = \"30s\" }", problems)?;
    unknown_keys(&table, HOOK, problems);
    Some(pb::Hook {
        command: table.field("command").map(|field| command(&field, problems)).unwrap_or_default(),
        timeout: table.field("timeout").and_then(|field| field.duration(problems)).map(to_proto),
    })
}

fn rlimits(field: &Field<'_>, problems: &mut Problems) -> BTreeMap<String, u64> {
    let mut rlimits = BTreeMap::new();
    let Some(table) = field.table("such as { nofile = 65536 }", problems) else { return rlimits };
    unknown_keys(&table, limits::RLIMIT_NAMES, problems);
    for field in table.fields() {
        let limit = match &field.value.value {
            Value::Int(number) => u64::try_from(*number).ok(),
            Value::Str(text) if text == "unlimited" => Some(u64::MAX),
            Value::Str(text) => values::parse_size(text).ok(),
            Value::Null
            | Value::Bool(_)
            | Value::Float(_)
            | Value::Other(..)
            | Value::List(_)
            | Value::Table(_) => None,
        };
        match limit {
            Some(limit) => drop(rlimits.insert(field.key.to_owned(), limit)),
            None => field.refuse(
                problems,
                format!(
                    "must be a whole number, a size such as \"64MiB\" or \"unlimited\", not {}",
                    field.value.value.describe()
                ),
            ),
        }
    }
    rlimits
}

/// Reports the keys that are not `known`, each with what was probably meant.
fn unknown_keys(table: &Table<'_>, known: Keys, problems: &mut Problems) {
    for field in table.fields().filter(|field| !known.contains(&field.key)) {
        let hint = match meant(field.key, known) {
            Some(key) => {
                problems.cover(table.path.key(key));
                format!("did you mean `{key}`?")
            }
            None => match TABLES.iter().find(|(_, keys)| keys.contains(&field.key)) {
                Some((name, _)) => format!("it belongs in {name}"),
                None => format!("known here: {}", known.join(", ")),
            },
        };
        problems.add(field.key_at, field.path.clone(), format!("unknown key; {hint}"));
    }
}

fn meant(given: &str, known: Keys) -> Option<&'static str> {
    let folded = given.to_ascii_lowercase().replace('-', "_");
    let synonym = SYNONYMS.iter().find(|(other, ours)| *other == folded && known.contains(ours));
    synonym.map(|(_, ours)| *ours).or_else(|| nearest(&folded, known.iter().copied()))
}

/// The closest of some words, when it is close: one slip in a short word, one in three letters of a longer one.
pub(super) fn nearest<'w>(given: &str, words: impl Iterator<Item = &'w str>) -> Option<&'w str> {
    words
        .map(|word| (strsim::damerau_levenshtein(given, word), word))
        .filter(|(distance, word)| *distance <= (word.len() / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, word)| word)
}
