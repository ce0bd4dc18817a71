//! From the message to the document that a person could have written.

use std::time::Duration;

use super::{
    ArtifactDocument, CallsDocument, Document, DurationText, FileDocument, HealthDocument, HookDocument,
    HooksDocument, IsolationDocument, JobDocument, KindWord, LogsDocument, MissedWord, OnDisconnectWord,
    OverlapWord, PlacementDocument, PolicyWord, PortDocument, ProbeDocument, ProtocolWord, ResourcesDocument,
    RestartDocument, RlimitValue, ScopeWord, SeccompWord, StopDocument, UpdateDocument,
};
use crate::manifest::values::{format_budget, format_size};
use crate::pb;
use crate::pb::probe::Check;
use crate::time::{format_duration, from_proto_or};
use crate::{signals, words};

impl From<&pb::Manifest> for Document {
    fn from(manifest: &pb::Manifest) -> Self {
        let text = |text: &String| (!text.is_empty()).then(|| text.clone());
        Self {
            name: manifest.name.clone(),
            command: manifest.command.clone(),
            count: (!manifest.per_host).then_some(manifest.count),
            per_host: manifest.per_host.then_some(true),
            env: manifest.env.clone(),
            user: text(&manifest.user),
            working_dir: text(&manifest.working_dir),
            needs: manifest.needs.clone(),
            allow: manifest.allow.as_ref().map(|allow| allow.callers.clone()),
            ports: manifest.ports.iter().map(|(name, port)| (name.clone(), port.into())).collect(),
            health: manifest.health.as_ref().map(HealthDocument::from),
            restart: manifest.restart.as_ref().map(RestartDocument::from),
            resources: manifest.resources.as_ref().and_then(resources),
            update: manifest.update.as_ref().map(UpdateDocument::from),
            stop: manifest.stop.as_ref().map(StopDocument::from),
            placement: manifest.placement.as_ref().map(PlacementDocument::from),
            kind: (manifest.kind() == pb::Kind::Job).then(|| KindWord(words::kind(manifest.kind()))),
            schedule: (!manifest.schedule.is_empty()).then(|| manifest.schedule.clone()),
            job: manifest.job.as_ref().map(JobDocument::from),
            logs: manifest.logs.as_ref().map(LogsDocument::from),
            env_file: manifest.env_files.clone(),
            data: manifest.data.then_some(true),
            secrets: manifest.secrets.clone(),
            artifact: manifest.artifacts.iter().map(ArtifactDocument::from).collect(),
            file: manifest.files.iter().map(FileDocument::from).collect(),
            isolation: manifest.isolation.as_ref().map(IsolationDocument::from),
            rlimits: manifest.rlimits.iter().map(|(name, &limit)| (name.clone(), rlimit(limit))).collect(),
            hooks: manifest.hooks.as_ref().map(HooksDocument::from),
        }
    }
}

impl From<&pb::Port> for PortDocument {
    fn from(port: &pb::Port) -> Self {
        let number = |number: u32| (number != 0).then_some(number);
        Self {
            protocol: ProtocolWord(words::protocol(port.protocol())),
            service_port: number(port.service_port),
            port: number(port.port),
            calls: port.calls.as_ref().map(CallsDocument::from),
        }
    }
}

impl From<&pb::Calls> for CallsDocument {
    fn from(calls: &pb::Calls) -> Self {
        Self {
            timeout: DurationText::of(calls.timeout.as_ref()),
            try_timeout: DurationText::of(calls.try_timeout.as_ref()),
            idle_timeout: DurationText::of(calls.idle_timeout.as_ref()),
            max_connections: calls.max_connections,
            max_requests: calls.max_requests,
            max_pending: calls.max_pending,
            retries: calls.retries,
            hash_header: (!calls.hash_header.is_empty()).then(|| calls.hash_header.clone()),
            access_log: calls.access_log.then_some(true),
        }
    }
}

impl From<&pb::Health> for HealthDocument {
    fn from(health: &pb::Health) -> Self {
        let ready = health.ready.as_ref().map(ProbeDocument::from).unwrap_or_default();
        let ProbeDocument { http, tcp, grpc, exec, notify, port, interval, timeout } = ready;
        let live = health.live.as_ref().map(ProbeDocument::from);
        let start_grace = DurationText::of(health.start_grace.as_ref());
        let said = health.ready.as_ref().and_then(|probe| probe.check.as_ref());
        let (notify_fd, log) = match said {
            Some(Check::NotifyFd(number)) => (Some(*number), None),
            Some(Check::Log(pattern)) => (None, Some(pattern.clone())),
            _ => (None, None),
        };
        Self { http, tcp, grpc, exec, notify, notify_fd, log, port, interval, timeout, start_grace, live }
    }
}

impl From<&pb::Probe> for ProbeDocument {
    fn from(probe: &pb::Probe) -> Self {
        let mut document = Self {
            port: (!probe.port.is_empty()).then(|| probe.port.clone()),
            interval: DurationText::of(probe.interval.as_ref()),
            timeout: DurationText::of(probe.timeout.as_ref()),
            ..Self::default()
        };
        match &probe.check {
            None => {}
            Some(Check::Http(path)) => document.http = Some(path.clone()),
            Some(Check::Tcp(chosen)) => document.tcp = Some(*chosen),
            Some(Check::Grpc(chosen)) => document.grpc = Some(*chosen),
            Some(Check::Exec(exec)) => document.exec = Some(exec.command.clone()),
            Some(Check::Notify(chosen)) => document.notify = Some(*chosen),
            // Readiness only, whose document has them.
            Some(Check::NotifyFd(_) | Check::Log(_)) => {}
        }
        document
    }
}

impl From<&pb::Restart> for RestartDocument {
    fn from(restart: &pb::Restart) -> Self {
        let policy = restart.policy();
        Self {
            policy: (policy != pb::RestartPolicy::Unspecified)
                .then(|| PolicyWord(words::restart_policy(policy))),
            budget: restart.budget_window.as_ref().map(|window| {
                format_budget(restart.budget_restarts, from_proto_or(Some(window), Duration::ZERO))
            }),
            success_codes: restart.success_codes.clone(),
            fatal_codes: restart.fatal_codes.clone(),
        }
    }
}

impl From<&pb::Hooks> for HooksDocument {
    fn from(hooks: &pb::Hooks) -> Self {
        let hook = |hook: &Option<pb::Hook>| {
            hook.as_ref().map(|hook| HookDocument {
                command: hook.command.clone(),
                timeout: DurationText::of(hook.timeout.as_ref()),
            })
        };
        Self {
            pre_start: hook(&hooks.pre_start),
            post_start: hook(&hooks.post_start),
            pre_stop: hook(&hooks.pre_stop),
            post_stop: hook(&hooks.post_stop),
        }
    }
}

impl From<&pb::Isolation> for IsolationDocument {
    fn from(isolation: &pb::Isolation) -> Self {
        let chosen = |flag: bool| flag.then_some(true);
        let seccomp = isolation.seccomp();
        Self {
            private_tmp: isolation.shared_tmp.then_some(false),
            service_names: isolation.host_names.then_some(false),
            new_privileges: chosen(isolation.new_privileges),
            capabilities: isolation.capabilities.clone(),
            read_only: chosen(isolation.read_only),
            hide: isolation.hide.clone(),
            landlock: chosen(isolation.landlock),
            read: isolation.read.clone(),
            write: isolation.write.clone(),
            seccomp: (seccomp != pb::SeccompPreset::Unspecified)
                .then(|| SeccompWord(words::seccomp(seccomp))),
        }
    }
}

fn rlimit(limit: u64) -> RlimitValue {
    // What no file can write is as good as no limit.
    i64::try_from(limit).map_or_else(|_| RlimitValue::Text("unlimited".to_owned()), RlimitValue::Number)
}

/// Nothing at all rather than an empty table.
fn resources(resources: &pb::Resources) -> Option<ResourcesDocument> {
    #[expect(clippy::cast_precision_loss, reason = "core counts are small")]
    let cores = |millicores: u64| (millicores != 0).then(|| millicores as f64 / 1000.0);
    let size = |bytes: u64| (bytes != 0).then(|| format_size(bytes));
    (*resources != pb::Resources::default()).then(|| ResourcesDocument {
        cpu: cores(resources.cpu_millicores),
        cpu_max: cores(resources.cpu_max_millicores),
        memory: size(resources.memory_bytes),
        memory_soft: size(resources.memory_soft_bytes),
        pids: (resources.pids != 0).then_some(resources.pids),
        nice: (resources.nice != 0).then_some(resources.nice),
        oom_score_adj: (resources.oom_score_adj != 0).then_some(resources.oom_score_adj),
    })
}

impl From<&pb::Update> for UpdateDocument {
    fn from(update: &pb::Update) -> Self {
        Self {
            max_parallel: (update.max_parallel != 0).then_some(update.max_parallel),
            min_ready: DurationText::of(update.min_ready.as_ref()),
            progress_deadline: DurationText::of(update.progress_deadline.as_ref()),
            auto_revert: Some(update.auto_revert),
            canary: Some(update.canary),
        }
    }
}

impl From<&pb::Stop> for StopDocument {
    fn from(stop: &pb::Stop) -> Self {
        Self {
            signal: (stop.signal != 0).then(|| signals::name(stop.signal)),
            scope: (stop.scope() != pb::StopScope::Process)
                .then(|| ScopeWord(words::stop_scope(stop.scope()))),
            grace: DurationText::of(stop.grace.as_ref()),
            drain_timeout: DurationText::of(stop.drain_timeout.as_ref()),
        }
    }
}

impl From<&pb::Job> for JobDocument {
    fn from(job: &pb::Job) -> Self {
        let (overlap, missed) = (job.overlap(), job.missed());
        Self {
            overlap: (overlap != pb::OverlapPolicy::Unspecified)
                .then(|| OverlapWord(words::overlap(overlap))),
            missed: (missed != pb::MissedPolicy::Unspecified).then(|| MissedWord(words::missed(missed))),
        }
    }
}

impl From<&pb::Placement> for PlacementDocument {
    fn from(placement: &pb::Placement) -> Self {
        let on_disconnect = placement.on_disconnect();
        Self {
            constraints: placement.constraints.clone(),
            spread: (!placement.spread.is_empty()).then(|| placement.spread.clone()),
            on_disconnect: (on_disconnect != pb::OnDisconnect::Unspecified)
                .then(|| OnDisconnectWord(words::on_disconnect(on_disconnect))),
            priority: placement.priority,
        }
    }
}

impl From<&pb::Artifact> for ArtifactDocument {
    fn from(artifact: &pb::Artifact) -> Self {
        Self {
            name: artifact.name.clone(),
            url: artifact.url.clone(),
            sha256: artifact.sha256.clone(),
            archive: (!artifact.archive.is_empty()).then(|| artifact.archive.clone()),
        }
    }
}

impl From<&pb::File> for FileDocument {
    fn from(file: &pb::File) -> Self {
        let text = |text: &String| (!text.is_empty()).then(|| text.clone());
        Self {
            path: file.path.clone(),
            content: file.source.is_empty().then(|| file.content.clone()),
            source: text(&file.source),
            template: file.verbatim.then_some(false),
            mode: (file.mode != 0).then(|| format!("{:04o}", file.mode)),
            owner: text(&file.owner),
        }
    }
}

impl From<&pb::Logs> for LogsDocument {
    fn from(logs: &pb::Logs) -> Self {
        Self {
            max_size: (logs.max_size_bytes != 0).then(|| format_size(logs.max_size_bytes)),
            max_age: DurationText::of(logs.max_age.as_ref()),
        }
    }
}

impl DurationText {
    fn of(duration: Option<&prost_types::Duration>) -> Option<Self> {
        duration.map(|given| Self(format_duration(from_proto_or(Some(given), Duration::ZERO))))
    }
}
