//! Promise: new limits reach a process while it runs, and none is killed because a limit came too late.

use std::path::PathBuf;

use nave_tests::cluster::SOON;
use nave_tests::{Cluster, Setup, eventually};
use serde_json::Value;

use crate::deploy_and_serve::pid;

fn manifest(mebibytes: u32, cores: f64) -> String {
    format!(
        "name = \"hungry\"\ncommand = [\"perl\", \"-e\", \"$| = 1; $x = 'x' x (40 << 20); print qq(full\\\\n); sleep 1000\"]\n\
         health.log = \"full\"\nresources = {{ memory = \"{mebibytes}MiB\", cpu_max = {cores} }}\n"
    )
}

#[test]
fn limits_change_under_a_process_that_goes_on() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let can = |name: &str| -> bool {
        let hosts = cluster.json(&["hosts"]);
        hosts[0]["capabilities"].as_array().is_some_and(|all| all.iter().any(|one| one == name))
    };
    cluster.apply(&manifest(256, 0.5), &["--wait"]).expect(0);
    let before = cluster.wait_ready("hungry", 1).remove(0);

    let dry = cluster.apply(&manifest(128, 0.25), &["--dry-run"]).expect(0);
    assert!(dry.text().contains("its processes stay"), "{}", dry.text());
    for (mebibytes, cores) in [(128, 0.25), (192, 0.75)] {
        cluster.apply(&manifest(mebibytes, cores), &["--wait"]).expect(0);
        if can("memory_limit") {
            let bytes = u64::from(mebibytes) << 20;
            eventually(&format!("{mebibytes} MiB are in force"), SOON, || {
                memory_limit(&before) == Some(bytes)
            });
        }
    }
    let told = |what: &str| {
        eventually(what, SOON, || cluster.nave(&["events", "--service", "hungry"]).stdout.contains(what));
    };
    told("has the limits of version 3 from now on");
    // Less than it uses.
    cluster.apply(&manifest(16, 0.25), &["--wait"]).expect(0);
    if can("memory_limit") {
        told("could not be given a new limit: memory of 16MiB: it uses");
        assert_eq!(memory_limit(&before), Some(192 << 20));
    }
    let after = cluster.wait_ready("hungry", 1).remove(0);
    assert_eq!((pid(&before), &before["id"]), (pid(&after), &after["id"]));
    assert_eq!((&after["restarts"], &after["version"]), (&0.into(), &4.into()));
}

/// As the kernel has it, in whichever hierarchy.
fn memory_limit(row: &Value) -> Option<u64> {
    let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", pid(row))).ok()?;
    let v1 = groups.lines().find_map(|line| line.split_once(":memory:"));
    let file = match v1 {
        Some((_, path)) => format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes"),
        None => {
            format!("/sys/fs/cgroup{}/memory.max", groups.lines().find_map(|line| line.strip_prefix("0::"))?)
        }
    };
    std::fs::read_to_string(PathBuf::from(file)).ok()?.trim().parse().ok()
}
