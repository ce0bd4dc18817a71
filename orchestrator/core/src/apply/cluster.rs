//! The cluster's birth and its join tokens.

use nave_proto::pb;
use nave_proto::pb::RejectedCode;

use super::{Outcome, Tx, rejected};
use crate::events::Subject;
use crate::limits::{ADDRESS_SUFFIXES, TOKENS_MAX, UIDS};
use crate::state::FORMATS_ARE_AGREED;

impl Tx<'_> {
    pub(super) fn init_cluster(&mut self, command: pb::InitCluster) -> Outcome {
        if let Some(cluster) = &self.state.cluster {
            let message = format!("this is cluster {} already", cluster.cluster_id);
            return Err(rejected(RejectedCode::Conflict, message));
        }
        let record = pb::ClusterRecord {
            cluster_id: command.cluster_id,
            incarnation: command.incarnation,
            revision_base: 0,
            next_host_id: 1,
            next_instance_id: 1,
            next_address_suffix: *ADDRESS_SUFFIXES.start(),
            next_uid: *UIDS.start(),
            time_unix_ns: self.now,
            next_member_id: 0,
            joining: Vec::new(),
            retired_members: Vec::new(),
            // Before, builds wrote nothing here, and all members' rows are the same for ever.
            command_format: if self.written_by >= FORMATS_ARE_AGREED { self.written_by } else { 0 },
        };
        let message = format!("cluster {} begins", record.cluster_id);
        self.state.cluster = Some(std::sync::Arc::new(record));
        self.edit_cluster(|_| ());
        if let Some(token) = command.first_token {
            self.put_token(token);
        }
        self.event("cluster_initialised", Subject::default(), message);
        Ok(pb::Accepted::default())
    }

    /// Never goes back: what was written since is of the format agreed upon.
    pub(super) fn agree_format(&mut self, format: u32) -> Outcome {
        let agreed = self.state.command_format();
        if format <= agreed {
            return Err(rejected(
                RejectedCode::Conflict,
                format!("command format {agreed} is in use already"),
            ));
        }
        self.edit_cluster(|cluster| cluster.command_format = format);
        let message = format!("all members know command format {format}; it is used from now on");
        self.event("format_agreed", Subject::default(), message);
        Ok(pb::Accepted::default())
    }

    pub(super) fn create_token(&mut self, command: pb::CreateToken) -> Outcome {
        let Some(token) = command.token.filter(|token| !token.id.is_empty()) else {
            return Err(rejected(RejectedCode::Invalid, "a token needs an id"));
        };
        if self.state.tokens.contains_key(&token.id) {
            return Err(rejected(RejectedCode::Conflict, format!("token {} exists already", token.id)));
        }
        let now = self.now;
        let expired: Vec<_> =
            self.state.tokens().filter(|t| t.expires_unix_ns <= now).map(|t| t.id.clone()).collect();
        if self.state.tokens.len() - expired.len() >= TOKENS_MAX {
            let message =
                format!("there are {TOKENS_MAX} join tokens; revoke one with `nave token revoke ID`");
            return Err(rejected(RejectedCode::Exhausted, message));
        }
        for id in expired {
            self.remove_token(&id);
        }
        let message = format!("join token {} created, good for {} hosts", token.id, token.uses_left);
        self.put_token(token);
        self.event("token_created", Subject::default(), message);
        Ok(pb::Accepted::default())
    }

    pub(super) fn revoke_token(&mut self, id: &str) -> Outcome {
        if !self.state.tokens.contains_key(id) {
            return Err(rejected(
                RejectedCode::NotFound,
                format!("no join token {id}; `nave token list` shows all"),
            ));
        }
        self.remove_token(id);
        self.event("token_revoked", Subject::default(), format!("join token {id} revoked"));
        Ok(pb::Accepted::default())
    }
}
