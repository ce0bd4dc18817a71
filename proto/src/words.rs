//! The shared vocabulary: one word for each state, the same in the API, the tables, the JSON and the logs.

use crate::pb;
use crate::signals;

/// Reasons of `google.rpc.ErrorInfo` that an agent acts upon: what it runs is others' now, so it stops all of it.
pub const HOST_FORGOTTEN: &str = "HOST_FORGOTTEN";
/// Likewise: another machine acts for its host.
pub const HOST_CLONED: &str = "HOST_CLONED";

macro_rules! words {
    ($(#[$doc:meta])* $to:ident, $from:ident, $enum:ty, { $($variant:path => $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        pub fn $to(value: $enum) -> &'static str {
            match value { $($variant => $word),+ }
        }

        /// The value that the word stands for.
        pub fn $from(word: &str) -> Option<$enum> {
            match word { $($word => Some($variant),)+ _ => None }
        }
    };
}

words!(
    /// Which system calls a service is refused.
    seccomp, parse_seccomp, pb::SeccompPreset, {
        pb::SeccompPreset::Unspecified => "",
        pb::SeccompPreset::Standard => "standard",
        pb::SeccompPreset::Offline => "offline",
    }
);
words!(
    /// What the hub wants of an instance.
    desired, parse_desired, pb::Desired, {
        pb::Desired::Unspecified => "unspecified",
        pb::Desired::Run => "run",
        pb::Desired::Stop => "stop",
    }
);
words!(
    /// Whether an endpoint may be called.
    endpoint_state, parse_endpoint_state, pb::EndpointState, {
        pb::EndpointState::Unspecified => "",
        pb::EndpointState::Starting => "starting",
        pb::EndpointState::Ready => "ready",
        pb::EndpointState::Draining => "draining",
    }
);
words!(
    /// What the hub thinks of a host.
    host_status, parse_host_status, pb::HostStatus, {
        pb::HostStatus::Unspecified => "unknown",
        pb::HostStatus::Connected => "connected",
        pb::HostStatus::Silent => "silent",
        pb::HostStatus::Lost => "lost",
    }
);
words!(
    /// Where a deployment stands.
    deployment_status, parse_deployment_status, pb::DeploymentStatus, {
        pb::DeploymentStatus::Unspecified => "unspecified",
        pb::DeploymentStatus::Running => "running",
        pb::DeploymentStatus::Paused => "paused",
        pb::DeploymentStatus::Successful => "successful",
        pb::DeploymentStatus::Failed => "failed",
        pb::DeploymentStatus::Cancelled => "cancelled",
    }
);
words!(
    /// How a port's bytes are to be understood.
    protocol, parse_protocol, pb::Protocol, {
        pb::Protocol::Unspecified => "unspecified",
        pb::Protocol::Http => "http",
        pb::Protocol::Http2 => "http2",
        pb::Protocol::Grpc => "grpc",
        pb::Protocol::Tcp => "tcp",
    }
);
words!(
    /// Whether it runs until it is stopped or to completion.
    kind, parse_kind, pb::Kind, {
        pb::Kind::Unspecified => "unspecified",
        pb::Kind::Service => "service",
        pb::Kind::Job => "job",
    }
);
words!(
    /// What happens to a run that comes due while the one before goes on.
    overlap, parse_overlap, pb::OverlapPolicy, {
        pb::OverlapPolicy::Unspecified => "unspecified",
        pb::OverlapPolicy::Skip => "skip",
        pb::OverlapPolicy::Queue => "queue",
        pb::OverlapPolicy::Replace => "replace",
    }
);
words!(
    /// What happens when a run was due while no hub could start it.
    missed, parse_missed, pb::MissedPolicy, {
        pb::MissedPolicy::Unspecified => "unspecified",
        pb::MissedPolicy::Skip => "skip",
        pb::MissedPolicy::Run => "run",
    }
);
words!(
    /// Where a run of a job stands.
    job_run_status, parse_job_run_status, pb::JobRunStatus, {
        pb::JobRunStatus::Unspecified => "unspecified",
        pb::JobRunStatus::Queued => "queued",
        pb::JobRunStatus::Running => "running",
        pb::JobRunStatus::Succeeded => "succeeded",
        pb::JobRunStatus::Failed => "failed",
        pb::JobRunStatus::Skipped => "skipped",
        pb::JobRunStatus::Missed => "missed",
        pb::JobRunStatus::Replaced => "replaced",
    }
);
words!(
    /// Whether a process that ended is started again.
    restart_policy, parse_restart_policy, pb::RestartPolicy, {
        pb::RestartPolicy::Unspecified => "unspecified",
        pb::RestartPolicy::Always => "always",
        pb::RestartPolicy::OnFailure => "on-failure",
        pb::RestartPolicy::Never => "never",
    }
);
words!(
    /// What a cut-off host does with an instance.
    on_disconnect, parse_on_disconnect, pb::OnDisconnect, {
        pb::OnDisconnect::Unspecified => "unspecified",
        pb::OnDisconnect::Keep => "keep",
        pb::OnDisconnect::Stop => "stop",
    }
);
words!(
    /// Whom the stop signal goes to.
    stop_scope, parse_stop_scope, pb::StopScope, {
        pb::StopScope::Process => "process",
        pb::StopScope::Group => "group",
    }
);

/// What was last seen of an instance. One that nobody has reported on yet is pending.
pub fn observed(observed: Option<&pb::Observed>) -> &'static str {
    use pb::observed::State;
    match observed.and_then(|observed| observed.state.as_ref()) {
        None | Some(State::Pending(_)) => "pending",
        Some(State::Starting(_)) => "starting",
        Some(State::Running(_)) => "running",
        Some(State::BackingOff(_)) => "backing_off",
        Some(State::Stopping(_)) => "stopping",
        Some(State::Exited(_)) => "exited",
        Some(State::Failed(_)) => "failed",
        Some(State::Lost(_)) => "lost",
        Some(State::Unknown(_)) => "unknown",
    }
}

/// How a process ended, as a person would say it: `exited with code 3`, `killed by SIGSEGV`.
pub fn describe_exit(exit: &pb::ExitRecord) -> String {
    use pb::ExitCause;
    match exit.cause() {
        ExitCause::ExecError => format!("could not start: {}", exec_error(exit)),
        ExitCause::Exit => format!("exited with code {}", exit.code),
        ExitCause::Signal => killed_by(exit),
        ExitCause::Oom => "out of memory".to_owned(),
        ExitCause::Watchdog => "stopped: it did not feed its watchdog in time".to_owned(),
        ExitCause::Probe => "stopped: its liveness check failed".to_owned(),
        ExitCause::Operator => format!("stopped by an operator ({})", bare_end(exit)),
        ExitCause::Hub => format!("stopped as the hub wanted ({})", bare_end(exit)),
        ExitCause::Unspecified => "ended, nobody saw how".to_owned(),
    }
}

fn exec_error(exit: &pb::ExitRecord) -> String {
    match (exit.message.is_empty(), exit.errno) {
        (false, _) => exit.message.clone(),
        (true, 0) => "unknown error".to_owned(),
        (true, errno) => std::io::Error::from_raw_os_error(errno).to_string(),
    }
}

fn bare_end(exit: &pb::ExitRecord) -> String {
    if exit.signal == 0 { format!("exited with code {}", exit.code) } else { killed_by(exit) }
}

fn killed_by(exit: &pb::ExitRecord) -> String {
    let core = if exit.core_dumped { ", core dumped" } else { "" };
    format!("killed by {}{core}", signals::name(exit.signal))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_as_a_person_would() {
        use pb::ExitCause;
        let exit = |cause: ExitCause| pb::ExitRecord { cause: cause.into(), ..Default::default() };
        for (exit, text) in [
            (pb::ExitRecord { code: 3, ..exit(ExitCause::Exit) }, "exited with code 3"),
            (pb::ExitRecord { signal: 11, ..exit(ExitCause::Signal) }, "killed by SIGSEGV"),
            (
                pb::ExitRecord { signal: 6, core_dumped: true, ..exit(ExitCause::Signal) },
                "killed by SIGABRT, core dumped",
            ),
            (pb::ExitRecord { signal: 9, ..exit(ExitCause::Oom) }, "out of memory"),
            (
                pb::ExitRecord {
                    errno: 2,
                    message: "/usr/bin/nope: no such file or directory".into(),
                    ..exit(ExitCause::ExecError)
                },
                "could not start: /usr/bin/nope: no such file or directory",
            ),
            (
                pb::ExitRecord { errno: 13, ..exit(ExitCause::ExecError) },
                "could not start: Permission denied (os error 13)",
            ),
            (
                pb::ExitRecord { signal: 15, ..exit(ExitCause::Hub) },
                "stopped as the hub wanted (killed by SIGTERM)",
            ),
            (exit(ExitCause::Operator), "stopped by an operator (exited with code 0)"),
            (exit(ExitCause::Unspecified), "ended, nobody saw how"),
        ] {
            assert_eq!(describe_exit(&exit), text);
        }
    }

    #[test]
    fn words_read_back() {
        assert_eq!(parse_host_status(host_status(pb::HostStatus::Silent)), Some(pb::HostStatus::Silent));
        assert_eq!(parse_restart_policy("on-failure"), Some(pb::RestartPolicy::OnFailure));
        assert_eq!(parse_protocol("udp"), None);
        assert_eq!(observed(None), "pending");
    }
}
