//! A member's end of one agent's session: what the agent has been told, and its reports on their way into the log.

use std::collections::{BTreeMap, BTreeSet};

use nave_orchestrator_core::ClusterState;
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::lease::HOLD;
use nave_proto::pb;
use pb::command::Body;
use pb::hub_message::Message as ToAgent;

// The orchestrator's own file: it is plain data, but its crate brings a runtime and a database with it.
#[path = "../../../orchestrator/src/dispatch/wanted.rs"]
mod wanted;

use wanted::Told;

/// A change of the state as far as sessions care.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Touch {
    pub(crate) revision: u64,
    pub(crate) instance: InstanceId,
}

#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) host: HostId,
    told: Told,
    generation: Option<u64>,
    seen: u64,
    pub(crate) reports: Merged,
    /// What is with the log now.
    pub(crate) attempt: Option<Merged>,
    /// A failed report is not tried again before this time.
    pub(crate) not_before: i64,
    pub(crate) retry: i64,
    pub(crate) place: u64,
    /// The newest beat, when it was heard, and whether the leader has yet to hear of it.
    pub(crate) sequence: u64,
    pub(crate) heard: i64,
    pub(crate) fresh: bool,
    /// The leader has answered: no other place speaks for the host.
    pub(crate) admitted: bool,
    /// The number that the log gave the session, once it is open and the agent has been welcomed.
    pub(crate) welcomed: Option<u64>,
    /// A lease that the agent has not been told of: counted from this beat, to be told once it knows all up to the
    /// revision.
    pub(crate) given: Option<(u64, u64)>,
}

impl Session {
    pub(crate) fn new(host: HostId, place: u64, now: i64) -> Self {
        Self {
            host,
            told: Told::nothing(host),
            generation: None,
            seen: 0,
            reports: Merged::default(),
            attempt: None,
            not_before: 0,
            retry: 200_000_000,
            place,
            sequence: 0,
            heard: now,
            fresh: true,
            admitted: false,
            welcomed: None,
            given: None,
        }
    }

    pub(crate) fn is_let_in(&self) -> bool {
        self.welcomed.is_some()
    }

    /// Its host was judged lost while the session went on, or has opened another.
    pub(crate) fn is_void(&self, state: &ClusterState) -> bool {
        self.welcomed.is_some_and(|number| wanted::is_void(state, self.host, number))
    }

    pub(crate) fn beat(&mut self, now: i64, sequence: u64) {
        (self.sequence, self.heard, self.fresh) = (self.sequence.max(sequence), now, true);
    }

    /// The lease to be told now, after everything else.
    pub(crate) fn lease(&mut self, revision: u64) -> Option<pb::Lease> {
        let (sequence, _) = self.given.take_if(|(_, needs)| *needs <= revision)?;
        let hold_ms = u64::try_from(HOLD.as_millis()).unwrap_or_default();
        Some(pb::Lease { sequence, hold_ms })
    }

    /// What the agent has not been told.
    pub(crate) fn look(&mut self, state: &ClusterState, ring: &[Touch]) -> Option<ToAgent> {
        let incarnation = state.cluster().map_or(0, |cluster| cluster.incarnation);
        let seen = std::mem::replace(&mut self.seen, state.revision());
        let Some(generation) = self.generation else {
            self.generation = Some(state.revision());
            return Some(ToAgent::Wanted(self.told.whole(state, incarnation)));
        };
        let begin = ring.partition_point(|touch| touch.revision <= seen);
        let touched: BTreeSet<_> = ring[begin..].iter().map(|touch| touch.instance).collect();
        if touched.is_empty() {
            return None;
        }
        let delta = self.told.delta(state, incarnation, generation, touched)?;
        self.generation = Some(delta.to_generation);
        Some(ToAgent::Delta(delta))
    }
}

/// Reports merged into one, the newest word on each instance.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Merged {
    pub(crate) sequence: u64,
    full: bool,
    instances: BTreeMap<u64, pb::InstanceReport>,
    gone: BTreeSet<u64>,
}

impl Merged {
    pub(crate) fn is_empty(&self) -> bool {
        self.sequence == 0
    }

    pub(crate) fn add(&mut self, report: pb::Report) {
        self.sequence = report.sequence;
        if report.full {
            self.full = true;
            self.instances.clear();
        }
        for id in report.gone {
            self.instances.remove(&id);
            self.gone.insert(id);
        }
        for instance in report.instances {
            self.gone.remove(&instance.instance_id);
            self.instances.insert(instance.instance_id, instance);
        }
    }

    /// Puts what could not be committed under what came since.
    pub(crate) fn under(self, newer: Self) -> Self {
        let mut merged = self;
        if newer.sequence != 0 {
            merged.add(pb::Report {
                sequence: newer.sequence,
                full: newer.full,
                instances: newer.instances.into_values().collect(),
                gone: newer.gone.into_iter().collect(),
                facts: None,
            });
        }
        merged
    }

    /// None: it says nothing, and is acknowledged as it is.
    pub(crate) fn body(&self, host: HostId, session: u64) -> Option<Body> {
        let empty = self.instances.is_empty() && self.gone.is_empty() && !self.full;
        (!empty).then(|| {
            Body::ReportInstances(pb::ReportInstances {
                host_id: host.0,
                full: self.full,
                instances: self.instances.values().cloned().collect(),
                gone: self.gone.iter().copied().collect(),
                session,
                sequence: self.sequence,
            })
        })
    }
}
