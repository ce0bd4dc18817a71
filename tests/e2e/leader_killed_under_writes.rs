//! Promise (invariant 1): `kill -9` of the leader under a stream of writes loses nothing acknowledged, does nothing
//! twice, and no running process notices.

use std::collections::BTreeMap;
use std::time::Duration;

use nave_tests::wait::pause;
use nave_tests::{Cluster, Setup, eventually};

use crate::deploy_and_serve::pid;
use crate::manifests::sleeper;

pub(crate) use nave_tests::writes::under_writes;

#[test]
fn nothing_acknowledged_is_missing_and_nothing_is_done_twice() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 1 });
    cluster.apply(&sleeper("sleeper", 2), &["--wait"]).expect(0);
    let before: Vec<u32> = cluster.wait_ready("sleeper", 2).iter().map(pid).collect();

    let acknowledged = under_writes(&mut cluster, "kill", |cluster| {
        for _ in 0..3 {
            let leader = cluster.wait_for_leader();
            pause(Duration::from_millis(300));
            cluster.members[leader].kill();
            eventually("a survivor leads", Duration::from_secs(30), || {
                cluster.leader().is_some_and(|next| next != leader)
            });
            cluster.members[leader].start();
            eventually("the killed member is back", Duration::from_secs(30), || {
                let status = cluster.try_json(&["cluster", "status"]);
                status.is_some_and(|s| {
                    s["members"]
                        .as_array()
                        .is_some_and(|all| all.iter().all(|member| member["reachable"] == true))
                })
            });
        }
    });

    assert!(acknowledged.len() > 100, "the writers wrote: {}", acknowledged.len());
    let services = cluster.json(&["services"]);
    let versions: BTreeMap<&str, u64> = services
        .as_array()
        .expect("an array")
        .iter()
        .map(|s| (s["name"].as_str().expect("a name"), s["version"].as_u64().expect("a version")))
        .collect();
    for name in &acknowledged {
        assert_eq!(versions.get(name.as_str()), Some(&1), "{name} was acknowledged");
    }
    let after: Vec<u32> = cluster.wait_ready("sleeper", 2).iter().map(pid).collect();
    assert_eq!(before, after, "no process noticed");
}
