//! Promise: with two of three members gone, changes are refused clearly and soon, old answers are still given and
//! marked as such, processes are left alone; when the members are back, all goes on.

use std::time::Duration;

use nave_tests::cluster::SOON;
use nave_tests::process::alive;
use nave_tests::{Cluster, Setup, eventually};

use crate::deploy_and_serve::pid;
use crate::manifests::sleeper;

#[test]
fn two_of_three_gone_and_back() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 1 });
    cluster.apply(&sleeper("sleeper", 3), &["--wait"]).expect(0);
    let before: Vec<u32> = cluster.wait_ready("sleeper", 3).iter().map(pid).collect();

    cluster.members[1].kill();
    cluster.members[2].kill();

    let refused = cluster.apply(&sleeper("other", 1), &[]);
    assert_eq!(refused.code, 3, "{}", refused.text());
    assert!(refused.took < Duration::from_secs(10), "refused after {:?}", refused.took);
    assert!(refused.stderr.contains("leader") || refused.stderr.contains("member"), "{}", refused.stderr);

    let stale = cluster.nave(&["ps", "sleeper"]).expect(0);
    assert_eq!(stale.stdout.matches("i-").count(), 3, "{}", stale.stdout);
    assert!(stale.stderr.contains("old"), "marked as stale: {:?}", stale.stderr);
    assert!(before.iter().all(|pid| alive(*pid)));

    cluster.members[1].start();
    cluster.members[2].start();
    cluster.wait_for_leader();
    cluster.apply(&sleeper("other", 1), &["--wait"]).expect(0);
    let after: Vec<u32> = cluster.wait_ready("sleeper", 3).iter().map(pid).collect();
    assert_eq!(before, after, "no process noticed");
}

/// Five members carry on without two, the leader among them, and refuse without a third.
#[test]
fn two_of_five_gone_change_nothing() {
    let mut cluster = Cluster::start(&Setup { members: 5, agents: 1 });
    cluster.apply(&sleeper("sleeper", 2), &["--wait"]).expect(0);
    let before: Vec<u32> = cluster.wait_ready("sleeper", 2).iter().map(pid).collect();

    let leader = cluster.wait_for_leader();
    let gone = [leader, (leader + 1) % 5, (leader + 2) % 5];
    cluster.members[gone[0]].kill();
    cluster.members[gone[1]].kill();
    cluster.apply(&sleeper("without-two", 1), &["--wait"]).expect(0);
    cluster.members[gone[2]].kill();
    assert_eq!(cluster.apply(&sleeper("without-three", 1), &[]).code, 3);

    gone.iter().for_each(|member| cluster.members[*member].start());
    cluster.wait_for_leader();
    cluster.apply(&sleeper("with-all", 1), &["--wait"]).expect(0);
    eventually("all five have everything", SOON, || cluster.settled(5));
    let after: Vec<u32> = cluster.wait_ready("sleeper", 2).iter().map(pid).collect();
    assert_eq!(before, after, "no process noticed");
}
