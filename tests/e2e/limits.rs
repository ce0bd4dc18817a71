//! Promise: new limits reach a process while it runs, and none is killed because a limit came too late. Who runs short of
//! memory is told before, and who was killed for it is told apart from who was not.

use std::path::PathBuf;

use nave_tests::cluster::SOON;
use nave_tests::process::send;
use nave_tests::{Cluster, Setup, eventually};
use nix::sys::signal::Signal;
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

/// One host, if it limits memory.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn with_memory_limits() -> Option<Cluster> {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let hosts = cluster.json(&["hosts"]);
    let can =
        hosts[0]["capabilities"].as_array().is_some_and(|all| all.iter().any(|one| one == "memory_limit"));
    if !can {
        eprintln!("skipped: this host has no memory controller for us");
    }
    can.then_some(cluster)
}

fn history(cluster: &Cluster, service: &str) -> String {
    cluster.nave(&["events", "--service", service]).expect(0).stdout
}

#[test]
fn memory_that_grows_behind_a_full_cache_is_told_while_the_process_lives() {
    let Some(cluster) = with_memory_limits() else { return };
    // More of its file than it may hold, then, in some seconds, nine tenths of its limit that nobody can take back.
    let script = "$m = 'x' x (1 << 20); open $f, '>', qq($ENV{NAVE_DATA}/f); print $f $m for 1..150; $f->flush; \
                  $f->sync; sub held { open S, '/proc/self/statm'; @s = split ' ', <S>; ($s[1] - $s[2]) * 4096 } \
                  while (held() < (93 << 20)) { push @x, $m . 1; select undef, undef, undef, 0.05 } sleep 1000";
    let manifest = format!(
        "name = \"leak\"\ndata = true\ncommand = [\"perl\", \"-e\", \"{script}\"]\nresources.memory = \"100MiB\"\n"
    );
    cluster.apply(&manifest, &["--wait"]).expect(0);
    let before = cluster.wait_ready("leak", 1).remove(0);
    eventually("that it is short of memory", SOON, || {
        history(&cluster, "leak").contains("is short of memory: it uses ")
    });
    let after = cluster.wait_ready("leak", 1).remove(0);
    assert_eq!((pid(&after), &after["restarts"]), (pid(&before), &0.into()), "before it was too late");
    assert!(history(&cluster, "leak").contains("of 100MiB"), "{}", history(&cluster, "leak"));
}

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn who_is_killed_by_a_person_after_its_child_ran_out_of_memory_did_not_itself() {
    let Some(cluster) = with_memory_limits() else { return };
    let parent = "name = \"parent\"\ncommand = [\"sh\", \"-c\", \"tail /dev/zero; exec sleep 1000\"]\n\
                  resources.memory = \"64MiB\"\n";
    cluster.apply(parent, &["--wait"]).expect(0);
    let process = pid(&cluster.wait_ready("parent", 1)[0]);
    let groups = std::fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap_or_default();
    if !groups.contains(":memory:") {
        eprintln!("skipped: with cgroup v2 a group that runs out of memory is killed as a whole");
        return;
    }
    let tells = |what: &str| {
        eventually(what, SOON, || history(&cluster, "parent").contains(what));
    };
    tells("had a child killed at the memory limit of 64MiB");
    send(process, Signal::SIGKILL);
    tells("was killed by SIGKILL after");
    let history = history(&cluster, "parent");
    assert!(!history.contains("ran out of memory"), "{history}");
    assert_eq!(history.matches("was killed by SIGKILL after").count(), 1, "{history}");
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
