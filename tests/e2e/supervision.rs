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
}
