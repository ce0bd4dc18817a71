//! Whatever a manifest says, it says the same after being written and read in each format.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;

use super::*;

fn text() -> impl Strategy<Value = String> {
    // Quotes, escapes, non-ASCII, line ends, what YAML could take for something else.
    prop_oneof![
        "[ -~é—\u{1F980}\n\t]{0,20}",
        Just("no".to_owned()),
        Just("1.10".to_owned()),
        Just("~".to_owned())
    ]
}

fn name() -> impl Strategy<Value = String> {
    "[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?"
}

fn duration(milliseconds: std::ops::Range<u64>) -> impl Strategy<Value = Option<prost_types::Duration>> {
    milliseconds.prop_map(|ms| Some(to_proto(Duration::from_millis(ms))))
}

fn command() -> impl Strategy<Value = Vec<String>> {
    ("[/a-z]{1,9}", vec(text(), 0..4)).prop_map(|(program, arguments)| {
        let mut command = vec![program];
        command.extend(arguments);
        command
    })
}

fn ports() -> impl Strategy<Value = BTreeMap<String, pb::Port>> {
    let port = (1i32..=4, 1u32..=65_535, prop_oneof![Just(0u32), 1u32..=65_535], option::of(calls()));
    btree_map("[a-z][a-z0-9]{0,7}", port, 0..4).prop_map(|ports| {
        // Numbers must differ between ports, and a fixed port with them.
        let (mut service_ports, mut fixed_ports) = (BTreeMap::new(), BTreeMap::new());
        ports
            .into_iter()
            .filter(|(_, (_, service_port, port, _))| {
                let fresh_fixed = *port == 0 || fixed_ports.insert(*port, ()).is_none();
                service_ports.insert(*service_port, ()).is_none() && fresh_fixed
            })
            .map(|(name, (protocol, service_port, port, mut calls))| {
                if let Some(calls) = calls.as_mut().filter(|_| protocol == pb::Protocol::Tcp as i32) {
                    (calls.timeout, calls.try_timeout, calls.max_requests) = (None, None, None);
                    calls.hash_header.clear();
                }
                (name, pb::Port { protocol, service_port, port, calls })
            })
            .collect()
    })
}

fn calls() -> impl Strategy<Value = pb::Calls> {
    let times = (duration(5_000..90_000), duration(1..5_000), duration(1_000..3_600_000));
    let numbers = [option::of(1u32..9), option::of(1u32..9), option::of(0u32..9), option::of(0u32..11)];
    let words = (prop_oneof![Just(String::new()), Just("X-User".to_owned())], any::<bool>());
    (times, numbers, words).prop_map(|(times, numbers, (hash_header, access_log))| {
        let (timeout, try_timeout, idle_timeout) = times;
        let [max_connections, max_requests, max_pending, retries] = numbers;
        pb::Calls {
            timeout,
            try_timeout,
            idle_timeout,
            max_connections,
            max_requests,
            max_pending,
            retries,
            hash_header,
            access_log,
        }
    })
}

fn probe(ports: Vec<(String, pb::Port)>, live: bool) -> impl Strategy<Value = pb::Probe> {
    let exec = command().prop_map(|command| (Check::Exec(pb::ExecCheck { command }), String::new()));
    let notify = Just((Check::Notify(true), String::new()));
    let said = prop_oneof![(3u32..=255).prop_map(Check::NotifyFd), "[a-z ]{1,9}".prop_map(Check::Log)]
        .prop_map(|check| (check, String::new()));
    let without_port =
        if live { prop_oneof![exec, notify].boxed() } else { prop_oneof![exec, notify, said].boxed() };
    let checks = if ports.is_empty() {
        without_port
    } else {
        let with_port = proptest::sample::select(ports).prop_flat_map(|(name, port)| {
            let http = if port.protocol() == pb::Protocol::Grpc {
                Just(Check::Tcp(true)).boxed()
            } else {
                "/[!-~]{0,9}".prop_map(Check::Http).boxed()
            };
            let check = prop_oneof![http, Just(Check::Tcp(true)), Just(Check::Grpc(true))];
            (check, Just(name))
        });
        prop_oneof![without_port, with_port].boxed()
    };
    (checks, duration(100..3_600_000), duration(1..300_000)).prop_map(|((check, port), interval, timeout)| {
        pb::Probe { check: Some(check), port, interval, timeout }
    })
}

fn health(ports: &BTreeMap<String, pb::Port>) -> impl Strategy<Value = Option<pb::Health>> + use<> {
    let ports: Vec<_> = ports.iter().map(|(name, port)| (name.clone(), port.clone())).collect();
    let start_grace = option::of(duration(0..3_600_000)).prop_map(Option::flatten);
    (option::of(probe(ports.clone(), false)), option::of(probe(ports, true)), start_grace).prop_map(
        |(ready, live, start_grace)| {
            let start_grace = start_grace.filter(|_| live.is_some());
            (ready.is_some() || live.is_some()).then_some(pb::Health { ready, live, start_grace })
        },
    )
}

prop_compose! {
    fn resources()(
        cpu in 0u64..100_000,
        above in option::of(0u64..1000),
        mebibytes in 0u64..1_000_000,
        soft: bool,
        pids in 0u32..=4_194_304,
        nice in -20..=19,
        oom_score_adj in -1000..=1000,
    ) -> pb::Resources {
        pb::Resources {
            cpu_millicores: cpu,
            cpu_max_millicores: above.map_or(0, |above| cpu + above),
            memory_bytes: mebibytes << 20,
            memory_soft_bytes: if soft && mebibytes > 1 { (mebibytes - 1) << 20 } else { 0 },
            pids,
            nice,
            oom_score_adj,
        }
    }
}

prop_compose! {
    fn update(count: u32)(
        max_parallel in 1u32..100,
        min_ready in duration(0..60_000),
        progress_deadline in duration(60_001..86_400_000),
        auto_revert: bool,
        canary in 0..=count,
    ) -> pb::Update {
        pb::Update { max_parallel, min_ready, progress_deadline, auto_revert, canary }
    }
}

prop_compose! {
    fn rest()(
        (policy, budget_restarts) in (1i32..=3, 1u32..=10_000),
        budget_window in duration(1000..86_400_000),
        success_codes in btree_set(0u32..=99, 0..3).prop_map(Vec::from_iter),
        fatal_codes in btree_set(100u32..=255, 0..3).prop_map(Vec::from_iter),
        signal in prop_oneof![1i32..=17, 23i32..=31],
        scope in 0i32..=1,
        grace in duration(0..3_600_000),
        drain_timeout in option::of(duration(0..3_600_000)),
        constraints in vec(prop_oneof![
            Just("os = \"linux\"".to_owned()),
            "label[.][a-z]{1,5} != \"[a-z]{0,5}\"",
        ], 0..3),
        spread in prop_oneof![Just("host".to_owned()), "label[.][a-z]{1,5}"],
        on_disconnect in 1i32..=2,
        priority in proptest::option::of(0u32..=100),
    ) -> (pb::Restart, pb::Stop, pb::Placement) {
        (
            pb::Restart { policy, budget_restarts, budget_window, success_codes, fatal_codes },
            pb::Stop { signal, scope, grace, drain_timeout: drain_timeout.flatten() },
            pb::Placement { constraints, spread, on_disconnect, priority },
        )
    }
}

type Beside = (Vec<pb::Artifact>, Vec<pb::File>, Vec<String>, bool, BTreeMap<String, String>);

fn beside() -> impl Strategy<Value = Beside> {
    let made_of = prop_oneof![
        text().prop_map(|content| (content, String::new())),
        "/[a-z]{1,9}".prop_map(|source| (String::new(), source)),
    ];
    let mode = prop_oneof![Just(0u32), 1u32..=0o777];
    let file = (made_of, any::<bool>(), mode, prop_oneof![Just(String::new()), Just("root".to_owned())]);
    let files = btree_map("[a-z]{1,4}(/[A-Z.]{3,5})?", file, 0..3).prop_map(|files| {
        let file = |(path, ((content, source), verbatim, mode, owner))| pb::File {
            path,
            content,
            source,
            verbatim,
            mode,
            owner,
        };
        let mut files: Vec<pb::File> = files.into_iter().map(file).collect();
        // A file is no directory of another.
        files.retain(|file| file.path.len() > 4 || !file.path.contains('/'));
        let flat: Vec<String> =
            files.iter().filter(|f| !f.path.contains('/')).map(|f| format!("{}/", f.path)).collect();
        files.retain(|file| !flat.iter().any(|folder| file.path.starts_with(folder)));
        files
    });
    let secrets = btree_map("[a-z][a-z0-9._-]{0,9}", "/[a-z]{1,9}", 0..3);
    let archive = prop_oneof![Just("none"), Just("tar.gz"), Just("tar.zst"), Just("zip")];
    let artifacts =
        btree_map("[a-z]{1,9}", ("(https?|file)://[a-z]{1,9}/[a-z.]{1,9}", "[0-9a-f]{64}", archive), 0..3)
            .prop_map(|artifacts| {
                let artifact = |(name, (url, sha256, archive)): (String, (String, String, &str))| {
                    let url = url.replace("file://", "file:///");
                    pb::Artifact { name, url, sha256, archive: archive.to_owned() }
                };
                artifacts.into_iter().map(artifact).collect::<Vec<_>>()
            });
    (artifacts, files, vec("/[a-z]{1,9}", 0..3), any::<bool>(), secrets)
}

fn rlimit_name() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(crate::limits::RLIMIT_NAMES)
}

prop_compose! {
    fn isolation()(
        (shared_tmp, host_names, read_only, landlock) in any::<(bool, bool, bool, bool)>(),
        capabilities in vec(prop_oneof![Just("CAP_KILL".to_owned()), Just("CAP_CHOWN".to_owned())], 0..3),
        hide in vec("/[a-z]{1,5}", 0..3),
        (read, write) in (vec("/[a-z]{0,5}", 0..3), vec("/[a-z]{0,5}", 0..3)),
        seccomp in 0i32..=1,
    ) -> pb::Isolation {
        pb::Isolation {
            shared_tmp,
            host_names,
            new_privileges: false,
            capabilities,
            read_only,
            hide,
            landlock,
            read: if landlock { read } else { Vec::new() },
            write: if landlock || read_only { write } else { Vec::new() },
            seccomp,
        }
    }
}

fn hook() -> impl Strategy<Value = Option<pb::Hook>> {
    option::of(
        (command(), duration(100..3_600_000)).prop_map(|(command, timeout)| pb::Hook { command, timeout }),
    )
}

/// `pre_stop` is left out where the grace, which it is part of, is too short for it.
fn hooks() -> impl Strategy<Value = pb::Hooks> {
    (hook(), hook(), hook(), hook()).prop_map(|(pre_start, post_start, pre_stop, post_stop)| pb::Hooks {
        pre_start,
        post_start,
        pre_stop,
        post_stop,
    })
}

fn within(hooks: Option<pb::Hooks>, stop: &pb::Stop) -> Option<pb::Hooks> {
    let (hooks, grace) = (hooks?, stop.grace.as_ref().and_then(|grace| Duration::try_from(*grace).ok())?);
    let fits = |hook: &pb::Hook| {
        hook.timeout.is_some_and(|timeout| Duration::try_from(timeout).is_ok_and(|timeout| timeout < grace))
    };
    let hooks = pb::Hooks { pre_stop: hooks.pre_stop.filter(fits), ..hooks };
    (hooks != pb::Hooks::default()).then_some(hooks)
}

fn manifest() -> impl Strategy<Value = pb::Manifest> {
    let count = prop_oneof![Just(None), (0u32..=COUNT_MAX).prop_map(Some)];
    (ports(), count).prop_flat_map(|(ports, count)| {
        (
            (name(), command(), btree_set("db-[a-z]{1,5}", 0..3)),
            btree_map("[A-FX_][A-Z0-9_]{0,6}", text(), 0..4),
            prop_oneof![Just(String::new()), "[a-z][a-z0-9-]{0,9}", "[1-9][0-9]{0,5}"],
            prop_oneof![Just(String::new()), "/[ -~]{0,9}"],
            health(&ports),
            resources(),
            (
                update(count.unwrap_or(0)),
                option::of(isolation()),
                btree_map(rlimit_name(), any::<i64>(), 0..3),
                option::of(hooks()),
            ),
            rest(),
            (1u64..1000, duration(1000..86_400_000)),
            beside(),
        )
            .prop_map(
                move |(names, env, user, working_dir, health, resources, more, rest, logs, beside)| {
                    let (name, command, needs) = names;
                    let (update, isolation, rlimits, hooks) = more;
                    let (restart, stop, placement) = rest;
                    let is_job = count == Some(1)
                        && health.is_none()
                        && update.canary == 0
                        && restart.policy() != pb::RestartPolicy::Always;
                    let odd = name.len() % 2;
                    let schedule =
                        ["", "30 2 * * 1-5 Europe/Berlin"][if is_job { odd } else { 0 }].to_owned();
                    let policy = i32::from(odd == 1) + 1;
                    let hooks = within(hooks, &stop);
                    pb::Manifest {
                        kind: if is_job { pb::Kind::Job } else { pb::Kind::Service }.into(),
                        schedule,
                        job: is_job.then_some(pb::Job { overlap: policy, missed: policy }),
                        name,
                        command,
                        count: count.unwrap_or(0),
                        per_host: count.is_none(),
                        env,
                        user,
                        working_dir,
                        allow: (odd == 1 && !ports.is_empty())
                            .then(|| pb::AllowedCallers { callers: needs.iter().cloned().collect() }),
                        needs: needs.into_iter().collect(),
                        ports: ports.clone(),
                        health,
                        restart: Some(restart),
                        resources: Some(resources),
                        update: Some(update),
                        stop: Some(stop),
                        placement: Some(placement),
                        logs: Some(pb::Logs { max_size_bytes: logs.0 << 20, max_age: logs.1 }),
                        artifacts: beside.0,
                        files: beside.1,
                        env_files: beside.2,
                        data: beside.3 && count.unwrap_or(0) <= 256,
                        secrets: beside.4,
                        isolation,
                        // What a file cannot write is no limit.
                        rlimits: rlimits
                            .into_iter()
                            .map(|(name, limit)| (name.to_owned(), u64::try_from(limit).unwrap_or(u64::MAX)))
                            .collect(),
                        hooks,
                    }
                },
            )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_manifest_reads_the_same_in_every_format(manifest in manifest()) {
        prop_assert_eq!(validate(&manifest), Ok(()));
        let read = |text: &str, format| parse(text, format, "f").map_err(|error| {
            TestCaseError::fail(format!("{error}\n{text}"))
        });
        let json = serde_json::to_string_pretty(&to_json(&manifest)).unwrap();
        prop_assert_eq!(&read(&to_toml(&manifest), Format::Toml)?, &manifest);
        prop_assert_eq!(&read(&json, Format::Json)?, &manifest);
        // JSON is YAML.
        prop_assert_eq!(&read(&json, Format::Yaml)?, &manifest);
        prop_assert_eq!(diff(Some(&manifest), &manifest), vec![]);
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "[ -~\n\té]{0,200}") {
        for format in [Format::Toml, Format::Yaml, Format::Json] {
            let _ = parse(&text, format, "f");
        }
    }

    #[test]
    fn no_damage_to_a_manifest_makes_the_parser_panic(
        at in 0usize..1700,
        remove in 0usize..20,
        insert in "[ -~\n]{0,9}",
    ) {
        let mut text = DESIGN.to_owned();
        let start = at.min(text.len());
        let end = (start + remove).min(text.len());
        text.replace_range(start..end, &insert);
        if let Err(error) = parse(&text, Format::Toml, "f") {
            prop_assert!(!error.problems.is_empty());
        }
    }
}
