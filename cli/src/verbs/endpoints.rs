//! `nave endpoints SERVICE`.

use nave_proto::pb;
use serde::Serialize;

use crate::args::OfService;
use crate::client::{Hub, note_age};
use crate::failure::Failure;
use crate::out::{self, Tone};
use crate::table::{Cell, Table};

#[derive(Debug, Serialize)]
struct EndpointRow<'a> {
    service: &'a str,
    instance: &'a str,
    host: &'a str,
    host_id: &'a str,
    port_name: &'a str,
    port: u32,
    state: &'a str,
    version: u64,
    epoch: u64,
    revision: u64,
}

impl<'a> From<&'a pb::Endpoint> for EndpointRow<'a> {
    fn from(endpoint: &'a pb::Endpoint) -> Self {
        Self {
            service: &endpoint.service,
            instance: &endpoint.instance_id,
            host: &endpoint.host,
            host_id: &endpoint.host_id,
            port_name: &endpoint.port_name,
            port: endpoint.port,
            state: &endpoint.state,
            version: endpoint.version,
            epoch: endpoint.epoch,
            revision: endpoint.revision,
        }
    }
}

pub(super) async fn run(args: &OfService, hub: &Hub) -> Result<(), Failure> {
    let request = pb::ListEndpointsRequest { service: args.service.clone(), linearizable: false };
    let listed = hub
        .read_status(|mut member| {
            let request = request.clone();
            async move { member.services.list_endpoints(request).await }
        })
        .await?;
    let listed = match listed {
        Ok(listed) => listed,
        Err(status) => return Err(super::about_service(hub, &args.service, &status).await),
    };
    note_age(listed.freshness.as_ref());
    if args.listing.json() {
        out::json(&listed.endpoints.iter().map(EndpointRow::from).collect::<Vec<_>>());
        return Ok(());
    }
    if listed.endpoints.is_empty() {
        out::aside(format_args!("{} answers nowhere", args.service));
        out::hint(format_args!("`nave status {}` says why", args.service));
        return Ok(());
    }
    let mut table = Table::new(["INSTANCE", "HOST", "PORT", "NUMBER", "STATE", "VERSION"]);
    for endpoint in &listed.endpoints {
        let tone = if endpoint.state == "ready" { Tone::Good } else { Tone::Warning };
        table.row([
            endpoint.instance_id.as_str().into(),
            endpoint.host.as_str().into(),
            endpoint.port_name.as_str().into(),
            endpoint.port.to_string().into(),
            Cell::new(endpoint.state.as_str(), tone),
            endpoint.version.to_string().into(),
        ]);
    }
    table.print();
    Ok(())
}
