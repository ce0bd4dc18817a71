//! `ServiceService`: what people do with services. Writing calls check what can be checked without the log, then
//! propose; `ApplyService` is the call that has to be cheap, so it copies nothing it does not need.

use std::sync::Arc;

use nave_orchestrator_core::{EventFilter, replaces_for_both};
use nave_proto::ids::HostId;
use nave_proto::manifest::{self, MANIFEST_BYTES_MAX};
use nave_proto::pb;
use pb::apply_service_response::Outcome;
use pb::command::Body;
use pb::service_service_server::ServiceService;
use prost::Message as _;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use crate::api::{Committed, Hub, access, convert, deadline, errors, logs, traffic};
use crate::watch::feed;

/// Events shown beside one service.
const EVENTS_SHOWN: usize = 20;

/// The service of this name on one member.
#[derive(Debug, Clone)]
pub(crate) struct Services {
    hub: Arc<Hub>,
}

impl Services {
    pub(crate) fn new(hub: Arc<Hub>) -> Self {
        Self { hub }
    }

    /// A change of a service that is answered with its new version.
    async fn change<T>(
        &self,
        request: &Request<T>,
        request_id: Option<pb::RequestId>,
        body: Body,
    ) -> Result<Response<pb::ChangeResponse>, Status> {
        let Committed { revision, accepted } = self.hub.write(request, request_id, body).await?;
        Ok(Response::new(pb::ChangeResponse { version: accepted.version, revision }))
    }

    /// `ApplyService`.
    pub(crate) async fn apply(
        &self,
        actor: String,
        deadline: Instant,
        mut request: pb::ApplyServiceRequest,
    ) -> Result<pb::ApplyServiceResponse, Status> {
        let mut manifest =
            request.manifest.take().ok_or_else(|| errors::invalid_field("manifest", "is missing"))?;
        let bytes = manifest.encoded_len();
        if bytes > MANIFEST_BYTES_MAX {
            return Err(errors::manifest_too_large(bytes));
        }
        manifest::fill_defaults(&mut manifest);
        manifest::validate(&manifest).map_err(|violations| errors::invalid_manifest(&violations))?;
        if request.dry_run {
            return self.dry_run(&request, &manifest);
        }
        let name = manifest.name.clone();
        let body = Body::ApplyService(pb::ApplyService {
            manifest: Some(manifest),
            expected_version: request.expected_version,
        });
        let Committed { revision, accepted } =
            self.hub.write_as(actor, request.request_id, body, deadline).await?;
        let mut answer = pb::ApplyServiceResponse {
            version: accepted.version,
            revision,
            outcome: accepted.outcome,
            changes: Vec::new(),
            replaces_instances: false,
        };
        if accepted.outcome() == Outcome::Updated {
            self.have_applied(revision, deadline).await;
            self.tell_change(&name, &mut answer);
        }
        Ok(answer)
    }

    /// `GetService`.
    pub(crate) async fn get(
        &self,
        deadline: Instant,
        request: &pb::GetServiceRequest,
    ) -> Result<pb::GetServiceResponse, Status> {
        let pb::GetServiceRequest { name, linearizable } = request;
        let linearizable = *linearizable;
        self.hub.read_by(deadline, linearizable).await?;
        let state = self.hub.raft.state();
        let record = state.service(name).ok_or_else(|| errors::no_service(name))?;
        let filter = EventFilter { service: Some(name.clone()), host: None };
        let answer = pb::GetServiceResponse {
            service: Some(convert::service(&state, record)),
            instances: state.instances_of(name).map(|record| convert::instance(&state, record)).collect(),
            events: state
                .events(&filter, EVENTS_SHOWN)
                .into_iter()
                .rev()
                .map(|record| convert::event(&state, &record))
                .collect(),
            freshness: self.hub.freshness(&state, linearizable),
        };
        drop(state);
        Ok(answer)
    }

    /// What an apply would do, found without writing anything.
    fn dry_run(
        &self,
        request: &pb::ApplyServiceRequest,
        after: &pb::Manifest,
    ) -> Result<pb::ApplyServiceResponse, Status> {
        let state = self.hub.raft.state();
        let before = state.service(&after.name).filter(|service| !service.deleting);
        let version = before.map_or(0, |service| service.version);
        if let Some(expected) = request.expected_version
            && expected != version
        {
            return Err(errors::failed_precondition(
                "CONFLICT",
                format!(
                    "{} is at version {version}, not {expected}; read it again before you change it",
                    after.name
                ),
            ));
        }
        let manifest = before.and_then(|service| service.manifest.as_deref());
        let outcome = match manifest {
            None => Outcome::Created,
            Some(manifest) if manifest == after => Outcome::Unchanged,
            Some(_) => Outcome::Updated,
        };
        Ok(pb::ApplyServiceResponse {
            version: if outcome == Outcome::Unchanged { version } else { version + 1 },
            revision: state.revision(),
            outcome: outcome.into(),
            changes: manifest::diff(manifest, after),
            replaces_instances: manifest.is_some_and(|manifest| replaces(manifest, after)),
        })
    }

    /// Until this member has applied what another one has committed, or the caller's time is over.
    async fn have_applied(&self, revision: u64, deadline: Instant) {
        let mut applied = self.hub.raft.applied();
        let there = applied.wait_for(|applied| *applied >= revision);
        // Then less is said, and nothing wrong.
        let _late = tokio::time::timeout_at(deadline, there).await;
    }

    /// Adds what a committed apply has changed. Its version and the one before are still there: many more would have to
    /// be made before an answer is, and then it says less.
    fn tell_change(&self, name: &str, answer: &mut pb::ApplyServiceResponse) {
        let state = self.hub.raft.state();
        let version = |version: Option<u64>| state.manifest(name, version?);
        if let Some(before) = version(answer.version.checked_sub(1))
            && let Some(after) = version(Some(answer.version))
        {
            answer.changes = manifest::diff(Some(before), after);
            answer.replaces_instances = replaces(before, after);
        }
    }
}

#[tonic::async_trait]
impl ServiceService for Services {
    async fn apply_service(
        &self,
        request: Request<pb::ApplyServiceRequest>,
    ) -> Result<Response<pb::ApplyServiceResponse>, Status> {
        let actor = access::actor(&request);
        let deadline = deadline::of(request.metadata());
        self.apply(actor, deadline, request.into_inner()).await.map(Response::new)
    }

    async fn delete_service(
        &self,
        request: Request<pb::DeleteServiceRequest>,
    ) -> Result<Response<pb::ChangeResponse>, Status> {
        let pb::DeleteServiceRequest { name, request_id } = request.get_ref().clone();
        self.change(&request, request_id, Body::DeleteService(pb::DeleteService { name })).await
    }

    async fn scale_service(
        &self,
        request: Request<pb::ScaleServiceRequest>,
    ) -> Result<Response<pb::ChangeResponse>, Status> {
        let pb::ScaleServiceRequest { name, count, request_id } = request.get_ref().clone();
        self.change(&request, request_id, Body::ScaleService(pb::ScaleService { name, count })).await
    }

    async fn restart_service(
        &self,
        request: Request<pb::RestartServiceRequest>,
    ) -> Result<Response<pb::ChangeResponse>, Status> {
        let pb::RestartServiceRequest { name, request_id } = request.get_ref().clone();
        self.change(&request, request_id, Body::RestartService(pb::RestartService { name })).await
    }

    async fn rollback_service(
        &self,
        request: Request<pb::RollbackServiceRequest>,
    ) -> Result<Response<pb::ChangeResponse>, Status> {
        let pb::RollbackServiceRequest { name, to_version, request_id } = request.get_ref().clone();
        self.change(&request, request_id, Body::RollbackService(pb::RollbackService { name, to_version }))
            .await
    }

    async fn pause_service(
        &self,
        request: Request<pb::PauseServiceRequest>,
    ) -> Result<Response<pb::ChangeResponse>, Status> {
        let pb::PauseServiceRequest { name, paused, request_id } = request.get_ref().clone();
        self.change(&request, request_id, Body::SetServicePaused(pb::SetServicePaused { name, paused })).await
    }

    async fn promote_service(
        &self,
        request: Request<pb::PromoteServiceRequest>,
    ) -> Result<Response<pb::ChangeResponse>, Status> {
        let pb::PromoteServiceRequest { name, request_id } = request.get_ref().clone();
        self.change(&request, request_id, Body::PromoteService(pb::PromoteService { name })).await
    }

    async fn get_service(
        &self,
        request: Request<pb::GetServiceRequest>,
    ) -> Result<Response<pb::GetServiceResponse>, Status> {
        let deadline = deadline::of(request.metadata());
        self.get(deadline, request.get_ref()).await.map(Response::new)
    }

    async fn list_services(
        &self,
        request: Request<pb::ListServicesRequest>,
    ) -> Result<Response<pb::ListServicesResponse>, Status> {
        let linearizable = request.get_ref().linearizable;
        self.hub.read(&request, linearizable).await?;
        let (records, freshness) = {
            let state = self.hub.raft.state();
            (state.services().cloned().collect(), self.hub.freshness(&state, linearizable))
        };
        let services = self.hub.in_slices(records, convert::service).await;
        Ok(Response::new(pb::ListServicesResponse { services, freshness }))
    }

    async fn list_service_versions(
        &self,
        request: Request<pb::ListServiceVersionsRequest>,
    ) -> Result<Response<pb::ListServiceVersionsResponse>, Status> {
        let linearizable = request.get_ref().linearizable;
        self.hub.read(&request, linearizable).await?;
        let name = &request.get_ref().name;
        let state = self.hub.raft.state();
        if state.service(name).is_none() {
            return Err(errors::no_service(name));
        }
        let versions = state.service_versions(name).map(|record| convert::version(&record)).collect();
        let freshness = self.hub.freshness(&state, linearizable);
        drop(state);
        Ok(Response::new(pb::ListServiceVersionsResponse { versions, freshness }))
    }

    async fn list_instances(
        &self,
        request: Request<pb::ListInstancesRequest>,
    ) -> Result<Response<pb::ListInstancesResponse>, Status> {
        let pb::ListInstancesRequest { service, linearizable, host } = request.get_ref().clone();
        self.hub.read(&request, linearizable).await?;
        let (records, freshness) = {
            let state = self.hub.raft.state();
            if !service.is_empty() && state.service(&service).is_none() {
                return Err(errors::no_service(&service));
            }
            let host = match host.as_str() {
                "" => None,
                name => Some(convert::find_host(&state, name).ok_or_else(|| errors::no_host(name))?),
            };
            let on_host =
                |record: &&Arc<pb::InstanceRecord>| host.is_none_or(|host| host == HostId(record.host_id));
            let records: Vec<_> = if service.is_empty() {
                state.instances().filter(on_host).cloned().collect()
            } else {
                state.instances_of(&service).filter(on_host).cloned().collect()
            };
            (records, self.hub.freshness(&state, linearizable))
        };
        let instances = self.hub.in_slices(records, convert::instance).await;
        Ok(Response::new(pb::ListInstancesResponse { instances, freshness }))
    }

    async fn list_endpoints(
        &self,
        request: Request<pb::ListEndpointsRequest>,
    ) -> Result<Response<pb::ListEndpointsResponse>, Status> {
        let pb::ListEndpointsRequest { service, linearizable } = request.get_ref().clone();
        self.hub.read(&request, linearizable).await?;
        let (records, freshness) = {
            let state = self.hub.raft.state();
            if !service.is_empty() && state.service(&service).is_none() {
                return Err(errors::no_service(&service));
            }
            let records: Vec<_> = if service.is_empty() {
                state.instances().cloned().collect()
            } else {
                state.instances_of(&service).cloned().collect()
            };
            (records, self.hub.freshness(&state, linearizable))
        };
        let endpoints = self.hub.in_slices(records, convert::endpoints).await.into_iter().flatten().collect();
        Ok(Response::new(pb::ListEndpointsResponse { endpoints, freshness }))
    }

    type WatchStream = feed::FeedStream;

    async fn watch(&self, request: Request<pb::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        feed::open(&self.hub, request.into_inner()).map(Response::new)
    }

    type ReadLogsStream = logs::LogStream;

    async fn read_logs(
        &self,
        request: Request<pb::ReadLogsRequest>,
    ) -> Result<Response<Self::ReadLogsStream>, Status> {
        logs::open(&self.hub, request.into_inner()).map(Response::new)
    }

    async fn get_service_traffic(
        &self,
        request: Request<pb::GetServiceTrafficRequest>,
    ) -> Result<Response<pb::GetServiceTrafficResponse>, Status> {
        traffic::get(&self.hub, &request.into_inner().service).await.map(Response::new)
    }
}

/// Whether going from one to the other has instances replaced.
fn replaces(before: &pb::Manifest, after: &pb::Manifest) -> bool {
    !manifest::same_template(before, after) || replaces_for_both(before, after)
}
