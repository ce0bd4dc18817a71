//! Promise (invariant 1): what was acknowledged survives `kill -9` of all members at once.

use nave_tests::api::Api;
use nave_tests::{Cluster, Setup};

use crate::deploy_and_serve::pid;
use crate::manifests::sleeper;

#[test]
fn everything_is_there_after_a_restart() {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 1 });
    cluster.apply(&sleeper("sleeper", 2), &["--wait"]).expect(0);
    for n in 0..20 {
        cluster.apply(&sleeper(&format!("idle-{n}"), 0), &[]).expect(0);
    }
    let before: Vec<u32> = cluster.wait_ready("sleeper", 2).iter().map(pid).collect();

    cluster.members.iter_mut().for_each(nave_tests::cluster::Role::kill);
    cluster.members.iter_mut().for_each(nave_tests::cluster::Role::start);

    cluster.wait_for_leader();
    cluster.wait_for_agents(1);
    // Until a leader has told it, a member may be one write behind what it had shown; this asks for the newest.
    let runtime = tokio::runtime::Runtime::new().expect("threads start");
    runtime.block_on(async {
        let api = Api::open(&cluster.context()).expect("a client");
        for member in 0..3 {
            let services = api.service_names(member).await.expect("a leader is there");
            assert_eq!(services.len(), 21, "member {member}: {services:?}");
        }
    });
    let after: Vec<u32> = cluster.wait_ready("sleeper", 2).iter().map(pid).collect();
    assert_eq!(before, after);
    cluster.apply(&sleeper("later", 1), &["--wait"]).expect(0);
}
