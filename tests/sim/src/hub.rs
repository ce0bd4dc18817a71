//! The hub: a perfect log (what is committed is in it once, in one order, for ever) and members that apply it each at
//! its own pace. Which member leads, who thinks that it still does, and which proposals come to nothing or to
//! something nobody hears of, is up to the network and to chance.

use std::collections::BTreeMap;

use nave_orchestrator_core::{Applied, Change, RowId};
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use pb::command::Body;
use rand::Rng as _;
use rand::seq::IndexedRandom as _;

use crate::clock::{MS, SECOND};
use crate::context::Context;
use crate::event::{Event, ToMember};
use crate::member::{Leads, Member};
use crate::session::Touch;

/// How long a proposer waits for an answer.
const DEADLINE: i64 = 5 * SECOND;

/// The longest time that an old leader is proven beside a new one: just below what the lease arithmetic allows.
const RAFT_LEASE_OVERLAP: i64 = 450 * MS;

/// A command on its way into the log.
#[derive(Debug)]
pub(crate) struct Proposal {
    pub(crate) id: u64,
    pub(crate) command: pb::Command,
}

/// Who is told what became of it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Origin {
    Operator(usize),
    Report {
        member: usize,
        stream: u64,
    },
    Plan {
        member: usize,
        term: u64,
    },
    /// A session is being opened in the log, before its agent is told anything.
    Open {
        member: usize,
        stream: u64,
    },
    Verdict {
        member: usize,
        term: u64,
    },
}

#[derive(Debug)]
struct Entry {
    command: pb::Command,
    proposal: u64,
    leader: usize,
    /// What the first member that applied it came to; all others must come to the same.
    applied: Option<Applied>,
}

#[derive(Debug)]
pub(crate) struct Hub {
    log: Vec<Entry>,
    pub(crate) members: Vec<Member>,
    term: u64,
    term_began: i64,
    pub(crate) leader: Option<usize>,
    look: u64,
    newest_stamp: i64,
    origins: BTreeMap<u64, (Origin, usize)>,
    next_proposal: u64,
}

impl Hub {
    pub(crate) fn new(members: Vec<Member>) -> Self {
        Self {
            log: Vec::new(),
            members,
            term: 0,
            term_began: 0,
            leader: None,
            look: 0,
            newest_stamp: 0,
            origins: BTreeMap::new(),
            next_proposal: 1,
        }
    }

    pub(crate) fn committed(&self) -> u64 {
        self.log.len() as u64
    }

    /// What is under way: somebody waits for an answer, or a member has not applied all.
    pub(crate) fn busy(&self) -> Option<String> {
        if let Some((_, (origin, from))) = self.origins.first_key_value() {
            return Some(format!("member {from} waits for the answer to {origin:?}"));
        }
        let committed = self.committed();
        let mut members = self.members.iter().enumerate();
        let behind = members.find(|(_, member)| {
            !member.up || member.state.applied_index() != committed || !member.pending.is_empty()
        });
        behind.map(|(index, member)| {
            format!(
                "member {index} has applied {} of {committed}, up: {}, pending: {}",
                member.state.applied_index(),
                member.up,
                member.pending.len()
            )
        })
    }

    // Leadership

    fn runs(&self, cx: &Context, member: usize) -> bool {
        self.members[member].up && cx.net.frozen_until(member) <= cx.now
    }

    pub(crate) fn reaches(&self, cx: &Context, one: usize, other: usize) -> bool {
        one == other || (self.runs(cx, one) && self.runs(cx, other) && cx.net.both_ways(one, other))
    }

    pub(crate) fn has_quorum(&self, cx: &Context, member: usize) -> bool {
        let count = self.members.len();
        let reached = (0..count).filter(|other| self.reaches(cx, member, *other)).count();
        self.runs(cx, member) && reached * 2 > count
    }

    /// The leader that a proposal can be committed by now.
    pub(crate) fn able(&self, cx: &Context) -> Option<usize> {
        self.leader.filter(|leader| self.has_quorum(cx, *leader))
    }

    /// Whether a member may still give leases: it leads and a quorum has answered it just now, or did so within its Raft
    /// lease, which may end a little after another one has been elected.
    pub(crate) fn is_proven(&self, cx: &Context, member: usize) -> bool {
        let Some(leads) = &self.members[member].leads else { return false };
        match leads.term == self.term {
            true => self.has_quorum(cx, member),
            false => cx.now - self.term_began < RAFT_LEASE_OVERLAP,
        }
    }

    /// After every change of who reaches whom.
    pub(crate) fn review(&mut self, cx: &mut Context) {
        self.look += 1;
        let Some(leader) = self.able(cx) else {
            let timeout = cx.rng.random_range(500 * MS..2_500 * MS);
            let look = self.look;
            return cx.after(timeout, Event::Elect { look });
        };
        for proposal in std::mem::take(&mut self.members[leader].pending) {
            self.append(cx, leader, proposal);
        }
        self.replicate(cx, leader);
        let term = self.term;
        for member in 0..self.members.len() {
            let stale = self.members[member].leads.as_ref().is_some_and(|leads| leads.term < term);
            if stale && self.reaches(cx, leader, member) {
                let soon = cx.rng.random_range(MS..300 * MS);
                cx.after(soon, Event::Member(member, ToMember::Deposed { term }));
            }
        }
    }

    pub(crate) fn elect(&mut self, cx: &mut Context, look: u64) {
        if look != self.look || self.able(cx).is_some() {
            return;
        }
        let able: Vec<usize> =
            (0..self.members.len()).filter(|member| self.has_quorum(cx, *member)).collect();
        if let Some(&next) = able.choose(&mut cx.rng) {
            self.lead(cx, next);
        }
    }

    /// Makes a member lead. The one before goes on believing that it does until it hears otherwise.
    pub(crate) fn lead(&mut self, cx: &mut Context, next: usize) {
        if !self.has_quorum(cx, next) || self.leader == Some(next) {
            return;
        }
        self.term += 1;
        let term = self.term;
        cx.note(|| format!("member {next} leads in term {term}"));
        let before = self.leader.replace(next);
        let began = self.members[next].elapsed(cx.now);
        self.members[next].leads = Some(Leads::new(term, began, self.committed()));
        self.term_began = cx.now;
        if let Some(before) = before {
            // It steps down by itself when it has not heard of a quorum for long.
            let late = cx.rng.random_range(500 * MS..4_000 * MS);
            cx.after(late, Event::Member(before, ToMember::Deposed { term }));
            let pending = std::mem::take(&mut self.members[before].pending);
            for proposal in pending {
                // Replicated before it fell, or not.
                if cx.rng.random_bool(0.3) {
                    self.append(cx, next, proposal);
                }
            }
        }
        cx.after(250 * MS, Event::Member(next, ToMember::Judge { term }));
        self.members[next].plan_soon(cx, next, 0);
        self.review(cx);
    }

    pub(crate) fn deposed(&mut self, cx: &mut Context, member: usize, term: u64) {
        if self.members[member].leads.as_ref().is_some_and(|leads| leads.term < term) {
            cx.note(|| format!("member {member} hears that it no longer leads"));
            self.members[member].leads = None;
            self.members[member].pending.clear();
        }
    }

    // The log

    /// Sends a command towards the leader. Exactly one answer comes, none when the outcome is unknown.
    pub(crate) fn propose(
        &mut self,
        cx: &mut Context,
        from: usize,
        body: Body,
        origin: Origin,
        id: Option<pb::RequestId>,
    ) {
        let proposal = self.next_proposal;
        self.next_proposal += 1;
        self.origins.insert(proposal, (origin, from));
        cx.after(DEADLINE, Event::Answer { proposal, reply: None });
        let actor = match origin {
            Origin::Operator(_) => "operator/sim",
            Origin::Report { .. } | Origin::Open { .. } => "agent",
            Origin::Plan { .. } | Origin::Verdict { .. } => "hub",
        };
        let command = pb::Command {
            time_unix_ns: 0,
            actor: actor.to_owned(),
            request_id: id,
            written_by: nave_proto::COMMAND_FORMAT,
            body: Some(body),
        };
        let leads = self.members[from].leads.is_some();
        let known =
            if leads { Some(from) } else { self.leader.filter(|leader| cx.net.is_open(from, *leader)) };
        let Some(leader) = known else { return };
        let delay = if leads { MS / 10 } else { cx.net.delay(&mut cx.rng, from, leader) };
        let proposal = Proposal { id: proposal, command };
        cx.after(delay, Event::Member(leader, ToMember::Propose(Box::new(proposal))));
    }

    pub(crate) fn take(&mut self, cx: &mut Context, member: usize, proposal: Proposal) {
        if self.members[member].leads.is_none() {
            // Refused, and so certainly not committed: its answer is as good as none.
            let proposal = proposal.id;
            return cx.after(5 * MS, Event::Answer { proposal, reply: None });
        }
        if self.able(cx) == Some(member) {
            self.append(cx, member, proposal);
            self.replicate(cx, member);
        } else {
            self.members[member].pending.push(proposal);
        }
    }

    fn append(&mut self, cx: &mut Context, leader: usize, proposal: Proposal) {
        let Proposal { id, mut command } = proposal;
        self.newest_stamp = self.newest_stamp.max(self.members[leader].wall.read(cx.now));
        command.time_unix_ns = self.newest_stamp;
        self.log.push(Entry { command, proposal: id, leader, applied: None });
    }

    /// Members that the leader reaches get what is in the log.
    fn replicate(&mut self, cx: &mut Context, leader: usize) {
        for member in 0..self.members.len() {
            if !self.reaches(cx, leader, member) {
                continue;
            }
            let this = &mut self.members[member];
            this.received = self.log.len() as u64;
            if !this.apply_due && this.state.applied_index() < this.received {
                this.apply_due = true;
                let delay = cx.rng.random_range(MS / 2..6 * MS);
                cx.after(delay, Event::Member(member, ToMember::Apply));
            }
        }
    }

    pub(crate) fn apply(&mut self, cx: &mut Context, member: usize) {
        self.members[member].apply_due = false;
        while self.members[member].up
            && self.members[member].state.applied_index() < self.members[member].received
        {
            self.apply_next(cx, member);
            if cx.rng.random_bool(0.05) && !self.members[member].apply_due {
                // A slow disk: the rest later.
                self.members[member].apply_due = true;
                let delay = cx.rng.random_range(MS..if cx.calm { 5 * MS } else { 200 * MS });
                return cx.after(delay, Event::Member(member, ToMember::Apply));
            }
        }
    }

    fn apply_next(&mut self, cx: &mut Context, member: usize) {
        let this = &mut self.members[member];
        let index = this.state.applied_index() + 1;
        let at = usize::try_from(index - 1).expect("a short log");
        let entry = &mut self.log[at];
        let is_plan = matches!(entry.command.body, Some(Body::CommitPlan(_)));
        let first = entry.applied.is_none();
        let before = (first && is_plan).then(|| crate::oracle::Standing::of(&this.state));
        let applied = this.state.apply(index, entry.command.clone());
        this.touched(&applied);
        let changed = !applied.changes.is_empty();
        match &entry.applied {
            Some(theirs) if *theirs != applied => {
                cx.violated("replicas agree", || {
                    format!("member {member} applied {index} as {applied:?}, another as {theirs:?}")
                });
            }
            Some(_) => {}
            None => {
                cx.committed(index, &entry.command, &applied, &this.state, before.as_ref());
                entry.applied = Some(applied);
            }
        }
        if entry.leader == member {
            let reply = entry.applied.as_ref().map(|applied| applied.reply.clone());
            let proposal = entry.proposal;
            self.answer(cx, member, proposal, reply);
        }
        if changed {
            self.members[member].news(cx, member);
        }
    }

    fn answer(&mut self, cx: &mut Context, leader: usize, proposal: u64, reply: Option<pb::Reply>) {
        let Some((_, from)) = self.origins.get(&proposal) else { return };
        if !cx.net.is_open(leader, *from) && leader != *from {
            return;
        }
        let delay = if leader == *from { 0 } else { cx.net.delay(&mut cx.rng, leader, *from) };
        cx.after(delay, Event::Answer { proposal, reply });
    }

    /// Whom an answer is for; each is given once.
    pub(crate) fn origin(&mut self, proposal: u64) -> Option<Origin> {
        self.origins.remove(&proposal).map(|(origin, _)| origin)
    }
}

/// The instance that a change is about.
pub(crate) fn touch(revision: u64, change: &Change) -> Option<Touch> {
    let instance = match change {
        Change::Instance(record) => InstanceId(record.id),
        Change::Deleted(RowId::Instance(id)) => *id,
        _ => return None,
    };
    Some(Touch { revision, instance })
}
