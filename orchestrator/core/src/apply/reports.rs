//! What agents say of their instances. A report of an older epoch, of an older attempt or of another host is about
//! something that is no more, and is ignored; a report that says nothing new changes nothing.

use std::collections::BTreeSet;
use std::sync::Arc;

use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use nave_proto::pb::observed::{Pending, State};
use nave_proto::pb::{EndpointState, RejectedCode};

use super::{Outcome, Tx, rejected};
use crate::events::{Sentences, Subject, called, fetch_event, late_sentences, sentences};
use crate::limits::FETCH_PROBLEM_CHARS_MAX;
use crate::plan::canaries;
use crate::wants::{HostExt as _, InstanceExt as _, ManifestExt as _, observed};

/// From this command format on, an instance that becomes ready is progress once.
const READY_ONCE: u32 = 8;

/// From this command format on, each end that a report tells is an event, and only one.
const ENDS_ARE_TOLD: u32 = 9;

impl Tx<'_> {
    /// Refused from a host that is lost: its instances may be running elsewhere by now. It first has to be
    /// connected again, by `SetHostStatus`. Refused, too, from a session that is not the host's newest.
    pub(super) fn report_instances(&mut self, command: pb::ReportInstances) -> Outcome {
        let host = HostId(command.host_id);
        match self.state.host(host) {
            None => return Err(rejected(RejectedCode::NotFound, format!("no host {host}"))),
            Some(record) if record.is_lost() => {
                let message = format!("{host} is lost; it has to be connected again before it reports");
                return Err(rejected(RejectedCode::Conflict, message));
            }
            Some(_) => self.check_session(host, command.session)?,
        }
        if !self.take_sequence(host, command.session, command.sequence) {
            return Ok(pb::Accepted { host_id: host.0, ..Default::default() });
        }
        let mut named: BTreeSet<InstanceId> = command.gone.iter().copied().map(InstanceId).collect();
        for report in command.instances {
            named.insert(InstanceId(report.instance_id));
            self.take_report(host, report);
        }
        for id in command.gone {
            self.take_gone(host, InstanceId(id));
        }
        if command.full {
            self.take_missing(host, &named);
        }
        Ok(pb::Accepted { host_id: host.0, ..Default::default() })
    }

    fn take_report(&mut self, host: HostId, report: pb::InstanceReport) {
        let Some(before) = self.state.instance(InstanceId(report.instance_id)).cloned() else { return };
        if before.host() != host || before.epoch != report.epoch || report.attempt < before.attempt {
            return self.take_late_ends(host, &before, report);
        }
        let mut report = report;
        let ends = self.ends_of(&mut report);
        let notes = std::mem::take(&mut report.notes);
        let numbers = notes.iter().map(|note| note.number);
        let newest = numbers.chain(ends.iter().flatten().map(|end| end.number)).max().unwrap_or_default();
        let Some(mut after) = merged(&before, report, newest, self.now) else { return };
        let progressed = after.ready() && !before.ready() && !before.was_ready;
        let regressed = before.ready() && !after.ready();
        let has_patience = progressed || (regressed && self.canaries_waited(&before.service));
        after.was_ready = self.has_been_ready(&before, &after);
        let host = self.host_name(host);
        let Sentences { history, state: event } = sentences(&before, &after, notes, ends, &host);
        let fetched = fetch_event(&before, &after, &host);
        let subject = Subject::instance(&after);
        let (template, fetch) = (after.template_version, after.fetch.clone());
        let for_run = (after.run != 0).then(|| after.clone());
        self.put_instance(after);
        for (kind, message) in history {
            self.event(&kind, subject.clone(), message);
        }
        if let Some((kind, message)) = fetched {
            if let Some(fetch) = fetch.filter(|fetch| fetch.done) {
                self.extend_deadline(&subject.service, fetch.template_version);
            }
            self.event(kind, subject.clone(), message);
        }
        if let Some((kind, message)) = event {
            if has_patience {
                self.extend_deadline(&subject.service, template);
            }
            self.event(kind, subject, message);
        }
        if let Some(instance) = for_run {
            self.job_reported(&instance);
        }
    }

    /// None: the report, or the command, tells only the newest.
    fn ends_of(&self, report: &mut pb::InstanceReport) -> Option<Vec<pb::EndNote>> {
        let ends = std::mem::take(&mut report.ends);
        (self.written_by >= ENDS_ARE_TOLD && report.tells_ends).then_some(ends)
    }

    /// How something ended that is over in any case is told all the same: its agent does not say it again.
    fn take_late_ends(&mut self, host: HostId, before: &pb::InstanceRecord, mut report: pb::InstanceReport) {
        let is_here = before.host() == host && report.epoch <= before.epoch;
        let Some(ends) = self.ends_of(&mut report).filter(|_| is_here) else { return };
        let newest = ends.iter().map(|end| end.number).max().unwrap_or_default();
        let told = late_sentences(before, ends, &self.host_name(host));
        if told.is_empty() {
            return;
        }
        self.put_instance(pb::InstanceRecord { note: newest.max(before.note), ..before.clone() });
        for (kind, message) in told {
            self.event(&kind, Subject::instance(before), message);
        }
    }

    /// Commands of before noted nothing of that, so that each time was the first.
    fn has_been_ready(&self, before: &pb::InstanceRecord, after: &pb::InstanceRecord) -> bool {
        before.was_ready || (self.written_by >= READY_ONCE && (before.ready() || after.ready()))
    }

    /// Canaries may have waited for a person for long; one that is no longer ready gets its full patience too. By commands
    /// of before also when they did not all wait.
    fn canaries_waited(&self, service: &str) -> bool {
        let all_wait =
            || canaries(self.state, service, self.now).is_some_and(|(healthy, all)| healthy >= all);
        self.has_canaries(service) && (self.written_by < READY_ONCE || all_wait())
    }

    fn has_canaries(&self, service: &str) -> bool {
        let record = self.state.services.get(service).map(|entry| &entry.record);
        record.and_then(|record| record.deployment.as_ref()).is_some_and(|deployment| deployment.canary > 0)
    }

    /// Each instance that becomes ready for the first time gives a running deployment its full patience again, and so does
    /// each host that has fetched what it needs for one. One that comes and goes would let it run for ever.
    pub(super) fn extend_deadline(&mut self, service: &str, template: u64) {
        let Some(entry) = self.state.services.get(service) else { return };
        let (Some(deployment), Some(manifest)) = (&entry.record.deployment, entry.current()) else { return };
        let deadline = self.now.saturating_add(manifest.progress_deadline_ns());
        let running = deployment.status() == pb::DeploymentStatus::Running;
        if !running
            || entry.record.template_version != template
            || deployment.progress_deadline_unix_ns >= deadline
        {
            return;
        }
        self.edit_service(service, |record| {
            if let Some(deployment) = &mut record.deployment {
                deployment.progress_deadline_unix_ns = deadline;
            }
        });
    }

    /// Stopped and cleaned up. Of one that is wanted, it is an old word about an earlier epoch.
    fn take_gone(&mut self, host: HostId, id: InstanceId) {
        let Some(record) = self.state.instance(id).cloned() else { return };
        if record.host() != host || record.wanted() {
            return;
        }
        let why =
            if record.stop_reason.is_empty() { String::new() } else { format!(": {}", record.stop_reason) };
        let message = format!("{} has stopped on {}{why}", called(&record), self.host_name(host));
        self.event("instance_stopped", Subject::instance(&record), message);
        self.remove_instance(id);
    }

    /// A full report leaves out what is not on the host: what was to stop has stopped; what is wanted has yet to
    /// be started, which the agent does once it has its wanted set.
    fn take_missing(&mut self, host: HostId, named: &BTreeSet<InstanceId>) {
        let missing = |record: &&Arc<pb::InstanceRecord>| !named.contains(&record.id());
        let missing: Vec<_> = self.state.instances_on(host).filter(missing).cloned().collect();
        for record in missing {
            if !record.wanted() {
                self.take_gone(host, record.id());
                continue;
            }
            if matches!(record.state(), Some(State::Pending(_))) {
                continue;
            }
            let message = format!(
                "{} is not on {} any more and is started anew",
                called(&record),
                self.host_name(host)
            );
            self.event("instance_missing", Subject::instance(&record), message);
            // Its attempts and its history begin again.
            let anew = self.written_by >= ENDS_ARE_TOLD;
            let (note, last_exit) = if anew { (0, None) } else { (record.note, record.last_exit.clone()) };
            self.put_instance(pb::InstanceRecord {
                observed: observed(State::Pending(Pending {})),
                endpoint: EndpointState::Unspecified.into(),
                ports: Default::default(),
                since_unix_ns: self.now,
                ready_since_unix_ns: 0,
                attempt: 0,
                wants_restart: 0,
                restart_granted: 0,
                restart_granted_unix_ns: 0,
                note,
                last_exit,
                ..record.as_ref().clone()
            });
        }
    }
}

/// The row after a report; None: it says nothing new.
fn merged(
    before: &pb::InstanceRecord,
    report: pb::InstanceReport,
    newest_note: u64,
    now: i64,
) -> Option<pb::InstanceRecord> {
    let fresh = report.attempt != before.attempt;
    let endpoint = merged_endpoint(before, &report, fresh);
    let mut after = pb::InstanceRecord {
        attempt: report.attempt,
        restarts: report.restarts,
        observed: report.observed,
        ports: report.ports,
        reason: report.reason,
        endpoint: endpoint.into(),
        note: before.note.max(newest_note),
        wants_restart: if report.wants_restart { report.attempt } else { 0 },
        fetch: merged_fetch(before.fetch.as_ref(), report.fetch),
        last_exit: report.last_exit.or_else(|| before.last_exit.clone()),
        ..before.clone()
    };
    if after == *before {
        return None;
    }
    if fresh || before.state().map(std::mem::discriminant) != after.state().map(std::mem::discriminant) {
        after.since_unix_ns = now;
    }
    let ready = matches!(after.state(), Some(State::Running(running)) if running.ready);
    let was_ready = matches!(before.state(), Some(State::Running(running)) if running.ready);
    if !ready {
        after.ready_since_unix_ns = 0;
    } else if fresh || !was_ready || before.ready_since_unix_ns == 0 {
        after.ready_since_unix_ns = now;
    }
    Some(after)
}

/// Only what was asked for counts, and what was done stays done.
fn merged_fetch(asked: Option<&pb::FetchState>, said: Option<pb::FetchState>) -> Option<pb::FetchState> {
    let asked = asked?;
    let said = said.filter(|said| said.template_version == asked.template_version && !asked.done);
    Some(said.map_or_else(
        || asked.clone(),
        |said| pb::FetchState {
            problem: said.problem.chars().take(FETCH_PROBLEM_CHARS_MAX).collect(),
            ..said
        },
    ))
}

/// What is draining never takes new callers again: not at all when it is to stop, else not before its next process.
fn merged_endpoint(before: &pb::InstanceRecord, report: &pb::InstanceReport, fresh: bool) -> EndpointState {
    let drains = before.endpoint() == EndpointState::Draining && (!before.wanted() || !fresh);
    if drains { EndpointState::Draining } else { report.endpoint() }
}
