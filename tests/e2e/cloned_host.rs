//! Bad input: an agent's directory copied to another machine. The newer one is refused with a clear error, it is told as
//! an event, and the first goes on.

use std::process::Command;

use nave_tests::cluster::SOON;
use nave_tests::process::{Process, send};
use nave_tests::{Cluster, Setup, eventually, nave};
use nix::sys::signal::Signal;

use crate::deploy_and_serve::pid;
use crate::manifests::web;

#[test]
fn the_newer_of_two_agents_with_one_identity_is_refused() {
    let cluster = Cluster::start(&Setup { members: 3, agents: 1 });
    let first = &cluster.agents[0];
    let copy = cluster.dir().join("copy");
    let copied = Command::new("cp").arg("-r").arg(&first.dir).arg(&copy).status().expect("cp runs");
    assert!(copied.success());
    let data = copy.join("data");
    let _ = std::fs::remove_file(data.join("keeper.sock"));
    let text = std::fs::read_to_string(copy.join("agent.toml")).expect("its configuration");
    let mut config: toml::Table = text.parse().expect("TOML");
    config.insert("data_dir".into(), data.display().to_string().into());
    config.insert("listen".into(), "127.0.0.1:0".into());
    config.insert("metrics_listen".into(), "127.0.0.1:0".into());
    std::fs::write(copy.join("agent.toml"), config.to_string()).expect("written");

    let mut command = Command::new(nave::binary());
    command.args(["agent", "--config"]).arg(copy.join("agent.toml")).env("NAVE_LOG", "info");
    let keeper = Process::start("copy", &mut command, &copy.join("log")).expect("it starts");
    eventually("the copy is refused", SOON, || {
        std::fs::read_to_string(copy.join("log"))
            .is_ok_and(|log| log.contains("another machine acts for h-1"))
    });
    eventually("it is told as an event", SOON, || {
        cluster.nave(&["events"]).stdout.contains("two agents use the identity of h-1")
    });
    cluster.apply(&web("web", 2), &["--wait"]).expect(0);
    assert_eq!(cluster.wait_ready("web", 2).iter().map(pid).count(), 2);
    cluster.wait_for_agents(1);

    // Only what this test started: the copy's keeper, and the agent it started.
    drop(keeper);
    let agent = std::fs::read_to_string(data.join("nave.pid")).unwrap_or_default();
    let own = agent.trim().parse::<u32>().ok().filter(|pid| *pid != cluster.agents[0].agent_pid());
    if let Some(own) = own {
        send(own, Signal::SIGKILL);
    }
}
