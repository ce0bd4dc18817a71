//! Who on this host hears what becomes of its instances: the proxy that calls them, the firewall that guards their ports,
//! and who counts them. They hear only news; none of them can make a turn wait.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nave_agent_core::directory::{Directory, DirectoryChange};
use nave_agent_core::supervisor::{Starting, State};
use nave_agent_core::{Reconciler, Supervisor};
use nave_proto::ids::InstanceId;
use tokio::sync::watch;

use super::service;
use crate::api::Shown;
use crate::directory::DirectoryHandle;
use crate::firewall::{Guarded, Owner, Told};
use crate::metrics::{Metrics, StateLabel};
use crate::proxy::{LocalWord, Proxy};

/// See the module's description.
pub(super) struct Onlookers {
    metrics: Metrics,
    shown: Shown,
    proxy: Option<Proxy>,
    firewall: Option<watch::Sender<Told>>,
    /// What the proxy was told of each instance: of which epoch, and what.
    told: BTreeMap<InstanceId, (u64, LocalWord)>,
}

impl Onlookers {
    pub(super) fn new(metrics: Metrics, shown: Shown) -> Self {
        Self { metrics, shown, proxy: None, firewall: None, told: BTreeMap::new() }
    }

    pub(super) fn with_proxy(self, proxy: Proxy) -> Self {
        Self { proxy: Some(proxy), ..self }
    }

    pub(super) fn with_firewall(self, firewall: watch::Sender<Told>) -> Self {
        Self { firewall: Some(firewall), ..self }
    }

    /// Calls under way to an instance; `None` when nobody here counts them.
    pub(super) fn in_flight(&self, instance: InstanceId) -> Option<u64> {
        self.proxy.as_ref().map(|proxy| proxy.in_flight(instance))
    }

    /// A process has ended: nothing more is sent to it, before anything is decided.
    pub(super) fn exited(&mut self, instance: InstanceId, epoch: u64) {
        if let Some(proxy) = &self.proxy {
            proxy.local_gone(instance, epoch);
            self.told.remove(&instance);
        }
    }

    /// Which service each user of this host's services is: without cgroup2, callers are told by that.
    pub(super) fn tell_users(&self, reconciler: &Reconciler) {
        let Some(proxy) = &self.proxy else { return };
        let wanted = reconciler.supervisors().map(Supervisor::wanted).filter(|wanted| wanted.uid != 0);
        let users =
            wanted.filter_map(|wanted| Some((wanted.uid, wanted.manifest.as_ref()?.name.as_str().into())));
        proxy.users(users.collect());
    }

    /// Whom the services of this host, and what else runs here, can call from now on.
    pub(super) fn tell_directory(&self, directory: &DirectoryHandle, change: &DirectoryChange) {
        let Some(proxy) = &self.proxy else { return };
        // Hosts first: an endpoint whose host is not known is one that cannot be reached.
        if change.hosts {
            proxy.hosts(directory.read(Directory::hosts));
        }
        for name in &change.services {
            match directory.read(|known| known.service(name)) {
                Some(service) => proxy.put(Arc::new(service)),
                None => proxy.remove(name),
            }
        }
    }

    /// What has changed of this host's endpoints.
    pub(super) fn tell_proxy(&mut self, reconciler: &Reconciler) {
        // Until then the directory that the last agent wrote down is the better word: nearly all of it still runs.
        let Some(proxy) = self.proxy.as_ref().filter(|_| reconciler.is_keeper_known()) else { return };
        for one in reconciler.supervisors() {
            let (instance, epoch) = (one.instance(), one.key().epoch);
            let is_same = self
                .told
                .get(&instance)
                .is_some_and(|(of_epoch, word)| *of_epoch == epoch && word.is(one.endpoint(), one.ports()));
            if is_same {
                continue;
            }
            let word = LocalWord::new(one.endpoint(), one.ports());
            if let Some((before, _)) = self.told.insert(instance, (epoch, word.clone()))
                && before != epoch
            {
                proxy.local(service(one), instance, before, LocalWord::Gone);
            }
            proxy.local(service(one), instance, epoch, word);
        }
        self.told.retain(|instance, (epoch, _)| {
            let stays = reconciler.supervisor(*instance).is_some();
            if !stays {
                proxy.local_gone(*instance, *epoch);
            }
            stays
        });
    }

    /// The rest of them, who may hear of it when it is done.
    pub(super) fn tell_others(&self, reconciler: &Reconciler) {
        self.tell_firewall(reconciler);
        self.show(reconciler);
    }

    /// Whose port is whose. A turn compares some hundred numbers; only a change is acted upon, elsewhere.
    fn tell_firewall(&self, reconciler: &Reconciler) {
        let Some(firewall) = &self.firewall else { return };
        let mut guarded = Guarded::new();
        for one in reconciler.supervisors().filter(|one| !one.is_gone()) {
            let user = one.wanted().manifest.as_ref().map_or("", |manifest| manifest.user.as_str());
            let owner = Owner { user: user.to_owned(), uid: one.wanted().uid };
            for port in one.ports().values() {
                guarded.entry(*port).or_default().insert(owner.clone());
            }
        }
        firewall.send_if_modified(|before| {
            let is_news = before.as_ref() != Some(&guarded);
            if is_news {
                *before = Some(guarded);
            }
            is_news
        });
    }

    fn show(&self, reconciler: &Reconciler) {
        let (_, generation) = reconciler.generation();
        self.shown.generation.store(generation, Ordering::Relaxed);
        self.metrics.wanted_generation.set(i64::try_from(generation).unwrap_or(i64::MAX));
        let mut counts: BTreeMap<&'static str, i64> = STATES.map(|state| (state, 0)).into();
        for supervisor in reconciler.supervisors() {
            if let Some(state) = state_name(supervisor.state()) {
                *counts.entry(state).or_default() += 1;
            }
        }
        for (state, count) in counts {
            self.metrics.instances.get_or_create(&StateLabel { state }).set(count);
        }
    }
}

const STATES: [&str; 7] = ["pending", "starting", "running", "backing_off", "stopping", "exited", "failed"];

fn state_name(state: &State) -> Option<&'static str> {
    match state {
        State::Pending(_) => Some("pending"),
        State::Starting(
            Starting::PickingPorts
            | Starting::Preparing { .. }
            | Starting::PreStart { .. }
            | Starting::Spawning,
        ) => Some("starting"),
        State::Running(_) => Some("running"),
        State::BackingOff { .. } => Some("backing_off"),
        State::Stopping(_) => Some("stopping"),
        State::Exited { .. } => Some("exited"),
        State::Failed { .. } => Some("failed"),
        State::Gone => None,
    }
}
