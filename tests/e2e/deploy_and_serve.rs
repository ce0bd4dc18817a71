//! Promise: what is applied runs, answers, is found, and comes back when it dies.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use nave_tests::cluster::SOON;
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::manifests::{sleeper, web, web_with};

/// GET over HTTP/1.1; the body, none when nothing answers.
pub(crate) fn get(port: u64, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", u16::try_from(port).ok()?)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.split_once("\r\n\r\n").map(|(_, body)| body.trim().to_owned())
}

pub(crate) fn pid(row: &Value) -> u32 {
    row["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("pid is a number")
}

#[test]
fn a_manifest_becomes_processes_that_answer() {
    let cluster = Cluster::start(&Setup { members: 3, agents: 2 });
    cluster.apply(&web_with("web", 4, "--greeting hi", ""), &["--wait"]).expect(0);

    let rows = cluster.wait_ready("web", 4);
    for row in &rows {
        let port = row["ports"]["http"].as_u64().expect("the port is known");
        let said = get(port, "/").expect("the instance answers");
        assert!(said.starts_with("hi from i-"), "{said}");
        assert!(alive(pid(row)));
        assert_eq!(row["version"], 1);
        assert_eq!(row["desired"], "run");
        assert_eq!(row["observed"], "running");
    }
    let on = |host: &str| rows.iter().filter(|row| row["host"] == host).count();
    assert_eq!((on("agent-1"), on("agent-2")), (2, 2), "spread over the hosts");

    let endpoints = cluster.json(&["endpoints", "web"]);
    let found: Vec<_> =
        endpoints.as_array().expect("an array").iter().filter(|e| e["state"] == "ready").collect();
    assert_eq!(found.len(), 4);
    let services = cluster.json(&["services"]);
    assert_eq!(
        (services[0]["name"].as_str(), services[0]["desired"].as_u64(), services[0]["ready"].as_u64()),
        (Some("web"), Some(4), Some(4))
    );
}

#[test]
fn a_process_that_is_killed_comes_back() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&web("web", 1), &["--wait"]).expect(0);
    let before = pid(&cluster.wait_ready("web", 1)[0]);

    send(before, Signal::SIGKILL);

    let row = eventually_some("another process", SOON, || {
        cluster.ps("web").into_iter().find(|row| row["ready"] == true && pid(row) != before)
    });
    assert_eq!(row["restarts"], 1);
    let events = cluster.nave(&["events", "--service", "web"]).expect(0);
    assert!(events.stdout.contains("SIGKILL"), "the end is explained:\n{}", events.stdout);
}

#[test]
fn the_environment_is_clean_and_tells_the_process_who_it_is() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let manifest = web_with("web", 1, "", "[env]\nLOG_LEVEL = \"info\"\nWHERE = \"${HOST}:${PORT}\"\n");
    cluster.apply(&manifest, &["--wait"]).expect(0);
    let row = &cluster.wait_ready("web", 1)[0];
    let port = row["ports"]["http"].as_u64().expect("a port");

    let variable = |name: &str| get(port, &format!("/env/{name}")).expect("it answers");
    assert_eq!(variable("LOG_LEVEL"), "info");
    assert_eq!(variable("WHERE"), format!("127.0.0.1:{port}"));
    assert_eq!(variable("NAVE_PORT_HTTP"), port.to_string());
    assert_eq!(variable("NAVE_SERVICE"), "web");
    assert_eq!(variable("NAVE_HOST"), "agent-1");
    assert_eq!(variable("NAVE_LOG"), "", "nothing of the agent's own environment");
}

#[test]
fn a_command_that_does_not_exist_is_given_up_with_its_path() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let manifest = "name = \"ghost\"\ncommand = [\"/usr/bin/nope\"]\n";
    let output = cluster.apply(manifest, &["--wait"]).expect(1);
    assert!(output.text().contains("/usr/bin/nope"), "{}", output.text());

    let row = eventually_some("the instance is given up", SOON, || {
        cluster.ps("ghost").into_iter().find(|row| row["observed"] == "failed")
    });
    let reason = row["reason"].as_str().expect("a reason").to_lowercase();
    assert!(reason.contains("/usr/bin/nope") && reason.contains("no such file"), "{reason}");
}

#[test]
fn scale_delete_and_needs() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let waiting = format!("{}needs = [\"db\"]\n", sleeper("app", 1));
    cluster.apply(&waiting, &[]).expect(0);
    eventually("the reason names db", SOON, || cluster.nave(&["status", "app"]).stdout.contains("db"));
    assert!(cluster.ps("app").iter().all(|row| row["observed"] != "running"), "app waits for db");

    cluster.apply(&sleeper("db", 1), &["--wait"]).expect(0);
    cluster.wait_ready("app", 1);

    let kept = pid(&cluster.ps("app")[0]);
    cluster.nave(&["scale", "app", "3"]).expect(0);
    let rows = cluster.wait_ready("app", 3);
    assert!(rows.iter().any(|row| pid(row) == kept), "scaling restarts nothing");
    cluster.nave(&["scale", "app", "1"]).expect(0);
    cluster.wait_ready("app", 1);

    let last = pid(&cluster.ps("app")[0]);
    cluster.nave(&["delete", "app"]).expect(0);
    eventually("app is gone", SOON, || {
        cluster.json(&["services"]).as_array().is_some_and(|all| all.iter().all(|s| s["name"] != "app"))
    });
    assert!(!alive(last));
    cluster.nave(&["status", "app"]).expect(1);
}

#[test]
fn a_process_that_ignores_the_signal_is_gone_after_its_grace_with_its_children() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let manifest = web_with("stubborn", 1, "--ignore-term --fork-away", "[stop]\ngrace = \"1s\"\n");
    cluster.apply(&manifest, &["--wait"]).expect(0);
    cluster.wait_ready("stubborn", 1);
    let data = cluster.agents[0].dir.join("data");
    assert!(nave_tests::cluster::processes_of(&data).len() >= 2, "the server and its runaway child");

    cluster.nave(&["delete", "stubborn"]).expect(0);

    eventually("all of them are gone", SOON, || nave_tests::cluster::processes_of(&data).is_empty());
}
