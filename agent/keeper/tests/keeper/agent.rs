//! The agent as the keeper's child.

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::harness::{Host, eventually, kill, runs};

/// An agent that notes its pid and stays.
fn noting(host: &Host) -> Vec<String> {
    let file = host.dir.path().join("agents");
    vec!["sh".to_owned(), "-c".to_owned(), format!("echo $$ >> {}; exec sleep 1000", file.display())]
}

fn agents(host: &Host, count: usize) -> Vec<u32> {
    eventually("the agent's start", || {
        let text = std::fs::read_to_string(host.dir.path().join("agents")).unwrap_or_default();
        let pids: Vec<u32> = text.lines().map(|line| line.parse().unwrap()).collect();
        (pids.len() >= count).then_some(pids)
    })
}

#[test]
fn its_end_starts_another_and_touches_no_service() {
    let mut host = Host::off();
    let command = noting(&host);
    host.start_keeper(&command);
    let first = agents(&host, 1)[0];
    let status = std::fs::read_to_string(format!("/proc/{first}/status")).unwrap();
    for mask in ["SigBlk", "SigIgn"] {
        assert!(
            status.contains(&format!("{mask}:\t0000000000000000\n")),
            "what the keeper blocks is not passed on"
        );
    }
    let mut client = host.agent();
    let service = client.spawn(&host.script(1, "exec sleep 1000"));
    drop(client);
    kill(first, Signal::SIGKILL);
    let second = agents(&host, 2)[1];
    kill(second, Signal::SIGKILL);
    let third = agents(&host, 3)[2];
    assert!(runs(third) && runs(service));
    assert!(host.said().contains("was ended by signal 9"), "{}", host.said());
    assert_eq!(host.agent().kept(1).unwrap().process.unwrap().pid, service);
}

#[test]
fn there_are_never_two_over_the_end_of_the_keeper() {
    let mut host = Host::off();
    let command = noting(&host);
    host.start_keeper(&command);
    let first = agents(&host, 1)[0];
    // Its answer says that it has noted what it started.
    host.connect().list().unwrap();
    host.kill_keeper();
    assert!(runs(first), "open traffic goes on");
    host.start_keeper(&command);
    // Its hello keeps it.
    let client = host.agent();
    assert_eq!(agents(&host, 1), [first]);
    kill(first, Signal::SIGKILL);
    eventually("its end to be seen", || host.said().contains("agent ended, starting it again").then_some(()));
    let both = agents(&host, 2);
    assert!(runs(both[1]));
    drop(client);
}

#[test]
fn sigterm_ends_agent_and_keeper_and_leaves_services() {
    let mut host = Host::off();
    let (file, termed) = (host.dir.path().join("agents"), host.dir.path().join("termed"));
    let trap = format!("trap 'echo > {}; exit' TERM; echo $$ >> {};", termed.display(), file.display());
    host.start_keeper(&["sh", "-c", &format!("{trap} while :; do sleep 0.02; done")]);
    let agent = agents(&host, 1)[0];
    let service = host.agent().spawn(&host.script(1, "exec sleep 1000"));
    kill(host.keeper_pid(), Signal::SIGTERM);
    assert_eq!(host.keeper_ends(), 0);
    assert!(!runs(agent) && runs(service));
    assert!(termed.exists(), "it was asked, not killed");
    assert!(!host.data_dir().join("keeper.pid").exists());
    kill(service, Signal::SIGKILL);
}

/// An agent that, asked to end what runs, opens a gate, waits for what comes of it, and ends.
fn ends_services(host: &Host) -> [String; 3] {
    let path = |name: &str| host.dir.path().join(name).display().to_string();
    let script = format!(
        "trap 'touch {}; while ! test -e {}; do sleep 0.02; done; exit 0' USR1; touch {}; while :; do sleep 0.02; done",
        path("go"),
        path("done"),
        path("hears"),
    );
    ["/bin/sh".to_owned(), "-c".to_owned(), script]
}

#[test]
fn services_are_ended_by_their_agent_when_it_has_the_time() {
    let mut host = Host::off();
    let agent = ends_services(&host);
    host.start_keeper(&agent);
    let mut client = host.agent();
    let (gate, done) = (host.gate("go"), host.dir.path().join("done"));
    client
        .spawn(&host.script(1, &format!("trap '' TERM; {} echo bye; touch {}", gate.wait(), done.display())));
    eventually("an agent that hears", || host.dir.path().join("hears").exists().then_some(()));
    host.connect().shutdown_in_order(Duration::from_secs(60), Duration::ZERO).unwrap();
    assert_eq!(host.keeper_ends(), 0);
    assert_eq!(host.line(1, "bye"), "");
    assert!(!host.said().contains("starting it again"), "{}", host.said());
}

#[test]
fn an_agent_that_does_not_end_services_is_not_waited_for_when_asked_again() {
    let mut host = Host::off();
    let hears = host.dir.path().join("hears");
    let script = format!("trap '' USR1; touch {}; while :; do sleep 0.02; done", hears.display());
    host.start_keeper(&["/bin/sh", "-c", &script]);
    let mut client = host.agent();
    let deaf =
        client.spawn(&host.script(1, "trap 'echo asked' TERM; echo deaf; while :; do sleep 0.02; done"));
    host.line(1, "deaf");
    eventually("an agent that is deaf", || hears.exists().then_some(()));
    let long = Duration::from_secs(600);
    let (mut first, mut second) = (host.connect(), host.connect());
    std::thread::scope(|threads| {
        // Whoever has asked before the newest is answered by the end of the keeper.
        threads.spawn(|| first.shutdown_in_order(long, long));
        eventually("it is asked", || is_stopping(&host).then_some(()));
        assert!(runs(deaf), "its agent has all the time");
        // Now without the agent, and with a long grace.
        threads.spawn(|| second.shutdown(true, long));
        host.line(1, "asked");
        host.connect().shutdown(true, Duration::ZERO).unwrap();
    });
    assert_eq!(host.keeper_ends(), 0);
    assert!(!runs(deaf));
}

fn is_stopping(host: &Host) -> bool {
    let refused = host.connect().upgrade(Path::new("/x"), Path::new("/x"), None);
    refused.is_err_and(|error| error.to_string().contains("shut down"))
}
