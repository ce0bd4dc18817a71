//! Random histories: commands, reports true and false, plans fresh and stale, retries. After each step `World`
//! checks rows, replicas and indexes; here come the promises of the scheduler on top: never above capacity, never
//! below the update rules, and in the end everything converges.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nave_orchestrator_core::limits::NEEDED_STOP_WAIT_NS;
use nave_orchestrator_core::{ClusterState, PlanCursor, desired_count, plan, plan_dirty, ready_count};
use nave_proto::constraint::Constraint;
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use nave_proto::pb::command::Body;
use nave_proto::pb::observed::{self, State};
use nave_proto::pb::{DeploymentStatus, HostStatus};
use proptest::prelude::*;

use crate::world::{
    MIB, SECOND, World, apply, delete, exited, facts, failed, forget, manifest, pause, probe, promote,
    report, restart, rollback, running, scale, seconds, status_of, stays_to_fetch, with_artifact,
};

const SERVICES: [&str; 4] = ["api", "db", "web", "zoo"];
const HOSTS: [&str; 4] = ["alpha", "beta", "gamma", "delta"];

#[derive(Debug, Clone)]
enum Op {
    Apply(Box<pb::Manifest>),
    Scale(usize, u32),
    Restart(usize),
    Rollback(usize, u64),
    Delete(usize),
    Pause(usize, bool),
    Promote(usize),
    Join(usize),
    Status(usize, HostStatus),
    /// Lost, and back a moment later.
    Flap(usize),
    /// Lost hosts have been without a lease for so many seconds.
    LeaseOver(u64),
    Drain(usize, bool),
    Forget(usize),
    Facts(usize, u64, bool),
    /// Any instance, any state, epoch and attempt perhaps wrong, from any host.
    Report {
        pick: usize,
        state: u8,
        older: bool,
        attempt: u32,
        host: Option<u64>,
    },
    FullReport(usize),
    Agents,
    Plan,
    Slice(usize),
    /// The plan made some time ago.
    Stale,
    /// A fresh plan and an old one in one command.
    Both,
    Wait(i64),
    Blank,
    Again,
}

fn manifests() -> impl Strategy<Value = pb::Manifest> {
    let flags = (any::<bool>(), any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.15));
    (0..SERVICES.len(), 0u32..4, 0..3usize, flags, 1u32..3, 0i64..3, 0..4usize, prop::bool::weighted(0.2))
        .prop_map(
            |(
                service,
                count,
                command,
                (cpu, revert, port, per_host),
                max_parallel,
                min_ready,
                needs,
                stop,
            )| {
                let mut manifest = pb::Manifest {
                    name: SERVICES[service].into(),
                    command: vec![["one", "two", "three"][command].into()],
                    count,
                    per_host,
                    ..Default::default()
                };
                let cpu_millicores = if cpu { 1000 } else { 0 };
                manifest.resources =
                    Some(pb::Resources { cpu_millicores, memory_bytes: 512 * MIB, ..Default::default() });
                if cpu && command > 0 {
                    manifest = with_artifact(manifest, ["one", "two", "three"][command]);
                }
                manifest.update = Some(pb::Update {
                    max_parallel,
                    min_ready: seconds(min_ready * 5),
                    progress_deadline: seconds(60),
                    auto_revert: revert,
                    canary: if command == 2 { 1 } else { 0 },
                });
                if count != 1 {
                    manifest.health = Some(pb::Health { ready: Some(probe()), ..Default::default() });
                }
                if port {
                    let fixed = pb::Port { service_port: 80, port: 8080, ..Default::default() };
                    manifest.ports.insert("http".into(), fixed);
                }
                if needs < service {
                    manifest.needs.push(SERVICES[needs].into());
                } else if needs == 3 && service == 0 {
                    manifest.needs.push(SERVICES[3].into());
                }
                let constraints =
                    if needs == 1 { vec!["label.zone != \"b\"".to_owned()] } else { Vec::new() };
                let on_disconnect = if stop { pb::OnDisconnect::Stop } else { pb::OnDisconnect::Keep };
                manifest.placement = Some(pb::Placement {
                    constraints,
                    on_disconnect: on_disconnect.into(),
                    priority: [None, Some(10), Some(90)].into_iter().nth(command).flatten(),
                    ..Default::default()
                });
                manifest
            },
        )
}

fn ops() -> impl Strategy<Value = Op> {
    let service = 0..SERVICES.len();
    let host = 0..HOSTS.len();
    let status = prop_oneof![Just(HostStatus::Lost), Just(HostStatus::Connected), Just(HostStatus::Silent)];
    prop_oneof![
        4 => manifests().prop_map(|manifest| Op::Apply(Box::new(manifest))),
        2 => (service.clone(), 0u32..5).prop_map(|(s, count)| Op::Scale(s, count)),
        1 => service.clone().prop_map(Op::Restart),
        1 => (service.clone(), 0u64..4).prop_map(|(s, to)| Op::Rollback(s, to)),
        1 => service.clone().prop_map(Op::Delete),
        2 => (service.clone(), prop::bool::weighted(0.5)).prop_map(|(s, paused)| Op::Pause(s, paused)),
        2 => service.prop_map(Op::Promote),
        2 => host.clone().prop_map(Op::Join),
        2 => (host.clone(), status).prop_map(|(h, status)| Op::Status(h, status)),
        2 => host.clone().prop_map(Op::Flap),
        1 => (1u64..60).prop_map(Op::LeaseOver),
        2 => (host.clone(), prop::bool::weighted(0.6)).prop_map(|(h, draining)| Op::Drain(h, draining)),
        1 => host.clone().prop_map(Op::Forget),
        1 => (host.clone(), 1u64..5, any::<bool>()).prop_map(|(h, cores, b)| Op::Facts(h, cores, b)),
        6 => (any::<usize>(), 0u8..8, prop::bool::weighted(0.1), 0u32..3, prop::option::weighted(0.1, 1u64..4))
            .prop_map(|(pick, state, older, attempt, host)| Op::Report { pick, state, older, attempt, host }),
        1 => host.prop_map(Op::FullReport),
        5 => Just(Op::Agents),
        8 => Just(Op::Plan),
        3 => (1usize..4).prop_map(Op::Slice),
        2 => Just(Op::Stale),
        2 => Just(Op::Both),
        3 => (1i64..40).prop_map(Op::Wait),
        1 => Just(Op::Blank),
        1 => Just(Op::Again),
    ]
}

/// A world and what a random history needs besides.
struct History {
    world: World,
    sliced: PlanCursor,
    stale: Vec<pb::PlanStep>,
    last: Option<pb::Command>,
    serial: u64,
}

impl History {
    fn new() -> Self {
        let mut world = World::with_hosts(2);
        world.update_facts("alpha", |facts| facts.cpu_millicores = 3000);
        Self { world, sliced: PlanCursor::default(), stale: Vec::new(), last: None, serial: 0 }
    }

    /// Numbered, so that it can be retried; refusals are as good as anything here.
    fn send(&mut self, body: Body) {
        self.serial += 1;
        let request_id = Some(pb::RequestId { client_id: "random".into(), serial: self.serial });
        let command = pb::Command { request_id, ..self.world.command(body) };
        self.last = Some(command.clone());
        self.world.apply(command);
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Apply(manifest) => self.send(apply(*manifest)),
            Op::Scale(service, count) => self.send(scale(SERVICES[service], count)),
            Op::Restart(service) => self.send(restart(SERVICES[service])),
            Op::Rollback(service, to) => self.send(rollback(SERVICES[service], to)),
            Op::Delete(service) => self.send(delete(SERVICES[service])),
            Op::Pause(service, paused) => self.send(pause(SERVICES[service], paused)),
            Op::Promote(service) => self.send(promote(SERVICES[service])),
            Op::Join(host) => self.join(HOSTS[host]),
            Op::Status(host, status) => {
                if let Some(record) = self.world.state.host_by_name(HOSTS[host]) {
                    self.send(status_of(record.id, status, ""));
                }
            }
            Op::Flap(host) => {
                self.step(Op::Status(host, HostStatus::Lost));
                self.step(Op::Status(host, HostStatus::Connected));
            }
            Op::LeaseOver(seconds) => self.lease_over(seconds * 1000),
            Op::Drain(host, draining) => {
                if let Some(record) = self.world.state.host_by_name(HOSTS[host]) {
                    let (host_id, reason) = (record.id, String::new());
                    self.send(Body::SetHostDraining(pb::SetHostDraining { host_id, draining, reason }));
                }
            }
            Op::Forget(host) => {
                if let Some(record) = self.world.state.host_by_name(HOSTS[host]) {
                    self.send(forget(record.id));
                }
            }
            Op::Facts(host, cores, zone_b) => self.facts(HOSTS[host], cores, zone_b),
            Op::Report { pick, state, older, attempt, host } => {
                self.report(pick, state, older, attempt, host)
            }
            Op::FullReport(host) => {
                if let Some(record) = self.world.state.host_by_name(HOSTS[host]) {
                    let host_id = record.id;
                    self.send(Body::ReportInstances(pb::ReportInstances {
                        host_id,
                        full: true,
                        ..Default::default()
                    }));
                }
            }
            Op::Agents => {
                self.world.agents();
            }
            Op::Plan => {
                let steps = self.world.steps();
                let steps: Vec<_> = steps.into_iter().map(|step| pb::PlanStep { step: Some(step) }).collect();
                self.stale = steps.clone();
                let (before, now) = (self.world.state.clone(), self.world.now);
                self.commit(steps);
                what_is_needed_goes_last(&before, &self.world.state, now);
            }
            Op::Slice(limit) => {
                let slice = plan_dirty(&self.world.state, &mut self.sliced, self.world.now, limit);
                self.commit(slice.steps);
            }
            Op::Stale => self.commit(self.stale.clone()),
            Op::Both => {
                let fresh = plan(&self.world.state, self.world.now).steps;
                self.commit([fresh, self.stale.clone()].concat());
            }
            Op::Wait(seconds) => self.world.now += seconds * SECOND,
            Op::Blank => self.world.blank_entry(),
            Op::Again => {
                if let Some(command) = self.last.clone() {
                    assert!(self.world.apply(command).changes.is_empty(), "a retry changed something");
                }
            }
        }
    }

    /// All lost hosts have been without a lease for so long.
    fn lease_over(&mut self, lease_over_ms: u64) {
        let lost = self.world.state.hosts().filter(|host| host.status() == HostStatus::Lost);
        for host_id in lost.map(|host| host.id).collect::<Vec<_>>() {
            let status = HostStatus::Lost.into();
            let set = pb::SetHostStatus { host_id, status, lease_over_ms, ..Default::default() };
            self.send(Body::SetHostStatus(set));
        }
    }

    fn join(&mut self, name: &str) {
        // A lost host's name is taken over by a new key, as after a reinstallation.
        let generation = match self.world.state.host_by_name(name) {
            Some(record) if record.status() == HostStatus::Lost => record.id,
            Some(_) | None => 0,
        };
        let key = name.bytes().chain(generation.to_be_bytes()).cycle().take(32).collect();
        let register =
            pb::RegisterHost { token_id: "t".into(), public_key_sha256: key, facts: Some(facts(name)) };
        self.send(Body::RegisterHost(register));
    }

    fn facts(&mut self, name: &str, cores: u64, zone_b: bool) {
        let Some(record) = self.world.state.host_by_name(name).cloned() else { return };
        let mut facts = record.facts.clone().unwrap();
        facts.cpu_millicores = cores * 1000;
        facts.labels.insert("zone".into(), if zone_b { "b" } else { "a" }.into());
        self.send(Body::UpdateHost(pb::UpdateHost { host_id: record.id, facts: Some(facts), session: 0 }));
    }

    fn report(&mut self, pick: usize, state: u8, older: bool, attempt: u32, host: Option<u64>) {
        let count = self.world.state.instances().len();
        if count == 0 {
            return;
        }
        let instance = self.world.state.instances().nth(pick % count).unwrap().clone();
        let state = match state {
            0 => State::Pending(observed::Pending {}),
            1 => State::Starting(observed::Starting {}),
            2..=3 => running(false),
            4 => running(true),
            5 => State::BackingOff(observed::BackingOff::default()),
            6 => exited(i32::from(older)),
            _ => failed(),
        };
        let mut word = report(&instance, instance.attempt + attempt, state);
        // Fetched, or not yet, or for another than was asked.
        word.fetch = instance.fetch.clone().map(|fetch| pb::FetchState {
            template_version: fetch.template_version - u64::from(older),
            done: attempt == 2,
            problem: if attempt == 1 { "not found".into() } else { String::new() },
        });
        word.epoch -= u64::from(older && word.epoch > 0);
        let host_id = host.unwrap_or(instance.host_id);
        self.send(Body::ReportInstances(pb::ReportInstances {
            host_id,
            instances: vec![word],
            ..Default::default()
        }));
    }

    /// Commits a plan, fresh or stale, and holds it to the promises.
    fn commit(&mut self, steps: Vec<pb::PlanStep>) {
        let before = self.world.state.clone();
        self.send(Body::CommitPlan(pb::CommitPlan { steps }));
        within_capacity(&before, &self.world.state);
        within_update_rules(&before, &self.world.state);
        fetched_before_it_goes(&before, &self.world.state);
        successful_means_ready(&before, &self.world.state);
        moves_only_what_must(&before, &self.world.state);
    }
}

/// A plan never reserves what a host has not.
fn within_capacity(before: &ClusterState, after: &ClusterState) {
    for host in after.hosts() {
        let id = HostId(host.id);
        let (was, is) = (before.reserved(id), after.reserved(id));
        let facts = host.facts.as_ref().unwrap();
        assert!(
            is.cpu_millicores <= facts.cpu_millicores.max(was.cpu_millicores),
            "{id} has too much cpu reserved"
        );
        assert!(
            is.memory_bytes <= facts.memory_bytes.max(was.memory_bytes),
            "{id} has too much memory reserved"
        );
        let mut ports = BTreeMap::new();
        for instance in after.instances_on(id) {
            let manifest = after.manifest(&instance.service, instance.version).unwrap();
            for port in manifest.ports.values().filter(|port| port.port != 0) {
                *ports.entry(port.port).or_insert(0) += 1;
            }
        }
        assert!(ports.values().all(|holders| *holders == 1), "a fixed port is held twice on {id}");
    }
}

/// A plan never leaves fewer ready, nor more wanted, than the update rules allow.
fn within_update_rules(before: &ClusterState, after: &ClusterState) {
    for record in after.services().filter(|record| !record.deleting) {
        let name = record.name.as_str();
        if before.service(name).map(|service| service.version) != Some(record.version) {
            continue;
        }
        let manifest = record.manifest.as_ref().unwrap();
        let slots = desired_count(after, name);
        let parallel = manifest.update.as_ref().map_or(1, |update| update.max_parallel as usize);
        let stop_first = manifest.per_host || manifest.ports.values().any(|port| port.port != 0);
        // A task that is done needs nothing ready in its place.
        let floor = if stop_first { slots.saturating_sub(parallel) } else { slots };
        let floor = floor.saturating_sub(done(after, record));
        let (was, is) = (meant_and_ready(before, record), meant_and_ready(after, record));
        assert!(is >= was.min(floor), "{name}: {was} were ready, {is} are, {floor} is the least: {record:?}");
        if manifest.per_host && !after.hosts().any(|host| host.draining) {
            let (was, is) = (ready_count(before, name), ready_count(after, name));
            assert!(
                is >= was.min(floor),
                "{name}: {was} were ready, {is} are, {floor} is the least: {record:?}"
            );
        }
        let canary = manifest.update.as_ref().map_or(0, |update| update.canary as usize);
        let beside = if stop_first { 0 } else { parallel.max(canary) };
        // Those of a version that is held, on hosts that are drained, are moved beside whatever the rollout has.
        let moved = parallel.min(to_be_moved(before, after, record, slots));
        if manifest.per_host {
            let added = added_beside(before, after, name);
            assert!(added <= moved, "{name}: {added} placed where one stood, {moved} is the most");
            continue;
        }
        let (had, has) = (wanted(before, name), wanted(after, name));
        let ceiling = had.max(slots + beside) + moved;
        assert!(has <= ceiling, "{name}: {has} wanted, {ceiling} is the most");
    }
}

/// A plan never empties a slot before its host has what the next instance needs.
fn fetched_before_it_goes(before: &ClusterState, after: &ClusterState) {
    for service in after.services().filter(|service| !service.deleting) {
        let name = service.name.as_str();
        if before.service(name).map(|before| before.version) != Some(service.version) {
            continue;
        }
        let goes = |i: &&Arc<pb::InstanceRecord>| {
            let stops = |now: &Arc<pb::InstanceRecord>| now.desired() == pb::Desired::Stop;
            stays_to_fetch(before, service, i) && after.instance(InstanceId(i.id)).is_none_or(stops)
        };
        let early = before.instances_of(name).filter(goes).count();
        // Others that go stood for slots, and what is left stands for the rest.
        let stood = before.instances_of(name).filter(|i| i.desired() == pb::Desired::Run).count();
        assert!(
            early == 0 || stood - early >= desired_count(after, name),
            "{name}: {early} of {stood} stop before their hosts have what the next ones need"
        );
    }
}

/// Instances of an earlier template on hosts that are being drained, for which none of that kind stands elsewhere, while
/// the rollout may not replace them: it failed, is paused, or waits for a promotion. A plan may itself be what says so.
fn to_be_moved(
    before: &ClusterState,
    after: &ClusterState,
    service: &pb::ServiceRecord,
    slots: usize,
) -> usize {
    let held = [before, after].into_iter().any(|state| {
        let deployment = state.service(&service.name).and_then(|record| record.deployment.as_ref());
        deployment.is_some_and(|deployment| match deployment.status() {
            DeploymentStatus::Failed | DeploymentStatus::Paused | DeploymentStatus::Cancelled => true,
            _ => deployment.canary > 0,
        })
    });
    let drained = |i: &&pb::InstanceRecord| before.host(HostId(i.host_id)).is_some_and(|host| host.draining);
    let earlier = before.instances_of(&service.name).filter(|instance| {
        instance.desired() == pb::Desired::Run && instance.template_version != service.template_version
    });
    let (leaving, staying): (Vec<_>, Vec<_>) = earlier.map(AsRef::as_ref).partition(drained);
    if held { leaving.len().min(slots.saturating_sub(staying.len())) } else { 0 }
}

/// Wanted instances that came to hosts on which another of the service stands.
fn added_beside(before: &ClusterState, after: &ClusterState, name: &str) -> usize {
    let on_each = |state: &ClusterState| {
        let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
        for instance in state.instances_of(name).filter(|i| i.desired() == pb::Desired::Run) {
            *counts.entry(instance.host_id).or_default() += 1;
        }
        counts
    };
    let (had, has) = (on_each(before), on_each(after));
    has.iter().map(|(host, count)| count.saturating_sub(had.get(host).copied().unwrap_or(0).max(1))).sum()
}

/// A fresh plan stops nothing that another needs which goes with it: the service as a whole, or from the same host.
fn what_is_needed_goes_last(before: &ClusterState, after: &ClusterState, now: i64) {
    let long_ago = now - NEEDED_STOP_WAIT_NS;
    let going = |service: &pb::ServiceRecord| match service.deleting {
        true => service.deleting_unix_ns > long_ago,
        false => {
            let none = service.manifest.as_ref().is_some_and(|m| m.count == 0 && !m.per_host);
            none && service.deployment.as_ref().is_some_and(|d| d.started_unix_ns > long_ago)
        }
    };
    for was in before.instances().filter(|instance| instance.desired() == pb::Desired::Run) {
        let stopped = after.instance(InstanceId(was.id)).is_none_or(|now| now.desired() == pb::Desired::Stop);
        let Some(service) = before.service(&was.service).filter(|_| stopped) else { continue };
        for needing in before.services_needing(&service.name) {
            let other = before.service(needing).unwrap();
            let left = before.instances_of(needing).count();
            assert!(
                !(going(service) && going(other)) || left == 0,
                "{was:?} is stopped before {left} of {needing}"
            );
            let host = before.host(HostId(was.host_id)).unwrap();
            let ended = |i: &pb::InstanceRecord| {
                let state = i.observed.as_ref().and_then(|observed| observed.state.as_ref());
                matches!(state, Some(State::Exited(_) | State::Failed(_)))
            };
            let beside = before.instances_of(needing).filter(|i| i.host_id == was.host_id && !ended(i));
            let (drained, ready) = (host.draining && host.draining_unix_ns > long_ago, is_ready(was));
            let excess = going(service) || desired_count(before, &service.name) == 0;
            assert!(
                !drained || !ready || excess || beside.count() == 0,
                "{was:?} leaves {} before {needing}",
                host.id
            );
        }
    }
}

fn is_ready(instance: &pb::InstanceRecord) -> bool {
    let state = instance.observed.as_ref().and_then(|observed| observed.state.as_ref());
    matches!(state, Some(State::Running(running)) if running.ready)
}

/// A plan stops nothing and places nothing anew that could have stayed as it was.
fn moves_only_what_must(before: &ClusterState, after: &ClusterState) {
    for instance in before.instances().filter(|instance| instance.desired() == pb::Desired::Run) {
        let (Some(now), Some(service)) =
            (after.instance(InstanceId(instance.id)), after.service(&instance.service))
        else {
            continue;
        };
        let state = instance.observed.as_ref().and_then(|observed| observed.state.as_ref());
        if now.epoch > instance.epoch {
            let must = matches!(state, Some(State::Lost(_) | State::Failed(_)));
            assert!(must, "placed again without need: {instance:?}");
        }
        let same_version =
            before.service(&instance.service).is_some_and(|old| old.version == service.version);
        if now.desired() == pb::Desired::Stop && same_version && !service.deleting {
            assert!(may_go(before, service, instance), "stopped without need: {instance:?}");
        }
    }
}

/// Whether there is a reason for an instance to go: another template, a host that it has to leave, or too many.
fn may_go(state: &ClusterState, service: &pb::ServiceRecord, instance: &pb::InstanceRecord) -> bool {
    let host = state.host(HostId(instance.host_id)).unwrap();
    let manifest = service.manifest.as_ref().unwrap();
    let constraints = manifest.placement.as_ref().map_or(&[][..], |placement| &placement.constraints);
    let facts = host.facts.as_ref().unwrap();
    let unmet = constraints.iter().any(|text| !text.parse::<Constraint>().unwrap().holds(facts));
    let rivals = state.instances_of(&service.name).filter(|i| i.desired() == pb::Desired::Run);
    let rivals = rivals.filter(|i| i.template_version == service.template_version);
    let too_many = match manifest.per_host {
        true => state.instances_of(&service.name).filter(|i| i.host_id == instance.host_id).count() > 1,
        false => rivals.count() > desired_count(state, &service.name),
    };
    // What never returns with its host is stopped where it was, with `per_host`.
    let gone = manifest.per_host && host.status() == HostStatus::Lost;
    let resources =
        |version| state.manifest(&service.name, version).and_then(|m| m.resources).unwrap_or_default();
    let (has, asks) = (resources(instance.version), resources(service.version));
    let more = |asked: u64, held: u64, reserved: u64, all: u64| asked > held && reserved - held + asked > all;
    let reserved = state.reserved(HostId(instance.host_id));
    let outgrown =
        more(asks.cpu_millicores, has.cpu_millicores, reserved.cpu_millicores, facts.cpu_millicores)
            || more(asks.memory_bytes, has.memory_bytes, reserved.memory_bytes, facts.memory_bytes);
    let other_template = instance.template_version != service.template_version;
    other_template || host.draining || unmet || too_many || gone || outgrown
}

/// A plan, however old, says that a version is fully ready only when it is.
fn successful_means_ready(before: &ClusterState, after: &ClusterState) {
    let status = |state: &ClusterState, name: &str| {
        state.service(name).and_then(|service| service.deployment.as_ref()).map(|d| (d.version, d.status()))
    };
    for service in after.services().filter(|service| service.version > 0) {
        let name = service.name.as_str();
        let (was, is) = (status(before, name), status(after, name));
        if was != is && is.is_some_and(|(_, status)| status == DeploymentStatus::Successful) {
            let (ready, wanted) =
                (ready_count(after, name) + done(after, service), desired_count(after, name));
            assert!(ready >= wanted, "{name} is said to be successful with {ready} of {wanted} ready");
        }
    }
}

fn wanted(state: &ClusterState, name: &str) -> usize {
    state.instances_of(name).filter(|instance| instance.desired() == pb::Desired::Run).count()
}

fn done(state: &ClusterState, service: &pb::ServiceRecord) -> usize {
    let done = |i: &pb::InstanceRecord| match i.observed.as_ref().and_then(|observed| observed.state.as_ref())
    {
        Some(State::Exited(exited)) => exited.exit.as_ref().is_some_and(|exit| exit.code == 0),
        Some(_) | None => false,
    };
    let current =
        state.instances_of(&service.name).filter(|i| i.template_version == service.template_version);
    current.filter(|i| i.desired() == pb::Desired::Run && done(i)).count()
}

/// Ready instances; of `per_host` only those that stand for a host that is meant.
fn meant_and_ready(state: &ClusterState, service: &pb::ServiceRecord) -> usize {
    let manifest = service.manifest.as_ref().unwrap();
    if !manifest.per_host {
        return ready_count(state, &service.name);
    }
    let constraints = manifest.placement.as_ref().map_or(&[][..], |placement| &placement.constraints);
    let meant = |id: u64| {
        let host = state.host(HostId(id)).unwrap();
        let facts = host.facts.as_ref().unwrap();
        !host.draining && constraints.iter().all(|text| text.parse::<Constraint>().unwrap().holds(facts))
    };
    let ready = |i: &pb::InstanceRecord| {
        let state = i.observed.as_ref().and_then(|observed| observed.state.as_ref());
        i.desired() == pb::Desired::Run && matches!(state, Some(State::Running(running)) if running.ready)
    };
    let mut hosts: Vec<_> = state
        .instances_of(&service.name)
        .filter(|i| ready(i) && meant(i.host_id))
        .map(|i| i.host_id)
        .collect();
    hosts.sort_unstable();
    hosts.dedup();
    hosts.len()
}

/// Hosts come back with room for all, agents are honest, time passes: then everything is as wanted.
fn converges(mut world: World) {
    for name in HOSTS {
        match world.state.host_by_name(name) {
            None => {
                world.join(name);
            }
            Some(_) => world.set_status(name, HostStatus::Connected),
        }
        world.set_draining(name, false);
        world.update_facts(name, |facts| {
            facts.cpu_millicores = 100_000;
            facts.memory_bytes = 100_000 * MIB;
            facts.labels.insert("zone".into(), "a".into());
        });
    }
    // Those that never come back have been without a lease for long.
    for host in world.state.hosts().cloned().collect::<Vec<_>>() {
        if host.status() == HostStatus::Lost {
            world.lease_over(HostId(host.id), Duration::from_secs(3600));
        }
    }
    // What a report of an old process has left: agents start anew what they do not run.
    for name in HOSTS {
        let host_id = world.host_id(name).0;
        world.accept(Body::ReportInstances(pb::ReportInstances {
            host_id,
            full: true,
            ..Default::default()
        }));
    }
    // Whatever waits for a person gets its word.
    for name in SERVICES {
        drop(world.try_apply(pause(name, false)));
    }
    world.settle_for(3 * 3600);
    for name in SERVICES {
        drop(world.try_apply(promote(name)));
    }
    world.settle_for(3 * 3600);
    assert_eq!(world.steps(), [], "it is quiet");
    let blocked: Vec<_> = plan(&world.state, world.now).unplaced;
    for service in world.state.services() {
        let name = service.name.as_str();
        assert!(!service.deleting, "{name} is still being deleted");
        let status = service.deployment.as_ref().unwrap().status();
        assert_ne!(status, DeploymentStatus::Running, "{name} is neither ready nor failed");
        let manifest = service.manifest.as_ref().unwrap();
        let ports_clash = manifest.ports.values().any(|port| port.port != 0);
        let needs = |unplaced: &nave_orchestrator_core::Unplaced| unplaced.service == name;
        if status == DeploymentStatus::Failed || ports_clash || blocked.iter().any(needs) {
            continue;
        }
        let ready = ready_count(&world.state, name) + done(&world.state, service);
        assert_eq!(ready, desired_count(&world.state, name), "{name}: {service:?}");
        assert_eq!(wanted(&world.state, name), desired_count(&world.state, name));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn any_history_keeps_every_promise(ops in prop::collection::vec(ops(), 1..90)) {
        let mut history = History::new();
        for op in ops {
            history.step(op);
        }
        // The planner that works in slices has missed nothing either.
        let whole = plan(&history.world.state, history.world.now);
        let rest = plan_dirty(&history.world.state, &mut history.sliced, history.world.now, usize::MAX);
        prop_assert_eq!(whole.steps, rest.steps);
        converges(history.world);
    }
}

/// How often an instance may move in so many seconds, however its hosts come and go: each move after the first waits
/// twice as long as the one before, and is forgotten only after ten minutes in one place.
fn moves_max(seconds: i64) -> u64 {
    let (mut moves, mut waited) = (0, 0);
    while waited <= seconds {
        waited += (1 << moves).min(300);
        moves += 1;
    }
    (moves + 1) * (u64::try_from(seconds).unwrap() / 600 + 1)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 500, ..ProptestConfig::default() })]

    #[test]
    fn hosts_that_come_and_go_cause_no_storm(
        flaps in prop::collection::vec((0..HOSTS.len(), 1i64..8, any::<bool>()), 40..120),
    ) {
        let mut world = World::with_hosts(HOSTS.len());
        world.deploy(manifest("web", 4));
        world.deploy(pb::Manifest { per_host: true, ..manifest("agentd", 0) });
        world.settle();
        let begun = world.now;
        for (host, wait, down) in flaps {
            world.set_status(HOSTS[host], if down { HostStatus::Lost } else { HostStatus::Connected });
            world.now += wait * SECOND;
            world.settle();
        }
        let most = moves_max((world.now - begun) / SECOND);
        for instance in world.state.instances() {
            let moves = instance.epoch - 1;
            prop_assert!(moves <= most, "{moves} moves, {most} are the most: {instance:?}");
        }
        for host in HOSTS {
            world.set_status(host, HostStatus::Connected);
        }
        world.settle_for(600);
        prop_assert_eq!((world.ready("web"), world.ready("agentd")), (4, HOSTS.len()));
        prop_assert!(world.wanted("agentd").iter().all(|instance| instance.epoch == 1), "it comes back with its host");
    }
}
