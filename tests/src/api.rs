//! A client of the gRPC API for tests and measurements that need more speed, or less politeness, than the command
//! line gives: one channel per member, no retries but the caller's own.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use nave_proto::pb;
use nave_proto::pb::service_service_client::ServiceServiceClient;
use nave_tls::{ChannelOptions, Credentials, Dialer, Expect};
use serde::Deserialize;
use tonic::transport::Channel;

/// All services of the largest test or measurement.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

#[derive(Debug, Deserialize)]
struct ClientFile {
    addresses: Vec<String>,
    ca: String,
    certificate: String,
    key: String,
}

/// Connections to all members as the operator of a client file.
#[derive(Debug, Clone)]
pub struct Api {
    channels: Vec<Channel>,
    addresses: Vec<String>,
    credentials: Credentials,
}

impl Api {
    /// Reads `client.toml`. Must be called inside a tokio runtime; nothing is dialled yet.
    pub fn open(context: &Path) -> anyhow::Result<Self> {
        let file: ClientFile =
            toml::from_str(&std::fs::read_to_string(context)?).context("parse the client file")?;
        let folder = context.parent().unwrap_or(Path::new("."));
        let credentials = Credentials::load(
            &folder.join(&file.certificate),
            &folder.join(&file.key),
            &folder.join(&file.ca),
        )?;
        let channels = file
            .addresses
            .iter()
            .map(|address| {
                nave_tls::channel(address, &credentials, Expect::Member, ChannelOptions::default())
            })
            .collect();
        Ok(Self { channels, addresses: file.addresses, credentials })
    }

    pub fn members(&self) -> usize {
        self.channels.len()
    }

    pub fn services(&self, member: usize) -> ServiceServiceClient<Channel> {
        ServiceServiceClient::new(self.channel(member)).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// For connections to a member that are not tonic channels.
    pub fn dialer(&self, member: usize, expect: Expect, timeout: Duration) -> Dialer {
        let address = &self.addresses[member % self.addresses.len()];
        Dialer::new(address, &self.credentials, expect, b"h2", timeout)
    }

    pub fn channel(&self, member: usize) -> Channel {
        self.channels[member % self.channels.len()].clone()
    }

    /// Applies a service without instances: a write and nothing else.
    pub async fn write(
        &self,
        member: usize,
        name: &str,
        id: Option<pb::RequestId>,
    ) -> Result<u64, tonic::Status> {
        let mut request = tonic::Request::new(pb::ApplyServiceRequest {
            manifest: Some(Box::new(idle_manifest(name))),
            request_id: id,
            ..Default::default()
        });
        request.set_timeout(Duration::from_secs(5));
        self.services(member).apply_service(request).await.map(|answer| answer.into_inner().revision)
    }

    /// Names of all services, read linearizably.
    pub async fn service_names(&self, member: usize) -> Result<Vec<String>, tonic::Status> {
        Ok(self.service_versions(member).await?.into_keys().collect())
    }

    /// The version of each service, read linearizably.
    pub async fn service_versions(&self, member: usize) -> Result<BTreeMap<String, u64>, tonic::Status> {
        let request = pb::ListServicesRequest { linearizable: true };
        let answer = self.services(member).list_services(request).await?.into_inner();
        Ok(answer.services.into_iter().map(|service| (service.name, service.version)).collect())
    }
}

/// A manifest as the parser would make it from the shortest text, with count 0.
pub fn idle_manifest(name: &str) -> pb::Manifest {
    let text = format!("name = \"{name}\"\ncommand = [\"true\"]\ncount = 0\n");
    nave_proto::manifest::parse(&text, nave_proto::manifest::Format::Toml, "idle.toml")
        .expect("a valid manifest")
}
