//! `nave hosts`, `nave hosts forget`, `nave drain`, `nave undrain`.

use std::sync::LazyLock;
use std::time::Duration;

use nave_proto::pb;
use serde::Serialize;
use tokio::time::Instant;

use super::count;
use crate::args::{Drain, Listing};
use crate::client::{Hub, note_age};
use crate::failure::Failure;
use crate::out::{self, Tone};
use crate::progress::Progress;
use crate::table::{Cell, Table};
use crate::{clock, when};

/// Between two looks at a host that is being emptied.
const ASK_EVERY: Duration = Duration::from_millis(300);

#[derive(Debug, Serialize)]
pub(super) struct HostRow<'a> {
    id: &'a str,
    name: &'a str,
    address: &'a str,
    status: &'a str,
    status_reason: &'a str,
    draining: bool,
    drain_reason: &'a str,
    instances: u32,
    cpu_millicores: u64,
    cpu_reserved_millicores: u64,
    memory_bytes: u64,
    memory_reserved_bytes: u64,
    labels: &'a std::collections::BTreeMap<String, String>,
    capabilities: &'a [String],
    lacks: &'a [String],
    alarms: &'a [String],
    address_prefix: &'a str,
    os: &'a str,
    arch: &'a str,
    kernel: &'a str,
    agent_version: &'a str,
    last_heard: String,
    revision: u64,
}

impl<'a> HostRow<'a> {
    fn new(host: &'a pb::Host, facts: &'a pb::HostFacts) -> Self {
        Self {
            id: &host.id,
            name: &host.name,
            address: &host.address,
            status: &host.status,
            status_reason: &host.status_reason,
            draining: host.draining,
            drain_reason: &host.drain_reason,
            instances: host.instances,
            cpu_millicores: facts.cpu_millicores,
            cpu_reserved_millicores: host.cpu_reserved_millicores,
            memory_bytes: facts.memory_bytes,
            memory_reserved_bytes: host.memory_reserved_bytes,
            labels: &facts.labels,
            capabilities: &facts.capabilities,
            lacks: &facts.lacks,
            alarms: &facts.alarms,
            address_prefix: &facts.address_prefix,
            os: &facts.os,
            arch: &facts.arch,
            kernel: &facts.kernel,
            agent_version: &facts.agent_version,
            last_heard: when::rfc3339(when::timestamp(host.last_heard.as_ref())),
            revision: host.revision,
        }
    }
}

pub(super) async fn read(hub: &Hub) -> Result<pb::ListHostsResponse, Failure> {
    let listed = hub
        .read(|mut member| async move { member.hosts.list_hosts(pb::ListHostsRequest::default()).await })
        .await?;
    note_age(listed.freshness.as_ref());
    Ok(listed)
}

pub(super) fn rows(hosts: &[pb::Host]) -> Vec<HostRow<'_>> {
    hosts.iter().map(|host| HostRow::new(host, facts_of(host))).collect()
}

fn facts_of(host: &pb::Host) -> &pb::HostFacts {
    static UNKNOWN: LazyLock<pb::HostFacts> = LazyLock::new(pb::HostFacts::default);
    host.facts.as_ref().unwrap_or(&UNKNOWN)
}

pub(super) async fn run(args: &Listing, hub: &Hub) -> Result<(), Failure> {
    let listed = read(hub).await?;
    if args.json() {
        out::json(&rows(&listed.hosts));
        return Ok(());
    }
    if listed.hosts.is_empty() {
        out::aside("no hosts have joined yet");
        out::hint(
            "`nave token create`, then on the host: nave agent --join ADDR --token-file FILE --data-dir DIR",
        );
        return Ok(());
    }
    let now = clock::now();
    let mut table = Table::new(["ID", "NAME", "STATUS", "INSTANCES", "CPU", "MEMORY", "ADDRESS", "HEARD"]);
    for host in &listed.hosts {
        let facts = facts_of(host);
        table.row([
            host.id.as_str().into(),
            host.name.as_str().into(),
            status(host),
            host.instances.to_string().into(),
            format!("{}/{}", cores(host.cpu_reserved_millicores), cores(facts.cpu_millicores)).into(),
            format!("{}/{}", bytes(host.memory_reserved_bytes), bytes(facts.memory_bytes)).into(),
            host.address.as_str().into(),
            when::age(when::timestamp(host.last_heard.as_ref()), now).into(),
        ]);
    }
    table.print();
    let mut said = std::collections::BTreeSet::new();
    for host in &listed.hosts {
        // The brake has one sentence for all of them.
        if host.status != "connected" && !host.status_reason.is_empty() && said.insert(&host.status_reason) {
            out::line(format_args!("{}: {}", host.name, host.status_reason));
        }
        if host.draining && !host.drain_reason.is_empty() {
            out::line(format_args!("{} is drained: {}", host.name, host.drain_reason));
        }
        for alarm in host.facts.iter().flat_map(|facts| &facts.alarms) {
            out::line(out::paint(Tone::Bad, &format!("{}: {alarm}", host.name)));
        }
        for lack in host.facts.iter().flat_map(|facts| &facts.lacks) {
            out::line(out::paint(Tone::Dim, &format!("{}: {lack}", host.name)));
        }
    }
    Ok(())
}

pub(super) async fn drain(args: &Drain, hub: &Hub) -> Result<(), Failure> {
    let request = pb::DrainHostRequest {
        host: args.host.clone(),
        reason: args.reason.clone(),
        request_id: Some(hub.request_id()),
    };
    let changed = hub
        .write(|mut member| {
            let request = request.clone();
            async move { member.hosts.drain_host(request).await }
        })
        .await?;
    let name = &changed.name;
    out::line(format_args!("{name}  is being drained, {} left", count(left(changed.instances), "instance")));
    if args.wait {
        return until_empty(&changed, args.timeout, hub).await;
    }
    out::hint(format_args!("`nave hosts`; `nave drain {name} --wait`; `nave undrain {name}` opens it again"));
    Ok(())
}

fn left(instances: u32) -> usize {
    usize::try_from(instances).unwrap_or(usize::MAX)
}

/// Until the agent has said that the last instance is gone.
async fn until_empty(host: &pb::ChangeHostResponse, timeout: Duration, hub: &Hub) -> Result<(), Failure> {
    let deadline = Instant::now() + timeout;
    let mut progress = Progress::new([host.name.clone()]);
    let mut waits = Vec::new();
    loop {
        let request = pb::GetHostRequest { host: host.host_id.clone(), linearizable: true };
        let asked = hub.read_status(|mut member| {
            let request = request.clone();
            async move { member.hosts.get_host(request).await }
        });
        if let Ok(answer) = tokio::time::timeout_at(deadline, asked).await {
            match answer {
                Ok(Ok(found)) => {
                    let record = found.host.unwrap_or_default();
                    if !record.draining {
                        return Err(Failure::refused(format!("{} was opened again by somebody", host.name)));
                    }
                    if record.instances == 0 {
                        progress.set(0, Tone::Good, "drained", "");
                        return Ok(());
                    }
                    waits = found.leaving.into_iter().map(|one| one.waits_for).collect();
                    let how_far = format!("{} left", count(left(record.instances), "instance"));
                    let why = waits.first().map(String::as_str).unwrap_or_default();
                    progress.set(0, Tone::Warning, &how_far, why);
                }
                Ok(Err(status)) if status.code() == tonic::Code::NotFound => {
                    return Err(Failure::from_status(&status));
                }
                // Asked again until the time is over.
                Ok(Err(_)) | Err(_) => {}
            }
        }
        if Instant::now() + ASK_EVERY >= deadline {
            let failure = Failure::refused(format!(
                "{} is not empty after {}",
                host.name,
                nave_proto::time::format_duration(timeout)
            ));
            return Err(failure.details(waits).next("the drain goes on; `nave undrain` ends it"));
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

pub(super) async fn undrain(host: String, hub: &Hub) -> Result<(), Failure> {
    let request = pb::UndrainHostRequest { host, request_id: Some(hub.request_id()) };
    let changed = hub
        .write(|mut member| {
            let request = request.clone();
            async move { member.hosts.undrain_host(request).await }
        })
        .await?;
    out::line(format_args!("{}  is open again", changed.name));
    Ok(())
}

pub(super) async fn forget(host: String, reason: String, hub: &Hub) -> Result<(), Failure> {
    let request = pb::ForgetHostRequest { host, reason, request_id: Some(hub.request_id()) };
    let changed = hub
        .write(|mut member| {
            let request = request.clone();
            async move { member.hosts.forget_host(request).await }
        })
        .await?;
    let (name, id) = (&changed.name, &changed.host_id);
    out::line(format_args!("{name}  ({id}) is given up for good, its certificate opens nothing any more"));
    if changed.instances > 0 {
        out::hint(
            "what it ran is placed again; `on_disconnect = \"stop\"` waits until it must have ended there",
        );
    }
    Ok(())
}

fn status(host: &pb::Host) -> Cell {
    let tone = match host.status.as_str() {
        "connected" => Tone::Good,
        "lost" => Tone::Bad,
        _ => Tone::Warning,
    };
    let text = match (host.draining, host.instances) {
        (false, _) => host.status.clone(),
        (true, 0) => format!("{}, drained", host.status),
        (true, left) => format!("{}, draining, {left} left", host.status),
    };
    Cell::new(text, tone)
}

/// `1500` thousandths: `1.5`.
fn cores(millicores: u64) -> String {
    let text = format!("{}.{:03}", millicores / 1000, millicores % 1000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// `512M`, `1.5G`: at most one digit after the point.
fn bytes(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] = [("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)];
    let Some((unit, size)) = UNITS.into_iter().find(|(_, size)| bytes >= *size) else {
        return bytes.to_string();
    };
    let (whole, tenth) = (bytes / size, bytes % size * 10 / size);
    if tenth == 0 || whole >= 100 { format!("{whole}{unit}") } else { format!("{whole}.{tenth}{unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_short() {
        assert_eq!([0, 500, 1500, 2000].map(cores), ["0", "0.5", "1.5", "2"]);
        assert_eq!([0, 1023, 1 << 20, 3 << 29, 300 << 20].map(bytes), ["0", "1023", "1M", "1.5G", "300M"]);
    }
}
