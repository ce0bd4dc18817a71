//! What a hub knows of how attempts ended, from the reports that it has committed: by their numbers, each once.

use std::collections::{BTreeMap, BTreeSet};

use nave_agent_core::supervisor::ProcessKey;
use nave_proto::ids::InstanceId;
use nave_proto::pb;

#[derive(Debug, Default)]
pub(crate) struct Hub {
    /// Number of the newest end, by instance.
    newest: BTreeMap<u64, u64>,
    told: BTreeSet<(u64, ProcessKey)>,
    /// Too many to be kept until they could be told.
    lost: u64,
}

impl Hub {
    /// Returns what the agent is to hear of it: up to which number all are told.
    pub(crate) fn commit(&mut self, report: &pb::InstanceReport) -> Option<(InstanceId, u64)> {
        let instance = report.instance_id;
        let newest = self.newest.entry(instance).or_default();
        for end in &report.ends {
            if end.number <= *newest {
                continue;
            }
            *newest = end.number;
            self.lost += end.lost;
            let exit = end.exit.as_ref().expect("an end says how it was");
            let process = (instance, ProcessKey { epoch: exit.epoch, attempt: exit.attempt });
            assert!(self.told.insert(process), "the end of {process:?} is told twice");
        }
        Some((InstanceId(instance), report.ends.last()?.number))
    }

    pub(crate) fn check_all_told(&self, ended: &BTreeSet<(u64, ProcessKey)>) {
        let missing: Vec<_> = ended.difference(&self.told).collect();
        assert!(missing.len() as u64 <= self.lost, "ended, and nobody was told: {missing:?}");
        let never: Vec<_> = self.told.difference(ended).collect();
        assert!(never.is_empty(), "told, and has not ended: {never:?}");
    }
}
