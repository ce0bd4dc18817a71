//! Promise: with two of three members gone, changes are refused clearly and soon, old answers are still given and
//! marked as such, processes are left alone; when the members are back, all goes on.

use std::time::Duration;

use nave_tests::process::alive;
use nave_tests::{Cluster, Setup};

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
