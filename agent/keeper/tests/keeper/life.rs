//! One process: started, signalled, ended, forgotten.

use std::fs;
use std::path::Path;

use nave_proto::pb;
use nix::sys::signal::Signal;
use pb::ExitCause;
use pb::KeeperErrorKind as Kind;
use pb::SignalScope::{Cgroup, Group, Process};
use pb::keeper_reply::Reply;
use pb::keeper_request::Request;

use crate::harness::{Agent, Host, eventually, forget_request, kill, runs, signal_request, state};

#[test]
fn exit_codes_and_signals_are_told_after_the_start() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let pid = agent.spawn(&host.script(1, "exit 7"));
    let exit = agent.exit(1);
    assert_eq!((exit.cause(), exit.code, exit.signal), (ExitCause::Exit, 7, 0));
    assert_eq!((exit.service.as_str(), exit.epoch, exit.attempt), ("s1", 1, 1));
    let process = exit.process.unwrap();
    assert_eq!(process.pid, pid);
    assert!(process.start_ticks > 0 && !process.boot_id.is_empty());
    assert!(exit.ended_unix_ns >= exit.started_unix_ns && exit.max_rss_bytes > 0);

    let pid = agent.spawn(&host.script(2, "kill -QUIT $$"));
    let exit = agent.exit(2);
    assert_eq!((exit.cause(), exit.signal), (ExitCause::Signal, libc::SIGQUIT));
    assert_eq!(exit.process.unwrap().pid, pid);
    assert_eq!(exit.sequence, 2);
}

#[test]
fn started_comes_before_ended_however_short_the_life() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let mut asked = std::collections::BTreeMap::new();
    for instance in 1..=40 {
        let spawn = pb::Spawn { argv: vec!["/bin/true".to_owned()], ..host.script(instance, "") };
        asked.insert(agent.client.post(Request::Spawn(spawn), None).unwrap(), instance);
    }
    let (mut started, mut ended) = (Vec::new(), Vec::new());
    while ended.len() < 40 {
        let reply = agent.client.next_reply().unwrap();
        match reply.reply.unwrap() {
            Reply::Spawned(_) => started.push(asked[&reply.id]),
            Reply::Exited(exit) => {
                assert!(started.contains(&exit.instance_id), "{} ended before it started", exit.instance_id);
                assert_eq!((exit.cause(), exit.code), (ExitCause::Exit, 0));
                ended.push(exit.instance_id);
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Children of the keeper that wait to be copied.
fn waiting(keeper: u32) -> Vec<u32> {
    let pids =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        words.split(|byte| *byte == 0).any(|word| word == b"ahead")
            && status
                .lines()
                .any(|line| line.strip_prefix("PPid:").is_some_and(|p| p.trim() == keeper.to_string()))
    })
    .collect()
}

#[test]
fn starts_are_copies_of_a_stub_that_waits_and_go_on_without_it() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let keeper = host.keeper_pid();
    let pids = [1, 2].map(|instance| agent.spawn(&host.script(instance, "exec sleep 1000")));
    let [stub] = waiting(keeper)[..] else { panic!("{:?} wait", waiting(keeper)) };
    for pid in pids {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains(&format!("PPid:\t{keeper}\n")), "not the keeper's child: {status}");
        // While it is being loaded it reads its libraries.
        let open = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        eventually("no descriptors that are not its own", || (open() == 3).then_some(()));
    }
    crate::harness::kill(stub, nix::sys::signal::Signal::SIGKILL);
    eventually("the stub to end", || waiting(keeper).is_empty().then_some(()));
    let third = agent.spawn(&host.script(3, "exec sleep 1000"));
    agent.spawn(&host.script(4, "exec sleep 1000"));
    let [second] = waiting(keeper)[..] else { panic!("{:?} wait", waiting(keeper)) };
    assert!(runs(third) && second != stub);
    host.kill_keeper();
    eventually("no stub to wait for a keeper that is dead", || {
        state(second).is_none_or(|s| s == 'Z').then_some(())
    });
}

#[test]
fn an_end_tells_whether_it_left_anybody() {
    let mut host = Host::start();
    if host.cgroup("", 1).is_none() {
        return;
    }
    let mut agent = host.agent();
    agent.spawn(&host.script(1, "exit 0"));
    assert!(agent.exit(1).cgroup_empty);
    agent.spawn(&host.script(2, "sleep 1000 & exit 0"));
    assert!(!agent.exit(2).cgroup_empty);
}

#[test]
fn what_cannot_be_started_says_what_and_why() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let script = host.dir.path().join("script");
    fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let plain = host.dir.path().join("plain");
    fs::write(&plain, "text").unwrap();
    let (script, plain) = (script.display().to_string(), plain.display().to_string());
    let cases = [
        ("/usr/bin/nope", "/", libc::ENOENT, "/usr/bin/nope: no such file or directory".to_owned()),
        ("nope", "/", libc::ENOENT, "nope: not found in PATH".to_owned()),
        (&plain, "/", libc::EACCES, format!("{plain}: permission denied")),
        (&script, "/", libc::ENOENT, format!("{script}: its interpreter or loader does not exist")),
        ("/", "/", libc::EACCES, "/: permission denied".to_owned()),
        (
            "true",
            "/no/such/dir",
            libc::ENOENT,
            "cannot enter working directory /no/such/dir: no such file or directory".to_owned(),
        ),
    ];
    for (instance, (program, dir, errno, message)) in (1..).zip(cases) {
        let spawn = pb::Spawn {
            argv: vec![program.to_owned()],
            working_dir: dir.to_owned(),
            ..host.script(instance, "")
        };
        let error = agent.refused(Request::Spawn(spawn));
        assert_eq!((error.kind(), error.errno, error.message), (Kind::Exec, errno, message.clone()));
        let exit = agent.exit(instance);
        assert_eq!((exit.cause(), exit.errno, exit.message), (ExitCause::ExecError, errno, message));
        assert_eq!(exit.process, None);
        agent.done(forget_request(instance, true));
    }
    // Also what fails before there is a stub.
    let spawn = pb::Spawn { log_dir: format!("{plain}/logs"), ..host.script(20, "exit 0") };
    let error = agent.refused(Request::Spawn(spawn));
    assert_eq!((error.kind(), error.errno), (Kind::Exec, libc::ENOTDIR), "{error:?}");
    assert_eq!(agent.exit(20).cause(), ExitCause::ExecError);
    let group = format!("{plain}/group");
    let spawn = pb::Spawn { cgroup1: vec![group.clone()], ..host.script(21, "exit 0") };
    let error = agent.refused(Request::Spawn(spawn));
    assert_eq!(
        (error.kind(), error.message),
        (Kind::Exec, format!("cannot make cgroup {group}: not a directory (ENOTDIR)"))
    );
    assert_eq!(agent.exit(21).cause(), ExitCause::ExecError);
}

#[test]
fn a_program_that_closes_its_output_is_watched_and_signalled_like_any_other() {
    let mut host = Host::start();
    let mut agent = host.agent();
    agent.spawn(&host.script(1, "echo last; exec >&- 2>&-; read line < /dev/null; exit 4"));
    assert_eq!((agent.exit(1).code, host.line(1, "last").as_str()), (4, ""));
    let pid = agent.spawn(&host.script(2, "exec >&- 2>&-; exec sleep 1000"));
    agent.signal(2, libc::SIGTERM, Process);
    let exit = agent.exit(2);
    assert_eq!((exit.signal, exit.process.map(|process| process.pid)), (libc::SIGTERM, Some(pid)));
}

#[test]
fn nothing_runs_twice() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let first = host.script(1, "exec sleep 1000");
    let pid = agent.spawn(&first);
    for (epoch, attempt) in [(1, 1), (1, 2), (2, 1)] {
        let again = pb::Spawn { epoch, attempt, ..first.clone() };
        let error = agent.refused(Request::Spawn(again));
        assert_eq!(error.kind(), Kind::Busy, "{error:?}");
        assert!(error.message.contains(&pid.to_string()), "{error:?}");
    }
    agent.signal(1, libc::SIGKILL, Process);
    agent.exit(1);
    let error = agent.refused(Request::Spawn(first.clone()));
    assert_eq!(error.kind(), Kind::Busy, "the same attempt a second time: {error:?}");
    agent.acknowledge(1);
    let error = agent.refused(Request::Spawn(first.clone()));
    assert_eq!(error.kind(), Kind::Busy, "also when its exit is acknowledged: {error:?}");
    agent.spawn(&pb::Spawn { attempt: 2, ..first });
}

#[test]
fn the_cause_is_the_one_asked_for() {
    let mut host = Host::start();
    let mut agent = host.agent();
    agent.spawn(&host.script(1, "exec sleep 1000"));
    let request = pb::Signal {
        instance_id: 1,
        epoch: 1,
        attempt: 1,
        signal: libc::SIGTERM,
        scope: Process.into(),
        cause: ExitCause::Operator.into(),
    };
    agent.done(Request::Signal(request));
    let exit = agent.exit(1);
    assert_eq!((exit.cause(), exit.signal), (ExitCause::Operator, libc::SIGTERM));
    assert_eq!(agent.refused(Request::Signal(request)).kind(), Kind::NotFound);
}

#[test]
fn a_stopped_process_obeys_a_signal_to_end() {
    let mut host = Host::start();
    let mut agent = host.agent();
    for (instance, scope) in [(1, Process), (2, Group), (3, Cgroup)] {
        let pid = agent.spawn(&host.script(instance, "exec sleep 1000"));
        agent.signal(instance, libc::SIGSTOP, scope);
        eventually("its stop", || (state(pid) == Some('T')).then_some(()));
        agent.signal(instance, libc::SIGTERM, scope);
        assert_eq!(agent.exit(instance).signal, libc::SIGTERM);
    }
}

#[test]
fn scopes_reach_whom_they_say() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let children = "sleep 1000 & echo child $!; setsid sleep 1000 & sleep 0.1; \
                    echo far $(pgrep -n -s 0 x; cat /proc/$!/stat | cut -d' ' -f1); wait";
    let script = format!("trap '' USR1; {children}");
    let pid = agent.spawn(&host.script(1, &script));
    let child: u32 = host.line(1, "child ").parse().unwrap();
    let far: u32 = host.line(1, "far ").trim().parse().unwrap();
    assert!(runs(child) && runs(far));
    agent.signal(1, libc::SIGKILL, Group);
    agent.exit(1);
    eventually("the group's end", || (!runs(child)).then_some(()));
    assert!(!runs(pid) && runs(far), "another session is another group");
    // Main gone, cgroup not empty.
    let kept = agent.kept(1).unwrap();
    assert!(kept.leftover);
    assert_eq!(agent.refused(signal_request(1, libc::SIGKILL, Group)).kind(), Kind::NotFound);
    agent.signal(1, libc::SIGKILL, Cgroup);
    eventually("the leftover's end", || (!runs(far)).then_some(()));
    eventually("an empty list", || agent.kept(1).is_none().then_some(()));
}

#[test]
fn a_double_forked_daemon_does_not_escape_its_cgroup_and_blocks_the_next_attempt() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let spawn = host.script(1, "(setsid sh -c 'echo daemon $$; exec sleep 1000' &) ; exit 3");
    agent.spawn(&spawn);
    assert_eq!(agent.exit(1).code, 3);
    let daemon: u32 = host.line(1, "daemon ").parse().unwrap();
    assert!(agent.kept(1).unwrap().leftover);
    let argv = ["sh", "-c", "sleep 0.1; exit 7"].map(str::to_owned).to_vec();
    let next = pb::Spawn { attempt: 2, argv, ..spawn };
    let error = agent.refused(Request::Spawn(next.clone()));
    assert_eq!(error.kind(), Kind::Busy);
    assert!(error.message.contains("being killed"), "{error:?}");
    eventually("the daemon's end, reaped", || state(daemon).is_none().then_some(()));
    eventually("the next attempt", || agent.ask(Request::Spawn(next.clone())).ok());
    // In a cgroup that has been killed before, the kernel may kill what is born in it.
    let end = agent.exit(1);
    assert_eq!((end.cause(), end.code), (pb::ExitCause::Exit, 7), "{end:?}");
}

#[test]
fn forgetting_removes_cgroup_and_fifos_and_logs_only_when_asked() {
    let mut host = Host::start();
    let mut agent = host.agent();
    for (instance, remove_logs) in [(1, false), (2, true)] {
        let spawn = host.script(instance, "mkdir $CG/below; (setsid sleep 1000 &); echo said");
        let env = [spawn.env.clone(), vec![format!("CG={}", spawn.cgroup2)]].concat();
        agent.spawn(&pb::Spawn { env, ..spawn.clone() });
        agent.exit(instance);
        host.line(instance, "said");
        agent.done(forget_request(instance, remove_logs));
        assert!(!fs::exists(&spawn.cgroup2).unwrap(), "with who was left in it and what was below");
        assert!(!host.log_dir(instance).join("stdout").exists());
        assert_eq!(host.log_dir(instance).exists(), !remove_logs);
        agent.done(forget_request(instance, remove_logs));
    }
    assert_eq!(host.log(1), ["stdout F said"]);
    let pid = agent.spawn(&host.script(3, "exec sleep 1000"));
    let error = agent.refused(forget_request(3, true));
    assert_eq!(error.kind(), Kind::Busy);
    assert!(runs(pid));
}

#[test]
fn the_last_instance_of_a_service_takes_the_directories_above_along() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let Some(root) = host.cgroup("", 1) else { return };
    let at =
        |service: &str, instance: u64| root.join("nave-c-h").join(service).join(format!("i-{instance}-1"));
    for (instance, service) in [(1, "web"), (2, "web"), (3, "jobs")] {
        let cgroup2 = at(service, instance).display().to_string();
        agent.spawn(&pb::Spawn { cgroup2, service: service.to_owned(), ..host.script(instance, "exit 0") });
        agent.exit(instance);
    }
    let is_there = |service: &str| root.join("nave-c-h").join(service).exists();
    agent.done(forget_request(1, true));
    assert!(!at("web", 1).exists() && at("web", 2).exists() && is_there("jobs"));
    agent.done(forget_request(2, true));
    assert!(!is_there("web") && is_there("jobs"));
    agent.done(forget_request(3, true));
    assert!(!is_there("") && root.exists(), "the host's own directory goes, and none above it");
}

#[test]
fn running_out_of_memory_is_called_so() {
    let mut host = Host::start();
    let Some(memory) = host.cgroup("memory", 1) else { return };
    let limit = memory.join("memory.limit_in_bytes").display().to_string();
    let mut agent = host.agent();
    let spawn = pb::Spawn {
        cgroup1: vec![memory.display().to_string()],
        cgroup_files: vec![pb::FileWrite { path: limit, value: "16777216".to_owned(), required: true }],
        ..host.script(1, "x=$(head -c 200000000 /dev/zero | tr '\\0' a); echo survived ${#x}")
    };
    agent.spawn(&spawn);
    let exit = agent.exit(1);
    assert_eq!((exit.cause(), exit.signal), (ExitCause::Oom, libc::SIGKILL), "{exit:?}");
    let who = format!(
        "sh (pid {}) reached the limit of 16MiB, resources.memory",
        exit.process.map_or(0, |p| p.pid)
    );
    assert_eq!(exit.message, who);
}

#[test]
fn an_end_is_not_laid_to_a_child_that_had_run_out_of_memory() {
    let mut host = Host::start();
    let Some(memory) = host.cgroup("memory", 1) else { return };
    let gate = host.gate("go");
    let mut agent = host.agent();
    let script = "tail /dev/zero; echo outlived; exec sleep 1000";
    let pid = agent.spawn(&limited(&memory, 16 << 20, host.script(1, script)));
    host.line(1, "outlived");
    assert_eq!(outlived(&mut agent), (1, 1, 16 << 20));
    let again = agent.ask(Request::LookForOomKills(pb::LookForOomKills {})).unwrap();
    assert_eq!(again, Reply::OomKills(pb::OomKills::default()), "each is told once");
    kill(pid, Signal::SIGKILL);
    let exit = agent.exit(1);
    assert_eq!((exit.cause(), exit.message.as_str()), (ExitCause::Signal, ""), "somebody killed it");

    agent.acknowledge(exit.sequence);
    let script = format!("tail /dev/zero; {} exec tail /dev/zero", gate.wait());
    let next = pb::Spawn { attempt: 2, ..host.script(1, &script) };
    agent.spawn(&limited(&memory, 16 << 20, next));
    assert_eq!(outlived(&mut agent).0, 2);
    gate.open();
    let exit = agent.exit(1);
    assert_eq!((exit.cause(), exit.signal), (ExitCause::Oom, libc::SIGKILL), "this time it was the one");
    assert!(exit.message.starts_with("tail (pid "), "{}", exit.message);
}

/// Attempt, kills and limit of the one that has outlived kills, once it is told.
fn outlived(agent: &mut Agent) -> (u32, u64, u64) {
    eventually("a kill that was outlived", || {
        match agent.ask(Request::LookForOomKills(pb::LookForOomKills {})).unwrap() {
            Reply::OomKills(told) => {
                told.outlived.first().map(|one| (one.attempt, one.kills, one.limit_bytes))
            }
            other => panic!("{other:?}"),
        }
    })
}

/// With swap, as an agent sets it.
fn limited(memory: &Path, bytes: u64, spawn: pb::Spawn) -> pb::Spawn {
    let file = |name: &str, required| pb::FileWrite {
        path: memory.join(name).display().to_string(),
        value: bytes.to_string(),
        required,
    };
    let cgroup_files = vec![file("memory.limit_in_bytes", true), file("memory.memsw.limit_in_bytes", false)];
    pb::Spawn { cgroup1: vec![memory.display().to_string()], cgroup_files, ..spawn }
}

#[test]
fn who_did_not_reach_its_limit_is_not_said_to_have() {
    let mut host = Host::start();
    let Some(memory) = host.cgroup("memory", 1) else { return };
    // As if that were the host.
    let above = memory.parent().unwrap();
    fs::create_dir_all(above).unwrap();
    fs::write(above.join("memory.limit_in_bytes"), (16 << 20).to_string()).unwrap();
    let mut agent = host.agent();
    let pid = agent.spawn(&limited(&memory, 64 << 20, host.script(1, "exec tail /dev/zero")));
    let exit = agent.exit(1);
    let message = format!("the host ran out of memory, and tail (pid {pid}) was chosen");
    assert_eq!((exit.cause(), exit.message), (ExitCause::Oom, message));
}
