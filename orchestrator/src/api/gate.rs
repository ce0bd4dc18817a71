//! The door of a member's port: every call passes here once, is checked against `access`, and is handed to its
//! service. Calls of `ServiceService`, which are nearly all that people's programs make, go straight to it; the
//! rest go through tonic's router.

use std::convert::Infallible;
use std::fmt;
use std::task::{Context, Poll};

use futures::future::{BoxFuture, Either, Ready, ready};
use http::{Request, Response};
use nave_proto::ids::ClusterId;
use nave_proto::pb::service_service_server::ServiceServiceServer;
use nave_tls::PeerIdentity;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::service::Routes;

use crate::api::access;
use crate::api::services::Services;

/// What all of `ServiceService`'s paths begin with.
const SERVICES: &str = "/nave.v1.ServiceService/";

/// One per connection, cloned; the services inside are shared.
#[derive(Clone)]
pub(crate) struct Gate {
    cluster: ClusterId,
    direct: Services,
    services: ServiceServiceServer<Services>,
    routes: Routes,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

impl Gate {
    pub(crate) fn new(cluster: ClusterId, direct: Services, routes: Routes) -> Self {
        let services = ServiceServiceServer::new(direct.clone());
        Self { cluster, direct, services, routes }
    }

    /// What the generated server answers with, for calls that need no more of it.
    pub(crate) fn services(&self) -> Services {
        self.direct.clone()
    }

    /// The identity, when it is one of this cluster's.
    pub(crate) fn known<'a>(&self, identity: Option<&'a PeerIdentity>) -> Option<&'a PeerIdentity> {
        access::known(identity, self.cluster)
    }
}

type Answer = Result<Response<Body>, Infallible>;

impl Service<Request<Body>> for Gate {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<Ready<Answer>, BoxFuture<'static, Answer>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Neither the router nor a generated server ever makes a caller wait.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if let Err(refusal) = access::check(&request, self.cluster) {
            tracing::debug!(path = request.uri().path(), reason = refusal.message(), "call refused");
            return Either::Left(ready(Ok(refusal.into_http())));
        }
        if request.uri().path().starts_with(SERVICES) {
            return Either::Right(self.services.call(request));
        }
        let answer = self.routes.call(request);
        Either::Right(Box::pin(answer))
    }
}
