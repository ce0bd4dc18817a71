//! Hosts: enrolment, facts, and the verdict on silence.

use std::sync::Arc;

use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_proto::pb::observed::{Lost, State, Unknown};
use nave_proto::pb::{HostStatus, RejectedCode};

use super::{Outcome, Tx, rejected};
use crate::change::{Change, RowId};
use crate::events::Subject;
use crate::limits::HOSTS_MAX;
use crate::wants::{HostExt as _, InstanceExt as _, observed};

impl Tx<'_> {
    /// A key that is known keeps its host id and uses up no token, so a retry of an enrolment is harmless.
    pub(super) fn register_host(&mut self, command: pb::RegisterHost) -> Outcome {
        let known = self.state.hosts.by_key(&command.public_key_sha256);
        let token = self.valid_token(&command.token_id, known.is_some())?;
        let Some(facts) = command.facts.filter(|facts| !facts.name.is_empty()) else {
            return Err(rejected(RejectedCode::Invalid, "a host needs a name"));
        };
        if command.public_key_sha256.len() != 32 {
            return Err(rejected(RejectedCode::Invalid, "the public key's digest is not 32 bytes"));
        }
        self.check_name_free(&facts.name, known)?;
        if known.is_none() && self.state.hosts.len() >= HOSTS_MAX {
            let message = format!("there are {HOSTS_MAX} hosts, which is the most a hub holds");
            return Err(rejected(RejectedCode::Exhausted, message));
        }
        let superseded = self.state.hosts.by_name(&facts.name).filter(|holder| Some(*holder) != known);
        match known.and_then(|id| self.state.host(id).cloned()) {
            Some(record) => Ok(self.enrol_again(&record, facts)),
            None => Ok(self.enrol(command.public_key_sha256, facts, token.as_ref().clone(), superseded)),
        }
    }

    fn enrol(
        &mut self,
        public_key_sha256: Vec<u8>,
        facts: pb::HostFacts,
        token: pb::TokenRecord,
        superseded: Option<HostId>,
    ) -> pb::Accepted {
        let id = self.edit_cluster(|cluster| {
            let id = cluster.next_host_id;
            cluster.next_host_id += 1;
            id
        });
        let id = id.unwrap_or_default();
        let message = format!("{} joined as {} with token {}", facts.name, HostId(id), token.id);
        self.put_token(pb::TokenRecord { uses_left: token.uses_left.saturating_sub(1), ..token });
        self.put_host(pb::HostRecord {
            id,
            facts: Some(facts),
            public_key_sha256,
            status: HostStatus::Connected.into(),
            draining: false,
            joined_unix_ns: self.now,
            revision: self.revision,
            status_reason: String::new(),
            forgotten: false,
            drain_reason: String::new(),
            lost_unix_ns: 0,
            lease_over_ms: 0,
            draining_unix_ns: 0,
        });
        self.event("host_joined", Subject::host(HostId(id)), message);
        if let Some(lost) = superseded {
            self.remove_host_if_succeeded(lost);
        }
        pb::Accepted { host_id: id, ..Default::default() }
    }

    fn enrol_again(&mut self, record: &pb::HostRecord, facts: pb::HostFacts) -> pb::Accepted {
        let id = HostId(record.id);
        self.replace_facts(record, facts);
        let message = format!("{} enrolled again with the key it had, as {id}", self.host_name(id));
        self.event("host_joined", Subject::host(id), message);
        pb::Accepted { host_id: id.0, ..Default::default() }
    }

    fn valid_token(&self, id: &str, enrolled: bool) -> Result<Arc<pb::TokenRecord>, pb::Rejected> {
        let make = "`nave token create` makes a new one";
        let token = self.state.token(id).ok_or_else(|| {
            let message = format!("join token {id} does not exist or was revoked; {make}");
            rejected(RejectedCode::NotFound, message)
        })?;
        if token.expires_unix_ns <= self.now {
            return Err(rejected(RejectedCode::Expired, format!("join token {id} has expired; {make}")));
        }
        if token.uses_left == 0 && !enrolled {
            return Err(rejected(RejectedCode::Expired, format!("join token {id} is used up; {make}")));
        }
        Ok(Arc::clone(token))
    }

    /// A name belongs to one key as long as its host lives; a lost host gives it up.
    fn check_name_free(&self, name: &str, id: Option<HostId>) -> Result<(), pb::Rejected> {
        let Some(holder) = self.state.host_by_name(name).filter(|holder| Some(HostId(holder.id)) != id)
        else {
            return Ok(());
        };
        if holder.is_lost() {
            return Ok(());
        }
        let message = format!(
            "the name {name} belongs to {}, a host with another key that is not lost; give this agent another name, \
             or stop the other agent and wait until `nave hosts` shows it as lost",
            HostId(holder.id)
        );
        Err(rejected(RejectedCode::Conflict, message))
    }

    pub(super) fn update_host(&mut self, command: pb::UpdateHost) -> Outcome {
        let id = HostId(command.host_id);
        let record = self.known_host(id)?;
        self.check_session(id, command.session)?;
        let Some(facts) = command.facts.filter(|facts| !facts.name.is_empty()) else {
            return Err(rejected(RejectedCode::Invalid, "a host needs a name"));
        };
        self.check_name_free(&facts.name, Some(id))?;
        self.replace_facts(&record, facts);
        Ok(pb::Accepted { host_id: id.0, ..Default::default() })
    }

    pub(super) fn replace_facts(&mut self, record: &pb::HostRecord, facts: pb::HostFacts) {
        if record.facts.as_ref() == Some(&facts) {
            return;
        }
        let id = HostId(record.id);
        let renamed = record.shown() != facts.name;
        let message = format!("{} is called {} from now on", record.shown(), facts.name);
        let known = record.facts.as_ref().map(|facts| facts.alarms.clone()).unwrap_or_default();
        let alarms = facts.alarms.clone();
        self.put_host(pb::HostRecord { facts: Some(facts), ..record.clone() });
        self.touch_services_on(id);
        for alarm in alarms.iter().filter(|alarm| !known.contains(alarm)) {
            self.event("host_alarm", Subject::host(id), format!("{}: {alarm}", record.shown()));
        }
        for alarm in known.iter().filter(|alarm| !alarms.contains(alarm)) {
            self.event("host_alarm_over", Subject::host(id), format!("{}: over: {alarm}", record.shown()));
        }
        if renamed {
            self.event("host_renamed", Subject::host(id), message);
        }
    }

    /// The verdict of the leader: lost, or back. What runs on a lost host is lost with it, until it reports again.
    pub(super) fn set_host_status(&mut self, command: &pb::SetHostStatus) -> Outcome {
        let id = HostId(command.host_id);
        let status = command.status();
        if status == HostStatus::Lost && command.lease_over_ms > 0 {
            return self.set_lease_over(id, command.lease_over_ms);
        }
        let record = self.known_host(id)?;
        if status == HostStatus::Unspecified {
            return Err(rejected(RejectedCode::Invalid, "a host's status is connected, silent or lost"));
        }
        if status != HostStatus::Lost && self.state.hosts.is_succeeded(id) {
            let message =
                format!("{id} was lost and its name {} is another host's now; enrol anew", record.shown());
            return Err(rejected(RejectedCode::Conflict, message));
        }
        let accepted = pb::Accepted { host_id: id.0, ..Default::default() };
        let (before, was_lost) = (record.status(), record.is_lost());
        if before == status {
            return Ok(accepted);
        }
        let reason = command.reason.clone();
        let lost_unix_ns = if status == HostStatus::Lost { self.now } else { record.lost_unix_ns };
        self.put_host(pb::HostRecord {
            status: status.into(),
            status_reason: reason,
            lost_unix_ns,
            lease_over_ms: 0,
            ..record.as_ref().clone()
        });
        let affected = match status {
            HostStatus::Lost => {
                // What it said is no longer known: it has to say everything again, which begins with a session.
                self.remove_session(id);
                self.observe_all(id, |_| State::Lost(Lost {}))
            }
            HostStatus::Connected | HostStatus::Silent | HostStatus::Unspecified if was_lost => {
                self.observe_all(id, |_| State::Unknown(Unknown {}))
            }
            HostStatus::Connected | HostStatus::Silent | HostStatus::Unspecified => 0,
        };
        self.touch_services_on(id);
        if let Some((kind, what)) = verdict(status, was_lost, affected) {
            let why = because(&command.reason);
            self.event(kind, Subject::host(id), format!("{} ({id}) {what}{why}", record.shown()));
        }
        Ok(accepted)
    }

    /// A lost host, given up or not, has been without a lease for so long: what waits for that may go on.
    fn set_lease_over(&mut self, id: HostId, lease_over_ms: u64) -> Outcome {
        let record = self.state.host(id).cloned().ok_or_else(|| no_host(id))?;
        if !record.is_lost() {
            return Err(rejected(RejectedCode::Conflict, format!("{id} is not lost")));
        }
        if record.lease_over_ms < lease_over_ms {
            self.put_host(pb::HostRecord { lease_over_ms, ..record.as_ref().clone() });
            self.touch_services_on(id);
        }
        Ok(pb::Accepted { host_id: id.0, ..Default::default() })
    }

    pub(super) fn note_host(&mut self, command: pb::NoteHost) -> Outcome {
        let record = self.known_host(HostId(command.host_id))?;
        self.event(&command.kind, Subject::host(HostId(record.id)), command.message);
        Ok(pb::Accepted { host_id: record.id, ..Default::default() })
    }

    /// Writes the hub's own word on every instance of a host; returns how many are wanted there.
    fn observe_all(&mut self, host: HostId, state: impl Fn(&pb::InstanceRecord) -> State) -> usize {
        let instances: Vec<_> = self.state.instances_on(host).cloned().collect();
        for record in &instances {
            let unready = if record.wanted() { pb::EndpointState::Unspecified } else { record.endpoint() };
            self.put_instance(pb::InstanceRecord {
                observed: observed(state(record)),
                endpoint: unready.into(),
                since_unix_ns: self.now,
                ready_since_unix_ns: 0,
                ..record.as_ref().clone()
            });
        }
        instances.iter().filter(|record| record.wanted()).count()
    }

    fn touch_services_on(&mut self, host: HostId) {
        let names: Vec<_> = self.state.instances_on(host).map(|instance| instance.service.clone()).collect();
        for name in names {
            self.state.services.touch(&name, self.revision);
        }
    }

    /// A draining host takes nothing new, and the scheduler empties it under the update rules.
    pub(super) fn set_host_draining(&mut self, command: pb::SetHostDraining) -> Outcome {
        let record = self.known_host(HostId(command.host_id))?;
        let (id, draining) = (HostId(record.id), command.draining);
        let accepted = pb::Accepted { host_id: id.0, ..Default::default() };
        if record.draining == draining {
            return Ok(accepted);
        }
        let why = because(&command.reason);
        let drain_reason = if draining { command.reason } else { String::new() };
        let draining_unix_ns = if draining { self.now } else { 0 };
        self.put_host(pb::HostRecord { draining, drain_reason, draining_unix_ns, ..record.as_ref().clone() });
        self.touch_services_on(id);
        let (name, left) = (record.shown(), self.state.instances_on(id).count());
        let (kind, what) = match draining {
            true => ("host_draining", format!("is being drained, {} to leave it", instances(left))),
            false => ("host_undrained", "is open again".to_owned()),
        };
        self.event(kind, Subject::host(id), format!("{name} ({id}) {what}{why}"));
        self.say_if_drained(id);
        Ok(accepted)
    }

    /// Gives a host up for good. Its key opens nothing from now on; while instances have yet to leave it (those with
    /// `on_disconnect = "stop"` wait until they must have ended there), the row stays as a lost host's.
    pub(super) fn forget_host(&mut self, command: &pb::ForgetHost) -> Outcome {
        let record = self.known_host(HostId(command.host_id))?;
        let id = HostId(record.id);
        self.may_forget(&record)?;
        if !record.is_lost() {
            self.observe_all(id, |_| State::Lost(Lost {}));
        }
        self.touch_services_on(id);
        let (name, left) = (record.shown(), self.state.instances_on(id).count());
        let why = because(&command.reason);
        self.event("host_forgotten", Subject::host(id), format!("{name} ({id}) is given up for good{why}"));
        if left == 0 {
            self.remove_host(id);
        } else {
            self.put_host(pb::HostRecord {
                public_key_sha256: Vec::new(),
                status: HostStatus::Lost.into(),
                status_reason: format!("given up for good{why}"),
                draining: false,
                drain_reason: String::new(),
                forgotten: true,
                ..record.as_ref().clone()
            });
        }
        Ok(pb::Accepted { host_id: id.0, ..Default::default() })
    }

    fn may_forget(&self, record: &pb::HostRecord) -> Result<(), pb::Rejected> {
        let (id, name) = (HostId(record.id), record.shown());
        if record.status() != HostStatus::Connected {
            return Ok(());
        }
        let message = match (record.draining, self.state.instances_on(id).count()) {
            (true, 0) => return Ok(()),
            (true, left) => {
                format!(
                    "{name} ({id}) is connected and {} still to leave; wait until it is empty",
                    instances(left)
                )
            }
            (false, _) => format!(
                "{name} ({id}) is connected; empty it with `nave drain {name}` first, or stop its agent and wait until \
                 `nave hosts` shows it as lost"
            ),
        };
        Err(rejected(RejectedCode::Conflict, message))
    }

    /// A host that has been forgotten is nobody's to command.
    pub(super) fn known_host(&self, id: HostId) -> Result<Arc<pb::HostRecord>, pb::Rejected> {
        self.state.host(id).filter(|record| !record.forgotten).cloned().ok_or_else(|| no_host(id))
    }

    /// An instance has left a host. The last one ends a drain, and takes with it the row of a host that can only come
    /// back as a new one: given up, or lost and its name another's.
    pub(super) fn host_left(&mut self, id: HostId) {
        self.remove_host_if_succeeded(id);
        let Some(entry) = self.state.hosts.get(id).filter(|entry| entry.instances.is_empty()) else { return };
        match entry.record.forgotten {
            true => self.remove_host(id),
            false => self.say_if_drained(id),
        }
    }

    fn say_if_drained(&mut self, id: HostId) {
        let Some(entry) = self.state.hosts.get(id) else { return };
        if entry.record.draining && !entry.record.is_lost() && entry.instances.is_empty() {
            let message = format!("{} ({id}) is drained, nothing runs there any more", entry.record.shown());
            self.event("host_drained", Subject::host(id), message);
        }
    }

    /// A lost host whose name has gone to another is forgotten once it is empty: it can only come back as a new one.
    fn remove_host_if_succeeded(&mut self, id: HostId) {
        let Some(entry) = self.state.hosts.get(id) else { return };
        let name = entry.record.shown();
        if !self.state.hosts.is_succeeded(id) || !entry.record.is_lost() || !entry.instances.is_empty() {
            return;
        }
        self.remove_host(id);
        self.event(
            "host_forgotten",
            Subject::host(id),
            format!("{name} ({id}) is forgotten, its name is another's"),
        );
    }

    fn remove_host(&mut self, id: HostId) {
        if self.state.hosts.remove(id, self.revision).is_some() {
            self.changes.push(Change::Deleted(RowId::Host(id)));
            self.remove_session(id);
        }
    }
}

fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

fn instances(count: usize) -> String {
    match count {
        1 => "1 instance has".to_owned(),
        _ => format!("{count} instances have"),
    }
}

fn no_host(id: HostId) -> pb::Rejected {
    rejected(RejectedCode::NotFound, format!("no host {id}; `nave hosts` shows all"))
}

fn verdict(status: HostStatus, was_lost: bool, affected: usize) -> Option<(&'static str, String)> {
    match status {
        HostStatus::Lost => Some(("host_lost", format!("is lost, and {affected} instances with it"))),
        HostStatus::Connected if was_lost => Some(("host_back", "is back".to_owned())),
        HostStatus::Connected => Some(("host_connected", "is connected".to_owned())),
        HostStatus::Silent => Some(("host_silent", "has fallen silent".to_owned())),
        HostStatus::Unspecified => None,
    }
}
