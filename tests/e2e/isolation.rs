//! Promise: a service takes no more than it was given, and reaches nothing of another's or of the host's.

use std::fs;
use std::path::Path;

use nave_tests::cluster::SOON;
use nave_tests::machine::is_root;
use nave_tests::process::alive;
use nave_tests::{Cluster, Setup, eventually, eventually_some};

use crate::deploy_and_serve::pid;
use crate::manifests::sleeper;

/// A service that runs a shell script.
fn script(name: &str, script: &str, tables: &str) -> String {
    format!("name = \"{name}\"\ncommand = [\"sh\", \"-c\", '''{script}''']\n{tables}\n")
}

/// A line of /proc/PID/status.
fn status(pid: u32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

fn capabilities(cluster: &Cluster) -> Vec<String> {
    let hosts = cluster.json(&["hosts"]);
    let listed = hosts[0]["capabilities"].as_array().cloned().unwrap_or_default();
    listed.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect()
}

/// What the service has written, once `until` is in it.
fn said(cluster: &Cluster, service: &str, until: &str) -> String {
    eventually_some(&format!("{service} has said {until:?}"), SOON, || {
        let text = cluster.nave(&["logs", service]).stdout;
        text.contains(until).then_some(text)
    })
}

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn limits_hold_and_the_one_that_breaks_them_pays_alone() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let can = capabilities(&cluster);
    if !["memory_limit", "pids_limit"].iter().all(|name| can.iter().any(|known| known == name)) {
        eprintln!("skipped: this host has no memory or pids controller for us; nave hosts says {can:?}");
        return;
    }
    cluster.apply(&sleeper("calm", 1), &["--wait"]).expect(0);
    let calm = pid(&cluster.wait_ready("calm", 1)[0]);

    let hog = "name = \"hog\"\ncommand = [\"tail\", \"/dev/zero\"]\nresources.memory = \"32MiB\"\nrestart.budget = \"1 in 5m\"\n";
    cluster.apply(hog, &[]).expect(0);
    let bomb = "name = \"bomb\"\ncommand = [\"perl\", \"-e\", \"while (1) { fork; select undef, undef, undef, 0.05 }\"]\n\
                resources = { pids = 20, cpu_max = 0.1 }\nrlimits = { nofile = 123, core = \"unlimited\" }\n\
                stop.grace = \"100ms\"\n";
    cluster.apply(bomb, &[]).expect(0);

    let failed = eventually_some("the hog is given up", SOON, || {
        cluster.ps("hog").into_iter().find(|row| row["observed"] == "failed")
    });
    let reason = failed["reason"].as_str().expect("a reason");
    assert!(reason.contains("ran out of memory") && reason.contains("32MiB"), "the limit is named: {reason}");
    assert!(reason.contains("tail"), "the culprit is named: {reason}");

    let row = eventually_some("the bomb runs", SOON, || {
        cluster.ps("bomb").into_iter().find(|row| row["observed"] == "running")
    });
    let bomb = pid(&row);
    let limit = fs::read_to_string(format!("/proc/{bomb}/limits")).expect("it runs");
    let open_files = limit.lines().find(|line| line.starts_with("Max open files")).unwrap_or_default();
    assert!(open_files.split_whitespace().filter(|word| *word == "123").count() == 2, "{open_files}");
    let group = pids_group(bomb);
    eventually("the bomb has met its limit", SOON, || {
        let refused = fs::read_to_string(group.join("pids.events")).unwrap_or_default();
        refused
            .split_whitespace()
            .last()
            .and_then(|count| count.parse::<u64>().ok())
            .is_some_and(|count| count > 0)
    });
    let members = fs::read_to_string(group.join("cgroup.procs")).expect("the group is there");
    assert!(members.lines().count() <= 20, "{members}");
    assert!(alive(calm), "the neighbour has felt nothing");
    assert_eq!(pid(&cluster.ps("calm")[0]), calm);

    cluster.nave(&["delete", "bomb"]).expect(0);
    eventually("nothing of the bomb is left", SOON, || {
        fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default().is_empty()
    });
}

/// The directory of the pids controller that a process is in.
fn pids_group(pid: u32) -> std::path::PathBuf {
    let own = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("it runs");
    let path = |controller: &str| {
        own.lines().find_map(|line| line.split_once(':')?.1.strip_prefix(controller)?.strip_prefix(":/"))
    };
    match path("pids") {
        Some(path) => Path::new("/sys/fs/cgroup/pids").join(path),
        None => Path::new("/sys/fs/cgroup").join(path("").expect("every process is in cgroup2")),
    }
}

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn a_service_reaches_no_other_and_nothing_of_the_host_that_it_was_not_given() {
    if !is_root() {
        eprintln!("skipped: users, mounts and capabilities need root");
        return;
    }
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let mark = format!("nave-isolation-{}", std::process::id());
    let owner = script(
        "owner",
        &format!("echo mine > /tmp/{mark}; mkdir /var/tmp/{mark}; echo wrote; exec sleep infinity"),
        "env = { TOKEN = \"hunter2\" }\n[health]\nexec = [\"sh\", \"-c\", \"test $(id -u) != 0 && \
         grep -q 'NoNewPrivs:.1' /proc/self/status && grep -q 'CapBnd:.0*$' /proc/self/status\"]",
    );
    cluster.apply(&owner, &["--wait"]).expect(0);
    let victim = pid(&cluster.wait_ready("owner", 1)[0]);
    said(&cluster, "owner", "wrote");
    assert!(!Path::new("/tmp").join(&mark).exists() && !Path::new("/var/tmp").join(&mark).exists());
    for (name, value) in [
        ("NoNewPrivs", "1"),
        ("CapInh", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
    ] {
        assert_eq!(status(victim, name), value, "{name}");
    }

    let thief = script(
        "thief",
        &format!(
            "ls /tmp/{mark}; ls /usr/share; kill -9 {victim} && echo signalled; cat /proc/{victim}/environ; \
             cat /proc/{victim}/root/tmp/{mark}; ls -l /proc/self/fd | grep -c nave-; echo done; exec sleep infinity"
        ),
        "isolation.hide = [\"/usr/share\"]",
    );
    // A uid that is not root's and a capability all the same.
    let binder = script("binder", "exec sleep infinity", "isolation.capabilities = [\"net_bind_service\"]");
    let locked = script(
        "locked",
        "touch /etc/nave-test; ls /var/log; unshare -m true; mount -t tmpfs x /mnt; \
         touch /tmp/ok && cat /etc/hostname > /dev/null && echo alive; exec sleep infinity",
        "user = \"root\"\n[isolation]\nread_only = true\nlandlock = true\nseccomp = \"standard\"\n[health]\n\
         exec = [\"sh\", \"-c\", \"! ls /var/log && ! touch /etc/nave-test && grep -q 'Seccomp:.2' /proc/self/status\"]",
    );
    for manifest in [&thief, &binder] {
        cluster.apply(manifest, &["--wait"]).expect(0);
    }
    let told = said(&cluster, "thief", "done");
    assert_eq!(told.matches("ermission denied").count() + told.matches("not permitted").count(), 4, "{told}");
    assert!(told.contains("No such file") && !told.contains("signalled"), "{told}");
    assert!(!told.contains("hunter2") && !told.contains("mine"), "{told}");
    assert!(alive(victim));
    let thieves = pid(&cluster.ps("thief")[0]);
    assert_ne!(status(thieves, "Uid"), status(victim, "Uid"));
    let bound = pid(&cluster.ps("binder")[0]);
    assert_eq!(status(bound, "CapEff"), "0000000000000400");
    assert_ne!(status(bound, "Uid").split_whitespace().next(), Some("0"));

    if !capabilities(&cluster).iter().any(|name| name == "landlock") {
        eprintln!("the rest is skipped: this kernel has no Landlock");
        cluster.apply(&locked, &["--wait"]).expect(1);
        return;
    }
    cluster.apply(&locked, &["--wait"]).expect(0);
    let told = said(&cluster, "locked", "alive");
    for refusal in [
        "touch: cannot touch '/etc/nave-test': Read-only file system",
        "cannot open directory '/var/log': Permission denied",
        "unshare failed: Operation not permitted",
        "mount: ",
    ] {
        assert!(told.contains(refusal), "{refusal} is missing:\n{told}");
    }
    assert!(!Path::new("/etc/nave-test").exists());
}
