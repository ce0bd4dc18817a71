use super::*;
use crate::leases::{Beat, BeatAnswer};
use nave_proto::ids::HostId;
use nave_proto::lease::fence_ms;
use proptest::prelude::*;

/// A moment of the leader's elapsed time.
pub(crate) fn at(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// Hosts 1.. as rows, to be changed between looks.
#[derive(Debug, Clone)]
pub(crate) struct Fleet {
    hosts: Vec<pb::HostRecord>,
    /// By host: a service of one instance, and its grace when it stops on disconnect.
    instances: Vec<(u64, &'static str, Option<Duration>)>,
}

impl Fleet {
    pub(crate) fn of(statuses: &[HostStatus]) -> Self {
        let host = |(status, id): (&HostStatus, u64)| pb::HostRecord {
            id,
            facts: Some(pb::HostFacts { name: format!("host-{id}"), ..Default::default() }),
            public_key_sha256: vec![u8::try_from(id % 251).unwrap(); 32],
            status: (*status).into(),
            ..Default::default()
        };
        Self { hosts: statuses.iter().zip(1..).map(host).collect(), instances: Vec::new() }
    }

    fn row(&mut self, id: u64) -> &mut pb::HostRecord {
        self.hosts.iter_mut().find(|host| host.id == id).unwrap()
    }

    pub(crate) fn instance(&mut self, host: u64, service: &'static str, stops: Option<Duration>) {
        self.instances.push((host, service, stops));
    }

    pub(crate) fn place(&mut self, id: u64, place: u64) {
        self.row(id).facts.as_mut().unwrap().place = place;
    }

    pub(crate) fn forget(&mut self, id: u64) {
        let row = self.row(id);
        (row.forgotten, row.public_key_sha256) = (true, Vec::new());
        row.set_status(HostStatus::Lost);
    }

    /// As the log would after these verdicts; `wall` is when.
    fn take(&mut self, verdicts: &[Verdict], wall: i64) {
        for verdict in verdicts {
            let row = self.row(verdict.host.0);
            row.lease_over_ms = verdict.lease_over_ms;
            if row.status() != verdict.status {
                row.set_status(verdict.status);
                row.lost_unix_ns = wall;
            }
        }
    }

    pub(crate) fn state(&self) -> ClusterState {
        let lost =
            |host: u64| self.hosts.iter().any(|row| row.id == host && row.status() == HostStatus::Lost);
        let mut rows: Vec<_> = self.hosts.iter().cloned().map(pb::row::Row::Host).collect();
        for (id, (host, service, stops)) in (1..).zip(&self.instances) {
            let manifest = pb::Manifest {
                name: (*service).to_owned(),
                count: 1,
                stop: stops.map(|grace| pb::Stop {
                    signal: 15,
                    grace: grace.try_into().ok(),
                    ..Default::default()
                }),
                placement: stops.map(|_| pb::Placement {
                    on_disconnect: pb::OnDisconnect::Stop.into(),
                    ..Default::default()
                }),
                ..Default::default()
            };
            let service_row = pb::ServiceRecord {
                name: (*service).to_owned(),
                version: 1,
                template_version: 1,
                manifest: Some(Box::new(manifest)),
                oldest_version: 1,
                ..Default::default()
            };
            let version =
                pb::VersionRecord { service: (*service).to_owned(), version: 1, ..Default::default() };
            let observed = lost(*host)
                .then_some(pb::Observed { state: Some(pb::observed::State::Lost(pb::observed::Lost {})) });
            let instance = pb::InstanceRecord {
                id,
                service: (*service).to_owned(),
                version: 1,
                template_version: 1,
                host_id: *host,
                epoch: 1,
                desired: pb::Desired::Run.into(),
                observed,
                ..Default::default()
            };
            rows.push(pb::row::Row::Service(service_row));
            rows.push(pb::row::Row::Version(version));
            rows.push(pb::row::Row::Instance(instance));
        }
        rows.push(pb::row::Row::Cluster(pb::ClusterRecord {
            next_host_id: 10_000,
            next_instance_id: 10_000,
            ..Default::default()
        }));
        ClusterState::from_rows(rows.into_iter().map(|row| pb::Row { row: Some(row) }), 1).unwrap()
    }
}

const UP: HostStatus = HostStatus::Connected;
const SILENT: HostStatus = HostStatus::Silent;
const LOST: HostStatus = HostStatus::Lost;
const WALL: i64 = 1_700_000_000_000_000_000;

fn said(verdicts: &[Verdict]) -> Vec<(u64, HostStatus)> {
    verdicts.iter().map(|verdict| (verdict.host.0, verdict.status)).collect()
}

/// A leader that began at 0, with a fleet that does what it says.
struct Leader {
    fleet: Fleet,
    judge: Judge,
    leases: Leases,
    began: f64,
}

impl Leader {
    fn of(statuses: &[HostStatus]) -> Self {
        Self::begins(Fleet::of(statuses), 0.0)
    }

    fn begins(fleet: Fleet, began: f64) -> Self {
        Self { fleet, judge: Judge::new(at(began)), leases: Leases::new(at(began)), began }
    }

    fn hear(&mut self, hosts: &[u64], seconds: f64) -> Vec<BeatAnswer> {
        let state = self.fleet.state();
        let beat = |host: &u64| Beat { host: HostId(*host), place: 0 };
        hosts.iter().map(|host| self.leases.take(&state, beat(host), true, at(seconds))).collect()
    }

    /// One look; the fleet's rows follow it.
    fn look(&mut self, seconds: f64) -> Vec<(u64, HostStatus)> {
        let wall = WALL + i64::try_from(at(seconds).as_nanos()).unwrap();
        let verdicts = self.judge.look(&self.fleet.state(), &self.leases, at(seconds), wall);
        self.fleet.take(&verdicts, wall);
        said(&verdicts)
    }

    /// Looks each quarter of a second while these hosts beat, and gives what was said with the time.
    fn pass(&mut self, from: f64, to: f64, beating: &[u64]) -> Vec<(f64, u64, HostStatus)> {
        let mut all = Vec::new();
        let mut now = from;
        while now < to {
            self.hear(beating, now);
            all.extend(self.look(now).into_iter().map(|(host, status)| (now - self.began, host, status)));
            now += 0.25;
        }
        all
    }
}

#[test]
fn a_silent_host_is_lost_after_its_lease_and_not_before() {
    let mut leader = Leader::of(&[UP]);
    assert_eq!(leader.look(3.4), [], "a new leader waits one lease, and while another may still give one");
    leader.hear(&[1], 3.4);
    assert_eq!(leader.look(6.3), []);
    assert_eq!(leader.look(6.4), [(1, LOST)]);
    assert_eq!(leader.look(6.65), [], "said once");
    leader.hear(&[1], 8.0);
    assert_eq!(leader.look(8.0), [(1, UP)]);
}

#[test]
fn a_new_leader_says_who_died_with_the_old_one_within_its_wait() {
    let mut leader = Leader::of(&[UP; 3]);
    let all = leader.pass(0.0, 5.0, &[2, 3]);
    assert_eq!(all, [(3.5, 1, LOST)]);
}

#[test]
fn a_host_that_has_just_joined_has_a_lease_s_time_to_be_heard() {
    let mut leader = Leader::of(&[UP; 2]);
    assert_eq!(leader.pass(0.0, 60.0, &[1, 2]), []);
    leader.fleet.hosts.extend(Fleet::of(&[UP; 3]).hosts.pop());
    // Registered; its first session is on its way.
    assert_eq!(leader.pass(60.0, 62.5, &[1, 2]), []);
    assert_eq!(leader.pass(62.5, 70.0, &[1, 2, 3]), []);
    // One that is never heard is lost as any other.
    leader.fleet.hosts.extend(Fleet::of(&[UP; 4]).hosts.pop());
    let said = leader.pass(70.0, 76.0, &[1, 2, 3]);
    assert!(matches!(said[..], [(when, 4, LOST)] if (73.0..75.0).contains(&when)), "{said:?}");
}

#[test]
fn hosts_that_fall_silent_at_once_are_never_lost_one_by_one() {
    // Their last beats were heard over a whole beat and a member's forwarding.
    let mut leader = Leader::of(&[UP; 10]);
    leader.pass(0.0, 10.0, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    for (host, heard) in [(7, 10.0), (8, 10.4), (9, 10.8), (10, 11.25)] {
        leader.hear(&[host], heard);
    }
    let mut all = Vec::new();
    for quarter in 0..200 {
        let now = 11.25 + f64::from(quarter) * 0.25;
        leader.hear(&[1, 2, 3, 4, 5, 6], now);
        all.extend(leader.look(now));
    }
    assert_eq!(all, [(7, SILENT), (8, SILENT), (9, SILENT), (10, SILENT)]);
    assert!(leader.judge.is_braking());

    // Two return: the other two are few, and may be on their way.
    leader.hear(&[1, 2, 3, 4, 5, 6, 7, 8], 70.0);
    assert_eq!(leader.look(70.0), [(7, UP), (8, UP)]);
    leader.hear(&[9], 71.0);
    assert_eq!(leader.look(71.0), [(9, UP)]);
    assert_eq!(leader.pass(71.0, 80.0, &[1, 2, 3, 4, 5, 6, 7, 8, 9]), [(74.0, 10, LOST)]);
}

#[test]
fn a_host_that_is_late_for_another_reason_delays_a_verdict_only_for_a_moment() {
    let mut leader = Leader::of(&[UP; 2]);
    leader.pass(0.0, 10.0, &[1, 2]);
    // Host 2 beats every two seconds, host 1 not at all.
    let mut lost_at = None;
    for quarter in 0..40 {
        let now = 10.0 + f64::from(quarter) * 0.25;
        if quarter % 8 == 0 {
            leader.hear(&[2], now);
        }
        if leader.look(now) == [(1, LOST)] {
            lost_at.get_or_insert(now);
        }
    }
    assert!(lost_at.is_some_and(|at| at <= 9.75 + 3.0 + 1.25), "{lost_at:?}");
}

#[test]
fn giving_a_silent_host_up_thaws_the_rest() {
    let mut leader = Leader::of(&[UP; 5]);
    assert_eq!(leader.pass(0.0, 8.0, &[1, 2, 3]), [(3.5, 4, SILENT), (3.5, 5, SILENT)]);
    leader.fleet.instance(4, "own", None);
    leader.fleet.forget(4);
    leader.hear(&[1, 2, 3], 8.0);
    assert_eq!(leader.look(8.0), [(5, LOST)]);
}

#[test]
fn hosts_lost_one_after_another_within_a_minute_count_together() {
    let mut leader = Leader::of(&[UP; 3]);
    assert_eq!(leader.pass(0.0, 4.0, &[2, 3]), [(3.5, 1, LOST)]);
    assert_eq!(leader.pass(4.0, 14.0, &[3]), [(6.75, 2, SILENT)]);
    // Beating again, the first is no longer one of many only when its minute is over.
    assert_eq!(leader.pass(14.0, 80.0, &[3]), [(60.5, 2, LOST)], "a minute later it stands alone");
}

#[test]
fn a_new_leader_remembers_from_the_log_who_was_lost_within_the_minute() {
    let mut first = Leader::of(&[UP; 3]);
    assert_eq!(first.pass(0.0, 4.0, &[2, 3]), [(3.5, 1, LOST)]);
    let mut second = Leader::begins(first.fleet, 10.0);
    assert_eq!(second.pass(10.0, 20.0, &[3]), [(3.5, 2, SILENT)], "two of three within a minute");
    let mut third = Leader::begins(second.fleet, 100.0);
    assert_eq!(third.pass(100.0, 110.0, &[3]), [(3.5, 2, LOST)]);
}

#[test]
fn a_host_lost_again_and_again_is_called_back_ever_later() {
    let mut leader = Leader::of(&[UP; 3]);
    leader.pass(0.0, 10.0, &[1, 2, 3]);
    let mut now = 10.0;
    let mut waits = Vec::new();
    for _ in 0..5 {
        leader.pass(now, now + 5.0, &[2, 3]);
        let back = leader.pass(now + 5.0, now + 45.0, &[1, 2, 3]);
        let (said, host, status) = back[0];
        assert_eq!((host, status, back.len()), (1, UP, 1));
        waits.push(said - (now + 5.0));
        now += 45.0;
    }
    assert_eq!(waits, [0.0, 2.0, 4.0, 8.0, 16.0]);
}

#[test]
fn a_lost_host_is_said_to_be_without_a_lease_once_for_each_grace() {
    let mut leader = Leader::of(&[UP; 2]);
    leader.fleet.instance(1, "plain", None);
    leader.fleet.instance(1, "quick", Some(at(1.0)));
    leader.fleet.instance(1, "slow", Some(at(20.0)));
    leader.hear(&[1], 5.0);
    assert_eq!(leader.pass(5.25, 8.5, &[2]), [(8.0, 1, LOST)]);
    let quick = at(5.0) + Duration::from_millis(fence_ms(at(1.0)));
    let slow = at(5.0) + Duration::from_millis(fence_ms(at(20.0)));
    let all = leader.pass(8.5, 60.0, &[2]);
    let times: Vec<f64> = all
        .iter()
        .map(|(time, _, status)| {
            assert_eq!(*status, LOST);
            *time
        })
        .collect();
    assert_eq!(times.len(), 2, "{all:?}");
    assert!(at(times[0]) >= quick && at(times[0] - 0.25) < quick, "{times:?}");
    assert!(at(times[1]) >= slow && at(times[1] - 0.25) < slow, "{times:?}");
    assert_eq!(
        leader.fleet.hosts[0].lease_over_ms,
        u64::try_from((at(times[1]) - at(5.0)).as_millis()).unwrap()
    );
}

#[test]
fn a_host_given_up_is_said_to_be_without_a_lease_too() {
    let mut leader = Leader::of(&[SILENT, UP]);
    leader.fleet.instance(1, "single", Some(at(1.0)));
    leader.hear(&[1], 5.0);
    leader.fleet.forget(1);
    assert_eq!(
        leader.hear(&[1], 6.0),
        [BeatAnswer::Refused { why: pb::BeatRefusal::Unknown, after: at(0.0) }]
    );
    let all = leader.pass(6.25, 60.0, &[2]);
    let until = at(5.0) + Duration::from_millis(fence_ms(at(1.0)));
    assert!(matches!(all[..], [(time, 1, LOST)] if at(time) >= until), "{all:?}");
}

/// One step of a random history: time in quarters of a second, then who beats, and whether the leader changes.
#[derive(Debug, Clone)]
struct Step {
    quarters: u8,
    beats: bool,
    new_leader: bool,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (1_u8..20, any::<bool>(), prop::bool::weighted(0.1))
        .prop_map(|(quarters, beats, new_leader)| Step { quarters, beats, new_leader });
    prop::collection::vec(step, 1..60)
}

proptest! {
    /// The whole promise, from both sides: whenever the log says that a host was without a lease for the fence of
    /// an instance, a process that its agent ended by the rules is gone; leaders change, an old one goes on giving
    /// leases for a while.
    #[test]
    fn no_fence_opens_while_a_process_may_run(steps in steps(), grace in 0_u64..15_000) {
        let grace = Duration::from_millis(grace);
        let mut fleet = Fleet::of(&[UP, UP, UP]);
        fleet.instance(1, "single", Some(grace));
        let mut leader = Leader::begins(fleet, 0.0);
        let mut old: Option<(Leases, f64)> = None;
        let (mut now, mut lease_ends) = (0.0, at(0.0));
        for step in steps {
            if step.new_leader {
                let next = Leader::begins(leader.fleet.clone(), now);
                old = Some((std::mem::replace(&mut leader, next).leases, now));
            }
            for _ in 0..step.quarters {
                now += 0.25;
                if step.beats {
                    // The agent sent it a moment ago; that moment is the latest it can have been.
                    let beat = Beat { host: HostId(1), place: 0 };
                    let state = leader.fleet.state();
                    let mut leased = leader.leases.take(&state, beat, true, at(now)) == BeatAnswer::Lease;
                    if let Some((leases, since)) = &mut old
                        && now - *since < 0.35
                    {
                        leased |= leases.take(&state, beat, true, at(now)) == BeatAnswer::Lease;
                    }
                    if leased {
                        lease_ends = lease_ends.max(at(now) + nave_proto::lease::HOLD);
                    }
                }
                leader.hear(&[2, 3], now);
                leader.look(now);
                let row = &leader.fleet.hosts[0];
                if row.status() == LOST && row.lease_over_ms >= fence_ms(grace) {
                    let gone = lease_ends + grace + nave_proto::lease::KILL;
                    prop_assert!(gone <= at(now), "at {now} s, the process may run until {gone:?}");
                }
            }
        }
    }
}
