//! A person's watch: the state as of a revision, then every change, in order, each once.
//!
//! A feed is pulled by its connection, so a slow reader holds a place in the ring and nothing else. It takes the
//! changes that are there in one go, waits a little for more under churn, and says every five seconds where it
//! stands. Two kinds: everything (services, instances, hosts, events; or one service's), and events only.
//!
//! A `Service` item is sent when its record changes; its counts are as of sending. Who follows the counts more
//! closely counts the instances, whose every change is sent.

use std::collections::{BTreeSet, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, stream};
use nave_orchestrator_core::{Change, ClusterState, RowId};
use nave_proto::ids::{ClusterId, HostId, InstanceId};
use nave_proto::pb;
use pb::watch_item::Item;
use prost::Message as _;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::Status;

use crate::api::{Hub, convert, errors};
use crate::watch::Read;

/// How often a watcher hears from us when nothing changes.
const PROGRESS: Duration = Duration::from_secs(5);
/// Under churn, changes of this time travel together.
const COALESCE: Duration = Duration::from_millis(10);
/// Changes taken from the ring at once: what the ring's lock is held for stays below a millisecond.
const CHANGES_AT_ONCE: usize = 512;
/// A message is closed when it has grown to this; with a last item of 64 KiB it stays far below tonic's 4 MiB.
const MESSAGE_BYTES: usize = 512 * 1024;

/// What `Watch` answers with.
pub(crate) type FeedStream = Pin<Box<dyn Stream<Item = Result<pb::WatchResponse, Status>> + Send>>;

/// Begins a feed where the request says.
pub(crate) fn open(hub: &Arc<Hub>, request: pb::WatchRequest) -> Result<FeedStream, Status> {
    let feed = Feed::new(hub.clone(), request)?;
    Ok(Box::pin(stream::unfold(feed, |mut feed| async move { feed.next().await.map(|item| (item, feed)) })))
}

/// What a feed is about.
#[derive(Debug)]
struct Interest {
    service: Option<String>,
    host: Option<HostId>,
    events_only: bool,
    /// Instances of `service` that were shown: a deletion names the instance only.
    shown: BTreeSet<InstanceId>,
}

impl Interest {
    fn wants(&mut self, change: &Change) -> bool {
        if self.events_only {
            return matches!(change, Change::Event(event) if self.wants_event(event));
        }
        let Some(service) = &self.service else { return true };
        match change {
            Change::Service(record) => record.name == *service,
            Change::Event(record) => record.service == *service,
            Change::Instance(record) => {
                record.service == *service && {
                    self.shown.insert(InstanceId(record.id));
                    true
                }
            }
            Change::Deleted(RowId::Service(name)) => name == service,
            Change::Deleted(RowId::Instance(id)) => self.shown.remove(id),
            Change::Deleted(_) | Change::Host(_) | Change::Version(_) => false,
            Change::Token(_) | Change::Dedup(_) | Change::Cluster(_) | Change::Session(_) => false,
        }
    }

    fn wants_event(&self, event: &pb::EventRecord) -> bool {
        self.service.as_ref().is_none_or(|service| event.service == *service)
            && self.host.is_none_or(|host| event.host_id == host.0)
    }

    /// The records of the whole state that are wanted, shared and not yet converted.
    fn whole(&mut self, state: &ClusterState) -> VecDeque<(u64, Change)> {
        let services = state.services().cloned().map(Change::Service);
        let hosts = state.hosts().cloned().map(Change::Host);
        let instances = state.instances().cloned().map(Change::Instance);
        self.shown.clear();
        let all: Vec<Change> = match &self.service {
            None => hosts.chain(services).chain(instances).collect(),
            Some(name) => {
                let service = state.service(name).cloned().map(Change::Service);
                service.into_iter().chain(state.instances_of(name).cloned().map(Change::Instance)).collect()
            }
        };
        all.into_iter().filter(|change| self.wants(change)).map(|change| (0, change)).collect()
    }

    /// Events after a revision that the state still has.
    fn missed_events(&self, state: &ClusterState, after: u64) -> VecDeque<(u64, Change)> {
        let events = state.events_after(after).filter(|event| self.wants_event(event));
        events.map(|event| (event.revision, Change::Event(event.clone()))).collect()
    }
}

/// How the messages that carry `pending` are marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Changes after the cursor.
    Following,
    /// The whole state; the first message says `reset`, the last `synced`.
    Whole { first: bool },
}

struct Feed {
    hub: Arc<Hub>,
    interest: Interest,
    /// All up to here has been sent, or is in `pending`.
    cursor: u64,
    mode: Mode,
    pending: VecDeque<(u64, Change)>,
    changed: watch::Receiver<u64>,
    next_progress: Instant,
}

impl Feed {
    fn new(hub: Arc<Hub>, request: pb::WatchRequest) -> Result<Self, Status> {
        let state = hub.raft.state();
        let host = match request.host.as_str() {
            "" => None,
            _ if !request.events_only => {
                return Err(errors::invalid_field("host", "is for events_only; leave it out"));
            }
            // A host that is gone still has its history.
            name => match convert::find_host(&state, name).or_else(|| name.parse().ok()) {
                Some(host) => Some(host),
                None => return Err(errors::no_host(name)),
            },
        };
        let interest = Interest {
            service: (!request.service.is_empty()).then_some(request.service),
            host,
            events_only: request.events_only,
            shown: BTreeSet::new(),
        };
        let incarnation = state.cluster().map_or(0, |cluster| cluster.incarnation);
        let resume = request.resume.filter(|resume| is_ours(resume, hub.cluster, incarnation));
        let mut feed = Self {
            changed: hub.changes.subscribe(),
            interest,
            cursor: resume.as_ref().map_or(state.revision(), |resume| resume.revision),
            mode: Mode::Following,
            pending: VecDeque::new(),
            next_progress: Instant::now(),
            hub: hub.clone(),
        };
        match resume {
            // A deletion names the instance only, so what was shown before has to be guessed: all there is now and
            // all that the ring still knows to have been.
            Some(_) => feed.remember_shown(&state),
            None if feed.interest.events_only => feed.mode = Mode::Whole { first: false },
            None => feed.begin_whole(&state, None),
        }
        drop(state);
        Ok(feed)
    }

    fn remember_shown(&mut self, state: &ClusterState) {
        let Some(service) = &self.interest.service else { return };
        self.interest.shown = state.instances_of(service).map(|record| InstanceId(record.id)).collect();
        let mut gone = BTreeSet::new();
        // Instances deleted since the cursor are no longer in the state: they are let through, and a watcher that
        // never saw one is told of a deletion that does not concern it, which does no harm.
        self.hub.changes.read(self.cursor, usize::MAX, |change| {
            if let Change::Deleted(RowId::Instance(id)) = change {
                gone.insert(*id);
            }
            false
        });
        self.interest.shown.append(&mut gone);
    }

    /// Everything anew, and the events missed since `after`, as far as they are kept.
    fn begin_whole(&mut self, state: &ClusterState, after: Option<u64>) {
        self.mode = Mode::Whole { first: true };
        self.cursor = state.revision();
        self.pending = if self.interest.events_only { VecDeque::new() } else { self.interest.whole(state) };
        if let Some(after) = after {
            self.pending.append(&mut self.interest.missed_events(state, after));
        }
    }

    /// The next message; nothing when the member stops.
    async fn next(&mut self) -> Option<Result<pb::WatchResponse, Status>> {
        loop {
            if self.hub.stop.is_cancelled() {
                return None;
            }
            if !self.pending.is_empty() || self.mode != Mode::Following {
                return Some(Ok(self.message()));
            }
            // Marked as seen before reading, so that what comes between is not slept through.
            self.changed.mark_unchanged();
            self.collect();
            if !self.pending.is_empty() || self.mode != Mode::Following {
                continue;
            }
            tokio::select! {
                () = self.hub.stop.cancelled() => return None,
                changed = self.changed.changed() => {
                    if changed.is_err() {
                        return None;
                    }
                    tokio::time::sleep(COALESCE).await;
                }
                () = tokio::time::sleep_until(self.next_progress) => return Some(Ok(self.message())),
            }
        }
    }

    /// Takes what is in the ring behind the cursor, or the whole state when that is no longer complete.
    fn collect(&mut self) {
        let Self { hub, interest, .. } = self;
        match hub.changes.read(self.cursor, CHANGES_AT_ONCE, |change| interest.wants(change)) {
            Read::Changes { changes, upto } => {
                self.pending = changes.into();
                self.cursor = upto;
            }
            Read::FellOut => {
                let hub = self.hub.clone();
                let state = hub.raft.state();
                let after = self.cursor;
                self.begin_whole(&state, Some(after));
            }
        }
    }

    /// As much of what is pending as fits one message. A revision is never torn, so every cursor is a place to
    /// resume from; of the whole state only the last message has one.
    fn message(&mut self) -> pb::WatchResponse {
        let mut items = Vec::new();
        let mut bytes = 0;
        let mut last = None;
        let state = self.hub.raft.state();
        while let Some((revision, _)) = self.pending.front() {
            let torn = self.mode == Mode::Following && last == Some(*revision);
            if bytes >= MESSAGE_BYTES && !torn {
                break;
            }
            let Some((revision, change)) = self.pending.pop_front() else { break };
            last = Some(revision);
            if let Some(item) = item(&state, &change) {
                let item = pb::WatchItem { item: Some(item) };
                bytes += item.encoded_len();
                items.push(item);
            }
        }
        let incarnation = state.cluster().map_or(0, |cluster| cluster.incarnation);
        drop(state);
        self.next_progress = Instant::now() + PROGRESS;
        let done = self.pending.is_empty();
        let (reset, synced, revision) = match (self.mode, done, last) {
            (Mode::Whole { first }, true, _) => (first, true, Some(self.cursor)),
            (Mode::Whole { first }, false, _) => (first, false, None),
            (Mode::Following, false, Some(revision)) => (false, false, Some(revision)),
            (Mode::Following, _, _) => (false, false, Some(self.cursor)),
        };
        self.mode = match (self.mode, done) {
            (Mode::Whole { .. }, false) => Mode::Whole { first: false },
            (Mode::Whole { .. }, true) | (Mode::Following, _) => Mode::Following,
        };
        let cursor = revision.map(|revision| self.hub.cursor_at(incarnation, revision));
        pb::WatchResponse { cursor, reset, synced, items }
    }
}

/// A cursor of another cluster, or from before a restore, says nothing here.
fn is_ours(cursor: &pb::WatchCursor, cluster: ClusterId, incarnation: u64) -> bool {
    cursor.cluster_id.parse() == Ok(cluster) && cursor.incarnation == incarnation
}

fn item(state: &ClusterState, change: &Change) -> Option<Item> {
    match change {
        Change::Service(record) => Some(Item::Service(convert::service(state, record))),
        Change::Instance(record) => Some(Item::Instance(convert::instance(state, record))),
        Change::Host(record) => Some(Item::Host(convert::host(state, record))),
        Change::Event(record) => Some(Item::Event(convert::event(state, record))),
        Change::Deleted(RowId::Service(name)) => Some(Item::DeletedService(name.clone())),
        Change::Deleted(RowId::Instance(id)) => Some(Item::DeletedInstance(id.to_string())),
        Change::Deleted(RowId::Host(id)) => Some(Item::DeletedHost(id.to_string())),
        Change::Deleted(_) | Change::Version(_) | Change::Token(_) => None,
        Change::Dedup(_) | Change::Cluster(_) | Change::Session(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(id: u64, service: &str) -> Change {
        let service = service.to_owned();
        Change::Instance(Arc::new(pb::InstanceRecord { id, service, ..Default::default() }))
    }

    fn event(service: &str, host_id: u64) -> Change {
        let service = service.to_owned();
        Change::Event(Arc::new(pb::EventRecord { service, host_id, ..Default::default() }))
    }

    fn interest(service: Option<&str>, host: Option<u64>, events_only: bool) -> Interest {
        let service = service.map(str::to_owned);
        Interest { service, host: host.map(HostId), events_only, shown: BTreeSet::new() }
    }

    #[test]
    fn a_service_filter_lets_its_own_things_through() {
        let mut web = interest(Some("web"), None, false);
        let gone = |id| Change::Deleted(RowId::Instance(InstanceId(id)));
        assert!(!web.wants(&gone(1)), "an instance of whom nobody spoke");
        assert!(web.wants(&instance(1, "web")) && !web.wants(&instance(2, "db")));
        assert!(web.wants(&gone(1)) && !web.wants(&gone(1)) && !web.wants(&gone(2)));
        assert!(web.wants(&event("web", 0)) && !web.wants(&event("db", 0)));
        assert!(web.wants(&Change::Deleted(RowId::Service("web".to_owned()))));
        assert!(!web.wants(&Change::Host(Arc::default())));
    }

    #[test]
    fn events_only_lets_events_through_and_nothing_else() {
        let mut all = interest(None, None, true);
        assert!(all.wants(&event("web", 3)) && !all.wants(&instance(1, "web")));
        let mut host = interest(None, Some(3), true);
        assert!(host.wants(&event("web", 3)) && !host.wants(&event("web", 4)));
    }

    #[test]
    fn a_cursor_of_another_cluster_or_incarnation_is_not_ours() {
        let cursor = |cluster: u64, incarnation| pb::WatchCursor {
            cluster_id: ClusterId(cluster).to_string(),
            incarnation,
            revision: 9,
        };
        assert!(is_ours(&cursor(7, 1), ClusterId(7), 1));
        assert!(!is_ours(&cursor(8, 1), ClusterId(7), 1) && !is_ours(&cursor(7, 2), ClusterId(7), 1));
        assert!(!is_ours(&pb::WatchCursor::default(), ClusterId(7), 1));
    }
}
