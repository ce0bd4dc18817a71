//! Promise: a service is watched as it asked for, and whatever is done to it or ends it is explained.

use nave_tests::cluster::SOON;
use nave_tests::{Cluster, Setup, eventually, eventually_some};

/// A service that runs a shell script.
fn script(name: &str, script: &str, tables: &str) -> String {
    format!("name = \"{name}\"\ncommand = [\"sh\", \"-c\", '''{script}''']\n{tables}\n")
}

fn told(cluster: &Cluster, service: &str, what: &str) -> String {
    eventually_some(&format!("the events of {service} tell {what:?}"), SOON, || {
        let text = cluster.nave(&["events", "--service", service]).stdout;
        text.contains(what).then_some(text)
    })
}

/// Processes of the whole machine whose command line is exactly this.
fn running(command: &str) -> usize {
    let wanted = command.replace(' ', "\0") + "\0";
    let entries = std::fs::read_dir("/proc").expect("/proc is mounted").flatten();
    entries
        .filter(|entry| {
            std::fs::read(entry.path().join("cmdline")).is_ok_and(|line| line == wanted.as_bytes())
        })
        .count()
}

#[test]
fn health_comes_in_every_form_and_each_end_has_its_reason() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let mark = std::process::id();
    let hanging = format!("sleep 9{mark}");
    let ready = [
        script("line", "sleep 0.2; echo up >&3; exec sleep infinity", "health.notify_fd = 3"),
        script("words", "echo listening on 80; exec sleep infinity", "health.log = \"listening on [0-9]+\""),
        // Only from inside: its own /tmp when the agent is root, its cgroup in any case.
        script(
            "inside",
            &format!("echo x > /tmp/nave-inside-{mark}; exec sleep infinity"),
            &format!(
                "health.exec = [\"sh\", \"-c\", \"cat /tmp/nave-inside-{mark} && grep -q /nave- /proc/self/cgroup\"]"
            ),
        ),
    ];
    let others = [
        script(
            "hangs",
            "exec sleep infinity",
            &format!("[health]\nexec = [\"sleep\", \"9{mark}\"]\ninterval = \"100ms\"\ntimeout = \"100ms\""),
        ),
        script(
            "dog",
            "exec sleep infinity",
            "[health]\nstart_grace = \"0s\"\nlive = { notify = true, interval = \"200ms\" }\n",
        ),
        script("fatal", "exit 78", "restart.fatal_codes = [78]"),
        "name = \"short\"\ncommand = [\"perl\", \"-e\", \"$x = 'x' x (29 << 20); sleep 1000\"]\n\
         resources.memory = \"32MiB\"\n"
            .to_owned(),
        script(
            "stubborn",
            "trap '' TERM; (setsid sleep 1000 &); while :; do sleep 1; done",
            "stop.grace = \"300ms\"",
        ),
        script(
            "pack",
            "trap : TERM; sh -c 'trap \"exit 0\" TERM; echo up; while :; do sleep 0.05; done' & wait; wait",
            "health.log = \"up\"\n[stop]\nscope = \"group\"\ngrace = \"30s\"",
        ),
    ];
    for manifest in others.iter().chain(&ready) {
        cluster.apply(manifest, &[]).expect(0);
    }
    for service in ["line", "words", "inside"] {
        cluster.wait_ready(service, 1);
    }
    eventually("a check that hangs has failed", SOON, || {
        let rows = cluster.ps("hangs");
        rows.iter().any(|row| row["reason"].as_str().is_some_and(|why| why.contains("no answer in 100 ms")))
    });
    assert!(running(&hanging) <= 1, "checks that hang do not pile up");

    told(&cluster, "dog", "missed its watchdog");
    told(&cluster, "fatal", "restart.fatal_codes");
    let hosts = cluster.json(&["hosts"]);
    let can_limit =
        hosts[0]["capabilities"].as_array().is_some_and(|all| all.iter().any(|name| name == "memory_limit"));
    if can_limit {
        told(&cluster, "short", "is short of memory: it uses");
    }

    cluster.wait_ready("stubborn", 1);
    cluster.nave(&["delete", "stubborn"]).expect(0);
    told(&cluster, "stubborn", "was sent SIGTERM, had not ended after 300ms, was sent SIGKILL");
    // Those it left are counted.
    told(&cluster, "stubborn", "behind, which w");

    cluster.wait_ready("pack", 1);
    cluster.nave(&["delete", "pack"]).expect(0);
    told(&cluster, "pack", "was sent SIGTERM with its process group and ended after");
}

#[test]
fn what_makes_all_of_them_hang_takes_down_one_at_a_time() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let shared = cluster.dir().join("shared");
    std::fs::create_dir(&shared).expect("a folder");
    // For a user of the service's own.
    std::fs::set_permissions(&shared, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("opened");
    let at = shared.display();
    // One that starts after the trouble began is well again.
    let service = format!(
        r#"
name = "herd"
count = 3
command = ["sh", "-c", '''
trap 'echo end >> $SHARED/trace; sleep 0.5; exit 0' TERM
[ ! -e $SHARED/trouble ] || touch $SHARED/well-$NAVE_INSTANCE
echo start >> $SHARED/trace
while :; do sleep 0.05; done''']
env = {{ SHARED = "{at}" }}
[health]
start_grace = "0s"
live = {{ exec = ["sh", "-c", "[ ! -e $SHARED/trouble ] || [ -e $SHARED/well-$NAVE_INSTANCE ]"], interval = "200ms", timeout = "5s" }}
"#
    );
    cluster.apply(&service, &["--wait"]).expect(0);
    cluster.wait_ready("herd", 3);
    let trace = || std::fs::read_to_string(shared.join("trace")).unwrap_or_default();
    eventually("three have started", SOON, || trace().lines().count() == 3);
    std::fs::write(shared.join("trouble"), "").expect("written");
    eventually("all are well again", SOON, || trace().lines().count() == 9);
    let told: Vec<String> = trace().lines().skip(3).map(str::to_owned).collect();
    assert_eq!(told, ["end", "start"].repeat(3), "one was ended before another was back");
}
