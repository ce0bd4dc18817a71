//! Which host is best for one more instance: the fields of [`HostScore`], top to bottom, are the policy, and the
//! least score wins. `search.rs` finds the least without scoring every host; its tests score every host.
//!
//! The load is that before the instance comes, not after. So hosts have one order for all requests, which the state
//! keeps; with the load after it, every shape of request would order them anew, and a placement would look at all of
//! them. Between hosts of one size the two choose alike but for the last percent.

use std::collections::BTreeMap;

use nave_proto::constraint::{Attribute, Spread};
use nave_proto::ids::HostId;
use nave_proto::pb;

use crate::state::Rank;

/// Less is better. The id at the end of the rank makes every choice the same on every member.
#[cfg_attr(not(test), expect(dead_code, reason = "says what the search finds, and checks it in tests"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HostScore {
    /// The instance gave up on this host last time.
    pub(crate) gave_up_here: bool,
    /// The host was lost not long ago.
    pub(crate) unsteady: bool,
    /// Instances of the service in the same spread domain (the host, or all hosts of one label value).
    pub(crate) in_domain: usize,
    /// Instances of the service on the host.
    pub(crate) on_host: usize,
    /// How loaded the host is; at the end its id.
    pub(crate) rank: Rank,
}

/// Where a service's instances are: what the spread counts.
#[derive(Debug, Clone)]
pub(crate) struct Census {
    label: Option<Attribute>,
    pub(crate) on_host: BTreeMap<HostId, usize>,
}

impl Census {
    /// A census by the manifest's `spread` of instances on these hosts. A spread that this build cannot read counts
    /// hosts.
    pub(crate) fn new(spread: &str, mut hosts: Vec<HostId>) -> Self {
        let label = match spread.parse() {
            Ok(Spread::Label(name)) => Some(Attribute::Label(name)),
            Ok(Spread::Host) | Err(_) => None,
        };
        hosts.sort_unstable();
        let on_host = hosts.chunk_by(|a, b| a == b).map(|same| (same[0], same.len())).collect();
        Self { label, on_host }
    }

    pub(crate) fn count(&mut self, host: HostId) {
        *self.on_host.entry(host).or_default() += 1;
    }

    pub(crate) fn on(&self, host: HostId) -> usize {
        self.on_host.get(&host).copied().unwrap_or_default()
    }

    /// Whether instances are spread over the values of a label before they are spread over hosts.
    pub(crate) fn has_label(&self) -> bool {
        self.label.is_some()
    }

    /// The value of the label; None: the host has none, or hosts are what is counted.
    pub(crate) fn domain<'f>(&self, facts: &'f pb::HostFacts) -> Option<&'f str> {
        self.label.as_ref()?.of(facts)
    }
}
