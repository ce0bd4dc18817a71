//! What the members shall be: ids reserved for those that join, and those that leave. The Raft membership itself is
//! not in here; the leader brings it to what these rows say (`members.rs` decides each step).

use nave_proto::ids::MemberId;
use nave_proto::pb;
use nave_proto::pb::RejectedCode;
use nave_proto::pb::change_member::Change;

use super::{Outcome, Tx, rejected};
use crate::events::Subject;
use crate::limits::{MEMBERS_JOINING_MAX, MEMBERS_RETIRED_KEPT};

impl Tx<'_> {
    pub(super) fn change_member(&mut self, command: pb::ChangeMember) -> Outcome {
        match command.change {
            Some(Change::Reserve(reserve)) => self.reserve_member(command.id_floor, reserve),
            Some(Change::Settle(settle)) => self.settle_member(settle.id),
            Some(Change::Retire(retire)) => self.retire_member(command.id_floor, retire.id),
            None => Err(rejected(RejectedCode::Invalid, "a change of members that this build does not know")),
        }
    }

    fn reserve_member(&mut self, id_floor: u64, command: pb::ReserveMember) -> Outcome {
        let joining = self.state.cluster.iter().flat_map(|cluster| &cluster.joining);
        if let Some(known) = joining.clone().find(|known| known.address == command.address) {
            let same_name = command.name.is_empty() || command.name == known.name;
            if same_name && known.replaces == command.replaces {
                return Ok(pb::Accepted { member_id: known.id, duplicate: true, ..Default::default() });
            }
            let message = format!(
                "{} ({}) is joining at {}; give it up first with `nave cluster remove {0}`",
                MemberId(known.id),
                known.name,
                known.address
            );
            return Err(rejected(RejectedCode::Conflict, message));
        }
        let with_name = |known: &&pb::MemberReservation| known.name == command.name;
        if let Some(known) = joining.clone().find(with_name) {
            let message = format!("{} is joining under the name {:?}", MemberId(known.id), known.name);
            return Err(rejected(RejectedCode::Conflict, message));
        }
        let in_place =
            |known: &&pb::MemberReservation| known.replaces != 0 && known.replaces == command.replaces;
        if let Some(known) = joining.clone().find(in_place) {
            let (new, old) = (MemberId(known.id), MemberId(known.replaces));
            return Err(rejected(
                RejectedCode::Conflict,
                format!("{new} is taking the place of {old} already"),
            ));
        }
        if joining.count() >= MEMBERS_JOINING_MAX {
            let message = format!("{MEMBERS_JOINING_MAX} members are joining already; wait until they have");
            return Err(rejected(RejectedCode::Exhausted, message));
        }
        let now = self.now;
        let reservation = self.edit_cluster(|cluster| {
            let id = cluster.next_member_id.max(id_floor).max(1);
            cluster.next_member_id = id + 1;
            let name = if command.name.is_empty() { format!("member-{id}") } else { command.name };
            let reservation = pb::MemberReservation {
                id,
                name,
                address: command.address,
                replaces: command.replaces,
                reserved_unix_ns: now,
            };
            cluster.joining.push(reservation.clone());
            reservation
        });
        let Some(reservation) = reservation else {
            return Err(rejected(RejectedCode::NotBegun, "the cluster has not begun yet"));
        };
        let (id, name, address) = (MemberId(reservation.id), reservation.name, reservation.address);
        let place = match reservation.replaces {
            0 => String::new(),
            old => format!(" in the place of {}", MemberId(old)),
        };
        self.event(
            "member_joining",
            Subject::default(),
            format!("{id} ({name}) is to join at {address}{place}"),
        );
        Ok(pb::Accepted { member_id: id.0, ..Default::default() })
    }

    fn settle_member(&mut self, id: u64) -> Outcome {
        let joining = self.state.cluster.iter().flat_map(|cluster| &cluster.joining);
        let Some(settled) = joining.clone().find(|known| known.id == id).cloned() else {
            return Err(rejected(RejectedCode::NotFound, format!("{} is not joining", MemberId(id))));
        };
        self.edit_cluster(|cluster| {
            cluster.joining.retain(|known| known.id != id);
            if settled.replaces != 0 {
                retire(cluster, settled.replaces);
            }
        });
        let place = match settled.replaces {
            0 => String::new(),
            old => format!(", {} has left", MemberId(old)),
        };
        let message = format!("{} ({}) has joined{place}", MemberId(id), settled.name);
        self.event("member_joined", Subject::default(), message);
        Ok(pb::Accepted { member_id: id, ..Default::default() })
    }

    fn retire_member(&mut self, id_floor: u64, id: u64) -> Outcome {
        let known = self.state.cluster.as_ref().is_some_and(|cluster| cluster.retired_members.contains(&id));
        if known {
            return Ok(pb::Accepted { member_id: id, duplicate: true, ..Default::default() });
        }
        let next = self.state.cluster.as_ref().map_or(0, |cluster| cluster.next_member_id).max(id_floor);
        if id == 0 || id >= next {
            return Err(rejected(
                RejectedCode::NotFound,
                format!("there has been no member {}", MemberId(id)),
            ));
        }
        self.edit_cluster(|cluster| {
            cluster.next_member_id = next;
            cluster.joining.retain(|known| known.id != id);
            retire(cluster, id);
        });
        self.event("member_leaving", Subject::default(), format!("{} is to leave", MemberId(id)));
        Ok(pb::Accepted { member_id: id, ..Default::default() })
    }
}

/// The newest are kept: an older one is known by being below the next id and nowhere else.
fn retire(cluster: &mut pb::ClusterRecord, id: u64) {
    if cluster.retired_members.contains(&id) {
        return;
    }
    cluster.retired_members.push(id);
    let extra = cluster.retired_members.len().saturating_sub(MEMBERS_RETIRED_KEPT);
    cluster.retired_members.drain(..extra);
}
