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

/// How many are ready by the word of the hub.
fn ready(cluster: &Cluster) -> usize {
    cluster.ps("web").iter().filter(|row| row["ready"] == true).count()
}

#[test]
fn canaries_wait_for_a_person_a_pause_holds_and_a_bad_version_takes_nothing() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let canary = "[update]\nprogress_deadline = \"3s\"\ncanary = 1\n";
    cluster.apply(&web_with("web", 3, "", canary), &["--wait"]).expect(0);
    cluster.wait_ready("web", 3);
    let first = pids(&cluster, "web");

    let said = cluster.apply(&web_with("web", 3, "--greeting two", canary), &["--wait"]).expect(0);
    assert!(
        said.text().contains("1 canary is ready") && said.text().contains("nave promote web"),
        "{}",
        said.text()
    );
    assert!(pids(&cluster, "web").is_superset(&first), "the canary runs beside them");
    let status = cluster.nave(&["status", "web"]).expect(0).stdout;
    assert!(status.contains("waits for `nave promote web`"), "{status}");

    cluster.nave(&["pause", "web"]).expect(0);
    let refused = cluster.nave(&["promote", "web"]).expect(1);
    assert!(refused.stderr.contains("nave resume web"), "{}", refused.stderr);
    cluster.nave(&["resume", "web"]).expect(0);
    eventually("it can be promoted", SOON, || cluster.nave(&["promote", "web"]).code == 0);
    eventually("all run the second version", SOON, || {
        assert!(ready(&cluster) >= 3, "never fewer than three");
        pids(&cluster, "web").is_disjoint(&first) && cluster.ps("web").len() == 3
    });

    // Its readiness check is gone, and it ends at once: ready for a moment, again and again.
    let bad = web_with(
        "web",
        3,
        "--exit 1",
        "[update]\nprogress_deadline = \"3s\"\n[restart]\nbudget = \"2 in 5m\"\n",
    );
    cluster.apply(&bad.replace("[health]\nhttp = \"/ready\"\ninterval = \"200ms\"\n", ""), &[]).expect(0);
    eventually("it is reverted", SOON, || {
        assert!(ready(&cluster) >= 3, "a bad version takes nothing");
        cluster.json(&["services"])[0]["version"] == 4
    });
    let status = cluster.nave(&["status", "web"]).expect(0).stdout;
    let why = status.lines().find(|line| line.contains("version 3 failed, back to version 2"));
    assert!(why.is_some_and(|why| why.contains("exited with status 1")), "{status}");
}
