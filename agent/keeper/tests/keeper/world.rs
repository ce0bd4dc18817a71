//! What a program finds when it starts.

use std::collections::BTreeMap;

use nave_proto::pb;

use crate::harness::Host;

/// `/proc/self/status` of the program, by name.
fn status(host: &Host, instance: u64) -> BTreeMap<String, String> {
    host.line(instance, "end");
    host.log(instance)
        .iter()
        .filter_map(|line| line.strip_prefix("stdout F ")?.split_once(":\t"))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

const PROBE: &str = "cat /proc/self/status; echo env $(tr '\\0' ' ' < /proc/$$/environ); echo cwd $(pwd -P); echo files $(ulimit -Sn); \
                     echo core $(ulimit -Hc); \
                     echo nice $(cut -d' ' -f19 /proc/$$/stat) oom $(cat /proc/$$/oom_score_adj); \
                     echo session $(cut -d' ' -f5,6 /proc/$$/stat) of $$; echo cgroup $(cat /proc/$$/cgroup); echo end";

#[test]
fn it_is_clean() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let spawn = pb::Spawn {
        env: vec!["PATH=/usr/bin:/bin".to_owned(), "ONLY=this".to_owned()],
        working_dir: "/usr".to_owned(),
        nice: 5,
        oom_score_adj: 300,
        no_new_privileges: true,
        rlimits: vec![pb::Rlimit { resource: libc::RLIMIT_CORE, soft: 0, hard: 4096 }],
        ..host.script(1, PROBE)
    };
    agent.spawn(&spawn);
    let status = status(&host, 1);
    for mask in ["SigBlk", "SigIgn", "SigCgt", "SigPnd"] {
        assert_eq!(status[mask], "0000000000000000", "{mask}");
    }
    assert_eq!(status["Umask"], "0022");
    assert_eq!(status["NoNewPrivs"], "1");
    assert_eq!(host.line(1, "env "), "PATH=/usr/bin:/bin ONLY=this ".trim_end());
    assert_eq!(host.line(1, "cwd "), "/usr");
    assert_eq!(host.line(1, "nice "), "5 oom 300");
    // In units of 1024 bytes or 512, by shell.
    assert!(["4", "8"].contains(&host.line(1, "core ").as_str()));
    let own = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap().0;
    assert_eq!(host.line(1, "files "), own.to_string(), "not the keeper's raised one");
    let session = host.line(1, "session ");
    let numbers: Vec<&str> = session.split(' ').filter(|word| *word != "of").collect();
    assert!(numbers.iter().all(|number| *number == numbers[0]), "leads its group and session: {session}");
    if !spawn.cgroup2.is_empty() {
        let (_, name) = spawn.cgroup2.rsplit_once("/nave-keeper-test").unwrap();
        assert!(host.line(1, "cgroup ").contains(name));
    }
}

#[test]
fn it_has_three_descriptors() {
    let mut host = Host::start();
    let mut agent = host.agent();
    // With some for the keeper to leak.
    agent.spawn(&host.script(1, "exec sleep 1000"));
    let pid = agent.spawn(&host.script(2, "exec sleep 1000"));
    let mut descriptors: Vec<(String, std::path::PathBuf)> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read_link(entry.path()).unwrap()))
        .collect();
    descriptors.sort();
    let log = host.log_dir(2);
    let wanted = [("0", "/dev/null".into()), ("1", log.join("stdout")), ("2", log.join("stderr"))];
    assert_eq!(descriptors, wanted.map(|(number, path)| (number.to_owned(), path)));
}

#[test]
fn it_runs_as_the_user_asked_for() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let mut host = Host::start();
    let mut agent = host.agent();
    let spawn = pb::Spawn {
        set_user: true,
        uid: 54_321,
        gid: 54_322,
        groups: vec![54_323],
        umask: 0o027,
        ..host.script(1, &format!("echo again > /dev/stdout; {PROBE}"))
    };
    agent.spawn(&spawn);
    let status = status(&host, 1);
    assert_eq!(status["Uid"], "54321\t54321\t54321\t54321");
    assert_eq!(status["Gid"], "54322\t54322\t54322\t54322");
    assert_eq!(status["Groups"], "54323");
    assert_eq!(status["Umask"], "0027");
    for set in ["CapEff", "CapPrm", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    host.line(1, "again");
    // What the user may not enter is refused as such.
    let closed = host.dir.path().join("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let spawn = pb::Spawn { attempt: 2, working_dir: closed.display().to_string(), ..spawn };
    agent.exit(1);
    let error = agent.refused(pb::keeper_request::Request::Spawn(spawn));
    assert_eq!(error.errno, libc::EACCES, "{error:?}");
}
