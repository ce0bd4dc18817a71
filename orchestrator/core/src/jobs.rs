//! What can be read from a job's ledger of runs. At most one run goes on, and at most one waits for it.

use nave_proto::pb;
use nave_proto::pb::JobRunStatus;

use crate::state::ServiceEntry;

/// The run that goes on.
pub(crate) fn open_run(job: &pb::JobState) -> Option<&pb::JobRun> {
    job.runs.iter().find(|run| run.status() == JobRunStatus::Running)
}

/// The run that waits for it.
pub(crate) fn queued_run(job: &pb::JobState) -> Option<&pb::JobRun> {
    job.runs.iter().find(|run| run.status() == JobRunStatus::Queued)
}

/// Nothing more comes of it.
pub(crate) fn is_over(status: JobRunStatus) -> bool {
    match status {
        JobRunStatus::Queued | JobRunStatus::Running => false,
        JobRunStatus::Succeeded
        | JobRunStatus::Failed
        | JobRunStatus::Skipped
        | JobRunStatus::Missed
        | JobRunStatus::Replaced
        | JobRunStatus::Unspecified => true,
    }
}

/// The last run that ran to its end succeeded: what needs the job may start.
pub(crate) fn is_done(entry: &ServiceEntry) -> bool {
    let ran = |run: &&pb::JobRun| matches!(run.status(), JobRunStatus::Succeeded | JobRunStatus::Failed);
    let job = entry.record.job.as_ref();
    job.and_then(|job| job.runs.iter().rev().find(ran))
        .is_some_and(|run| run.status() == JobRunStatus::Succeeded)
}

/// What must hold of every ledger.
pub(crate) fn check(entry: &ServiceEntry) -> Result<(), String> {
    let (name, Some(job)) = (&entry.name, &entry.record.job) else { return Ok(()) };
    let count = |status| job.runs.iter().filter(|run| run.status() == status).count();
    let (open, queued) = (count(JobRunStatus::Running), count(JobRunStatus::Queued));
    if open > 1 || queued > 1 || queued > open {
        return Err(format!("job {name}: {open} runs go on and {queued} wait"));
    }
    if !job.runs.is_sorted_by(|a, b| a.number < b.number)
        || job.runs.last().is_some_and(|run| run.number > job.last_number)
    {
        return Err(format!("job {name}: runs are not in the order of their numbers"));
    }
    if job.runs.len() > crate::limits::JOB_RUNS_KEPT {
        return Err(format!("job {name}: {} runs are kept", job.runs.len()));
    }
    Ok(())
}
