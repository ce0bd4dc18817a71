//! The table of mistakes: what is written, and every word of the answer.

use super::*;

/// The message for a body under a valid beginning; lines therefore count from 3.
fn told(body: &str) -> String {
    let text = format!("name = \"web\"\ncommand = [\"true\"]\n{body}");
    match parse(&text, Format::Toml, "f") {
        Ok(_) => format!("accepted: {body}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_mistake_in_a_value_is_answered_in_place() {
    for (body, message) in [
        ("count = -1", "f:3:9: count: must be 0 or more, not the number -1"),
        ("count = \"3\"", "f:3:9: count: must be a whole number, not the text \"3\""),
        ("count = 3.5", "f:3:9: count: must be a whole number, not the number 3.5"),
        ("count = 10001", "f:3:9: count: must be at most 10000, not 10001"),
        ("count = 99999999999", "f:3:9: count: must be less than 4294967296, not the number 99999999999"),
        (
            "count = 99999999999999999999",
            "f:3:9: count: must be a whole number, not the number 99999999999999999999",
        ),
        (
            "count = 2\nper_host = true",
            "f:3:9: count: count and per_host = true contradict each other; leave one of them out",
        ),
        ("per_host = 1", "f:3:12: per_host: must be true or false, not the number 1"),
        ("user = \"No Body\"", "f:3:8: user: \"No Body\" is neither a user's name nor a uid"),
        ("working_dir = \"srv\"", "f:3:15: working_dir: must be absolute, such as \"/srv/web\", not \"srv\""),
        ("needs = [\"web\"]", "f:3:10: needs[0]: \"web\" needs itself, so it could never start"),
        ("needs = [\"db\", \"db\"]", "f:3:16: needs[1]: \"db\" is listed twice"),
        (
            "allow = [\"db\"]",
            "f:3:9: allow: nobody can call a service without ports; add one, such as [ports.http]",
        ),
        (
            "allow = [\"db\", \"db\"]\n[ports.a]\nprotocol = \"http\"",
            "f:3:16: allow[1]: \"db\" is listed twice",
        ),
        (
            "allow = [\"host/north/gid/3\"]\n[ports.a]\nprotocol = \"http\"",
            "f:3:10: allow[0]: \"host/north/gid/3\" is neither a service nor a user of a host, such as \"host/north/uid/1000\"",
        ),
        ("allow = \"db\"", "f:3:9: allow: must be a list of texts, such as [\"web\"], not the text \"db\""),
        ("needs = \"db\"", "f:3:9: needs: must be a list of texts, such as [\"db\"], not the text \"db\""),
        ("needs = [1]", "f:3:10: needs[0]: must be text in quotes, not the number 1"),
        (
            "needs = [\"My_Db\"]",
            "f:3:10: needs[0]: \"My_Db\" has 'M'; a service's name has only a-z, 0-9 and -",
        ),
        (
            "env = { \"1A\" = \"x\" }",
            "f:3:16: env.1A: a variable's name has letters, digits and _, and no digit first",
        ),
        ("env = { NAVE_X = \"x\" }", "f:3:18: env.NAVE_X: NAVE_X is set by Nave; choose another name"),
        ("env = { A = 1.10 }", "f:3:13: env.A: must be text in quotes, not the number 1.1"),
        ("env = { A = \"\\u0000\" }", "f:3:13: env.A: has a NUL byte, which no variable can have"),
        ("env = []", "f:3:7: env: it must be a table, such as { LOG_LEVEL = \"info\" }, not a list"),
        ("count = 2026-11-26", "f:3:9: count: must be a whole number, not the time 2026-11-26"),
    ] {
        assert_eq!(told(body), message);
    }
}

#[test]
fn a_mistake_in_files_and_secrets_is_answered_in_place() {
    for (body, message) in [
        ("[[file]]\npath = \"a\"", "f:3:1: file[0]: has nothing to be made of; add content or source"),
        (
            "[[file]]\npath = \"a\"\ncontent = \"x\"\nsource = \"/b\"",
            "f:6:10: file[0].source: content and source contradict each other; leave one of them out",
        ),
        (
            "[[file]]\npath = \"../a\"\ncontent = \"x\"",
            "f:4:8: file[0].path: \"../a\" must go straight down: without empty parts, . and ..",
        ),
        (
            "[[file]]\npath = \"/etc/a\"\ncontent = \"x\"",
            "f:4:8: file[0].path: must be relative, not \"/etc/a\": files are made in the directory NAVE_FILES",
        ),
        (
            "[[file]]\npath = \"a\"\ncontent = \"x\"\n[[file]]\npath = \"a/b\"\ncontent = \"x\"",
            "f:7:8: file[1].path: \"a/b\" cannot be beside \"a\": one is a directory of the other",
        ),
        (
            "[[file]]\npath = \"a\"\ncontent = \"x\"\nmode = \"4755\"",
            "f:6:8: file[0].mode: \"4755\" is not a mode, for instance \"0640\"",
        ),
        (
            "[[file]]\npath = \"a\"\ncontents = \"x\"",
            "f:3:1: file[0]: has nothing to be made of; add content or source\nf:5:1: file[0].contents: unknown key; \
             did you mean `content`?",
        ),
        ("file = \"a\"", "f:3:8: file: must be a list of tables, such as [[file]], not the text \"a\""),
        (
            "env_file = [\"web.env\"]",
            "f:3:13: env_file[0]: must be the absolute path of a file on the host, not \"web.env\"",
        ),
        (
            "[secrets]\npassword = \"hunter2\"",
            "f:4:12: secrets.password: must be the absolute path of a file on the host, not \"hunter2\"",
        ),
        (
            "[secrets]\n\".x\" = \"/x\"",
            "f:4:8: secrets.\".x\": a secret's name has letters, digits, . _ and -, at most 64, and no . first",
        ),
        (
            "[[artifact]]\nname = \"tool\"\nurl = \"ftp://x/y\"\nsha256 = \"abc\"",
            "f:5:7: artifact[0].url: must be an https, http or file:///… URL, not \"ftp://x/y\"\nf:6:10: \
             artifact[0].sha256: must be 64 digits 0-9 a-f, as `sha256sum` prints them: nothing is fetched that is not \
             known",
        ),
        ("data = \"yes\"", "f:3:8: data: must be true or false, not the text \"yes\""),
    ] {
        assert_eq!(told(body), message);
    }
}

#[test]
fn a_mistake_in_hooks_is_answered_in_place() {
    for (body, message) in [
        (
            "[hooks]\npre_start = [\"true\"]",
            "f:4:13: hooks.pre_start: it must be a table, such as { command = [\"/srv/migrate\"], timeout = \"30s\" }, \
             not a list",
        ),
        (
            "[hooks.pre_start]\ntimeout = \"5s\"",
            "f:3:8: hooks.pre_start.command: is missing; list the program and its arguments, such as [\"sleep\", \"60\"]",
        ),
        (
            "[hooks]\npost_stop = { command = [\"true\"], timeout = \"0s\" }",
            "f:4:45: hooks.post_stop.timeout: must be 100ms to 1h, not 0s",
        ),
        (
            "[stop]\ngrace = \"5s\"\n[hooks]\npre_stop = { command = [\"true\"], timeout = \"5s\" }",
            "f:6:44: hooks.pre_stop.timeout: 5s is not less than stop.grace, 5s, which it is part of: no time would be \
             left to obey the stop signal",
        ),
        (
            "[hooks]\nprestart = { command = [\"true\"] }",
            "f:4:1: hooks.prestart: unknown key; did you mean `pre_start`?",
        ),
        ("[hooks]", "f:3:2: hooks: has no hook; add one of pre_start, post_start, pre_stop or post_stop"),
    ] {
        assert_eq!(told(body), message);
    }
}

#[test]
fn a_mistake_in_a_job_is_answered_in_place() {
    for (body, part) in [
        ("schedule = \"0 3 * * *\"", "f:3:12: schedule: only a job has a schedule; say kind = \"job\""),
        ("[job]\noverlap = \"skip\"", "job: is for jobs; say kind = \"job\""),
        ("kind = \"cron\"", "f:3:8: kind: "),
        ("kind = \"job\"\ncount = 2", "f:4:9: count: a job has one process at a time, not 2; leave it out"),
        (
            "kind = \"job\"\nper_host = true",
            "f:4:12: per_host: a job runs on one host at a time; leave it out",
        ),
        (
            "kind = \"job\"\nschedule = \"hourly\"",
            "f:4:12: schedule: has five fields and perhaps a time zone",
        ),
        ("kind = \"job\"\nschedule = \"0 3 * * * Mars\"", "failed to find timezone Mars"),
        ("kind = \"job\"\nschedule = \"0 0 30 2 *\"", "f:4:12: schedule: is never due: no year"),
        (
            "kind = \"job\"\n[restart]\npolicy = \"always\"",
            "restart.policy: always would never let a job end",
        ),
        ("kind = \"job\"\n[health]\nexec = [\"true\"]", "health: a job is done when it ends"),
        ("kind = \"job\"\n[job]\noverlap = \"both\"", "f:5:11: job.overlap: "),
    ] {
        assert!(told(body).contains(part), "{body}: {}", told(body));
    }
}

#[test]
fn a_mistake_in_logs_is_answered_in_place() {
    for (body, message) in [
        ("[logs]\nmax_size = \"1KiB\"", "f:4:12: logs.max_size: must be 64KiB to 1TiB, not 1KiB"),
        (
            "[logs]\nmax_size = \"0B\"",
            "f:4:12: logs.max_size: 0 bytes hold no line; leave the key out for 50MiB",
        ),
        (
            "[logs]\nmax_size = 50",
            "f:4:12: logs.max_size: must be a size in quotes, such as \"50MiB\", not the number 50",
        ),
        ("[logs]\nmax_age = \"500ms\"", "f:4:11: logs.max_age: must be 1s to 3650d, not 500ms"),
        ("[logs]\nmax_sise = \"1MiB\"", "f:4:1: logs.max_sise: unknown key; did you mean `max_size`?"),
        ("[logging]\nmax_size = \"1MiB\"", "f:3:2: logging: unknown key; did you mean `logs`?"),
    ] {
        assert_eq!(told(body), message);
    }
}

#[test]
fn a_mistake_in_ports_is_answered_in_place() {
    for (body, message) in [
        (
            "[ports.dns]\nprotocol = \"udp\"",
            "f:4:12: ports.dns.protocol: udp is not supported: Nave balances connections, and udp has none; use \
             http, http2, grpc or tcp",
        ),
        (
            "[ports.web]\nprotocol = \"https\"",
            "f:4:12: ports.web.protocol: services speak plain http to their own host, Nave encrypts between hosts; \
             use http, or tcp when the process does its own TLS",
        ),
        (
            "[ports.web]\nprotocol = \"htp\"",
            "f:4:12: ports.web.protocol: must be one of http, http2, grpc, tcp, not \"htp\"; did you mean \"http\"?",
        ),
        ("[ports.web]", "f:3:8: ports.web.protocol: is missing; one of http, http2, grpc, tcp"),
        (
            "[ports.api]\nprotocol = \"grpc\"",
            "f:3:8: ports.api.service_port: is missing: the port that callers use; only http has a default, 80",
        ),
        (
            "[ports.web]\nprotocol = \"http\"\nservice_port = 65536",
            "f:5:16: ports.web.service_port: must be 1 to 65535, not 65536",
        ),
        (
            "[ports.web]\nprotocol = \"http\"\nport = 0",
            "f:5:8: ports.web.port: 0 is not a port; leave the key out for a port that the agent picks",
        ),
        (
            "[ports]\na = { protocol = \"http\" }\nb = { protocol = \"http\" }",
            "f:5:1: ports.b.service_port: 80 is the service_port of \"a\" too",
        ),
        (
            "[ports]\na = { protocol = \"http\", port = 9 }\nb = { protocol = \"tcp\", service_port = 9, port = 9 }",
            "f:5:50: ports.b.port: 9 is the port of \"a\" too",
        ),
        (
            "[ports.web]\nprotocol = \"http\"\ncalls = { timeout = \"1s\", try_timeout = \"2s\" }",
            "f:5:41: ports.web.calls.try_timeout: 2s is longer than timeout, 1s, so it would never be felt",
        ),
        (
            "[ports.web]\nprotocol = \"http\"\n[ports.web.calls]\nretries = 11",
            "f:6:11: ports.web.calls.retries: must be at most 10, not 11",
        ),
        (
            "[ports.web]\nprotocol = \"http\"\n[ports.web.calls]\nmax_requests = 0",
            "f:6:16: ports.web.calls.max_requests: must be 1 to 1000000, not 0",
        ),
        (
            "[ports.web]\nprotocol = \"http\"\n[ports.web.calls]\nhash_header = \"X User\"",
            "f:6:15: ports.web.calls.hash_header: must be the name of a header, such as \"X-User\", of at most 64 \
             characters",
        ),
        (
            "[ports.db]\nprotocol = \"tcp\"\nservice_port = 5432\ncalls = { timeout = \"1s\" }",
            "f:6:21: ports.db.calls.timeout: tcp has connections and no requests; idle_timeout and max_connections \
             are theirs",
        ),
        (
            "[ports.web]\nprotocol = \"http\"\n[ports.web.calls]\nidle_timeout = \"10ms\"",
            "f:6:16: ports.web.calls.idle_timeout: must be 1s to 1d, not 10ms",
        ),
        (
            "[ports.web]\nprotocol = \"http\"\n[ports.web.calls]\nretrys = 3",
            "f:6:1: ports.web.calls.retrys: unknown key; did you mean `retries`?",
        ),
        (
            "[ports.Web]\nprotocol = \"http\"",
            "f:3:8: ports.Web: a port's name has a-z, 0-9 and -, a letter first, at most 32",
        ),
        (
            "[ports]\nprotocol = \"http\"",
            "f:4:12: ports.protocol: a port has a name of its own; write [ports.http] above protocol",
        ),
        (
            "env = { PORT = \"1\" }\n[ports.web]\nprotocol = \"http\"",
            "f:3:16: env.PORT: PORT is set by Nave; choose another name",
        ),
    ] {
        assert_eq!(told(body), message);
    }
}

#[test]
fn a_mistake_in_health_is_answered_in_place() {
    let web = "ports.web.protocol = \"http\"\n";
    for (body, message) in [
        (
            "[health]\nhttp = \"/\"",
            "f:4:8: health.http: the http check needs a port; add one, such as [ports.http]",
        ),
        (
            "[health]\ninterval = \"1s\"",
            "f:3:2: health: has no check; add one of http, tcp, grpc, exec, notify, notify_fd or log",
        ),
        (
            "[health]",
            "f:3:2: health: has no check; add one of http, tcp, grpc, exec, notify, notify_fd or log",
        ),
        (
            "[health.live]\ntimeout = \"1s\"",
            "f:3:9: health.live: has no check; add one of http, tcp, grpc, exec or notify",
        ),
        (
            "[health]\nnotify = true\nexec = [\"true\"]",
            "f:5:8: health.exec: a second check beside notify; keep one of the two",
        ),
        ("[health]\nnotify_fd = 2", "f:4:13: health.notify_fd: must be 3 to 255, not 2"),
        (
            "[health]\nlog = \"ready (\"",
            "f:4:7: health.log: is not a regular expression: error: unclosed group",
        ),
        (
            "[health]\nexec = [\"true\"]\nstart_grace = \"1m\"",
            "f:5:15: health.start_grace: says nothing without [health.live]",
        ),
        ("[health.live]\nlog = \"x\"", "f:4:1: health.live.log: unknown key; it belongs in [health]"),
        ("[health]\ntcp = false", "f:4:7: health.tcp: false says nothing here; leave the key out"),
        (
            "[health]\nexec = []",
            "f:4:8: health.exec: is missing; list the program and its arguments, such as [\"sleep\", \"60\"]",
        ),
        (
            "[health]\nexec = \"curl -f localhost\"",
            "f:4:8: health.exec: must be a list, one text for each argument, such as [\"curl\", \"-f\", \"localhost\"]",
        ),
        (
            "[health]\nnotify = true\nport = \"web\"",
            "f:5:8: health.port: notify checks no port; leave the key out",
        ),
        (
            &format!("{web}[health]\nhttp = \"healthz\""),
            "f:5:8: health.http: must be a path that begins with /, such as \"/healthz\", not \"healthz\"",
        ),
        (
            &format!("{web}[health]\nhttp = \"/\"\nport = \"wed\""),
            "f:6:8: health.port: there is no port \"wed\", only web",
        ),
        (
            &format!("{web}[health]\nhttp = \"/\"\nport = 80"),
            "f:6:8: health.port: must be the name of one of [ports], not the number 80",
        ),
        (
            &format!("{web}[health]\nhttp = \"/\"\ninterval = \"10\""),
            "f:6:12: health.interval: \"10\" lacks a unit; write \"10s\" for seconds (d, h, m, s, ms)",
        ),
        (
            &format!("{web}[health]\nhttp = \"/\"\ninterval = 10"),
            "f:6:12: health.interval: must be a duration in quotes, such as \"10s\", not the number 10",
        ),
        (
            &format!("{web}[health]\nhttp = \"/\"\ntimeout = \"0s\""),
            "f:6:11: health.timeout: must be 1ms to 5m, not 0s",
        ),
        (
            &format!("{web}ports.adm = {{ protocol = \"http\", service_port = 81 }}\n[health]\nhttp = \"/\""),
            "f:6:8: health.http: there are several ports; say which one to check with port, one of adm, web",
        ),
        (
            "ports.api = { protocol = \"grpc\", service_port = 81 }\n[health]\nhttp = \"/\"",
            "f:5:8: health.http: port \"api\" speaks grpc; use grpc = true or check another port",
        ),
    ] {
        assert_eq!(told(body), message);
    }
}

#[test]
fn a_mistake_in_the_other_tables_is_answered_in_place() {
    for (body, message) in [
        (
            "[restart]\npolicy = \"onfailure\"",
            "f:4:10: restart.policy: must be one of always, on-failure, never, not \"onfailure\"; did you mean \
             \"on-failure\"?",
        ),
        (
            "[restart]\nbudget = \"10\"",
            "f:4:10: restart.budget: \"10\" is not a budget, for instance \"10 in 5m\"",
        ),
        (
            "[restart]\nbudget = \"10 in 5\"",
            "f:4:10: restart.budget: \"5\" lacks a unit; write \"5s\" for seconds (d, h, m, s, ms)",
        ),
        (
            "[restart]\nbudget = \"0 in 5m\"",
            "f:4:10: restart.budget: 0 restarts are none: set policy = \"never\" instead",
        ),
        (
            "[resources]\ncpu = 0",
            "f:4:7: resources.cpu: 0 cores is nothing; leave the key out to reserve none",
        ),
        ("[resources]\ncpu = -1", "f:4:7: resources.cpu: -1 is not a number of cores"),
        (
            "[resources]\ncpu = \"500m\"",
            "f:4:7: resources.cpu: must be a number of cores, such as 0.5, not the text \"500m\"",
        ),
        (
            "[resources]\ncpu = 2\ncpu_max = 1",
            "f:5:11: resources.cpu_max: 1 is less than the 2 reserved by cpu",
        ),
        (
            "[resources]\nmemory = \"0MiB\"",
            "f:4:10: resources.memory: 0 bytes is nothing; leave the key out for no limit",
        ),
        (
            "[resources]\nmemory = \"128M\"",
            "f:4:10: resources.memory: \"128M\" has an ambiguous unit; write \"128MiB\"",
        ),
        (
            "[resources]\nmemory = 128",
            "f:4:10: resources.memory: must be a size in quotes, such as \"128MiB\", not the number 128",
        ),
        ("[resources]\nmemory = \"4KiB\"", "f:4:10: resources.memory: must be 1MiB to 1024TiB, not 4KiB"),
        (
            "[resources]\nmemory = \"64MiB\"\nmemory_soft = \"64MiB\"",
            "f:5:15: resources.memory_soft: 64MiB is not less than the hard limit, 64MiB, so it would never be felt",
        ),
        ("[resources]\nnice = -21", "f:4:8: resources.nice: must be -20 to 19, not -21"),
        (
            "[resources]\noom_score_adj = 1001",
            "f:4:17: resources.oom_score_adj: must be -1000 to 1000, not 1001",
        ),
        (
            "[resources]\npids = 0",
            "f:4:8: resources.pids: 0 processes are none; leave the key out for the default",
        ),
        ("[rlimits]\nnofiel = 1", "f:4:1: rlimits.nofiel: unknown key; did you mean `nofile`?"),
        (
            "[rlimits]\nnofile = -1",
            "f:4:10: rlimits.nofile: must be a whole number, a size such as \"64MiB\" or \"unlimited\", not the \
             number -1",
        ),
        (
            "[restart]\nsuccess_codes = [3]\nfatal_codes = [3]",
            "f:5:16: restart.fatal_codes[0]: 3 is one of success_codes too",
        ),
        (
            "[restart]\nfatal_codes = [256]",
            "f:4:16: restart.fatal_codes[0]: an exit code is 0 to 255, not 256",
        ),
        (
            "[isolation]\ncapabilities = [\"NET_BIND_SERVIC\"]",
            "f:4:17: isolation.capabilities[0]: \"CAP_NET_BIND_SERVIC\" is not a capability; did you mean \"CAP_NET_BIND_SERVICE\"?",
        ),
        ("[isolation]\nread = [\"/srv\"]", "f:4:8: isolation.read: says nothing without landlock = true"),
        (
            "[isolation]\nhide = [\"home\"]",
            "f:4:9: isolation.hide[0]: must be absolute and without .., such as \"/srv\", not \"home\"",
        ),
        (
            "[isolation]\nseccomp = \"strict\"",
            "f:4:11: isolation.seccomp: must be one of standard, offline, not \"strict\"",
        ),
        (
            "[isolation]\nlandlock = true\nnew_privileges = true",
            "f:5:18: isolation.new_privileges: contradicts landlock and seccomp, which a setuid program must not \
             escape",
        ),
        (
            "[update]\nmax_parallel = 0",
            "f:4:16: update.max_parallel: must be at least 1, or nothing could ever be replaced",
        ),
        ("[update]\ncanary = 2", "f:4:10: update.canary: must be at most count, 1, not 2"),
        (
            "[update]\nmin_ready = \"2m\"\nprogress_deadline = \"1m\"",
            "f:5:21: update.progress_deadline: 1m is not longer than min_ready, 2m, so every update would fail",
        ),
        ("[update]\nmin_ready = \"2h\"", "f:4:13: update.min_ready: must be 0s to 1h, not 2h"),
        (
            "[stop]\nsignal = \"SIGTREM\"",
            "f:4:10: stop.signal: \"SIGTREM\" is not a signal; did you mean \"SIGTERM\"?",
        ),
        (
            "[stop]\nsignal = 15",
            "f:4:10: stop.signal: must be a signal's name in quotes, such as \"SIGTERM\", not the number 15",
        ),
        (
            "[stop]\nsignal = \"SIGSTOP\"",
            "f:4:10: stop.signal: SIGSTOP ends no process; SIGTERM asks it to end",
        ),
        (
            "[stop]\ngrace = \"1.5s\"",
            "f:4:9: stop.grace: \"1.5s\" has a fraction; use a smaller unit, for instance \"1s500ms\"",
        ),
        (
            "[placement]\nspread = \"rack\"",
            "f:4:10: placement.spread: spread is \"host\" or \"label.NAME\", not \"rack\"",
        ),
        ("[placement]\npriority = 101", "f:4:12: placement.priority: must be at most 100, not 101"),
        (
            "[placement]\non_disconnect = \"kill\"",
            "f:4:17: placement.on_disconnect: must be one of keep, stop, not \"kill\"",
        ),
        ("stop = 3", "f:3:8: stop: it must be a table, such as { grace = \"10s\" }, not the number 3"),
    ] {
        assert_eq!(told(body), message);
    }
    let constraint = told("[placement]\nconstraints = ['os = linux']");
    assert!(constraint.starts_with("f:4:16: placement.constraints[0]: "), "{constraint}");
}

#[test]
fn a_misspelt_key_is_answered_with_the_one_that_was_meant() {
    for (body, message) in [
        ("coutn = 3", "f:3:1: coutn: unknown key; did you mean `count`?"),
        ("replicas = 3", "f:3:1: replicas: unknown key; did you mean `count`?"),
        ("depends_on = [\"db\"]", "f:3:1: depends_on: unknown key; did you mean `needs`?"),
        ("working-dir = \"/\"", "f:3:1: working-dir: unknown key; did you mean `working_dir`?"),
        ("max_parallel = 2", "f:3:1: max_parallel: unknown key; it belongs in [update]"),
        ("grace = \"2s\"", "f:3:1: grace: unknown key; it belongs in [stop]"),
        (
            "[ports.web]\nprotcol = \"http\"",
            "f:4:1: ports.web.protcol: unknown key; did you mean `protocol`?",
        ),
        ("[stop]\ntimeout = \"2s\"", "f:4:1: stop.timeout: unknown key; did you mean `grace`?"),
        (
            "[health.live]\nexec = [\"true\"]\ninterva = \"1s\"",
            "f:5:1: health.live.interva: unknown key; did you mean `interval`?",
        ),
        (
            "[restart]\nbanana = 1",
            "f:4:1: restart.banana: unknown key; known here: policy, budget, success_codes, fatal_codes",
        ),
        (
            "\"a b\" = 1\n[restart]\nx = 1",
            "f:3:1: \"a b\": unknown key; known here: name, command, count, per_host, kind, schedule, env, user, working_dir, needs, allow, ports, health, restart, resources, update, stop, placement, logs, file, env_file, data, secrets, isolation, rlimits, artifact, job, hooks\nf:5:1: restart.x: unknown key; known here: policy, budget, success_codes, fatal_codes",
        ),
    ] {
        assert_eq!(told(body), message);
    }
}

#[test]
fn names_and_commands_must_be_there_and_possible() {
    for (text, message) in [
        (
            "",
            "f:1:1: name: is missing; give the service a name, such as \"web\"\n\
             f:1:1: command: is missing; list the program and its arguments, such as [\"sleep\", \"60\"]",
        ),
        // One mistake, one answer: that the misspelt key is missing is not said as well.
        ("name = \"web\"\ncomand = [\"true\"]", "f:2:1: comand: unknown key; did you mean `command`?"),
        (
            "name = \"Web Server\"\ncommand = [\"true\"]",
            "f:1:8: name: \"Web Server\" has 'W'; a service's name has only a-z, 0-9 and -",
        ),
        (
            "name = \"-web\"\ncommand = [\"true\"]",
            "f:1:8: name: \"-web\" must begin and end with a letter or digit",
        ),
        ("name = 7\ncommand = [\"true\"]", "f:1:8: name: must be text in quotes, not the number 7"),
        (
            "name = \"web\"\ncommand = []",
            "f:2:11: command: is missing; list the program and its arguments, such as [\"sleep\", \"60\"]",
        ),
        (
            "name = \"web\"\ncommand = [\"\"]",
            "f:2:12: command[0]: is empty; the first text names the program",
        ),
        (
            "name = \"web\"\ncommand = [\"a\", \"b\\u0000\"]",
            "f:2:17: command[1]: has a NUL byte, which no argument can have",
        ),
        (
            "name = \"web\"\ncommand = \"sleep 60\"",
            "f:2:11: command: must be a list, one text for each argument, such as [\"sleep\", \"60\"]",
        ),
    ] {
        assert_eq!(parse(text, Format::Toml, "f").unwrap_err().to_string(), message);
    }
    let long = format!("name = \"{}\"\ncommand = [\"true\"]", "a".repeat(64));
    let error = parse(&long, Format::Toml, "f").unwrap_err().to_string();
    assert!(error.ends_with("is too long: 64 characters, at most 63"), "{error}");
}

#[test]
fn yaml_and_json_are_answered_in_place_too() {
    for (format, text, message) in [
        (
            Format::Yaml,
            "name: web\ncommand: [\"true\"]\nports:\n  http:\n    protocol: http\n    service_prot: 80\n",
            "f:6:5: ports.http.service_prot: unknown key; did you mean `service_port`?",
        ),
        (
            Format::Yaml,
            "name: web\ncommand: [\"true\"]\ncount: three\n",
            "f:3:8: count: must be a whole number, not the text \"three\"",
        ),
        (
            Format::Yaml,
            "name: web\ncommand: [\"true\"]\ncount:\n",
            "f:3:6: count: must be a whole number, not empty",
        ),
        (
            Format::Yaml,
            "name: web\nname: web\ncommand: [\"true\"]\n",
            "f:2:1: not YAML: the key \"name\" is there twice",
        ),
        (Format::Yaml, "- a\n", "f:1:1: a manifest must be a table, such as name = \"web\", not a list"),
        (Format::Yaml, "", "f:1:1: a manifest must be a table, such as name = \"web\", not empty"),
        (
            Format::Yaml,
            "name: a\n<<: {count: 1}\n",
            "f:2:1: merge keys (<<) are not YAML 1.2 and not supported; repeat the keys",
        ),
        (
            Format::Json,
            "{\n  \"name\": \"web\",\n  \"command\": [\"true\"],\n  \"stop\": {\"grase\": \"1s\"}\n}",
            "f:4:12: stop.grase: unknown key; did you mean `grace`?",
        ),
        (Format::Json, "{\"name\": \"web\",}", "f:1:16: not JSON: trailing comma"),
        (
            Format::Json,
            "{\"name\": \"é\", \"name\": \"b\"}",
            "f:1:15: not JSON: the key \"name\" is there twice",
        ),
        (Format::Json, "[]", "f:1:1: a manifest must be a table, such as name = \"web\", not a list"),
    ] {
        assert_eq!(parse(text, format, "f").unwrap_err().to_string(), message, "{text}");
    }
}

#[test]
fn text_of_another_kind_is_answered_in_place() {
    for (format, text, message) in [
        (Format::Toml, "name = \"web", "f:1:12: not TOML: invalid basic string, expected `\"`"),
        (Format::Toml, "name = \"a\"\nname = \"b\"", "f:2:1: not TOML: duplicate key"),
        (Format::Yaml, "name: [web", "f:1:7: not YAML: unclosed bracket '['"),
        (Format::Json, "", "f:1:1: not JSON: EOF while parsing a value"),
    ] {
        assert_eq!(parse(text, format, "f").unwrap_err().to_string(), message, "{text}");
    }
}

#[test]
fn all_mistakes_are_told_at_once_in_the_order_of_the_text() {
    let text = "name = \"Web\"\ncomand = [\"true\"]\ncount = -1\nneeds = [\"Web\"]\n\n[ports.http]\n\
                protocol = \"udp\"\nprot = 1\n\n[stop]\ngrace = 5\n";
    assert_eq!(
        parse(text, Format::Toml, "web.toml").unwrap_err().to_string(),
        "web.toml:1:8: name: \"Web\" has 'W'; a service's name has only a-z, 0-9 and -\n\
         web.toml:2:1: comand: unknown key; did you mean `command`?\n\
         web.toml:3:9: count: must be 0 or more, not the number -1\n\
         web.toml:4:10: needs[0]: \"Web\" has 'W'; a service's name has only a-z, 0-9 and -\n\
         web.toml:7:12: ports.http.protocol: udp is not supported: Nave balances connections, and udp has none; \
         use http, http2, grpc or tcp\n\
         web.toml:8:1: ports.http.prot: unknown key; did you mean `port`?\n\
         web.toml:11:9: stop.grace: must be a duration in quotes, such as \"10s\", not the number 5"
    );
}
