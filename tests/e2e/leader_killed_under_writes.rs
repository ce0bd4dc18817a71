//! Promise (invariant 1): `kill -9` of the leader under a stream of writes loses nothing acknowledged, does nothing
//! twice, and no running process notices.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nave_proto::pb;
use nave_tests::api::Api;
use nave_tests::wait::pause;
use nave_tests::{Cluster, Setup, eventually};

use crate::deploy_and_serve::pid;
use crate::manifests::sleeper;

const WRITERS: usize = 8;

/// Writes distinct services until told to stop; retries a write under its request id until it is acknowledged.
/// Returns what was acknowledged: name and version.
async fn write_until(api: Api, writer: usize, round: &'static str, stop: Arc<AtomicBool>) -> Vec<String> {
    let mut acknowledged = Vec::new();
    let mut serial = 0;
    let mut member = writer;
    while !stop.load(Ordering::Relaxed) {
        serial += 1;
        let name = format!("{round}-{writer}-{serial}");
        let id = pb::RequestId { client_id: format!("{round}-{writer}"), serial };
        while api.write(member, &name, Some(id.clone())).await.is_err() {
            member += 1;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        acknowledged.push(name);
    }
    acknowledged
}

/// Runs `fault` while `WRITERS` writers write; returns every acknowledged name.
pub(crate) fn under_writes(
    cluster: &mut Cluster,
    round: &'static str,
    fault: impl FnOnce(&mut Cluster),
) -> Vec<String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let stop = Arc::new(AtomicBool::new(false));
    let context = cluster.context();
    let writers: Vec<_> = {
        let _inside = runtime.enter();
        let api = Api::open(&context).expect("a client");
        (0..WRITERS).map(|n| runtime.spawn(write_until(api.clone(), n, round, stop.clone()))).collect()
    };
    fault(cluster);
    stop.store(true, Ordering::Relaxed);
    runtime.block_on(async {
        let mut all = Vec::new();
        for writer in writers {
            all.extend(writer.await.expect("a writer ends"));
        }
        all
    })
}

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
