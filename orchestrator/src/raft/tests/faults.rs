//! What a cluster of three promises while members come and go.

use std::sync::Arc;
use std::time::Duration;

use nave_proto::ids::MemberId;
use nave_proto::pb;
use openraft::storage::{RaftLogReader as _, RaftLogStorage as _};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::cluster::{Cluster, Counting, SOON, soon, token};
use crate::raft::types::Entry;
use crate::raft::{ProposeError, RaftHub, ReadError, Role, SnapshotSettings, StartError, TransferError};
use crate::storage::failure::Failure;
use crate::storage::log::LogDatabase;

const RARE: SnapshotSettings = SnapshotSettings {
    entries_between: 1_000_000,
    entries_kept: 1_000_000,
    interval_min: Duration::from_secs(3600),
};

fn accepted(reply: &pb::Reply) -> bool {
    matches!(reply.result, Some(pb::reply::Result::Accepted(_)))
}

/// Writes one token. After a fault an outcome may be unknown: then the state says whether to write it again.
async fn put(hub: &RaftHub, id: &str) {
    let mut unknown = false;
    loop {
        match hub.propose(token(id), soon()).await {
            Ok(reply) => {
                let took_effect_before = unknown && hub.state().token(id).is_some();
                assert!(accepted(&reply) || took_effect_before, "{reply:?}");
                return;
            }
            Err(ProposeError::Unknown) => unknown = true,
            Err(error) => panic!("{id}: {error}"),
        }
        hub.linearize(soon()).await.unwrap();
        if hub.state().token(id).is_some() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_member_takes_writes_and_reads_what_was_acknowledged() {
    let cluster = Cluster::start(3, RARE).await;
    cluster.leader().await;
    for round in 0..5 {
        for (writer, member) in &cluster.members {
            let name = format!("{writer}-{round}");
            put(&member.hub, &name).await;
            for (reader, other) in &cluster.members {
                other.hub.linearize(soon()).await.unwrap();
                assert!(other.hub.state().token(&name).is_some(), "{reader} has not seen {name}");
            }
        }
    }
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_in_the_log_never_go_back() {
    let cluster = Cluster::start(3, RARE).await;
    let leader = cluster.leader().await;
    let mut writers = JoinSet::new();
    for (id, member) in &cluster.members {
        let (id, hub) = (*id, member.hub.clone());
        for writer in 0..8 {
            let hub = hub.clone();
            writers.spawn(async move {
                for round in 0..5 {
                    put(&hub, &format!("{id}-{writer}-{round}")).await;
                }
            });
        }
    }
    while let Some(done) = writers.join_next().await {
        done.unwrap();
    }
    cluster.converge().await;
    let path = cluster.data_dir(leader);
    let mut cluster = cluster;
    cluster.kill(leader).await;
    let mut newest = 0;
    let mut commands = 0;
    for entry in log_of(&path).await {
        if let crate::raft::types::Payload::Normal(command) = entry.payload {
            let command = <pb::Command as prost::Message>::decode(command.0).unwrap();
            assert!(command.time_unix_ns >= newest && command.time_unix_ns > 0);
            newest = command.time_unix_ns;
            commands += 1;
        }
    }
    assert_eq!(commands, 1 + 3 * 8 * 5, "init and the tokens");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_the_leader() {
    let mut cluster = Cluster::start(3, RARE).await;
    let mut written = 0;
    for _ in 0..3 {
        let leader = cluster.leader().await;
        for _ in 0..5 {
            put(cluster.hub(leader), &format!("t{written}")).await;
            written += 1;
        }
        cluster.kill(leader).await;
        let survivor = cluster.other_than(leader);
        put(cluster.hub(survivor), &format!("t{written}")).await;
        written += 1;
        cluster.restart(leader).await;
    }
    cluster.leader().await;
    cluster.converge().await;
    let state = cluster.any().hub.state();
    for index in 0..written {
        assert!(state.token(&format!("t{index}")).is_some(), "t{index} is missing");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_leader_hands_over_first() {
    let mut cluster = Cluster::start(3, RARE).await;
    let leader = cluster.leader().await;
    put(cluster.hub(leader), "before").await;
    let other = cluster.other_than(leader);
    let mut leadership = cluster.hub(other).subscribe_status();
    leadership.mark_unchanged();
    cluster.stop(leader).await;
    // The handover was over before the leader was gone: no election time-out has passed.
    let now = *cluster.hub(other).subscribe_status().borrow();
    assert!(now.leader.is_some_and(|id| id != leader), "{now:?}");
    put(cluster.hub(other), "after").await;
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_moves_where_it_is_sent() {
    let cluster = Cluster::start(3, RARE).await;
    let leader = cluster.leader().await;
    let target = cluster.other_than(leader);
    assert_eq!(
        cluster.hub(target).transfer_leader(None).await,
        Err(TransferError::NotLeader { leader: Some(leader) })
    );
    assert_eq!(
        cluster.hub(leader).transfer_leader(Some(MemberId(9))).await,
        Err(TransferError::NotVoter { member: MemberId(9) })
    );
    assert_eq!(cluster.hub(leader).transfer_leader(Some(target)).await, Ok(target));
    assert_eq!(cluster.leader().await, target);
    let status = cluster.hub(target).status();
    assert_eq!((status.role, status.members.len()), (Role::Leader, 3));
    put(cluster.hub(leader), "through-the-old-one").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_writes_and_reads_are_refused_in_time() {
    let mut cluster = Cluster::start(3, RARE).await;
    let leader = cluster.leader().await;
    put(cluster.hub(leader), "before").await;
    cluster.converge().await;
    cluster.kill(leader).await;
    let last = cluster.other_than(leader);
    let other = cluster.other_than(last);
    cluster.kill(other).await;

    let started = Instant::now();
    let (write, read) = {
        let hub = cluster.hub(last);
        tokio::join!(hub.propose(token("refused"), soon()), hub.linearize(soon()))
    };
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(matches!(write, Err(ProposeError::Unavailable { .. } | ProposeError::Unknown)), "{write:?}");
    assert!(matches!(read, Err(ReadError::Unavailable { .. })), "{read:?}");
    assert!(cluster.hub(last).state().token("before").is_some(), "stale reads go on");
    assert!(cluster.hub(last).status().last_quorum_contact > Duration::from_millis(100));

    cluster.restart(leader).await;
    put(cluster.hub(last), "back").await;
    cluster.converge().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_far_behind_catches_up_by_snapshot() {
    let often = SnapshotSettings { entries_between: 40, entries_kept: 5, interval_min: Duration::ZERO };
    let mut cluster = Cluster::start(3, often).await;
    let leader = cluster.leader().await;
    put(cluster.hub(leader), "first").await;
    let away = cluster.other_than(leader);
    cluster.kill(away).await;
    for index in 0..120 {
        put(cluster.hub(leader), &format!("t{index}")).await;
    }
    cluster.hub(leader).trigger_snapshot().await.unwrap();
    let purged = timeout(SOON, async {
        while cluster.hub(leader).status().purged_index < 100 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(purged.await.is_ok(), "{:?}", cluster.hub(leader).status());
    cluster.restart(away).await;
    cluster.converge().await;
    let restored = cluster.members[&away].observer.restored.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(restored, 2, "once at start, once from the snapshot");
    // The core publishes what it has some time after the state shows it.
    let known = timeout(SOON, async {
        while cluster.hub(away).status().snapshot_index <= 100 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(known.await.is_ok(), "{:?}", cluster.hub(away).status());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_of_a_newer_version_is_turned_away_at_the_door() {
    let cluster = Cluster::start(3, RARE).await;
    let leader = cluster.leader().await;
    let follower = cluster.other_than(leader);
    let newer = pb::Command::default();
    let refused = cluster.hub(follower).propose(newer, soon()).await.unwrap_err();
    assert!(
        matches!(&refused, ProposeError::Refused { why } if why.contains("upgrade all members")),
        "{refused:?}"
    );
    let format = nave_proto::COMMAND_FORMAT + 1;
    let agree = pb::Command {
        body: Some(pb::command::Body::AgreeFormat(pb::AgreeFormat { format })),
        ..Default::default()
    };
    let refused = cluster.hub(follower).propose(agree, soon()).await.unwrap_err();
    assert!(matches!(refused, ProposeError::Refused { .. }), "{refused:?}");
    put(cluster.hub(follower), "the-leader-lives").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeated_requests_take_effect_once() {
    let cluster = Cluster::start(3, RARE).await;
    cluster.leader().await;
    let mut command = token("once");
    command.request_id = Some(pb::RequestId { client_id: "c1".into(), serial: 1 });
    for member in cluster.members.values() {
        let reply = member.hub.propose(command.clone(), soon()).await.unwrap();
        assert!(accepted(&reply), "{reply:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oversized_commands_and_a_full_disk_are_refused_in_words() {
    let mut cluster = Cluster::start(1, RARE).await;
    let only = cluster.leader().await;
    let large = token(&"x".repeat(crate::raft::COMMAND_BYTES_MAX));
    assert_eq!(cluster.hub(only).propose(large, soon()).await, Err(ProposeError::TooLarge));
    cluster.kill(only).await;

    let mut options = cluster.options(only);
    options.free_bytes_min = u64::MAX;
    let hub = RaftHub::start(options, Arc::new(Counting::default())).await.unwrap();
    let refused = hub.propose(token("full"), soon()).await.unwrap_err();
    assert!(
        matches!(&refused, ProposeError::Refused { why } if why.contains("free some space")),
        "{refused:?}"
    );
    hub.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_log_write_ends_the_member_and_no_other() {
    let cluster = Cluster::start(3, RARE).await;
    let leader = cluster.leader().await;
    put(cluster.hub(leader), "before").await;
    let marker = cluster.data_dir(leader).join("log/fail-writes");
    std::fs::write(&marker, "").unwrap();
    let survivor = cluster.other_than(leader);
    // The outcome of the write that meets the failure may be unknown; the next one is taken by another leader.
    let _unknown = cluster.hub(leader).propose(token("lost"), Instant::now() + Duration::from_secs(2)).await;
    let message = timeout(SOON, cluster.hub(leader).failed()).await.unwrap();
    assert!(message.contains("injected"), "{message}");
    assert_eq!(cluster.hub(leader).status().role, Role::Stopped);
    // One that was still handed to the old leader has an unknown outcome as well; others follow until one is taken.
    let taken = timeout(SOON, async {
        let mut write = 0;
        while cluster.hub(survivor).propose(token(&format!("after-{write}")), soon()).await.is_err() {
            write += 1;
        }
    });
    assert!(taken.await.is_ok(), "{:?}", cluster.hub(survivor).status());
}

#[tokio::test]
async fn a_data_directory_of_another_member_is_refused() {
    let cluster = Cluster::start(1, RARE).await;
    let id = *cluster.members.keys().next().unwrap();
    let start = |options| RaftHub::start(options, Arc::new(Counting::default()));
    let error = start(cluster.options(id)).await.unwrap_err();
    assert!(matches!(error, StartError::Directory(_)), "{error}");
    assert!(error.to_string().contains("in use by another process"), "{error}");
    let mut cluster = cluster;
    cluster.stop(id).await;
    let mut options = cluster.options(id);
    options.member = MemberId(2);
    let error = start(options).await.unwrap_err();
    assert!(error.to_string().contains("belongs to member m-1"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_are_equal_entry_by_entry_after_crashes_under_load() {
    let mut cluster = Cluster::start(3, RARE).await;
    for round in 0..3 {
        let leader = cluster.leader().await;
        let mut writers = JoinSet::new();
        for (id, member) in &cluster.members {
            let (id, hub) = (*id, member.hub.clone());
            writers.spawn(async move {
                for serial in 0..30 {
                    let name = format!("r{round}-{id}-{serial}");
                    let deadline = Instant::now() + Duration::from_secs(3);
                    if hub.propose(token(&name), deadline).await.is_err() {
                        break;
                    }
                }
            });
        }
        let mut applied = cluster.hub(leader).applied();
        let target = *applied.borrow() + 30;
        timeout(SOON, applied.wait_for(|index| *index >= target)).await.unwrap().unwrap();
        cluster.kill(leader).await;
        while let Some(done) = writers.join_next().await {
            done.unwrap();
        }
        cluster.restart(leader).await;
    }
    cluster.leader().await;
    put(&cluster.any().hub, "the-end").await;
    cluster.converge().await;
    let end = *cluster.any().hub.applied().borrow();
    let ids: Vec<MemberId> = cluster.members.keys().copied().collect();
    let mut logs = Vec::new();
    for id in ids {
        cluster.kill(id).await;
        let mut log = log_of(&cluster.data_dir(id)).await;
        // While one after another is ended, those that are left may elect again.
        log.retain(|entry| entry.log_id.index <= end);
        logs.push(log);
    }
    assert!(logs[0].len() > 90, "{}", logs[0].len());
    assert!(logs.iter().all(|log| *log == logs[0]), "the logs differ");
}

/// The whole log of a member that is down.
async fn log_of(path: &std::path::Path) -> Vec<Entry> {
    let deadline = soon();
    let database = loop {
        match LogDatabase::open(&path.join("log"), Failure::new()) {
            Ok(database) => break database,
            // A task of the member that was killed may still hold it for a moment.
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::task::yield_now().await;
    };
    let mut store = database.group(crate::raft::types::REGISTRY_GROUP).unwrap();
    store.get_log_reader().await.try_get_log_entries(..).await.unwrap()
}
