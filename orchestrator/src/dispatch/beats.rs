//! Signs of life. Beats never enter the log: each member notes the newest of each of its sessions and hands what is
//! new to the leader four times a second, at once for a session that begins. The leader's table is the one that counts
//! (`nave_orchestrator_core::Leases`, judged by `controllers/liveness`); its answer goes back to the session, which tells
//! the agent until when it has a lease, or ends.
//!
//! With them goes how far this member's agents have taken the directory, and back comes how far all have: then nobody
//! calls what was draining by that revision, and it may end (`callers.rs`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nave_orchestrator_core::{Beat, BeatAnswer, ClusterState, Leases};
use nave_proto::ids::{HostId, MemberId};
use nave_proto::pb;
use parking_lot::Mutex;
use pb::BeatRefusal;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tracing::debug;

use super::callers::Callers;
use crate::api::Hub;
use crate::clock;
use crate::raft::RaftStatus;
use crate::watch::Standing;

/// How often beats are handed to the leader: a lost host is said within the lease + this + the judge's tick.
const FORWARD: Duration = Duration::from_millis(250);
/// A beat older than this is not handed on, else a host long silent would seem to speak after an outage.
const FRESH: Duration = Duration::from_secs(1);
/// How long one call to the leader may take; the beats that come meanwhile wait.
const CALL_TIMEOUT: Duration = Duration::from_millis(500);
/// Sessions that begin together are handed on together.
const GATHER: Duration = Duration::from_millis(10);

/// While an agent waits for the callers of what it is to stop, the leader is asked this often.
const ASK: Duration = Duration::from_millis(20);
/// No agent waits longer for its callers; `nave_agent_core::supervisor::DRAIN_WAIT`.
const ASK_FOR: Duration = Duration::from_secs(2);

/// When each host was last heard, unix nanoseconds.
pub(crate) type Heard = BTreeMap<HostId, i64>;

/// What the leader has answered to the newest beat of a session.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The leader has heard the session at least once.
    pub(crate) heard: bool,
    pub(crate) lease: Option<Given>,
    pub(crate) refused: Option<(BeatRefusal, Duration)>,
}

/// A lease, counted from the beat of this number. The agent may hear of it once it knows all up to the revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Given {
    pub(crate) sequence: u64,
    pub(crate) revision: u64,
}

/// The beats of one member's sessions, and on the leader the table of all.
#[derive(Debug)]
pub(crate) struct Beats {
    origin: Instant,
    /// By session: two agents may say that they are the same host, and one of them is refused.
    own: Mutex<BTreeMap<u64, Own>>,
    table: Mutex<Option<Table>>,
    begun: Notify,
    callers_left: watch::Sender<u64>,
    asked: Mutex<Option<Asked>>,
}

/// An agent waits until its callers have left what drained at this revision.
#[derive(Debug, Clone, Copy)]
struct Asked {
    revision: u64,
    until: Instant,
}

/// One session of this member.
#[derive(Debug)]
struct Own {
    host: HostId,
    place: u64,
    sequence: u64,
    at: Instant,
    fresh: bool,
    answers: watch::Sender<Answer>,
}

/// One leadership of this member.
#[derive(Debug)]
struct Table {
    term: u64,
    leases: Leases,
    /// This leader has applied all that was committed before its term.
    settled: bool,
    callers: Callers,
}

impl Table {
    fn new(term: u64, now: Duration) -> Self {
        Self { term, leases: Leases::new(now), settled: false, callers: Callers::default() }
    }
}

impl Default for Beats {
    fn default() -> Self {
        let (own, table, begun, callers_left, asked) = Default::default();
        Self { origin: Instant::now(), own, table, begun, callers_left, asked }
    }
}

/// A beat on its way to the leader.
#[derive(Debug, Clone, Copy)]
struct Sent {
    session: u64,
    host: HostId,
    place: u64,
    sequence: u64,
}

impl Beats {
    /// Elapsed time as the leader's table has it.
    pub(crate) fn now(&self) -> Duration {
        Instant::now() - self.origin
    }

    /// A session begins: it is announced to the leader at once. What the leader says of it comes through the receiver.
    pub(crate) fn open(&self, host: HostId, session: u64, place: u64) -> watch::Receiver<Answer> {
        let (answers, receiver) = watch::channel(Answer::default());
        let own = Own { host, place, sequence: 0, at: Instant::now(), fresh: true, answers };
        self.own.lock().insert(session, own);
        self.begun.notify_one();
        receiver
    }

    /// The agent of this session was heard.
    pub(crate) fn beat(&self, session: u64, sequence: u64) {
        if let Some(own) = self.own.lock().get_mut(&session) {
            own.sequence = own.sequence.max(sequence);
            (own.at, own.fresh) = (Instant::now(), true);
        }
    }

    /// The session has ended.
    pub(crate) fn close(&self, session: u64) {
        self.own.lock().remove(&session);
    }

    /// This member leads since a moment ago.
    pub(crate) fn lead(&self, term: u64) {
        *self.table.lock() = Some(Table::new(term, self.now()));
        self.begun.notify_one();
    }

    /// The leader has applied all that was committed before its term.
    pub(crate) fn settle(&self, term: u64) {
        if let Some(table) = self.table.lock().as_mut().filter(|table| table.term == term) {
            table.settled = true;
        }
    }

    /// It leads no longer.
    pub(crate) fn follow(&self) {
        *self.table.lock() = None;
    }

    /// Looks at the leader's table; nothing on a follower.
    pub(crate) fn with_leases<T>(&self, look: impl FnOnce(&mut Leases) -> T) -> Option<T> {
        self.table.lock().as_mut().map(|table| look(&mut table.leases))
    }

    /// When each host was last heard by this leader, as wall time; empty on a follower.
    pub(crate) fn heard(&self) -> Heard {
        let (now, now_ns) = (self.now(), clock::unix_now_ns());
        let ago = |at: Duration| i64::try_from(now.saturating_sub(at).as_nanos()).unwrap_or(i64::MAX);
        let wall = |(host, at): (HostId, Duration)| (host, now_ns.saturating_sub(ago(at)));
        self.with_leases(|leases| leases.all_heard().map(wall).collect()).unwrap_or_default()
    }

    /// Up to where all agents of the cluster have taken the directory.
    pub(crate) fn callers_left(&self) -> watch::Receiver<u64> {
        self.callers_left.subscribe()
    }

    /// An agent waits for its callers to leave what drained at this revision.
    pub(crate) fn ask_callers(&self, revision: u64) {
        let mut asked = self.asked.lock();
        // Another one may wait for a newer drain, since sessions look when they come to it.
        let revision = asked.map_or(revision, |before| before.revision.max(revision));
        *asked = Some(Asked { revision, until: Instant::now() + ASK_FOR });
        drop(asked);
        self.begun.notify_one();
    }

    fn is_asked(&self) -> bool {
        let left = *self.callers_left.borrow();
        let mut asked = self.asked.lock();
        asked.take_if(|asked| asked.revision <= left || asked.until <= Instant::now());
        asked.is_some()
    }

    /// Takes beats as the leader, and how far the agents of the member that sends them have taken the directory.
    pub(crate) fn take(
        &self,
        hub: &Hub,
        (member, standing): (MemberId, Standing),
        beats: impl IntoIterator<Item = Beat>,
    ) -> pb::ForwardBeatsResponse {
        let status = hub.raft.status();
        let (state, mut table) = (hub.raft.state(), self.table.lock());
        let leads = status.leader == Some(hub.id);
        let Some(table) = table.as_mut().filter(|table| leads && table.term == status.term) else {
            return pb::ForwardBeatsResponse::default();
        };
        let may_give = table.settled && status.leader_proven;
        let now = self.now();
        table.callers.said(member, standing);
        let directory_acknowledged = table.callers.all_taken(hub.changes.sessions());
        let response = taken(&mut table.leases, &state, beats, may_give, now);
        pb::ForwardBeatsResponse { directory_acknowledged, ..response }
    }

    /// What is new since it was last handed on.
    fn fresh(&self) -> Vec<Sent> {
        let now = Instant::now();
        let mut sent = Vec::new();
        for (session, own) in self.own.lock().iter_mut().filter(|(_, own)| own.fresh) {
            // A session that waits for its first answer is there as long as it waits.
            let waits = !own.answers.borrow().heard;
            if !waits && now - own.at > FRESH {
                own.fresh = false;
                continue;
            }
            let Own { host, place, sequence, .. } = *own;
            sent.push(Sent { session: *session, host, place, sequence });
        }
        sent
    }

    /// What was true of a revision stays so, whatever another leader has yet to hear.
    fn callers_have_left(&self, revision: u64) {
        self.callers_left.send_if_modified(|left| {
            let newer = revision > *left;
            *left = (*left).max(revision);
            newer
        });
    }

    /// Tells the sessions what the leader has answered.
    fn answered(&self, sent: &[Sent], response: &pb::ForwardBeatsResponse) {
        let refused: BTreeMap<(u64, u64), _> =
            response.refused.iter().map(|refused| ((refused.host_id, refused.place), refused)).collect();
        let mut own = self.own.lock();
        for beat in sent {
            let Some(own) = own.get_mut(&beat.session) else { continue };
            own.fresh = own.sequence > beat.sequence;
            own.answers.send_if_modified(|answer| match refused.get(&(beat.host.0, beat.place)) {
                Some(refused) => {
                    answer.refused = Some((refused.why(), Duration::from_millis(refused.after_ms)));
                    true
                }
                None => {
                    let without =
                        response.lease_revision == 0 || response.without_lease.contains(&beat.host.0);
                    let given = Given { sequence: beat.sequence, revision: response.lease_revision };
                    let news = !answer.heard || !without;
                    answer.heard = true;
                    if !without {
                        answer.lease = Some(given);
                    }
                    news
                }
            });
        }
    }
}

fn taken(
    leases: &mut Leases,
    state: &ClusterState,
    beats: impl IntoIterator<Item = Beat>,
    may_give: bool,
    now: Duration,
) -> pb::ForwardBeatsResponse {
    let lease_revision = if may_give { state.revision() } else { 0 };
    let mut response = pb::ForwardBeatsResponse { leader: true, lease_revision, ..Default::default() };
    for beat in beats {
        match leases.take(state, beat, may_give, now) {
            BeatAnswer::Lease => {}
            BeatAnswer::Heard => response.without_lease.push(beat.host.0),
            BeatAnswer::Refused { why, after } => response.refused.push(pb::BeatRefused {
                host_id: beat.host.0,
                why: why.into(),
                after_ms: u64::try_from(after.as_millis()).unwrap_or(u64::MAX),
                place: beat.place,
            }),
        }
    }
    response
}

/// The beats in a request; one of an older build has hosts alone.
pub(crate) fn in_request(request: &pb::ForwardBeatsRequest) -> Vec<Beat> {
    if request.beats.is_empty() {
        return request.host_ids.iter().map(|id| Beat { host: HostId(*id), place: 0 }).collect();
    }
    request.beats.iter().map(|beat| Beat { host: HostId(beat.host_id), place: beat.place }).collect()
}

/// How far the agents of the member that sends it have taken the directory.
pub(crate) fn standing(request: &pb::ForwardBeatsRequest) -> Standing {
    Standing {
        taken: request.directory_acknowledged,
        as_of: request.directory_as_of,
        sessions: request.directory_sessions,
    }
}

/// Hands this member's beats to the leader until the member stops.
pub(crate) async fn forward(hub: Arc<Hub>) {
    let mut ticks = interval(FORWARD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut leadership = hub.raft.subscribe_status();
    // Which leader knows how far the agents here are. A new one knows of nobody, and drains wait for it.
    let mut informed: Option<(MemberId, u64)> = None;
    loop {
        let leads = {
            let now = leadership.borrow_and_update();
            now.leader.map(|leader| (leader, now.term))
        };
        let untold = leads.is_some() && leads != informed;
        let asked = hub.beats.is_asked();
        let at_once = tokio::select! {
            _ = ticks.tick() => untold,
            () = hub.beats.begun.notified() => {
                sleep(GATHER).await;
                untold || hub.beats.is_asked()
            }
            () = hub.changes.agent_has_moved() => {
                sleep(GATHER).await;
                true
            }
            () = hub.changes.callers_have_left() => true,
            Ok(()) = leadership.changed() => continue,
            () = sleep(ASK), if asked || untold => true,
            () = hub.stop.cancelled() => return,
        };
        let sent = hub.beats.fresh();
        if sent.is_empty() && !at_once {
            continue;
        }
        let standing = hub.changes.standing();
        let status = hub.raft.status();
        let to = status.leader;
        let response = match to {
            Some(leader) if leader == hub.id => {
                let beats = sent.iter().map(|sent| Beat { host: sent.host, place: sent.place });
                Some(hub.beats.take(&hub, (hub.id, standing), beats))
            }
            Some(_) => hand_on(&hub, status, &sent, standing).await,
            None => None,
        };
        // Not taken: what is still fresh is handed on with the next.
        let response = response.filter(|response| response.leader);
        informed = leads.filter(|(leader, _)| response.is_some() && to == Some(*leader));
        if let Some(response) = response {
            hub.beats.answered(&sent, &response);
            hub.beats.callers_have_left(response.directory_acknowledged);
        }
    }
}

async fn hand_on(
    hub: &Hub,
    status: RaftStatus,
    sent: &[Sent],
    standing: Standing,
) -> Option<pb::ForwardBeatsResponse> {
    let leader = status.leader?;
    let (id, node, _) = status.members.into_iter().find(|(id, _, _)| *id == leader)?;
    let request = pb::ForwardBeatsRequest {
        host_ids: sent.iter().map(|sent| sent.host.0).collect(),
        from_member: hub.id.0,
        beats: sent.iter().map(|sent| pb::HostBeat { host_id: sent.host.0, place: sent.place }).collect(),
        directory_acknowledged: standing.taken,
        directory_as_of: standing.as_of,
        directory_sessions: standing.sessions,
    };
    let mut client = hub.peers.member(id, &node.address);
    match timeout(CALL_TIMEOUT, client.forward_beats(request)).await {
        Ok(Ok(response)) => Some(response.into_inner()),
        Ok(Err(status)) => {
            debug!(leader = %id, error = status.message(), "beats not handed on");
            None
        }
        Err(_) => {
            debug!(leader = %id, "beats not handed on in time");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostId = HostId(1);

    fn sequences(beats: &Beats) -> Vec<(u64, u64)> {
        beats.fresh().iter().map(|sent| (sent.host.0, sent.sequence)).collect()
    }

    fn given(revision: u64) -> pb::ForwardBeatsResponse {
        pb::ForwardBeatsResponse { leader: true, lease_revision: revision, ..Default::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_beat_is_handed_on_once_and_never_when_it_is_old() {
        let beats = Beats::default();
        beats.open(HOST, 1, 7);
        tokio::time::advance(Duration::from_secs(9)).await;
        assert_eq!(sequences(&beats), [(1, 0)], "a session that begins waits for its answer");
        beats.answered(&beats.fresh(), &given(5));
        assert_eq!(sequences(&beats), []);
        beats.beat(1, 4);
        assert_eq!(sequences(&beats), [(1, 4)]);
        tokio::time::advance(FRESH + Duration::from_millis(1)).await;
        assert_eq!(sequences(&beats), [], "the agent may have died since");
        beats.close(1);
        beats.beat(1, 5);
        assert_eq!(sequences(&beats), [], "of a session that is over");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_for_the_beat_that_was_sent() {
        let beats = Beats::default();
        let mut answers = beats.open(HOST, 1, 7);
        beats.beat(1, 1);
        let sent = beats.fresh();
        beats.beat(1, 2);
        beats.answered(&sent, &given(5));
        assert_eq!(answers.borrow_and_update().lease, Some(Given { sequence: 1, revision: 5 }));
        assert_eq!(sequences(&beats), [(1, 2)], "the newer one has yet to go");
        let without = pb::ForwardBeatsResponse { without_lease: vec![1], ..given(6) };
        beats.answered(&beats.fresh(), &without);
        assert!(!answers.has_changed().unwrap(), "no news");
        // Another session of the same host, on this member too.
        let mut others = beats.open(HOST, 2, 8);
        let refused = pb::BeatRefused { host_id: 1, why: BeatRefusal::Held.into(), after_ms: 5, place: 8 };
        let refused = pb::ForwardBeatsResponse { refused: vec![refused], ..given(7) };
        beats.beat(1, 3);
        beats.answered(&beats.fresh(), &refused);
        assert_eq!(others.borrow_and_update().refused, Some((BeatRefusal::Held, Duration::from_millis(5))));
        let first = *answers.borrow_and_update();
        assert_eq!((first.refused, first.lease), (None, Some(Given { sequence: 3, revision: 7 })));
    }

    #[test]
    fn a_request_of_an_older_build_names_hosts_alone() {
        let older = pb::ForwardBeatsRequest { host_ids: vec![3], ..Default::default() };
        assert_eq!(in_request(&older), [Beat { host: HostId(3), place: 0 }]);
        let beat = pb::HostBeat { host_id: 3, place: 9 };
        let newer = pb::ForwardBeatsRequest { beats: vec![beat], ..older };
        assert_eq!(in_request(&newer), [Beat { host: HostId(3), place: 9 }]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_leader_is_asked_until_it_answers_or_nobody_waits_any_more() {
        let beats = Beats::default();
        assert!(!beats.is_asked());
        beats.ask_callers(7);
        beats.callers_have_left(6);
        assert!(beats.is_asked());
        beats.callers_have_left(7);
        assert!(!beats.is_asked());
        beats.callers_have_left(5);
        assert_eq!(*beats.callers_left().borrow(), 7, "another leader has yet to hear of it");
        beats.ask_callers(9);
        beats.ask_callers(8);
        beats.callers_have_left(8);
        assert!(beats.is_asked(), "another agent waits for a newer one");
        tokio::time::advance(ASK_FOR).await;
        assert!(!beats.is_asked());
    }
}
