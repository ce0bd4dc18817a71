//! Where instances of a service are meant to be, and so of what kind each of them is.

use std::collections::BTreeSet;

use nave_proto::ids::HostId;
use nave_proto::pb;

use super::ahead;
use super::conditions::Conditions;
use super::recheck;
use crate::jobs::open_run;
use crate::state::{ClusterState, ServiceEntry};
use crate::wants::{HostExt as _, InstanceExt as _, ManifestExt as _};

/// What is to become of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Of the template wanted now, on a host where it may stay.
    Current,
    /// To be replaced: of another template, or on a host that it has to leave, or has no room for what it is to have.
    Old,
    /// In nobody's place, on a host that is being emptied or never comes back (`per_host`); for no run that goes on (a
    /// job's).
    Surplus,
    /// In nobody's place, but good for standing in until enough others are ready (`per_host`): a second one on its
    /// host, or on a host that is no longer meant. Most are left over when a count becomes `per_host`.
    Spare,
    /// On a lost host and to come back with it (`per_host`).
    Away,
    /// Told to stop, not gone yet.
    Stopping,
}

/// See the file's head.
#[derive(Debug)]
pub(crate) struct Meant {
    pub(crate) template: u64,
    version: u64,
    pub(crate) per_host: bool,
    /// See [`recheck::versions`].
    pub(crate) rechecks: Vec<u64>,
    /// Paused: everything is as good as it is.
    paused: bool,
    /// An old instance stops before its successor comes, for which something has to be there.
    pub(super) fetches: bool,
    /// Of a job: the run that goes on, 0 none.
    pub(crate) run: Option<u64>,
    pub(crate) conditions: Conditions,
    /// For `per_host`: the hosts that should have one.
    pub(crate) slot_hosts: BTreeSet<HostId>,
    /// For `per_host`: instances beside a better one on their host.
    pub(crate) seconds: BTreeSet<u64>,
}

impl Meant {
    pub(crate) fn of(state: &ClusterState, entry: &ServiceEntry, manifest: &pb::Manifest) -> Self {
        let conditions = Conditions::of(manifest);
        let admitted = || state.hosts.iter().filter(|(_, host)| conditions.admit(host)).map(|(id, _)| id);
        let slot_hosts = if manifest.per_host { admitted().collect() } else { BTreeSet::new() };
        let (template, version) = (entry.record.template_version, entry.record.version);
        let per_host = manifest.per_host;
        let open = || entry.record.job.as_ref().and_then(open_run).map_or(0, |run| run.number);
        let run = manifest.is_job().then(open);
        let status = entry.record.deployment.as_ref().map(pb::Deployment::status);
        let paused = status == Some(pb::DeploymentStatus::Paused);
        let fetches = run.is_none() && manifest.stop_first() && ahead::needs_any(state, manifest);
        let seconds = BTreeSet::new();
        let rechecks = recheck::versions(entry, manifest);
        Self { template, version, per_host, rechecks, paused, fetches, run, conditions, slot_hosts, seconds }
    }

    pub(crate) fn kind(&self, state: &ClusterState, instance: &pb::InstanceRecord) -> Kind {
        let is_current = instance.template_version == self.template;
        if !instance.wanted() {
            return Kind::Stopping;
        }
        if let Some(run) = self.run {
            // Whatever it runs and wherever: a run is neither replaced nor moved.
            return if run != 0 && instance.run == run { Kind::Current } else { Kind::Surplus };
        }
        let adrift = self.is_adrift(state, instance);
        if self.per_host && adrift {
            return if state.hosts.is_gone(instance.host()) { Kind::Surplus } else { Kind::Away };
        }
        if self.per_host && !self.slot_hosts.contains(&instance.host()) {
            let emptied = state.host(instance.host()).is_none_or(|host| host.draining);
            return if emptied { Kind::Surplus } else { Kind::Spare };
        }
        if self.per_host && self.seconds.contains(&instance.id) {
            return Kind::Spare;
        }
        let stays = adrift || (self.may_stay(state, instance) && !self.has_outgrown(instance));
        if is_current && stays { Kind::Current } else { Kind::Old }
    }

    /// The current version sets aside more for it than its host was asked for. While it is paused nobody asks, and no
    /// instance is worse for that.
    pub(crate) fn has_outgrown(&self, instance: &pb::InstanceRecord) -> bool {
        !self.paused
            && instance.template_version == self.template
            && instance.version != self.version
            && !self.rechecks.contains(&instance.version)
    }

    /// Its host is lost, so it has to be placed again.
    pub(crate) fn is_adrift(&self, state: &ClusterState, instance: &pb::InstanceRecord) -> bool {
        let host = instance.host();
        state.hosts.closed.contains(&host) && state.host(host).is_none_or(|host| host.is_lost())
    }

    /// On a host that is being drained.
    pub(crate) fn is_drained(&self, state: &ClusterState, instance: &pb::InstanceRecord) -> bool {
        let host = instance.host();
        state.hosts.closed.contains(&host)
            && state.host(host).is_some_and(|host| host.draining && !host.is_lost())
    }

    /// Not on a host that it has to leave.
    pub(crate) fn may_stay(&self, state: &ClusterState, instance: &pb::InstanceRecord) -> bool {
        let host = instance.host();
        (self.conditions.is_empty() && !state.hosts.closed.contains(&host))
            || state.hosts.get(host).is_some_and(|host| self.conditions.admit(host))
    }
}
