//! Which host is best for one more instance: the fields of [`HostScore`], top to bottom, are the policy, and the
//! least score wins.

use std::collections::BTreeMap;

use nave_proto::constraint::{Attribute, Spread};
use nave_proto::ids::HostId;
use nave_proto::pb;

use super::placement::Room;
use crate::state::Reservation;

/// Less is better. The id at the end makes every choice the same on every member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct HostScore {
    /// The instance gave up on this host last time.
    gave_up_here: bool,
    /// Instances of the service in the same spread domain (the host, or all hosts of one label value).
    in_domain: usize,
    /// Instances of the service on the host.
    on_host: usize,
    /// The scarcer of cpu and memory, in percent of the host, once the instance is there.
    load_percent: u64,
    /// Instances of all services.
    instances: usize,
    host: HostId,
}

/// Where a service's instances are: what the spread counts.
#[derive(Debug, Clone)]
pub(crate) struct Census {
    label: Option<Attribute>,
    on_host: BTreeMap<HostId, usize>,
    in_domain: BTreeMap<Option<String>, usize>,
}

impl Census {
    /// An empty census by the manifest's `spread`. A spread that this build cannot read counts hosts.
    pub(crate) fn new(spread: &str) -> Self {
        let label = match spread.parse() {
            Ok(Spread::Label(name)) => Some(Attribute::Label(name)),
            Ok(Spread::Host) | Err(_) => None,
        };
        Self { label, on_host: BTreeMap::new(), in_domain: BTreeMap::new() }
    }

    pub(crate) fn count(&mut self, host: HostId, facts: Option<&pb::HostFacts>) {
        *self.on_host.entry(host).or_default() += 1;
        if self.label.is_some() {
            *self.in_domain.entry(self.domain(facts)).or_default() += 1;
        }
    }

    fn domain(&self, facts: Option<&pb::HostFacts>) -> Option<String> {
        let label = self.label.as_ref()?;
        facts.and_then(|facts| label.of(facts)).map(str::to_owned)
    }

    pub(crate) fn score(
        &self,
        room: &Room<'_>,
        taken: &Reservation,
        gave_up_on: Option<HostId>,
    ) -> HostScore {
        let host = room.id();
        let on_host = self.on_host.get(&host).copied().unwrap_or_default();
        let in_domain = match self.label {
            Some(_) => self.in_domain.get(&self.domain(room.facts())).copied().unwrap_or_default(),
            None => on_host,
        };
        HostScore {
            gave_up_here: gave_up_on == Some(host),
            in_domain,
            on_host,
            load_percent: room.load_percent_with(taken),
            instances: room.instances(),
            host,
        }
    }
}
