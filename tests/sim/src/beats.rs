//! Beats on their way from a member to the leader, and the leader's answers on their way back: who is let in, who has a
//! lease, who is refused. The table and its rules are the core's ([`Leases`](nave_orchestrator_core::Leases)).

use nave_orchestrator_core::{Beat, BeatAnswer};
use nave_proto::ids::HostId;
use nave_proto::lease::TTL;
use nave_proto::pb;
use pb::command::Body;
use pb::hub_message::Message as ToAgent;

use crate::clock::{MS, SECOND};
use crate::context::Context;
use crate::event::{Event, ToMember};
use crate::hub::{Hub, Origin};
use crate::network::{Refusal, Way, Word};

const FORWARD: i64 = 250 * MS;
/// A beat older than this is not handed on.
const FRESH: i64 = SECOND;
/// Sessions that begin together are handed on together.
pub(crate) const GATHER: i64 = 10 * MS;

/// A beat that was handed on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sent {
    stream: u64,
    host: HostId,
    place: u64,
    sequence: u64,
}

/// What the leader says of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Answered {
    sent: Sent,
    answer: BeatAnswer,
}

impl Hub {
    /// Hands beats on after this delay at the latest.
    pub(crate) fn forward_soon(&mut self, cx: &mut Context, member: usize, delay: i64) {
        let this = &mut self.members[member];
        let at = cx.now + delay;
        if this.forward_at > cx.now && this.forward_at <= at {
            return;
        }
        this.forward_at = at;
        cx.at(at, Event::Member(member, ToMember::Forward { run: this.run, at }));
    }

    /// What was heard goes to the leader; without one, agents are sent elsewhere.
    pub(crate) fn forward(&mut self, cx: &mut Context, member: usize, at: i64) {
        if self.members[member].forward_at != at {
            return;
        }
        self.forward_soon(cx, member, FORWARD);
        let leads = self.members[member].leads.is_some();
        let leader = self.able(cx).filter(|leader| self.reaches(cx, member, *leader));
        let ttl = i64::try_from(TTL.as_nanos()).unwrap_or(i64::MAX);
        if leader.is_some() {
            self.members[member].contact = cx.now;
        } else if self.members[member].contact + ttl / 3 < cx.now {
            self.goodbye(cx, member);
        }
        // One that believes to lead asks itself.
        let Some(leader) = leader.or(leads.then_some(member)) else { return };
        let leader = if leads { member } else { leader };
        let sent = self.fresh(cx.now, member);
        if !sent.is_empty() {
            let delay = if leads { 0 } else { cx.net.delay(&mut cx.rng, member, leader) };
            cx.after(delay, Event::Member(leader, ToMember::Beats { from: member, sent }));
        }
    }

    fn fresh(&mut self, now: i64, member: usize) -> Vec<Sent> {
        let mut sent = Vec::new();
        for (stream, session) in &mut self.members[member].sessions {
            if session.admitted && now - session.heard > FRESH {
                session.fresh = false;
            }
            if session.fresh {
                let (host, place, sequence) = (session.host, session.place, session.sequence);
                sent.push(Sent { stream: *stream, host, place, sequence });
            }
        }
        sent
    }

    fn goodbye(&mut self, cx: &mut Context, member: usize) {
        for stream in std::mem::take(&mut self.members[member].sessions).into_keys() {
            cx.close(stream, Way::Up);
        }
    }

    /// As the leader, or one that believes so.
    pub(crate) fn take_beats(&mut self, cx: &mut Context, member: usize, from: usize, sent: &[Sent]) {
        let proven = self.is_proven(cx, member);
        let this = &mut self.members[member];
        let now = this.elapsed(cx.now);
        let Some(leads) = &mut this.leads else { return };
        let may_give = proven && leads.settled;
        let revision = if may_give { this.state.revision() } else { 0 };
        let mut answers = Vec::new();
        for sent in sent {
            let beat = Beat { host: sent.host, place: sent.place };
            let answer = leads.leases.take(&this.state, beat, may_give, now);
            answers.push(Answered { sent: *sent, answer });
        }
        if from != member && !cx.net.is_open(member, from) {
            return;
        }
        let delay = if from == member { 0 } else { cx.net.delay(&mut cx.rng, member, from) };
        cx.after(delay, Event::Member(from, ToMember::Beaten { answers, revision }));
    }

    /// The leader has answered.
    pub(crate) fn beaten(&mut self, cx: &mut Context, member: usize, answers: &[Answered], revision: u64) {
        for Answered { sent, answer } in answers {
            let Some(session) = self.members[member].sessions.get_mut(&sent.stream) else { continue };
            session.fresh = session.sequence > sent.sequence;
            match answer {
                BeatAnswer::Refused { why, .. } => {
                    let why =
                        if *why == pb::BeatRefusal::Unknown { Refusal::Forgotten } else { Refusal::Held };
                    self.refuse(cx, member, sent.stream, why);
                    continue;
                }
                BeatAnswer::Lease if sent.sequence > 0 => session.given = Some((sent.sequence, revision)),
                BeatAnswer::Lease | BeatAnswer::Heard => {}
            }
            if !std::mem::replace(&mut session.admitted, true) {
                self.admit(cx, member, sent);
            }
            self.tell(cx, member, sent.stream);
        }
    }

    /// The log has to know the session and its place before the agent is told what to run.
    fn admit(&mut self, cx: &mut Context, member: usize, sent: &Sent) {
        let body = Body::OpenSession(pb::OpenSession { host_id: sent.host.0, place: sent.place });
        self.propose(cx, member, body, Origin::Open { member, stream: sent.stream }, None);
    }

    /// `number`: of the session in the log; none: it was not committed.
    pub(crate) fn opened(&mut self, cx: &mut Context, member: usize, stream: u64, number: Option<u64>) {
        match number {
            Some(number) => self.welcome(cx, member, stream, number),
            None => {
                self.members[member].sessions.remove(&stream);
                cx.close(stream, Way::Up);
            }
        }
    }

    fn welcome(&mut self, cx: &mut Context, member: usize, stream: u64, number: u64) {
        let Some(session) = self.members[member].sessions.get_mut(&stream) else { return };
        session.welcomed = Some(number);
        let welcome = pb::Welcome { member: format!("{member}"), ..Default::default() };
        cx.send(stream, Way::Down, Word::Hub(Box::new(ToAgent::Welcome(welcome))));
        self.tell(cx, member, stream);
    }
}
