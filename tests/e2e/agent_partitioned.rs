//! Promise (invariants 3 and 4): a host that nobody hears is given up, its instances run elsewhere under a later epoch;
//! meanwhile what runs on it goes on, and when it is back the stale processes end, the later ones are left alone.

use std::time::Duration;

use nave_tests::process::alive;
use nave_tests::{Cluster, Setup, eventually, eventually_some};

use crate::deploy_and_serve::pid;
use crate::manifests::sleeper;

#[test]
fn a_host_cut_off_is_replaced_and_its_stale_processes_end() {
    let Some(cluster) = Cluster::start_on_network(&Setup { members: 3, agents: 3 }) else { return };
    cluster.apply(&sleeper("sleeper", 3), &["--wait"]).expect(0);
    let before = cluster.wait_ready("sleeper", 3);
    let victim = before.iter().find(|row| row["host"] == "agent-1").expect("spread over hosts").clone();
    let (old_pid, id) = (pid(&victim), victim["id"].clone());
    let others: Vec<u32> = before.iter().filter(|row| row["id"] != id).map(pid).collect();

    cluster.network().isolate(3, 0..3);
    let limit = Duration::from_secs(60);
    let replaced = eventually_some("it runs elsewhere", limit, || {
        let row = cluster.ps("sleeper").into_iter().find(|row| row["id"] == id)?;
        (row["ready"] == true && row["host"] != "agent-1").then_some(row)
    });
    assert!(number(&replaced["epoch"]) > number(&victim["epoch"]), "{victim} {replaced}");
    assert!(alive(old_pid), "nobody could tell it to end, and nothing else may end it");
    let hosts = cluster.json(&["hosts"]);
    let lost = hosts.as_array().expect("rows").iter().find(|host| host["name"] == "agent-1").expect("a row");
    assert_eq!(lost["status"], "lost", "{lost}");

    cluster.network().heal();
    eventually("the stale process ends", limit, || !alive(old_pid));
    cluster.wait_for_agents(3);
    let after = cluster.wait_ready("sleeper", 3);
    let same = after.iter().find(|row| row["id"] == id).expect("it is wanted");
    assert_eq!(
        (pid(same), &same["epoch"]),
        (pid(&replaced), &replaced["epoch"]),
        "the later one was left alone"
    );
    assert!(others.iter().all(|pid| alive(*pid)), "and so were the others");
}

/// Numbers of 64 bits are text in proto3's JSON.
fn number(value: &serde_json::Value) -> u64 {
    value.as_u64().or_else(|| value.as_str()?.parse().ok()).expect("a number")
}
