//! What a restore makes of a snapshot's rows. A restored hub begins a new incarnation, and hands out nothing that the
//! old one may have handed out after the snapshot: no revision, no id. Everything else is as it was, so agents that
//! come back find the instances that they run.

use std::collections::BTreeSet;

use nave_proto::pb;
use nave_proto::pb::row::Row;

/// Revisions left out. The old hub cannot have reached them since the snapshot: at 100,000 commands a second without
/// a pause this is 127 days of log. Revisions stay exact in JSON (2^53) over eight thousand restores.
pub const REVISION_GAP: u64 = 1 << 40;
/// Instance ids left out: placements since the snapshot.
pub const INSTANCE_GAP: u64 = 100_000_000;
/// Host ids left out: enrolments since the snapshot.
pub const HOST_GAP: u64 = 100_000;
/// Member ids left out: members added since the snapshot.
pub const MEMBER_GAP: u64 = 100;

/// What the restored hub is to be.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Target {
    pub cluster_id: String,
    /// Greater than every incarnation before; the caller takes the time.
    pub incarnation: u64,
    /// One more than any member id that is known of, in the snapshot's membership or elsewhere.
    pub member_id_floor: u64,
    /// The cluster's row and applied index that the machine held before, when they can be read: what the old hub is
    /// known to have reached.
    pub known: Option<(pb::ClusterRecord, u64)>,
}

/// Why these rows cannot become a hub.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotRestorable {
    #[error("it is of a cluster that had not begun yet: it holds nothing")]
    Empty,
    #[error(
        "the incarnation {incarnation} is not above the snapshot's, {found}; is this machine's clock right?"
    )]
    Incarnation { incarnation: u64, found: u64 },
}

/// The rows of the restored hub. For another cluster only what people wrote goes over, services with their versions
/// and events: its hosts have to enrol, and the instances are placed anew.
pub fn restored(rows: Vec<pb::Row>, target: &Target) -> Result<Vec<pb::Row>, NotRestorable> {
    let cluster = rows.iter().find_map(|row| match &row.row {
        Some(Row::Cluster(cluster)) => Some(cluster.clone()),
        _ => None,
    });
    let cluster = cluster.ok_or(NotRestorable::Empty)?;
    if target.incarnation <= cluster.incarnation {
        return Err(NotRestorable::Incarnation {
            incarnation: target.incarnation,
            found: cluster.incarnation,
        });
    }
    let same = cluster.cluster_id == target.cluster_id;
    let deleting: BTreeSet<String> = rows.iter().filter_map(deleting).map(str::to_owned).collect();
    let mut kept = rows;
    kept.retain(|row| is_kept(row, same, &deleting));
    kept.push(pb::Row { row: Some(Row::Cluster(successor(cluster, target, same))) });
    Ok(kept)
}

/// A service that waits for its instances to be gone, which another cluster never had.
fn deleting(row: &pb::Row) -> Option<&str> {
    match &row.row {
        Some(Row::Service(service)) if service.deleting => Some(&service.name),
        _ => None,
    }
}

fn is_kept(row: &pb::Row, same: bool, deleting: &BTreeSet<String>) -> bool {
    match &row.row {
        // Written anew.
        Some(Row::Cluster(_)) => false,
        Some(Row::Service(service)) => same || !deleting.contains(&service.name),
        Some(Row::Version(version)) => same || !deleting.contains(&version.service),
        Some(Row::Event(_)) => true,
        Some(Row::Host(_) | Row::Instance(_) | Row::Token(_) | Row::Dedup(_) | Row::Session(_)) => same,
        // The reader has refused these.
        None => true,
    }
}

fn successor(old: pb::ClusterRecord, target: &Target, same: bool) -> pb::ClusterRecord {
    let known = target.known.as_ref().filter(|_| same);
    let reached = |of: fn(&pb::ClusterRecord) -> u64| known.map_or(0, |(record, _)| of(record)).max(of(&old));
    // The snapshot's own applied index comes on top of the base again, so bases alone are compared.
    let base = known.map_or(0, |(record, applied)| record.revision_base + applied).max(old.revision_base);
    let next_member_id = reached(|record| record.next_member_id).max(target.member_id_floor) + MEMBER_GAP;
    pb::ClusterRecord {
        cluster_id: target.cluster_id.clone(),
        incarnation: target.incarnation,
        revision_base: base + REVISION_GAP,
        next_host_id: reached(|record| record.next_host_id) + HOST_GAP,
        next_instance_id: reached(|record| record.next_instance_id) + INSTANCE_GAP,
        next_member_id,
        joining: Vec::new(),
        retired_members: Vec::new(),
        ..old
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(row: Row) -> pb::Row {
        pb::Row { row: Some(row) }
    }

    fn rows() -> Vec<pb::Row> {
        let joining = vec![pb::MemberReservation { id: 5, ..Default::default() }];
        vec![
            row(Row::Cluster(pb::ClusterRecord {
                cluster_id: "a".into(),
                incarnation: 3,
                revision_base: 10,
                next_host_id: 4,
                next_instance_id: 20,
                next_member_id: 6,
                next_uid: 7,
                joining,
                ..Default::default()
            })),
            row(Row::Service(pb::ServiceRecord { name: "web".into(), ..Default::default() })),
            row(Row::Service(pb::ServiceRecord { name: "old".into(), deleting: true, ..Default::default() })),
            row(Row::Version(pb::VersionRecord { service: "old".into(), ..Default::default() })),
            row(Row::Host(pb::HostRecord { id: 1, ..Default::default() })),
            row(Row::Instance(pb::InstanceRecord { id: 1, ..Default::default() })),
            row(Row::Token(pb::TokenRecord::default())),
            row(Row::Dedup(pb::DedupRecord::default())),
        ]
    }

    fn target(cluster_id: &str) -> Target {
        Target { cluster_id: cluster_id.into(), incarnation: 9, member_id_floor: 8, known: None }
    }

    fn cluster(rows: &[pb::Row]) -> pb::ClusterRecord {
        rows.iter()
            .find_map(|r| if let Some(Row::Cluster(c)) = &r.row { Some(c.clone()) } else { None })
            .unwrap()
    }

    #[test]
    fn everything_stays_and_nothing_is_handed_out_twice() {
        let restored = restored(rows(), &target("a")).unwrap();
        assert_eq!(restored.len(), rows().len());
        let now = cluster(&restored);
        assert_eq!((now.incarnation, now.revision_base, now.next_uid), (9, 10 + REVISION_GAP, 7));
        assert_eq!((now.next_host_id, now.next_instance_id), (4 + HOST_GAP, 20 + INSTANCE_GAP));
        assert_eq!((now.next_member_id, now.joining.len()), (8 + MEMBER_GAP, 0));
    }

    #[test]
    fn what_the_old_hub_is_known_to_have_reached_counts() {
        let reached = pb::ClusterRecord { revision_base: 50, next_instance_id: 70, ..cluster(&rows()) };
        let restored = restored(rows(), &Target { known: Some((reached, 1000)), ..target("a") }).unwrap();
        let now = cluster(&restored);
        assert_eq!((now.revision_base, now.next_instance_id), (1050 + REVISION_GAP, 70 + INSTANCE_GAP));
    }

    #[test]
    fn another_cluster_gets_what_people_wrote() {
        let restored = restored(rows(), &target("b")).unwrap();
        assert_eq!(cluster(&restored).cluster_id, "b");
        let services = restored.iter().filter(|r| matches!(r.row, Some(Row::Service(_)))).count();
        assert_eq!((services, restored.len()), (1, 2));
    }

    #[test]
    fn an_incarnation_does_not_come_back_and_nothing_is_not_restored() {
        let old = Target { incarnation: 3, ..target("a") };
        assert_eq!(restored(rows(), &old), Err(NotRestorable::Incarnation { incarnation: 3, found: 3 }));
        assert_eq!(restored(Vec::new(), &old), Err(NotRestorable::Empty));
    }
}
