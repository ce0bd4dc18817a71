//! The agent's own gRPC API, for members and operators: this host's logs, and what the agent says of itself.
//! Everything else goes through the hub. Other agents are known here too, and refused.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use nave_agent_core::directory::Protocol;
use nave_proto::pb;
use nave_tls::{Role, TlsConnection};
use pb::agent_service_server::{AgentService, AgentServiceServer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::clock;
use crate::data_dir::DataDir;
use crate::directory::Ways;
use crate::identity::Identity;
use crate::logs::{Batch, LogReader};
use crate::metrics::Metrics;
use crate::proxy::{Recent, Records};

/// Members ask on behalf of everybody who reads logs; each reader of a busy host holds about a megabyte.
const LOG_READERS: usize = 32;
/// A look at a few files; ten a second is soon enough for a person's eye.
const FOLLOW_POLL: Duration = Duration::from_millis(100);
/// Who waits for a long search is sent an answer with nothing in it so often. A member gives a host up after 10 s.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// What the main loop knows and this API tells.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shown {
    pub(crate) generation: Arc<AtomicU64>,
}

#[derive(Debug)]
pub(crate) struct Api {
    pub(crate) identity: Arc<Identity>,
    pub(crate) name: String,
    pub(crate) keeper_pid: u32,
    pub(crate) logs_dir: PathBuf,
    pub(crate) access_dir: PathBuf,
    pub(crate) metrics: Metrics,
    pub(crate) shown: Shown,
    pub(crate) log_readers: Arc<Semaphore>,
    ways: Option<Ways>,
    calls: Option<(Recent, Arc<Records>)>,
}

impl Api {
    pub(crate) fn new(
        identity: Arc<Identity>,
        name: String,
        keeper_pid: u32,
        data: &DataDir,
        metrics: Metrics,
        shown: Shown,
    ) -> Self {
        let log_readers = Arc::new(Semaphore::new(LOG_READERS));
        let (logs_dir, access_dir, ways, calls) = (data.logs(), data.access(), None, None);
        Self { identity, name, keeper_pid, logs_dir, access_dir, metrics, shown, log_readers, ways, calls }
    }

    /// With what is counted and noted of calls.
    pub(crate) fn with_calls(self, recent: Recent, records: Arc<Records>) -> Self {
        Self { calls: Some((recent, records)), ..self }
    }

    /// With the ways from this host to services.
    pub(crate) fn with_ways(self, ways: Ways) -> Self {
        Self { ways: Some(ways), ..self }
    }

    /// Serves these connections until `shutdown`, then ends open streams.
    pub(crate) async fn serve(
        self,
        connections: mpsc::Receiver<TlsConnection>,
        shutdown: CancellationToken,
    ) -> Result<(), tonic::transport::Error> {
        let incoming = ReceiverStream::new(connections).map(Ok::<_, std::io::Error>);
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<AgentServiceServer<Self>>().await;
        let serving = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .http2_keepalive_timeout(Some(Duration::from_secs(5)))
            .max_concurrent_streams(64)
            .add_service(health_service)
            .add_service(AgentServiceServer::new(self))
            .serve_with_incoming(incoming);
        tokio::select! {
            served = serving => served,
            // Followed logs would never end by themselves.
            () = shutdown.cancelled() => Ok(()),
        }
    }
}

/// Members and operators only.
fn check_caller<T>(request: &Request<T>) -> Result<(), Status> {
    match nave_tls::peer(request).map(|peer| &peer.role) {
        Some(Role::Member(_) | Role::Operator(_)) => Ok(()),
        Some(role @ Role::Agent(_)) => {
            Err(Status::permission_denied(format!("{role} may not ask an agent; members and operators may")))
        }
        None => Err(Status::unauthenticated("a valid certificate of this cluster is needed")),
    }
}

#[tonic::async_trait]
impl AgentService for Api {
    type ReadHostLogsStream = Pin<Box<dyn Stream<Item = Result<pb::ReadLogsResponse, Status>> + Send>>;

    async fn read_host_logs(
        &self,
        request: Request<pb::ReadHostLogsRequest>,
    ) -> Result<Response<Self::ReadHostLogsStream>, Status> {
        check_caller(&request)?;
        let request = request.into_inner();
        let directory = if request.access { &self.access_dir } else { &self.logs_dir };
        let reader = LogReader::new(directory, self.name.clone(), &request)
            .map_err(|e| Status::invalid_argument(crate::error_chain(&e)))?;
        // Members ask every host, most of which have never had the service: that takes no reader's place.
        if !request.follow && !tokio::fs::try_exists(reader.service_dir()).await.unwrap_or(true) {
            return Ok(Response::new(Box::pin(futures::stream::empty())));
        }
        let permit = self.log_readers.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!(
                "{LOG_READERS} readers follow logs on {} already; try again when one has ended",
                self.name
            ))
        })?;
        Ok(Response::new(Box::pin(stream(reader, request.follow, permit, SIGN_OF_LIFE))))
    }

    async fn get_agent_info(
        &self,
        request: Request<pb::GetAgentInfoRequest>,
    ) -> Result<Response<pb::AgentInfo>, Status> {
        check_caller(&request)?;
        Ok(Response::new(pb::AgentInfo {
            host_id: self.identity.host.to_string(),
            name: self.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            keeper_pid: self.keeper_pid,
            hub_connected: self.metrics.session_connected.get() == 1,
            generation: self.shown.generation.load(Ordering::Relaxed),
        }))
    }

    async fn get_service_addresses(
        &self,
        request: Request<pb::GetServiceAddressesRequest>,
    ) -> Result<Response<pb::ServiceAddresses>, Status> {
        check_caller(&request)?;
        let service = request.into_inner().service;
        let callable = self.ways.as_ref().and_then(|ways| ways.to(&service)).ok_or_else(|| {
            Status::not_found(format!("{} knows no service {service:?} with ports", self.name))
        })?;
        let addresses = callable.ports.iter().map(|port| (port.name.to_string(), port.address.to_string()));
        let protocols =
            callable.ports.iter().map(|port| (port.name.to_string(), protocol(port.protocol).into()));
        let (addresses, protocols) = (addresses.collect(), protocols.collect());
        Ok(Response::new(pb::ServiceAddresses { addresses, protocols }))
    }

    async fn get_host_traffic(
        &self,
        request: Request<pb::GetServiceTrafficRequest>,
    ) -> Result<Response<pb::ServiceTraffic>, Status> {
        check_caller(&request)?;
        let service = request.into_inner().service;
        Ok(Response::new(self.calls.as_ref().map(|(recent, _)| recent.of(&service)).unwrap_or_default()))
    }

    async fn read_spans(
        &self,
        request: Request<pb::ReadSpansRequest>,
    ) -> Result<Response<pb::ReadSpansResponse>, Status> {
        check_caller(&request)?;
        let request = request.into_inner();
        let read = self.calls.as_ref().map(|(_, records)| records.spans.read(&request));
        Ok(Response::new(read.unwrap_or_default()))
    }
}

fn protocol(protocol: Protocol) -> pb::Protocol {
    match protocol {
        Protocol::Http => pb::Protocol::Http,
        Protocol::Http2 => pb::Protocol::Http2,
        Protocol::Grpc => pb::Protocol::Grpc,
        Protocol::Tcp => pb::Protocol::Tcp,
    }
}

/// Polled by the connection: a reader that goes away takes all of this with it, and one that is slow reads slowly.
fn stream(
    reader: LogReader,
    follow: bool,
    permit: OwnedSemaphorePermit,
    sign_of_life: Duration,
) -> impl Stream<Item = Result<pb::ReadLogsResponse, Status>> + Send {
    futures::stream::unfold(Some((reader, permit, false)), move |state| async move {
        let (mut reader, permit, said_live) = state?;
        let asked = Instant::now();
        loop {
            let read = tokio::task::spawn_blocking(move || {
                let batch = reader.next_batch(clock::monotonic());
                (reader, batch)
            });
            let (back, batch) = read.await.expect("reading files does not panic");
            reader = back;
            match batch {
                Ok(Batch::Lines(lines)) => {
                    let answer = pb::ReadLogsResponse { lines, ..Default::default() };
                    return Some((Ok(answer), Some((reader, permit, said_live))));
                }
                Ok(Batch::Searching) if asked.elapsed() < sign_of_life => {}
                Ok(Batch::Searching) => {
                    return Some((Ok(pb::ReadLogsResponse::default()), Some((reader, permit, said_live))));
                }
                Ok(Batch::End) if follow && !said_live && reader.is_live() => {
                    let answer = pb::ReadLogsResponse { live: true, ..Default::default() };
                    return Some((Ok(answer), Some((reader, permit, true))));
                }
                Ok(Batch::End) if follow => tokio::time::sleep(FOLLOW_POLL).await,
                Ok(Batch::End) => return None,
                Err(error) => {
                    return Some((Err(Status::internal(format!("reading the logs failed: {error}"))), None));
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_search_that_finds_nothing_shows_that_it_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let logs = dir.path().join("web/i-1-1");
        std::fs::create_dir_all(&logs).unwrap();
        let text = "1970-01-01T00:00:01Z stdout F text\n".repeat(100_000);
        std::fs::write(logs.join("0000000001.log"), text).unwrap();
        let answers = async |contains: &str, sign_of_life| {
            let (service, contains) = ("web".to_owned(), contains.to_owned());
            let request = pb::ReadHostLogsRequest { service, contains, ..Default::default() };
            let reader = LogReader::new(dir.path(), "north".to_owned(), &request).unwrap();
            let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
            let answers: Vec<_> = stream(reader, false, permit, sign_of_life).collect().await;
            answers.into_iter().map(|answer| answer.unwrap().lines.len()).collect::<Vec<usize>>()
        };
        assert_eq!(answers("none", Duration::ZERO).await, [0, 0, 0]);
        assert!(answers("none", Duration::from_secs(3600)).await.is_empty());
        assert!(answers("text", Duration::ZERO).await.iter().all(|lines| *lines > 0));
    }
}
