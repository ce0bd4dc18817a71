//! The wanted set, the keeper's list and the ledger, one claim a test.

use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::*;
use crate::supervisor::{ProbeKind, ProbeOutcome, SpawnError, State};

const NOW: Monotonic = Monotonic(1_000_000_000_000);

fn rng() -> StdRng {
    StdRng::seed_from_u64(1)
}

fn wanted(id: u64, epoch: u64, desired: pb::Desired) -> pb::WantedInstance {
    let manifest = pb::Manifest { name: format!("s{id}"), ..pb::Manifest::default() };
    pb::WantedInstance {
        instance_id: id,
        epoch,
        desired: desired.into(),
        manifest: Some(manifest),
        ..pb::WantedInstance::default()
    }
}

fn run(id: u64) -> pb::WantedInstance {
    wanted(id, 1, pb::Desired::Run)
}

fn set(generation: u64, instances: Vec<pb::WantedInstance>) -> pb::WantedSet {
    pb::WantedSet { incarnation: 9, generation, instances }
}

fn delta(from: u64, to: u64, put: Vec<pb::WantedInstance>, removed: Vec<u64>) -> pb::WantedDelta {
    pb::WantedDelta { incarnation: 9, from_generation: from, to_generation: to, put, removed }
}

fn kept(id: u64, epoch: u64, attempt: u32, leftover: bool) -> pb::KeptProcess {
    let process = pb::ProcessIdentity { pid: 100 + attempt, ..pb::ProcessIdentity::default() };
    pb::KeptProcess {
        instance_id: id,
        epoch,
        attempt,
        process: Some(process),
        leftover,
        ..pb::KeptProcess::default()
    }
}

fn key(epoch: u64, attempt: u32) -> ProcessKey {
    ProcessKey { epoch, attempt }
}

fn spawned(attempt: u32) -> Input {
    let process = pb::ProcessIdentity { pid: 100 + attempt, ..pb::ProcessIdentity::default() };
    Input::Spawned { key: key(1, attempt), process, started_unix_ns: 1 }
}

fn exit(id: u64, attempt: u32, sequence: u64) -> pb::ExitRecord {
    pb::ExitRecord {
        instance_id: id,
        epoch: 1,
        attempt,
        sequence,
        code: 1,
        ran_ms: 60_000,
        ..pb::ExitRecord::default()
    }
}

fn count(orders: &[Order], wanted: impl Fn(&Action) -> bool) -> usize {
    orders.iter().filter(|order| wanted(&order.action)).count()
}

fn spawns(orders: &[Order]) -> usize {
    count(orders, |action| matches!(action, Action::Spawn(_)))
}

fn signals(orders: &[Order]) -> usize {
    count(orders, |action| matches!(action, Action::Signal { .. }))
}

/// The keeper runs nothing, `ids` are wanted and run.
fn running(ids: &[u64]) -> Reconciler {
    let mut reconciler = Reconciler::new("boot");
    reconciler.keeper_processes(NOW, &mut rng(), &[]);
    let instances = ids.iter().map(|&id| run(id)).collect();
    reconciler.apply_wanted(NOW, &mut rng(), set(5, instances)).unwrap();
    for &id in ids {
        reconciler.input(NOW, &mut rng(), InstanceId(id), spawned(1));
    }
    reconciler
}

/// What is on disk when the orders given so far have been carried out.
fn restored(reconciler: &Reconciler) -> Reconciler {
    Reconciler::restore("boot", reconciler.ledger_records(), NOW)
}

#[test]
fn an_older_generation_never_moves_it_back() {
    let mut reconciler = running(&[1]);
    let before = reconciler.generation();
    let error = reconciler.apply_wanted(NOW, &mut rng(), set(4, vec![])).unwrap_err();
    assert_eq!(error, StaleWanted { given: 4, known: 5 });
    assert_eq!(reconciler.generation(), before);
    assert!(reconciler.gone().is_empty() && reconciler.supervisor(InstanceId(1)).is_some());
    let other = pb::WantedSet { incarnation: 10, ..set(1, vec![run(1)]) };
    assert_eq!(reconciler.apply_wanted(NOW, &mut rng(), other), Ok(vec![]), "a new incarnation counts anew");
    let given_up = pb::WantedSet { incarnation: 9, ..set(99, vec![]) };
    assert!(reconciler.apply_wanted(NOW, &mut rng(), given_up).is_err(), "the hub from before a restore");
    assert!(reconciler.supervisor(InstanceId(1)).is_some());
}

#[test]
fn the_same_set_again_changes_nothing() {
    let mut reconciler = running(&[1, 2]);
    assert_eq!(reconciler.apply_wanted(NOW, &mut rng(), set(5, vec![run(1), run(2)])), Ok(vec![]));
}

#[test]
fn a_delta_applies_only_on_top_of_what_it_names() {
    let mut reconciler = running(&[1]);
    let need = NeedWhole { incarnation: 9, generation: 5 };
    for wrong in [
        delta(4, 6, vec![], vec![1]),
        delta(6, 7, vec![], vec![1]),
        delta(5, 4, vec![], vec![1]),
        pb::WantedDelta { incarnation: 8, ..delta(5, 6, vec![], vec![1]) },
    ] {
        assert_eq!(reconciler.apply_delta(NOW, &mut rng(), wrong), Err(need));
        assert_eq!(reconciler.generation(), (9, 5));
    }
    let orders = reconciler.apply_delta(NOW, &mut rng(), delta(5, 6, vec![run(2)], vec![1])).unwrap();
    assert_eq!((spawns(&orders), signals(&orders)), (1, 2));
    assert_eq!(reconciler.generation(), (9, 6));
}

#[test]
fn instances_not_in_the_whole_set_are_stopped_and_forgotten() {
    let mut reconciler = running(&[1, 2]);
    let orders = reconciler.apply_wanted(NOW, &mut rng(), set(6, vec![run(2)])).unwrap();
    assert!(orders.iter().all(|order| order.instance == InstanceId(1)));
    assert_eq!(signals(&orders), 2);
    reconciler.exited(NOW, &mut rng(), exit(1, 1, 1));
    reconciler.input(NOW, &mut rng(), InstanceId(1), Input::CgroupEmpty { key: key(1, 1), killed: 0 });
    assert_eq!(reconciler.gone(), [InstanceId(1)]);
    assert_eq!(reconciler.gone(), [InstanceId(1)], "repeated until acknowledged");
    let orders = reconciler.acknowledge_gone(&[InstanceId(1), InstanceId(2), InstanceId(3)]);
    assert_eq!(orders, [Order { instance: InstanceId(1), action: Action::ForgetLedger }]);
    assert!(reconciler.gone().is_empty());
    assert!(reconciler.supervisor(InstanceId(2)).is_some(), "what is not gone is not forgotten");
}

#[test]
fn wanted_again_before_the_acknowledgement_is_not_gone() {
    let mut reconciler = running(&[1]);
    let stop = wanted(1, 1, pb::Desired::Stop);
    reconciler.apply_delta(NOW, &mut rng(), delta(5, 6, vec![stop], vec![])).unwrap();
    reconciler.exited(NOW, &mut rng(), exit(1, 1, 1));
    reconciler.input(NOW, &mut rng(), InstanceId(1), Input::CgroupEmpty { key: key(1, 1), killed: 0 });
    assert_eq!(reconciler.gone(), [InstanceId(1)]);
    let again = wanted(1, 2, pb::Desired::Run);
    let orders = reconciler.apply_delta(NOW, &mut rng(), delta(6, 7, vec![again], vec![])).unwrap();
    assert_eq!(spawns(&orders), 1);
    assert!(reconciler.acknowledge_gone(&[InstanceId(1)]).is_empty());
    assert!(reconciler.supervisor(InstanceId(1)).is_some());
}

#[test]
fn nothing_starts_before_the_keepers_list() {
    let mut reconciler = Reconciler::new("boot");
    let orders = reconciler.apply_wanted(NOW, &mut rng(), set(5, vec![run(1)])).unwrap();
    assert_eq!(spawns(&orders), 0);
    assert_eq!(spawns(&reconciler.keeper_processes(NOW, &mut rng(), &[])), 1);
}

#[test]
fn the_keepers_list_is_adopted_stopped_or_swept() {
    let mut reconciler = Reconciler::new("boot");
    let instances = vec![run(1), wanted(2, 2, pb::Desired::Run), run(3)];
    reconciler.apply_wanted(NOW, &mut rng(), set(5, instances)).unwrap();
    let list = [kept(1, 1, 4, false), kept(2, 1, 1, false), kept(3, 1, 1, true), kept(7, 1, 1, false)];
    let orders = reconciler.keeper_processes(NOW, &mut rng(), &list);
    let of =
        |id: u64| orders.iter().filter(|order| order.instance == InstanceId(id)).cloned().collect::<Vec<_>>();
    assert_eq!((spawns(&of(1)), signals(&of(1))), (0, 0), "wanted with this epoch: adopted");
    assert!(matches!(reconciler.supervisor(InstanceId(1)).unwrap().state(), State::Running(_)));
    assert_eq!((spawns(&of(2)), signals(&of(2))), (0, 2), "of an older epoch: stopped, then placed");
    assert_eq!((spawns(&of(3)), signals(&of(3))), (0, 0));
    assert_eq!(count(&of(3), |action| *action == Action::SweepCgroup { key: key(1, 1) }), 1);
    assert_eq!(signals(&of(7)), 2, "of nobody: stopped");
    reconciler.exited(NOW, &mut rng(), exit(7, 1, 1));
    reconciler.input(NOW, &mut rng(), InstanceId(7), Input::CgroupEmpty { key: key(1, 1), killed: 0 });
    assert_eq!(reconciler.gone(), [InstanceId(7)]);
}

/// Of an agent that died, with what was true then but for the records that `lost` names.
fn damaged(reconciler: &Reconciler, lost: impl Fn(&pb::ledger_record::Record) -> bool) -> Reconciler {
    let mut records = reconciler.ledger_records();
    records.retain(|record| !lost(record.record.as_ref().unwrap()));
    records.push(pb::LedgerRecord { record: Some(pb::ledger_record::Record::Damaged(true)) });
    Reconciler::restore("boot", records, NOW)
}

fn touched(orders: &[Order]) -> Vec<u64> {
    let touches = |order: &&Order| matches!(order.action, Action::Spawn(_) | Action::Signal { .. });
    let mut ids: Vec<u64> = orders.iter().filter(touches).map(|order| order.instance.0).collect();
    ids.dedup();
    ids
}

#[test]
fn whoever_was_never_told_what_is_wanted_takes_nobody_for_a_stranger() {
    let mut reconciler = Reconciler::new("boot");
    let list = [kept(1, 1, 1, false), kept(7, 1, 1, false), kept(8, 1, 1, true)];
    assert_eq!(reconciler.keeper_processes(NOW, &mut rng(), &list), []);
    assert!(!reconciler.is_keeper_known());
    reconciler.apply_delta(NOW, &mut rng(), delta(0, 1, vec![run(1)], vec![])).unwrap_err();
    let orders = reconciler.apply_wanted(NOW, &mut rng(), set(5, vec![run(1)])).unwrap();
    assert_eq!(orders.last().unwrap().action, Action::ListProcesses);
    let orders = reconciler.keeper_processes(NOW, &mut rng(), &list);
    assert_eq!(touched(&orders), [7], "1 is adopted; 7 is a stranger indeed");
    assert!(matches!(reconciler.supervisor(InstanceId(1)).unwrap().state(), State::Running(_)));
}

#[test]
fn a_lost_wanted_set_ends_nothing() {
    let before = running(&[1, 2, 3]);
    let mut after = damaged(&before, |record| matches!(record, pb::ledger_record::Record::Wanted(_)));
    let list = [kept(1, 1, 1, false), kept(2, 1, 1, false), kept(3, 1, 1, false)];
    assert_eq!(touched(&after.keeper_processes(NOW, &mut rng(), &list)), [] as [u64; 0]);
    assert_eq!(touched(&after.tick(NOW + Duration::from_secs(60), &mut rng())), [] as [u64; 0]);
    // Nor does the next agent, although this one may have written the ledger anew.
    let mut after = restored(&after);
    assert_eq!(touched(&after.keeper_processes(NOW, &mut rng(), &list)), [] as [u64; 0]);
    after.apply_wanted(NOW, &mut rng(), set(6, vec![run(1), run(2)])).unwrap();
    assert_eq!(touched(&after.keeper_processes(NOW, &mut rng(), &list)), [3]);
    let mut sure = restored(&after);
    assert!(!sure.is_doubtful());
    assert!(!sure.keeper_processes(NOW, &mut rng(), &[]).is_empty());
}

#[test]
fn in_doubt_what_runs_is_watched_on_and_what_does_not_run_stays_so() {
    let before = running(&[1, 2]);
    let mut after = damaged(&before, |_| false);
    let orders = after.keeper_processes(NOW, &mut rng(), &[kept(1, 1, 1, false)]);
    assert_eq!(touched(&orders), [] as [u64; 0]);
    assert!(matches!(after.supervisor(InstanceId(1)).unwrap().state(), State::Running(_)));
    assert_eq!(after.full_report(WallOffset::default()), None, "2 is not known yet");
    let mut orders = after.exited(NOW, &mut rng(), exit(1, 1, 1));
    orders.extend(after.input(
        NOW,
        &mut rng(),
        InstanceId(1),
        Input::CgroupEmpty { key: key(1, 1), killed: 0 },
    ));
    assert_eq!(touched(&orders), [1], "one that ran may go on running");
    after.apply_wanted(NOW, &mut rng(), set(6, vec![run(1), run(2)])).unwrap();
    // The order to start 1 again is on its way.
    let mut orders = after.keeper_processes(NOW, &mut rng(), &[]);
    orders.extend(after.input(
        NOW,
        &mut rng(),
        InstanceId(2),
        Input::CgroupEmpty { key: key(1, 1), killed: 0 },
    ));
    orders.extend(after.tick(NOW + Duration::from_secs(10), &mut rng()));
    assert_eq!(touched(&orders), [2], "it had ended, and the hub wants it");
}

#[test]
fn a_record_that_was_lost_makes_no_duplicate_of_what_came_after_it() {
    // The ledger says that the first attempt runs, the keeper that the third does, or has ended.
    let mut after = damaged(&running(&[1]), |_| false);
    after.apply_wanted(NOW, &mut rng(), set(6, vec![run(1)])).unwrap();
    let mut ended = after.clone();
    assert_eq!(touched(&after.keeper_processes(NOW, &mut rng(), &[kept(1, 1, 3, false)])), [] as [u64; 0]);
    assert_eq!(after.supervisor(InstanceId(1)).unwrap().key(), key(1, 3));
    let code_of_third = pb::ExitRecord { attempt: 3, code: 7, ..exit(1, 1, 9) };
    ended.exited(NOW, &mut rng(), code_of_third);
    ended.keeper_processes(NOW, &mut rng(), &[]);
    let supervisor = ended.supervisor(InstanceId(1)).unwrap();
    assert_eq!(supervisor.report(WallOffset::default()).last_exit.unwrap().code, 7);
    assert!(supervisor.key().attempt >= 3, "the number of an attempt is not used twice");
}

#[test]
fn of_two_processes_of_one_instance_the_newest_stays() {
    let mut reconciler = Reconciler::new("boot");
    reconciler.apply_wanted(NOW, &mut rng(), set(5, vec![wanted(1, 2, pb::Desired::Run)])).unwrap();
    let orders = reconciler.keeper_processes(NOW, &mut rng(), &[kept(1, 1, 3, false), kept(1, 2, 1, false)]);
    assert_eq!(spawns(&orders), 0);
    let killed: Vec<_> = orders
        .iter()
        .filter_map(|order| {
            let Action::Signal { key, signal, .. } = &order.action else { return None };
            Some((*key, *signal))
        })
        .collect();
    assert_eq!(killed, [(key(1, 3), 9)]);
    assert_eq!(reconciler.supervisor(InstanceId(1)).unwrap().key(), key(2, 1));
}

#[test]
fn exits_are_acknowledged_only_once_the_ledger_has_them() {
    let mut reconciler = restored(&running(&[1, 2]));
    assert_eq!(reconciler.exited(NOW, &mut rng(), exit(1, 1, 6)), []);
    let orders = reconciler.exited(NOW, &mut rng(), exit(99, 1, 7));
    assert_eq!(orders, [], "nor those of nobody, since acknowledging them acknowledges all before");
    let orders = reconciler.keeper_processes(NOW, &mut rng(), &[kept(2, 1, 1, false)]);
    let has_exit =
        |action: &Action| matches!(action, Action::Persist(ledger) if ledger.last_exit_sequence == 6);
    let persisted = orders.iter().position(|order| has_exit(&order.action));
    let acknowledged =
        orders.iter().position(|order| order.action == Action::AcknowledgeExits { up_to_sequence: 7 });
    assert!(persisted.unwrap() < acknowledged.unwrap());
}

#[test]
fn an_unreachable_keeper_is_asked_anew() {
    let mut reconciler = Reconciler::new("boot");
    reconciler.keeper_processes(NOW, &mut rng(), &[]);
    reconciler.apply_wanted(NOW, &mut rng(), set(5, vec![run(1)])).unwrap();
    let error =
        SpawnError { kind: SpawnErrorKind::Unavailable, errno: 0, message: "connection lost".to_owned() };
    reconciler.input(NOW, &mut rng(), InstanceId(1), Input::SpawnFailed { key: key(1, 1), error });
    assert!(!reconciler.is_keeper_known());
    let orders = reconciler.keeper_processes(NOW, &mut rng(), &[kept(1, 1, 1, false)]);
    assert_eq!(spawns(&orders), 0);
    assert!(matches!(reconciler.supervisor(InstanceId(1)).unwrap().state(), State::Running(_)));
}

#[test]
fn a_lost_keeper_that_still_runs_all_changes_nothing() {
    let mut reconciler = running(&[1, 2]);
    reconciler.keeper_lost();
    let list = [kept(1, 1, 1, false), kept(2, 1, 1, false)];
    assert_eq!(reconciler.keeper_processes(NOW, &mut rng(), &list), []);
}

#[test]
fn reports_are_the_newest_of_each_changed_instance() {
    let mut reconciler = running(&[1, 2]);
    let reports = reconciler.take_reports(WallOffset::default());
    assert_eq!(reports.len(), 2, "coalesced: starting and running are one");
    assert!(reports.iter().all(|report| report.endpoint() == pb::EndpointState::Ready));
    assert!(!reconciler.has_reports());
    assert!(reconciler.take_reports(WallOffset::default()).is_empty());
    reconciler.exited(NOW, &mut rng(), exit(2, 1, 1));
    let ids: Vec<_> =
        reconciler.take_reports(WallOffset(5)).iter().map(|report| report.instance_id).collect();
    assert_eq!(ids, [2]);
    assert_eq!(reconciler.full_report(WallOffset::default()).unwrap().len(), 2);
}

#[test]
fn nothing_is_reported_before_the_truth_is_known() {
    let mut reconciler = restored(&running(&[1]));
    assert_eq!(reconciler.full_report(WallOffset::default()), None);
    assert!(reconciler.take_reports(WallOffset::default()).is_empty());
    reconciler.keeper_processes(NOW, &mut rng(), &[kept(1, 1, 1, false)]);
    assert_eq!(reconciler.full_report(WallOffset::default()).unwrap().len(), 1);
}

#[test]
fn the_set_on_disk_is_enough_to_go_on() {
    let records = |bodies: Vec<pb::ledger_record::Record>| {
        bodies.into_iter().map(|record| pb::LedgerRecord { record: Some(record) }).collect::<Vec<_>>()
    };
    use pb::ledger_record::Record;
    let before = running(&[1, 2, 3]);
    let mut log = before.ledger_records();
    log.extend(records(vec![
        Record::Delta(delta(5, 6, vec![run(4)], vec![2])),
        Record::Delta(delta(3, 7, vec![], vec![1])),
        Record::Forgotten(2),
    ]));
    log.push(pb::LedgerRecord { record: None });
    let mut after = Reconciler::restore("boot", log, NOW);
    assert_eq!(after.generation(), (9, 6), "what does not follow is skipped");
    let ids: Vec<_> = after.supervisors().map(|one| one.instance().0).collect();
    assert_eq!(ids, [1, 3, 4]);
    // 1 has died meanwhile, 3 runs, 4 was never started.
    after.exited(NOW, &mut rng(), exit(1, 1, 1));
    let mut orders = after.keeper_processes(NOW, &mut rng(), &[kept(3, 1, 1, false)]);
    orders.extend(after.input(
        NOW,
        &mut rng(),
        InstanceId(1),
        Input::CgroupEmpty { key: key(1, 1), killed: 0 },
    ));
    let started: Vec<_> = orders
        .iter()
        .filter(|order| matches!(order.action, Action::Spawn(_)))
        .map(|order| order.instance.0)
        .collect();
    assert_eq!(started, [4, 1]);
}

#[test]
fn a_stop_under_way_is_finished_also_when_nobody_wants_the_instance_any_more() {
    let mut before = running(&[1]);
    before.apply_delta(NOW, &mut rng(), delta(5, 6, vec![], vec![1])).unwrap();
    let mut after = restored(&before);
    let orders = after.keeper_processes(NOW, &mut rng(), &[kept(1, 1, 1, false)]);
    assert_eq!(signals(&orders), 0, "the stop signal is out already");
    assert_eq!(after.next_wake(), before.next_wake(), "the deadline stands");
    after.exited(NOW, &mut rng(), exit(1, 1, 1));
    after.input(NOW, &mut rng(), InstanceId(1), Input::CgroupEmpty { key: key(1, 1), killed: 0 });
    assert_eq!(after.gone(), [InstanceId(1)]);
}

#[test]
fn the_whole_ledger_reads_back_as_it_was() {
    let mut reconciler = running(&[1, 2]);
    reconciler.exited(NOW, &mut rng(), exit(1, 1, 1));
    assert_eq!(restored(&reconciler).ledger_records(), reconciler.ledger_records());
}

#[test]
fn ports_in_use_are_those_of_all_instances() {
    let mut reconciler = Reconciler::new("boot");
    reconciler.keeper_processes(NOW, &mut rng(), &[]);
    let mut one = run(1);
    let ports = [("http".to_owned(), pb::Port::default())];
    one.manifest.as_mut().unwrap().ports = ports.into();
    reconciler.apply_wanted(NOW, &mut rng(), set(5, vec![one])).unwrap();
    let ports = BTreeMap::from([("http".to_owned(), 20_007)]);
    reconciler.input(NOW, &mut rng(), InstanceId(1), Input::PortsPicked { ports });
    assert_eq!(reconciler.ports_in_use(), BTreeSet::from([20_007]));
}

#[test]
fn callers_leave_what_was_told_to_stop_by_then_and_nothing_else() {
    let port = pb::Port { service_port: 80, ..Default::default() };
    let manifest = pb::Manifest { ports: [("http".to_owned(), port)].into(), ..Default::default() };
    let wanted =
        |id, desired| pb::WantedInstance { manifest: Some(manifest.clone()), ..wanted(id, 1, desired) };
    let mut reconciler = Reconciler::new("boot");
    let now = Monotonic::BOOT;
    reconciler.keeper_processes(now, &mut rng(), &[]);
    let run = vec![wanted(1, pb::Desired::Run), wanted(2, pb::Desired::Run)];
    reconciler.apply_wanted(now, &mut rng(), set(5, run)).unwrap();
    for id in [1, 2] {
        let ports = [("http".to_owned(), 20_000)].into();
        reconciler.input(now, &mut rng(), InstanceId(id), Input::PortsPicked { ports });
        reconciler.input(now, &mut rng(), InstanceId(id), spawned(1));
    }
    for (from, to, id) in [(5, 6, 1), (6, 8, 2)] {
        let stop = vec![wanted(id, pb::Desired::Stop)];
        reconciler.apply_delta(now, &mut rng(), delta(from, to, stop, Vec::new())).unwrap();
    }
    assert_eq!(reconciler.draining().count(), 2);
    assert_eq!(signals(&reconciler.callers_left(now, &mut rng(), 5)), 0);
    assert!(signals(&reconciler.callers_left(now, &mut rng(), 7)) > 0);
    assert_eq!(reconciler.draining().collect::<Vec<_>>(), [InstanceId(2)]);
    reconciler.callers_left(now, &mut rng(), 8);
    assert_eq!(reconciler.draining().count(), 0);
}

/// `needs` by instance: a service of each, which needs that of the named one.
fn needing(id: u64, needs: u64, desired: pb::Desired) -> pb::WantedInstance {
    let mut wanted = wanted(id, 1, desired);
    if let Some(manifest) = &mut wanted.manifest {
        manifest.needs = vec![format!("s{needs}")];
    }
    wanted
}

/// Instance 1 runs, 2 needs it, 3 needs 2.
fn chain() -> Reconciler {
    let mut reconciler = Reconciler::new("boot");
    reconciler.keeper_processes(NOW, &mut rng(), &[]);
    let run = pb::Desired::Run;
    let instances = vec![wanted(1, 1, run), needing(2, 1, run), needing(3, 2, run)];
    reconciler.apply_wanted(NOW, &mut rng(), set(5, instances)).unwrap();
    for id in 1..=3 {
        reconciler.input(NOW, &mut rng(), InstanceId(id), spawned(1));
    }
    reconciler
}

/// Whose stop signals these are.
fn stopped(orders: &[Order]) -> Vec<u64> {
    let stops = |order: &&Order| matches!(order.action, Action::Signal { signal: 15, .. });
    orders.iter().filter(stops).map(|order| order.instance.0).collect()
}

#[test]
fn what_is_needed_stops_after_what_needs_it() {
    for by in ["given up", "left out", "told", "told by delta"] {
        let mut reconciler = chain();
        let stop = pb::Desired::Stop;
        let instances = vec![wanted(1, 1, stop), needing(2, 1, stop), needing(3, 2, stop)];
        let orders = match by {
            "given up" => reconciler.given_up(NOW, &mut rng()).1,
            "left out" => reconciler.apply_wanted(NOW, &mut rng(), set(6, vec![])).unwrap(),
            "told" => reconciler.apply_wanted(NOW, &mut rng(), set(6, instances)).unwrap(),
            _ => reconciler.apply_delta(NOW, &mut rng(), delta(5, 6, instances, vec![])).unwrap(),
        };
        assert_eq!(stopped(&orders), [3], "{by}");
        assert_eq!(stopped(&reconciler.exited(NOW, &mut rng(), exit(3, 1, 1))), [2], "{by}");
        // Its agent restarts meanwhile, with a ledger written anew, and the new one waits as well.
        reconciler = restored(&reconciler);
        let list = [kept(1, 1, 1, false), kept(2, 1, 1, false)];
        assert_eq!(stopped(&reconciler.keeper_processes(NOW, &mut rng(), &list)), [] as [u64; 0], "{by}");
        assert_eq!(stopped(&reconciler.exited(NOW, &mut rng(), exit(2, 1, 2))), [1], "{by}");
    }
}

#[test]
fn what_is_needed_waits_for_what_stops_too_and_not_for_ever() {
    let stop = pb::Desired::Stop;
    let mut reconciler = chain();
    let one = delta(5, 6, vec![wanted(1, 1, stop)], vec![]);
    assert_eq!(stopped(&reconciler.apply_delta(NOW, &mut rng(), one).unwrap()), [1], "2 is to stay");
    // Wanted again in between, 3 holds nothing back any longer.
    let mut reconciler = chain();
    let both = vec![needing(2, 1, stop), needing(3, 2, stop)];
    let orders = reconciler.apply_delta(NOW, &mut rng(), delta(5, 6, both, vec![])).unwrap();
    assert_eq!(stopped(&orders), [3]);
    let again = vec![needing(3, 2, pb::Desired::Run)];
    let orders = reconciler.apply_delta(NOW, &mut rng(), delta(6, 7, again, vec![])).unwrap();
    assert_eq!(stopped(&orders), [2]);
    // One that does not die from SIGKILL is not waited for.
    let mut reconciler = chain();
    reconciler.given_up(NOW, &mut rng());
    let mut now = NOW;
    let mut told = Vec::new();
    while !told.contains(&2) {
        now = reconciler.next_wake().expect("there is more to do");
        told.extend(stopped(&reconciler.tick(now, &mut rng())));
    }
    assert_eq!(now.since(NOW), crate::supervisor::GRACE + crate::supervisor::KILL_WAIT);
}

#[test]
fn without_the_hub_liveness_restarts_no_more_of_a_service_at_a_time_than_its_update_rule_allows() {
    let probe = pb::Probe { check: Some(pb::probe::Check::Tcp(true)), ..Default::default() };
    let instance = |id: u64| {
        let mut wanted = pb::WantedInstance { grants_restarts: true, ..run(id) };
        let manifest = wanted.manifest.as_mut().unwrap();
        manifest.name = "web".into();
        manifest.health =
            Some(pb::Health { live: Some(probe.clone()), ready: Some(probe.clone()), ..Default::default() });
        manifest.update = Some(pb::Update { max_parallel: 2, ..Default::default() });
        wanted
    };
    let mut reconciler = Reconciler::new("boot");
    reconciler.keeper_processes(NOW, &mut rng(), &[]);
    reconciler.apply_wanted(NOW, &mut rng(), set(5, (1..=4).map(instance).collect())).unwrap();
    let say = |reconciler: &mut Reconciler, now, id: u64, attempt, probe, outcome| {
        let result = Input::ProbeResult { key: key(1, attempt), probe, outcome };
        reconciler.input(now, &mut rng(), InstanceId(id), result)
    };
    for id in 1..=4 {
        reconciler.input(NOW, &mut rng(), InstanceId(id), spawned(1));
        say(&mut reconciler, NOW, id, 1, ProbeKind::Ready, ProbeOutcome::Passed);
    }
    let mut now = NOW + Duration::from_secs(60);
    for _ in 0..3 {
        for id in 1..=4 {
            let failed = ProbeOutcome::Failed("no answer".into());
            assert_eq!(stopped(&say(&mut reconciler, now, id, 1, ProbeKind::Live, failed)), [] as [u64; 0]);
        }
        now = now + Duration::from_secs(1);
    }
    let mut went = Vec::new();
    while now < NOW + Duration::from_secs(90) {
        went.extend(stopped(&reconciler.tick(now, &mut rng())));
        now = now + Duration::from_secs(1);
    }
    went.dedup();
    assert_eq!(went.len(), 2, "{went:?}");
    // One of them is ready again, so the next one may go.
    let back = went[0];
    reconciler.exited(now, &mut rng(), exit(back, 1, 1));
    let empty = Input::CgroupEmpty { key: key(1, 1), killed: 0 };
    reconciler.input(now, &mut rng(), InstanceId(back), empty);
    now = now + Duration::from_secs(20);
    reconciler.tick(now, &mut rng());
    let process = pb::ProcessIdentity { pid: 500, ..Default::default() };
    let again = Input::Spawned { key: key(1, 2), process, started_unix_ns: 1 };
    reconciler.input(now, &mut rng(), InstanceId(back), again);
    assert_eq!(stopped(&reconciler.tick(now, &mut rng())), [] as [u64; 0], "it is not ready yet");
    say(&mut reconciler, now, back, 2, ProbeKind::Ready, ProbeOutcome::Passed);
    now = now + Duration::from_secs(2);
    let next = stopped(&reconciler.tick(now, &mut rng()));
    assert!(next.len() == 1 && !went.contains(&next[0]), "{next:?}");
}

#[test]
fn a_host_that_rests_ends_all_in_order_starts_nothing_and_begins_again_with_the_next_agent() {
    let mut reconciler = chain();
    assert_eq!(stopped(&reconciler.rest(NOW, &mut rng())), [3]);
    assert_eq!(stopped(&reconciler.exited(NOW, &mut rng(), exit(3, 1, 1))), [2]);
    // What the hub sends meanwhile is wanted, and waits.
    let orders = reconciler.apply_delta(NOW, &mut rng(), delta(5, 6, vec![run(4)], vec![])).unwrap();
    assert_eq!(spawns(&orders), 0);
    assert!(!reconciler.is_at_rest());
    assert_eq!(stopped(&reconciler.exited(NOW, &mut rng(), exit(2, 1, 2))), [1]);
    assert_eq!(spawns(&reconciler.exited(NOW, &mut rng(), exit(1, 1, 3))), 0);
    assert!(!reconciler.is_at_rest(), "what they have left behind is not known to be gone");
    for id in 1..=3 {
        let empty = Input::CgroupEmpty { key: key(1, 1), killed: 0 };
        assert_eq!(spawns(&reconciler.input(NOW, &mut rng(), InstanceId(id), empty)), 0);
    }
    assert!(reconciler.is_at_rest());
    assert_eq!(reconciler.next_wake(), None);
    assert_eq!(reconciler.gone(), [], "the hub is not told that they have left");
    let mut next = restored(&reconciler);
    assert_eq!(spawns(&next.keeper_processes(NOW, &mut rng(), &[])), 4, "and what came meanwhile");
}
