//! Promise: `nave dev` is a whole cluster in one command: ready, used, killed and adopted, and gone without a trace.

use std::path::Path;
use std::process::Command;

use nave_tests::cluster::{SOON, processes_of};
use nave_tests::machine::free_ports;
use nave_tests::nave::{Output, binary, run};
use nave_tests::process::{Process, alive};
use nave_tests::{eventually, eventually_some};

use crate::manifests::sleeper;

fn dev(dir: &Path, port: u16) -> Process {
    let mut command = Command::new(binary());
    command
        .args(["dev", "--members", "3", "--agents", "1", "--port", &port.to_string(), "--data-dir"])
        .arg(dir.join("data"))
        .env_remove("NAVE_CONTEXT");
    Process::start("dev", &mut command, &dir.join("said")).expect("dev starts")
}

fn said(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("said")).unwrap_or_default()
}

fn wait_ready(dir: &Path, times: usize) {
    eventually("dev says that it is ready", SOON, || {
        said(dir).lines().filter(|line| line.starts_with("nave dev: ready")).count() == times
    });
}

fn nave(dir: &Path, args: &[&str]) -> Output {
    run(Some(&dir.join("data/client.toml")), args, None)
}

fn pid(path: &Path) -> Option<u32> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[test]
fn ready_used_killed_adopted_and_gone() {
    let folder = tempfile::tempdir().expect("a folder");
    let (dir, port) = (folder.path(), free_ports());
    let mut first = dev(dir, port);
    wait_ready(dir, 1);
    run(Some(&dir.join("data/client.toml")), &["apply", "-f", "-", "--wait"], Some(&sleeper("sleeper", 2)))
        .expect(0);
    let data = dir.join("data/agent-1");
    let before =
        eventually_some("two processes", SOON, || Some(processes_of(&data)).filter(|pids| pids.len() == 2));

    // A member that dies is started again.
    let member = pid(&dir.join("data/member-1/nave.pid")).expect("member-1 has a pid file");
    nave_tests::process::send(member, nix::sys::signal::Signal::SIGKILL);
    eventually("member-1 is back", SOON, || {
        pid(&dir.join("data/member-1/nave.pid")).is_some_and(|now| now != member && alive(now))
    });

    // A second one on the same folder is told who is there.
    let refused =
        Command::new(binary()).args(["dev", "--data-dir"]).arg(dir.join("data")).output().expect("it runs");
    assert_eq!(refused.status.code(), Some(1));

    first.kill();
    assert!(before.iter().all(|pid| alive(*pid)), "services outlive dev");
    let mut second = dev(dir, port);
    wait_ready(dir, 2);
    assert_eq!(processes_of(&data), before, "and are adopted");
    assert_eq!(nave(dir, &["ps", "sleeper"]).expect(0).stdout.matches("running").count(), 2);

    let roles: Vec<u32> = [
        "member-1/nave.pid",
        "member-2/nave.pid",
        "member-3/nave.pid",
        "agent-1/nave.pid",
        "agent-1/keeper.pid",
    ]
    .iter()
    .map(|name| pid(&dir.join("data").join(name)).expect("every role has a pid file"))
    .collect();
    second.terminate();
    eventually("nothing is left", SOON, || {
        processes_of(&data).is_empty() && roles.iter().chain(&before).all(|pid| !alive(*pid))
    });
}

#[test]
fn a_port_that_is_taken_is_named_before_anything_starts() {
    let folder = tempfile::tempdir().expect("a folder");
    let port = free_ports();
    let _taken = std::net::TcpListener::bind(("127.0.0.1", port + 1)).expect("free");
    let mut process = dev(folder.path(), port);
    assert_eq!(process.wait(), Some(1));
    assert!(said(folder.path()).contains(&(port + 1).to_string()), "{}", said(folder.path()));
}

/// Writes a word at its start and end into a file that all of them write to.
fn told(name: &str, file: &Path, at_end: &str, more: &str) -> String {
    let file = file.display();
    format!(
        r#"name = "{name}"
command = ["sh", "-c", '''trap "{at_end}; echo {name} ends >> {file}; exit 0" USR2
trap "" TERM; echo {name} begins >> {file}; while :; do sleep 0.02; done''']
stop = {{ signal = "SIGUSR2", grace = "60s" }}
{more}"#
    )
}

#[test]
fn an_end_is_each_services_own_and_in_order_and_asked_again_at_once() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::Builder::new().prefix("nave-dev").tempdir_in("/dev/shm").expect("a folder");
    let (dir, port) = (folder.path(), free_ports());
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).expect("opened");
    let file = dir.join("told");
    std::fs::write(&file, "").expect("made");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).expect("opened");
    let lines = || std::fs::read_to_string(&file).expect("it is there");
    let mut first = dev(dir, port);
    wait_ready(dir, 1);
    let apply = |manifest: &str| {
        run(Some(&dir.join("data/client.toml")), &["apply", "-f", "-", "--wait"], Some(manifest)).expect(0);
    };
    let hook = format!(
        "hooks.post_stop.command = [\"sh\", \"-c\", \"echo db is put away >> {}\"]\n",
        file.display()
    );
    apply(&told("db", &file, ":", &hook));
    apply(&told("web", &file, "sleep 0.5", "needs = [\"db\"]\n"));
    nave(dir, &["status"]).expect(0);
    eventually("both have begun", SOON, || lines().matches("begins").count() == 2);
    first.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(first.wait(), Some(0), "{}", said(dir));
    let ends = lines();
    let ends: Vec<&str> = ends.lines().filter(|line| !line.ends_with("begins")).collect();
    assert_eq!(ends, ["web ends", "db ends", "db is put away"], "{}", said(dir));

    // They are wanted as before.
    let mut second = dev(dir, port);
    wait_ready(dir, 2);
    eventually("both have begun again", SOON, || lines().matches("begins").count() == 4);
    apply(
        r#"name = "deaf"
command = ["sh", "-c", 'trap "" TERM; echo deaf; while :; do sleep 0.1; done']
stop.grace = "10m"
health.log = "deaf"
"#,
    );
    second.signal(nix::sys::signal::Signal::SIGINT);
    eventually("the others have ended", SOON, || lines().matches("is put away").count() == 2);
    let data = dir.join("data/agent-1");
    assert!(!processes_of(&data).is_empty(), "it has its ten minutes");
    second.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(second.wait(), Some(0), "{}", said(dir));
    assert!(processes_of(&data).is_empty(), "or none");
}
