//! A process that must never run twice runs only under a lease of its host (`on_disconnect = "stop"`): it is started
//! under one, its keeper has the end of the lease as its deadline, and when no newer lease comes it is stopped at that
//! moment by us, or by the keeper when we are dead or stuck. Once a lease comes, it goes on as wanted.
//! `nave_proto::lease` has the whole rule.

use nave_proto::lease::START_MIN;
use nave_proto::pb;

use super::Supervisor;
use super::action::{Action, Deadline};
use super::state::State;
use super::stop::{Rules, rules};
use crate::monotonic::Monotonic;

/// Why a process was stopped, and stays so until the hub is heard.
pub(super) const LEASE_OVER: &str =
    "stopped: it must not run twice, and the hub was out of reach for too long";

/// See [`Supervisor::needs_lease`].
pub(super) fn needs_lease(wanted: &pb::WantedInstance) -> bool {
    let placement = wanted.manifest.as_ref().and_then(|manifest| manifest.placement.as_ref());
    placement.is_some_and(|placement| placement.on_disconnect() == pb::OnDisconnect::Stop)
}

impl Supervisor {
    /// Whether it runs only under a lease.
    #[must_use]
    pub fn needs_lease(&self) -> bool {
        needs_lease(&self.wanted)
    }

    /// What [`Input::Lease`](super::Input::Lease) tells one that needs a lease, for the others: nothing follows from it.
    pub fn note_lease(&mut self, until: Monotonic) {
        self.lease = self.lease.max(Some(until));
    }

    pub(super) fn leased(&mut self, until: Monotonic, out: &mut Vec<Action>) {
        self.note_lease(until);
        // One that is being stopped is not to live longer.
        if let (State::Running(_), Some(deadline)) = (&self.state, self.deadline()) {
            out.push(Action::SetDeadline { key: self.key(), deadline });
        }
    }

    pub(super) fn deadline(&self) -> Option<Deadline> {
        let at = self.lease.filter(|_| self.needs_lease())?;
        let Rules { signal, scope, grace } = rules(self.wanted.manifest.as_ref());
        Some(Deadline { at, signal, scope, grace })
    }

    /// No lease, or none that is worth beginning under.
    pub(super) fn lacks_lease(&self, now: Monotonic) -> bool {
        self.needs_lease() && self.lease.is_none_or(|until| until < now + START_MIN)
    }

    /// The lease it runs under is over. One that is not known is the keeper's to watch.
    pub(super) fn has_lost_lease(&self, now: Monotonic) -> bool {
        self.needs_lease() && self.lease.is_some_and(|until| until <= now)
    }
}
