//! What the main loop says to the hub in the session there may be: hello, reports and acknowledgements.
//!
//! One report is on its way at a time: the first of a session is of everything, later ones of what changed; each is
//! repeated, with newer news in place of older, until the hub says that it is committed. How an instance ended is
//! said in one report, that it is gone in the next, so that the hub has seen the end before it drops the row.

use std::collections::BTreeMap;
use std::time::Duration;

use nave_agent_core::{Monotonic, Reconciler, WallOffset};
use nave_proto::ids::{ClusterId, HostId, InstanceId};
use nave_proto::pb;
use pb::agent_message::Message;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// The hub has this long to commit a report before it is sent again: an election and some.
const REPEAT: Duration = Duration::from_secs(5);

/// Who we say we are.
#[derive(Debug)]
pub(crate) struct Hello {
    pub(crate) cluster: ClusterId,
    pub(crate) host: HostId,
    pub(crate) facts: pb::HostFacts,
    pub(crate) run_id: String,
}

#[derive(Debug)]
struct InFlight {
    sequence: u64,
    full: bool,
    reports: BTreeMap<u64, pb::InstanceReport>,
    gone: Vec<InstanceId>,
    facts: Option<pb::HostFacts>,
    sent: Monotonic,
}

/// What the hub has for good.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Committed {
    /// They need not be said again.
    pub(crate) gone: Vec<InstanceId>,
    /// Of each of these instances all ends up to that number.
    pub(crate) ends: Vec<(InstanceId, u64)>,
}

impl From<InFlight> for Committed {
    fn from(report: InFlight) -> Self {
        let newest = |one: &pb::InstanceReport| Some((InstanceId(one.instance_id), one.ends.last()?.number));
        Self { gone: report.gone, ends: report.reports.values().filter_map(newest).collect() }
    }
}

#[derive(Debug)]
struct Open {
    outgoing: mpsc::Sender<pb::AgentMessage>,
    close: CancellationToken,
    welcomed: bool,
    full_due: bool,
    /// Changed since the hello.
    facts_due: Option<pb::HostFacts>,
    sequence: u64,
    in_flight: Option<InFlight>,
    acknowledged: (u64, u64),
    /// Of the directory: what the hub has asked to be told of, and what it has been told.
    directory_taken: u64,
    directory_acknowledged: u64,
    /// The interest has changed since it was last said.
    interest_due: bool,
}

/// The session, or its absence.
#[derive(Debug)]
pub(crate) struct Uplink {
    hello: Hello,
    /// So many of the facts' sentences are of what this host never can.
    lacks_ever: usize,
    interest: pb::Interest,
    open: Option<Open>,
}

impl Uplink {
    pub(crate) fn new(hello: Hello) -> Self {
        let lacks_ever = hello.facts.lacks.len();
        Self { hello, lacks_ever, interest: pb::Interest::default(), open: None }
    }

    /// A stream is being opened: the hello is its first message.
    pub(crate) fn opening(
        &mut self,
        outgoing: mpsc::Sender<pb::AgentMessage>,
        close: CancellationToken,
        (incarnation, generation): (u64, u64),
        directory: Option<pb::DirectoryKnown>,
    ) {
        let hello = pb::Hello {
            cluster_id: self.hello.cluster.to_string(),
            host_id: self.hello.host.to_string(),
            facts: Some(self.hello.facts.clone()),
            incarnation,
            generation,
            agent_run_id: self.hello.run_id.clone(),
            interest: Some(self.interest.clone()),
            directory,
        };
        let open = Open {
            outgoing,
            close,
            welcomed: false,
            full_due: true,
            facts_due: None,
            sequence: 0,
            in_flight: None,
            acknowledged: (0, 0),
            directory_taken: 0,
            directory_acknowledged: 0,
            interest_due: false,
        };
        open.send(Message::Hello(hello));
        self.open = Some(open);
    }

    pub(crate) fn welcomed(&mut self) {
        if let Some(open) = &mut self.open {
            open.welcomed = true;
        }
    }

    pub(crate) fn closed(&mut self) {
        self.open = None;
    }

    /// This member's word cannot be used: look for another.
    pub(crate) fn leave(&self) {
        if let Some(open) = &self.open {
            open.close.cancel();
        }
    }

    /// All that the session has said was taken.
    pub(crate) fn is_followed(&self) -> bool {
        self.open.as_ref().is_some_and(|open| !open.close.is_cancelled())
    }

    /// Nobody here calls what was draining at this revision of the directory.
    pub(crate) fn directory_taken(&mut self, revision: u64) {
        if let Some(open) = &mut self.open {
            open.directory_taken = open.directory_taken.max(revision);
        }
    }

    /// The services whose endpoints this host has to know.
    pub(crate) fn interest(&mut self, interest: pb::Interest) {
        if interest != self.interest {
            self.interest = interest;
            if let Some(open) = &mut self.open {
                open.interest_due = true;
            }
        }
    }

    /// What this host cannot do at the moment, beside what it never can.
    pub(crate) fn lacks(&mut self, sentences: Vec<String>) {
        self.hello.facts.lacks.truncate(self.lacks_ever);
        self.hello.facts.lacks.extend(sentences);
        if let Some(open) = &mut self.open {
            open.facts_due = Some(self.hello.facts.clone());
        }
    }

    /// What a person must see to on this host, from now on.
    pub(crate) fn alarms(&mut self, alarms: Vec<String>) {
        self.hello.facts.alarms = alarms;
        if let Some(open) = &mut self.open {
            open.facts_due = Some(self.hello.facts.clone());
        }
    }

    /// The hub has committed a report.
    pub(crate) fn acknowledged(&mut self, sequence: u64) -> Committed {
        let open = self.open.as_mut();
        let report = open.and_then(|open| open.in_flight.take_if(|report| report.sequence == sequence));
        // None: of a report that was repeated since.
        report.map(Committed::from).unwrap_or_default()
    }

    /// Says what is new. Called after each turn, when the ledger has it.
    pub(crate) fn say(&mut self, reconciler: &mut Reconciler, now: Monotonic, wall: WallOffset) {
        let Some(open) = self.open.as_mut().filter(|open| open.welcomed) else { return };
        open.acknowledge(reconciler.generation());
        if open.interest_due {
            open.interest_due = !open.send(Message::Interest(self.interest.clone()));
        }
        open.report(reconciler, now, wall);
    }

    /// When a report is to be repeated.
    pub(crate) fn next_wake(&self) -> Option<Monotonic> {
        Some(self.open.as_ref()?.in_flight.as_ref()?.sent + REPEAT)
    }
}

impl Open {
    fn acknowledge(&mut self, generation: (u64, u64)) {
        if generation == self.acknowledged && self.directory_taken == self.directory_acknowledged {
            return;
        }
        let (incarnation, number) = generation;
        let draining_revision = self.directory_taken;
        let message = pb::Acknowledge { incarnation, generation: number, draining_revision };
        if self.send(Message::Acknowledge(message)) {
            self.acknowledged = generation;
            self.directory_acknowledged = draining_revision;
        }
    }

    fn report(&mut self, reconciler: &mut Reconciler, now: Monotonic, wall: WallOffset) {
        let late = match &self.in_flight {
            Some(report) if now < report.sent + REPEAT => return,
            Some(_) => true,
            None => false,
        };
        let gone = reconciler.gone();
        let sent_facts = self.in_flight.as_ref().and_then(|report| report.facts.clone());
        let facts = self.facts_due.take().or(sent_facts);
        let before = self.in_flight.as_ref();
        if self.full_due || before.is_some_and(|report| report.full) {
            let Some(reports) = reconciler.full_report(wall) else {
                self.facts_due = facts;
                return;
            };
            self.full_due = false;
            return self.send_report(true, reports, BTreeMap::new(), gone, facts, now);
        }
        if late || reconciler.has_reports() || !gone.is_empty() || facts.is_some() {
            let kept = self.in_flight.take().map(|report| report.reports).unwrap_or_default();
            self.send_report(false, reconciler.take_reports(wall), kept, gone, facts, now);
        }
    }

    fn send_report(
        &mut self,
        full: bool,
        news: Vec<pb::InstanceReport>,
        mut reports: BTreeMap<u64, pb::InstanceReport>,
        mut gone: Vec<InstanceId>,
        facts: Option<pb::HostFacts>,
        now: Monotonic,
    ) {
        reports.extend(news.into_iter().map(|report| (report.instance_id, report)));
        gone.retain(|instance| !reports.contains_key(&instance.0));
        self.sequence += 1;
        let message = pb::Report {
            sequence: self.sequence,
            full,
            instances: reports.values().cloned().collect(),
            facts: facts.clone(),
            gone: gone.iter().map(|instance| instance.0).collect(),
        };
        // When the network is too slow to take it now, it is repeated like one that was lost.
        self.send(Message::Report(message));
        self.in_flight = Some(InFlight { sequence: self.sequence, full, reports, gone, facts, sent: now });
    }

    fn send(&self, message: Message) -> bool {
        self.outgoing.try_send(pb::AgentMessage { message: Some(message) }).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    fn uplink() -> Uplink {
        Uplink::new(Hello {
            cluster: ClusterId(1),
            host: HostId(2),
            facts: pb::HostFacts::default(),
            run_id: "r".into(),
        })
    }

    fn wanted(generation: u64, ids: &[u64]) -> pb::WantedSet {
        let instance = |id: &u64| pb::WantedInstance {
            instance_id: *id,
            epoch: 1,
            desired: pb::Desired::Run.into(),
            manifest: Some(pb::Manifest {
                name: "web".into(),
                command: vec!["x".into()],
                ..Default::default()
            }),
            ..Default::default()
        };
        pb::WantedSet { incarnation: 9, generation, instances: ids.iter().map(instance).collect() }
    }

    fn next(from: &mut mpsc::Receiver<pb::AgentMessage>) -> Option<Message> {
        from.try_recv().ok().and_then(|message| message.message)
    }

    #[test]
    fn a_report_is_repeated_with_newer_news_until_it_is_acknowledged() {
        let (mut uplink, mut rng) = (uplink(), StdRng::seed_from_u64(1));
        let mut reconciler = Reconciler::new("boot");
        let (outgoing, mut sent) = mpsc::channel(16);
        let start = Monotonic(0);
        uplink.opening(outgoing, CancellationToken::new(), reconciler.generation(), None);
        assert!(matches!(next(&mut sent), Some(Message::Hello(hello)) if hello.host_id == "h-2"));
        uplink.say(&mut reconciler, start, WallOffset::default());
        assert!(next(&mut sent).is_none(), "nothing is said before the welcome");

        uplink.welcomed();
        reconciler.keeper_processes(start, &mut rng, &[]);
        reconciler.apply_wanted(start, &mut rng, wanted(5, &[1])).unwrap();
        uplink.say(&mut reconciler, start, WallOffset::default());
        assert!(
            matches!(next(&mut sent), Some(Message::Acknowledge(a)) if (a.incarnation, a.generation) == (9, 5))
        );
        let Some(Message::Report(first)) = next(&mut sent) else { panic!("no report") };
        assert!(first.full && first.instances.len() == 1 && first.sequence == 1, "{first:?}");

        // News while it is on its way waits; what is late is sent again, whole.
        reconciler.apply_wanted(start, &mut rng, wanted(6, &[1, 2])).unwrap();
        uplink.say(&mut reconciler, start, WallOffset::default());
        assert!(matches!(next(&mut sent), Some(Message::Acknowledge(_))));
        assert!(next(&mut sent).is_none());
        assert_eq!(uplink.next_wake(), Some(start + REPEAT));
        let later = start + REPEAT;
        uplink.say(&mut reconciler, later, WallOffset::default());
        let Some(Message::Report(again)) = next(&mut sent) else { panic!("no report") };
        assert!(again.full && again.instances.len() == 2 && again.sequence == 2, "{again:?}");

        assert_eq!(uplink.acknowledged(1), Committed::default(), "an older sequence acknowledges nothing");
        assert!(uplink.next_wake().is_some());
        uplink.acknowledged(2);
        assert_eq!(uplink.next_wake(), None);
        uplink.say(&mut reconciler, later, WallOffset::default());
        assert!(next(&mut sent).is_none(), "nothing is new");
    }

    /// The first report in what was sent, if any.
    fn report(sent: &mut mpsc::Receiver<pb::AgentMessage>) -> Option<pb::Report> {
        std::iter::from_fn(|| next(sent)).find_map(|message| match message {
            Message::Report(report) => Some(report),
            _ => None,
        })
    }

    #[test]
    fn what_is_gone_is_said_after_its_end_and_until_the_hub_has_it() {
        let (mut uplink, mut rng) = (uplink(), StdRng::seed_from_u64(1));
        let mut reconciler = Reconciler::new("boot");
        let now = Monotonic(0);
        reconciler.keeper_processes(now, &mut rng, &[]);
        let mut stopped = wanted(5, &[1]);
        stopped.instances[0].set_desired(pb::Desired::Stop);
        reconciler.apply_wanted(now, &mut rng, stopped).unwrap();
        for session in 1..=2 {
            let (outgoing, mut sent) = mpsc::channel(16);
            uplink.opening(outgoing, CancellationToken::new(), reconciler.generation(), None);
            uplink.welcomed();
            uplink.say(&mut reconciler, now, WallOffset::default());
            let end = report(&mut sent).unwrap();
            let ended = end.instances[0].observed.as_ref().unwrap().state.as_ref();
            assert!(matches!(ended, Some(pb::observed::State::Exited(_))), "session {session}: {ended:?}");
            assert_eq!(end.gone, [0_u64; 0]);
            uplink.acknowledged(1);
            uplink.say(&mut reconciler, now, WallOffset::default());
            let gone = report(&mut sent).unwrap();
            assert_eq!((gone.gone, gone.instances.len()), (vec![1], 0), "session {session}");
        }
        assert_eq!(uplink.acknowledged(2).gone, [InstanceId(1)]);
    }
}
