//! `nave ps [SERVICE]`.

use std::collections::BTreeMap;

use nave_proto::pb;
use serde::Serialize;

use super::{no_service, observed_tone};
use crate::args::Ps;
use crate::client::{Hub, note_age};
use crate::failure::Failure;
use crate::out::{self, Tone};
use crate::table::{Cell, Table};
use crate::{clock, when};

/// One instance, as scripts get it.
#[derive(Debug, Serialize)]
pub(super) struct InstanceRow<'a> {
    id: &'a str,
    service: &'a str,
    version: u64,
    ordinal: u32,
    host: &'a str,
    host_id: &'a str,
    desired: &'a str,
    observed: &'a str,
    ready: bool,
    endpoint: &'a str,
    pid: u32,
    epoch: u64,
    attempt: u32,
    restarts: u32,
    ports: &'a BTreeMap<String, u32>,
    since: String,
    reason: &'a str,
    revision: u64,
}

impl<'a> From<&'a pb::Instance> for InstanceRow<'a> {
    fn from(instance: &'a pb::Instance) -> Self {
        Self {
            id: &instance.id,
            service: &instance.service,
            version: instance.version,
            ordinal: instance.ordinal,
            host: &instance.host,
            host_id: &instance.host_id,
            desired: &instance.desired,
            observed: &instance.observed,
            ready: instance.ready,
            endpoint: &instance.endpoint,
            pid: instance.pid,
            epoch: instance.epoch,
            attempt: instance.attempt,
            restarts: instance.restarts,
            ports: &instance.ports,
            since: when::rfc3339(when::timestamp(instance.since.as_ref())),
            reason: &instance.reason,
            revision: instance.revision,
        }
    }
}

pub(super) async fn run(args: &Ps, hub: &Hub) -> Result<(), Failure> {
    let request = pb::ListInstancesRequest {
        service: args.service.clone().unwrap_or_default(),
        host: args.host.clone().unwrap_or_default(),
        linearizable: false,
    };
    let listed = hub
        .read_status(|mut member| {
            let request = request.clone();
            async move { member.services.list_instances(request).await }
        })
        .await?;
    let listed = match (listed, &args.service) {
        (Ok(listed), _) => listed,
        (Err(status), Some(name)) => return Err(super::about_service(hub, name, &status).await),
        (Err(status), None) => return Err(Failure::from_status(&status)),
    };
    note_age(listed.freshness.as_ref());
    if let Some(name) = &args.service
        && listed.instances.is_empty()
        && let Some(absent) = no_service(hub, name).await
    {
        return Err(absent);
    }
    if args.listing.json() {
        out::json(&listed.instances.iter().map(InstanceRow::from).collect::<Vec<_>>());
        return Ok(());
    }
    if listed.instances.is_empty() {
        match &args.service {
            Some(name) => {
                out::aside(format_args!("{name} has no instances"));
                out::hint(format_args!("`nave status {name}` says why"));
            }
            None => {
                out::aside("no instances");
                out::hint("`nave services` shows what is wanted");
            }
        }
        return Ok(());
    }
    table(&listed.instances, args.service.is_none(), 0).print();
    Ok(())
}

/// The table of instances; the status page has it too, without the column that would say the same in each row.
pub(super) fn table(instances: &[pb::Instance], with_service: bool, indent: usize) -> Table {
    let now = clock::now();
    let service: &[&'static str] = if with_service { &["SERVICE"] } else { &[] };
    let headers = ["VERSION", "HOST", "STATE", "READY", "PID", "PORTS", "RESTARTS", "SINCE", "REASON"];
    let mut table =
        Table::new(["ID"].into_iter().chain(service.iter().copied()).chain(headers)).indented(indent);
    for instance in instances {
        let mut row = vec![Cell::from(instance.id.as_str())];
        if with_service {
            row.push(instance.service.as_str().into());
        }
        row.extend([
            instance.version.to_string().into(),
            instance.host.as_str().into(),
            state(instance),
            if instance.ready { Cell::new("yes", Tone::Good) } else { Cell::new("no", Tone::Warning) },
            if instance.pid == 0 { "-".into() } else { instance.pid.to_string().into() },
            ports(&instance.ports).into(),
            instance.restarts.to_string().into(),
            when::age(when::timestamp(instance.since.as_ref()), now).into(),
            instance.reason.as_str().into(),
        ]);
        table.row(row);
    }
    table
}

/// What the agent saw; with what the hub wants, when that is something else.
fn state(instance: &pb::Instance) -> Cell {
    let stopping = instance.desired == "stop" && !matches!(instance.observed.as_str(), "stopping" | "exited");
    let text = if stopping { format!("{}, to stop", instance.observed) } else { instance.observed.clone() };
    Cell::new(text, observed_tone(&instance.observed, instance.ready))
}

/// `http 20017, admin 20018`; the name is left out when there is but one.
fn ports(ports: &BTreeMap<String, u32>) -> String {
    match ports.len() {
        0 => "-".to_owned(),
        1 => ports.values().map(u32::to_string).collect(),
        _ => ports.iter().map(|(name, port)| format!("{name} {port}")).collect::<Vec<_>>().join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_the_fields_and_types_of_the_contract() {
        let instance = pb::Instance {
            id: "i-1".into(),
            pid: 42,
            ready: true,
            ports: [("http".to_owned(), 20_000)].into(),
            since: Some(prost_types::Timestamp { seconds: 0, nanos: 0 }),
            ..Default::default()
        };
        let row = serde_json::to_value(InstanceRow::from(&instance)).unwrap();
        for field in [
            "id", "service", "version", "host", "desired", "observed", "ready", "pid", "restarts", "ports",
            "since", "reason",
        ] {
            assert!(row.get(field).is_some(), "{field}");
        }
        assert_eq!(row["pid"], 42);
        assert_eq!(row["ready"], true);
        assert_eq!(row["ports"]["http"], 20_000);
        assert_eq!(row["since"], "1970-01-01T00:00:00.000Z");
    }

    #[test]
    fn a_single_port_needs_no_name() {
        assert_eq!(ports(&[].into()), "-");
        assert_eq!(ports(&[("http".to_owned(), 1)].into()), "1");
        assert_eq!(ports(&[("b".to_owned(), 2), ("a".to_owned(), 1)].into()), "a 1, b 2");
    }
}
