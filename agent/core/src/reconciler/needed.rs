//! `needs` on the way down: of instances that are to stop at the same time, one stays until those on this host that
//! need it have ended. The hub gives its stops in that order; this is for what comes all at once, as when a host is
//! given up. One whose process does not die from SIGKILL is not waited for.

use std::collections::BTreeSet;

use nave_proto::ids::InstanceId;
use nave_proto::pb;
use rand::Rng;

use super::{Order, Reconciler};
use crate::monotonic::Monotonic;
use crate::supervisor::{Input, Supervisor};

impl Reconciler {
    /// Before the stops of a new wanted set are given: `going` are all that are then to stop.
    pub(super) fn hold_needed(&mut self, now: Monotonic, going: &BTreeSet<InstanceId>) {
        let needed = self.needed_by(going);
        for id in going {
            let service = self.supervisors.get(id).and_then(Supervisor::service);
            if service.is_some_and(|name| needed.contains(name)) {
                self.supervisors.change(*id, |supervisor| supervisor.stay_for_others(now));
                self.held.insert(*id);
            }
        }
    }

    /// All that are to stop already.
    pub(super) fn going(&self) -> BTreeSet<InstanceId> {
        let going = self.supervisors.values().filter(|supervisor| supervisor.is_to_stop());
        going.map(Supervisor::instance).collect()
    }

    /// Lets go of those that nobody needs any longer, one after another.
    pub(super) fn release_needed<R: Rng + ?Sized>(
        &mut self,
        now: Monotonic,
        rng: &mut R,
        orders: &mut Vec<Order>,
    ) {
        while !self.held.is_empty() {
            let needed = self.needed_by(&self.going());
            let stays = |id: &InstanceId| {
                self.supervisors.get(id).is_some_and(|supervisor| {
                    supervisor.is_to_stop()
                        && supervisor.may_run()
                        && supervisor.service().is_some_and(|name| needed.contains(name))
                })
            };
            let released: Vec<_> = self.held.iter().copied().filter(|id| !stays(id)).collect();
            if released.is_empty() {
                return;
            }
            for id in released {
                self.held.remove(&id);
                self.supervisors.change(id, Supervisor::go_at_last);
                self.step(now, rng, id, Input::Tick, orders);
            }
        }
    }

    fn needed_by(&self, going: &BTreeSet<InstanceId>) -> BTreeSet<String> {
        let running = going.iter().filter_map(|id| self.supervisors.get(id)).filter(|one| one.may_run());
        let manifests = running.filter_map(|supervisor| supervisor.wanted().manifest.as_ref());
        manifests.flat_map(|manifest| manifest.needs.iter().cloned()).collect()
    }
}

/// What of a set is to stop.
pub(super) fn stops(instances: &[pb::WantedInstance]) -> impl Iterator<Item = InstanceId> + '_ {
    let stops = instances.iter().filter(|wanted| wanted.desired() == pb::Desired::Stop);
    stops.map(|wanted| InstanceId(wanted.instance_id))
}
