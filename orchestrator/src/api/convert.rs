//! Records of the state as resources of the API: the one place where numbers become what people see (`h-3`, host
//! names, time stamps, `running`). Called by every reading call and by the watches, under the state's read lock, so
//! it only looks things up and copies.

use nave_orchestrator_core::{self as core, ClusterState};
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::{pb, words};
use pb::observed::State;
use prost_types::Timestamp;

use crate::clock;

/// A moment in the log; unset when it never was.
pub(crate) fn timestamp(unix_ns: i64) -> Option<Timestamp> {
    const NS: i64 = 1_000_000_000;
    let nanos = i32::try_from(unix_ns.rem_euclid(NS)).expect("a remainder below 10^9 fits");
    (unix_ns != 0).then(|| Timestamp { seconds: unix_ns.div_euclid(NS), nanos })
}

/// A service, its counts as of now, and why instances are missing.
pub(crate) fn service(state: &ClusterState, record: &pb::ServiceRecord) -> pb::Service {
    let desired = count(core::desired_count(state, &record.name));
    let ready = count(core::ready_count(state, &record.name));
    // Also while all that is desired is ready, and the next version is held up.
    let explained = desired > ready || core::fetches_ahead(state, &record.name);
    let now = clock::unix_now_ns().max(state.time_unix_ns());
    let reasons: Vec<pb::Reason> = if explained { reasons(state, &record.name) } else { Vec::new() };
    pb::Service {
        name: record.name.clone(),
        version: record.version,
        manifest: record.manifest.as_deref().cloned(),
        desired,
        ready,
        running: count(core::running_count(state, &record.name)),
        deployment: record.deployment.clone(),
        stable_version: record.stable_version,
        address_suffix: record.address_suffix,
        uid: record.uid,
        deleting: record.deleting,
        created: timestamp(record.created_unix_ns),
        revision: record.revision,
        unplaced: reasons.iter().map(|reason| reason.text.clone()).collect(),
        reasons,
        runs: record.job.as_ref().map_or_else(Vec::new, |job| job.runs.clone()),
        next_run: next_run(record),
        waits_for: core::waits_for(state, &record.name, now).unwrap_or_default(),
    }
}

/// When a job is due next; unset also until that has been worked out for its version, whose schedule may be another.
fn next_run(record: &pb::ServiceRecord) -> Option<Timestamp> {
    let job = record.job.as_ref().filter(|job| job.schedule_version == record.version)?;
    timestamp(job.next_due_unix_ns)
}

fn reasons(state: &ClusterState, service: &str) -> Vec<pb::Reason> {
    let explained = core::explained(state, service).into_iter();
    explained.map(|(about, text)| pb::Reason { about: about.word().to_owned(), text }).collect()
}

/// One accepted change of a service.
pub(crate) fn version(record: &pb::VersionRecord) -> pb::ServiceVersion {
    pb::ServiceVersion {
        service: record.service.clone(),
        version: record.version,
        manifest: record.manifest.as_deref().cloned(),
        created: timestamp(record.created_unix_ns),
        actor: record.actor.clone(),
        cause: record.cause.clone(),
        stable: record.stable,
        revision: record.revision,
    }
}

/// A desired copy and what was last seen of it.
pub(crate) fn instance(state: &ClusterState, record: &pb::InstanceRecord) -> pb::Instance {
    let observed = record.observed.as_ref().and_then(|observed| observed.state.as_ref());
    pb::Instance {
        id: InstanceId(record.id).to_string(),
        service: record.service.clone(),
        version: record.version,
        host: host_name(state, record.host_id),
        host_id: host_id(record.host_id),
        epoch: record.epoch,
        ordinal: record.ordinal,
        desired: words::desired(record.desired()).to_owned(),
        observed: words::observed(record.observed.as_ref()).to_owned(),
        ready: is_ready(record),
        pid: process(observed).map_or(0, |process| process.pid),
        restarts: record.restarts,
        ports: record.ports.clone(),
        since: timestamp(record.since_unix_ns),
        reason: reason(record),
        revision: record.revision,
        attempt: record.attempt,
        endpoint: words::endpoint_state(record.endpoint()).to_owned(),
        last_exit: last_exit(observed).cloned(),
    }
}

/// The addresses at which an instance answers: one for each of its ports.
pub(crate) fn endpoints(state: &ClusterState, record: &pb::InstanceRecord) -> Vec<pb::Endpoint> {
    if record.endpoint() == pb::EndpointState::Unspecified {
        return Vec::new();
    }
    let endpoint = |(port_name, port): (&String, &u32)| pb::Endpoint {
        service: record.service.clone(),
        instance_id: InstanceId(record.id).to_string(),
        host: host_name(state, record.host_id),
        host_id: host_id(record.host_id),
        port_name: port_name.clone(),
        port: *port,
        state: words::endpoint_state(record.endpoint()).to_owned(),
        epoch: record.epoch,
        version: record.version,
        revision: record.revision,
    };
    record.ports.iter().map(endpoint).collect()
}

/// A host, without what only the leader knows of it (`last_heard`, silent).
pub(crate) fn host(state: &ClusterState, record: &pb::HostRecord) -> pb::Host {
    let id = HostId(record.id);
    let reserved = state.reserved(id);
    let facts = record.facts.clone().unwrap_or_default();
    pb::Host {
        id: id.to_string(),
        name: facts.name.clone(),
        address: facts.address.clone(),
        status: words::host_status(record.status()).to_owned(),
        draining: record.draining,
        facts: Some(facts),
        cpu_reserved_millicores: reserved.cpu_millicores,
        memory_reserved_bytes: reserved.memory_bytes,
        instances: count(state.instances_on(id).count()),
        last_heard: None,
        revision: record.revision,
        status_reason: record.status_reason.clone(),
        drain_reason: record.drain_reason.clone(),
    }
}

/// A line of the lifecycle history.
pub(crate) fn event(state: &ClusterState, record: &pb::EventRecord) -> pb::Event {
    pb::Event {
        revision: record.revision,
        index: record.index,
        time: timestamp(record.time_unix_ns),
        kind: record.kind.clone(),
        service: record.service.clone(),
        instance_id: if record.instance_id == 0 {
            String::new()
        } else {
            InstanceId(record.instance_id).to_string()
        },
        host: host_name(state, record.host_id),
        actor: record.actor.clone(),
        message: record.message.clone(),
    }
}

/// A join token without its secret, which nobody has.
pub(crate) fn token(record: &pb::TokenRecord) -> pb::Token {
    pb::Token {
        id: record.id.clone(),
        created: timestamp(record.created_unix_ns),
        expires: timestamp(record.expires_unix_ns),
        uses_left: record.uses_left,
        actor: record.actor.clone(),
    }
}

/// The name of a host; its id when it is no longer known; empty for none.
pub(crate) fn host_name(state: &ClusterState, id: u64) -> String {
    if id == 0 {
        return String::new();
    }
    let facts = state.host(HostId(id)).and_then(|host| host.facts.as_ref());
    facts.map_or_else(|| HostId(id).to_string(), |facts| facts.name.clone())
}

/// A host by its name or its id.
pub(crate) fn find_host(state: &ClusterState, name_or_id: &str) -> Option<HostId> {
    if let Ok(id) = name_or_id.parse::<HostId>()
        && state.host(id).is_some()
    {
        return Some(id);
    }
    state.host_by_name(name_or_id).map(|host| HostId(host.id))
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn host_id(id: u64) -> String {
    if id == 0 { String::new() } else { HostId(id).to_string() }
}

fn is_ready(record: &pb::InstanceRecord) -> bool {
    let observed = record.observed.as_ref().and_then(|observed| observed.state.as_ref());
    matches!(observed, Some(State::Running(running)) if running.ready)
}

fn process(state: Option<&State>) -> Option<&pb::ProcessIdentity> {
    match state? {
        State::Running(running) => running.process.as_ref(),
        State::Stopping(stopping) => stopping.process.as_ref(),
        State::Pending(_) | State::Starting(_) | State::BackingOff(_) | State::Exited(_) => None,
        State::Failed(_) | State::Lost(_) | State::Unknown(_) => None,
    }
}

fn last_exit(state: Option<&State>) -> Option<&pb::ExitRecord> {
    match state? {
        State::BackingOff(backing_off) => backing_off.last_exit.as_ref(),
        State::Exited(exited) => exited.exit.as_ref(),
        State::Failed(failed) => failed.last_exit.as_ref(),
        State::Pending(_) | State::Starting(_) | State::Running(_) => None,
        State::Stopping(_) | State::Lost(_) | State::Unknown(_) => None,
    }
}

/// The agent's reason, or the hub's for a stop that the agent has not spoken about yet.
fn reason(record: &pb::InstanceRecord) -> String {
    if record.reason.is_empty() && record.desired() == pb::Desired::Stop {
        record.stop_reason.clone()
    } else {
        record.reason.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_stamp_has_seconds_and_the_rest() {
        assert_eq!(timestamp(1_000_000_001), Some(Timestamp { seconds: 1, nanos: 1 }));
        assert_eq!(timestamp(0), None);
        assert_eq!(timestamp(-1), Some(Timestamp { seconds: -1, nanos: 999_999_999 }));
    }

    #[test]
    fn a_run_that_an_earlier_schedule_had_next_is_not_told() {
        let job = |schedule_version| pb::JobState {
            schedule_version,
            next_due_unix_ns: 7_000_000_000,
            ..Default::default()
        };
        let record =
            |version| pb::ServiceRecord { version: 2, job: Some(job(version)), ..Default::default() };
        assert_eq!(next_run(&record(1)), None);
        assert_eq!(next_run(&record(2)), Some(Timestamp { seconds: 7, nanos: 0 }));
    }

    #[test]
    fn an_instance_shows_the_words_people_know() {
        let state = ClusterState::new();
        let process = pb::ProcessIdentity { pid: 77, ..Default::default() };
        let running = pb::observed::Running { process: Some(process), ready: true, started_unix_ns: 1 };
        let record = pb::InstanceRecord {
            id: 42,
            service: "web".to_owned(),
            host_id: 3,
            desired: pb::Desired::Stop.into(),
            observed: Some(pb::Observed { state: Some(State::Running(running)) }),
            ports: [("http".to_owned(), 20_001), ("admin".to_owned(), 20_002)].into(),
            endpoint: pb::EndpointState::Draining.into(),
            stop_reason: "scaled down".to_owned(),
            ..Default::default()
        };
        let shown = instance(&state, &record);
        assert_eq!((shown.id.as_str(), shown.host_id.as_str(), shown.pid), ("i-42", "h-3", 77));
        // The host is not known (any more): its id stands for its name.
        assert_eq!((shown.host.as_str(), shown.ready), ("h-3", true));
        assert_eq!((shown.desired.as_str(), shown.observed.as_str()), ("stop", "running"));
        assert_eq!((shown.endpoint.as_str(), shown.reason.as_str()), ("draining", "scaled down"));
        let endpoints = endpoints(&state, &record);
        assert_eq!(endpoints.len(), 2);
        assert_eq!((endpoints[0].port_name.as_str(), endpoints[0].port), ("admin", 20_002));
    }

    #[test]
    fn an_instance_without_endpoint_has_no_address() {
        let record = pb::InstanceRecord { ports: [("http".to_owned(), 1)].into(), ..Default::default() };
        assert!(endpoints(&ClusterState::new(), &record).is_empty());
        assert_eq!(instance(&ClusterState::new(), &record).observed, "pending");
    }
}
