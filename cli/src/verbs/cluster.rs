//! `nave cluster status|transfer`.

use nave_proto::pb;
use serde::Serialize;

use crate::args::Listing;
use crate::client::{Hub, note_age};
use crate::failure::Failure;
use crate::out::{self, Tone};
use crate::table::{Cell, Table};
use crate::{clock, when};

#[derive(Debug, Serialize)]
pub(super) struct StatusRow<'a> {
    cluster_id: &'a str,
    incarnation: u64,
    leader: &'a str,
    term: u64,
    revision: u64,
    answered_by: &'a str,
    members: Vec<MemberRow<'a>>,
}

#[derive(Debug, Serialize)]
struct MemberRow<'a> {
    id: &'a str,
    name: &'a str,
    address: &'a str,
    role: &'a str,
    reachable: bool,
    applied_index: u64,
    lag_entries: u64,
    snapshot_index: u64,
    snapshot_time: String,
    backup_time: String,
    note: &'a str,
    version: &'a str,
}

impl<'a> From<&'a pb::ClusterStatus> for StatusRow<'a> {
    fn from(status: &'a pb::ClusterStatus) -> Self {
        Self {
            cluster_id: &status.cluster_id,
            incarnation: status.incarnation,
            leader: &status.leader,
            term: status.term,
            revision: status.revision,
            answered_by: &status.answered_by,
            members: status
                .members
                .iter()
                .map(|member| MemberRow {
                    id: &member.id,
                    name: &member.name,
                    address: &member.address,
                    role: &member.role,
                    reachable: member.reachable,
                    applied_index: member.applied_index,
                    lag_entries: member.lag_entries,
                    snapshot_index: member.snapshot_index,
                    snapshot_time: when::rfc3339(when::timestamp(member.snapshot_time.as_ref())),
                    backup_time: when::rfc3339(when::timestamp(member.backup_time.as_ref())),
                    note: &member.note,
                    version: &member.version,
                })
                .collect(),
        }
    }
}

pub(super) async fn read(hub: &Hub) -> Result<pb::ClusterStatus, Failure> {
    let status =
        hub.read(|mut member| async move {
            member.cluster.get_cluster_status(pb::GetClusterStatusRequest {}).await
        })
        .await?;
    note_age(status.freshness.as_ref());
    Ok(status)
}

pub(super) async fn status(args: &Listing, hub: &Hub) -> Result<(), Failure> {
    let status = read(hub).await?;
    if args.json() {
        out::json(&StatusRow::from(&status));
        return Ok(());
    }
    let led =
        !status.leader.is_empty() && status.freshness.as_ref().is_none_or(|freshness| freshness.has_leader);
    let leader = match status.leader.as_str() {
        leader if led => leader.to_owned(),
        "" => out::paint(Tone::Bad, "none"),
        // It has not been replaced, and cannot be.
        last => out::paint(Tone::Bad, &format!("none ({last} has lost its majority)")),
    };
    out::line(format_args!(
        "cluster {}  leader {leader}, term {}, revision {}",
        status.cluster_id, status.term, status.revision
    ));
    let now = clock::now();
    let age = |time: Option<&prost_types::Timestamp>| when::age(when::timestamp(time), now);
    let heads = [
        "ID",
        "NAME",
        "ADDRESS",
        "ROLE",
        "REACHABLE",
        "APPLIED",
        "LAG",
        "SNAPSHOT",
        "BACKUP",
        "VERSION",
        "NOTE",
    ];
    let mut table = Table::new(heads);
    for member in &status.members {
        let role = if member.role == "leader" { Tone::Good } else { Tone::Plain };
        let reachable =
            if member.reachable { Cell::new("yes", Tone::Good) } else { Cell::new("no", Tone::Bad) };
        table.row([
            member.id.as_str().into(),
            member.name.as_str().into(),
            member.address.as_str().into(),
            Cell::new(member.role.as_str(), role),
            reachable,
            if member.reachable { member.applied_index.to_string().into() } else { "-".into() },
            if member.reachable { member.lag_entries.to_string().into() } else { "-".into() },
            age(member.snapshot_time.as_ref()).into(),
            age(member.backup_time.as_ref()).into(),
            member.version.as_str().into(),
            Cell::new(member.note.as_str(), Tone::Warning),
        ]);
    }
    table.print();
    let voters =
        status.members.iter().filter(|member| !matches!(member.role.as_str(), "joining" | "learner"));
    let (voters, away) =
        voters.fold((0, 0), |(all, away), member| (all + 1, away + usize::from(!member.reachable)));
    if !led {
        let needed = voters / 2 + 1;
        out::note(format_args!(
            "{away} of {voters} members are away; {needed} are needed to change anything. What runs goes on running"
        ));
    }
    Ok(())
}

pub(super) async fn transfer(to: Option<String>, hub: &Hub) -> Result<(), Failure> {
    let request = pb::TransferLeaderRequest { to: to.unwrap_or_default() };
    let moved = hub
        .write(|mut member| {
            let request = request.clone();
            async move { member.cluster.transfer_leader(request).await }
        })
        .await?;
    out::line(format_args!("{} leads now, term {}", moved.leader, moved.term));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_one_object_with_the_fields_of_the_contract() {
        let status = pb::ClusterStatus {
            leader: "member-1".into(),
            term: 3,
            revision: 9,
            members: vec![pb::Member { id: "m-1".into(), reachable: true, ..Default::default() }],
            ..Default::default()
        };
        let object = serde_json::to_value(StatusRow::from(&status)).unwrap();
        assert_eq!(
            (&object["leader"], &object["term"], &object["revision"]),
            (&"member-1".into(), &3.into(), &9.into())
        );
        for field in ["id", "name", "address", "role", "reachable", "applied_index"] {
            assert!(object["members"][0].get(field).is_some(), "{field}");
        }
    }
}
