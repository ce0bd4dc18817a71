//! The judge outside: what really runs on all hosts at once, and what was promised about it. It knows no more of
//! the hub's mind than the rows that are committed.
//!
//! - *An instance id runs at most once per epoch*, and on one host only.
//! - *With `on_disconnect = "stop"` never two processes of one instance*, whoever dies and whatever the network does.
//! - *Never fewer ready than the update rules allow*: looked at whenever a process that was ready is told to stop by
//!   the hub's will, for services that have not lost anything to a fault since they last were as wanted.
//! - Replicas agree, `check()` holds, a plan keeps to the rules, a request takes effect once.

use std::collections::{BTreeMap, BTreeSet};

use nave_agent_core::ProcessKey;
use nave_orchestrator_core::{Applied, Change, ClusterState, RowId, desired_count, ready_count};
use nave_proto::pb;
use pb::command::Body;

use crate::context::Context;

/// Entries from one `check()` to the next, when nobody reads a trace.
const CHECK_EACH: u64 = 16;

/// How a service's processes behave, said by its command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Good,
    Crashing,
    NeverHealthy,
    Missing,
}

impl Kind {
    pub(crate) fn of(manifest: &pb::Manifest) -> Self {
        match manifest.command.first().map(String::as_str) {
            Some("crashing") => Self::Crashing,
            Some("never-healthy") => Self::NeverHealthy,
            Some("missing") => Self::Missing,
            Some(_) | None => Self::Good,
        }
    }
}

/// A process that runs.
#[derive(Debug)]
struct Live {
    host: usize,
    key: ProcessKey,
    service: String,
    alone: bool,
    ready: bool,
}

/// What is held against a service.
#[derive(Debug, Default)]
struct Floor {
    least: usize,
    /// It was as wanted, and no fault has taken anything from it since.
    clean: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Oracle {
    live: BTreeMap<u64, Vec<Live>>,
    ready: BTreeMap<String, usize>,
    floors: BTreeMap<String, Floor>,
    /// Where each placement has run.
    ran: BTreeMap<(u64, u64), usize>,
    accepted: BTreeSet<(String, u64)>,
    /// Processes that were started, for the statistics.
    pub(crate) started: u64,
}

impl Oracle {
    /// (instance, host, epoch) of all that runs.
    pub(crate) fn running(&self) -> BTreeSet<(u64, usize, u64)> {
        self.live
            .iter()
            .flat_map(|(id, all)| all.iter().map(|live| (*id, live.host, live.key.epoch)))
            .collect()
    }

    pub(crate) fn ready_of(&self, service: &str) -> usize {
        self.ready.get(service).copied().unwrap_or_default()
    }

    /// Those that are wanted, and are ready whatever the hub has heard.
    fn truly_ready(&self, state: &ClusterState, service: &str) -> usize {
        let wanted = state.instances_of(service).filter(|instance| instance.desired() == pb::Desired::Run);
        let runs = |instance: &&std::sync::Arc<pb::InstanceRecord>| {
            let all = self.live.get(&instance.id).map_or(&[][..], Vec::as_slice);
            all.iter().any(|live| live.ready && live.key.epoch == instance.epoch)
        };
        wanted.filter(runs).count()
    }

    fn find(&mut self, host: usize, instance: u64, key: ProcessKey) -> Option<&mut Live> {
        let all = self.live.get_mut(&instance)?;
        all.iter_mut().find(|live| live.host == host && live.key == key)
    }

    fn dirty(&mut self, service: &str) {
        if let Some(floor) = self.floors.get_mut(service) {
            floor.clean = false;
        }
    }

    pub(crate) fn healthy(&mut self, host: usize, instance: u64, key: ProcessKey) {
        let Some(live) = self.find(host, instance, key) else { return };
        if !std::mem::replace(&mut live.ready, true) {
            let service = live.service.clone();
            *self.ready.entry(service).or_default() += 1;
        }
    }

    /// A service that has no check any more is ready wherever it runs, by the word of whoever took the check away: what
    /// its process would have answered to the old one no longer counts.
    fn unchecked(&mut self, state: &ClusterState, report: &pb::InstanceReport) {
        let Some(instance) = state.instance(nave_proto::ids::InstanceId(report.instance_id)) else { return };
        let manifest = state.manifest(&instance.service, instance.version);
        let checked =
            manifest.is_none_or(|manifest| manifest.health.as_ref().is_some_and(|h| h.ready.is_some()));
        let said = report.observed.as_ref().and_then(|observed| observed.state.as_ref());
        let ready = matches!(said, Some(pb::observed::State::Running(running)) if running.ready);
        if checked || !ready || instance.epoch != report.epoch {
            return;
        }
        let key = ProcessKey { epoch: report.epoch, attempt: report.attempt };
        let all = self.live.get(&report.instance_id).map_or(&[][..], Vec::as_slice);
        if let Some(host) = all.iter().find(|live| live.key == key).map(|live| live.host) {
            self.healthy(host, report.instance_id, key);
        }
    }

    fn unready(&mut self, host: usize, instance: u64, key: ProcessKey) -> Option<String> {
        let live = self.find(host, instance, key)?;
        if !std::mem::replace(&mut live.ready, false) {
            return None;
        }
        let service = live.service.clone();
        if let Some(ready) = self.ready.get_mut(&service) {
            *ready -= 1;
        }
        Some(service)
    }

    /// By a fault.
    pub(crate) fn unhealthy(&mut self, host: usize, instance: u64, key: ProcessKey) {
        if let Some(service) = self.unready(host, instance, key) {
            self.dirty(&service);
        }
    }
}

/// The least that the update rules allow to be ready.
fn least(state: &ClusterState, service: &pb::ServiceRecord) -> usize {
    let Some(manifest) = service.manifest.as_ref().filter(|_| !service.deleting) else { return 0 };
    let slots = desired_count(state, &service.name);
    let parallel = manifest.update.as_ref().map_or(1, |update| update.max_parallel.max(1) as usize);
    let stop_first = manifest.per_host || manifest.ports.values().any(|port| port.port != 0);
    if stop_first { slots.saturating_sub(parallel) } else { slots }
}

/// How each service stands, before a plan.
#[derive(Debug)]
pub(crate) struct Standing {
    services: Vec<(String, u64, usize)>,
}

impl Standing {
    pub(crate) fn of(state: &ClusterState) -> Self {
        let services = state.services().filter(|service| !service.deleting);
        let of = |service: &std::sync::Arc<pb::ServiceRecord>| {
            (service.name.clone(), service.version, ready_count(state, &service.name))
        };
        Self { services: services.map(of).collect() }
    }
}

impl Context {
    /// The planner has nothing to do. From services that are as wanted, nothing may be taken without need from now on.
    pub(crate) fn at_rest(&mut self, state: &ClusterState) {
        for service in state.services() {
            let name = &service.name;
            let successful = service.deployment.as_ref().map(pb::Deployment::status)
                == Some(pb::DeploymentStatus::Successful);
            let (wanted, hub) = (desired_count(state, name), ready_count(state, name));
            let all = state.instances_of(name).filter(|i| i.desired() == pb::Desired::Run).count();
            if successful
                && !service.deleting
                && all == wanted
                && hub == wanted
                && self.oracle.truly_ready(state, name) == wanted
            {
                self.oracle.floors.insert(name.clone(), Floor { least: least(state, service), clean: true });
            }
        }
    }

    pub(crate) fn started(&mut self, host: usize, instance: u64, key: ProcessKey, manifest: &pb::Manifest) {
        self.note(|| {
            format!(
                "host {host}: i-{instance} of {} starts, epoch {} attempt {}",
                manifest.name, key.epoch, key.attempt
            )
        });
        self.oracle.started += 1;
        let alone = manifest.placement.as_ref().is_some_and(|p| p.on_disconnect() == pb::OnDisconnect::Stop);
        let home = *self.oracle.ran.entry((instance, key.epoch)).or_insert(host);
        if home != host {
            self.violated("an epoch is of one host", || {
                format!("i-{instance} epoch {} runs on host {host} and ran on host {home}", key.epoch)
            });
        }
        let all = self.oracle.live.entry(instance).or_default();
        let other = all.iter().find(|live| live.key.epoch == key.epoch || (alone && live.alone));
        if let Some(other) = other {
            let (there, theirs, same) = (other.host, other.key, other.key.epoch == key.epoch);
            let promise = if same { "at most once per epoch" } else { "stop means never twice" };
            let what =
                format!("i-{instance}: {key:?} starts on host {host} while {theirs:?} runs on host {there}");
            self.violated(promise, || what);
        }
        let service = manifest.name.clone();
        self.oracle.live.entry(instance).or_default().push(Live { host, key, service, alone, ready: false });
    }

    /// A signal that will end it. `told`: the hub wants it stopped.
    pub(crate) fn stopping(&mut self, host: usize, instance: u64, key: ProcessKey, told: bool) {
        self.note(|| {
            format!(
                "host {host}: i-{instance} epoch {} is being stopped{}",
                key.epoch,
                if told { "" } else { ", not by the hub's will" }
            )
        });
        let Some(service) = self.oracle.unready(host, instance, key) else { return };
        if !told {
            return self.oracle.dirty(&service);
        }
        let ready = self.oracle.ready_of(&service);
        let floor = self.oracle.floors.get(&service).filter(|floor| floor.clean);
        if let Some(least) = floor.map(|floor| floor.least).filter(|least| ready < *least) {
            self.violated("never fewer ready than the rules allow", || {
                format!("{service}: {ready} are ready after i-{instance} was stopped, {least} is the least")
            });
        }
    }

    /// `fault`: nobody wanted that.
    pub(crate) fn ended(&mut self, host: usize, instance: u64, key: ProcessKey, fault: bool) {
        self.note(|| format!("host {host}: i-{instance} epoch {} has ended", key.epoch));
        if let Some(service) = self.oracle.unready(host, instance, key) {
            self.oracle.dirty(&service);
        }
        let Some(all) = self.oracle.live.get_mut(&instance) else { return };
        if fault {
            let service =
                all.iter().find(|live| live.host == host && live.key == key).map(|l| l.service.clone());
            all.retain(|live| live.host != host || live.key != key);
            if let Some(service) = service {
                self.oracle.dirty(&service);
            }
        } else {
            all.retain(|live| live.host != host || live.key != key);
        }
        if self.oracle.live.get(&instance).is_some_and(Vec::is_empty) {
            self.oracle.live.remove(&instance);
        }
    }

    /// The first member has applied an entry.
    pub(crate) fn committed(
        &mut self,
        index: u64,
        command: &pb::Command,
        applied: &Applied,
        state: &ClusterState,
        before: Option<&Standing>,
    ) {
        self.note(|| format!("#{index} {}", brief(command, applied)));
        // It costs as much as all the rest; what it finds stays wrong, so a look now and then finds it too.
        let due = self.trace.is_some() || index.is_multiple_of(CHECK_EACH);
        if due && let Err(wrong) = state.check() {
            self.violated("check() holds", || format!("after #{index} {command:?}: {wrong}"));
        }
        self.once(command, applied);
        if let Some(Body::ReportInstances(report)) = &command.body {
            report.instances.iter().for_each(|report| self.oracle.unchecked(state, report));
        }
        if let Some(before) = before {
            self.plan_keeps_rules(state, before);
        }
        if let Some(Body::SetHostStatus(set)) = &command.body
            && set.status() == pb::HostStatus::Lost
        {
            let of = state.instances_on(nave_proto::ids::HostId(set.host_id));
            for instance in of {
                self.oracle.dirty(&instance.service);
            }
        }
        if let Some(Body::ForgetHost(_)) = &command.body {
            self.oracle.floors.values_mut().for_each(|floor| floor.clean = false);
        }
        let moved = |change: &Change| {
            matches!(
                change,
                Change::Service(_) | Change::Host(_) | Change::Deleted(RowId::Service(_) | RowId::Host(_))
            )
        };
        let drains = state.hosts().any(|host| host.draining);
        if applied.changes.iter().any(moved) {
            for (name, floor) in &mut self.oracle.floors {
                let allowed = state.service(name).map_or(0, |service| least(state, service));
                floor.least = floor.least.min(allowed);
                // One of `per_host` is just stopped on a host that is being emptied.
                let per_host =
                    |service: &pb::ServiceRecord| service.manifest.as_ref().is_some_and(|m| m.per_host);
                floor.clean &= !drains || !state.service(name).is_some_and(|service| per_host(service));
            }
        }
    }

    fn once(&mut self, command: &pb::Command, applied: &Applied) {
        let Some(pb::reply::Result::Accepted(accepted)) = &applied.reply.result else { return };
        let Some(request) = &command.request_id else { return };
        let id = (request.client_id.clone(), request.serial);
        if !accepted.duplicate && !self.oracle.accepted.insert(id) {
            self.violated("a request takes effect once", || format!("{request:?}"));
        }
    }

    fn plan_keeps_rules(&mut self, state: &ClusterState, before: &Standing) {
        for (name, version, was) in &before.services {
            let Some(service) = state.service(name).filter(|service| service.version == *version) else {
                continue;
            };
            if service.manifest.as_ref().is_some_and(|manifest| manifest.per_host) {
                continue; // judged by what really runs
            }
            let (is, least) = (ready_count(state, name), least(state, service));
            if is < (*was).min(least) {
                self.violated("a plan keeps to the update rules", || {
                    format!("{name}: {was} were ready, {is} are, {least} is the least")
                });
            }
        }
    }
}

/// A command in one line.
fn brief(command: &pb::Command, applied: &Applied) -> String {
    let what = match &command.body {
        Some(Body::ReportInstances(report)) => {
            let each = report.instances.iter().map(|one| {
                let state = one.observed.as_ref().and_then(|observed| observed.state.as_ref());
                let state = format!("{state:?}");
                let word =
                    state.trim_start_matches("Some(").split(['(', ' ']).next().unwrap_or_default().to_owned();
                let ready = if state.contains("ready: true") { " ready" } else { "" };
                format!("i-{} e{} a{} {word}{ready}", one.instance_id, one.epoch, one.attempt)
            });
            let each = each.collect::<Vec<_>>().join(", ");
            format!(
                "report of h-{}{}: {each} gone {:?}",
                report.host_id,
                if report.full { " (full)" } else { "" },
                report.gone
            )
        }
        Some(Body::CommitPlan(plan)) => {
            let steps: Vec<_> =
                plan.steps.iter().filter_map(|step| step.step.as_ref()).map(step_brief).collect();
            format!("plan: {}", steps.join(", "))
        }
        Some(Body::ApplyService(apply)) => format!("apply {:?}", apply.manifest),
        body => format!("{body:?}"),
    };
    match &applied.reply.result {
        Some(pb::reply::Result::Rejected(rejected)) => format!("{what} REJECTED: {}", rejected.message),
        _ => what,
    }
}

fn step_brief(step: &pb::plan_step::Step) -> String {
    use pb::plan_step::Step;
    match step {
        Step::Place(place) => format!(
            "place {} v{} i-{} (epoch {}) on h-{}",
            place.service, place.version, place.instance_id, place.expected_epoch, place.host_id
        ),
        Step::Stop(stop) => format!("stop i-{} ({})", stop.instance_id, stop.reason),
        Step::SetDeployment(set) => format!(
            "deployment of {}: {:?}",
            set.service,
            set.deployment.as_ref().map(pb::Deployment::status)
        ),
        Step::Revert(revert) => format!("revert {} to v{}", revert.service, revert.to_version),
        Step::ScheduleRun(step) => format!("schedule of {}", step.service),
        Step::FetchAhead(fetch) => {
            format!("fetch what replaces i-{}, template {}", fetch.instance_id, fetch.template_version)
        }
        Step::GrantRestart(grant) => format!("grant i-{} a restart", grant.instance_id),
        Step::Resize(resize) => format!("resize i-{} to v{}", resize.instance_id, resize.version),
        Step::Forget(forget) => format!("forget i-{} epoch {}", forget.instance_id, forget.epoch),
    }
}
