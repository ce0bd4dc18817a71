//! A new cluster's first steps. Every member of the configured list offers the same first membership when its log
//! is pristine, which is safe to do on all of them; whoever then leads and finds no cluster in the state makes it,
//! with the first join token. On an old cluster both find nothing to do. A member that is added to a cluster (`join`)
//! offers nothing.

use std::sync::Arc;
use std::time::Duration;

use nave_proto::pb;
use pb::command::Body;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::standing;
use crate::api::peers::INFO_TIMEOUT;
use crate::api::{self, Hub};
use crate::config::{Bootstrap, MemberConfig};
use crate::raft::{InitializeError, MemberNode};

/// Between tries while the others are not up yet.
const RETRY: Duration = Duration::from_millis(100);
const DEADLINE: Duration = Duration::from_secs(2);
/// A first token's uses, as of any token that does not say.
const TOKEN_USES: u32 = 1000;
/// Before any restore.
const FIRST_INCARNATION: u64 = 1;

/// Does its part, then waits for the member to stop.
pub(super) async fn run(hub: Arc<Hub>, config: MemberConfig) -> Result<(), String> {
    if config.join {
        return join(&hub).await;
    }
    refuse_wiped(&hub, &config).await?;
    let members = config
        .members
        .iter()
        .map(|member| (member.id, MemberNode { name: member.name.clone(), address: member.address.clone() }))
        .collect();
    match hub.raft.initialize(members).await {
        Ok(()) => info!(members = config.members.len(), "a new log has begun"),
        Err(InitializeError::NotPristine) => debug!("the log has begun before"),
        Err(error) => return Err(format!("cannot begin a new cluster: {error}")),
    }
    tokio::select! {
        () = found(&hub, &config) => {}
        () = hub.stop.cancelled() => return Ok(()),
    }
    hub.stop.cancelled().await;
    Ok(())
}

/// A member that lost its data must not vote under its old id: it would vote for a leader that lacks what it had
/// acknowledged. The leader knows how far it was.
async fn refuse_wiped(hub: &Hub, config: &MemberConfig) -> Result<(), String> {
    let status = hub.raft.status();
    if status.last_log_index > 0 || status.applied_index > 0 || status.term > 0 {
        return Ok(());
    }
    let others = standing::others(hub.id, config, &status.members);
    let infos = hub.peers.infos(&others, INFO_TIMEOUT).await;
    let had = infos.values().map(|info| info.caller_matched_index).max().unwrap_or(0);
    match had {
        0 => Ok(()),
        had => Err(format!(
            "the data directory {} is empty, but this member had acknowledged the log up to entry {had}: under its old \
             id it could undo what was acknowledged; put its data back, or `nave cluster replace {} {}`",
            config.data_dir.display(),
            config.name,
            config.advertise
        )),
    }
}

/// Begins nothing, whatever the log holds: the cluster is there, and its leader comes to this member.
async fn join(hub: &Hub) -> Result<(), String> {
    if hub.raft.status().members.is_empty() {
        info!(member = %hub.id, "waiting to be added: the cluster's leader will come to this member");
    }
    let mut applied = hub.raft.applied();
    tokio::select! {
        () = hub.stop.cancelled() => return Ok(()),
        joined = applied.wait_for(|index| *index > 0) => {
            if joined.is_ok() {
                info!(member = %hub.id, "this member has been added to the cluster");
            }
        }
    }
    hub.stop.cancelled().await;
    Ok(())
}

/// Returns once there is a cluster in the state.
async fn found(hub: &Hub, config: &MemberConfig) {
    loop {
        if let Some(cluster) = hub.raft.state().cluster() {
            info!(incarnation = cluster.incarnation, "the cluster is there");
            return;
        }
        let status = hub.raft.status();
        if status.leader == Some(hub.id) && status.leader_proven {
            let body = pb::InitCluster {
                cluster_id: config.cluster_id.to_string(),
                incarnation: FIRST_INCARNATION,
                first_token: config.bootstrap.as_ref().map(token),
            };
            let command = api::command("hub".to_owned(), None, Body::InitCluster(body));
            match hub.raft.propose(command, Instant::now() + DEADLINE).await {
                Ok(_) => info!(cluster = %config.cluster_id, "a new cluster has begun"),
                Err(error) => warn!(%error, "the new cluster has not begun yet, trying again"),
            }
        }
        sleep(RETRY).await;
    }
}

fn token(bootstrap: &Bootstrap) -> pb::TokenRecord {
    let secret_sha256 = bootstrap.secret_sha256().expect("checked with the configuration").to_vec();
    pb::TokenRecord {
        id: bootstrap.token_id.clone(),
        secret_sha256,
        created_unix_ns: 0,
        expires_unix_ns: bootstrap.token_expires_unix.saturating_mul(1_000_000_000),
        uses_left: TOKEN_USES,
        actor: "hub".to_owned(),
        revision: 0,
    }
}
