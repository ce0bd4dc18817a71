//! `nave status SERVICE`: the page a person opens when something is odd.

use nave_proto::pb;
use serde::Serialize;

use super::events::{self, EventRow};
use super::ps::{self, InstanceRow};
use super::runs::{self, RunRow};
use super::services::{self, ServiceRow, deployment_word};
use super::traffic::{self, TrafficRow};
use super::{cluster, hosts, ready_of};
use crate::args::{self, Listing};
use crate::client::{Hub, note_age};
use crate::failure::Failure;
use crate::out::{self, Tone};
use crate::{clock, when};

#[derive(Debug, Serialize)]
struct StatusPage<'a> {
    service: ServiceRow<'a>,
    runs: Vec<RunRow<'a>>,
    traffic: Option<TrafficRow>,
    instances: Vec<InstanceRow<'a>>,
    events: Vec<EventRow<'a>>,
}

/// So many of the last events fit below the rest on one screen.
const EVENTS: usize = 8;

pub(super) async fn run(args: &args::Status, hub: &Hub) -> Result<(), Failure> {
    match &args.service {
        Some(service) => of_service(service, &args.listing, hub).await,
        None => overview(&args.listing, hub).await,
    }
}

/// Without a service: what there is, the whole first.
async fn overview(listing: &Listing, hub: &Hub) -> Result<(), Failure> {
    if listing.json() {
        let (cluster, hosts, services) =
            (cluster::read(hub).await?, hosts::read(hub).await?, services::read(hub).await?);
        out::json(&Overview {
            cluster: cluster::StatusRow::from(&cluster),
            hosts: hosts::rows(&hosts.hosts),
            services: services.services.iter().map(ServiceRow::from).collect(),
        });
        return Ok(());
    }
    cluster::status(listing, hub).await?;
    out::line("");
    hosts::run(listing, hub).await?;
    out::line("");
    services::run(listing, hub).await?;
    out::hint("`nave status SERVICE` has all about one");
    Ok(())
}

#[derive(Debug, Serialize)]
struct Overview<'a> {
    cluster: cluster::StatusRow<'a>,
    hosts: Vec<hosts::HostRow<'a>>,
    services: Vec<ServiceRow<'a>>,
}

async fn of_service(service: &str, listing: &Listing, hub: &Hub) -> Result<(), Failure> {
    let request = pb::GetServiceRequest { name: service.to_owned(), linearizable: false };
    let got = hub
        .read_status(|mut member| {
            let request = request.clone();
            async move { member.services.get_service(request).await }
        })
        .await?;
    let mut got = match got {
        Ok(got) => got,
        Err(status) => return Err(super::about_service(hub, service, &status).await),
    };
    note_age(got.freshness.as_ref());
    // The hub sends the newest first; a page reads better downwards.
    got.events.reverse();
    let Some(service) = &got.service else {
        return Err(Failure::refused("the hub's answer has no service in it"));
    };
    let traffic = traffic::read(hub, service).await;
    if listing.json() {
        // An array, like every list; it has one page.
        out::json(&StatusPage {
            service: service.into(),
            runs: service.runs.iter().map(RunRow::from).collect(),
            traffic,
            instances: got.instances.iter().map(InstanceRow::from).collect(),
            events: got.events.iter().map(EventRow::from).collect(),
        });
        return Ok(());
    }
    print(service, traffic.as_ref(), &got.instances, &got.events);
    Ok(())
}

fn print(
    service: &pb::Service,
    traffic: Option<&TrafficRow>,
    instances: &[pb::Instance],
    all_events: &[pb::Event],
) {
    let now = clock::now();
    let created = when::age(when::timestamp(service.created.as_ref()), now);
    let stable = match service.stable_version {
        0 => "none stable yet".to_owned(),
        stable if stable == service.version => "stable".to_owned(),
        stable => format!("last stable {stable}"),
    };
    out::line(format_args!(
        "{}  version {} ({stable}), created {created} ago",
        out::paint(Tone::Bold, &service.name),
        service.version
    ));
    let ready = ready_of(service.ready, service.desired);
    out::line(format_args!("  ready       {}, {} running", ready.painted(), service.running));
    out::line(format_args!("  deployment  {}", deployment(service, now)));
    traffic.inspect(|traffic| traffic.print());
    if let Some(manifest) = &service.manifest {
        out::line(format_args!("  command     {}", command(&manifest.command)));
        if !manifest.needs.is_empty() {
            out::line(format_args!("  needs       {}", manifest.needs.join(", ")));
        }
    }
    if !service.waits_for.is_empty() {
        out::line(format_args!("  waits       {}", out::paint(Tone::Warning, &service.waits_for)));
    }
    let said = service.deployment.as_ref().map_or("", |deployment| deployment.reason.as_str());
    for (label, tone, text) in reasons(service).filter(|(_, _, text)| said.is_empty() || !text.contains(said))
    {
        out::line(format_args!("  {label:<11} {}", out::paint(tone, text)));
    }
    runs::print(service, now);
    if !instances.is_empty() {
        out::line("\ninstances");
        ps::table(instances, false, 2).print();
    }
    if !all_events.is_empty() {
        out::line("\nlast events");
        for event in &all_events[all_events.len().saturating_sub(EVENTS)..] {
            out::line(format_args!("  {}", events::text(event, now, false)));
        }
    }
    if let Some(next) = next(service, instances) {
        out::hint(next);
    }
}

/// Why it is not as it should be: what each sentence is about, and the sentence. A hub of an older build says only the
/// sentences.
fn reasons(service: &pb::Service) -> impl Iterator<Item = (&'static str, Tone, &str)> {
    let told = service.reasons.iter().map(|reason| {
        let (label, tone) = match reason.about.as_str() {
            "fetching" => ("fetching", Tone::Warning),
            "not_ready" => ("not ready", Tone::Bad),
            "deployment" => ("rollout", Tone::Warning),
            _ => ("missing", Tone::Bad),
        };
        (label, tone, reason.text.as_str())
    });
    let untold = service.unplaced.iter().filter(|_| service.reasons.is_empty());
    told.chain(untold.map(|text| ("missing", Tone::Bad, text.as_str())))
}

fn deployment(service: &pb::Service, now: jiff::Timestamp) -> String {
    if service.deleting {
        return out::paint(Tone::Warning, "being deleted");
    }
    let Some(deployment) = &service.deployment else { return "none".to_owned() };
    let word = deployment_word(Some(deployment));
    let tone = match word {
        "failed" => Tone::Bad,
        "successful" => Tone::Good,
        _ => Tone::Warning,
    };
    let mut text = out::paint(tone, word);
    // When it was paused is not known, only when it began.
    if word != "paused" {
        let (started, ended) = (deployment.started_unix_ns, deployment.ended_unix_ns);
        let at = jiff::Timestamp::from_nanosecond(i128::from(if ended == 0 { started } else { ended })).ok();
        text.push_str(&format!(" {} ago", when::age(at, now)));
    }
    if deployment.from_version != 0 {
        text.push_str(&format!(", from version {}", deployment.from_version));
    }
    if deployment.reverted_to != 0 {
        text.push_str(&format!(", reverted as version {}", deployment.reverted_to));
    }
    if !deployment.reason.is_empty() {
        text.push_str(&format!(": {}", deployment.reason));
    }
    text
}

/// The arguments as a shell would take them, short enough for a line.
fn command(arguments: &[String]) -> String {
    const CHARACTERS_MAX: usize = 100;
    let quoted: Vec<String> = arguments
        .iter()
        .map(|argument| {
            let plain =
                !argument.is_empty() && !argument.contains([' ', '\'', '"', '\n', '\t', ';', '&', '|']);
            if plain { argument.clone() } else { format!("'{}'", argument.replace('\n', "⏎")) }
        })
        .collect();
    let line = quoted.join(" ");
    if line.chars().count() <= CHARACTERS_MAX {
        return line;
    }
    line.chars().take(CHARACTERS_MAX).chain(['…']).collect()
}

/// What a person in this situation does next.
fn next(service: &pb::Service, instances: &[pb::Instance]) -> Option<String> {
    let name = &service.name;
    if service.deleting {
        return None;
    }
    if let Some(bad) =
        instances.iter().find(|instance| matches!(instance.observed.as_str(), "failed" | "backing_off"))
    {
        return Some(format!("`nave logs {name} --instance {} --tail 50`", bad.id));
    }
    let is_missing = reasons(service).any(|(label, _, _)| label == "missing");
    if is_missing && service.ready < service.desired {
        return Some("`nave hosts` shows what the hosts have left".to_owned());
    }
    if deployment_word(service.deployment.as_ref()) == "failed" && service.stable_version != 0 {
        return Some(format!("`nave rollback {name}` goes back to version {}", service.stable_version));
    }
    Some(format!("`nave logs {name} -f`, `nave events --service {name}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_reads_as_in_a_shell() {
        let words = ["sh", "-c", "echo hello; sleep 1"].map(str::to_owned);
        assert_eq!(command(&words), "sh -c 'echo hello; sleep 1'");
        assert_eq!(command(&["x".repeat(200)]).chars().count(), 101);
    }

    #[test]
    fn a_paused_rollout_is_not_said_to_be_as_old_as_its_beginning() {
        let now = jiff::Timestamp::from_second(100).unwrap();
        let text = |status: pb::DeploymentStatus| {
            let started = pb::Deployment {
                status: status.into(),
                started_unix_ns: 94_000_000_000,
                from_version: 1,
                ..Default::default()
            };
            deployment(&pb::Service { deployment: Some(started), ..Default::default() }, now)
        };
        let word = |word| out::paint(Tone::Warning, word);
        assert_eq!(text(pb::DeploymentStatus::Paused), format!("{}, from version 1", word("paused")));
        assert_eq!(
            text(pb::DeploymentStatus::Running),
            format!("{} 6s ago, from version 1", word("running"))
        );
    }

    #[test]
    fn the_next_command_fits_the_trouble() {
        let mut service = pb::Service { name: "web".into(), desired: 1, ..Default::default() };
        let bad = pb::Instance { id: "i-4".into(), observed: "failed".into(), ..Default::default() };
        assert_eq!(next(&service, &[bad]).as_deref(), Some("`nave logs web --instance i-4 --tail 50`"));
        service.unplaced.push("no host has 4 cores left".into());
        assert!(next(&service, &[]).unwrap().contains("nave hosts"));
        let reason = pb::Reason { about: "not_ready".into(), text: "web.0 is starting".into() };
        service.reasons.push(reason);
        assert!(next(&service, &[]).unwrap().contains("nave logs"), "it is there, and says why itself");
    }

    #[test]
    fn each_sentence_is_called_what_it_is() {
        let reason = |about: &str| pb::Reason { about: about.into(), text: about.into() };
        let all = ["missing", "fetching", "not_ready", "deployment", "of a newer build"];
        let mut service = pb::Service { unplaced: vec!["only this".into()], ..Default::default() };
        let labels = |service: &pb::Service| {
            reasons(service).map(|(label, _, text)| format!("{label}: {text}")).collect::<Vec<_>>()
        };
        assert_eq!(labels(&service), ["missing: only this"], "of an older hub");
        service.reasons = all.map(reason).to_vec();
        assert_eq!(
            labels(&service),
            [
                "missing: missing",
                "fetching: fetching",
                "not ready: not_ready",
                "rollout: deployment",
                "missing: of a newer build"
            ]
        );
    }
}
