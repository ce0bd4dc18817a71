//! Which endpoint a call goes to. One [`Balancer`] for each port of a service; every worker of the proxy picks from it
//! at once, so a pick takes no lock and waits for nobody: it reads one snapshot of the endpoints and their atomics.
//!
//! The choice: of two endpoints drawn by weight, the one whose expected time is lower, which is how long it takes to
//! answer (its recent peak, see `load`) times the calls it already has. Endpoints on this host are preferred as long as
//! they are not clearly slower. New ones get their share by and by. What fails is left alone (see `breaker`), but only
//! while at least half of the endpoints are good: below that the failures are the service's, and all are asked again,
//! except for those that cannot even be connected to. Nobody calls an endpoint that is gone; one that drains is called
//! only when nothing else is there.
//!
//! The proxy's table calls [`Balancer::update`] and [`Balancer::set_state`], one at a time; its engines the rest.

mod breaker;
mod budget;
mod choice;
mod endpoint;
mod load;
mod pick;
mod window;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use nave_proto::ids::{HostId, InstanceId};
use rand::Rng;

pub use breaker::BreakerSettings;
pub use budget::RetryBudget;
pub use pick::Pick;

use crate::Monotonic;
use crate::directory::EndpointState;
use breaker::Gate;
use endpoint::{Member, Shared, Snapshot, Standing};

/// One placement of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointKey {
    pub instance: InstanceId,
    pub epoch: u64,
}

/// How this host calls an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reach {
    /// It listens on this host.
    Local(SocketAddr),
    /// By the agent of its host.
    Remote { host: HostId, port: u16 },
}

/// An endpoint as the directory knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSpec {
    pub key: EndpointKey,
    pub reach: Reach,
    pub state: EndpointState,
    /// Its share relative to the others'; 1 is normal, 0 counts as 1.
    pub weight: u32,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ask<'a> {
    /// Endpoints that this call was tried on already; never picked.
    pub tried: &'a [EndpointKey],
    /// Equal values go to the same endpoint while it is there.
    pub hash: Option<u64>,
}

/// How a call ended, as far as the endpoint's health is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Success,
    /// It answered that it failed (5xx), or the connection broke in the middle.
    Failure,
    /// It has too much to do (429, RESOURCE_EXHAUSTED).
    Overloaded,
    /// It could not be connected to.
    Unreached,
    /// The caller went first: says nothing.
    Cancelled,
}

/// Why there is nothing to call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoPick {
    #[error("it has no instances")]
    Empty,
    #[error("none of its instances is ready")]
    NoneReady,
    /// `until`: when the first of them may be asked again, as far as known.
    #[error("all of its instances fail")]
    AllOut { until: Option<Monotonic> },
    #[error("all of its instances were tried")]
    AllTried,
}

/// How a balancer weighs.
#[derive(Debug, Clone, PartialEq)]
pub struct BalancerSettings {
    /// Taken for endpoints of which none has answered yet.
    pub default_rtt: Duration,
    /// Time constant with which an endpoint that is not asked is forgiven.
    pub decay: Duration,
    /// Time constant with which good answers outweigh a bad one.
    pub settle: Duration,
    /// How many times slower than another host's an endpoint of this host may be and still be preferred.
    pub local_preference: f32,
    /// How long a new endpoint's share grows from a tenth to the whole.
    pub slow_start: Duration,
    pub breaker: BreakerSettings,
    /// Differs between agents, so that they do not all probe at the same moment.
    pub seed: u64,
}

impl Default for BalancerSettings {
    fn default() -> Self {
        Self {
            default_rtt: Duration::from_millis(30),
            decay: Duration::from_secs(10),
            settle: Duration::from_millis(300),
            local_preference: 2.0,
            slow_start: Duration::from_secs(10),
            breaker: BreakerSettings::default(),
            seed: 0,
        }
    }
}

/// An endpoint as `nave status` and the metrics show it.
#[derive(Debug, Clone, PartialEq)]
pub struct EndpointView {
    pub spec: EndpointSpec,
    pub in_flight: u64,
    /// Of its answers; `None` before the first.
    pub rtt: Option<Duration>,
    /// Left alone because it fails.
    pub ejected: bool,
}

/// See the module's description.
#[derive(Debug)]
pub struct Balancer {
    pool: Arc<Pool>,
}

/// What outlives a snapshot.
#[derive(Debug)]
struct Pool {
    settings: BalancerSettings,
    snapshot: ArcSwap<Snapshot>,
    /// Fewer than half of the ready endpoints are good.
    panic: AtomicBool,
    ejections: AtomicU64,
}

impl Balancer {
    #[must_use]
    pub fn new(settings: BalancerSettings) -> Self {
        let pool = Pool {
            settings,
            snapshot: ArcSwap::default(),
            panic: AtomicBool::default(),
            ejections: AtomicU64::default(),
        };
        Self { pool: Arc::new(pool) }
    }

    /// The endpoints are now these. One that stays (same instance, epoch and address) keeps what is known of it, unless
    /// it was gone: a process that was started again is new. Not to be called by two at once.
    pub fn update(&self, now: Monotonic, specs: Vec<EndpointSpec>) {
        let before = self.pool.snapshot.load_full();
        let members = specs.into_iter().map(|spec| Arc::new(self.member(now, &before.members, spec)));
        self.pool.snapshot.store(Arc::new(Snapshot::new(members.collect())));
        self.pool.look_for_panic();
    }

    fn member(&self, now: Monotonic, before: &[Arc<Member>], spec: EndpointSpec) -> Member {
        let known = before.iter().find(|one| one.spec.key == spec.key && one.spec.reach == spec.reach);
        let known = known.filter(|one| one.shared.standing() != Standing::Gone);
        let shared = match known {
            Some(one) => {
                one.shared.stand(spec.state.into(), now);
                one.shared.clone()
            }
            None => {
                let pool = Arc::downgrade(&self.pool);
                // All that are there when the first word comes have been there before.
                let since = if before.is_empty() { Monotonic(i64::MIN) } else { now };
                Arc::new(Shared::new(pool, spec.state.into(), since))
            }
        };
        Member { spec, shared }
    }

    /// An endpoint's state changes right now, before the directory says so; `None`: it is gone. `false`: unknown.
    pub fn set_state(&self, now: Monotonic, key: EndpointKey, state: Option<EndpointState>) -> bool {
        let snapshot = self.pool.snapshot.load();
        let mut found = false;
        for member in snapshot.members.iter().filter(|one| one.spec.key == key) {
            member.shared.stand(state.map_or(Standing::Gone, Standing::from), now);
            found = true;
        }
        if found {
            self.pool.look_for_panic();
        }
        found
    }

    /// One endpoint for one try of a call.
    ///
    /// # Errors
    /// There is none, and why.
    pub fn pick(&self, now: Monotonic, rng: &mut impl Rng, ask: &Ask<'_>) -> Result<Pick, NoPick> {
        let snapshot = self.pool.snapshot.load();
        let scene = choice::Scene {
            snapshot: &snapshot,
            settings: &self.pool.settings,
            now,
            panic: self.pool.panic.load(Relaxed),
        };
        scene.choose(rng, ask).map(|chosen| Pick::begin(chosen.member.clone(), chosen.probe))
    }

    /// A ready endpoint of this host, for a call that was chosen to come here by another host's balancer: the named one,
    /// or when it is not ready, another. Whether it fails is judged where the choice is made.
    #[must_use]
    pub fn local(&self, key: EndpointKey) -> Option<Pick> {
        let snapshot = self.pool.snapshot.load();
        let ready = |one: &&Arc<Member>| one.shared.standing() == Standing::Ready;
        let locals = &snapshot.members[..snapshot.locals];
        let named = locals.iter().filter(ready).find(|one| one.spec.key == key);
        let chosen = named.or_else(|| locals.iter().filter(ready).min_by_key(|one| one.shared.in_flight()));
        chosen.map(|one| Pick::begin(one.clone(), None))
    }

    /// Calls under way to an instance, whatever its epoch.
    #[must_use]
    pub fn in_flight(&self, instance: InstanceId) -> u64 {
        let snapshot = self.pool.snapshot.load();
        let of_instance = snapshot.members.iter().filter(|one| one.spec.key.instance == instance);
        of_instance.map(|one| u64::from(one.shared.in_flight())).sum()
    }

    /// How many times an endpoint was left alone because it failed.
    #[must_use]
    pub fn ejections(&self) -> u64 {
        self.pool.ejections.load(Relaxed)
    }

    /// All endpoints as they stand.
    #[must_use]
    pub fn view(&self, now: Monotonic) -> Vec<EndpointView> {
        let settings = &self.pool.settings;
        let snapshot = self.pool.snapshot.load();
        let view = |one: &Arc<Member>| EndpointView {
            spec: EndpointSpec { state: one.shared.state(), ..one.spec.clone() },
            in_flight: u64::from(one.shared.in_flight()),
            rtt: one.shared.load.estimate(now, settings.decay).map(Duration::from_secs_f32),
            ejected: one.shared.breaker.gate() != Gate::Closed,
        };
        snapshot.members.iter().filter(|one| one.shared.standing() != Standing::Gone).map(view).collect()
    }
}

impl Pool {
    /// After each change of a state or a breaker, which are rare, so that no pick has to count.
    fn look_for_panic(&self) {
        let snapshot = self.snapshot.load();
        let ready = || snapshot.members.iter().filter(|one| one.shared.standing() == Standing::Ready);
        let good = ready().filter(|one| one.shared.breaker.gate() == Gate::Closed).count();
        self.panic.store(good * 2 < ready().count(), Relaxed);
    }

    fn ejected(&self) {
        self.ejections.fetch_add(1, Relaxed);
        self.look_for_panic();
    }
}

/// A balancer that was dropped has nothing to hear.
fn with_pool(pool: &Weak<Pool>, then: impl FnOnce(&Pool)) {
    if let Some(pool) = pool.upgrade() {
        then(&pool);
    }
}

#[cfg(test)]
mod tests;
