//! Takes one committed command and makes it true. Never fails and never panics on a committed command: what cannot
//! take effect is a `Rejected` reply, since the log cannot be argued with. Every check comes before the first
//! write, so a rejected command changes nothing (its reply is remembered all the same).
//!
//! The hot path is a service without instances: one service row, one lean version row, one event and, when the
//! client numbered its request, one reply to remember. The manifest is moved, never copied.

mod cluster;
mod commit;
mod hosts;
mod jobs;
mod members;
mod promotion;
mod reports;
mod services;
mod sessions;
mod versions;

use std::collections::BTreeMap;
use std::sync::Arc;

use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb::command::Body;
use nave_proto::{COMMAND_FORMAT, pb};

use crate::change::{Change, RowId};
use crate::dedup::Recall;
use crate::events::Subject;
use crate::state::ClusterState;

/// What became of a command.
#[derive(Debug, Clone, PartialEq)]
pub struct Applied {
    pub reply: pb::Reply,
    /// In order, at most one per row.
    pub changes: Vec<Change>,
}

/// Either answer of a command.
type Outcome = Result<pb::Accepted, pb::Rejected>;

/// Whether a newer build wrote this command: it is of a later format, or it, or a step in it, has no body that this build
/// knows. A member that meets one must stop before it applies anything: also what has a body that is known may be meant
/// otherwise.
pub fn unknown_command(command: &pb::Command) -> bool {
    command.written_by > COMMAND_FORMAT || has_unknown_body(command)
}

fn has_unknown_body(command: &pb::Command) -> bool {
    match &command.body {
        None => true,
        Some(Body::CommitPlan(plan)) => plan.steps.iter().any(|step| step.step.is_none()),
        Some(Body::ChangeMember(change)) => change.change.is_none(),
        Some(
            Body::InitCluster(_)
            | Body::ApplyService(_)
            | Body::DeleteService(_)
            | Body::ScaleService(_)
            | Body::RestartService(_)
            | Body::RollbackService(_)
            | Body::SetServicePaused(_)
            | Body::PromoteService(_)
            | Body::RegisterHost(_)
            | Body::UpdateHost(_)
            | Body::ReportInstances(_)
            | Body::CreateToken(_)
            | Body::RevokeToken(_)
            | Body::SetHostStatus(_)
            | Body::SetHostDraining(_)
            | Body::ForgetHost(_)
            | Body::NoteHost(_)
            | Body::OpenSession(_)
            | Body::AgreeFormat(_),
        ) => false,
    }
}

impl ClusterState {
    /// Applies the command of one log entry. Entries come in order, each once.
    pub fn apply(&mut self, log_index: u64, command: pb::Command) -> Applied {
        self.applied_index = log_index;
        self.time_unix_ns = self.time_unix_ns.max(command.time_unix_ns);
        let revision = self.revision();
        let pb::Command { time_unix_ns: now, actor, request_id, body, written_by } = command;
        if self.cluster.is_none() && !matches!(body, Some(Body::InitCluster(_))) {
            // Not remembered: the same request is welcome a moment later.
            let refusal = rejected(pb::RejectedCode::NotBegun, "the cluster has not begun yet");
            return Applied { reply: reply(revision, Err(refusal)), changes: Vec::new() };
        }
        match request_id.as_ref().map_or(Recall::New, |request| self.dedup.recall(request)) {
            Recall::New => {}
            Recall::Done(reply) => return Applied { reply: marked_duplicate(reply), changes: Vec::new() },
            Recall::Forgotten => {
                let refusal = rejected(
                    pb::RejectedCode::Forgotten,
                    "this request is older than the replies kept of its client, so whether it took effect is unknown",
                );
                return Applied { reply: reply(revision, Err(refusal)), changes: Vec::new() };
            }
        }
        let changes = Vec::with_capacity(4);
        let mut tx = Tx { state: self, revision, now, actor, written_by, changes, events: 0 };
        let outcome = match body {
            Some(body) => tx.run(body),
            None => Err(rejected(pb::RejectedCode::Invalid, "a command that this build does not know")),
        };
        let reply = reply(revision, outcome);
        let mut changes = tx.finish();
        if let Some(request) = request_id {
            changes.extend(self.dedup.remember(request, &reply, now));
        }
        Applied { reply, changes }
    }
}

fn reply(revision: u64, outcome: Outcome) -> pb::Reply {
    let result = match outcome {
        Ok(accepted) => pb::reply::Result::Accepted(accepted),
        Err(rejected) => pb::reply::Result::Rejected(rejected),
    };
    pb::Reply { revision, result: Some(result) }
}

fn marked_duplicate(mut reply: pb::Reply) -> pb::Reply {
    if let Some(pb::reply::Result::Accepted(accepted)) = &mut reply.result {
        accepted.duplicate = true;
    }
    reply
}

fn rejected(code: pb::RejectedCode, message: impl Into<String>) -> pb::Rejected {
    pb::Rejected { code: code.into(), message: message.into() }
}

/// One command under way: the state, what the command says of itself, and the changes so far. All writing goes
/// through here, so that no row changes without its index, its revision and its change.
struct Tx<'a> {
    state: &'a mut ClusterState,
    revision: u64,
    now: i64,
    actor: String,
    /// The format that the command is written in.
    written_by: u32,
    changes: Vec<Change>,
    events: u32,
}

impl Tx<'_> {
    fn run(&mut self, body: Body) -> Outcome {
        match body {
            Body::InitCluster(command) => self.init_cluster(command),
            Body::ApplyService(command) => self.apply_service(command),
            Body::DeleteService(command) => self.delete_service(&command.name),
            Body::ScaleService(command) => self.scale_service(&command.name, command.count),
            Body::RestartService(command) => self.restart_service(&command.name),
            Body::RollbackService(command) => self.rollback_service(&command.name, command.to_version),
            Body::SetServicePaused(command) => self.set_service_paused(&command.name, command.paused),
            Body::PromoteService(command) => self.promote_service(&command.name),
            Body::RegisterHost(command) => self.register_host(command),
            Body::UpdateHost(command) => self.update_host(command),
            Body::ReportInstances(command) => self.report_instances(command),
            Body::CommitPlan(command) => self.commit_plan(command),
            Body::CreateToken(command) => self.create_token(command),
            Body::RevokeToken(command) => self.revoke_token(&command.id),
            Body::SetHostStatus(command) => self.set_host_status(&command),
            Body::SetHostDraining(command) => self.set_host_draining(command),
            Body::ForgetHost(command) => self.forget_host(&command),
            Body::ChangeMember(command) => self.change_member(command),
            Body::NoteHost(command) => self.note_host(command),
            Body::OpenSession(command) => self.open_session(&command),
            Body::AgreeFormat(command) => self.agree_format(command.format),
        }
    }

    /// The changes, at most one per row: a plan may touch a row several times, and a watcher sees one revision once.
    fn finish(self) -> Vec<Change> {
        let apart =
            |(at, change): (usize, &Change)| self.changes[..at].iter().all(|other| !other.same_row(change));
        if self.changes.len() <= 4 && self.changes.iter().enumerate().all(apart) {
            return self.changes;
        }
        let mut last = BTreeMap::new();
        for (at, change) in self.changes.iter().enumerate() {
            last.insert(change.id(), at);
        }
        let keep = |(at, change): (usize, Change)| (last.get(&change.id()) == Some(&at)).then_some(change);
        self.changes.into_iter().enumerate().filter_map(keep).collect()
    }

    /// Puts a service and the row of its newest version.
    fn put_service(&mut self, mut record: pb::ServiceRecord, mut version: pb::VersionRecord) {
        record.revision = self.revision;
        version.revision = self.revision;
        let (record, version) = (Arc::new(record), Arc::new(version));
        let entry = self.state.services.put(Arc::clone(&record), self.revision);
        entry.put_version(Arc::clone(&version));
        self.changes.extend([Change::Service(record), Change::Version(version)]);
    }

    /// Changes what no index is derived from; the manifest stays, so it is not copied unless a reader holds the row.
    fn edit_service(&mut self, name: &str, edit: impl FnOnce(&mut pb::ServiceRecord)) {
        let Some(entry) = self.state.services.get_mut(name) else { return };
        let record = Arc::make_mut(&mut entry.record);
        edit(record);
        record.revision = self.revision;
        self.changes.push(Change::Service(Arc::clone(&entry.record)));
        self.state.services.touch(name, self.revision);
    }

    fn put_version(&mut self, mut record: pb::VersionRecord) {
        record.revision = self.revision;
        let Some(entry) = self.state.services.get_mut(&record.service) else { return };
        let record = Arc::new(record);
        entry.put_version(Arc::clone(&record));
        self.changes.push(Change::Version(record));
    }

    fn put_host(&mut self, mut record: pb::HostRecord) {
        record.revision = self.revision;
        let record = Arc::new(record);
        self.state.hosts.put(Arc::clone(&record), self.revision);
        self.changes.push(Change::Host(record));
    }

    fn put_instance(&mut self, mut record: pb::InstanceRecord) {
        record.revision = self.revision;
        let record = Arc::new(record);
        self.state.put_instance(Arc::clone(&record), self.revision);
        self.changes.push(Change::Instance(record));
    }

    /// Removes an instance, and with the last one a service that is being deleted.
    fn remove_instance(&mut self, id: InstanceId) {
        let Some(record) = self.state.remove_instance(id, self.revision) else { return };
        self.changes.push(Change::Deleted(RowId::Instance(id)));
        self.drop_stale_versions(&record.service);
        self.remove_service_if_done(&record.service);
        self.host_left(HostId(record.host_id));
    }

    fn put_token(&mut self, mut record: pb::TokenRecord) {
        record.revision = self.revision;
        let record = Arc::new(record);
        self.state.tokens.insert(record.id.clone(), Arc::clone(&record));
        self.changes.push(Change::Token(record));
    }

    fn remove_token(&mut self, id: &str) {
        if self.state.tokens.remove(id).is_some() {
            self.changes.push(Change::Deleted(RowId::Token(id.to_owned())));
        }
    }

    /// Changes the one cluster row, which holds the counters.
    fn edit_cluster<T>(&mut self, edit: impl FnOnce(&mut pb::ClusterRecord) -> T) -> Option<T> {
        let mut cluster = self.state.cluster.take()?;
        let record = Arc::make_mut(&mut cluster);
        let result = edit(record);
        record.time_unix_ns = record.time_unix_ns.max(self.now);
        self.state.cluster = Some(Arc::clone(&cluster));
        self.changes.push(Change::Cluster(cluster));
        Some(result)
    }

    fn event(&mut self, kind: &str, subject: Subject, message: String) {
        let record = Arc::new(pb::EventRecord {
            revision: self.revision,
            index: self.events,
            time_unix_ns: self.now,
            kind: kind.to_owned(),
            service: subject.service,
            instance_id: subject.instance,
            host_id: subject.host,
            actor: self.actor.clone(),
            message,
        });
        self.events += 1;
        let pushed_out = self.state.events.add(Arc::clone(&record));
        self.changes.push(Change::Event(record));
        let gone = pushed_out.into_iter().map(|(revision, index)| RowId::Event(revision, index));
        self.changes.extend(gone.map(Change::Deleted));
    }

    /// A host's name for sentences.
    fn host_name(&self, id: HostId) -> String {
        use crate::wants::HostExt as _;
        self.state.host(id).map_or_else(|| id.to_string(), |record| record.shown())
    }
}
