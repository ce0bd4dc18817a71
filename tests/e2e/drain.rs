//! Promise: a drained host is emptied under the update rules, and done when its agent says so; a host given up is no
//! longer the cluster's: its session is cut and its certificate opens nothing.

use nave_tests::cluster::{SOON, processes_of};
use nave_tests::{Cluster, Setup, eventually};

use crate::manifests::web;

fn host(cluster: &Cluster, name: &str) -> Option<serde_json::Value> {
    cluster
        .json(&["hosts"])
        .as_array()
        .and_then(|hosts| hosts.iter().find(|host| host["name"] == name).cloned())
}

#[test]
fn a_drain_moves_everything_and_never_has_fewer_ready() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 2 });
    cluster.apply(&web("web", 4), &["--wait"]).expect(0);
    cluster.wait_ready("web", 4);
    let refused = cluster.nave(&["drain", "nobody"]).expect(1);
    assert!(refused.stderr.contains("there is no host \"nobody\""), "{}", refused.stderr);

    cluster.nave(&["drain", "agent-1", "--reason", "new disks"]).expect(0);
    let data = cluster.agents[0].dir.join("data");
    eventually("the host is empty", SOON, || {
        let ready = cluster.ps("web").iter().filter(|row| row["ready"] == true).count();
        assert!(ready >= 4, "{ready} of 4 are ready");
        host(&cluster, "agent-1").is_some_and(|host| host["instances"] == 0)
    });
    assert!(processes_of(&data).is_empty(), "empty by the word of its agent");
    let id = host(&cluster, "agent-1").map(|host| host["id"].clone()).expect("agent-1 is a host");
    cluster.nave(&["drain", id.as_str().expect("an id is text"), "--wait"]).expect(0);
    let shown = cluster.nave(&["hosts"]).expect(0).stdout;
    assert!(shown.contains("connected, drained") && shown.contains("new disks"), "{shown}");
    assert!(cluster.wait_ready("web", 4).iter().all(|row| row["host"] == "agent-2"));

    cluster.nave(&["undrain", "agent-1"]).expect(0);
    assert!(host(&cluster, "agent-1").is_some_and(|host| host["draining"] == false));
}

#[test]
fn a_host_given_up_is_cut_off_and_says_so() {
    let cluster = Cluster::start(&Setup { members: 3, agents: 2 });
    cluster.apply(&web("web", 2), &["--wait"]).expect(0);
    let refused = cluster.nave(&["hosts", "forget", "agent-1"]).expect(1);
    assert!(refused.stderr.contains("nave drain agent-1"), "{}", refused.stderr);
    cluster.nave(&["drain", "agent-1", "--wait"]).expect(0);
    cluster.nave(&["hosts", "forget", "agent-1", "--reason", "sold"]).expect(0);

    assert!(host(&cluster, "agent-1").is_none());
    eventually("its agent is told what to do", SOON, || {
        let log = cluster.agents[0].log();
        log.contains("was given up for good") && log.contains("join again with a new token")
    });
    let events = cluster.nave(&["events"]).expect(0).stdout;
    assert!(events.contains("sold"), "{events}");
    assert!(cluster.wait_ready("web", 2).iter().all(|row| row["host"] == "agent-2"));
}
