//! What holds when a manifest says nothing. In one place, for files and for messages alike, so that the log and the
//! agents always see a manifest that says everything.

use std::time::Duration;

use crate::pb;
use crate::pb::probe::Check;
use crate::time::{from_proto_or, to_proto};

const PROBE_INTERVAL: Duration = Duration::from_secs(1);
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);
const BUDGET_RESTARTS: u32 = 10;
const BUDGET_WINDOW: Duration = Duration::from_secs(5 * 60);
/// Of a job it bounds the tries of one run, which may take hours each.
const JOB_BUDGET_RESTARTS: u32 = 3;
const JOB_BUDGET_WINDOW: Duration = Duration::from_secs(24 * 3600);
const MAX_PARALLEL: u32 = 1;
const PROGRESS_DEADLINE: Duration = Duration::from_secs(2 * 60);
const STOP_SIGNAL: i32 = 15;
const STOP_GRACE: Duration = Duration::from_secs(10);
const HTTP_SERVICE_PORT: u32 = 80;
const HOOK_TIMEOUT: Duration = Duration::from_secs(30);
/// Of `pre_stop`, whose time is part of the grace: at most that, and at most half of the grace.
const PRE_STOP_TIMEOUT: Duration = Duration::from_secs(5);
const LOGS_MAX_SIZE_BYTES: u64 = 50 * 1024 * 1024;
const LOGS_MAX_AGE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Fills in every default that DESIGN names. Changes nothing that is set; twice is the same as once. An unset
/// `update` gets `auto_revert`, a set one keeps what it says, since the wire cannot tell false from unset.
pub fn fill_defaults(manifest: &mut pb::Manifest) {
    if manifest.per_host {
        manifest.count = 0;
    }
    for port in manifest.ports.values_mut() {
        if port.service_port == 0 && port.protocol() == pb::Protocol::Http {
            port.service_port = HTTP_SERVICE_PORT;
        }
    }
    for artifact in manifest.artifacts.iter_mut().filter(|artifact| artifact.archive.is_empty()) {
        archive_of(&artifact.url).clone_into(&mut artifact.archive);
    }
    if let Some(health) = &mut manifest.health {
        for probe in health.ready.iter_mut().chain(&mut health.live) {
            fill_probe(probe, &manifest.ports);
        }
    }
    if manifest.kind() == pb::Kind::Unspecified {
        manifest.set_kind(pb::Kind::Service);
    }
    let is_job = manifest.kind() == pb::Kind::Job;
    if is_job {
        fill_job(manifest.job.get_or_insert_default());
    }
    fill_restart(manifest.restart.get_or_insert_default(), is_job);
    manifest.resources.get_or_insert_default();
    fill_update(
        manifest.update.get_or_insert_with(|| pb::Update { auto_revert: true, ..Default::default() }),
    );
    fill_stop(manifest.stop.get_or_insert_default());
    if let Some(hooks) = &mut manifest.hooks {
        let grace = manifest.stop.as_ref().and_then(|stop| stop.grace.as_ref());
        fill_hooks(hooks, from_proto_or(grace, STOP_GRACE));
    }
    fill_placement(manifest.placement.get_or_insert_default());
    fill_logs(manifest.logs.get_or_insert_default());
}

/// As its name ends.
fn archive_of(url: &str) -> &'static str {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let forms = [(".tar.gz", "tar.gz"), (".tgz", "tar.gz"), (".tar.zst", "tar.zst"), (".zip", "zip")];
    forms.iter().find(|(end, _)| path.ends_with(end)).map_or("none", |(_, form)| form)
}

fn fill_probe(probe: &mut pb::Probe, ports: &std::collections::BTreeMap<String, pb::Port>) {
    probe.interval.get_or_insert_with(|| to_proto(PROBE_INTERVAL));
    probe.timeout.get_or_insert_with(|| to_proto(PROBE_TIMEOUT));
    if probe.port.is_empty()
        && let Some(check) = &probe.check
        && let Some(port) = only_port(check, ports)
    {
        port.clone_into(&mut probe.port);
    }
}

/// The one port that a check can mean: the only one there is, or the only one of its protocol.
fn only_port<'a>(check: &Check, ports: &'a std::collections::BTreeMap<String, pb::Port>) -> Option<&'a str> {
    let suits = |port: &pb::Port| match check {
        Check::Http(_) => matches!(port.protocol(), pb::Protocol::Http | pb::Protocol::Http2),
        Check::Grpc(_) => port.protocol() == pb::Protocol::Grpc,
        Check::Tcp(_) => true,
        Check::Exec(_) | Check::Notify(_) | Check::NotifyFd(_) | Check::Log(_) => false,
    };
    let only = |mut names: Vec<&'a str>| if names.len() == 1 { names.pop() } else { None };
    let suiting = ports.iter().filter(|(_, port)| suits(port)).map(|(name, _)| name.as_str()).collect();
    let needs_port = matches!(check, Check::Http(_) | Check::Grpc(_) | Check::Tcp(_));
    only(suiting).or_else(|| only(ports.keys().map(String::as_str).collect()).filter(|_| needs_port))
}

fn fill_job(job: &mut pb::Job) {
    if job.overlap() == pb::OverlapPolicy::Unspecified {
        job.set_overlap(pb::OverlapPolicy::Skip);
    }
    if job.missed() == pb::MissedPolicy::Unspecified {
        job.set_missed(pb::MissedPolicy::Skip);
    }
}

fn fill_restart(restart: &mut pb::Restart, is_job: bool) {
    if restart.policy() == pb::RestartPolicy::Unspecified {
        let policy = if is_job { pb::RestartPolicy::OnFailure } else { pb::RestartPolicy::Always };
        restart.set_policy(policy);
    }
    if restart.budget_window.is_none() {
        restart.budget_window = Some(to_proto(if is_job { JOB_BUDGET_WINDOW } else { BUDGET_WINDOW }));
        let usual = if is_job { JOB_BUDGET_RESTARTS } else { BUDGET_RESTARTS };
        restart.budget_restarts = if restart.budget_restarts == 0 { usual } else { restart.budget_restarts };
    }
}

fn fill_update(update: &mut pb::Update) {
    if update.max_parallel == 0 {
        update.max_parallel = MAX_PARALLEL;
    }
    update.min_ready.get_or_insert_with(|| to_proto(Duration::ZERO));
    update.progress_deadline.get_or_insert_with(|| to_proto(PROGRESS_DEADLINE));
}

fn fill_stop(stop: &mut pb::Stop) {
    if stop.signal == 0 {
        stop.signal = STOP_SIGNAL;
    }
    stop.grace.get_or_insert_with(|| to_proto(STOP_GRACE));
}

fn fill_hooks(hooks: &mut pb::Hooks, grace: Duration) {
    // Whole milliseconds, as a file could have it.
    let half = Duration::from_millis(u64::try_from(grace.as_millis() / 2).unwrap_or(u64::MAX));
    let fill = |hook: Option<&mut pb::Hook>, timeout: Duration| {
        if let Some(hook) = hook {
            hook.timeout.get_or_insert_with(|| to_proto(timeout));
        }
    };
    fill(hooks.pre_start.as_mut(), HOOK_TIMEOUT);
    fill(hooks.post_start.as_mut(), HOOK_TIMEOUT);
    fill(hooks.pre_stop.as_mut(), PRE_STOP_TIMEOUT.min(half));
    fill(hooks.post_stop.as_mut(), HOOK_TIMEOUT);
}

fn fill_logs(logs: &mut pb::Logs) {
    if logs.max_size_bytes == 0 {
        logs.max_size_bytes = LOGS_MAX_SIZE_BYTES;
    }
    logs.max_age.get_or_insert_with(|| to_proto(LOGS_MAX_AGE));
}

fn fill_placement(placement: &mut pb::Placement) {
    if placement.spread.is_empty() {
        "host".clone_into(&mut placement.spread);
    }
    if placement.on_disconnect() == pb::OnDisconnect::Unspecified {
        placement.set_on_disconnect(pb::OnDisconnect::Keep);
    }
}
