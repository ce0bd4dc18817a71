//! `kill -9` of the leader, to the next write that the API acknowledges through a survivor; the killed member is started
//! again each time.

use std::time::Duration;

use nave_tests::api::Api;
use nave_tests::{Cluster, Setup, eventually};
use tokio::time::Instant;

use crate::load::runtime;

const KILLS: usize = 20;

pub(crate) fn run() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(&Setup { members: 3, agents: 1 });
    let runtime = runtime()?;
    let api = {
        let _inside = runtime.enter();
        Api::open(&cluster.context())?
    };
    let mut times = Vec::new();
    for kill in 0..KILLS {
        let leader = cluster.wait_for_leader();
        runtime.block_on(write_until_acknowledged(&api, leader, &format!("before-{kill}")));
        cluster.members[leader].kill();
        let began = Instant::now();
        runtime.block_on(write_until_acknowledged(&api, leader + 1, &format!("after-{kill}")));
        times.push(began.elapsed());
        cluster.members[leader].start();
        eventually("all members are back", Duration::from_secs(30), || {
            let status = cluster.try_json(&["cluster", "status"]);
            status.is_some_and(|s| {
                s["members"].as_array().is_some_and(|all| all.iter().all(|m| m["reachable"] == true))
            })
        });
    }
    times.sort_unstable();
    println!("| kills | min ms | median ms | max ms |\n|---|---|---|---|");
    let ms = |time: Duration| time.as_millis();
    println!("| {KILLS} | {} | {} | {} |", ms(times[0]), ms(times[KILLS / 2]), ms(times[KILLS - 1]));
    Ok(())
}

/// Tries the members in turn, a new try each 5 ms, as a client that wants its write done would.
async fn write_until_acknowledged(api: &Api, first: usize, name: &str) {
    let mut member = first;
    let id = nave_proto::pb::RequestId { client_id: format!("failover-{name}"), serial: 1 };
    loop {
        let write = api.write(member, name, Some(id.clone()));
        if tokio::time::timeout(Duration::from_secs(2), write).await.is_ok_and(|done| done.is_ok()) {
            return;
        }
        member += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
