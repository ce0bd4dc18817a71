//! Which hosts are asked for a service's output, and which of those that may have some are not. Pure.
//!
//! The hub knows where instances are, and of former ones where they were as long as its events say so. Those are few: of
//! what restarts often they go back minutes. So every connected host is asked, and one that has nothing says so at once.

use std::collections::BTreeSet;
use std::sync::Arc;

use nave_orchestrator_core::{ClusterState, EventFilter};
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use tonic::Status;

use crate::api::{convert, errors};

/// Hosts asked that are only connected. Each costs this member a handshake and, while it has something to send, a
/// connection and some hundred KiB; most have nothing.
const OTHERS_ASKED_MAX: usize = 1024;
/// All the events that are kept for one service.
const EVENTS_ASKED: usize = 1000;
/// Hosts named in one sentence.
const HOSTS_NAMED: usize = 5;

/// A host to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) host: HostId,
    pub(super) name: String,
    /// It has instances, or had them as far as the events go back: it is followed.
    pub(super) is_likely: bool,
}

/// Whom to ask, and what is to be said about it.
#[derive(Debug)]
pub(super) struct Whom {
    pub(super) sources: Vec<Source>,
    /// Why lines may be missing whatever the sources answer.
    pub(super) warnings: Vec<String>,
    /// The hub does not know what is asked for: the answer when no host does either.
    pub(super) unknown: Option<Status>,
}

impl Whom {
    /// # Errors
    /// The instance is another service's.
    pub(super) fn of(
        state: &ClusterState,
        request: &pb::ReadLogsRequest,
        instance: Option<InstanceId>,
    ) -> Result<Self, Status> {
        let (service, events) = (request.service.as_str(), events(state, &request.service));
        let record = instance.and_then(|id| state.instance(id));
        if let (Some(id), Some(record)) = (instance, record)
            && record.service != service
        {
            return Err(errors::of_another_service(id, &record.service));
        }
        let has_service = state.service(service).is_some();
        let is_named = |id: InstanceId| events.iter().any(|event| event.instance_id == id.0);
        let unknown = match instance {
            _ if !has_service => Some(errors::no_service(service)),
            Some(id) if record.is_none() && !is_named(id) => Some(errors::no_output(service, id)),
            _ => None,
        };
        let (sources, left_out) = sources(state, request, instance);
        let mut warnings = Vec::new();
        // Then the likely ones are all there are.
        let are_all_known = !has_service || goes_back_to_the_beginning(state, service, &events);
        if request.access || !are_all_known {
            warnings.extend((left_out > 0).then(|| too_many(left_out)));
        }
        if !request.access && !are_all_known {
            warnings.extend(not_connected(state, service, &sources));
        }
        Ok(Self { sources, warnings, unknown })
    }
}

/// Whom to ask now, and how many connected hosts are left out.
pub(super) fn sources(
    state: &ClusterState,
    request: &pb::ReadLogsRequest,
    instance: Option<InstanceId>,
) -> (Vec<Source>, usize) {
    let likely = if request.access { BTreeSet::new() } else { likely(state, &request.service, instance) };
    let source = |id: u64, is_likely: bool| Source {
        host: HostId(id),
        name: convert::host_name(state, id),
        is_likely,
    };
    let mut sources: Vec<Source> = likely.iter().map(|id| source(*id, true)).collect();
    let others = state.hosts().filter(|host| host.status() == pb::HostStatus::Connected);
    let mut others = others.filter(|host| !likely.contains(&host.id));
    sources.extend(others.by_ref().take(OTHERS_ASKED_MAX).map(|host| source(host.id, false)));
    (sources, others.count())
}

/// The hosts that have instances of the service, or had them as far as the events go back.
fn likely(state: &ClusterState, service: &str, instance: Option<InstanceId>) -> BTreeSet<u64> {
    let is_wanted = |id: u64| instance.is_none_or(|only| only.0 == id);
    let instances = state.instances_of(service).filter(|record| is_wanted(record.id));
    let mut hosts: BTreeSet<u64> = instances.map(|record| record.host_id).collect();
    for event in events(state, service) {
        if event.instance_id != 0 && is_wanted(event.instance_id) {
            hosts.insert(event.host_id);
        }
    }
    hosts.remove(&0);
    hosts
}

fn events(state: &ClusterState, service: &str) -> Vec<Arc<pb::EventRecord>> {
    state.events(&EventFilter { service: Some(service.to_owned()), host: None }, EVENTS_ASKED)
}

/// Whether the events name every host that the service was on since it was made.
fn goes_back_to_the_beginning(state: &ClusterState, service: &str, events: &[Arc<pb::EventRecord>]) -> bool {
    let made = state.service(service).map(|record| record.created_unix_ns);
    let oldest = events.first().map(|event| event.time_unix_ns);
    made.zip(oldest).is_some_and(|(made, oldest)| oldest <= made)
}

/// Hosts that nobody can ask now, of which nothing says whether the service was there.
fn not_connected(state: &ClusterState, service: &str, sources: &[Source]) -> Option<String> {
    let asked: BTreeSet<u64> = sources.iter().map(|source| source.host.0).collect();
    let is_away = |host: &pb::HostRecord| host.status() != pb::HostStatus::Connected && !host.forgotten;
    let mut away = state.hosts().filter(|host| is_away(host) && !asked.contains(&host.id));
    let named = away.by_ref().take(HOSTS_NAMED).map(|host| convert::host_name(state, host.id));
    let mut hosts: Vec<String> = named.collect();
    let more = away.count();
    if more > 0 {
        hosts.push(format!("{more} more"));
    }
    let are = match hosts.len() {
        0 => return None,
        1 => "is",
        _ => "are",
    };
    let hosts = hosts.join(", ");
    Some(format!("{hosts} {are} not connected: if {service} ran there earlier, that output is missing"))
}

fn too_many(left_out: usize) -> String {
    format!(
        "{left_out} connected hosts were not asked, since a member asks at most {OTHERS_ASKED_MAX} that are not known to \
         have had what is asked for: what they have of it is missing"
    )
}

#[cfg(test)]
mod tests {
    use pb::row::Row;

    use super::*;

    fn host(id: u64, status: pb::HostStatus) -> Row {
        let facts = Some(pb::HostFacts { name: format!("host-{id}"), ..Default::default() });
        let public_key_sha256 = id.to_be_bytes().to_vec();
        Row::Host(pb::HostRecord {
            id,
            facts,
            status: status.into(),
            public_key_sha256,
            ..Default::default()
        })
    }

    fn service(name: &str) -> Row {
        let manifest = Some(Box::new(pb::Manifest { name: name.into(), ..Default::default() }));
        Row::Service(pb::ServiceRecord {
            name: name.into(),
            manifest,
            created_unix_ns: 10,
            ..Default::default()
        })
    }

    fn instance(id: u64, service: &str, host_id: u64) -> Row {
        let service = service.to_owned();
        Row::Instance(pb::InstanceRecord { id, service, host_id, ..Default::default() })
    }

    fn event(time_unix_ns: i64, instance_id: u64, host_id: u64) -> Row {
        let (revision, service) = (u64::try_from(time_unix_ns).unwrap(), "web".to_owned());
        Row::Event(pb::EventRecord {
            revision,
            time_unix_ns,
            service,
            instance_id,
            host_id,
            ..Default::default()
        })
    }

    fn state(rows: Vec<Row>) -> ClusterState {
        ClusterState::from_rows(rows.into_iter().map(|row| pb::Row { row: Some(row) }), 100).unwrap()
    }

    fn logs_of(service: &str) -> pb::ReadLogsRequest {
        pb::ReadLogsRequest { service: service.into(), ..Default::default() }
    }

    fn asked(whom: &Whom) -> Vec<(u64, bool)> {
        whom.sources.iter().map(|source| (source.host.0, source.is_likely)).collect()
    }

    /// Connected hosts 1 to 3, of which 1 has an instance, and 4 which is lost.
    fn fleet(oldest_event: i64, formerly_on: u64) -> ClusterState {
        let mut rows: Vec<Row> = (1..=3).map(|id| host(id, pb::HostStatus::Connected)).collect();
        rows.extend([host(4, pb::HostStatus::Lost), service("web"), instance(7, "web", 1)]);
        rows.push(event(oldest_event, 6, formerly_on));
        state(rows)
    }

    #[test]
    fn every_connected_host_is_asked_and_those_that_are_likely_are_followed() {
        let whom = Whom::of(&fleet(10, 4), &logs_of("web"), None).unwrap();
        assert_eq!(asked(&whom), [(1, true), (4, true), (2, false), (3, false)]);
        assert!(whom.unknown.is_none() && whom.warnings.is_empty(), "{whom:?}");
        // Of one instance as of all.
        let whom = Whom::of(&fleet(10, 4), &logs_of("web"), Some(InstanceId(6))).unwrap();
        assert_eq!(asked(&whom), [(4, true), (1, false), (2, false), (3, false)]);
        let access = pb::ReadLogsRequest { access: true, ..logs_of("web") };
        let whom = Whom::of(&fleet(10, 4), &access, None).unwrap();
        assert_eq!(asked(&whom), [(1, false), (2, false), (3, false)]);
    }

    #[test]
    fn hosts_that_cannot_be_asked_are_named_when_the_events_have_forgotten() {
        let whom = Whom::of(&fleet(11, 2), &logs_of("web"), None).unwrap();
        assert_eq!(whom.warnings.len(), 1, "{whom:?}");
        assert!(whom.warnings[0].contains("host-4 is not connected"), "{whom:?}");
        let whole = Whom::of(&fleet(10, 2), &logs_of("web"), None).unwrap();
        assert!(whole.warnings.is_empty(), "{whole:?}");
    }

    #[test]
    fn what_the_hub_does_not_know_is_asked_for_all_the_same() {
        let unknown = |service: &str, instance: Option<u64>| {
            let whom = Whom::of(&fleet(11, 2), &logs_of(service), instance.map(InstanceId)).unwrap();
            assert!(asked(&whom).contains(&(3, false)));
            whom.unknown.map(|status| status.message().to_owned()).unwrap_or_default()
        };
        assert!(unknown("nothing", None).contains("no service \"nothing\""));
        assert!(unknown("web", Some(999)).contains("no instance i-999 of web"));
        for known in [None, Some(6), Some(7)] {
            assert_eq!(unknown("web", known), "");
        }
    }

    #[test]
    fn an_instance_of_another_service_is_refused_with_its_name() {
        let rows =
            vec![host(1, pb::HostStatus::Connected), service("web"), service("db"), instance(7, "db", 1)];
        let refused = Whom::of(&state(rows), &logs_of("web"), Some(InstanceId(7))).unwrap_err();
        assert!(refused.message().contains("i-7 is an instance of db"), "{refused}");
    }

    #[test]
    fn of_very_many_hosts_those_that_are_left_out_are_counted() {
        let many = u64::try_from(OTHERS_ASKED_MAX).unwrap() + 3;
        let mut rows: Vec<Row> = (1..=many).map(|id| host(id, pb::HostStatus::Connected)).collect();
        rows.extend([service("web"), instance(7, "web", 1), event(11, 7, 1)]);
        let whom = Whom::of(&state(rows), &logs_of("web"), None).unwrap();
        assert_eq!(whom.sources.len(), OTHERS_ASKED_MAX + 1);
        assert!(whom.warnings[0].starts_with("2 connected hosts were not asked"), "{whom:?}");
    }
}
