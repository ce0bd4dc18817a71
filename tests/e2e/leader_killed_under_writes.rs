//! Promise (invariant 1): `kill -9` of the leader under a stream of writes loses nothing acknowledged, does nothing
//! twice, and no running process notices.

use std::time::Duration;

use nave_tests::api::Api;
use nave_tests::wait::pause;
use nave_tests::writes::runtime_of;
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
    // What was acknowledged is what is committed: a member that is just back may be asked for it linearizably only.
    let runtime = runtime_of(&cluster);
    for member in 0..3 {
        let versions = runtime.block_on(async {
            let api = Api::open(&cluster.context()).expect("a client");
            api.service_versions(member).await.expect("every member is back")
        });
        for name in &acknowledged {
            assert_eq!(versions.get(name), Some(&1), "{name} was acknowledged, asked of member {member}");
        }
    }
    let after: Vec<u32> = cluster.wait_ready("sleeper", 2).iter().map(pid).collect();
    assert_eq!(before, after, "no process noticed");
}
