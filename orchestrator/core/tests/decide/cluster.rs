//! The cluster's birth, tokens, revisions, deduplication as seen through `apply`.

use nave_orchestrator_core::{ClusterState, EventFilter, RowError, limits, unknown_command};
use nave_proto::pb;
use nave_proto::pb::RejectedCode;
use nave_proto::pb::command::Body;
use nave_proto::pb::reply::Result as ReplyResult;
use nave_proto::pb::row::Row;

use crate::world::{SECOND, World, apply, delete, manifest};

fn numbered(world: &World, body: Body, client: &str, serial: u64) -> pb::Command {
    let request_id = Some(pb::RequestId { client_id: client.into(), serial });
    pb::Command { request_id, ..world.command(body) }
}

#[test]
fn nothing_is_accepted_before_the_cluster_begins_and_it_begins_once() {
    let mut world = World::blank();
    let (code, message) = world.refuse(apply(manifest("web", 1)));
    assert_eq!((code, message.as_str()), (RejectedCode::NotBegun, "the cluster has not begun yet"));
    let init = |id: &str| Body::InitCluster(pb::InitCluster { cluster_id: id.into(), ..Default::default() });
    world.accept(init("a"));
    assert_eq!(world.refuse(init("b")).0, RejectedCode::Conflict);
    assert_eq!(world.state.cluster().unwrap().cluster_id, "a");
}

#[test]
fn the_format_that_commands_are_written_in_only_rises() {
    let mut world = World::new();
    let known = nave_proto::COMMAND_FORMAT;
    assert_eq!(world.state.command_format(), known, "a cluster begins with what its first build knows");
    let agree = |format| Body::AgreeFormat(pb::AgreeFormat { format });
    assert_eq!(world.refuse(agree(known)).0, RejectedCode::Conflict);
    assert_eq!(world.refuse(agree(known - 1)).0, RejectedCode::Conflict);
    // A build that does not know a format neither loads a state of it nor takes what is written in it.
    let later = world.state.rows().map(|mut row| {
        if let Some(Row::Cluster(cluster)) = &mut row.row {
            cluster.command_format = known + 1;
        }
        row
    });
    assert_eq!(ClusterState::from_rows(later, 9).unwrap_err(), RowError::Newer { format: known + 1 });
    for (written_by, unknown) in [(known + 1, true), (known, false), (1, false)] {
        let command = pb::Command { written_by, ..world.command(delete("web")) };
        assert_eq!(unknown_command(&command), unknown, "{written_by}");
    }
}

/// Members of both builds must have the same rows, whichever of them replays the log.
#[test]
fn a_cluster_of_before_the_agreement_is_of_the_last_format_then() {
    let mut world = World::blank();
    let init = Body::InitCluster(pb::InitCluster { cluster_id: "a".into(), ..Default::default() });
    world.apply(pb::Command { written_by: 3, ..world.command(init) });
    assert_eq!(world.state.cluster().unwrap().command_format, 0);
    assert_eq!(world.state.command_format(), 6);
    let agree = Body::AgreeFormat(pb::AgreeFormat { format: 7 });
    let written = |world: &World| world.state.format_of(Some(&delete("web")));
    assert_eq!((written(&world), world.state.format_of(Some(&agree))), (6, 7));
    world.accept(agree);
    assert_eq!((world.state.command_format(), written(&world)), (7, 7));
    let told = world.state.events(&EventFilter::default(), 1);
    assert_eq!(told[0].kind, "format_agreed");
}

#[test]
fn revision_follows_the_log_also_over_blank_entries() {
    let mut world = World::new();
    let before = world.state.revision();
    world.blank_entry();
    world.deploy(manifest("web", 0));
    assert_eq!(world.state.revision(), before + 2);
    assert_eq!(world.service("web").revision, before + 2);
}

#[test]
fn a_retry_takes_effect_once_and_gets_the_same_answer() {
    let mut world = World::new();
    let command = numbered(&world, apply(manifest("web", 0)), "c", 1);
    let first = world.apply(command.clone());
    let second = world.apply(command);
    assert!(second.changes.is_empty());
    assert_eq!(second.reply.revision, first.reply.revision);
    match second.reply.result.unwrap() {
        ReplyResult::Accepted(accepted) => assert!(accepted.duplicate && accepted.version == 1),
        ReplyResult::Rejected(rejected) => panic!("{rejected:?}"),
    }
}

#[test]
fn a_refusal_is_remembered_too() {
    let mut world = World::new();
    let command = numbered(&world, delete("web"), "c", 1);
    let refused = world.apply(command.clone());
    assert_eq!(refused.changes.len(), 1, "only the reply is kept");
    world.deploy(manifest("web", 0));
    assert_eq!(world.apply(command).reply, refused.reply);
    assert!(world.state.service("web").is_some());
}

#[test]
fn a_request_older_than_what_is_kept_is_forgotten_not_repeated() {
    let mut world = World::new();
    for serial in 2..=20 {
        let command = numbered(&world, apply(manifest(&format!("s{serial}"), 0)), "c", serial);
        world.apply(command);
    }
    let late = world.apply(numbered(&world, apply(manifest("late", 0)), "c", 1));
    match late.reply.result.unwrap() {
        ReplyResult::Rejected(rejected) => assert_eq!(rejected.code(), RejectedCode::Forgotten),
        ReplyResult::Accepted(accepted) => panic!("{accepted:?}"),
    }
    assert!(world.state.service("late").is_none());
}

#[test]
fn a_client_idle_for_ten_minutes_is_forgotten() {
    let mut world = World::new();
    let command = numbered(&world, delete("web"), "old", 1);
    world.apply(command);
    world.now += limits::DEDUP_IDLE_NS + SECOND;
    let command = numbered(&world, delete("web"), "new", 1);
    let applied = world.apply(command);
    assert_eq!(applied.changes.len(), 2, "the new reply, and the old client deleted: {:?}", applied.changes);
}

#[test]
fn tokens_are_made_listed_and_revoked() {
    let mut world = World::new();
    let token = |id: &str, expires_unix_ns| {
        let token = pb::TokenRecord { id: id.into(), expires_unix_ns, uses_left: 1, ..Default::default() };
        Body::CreateToken(pb::CreateToken { token: Some(token) })
    };
    world.accept(token("a", world.now + SECOND));
    assert_eq!(world.refuse(token("a", i64::MAX)).0, RejectedCode::Conflict);
    world.now += 2 * SECOND;
    world.accept(token("b", i64::MAX));
    assert!(world.state.token("a").is_none(), "the expired one went when another came");
    world.accept(Body::RevokeToken(pb::RevokeToken { id: "b".into() }));
    assert_eq!(world.refuse(Body::RevokeToken(pb::RevokeToken { id: "b".into() })).0, RejectedCode::NotFound);
    assert_eq!(world.state.tokens().count(), 1);
}

#[test]
fn commands_of_a_newer_build_are_known_as_such() {
    let world = World::new();
    let known = world.command(apply(manifest("web", 1)));
    assert!(!unknown_command(&known));
    assert!(unknown_command(&pb::Command { body: None, ..known.clone() }));
    let steps = vec![pb::PlanStep { step: None }];
    let newer_step = pb::Command { body: Some(Body::CommitPlan(pb::CommitPlan { steps })), ..known };
    assert!(unknown_command(&newer_step));
}

#[test]
fn rows_of_a_newer_build_or_with_holes_are_refused() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("web", 1));
    world.settle();
    let rows: Vec<_> = world.state.rows().collect();
    let without = |keep: fn(&pb::row::Row) -> bool| {
        let rows = rows.iter().filter(|row| row.row.as_ref().is_some_and(keep)).cloned();
        ClusterState::from_rows(rows, 9).map(|_| ()).unwrap_err()
    };
    use pb::row::Row;
    assert!(matches!(without(|row| !matches!(row, Row::Host(_))), RowError::NoHost { .. }));
    assert!(matches!(
        without(|row| !matches!(row, Row::Service(_) | Row::Version(_))),
        RowError::NoService { .. }
    ));
    assert!(matches!(without(|row| !matches!(row, Row::Service(_))), RowError::StrayVersion { .. }));
    assert_eq!(
        ClusterState::from_rows([pb::Row::default()], 1).map(|_| ()).unwrap_err(),
        RowError::UnknownTable
    );
}

#[test]
fn the_newest_time_survives_the_rows() {
    let mut world = World::new();
    world.now += 5 * SECOND;
    world.deploy(manifest("web", 0));
    let restored = ClusterState::from_rows(world.state.rows(), world.state.applied_index()).unwrap();
    assert_eq!(restored.time_unix_ns(), world.now);
    assert_eq!(restored.revision(), world.state.revision());
}

#[test]
fn events_are_bounded_per_service_and_found_by_service_and_host() {
    let mut world = World::with_hosts(1);
    for count in 0..60 {
        world.deploy(manifest("web", count % 2));
    }
    world.deploy(manifest("other", 0));
    let of = |service: &str| {
        let filter = EventFilter { service: Some(service.into()), host: None };
        world.state.events(&filter, usize::MAX)
    };
    assert_eq!(of("web").len(), limits::EVENTS_PER_SUBJECT_MAX);
    assert_eq!(of("other").len(), 1, "one busy service pushes out only its own");
    assert!(of("web").is_sorted_by_key(|event| event.revision));
    let of_host = EventFilter { service: None, host: Some(world.host_id("alpha")) };
    assert_eq!(world.state.events(&of_host, 10).len(), 1);
    let newest = world.state.events(&EventFilter::default(), 2);
    assert_eq!(newest.last().unwrap().service, "other");
    assert_eq!(newest.len(), 2);
}
