//! The table of hosts, and what is looked up by host: its instances, what they reserve, who has a name or a key.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;

use super::instances::Reservation;
use super::ranks::{Rank, Ranked, Ranks};
use crate::wants::HostExt as _;

/// What instances have set aside on a host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reserved {
    pub cpu_millicores: u64,
    pub memory_bytes: u64,
}

impl Reserved {
    /// Percent of the scarcer of a host's cpu and memory; of what a host has not, nothing is scarce.
    pub(crate) fn percent_of(self, facts: &pb::HostFacts) -> u64 {
        let percent = |used: u64, all: u64| used.saturating_mul(100).checked_div(all).unwrap_or_default();
        percent(self.cpu_millicores, facts.cpu_millicores).max(percent(self.memory_bytes, facts.memory_bytes))
    }
}

/// One host and everything indexed by its id.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct HostEntry {
    pub(crate) record: Arc<pb::HostRecord>,
    pub(crate) instances: BTreeSet<InstanceId>,
    pub(crate) reserved: Reserved,
    /// Fixed ports that instances hold, by how many do (two only while facts contradict the plan).
    pub(crate) fixed_ports: BTreeMap<u32, usize>,
    /// None: it takes no new instances.
    pub(crate) ranked: Option<Ranked>,
}

impl HostEntry {
    fn new(record: Arc<pb::HostRecord>) -> Self {
        let (instances, reserved, fixed_ports, ranked) = Default::default();
        Self { record, instances, reserved, fixed_ports, ranked }
    }

    /// None: it takes no new instances.
    fn rank(&self) -> Option<Rank> {
        let facts = self.facts().filter(|_| self.record.is_open())?;
        let load_percent = self.reserved.percent_of(facts);
        Some(Rank { load_percent, instances: self.instances.len(), host: HostId(self.record.id) })
    }

    pub(crate) fn facts(&self) -> Option<&pb::HostFacts> {
        self.record.facts.as_ref()
    }
}

/// All hosts.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Hosts {
    entries: BTreeMap<HostId, HostEntry>,
    /// A lost host may share its name with a successor: the youngest has it. A forgotten one has none.
    names: BTreeMap<String, BTreeSet<HostId>>,
    keys: BTreeMap<Vec<u8>, HostId>,
    /// Hosts that take new instances, by who takes the next.
    pub(crate) ranks: Ranks,
    /// The others: lost, silent, draining.
    pub(crate) closed: BTreeSet<HostId>,
    /// Revision at which a host row last changed.
    pub(crate) fleet_touched: u64,
    /// Revision at which room on any host last grew.
    pub(crate) room_touched: u64,
}

impl Hosts {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn get(&self, id: HostId) -> Option<&HostEntry> {
        self.entries.get(&id)
    }

    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = (HostId, &HostEntry)> + '_ {
        self.entries.iter().map(|(id, entry)| (*id, entry))
    }

    pub(crate) fn by_name(&self, name: &str) -> Option<HostId> {
        self.names.get(name)?.last().copied()
    }

    pub(crate) fn by_key(&self, public_key_sha256: &[u8]) -> Option<HostId> {
        self.keys.get(public_key_sha256).copied()
    }

    /// It can only come back as a new host: it was given up, or it was lost and its name is another's now.
    pub(crate) fn is_gone(&self, id: HostId) -> bool {
        self.get(id).is_none_or(|entry| entry.record.forgotten) || self.is_succeeded(id)
    }

    /// Its name is another's now: it was lost, and can only come back as a new host.
    pub(crate) fn is_succeeded(&self, id: HostId) -> bool {
        let name = self.get(id).and_then(|entry| entry.facts()).map(|facts| &facts.name);
        name.and_then(|name| self.by_name(name)).is_some_and(|holder| holder != id)
    }

    pub(crate) fn put(&mut self, record: Arc<pb::HostRecord>, revision: u64) {
        let id = HostId(record.id);
        if let Some(before) = self.entries.get(&id).map(|entry| Arc::clone(&entry.record)) {
            self.unindex(id, &before);
        }
        self.index(id, &record);
        match self.entries.get_mut(&id) {
            Some(entry) => entry.record = record,
            None => {
                self.entries.insert(id, HostEntry::new(record));
            }
        }
        self.rank_anew(id);
        self.fleet_touched = revision;
        self.room_touched = revision;
    }

    pub(crate) fn remove(&mut self, id: HostId, revision: u64) -> Option<HostEntry> {
        let entry = self.entries.remove(&id)?;
        self.unindex(id, &entry.record);
        self.closed.remove(&id);
        if let Some(ranked) = entry.ranked {
            self.ranks.remove(ranked);
        }
        self.fleet_touched = revision;
        Some(entry)
    }

    /// After a change of the row, which may have moved the host to another class or closed it.
    fn rank_anew(&mut self, id: HostId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if let Some(ranked) = entry.ranked.take() {
            self.ranks.remove(ranked);
        }
        let rank = entry.rank();
        entry.ranked = entry.facts().zip(rank).map(|(facts, rank)| self.ranks.insert(facts, rank));
        match entry.ranked {
            Some(_) => self.closed.remove(&id),
            None => self.closed.insert(id),
        };
    }

    fn index(&mut self, id: HostId, record: &pb::HostRecord) {
        if record.forgotten {
            return;
        }
        self.keys.insert(record.public_key_sha256.clone(), id);
        if let Some(facts) = &record.facts {
            self.names.entry(facts.name.clone()).or_default().insert(id);
        }
    }

    fn unindex(&mut self, id: HostId, record: &pb::HostRecord) {
        if record.forgotten {
            return;
        }
        self.keys.remove(&record.public_key_sha256);
        let name = record.facts.as_ref().map_or("", |facts| facts.name.as_str());
        if let Some(holders) = self.names.get_mut(name) {
            holders.remove(&id);
            if holders.is_empty() {
                self.names.remove(name);
            }
        }
    }

    /// An instance takes its room on a host.
    pub(crate) fn occupy(&mut self, id: HostId, instance: InstanceId, taken: &Reservation) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.instances.insert(instance);
        entry.reserved.cpu_millicores += taken.cpu_millicores;
        entry.reserved.memory_bytes += taken.memory_bytes;
        for port in &taken.fixed_ports {
            *entry.fixed_ports.entry(*port).or_default() += 1;
        }
        shift(&mut self.ranks, entry);
    }

    /// An instance has left a host: what it took is free.
    pub(crate) fn vacate(&mut self, id: HostId, instance: InstanceId, taken: &Reservation, revision: u64) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.instances.remove(&instance);
        entry.reserved.cpu_millicores -= taken.cpu_millicores;
        entry.reserved.memory_bytes -= taken.memory_bytes;
        for port in &taken.fixed_ports {
            if let Some(holders) = entry.fixed_ports.get_mut(port) {
                *holders -= 1;
                if *holders == 0 {
                    entry.fixed_ports.remove(port);
                }
            }
        }
        shift(&mut self.ranks, entry);
        self.room_touched = revision;
    }
}

/// After a change of what is reserved.
fn shift(ranks: &mut Ranks, entry: &mut HostEntry) {
    if let (Some(ranked), Some(rank)) = (entry.ranked, entry.rank()) {
        entry.ranked = Some(ranks.shift(ranked, rank));
    }
}
