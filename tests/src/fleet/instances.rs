//! What one simulated agent runs, and what of it the hub has to be told. Pure.

use std::collections::BTreeMap;

use nave_proto::pb;
use pb::observed::{Running, State};

/// What changed by a message of the hub.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turned {
    pub(super) started: u64,
    pub(super) stopped: u64,
}

#[derive(Debug, Default)]
pub(super) struct Instances {
    /// Instance id to the epoch that runs.
    running: BTreeMap<u64, u64>,
    news: BTreeMap<u64, pb::InstanceReport>,
    gone: Vec<u64>,
    full: bool,
}

impl Instances {
    /// A session begins: everything is told, once.
    pub(super) fn tell_all(&mut self) {
        self.full = true;
        self.gone.clear();
        self.news = self.running.iter().map(|(id, epoch)| (*id, running(*id, *epoch))).collect();
    }

    pub(super) fn whole(&mut self, set: pb::WantedSet) -> Turned {
        let kept: BTreeMap<u64, ()> = set.instances.iter().map(|wanted| (wanted.instance_id, ())).collect();
        let removed: Vec<u64> = self.running.keys().filter(|id| !kept.contains_key(id)).copied().collect();
        let mut turned = Turned::default();
        removed.into_iter().for_each(|id| self.remove(id, &mut turned));
        set.instances.into_iter().for_each(|wanted| self.put(&wanted, &mut turned));
        turned
    }

    pub(super) fn delta(&mut self, delta: pb::WantedDelta) -> Turned {
        let mut turned = Turned::default();
        delta.removed.into_iter().for_each(|id| self.remove(id, &mut turned));
        delta.put.into_iter().for_each(|wanted| self.put(&wanted, &mut turned));
        turned
    }

    fn put(&mut self, wanted: &pb::WantedInstance, turned: &mut Turned) {
        let id = wanted.instance_id;
        if wanted.desired() == pb::Desired::Stop {
            turned.stopped += u64::from(self.running.remove(&id).is_some());
            self.news.remove(&id);
            self.gone.push(id);
            return;
        }
        match self.running.insert(id, wanted.epoch) {
            Some(epoch) if epoch == wanted.epoch => return,
            Some(_) => {}
            None => turned.started += 1,
        }
        self.news.insert(id, running(id, wanted.epoch));
    }

    /// The hub no longer knows it.
    fn remove(&mut self, id: u64, turned: &mut Turned) {
        self.news.remove(&id);
        turned.stopped += u64::from(self.running.remove(&id).is_some());
    }

    /// The next report, when there is something to say.
    pub(super) fn report(&mut self, sequence: u64) -> Option<pb::Report> {
        let full = std::mem::take(&mut self.full);
        let instances: Vec<_> = std::mem::take(&mut self.news).into_values().collect();
        let gone = std::mem::take(&mut self.gone);
        let something = full || !instances.is_empty() || !gone.is_empty();
        something.then_some(pb::Report { sequence, full, instances, facts: None, gone })
    }
}

fn running(instance_id: u64, epoch: u64) -> pb::InstanceReport {
    let process = pb::ProcessIdentity {
        pid: 1000 + u32::try_from(instance_id % 1_000_000).unwrap_or(0),
        start_ticks: instance_id,
        boot_id: "3f0e7a54-6a9e-4f0e-9a55-0f6c2f1a7d11".to_owned(),
        cgroup_id: instance_id,
    };
    let running = Running { process: Some(process), started_unix_ns: 1, ready: true };
    pb::InstanceReport {
        instance_id,
        epoch,
        attempt: 1,
        observed: Some(pb::Observed { state: Some(State::Running(running)) }),
        endpoint: pb::EndpointState::Ready.into(),
        ports: [("http".to_owned(), 20_000)].into(),
        ..Default::default()
    }
}
