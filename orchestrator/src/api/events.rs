//! `EventService`: the lifecycle history that every member keeps, the newest of it.

use std::sync::Arc;

use nave_orchestrator_core::EventFilter;
use nave_proto::pb;
use pb::event_service_server::EventService;
use tonic::{Request, Response, Status};

use crate::api::{Hub, convert, errors};

const LIMIT_DEFAULT: u32 = 100;
/// All that is kept is 20,000 events of some 300 B; a page of it stays below tonic's 4 MiB.
const LIMIT_MAX: u32 = 10_000;

/// The service of this name on one member.
#[derive(Debug)]
pub(crate) struct Events {
    hub: Arc<Hub>,
}

impl Events {
    pub(crate) fn new(hub: Arc<Hub>) -> Self {
        Self { hub }
    }
}

#[tonic::async_trait]
impl EventService for Events {
    async fn list_events(
        &self,
        request: Request<pb::ListEventsRequest>,
    ) -> Result<Response<pb::ListEventsResponse>, Status> {
        let pb::ListEventsRequest { service, host, limit, linearizable } = request.get_ref().clone();
        self.hub.read(&request, linearizable).await?;
        let limit = if limit == 0 { LIMIT_DEFAULT } else { limit.min(LIMIT_MAX) };
        let state = self.hub.raft.state();
        let host = match host.as_str() {
            "" => None,
            name => Some(convert::find_host(&state, name).ok_or_else(|| errors::no_host(name))?),
        };
        let filter = EventFilter { service: (!service.is_empty()).then_some(service), host };
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let events =
            state.events(&filter, limit).iter().map(|record| convert::event(&state, record)).collect();
        let cursor = Some(self.hub.cursor(&state));
        let freshness = self.hub.freshness(&state, linearizable);
        drop(state);
        Ok(Response::new(pb::ListEventsResponse { events, freshness, cursor }))
    }
}
