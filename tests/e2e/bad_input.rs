//! Promise: what cannot work is refused with what, why and what to do, and nothing already accepted is lost.

use std::process::Command;

use nave_tests::cluster::SOON;
use nave_tests::nave::{binary, run_command};
use nave_tests::{Cluster, Setup, eventually};

use crate::manifests::sleeper;

#[test]
fn a_data_directory_of_another_cluster_or_a_newer_version_is_refused() {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 0 });
    cluster.apply(&sleeper("kept", 0), &[]).expect(0);
    cluster.members[0].terminate();
    let other = Cluster::prepare(&Setup { members: 1, agents: 0 }).expect("prepared");
    let config = other.members[0].dir.join("member.toml");
    let text = std::fs::read_to_string(&config).expect("the configuration");
    let ours = cluster.members[0].dir.join("data");
    let mut table: toml::Table = text.parse().expect("toml");
    table.insert("data_dir".into(), ours.to_str().expect("plain").into());
    std::fs::write(&config, table.to_string()).expect("written");

    let mut command = Command::new(binary());
    command.args(["orchestrator", "--config"]).arg(&config);
    let output = run_command(command, None);
    assert_eq!(output.code, 1, "{}", output.text());
    assert!(output.stderr.contains("cluster"), "{}", output.stderr);

    cluster.members[0].start();
    cluster.wait_for_leader();
    assert_eq!(cluster.json(&["services"])[0]["name"], "kept", "nothing was harmed");
}

#[test]
fn a_port_that_is_taken_is_named() {
    let mut cluster = Cluster::prepare(&Setup { members: 1, agents: 0 }).expect("prepared");
    let port = cluster.members[0].port;
    let _taken = std::net::TcpListener::bind(("127.0.0.1", port)).expect("free");
    cluster.members[0].start();
    assert_eq!(cluster.members[0].process().wait(), Some(1));
    let log = cluster.members[0].log();
    assert!(log.contains(&port.to_string()) && log.contains("in use"), "{log}");
}

#[test]
fn wrong_usage_and_an_absent_cluster_have_their_own_exit_codes() {
    let cluster = Cluster::prepare(&Setup { members: 1, agents: 0 }).expect("prepared");
    cluster.nave(&["servces"]).expect(2);
    let output = cluster.nave(&["services"]).expect(3);
    assert!(output.stderr.contains("127.0.0.1"), "the address is named: {}", output.stderr);
}

#[test]
fn a_service_that_does_not_exist_is_said_so() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 0 });
    cluster.apply(&sleeper("sleeper", 0), &[]).expect(0);
    let output = cluster.nave(&["scale", "sleepr", "2"]).expect(1);
    assert!(output.stderr.contains("sleepr") && output.stderr.contains("sleeper"), "{}", output.stderr);
}

#[test]
fn what_fits_nowhere_says_why() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let manifest = format!("{}\n[resources]\nmemory = \"900TiB\"\n", sleeper("whale", 1));
    cluster.apply(&manifest, &[]).expect(0);
    eventually("the reason is memory", SOON, || cluster.nave(&["status", "whale"]).stdout.contains("memory"));
}
