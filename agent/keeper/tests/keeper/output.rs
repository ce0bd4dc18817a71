//! Output: complete when the disk is well, counted when it is not, never in the way of the process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nave_proto::pb;
use pb::keeper_reply::Reply;

use crate::harness::{Host, eventually};

#[test]
fn twenty_thousand_lines_are_all_there_in_order() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let script =
        "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; echo to stderr >&2; printf unended";
    let spawn = pb::Spawn { log_segment_bytes: 256 * 1024, log_segments: 20, ..host.script(1, script) };
    agent.spawn(&spawn);
    assert_eq!(agent.exit(1).code, 0);
    host.line(1, "unended");
    let log = host.log(1);
    let lines: Vec<&str> = log.iter().filter_map(|line| line.strip_prefix("stdout F line ")).collect();
    assert_eq!(lines.len(), 20_000);
    assert!(lines.iter().enumerate().all(|(index, line)| *line == index.to_string()));
    assert!(log.contains(&"stderr F to stderr".to_owned()));
    let segments = fs::read_dir(host.log_dir(1)).unwrap().count() - 2;
    assert!(segments > 3, "{segments} segments");
}

#[test]
fn a_prompt_without_an_end_is_seen_and_goes_on_later() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let gate = host.gate("go");
    agent.spawn(&host.script(1, &format!("printf 'name? '; {} echo nave", gate.wait())));
    eventually("the prompt", || host.log(1).contains(&"stdout P name? ".to_owned()).then_some(()));
    gate.open();
    host.line(1, "nave");
}

struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: &Path, size: &str) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let options = format!("size={size},mode=700");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "nave-keeper-test"]).arg(at);
        mount.status().ok()?.success().then(|| Self(at.to_path_buf()))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_drops_and_counts_and_holds_nobody_up() {
    let mut host = Host::start();
    let Some(_disk) = Tmpfs::mount(&host.log_dir(1), "512k") else { return };
    let filler = host.log_dir(1).join("filler");
    fs::write(&filler, vec![0; 400 * 1024]).unwrap();
    let mut agent = host.agent();
    let gate = host.gate("go");
    let script = format!("seq -f 'before %g' 1 50000; echo written >&2; {} echo after", gate.wait());
    agent.spawn(&host.script(1, &script));
    // It has written all of it although the disk took a tenth.
    let mut dropped = 0;
    while dropped == 0 {
        if let Reply::OutputDropped(report) = agent.event() {
            assert_eq!(report.instance_id, 1);
            dropped += report.lines;
        }
    }
    let writer = agent.kept(1).unwrap().process.unwrap().pid;
    eventually("all written", || {
        let children = fs::read_to_string(format!("/proc/{writer}/task/{writer}/children")).unwrap();
        let seq = children
            .split_whitespace()
            .any(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "seq\n"));
        (!seq).then_some(())
    });
    fs::remove_file(&filler).unwrap();
    gate.open();
    host.line(1, "after");
    let log = host.log(1);
    let counted: u64 = log
        .iter()
        .filter_map(|line| line.split_once(" D ")?.1.strip_suffix(" lines dropped")?.parse::<u64>().ok())
        .sum();
    let kept = log.iter().filter(|line| line.contains(" F ")).count() as u64;
    assert_eq!(kept + counted, 50_002, "every line is there or counted: {kept} and {counted}");
    assert!(counted > 10_000);
    let at = log.iter().position(|line| line.contains(" D ")).unwrap();
    assert!(log[..at].iter().all(|line| line.contains("before")), "said in its place");
}

#[test]
fn a_planted_link_is_not_written_through() {
    let mut host = Host::start();
    let mut agent = host.agent();
    let file = host.dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    let fifo = host.dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    for (instance, target) in [(1, &file), (2, &fifo)] {
        fs::create_dir_all(host.log_dir(instance)).unwrap();
        std::os::unix::fs::symlink(target, host.log_dir(instance).join("stdout")).unwrap();
        let spawn = host.script(instance, "echo x");
        let error = agent.refused(pb::keeper_request::Request::Spawn(spawn));
        assert_eq!(error.kind(), pb::KeeperErrorKind::Exec, "{error:?}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
}
