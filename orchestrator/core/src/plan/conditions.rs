//! The constraints of one manifest, read once, and what they say of a host or of a class of hosts.

use nave_proto::constraint::{Attribute, Constraint, Operator};
use nave_proto::pb;

use super::lack::Lack;
use crate::state::HostEntry;
use crate::wants::{HostExt as _, ManifestExt as _};

/// See the file's head. A constraint that this build cannot read is met by no host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Conditions(Vec<Result<Constraint, String>>);

impl Conditions {
    pub(crate) fn of(manifest: &pb::Manifest) -> Self {
        let read = |text: &String| text.parse().map_err(|_| text.clone());
        Self(manifest.constraints().iter().map(read).collect())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The first condition that a host with these facts does not meet.
    pub(crate) fn unmet(&self, facts: &pb::HostFacts) -> Option<Lack> {
        self.0.iter().find_map(|condition| unmet(condition, facts))
    }

    /// The first condition that no host of a class meets, whatever its name.
    pub(crate) fn unmet_by_class(&self, facts: &pb::HostFacts) -> Option<Lack> {
        self.0.iter().filter(|condition| !is_of_name(condition)).find_map(|condition| unmet(condition, facts))
    }

    /// Whether all that matters is the name of a host.
    pub(crate) fn are_of_names(&self) -> bool {
        self.0.iter().all(is_of_name)
    }

    /// The one host that is meant, if one is named, and what the others lack.
    pub(crate) fn only_host(&self) -> Option<(&str, Lack)> {
        self.0.iter().find_map(|condition| match condition {
            Ok(only @ Constraint { attribute: Attribute::Host, operator: Operator::Equal, value }) => {
                Some((value.as_str(), Lack::Constraint(only.to_string())))
            }
            Ok(_) | Err(_) => None,
        })
    }

    /// Whether instances that are on the host may stay there.
    pub(crate) fn admit(&self, host: &HostEntry) -> bool {
        !host.record.is_lost()
            && !host.record.draining
            && host.facts().is_some_and(|facts| self.unmet(facts).is_none())
    }
}

fn is_of_name(condition: &Result<Constraint, String>) -> bool {
    condition.as_ref().is_ok_and(|constraint| constraint.attribute == Attribute::Host)
}

fn unmet(condition: &Result<Constraint, String>, facts: &pb::HostFacts) -> Option<Lack> {
    match condition {
        Ok(constraint) if constraint.holds(facts) => None,
        Ok(constraint) => Some(Lack::Constraint(constraint.to_string())),
        Err(text) => Some(Lack::Unreadable(text.clone())),
    }
}
