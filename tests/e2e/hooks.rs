//! Promise: hooks run where the service runs and when it says, each once at a time, and what hangs in them is ended.

use std::path::PathBuf;

use nave_tests::cluster::SOON;
use nave_tests::process::{alive, send};
use nave_tests::{Cluster, Setup, eventually, eventually_some};
use nix::sys::signal::Signal;

use crate::deploy_and_serve::pid;

/// Each hook and the process itself write a word into its data directory; with it who and where they are.
fn life(mark: u32) -> String {
    format!(
        r#"
name = "life"
data = true
command = ["sh", "-c", '''
where() {{ echo "$(id -u) $(grep -c /nave- /proc/self/cgroup) $(ulimit -n) $(cat /tmp/nave-{mark})"; }}
trap 'echo term >> $NAVE_DATA/trace; exit 0' TERM
echo run >> $NAVE_DATA/trace; where >> $NAVE_DATA/where
while :; do sleep 0.05; done''']
rlimits.nofile = 777
stop.grace = "20s"

[hooks.pre_start]
command = ["sh", "-c", '''
echo $NAVE_SERVICE > /tmp/nave-{mark}; echo pre_start >> $NAVE_DATA/trace
echo "$(id -u) $(grep -c /nave- /proc/self/cgroup) $(ulimit -n) $(cat /tmp/nave-{mark})" >> $NAVE_DATA/where''']

[hooks.post_start]
command = ["sh", "-c", '''
while [ "$(tail -1 $NAVE_DATA/trace)" != run ]; do sleep 0.05; done; echo post_start >> $NAVE_DATA/trace
echo "$(id -u) $(grep -c /nave- /proc/self/cgroup) $(ulimit -n) $(cat /tmp/nave-{mark})" >> $NAVE_DATA/where
(setsid sleep 8{mark} &); echo and that was that >&2; exit 3''']

[hooks.pre_stop]
command = ["sh", "-c", "echo pre_stop >> $NAVE_DATA/trace"]

[hooks.post_stop]
command = ["sh", "-c", "sleep 0.2; cat /tmp/nave-{mark} && echo post_stop >> $NAVE_DATA/trace"]
"#
    )
}

#[test]
fn a_life_goes_through_its_hooks_and_a_crash_skips_none() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let mark = std::process::id();
    cluster.apply(&life(mark), &["--wait"]).expect(0);
    let file = |name: &str| cluster.agents[0].dir.join("data/data/life/0").join(name);
    traces(&file("trace"), &["pre_start", "run", "post_start"]);
    eventually("what the hook left running is killed", SOON, || running(&format!("sleep 8{mark}")) == 0);
    let everywhere = std::fs::read_to_string(file("where")).expect("written");
    let mut lines: Vec<&str> = everywhere.lines().collect();
    assert_eq!(lines.len(), 3, "{everywhere}");
    lines.dedup();
    assert_eq!(lines.len(), 1, "hooks are who and where the process is:\n{everywhere}");

    send(pid(&cluster.wait_ready("life", 1)[0]), Signal::SIGKILL);
    let second = ["pre_start", "run", "post_start", "post_stop", "pre_start", "run", "post_start"];
    traces(&file("trace"), &second);

    cluster.nave(&["scale", "life", "0"]).expect(0);
    let all = [&second[..], &["pre_stop", "term", "post_stop"]].concat();
    traces(&file("trace"), &all);
    let history = eventually_some("its history tells", SOON, || {
        let text = cluster.nave(&["events", "--service", "life"]).stdout;
        text.contains("post_stop hook, in").then_some(text)
    });
    for part in [
        "has been through its pre_start hook, in",
        "had its post_start hook fail: sh ended with exit status: 3: and that was that",
        "has been through its pre_stop hook, in",
    ] {
        assert!(history.contains(part), "{part:?} is not in\n{history}");
    }
}

#[test]
fn a_hook_that_hangs_is_a_failed_start_and_leaves_nobody() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let mark = std::process::id();
    let hangs = format!(
        "name = \"hangs\"\ncommand = [\"sleep\", \"infinity\"]\nrestart.budget = \"1 in 1m\"\n[hooks.pre_start]\n\
         command = [\"sh\", \"-c\", \"(setsid sleep 7{mark} &); sleep 7{mark}\"]\ntimeout = \"300ms\"\n"
    );
    // Waits in the middle of its hook for a word.
    let waits = "name = \"waits\"\ndata = true\ncommand = [\"sh\", \"-c\", \"echo run >> $NAVE_DATA/trace; exec sleep \
                 infinity\"]\n[hooks.pre_start]\ncommand = [\"sh\", \"-c\", '''\necho $$$$ > $NAVE_DATA/pid; echo begin >> \
                 $NAVE_DATA/trace\nwhile [ ! -e $NAVE_DATA/go ]; do sleep 0.05; done; echo end >> $NAVE_DATA/trace''']\n";
    cluster.apply(&hangs, &[]).expect(0);
    cluster.apply(waits, &[]).expect(0);
    let file = |name: &str| cluster.agents[0].dir.join("data/data/waits/0").join(name);
    traces(&file("trace"), &["begin"]);
    eventually("the hook that hangs is the reason", SOON, || {
        let why = "pre_start hook failed: it took longer than 300ms and was killed";
        let rows = cluster.ps("hangs");
        rows.iter().any(|row| row["reason"].as_str().is_some_and(|reason| reason.contains(why)))
            && rows.iter().any(|row| row["observed"] == "failed")
    });
    assert_eq!(running(&format!("sleep 7{mark}")), 0, "no process of it is left");

    // In the middle of the other, its agent dies.
    let hook = || std::fs::read_to_string(file("pid")).ok()?.trim().parse::<u32>().ok();
    let first = hook().expect("it runs");
    let agent = cluster.agents[0].agent_pid();
    send(agent, Signal::SIGKILL);
    let second = eventually_some("it is run again", SOON, || hook().filter(|pid| *pid != first));
    assert!(!alive(first), "not beside the one before");
    std::fs::write(file("go"), "").expect("written");
    traces(&file("trace"), &["begin", "begin", "end", "run"]);
    eventually("it has ended", SOON, || !alive(second));
    cluster.wait_ready("waits", 1);
}

fn traces(path: &PathBuf, words: &[&str]) {
    let read = || std::fs::read_to_string(path).unwrap_or_default();
    let what = format!("{words:?} in {}", path.display());
    eventually(&what, SOON, || read().lines().count() >= words.len());
    assert_eq!(read().lines().collect::<Vec<_>>(), words);
}

/// Processes of the whole machine whose command line is exactly this.
fn running(command: &str) -> usize {
    let wanted = command.replace(' ', "\0") + "\0";
    let entries = std::fs::read_dir("/proc").expect("/proc is mounted").flatten();
    entries
        .filter(|entry| {
            std::fs::read(entry.path().join("cmdline")).is_ok_and(|line| line == wanted.as_bytes())
        })
        .count()
}
