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

/// Of one process, for how long it ran.
fn took(run: &pb::JobRun) -> String {
    let alone = run.exit.as_ref().filter(|exit| (exit.epoch, exit.attempt) == (1, 1) && exit.ran_ms != 0);
    match (alone, run.started_unix_ns, run.ended_unix_ns) {
        (Some(exit), _, _) => format!("{} s", exit.ran_ms / 1000),
        (None, 0, _) | (None, _, 0) => String::new(),
        (None, from, to) => format!("{} s", (to - from) / 1_000_000_000),
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
        table.row([
            format!("  {}", run.number).into(),
            Cell::new(words::job_run_status(run.status()), tone),
            run.version.to_string().into(),
            format!("{} ago", when::age(moment(run.due_unix_ns), now)).into(),
            took(run).into(),
            run.attempts.to_string().into(),
            instance(run).into(),
            run.reason.as_str().into(),
        ]);
    }
    table.print();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_of_one_process_took_as_long_as_that_ran() {
        let run = |attempt, ran_ms| pb::JobRun {
            started_unix_ns: 1_000_000_000,
            ended_unix_ns: 198_000_000_000,
            exit: Some(pb::ExitRecord { epoch: 1, attempt, ran_ms, ..Default::default() }),
            ..Default::default()
        };
        assert_eq!((took(&run(1, 90_400)), took(&run(2, 90_400))), ("90 s".to_owned(), "197 s".to_owned()));
        assert_eq!(took(&pb::JobRun { ended_unix_ns: 0, exit: None, ..run(1, 0) }), "");
    }
}
