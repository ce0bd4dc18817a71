//! One member: its copy of the state, the agents' sessions, and, while it leads, the scheduler and the judge.

use std::collections::BTreeMap;
use std::time::Duration;

use nave_orchestrator_core::limits::STEPS_PER_COMMAND;
use nave_orchestrator_core::{Applied, ClusterState, Judge, Leases, Plan, PlanCursor, Verdict, plan_dirty};
use nave_proto::ids::HostId;
use nave_proto::lease::fence;
use nave_proto::pb;
use pb::agent_message::Message as FromAgent;
use pb::command::Body;
use pb::hub_message::Message as ToAgent;

use crate::beats::GATHER;
use crate::bug::Bug;
use crate::clock::{Clock, MS, SECOND};
use crate::context::Context;
use crate::event::{Event, ToMember};
use crate::hub::{Hub, Origin, Proposal, touch};
use crate::network::{Refusal, Way, Word};
use crate::session::{Merged, Session, Touch};

const COALESCE_PLAN: i64 = 5 * MS;
const COALESCE_SESSIONS: i64 = 10 * MS;
const LOOK_AT_LEAST: i64 = 5 * SECOND;
/// Longer than every grace.
const HASTY_MS: u64 = 600_000;
const RETRY: i64 = 200 * MS;
const RETRY_MAX: i64 = 2 * SECOND;

/// What a member does while it leads, or believes to.
#[derive(Debug)]
pub(crate) struct Leads {
    pub(crate) term: u64,
    pub(crate) judge: Judge,
    pub(crate) leases: Leases,
    /// It has applied all that was committed before its term, which ended here.
    pub(crate) settled: bool,
    inherited: u64,
    /// Verdicts that are with the log.
    judging: usize,
    cursor: PlanCursor,
    planning: bool,
    plan_at: Option<i64>,
    last_steps: Vec<pb::PlanStep>,
    repeated: i64,
}

impl Leads {
    pub(crate) fn new(term: u64, began: Duration, inherited: u64) -> Self {
        Self {
            term,
            judge: Judge::new(began),
            leases: Leases::new(began),
            settled: false,
            inherited,
            judging: 0,
            cursor: PlanCursor::default(),
            planning: false,
            plan_at: None,
            last_steps: Vec::new(),
            repeated: 0,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) up: bool,
    pub(crate) run: u64,
    pub(crate) boot: Clock,
    pub(crate) wall: Clock,
    pub(crate) state: ClusterState,
    /// Log entries that it has; it applies them in its own time.
    pub(crate) received: u64,
    pub(crate) apply_due: bool,
    /// Proposals taken and not committed, for want of a quorum.
    pub(crate) pending: Vec<Proposal>,
    pub(crate) leads: Option<Leads>,
    pub(crate) ring: Vec<Touch>,
    pub(crate) sessions: BTreeMap<u64, Session>,
    sessions_due: bool,
    pub(crate) forward_at: i64,
    /// When it last knew of a leader, true time.
    pub(crate) contact: i64,
}

impl Member {
    pub(crate) fn new(boot: Clock, wall: Clock) -> Self {
        Self {
            up: true,
            run: 1,
            boot,
            wall,
            state: ClusterState::new(),
            received: 0,
            apply_due: false,
            pending: Vec::new(),
            leads: None,
            ring: Vec::new(),
            sessions: BTreeMap::new(),
            sessions_due: false,
            forward_at: 0,
            contact: 0,
        }
    }

    /// Remembers what sessions and the planner have to look at.
    pub(crate) fn touched(&mut self, applied: &Applied) {
        let revision = self.state.revision();
        self.ring.extend(applied.changes.iter().filter_map(|change| touch(revision, change)));
    }

    /// Something has changed.
    pub(crate) fn news(&mut self, cx: &mut Context, member: usize) {
        if !self.sessions_due && !self.sessions.is_empty() {
            self.sessions_due = true;
            cx.after(COALESCE_SESSIONS, Event::Member(member, ToMember::Sessions));
        }
        self.plan_soon(cx, member, COALESCE_PLAN);
    }

    /// Plans after this delay at the latest.
    pub(crate) fn plan_soon(&mut self, cx: &mut Context, member: usize, delay: i64) {
        let Some(leads) = &mut self.leads else { return };
        let at = cx.now + delay.max(0);
        if leads.planning || leads.plan_at.is_some_and(|before| before <= at) {
            return;
        }
        leads.plan_at = Some(at);
        cx.at(at, Event::Member(member, ToMember::Plan { term: leads.term, at }));
    }

    /// Elapsed time by its own clock.
    pub(crate) fn elapsed(&self, at: i64) -> Duration {
        Duration::from_nanos(self.boot.read(at).unsigned_abs())
    }

    pub(crate) fn scheduler_is_idle(&self) -> bool {
        self.leads.as_ref().is_some_and(|leads| !leads.planning && leads.judging == 0)
    }
}

impl Hub {
    /// SIGKILL. Its disk keeps what it has applied.
    pub(crate) fn crash_member(&mut self, cx: &mut Context, member: usize) {
        let this = &mut self.members[member];
        if !this.up {
            return;
        }
        cx.note(|| format!("member {member} is killed"));
        self.leader = self.leader.filter(|leader| *leader != member);
        this.up = false;
        this.run += 1;
        this.leads = None;
        this.pending.clear();
        this.sessions.clear();
        this.ring.clear();
        cx.net.thaw(member);
        cx.net.set_down(member, true);
        for stream in cx.net.streams_of(member) {
            cx.drop_end(stream, Way::Up);
        }
        self.review(cx);
    }

    pub(crate) fn start_member(&mut self, cx: &mut Context, member: usize) {
        let this = &mut self.members[member];
        if this.up {
            return;
        }
        cx.note(|| format!("member {member} starts"));
        this.up = true;
        cx.net.set_down(member, false);
        this.apply_due = false;
        this.sessions_due = false;
        this.contact = cx.now;
        match ClusterState::from_rows(this.state.rows(), this.state.applied_index()) {
            Ok(state) => this.state = state,
            Err(error) => cx.violated("rows are the state", || error.to_string()),
        }
        self.begin_member(cx, member);
        self.review(cx);
    }

    pub(crate) fn begin_member(&mut self, cx: &mut Context, member: usize) {
        self.members[member].forward_at = 0;
        self.forward_soon(cx, member, 0);
    }

    pub(crate) fn member_event(&mut self, cx: &mut Context, member: usize, event: ToMember) {
        if !self.members[member].up {
            return;
        }
        match event {
            ToMember::Apply => self.apply(cx, member),
            ToMember::Forward { run, at } if run == self.members[member].run => self.forward(cx, member, at),
            ToMember::Beats { from, sent } => self.take_beats(cx, member, from, &sent),
            ToMember::Beaten { answers, revision } => self.beaten(cx, member, &answers, revision),
            ToMember::Judge { term } => self.judge(cx, member, term),
            ToMember::Plan { term, at } => self.plan(cx, member, term, at),
            ToMember::Sessions => self.tell_sessions(cx, member),
            ToMember::Retry { stream } => self.commit_report(cx, member, stream),
            ToMember::Propose(proposal) => self.take(cx, member, *proposal),
            ToMember::Deposed { term } => self.deposed(cx, member, term),
            ToMember::Forward { .. } => {}
        }
    }

    // Liveness

    fn judge(&mut self, cx: &mut Context, member: usize, term: u64) {
        let proven = self.able(cx) == Some(member);
        let this = &mut self.members[member];
        let (now, wall) = (this.elapsed(cx.now), this.wall.read(cx.now));
        let Some(leads) = this.leads.as_mut().filter(|leads| leads.term == term) else { return };
        cx.after(250 * MS, Event::Member(member, ToMember::Judge { term }));
        leads.settled |= proven && this.state.applied_index() >= leads.inherited;
        if leads.judging > 0 {
            return;
        }
        let mut verdicts = leads.judge.look(&this.state, &leads.leases, now, wall);
        if !proven {
            return;
        }
        if cx.bug == Some(Bug::DeadlineIgnoresGrace) {
            verdicts.extend(hasty(&this.state, &leads.leases, now));
        }
        leads.judging = verdicts.len();
        for verdict in verdicts {
            cx.note(|| {
                format!(
                    "member {member} judges {}: {:?} {} ms without a lease",
                    verdict.host, verdict.status, verdict.lease_over_ms
                )
            });
            let body = Body::SetHostStatus(verdict.command());
            self.propose(cx, member, body, Origin::Verdict { member, term }, None);
        }
    }

    pub(crate) fn judged(&mut self, member: usize, term: u64) {
        if let Some(leads) = self.members[member].leads.as_mut().filter(|leads| leads.term == term) {
            leads.judging -= 1;
        }
    }

    // The scheduler

    fn plan(&mut self, cx: &mut Context, member: usize, term: u64, at: i64) {
        let committed = self.committed();
        let this = &mut self.members[member];
        let wall = this.wall.read(cx.now);
        let Some(leads) = this.leads.as_mut().filter(|leads| leads.term == term && leads.plan_at == Some(at))
        else {
            return;
        };
        leads.plan_at = None;
        let now = wall.max(this.state.time_unix_ns());
        let Plan { mut steps, wake_at, more, .. } =
            plan_dirty(&this.state, &mut leads.cursor, now, STEPS_PER_COMMAND);
        cx.spoil_plan(&this.state, &mut steps);
        if steps.is_empty() {
            if !more && this.state.applied_index() == committed {
                cx.at_rest(&this.state);
            }
            let wait = wake_at.map_or(LOOK_AT_LEAST, |at| (at - now).clamp(0, LOOK_AT_LEAST));
            return this.plan_soon(cx, member, if more { 0 } else { wait });
        }
        if leads.last_steps != steps {
            leads.repeated = 0;
            leads.last_steps.clone_from(&steps);
        } else if leads.repeated == 0 {
            leads.repeated = 20 * MS;
            return this.plan_soon(cx, member, 20 * MS);
        } else {
            leads.repeated = 0;
            leads.last_steps.clear();
        }
        leads.planning = true;
        let body = Body::CommitPlan(pb::CommitPlan { steps });
        self.propose(cx, member, body, Origin::Plan { member, term }, None);
    }

    pub(crate) fn planned(&mut self, cx: &mut Context, member: usize, term: u64, reply: Option<&pb::Reply>) {
        let this = &mut self.members[member];
        let Some(leads) = this.leads.as_mut().filter(|leads| leads.term == term) else { return };
        leads.planning = false;
        match reply {
            Some(_) => this.plan_soon(cx, member, 0),
            None => {
                leads.cursor = PlanCursor::default();
                this.plan_soon(cx, member, 100 * MS);
            }
        }
    }

    // Sessions

    fn tell_sessions(&mut self, cx: &mut Context, member: usize) {
        self.members[member].sessions_due = false;
        let streams: Vec<u64> = self.members[member].sessions.keys().copied().collect();
        for stream in streams {
            self.tell(cx, member, stream);
        }
    }

    /// What the agent has not been told, and then its lease.
    pub(crate) fn tell(&mut self, cx: &mut Context, member: usize, stream: u64) {
        let Member { sessions, state, ring, .. } = &mut self.members[member];
        let Some(session) = sessions.get_mut(&stream).filter(|session| session.is_let_in()) else { return };
        if state.host(session.host).is_none_or(|record| record.forgotten) {
            return self.refuse(cx, member, stream, Refusal::Forgotten);
        }
        if session.is_void(state) {
            sessions.remove(&stream);
            return cx.close(stream, Way::Up);
        }
        if let Some(word) = session.look(state, ring) {
            cx.send(stream, Way::Down, Word::Hub(Box::new(word)));
        }
        if let Some(lease) = session.lease(state.revision()) {
            cx.send(stream, Way::Down, Word::Hub(Box::new(ToAgent::Lease(lease))));
        }
    }

    /// A word of an agent, or the end of its stream.
    pub(crate) fn hear(&mut self, cx: &mut Context, member: usize, stream: u64, word: Word) {
        let this = &mut self.members[member];
        if !this.up {
            return;
        }
        let message = match word {
            Word::Agent(message) => message,
            Word::Closed | Word::Hub(_) | Word::Refused(_) => {
                this.sessions.remove(&stream);
                return cx.close(stream, Way::Up);
            }
        };
        if let FromAgent::Hello(hello) = &*message {
            return self.greet(cx, member, stream, hello);
        }
        let Some(session) = this.sessions.get_mut(&stream) else { return };
        match *message {
            FromAgent::Report(report) => {
                session.reports.add(report);
                self.commit_report(cx, member, stream);
            }
            FromAgent::Beat(beat) => session.beat(cx.now, beat.sequence),
            FromAgent::Hello(_) | FromAgent::Acknowledge(_) | FromAgent::Interest(_) => {}
        }
    }

    /// A session begins, but its agent is told nothing before the leader has let it in.
    fn greet(&mut self, cx: &mut Context, member: usize, stream: u64, hello: &pb::Hello) {
        let this = &mut self.members[member];
        let known = |host: &HostId| this.state.host(*host).is_some_and(|record| !record.forgotten);
        let host: Option<HostId> = hello.host_id.parse().ok();
        let Some(host) = host.filter(known) else {
            return self.refuse(cx, member, stream, Refusal::Forgotten);
        };
        let older: Vec<u64> =
            this.sessions.iter().filter(|(_, other)| other.host == host).map(|(id, _)| *id).collect();
        for older in older {
            this.sessions.remove(&older);
            cx.close(older, Way::Up);
        }
        let place = hello.facts.as_ref().map_or(0, |facts| facts.place);
        this.sessions.insert(stream, Session::new(host, place, cx.now));
        self.forward_soon(cx, member, GATHER);
    }

    /// Ends a session for a reason that the agent is told.
    pub(crate) fn refuse(&mut self, cx: &mut Context, member: usize, stream: u64, why: Refusal) {
        self.members[member].sessions.remove(&stream);
        cx.send(stream, Way::Down, Word::Refused(why));
        cx.close(stream, Way::Up);
    }

    fn commit_report(&mut self, cx: &mut Context, member: usize, stream: u64) {
        let Some(session) = self.members[member].sessions.get_mut(&stream) else { return };
        if session.attempt.is_some() || session.reports.is_empty() || session.not_before > cx.now {
            return;
        }
        let merged = std::mem::take(&mut session.reports);
        match merged.body(session.host, session.welcomed.unwrap_or_default()) {
            Some(body) => {
                session.attempt = Some(merged);
                self.propose(cx, member, body, Origin::Report { member, stream }, None);
            }
            None => acknowledge(cx, stream, &merged),
        }
    }

    pub(crate) fn reported(
        &mut self,
        cx: &mut Context,
        member: usize,
        stream: u64,
        reply: Option<pb::Reply>,
    ) {
        let Some(session) = self.members[member].sessions.get_mut(&stream) else { return };
        let Some(merged) = session.attempt.take() else { return };
        match reply.and_then(|reply| reply.result) {
            Some(pb::reply::Result::Accepted(_)) => {
                session.retry = RETRY;
                acknowledge(cx, stream, &merged);
            }
            Some(pb::reply::Result::Rejected(rejected)) if rejected.code() == pb::RejectedCode::NotFound => {
                return self.refuse(cx, member, stream, Refusal::Forgotten);
            }
            Some(pb::reply::Result::Rejected(rejected))
                if rejected.code() == pb::RejectedCode::Superseded =>
            {
                self.members[member].sessions.remove(&stream);
                return cx.close(stream, Way::Up);
            }
            // Lost and about to be called back, or nothing is known of it.
            Some(pb::reply::Result::Rejected(_)) | None => {
                let newer = std::mem::take(&mut session.reports);
                session.reports = merged.under(newer);
                session.not_before = cx.now + session.retry;
                cx.after(session.retry, Event::Member(member, ToMember::Retry { stream }));
                session.retry = (session.retry * 2).min(RETRY_MAX);
            }
        }
        self.commit_report(cx, member, stream);
    }
}

/// Verdicts of [`Bug::DeadlineIgnoresGrace`].
fn hasty(state: &ClusterState, leases: &Leases, now: Duration) -> Vec<Verdict> {
    let lost = state.hosts().filter(|host| host.status() == pb::HostStatus::Lost);
    let lost = lost.filter(|record| record.lease_over_ms < HASTY_MS);
    let over = |host: HostId| now.saturating_sub(leases.last_lease(host)) >= fence(Duration::ZERO);
    let hasty = lost.filter(|record| over(HostId(record.id)));
    hasty
        .map(|record| Verdict {
            host: HostId(record.id),
            status: pb::HostStatus::Lost,
            reason: String::new(),
            lease_over_ms: HASTY_MS,
        })
        .collect()
}

fn acknowledge(cx: &mut Context, stream: u64, merged: &Merged) {
    let sequence = merged.sequence;
    let word = ToAgent::ReportAcknowledged(pb::ReportAcknowledged { sequence });
    cx.send(stream, Way::Down, Word::Hub(Box::new(word)));
}
