//! Reads what a record or a manifest says, defaults filled in, so that no rule spells `Option` and `i32` twice.
//! Manifests arrive with defaults already set; these defaults are for rows and messages of older builds.

use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use nave_proto::pb::observed::State;

use crate::limits::{SECOND_NS, UNSTEADY_NS};

/// Nanoseconds of a protobuf duration; unset or negative counts as the default.
pub(crate) fn nanos(duration: Option<&prost_types::Duration>, default: i64) -> i64 {
    match duration {
        Some(d) if d.seconds >= 0 && d.nanos >= 0 => {
            d.seconds.saturating_mul(SECOND_NS).saturating_add(i64::from(d.nanos))
        }
        Some(_) | None => default,
    }
}

/// What the hub reads from a manifest.
pub(crate) trait ManifestExt {
    fn max_parallel(&self) -> usize;
    fn min_ready_ns(&self) -> i64;
    fn progress_deadline_ns(&self) -> i64;
    fn auto_revert(&self) -> bool;
    fn stop_grace_ns(&self) -> i64;
    fn constraints(&self) -> &[String];
    fn spread(&self) -> &str;
    fn stops_on_disconnect(&self) -> bool;
    /// Where room is scarce, the higher one is placed first.
    fn priority(&self) -> u32;
    fn fixed_ports(&self) -> Vec<u32>;
    /// An old instance must be gone before its successor can run.
    fn stop_first(&self) -> bool;
    fn wants_none(&self) -> bool;
    /// Runs to completion, once for each run.
    fn is_job(&self) -> bool;
    /// Something says when a process of it is ready.
    fn is_probed(&self) -> bool;
    /// Instances of a new template that come first and wait for a promotion.
    fn canary(&self) -> u32;
}

impl ManifestExt for pb::Manifest {
    fn max_parallel(&self) -> usize {
        let max = self.update.as_ref().map_or(1, |update| update.max_parallel);
        usize::try_from(max).unwrap_or(usize::MAX).max(1)
    }

    fn min_ready_ns(&self) -> i64 {
        nanos(self.update.as_ref().and_then(|update| update.min_ready.as_ref()), 0)
    }

    fn progress_deadline_ns(&self) -> i64 {
        let default = 120 * SECOND_NS;
        match nanos(self.update.as_ref().and_then(|update| update.progress_deadline.as_ref()), default) {
            0 => default,
            deadline => deadline,
        }
    }

    fn auto_revert(&self) -> bool {
        self.update.as_ref().is_none_or(|update| update.auto_revert)
    }

    fn stop_grace_ns(&self) -> i64 {
        nanos(self.stop.as_ref().and_then(|stop| stop.grace.as_ref()), 10 * SECOND_NS)
    }

    fn constraints(&self) -> &[String] {
        self.placement.as_ref().map_or(&[], |placement| &placement.constraints)
    }

    fn spread(&self) -> &str {
        self.placement.as_ref().map_or("", |placement| &placement.spread)
    }

    fn stops_on_disconnect(&self) -> bool {
        self.placement.as_ref().is_some_and(|p| p.on_disconnect() == pb::OnDisconnect::Stop)
    }

    fn priority(&self) -> u32 {
        self.placement.as_ref().and_then(|placement| placement.priority).unwrap_or(50)
    }

    fn fixed_ports(&self) -> Vec<u32> {
        self.ports.values().map(|port| port.port).filter(|port| *port != 0).collect()
    }

    fn stop_first(&self) -> bool {
        self.data || self.per_host || self.ports.values().any(|port| port.port != 0)
    }

    fn wants_none(&self) -> bool {
        !self.per_host && self.count == 0
    }

    fn is_job(&self) -> bool {
        self.kind() == pb::Kind::Job
    }

    fn is_probed(&self) -> bool {
        self.health.as_ref().is_some_and(|health| health.ready.is_some())
    }

    fn canary(&self) -> u32 {
        self.update.as_ref().map_or(0, |update| update.canary)
    }
}

/// What the hub reads from an instance row.
pub(crate) trait InstanceExt {
    fn id(&self) -> InstanceId;
    fn host(&self) -> HostId;
    fn state(&self) -> Option<&State>;
    /// Wanted to run, wherever it is.
    fn wanted(&self) -> bool;
    /// Wanted, and its agent says that it is ready.
    fn ready(&self) -> bool;
    fn running(&self) -> bool;
    fn gave_up(&self) -> bool;
    /// Ended by itself with success and not to be started again: a task that is done.
    fn completed(&self) -> bool;
    fn exited(&self) -> bool;
    fn lost(&self) -> bool;
}

impl InstanceExt for pb::InstanceRecord {
    fn id(&self) -> InstanceId {
        InstanceId(self.id)
    }

    fn host(&self) -> HostId {
        HostId(self.host_id)
    }

    fn state(&self) -> Option<&State> {
        self.observed.as_ref().and_then(|observed| observed.state.as_ref())
    }

    fn wanted(&self) -> bool {
        self.desired() == pb::Desired::Run
    }

    fn ready(&self) -> bool {
        self.wanted() && matches!(self.state(), Some(State::Running(running)) if running.ready)
    }

    fn running(&self) -> bool {
        matches!(self.state(), Some(State::Running(_)))
    }

    fn gave_up(&self) -> bool {
        matches!(self.state(), Some(State::Failed(_)))
    }

    fn completed(&self) -> bool {
        matches!(self.state(), Some(State::Exited(exited)) if exited.exit.as_ref().is_some_and(succeeded))
    }

    fn exited(&self) -> bool {
        matches!(self.state(), Some(State::Exited(_)))
    }

    fn lost(&self) -> bool {
        matches!(self.state(), Some(State::Lost(_)))
    }
}

fn succeeded(exit: &pb::ExitRecord) -> bool {
    exit.cause() == pb::ExitCause::Exit && exit.code == 0
}

/// What the hub reads from a host row.
pub(crate) trait HostExt {
    /// For people: `alpha`; its id when it has not said its name.
    fn shown(&self) -> String;
    fn is_lost(&self) -> bool;
    /// It takes new instances: connected, and not draining.
    fn is_open(&self) -> bool;
    /// It was lost not long ago, and may be again.
    fn is_unsteady(&self, now: i64) -> bool;
}

impl HostExt for pb::HostRecord {
    fn shown(&self) -> String {
        match &self.facts {
            Some(facts) if !facts.name.is_empty() => facts.name.clone(),
            Some(_) | None => HostId(self.id).to_string(),
        }
    }

    fn is_lost(&self) -> bool {
        self.status() == pb::HostStatus::Lost
    }

    fn is_open(&self) -> bool {
        self.status() == pb::HostStatus::Connected && !self.draining
    }

    fn is_unsteady(&self, now: i64) -> bool {
        self.lost_unix_ns != 0 && now < self.lost_unix_ns.saturating_add(UNSTEADY_NS)
    }
}

/// A state as one empty-bodied message.
pub(crate) fn observed(state: State) -> Option<pb::Observed> {
    Some(pb::Observed { state: Some(state) })
}
