//! Promise: a new version replaces the old one step by step, and a bad one is taken back.

use std::collections::BTreeSet;

use nave_tests::cluster::SOON;
use nave_tests::{Cluster, Setup, eventually};

use crate::deploy_and_serve::pid;
use crate::manifests::{web, web_with};

fn pids(cluster: &Cluster, service: &str) -> BTreeSet<u32> {
    cluster.ps(service).iter().map(pid).collect()
}

#[test]
fn restart_replaces_every_process_and_rollback_brings_the_old_manifest_back() {
    let cluster = Cluster::start(&Setup { members: 3, agents: 2 });
    cluster.apply(&web("web", 3), &["--wait"]).expect(0);
    cluster.wait_ready("web", 3);
    let first = pids(&cluster, "web");

    cluster.nave(&["restart", "web", "--wait"]).expect(0);
    cluster.wait_ready("web", 3);
    assert!(pids(&cluster, "web").is_disjoint(&first));

    cluster.apply(&web_with("web", 3, "--greeting new", ""), &["--wait"]).expect(0);
    cluster.nave(&["rollback", "web", "--to", "1", "--wait"]).expect(0);
    cluster.wait_ready("web", 3);
    let status = cluster.nave(&["status", "web"]).expect(0);
    assert!(status.stdout.contains("version") && status.stdout.contains('4'), "{}", status.stdout);
}

#[test]
fn a_bad_version_is_reverted_and_the_old_instances_stay() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&web("web", 3), &["--wait"]).expect(0);
    cluster.wait_ready("web", 3);
    let good = pids(&cluster, "web");

    let bad = web_with("web", 3, "--unready", "[update]\nprogress_deadline = \"3s\"\n");
    let output = cluster.apply(&bad, &["--wait"]).expect(1);
    assert!(output.text().contains("revert"), "{}", output.text());

    eventually("the old version is back", SOON, || {
        let rows = cluster.ps("web");
        rows.len() == 3 && rows.iter().all(|row| row["ready"] == true)
    });
    assert_eq!(pids(&cluster, "web"), good, "none of the good processes was touched");
}
