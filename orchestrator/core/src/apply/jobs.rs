//! Runs of jobs: when one begins, how it ends, and how many are remembered. A run ends with the report that says so, in
//! the same command: there is no moment at which its process has ended well and a host that is lost could have it run
//! again.

use nave_proto::pb;
use nave_proto::pb::{DeploymentStatus, JobRunStatus, MissedPolicy, OverlapPolicy};

use super::Tx;
use crate::events::{Subject, ended};
use crate::jobs::{is_over, open_run, queued_run};
use crate::limits::JOB_RUNS_KEPT;
use crate::wants::{InstanceExt as _, ManifestExt};

/// From this command format on, also what was missed before a run that starts in time is noted.
const ALL_MISSED_ARE_NOTED: u32 = 8;
/// From this command format on, a run has ended when its process did, not when the hub heard of it.
const ENDS_ARE_THE_HOSTS: u32 = 8;

impl Tx<'_> {
    /// A person's word starts a run whatever the schedule says; while one goes on it waits or takes its place.
    pub(super) fn start_run(&mut self, name: &str) {
        let (overlap, _) = self.policies(name);
        let overlap = if overlap == OverlapPolicy::Skip { OverlapPolicy::Queue } else { overlap };
        self.add_run(name, self.now, overlap, String::new());
    }

    /// The leader's word that a run is due, or when the next one is. What no longer fits is skipped.
    pub(super) fn schedule_run(&mut self, step: &pb::ScheduleRun) {
        let Some(entry) = self.state.services.get(&step.service) else { return };
        let record = &entry.record;
        let job = record.job.clone().unwrap_or_default();
        let wanted = entry.current().is_some_and(ManifestExt::is_job) && !record.deleting;
        if !wanted || record.version != step.version {
            return;
        }
        let known = job.schedule_version == step.version;
        let rises = job.next_due_unix_ns != 0
            && step.due_unix_ns >= job.next_due_unix_ns
            && step.due_unix_ns <= self.now
            && (step.next_due_unix_ns == 0 || step.next_due_unix_ns > step.due_unix_ns);
        if (step.due_unix_ns == 0 && known) || (step.due_unix_ns != 0 && !(known && rises)) {
            return;
        }
        self.edit_job(&step.service, |job| {
            job.schedule_version = step.version;
            job.next_due_unix_ns = step.next_due_unix_ns;
        });
        if step.due_unix_ns != 0 {
            self.run_due(step, job.next_due_unix_ns);
        }
    }

    /// `first`: what was due before all others of this step.
    fn run_due(&mut self, step: &pb::ScheduleRun, first: i64) {
        let (overlap, policy) = self.policies(&step.service);
        let missed = step.late || (step.missed > 0 && self.written_by >= ALL_MISSED_ARE_NOTED);
        let what = format!("{} due while no hub could start it", times(step.missed));
        let reason = match policy {
            MissedPolicy::Run if missed => format!("makes good for what was {what}"),
            MissedPolicy::Skip | MissedPolicy::Unspecified if missed => {
                let due = if step.late { step.due_unix_ns } else { first };
                self.note_run(&step.service, due, JobRunStatus::Missed, what);
                String::new()
            }
            MissedPolicy::Run | MissedPolicy::Skip | MissedPolicy::Unspecified => String::new(),
        };
        if !step.late || policy == MissedPolicy::Run {
            self.add_run(&step.service, step.due_unix_ns, overlap, reason);
        }
    }

    fn add_run(&mut self, name: &str, due: i64, overlap: OverlapPolicy, reason: String) {
        let Some(job) = self.state.services.get(name).map(|e| e.record.job.clone().unwrap_or_default())
        else {
            return;
        };
        let (open, queued) = (open_run(&job).map(|run| run.number), queued_run(&job).map(|run| run.number));
        let (status, reason) = match (open, overlap, queued) {
            (None, _, _) => (JobRunStatus::Running, reason),
            (Some(_), OverlapPolicy::Replace, _) => {
                let why = "stopped for the next one";
                for number in open.into_iter().chain(queued) {
                    self.end_run(name, number, JobRunStatus::Replaced, why, None);
                }
                (JobRunStatus::Running, reason)
            }
            (Some(open), OverlapPolicy::Queue, None) => {
                (JobRunStatus::Queued, format!("waits for run {open}"))
            }
            (Some(_), OverlapPolicy::Queue, Some(queued)) => {
                (JobRunStatus::Skipped, format!("run {queued} already waits"))
            }
            (Some(open), OverlapPolicy::Skip | OverlapPolicy::Unspecified, _) => {
                (JobRunStatus::Skipped, format!("run {open} was still going on"))
            }
        };
        self.note_run(name, due, status, reason);
    }

    fn note_run(&mut self, name: &str, due: i64, status: JobRunStatus, reason: String) {
        let (now, version) = (self.now, self.state.services.get(name).map_or(0, |e| e.record.version));
        let mut number = 0;
        self.edit_job(name, |job| {
            job.last_number += 1;
            number = job.last_number;
            job.runs.push(pb::JobRun {
                number,
                version,
                status: status.into(),
                due_unix_ns: due,
                ended_unix_ns: if is_over(status) { now } else { 0 },
                reason: reason.clone(),
                ..Default::default()
            });
        });
        let why = if reason.is_empty() { String::new() } else { format!(": {reason}") };
        let (kind, what) = match status {
            JobRunStatus::Running => ("job_started", "is to start"),
            JobRunStatus::Queued => ("job_queued", "is queued"),
            JobRunStatus::Skipped => ("job_skipped", "is skipped"),
            JobRunStatus::Missed => ("job_missed", "was missed"),
            JobRunStatus::Succeeded
            | JobRunStatus::Failed
            | JobRunStatus::Replaced
            | JobRunStatus::Unspecified => return,
        };
        self.event(kind, Subject::service(name), format!("run {number} of {name} {what}{why}"));
    }

    /// A new instance stands for an open run.
    pub(super) fn run_placed(&mut self, instance: &pb::InstanceRecord) {
        let now = self.now;
        self.edit_run(&instance.service, instance.run, |run| {
            run.instance_id = instance.id;
            run.version = instance.version;
            run.started_unix_ns = now;
        });
    }

    /// What a report of an instance means for the run that it is for.
    pub(super) fn job_reported(&mut self, instance: &pb::InstanceRecord) {
        let open = |record: &pb::ServiceRecord| record.job.as_ref().and_then(open_run).map(|run| run.number);
        let open = self.state.services.get(&instance.service).and_then(|entry| open(&entry.record));
        if instance.run == 0 || open != Some(instance.run) || !instance.wanted() {
            return;
        }
        let status = match (instance.completed(), instance.gave_up() || instance.exited()) {
            (true, _) => JobRunStatus::Succeeded,
            (false, true) => JobRunStatus::Failed,
            (false, false) => return,
        };
        let exit = instance.last_exit.as_ref();
        let reason = match status {
            JobRunStatus::Failed if !instance.reason.is_empty() => instance.reason.clone(),
            JobRunStatus::Failed => ended(exit),
            JobRunStatus::Succeeded
            | JobRunStatus::Unspecified
            | JobRunStatus::Queued
            | JobRunStatus::Running
            | JobRunStatus::Skipped
            | JobRunStatus::Missed
            | JobRunStatus::Replaced => String::new(),
        };
        self.end_run(&instance.service, instance.run, status, &reason, Some(instance));
    }

    /// The next one in the queue begins with it.
    fn end_run(
        &mut self,
        name: &str,
        number: u64,
        status: JobRunStatus,
        reason: &str,
        instance: Option<&pb::InstanceRecord>,
    ) {
        let now = self.now;
        let exit = instance.filter(|_| self.written_by >= ENDS_ARE_THE_HOSTS).and_then(last_exit);
        let mut took = 0;
        self.edit_run(name, number, |run| {
            run.set_status(status);
            run.ended_unix_ns = ended_at(run, exit, now);
            reason.clone_into(&mut run.reason);
            took = ran_ns(run, exit) / crate::limits::SECOND_NS;
            if let Some(instance) = instance {
                run.attempts = instance.attempt;
                run.exit = instance.last_exit.clone();
            }
        });
        let why = if reason.is_empty() { String::new() } else { format!(": {reason}") };
        let (kind, what) = match status {
            JobRunStatus::Succeeded => ("job_succeeded", format!("succeeded after {took} s")),
            JobRunStatus::Failed => ("job_failed", format!("failed after {took} s")),
            JobRunStatus::Replaced => ("job_replaced", "is replaced".to_owned()),
            JobRunStatus::Unspecified
            | JobRunStatus::Queued
            | JobRunStatus::Running
            | JobRunStatus::Skipped
            | JobRunStatus::Missed => return,
        };
        let subject = instance.map_or_else(|| Subject::service(name), Subject::instance);
        self.event(kind, subject, format!("run {number} of {name} {what}{why}"));
        if status == JobRunStatus::Replaced {
            return;
        }
        self.conclude_by_run(name, number, status, reason);
        self.edit_job(name, |job| {
            if let Some(next) = job.runs.iter_mut().find(|run| run.status() == JobRunStatus::Queued) {
                next.set_status(JobRunStatus::Running);
                next.reason.clear();
            }
        });
        self.state.services.touch_needing(name, self.revision);
    }

    /// The deployment that asked for a run ends as the run does.
    fn conclude_by_run(&mut self, name: &str, number: u64, status: JobRunStatus, reason: &str) {
        let Some(entry) = self.state.services.get(name) else { return };
        let record = &entry.record;
        let of_version = |job: &pb::JobState| {
            job.runs.iter().any(|run| run.number == number && run.version == record.version)
        };
        let running = record.deployment.as_ref().is_some_and(|d| d.status() == DeploymentStatus::Running);
        if !running || !record.job.as_ref().is_some_and(of_version) {
            return;
        }
        let (version, succeeded, now) = (record.version, status == JobRunStatus::Succeeded, self.now);
        let stored = entry.version(version).cloned();
        self.edit_service(name, |record| {
            if succeeded {
                record.stable_version = version;
            }
            if let Some(deployment) = &mut record.deployment {
                let ends = if succeeded { DeploymentStatus::Successful } else { DeploymentStatus::Failed };
                deployment.set_status(ends);
                deployment.ended_unix_ns = now;
                deployment.reason =
                    if succeeded { String::new() } else { format!("run {number} failed: {reason}") };
            }
        });
        if succeeded && let Some(stored) = stored {
            self.put_version(pb::VersionRecord { stable: true, ..stored.as_ref().clone() });
        }
    }

    fn policies(&self, name: &str) -> (OverlapPolicy, MissedPolicy) {
        let manifest = self.state.services.get(name).and_then(|entry| entry.current());
        let job = manifest.and_then(|manifest| manifest.job).unwrap_or_default();
        (job.overlap(), job.missed())
    }

    fn edit_run(&mut self, name: &str, number: u64, edit: impl FnOnce(&mut pb::JobRun)) {
        self.edit_job(name, |job| {
            if let Some(run) = job.runs.iter_mut().find(|run| run.number == number) {
                edit(run);
            }
        });
    }

    /// Forgets the oldest runs that are over, too.
    fn edit_job(&mut self, name: &str, edit: impl FnOnce(&mut pb::JobState)) {
        self.edit_service(name, |record| {
            let job = record.job.get_or_insert_default();
            edit(job);
            while job.runs.len() > JOB_RUNS_KEPT {
                let Some(oldest) = job.runs.iter().position(|run| is_over(run.status())) else { return };
                job.runs.remove(oldest);
            }
        });
    }
}

/// How the newest process of an instance ended, if that has been told.
fn last_exit(instance: &pb::InstanceRecord) -> Option<&pb::ExitRecord> {
    let newest = |exit: &&pb::ExitRecord| (exit.epoch, exit.attempt) == (instance.epoch, instance.attempt);
    instance.last_exit.as_ref().filter(newest)
}

/// By the host's clock, which may be another than the hub's: never before the run began nor later than now.
fn ended_at(run: &pb::JobRun, exit: Option<&pb::ExitRecord>, now: i64) -> i64 {
    let ended = exit.map(|exit| exit.ended_unix_ns).filter(|ended| *ended != 0);
    ended.map_or(now, |ended| ended.max(run.started_unix_ns).min(now))
}

/// For how long a run that has ended went on. Of one process, as its host has measured it.
fn ran_ns(run: &pb::JobRun, exit: Option<&pb::ExitRecord>) -> i64 {
    let alone = exit.filter(|exit| (exit.epoch, exit.attempt) == (1, 1) && exit.ran_ms != 0);
    match (alone, run.started_unix_ns) {
        (Some(exit), _) => i64::try_from(exit.ran_ms).unwrap_or(i64::MAX).saturating_mul(1_000_000),
        (None, 0) => 0,
        (None, began) => run.ended_unix_ns - began,
    }
}

fn times(missed: u32) -> String {
    if missed == 1 { "once".to_owned() } else { format!("{missed} times") }
}
