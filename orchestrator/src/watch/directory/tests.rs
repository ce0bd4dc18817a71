use std::collections::BTreeMap;
use std::sync::Arc;

use nave_orchestrator_core::{directory_endpoint, directory_service};
use proptest::prelude::*;

use super::*;

const HTTP: &str = "http";

fn service(name: &str, service_port: u32) -> Change {
    let port = pb::Port { service_port, ..Default::default() };
    let manifest = pb::Manifest { ports: [(HTTP.to_owned(), port)].into(), ..Default::default() };
    Change::Service(Arc::new(pb::ServiceRecord {
        name: name.to_owned(),
        manifest: Some(Box::new(manifest)),
        ..Default::default()
    }))
}

fn record(id: u64, service: &str, epoch: u64, state: pb::EndpointState) -> pb::InstanceRecord {
    pb::InstanceRecord {
        id,
        service: service.to_owned(),
        host_id: id % 3,
        epoch,
        desired: pb::Desired::Run.into(),
        ports: [(HTTP.to_owned(), 20_000)].into(),
        endpoint: state.into(),
        ..Default::default()
    }
}

fn endpoint(id: u64, service: &str, state: pb::EndpointState) -> Change {
    Change::Instance(Arc::new(record(id, service, 1, state)))
}

fn host(id: u64) -> Change {
    let facts = pb::HostFacts { name: format!("host-{id}"), ..Default::default() };
    Change::Host(Arc::new(pb::HostRecord { id, facts: Some(facts), ..Default::default() }))
}

fn directory(items_max: usize, everything_max: usize) -> Arc<Directory> {
    let directory = Directory::bounded(items_max, everything_max, everything_max * 8 / 10);
    directory.applied(1, &[]);
    Arc::new(directory)
}

/// A session that the log has yet to show here, of an agent that knows nothing.
fn seat(directory: &Arc<Directory>, number: u64) -> Seat {
    opened(directory, number, u64::MAX, None).0
}

fn opened(
    directory: &Arc<Directory>,
    number: u64,
    session: u64,
    known: Option<Known>,
) -> (Seat, Option<Place>) {
    directory.seat(Opened { number, host: HostId(number), session, known })
}

/// What is behind the place, and the place where the reader then is.
fn read(seat: &Seat, place: &mut Option<Place>) -> News {
    let here = seat.here().0;
    let news = seat.news(*place);
    *place = Some(here);
    news
}

fn ids(news: News) -> Vec<u64> {
    match news {
        News::Changes(changed) => changed.endpoints.into_iter().map(|id| id.0).collect(),
        News::Whole => panic!("whole"),
    }
}

#[test]
fn a_change_that_shows_nothing_new_is_told_to_nobody() {
    let directory = directory(100, 1000);
    let seat = seat(&directory, 1);
    let mut place = None;
    directory.applied(2, &[service("web", 80), endpoint(5, "web", pb::EndpointState::Ready)]);
    assert_eq!(read(&seat, &mut place), News::Whole);
    let mut noisy = record(5, "web", 1, pb::EndpointState::Ready);
    noisy.restarts = 7;
    noisy.reason = "slow".to_owned();
    directory.applied(3, &[Change::Instance(Arc::new(noisy)), service("web", 80)]);
    assert_eq!(read(&seat, &mut place), News::Changes(Changed::default()));
    directory.applied(4, &[endpoint(5, "web", pb::EndpointState::Draining)]);
    directory.applied(5, &[Change::Deleted(RowId::Instance(InstanceId(5)))]);
    assert_eq!(ids(read(&seat, &mut place)), [5], "twice, told once");
    assert!(directory.index.lock().endpoints.is_empty());
}

#[test]
fn of_a_large_fleet_only_those_who_named_it_hear_of_an_endpoint() {
    let directory = directory(100, 0);
    let (web, db) = (seat(&directory, 1), seat(&directory, 2));
    directory.applied(2, &[host(1), service("web", 80), endpoint(5, "web", pb::EndpointState::Ready)]);
    assert!(!web.here().1);
    assert_eq!(web.set_interest(["web".to_owned()]), ["web".into()]);
    assert_eq!(web.set_interest(["web".to_owned()]), [], "named before");
    db.set_interest(["db".to_owned()]);
    let (mut at_web, mut at_db) = (None, None);
    assert_eq!(read(&web, &mut at_web), News::Whole);
    assert_eq!(read(&db, &mut at_db), News::Whole);
    directory.ring();
    directory.applied(3, &[endpoint(5, "web", pb::EndpointState::Draining)]);
    assert_eq!(ids(read(&web, &mut at_web)), [5]);
    assert_eq!(ids(read(&db, &mut at_db)), [0; 0]);
    web.set_interest([]);
    directory.applied(4, &[endpoint(5, "web", pb::EndpointState::Ready)]);
    assert_eq!(ids(read(&web, &mut at_web)), [0; 0]);
    drop((web, db));
    let index = directory.index.lock();
    assert!(index.interested.is_empty() && index.seats.is_empty());
}

#[tokio::test(start_paused = true)]
async fn only_those_are_woken_whom_it_concerns() {
    let directory = directory(100, 0);
    let (web, db) = (seat(&directory, 1), seat(&directory, 2));
    web.set_interest(["web".to_owned()]);
    let quiet = |seat: &Seat| {
        let bell = seat.bell.clone();
        async move { tokio::time::timeout(Duration::from_secs(1), bell.rung.notified()).await.is_err() }
    };
    directory.applied(2, &[host(1), endpoint(5, "web", pb::EndpointState::Ready)]);
    directory.ring();
    web.rung().await;
    // The fleet has become a large one by that, which both are told.
    db.rung().await;
    directory.applied(3, &[endpoint(5, "web", pb::EndpointState::Draining)]);
    directory.ring();
    assert_eq!(web.rung().await, COALESCE, "urgent");
    assert!(quiet(&db).await);
    directory.applied(4, &[service("web", 80)]);
    directory.ring();
    web.rung().await;
    db.rung().await;
}

#[test]
fn a_place_that_left_the_ring_and_a_change_of_mode_mean_whole() {
    let directory = directory(4, 6);
    let seat = seat(&directory, 1);
    let mut place = None;
    directory.applied(2, &[host(1), host(2)]);
    read(&seat, &mut place);
    for id in 0..3 {
        directory.applied(3 + id, &[endpoint(id, "web", pb::EndpointState::Ready)]);
    }
    assert_eq!(ids(read(&seat, &mut place)), [0, 1, 2], "two hosts, three endpoints");
    directory.applied(6, &[endpoint(3, "web", pb::EndpointState::Ready)]);
    assert!(!seat.here().1);
    assert_eq!(read(&seat, &mut place), News::Whole, "too many for everybody");
    let gone = |id| Change::Deleted(RowId::Instance(InstanceId(id)));
    directory.applied(7, &[gone(3)]);
    assert!(!seat.here().1, "it does not flip back at once");
    directory.applied(8, &[gone(2)]);
    assert!(!seat.here().1);
    directory.applied(9, &[gone(1)]);
    assert!(seat.here().1);
    assert_eq!(read(&seat, &mut place), News::Whole);
    for revision in 10..20 {
        let state = [pb::EndpointState::Ready, pb::EndpointState::Starting][usize::from(revision % 2 == 0)];
        directory.applied(revision, &[endpoint(0, "web", state)]);
    }
    assert_eq!(read(&seat, &mut place), News::Whole, "fell out");
}

#[test]
fn a_drain_is_taken_when_all_whom_it_concerns_have_said_so() {
    let directory = directory(100, 1000);
    let (first, second) = (seat(&directory, 1), seat(&directory, 2));
    directory.applied(2, &[endpoint(5, "web", pb::EndpointState::Ready)]);
    assert_eq!(directory.standing().taken, 0, "nobody knows what a new session's agent has from before");
    assert!(first.owes());
    first.taken(2);
    second.taken(2);
    directory.applied(3, &[endpoint(6, "web", pb::EndpointState::Ready)]);
    assert_eq!((directory.standing().taken, first.owes()), (3, false), "nothing drains");
    directory.applied(4, &[endpoint(5, "web", pb::EndpointState::Draining)]);
    assert_eq!(directory.standing().taken, 3);
    first.taken(4);
    directory.applied(5, &[endpoint(7, "web", pb::EndpointState::Ready)]);
    assert_eq!(directory.standing().taken, 3, "one has yet to say so");
    directory.applied(6, &[endpoint(6, "web", pb::EndpointState::Draining)]);
    second.taken(4);
    assert_eq!(directory.standing().taken, 4, "of the older one both have");
    drop(second);
    assert_eq!(directory.standing().taken, 5, "the one that is left has not taken the newer");
    first.taken(6);
    assert_eq!(directory.standing().taken, 6);
}

#[test]
fn who_did_not_name_the_service_holds_no_drain_up() {
    let directory = directory(100, 0);
    let (web, db) = (seat(&directory, 1), seat(&directory, 2));
    directory.applied(2, &[host(1), endpoint(5, "web", pb::EndpointState::Ready)]);
    web.set_interest(["web".to_owned()]);
    web.taken(2);
    db.taken(2);
    directory.applied(3, &[endpoint(5, "web", pb::EndpointState::Draining)]);
    assert!(web.owes() && !db.owes());
    web.taken(3);
    assert_eq!(directory.standing().taken, 3);
}

fn session(host: u64, session: u64, sequence: u64) -> Change {
    Change::Session(Arc::new(pb::SessionRecord { host_id: host, session, sequence }))
}

#[test]
fn the_logs_sessions_are_counted_where_they_are() {
    let directory = directory(100, 1000);
    let standing = || {
        let Standing { taken, as_of, sessions } = directory.standing();
        (taken, as_of, sessions)
    };
    let (first, _) = opened(&directory, 1, 2, None);
    let _second = opened(&directory, 2, 3, None);
    assert_eq!(standing(), (0, 1, 0), "this member has yet to apply them");
    directory.applied(2, &[session(1, 2, 0)]);
    directory.applied(3, &[session(2, 3, 0)]);
    assert_eq!(standing(), (0, 3, 2));
    directory.applied(4, &[session(1, 2, 1), session(7, 4, 0)]);
    assert_eq!(directory.sessions(), LogSessions { count: 3, changed: 4, as_of: 4 });
    first.taken(4);
    directory.applied(5, &[session(1, 2, 2)]);
    assert_eq!(directory.sessions(), LogSessions { count: 3, changed: 4, as_of: 5 }, "a report");
    // The second goes on elsewhere: its old session, which nobody has noticed to be dead, holds nothing up.
    directory.applied(6, &[session(2, 6, 0)]);
    assert_eq!(standing(), (6, 6, 1));
    directory.applied(7, &[Change::Deleted(RowId::Session(HostId(1)))]);
    assert_eq!((standing(), directory.sessions().count), ((7, 7, 0), 2), "lost");
}

#[test]
fn a_session_goes_on_where_the_last_one_ended_while_all_since_is_known() {
    let directory = directory(4, 1000);
    for revision in 2..=9 {
        let state = [pb::EndpointState::Ready, pb::EndpointState::Starting][usize::from(revision % 2 == 0)];
        directory.applied(revision, &[endpoint(0, "web", state)]);
    }
    let open = |number, revision, everything| {
        opened(&directory, number, u64::MAX, Some(Known { revision, everything }))
    };
    assert_eq!(open(1, 4, true).1, None, "some of it has left the ring");
    assert_eq!(open(2, 7, false).1, None, "it knows the endpoints of some services alone");
    let (seat, mut place) = open(3, 7, true);
    assert!(seat.owes(), "something may have begun to drain meanwhile");
    assert_eq!(directory.standing().taken, 7);
    assert_eq!(ids(read(&seat, &mut place)), [0]);
    drop(seat);
    let (seat, mut place) = open(4, 9, true);
    assert!(!seat.owes(), "it knows all there is");
    assert_eq!(directory.standing().taken, 9);
    assert_eq!(ids(read(&seat, &mut place)), [0; 0]);
    let ahead = open(5, 12, true);
    assert!(ahead.1.is_some() && !ahead.0.owes(), "this member has yet to apply what it knows");
    directory.applied(10, &[endpoint(0, "web", pb::EndpointState::Draining)]);
    assert!(seat.owes() && !ahead.0.owes());
}

#[derive(Debug, Clone)]
enum Step {
    Service(u8, Option<u32>),
    Endpoint { id: u8, service: u8, epoch: u64, state: i32, stop: bool },
    Gone(u8),
    Interest(Vec<u8>),
    Read,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => (0..4u8, prop::option::of(80..83u32)).prop_map(|(name, port)| Step::Service(name, port)),
        6 => (0..6u8, 0..4u8, 1..3u64, 0..4i32, any::<bool>())
            .prop_map(|(id, service, epoch, state, stop)| Step::Endpoint { id, service, epoch, state, stop }),
        1 => (0..6u8).prop_map(Step::Gone),
        2 => prop::collection::vec(0..4u8, 0..3).prop_map(Step::Interest),
        4 => Just(Step::Read),
    ];
    prop::collection::vec(step, 1..120)
}

/// All services, and the endpoints of those that an agent may know, by what is told of each.
type Picture = (BTreeMap<String, pb::DirectoryService>, BTreeMap<u64, pb::DirectoryEndpoint>);

#[derive(Default)]
struct Truth {
    services: BTreeMap<String, Arc<pb::ServiceRecord>>,
    instances: BTreeMap<u64, Arc<pb::InstanceRecord>>,
}

impl Truth {
    fn known(&self, everything: bool, interest: &BTreeSet<Arc<str>>) -> Picture {
        let endpoints = self.instances.values().filter_map(|record| directory_endpoint(record));
        let endpoints = endpoints.filter(|one| everything || interest.contains(one.service.as_str()));
        (
            self.services
                .values()
                .filter_map(|record| directory_service(record))
                .map(|one| (one.name.clone(), one))
                .collect(),
            endpoints.map(|one| (one.instance_id, one)).collect(),
        )
    }
}

proptest! {
    /// Whoever follows its place, and looks up what it is told of, knows what there is to know, always.
    #[test]
    fn a_session_that_follows_knows_what_there_is(
        steps in steps(),
        items_max in 1..12usize,
        everything_max in prop_oneof![Just(0usize), Just(4), Just(1000)],
    ) {
        let directory = directory(items_max, everything_max);
        let seat = seat(&directory, 1);
        let mut truth = Truth::default();
        let (mut place, mut owed) = (None, BTreeSet::<Arc<str>>::new());
        let mut known = Picture::default();
        let mut revision = 1;
        directory.applied(1, &[host(0), host(1)]);
        for step in steps {
            revision += 1;
            let change = match step {
                Step::Service(name, Some(port)) => service(&format!("s{name}"), port),
                Step::Service(name, None) => Change::Deleted(RowId::Service(format!("s{name}"))),
                Step::Endpoint { id, service, epoch, state, stop } => {
                    // An instance is of one service for ever.
                    let name = truth.instances.get(&u64::from(id)).map_or(format!("s{service}"), |one| one.service.clone());
                    let state = pb::EndpointState::try_from(state).unwrap();
                    let desired = if stop { pb::Desired::Stop } else { pb::Desired::Run };
                    let record = record(u64::from(id), &name, epoch, state);
                    Change::Instance(Arc::new(pb::InstanceRecord { desired: desired.into(), ..record }))
                }
                Step::Gone(id) => Change::Deleted(RowId::Instance(InstanceId(u64::from(id)))),
                Step::Interest(names) => {
                    owed.extend(seat.set_interest(names.into_iter().map(|name| format!("s{name}"))));
                    let interest = seat.interest();
                    if !seat.here().1 {
                        known.1.retain(|_, one| interest.contains(one.service.as_str()));
                    }
                    continue;
                }
                Step::Read => {
                    let everything = seat.here().1;
                    let interest = seat.interest();
                    let there = truth.known(everything, &interest);
                    match read(&seat, &mut place) {
                        News::Whole => known = there.clone(),
                        News::Changes(changed) => {
                            for name in changed.services {
                                match there.0.get(&*name) {
                                    Some(one) => drop(known.0.insert(name.to_string(), one.clone())),
                                    None => drop(known.0.remove(&*name)),
                                }
                            }
                            for id in changed.endpoints {
                                match there.1.get(&id.0) {
                                    Some(one) => drop(known.1.insert(id.0, one.clone())),
                                    None => drop(known.1.remove(&id.0)),
                                }
                            }
                            for name in owed.iter().filter(|_| !everything) {
                                let told = there.1.iter().filter(|(_, one)| one.service == **name);
                                known.1.extend(told.map(|(id, one)| (*id, one.clone())));
                            }
                        }
                    }
                    owed.clear();
                    prop_assert_eq!(&known, &there);
                    continue;
                }
            };
            match &change {
                Change::Service(record) => drop(truth.services.insert(record.name.clone(), Arc::clone(record))),
                Change::Instance(record) => drop(truth.instances.insert(record.id, Arc::clone(record))),
                Change::Deleted(RowId::Service(name)) => drop(truth.services.remove(name)),
                Change::Deleted(RowId::Instance(id)) => drop(truth.instances.remove(&id.0)),
                other => panic!("not in this test: {other:?}"),
            }
            directory.applied(revision, &[change]);
        }
    }
}
