//! What has changed in the agents' directory, for thousands of sessions at once.
//!
//! Each session holds a place (a revision) and an interest; this holds bounded rings of (revision, what changed), one of
//! endpoints and one of services and hosts, and only of what agents are shown: a print per service, instance and host tells that a change shows nothing new. A
//! session that is woken collects the ids behind its place, looks them up in the state and sends what it finds, so what
//! changed twice is told once; one whose place has left the ring is told the whole.
//!
//! Telling every endpoint to every agent costs hosts × endpoints messages for a restart of everything: 5,000 hosts and
//! 100,000 instances would be 5 × 10^8. So beyond [`EVERYTHING_MAX`] an agent is told every service, which are few, and
//! the endpoints of those that it names; a change of an endpoint wakes the sessions that have named its service, and no
//! others.
//!
//! It also knows which agents have yet to say that they have taken a draining endpoint ([`Directory::standing`]).
//!
//! Written to under the state's write lock, so whoever holds the state's read lock finds both at one revision.

mod sessions;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nave_orchestrator_core::{
    Change, ClusterState, RowId, endpoint_print, host_print, is_draining, service_print,
};
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use parking_lot::Mutex;
use tokio::sync::Notify;

use sessions::Sessions;
pub(crate) use sessions::{LogSessions, Standing};

/// Changes kept: 40 bytes each, 2.5 MiB. A rolling update of 20,000 instances stays in it.
const ITEMS_MAX: usize = 65_536;
/// Hosts × endpoints up to which every agent is told every endpoint: a message costs a member some 20 µs, so a restart
/// of everything costs 20 s of CPU, spread over the members; each agent then knows at most 1,000,000 / hosts endpoints.
const EVERYTHING_MAX: usize = 1_000_000;
/// Below it they are told everything again; between the two it stays as it is.
const EVERYTHING_AGAIN: usize = 800_000;
/// Changes of this time travel together, at least.
const COALESCE: Duration = Duration::from_millis(10);
/// With many sessions more travels together, so that telling everybody takes half of one core at most: 25 µs each.
const COALESCE_PER_SEAT: Duration = Duration::from_micros(50);
/// A death must be known on other hosts within 100 ms.
const COALESCE_MAX: Duration = Duration::from_millis(80);
/// A new service has no callers that wait for it, and everybody is told.
const COALESCE_SERVICES_PER_SEAT: Duration = Duration::from_micros(500);
const COALESCE_SERVICES_MAX: Duration = Duration::from_secs(1);

/// Wakes one session.
#[derive(Debug, Default)]
struct Bell {
    rung: Notify,
    urgent: AtomicBool,
}

/// What has changed behind a session's place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum News {
    Changes(Changed),
    /// Its place has left the ring, or agents are told more, or less, than they were.
    Whole,
}

/// What to look up in the state.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changed {
    pub(crate) services: BTreeSet<Arc<str>>,
    pub(crate) endpoints: BTreeSet<InstanceId>,
    pub(crate) hosts: BTreeSet<HostId>,
}

/// Where a session stands: all up to `revision` has been told, in the mode of this number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) revision: u64,
    pub(crate) mode: u64,
}

/// A session as it begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Opened {
    /// Its own on this member, never used before.
    pub(crate) number: u64,
    pub(crate) host: HostId,
    /// Its number in the log.
    pub(crate) session: u64,
    /// What its agent knows from before; nothing: it has to be told everything.
    pub(crate) known: Option<Known>,
}

/// What an agent has been told in an earlier session, of this history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) revision: u64,
    /// The endpoints of every service, not only of those that it named.
    pub(crate) everything: bool,
}

/// What every session looks at.
#[derive(Debug, Clone)]
enum Common {
    Service(Arc<str>),
    Host(HostId),
}

/// The newest changes of one kind.
#[derive(Debug)]
struct Recent<T> {
    items: VecDeque<(u64, T)>,
    max: usize,
    /// Every change with a greater revision that was ever applied is here; `None` before the first.
    complete_after: Option<u64>,
}

impl<T> Recent<T> {
    fn bounded(max: usize) -> Self {
        Self { items: VecDeque::new(), max, complete_after: None }
    }

    fn restart(&mut self, revision: u64) {
        self.items.clear();
        self.complete_after = Some(revision);
    }

    fn push(&mut self, revision: u64, item: T) {
        self.items.push_back((revision, item));
    }

    /// A revision is kept or forgotten as a whole, else a reader could see half of one.
    fn forget_oldest(&mut self) {
        while self.items.len() > self.max {
            let Some(oldest) = self.items.front().map(|(revision, _)| *revision) else { return };
            while self.items.front().is_some_and(|(revision, _)| *revision == oldest) {
                self.items.pop_front();
            }
            self.complete_after = Some(oldest);
        }
    }

    /// Whether all after a revision are here.
    fn reaches(&self, revision: u64) -> bool {
        self.complete_after.is_some_and(|complete_after| revision >= complete_after)
    }

    /// Those after a revision; `None`: some of them are gone.
    fn after(&self, revision: u64) -> Option<impl Iterator<Item = &T> + '_> {
        if !self.reaches(revision) {
            return None;
        }
        let from = self.items.partition_point(|(at, _)| *at <= revision);
        Some(self.items.range(from..).map(|(_, item)| item))
    }
}

#[derive(Debug)]
struct Shown {
    print: u64,
    service: Arc<str>,
}

#[derive(Debug)]
struct SeatEntry {
    host: HostId,
    /// Its number in the log.
    session: u64,
    bell: Arc<Bell>,
    interest: BTreeSet<Arc<str>>,
    /// The agent has said that it has taken everything up to here.
    taken: u64,
    /// Newest revision at which something began to drain that it must take.
    drain: u64,
    /// First change of an endpoint that it has named since it last looked; not kept while everything is told.
    touched: Option<u64>,
}

impl SeatEntry {
    fn owes(&self) -> bool {
        self.drain > self.taken
    }

    fn must_take(&mut self, revision: u64) {
        if !self.owes() {
            self.taken = self.taken.max(revision.saturating_sub(1));
        }
        self.drain = self.drain.max(revision);
    }
}

/// Bells to be rung once the state is free again.
#[derive(Debug, Default)]
struct ToRing {
    all: bool,
    all_urgently: bool,
    services: BTreeSet<Arc<str>>,
}

#[derive(Debug)]
struct Index {
    changed_endpoints: Recent<(InstanceId, Arc<str>)>,
    changed_common: Recent<Common>,
    applied: u64,
    services: HashMap<Arc<str>, u64>,
    endpoints: HashMap<InstanceId, Shown>,
    hosts: HashMap<HostId, u64>,
    everything: bool,
    everything_max: usize,
    everything_again: usize,
    /// Rises when `everything` changes.
    mode: u64,
    seats: BTreeMap<u64, SeatEntry>,
    interested: HashMap<Arc<str>, BTreeSet<u64>>,
    to_ring: ToRing,
    /// Newest revision that is not taken by all until somebody says so.
    drained: u64,
    sessions: Sessions,
    /// The log has another session than before.
    moved: bool,
}

/// The directory of one member.
#[derive(Debug)]
pub(crate) struct Directory {
    index: Mutex<Index>,
    /// Notified when all that drains has been taken by all agents here.
    settled: Notify,
    /// Notified when another agent has a session, here or elsewhere.
    moved: Notify,
}

/// A session's place among the others, until it is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    directory: Arc<Directory>,
    number: u64,
    bell: Arc<Bell>,
}

impl Default for Directory {
    fn default() -> Self {
        Self::bounded(ITEMS_MAX, EVERYTHING_MAX, EVERYTHING_AGAIN)
    }
}

impl Directory {
    pub(super) fn bounded(items_max: usize, everything_max: usize, everything_again: usize) -> Self {
        let index = Index {
            changed_endpoints: Recent::bounded(items_max),
            changed_common: Recent::bounded(items_max),
            applied: 0,
            services: HashMap::new(),
            endpoints: HashMap::new(),
            hosts: HashMap::new(),
            everything: true,
            everything_max,
            everything_again,
            mode: 1,
            seats: BTreeMap::new(),
            interested: HashMap::new(),
            to_ring: ToRing::default(),
            drained: 0,
            sessions: Sessions::default(),
            moved: false,
        };
        Self { index: Mutex::new(index), settled: Notify::new(), moved: Notify::new() }
    }

    /// Opens a session's seat. With it comes the place from which its agent is told on; nothing: from the beginning.
    pub(crate) fn seat(self: &Arc<Self>, opened: Opened) -> (Seat, Option<Place>) {
        let bell = Arc::new(Bell::default());
        let place = self.index.lock().open(opened, Arc::clone(&bell));
        // An agent that owes nothing has no word to say at which this would be said.
        self.moved.notify_one();
        (Seat { directory: Arc::clone(self), number: opened.number, bell }, place)
    }

    /// How far the agents with a session here have taken the directory.
    pub(crate) fn standing(&self) -> Standing {
        self.index.lock().standing()
    }

    /// The sessions that there are.
    pub(crate) fn sessions(&self) -> LogSessions {
        let index = self.index.lock();
        index.sessions.as_of(index.applied)
    }

    /// Waits until another agent has a session, here or elsewhere. Cancel-safe; for one waiter.
    pub(crate) async fn moved(&self) {
        self.moved.notified().await;
    }

    /// Waits until all that drains has been taken by all agents here. Cancel-safe; for one waiter.
    pub(crate) async fn settled(&self) {
        self.settled.notified().await;
    }

    pub(super) fn applied(&self, revision: u64, changes: &[Change]) {
        self.index.lock().apply(revision, changes);
    }

    /// The state is free again: wakes whom the changes concern.
    pub(super) fn ring(&self) {
        let mut index = self.index.lock();
        index.ring_bells();
        // What concerns nobody here is taken already.
        index.note_settled(&self.settled);
        if std::mem::take(&mut index.moved) {
            self.moved.notify_one();
        }
    }

    pub(super) fn restart(&self, state: &ClusterState) {
        let mut index = self.index.lock();
        index.restart(state);
        index.ring_bells();
        self.moved.notify_one();
    }
}

impl Index {
    fn open(&mut self, opened: Opened, bell: Arc<Bell>) -> Option<Place> {
        let Opened { number, host, session, known } = opened;
        let place = known.and_then(|known| self.resume(known));
        // What an agent knows that begins anew may be anything: it owes the first whole. What began to drain behind a
        // place that is gone on from is not kept, so all up to here is owed.
        let (taken, drain) = place.map_or((0, 1), |place| (place.revision, self.applied.max(place.revision)));
        let entry = SeatEntry { host, session, bell, interest: BTreeSet::new(), taken, drain, touched: None };
        if entry.owes() {
            self.drained = self.drained.max(drain);
        }
        self.seats.insert(number, entry);
        place
    }

    /// Where an agent stands that knows this, if everything since can be told.
    fn resume(&self, known: Known) -> Option<Place> {
        let Known { revision, everything } = known;
        let is_known = everything == self.everything
            && self.changed_common.reaches(revision)
            && (!everything || self.changed_endpoints.reaches(revision));
        is_known.then_some(Place { revision, mode: self.mode })
    }

    fn floor(&self) -> u64 {
        let owing = self.seats.values().filter(|seat| seat.owes() && !self.is_void(seat));
        owing.map(|seat| seat.taken).min().unwrap_or(self.applied)
    }

    /// The log has gone on without it: its agent has another session, or none.
    fn is_void(&self, seat: &SeatEntry) -> bool {
        self.applied >= seat.session && self.sessions.of(seat.host) != Some(seat.session)
    }

    fn standing(&self) -> Standing {
        let is_current = |seat: &&SeatEntry| self.sessions.of(seat.host) == Some(seat.session);
        let sessions = self.seats.values().filter(is_current).count();
        Standing {
            taken: self.floor(),
            as_of: self.applied,
            sessions: u64::try_from(sessions).unwrap_or(u64::MAX),
        }
    }

    /// Says so once when all that drains has been taken.
    fn note_settled(&mut self, settled: &Notify) {
        if self.drained != 0 && self.floor() >= self.drained {
            self.drained = 0;
            settled.notify_one();
        }
    }

    fn restart(&mut self, state: &ClusterState) {
        self.applied = state.revision();
        self.services.clear();
        self.endpoints.clear();
        self.hosts.clear();
        for record in state.services() {
            self.put_service(record);
        }
        for record in state.hosts() {
            self.put_host(record);
        }
        for record in state.instances() {
            self.put_endpoint(record);
        }
        self.sessions.restart(self.applied, state.sessions());
        self.changed_endpoints.restart(self.applied);
        self.changed_common.restart(self.applied);
        // Places in the history before are no places in this one.
        self.mode += 1;
        self.choose_mode();
        let revision = self.applied;
        self.seats.values_mut().for_each(|seat| seat.must_take(revision));
        self.to_ring.all_urgently = true;
    }

    fn apply(&mut self, revision: u64, changes: &[Change]) {
        self.changed_endpoints.complete_after.get_or_insert(revision.saturating_sub(1));
        self.changed_common.complete_after.get_or_insert(revision.saturating_sub(1));
        self.applied = revision;
        let mut draining: BTreeSet<Arc<str>> = BTreeSet::new();
        for change in changes {
            match change {
                Change::Service(record) => self.put_service(record),
                Change::Host(record) => self.put_host(record),
                Change::Instance(record) => {
                    let is_news = self.put_endpoint(record);
                    if is_news && is_draining(record) {
                        draining.insert(self.name(&record.service));
                    }
                }
                Change::Deleted(RowId::Service(name)) => self.remove_service(name),
                Change::Deleted(RowId::Instance(id)) => self.remove_endpoint(*id),
                Change::Deleted(RowId::Host(id)) => {
                    self.hosts.remove(id);
                }
                Change::Session(record) => self.moved |= self.sessions.put(revision, record),
                Change::Deleted(RowId::Session(host)) => self.moved |= self.sessions.remove(revision, *host),
                _ => {}
            }
        }
        self.changed_endpoints.forget_oldest();
        self.changed_common.forget_oldest();
        self.choose_mode();
        if !draining.is_empty() {
            self.must_take(revision, &draining);
        }
    }

    /// One copy of each name.
    fn name(&self, name: &str) -> Arc<str> {
        match self.services.get_key_value(name) {
            Some((name, _)) => Arc::clone(name),
            None => name.into(),
        }
    }

    fn put_service(&mut self, record: &pb::ServiceRecord) {
        let Some(print) = service_print(record) else { return self.remove_service(&record.name) };
        let name = self.name(&record.name);
        if self.services.insert(Arc::clone(&name), print) != Some(print) {
            self.changed_common.push(self.applied, Common::Service(name));
            self.to_ring.all = true;
        }
    }

    fn remove_service(&mut self, name: &str) {
        if let Some((name, _)) = self.services.remove_entry(name) {
            self.changed_common.push(self.applied, Common::Service(name));
            self.to_ring.all = true;
        }
    }

    fn put_host(&mut self, record: &pb::HostRecord) {
        let (id, print) = (HostId(record.id), host_print(record));
        // A host is told with the first endpoint on it, so a new one is no news.
        if self.hosts.insert(id, print).is_some_and(|before| before != print) {
            self.changed_common.push(self.applied, Common::Host(id));
            self.to_ring.all_urgently = true;
        }
    }

    /// Returns whether it shows anything new.
    fn put_endpoint(&mut self, record: &pb::InstanceRecord) -> bool {
        let id = InstanceId(record.id);
        let Some(print) = endpoint_print(record) else {
            self.remove_endpoint(id);
            return false;
        };
        if let Some(shown) = self.endpoints.get_mut(&id) {
            if shown.print == print {
                return false;
            }
            shown.print = print;
            let service = Arc::clone(&shown.service);
            self.changed(id, service);
            return true;
        }
        let service = self.name(&record.service);
        self.endpoints.insert(id, Shown { print, service: Arc::clone(&service) });
        self.changed(id, service);
        true
    }

    fn remove_endpoint(&mut self, id: InstanceId) {
        if let Some(shown) = self.endpoints.remove(&id) {
            self.changed(id, shown.service);
        }
    }

    fn changed(&mut self, id: InstanceId, service: Arc<str>) {
        if self.everything {
            self.to_ring.all_urgently = true;
        } else {
            for number in self.interested.get(&service).into_iter().flatten() {
                if let Some(seat) = self.seats.get_mut(number) {
                    seat.touched.get_or_insert(self.applied);
                }
            }
            self.to_ring.services.insert(Arc::clone(&service));
        }
        self.changed_endpoints.push(self.applied, (id, service));
    }

    fn choose_mode(&mut self) {
        let told = self.hosts.len().saturating_mul(self.endpoints.len());
        let everything = match self.everything {
            true => told <= self.everything_max,
            false => told < self.everything_again,
        };
        if everything != self.everything {
            self.everything = everything;
            self.mode += 1;
            // Not at once: it may flip in the middle of a burst, and nobody waits for it.
            self.to_ring.all = true;
        }
    }

    fn must_take(&mut self, revision: u64, services: &BTreeSet<Arc<str>>) {
        self.drained = revision;
        if self.everything {
            self.seats.values_mut().for_each(|seat| seat.must_take(revision));
            return;
        }
        for number in services.iter().filter_map(|service| self.interested.get(service)).flatten() {
            if let Some(seat) = self.seats.get_mut(number) {
                seat.must_take(revision);
            }
        }
    }

    fn ring_bells(&mut self) {
        let ToRing { all, all_urgently, services } = std::mem::take(&mut self.to_ring);
        if all || all_urgently {
            self.seats.values().for_each(|seat| seat.bell.ring(all_urgently));
        }
        if !all_urgently {
            for number in services.iter().filter_map(|service| self.interested.get(service)).flatten() {
                if let Some(seat) = self.seats.get(number) {
                    seat.bell.ring(true);
                }
            }
        }
    }

    fn news(&mut self, number: u64, place: Option<Place>) -> News {
        let touched = self.seats.get_mut(&number).and_then(|seat| seat.touched.take());
        let Some(place) = place.filter(|place| place.mode == self.mode) else { return News::Whole };
        // Where nothing has touched what it has named, there is nothing to look through.
        let endpoints_after = match self.everything {
            true => Some(place.revision),
            false => touched.map(|first| first.saturating_sub(1)),
        };
        let mut changed = Changed::default();
        let Some(common) = self.changed_common.after(place.revision) else { return News::Whole };
        for item in common {
            match item {
                Common::Service(name) => changed.services.insert(Arc::clone(name)),
                Common::Host(id) => changed.hosts.insert(*id),
            };
        }
        if let Some(after) = endpoints_after {
            let seat = self.seats.get(&number);
            let wants =
                |service: &str| self.everything || seat.is_some_and(|seat| seat.interest.contains(service));
            let Some(endpoints) = self.changed_endpoints.after(after) else { return News::Whole };
            changed.endpoints.extend(endpoints.filter(|(_, service)| wants(service)).map(|(id, _)| *id));
        }
        News::Changes(changed)
    }

    fn set_interest(&mut self, number: u64, names: impl IntoIterator<Item = String>) -> Vec<Arc<str>> {
        let interest: BTreeSet<Arc<str>> = names.into_iter().map(|name| self.name(&name)).collect();
        let Some(seat) = self.seats.get_mut(&number) else { return Vec::new() };
        let before = std::mem::replace(&mut seat.interest, interest.clone());
        for gone in before.difference(&interest) {
            if let Some(seats) = self.interested.get_mut(gone) {
                seats.remove(&number);
                if seats.is_empty() {
                    self.interested.remove(gone);
                }
            }
        }
        let added: Vec<Arc<str>> = interest.difference(&before).cloned().collect();
        for name in &added {
            self.interested.entry(Arc::clone(name)).or_default().insert(number);
        }
        added
    }
}

impl Bell {
    fn ring(&self, urgent: bool) {
        if urgent {
            self.urgent.store(true, Ordering::Relaxed);
        }
        self.rung.notify_one();
    }
}

impl Seat {
    /// Waits until something has changed that the agent may have to be told; returns for how long more is gathered.
    /// Cancel-safe; for one waiter.
    pub(crate) async fn rung(&self) -> Duration {
        self.bell.rung.notified().await;
        let urgent = self.bell.urgent.swap(false, Ordering::Relaxed);
        let seats = u32::try_from(self.directory.index.lock().seats.len()).unwrap_or(u32::MAX);
        let (each, most) = match urgent {
            true => (COALESCE_PER_SEAT, COALESCE_MAX),
            false => (COALESCE_SERVICES_PER_SEAT, COALESCE_SERVICES_MAX),
        };
        each.saturating_mul(seats).clamp(COALESCE, most)
    }

    /// What has changed behind a place. Whoever holds the state's read lock finds there what this speaks of.
    pub(crate) fn news(&self, place: Option<Place>) -> News {
        self.directory.index.lock().news(self.number, place)
    }

    /// Where a session stands that is told all there is now, and whether that is everything.
    pub(crate) fn here(&self) -> (Place, bool) {
        let index = self.directory.index.lock();
        (Place { revision: index.applied, mode: index.mode }, index.everything)
    }

    /// The services whose endpoints the agent has to know; returns those that it had not named before.
    pub(crate) fn set_interest(&self, names: impl IntoIterator<Item = String>) -> Vec<Arc<str>> {
        self.directory.index.lock().set_interest(self.number, names)
    }

    pub(crate) fn interest(&self) -> BTreeSet<Arc<str>> {
        self.directory
            .index
            .lock()
            .seats
            .get(&self.number)
            .map(|seat| seat.interest.clone())
            .unwrap_or_default()
    }

    /// The agent has to say when it has taken what it is told now.
    pub(crate) fn owes(&self) -> bool {
        self.directory.index.lock().seats.get(&self.number).is_some_and(SeatEntry::owes)
    }

    /// The agent has taken everything up to a revision that it was told.
    pub(crate) fn taken(&self, revision: u64) {
        let mut index = self.directory.index.lock();
        if let Some(seat) = index.seats.get_mut(&self.number) {
            seat.taken = seat.taken.max(revision);
        }
        index.note_settled(&self.directory.settled);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut index = self.directory.index.lock();
        index.set_interest(self.number, []);
        index.seats.remove(&self.number);
        index.note_settled(&self.directory.settled);
    }
}

#[cfg(test)]
mod tests;
