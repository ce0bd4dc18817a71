//! Why hosts do not take an instance: what each lacks, counted, and the sentences that account for every host, ending
//! with the host that misses by least.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;

use nave_proto::ids::HostId;
use nave_proto::pb;

use crate::state::Reservation;

/// Why a host does not take an instance. The order is the one in which they are looked for and told.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lack {
    Lost,
    Silent,
    Draining,
    Constraint(String),
    /// A constraint that this build cannot read.
    Unreadable(String),
    Cpu,
    Memory,
    Port(u32),
    /// The instance before it has not gone yet.
    Leaving,
    /// The data of the instance is on another host.
    Data,
}

/// What a host has too little of: the first lack, and by how much cpu and memory fall short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shortage {
    pub(crate) lack: Lack,
    /// Of what is lacking first: cpu or memory.
    pub(crate) free: u64,
    pub(crate) cpu_missing: u64,
    pub(crate) memory_missing: u64,
}

/// What the hosts that were looked at lack, counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Refusals {
    groups: BTreeMap<Lack, Group>,
    nearest: Option<Nearest>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Group {
    hosts: usize,
    /// The host with the most of what is lacking; of several the first.
    most: Option<(u64, Reverse<HostId>)>,
}

/// The host whose cpu and memory fall short by least, in thousandths of what is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Nearest {
    short: (u64, HostId),
    cpu_missing: u64,
    memory_missing: u64,
}

impl Lack {
    /// Why a host is not open to new instances.
    pub(crate) fn of_closed(record: &pb::HostRecord) -> Option<Self> {
        match record.status() {
            pb::HostStatus::Lost => Some(Lack::Lost),
            pb::HostStatus::Silent | pb::HostStatus::Unspecified => Some(Lack::Silent),
            pb::HostStatus::Connected if record.draining => Some(Lack::Draining),
            pb::HostStatus::Connected => None,
        }
    }

    /// Stopping something of the service's own could help.
    fn is_shortage(&self) -> bool {
        match self {
            Lack::Cpu | Lack::Memory | Lack::Port(_) => true,
            Lack::Lost
            | Lack::Silent
            | Lack::Draining
            | Lack::Constraint(_)
            | Lack::Unreadable(_)
            | Lack::Data
            | Lack::Leaving => false,
        }
    }
}

impl From<Lack> for Shortage {
    fn from(lack: Lack) -> Self {
        Self { lack, free: 0, cpu_missing: 0, memory_missing: 0 }
    }
}

impl Refusals {
    pub(crate) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// How many hosts have been counted.
    #[cfg(test)]
    pub(crate) fn hosts(&self) -> usize {
        self.groups.values().map(|group| group.hosts).sum()
    }

    /// Stopping something of the service's own could help.
    pub(crate) fn have_shortage(&self) -> bool {
        self.groups.keys().any(Lack::is_shortage)
    }

    /// So many hosts have this in common.
    pub(crate) fn add_hosts(&mut self, lack: Lack, hosts: usize) {
        if hosts > 0 {
            self.groups.entry(lack).or_default().hosts += hosts;
        }
    }

    pub(crate) fn add(&mut self, host: HostId, shortage: Shortage, wanted: &Reservation) {
        let Shortage { lack, free, cpu_missing, memory_missing } = shortage;
        let thousandths =
            |missing: u64, wanted: u64| missing.saturating_mul(1000).checked_div(wanted).unwrap_or(0);
        let short = thousandths(cpu_missing, wanted.cpu_millicores)
            .max(thousandths(memory_missing, wanted.memory_bytes));
        if matches!(lack, Lack::Cpu | Lack::Memory)
            && self.nearest.as_ref().is_none_or(|nearest| (short, host) < nearest.short)
        {
            self.nearest = Some(Nearest { short: (short, host), cpu_missing, memory_missing });
        }
        let group = self.groups.entry(lack).or_default();
        group.hosts += 1;
        group.most = group.most.max(Some((free, Reverse(host))));
    }

    /// Sentences that together account for every host: `2 of 3 hosts lack cpu: need 2.0 cores, most free is 0.5 on a`,
    /// and when several are short, which of them misses by least.
    pub(crate) fn sentences(
        &self,
        wanted: &Reservation,
        hosts: usize,
        name: impl Fn(HostId) -> String,
    ) -> Vec<String> {
        if hosts == 0 {
            return vec![
                "no host has joined yet; `nave token create` and `nave agent --join` add one".to_owned(),
            ];
        }
        let tell = |(lack, group): (&Lack, &Group)| {
            sentence(lack, group, Quantity { count: group.hosts, of: hosts }, wanted, &name)
        };
        let mut sentences: Vec<_> = self.groups.iter().map(tell).collect();
        let short = [Lack::Cpu, Lack::Memory].iter().filter_map(|lack| self.groups.get(lack));
        if short.map(|group| group.hosts).sum::<usize>() > 1
            && let Some(nearest) = &self.nearest
        {
            sentences.push(nearest.sentence(name(nearest.short.1)));
        }
        sentences
    }
}

impl Nearest {
    fn sentence(&self, host: String) -> String {
        let (cpu, memory) = (Cores(self.cpu_missing), Bytes(self.memory_missing));
        match (self.cpu_missing, self.memory_missing) {
            (_, 0) => format!("nearest miss: {host} lacks {cpu} cores"),
            (0, _) => format!("nearest miss: {host} lacks {memory}"),
            (_, _) => format!("nearest miss: {host} lacks {cpu} cores and {memory}"),
        }
    }
}

fn sentence(
    lack: &Lack,
    group: &Group,
    hosts: Quantity,
    wanted: &Reservation,
    name: impl Fn(HostId) -> String,
) -> String {
    let one = hosts.count == 1;
    let (is, does, lacks, has) =
        if one { ("is", "does", "lacks", "has") } else { ("are", "do", "lack", "have") };
    let (free, on) = group.most.map_or((0, String::new()), |(free, Reverse(host))| (free, name(host)));
    match lack {
        Lack::Lost => format!("{hosts} {is} lost"),
        Lack::Data => format!("{hosts} {does} not have its data"),
        Lack::Silent => format!("{hosts} {is} silent"),
        Lack::Draining => format!("{hosts} {is} draining"),
        Lack::Constraint(constraint) => format!("{hosts} {does} not meet {constraint}"),
        Lack::Unreadable(text) => format!("this hub cannot read the constraint {text:?}; upgrade it"),
        Lack::Port(port) => format!("{hosts} already {has} port {port} in use"),
        Lack::Leaving => format!("{hosts} still {has} the instance before it, which is stopping"),
        Lack::Cpu => {
            let (need, free) = (Cores(wanted.cpu_millicores), Cores(free));
            format!("{hosts} {lacks} cpu: need {need} cores, most free is {free} on {on}")
        }
        Lack::Memory => {
            let (need, free) = (Bytes(wanted.memory_bytes), Bytes(free));
            format!("{hosts} {lacks} memory: need {need}, most free is {free} on {on}")
        }
    }
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

    fn name(host: HostId) -> String {
        let names = ["", "alpha", "beta", "gamma", "delta", "eta", "theta"];
        names[usize::try_from(host.0).unwrap()].to_owned()
    }

    fn short(lack: Lack, free: u64, cpu_missing: u64, memory_missing: u64) -> Shortage {
        Shortage { lack, free, cpu_missing, memory_missing }
    }

    #[test]
    fn sentences_account_for_every_host_and_name_the_nearest() {
        let wanted = Reservation { cpu_millicores: 2000, memory_bytes: 512 << 20, fixed_ports: vec![8080] };
        let mut refusals = Refusals::default();
        for (host, shortage) in [
            (1, short(Lack::Cpu, 500, 1500, 0)),
            (2, short(Lack::Cpu, 250, 1750, 100 << 20)),
            (3, short(Lack::Memory, 100 << 20, 0, 412 << 20)),
            (4, Lack::Port(8080).into()),
            (5, Lack::Draining.into()),
        ] {
            refusals.add(HostId(host), shortage, &wanted);
        }
        refusals.add_hosts(Lack::Constraint("label.zone != \"b\"".into()), 1);
        assert_eq!(
            refusals.sentences(&wanted, 6, name),
            [
                "1 of 6 hosts is draining",
                "1 of 6 hosts does not meet label.zone != \"b\"",
                "2 of 6 hosts lack cpu: need 2.0 cores, most free is 0.5 on alpha",
                "1 of 6 hosts lacks memory: need 512 MiB, most free is 100 MiB on gamma",
                "1 of 6 hosts already has port 8080 in use",
                "nearest miss: alpha lacks 1.5 cores",
            ]
        );
        assert!(refusals.have_shortage());
    }

    #[test]
    fn one_host_and_none_read_well() {
        let wanted = Reservation { cpu_millicores: 1250, ..Default::default() };
        let mut only = Refusals::default();
        only.add(HostId(1), short(Lack::Cpu, 0, 1250, 0), &wanted);
        assert_eq!(
            only.sentences(&wanted, 1, name),
            ["the only host lacks cpu: need 1.250 cores, most free is 0.0 on alpha"]
        );
        assert_eq!(Refusals::default().sentences(&wanted, 0, name).len(), 1);
    }
}
