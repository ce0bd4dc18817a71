//! Jobs: a run is started once, ends with the word of its agent, and is not run again for a host that goes.

use nave_proto::pb;
use nave_proto::pb::JobRunStatus::{self, Failed, Missed, Queued, Replaced, Running, Skipped, Succeeded};
use nave_proto::pb::plan_step::Step;
use nave_proto::pb::{DeploymentStatus, HostStatus, MissedPolicy, OverlapPolicy};

use crate::world::{SECOND, World, changed, delete, exited, failed, manifest, restart, running, scale};

const MINUTE: i64 = 60 * SECOND;

fn job(schedule: &str, overlap: OverlapPolicy, missed: MissedPolicy) -> pb::Manifest {
    pb::Manifest {
        kind: pb::Kind::Job.into(),
        schedule: schedule.into(),
        job: Some(pb::Job { overlap: overlap.into(), missed: missed.into() }),
        health: None,
        ..manifest("tidy", 1)
    }
}

fn once() -> pb::Manifest {
    job("", OverlapPolicy::Skip, MissedPolicy::Skip)
}

fn runs(world: &World) -> Vec<(u64, JobRunStatus)> {
    let job = world.service("tidy").job.clone().unwrap_or_default();
    job.runs.iter().map(|run| (run.number, run.status())).collect()
}

/// Plans, starts what is to start and stops what is to stop; what runs goes on.
fn settle(world: &mut World) {
    for _ in 0..20 {
        let steps = world.plan_once();
        let reported = world.agents();
        if steps == 0 && !reported {
            return;
        }
    }
    panic!("it never settles");
}

/// The process of the run that goes on ends.
fn ends(world: &mut World, code: i32) {
    let instance = world.wanted("tidy").remove(0);
    world.say(instance.id, exited(code));
    settle(world);
}

#[test]
fn a_job_runs_once_for_each_change_and_keeps_its_result() {
    let mut world = World::with_hosts(2);
    world.deploy(once());
    settle(&mut world);
    assert_eq!((runs(&world), world.status("tidy")), (vec![(1, Running)], DeploymentStatus::Running));
    world.now += 5 * SECOND;
    ends(&mut world, 0);
    assert_eq!((runs(&world), world.status("tidy")), (vec![(1, Succeeded)], DeploymentStatus::Successful));
    assert_eq!(world.state.instances_of("tidy").count(), 0, "nothing is left on the host");
    assert_eq!(world.last_event("job_succeeded"), "run 1 of tidy succeeded after 5 s");
    assert_eq!(world.service("tidy").stable_version, 1);
    // Limits and the like are no word to run it again.
    world.deploy(pb::Manifest {
        stop: Some(pb::Stop { signal: 2, grace: None, ..Default::default() }),
        ..once()
    });
    settle(&mut world);
    assert_eq!((runs(&world), world.status("tidy")), (vec![(1, Succeeded)], DeploymentStatus::Successful));
    world.deploy(changed(&once(), "other"));
    settle(&mut world);
    ends(&mut world, 3);
    assert_eq!(
        (runs(&world), world.status("tidy")),
        (vec![(1, Succeeded), (2, Failed)], DeploymentStatus::Failed)
    );
    assert!(world.reason("tidy").starts_with("run 2 failed: "), "{}", world.reason("tidy"));
    world.accept(restart("tidy"));
    settle(&mut world);
    ends(&mut world, 0);
    assert_eq!(runs(&world).last(), Some(&(3, Succeeded)));
    assert!(world.refuse(scale("tidy", 3)).1.contains("one process at a time"));
    world.accept(delete("tidy"));
    assert!(world.state.service("tidy").is_none());
}

#[test]
fn a_run_took_as_long_as_its_process_ran_however_late_the_hub_hears_of_it() {
    for (attempt, ran_ms, ended, written_by, took, kept) in [
        (1, 90_500, 92, nave_proto::COMMAND_FORMAT, 90, 92),
        (2, 30_000, 92, nave_proto::COMMAND_FORMAT, 92, 92),
        (2, 30_000, 900, nave_proto::COMMAND_FORMAT, 197, 197), // the host's clock is fast
        (1, 0, 0, nave_proto::COMMAND_FORMAT, 197, 197),
        (1, 90_500, 92, 7, 197, 197),
    ] {
        let mut world = World::with_hosts(1);
        world.deploy(once());
        settle(&mut world);
        let began = world.now;
        let instance = world.wanted("tidy").remove(0);
        world.now += 197 * SECOND;
        let ended_unix_ns = if ended == 0 { 0 } else { began + ended * SECOND };
        let last_exit =
            Some(pb::ExitRecord { epoch: 1, attempt, ran_ms, ended_unix_ns, ..Default::default() });
        let said = pb::InstanceReport { last_exit, ..crate::world::report(&instance, attempt, exited(0)) };
        let reports =
            pb::ReportInstances { host_id: instance.host_id, instances: vec![said], ..Default::default() };
        let command = world.command(pb::command::Body::ReportInstances(reports));
        world.apply(pb::Command { written_by, ..command });
        assert_eq!(world.last_event("job_succeeded"), format!("run 1 of tidy succeeded after {took} s"));
        let run = world.service("tidy").job.clone().unwrap().runs.remove(0);
        assert_eq!(run.ended_unix_ns, began + kept * SECOND);
    }
}

#[test]
fn a_run_that_is_over_is_not_run_again_for_a_host_that_goes() {
    let mut world = World::with_hosts(2);
    world.deploy(once());
    settle(&mut world);
    let host = world.hosts_of("tidy").remove(0);
    let instance = world.wanted("tidy").remove(0);
    world.say(instance.id, exited(0));
    // Before any plan: the report itself has ended the run.
    world.lose(&host);
    world.settle_for(3600);
    assert_eq!((runs(&world), world.state.instances_of("tidy").count()), (vec![(1, Succeeded)], 0));
    assert_eq!(world.state.instances_of("tidy").count(), 0);
    world.set_status(&host, HostStatus::Connected);
    world.set_draining(&host, true);
    world.settle_for(3600);
    assert_eq!(runs(&world), [(1, Succeeded)]);
}

#[test]
fn a_run_is_not_moved_by_a_drain_and_is_tried_again_when_its_host_is_lost() {
    let mut world = World::with_hosts(2);
    world.deploy(once());
    settle(&mut world);
    let host = world.hosts_of("tidy").remove(0);
    world.set_draining(&host, true);
    settle(&mut world);
    assert_eq!(world.hosts_of("tidy"), std::slice::from_ref(&host), "it finishes where it is");
    world.lose(&host);
    settle(&mut world);
    let instance = world.wanted("tidy").remove(0);
    assert_eq!((instance.epoch, instance.run), (2, 1));
    assert_ne!(world.hosts_of("tidy"), [host]);
    ends(&mut world, 0);
    assert_eq!(runs(&world), [(1, Succeeded)]);
}

#[test]
fn retries_are_the_agents_and_giving_up_fails_the_run() {
    let mut world = World::with_hosts(1);
    world.deploy(once());
    settle(&mut world);
    let instance = world.wanted("tidy").remove(0);
    world.report(instance.host_id, crate::world::report(&instance, 4, failed()));
    settle(&mut world);
    let job = world.service("tidy").job.clone().unwrap();
    assert_eq!((runs(&world), job.runs[0].attempts), (vec![(1, Failed)], 4));
    world.settle_for(3600);
    assert_eq!(runs(&world), [(1, Failed)], "it is left at that");
}

#[test]
fn a_schedule_is_kept_to_the_minute_and_what_overlaps_is_as_said() {
    for (overlap, expected) in [
        (OverlapPolicy::Skip, vec![(1, Running), (2, Skipped), (3, Skipped)]),
        (OverlapPolicy::Queue, vec![(1, Running), (2, Queued), (3, Skipped)]),
        (OverlapPolicy::Replace, vec![(1, Replaced), (2, Replaced), (3, Running)]),
    ] {
        let mut world = World::with_hosts(1);
        world.deploy(job("*/10 * * * *", overlap, MissedPolicy::Skip));
        settle(&mut world);
        assert_eq!((runs(&world), world.status("tidy")), (vec![], DeploymentStatus::Successful));
        let due = world.service("tidy").job.as_ref().unwrap().next_due_unix_ns;
        assert_eq!((due % (10 * MINUTE), due > world.now), (0, true));
        world.now = due - SECOND;
        settle(&mut world);
        assert_eq!(runs(&world), [], "not a second early");
        for _ in 0..3 {
            let due = world.service("tidy").job.as_ref().unwrap().next_due_unix_ns;
            assert!(nave_orchestrator_core::plan(&world.state, world.now).wake_at.unwrap() <= due);
            world.now = due + SECOND;
            settle(&mut world);
        }
        assert_eq!(runs(&world), expected, "{overlap:?}");
        assert_eq!(world.state.instances_of("tidy").count(), 1, "one at a time");
        ends(&mut world, 0);
        if overlap == OverlapPolicy::Queue {
            assert_eq!(runs(&world), [(1, Succeeded), (2, Running), (3, Skipped)]);
        }
    }
}

#[test]
fn what_was_missed_is_noted_or_made_good_for_once() {
    for (missed, expected) in [(MissedPolicy::Skip, Missed), (MissedPolicy::Run, Running)] {
        let mut world = World::with_hosts(1);
        world.deploy(job("0 * * * *", OverlapPolicy::Skip, missed));
        settle(&mut world);
        world.now += 5 * 60 * MINUTE;
        settle(&mut world);
        assert_eq!(runs(&world), [(1, expected)], "one for all");
        let job = world.service("tidy").job.clone().unwrap();
        assert!(job.runs[0].reason.contains("5 times"), "{}", job.runs[0].reason);
        assert!(job.next_due_unix_ns > world.now);
    }
}

#[test]
fn what_was_missed_is_noted_also_when_the_newest_is_in_time() {
    let (skip, run) = (MissedPolicy::Skip, MissedPolicy::Run);
    let missed = vec![(1, Missed), (2, Running)];
    for (schedule, minutes, policy, written_by, expected, reason) in [
        ("* * * * *", 2, skip, nave_proto::COMMAND_FORMAT, missed.clone(), "2 times due while no hub"),
        ("0 * * * *", 60, skip, nave_proto::COMMAND_FORMAT, missed, "once due while no hub"),
        ("* * * * *", 2, run, nave_proto::COMMAND_FORMAT, vec![(1, Running)], "for what was 2 times due"),
        ("* * * * *", 2, skip, 7, vec![(1, Running)], ""),
    ] {
        let mut world = World::with_hosts(1);
        world.deploy(job(schedule, OverlapPolicy::Skip, policy));
        settle(&mut world);
        let first = world.service("tidy").job.as_ref().unwrap().next_due_unix_ns;
        world.now = first + minutes * MINUTE + 30 * SECOND;
        let steps = world.steps().into_iter().map(|step| pb::PlanStep { step: Some(step) }).collect();
        let command = world.command(pb::command::Body::CommitPlan(pb::CommitPlan { steps }));
        world.apply(pb::Command { written_by, ..command });
        let ledger = world.service("tidy").job.clone().unwrap().runs;
        assert_eq!(runs(&world), expected, "{schedule} {policy:?} {written_by}");
        assert!(ledger[0].reason.contains(reason), "{}", ledger[0].reason);
        let newest = ledger.last().unwrap();
        assert_eq!((newest.due_unix_ns, newest.status()), (first + minutes * MINUTE, Running));
        assert!(ledger.len() == 1 || ledger[0].due_unix_ns == first);
        assert_eq!(world.last_event("job_missed").is_empty(), ledger.len() == 1);
    }
}

#[test]
fn a_schedule_from_an_old_plan_is_not_taken() {
    let mut world = World::with_hosts(1);
    world.deploy(job("0 * * * *", OverlapPolicy::Queue, MissedPolicy::Run));
    settle(&mut world);
    world.now += 61 * MINUTE;
    let steps = world.steps();
    assert!(matches!(&steps[..], [Step::ScheduleRun(_)]), "{steps:?}");
    world.commit(steps.clone());
    world.commit(steps);
    assert_eq!(runs(&world), [(1, Running)], "once, though it was said twice");
}

#[test]
fn only_so_many_runs_are_remembered() {
    let mut world = World::with_hosts(1);
    world.deploy(once());
    for run in 1..40 {
        settle(&mut world);
        assert_eq!(world.wanted("tidy")[0].run, run);
        ends(&mut world, 0);
        world.accept(restart("tidy"));
    }
    assert_eq!(runs(&world).len(), nave_orchestrator_core::limits::JOB_RUNS_KEPT);
}

#[test]
fn what_needs_a_job_waits_for_its_success() {
    let mut world = World::with_hosts(1);
    world.deploy(once());
    world.deploy(pb::Manifest { needs: vec!["tidy".into()], ..manifest("web", 1) });
    settle(&mut world);
    assert_eq!(world.wanted("web").len(), 0);
    let why = nave_orchestrator_core::explain(&world.state, "web").join("; ");
    assert!(why.contains("needs tidy, a job that has not succeeded"), "{why}");
    ends(&mut world, 0);
    assert_eq!(world.ready("web"), 1);
}

#[test]
fn a_service_becomes_a_job_and_a_job_a_service() {
    let mut world = World::with_hosts(1);
    world.deploy(manifest("tidy", 2));
    world.settle();
    world.deploy(once());
    settle(&mut world);
    assert_eq!((runs(&world), world.wanted("tidy").len()), (vec![(1, Running)], 1));
    world.deploy(pb::Manifest { count: 2, ..manifest("tidy", 2) });
    settle(&mut world);
    let instance = world.wanted("tidy").remove(0);
    world.say(instance.id, running(true));
    settle(&mut world);
    assert_eq!((world.service("tidy").job.clone(), world.ready("tidy")), (None, 2));
    assert_eq!(world.status("tidy"), DeploymentStatus::Successful);
}
