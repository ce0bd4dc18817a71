//! The runs of a job, on the page of `nave status`.

use nave_proto::{pb, words};
use serde::Serialize;

use crate::out::{self, Tone};
use crate::table::{Cell, Table};
use crate::when;

#[derive(Debug, Serialize)]
pub(super) struct RunRow<'a> {
    number: u64,
    version: u64,
    status: &'static str,
    due: String,
    started: String,
    ended: String,
    instance: String,
    attempts: u32,
    reason: &'a str,
}

impl<'a> From<&'a pb::JobRun> for RunRow<'a> {
    fn from(run: &'a pb::JobRun) -> Self {
        Self {
            number: run.number,
            version: run.version,
            status: words::job_run_status(run.status()),
            due: when::rfc3339(moment(run.due_unix_ns)),
            started: when::rfc3339(moment(run.started_unix_ns)),
            ended: when::rfc3339(moment(run.ended_unix_ns)),
            instance: instance(run),
            attempts: run.attempts,
            reason: &run.reason,
        }
    }
}

fn moment(unix_ns: i64) -> Option<jiff::Timestamp> {
    (unix_ns != 0).then(|| jiff::Timestamp::from_nanosecond(i128::from(unix_ns)).ok()).flatten()
}

fn instance(run: &pb::JobRun) -> String {
    if run.instance_id == 0 {
        String::new()
    } else {
        nave_proto::ids::InstanceId(run.instance_id).to_string()
    }
}

/// So many of the last runs fit on a screen.
const SHOWN: usize = 10;

pub(super) fn print(service: &pb::Service, now: jiff::Timestamp) {
    if let Some(next) = when::timestamp(service.next_run.as_ref()) {
        out::line(format_args!("  next run    {next}"));
    }
    if service.runs.is_empty() {
        return;
    }
    out::line("\nruns");
    let mut table = Table::new(["  RUN", "STATE", "VERSION", "DUE", "TOOK", "TRIES", "INSTANCE", "REASON"]);
    for run in &service.runs[service.runs.len().saturating_sub(SHOWN)..] {
        let tone = match run.status() {
            pb::JobRunStatus::Failed => Tone::Bad,
            pb::JobRunStatus::Succeeded => Tone::Good,
            _ => Tone::Warning,
        };
        let took = match (run.started_unix_ns, run.ended_unix_ns) {
            (0, _) | (_, 0) => String::new(),
            (from, to) => format!("{} s", (to - from) / 1_000_000_000),
        };
        table.row([
            format!("  {}", run.number).into(),
            Cell::new(words::job_run_status(run.status()), tone),
            run.version.to_string().into(),
            format!("{} ago", when::age(moment(run.due_unix_ns), now)).into(),
            took.into(),
            run.attempts.to_string().into(),
            instance(run).into(),
            run.reason.as_str().into(),
        ]);
    }
    table.print();
}
