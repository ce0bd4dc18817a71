//! What of the state every agent's directory shows: services with ports, the endpoints behind them, and where the hosts
//! are. An endpoint drains as soon as its instance is to stop, whatever its agent has said of it.
//!
//! A *print* is a hash of what is shown: a change of a record that leaves its print as it was is no news to anybody.

use std::hash::{DefaultHasher, Hash, Hasher as _};

use nave_proto::pb;
use pb::EndpointState;

use crate::wants::InstanceExt as _;

/// The service as agents are told of it; `None`: it has no ports, so nobody can call it.
#[must_use]
pub fn directory_service(record: &pb::ServiceRecord) -> Option<pb::DirectoryService> {
    let manifest = record.manifest.as_ref().filter(|manifest| !manifest.ports.is_empty())?;
    Some(pb::DirectoryService {
        name: record.name.clone(),
        address_suffix: record.address_suffix,
        ports: manifest.ports.clone(),
        allow: manifest.allow.clone(),
    })
}

/// Of what [`directory_service`] says.
#[must_use]
pub fn service_print(record: &pb::ServiceRecord) -> Option<u64> {
    let manifest = record.manifest.as_ref().filter(|manifest| !manifest.ports.is_empty())?;
    let mut hasher = DefaultHasher::new();
    record.address_suffix.hash(&mut hasher);
    for (name, port) in &manifest.ports {
        // Encoded, so that a key added to `Port` is never forgotten here.
        (name, prost::Message::encode_to_vec(port)).hash(&mut hasher);
    }
    manifest.allow.as_ref().map(|allow| &allow.callers).hash(&mut hasher);
    Some(hasher.finish())
}

/// The endpoint as agents are told of it; `None`: nothing answers there, and nothing is about to.
#[must_use]
pub fn directory_endpoint(record: &pb::InstanceRecord) -> Option<pb::DirectoryEndpoint> {
    let state = shown_state(record)?;
    Some(pb::DirectoryEndpoint {
        instance_id: record.id,
        epoch: record.epoch,
        ordinal: record.ordinal,
        service: record.service.clone(),
        host_id: record.host_id,
        ports: record.ports.clone(),
        state: state.into(),
        version: record.version,
    })
}

/// Of what [`directory_endpoint`] says.
#[must_use]
pub fn endpoint_print(record: &pb::InstanceRecord) -> Option<u64> {
    let state = shown_state(record)?;
    let mut hasher = DefaultHasher::new();
    (record.epoch, record.ordinal, record.host_id, record.version, state as i32).hash(&mut hasher);
    (&record.service, &record.ports).hash(&mut hasher);
    Some(hasher.finish())
}

/// Whether callers have to leave it.
#[must_use]
pub fn is_draining(record: &pb::InstanceRecord) -> bool {
    shown_state(record) == Some(EndpointState::Draining)
}

fn shown_state(record: &pb::InstanceRecord) -> Option<EndpointState> {
    if record.ports.is_empty() {
        return None;
    }
    match record.endpoint() {
        EndpointState::Unspecified => None,
        EndpointState::Starting | EndpointState::Ready | EndpointState::Draining if !record.wanted() => {
            Some(EndpointState::Draining)
        }
        state @ (EndpointState::Starting | EndpointState::Ready | EndpointState::Draining) => Some(state),
    }
}

/// The host as agents are told of it.
#[must_use]
pub fn directory_host(record: &pb::HostRecord) -> pb::DirectoryHost {
    let facts = record.facts.as_ref();
    pb::DirectoryHost {
        id: record.id,
        name: facts.map(|facts| facts.name.clone()).unwrap_or_default(),
        address: facts.map(|facts| facts.address.clone()).unwrap_or_default(),
    }
}

/// Of what [`directory_host`] says.
#[must_use]
pub fn host_print(record: &pb::HostRecord) -> u64 {
    let mut hasher = DefaultHasher::new();
    record.facts.as_ref().map(|facts| (&facts.name, &facts.address)).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance() -> pb::InstanceRecord {
        pb::InstanceRecord {
            id: 5,
            service: "web".to_owned(),
            version: 2,
            ordinal: 1,
            host_id: 3,
            epoch: 4,
            desired: pb::Desired::Run.into(),
            ports: [("http".to_owned(), 20_001)].into(),
            endpoint: EndpointState::Ready.into(),
            ..Default::default()
        }
    }

    #[test]
    fn what_nobody_can_call_is_not_shown() {
        assert_eq!(directory_endpoint(&pb::InstanceRecord { ports: Default::default(), ..instance() }), None);
        let unreachable = pb::InstanceRecord { endpoint: EndpointState::Unspecified.into(), ..instance() };
        assert_eq!(directory_endpoint(&unreachable), None);
        let manifest = pb::Manifest { name: "worker".to_owned(), ..Default::default() };
        let service = pb::ServiceRecord { manifest: Some(Box::new(manifest)), ..Default::default() };
        assert_eq!((directory_service(&service), service_print(&service)), (None, None));
    }

    #[test]
    fn what_is_to_stop_drains_at_once() {
        let told = pb::InstanceRecord { desired: pb::Desired::Stop.into(), ..instance() };
        assert_eq!(directory_endpoint(&told).unwrap().state(), EndpointState::Draining);
        assert!(is_draining(&told) && !is_draining(&instance()));
        assert_ne!(endpoint_print(&told), endpoint_print(&instance()));
    }

    #[test]
    fn a_print_changes_with_what_is_shown_and_with_nothing_else() {
        let before = instance();
        let changes: [fn(&mut pb::InstanceRecord); 9] = [
            |record| record.epoch += 1,
            |record| record.ordinal += 1,
            |record| record.host_id += 1,
            |record| record.version += 1,
            |record| record.ports = [("http".to_owned(), 20_002)].into(),
            |record| record.endpoint = EndpointState::Starting.into(),
            |record| record.restarts += 1,
            |record| record.reason = "out of memory".to_owned(),
            |record| record.since_unix_ns += 1,
        ];
        for change in changes {
            let mut after = before.clone();
            change(&mut after);
            let shown = directory_endpoint(&after) != directory_endpoint(&before);
            assert_eq!(endpoint_print(&after) != endpoint_print(&before), shown, "{after:?}");
        }
    }

    #[test]
    fn a_services_print_is_of_its_ports_and_its_callers() {
        let port = pb::Port { service_port: 80, ..Default::default() };
        let manifest = pb::Manifest { ports: [("http".to_owned(), port)].into(), ..Default::default() };
        let service = |manifest| pb::ServiceRecord {
            manifest: Some(Box::new(manifest)),
            address_suffix: 7,
            ..Default::default()
        };
        let before = service_print(&service(manifest.clone()));
        let counted = pb::Manifest { count: 9, ..manifest.clone() };
        assert_eq!(service_print(&service(counted)), before);
        let closed = pb::Manifest { allow: Some(pb::AllowedCallers::default()), ..manifest.clone() };
        assert_ne!(service_print(&service(closed)), before);
        let mut moved = manifest;
        moved.ports.get_mut("http").unwrap().service_port = 81;
        assert_ne!(service_print(&service(moved)), before);
    }
}
