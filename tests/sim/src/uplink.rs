//! What an agent says in the session there may be: the hello, one report at a time until it is acknowledged, beats.
//! The rules of the agent's own uplink, on the world's streams.

use std::collections::BTreeMap;
use std::time::Duration;

use nave_agent_core::{Monotonic, Reconciler, WallOffset};
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use pb::agent_message::Message;

use crate::clock::SECOND;
use crate::context::Context;
use crate::network::{Way, Word};

const REPEAT: i64 = 5 * SECOND;
const BEAT: i64 = SECOND;
/// More than a lease has.
const BEATS_REMEMBERED: usize = 16;

#[derive(Debug)]
struct InFlight {
    sequence: u64,
    full: bool,
    reports: BTreeMap<u64, pb::InstanceReport>,
    gone: Vec<InstanceId>,
    sent: i64,
}

/// A session's end at the agent.
#[derive(Debug)]
pub(crate) struct Uplink {
    pub(crate) stream: u64,
    pub(crate) opened: i64,
    pub(crate) welcomed: bool,
    full_due: bool,
    sequence: u64,
    in_flight: Option<InFlight>,
    beat_at: i64,
    beats: u64,
    /// When the newest beats were sent, by number.
    sent: BTreeMap<u64, i64>,
}

impl Uplink {
    /// `now` is the host's boot clock.
    pub(crate) fn open(
        cx: &mut Context,
        stream: u64,
        host_id: u64,
        place: u64,
        now: i64,
        (incarnation, generation): (u64, u64),
    ) -> Self {
        let facts = Some(pb::HostFacts { place, ..Default::default() });
        let hello = pb::Hello {
            host_id: format!("h-{host_id}"),
            facts,
            incarnation,
            generation,
            ..Default::default()
        };
        cx.send(stream, Way::Up, Word::Agent(Box::new(Message::Hello(hello))));
        Self {
            stream,
            opened: now,
            welcomed: false,
            full_due: true,
            sequence: 0,
            in_flight: None,
            beat_at: now,
            beats: 0,
            sent: BTreeMap::new(),
        }
    }

    /// The hub has committed it: these are gone for good, and of these all ends up to that number are told.
    pub(crate) fn acknowledged(&mut self, sequence: u64) -> (Vec<InstanceId>, Vec<(InstanceId, u64)>) {
        let Some(report) = self.in_flight.take_if(|report| report.sequence == sequence) else {
            return (Vec::new(), Vec::new());
        };
        let newest = |one: &pb::InstanceReport| Some((InstanceId(one.instance_id), one.ends.last()?.number));
        (report.gone, report.reports.values().filter_map(newest).collect())
    }

    /// Until when the host has a lease, if this one is counted from a beat that is remembered.
    pub(crate) fn lease_until(&self, lease: &pb::Lease) -> Option<Monotonic> {
        let sent = Monotonic(*self.sent.get(&lease.sequence)?);
        Some(sent + Duration::from_millis(lease.hold_ms))
    }

    pub(crate) fn beat(&mut self, cx: &mut Context, now: i64) {
        if now < self.beat_at {
            return;
        }
        self.beat_at = now + BEAT;
        self.beats += 1;
        self.sent.insert(self.beats, now);
        if self.sent.len() > BEATS_REMEMBERED {
            self.sent.pop_first();
        }
        let beat = pb::Beat { sequence: self.beats };
        cx.send(self.stream, Way::Up, Word::Agent(Box::new(Message::Beat(beat))));
    }

    pub(crate) fn next_wake(&self) -> i64 {
        let repeat = self.in_flight.as_ref().map_or(i64::MAX, |report| report.sent + REPEAT);
        repeat.min(self.beat_at)
    }

    pub(crate) fn say(&mut self, cx: &mut Context, reconciler: &mut Reconciler, now: Monotonic) {
        if !self.welcomed {
            return;
        }
        self.report(cx, reconciler, now.0);
    }

    fn report(&mut self, cx: &mut Context, reconciler: &mut Reconciler, now: i64) {
        let late = match &self.in_flight {
            Some(report) if now < report.sent + REPEAT => return,
            Some(_) => true,
            None => false,
        };
        let gone = reconciler.gone();
        let before = self.in_flight.as_ref();
        if self.full_due || before.is_some_and(|report| report.full) {
            let Some(reports) = reconciler.full_report(WallOffset::default()) else { return };
            self.full_due = false;
            return self.send_report(cx, true, reports, BTreeMap::new(), gone, now);
        }
        if late || reconciler.has_reports() || !gone.is_empty() {
            let kept = self.in_flight.take().map(|report| report.reports).unwrap_or_default();
            let news = reconciler.take_reports(WallOffset::default());
            self.send_report(cx, false, news, kept, gone, now);
        }
    }

    fn send_report(
        &mut self,
        cx: &mut Context,
        full: bool,
        news: Vec<pb::InstanceReport>,
        mut reports: BTreeMap<u64, pb::InstanceReport>,
        mut gone: Vec<InstanceId>,
        now: i64,
    ) {
        reports.extend(news.into_iter().map(|report| (report.instance_id, report)));
        gone.retain(|instance| !reports.contains_key(&instance.0));
        self.sequence += 1;
        let message = pb::Report {
            sequence: self.sequence,
            full,
            instances: reports.values().cloned().collect(),
            facts: None,
            gone: gone.iter().map(|instance| instance.0).collect(),
        };
        cx.send(self.stream, Way::Up, Word::Agent(Box::new(Message::Report(message))));
        self.in_flight = Some(InFlight { sequence: self.sequence, full, reports, gone, sent: now });
    }
}
