//! `HostService`: the hosts as the hub knows them. What the log says of a host (lost or not) every member knows;
//! when it was last heard only the leader does, so a follower asks it and does without when it does not answer.

use std::sync::Arc;
use std::time::Duration;

use nave_orchestrator_core::{ClusterState, leaving};
use nave_proto::ids::HostId;
use nave_proto::lease::TTL;
use nave_proto::pb;
use pb::command::Body;
use pb::host_service_server::HostService;
use tonic::{Request, Response, Status};

use crate::api::{Hub, convert, errors};
use crate::clock;
use crate::dispatch::beats::Heard;

/// A listing is worth little waiting for a leader that does not answer.
const LEADER_TIMEOUT: Duration = Duration::from_millis(500);

/// The service of this name on one member.
#[derive(Debug)]
pub(crate) struct Hosts {
    hub: Arc<Hub>,
}

impl Hosts {
    pub(crate) fn new(hub: Arc<Hub>) -> Self {
        Self { hub }
    }

    /// Commits a change of the host of this name or id.
    async fn change<T>(
        &self,
        request: &Request<T>,
        name: &str,
        request_id: Option<pb::RequestId>,
        body: impl FnOnce(u64) -> Body,
    ) -> Result<Response<pb::ChangeHostResponse>, Status> {
        let known = find(&self.hub.raft.state(), name);
        let record = match known {
            Ok(record) => record,
            // It may have joined a moment ago through another member.
            Err(_) => {
                self.hub.read(request, true).await?;
                find(&self.hub.raft.state(), name)?
            }
        };
        let committed = self.hub.write(request, request_id, body(record.id)).await?;
        let id = HostId(record.id);
        let left = self.hub.raft.state().instances_on(id).count();
        Ok(Response::new(pb::ChangeHostResponse {
            host_id: id.to_string(),
            name: record.facts.as_ref().map_or_else(String::new, |facts| facts.name.clone()),
            instances: u32::try_from(left).unwrap_or(u32::MAX),
            revision: committed.revision,
        }))
    }

    /// When each host was last heard, by the leader; nothing when it cannot be asked.
    async fn heard(&self) -> Option<Heard> {
        let status = self.hub.raft.status();
        let leader = status.leader?;
        if leader == self.hub.id {
            return Some(self.hub.beats.heard());
        }
        let (_, node, _) = status.members.into_iter().find(|(id, _, _)| *id == leader)?;
        let info = self.hub.peers.info(leader, &node.address, LEADER_TIMEOUT).await?;
        Some(info.last_heard_unix_ns.into_iter().map(|(id, at)| (HostId(id), at)).collect())
    }
}

#[tonic::async_trait]
impl HostService for Hosts {
    async fn list_hosts(
        &self,
        request: Request<pb::ListHostsRequest>,
    ) -> Result<Response<pb::ListHostsResponse>, Status> {
        let linearizable = request.get_ref().linearizable;
        self.hub.read(&request, linearizable).await?;
        let heard = self.heard().await;
        let now = clock::unix_now_ns();
        let state = self.hub.raft.state();
        let hosts = state
            .hosts()
            .map(|record| {
                let mut host = convert::host(&state, record);
                if let Some(heard) = &heard {
                    show_heard(&mut host, record, heard.get(&HostId(record.id)).copied(), now);
                }
                host
            })
            .collect();
        let freshness = self.hub.freshness(&state, linearizable);
        drop(state);
        Ok(Response::new(pb::ListHostsResponse { hosts, freshness }))
    }

    async fn get_host(
        &self,
        request: Request<pb::GetHostRequest>,
    ) -> Result<Response<pb::GetHostResponse>, Status> {
        let linearizable = request.get_ref().linearizable;
        self.hub.read(&request, linearizable).await?;
        let heard = self.heard().await;
        let now = clock::unix_now_ns();
        let state = self.hub.raft.state();
        let record = find(&state, &request.get_ref().host)?;
        let id = HostId(record.id);
        let mut host = convert::host(&state, &record);
        if let Some(heard) = &heard {
            show_heard(&mut host, &record, heard.get(&id).copied(), now);
        }
        let leaves = record.draining || record.forgotten;
        let leaving = if leaves { leaving(&state, id) } else { Vec::new() };
        let leaving = leaving.into_iter().map(|one| pb::LeavingInstance {
            id: one.instance.to_string(),
            service: one.service,
            waits_for: one.waits_for,
        });
        Ok(Response::new(pb::GetHostResponse {
            host: Some(host),
            leaving: leaving.collect(),
            freshness: self.hub.freshness(&state, linearizable),
        }))
    }

    async fn drain_host(
        &self,
        request: Request<pb::DrainHostRequest>,
    ) -> Result<Response<pb::ChangeHostResponse>, Status> {
        let pb::DrainHostRequest { host, reason, request_id } = request.get_ref().clone();
        let body = |host_id| Body::SetHostDraining(pb::SetHostDraining { host_id, draining: true, reason });
        self.change(&request, &host, request_id, body).await
    }

    async fn undrain_host(
        &self,
        request: Request<pb::UndrainHostRequest>,
    ) -> Result<Response<pb::ChangeHostResponse>, Status> {
        let pb::UndrainHostRequest { host, request_id } = request.get_ref().clone();
        let body = |host_id| {
            Body::SetHostDraining(pb::SetHostDraining { host_id, draining: false, reason: String::new() })
        };
        self.change(&request, &host, request_id, body).await
    }

    async fn forget_host(
        &self,
        request: Request<pb::ForgetHostRequest>,
    ) -> Result<Response<pb::ChangeHostResponse>, Status> {
        let pb::ForgetHostRequest { host, reason, request_id } = request.get_ref().clone();
        let body = |host_id| Body::ForgetHost(pb::ForgetHost { host_id, reason });
        self.change(&request, &host, request_id, body).await
    }
}

/// The host of this name, else of this id.
fn find(state: &ClusterState, name: &str) -> Result<Arc<pb::HostRecord>, Status> {
    let by_id = || name.parse().ok().and_then(|id: HostId| state.host(id));
    state.host_by_name(name).or_else(by_id).cloned().ok_or_else(|| errors::no_host(name))
}

/// Adds what the leader has heard: a host that the log calls connected and that has missed its lease is silent.
fn show_heard(host: &mut pb::Host, record: &pb::HostRecord, heard_ns: Option<i64>, now_ns: i64) {
    host.last_heard = heard_ns.and_then(convert::timestamp);
    let ttl_ns = i64::try_from(TTL.as_nanos()).unwrap_or(i64::MAX);
    let silent = heard_ns.is_none_or(|at| now_ns.saturating_sub(at) > ttl_ns);
    if silent && record.status() == pb::HostStatus::Connected {
        "silent".clone_into(&mut host.status);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connected_host_that_is_not_heard_is_shown_silent() {
        const SECOND: i64 = 1_000_000_000;
        let table = [
            (pb::HostStatus::Connected, Some(99 * SECOND), "connected"),
            (pb::HostStatus::Connected, Some(95 * SECOND), "silent"),
            (pb::HostStatus::Connected, None, "silent"),
            (pb::HostStatus::Lost, Some(99 * SECOND), "lost"),
            (pb::HostStatus::Lost, None, "lost"),
        ];
        for (status, heard, expected) in table {
            let record = pb::HostRecord { id: 1, status: status.into(), ..Default::default() };
            let mut host = convert::host(&nave_orchestrator_core::ClusterState::new(), &record);
            show_heard(&mut host, &record, heard, 100 * SECOND);
            assert_eq!(host.status, expected, "{status:?} {heard:?}");
            assert_eq!(host.last_heard.is_some(), heard.is_some());
        }
    }
}
