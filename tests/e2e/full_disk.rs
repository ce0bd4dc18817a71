//! Promise (invariant 10): a full disk refuses writes with a clear error and tears nothing; with room again, all goes on.
//! Needs root for a small tmpfs; said and skipped elsewhere.

use std::path::{Path, PathBuf};

use nave_tests::cluster::{Role, SOON};
use nave_tests::machine::is_root;
use nave_tests::{Cluster, Setup, eventually};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::manifests::sleeper;
use crate::members::{assert_kept, under_load, versions};

/// A small file system of its own below a member's data folder; unmounted when it goes out of scope.
pub(crate) struct Small(PathBuf);

impl Small {
    pub(crate) fn mount(at: &Path, size: &str) -> Self {
        std::fs::create_dir_all(at).expect("a folder");
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(&*format!("size={size}")))
            .expect("root may mount");
        Self(at.to_owned())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn writes_are_refused_and_nothing_is_lost() {
    if !is_root() {
        eprintln!("skipped: mounting a small file system needs root");
        return;
    }
    let mut cluster = Cluster::prepare(&Setup { members: 1, agents: 0 }).expect("prepared");
    let data = cluster.members[0].dir.join("data");
    let small = Small::mount(&data, "160m");
    cluster.members.iter_mut().for_each(Role::start);
    cluster.wait_for_leader();
    cluster.apply(&sleeper("kept", 0), &[]).expect(0);

    let filler = data.join("filler");
    fill(&filler);
    eventually("writes are refused with the reason", SOON, || {
        let output = cluster.apply(&sleeper("refused", 0), &[]);
        output.code != 0 && output.stderr.contains("disk")
    });
    assert_eq!(cluster.json(&["services"])[0]["name"], "kept", "reads go on");

    std::fs::remove_file(&filler).expect("the filler can go");
    eventually("writes are taken again", SOON, || cluster.apply(&sleeper("later", 0), &[]).code == 0);
    cluster.members[0].terminate();
    cluster.members[0].start();
    cluster.wait_for_leader();
    let services = cluster.json(&["services"]);
    let names: Vec<&str> =
        services.as_array().expect("rows").iter().filter_map(|s| s["name"].as_str()).collect();
    assert!(names.contains(&"kept") && names.contains(&"later"), "{names:?}");
    cluster.members[0].kill();
    drop(small);
}

/// Writes until the file system is full.
pub(crate) fn fill(path: &Path) {
    use std::io::Write as _;
    let mut file = std::fs::File::create(path).expect("created");
    let block = vec![0u8; 1 << 20];
    while file.write_all(&block).is_ok() {}
}

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn a_follower_whose_disk_is_full_holds_nobody_up_and_comes_back_with_room() {
    if !is_root() {
        eprintln!("skipped: mounting a small file system needs root");
        return;
    }
    let mut cluster = Cluster::prepare(&Setup { members: 3, agents: 0 }).expect("prepared");
    let data = cluster.members[2].dir.join("data");
    let small = Small::mount(&data, "160m");
    cluster.members.iter_mut().for_each(Role::start);
    if cluster.wait_for_leader() == 2 {
        cluster.nave(&["cluster", "transfer", "--to", "member-1"]).expect(0);
    }
    cluster.apply(&sleeper("kept", 0), &[]).expect(0);
    let filler = data.join("filler");
    fill(&filler);
    let written = under_load(&mut cluster, |cluster| {
        eventually("the others go on", SOON, || {
            cluster.json(&["services"]).as_array().is_some_and(|services| services.len() > 200)
        });
    });
    assert_eq!(written.refused, Vec::<String>::new());
    // It may have ended, as after any write that failed; then it says so, and is started again by its supervisor.
    if !cluster.members[2].is_running() {
        let log = cluster.members[2].log();
        assert!(log.contains("No space left") || log.contains("no space"), "{log}");
    }
    std::fs::remove_file(&filler).expect("the filler can go");
    if !cluster.members[2].is_running() {
        cluster.members[2].start();
    }
    eventually("it has caught up", SOON, || {
        let status = cluster.try_json(&["cluster", "status"]);
        status.is_some_and(|status| {
            status["members"][2]["reachable"] == true && status["members"][2]["lag_entries"] == 0
        })
    });
    cluster.members[0].kill();
    eventually("it is needed, and it is there", SOON, || cluster.apply(&sleeper("later", 0), &[]).code == 0);
    assert_kept(&versions(&cluster), written.acknowledged.iter().chain([&"kept".to_owned()]));
    cluster.members.iter_mut().for_each(Role::kill);
    drop(small);
}
