//! Brings the Raft membership to what the cluster's row says, on the leader, one change at a time. What comes next is
//! `nave_orchestrator_core::members`' to say; here it is done, and what it waits for is kept for people to see.
//! While nobody is joining or leaving this looks at a few ids twice a second.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nave_orchestrator_core::members::{self, Membership, Next, Step};
use nave_proto::ids::MemberId;
use nave_proto::pb;
use pb::change_member::Change;
use pb::command::Body;
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Looks, leadership};
use crate::api::{self, Hub};
use crate::raft::{MemberNode, MembershipError, MembershipView};

const TICK: Duration = Duration::from_millis(500);
/// After a step the next one follows at once; one that did not work is tried again at a tick.
const DEADLINE: Duration = Duration::from_secs(5);
/// How long a member that is to join may take to answer.
const PROBE: Duration = Duration::from_secs(1);

/// Works while this member leads, until it stops.
pub(crate) async fn run(hub: Arc<Hub>) {
    while let Some(term) = leadership(&hub).await {
        let mut looks = Looks::new(&hub, term, TICK);
        while looks.next().await {
            while step(&hub).await {}
        }
        hub.member_notes.lock().clear();
        if hub.stop.is_cancelled() {
            return;
        }
    }
}

/// One look and at most one change; true: something was done, so look again.
async fn step(hub: &Hub) -> bool {
    let Some(cluster) = hub.raft.state().cluster().cloned() else { return false };
    let mut view = hub.raft.membership();
    if is_settled(&cluster, &view.membership) {
        if !hub.member_notes.lock().is_empty() {
            hub.member_notes.lock().clear();
        }
        return false;
    }
    view.membership.probed = probe(hub, &cluster, &view.membership).await;
    let Next { step, waits } = members::next(&cluster, &view.membership);
    note(hub, waits);
    let Some(step) = step else { return false };
    match take(hub, &cluster, &view, &step).await {
        Ok(()) => {
            info!(?step, "membership changed");
            true
        }
        Err(error) => {
            warn!(?step, error, "a change of the membership did not go through, looking again");
            false
        }
    }
}

/// Nothing to do, seen without asking anybody.
fn is_settled(cluster: &pb::ClusterRecord, raft: &Membership) -> bool {
    let leaving = cluster.retired_members.iter().any(|id| raft.members.contains_key(&MemberId(*id)));
    cluster.joining.is_empty() && !leaving && raft.configs.len() == 1
}

/// Asks those that are to join and are not in the membership yet.
async fn probe(
    hub: &Hub,
    cluster: &pb::ClusterRecord,
    raft: &Membership,
) -> BTreeMap<MemberId, Result<(), String>> {
    let mut probed = BTreeMap::new();
    for joining in &cluster.joining {
        let id = MemberId(joining.id);
        if raft.members.contains_key(&id) {
            continue;
        }
        if let Some(info) = hub.peers.info(id, &joining.address, PROBE).await {
            probed.insert(id, may_join(&info, hub.raft.state().command_format()));
        }
    }
    probed
}

fn may_join(info: &pb::MemberInfo, format: u32) -> Result<(), String> {
    if info.last_log_index != 0 || info.term != 0 {
        return Err("has a log already; start it with an empty data directory".to_owned());
    }
    if info.command_format < format {
        return Err(format!(
            "runs nave {}, which is older than this cluster: it knows command formats up to {}, and {format} is in use",
            info.version, info.command_format
        ));
    }
    Ok(())
}

/// What is waited for, for `nave cluster status`; said in the log when it changes.
fn note(hub: &Hub, waits: BTreeMap<MemberId, String>) {
    let mut notes = hub.member_notes.lock();
    for (member, why) in &waits {
        // A count of entries changes all the time.
        let kind =
            |text: &str| text.trim_matches(|c: char| !c.is_alphabetic()).chars().take(12).collect::<String>();
        if notes.get(member).is_none_or(|before| kind(before) != kind(why)) {
            info!(%member, why, "a change of members waits");
        }
    }
    *notes = waits;
}

async fn take(
    hub: &Hub,
    cluster: &pb::ClusterRecord,
    view: &MembershipView,
    step: &Step,
) -> Result<(), String> {
    let changed = match step {
        Step::Flatten => hub.raft.flatten_membership(view).await,
        Step::AddLearner(id) => {
            let joining = cluster.joining.iter().find(|joining| joining.id == id.0);
            let joining = joining.expect("only those that join are added");
            let node = MemberNode { name: joining.name.clone(), address: joining.address.clone() };
            hub.raft.add_learner(view, *id, node).await
        }
        Step::SetVoters(voters) => hub.raft.set_voters(view, voters).await,
        Step::RemoveLearner(id) => hub.raft.remove_learner(view, *id).await,
        Step::HandOver { .. } => {
            return hub.raft.transfer_leader(None).await.map(drop).map_err(|error| error.to_string());
        }
        Step::Settle(id) => return settle(hub, *id).await,
    };
    match changed {
        Ok(()) => verified(hub),
        Err(MembershipError::Moved) => Err("the membership or the leader has changed meanwhile".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// The end of a change is one plain, committed membership; anything else is looked at again.
fn verified(hub: &Hub) -> Result<(), String> {
    let now = hub.raft.membership().membership;
    match now.configs.len() {
        1 => Ok(()),
        _ => Err("the membership is still joint".to_owned()),
    }
}

async fn settle(hub: &Hub, id: MemberId) -> Result<(), String> {
    let change =
        pb::ChangeMember { id_floor: 0, change: Some(Change::Settle(pb::SettleMember { id: id.0 })) };
    let command = api::command("hub".to_owned(), None, Body::ChangeMember(change));
    hub.raft.propose(command, Instant::now() + DEADLINE).await.map(drop).map_err(|error| error.to_string())
}
