//! The agent as the keeper's child.

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
