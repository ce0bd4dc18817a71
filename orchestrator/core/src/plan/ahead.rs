//! What a successor needs before the stop: an instance that has to stop before its successor comes goes on until its host
//! has fetched the artifacts of that and has read the files that it names (`env_file`, `secrets`, a file's `source`), so a
//! slow download costs nobody anything, and a wrong one or a missing file only the deployment.
//!
//! Who is next is asked to fetch (`FetchState` in its row), as many at a time as may be replaced at a time. One whose
//! host cannot fetch, or whose agent would not say so, is waited for by nobody; all others end with the deployment's
//! deadline. The successor is placed where all of that is, if it may choose.

use std::sync::Arc;

use nave_proto::ids::HostId;
use nave_proto::{FETCHES_AHEAD, pb};

use super::meant::Meant;
use super::needing::may_run;
use super::rollout::Rollout;
use crate::events::called;
use crate::limits::FETCHED_STOP_WAIT_NS;
use crate::state::{ClusterState, ServiceEntry};
use crate::wants::{HostExt as _, InstanceExt as _};

/// From this command format on, files of the host are asked for too.
const READS_AHEAD: u32 = 8;

/// Whether there is something to have before such a one is stopped.
pub(super) fn needs_any(state: &ClusterState, manifest: &pb::Manifest) -> bool {
    !manifest.artifacts.is_empty() || reads_any(state, manifest)
}

/// Files of its host, which may be gone though the old instance has read them too.
fn reads_any(state: &ClusterState, manifest: &pb::Manifest) -> bool {
    let has_source = manifest.files.iter().any(|file| !file.source.is_empty());
    let any = has_source || !manifest.env_files.is_empty() || !manifest.secrets.is_empty();
    any && state.command_format() >= READS_AHEAD
}

/// Whether a host of the service is fetching for a successor, so that there is something to explain.
pub fn fetches_ahead(state: &ClusterState, service: &str) -> bool {
    state.instances_of(service).any(|instance| instance.fetch.as_ref().is_some_and(|fetch| !fetch.done))
}

impl Meant {
    /// It may run, its successor is meant for its host too, and what that needs has yet to be fetched there.
    pub(crate) fn awaits_fetch(
        &self,
        state: &ClusterState,
        entry: &ServiceEntry,
        instance: &pb::InstanceRecord,
    ) -> bool {
        self.fetches
            && instance.template_version != self.template
            && !self.fetch_of(instance).is_some_and(|fetch| fetch.done)
            && may_run(instance)
            && !instance.lost()
            && self.may_stay(state, instance)
            && says_so(state, instance.host())
            && !has_all(state, entry, instance)
    }

    /// Its host has what its successor needs, which may come to that host or to another.
    pub(crate) fn leaves_fetched(
        &self,
        state: &ClusterState,
        entry: &ServiceEntry,
        instance: &pb::InstanceRecord,
    ) -> bool {
        // Others come back to where they were anyway.
        let roams = self.fetches && !self.per_host && entry.current().is_some_and(|manifest| !manifest.data);
        roams
            && instance.template_version != self.template
            && self.may_stay(state, instance)
            && (self.fetch_of(instance).is_some_and(|fetch| fetch.done) || has_all(state, entry, instance))
    }

    /// It awaits what its host has been asked to fetch.
    pub(crate) fn is_fetching(
        &self,
        state: &ClusterState,
        entry: &ServiceEntry,
        instance: &pb::InstanceRecord,
    ) -> bool {
        self.fetch_of(instance).is_some() && self.awaits_fetch(state, entry, instance)
    }

    /// How far that is which the template wanted now needs; None: it has not been asked for.
    pub(crate) fn fetch_of<'i>(&self, instance: &'i pb::InstanceRecord) -> Option<&'i pb::FetchState> {
        instance.fetch.as_ref().filter(|fetch| fetch.template_version == self.template)
    }
}

/// Its agent reports what became of a fetch.
fn says_so(state: &ClusterState, host: HostId) -> bool {
    let facts = state.host(host).and_then(|host| host.facts.as_ref());
    facts.is_some_and(|facts| facts.capabilities.iter().any(|capability| capability == FETCHES_AHEAD))
}

/// Its own version needs all of that too, and it is kept, so it is there.
fn has_all(state: &ClusterState, entry: &ServiceEntry, instance: &pb::InstanceRecord) -> bool {
    let (Some(wanted), Some(own)) = (entry.current(), entry.manifest(instance.version)) else { return false };
    let same = |a: &pb::Artifact, b: &pb::Artifact| a.sha256 == b.sha256 && a.archive == b.archive;
    let fetched = |artifact| own.artifacts.iter().any(|other| same(artifact, other));
    !reads_any(state, wanted) && wanted.artifacts.iter().all(fetched)
}

impl Rollout<'_> {
    pub(crate) fn awaits_fetch(&self, instance: &Arc<pb::InstanceRecord>) -> bool {
        self.meant.awaits_fetch(self.state, self.entry, instance)
    }

    pub(crate) fn is_fetching(&self, instance: &Arc<pb::InstanceRecord>) -> bool {
        self.meant.is_fetching(self.state, self.entry, instance)
    }

    /// One sentence for who wonders why an old instance still runs.
    pub(crate) fn why_it_stays(&self, instance: &Arc<pb::InstanceRecord>) -> String {
        let host = instance.host();
        let host = self.state.host(host).map_or_else(|| host.to_string(), |record| record.shown());
        let (who, version) = (called(instance), self.entry.record.version);
        match self.meant.fetch_of(instance).map(|fetch| fetch.problem.as_str()) {
            None | Some("") => {
                format!("{who} runs on until {host} has what version {version} needs")
            }
            Some(problem) => {
                format!("{who} runs on, since {host} cannot fetch what version {version} needs: {problem}")
            }
        }
    }

    /// Hosts where what the current template needs is and a place was left for one of it. `Err`: one that is to stop
    /// is still there; until when it is waited for at most.
    pub(crate) fn fetched_hosts(&self, now: i64) -> Vec<(HostId, Result<(), i64>)> {
        if !self.meant.fetches {
            return Vec::new();
        }
        let open = |host: &&pb::FetchedHost| {
            let host = self.state.hosts.get(HostId(host.host_id));
            host.is_some_and(|host| host.record.is_open() && self.meant.conditions.admit(host))
        };
        let fetched = self.entry.record.fetched_hosts.iter().filter(open);
        let fetched = fetched.map(|fetched| {
            let host = HostId(fetched.host_id);
            let until = fetched.stopped_unix_ns.saturating_add(FETCHED_STOP_WAIT_NS);
            let leaves = self.stopping.iter().any(|instance| instance.host() == host) && now < until;
            (host, if leaves { Err(until) } else { Ok(()) })
        });
        fetched.collect()
    }
}
