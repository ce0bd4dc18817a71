//! `nave services`.

use nave_proto::pb;
use serde::Serialize;

use super::ready_of;
use crate::args::Listing;
use crate::client::{Hub, note_age};
use crate::failure::Failure;
use crate::out::{self, Tone};
use crate::table::{Cell, Table};
use crate::{clock, when};

#[derive(Debug, Serialize)]
pub(super) struct ServiceRow<'a> {
    name: &'a str,
    version: u64,
    desired: u32,
    ready: u32,
    running: u32,
    stable_version: u64,
    deployment: DeploymentRow<'a>,
    deleting: bool,
    created: String,
    unplaced: &'a [String],
    reasons: Vec<ReasonRow<'a>>,
    waits_for: &'a str,
    revision: u64,
}

/// What of `unplaced` is about what.
#[derive(Debug, Serialize)]
struct ReasonRow<'a> {
    about: &'a str,
    text: &'a str,
}

#[derive(Debug, Serialize)]
struct DeploymentRow<'a> {
    version: u64,
    status: &'static str,
    reason: &'a str,
    from_version: u64,
    reverted_to: u64,
    canary: u32,
}

impl<'a> From<&'a pb::Service> for ServiceRow<'a> {
    fn from(service: &'a pb::Service) -> Self {
        let deployment = service.deployment.as_ref();
        Self {
            name: &service.name,
            version: service.version,
            desired: service.desired,
            ready: service.ready,
            running: service.running,
            stable_version: service.stable_version,
            deployment: DeploymentRow {
                version: deployment.map_or(0, |deployment| deployment.version),
                status: deployment_word(deployment),
                reason: deployment.map_or("", |deployment| &deployment.reason),
                from_version: deployment.map_or(0, |deployment| deployment.from_version),
                reverted_to: deployment.map_or(0, |deployment| deployment.reverted_to),
                canary: deployment.map_or(0, |deployment| deployment.canary),
            },
            deleting: service.deleting,
            created: when::rfc3339(when::timestamp(service.created.as_ref())),
            unplaced: &service.unplaced,
            reasons: service
                .reasons
                .iter()
                .map(|reason| ReasonRow { about: &reason.about, text: &reason.text })
                .collect(),
            waits_for: &service.waits_for,
            revision: service.revision,
        }
    }
}

/// One word for where a deployment stands.
pub(super) fn deployment_word(deployment: Option<&pb::Deployment>) -> &'static str {
    match deployment.map_or(pb::DeploymentStatus::Unspecified, pb::Deployment::status) {
        pb::DeploymentStatus::Unspecified => "none",
        pb::DeploymentStatus::Running => "running",
        pb::DeploymentStatus::Paused => "paused",
        pb::DeploymentStatus::Successful => "successful",
        pb::DeploymentStatus::Failed => "failed",
        pb::DeploymentStatus::Cancelled => "cancelled",
    }
}

pub(super) fn deployment_cell(service: &pb::Service) -> Cell {
    if service.deleting {
        return Cell::new("deleting", Tone::Warning);
    }
    let word = deployment_word(service.deployment.as_ref());
    let tone = match word {
        "failed" => Tone::Bad,
        "running" | "paused" => Tone::Warning,
        _ => Tone::Plain,
    };
    Cell::new(word, tone)
}

pub(super) async fn read(hub: &Hub) -> Result<pb::ListServicesResponse, Failure> {
    let listed =
        hub.read(|mut member| async move {
            member.services.list_services(pb::ListServicesRequest::default()).await
        })
        .await?;
    note_age(listed.freshness.as_ref());
    Ok(listed)
}

pub(super) async fn run(args: &Listing, hub: &Hub) -> Result<(), Failure> {
    let listed = read(hub).await?;
    if args.json() {
        out::json(&listed.services.iter().map(ServiceRow::from).collect::<Vec<_>>());
        return Ok(());
    }
    if listed.services.is_empty() {
        out::aside("no services yet");
        out::hint("`nave apply -f FILE --wait` with a manifest; `nave schema` describes one");
        return Ok(());
    }
    let now = clock::now();
    let mut table = Table::new(["NAME", "READY", "VERSION", "DEPLOYMENT", "AGE", "WHY NOT"]);
    for service in &listed.services {
        table.row([
            service.name.as_str().into(),
            ready_of(service.ready, service.desired),
            service.version.to_string().into(),
            deployment_cell(service),
            when::age(when::timestamp(service.created.as_ref()), now).into(),
            why_not(service).into(),
        ]);
    }
    table.print();
    Ok(())
}

/// The first reason why a service is not what it should be; the status page has them all.
fn why_not(service: &pb::Service) -> String {
    if let Some(first) = service.unplaced.first() {
        return first.clone();
    }
    if !service.waits_for.is_empty() {
        return service.waits_for.clone();
    }
    match &service.deployment {
        Some(deployment) if deployment_word(Some(deployment)) != "successful" => deployment.reason.clone(),
        _ => String::new(),
    }
}
