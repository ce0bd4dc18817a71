//! Promise: what processes print is there, in order, from all hosts, and goes on while they run.

use std::path::Path;
use std::process::Command;

use nave_tests::cluster::SOON;
use nave_tests::process::{Process, send};
use nave_tests::{Cluster, Setup, eventually, nave};
use nix::sys::signal::Signal;

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

/// Some 400 lines a second, so that a file of the log is full every two seconds and the follower never lags behind them.
const COUNTING: &str = r#"
name = "web"
command = ["sh", "-c", "n=0; while :; do for k in 1 2 3 4 5 6 7 8; do n=$((n+1)); echo count $n ${PAD}; done; sleep 0.02; done"]
env = { PAD = "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx" }
logs = { max_size = "512KiB" }
"#;

#[test]
fn following_has_no_gap_and_no_repeat_through_rotation_and_the_end_of_the_agent() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    cluster.apply(COUNTING, &["--wait"]).expect(0);
    let seen = cluster.dir().join("followed");
    let context = cluster.context();
    let mut follow = Command::new(nave::binary());
    follow.args(["logs", "web", "-f", "--grep", "count", "--context"]).arg(&context);
    let mut follow = Process::start("a follower", &mut follow, &seen).expect("it starts");

    let agent = cluster.agents[0].agent_pid();
    let mut reached = |what: &str, at_least: usize| {
        eventually(what, SOON, || counted(&seen).len() >= at_least);
        assert_eq!(follow.ended(), None, "the follower goes on");
        counted(&seen).len()
    };
    let so_far = reached("lines are followed", 200);
    send(agent, Signal::SIGKILL);
    let so_far = reached("and after the agent was killed", so_far + 800);
    let segments = std::fs::read_dir(cluster.agents[0].dir.join("data/logs/web/i-1-1")).expect("its logs");
    let rotated = segments.flatten().all(|file| file.file_name() != "0000000001.log");
    reached("and through rotation", so_far + if rotated { 1 } else { 3000 });
    follow.kill();

    let numbers = counted(&seen);
    assert!(numbers.iter().copied().eq(1..=numbers.len()), "{numbers:?}");

    // Limits take effect on what runs.
    let kept = || {
        let lines = cluster.nave(&["logs", "web"]).expect(0).stdout;
        lines.lines().count()
    };
    let before = cluster.wait_ready("web", 1)[0]["pid"].clone();
    cluster.apply(&COUNTING.replace("512KiB", "64KiB"), &["--wait"]).expect(0);
    eventually("all but the newest lines go", SOON, || kept() < 1000);
    assert_eq!(cluster.wait_ready("web", 1)[0]["pid"], before, "and the process stays");

    let some = cluster.nave(&["logs", "web", "--grep", "7 x", "--tail", "3"]).expect(0).stdout;
    // It goes on writing meanwhile, so that there may be more by the time they are read.
    assert!(some.lines().count() >= 3 && some.lines().all(|line| line.contains("7 x")), "{some}");
    let none = cluster.nave(&["logs", "web", "--until", "1h"]).expect(0);
    assert!(none.stdout.is_empty() && none.stderr.contains("nothing in that time"), "{}", none.stderr);
}

/// Says once where it is in its history, on a host.
fn mover(turn: usize, host: &str) -> String {
    format!(
        "name = \"mover\"\ncommand = [\"sh\", \"-c\", \"echo this is turn $TURN.; exec sleep infinity\"]\n\
         env = {{ TURN = \"{turn}\" }}\n\n[placement]\nconstraints = ['host = \"{host}\"']\n"
    )
}

#[test]
fn what_was_written_before_a_move_is_found_and_followed_when_no_event_tells_of_it() {
    let mut cluster = Cluster::start(&Setup { members: 1, agents: 2 });
    cluster.apply(&mover(1, "agent-1"), &["--wait"]).expect(0);
    let first = cluster.wait_ready("mover", 1)[0]["id"].as_str().expect("an id").to_owned();
    let events = || cluster.nave(&["events", "--service", "mover", "--tail", "1000"]).expect(0).stdout;
    assert!(events().contains("agent-1"), "{}", events());
    let mut turn = 1;
    while events().contains("agent-1") {
        turn += 1;
        assert!(turn < 60, "the events of a service are few: {}", events());
        cluster.apply(&mover(turn, "agent-2"), &["--wait"]).expect(0);
    }
    let all = cluster.nave(&["logs", "mover"]).expect(0).stdout;
    assert!(all.contains("this is turn 1.") && all.contains(&format!("turn {turn}.")), "{all}");
    let of_first = cluster.nave(&["logs", "mover", "--instance", &first]).expect(0).stdout;
    assert_eq!(of_first, "this is turn 1.\n");

    let never = cluster.nave(&["logs", "mover", "--instance", "i-999999"]).expect(1);
    assert!(never.stderr.contains("no instance i-999999 of mover"), "{}", never.stderr);
    let followed = cluster.nave(&["logs", "mover", "--instance", "i-999999", "-f"]).expect(1);
    assert!(followed.stderr.contains("no instance i-999999 of mover"), "{}", followed.stderr);
    let nowhere = cluster.nave(&["logs", "mever"]).expect(1).stderr;
    assert!(nowhere.contains("no service \"mever\"") && nowhere.contains("did you mean mover"), "{nowhere}");

    // A follower reads a host that has no instance once, and follows it as soon as it has one.
    let seen = cluster.dir().join("followed");
    let mut follow = Command::new(nave::binary());
    follow.args(["logs", "mover", "-f", "--context"]).arg(cluster.context());
    let mut follow = Process::start("a follower", &mut follow, &seen).expect("it starts");
    let times = |turn: usize| {
        let text = std::fs::read_to_string(&seen).unwrap_or_default();
        text.matches(&format!("this is turn {turn}.")).count()
    };
    eventually("what was written before is followed", SOON, || times(1) == 1 && times(turn) == 1);
    cluster.apply(&mover(turn + 1, "agent-1"), &["--wait"]).expect(0);
    eventually("and what is written where nothing was", SOON, || times(turn + 1) == 1);
    assert_eq!(times(1), 1);
    follow.kill();

    crate::hosts_lost::power_off(&mut cluster, 0);
    let without = cluster.nave(&["logs", "mover", "--grep", "turn 1."]).expect(1);
    assert!(without.stderr.contains("agent-1") && !without.stderr.contains("nothing"), "{}", without.stderr);
}

#[test]
fn a_long_line_is_one_and_the_tail_is_of_the_stream_that_is_asked_for() {
    let cluster = Cluster::start(&Setup { members: 1, agents: 1 });
    let manifest = r#"
name = "long"
command = ["sh", "-c", '''echo aside 1 >&2; echo aside 2 >&2; head -c 20000 /dev/zero | tr "\0" x; echo; echo end; exec sleep infinity''']
"#;
    cluster.apply(manifest, &["--wait"]).expect(0);
    let long = "x".repeat(20_000);
    let printed = |line: &str| line.rsplit(" | ").next().map(str::to_owned).unwrap_or_default();
    let lines = |args: &[&str]| -> Vec<String> {
        let all: Vec<&str> = ["logs", "long"].into_iter().chain(args.iter().copied()).collect();
        cluster.nave(&all).expect(0).stdout.lines().map(printed).collect()
    };
    eventually("all is written", SOON, || lines(&[]).len() == 4);
    assert_eq!(lines(&["--stream", "stdout"]), [long.as_str(), "end"]);
    assert_eq!(lines(&["--stream", "stdout", "--tail", "2"]), [long.as_str(), "end"]);
    assert_eq!(lines(&["--stream", "stderr", "--tail", "1"]), ["aside 2"]);
    // Longer than any part.
    assert_eq!(lines(&["--grep", &long[..18_000]]), [long.as_str()]);
}

/// The numbers in a follower's output, whole lines only.
fn counted(seen: &Path) -> Vec<usize> {
    let text = std::fs::read_to_string(seen).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let number = |line: &str| line.split_once("count ")?.1.split(' ').next()?.parse().ok();
    whole.lines().filter_map(number).collect()
}

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn a_full_log_disk_holds_nobody_up_is_told_and_counted() {
    if !nave_tests::machine::is_root() {
        eprintln!("skipped: mounting a small file system needs root");
        return;
    }
    let mut cluster = Cluster::prepare(&Setup { members: 1, agents: 1 }).expect("prepared");
    let logs = cluster.agents[0].dir.join("data/logs");
    let small = crate::full_disk::Small::mount(&logs, "8m");
    cluster.members.iter_mut().for_each(nave_tests::cluster::Role::start);
    cluster.agents.iter_mut().for_each(nave_tests::cluster::Role::start);
    cluster.wait_for_leader();
    cluster.wait_for_agents(1);
    crate::full_disk::fill(&logs.join("filler"));
    cluster.apply(COUNTING, &["--wait"]).expect(0);
    let alarms = || cluster.json(&["hosts"])[0]["alarms"].as_array().cloned().unwrap_or_default();
    eventually("the host raises an alarm", SOON, || {
        alarms().iter().any(|alarm| alarm.as_str().is_some_and(|text| text.contains("No space left")))
    });
    let told = cluster.nave(&["events"]).stdout;
    assert!(told.contains("host_alarm") || told.contains("takes nothing"), "{told}");
    assert_eq!(cluster.wait_ready("web", 1)[0]["restarts"], 0, "what it prints held it up or ended it");

    std::fs::remove_file(logs.join("filler")).expect("the filler can go");
    eventually("lines are taken again, and what is missing is said in its place", SOON, || {
        let lines = cluster.nave(&["logs", "web"]).stdout;
        let dropped = lines.find("lines dropped]");
        dropped.is_some_and(|at| lines[at..].contains("count "))
    });
    eventually("the alarm is over", SOON, || alarms().is_empty());
    drop(cluster);
    drop(small);
}
