//! What people write, right and wrong. The tables of mistakes assert whole messages, since the messages are the
//! product.

mod mistakes;
mod round_trip;

use std::time::Duration;

use super::*;
use crate::pb::probe::Check;
use crate::time::{from_proto_or, to_proto};

/// DESIGN's example, word for word.
const DESIGN: &str = r#"
name = "web"                              # [a-z0-9-], 1..63
command = ["python3", "-m", "http.server", "--bind", "${HOST}", "${PORT}"]
count = 3                                 # or per_host = true
env = { LOG_LEVEL = "info" }
user = "www-data"                         # default: a uid of its own when the agent is root, else the agent's user
working_dir = "/srv/web"
needs = ["db"]                            # started only once db is ready; stopped before it

[ports.http]                              # the process gets HOST, PORT, NAVE_PORT_HTTP: bind there
protocol = "http"                         # http, http2, grpc, tcp (udp is refused)
service_port = 80                         # what callers use on the service's address; http 80, https 443, else required
# port = 8080                             # fix the instance's own port instead of a dynamic one

[health]                                  # readiness; [health.live] adds liveness
http = "/"                                # or tcp = true, grpc = true, exec = [...], notify = true
interval = "1s"
timeout = "500ms"

[restart]
policy = "always"                         # on-failure, never
budget = "10 in 5m"

[resources]
cpu = 0.5                                 # cores, reserved for placement, enforced as weight; cpu_max enforces a quota
memory = "128MiB"                         # hard limit

[update]
max_parallel = 1
min_ready = "2s"
progress_deadline = "2m"
auto_revert = true
canary = 0

[stop]
signal = "SIGTERM"
grace = "10s"

[placement]
constraints = ['os = "linux"', 'label.zone != "b"']
spread = "host"
on_disconnect = "keep"                    # or "stop": for services that must never run twice
"#;

fn toml(text: &str) -> pb::Manifest {
    parse(text, Format::Toml, "web.toml").unwrap_or_else(|error| panic!("{error}"))
}

/// The least that is a manifest.
fn least() -> pb::Manifest {
    toml("name = \"web\"\ncommand = [\"true\"]")
}

#[test]
fn the_manifest_of_the_design_is_read_as_meant() {
    let manifest = toml(DESIGN);
    assert_eq!(manifest.name, "web");
    assert_eq!(manifest.command.len(), 6);
    assert_eq!((manifest.count, manifest.per_host), (3, false));
    assert_eq!(manifest.env["LOG_LEVEL"], "info");
    assert_eq!((manifest.user.as_str(), manifest.working_dir.as_str()), ("www-data", "/srv/web"));
    assert_eq!(manifest.needs, ["db"]);
    assert_eq!(
        manifest.ports["http"],
        pb::Port { protocol: pb::Protocol::Http.into(), service_port: 80, port: 0, calls: None }
    );
    let probe = manifest.health.unwrap().ready.unwrap();
    assert_eq!(probe.check, Some(Check::Http("/".into())));
    assert_eq!(probe.port, "http");
    assert_eq!(from_proto_or(probe.timeout.as_ref(), Duration::ZERO), Duration::from_millis(500));
    let resources = manifest.resources.unwrap();
    assert_eq!((resources.cpu_millicores, resources.memory_bytes), (500, 128 << 20));
    assert_eq!(manifest.update.unwrap().min_ready, Some(to_proto(Duration::from_secs(2))));
    assert_eq!(manifest.placement.unwrap().constraints.len(), 2);
}

#[test]
fn defaults_are_those_of_the_design() {
    let manifest = least();
    let seconds = |seconds| Some(to_proto(Duration::from_secs(seconds)));
    assert_eq!((manifest.count, manifest.per_host), (1, false));
    assert_eq!(manifest.health, None);
    assert_eq!(
        manifest.restart,
        Some(pb::Restart {
            policy: pb::RestartPolicy::Always.into(),
            budget_restarts: 10,
            budget_window: seconds(300),
            ..Default::default()
        })
    );
    assert_eq!(
        manifest.update,
        Some(pb::Update {
            max_parallel: 1,
            min_ready: seconds(0),
            progress_deadline: seconds(120),
            auto_revert: true,
            canary: 0
        })
    );
    assert_eq!(manifest.stop, Some(pb::Stop { signal: 15, grace: seconds(10), ..Default::default() }));
    let placement = manifest.placement.unwrap();
    assert_eq!(placement.spread, "host");
    assert_eq!(placement.on_disconnect(), pb::OnDisconnect::Keep);

    let with_probe = toml(
        "name = \"web\"\ncommand = [\"true\"]\n[ports.web]\nprotocol = \"http\"\n[health.live]\ntcp = true",
    );
    assert_eq!(with_probe.ports["web"].service_port, 80);
    let health = with_probe.health.unwrap();
    assert_eq!(health.ready, None);
    let live = health.live.unwrap();
    assert_eq!((live.interval, live.timeout), (seconds(1), Some(to_proto(Duration::from_millis(500)))));
    assert_eq!(live.port, "web");
}

#[test]
fn every_example_in_the_tree_is_a_manifest() {
    let mut directories = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")];
    let mut read = 0;
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.ends_with("Cargo.toml") {
                // A program that an example runs.
            } else if let Some(format) = Format::of_path(&path) {
                let text = std::fs::read_to_string(&path).unwrap();
                parse_all(&text, format, &path.display().to_string())
                    .unwrap_or_else(|error| panic!("{error}"));
                read += 1;
            }
        }
    }
    assert!(read > 0, "no examples");
}

#[test]
fn filling_in_defaults_twice_changes_nothing() {
    let mut manifest = toml(DESIGN);
    let once = manifest.clone();
    fill_defaults(&mut manifest);
    assert_eq!(manifest, once);
}

#[test]
fn a_manifest_from_the_wire_is_held_to_the_same_rules() {
    assert_eq!(validate(&least()), Ok(()));
    let mut manifest = least();
    manifest.name = "Web".into();
    manifest.needs = vec!["db".into(), "db".into()];
    manifest.ports.insert("x".into(), pb::Port::default());
    let told: Vec<String> = validate(&manifest).unwrap_err().iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "name: \"Web\" has 'W'; a service's name has only a-z, 0-9 and -",
            "needs[1]: \"db\" is listed twice",
            "ports.x.protocol: is missing; one of http, http2, grpc, tcp",
        ]
    );
}

#[test]
fn a_manifest_too_large_is_refused_as_text_and_as_a_message() {
    let text = format!("name = \"web\"\ncommand = [\"{}\"]", "x".repeat(MANIFEST_BYTES_MAX));
    let error = parse(&text, Format::Toml, "web.toml").unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("web.toml:1:1: a manifest has at most 65536 bytes, this one has {}", text.len())
    );
    let mut manifest = least();
    manifest.command.push("x".repeat(MANIFEST_BYTES_MAX));
    let violations = validate(&manifest).unwrap_err();
    assert!(violations[0].message.starts_with("a manifest has at most 65536 bytes"), "{violations:?}");
}

#[test]
fn a_yaml_stream_holds_several_manifests() {
    let text = "name: a\ncommand: [\"true\"]\n---\nname: b\ncommand: [\"true\"]\n---\n";
    let names: Vec<String> = parse_all(text, Format::Yaml, "all.yaml")
        .unwrap()
        .into_iter()
        .map(|manifest| manifest.name)
        .collect();
    assert_eq!(names, ["a", "b"]);
    let error = parse(text, Format::Yaml, "all.yaml").unwrap_err();
    assert_eq!(error.to_string(), "all.yaml:1:1: one manifest is expected here, the file has 2");
}

#[test]
fn yaml_means_what_yaml_1_2_says() {
    let manifest = parse(
        "name: web\ncommand: &c [env, \"true\"]\nenv: {A: no, B: 8080, C: true, D: '1.10'}\n\
         health:\n  exec: *c\n",
        Format::Yaml,
        "web.yaml",
    )
    .unwrap();
    let env: Vec<&str> = manifest.env.values().map(String::as_str).collect();
    assert_eq!(env, ["no", "8080", "true", "1.10"]);
    let check = manifest.health.unwrap().ready.unwrap().check;
    assert_eq!(check, Some(Check::Exec(pb::ExecCheck { command: vec!["env".into(), "true".into()] })));
}

#[test]
fn aliases_cannot_blow_up() {
    let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..9 {
        let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
        text.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
    }
    let error = parse(&text, Format::Yaml, "bomb.yaml").unwrap_err();
    assert!(error.to_string().ends_with("too many values, are aliases nested?"), "{error}");
}

#[test]
fn formats_are_known_by_extension_or_by_their_first_character() {
    assert_eq!(Format::of_path(Path::new("a/web.yml")), Some(Format::Yaml));
    assert_eq!(Format::of_path(Path::new("web.TOML")), Some(Format::Toml));
    assert_eq!(Format::of_path(Path::new("web")), None);
    for (text, format) in [
        ("\n# hello\nname = \"web\"", Format::Toml),
        ("[ports.http]", Format::Toml),
        ("name: web", Format::Yaml),
        ("---\nname: web", Format::Yaml),
        (" {\"name\": \"web\"}", Format::Json),
        ("", Format::Toml),
    ] {
        assert_eq!(Format::guess(text), format, "{text:?}");
    }
}

#[test]
fn the_schema_knows_exactly_the_keys_that_the_parser_reads() {
    let schema = json_schema();
    let keys = |table: &serde_json::Value| {
        let mut keys: Vec<String> = table["properties"].as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    };
    let expected = |known: &[&str]| {
        let mut known: Vec<String> = known.iter().map(|key| (*key).to_owned()).collect();
        known.sort();
        known
    };
    assert_eq!(keys(&schema), expected(definition::ROOT));
    assert_eq!(schema["additionalProperties"], false);
    for (name, known) in [
        ("PortDocument", definition::PORT),
        ("HealthDocument", definition::HEALTH),
        ("ProbeDocument", definition::PROBE),
        ("RestartDocument", definition::RESTART),
        ("ResourcesDocument", definition::RESOURCES),
        ("UpdateDocument", definition::UPDATE),
        ("StopDocument", definition::STOP),
        ("PlacementDocument", definition::PLACEMENT),
        ("IsolationDocument", definition::ISOLATION),
        ("JobDocument", definition::JOB),
        ("HooksDocument", definition::HOOKS),
        ("HookDocument", definition::HOOK),
    ] {
        let table = &schema["$defs"][name];
        assert_eq!(keys(table), expected(known), "{name}");
        assert_eq!(table["additionalProperties"], false, "{name}");
        for (key, property) in table["properties"].as_object().unwrap() {
            assert!(property["description"].is_string(), "{name}.{key} has no description");
        }
    }
    assert_eq!(schema["required"], serde_json::json!(["name", "command"]));
    assert!(!schema.to_string().contains("\"null\""), "{schema:#}");
}

#[test]
fn a_template_is_what_a_process_is_started_with() {
    let before = toml(DESIGN);
    let changed = |change: fn(&mut pb::Manifest)| {
        let mut after = before.clone();
        change(&mut after);
        !same_template(&before, &after)
    };
    assert!(changed(|m| m.command.push("x".into())));
    assert!(changed(|m| m.env.clear()));
    assert!(changed(|m| m.ports.get_mut("http").unwrap().port = 8080));
    assert!(
        !changed(|m| m.ports.get_mut("http").unwrap().calls = Some(pb::Calls::default())),
        "no process hears how calls are carried"
    );
    assert!(!changed(|m| m.resources = None), "limits are changed while it runs");
    assert!(changed(|m| m.resources.as_mut().unwrap().nice = 5));
    assert!(changed(|m| m.resources.as_mut().unwrap().oom_score_adj = 5));
    assert!(changed(|m| m.user.clear()));
    assert!(changed(|m| m.working_dir.clear()));
    assert!(changed(|m| m.rlimits = [("nofile".to_owned(), 9)].into()));
    assert!(changed(|m| m.isolation = Some(pb::Isolation { read_only: true, ..Default::default() })));
    assert!(!changed(|m| m.isolation = Some(pb::Isolation::default())));
    let hook = |command: &str| Some(pb::Hook { command: vec![command.to_owned()], timeout: None });
    let with = |hooks: pb::Hooks| {
        let after = pb::Manifest { hooks: Some(hooks), ..before.clone() };
        !same_template(&before, &after)
    };
    assert!(with(pb::Hooks { pre_start: hook("a"), ..Default::default() }));
    assert!(with(pb::Hooks { post_start: hook("a"), ..Default::default() }));
    assert!(!with(pb::Hooks { pre_stop: hook("a"), post_stop: hook("b"), ..Default::default() }));
    assert!(changed(|m| m.set_kind(pb::Kind::Job)));
    assert!(!changed(|m| m.schedule = "0 3 * * *".into()));
    assert!(!changed(|m| m.count = 9));
    assert!(!changed(|m| m.health = None));
    assert!(!changed(|m| m.needs.clear()));
    assert!(!changed(|m| m.stop = None));
    assert!(!changed(|m| m.allow = Some(pb::AllowedCallers { callers: vec!["db".into()] })));
    assert!(!changed(|m| m.placement = None));
}

#[test]
fn hooks_have_time_to_end_and_a_stop_some_left_to_be_obeyed() {
    let timeouts = |grace: &str| {
        let hook = "= { command = [\"true\"] }";
        let text = format!(
            "name = \"web\"\ncommand = [\"true\"]\nstop = {{ grace = \"{grace}\" }}\n[hooks]\npre_start {hook}\n\
             post_start {hook}\npre_stop {hook}\npost_stop {hook}"
        );
        let hooks = toml(&text).hooks.unwrap();
        let timeout = |hook: Option<pb::Hook>| from_proto_or(hook.unwrap().timeout.as_ref(), Duration::MAX);
        [hooks.pre_start, hooks.post_start, hooks.pre_stop, hooks.post_stop].map(timeout)
    };
    let seconds = |all: [u64; 4]| all.map(Duration::from_secs);
    assert_eq!(timeouts("30s"), seconds([30, 30, 5, 30]));
    assert_eq!(timeouts("4s"), seconds([30, 30, 2, 30]));
}

#[test]
fn a_job_tries_a_run_a_few_times_and_survives_the_round() {
    let text = "name = \"tidy\"\ncommand = [\"true\"]\nkind = \"job\"\nschedule = \"30 2 * * 1-5 Europe/Berlin\"\n\
                [job]\noverlap = \"queue\"\nmissed = \"run\"";
    let job = toml(text);
    let restart = job.restart.clone().unwrap();
    assert_eq!((restart.policy(), restart.budget_restarts), (pb::RestartPolicy::OnFailure, 3));
    let policies = job.job.unwrap();
    assert_eq!((policies.overlap(), policies.missed()), (pb::OverlapPolicy::Queue, pb::MissedPolicy::Run));
    assert_eq!(toml(&to_toml(&job)), job);
    assert_eq!(least().kind(), pb::Kind::Service);
}

#[test]
fn a_difference_is_told_as_a_person_writes_it() {
    let before = toml(DESIGN);
    let mut after = before.clone();
    after.command = vec!["sleep".into(), "60".into()];
    after.count = 5;
    after.env.insert("A\"B".into(), "x".into());
    after.ports.get_mut("http").unwrap().port = 8080;
    after.health = None;
    after.resources.as_mut().unwrap().memory_bytes = 1 << 30;
    after.stop.as_mut().unwrap().grace = Some(to_proto(Duration::from_secs(90)));
    let told: Vec<(String, String, String)> = diff(Some(&before), &after)
        .into_iter()
        .map(|change| (change.path, change.before, change.after))
        .collect();
    let expected = [
        (
            "command",
            r#"["python3", "-m", "http.server", "--bind", "${HOST}", "${PORT}"]"#,
            r#"["sleep", "60"]"#,
        ),
        ("count", "3", "5"),
        (r#"env."A\"B""#, "", r#""x""#),
        ("ports.http.port", "", "8080"),
        ("health.http", r#""/""#, ""),
        ("health.interval", r#""1s""#, ""),
        ("health.port", r#""http""#, ""),
        ("health.timeout", r#""500ms""#, ""),
        ("resources.memory", r#""128MiB""#, r#""1GiB""#),
        ("stop.grace", r#""10s""#, r#""1m30s""#),
    ];
    let expected: Vec<(String, String, String)> = expected
        .into_iter()
        .map(|(path, before, after)| (path.to_owned(), before.to_owned(), after.to_owned()))
        .collect();
    assert_eq!(told, expected);
    assert_eq!(diff(Some(&before), &before), []);
    assert!(diff(None, &after).iter().all(|change| change.before.is_empty()));
}
