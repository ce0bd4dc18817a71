//! Room on hosts: what is free, what an instance lacks there. One [`Fleet`] lives for one plan and remembers what the
//! plan has already given away; stops free nothing until their instance is gone. It holds only what the plan touched:
//! the rest of the fleet is read where it is, so a plan that places nothing costs nothing here.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use nave_proto::ids::HostId;
use nave_proto::pb;

use super::conditions::Conditions;
use super::lack::{Lack, Refusals, Shortage};
use crate::state::{ClassId, ClusterState, HostEntry, Rank, Reservation, Reserved};
use crate::wants::HostExt as _;

/// One host with what is taken on it, by instances and by this plan.
#[derive(Debug, Clone)]
pub(crate) struct Room<'a> {
    entry: &'a HostEntry,
    facts: &'a pb::HostFacts,
    given: Given,
}

/// What this plan has given away on a host.
#[derive(Debug, Clone, Default)]
struct Given {
    cpu_millicores: u64,
    memory_bytes: u64,
    ports: BTreeSet<u32>,
    instances: usize,
}

impl<'a> Room<'a> {
    /// None: the host has not said what it has.
    pub(crate) fn of(entry: &'a HostEntry) -> Option<Self> {
        Some(Self { entry, facts: entry.facts()?, given: Given::default() })
    }

    pub(crate) fn facts(&self) -> &'a pb::HostFacts {
        self.facts
    }

    pub(crate) fn is_open(&self) -> bool {
        self.entry.ranked.is_some()
    }

    pub(crate) fn is_unsteady(&self, now: i64) -> bool {
        self.entry.record.is_unsteady(now)
    }

    fn reserved(&self) -> Reserved {
        Reserved {
            cpu_millicores: self.entry.reserved.cpu_millicores + self.given.cpu_millicores,
            memory_bytes: self.entry.reserved.memory_bytes + self.given.memory_bytes,
        }
    }

    pub(crate) fn rank(&self) -> Rank {
        Rank {
            load_percent: self.reserved().percent_of(self.facts),
            instances: self.entry.instances.len() + self.given.instances,
            host: HostId(self.entry.record.id),
        }
    }

    /// The first thing that the host has too little of.
    pub(crate) fn lacks(&self, wanted: &Reservation) -> Option<Shortage> {
        self.lacks_without(wanted, &Reservation::default())
    }

    /// The same as if what an instance holds there were free: it is placed again, perhaps here.
    pub(crate) fn lacks_without(&self, wanted: &Reservation, held: &Reservation) -> Option<Shortage> {
        let reserved = self.reserved();
        let cpu_used = reserved.cpu_millicores.saturating_sub(held.cpu_millicores);
        let memory_used = reserved.memory_bytes.saturating_sub(held.memory_bytes);
        let cpu_free = self.facts.cpu_millicores.saturating_sub(cpu_used);
        let memory_free = self.facts.memory_bytes.saturating_sub(memory_used);
        let cpu_missing = wanted.cpu_millicores.saturating_sub(cpu_free);
        let memory_missing = wanted.memory_bytes.saturating_sub(memory_free);
        if cpu_missing > 0 {
            return Some(Shortage { lack: Lack::Cpu, free: cpu_free, cpu_missing, memory_missing });
        }
        if memory_missing > 0 {
            return Some(Shortage { lack: Lack::Memory, free: memory_free, cpu_missing, memory_missing });
        }
        let in_use = |port: &&u32| {
            let used = self.entry.fixed_ports.contains_key(port) || self.given.ports.contains(port);
            used && !held.fixed_ports.contains(port)
        };
        wanted.fixed_ports.iter().find(in_use).map(|port| Lack::Port(*port).into())
    }

    fn take(&mut self, wanted: &Reservation) {
        self.given.cpu_millicores += wanted.cpu_millicores;
        self.given.memory_bytes += wanted.memory_bytes;
        self.given.ports.extend(&wanted.fixed_ports);
        self.given.instances += 1;
    }
}

/// What is wanted of a host for one instance.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request<'r> {
    pub(crate) conditions: &'r Conditions,
    pub(crate) wanted: &'r Reservation,
}

impl Request<'_> {
    /// Why a host does not take the instance.
    pub(crate) fn verdict(&self, room: &Room<'_>) -> Option<Shortage> {
        self.verdict_without(room, &Reservation::default())
    }

    pub(crate) fn verdict_without(&self, room: &Room<'_>, held: &Reservation) -> Option<Shortage> {
        let closed = || Lack::of_closed(&room.entry.record).map(Shortage::from);
        let unmet = || self.conditions.unmet(room.facts).map(Shortage::from);
        closed().or_else(unmet).or_else(|| room.lacks_without(self.wanted, held))
    }
}

/// The requests that no host takes any more in this plan, with what the hosts lack.
type Hopeless = BTreeMap<(Conditions, Reservation), Rc<Refusals>>;

/// All hosts as this plan leaves them.
#[derive(Debug)]
pub(crate) struct Fleet<'a> {
    pub(crate) state: &'a ClusterState,
    pub(crate) now: i64,
    /// Hosts of which something has been given away.
    touched: BTreeMap<HostId, Room<'a>>,
    /// The same hosts in the order in which they take instances, as this plan leaves them.
    ranks: BTreeSet<Rank>,
    ranks_of: BTreeMap<ClassId, BTreeSet<Rank>>,
    hopeless: Hopeless,
    /// Whether anything has been given away.
    pub(crate) given: bool,
    /// Hosts that were judged: the work that a plan has done.
    pub(crate) looked: usize,
}

impl<'a> Fleet<'a> {
    pub(crate) fn new(state: &'a ClusterState, now: i64) -> Self {
        let (touched, ranks, ranks_of, hopeless) = Default::default();
        Self { state, now, touched, ranks, ranks_of, hopeless, given: false, looked: 0 }
    }

    /// None: there is no such host, or it has not said what it has.
    pub(crate) fn room(&self, host: HostId) -> Option<Room<'a>> {
        match self.touched.get(&host) {
            Some(room) => Some(room.clone()),
            None => Room::of(self.state.hosts.get(host)?),
        }
    }

    pub(crate) fn is_touched(&self, host: HostId) -> bool {
        self.touched.contains_key(&host)
    }

    /// Touched hosts, all or of one class, in the order in which they take instances.
    pub(crate) fn touched(&self, class: Option<ClassId>) -> Option<&BTreeSet<Rank>> {
        match class {
            None => Some(&self.ranks),
            Some(class) => self.ranks_of.get(&class),
        }
    }

    /// Takes room on this host and no other. `held`: what the instance holds there and gives up.
    pub(crate) fn place_on(
        &mut self,
        host: HostId,
        request: &Request<'_>,
        held: Option<&Reservation>,
    ) -> Result<(), Shortage> {
        self.looked += 1;
        let Some(room) = self.room(host) else { return Err(Lack::Silent.into()) };
        let none = Reservation::default();
        match request.verdict_without(&room, held.unwrap_or(&none)) {
            Some(shortage) => Err(shortage),
            None => {
                self.give(host, request.wanted);
                Ok(())
            }
        }
    }

    /// Takes what an instance that holds `held` there is to have more.
    pub(crate) fn grow(
        &mut self,
        host: HostId,
        wanted: &Reservation,
        held: &Reservation,
    ) -> Result<(), Shortage> {
        let Some(room) = self.room(host) else { return Err(Lack::Silent.into()) };
        match room.lacks_without(wanted, held) {
            Some(shortage) => Err(shortage),
            None => {
                let more = Reservation {
                    cpu_millicores: wanted.cpu_millicores.saturating_sub(held.cpu_millicores),
                    memory_bytes: wanted.memory_bytes.saturating_sub(held.memory_bytes),
                    fixed_ports: Vec::new(),
                };
                self.give(host, &more);
                Ok(())
            }
        }
    }

    /// Takes room on a host that has it; returns where the host stands then.
    pub(crate) fn give(&mut self, host: HostId, wanted: &Reservation) -> Option<Rank> {
        self.given = true;
        let state = self.state;
        let entry = state.hosts.get(host)?;
        let class = entry.ranked?.class;
        let room = match self.touched.entry(host) {
            Entry::Vacant(vacant) => vacant.insert(Room::of(entry)?),
            Entry::Occupied(occupied) => occupied.into_mut(),
        };
        let before = room.rank();
        room.take(wanted);
        let after = room.rank();
        for ranks in [&mut self.ranks, self.ranks_of.entry(class).or_default()] {
            ranks.remove(&before);
            ranks.insert(after);
        }
        Some(after)
    }

    /// What hosts lack for a request that was found to fit nowhere. Room only shrinks while a plan is made.
    pub(crate) fn hopeless(&self, request: &Request<'_>) -> Option<Rc<Refusals>> {
        if self.hopeless.is_empty() {
            return None;
        }
        self.hopeless.get(&(request.conditions.clone(), request.wanted.clone())).cloned()
    }

    pub(crate) fn give_up(&mut self, request: &Request<'_>, refusals: Rc<Refusals>) {
        self.hopeless.insert((request.conditions.clone(), request.wanted.clone()), refusals);
    }
}
