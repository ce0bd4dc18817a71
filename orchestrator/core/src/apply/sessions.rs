//! Which session of a host speaks for it. A report may reach the log long after it was made: a member that was frozen
//! or cut off still has it under way when the agent has gone on at another. The log then says in which order they were
//! proposed, not in which order they became true, so each report names its session and its number in it, and what is
//! older than what was taken changes nothing.

use std::sync::Arc;

use nave_proto::ids::HostId;
use nave_proto::pb;
use nave_proto::pb::RejectedCode;

use super::{Outcome, Tx, rejected};
use crate::change::{Change, RowId};

impl Tx<'_> {
    /// All that older sessions of the host still have under way is void from here on. The revision of the reply is the
    /// session's number.
    pub(super) fn open_session(&mut self, command: &pb::OpenSession) -> Outcome {
        let id = HostId(command.host_id);
        let record = self.known_host(id)?;
        let facts = record.facts.clone().unwrap_or_default();
        if command.place != 0 && facts.place != command.place {
            self.replace_facts(&record, pb::HostFacts { place: command.place, ..facts });
        }
        self.put_session(pb::SessionRecord { host_id: id.0, session: self.revision, sequence: 0 });
        Ok(pb::Accepted { host_id: id.0, ..Default::default() })
    }

    /// Whether `session` is the one that speaks for the host. 0 is of a build that did not say.
    pub(super) fn check_session(&self, host: HostId, session: u64) -> Result<(), pb::Rejected> {
        let newest = self.state.sessions.get(&host).map_or(0, |record| record.session);
        if session == 0 || session == newest {
            return Ok(());
        }
        let message =
            format!("{host} has opened a newer session than this one, or was lost since, so this one ends");
        Err(rejected(RejectedCode::Superseded, message))
    }

    /// Whether the session's report of this number is news; if it is, the next has to be newer.
    pub(super) fn take_sequence(&mut self, host: HostId, session: u64, sequence: u64) -> bool {
        if session == 0 {
            return true;
        }
        let taken = self.state.sessions.get(&host).map_or(0, |record| record.sequence);
        if sequence <= taken {
            return false;
        }
        self.put_session(pb::SessionRecord { host_id: host.0, session, sequence });
        true
    }

    fn put_session(&mut self, record: pb::SessionRecord) {
        let record = Arc::new(record);
        self.state.sessions.insert(HostId(record.host_id), Arc::clone(&record));
        self.changes.push(Change::Session(record));
    }

    /// With its host, or its host's being lost.
    pub(super) fn remove_session(&mut self, host: HostId) {
        if self.state.sessions.remove(&host).is_some() {
            self.changes.push(Change::Deleted(RowId::Session(host)));
        }
    }
}
