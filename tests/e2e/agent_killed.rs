//! Promise (invariant 6): the end of an agent ends no service; its successor adopts them all and knows how those
//! that ended meanwhile had ended.

use nave_tests::cluster::SOON;
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nix::sys::signal::Signal;

use crate::deploy_and_serve::{get, pid};
use crate::manifests::{sleeper, web};

#[test]
fn processes_keep_their_pids() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&sleeper("sleeper", 5), &["--wait"]).expect(0);
    let before: Vec<u32> = cluster.wait_ready("sleeper", 5).iter().map(pid).collect();
    let agent = cluster.agents[0].agent_pid();

    send(agent, Signal::SIGKILL);

    eventually("another agent", SOON, || {
        cluster.agents[0].pid_file("nave.pid").is_some_and(|now| now != agent && alive(now))
    });
    cluster.wait_for_agents(1);
    let after: Vec<u32> = cluster.wait_ready("sleeper", 5).iter().map(pid).collect();
    assert_eq!(before, after);
    assert!(cluster.ps("sleeper").iter().all(|row| row["restarts"] == 0));
}

#[test]
fn what_died_meanwhile_is_reported_with_its_true_exit_code() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&web("web", 1), &["--wait"]).expect(0);
    let row = &cluster.wait_ready("web", 1)[0];
    let (before, port) = (pid(row), row["ports"]["http"].as_u64().expect("a port"));

    // Stopped, the agent cannot see the exit; killed, it never will.
    let agent = cluster.agents[0].agent_pid();
    send(agent, Signal::SIGSTOP);
    let _ = get(port, "/exit/42");
    eventually("the process has ended", SOON, || !alive(before));
    send(agent, Signal::SIGKILL);

    eventually_some("its successor runs", SOON, || {
        cluster.ps("web").into_iter().find(|row| row["ready"] == true && pid(row) != before)
    });
    let events = cluster.nave(&["events", "--service", "web"]).expect(0);
    assert!(events.stdout.contains("code 42"), "{}", events.stdout);
}

#[test]
fn a_planned_stop_of_the_agent_leaves_services_alone() {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(&sleeper("sleeper", 2), &["--wait"]).expect(0);
    let before: Vec<u32> = cluster.wait_ready("sleeper", 2).iter().map(pid).collect();

    cluster.agents[0].terminate();
    assert!(before.iter().all(|pid| alive(*pid)));
    cluster.agents[0].start();

    cluster.wait_for_agents(1);
    let after: Vec<u32> = cluster.wait_ready("sleeper", 2).iter().map(pid).collect();
    assert_eq!(before, after);
}

/// Connects once, as many programs do, ignores that nobody listens, and notes each word for its watchdog in a file. Ready
/// when it is told to be.
const SPEAKS: &str = r#"
import os, socket, time
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect(os.environ["NOTIFY_SOCKET"])
shared, ready, beats = os.environ["SHARED"], False, 0

def say(word):
    try:
        notify.send(word)
    except OSError:
        pass

while True:
    say(b"WATCHDOG=1")
    if not ready and os.path.exists(shared + "/go"):
        say(b"READY=1")
        ready = True
    beats += 1
    with open(shared + "/new", "w") as file:
        file.write(f"{beats} {os.getpid()} {ready}")
    os.rename(shared + "/new", shared + "/beats")
    time.sleep(int(os.environ["WATCHDOG_USEC"]) / 1e7)
"#;

/// Longer than two watchdogs may be silent.
const MANY: u64 = 25;

#[test]
fn a_service_that_says_how_it_is_is_heard_by_the_next_agent_and_not_ended() {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let shared = cluster.dir().join("shared");
    std::fs::create_dir(&shared).expect("a folder");
    // For a user of the service's own.
    std::fs::set_permissions(&shared, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("opened");
    let manifest = format!(
        "name = \"speaks\"\ncommand = [\"python3\", \"-c\", '''{SPEAKS}''']\nenv = {{ SHARED = \"{}\" }}\n\
         [health]\nnotify = true\nstart_grace = \"0s\"\nlive = {{ notify = true, interval = \"650ms\" }}\n",
        shared.display()
    );
    cluster.apply(&manifest, &[]).expect(0);
    let beats = || -> Option<(u64, u32, bool)> {
        let text = std::fs::read_to_string(shared.join("beats")).ok()?;
        let mut words = text.split(' ');
        let (beats, pid) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some((beats, pid, words.next() == Some("True")))
    };
    let (_, process, _) = eventually_some("it runs", SOON, beats);
    let goes_on = |from: u64| {
        eventually_some("it goes on", SOON, || beats().filter(|(now, ..)| *now >= from + MANY));
        let (now, pid, _) = beats().expect("it has beaten");
        assert_eq!(pid, process, "the same process");
        now
    };

    // It says that it is ready, and nobody reads that before the agent is dead.
    let agent = cluster.agents[0].agent_pid();
    send(agent, Signal::SIGSTOP);
    std::fs::write(shared.join("go"), "").expect("written");
    let (now, ..) = eventually_some("it is ready", SOON, || beats().filter(|(.., ready)| *ready));
    send(agent, Signal::SIGKILL);
    assert_eq!(pid(&cluster.wait_ready("speaks", 1)[0]), process);
    let now = goes_on(now);

    // In between nobody listens at all, and it is held up by that no more than by an agent.
    let agent = cluster.agents[0].agent_pid();
    send(agent, Signal::SIGKILL);
    goes_on(now);
    cluster.wait_for_agents(1);

    // With the keeper its socket ends: it is not killed for what nobody could hear.
    let agent = cluster.agents[0].agent_pid();
    send(agent, Signal::SIGKILL);
    cluster.agents[0].kill();
    cluster.agents[0].start();
    cluster.wait_for_agents(1);
    let (now, ..) = beats().expect("it has beaten");
    goes_on(now);
    let row = &cluster.wait_ready("speaks", 1)[0];
    assert_eq!((pid(row), &row["restarts"]), (process, &serde_json::json!(0)));
}
