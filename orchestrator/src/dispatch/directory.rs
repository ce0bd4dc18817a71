//! What one agent has been told of the directory, and the next it is to be told. The state is the truth: this holds a
//! place in the ring of changes and which services have yet to be told for the first time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use nave_orchestrator_core::{ClusterState, directory_endpoint, directory_host, directory_service};
use nave_proto::ids::HostId;
use nave_proto::pb;
use tonic::Status;

use crate::api::errors;
use crate::watch::{Changed, Changes, Known, News, Opened, Place, Seat};

/// Services that one agent may name: more than any host runs or calls.
const INTEREST_MAX: usize = 10_000;
/// As a manifest allows.
const NAME_BYTES_MAX: usize = 63;

#[derive(Debug)]
pub(super) struct Directory {
    seat: Seat,
    /// All up to here has been looked at; nothing: the agent has been told nothing in this session.
    place: Option<Place>,
    /// The revision that the agent has been told last, in this session or before.
    told: u64,
    /// It began where an earlier session ended.
    resumed: bool,
    /// A word of the agent is due: that it has taken all up to this revision.
    due: Option<u64>,
    /// Named by the agent, and not told yet.
    owed: BTreeSet<Arc<str>>,
}

impl Directory {
    /// Of a session that has just been opened. An agent that knows the directory from before is told what has changed
    /// since, while that is still known here.
    pub(super) fn open(
        changes: &Changes,
        state: &ClusterState,
        (number, host, session): (u64, HostId, u64),
        knows: Option<pb::DirectoryKnown>,
    ) -> Self {
        let incarnation = state.cluster().map_or(0, |cluster| cluster.incarnation);
        // Another history has other changes at the same revisions.
        let known = knows.filter(|knows| knows.incarnation == incarnation && knows.revision != 0);
        let known = known.map(|knows| Known { revision: knows.revision, everything: knows.everything });
        let (seat, place) = changes.seat(Opened { number, host, session, known });
        let (told, resumed) = place.map_or((0, false), |place| (place.revision, true));
        Self { seat, place, told, resumed, due: None, owed: BTreeSet::new() }
    }

    /// The agent goes on from what it knew before.
    pub(super) fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// This member has yet to apply what the agent knows already.
    pub(super) fn is_behind(&self, state: &ClusterState) -> bool {
        state.revision() < self.told
    }

    /// Waits until there may be news, and says for how long more of them is gathered. Cancel-safe.
    pub(super) async fn rung(&self) -> Duration {
        self.seat.rung().await
    }

    /// The services whose endpoints the agent has to know, in place of those it named before.
    ///
    /// # Errors
    /// When no agent of ours would say so.
    pub(super) fn interest(&mut self, interest: pb::Interest) -> Result<(), Status> {
        if interest.services.len() > INTEREST_MAX {
            let why =
                format!("names {} services, at most {INTEREST_MAX} are allowed", interest.services.len());
            return Err(errors::invalid_field("interest", &why));
        }
        let is_name = |name: &String| !name.is_empty() && name.len() <= NAME_BYTES_MAX;
        self.owed.extend(self.seat.set_interest(interest.services.into_iter().filter(is_name)));
        Ok(())
    }

    /// The agent has taken all that it was told up to here.
    pub(super) fn acknowledged(&mut self, revision: u64) {
        if revision != 0 {
            self.seat.taken(revision.min(self.told));
            self.due.take_if(|due| *due <= revision);
        }
    }

    /// What the agent has not been told, if anything; not while the member [is behind](Self::is_behind). The state must
    /// be locked by the caller until this returns.
    pub(super) fn update(&mut self, state: &ClusterState, incarnation: u64) -> Option<pb::DirectoryUpdate> {
        let (here, everything) = self.seat.here();
        let news = self.seat.news(self.place.replace(here));
        let owed = std::mem::take(&mut self.owed);
        let mut update = match news {
            News::Changes(changed) => {
                let mut update = changes(state, &changed);
                if !everything {
                    let interest = self.seat.interest();
                    // What it has named and dropped again is nothing to it.
                    owed.iter().filter(|name| interest.contains(*name)).for_each(|name| {
                        tell_service(state, name, &mut update);
                    });
                }
                if is_empty(&update) {
                    if self.due.is_none() {
                        // What drains since is nothing to it, or it knew from before, so it has no word to say of it.
                        self.seat.taken(here.revision);
                    }
                    return None;
                }
                pb::DirectoryUpdate { from_revision: self.told, ..update }
            }
            News::Whole => whole(state, everything, &self.seat.interest()),
        };
        add_hosts(state, &mut update);
        self.told = here.revision;
        let acknowledge = self.seat.owes();
        if acknowledge {
            self.due = Some(here.revision);
        }
        Some(pb::DirectoryUpdate { incarnation, revision: here.revision, everything, acknowledge, ..update })
    }
}

fn is_empty(update: &pb::DirectoryUpdate) -> bool {
    update.services.is_empty()
        && update.removed_services.is_empty()
        && update.endpoints.is_empty()
        && update.removed_endpoints.is_empty()
        && update.hosts.is_empty()
        && update.complete.is_empty()
}

fn changes(state: &ClusterState, changed: &Changed) -> pb::DirectoryUpdate {
    let mut update = pb::DirectoryUpdate::default();
    for name in &changed.services {
        match state.service(name).and_then(|record| directory_service(record)) {
            Some(service) => update.services.push(service),
            None => update.removed_services.push(name.to_string()),
        }
    }
    for id in &changed.endpoints {
        match state.instance(*id).and_then(|record| directory_endpoint(record)) {
            Some(endpoint) => update.endpoints.push(endpoint),
            None => update.removed_endpoints.push(id.0),
        }
    }
    update.hosts =
        changed.hosts.iter().filter_map(|id| state.host(*id)).map(|host| directory_host(host)).collect();
    update
}

fn whole(state: &ClusterState, everything: bool, interest: &BTreeSet<Arc<str>>) -> pb::DirectoryUpdate {
    let services = state.services().filter_map(|record| directory_service(record)).collect();
    let mut update = pb::DirectoryUpdate { whole: true, services, ..Default::default() };
    match everything {
        true => {
            update.endpoints = state.instances().filter_map(|record| directory_endpoint(record)).collect()
        }
        false => interest.iter().for_each(|name| tell_service(state, name, &mut update)),
    }
    update
}

/// All endpoints of a service that was not told before.
fn tell_service(state: &ClusterState, name: &str, update: &mut pb::DirectoryUpdate) {
    update.complete.push(name.to_owned());
    let told: BTreeSet<u64> = update.endpoints.iter().map(|endpoint| endpoint.instance_id).collect();
    let endpoints = state.instances_of(name).filter_map(|record| directory_endpoint(record));
    update.endpoints.extend(endpoints.filter(|endpoint| !told.contains(&endpoint.instance_id)));
}

/// Where the hosts of the endpoints are: told again with each, which costs less than to remember who knows which.
fn add_hosts(state: &ClusterState, update: &mut pb::DirectoryUpdate) {
    let told: BTreeSet<u64> = update.hosts.iter().map(|host| host.id).collect();
    let needed: BTreeSet<u64> = update.endpoints.iter().map(|endpoint| endpoint.host_id).collect();
    let hosts = needed.difference(&told).filter_map(|id| state.host(HostId(*id)));
    update.hosts.extend(hosts.map(|host| directory_host(host)));
}

#[cfg(test)]
mod tests;
