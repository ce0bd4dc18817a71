//! `nave scale`, `restart`, `rollback`, `pause`, `resume`, `promote`, `delete`: one write, then its version, then perhaps the wait.

use std::time::Duration;

use nave_proto::pb;
use tonic::Status;

use super::wait::{self, Goal, Target};
use crate::args::{Change, Rollback, Scale, Waiting};
use crate::client::Hub;
use crate::failure::Failure;
use crate::out;

pub(super) async fn scale(args: &Scale, hub: &Hub) -> Result<(), Failure> {
    let request = pb::ScaleServiceRequest {
        name: args.service.clone(),
        count: args.count,
        request_id: Some(hub.request_id()),
    };
    let changed = hub
        .write_status(|mut member| {
            let request = request.clone();
            async move { member.services.scale_service(request).await }
        })
        .await?;
    let what = format!("scaled to {}", args.count);
    after(hub, &args.service, changed, &what, &args.waiting).await
}

pub(super) async fn restart(args: &Change, hub: &Hub) -> Result<(), Failure> {
    let request =
        pb::RestartServiceRequest { name: args.service.clone(), request_id: Some(hub.request_id()) };
    let changed = hub
        .write_status(|mut member| {
            let request = request.clone();
            async move { member.services.restart_service(request).await }
        })
        .await?;
    after(hub, &args.service, changed, "restarting", &args.waiting).await
}

pub(super) async fn rollback(args: &Rollback, hub: &Hub) -> Result<(), Failure> {
    let request = pb::RollbackServiceRequest {
        name: args.service.clone(),
        to_version: args.to.unwrap_or(0),
        request_id: Some(hub.request_id()),
    };
    let changed = hub
        .write_status(|mut member| {
            let request = request.clone();
            async move { member.services.rollback_service(request).await }
        })
        .await?;
    let what = match args.to {
        Some(version) => format!("going back to version {version}"),
        None => "going back to the last stable version".to_owned(),
    };
    after(hub, &args.service, changed, &what, &args.waiting).await
}

pub(super) async fn pause(service: &str, hub: &Hub) -> Result<(), Failure> {
    let changed = set_paused(service, true, hub).await?;
    let waiting = Waiting { wait: false, timeout: Duration::ZERO };
    after(hub, service, changed, "its rollout is paused", &waiting).await
}

pub(super) async fn resume(args: &Change, hub: &Hub) -> Result<(), Failure> {
    let changed = set_paused(&args.service, false, hub).await?;
    after(hub, &args.service, changed, "its rollout goes on", &args.waiting).await
}

async fn set_paused(
    service: &str,
    paused: bool,
    hub: &Hub,
) -> Result<Result<pb::ChangeResponse, Status>, Failure> {
    let request =
        pb::PauseServiceRequest { name: service.to_owned(), paused, request_id: Some(hub.request_id()) };
    hub.write_status(|mut member| {
        let request = request.clone();
        async move { member.services.pause_service(request).await }
    })
    .await
}

pub(super) async fn promote(args: &Change, hub: &Hub) -> Result<(), Failure> {
    let request =
        pb::PromoteServiceRequest { name: args.service.clone(), request_id: Some(hub.request_id()) };
    let changed = hub
        .write_status(|mut member| {
            let request = request.clone();
            async move { member.services.promote_service(request).await }
        })
        .await?;
    after(hub, &args.service, changed, "promoted, the rest is being replaced", &args.waiting).await
}

pub(super) async fn delete(args: &Change, hub: &Hub) -> Result<(), Failure> {
    let request = pb::DeleteServiceRequest { name: args.service.clone(), request_id: Some(hub.request_id()) };
    let changed = hub
        .write_status(|mut member| {
            let request = request.clone();
            async move { member.services.delete_service(request).await }
        })
        .await?;
    if let Err(status) = changed {
        return Err(super::about_service(hub, &args.service, &status).await);
    }
    out::line(format_args!("{}  deleted, its instances are being stopped", args.service));
    if !args.waiting.wait {
        return Ok(());
    }
    let target = Target { service: args.service.clone(), goal: Goal::Gone };
    wait::until(hub, &[target], args.waiting.timeout).await
}

async fn after(
    hub: &Hub,
    service: &str,
    changed: Result<pb::ChangeResponse, Status>,
    what: &str,
    waiting: &Waiting,
) -> Result<(), Failure> {
    let changed = match changed {
        Ok(changed) => changed,
        Err(status) => return Err(super::about_service(hub, service, &status).await),
    };
    out::line(format_args!("{service}  {what}, version {}", changed.version));
    if !waiting.wait {
        out::hint(format_args!("`nave status {service}`"));
        return Ok(());
    }
    await_version(hub, service, changed.version, waiting.timeout).await
}

async fn await_version(hub: &Hub, service: &str, version: u64, timeout: Duration) -> Result<(), Failure> {
    let target = Target { service: service.to_owned(), goal: Goal::Ready { version } };
    wait::until(hub, &[target], timeout).await
}
