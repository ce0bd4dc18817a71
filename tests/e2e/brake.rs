//! Promise: when many hosts fall silent at once it is us, not them: nothing is moved, people are told, and it thaws when
//! they return.

use std::collections::BTreeSet;

use nave_tests::cluster::SOON;
use nave_tests::process::send;
use nave_tests::{Cluster, Setup, eventually};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::manifests::sleeper;

fn with_status(cluster: &Cluster, status: &str) -> usize {
    let hosts = cluster.try_json(&["hosts"]).and_then(|hosts| hosts.as_array().cloned()).unwrap_or_default();
    hosts.iter().filter(|host| host["status"] == status).count()
}

/// What says that nothing was moved: instance, host and process of each.
fn places(cluster: &Cluster) -> BTreeSet<String> {
    let text = |row: &Value| format!("{} {} {}", row["id"], row["host"], row["pid"]);
    cluster.ps("calm").iter().map(text).collect()
}

#[test]
fn four_of_ten_silent_hosts_are_not_replaced() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 10 });
    cluster.apply(&sleeper("calm", 10), &["--wait", "--timeout", "120s"]).expect(0);
    cluster.wait_ready("calm", 10);
    let before = places(&cluster);
    let agents: Vec<u32> = cluster.agents.iter().take(4).map(nave_tests::cluster::Role::agent_pid).collect();

    for agent in &agents {
        send(*agent, Signal::SIGSTOP);
    }
    // Said in the log only once the verdict was due, so a host that were to be lost would be by now.
    eventually("the brake is said", SOON, || {
        cluster
            .nave(&["hosts"])
            .stdout
            .contains("4 of 10 hosts fell silent within a minute: none is replaced")
    });
    assert_eq!((with_status(&cluster, "silent"), with_status(&cluster, "lost")), (4, 0));
    assert_eq!(places(&cluster), before, "nothing was moved");

    for agent in &agents {
        send(*agent, Signal::SIGCONT);
    }
    eventually("all are connected", SOON, || with_status(&cluster, "connected") == 10);
    cluster.wait_ready("calm", 10);
    assert_eq!(places(&cluster), before, "nor afterwards");
    let events = cluster.nave(&["events"]).expect(0).stdout;
    assert!(!events.contains("is lost"), "{events}");
}
