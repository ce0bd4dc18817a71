//! The hosts that take new instances, in the order in which they take them: least loaded first. One order over all,
//! and one per class of hosts that are alike, so that a plan asks about constraints and spread domains once per class
//! and finds the best host of each without looking at the others. Kept in step by [`super::Hosts`].

use std::collections::{BTreeMap, BTreeSet};

use nave_proto::ids::HostId;
use nave_proto::pb;

/// Number of a class in this process; another process, or this one after a restart, may have numbered otherwise.
pub(crate) type ClassId = u32;

/// Where a host stands among others: the least takes the next instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    /// Percent of the scarcer of cpu and memory that is reserved.
    pub(crate) load_percent: u64,
    /// Instances of all services.
    pub(crate) instances: usize,
    /// The last word, so that every choice is the same on every member.
    pub(crate) host: HostId,
}

/// A rank and the class in which it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ranked {
    pub(crate) class: ClassId,
    pub(crate) rank: Rank,
}

impl PartialEq for Ranked {
    /// Numbers of classes mean nothing beyond one process.
    fn eq(&self, other: &Self) -> bool {
        self.rank == other.rank
    }
}

/// All that a constraint or a spread can see of a host besides its name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Likeness {
    os: String,
    arch: String,
    labels: BTreeMap<String, String>,
}

/// Hosts that are alike.
#[derive(Debug, Clone)]
pub(crate) struct Class {
    /// What they have in common; no name.
    pub(crate) facts: pb::HostFacts,
    pub(crate) hosts: BTreeSet<Rank>,
}

/// See the file's head.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ranks {
    all: BTreeSet<Rank>,
    classes: BTreeMap<ClassId, Class>,
    numbers: BTreeMap<Likeness, ClassId>,
    next: ClassId,
}

impl PartialEq for Ranks {
    fn eq(&self, other: &Self) -> bool {
        let told = |ranks: &'_ Self| -> Vec<(Likeness, BTreeSet<Rank>)> {
            let hosts = |class| ranks.classes.get(class).map(|class| class.hosts.clone()).unwrap_or_default();
            ranks.numbers.iter().map(|(likeness, class)| (likeness.clone(), hosts(class))).collect()
        };
        self.all == other.all && told(self) == told(other)
    }
}

impl Ranks {
    /// Every open host.
    pub(crate) fn all(&self) -> &BTreeSet<Rank> {
        &self.all
    }

    /// In the order of numbers, which no result may depend on.
    pub(crate) fn classes(&self) -> impl ExactSizeIterator<Item = (ClassId, &Class)> + '_ {
        self.classes.iter().map(|(id, class)| (*id, class))
    }

    /// Puts a host in; its facts say into which class.
    pub(super) fn insert(&mut self, facts: &pb::HostFacts, rank: Rank) -> Ranked {
        let likeness =
            Likeness { os: facts.os.clone(), arch: facts.arch.clone(), labels: facts.labels.clone() };
        let next = self.next;
        let class = *self.numbers.entry(likeness).or_insert(next);
        if class == next {
            self.next += 1;
        }
        let new = || Class {
            facts: pb::HostFacts {
                os: facts.os.clone(),
                arch: facts.arch.clone(),
                labels: facts.labels.clone(),
                ..Default::default()
            },
            hosts: BTreeSet::new(),
        };
        self.classes.entry(class).or_insert_with(new).hosts.insert(rank);
        self.all.insert(rank);
        Ranked { class, rank }
    }

    /// Takes a host out, and with the last one its class.
    pub(super) fn remove(&mut self, ranked: Ranked) {
        self.all.remove(&ranked.rank);
        let Some(class) = self.classes.get_mut(&ranked.class) else { return };
        class.hosts.remove(&ranked.rank);
        if class.hosts.is_empty() {
            self.classes.remove(&ranked.class);
            self.numbers.retain(|_, id| *id != ranked.class);
        }
    }

    /// Moves a host within its class.
    pub(super) fn shift(&mut self, ranked: Ranked, rank: Rank) -> Ranked {
        self.all.remove(&ranked.rank);
        self.all.insert(rank);
        if let Some(class) = self.classes.get_mut(&ranked.class) {
            class.hosts.remove(&ranked.rank);
            class.hosts.insert(rank);
        }
        Ranked { rank, ..ranked }
    }
}
