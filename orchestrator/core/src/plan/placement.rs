//! Room on hosts: what is free, what an instance lacks, and which host takes it. One [`Fleet`] lives for one plan
//! and remembers what the plan has already given away; stops free nothing until their instance is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use nave_proto::constraint::Constraint;
use nave_proto::ids::HostId;
use nave_proto::pb;

use super::score::Census;
use crate::state::{ClusterState, HostEntry, Reservation};
use crate::wants::{HostExt as _, ManifestExt as _};

/// One host with what is taken on it, by instances and by this plan.
#[derive(Debug, Clone)]
pub(crate) struct Room<'a> {
    entry: &'a HostEntry,
    facts: &'a pb::HostFacts,
    cpu_millicores: u64,
    memory_bytes: u64,
    ports: BTreeSet<u32>,
    instances: usize,
}

/// Why a host does not take an instance. The order is the one in which they are looked for and told.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lack {
    Lost,
    Silent,
    Draining,
    Constraint(String),
    /// A constraint that this build cannot read.
    Unreadable(String),
    Cpu {
        free: u64,
    },
    Memory {
        free: u64,
    },
    Port(u32),
    /// The instance before it has not gone yet.
    Leaving,
}

impl<'a> Room<'a> {
    /// None: the host has not said what it has.
    pub(crate) fn of(entry: &'a HostEntry) -> Option<Self> {
        Some(Self {
            entry,
            facts: entry.facts()?,
            cpu_millicores: entry.reserved.cpu_millicores,
            memory_bytes: entry.reserved.memory_bytes,
            ports: entry.fixed_ports.keys().copied().collect(),
            instances: entry.instances.len(),
        })
    }

    pub(crate) fn id(&self) -> HostId {
        HostId(self.entry.record.id)
    }

    pub(crate) fn facts(&self) -> Option<&'a pb::HostFacts> {
        Some(self.facts)
    }

    pub(crate) fn instances(&self) -> usize {
        self.instances
    }

    fn cpu_free(&self) -> u64 {
        self.facts.cpu_millicores.saturating_sub(self.cpu_millicores)
    }

    fn memory_free(&self) -> u64 {
        self.facts.memory_bytes.saturating_sub(self.memory_bytes)
    }

    /// The first thing that the host has too little of.
    pub(crate) fn lacks(&self, wanted: &Reservation) -> Option<Lack> {
        if wanted.cpu_millicores > self.cpu_free() {
            return Some(Lack::Cpu { free: self.cpu_free() });
        }
        if wanted.memory_bytes > self.memory_free() {
            return Some(Lack::Memory { free: self.memory_free() });
        }
        wanted.fixed_ports.iter().find(|port| self.ports.contains(port)).copied().map(Lack::Port)
    }

    pub(crate) fn take(&mut self, wanted: &Reservation) {
        self.cpu_millicores += wanted.cpu_millicores;
        self.memory_bytes += wanted.memory_bytes;
        self.ports.extend(&wanted.fixed_ports);
        self.instances += 1;
    }

    /// As if an instance had left: it is placed again, perhaps here.
    pub(crate) fn without(mut self, taken: &Reservation) -> Self {
        self.cpu_millicores = self.cpu_millicores.saturating_sub(taken.cpu_millicores);
        self.memory_bytes = self.memory_bytes.saturating_sub(taken.memory_bytes);
        self.ports.retain(|port| !taken.fixed_ports.contains(port));
        self
    }

    /// Percent of the scarcer of cpu and memory in use once `wanted` is there.
    pub(crate) fn load_percent_with(&self, wanted: &Reservation) -> u64 {
        let percent = |used: u64, all: u64| used.saturating_mul(100).checked_div(all).unwrap_or_default();
        percent(self.cpu_millicores + wanted.cpu_millicores, self.facts.cpu_millicores)
            .max(percent(self.memory_bytes + wanted.memory_bytes, self.facts.memory_bytes))
    }
}

/// The constraints of one manifest, read once.
#[derive(Debug, Clone)]
pub(crate) struct Conditions(Vec<Result<Constraint, String>>);

impl Conditions {
    pub(crate) fn of(manifest: &pb::Manifest) -> Self {
        let read = |text: &String| text.parse().map_err(|_| text.clone());
        Self(manifest.constraints().iter().map(read).collect())
    }

    /// The first condition that a host with these facts does not meet.
    pub(crate) fn unmet(&self, facts: &pb::HostFacts) -> Option<Lack> {
        self.0.iter().find_map(|condition| match condition {
            Ok(constraint) if constraint.holds(facts) => None,
            Ok(constraint) => Some(Lack::Constraint(constraint.to_string())),
            Err(text) => Some(Lack::Unreadable(text.clone())),
        })
    }

    /// Whether instances that are on the host may stay there.
    pub(crate) fn admit(&self, host: &HostEntry) -> bool {
        !host.record.is_lost()
            && !host.record.draining
            && host.facts().is_some_and(|facts| self.unmet(facts).is_none())
    }
}

/// Why a host is not open to new instances.
pub(crate) fn closed(record: &pb::HostRecord) -> Option<Lack> {
    match record.status() {
        pb::HostStatus::Lost => Some(Lack::Lost),
        pb::HostStatus::Silent | pb::HostStatus::Unspecified => Some(Lack::Silent),
        pb::HostStatus::Connected if record.draining => Some(Lack::Draining),
        pb::HostStatus::Connected => None,
    }
}

/// What is wanted of a host for one instance.
#[derive(Debug, Clone)]
pub(crate) struct Request<'a> {
    pub(crate) conditions: &'a Conditions,
    pub(crate) wanted: &'a Reservation,
    /// For an instance that gave up: where, and what it still holds there.
    pub(crate) gave_up_on: Option<(HostId, &'a Reservation)>,
}

/// All hosts as this plan leaves them. Made when first asked: most plans place nothing.
#[derive(Debug)]
pub(crate) struct Fleet<'a> {
    state: &'a ClusterState,
    rooms: Option<BTreeMap<HostId, Room<'a>>>,
    /// Whether anything has been given away.
    pub(crate) given: bool,
}

impl<'a> Fleet<'a> {
    pub(crate) fn new(state: &'a ClusterState) -> Self {
        Self { state, rooms: None, given: false }
    }

    fn rooms(&mut self) -> &mut BTreeMap<HostId, Room<'a>> {
        let state = self.state;
        self.rooms.get_or_insert_with(|| {
            state.hosts.iter().filter_map(|(id, entry)| Some((id, Room::of(entry)?))).collect()
        })
    }

    /// Takes room on the best host, or says what each lacks.
    pub(crate) fn place(
        &mut self,
        request: &Request<'_>,
        census: &mut Census,
    ) -> Result<HostId, Vec<Refusal>> {
        let mut refusals = Vec::new();
        let mut best = None;
        for (id, room) in self.rooms() {
            match verdict(room, request) {
                Some(lack) => refusals.push(Refusal { host: *id, name: room.entry.record.shown(), lack }),
                None => {
                    let score = census.score(room, request.wanted, request.gave_up_on.map(|(host, _)| host));
                    best = best.into_iter().chain([(score, *id)]).min();
                }
            }
        }
        let Some((_, host)) = best else { return Err(refusals) };
        self.give(host, request.wanted, census);
        Ok(host)
    }

    /// Takes room on this host and no other.
    pub(crate) fn place_on(
        &mut self,
        host: HostId,
        request: &Request<'_>,
        census: &mut Census,
    ) -> Result<HostId, Refusal> {
        let Some(room) = self.rooms().get(&host) else {
            return Err(Refusal { host, name: host.to_string(), lack: Lack::Silent });
        };
        if let Some(lack) = verdict(room, request) {
            return Err(Refusal { host, name: room.entry.record.shown(), lack });
        }
        self.give(host, request.wanted, census);
        Ok(host)
    }

    fn give(&mut self, host: HostId, wanted: &Reservation, census: &mut Census) {
        self.given = true;
        if let Some(room) = self.rooms().get_mut(&host) {
            room.take(wanted);
            census.count(host, room.facts());
        }
    }
}

fn verdict(room: &Room<'_>, request: &Request<'_>) -> Option<Lack> {
    let unmet = || request.conditions.unmet(room.facts);
    let short = || match request.gave_up_on {
        Some((host, held)) if host == room.id() => room.clone().without(held).lacks(request.wanted),
        Some(_) | None => room.lacks(request.wanted),
    };
    closed(&room.entry.record).or_else(unmet).or_else(short)
}

/// One host's reason for not taking an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) host: HostId,
    pub(crate) name: String,
    pub(crate) lack: Lack,
}

impl Refusal {
    /// Stopping something of the service's own could help.
    pub(crate) fn is_shortage(&self) -> bool {
        match self.lack {
            Lack::Cpu { .. } | Lack::Memory { .. } | Lack::Port(_) => true,
            Lack::Lost
            | Lack::Silent
            | Lack::Draining
            | Lack::Constraint(_)
            | Lack::Unreadable(_)
            | Lack::Leaving => false,
        }
    }
}

/// Sentences that together account for every host: `2 of 3 hosts lack cpu: need 2.0 cores, most free is 0.5 on a`.
pub(crate) fn reasons(refusals: &[Refusal], wanted: &Reservation, hosts: usize) -> Vec<String> {
    if hosts == 0 {
        return vec![
            "no host has joined yet; `nave token create` and `nave agent --join` add one".to_owned(),
        ];
    }
    let mut groups: BTreeMap<Lack, Vec<&Refusal>> = BTreeMap::new();
    for refusal in refusals {
        groups.entry(kind(&refusal.lack)).or_default().push(refusal);
    }
    let tell = |(lack, group): (&Lack, &Vec<&Refusal>)| {
        let quantity = Quantity { count: group.len(), of: hosts };
        sentence(lack, group, quantity, wanted)
    };
    groups.iter().map(tell).collect()
}

/// The lack without its number, so that hosts with the same one are told together.
fn kind(lack: &Lack) -> Lack {
    match lack {
        Lack::Cpu { .. } => Lack::Cpu { free: 0 },
        Lack::Memory { .. } => Lack::Memory { free: 0 },
        Lack::Lost
        | Lack::Silent
        | Lack::Draining
        | Lack::Constraint(_)
        | Lack::Unreadable(_)
        | Lack::Port(_)
        | Lack::Leaving => lack.clone(),
    }
}

fn sentence(lack: &Lack, group: &[&Refusal], hosts: Quantity, wanted: &Reservation) -> String {
    let one = hosts.count == 1;
    let (is, does, lacks) = if one { ("is", "does", "lacks") } else { ("are", "do", "lack") };
    match lack {
        Lack::Lost => format!("{hosts} {is} lost"),
        Lack::Silent => format!("{hosts} {is} silent"),
        Lack::Draining => format!("{hosts} {is} draining"),
        Lack::Constraint(constraint) => format!("{hosts} {does} not meet {constraint}"),
        Lack::Unreadable(text) => format!("this hub cannot read the constraint {text:?}; upgrade it"),
        Lack::Port(port) => {
            format!("{hosts} already {} port {port} in use", if one { "has" } else { "have" })
        }
        Lack::Leaving => format!(
            "{hosts} still {} the instance before it, which is stopping",
            if one { "has" } else { "have" }
        ),
        Lack::Cpu { .. } => {
            let (free, name) = most_free(group);
            let (need, free) = (Cores(wanted.cpu_millicores), Cores(free));
            format!("{hosts} {lacks} cpu: need {need} cores, most free is {free} on {name}")
        }
        Lack::Memory { .. } => {
            let (free, name) = most_free(group);
            let (need, free) = (Bytes(wanted.memory_bytes), Bytes(free));
            format!("{hosts} {lacks} memory: need {need}, most free is {free} on {name}")
        }
    }
}

fn most_free<'a>(group: &[&'a Refusal]) -> (u64, &'a str) {
    let free = |refusal: &&&Refusal| match refusal.lack {
        Lack::Cpu { free } | Lack::Memory { free } => (free, std::cmp::Reverse(refusal.host)),
        Lack::Lost
        | Lack::Silent
        | Lack::Draining
        | Lack::Constraint(_)
        | Lack::Unreadable(_)
        | Lack::Port(_)
        | Lack::Leaving => (0, std::cmp::Reverse(refusal.host)),
    };
    group.iter().max_by_key(free).map_or((0, ""), |refusal| (free(&refusal).0, refusal.name.as_str()))
}

/// `2 of 3 hosts`.
#[derive(Debug, Clone, Copy)]
struct Quantity {
    count: usize,
    of: usize,
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.count, self.of) {
            (1, 1) => f.write_str("the only host"),
            (count, of) => write!(f, "{count} of {of} hosts"),
        }
    }
}

struct Cores(u64);

impl fmt::Display for Cores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, rest) = (self.0 / 1000, self.0 % 1000);
        match rest {
            _ if rest % 100 == 0 => write!(f, "{whole}.{}", rest / 100),
            _ => write!(f, "{whole}.{rest:03}"),
        }
    }
}

struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: u64 = 1024 * 1024;
        match self.0 {
            bytes if bytes >= 10 * 1024 * MIB => write!(f, "{} GiB", bytes / (1024 * MIB)),
            bytes if bytes >= MIB => write!(f, "{} MiB", bytes / MIB),
            bytes => write!(f, "{bytes} bytes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(host: u64, name: &str, lack: Lack) -> Refusal {
        Refusal { host: HostId(host), name: name.into(), lack }
    }

    #[test]
    fn reasons_account_for_every_host() {
        let wanted = Reservation { cpu_millicores: 2000, memory_bytes: 512 << 20, fixed_ports: vec![8080] };
        let refusals = [
            refusal(1, "alpha", Lack::Cpu { free: 500 }),
            refusal(2, "beta", Lack::Cpu { free: 250 }),
            refusal(3, "gamma", Lack::Memory { free: 100 << 20 }),
            refusal(4, "delta", Lack::Port(8080)),
            refusal(5, "eta", Lack::Draining),
            refusal(6, "theta", Lack::Constraint("label.zone != \"b\"".into())),
        ];
        assert_eq!(
            reasons(&refusals, &wanted, 6),
            [
                "1 of 6 hosts is draining",
                "1 of 6 hosts does not meet label.zone != \"b\"",
                "2 of 6 hosts lack cpu: need 2.0 cores, most free is 0.5 on alpha",
                "1 of 6 hosts lacks memory: need 512 MiB, most free is 100 MiB on gamma",
                "1 of 6 hosts already has port 8080 in use",
            ]
        );
    }

    #[test]
    fn one_host_and_none_read_well() {
        let wanted = Reservation { cpu_millicores: 1250, ..Default::default() };
        let only = [refusal(1, "alpha", Lack::Cpu { free: 0 })];
        assert_eq!(
            reasons(&only, &wanted, 1),
            ["the only host lacks cpu: need 1.250 cores, most free is 0.0 on alpha"]
        );
        assert_eq!(reasons(&[], &wanted, 0).len(), 1);
    }
}
