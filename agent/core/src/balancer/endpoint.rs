//! One endpoint: what the directory says of it, and what its calls have shown.

use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use super::breaker::Breaker;
use super::load::Load;
use super::{BalancerSettings, EndpointSpec, Pool, Reach};
use crate::Monotonic;
use crate::directory::EndpointState;

/// All endpoints at one moment.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    /// Those of this host first.
    pub(super) members: Vec<Arc<Member>>,
    pub(super) locals: usize,
    pub(super) weight_max: u32,
}

impl Snapshot {
    pub(super) fn new(mut members: Vec<Arc<Member>>) -> Self {
        members.sort_by_key(|one| !one.is_local());
        let locals = members.iter().take_while(|one| one.is_local()).count();
        let weight_max = members.iter().map(|one| one.spec.weight).max().unwrap_or_default().max(1);
        Self { members, locals, weight_max }
    }
}

/// In one snapshot.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) spec: EndpointSpec,
    pub(super) shared: Arc<Shared>,
}

/// Over all snapshots, and in every pick.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) pool: Weak<Pool>,
    pub(super) load: Load,
    pub(super) breaker: Breaker,
    standing: AtomicU8,
    in_flight: AtomicU32,
    /// When its share began to grow.
    ready_since: AtomicI64,
}

/// The directory's state, or gone: its process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Standing {
    Starting = 0,
    Ready = 1,
    Draining = 2,
    Gone = 3,
}

impl From<EndpointState> for Standing {
    fn from(state: EndpointState) -> Self {
        match state {
            EndpointState::Starting => Self::Starting,
            EndpointState::Ready => Self::Ready,
            EndpointState::Draining => Self::Draining,
        }
    }
}

impl Shared {
    pub(super) fn new(pool: Weak<Pool>, standing: Standing, ready_since: Monotonic) -> Self {
        Self {
            pool,
            load: Load::default(),
            breaker: Breaker::default(),
            standing: AtomicU8::new(standing as u8),
            in_flight: AtomicU32::default(),
            ready_since: AtomicI64::new(ready_since.0),
        }
    }

    pub(super) fn standing(&self) -> Standing {
        match self.standing.load(Relaxed) {
            0 => Standing::Starting,
            1 => Standing::Ready,
            2 => Standing::Draining,
            _ => Standing::Gone,
        }
    }

    /// For show; one that is gone is no longer shown.
    pub(super) fn state(&self) -> EndpointState {
        match self.standing() {
            Standing::Starting => EndpointState::Starting,
            Standing::Ready => EndpointState::Ready,
            Standing::Draining | Standing::Gone => EndpointState::Draining,
        }
    }

    pub(super) fn stand(&self, standing: Standing, now: Monotonic) {
        let before = self.standing();
        self.standing.store(standing as u8, Relaxed);
        if standing == Standing::Ready && before != Standing::Ready {
            self.begin_slowly(now);
        }
    }

    pub(super) fn begin_slowly(&self, now: Monotonic) {
        self.ready_since.store(now.0, Relaxed);
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    pub(super) fn enter(&self) {
        self.in_flight.fetch_add(1, Relaxed);
    }

    pub(super) fn leave(&self) {
        self.in_flight.fetch_sub(1, Relaxed);
    }
}

impl Member {
    fn is_local(&self) -> bool {
        match self.spec.reach {
            Reach::Local(_) => true,
            Reach::Remote { .. } => false,
        }
    }

    /// Its share by weight and newness, 1 being normal.
    pub(super) fn share(&self, now: Monotonic, settings: &BalancerSettings) -> f32 {
        let weight = self.spec.weight.max(1) as f32;
        let since = Monotonic(self.shared.ready_since.load(Relaxed));
        let grown = now.since(since).as_secs_f32() / settings.slow_start.as_secs_f32().max(1e-3);
        weight * grown.clamp(0.1, 1.0)
    }
}
