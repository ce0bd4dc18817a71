//! Changes of members as a person asks for them. A call only says in the log what shall be; the leader's controller
//! brings the membership there, whoever leads by then, so a call may be repeated and its answer may be lost.

use std::collections::BTreeMap;

use nave_orchestrator_core::members as core;
use nave_proto::ids::MemberId;
use nave_proto::pb;
use pb::change_member::Change;
use pb::command::Body;
use tonic::{Request, Status};

use crate::api::peers::{INFO_TIMEOUT, Listed};
use crate::api::{Hub, access, convert, deadline, errors, member};
use crate::config::{MEMBERS_MAX, is_host_port};
use crate::raft::RaftStatus;

/// The command format that knows of changes of members.
const FORMAT: u32 = 3;
const NAME_BYTES_MAX: usize = 63;

/// Reserves an id for a member that shall join.
pub(crate) async fn add(
    hub: &Hub,
    request: &Request<pb::AddMemberRequest>,
) -> Result<pb::AddMemberResponse, Status> {
    let pb::AddMemberRequest { name, address, replaces } = request.get_ref();
    check_address(address)?;
    check_name(name)?;
    hub.read(request, true).await?;
    let status = hub.raft.status();
    let old = match replaces.as_str() {
        "" => None,
        named => Some(find(&status, named).ok_or_else(|| no_such(named))?),
    };
    let members = list(hub, &status).await;
    for (id, node, _) in status.members.iter().filter(|(id, _, _)| Some(*id) != old) {
        if node.address == *address && (name.is_empty() || *name == node.name) && old.is_none() {
            return Ok(added(hub, *id, &node.name, address, members, true));
        }
        if node.address == *address || node.name == *name {
            return Err(errors::failed_precondition(
                "MEMBER_EXISTS",
                format!(
                    "{id} ({}) is a member at {}; `nave cluster status` lists them",
                    node.name, node.address
                ),
            ));
        }
    }
    check_formats(hub, &status).await?;
    check_count(hub, &status, address, old)?;
    let change = Change::Reserve(pb::ReserveMember {
        name: name.clone(),
        address: address.clone(),
        replaces: old.map_or(0, |old| old.0),
    });
    let committed = commit(hub, request, change).await?;
    let id = MemberId(committed.accepted.member_id);
    // Written by this member or not, the name is in the log by now; ours may be a moment behind.
    let name = if name.is_empty() { format!("member-{}", id.0) } else { name.clone() };
    Ok(added(hub, id, &name, address, members, committed.accepted.duplicate))
}

fn added(
    hub: &Hub,
    id: MemberId,
    name: &str,
    address: &str,
    members: Vec<pb::Member>,
    already: bool,
) -> pb::AddMemberResponse {
    pb::AddMemberResponse {
        id: id.to_string(),
        name: name.to_owned(),
        address: address.to_owned(),
        cluster_id: hub.cluster.to_string(),
        members,
        already,
    }
}

/// Has a member leave, or gives up one that is joining.
pub(crate) async fn remove(
    hub: &Hub,
    request: &Request<pb::RemoveMemberRequest>,
) -> Result<pb::RemoveMemberResponse, Status> {
    let named = request.get_ref().member.as_str();
    hub.read(request, true).await?;
    let status = hub.raft.status();
    let Some((id, name)) = known(hub, &status, named) else {
        // The same request a second time.
        return match named.parse().map(|id| (id, hub.raft.standing(id))) {
            Ok((id, pb::MemberStanding::Removed)) => {
                Ok(pb::RemoveMemberResponse { id: id.to_string(), name: String::new() })
            }
            Ok(_) | Err(_) => Err(no_such(named)),
        };
    };
    check_formats(hub, &status).await?;
    if status.members.iter().any(|(other, _, _)| *other == id) {
        let seen = seen(hub, &status).await;
        core::refuse_removal(id, &seen).map_err(|why| errors::failed_precondition("MAJORITY_NEEDED", why))?;
    }
    commit(hub, request, Change::Retire(pb::RetireMember { id: id.0 })).await?;
    Ok(pb::RemoveMemberResponse { id: id.to_string(), name })
}

async fn commit<T>(hub: &Hub, request: &Request<T>, change: Change) -> Result<crate::api::Committed, Status> {
    let id_floor = hub.raft.highest_member_id() + 1;
    let body = Body::ChangeMember(pb::ChangeMember { id_floor, change: Some(change) });
    hub.write_as(access::actor(request), None, body, deadline::of(request.metadata())).await
}

/// A member of the Raft membership by id or name.
fn find(status: &RaftStatus, named: &str) -> Option<MemberId> {
    let is = |(id, node, _): &&Listed| id.to_string() == named || node.name == named;
    status.members.iter().find(is).map(|(id, _, _)| *id)
}

/// The same, or one that is joining.
fn known(hub: &Hub, status: &RaftStatus, named: &str) -> Option<(MemberId, String)> {
    let is = |(id, node, _): &&Listed| id.to_string() == named || node.name == named;
    if let Some((id, node, _)) = status.members.iter().find(is) {
        return Some((*id, node.name.clone()));
    }
    let state = hub.raft.state();
    let joining = state.cluster().into_iter().flat_map(|cluster| &cluster.joining);
    let mut joining = joining.map(|joining| (MemberId(joining.id), joining.name.clone()));
    joining.find(|(id, name)| id.to_string() == named || name == named)
}

fn no_such(named: &str) -> Status {
    errors::failed_precondition(
        "NO_SUCH_MEMBER",
        format!("there is no member {named:?}; `nave cluster status` lists them"),
    )
}

fn check_address(address: &str) -> Result<(), Status> {
    if !is_host_port(address) {
        return Err(errors::invalid_field("address", &format!("{address:?} is not host:port")));
    }
    if address.starts_with("0.0.0.0:") || address.starts_with("[::]:") {
        return Err(errors::invalid_field("address", &format!("{address} cannot be dialled by others")));
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), Status> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.len() > NAME_BYTES_MAX || !name.chars().all(plain) {
        return Err(errors::invalid_field("name", "must be at most 63 letters, digits, `-`, `_` or `.`"));
    }
    if name.parse::<MemberId>().is_ok() {
        return Err(errors::invalid_field("name", &format!("{name} looks like an id")));
    }
    Ok(())
}

/// A member of an older build would stop at a command that it does not know.
async fn check_formats(hub: &Hub, status: &RaftStatus) -> Result<(), Status> {
    let infos = hub.peers.infos(&status.members, INFO_TIMEOUT).await;
    let old = infos.values().find(|info| info.command_format < FORMAT);
    old.map_or(Ok(()), |info| {
        Err(errors::failed_precondition(
            "NOT_UPGRADED",
            format!(
                "{} runs nave {}, which does not know changes of members; upgrade it first",
                info.name, info.version
            ),
        ))
    })
}

fn check_count(hub: &Hub, status: &RaftStatus, address: &str, old: Option<MemberId>) -> Result<(), Status> {
    let state = hub.raft.state();
    let joining = state.cluster().into_iter().flat_map(|cluster| &cluster.joining);
    let coming = joining.filter(|joining| joining.address != address && joining.replaces == 0).count();
    let after = status.members.len() + coming + usize::from(old.is_none());
    if after <= MEMBERS_MAX {
        return Ok(());
    }
    Err(errors::failed_precondition(
        "TOO_MANY_MEMBERS",
        format!(
            "a hub has at most {MEMBERS_MAX} members: each more makes every write slower; remove one first"
        ),
    ))
}

/// The membership with who answers this member now.
async fn seen(hub: &Hub, status: &RaftStatus) -> core::Membership {
    let infos = hub.peers.infos(&status.members, INFO_TIMEOUT).await;
    let mut membership = hub.raft.membership().membership;
    for (id, progress) in &mut membership.members {
        progress.answers = *id == hub.id || infos.contains_key(id);
    }
    // Whoever leads: here it matters only whether the rest can go on.
    membership.own = MemberId(0);
    membership
}

/// The members as this one sees them: what it knows, and what the others said just now.
pub(crate) async fn list(hub: &Hub, status: &RaftStatus) -> Vec<pb::Member> {
    let mut infos = hub.peers.infos(&status.members, INFO_TIMEOUT).await;
    infos.insert(hub.id, member::info(hub));
    let leader = status.leader.and_then(|leader| infos.get(&leader));
    let last = leader.map_or(status.last_log_index, |leader| leader.last_log_index);
    let notes: BTreeMap<u64, String> =
        leader.map(|leader| leader.membership_notes.clone()).unwrap_or_default().into_iter().collect();
    let note = |id: u64| notes.get(&id).cloned().unwrap_or_default();
    let state = hub.raft.state();
    let cluster = state.cluster();
    let leaving = |id: u64| cluster.is_some_and(|cluster| cluster.retired_members.contains(&id));
    let mut members: Vec<pb::Member> = status
        .members
        .iter()
        .map(|listed| {
            let mut shown = shown(listed, infos.get(&listed.0), status, last);
            shown.note = note(listed.0.0);
            if shown.note.is_empty() && leaving(listed.0.0) {
                shown.note = "is leaving".to_owned();
            }
            shown
        })
        .collect();
    let there = |id: u64| status.members.iter().any(|(other, _, _)| other.0 == id);
    let joining = cluster.into_iter().flat_map(|cluster| &cluster.joining);
    members.extend(joining.filter(|joining| !there(joining.id)).map(|joining| pb::Member {
        id: MemberId(joining.id).to_string(),
        name: joining.name.clone(),
        address: joining.address.clone(),
        role: "joining".to_owned(),
        note: note(joining.id),
        ..Default::default()
    }));
    members
}

fn shown(
    (id, node, voter): &Listed,
    info: Option<&pb::MemberInfo>,
    status: &RaftStatus,
    last: u64,
) -> pb::Member {
    let role = match (info.is_some(), voter, status.leader == Some(*id)) {
        (false, _, _) => "unknown",
        (true, _, true) => "leader",
        (true, true, false) => "follower",
        (true, false, false) => "learner",
    };
    let mut shown = pb::Member {
        id: id.to_string(),
        name: node.name.clone(),
        address: node.address.clone(),
        role: role.to_owned(),
        ..Default::default()
    };
    if let Some(info) = info {
        shown.reachable = true;
        shown.applied_index = info.applied_index;
        shown.version.clone_from(&info.version);
        shown.lag_entries = last.saturating_sub(info.applied_index);
        shown.snapshot_index = info.snapshot_index;
        shown.snapshot_time = convert::timestamp(info.snapshot_unix_ns);
        shown.backup_time = convert::timestamp(info.backup_unix_ns);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_are_checked() {
        check_address("hub-4:7400").unwrap();
        for wrong in ["", "hub-4", "0.0.0.0:7400", "hub-4:0"] {
            assert!(check_address(wrong).is_err(), "{wrong}");
        }
        check_name("member-4").unwrap();
        check_name("").unwrap();
        for wrong in ["a b", "m-4", "a/b"] {
            assert!(check_name(wrong).is_err(), "{wrong}");
        }
    }
}
