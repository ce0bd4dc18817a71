//! What is wanted on one host, and what its agent has been told of it. The state is the truth; this remembers only
//! enough to leave out what an agent knows already, such as the echo of its own reports.

use std::collections::{BTreeMap, BTreeSet};

use nave_orchestrator_core::ClusterState;
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;

/// What the agent of one host has been told.
#[derive(Debug)]
pub(super) struct Told {
    host: HostId,
    instances: BTreeMap<InstanceId, Wish>,
}

/// The parts of a wanted instance that ever change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wish {
    epoch: u64,
    version: u64,
    desired: pb::Desired,
    restart_granted: u32,
    /// Template whose artifacts it is to fetch ahead; 0: none.
    fetch: u64,
}

impl Wish {
    fn of(record: &pb::InstanceRecord) -> Self {
        Self {
            epoch: record.epoch,
            version: record.version,
            desired: record.desired(),
            restart_granted: record.restart_granted,
            fetch: record.fetch.as_ref().map_or(0, |fetch| fetch.template_version),
        }
    }
}

impl Told {
    pub(super) fn nothing(host: HostId) -> Self {
        Self { host, instances: BTreeMap::new() }
    }

    /// Everything that is wanted on the host.
    pub(super) fn whole(&mut self, state: &ClusterState, incarnation: u64) -> pb::WantedSet {
        let records: Vec<_> = state.instances_on(self.host).collect();
        self.instances = records.iter().map(|record| (InstanceId(record.id), Wish::of(record))).collect();
        pb::WantedSet {
            incarnation,
            generation: state.revision(),
            instances: records.into_iter().map(|record| wanted(state, record)).collect(),
        }
    }

    /// What these instances' changes mean for the agent; nothing when it knows it all.
    pub(super) fn delta(
        &mut self,
        state: &ClusterState,
        incarnation: u64,
        from: u64,
        touched: BTreeSet<InstanceId>,
    ) -> Option<pb::WantedDelta> {
        let mut put = Vec::new();
        let mut removed = Vec::new();
        for id in touched {
            match state.instance(id).filter(|record| record.host_id == self.host.0) {
                Some(record) => {
                    let wish = Wish::of(record);
                    if self.instances.insert(id, wish) != Some(wish) {
                        put.push(wanted(state, record));
                    }
                }
                None => {
                    if self.instances.remove(&id).is_some() {
                        removed.push(id.0);
                    }
                }
            }
        }
        let delta = pb::WantedDelta {
            incarnation,
            from_generation: from,
            to_generation: state.revision(),
            put,
            removed,
        };
        (!delta.put.is_empty() || !delta.removed.is_empty()).then_some(delta)
    }
}

/// Whether the log knows of this session no more: the host was judged lost since, so what it reported is forgotten and
/// has to be said anew, or it has opened a newer one. A state from before the session says nothing about it.
pub(super) fn is_void(state: &ClusterState, host: HostId, session: u64) -> bool {
    state.revision() >= session && state.session(host) != Some(session)
}

fn wanted(state: &ClusterState, record: &pb::InstanceRecord) -> pb::WantedInstance {
    let service = state.service(&record.service);
    let manifest = state.manifest(&record.service, record.version);
    pb::WantedInstance {
        instance_id: record.id,
        epoch: record.epoch,
        version: record.version,
        ordinal: record.ordinal,
        desired: record.desired,
        manifest: manifest.or_else(|| service?.manifest.as_deref()).cloned(),
        address_suffix: service.map_or(0, |service| service.address_suffix),
        uid: service.map_or(0, |service| service.uid),
        grants_restarts: true,
        restart_granted: record.restart_granted,
        fetch: record.fetch.as_ref().and_then(|fetch| order(service?, fetch.template_version)),
    }
}

/// None: that template is wanted no longer, which the plan is about to see.
fn order(service: &pb::ServiceRecord, template_version: u64) -> Option<pb::FetchOrder> {
    let manifest = service.manifest.as_ref().filter(|_| service.template_version == template_version)?;
    Some(pb::FetchOrder {
        template_version,
        artifacts: manifest.artifacts.clone(),
        env_files: manifest.env_files.clone(),
        secrets: manifest.secrets.clone(),
        files: manifest.files.iter().filter(|file| !file.source.is_empty()).cloned().collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostId = HostId(1);

    fn state(records: &[pb::InstanceRecord]) -> ClusterState {
        let host = |id| pb::HostRecord {
            id,
            facts: Some(pb::HostFacts { name: format!("host-{id}"), ..Default::default() }),
            public_key_sha256: vec![u8::try_from(id).unwrap(); 32],
            ..Default::default()
        };
        let service = pb::ServiceRecord {
            name: "web".to_owned(),
            version: 1,
            template_version: 1,
            manifest: Some(Box::new(pb::Manifest { name: "web".to_owned(), ..Default::default() })),
            address_suffix: 300,
            oldest_version: 1,
            ..Default::default()
        };
        let version = pb::VersionRecord { service: "web".to_owned(), version: 1, ..Default::default() };
        let cluster = pb::ClusterRecord { incarnation: 1, ..Default::default() };
        let rows = [
            pb::row::Row::Cluster(cluster),
            pb::row::Row::Host(host(1)),
            pb::row::Row::Host(host(2)),
            pb::row::Row::Service(service),
            pb::row::Row::Version(version),
        ];
        let instances = records.iter().cloned().map(pb::row::Row::Instance);
        let rows = rows.into_iter().chain(instances).map(|row| pb::Row { row: Some(row) });
        ClusterState::from_rows(rows, 10).unwrap()
    }

    fn instance(id: u64, host_id: u64, epoch: u64) -> pb::InstanceRecord {
        let desired = pb::Desired::Run.into();
        pb::InstanceRecord {
            id,
            host_id,
            epoch,
            desired,
            version: 1,
            service: "web".to_owned(),
            ..Default::default()
        }
    }

    fn touched(ids: &[u64]) -> BTreeSet<InstanceId> {
        ids.iter().copied().map(InstanceId).collect()
    }

    #[test]
    fn a_session_that_the_log_does_not_know_is_void() {
        let rows = state(&[]).rows().collect::<Vec<_>>();
        let session = pb::SessionRecord { host_id: HOST.0, session: 7, sequence: 3 };
        let session = pb::Row { row: Some(pb::row::Row::Session(session)) };
        let state = ClusterState::from_rows(rows.into_iter().chain([session]), 10).unwrap();
        assert!(!is_void(&state, HOST, 7));
        assert!(is_void(&state, HOST, 6), "an older session");
        assert!(is_void(&state, HostId(2), 9), "lost since");
        assert!(!is_void(&state, HostId(2), 11), "this member has yet to apply it");
    }

    #[test]
    fn the_whole_set_is_the_hosts_own() {
        let mut told = Told::nothing(HOST);
        let set = told.whole(&state(&[instance(1, 1, 1), instance(2, 2, 1)]), 1);
        assert_eq!((set.incarnation, set.generation), (1, 10));
        assert_eq!(set.instances.len(), 1);
        let first = &set.instances[0];
        assert_eq!((first.instance_id, first.epoch, first.address_suffix), (1, 1, 300));
        assert_eq!(first.manifest.as_ref().map(|manifest| manifest.name.as_str()), Some("web"));
    }

    #[test]
    fn an_agent_is_not_told_what_it_knows() {
        let mut told = Told::nothing(HOST);
        let before = state(&[instance(1, 1, 1)]);
        told.whole(&before, 1);
        let observed = pb::InstanceRecord { restarts: 3, attempt: 4, ..instance(1, 1, 1) };
        assert_eq!(told.delta(&state(&[observed]), 1, 10, touched(&[1])), None);
    }

    #[test]
    fn what_a_successor_needs_is_told_once_and_only_while_that_is_wanted() {
        let mut told = Told::nothing(HOST);
        told.whole(&state(&[instance(1, 1, 1)]), 1);
        let fetch = |template_version, done| {
            let fetch = Some(pb::FetchState { template_version, done, ..Default::default() });
            state(&[pb::InstanceRecord { fetch, ..instance(1, 1, 1) }])
        };
        let delta = told.delta(&fetch(1, false), 1, 10, touched(&[1])).unwrap();
        assert_eq!(delta.put[0].fetch.as_ref().map(|order| order.template_version), Some(1));
        assert_eq!(told.delta(&fetch(1, true), 1, 10, touched(&[1])), None, "it has it, and keeps it");
        let delta = told.delta(&fetch(9, false), 1, 10, touched(&[1])).unwrap();
        assert_eq!(delta.put[0].fetch, None, "of no version that is wanted");
    }

    #[test]
    fn what_a_successor_reads_from_its_host_is_told_by_its_place_there() {
        let file = |source: &str| pb::File { path: "a".into(), source: source.into(), ..Default::default() };
        let manifest = pb::Manifest {
            env_files: vec!["/etc/web.env".into()],
            secrets: [("key".into(), "/etc/key".into())].into(),
            files: vec![file(""), file("/etc/a")],
            ..Default::default()
        };
        let service = pb::ServiceRecord {
            template_version: 2,
            manifest: Some(Box::new(manifest.clone())),
            ..Default::default()
        };
        let told = order(&service, 2).unwrap();
        assert_eq!((told.env_files, told.secrets), (manifest.env_files, manifest.secrets));
        assert_eq!(told.files, [file("/etc/a")], "the other is in the manifest in full");
    }

    #[test]
    fn a_new_epoch_is_put_and_what_left_the_host_is_removed() {
        let mut told = Told::nothing(HOST);
        told.whole(&state(&[instance(1, 1, 1), instance(2, 1, 1), instance(3, 1, 1)]), 1);
        let after = state(&[instance(1, 1, 2), instance(2, 2, 2)]);
        let delta = told.delta(&after, 1, 10, touched(&[1, 2, 3])).unwrap();
        assert_eq!(delta.put.iter().map(|put| (put.instance_id, put.epoch)).collect::<Vec<_>>(), [(1, 2)]);
        assert_eq!((delta.removed, delta.from_generation), (vec![2, 3], 10));
        assert_eq!(told.delta(&after, 1, 10, touched(&[2])), None, "it has been told that it is gone");
    }
}
