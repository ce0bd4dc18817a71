//! The plan for one job: at most one instance, for the run that goes on; and when the next run is due.

use nave_proto::manifest::schedule::Schedule;
use nave_proto::pb;
use nave_proto::pb::plan_step::Step;

use super::conditions::Conditions;
use super::placement::Request;
use super::search::Placer;
use super::service::Planner;
use crate::jobs::open_run;
use crate::limits::{JOB_LATE_NS, JOB_MISSED_MAX};
use crate::state::Reservation;

impl<'a> Planner<'_, 'a> {
    /// What belongs to no open run stops; the open run has its instance; the schedule is kept.
    pub(super) fn run_job(&mut self) {
        let rollout = self.rollout;
        self.stop_each(&rollout.surplus, "its run is over");
        self.place_run();
        self.keep_schedule();
    }

    fn place_run(&mut self) {
        let rollout = self.rollout;
        let Some(run) = rollout.entry.record.job.as_ref().and_then(open_run) else { return };
        let again = self.due_again(&[]);
        // The process of the run before has to be gone first.
        let new = rollout.current.is_empty() && rollout.entry.instances.is_empty();
        if again.is_empty() && !new {
            return;
        }
        if rollout.held() {
            self.lacks_needs(1);
            return;
        }
        let mut placer = Placer::new(self.census());
        let placed = match again.first() {
            Some(instance) => self.place_again(instance, &mut placer, &mut (0..)),
            None => self.place_new_run(run.number, &mut placer),
        };
        if let Err(refusals) = placed {
            self.plan.missing = 1;
            self.explain_missing(&refusals);
        }
    }

    fn place_new_run(
        &mut self,
        run: u64,
        placer: &mut Placer<'a>,
    ) -> Result<(), std::rc::Rc<super::lack::Refusals>> {
        let rollout = self.rollout;
        let (conditions, wanted) = (Conditions::of(rollout.manifest), Reservation::of(rollout.manifest));
        let version = rollout.entry.record.version;
        let request = Request { conditions: &conditions, wanted: &wanted };
        let host = placer.place(self.fleet, version, &request, None)?;
        let place = self.placement(version, host, 0);
        self.push(Step::Place(pb::Place { run, ..place }));
        Ok(())
    }

    fn keep_schedule(&mut self) {
        let record = &self.rollout.entry.record;
        let text = &self.rollout.manifest.schedule;
        if text.is_empty() {
            return;
        }
        // One that this build cannot read is never due; it was checked before it came into the log.
        let Ok(schedule) = Schedule::parse(text) else { return };
        let job = record.job.as_ref().filter(|job| job.schedule_version == record.version);
        let step = match job.map(|job| job.next_due_unix_ns) {
            None => pb::ScheduleRun {
                next_due_unix_ns: schedule.next_after(self.now).unwrap_or_default(),
                ..Default::default()
            },
            Some(0) => return,
            Some(due) if due > self.now => return self.wake_at(due),
            Some(due) => due_run(&schedule, due, self.now),
        };
        let (service, version) = (record.name.clone(), record.version);
        self.push(Step::ScheduleRun(pb::ScheduleRun { service, version, ..step }));
    }
}

/// The newest time that is due, how many were not met, and when the next one is.
fn due_run(schedule: &Schedule, first: i64, now: i64) -> pb::ScheduleRun {
    let (mut due, mut count) = (first, 1);
    let mut next = schedule.next_after(due);
    while let Some(at) = next.filter(|at| *at <= now) {
        (due, count) = (at, count + 1);
        // After years of absence nobody counts on.
        next = if count < JOB_MISSED_MAX { schedule.next_after(due) } else { schedule.next_after(now) };
    }
    let late = now - due > JOB_LATE_NS;
    pb::ScheduleRun {
        due_unix_ns: due,
        next_due_unix_ns: next.unwrap_or_default(),
        missed: if late { count } else { count - 1 },
        late,
        ..Default::default()
    }
}
