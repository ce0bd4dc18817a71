//! Promise: what processes print is there, in order, from all hosts, and goes on while they run.

use nave_tests::cluster::SOON;
use nave_tests::{Cluster, Setup, eventually};

use crate::manifests::{web, web_with};

#[test]
fn output_of_all_hosts_is_merged() {
    let cluster = Cluster::start(&Setup { members: 3, agents: 2 });
    cluster.apply(&web("web", 2), &["--wait"]).expect(0);
    let ids: Vec<String> = cluster
        .wait_ready("web", 2)
        .iter()
        .map(|row| row["id"].as_str().expect("an id").to_owned())
        .collect();
    eventually("both instances have spoken", SOON, || {
        let output = cluster.nave(&["logs", "web"]);
        ids.iter().all(|id| {
            output.stdout.lines().any(|line| line.contains(id.as_str()) && line.contains("listening on"))
        })
    });
}

#[test]
fn no_line_is_missing_and_the_tail_is_the_end() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&web_with("web", 1, "--lines 20000", ""), &["--wait"]).expect(0);
    cluster.wait_ready("web", 1);
    let wanted: Vec<String> = (1..=20_000).map(|n| format!("line {n}")).collect();
    eventually("all lines, in order", SOON, || {
        let output = cluster.nave(&["logs", "web"]);
        let lines =
            output.stdout.lines().filter_map(|line| line.find("line ").map(|at| line[at..].to_owned()));
        lines.eq(wanted.iter().cloned())
    });
    let tail = cluster.nave(&["logs", "web", "--tail", "2"]).expect(0);
    assert_eq!(tail.stdout.lines().count(), 2, "{}", tail.stdout);
    assert!(tail.stdout.contains("line 20000") && tail.stdout.contains("listening on"), "{}", tail.stdout);
}
