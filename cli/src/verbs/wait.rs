//! Waiting for a deployment to end, or for a service to be gone. A watch only wakes; what counts is a linearizable
//! read, so that a success is one, whichever member is asked. On a terminal one line per service is kept up to date.

use std::time::Duration;

use futures::future::join_all;
use nave_proto::manifest::schedule::Schedule;
use nave_proto::pb;
use tokio::time::Instant;
use tonic::{Code, Status};

use super::observed_text;
use super::services::deployment_word;
use crate::client::Hub;
use crate::failure::{Exit, Failure};
use crate::out::{self, Tone};
use crate::progress::Progress;

/// The watch tells at once; this is for when it is broken.
const ASK_AT_LEAST_EVERY: Duration = Duration::from_millis(400);
/// Changes come in bursts; one read answers for a burst.
const BURST: Duration = Duration::from_millis(15);

/// One service that is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) service: String,
    pub(super) goal: Goal,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// This version is fully ready.
    Ready { version: u64 },
    /// No instance is left.
    Gone,
}

/// Where a target stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Going {
        how_far: String,
        why: String,
    },
    Done(String),
    Failed {
        reason: String,
        details: Vec<String>,
    },
    /// A newer version is there: it must be asked why.
    Superseded {
        by: u64,
    },
}

/// Returns when all targets are reached; the first failure ends the wait with its reason.
pub(super) async fn until(hub: &Hub, targets: &[Target], timeout: Duration) -> Result<(), Failure> {
    let begun = Instant::now();
    let deadline = begun + timeout;
    let mut progress = Progress::new(targets.iter().map(|target| target.service.clone()));
    let mut open: Vec<usize> = (0..targets.len()).collect();
    let mut failures: Vec<Failure> = Vec::new();
    let mut last: Vec<Option<pb::GetServiceResponse>> = vec![None; targets.len()];
    let mut wake = Wake::new(hub, targets);
    while !open.is_empty() {
        let asked = open.iter().map(|&index| ask(hub, &targets[index]));
        let Ok(answers) = tokio::time::timeout_at(deadline, join_all(asked)).await else { break };
        let mut still = Vec::new();
        for (index, answer) in open.into_iter().zip(answers) {
            let target = &targets[index];
            let verdict = match &answer {
                Ok(answer) => judge(target, answer),
                Err(failure) => {
                    Verdict::Going { how_far: "no answer yet".to_owned(), why: first_line(failure) }
                }
            };
            match verdict {
                Verdict::Going { how_far, why } => {
                    progress.set(index, Tone::Warning, &how_far, &why);
                    still.push(index);
                }
                Verdict::Done(text) => {
                    progress.finish(index, Tone::Good, &format!("{text} {}", after(begun.elapsed())));
                }
                Verdict::Failed { reason, details } => {
                    progress.finish(index, Tone::Bad, "failed");
                    failures.push(failed(target, &reason, details));
                }
                Verdict::Superseded { by } => {
                    progress.finish(index, Tone::Bad, "failed");
                    let events =
                        answer.ok().and_then(Result::ok).map(|answer| answer.events).unwrap_or_default();
                    failures.push(superseded(hub, target, by, &events).await);
                    continue;
                }
            }
            if let Ok(Ok(answer)) = answer {
                last[index] = Some(answer);
            }
        }
        open = still;
        if open.is_empty() || Instant::now() >= deadline {
            break;
        }
        wake.next(deadline).await;
    }
    for index in open {
        progress.finish(index, Tone::Bad, "timed out");
        failures.push(timed_out(&targets[index], last[index].as_ref(), timeout));
    }
    progress.end();
    merge(failures)
}

/// What was there already took no time.
fn after(took: Duration) -> String {
    match took.as_millis() {
        ..1000 => format!("after {} ms", took.as_millis()),
        _ => format!("after {:.1} s", took.as_secs_f32()),
    }
}

type Answer = Result<Result<pb::GetServiceResponse, Status>, Failure>;

async fn ask(hub: &Hub, target: &Target) -> Answer {
    let request = pb::GetServiceRequest { name: target.service.clone(), linearizable: true };
    hub.read_status(|mut member| {
        let request = request.clone();
        async move { member.services.get_service(request).await }
    })
    .await
}

fn judge(target: &Target, answer: &Result<pb::GetServiceResponse, Status>) -> Verdict {
    let response = match answer {
        Ok(response) => response,
        Err(status) if status.code() == Code::NotFound && target.goal == Goal::Gone => {
            return Verdict::Done("gone".to_owned());
        }
        Err(status) if status.code() == Code::NotFound => {
            return fail("it was deleted while it was waited for".to_owned());
        }
        Err(status) => return fail(first_line(&Failure::from_status(status))),
    };
    let Some(service) = &response.service else {
        return fail("the hub's answer has no service in it".to_owned());
    };
    match target.goal {
        Goal::Gone => {
            let left = super::count(response.instances.len(), "instance");
            Verdict::Going { how_far: format!("stopping, {left} left"), why: String::new() }
        }
        Goal::Ready { version } => judge_version(version, service, &response.instances),
    }
}

fn judge_version(version: u64, service: &pb::Service, instances: &[pb::Instance]) -> Verdict {
    if service.deleting {
        return fail("it is being deleted".to_owned());
    }
    if service.version != version {
        return Verdict::Superseded { by: service.version };
    }
    let wanted: Vec<&pb::Instance> = instances
        .iter()
        .filter(|instance| instance.version == version && instance.desired == "run")
        .collect();
    let ready = wanted.iter().filter(|instance| instance.ready).count();
    // More than are desired, while the surplus is on its way out.
    let ready = u32::try_from(ready).unwrap_or(u32::MAX).min(service.desired);
    let of = format!("{ready} of {} ready", service.desired);
    let word = deployment_word(service.deployment.as_ref());
    let reason = service.deployment.as_ref().map_or("", |deployment| deployment.reason.as_str());
    let canaries = service.deployment.as_ref().is_some_and(|deployment| deployment.canary > 0);
    match word {
        // A person decides what comes next, so there is nothing left to wait for.
        "running" if canaries && !service.waits_for.is_empty() => Verdict::Done(service.waits_for.clone()),
        "paused" => {
            Verdict::Going { how_far: format!("version {version}, {of}"), why: service.waits_for.clone() }
        }
        "failed" | "cancelled" if reason.is_empty() => Verdict::Failed {
            reason: format!("the deployment of version {version} is {word}"),
            details: why_not(service, &wanted),
        },
        "failed" | "cancelled" => fail(reason.to_owned()),
        "successful" if manifest_kind(service) == pb::Kind::Job => judge_job(version, service),
        "successful" if ready >= service.desired => Verdict::Done(format!("version {version}, {of}")),
        _ => Verdict::Going {
            how_far: format!("version {version}, {of}"),
            why: why_not(service, &wanted).into_iter().next().unwrap_or_default(),
        },
    }
}

fn manifest_kind(service: &pb::Service) -> pb::Kind {
    service.manifest.as_ref().map_or(pb::Kind::Unspecified, pb::Manifest::kind)
}

/// The hub works out when a schedule is due a moment after it has taken it.
fn judge_job(version: u64, service: &pb::Service) -> Verdict {
    let ran = service.runs.iter().rev().find(|run| run.version == version && run.ended_unix_ns != 0);
    match (ran, crate::when::timestamp(service.next_run.as_ref())) {
        (Some(run), _) => {
            Verdict::Done(format!("run {} {}", run.number, nave_proto::words::job_run_status(run.status())))
        }
        (None, Some(next)) => Verdict::Done(format!("version {version}, first run at {next}")),
        (None, None) if is_ever_due(service) => Verdict::Going {
            how_far: format!("version {version}"),
            why: "the hub has yet to work out its first run".to_owned(),
        },
        (None, None) => Verdict::Done(format!("version {version}")),
    }
}

fn is_ever_due(service: &pb::Service) -> bool {
    let schedule = service.manifest.as_ref().map_or("", |manifest| manifest.schedule.as_str());
    Schedule::parse(schedule).is_ok_and(|schedule| schedule.is_ever_due())
}

fn fail(reason: String) -> Verdict {
    Verdict::Failed { reason, details: Vec::new() }
}

/// A sentence for each thing that is missing.
fn why_not(service: &pb::Service, instances: &[&pb::Instance]) -> Vec<String> {
    let missing = instances.iter().filter(|instance| !instance.ready).map(|instance| {
        let reason =
            if instance.reason.is_empty() { String::new() } else { format!(": {}", instance.reason) };
        format!("{} on {} is {}{reason}", instance.id, instance.host, observed_text(instance))
    });
    // The hub's own sentences cover the instances too.
    if service.unplaced.is_empty() { missing.collect() } else { service.unplaced.clone() }
}

fn failed(target: &Target, reason: &str, details: Vec<String>) -> Failure {
    let details = details.into_iter().filter(|detail| !reason.contains(detail.as_str()));
    Failure::refused(format!("{}: {reason}", target.service)).details(details).next(look(target))
}

/// Says what took the place of the version that was waited for: a revert is a failure with a reason of its own.
async fn superseded(hub: &Hub, target: &Target, by: u64, events: &[pb::Event]) -> Failure {
    let Goal::Ready { version } = target.goal else { unreachable!("only versions are superseded") };
    let request = pb::ListServiceVersionsRequest { name: target.service.clone(), linearizable: true };
    let versions = hub
        .read(|mut member| {
            let request = request.clone();
            async move { member.services.list_service_versions(request).await }
        })
        .await;
    let next = versions.ok().and_then(|listed| {
        listed
            .versions
            .into_iter()
            .filter(|record| record.version > version)
            .min_by_key(|record| record.version)
    });
    let Some(next) = next else {
        return failed(target, &format!("version {by} took the place of version {version}"), Vec::new());
    };
    if let Some(to) = next.cause.strip_prefix("auto-revert to ") {
        let why =
            events.iter().find(|event| event.kind == "deployment_failed").map(|event| event.message.clone());
        let reason = format!(
            "version {version} failed and was reverted to version {to} (as version {})",
            next.version
        );
        return failed(target, &reason, why.into_iter().collect());
    }
    let reason = format!(
        "version {} ({} by {}) took the place of version {version}",
        next.version, next.cause, next.actor
    );
    failed(target, &reason, Vec::new())
}

fn timed_out(target: &Target, last: Option<&pb::GetServiceResponse>, timeout: Duration) -> Failure {
    let within = crate::when::exact(timeout);
    match (target.goal, last) {
        (Goal::Ready { version }, Some(response)) => {
            let service = response.service.clone().unwrap_or_default();
            let wanted: Vec<_> = response
                .instances
                .iter()
                .filter(|instance| instance.version == version && instance.desired == "run")
                .collect();
            let ready = wanted.iter().filter(|instance| instance.ready).count();
            let reason = format!("not ready within {within}: {ready} of {}; it goes on", service.desired);
            failed(target, &reason, why_not(&service, &wanted))
        }
        (Goal::Gone, Some(response)) => {
            let left = super::count(response.instances.len(), "instance");
            failed(target, &format!("not gone within {within}: {left} left; it goes on"), Vec::new())
        }
        // Not one answer in all that time: nobody knows.
        _ => failed(target, &format!("no answer within {within}"), Vec::new()).exiting(Exit::Unknown),
    }
}

fn look(target: &Target) -> String {
    format!("`nave status {0}`, `nave logs {0}`", target.service)
}

fn first_line(failure: &Failure) -> String {
    failure.to_string().lines().next().unwrap_or_default().to_owned()
}

/// One failure as it is; of several, each but the last is printed now.
fn merge(mut failures: Vec<Failure>) -> Result<(), Failure> {
    let Some(last) = failures.pop() else { return Ok(()) };
    for failure in failures {
        out::error(&failure);
    }
    Err(last)
}

/// Wakes when something changes, and several times a second anyway.
struct Wake {
    member: crate::client::Member,
    request: pb::WatchRequest,
    stream: Option<tonic::Streaming<pb::WatchResponse>>,
}

impl Wake {
    fn new(hub: &Hub, targets: &[Target]) -> Self {
        let service = match targets {
            [only] => only.service.clone(),
            _ => String::new(),
        };
        let request = pb::WatchRequest { service, ..Default::default() };
        Self { member: hub.member(), request, stream: None }
    }

    async fn next(&mut self, deadline: Instant) {
        let until = deadline.min(Instant::now() + ASK_AT_LEAST_EVERY);
        let woken = tokio::time::timeout_at(until, self.changed()).await;
        if woken == Ok(true) {
            let settled = tokio::time::timeout(BURST, async { while self.changed().await {} });
            // Either way it is time to ask.
            drop(settled.await);
        } else {
            tokio::time::sleep_until(until).await;
        }
    }

    /// False when there is no stream to hear from.
    async fn changed(&mut self) -> bool {
        if self.stream.is_none() {
            match self.member.services.watch(self.request.clone()).await {
                Ok(stream) => self.stream = Some(stream.into_inner()),
                Err(_) => return false,
            }
        }
        let Some(stream) = &mut self.stream else { return false };
        match stream.message().await {
            Ok(Some(_)) => true,
            Ok(None) | Err(_) => {
                self.stream = None;
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(version: u64, status: pb::DeploymentStatus) -> pb::Service {
        pb::Service {
            name: "web".into(),
            version,
            desired: 2,
            deployment: Some(pb::Deployment {
                version,
                status: status.into(),
                reason: "i-2 exited with 1".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn instance(id: &str, version: u64, ready: bool) -> pb::Instance {
        pb::Instance {
            id: id.into(),
            version,
            ready,
            desired: "run".into(),
            observed: "running".into(),
            host: "a".into(),
            ..Default::default()
        }
    }

    #[test]
    fn ready_means_all_of_the_new_version_and_a_deployment_that_ended_well() {
        let both = [instance("i-1", 2, true), instance("i-2", 2, true)];
        let successful = service(2, pb::DeploymentStatus::Successful);
        assert_eq!(judge_version(2, &successful, &both), Verdict::Done("version 2, 2 of 2 ready".into()));
        let going = service(2, pb::DeploymentStatus::Running);
        assert!(matches!(judge_version(2, &going, &both), Verdict::Going { .. }));
        let old = [instance("i-1", 2, true), instance("i-2", 1, true)];
        assert!(matches!(judge_version(2, &successful, &old), Verdict::Going { .. }));
    }

    #[test]
    fn what_is_missing_is_said_while_waiting() {
        let going = service(2, pb::DeploymentStatus::Running);
        let some = [instance("i-1", 2, true), instance("i-2", 2, false)];
        assert_eq!(
            judge_version(2, &going, &some),
            Verdict::Going {
                how_far: "version 2, 1 of 2 ready".into(),
                why: "i-2 on a is running, not ready".into()
            }
        );
    }

    #[test]
    fn a_failed_deployment_fails_with_the_hubs_reason() {
        let verdict = judge_version(2, &service(2, pb::DeploymentStatus::Failed), &[]);
        assert_eq!(verdict, Verdict::Failed { reason: "i-2 exited with 1".into(), details: Vec::new() });
    }

    #[test]
    fn a_scheduled_job_is_waited_for_until_its_first_run_is_known() {
        let job = |schedule: &str| pb::Service {
            manifest: Some(pb::Manifest {
                kind: pb::Kind::Job.into(),
                schedule: schedule.to_owned(),
                ..Default::default()
            }),
            ..service(2, pb::DeploymentStatus::Successful)
        };
        let unknown = job("30 2 * * * Europe/Berlin");
        assert!(matches!(judge_version(2, &unknown, &[]), Verdict::Going { .. }));
        let next_run = Some(prost_types::Timestamp { seconds: 1_795_829_400, nanos: 0 });
        let known = pb::Service { next_run, ..unknown };
        assert_eq!(
            judge_version(2, &known, &[]),
            Verdict::Done("version 2, first run at 2026-11-28T01:30:00Z".into())
        );
        for never in ["", "0 0 30 2 *"] {
            assert_eq!(judge_version(2, &job(never), &[]), Verdict::Done("version 2".into()));
        }
    }

    #[test]
    fn a_newer_version_ends_the_wait() {
        assert_eq!(
            judge_version(2, &service(3, pb::DeploymentStatus::Successful), &[]),
            Verdict::Superseded { by: 3 }
        );
    }

    #[test]
    fn not_found_is_what_a_deletion_waits_for() {
        let gone = Err(Status::not_found("no such service"));
        let target = |goal| Target { service: "web".into(), goal };
        assert_eq!(judge(&target(Goal::Gone), &gone), Verdict::Done("gone".into()));
        assert!(matches!(judge(&target(Goal::Ready { version: 1 }), &gone), Verdict::Failed { .. }));
    }
}
