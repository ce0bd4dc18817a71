//! `nave apply`: read and check all, send each, say what came of it, wait if asked.

use nave_proto::pb;
use pb::apply_service_response::Outcome;

use super::wait::{self, Goal, Target};
use crate::args::Apply;
use crate::client::Hub;
use crate::failure::Failure;
use crate::manifests::{self, Named};
use crate::out::{self, Tone};

pub(super) async fn run(args: &Apply, hub: &Hub) -> Result<(), Failure> {
    let manifests = manifests::load(&args.files)?;
    if args.dry_run {
        return dry_run(hub, &manifests).await;
    }
    let width = manifests.iter().map(|named| named.manifest.name.len()).max().unwrap_or(0);
    let mut targets = Vec::new();
    for (done, named) in manifests.iter().enumerate() {
        let applied = match send(hub, named, false).await {
            Ok(applied) => applied,
            Err(failure) if done == 0 => return Err(failure),
            Err(failure) => {
                let before: Vec<_> =
                    manifests[..done].iter().map(|named| named.manifest.name.as_str()).collect();
                return Err(failure.detail(format!("applied before it: {}", before.join(", "))));
            }
        };
        out::line(format_args!("{:width$}  {}", named.manifest.name, outcome(&applied)));
        targets.push(Target {
            service: named.manifest.name.clone(),
            goal: Goal::Ready { version: applied.version },
        });
    }
    if args.waiting.wait {
        return wait::until(hub, &targets, args.waiting.timeout).await;
    }
    match targets.as_slice() {
        [only] => out::hint(format_args!("`nave status {}`", only.service)),
        _ => out::hint("`nave services`"),
    }
    Ok(())
}

async fn send(hub: &Hub, named: &Named, dry_run: bool) -> Result<pb::ApplyServiceResponse, Failure> {
    let request = pb::ApplyServiceRequest {
        manifest: Some(Box::new(named.manifest.clone())),
        expected_version: None,
        dry_run,
        request_id: Some(hub.request_id()),
    };
    let sent = hub
        .write(|mut member| {
            let request = request.clone();
            async move { member.services.apply_service(request).await }
        })
        .await;
    sent.map_err(|failure| failure.of(&named.file))
}

fn outcome(applied: &pb::ApplyServiceResponse) -> String {
    let version = applied.version;
    match applied.outcome() {
        Outcome::Created => format!("created, version {version}"),
        Outcome::Unchanged => format!("unchanged, version {version}"),
        Outcome::Updated if applied.replaces_instances => {
            format!("updated, version {version}; its processes are being replaced")
        }
        // The member that answered had not seen yet what another one had written.
        Outcome::Updated if applied.changes.is_empty() => format!("updated, version {version}"),
        Outcome::Updated => format!("updated, version {version}; its processes stay"),
        Outcome::Unspecified => format!("accepted, version {version}"),
    }
}

async fn dry_run(hub: &Hub, manifests: &[Named]) -> Result<(), Failure> {
    for named in manifests {
        let would = send(hub, named, true).await?;
        for line in difference(&named.manifest, &would) {
            out::line(line);
        }
    }
    out::hint("nothing was changed; the same without --dry-run does it");
    Ok(())
}

fn difference(manifest: &pb::Manifest, would: &pb::ApplyServiceResponse) -> Vec<String> {
    let what = match would.outcome() {
        Outcome::Created => out::paint(Tone::Good, "would be created"),
        Outcome::Unchanged => out::paint(Tone::Dim, "would stay as it is"),
        Outcome::Updated | Outcome::Unspecified if would.replaces_instances => {
            let at_once = manifest.update.as_ref().map_or(1, |update| update.max_parallel.max(1));
            out::paint(
                Tone::Warning,
                &format!("would change, and its processes be replaced, {at_once} at a time"),
            )
        }
        Outcome::Updated | Outcome::Unspecified => {
            out::paint(Tone::Warning, "would change, and its processes stay")
        }
    };
    let mut lines = vec![format!("{}  {what}", out::paint(Tone::Bold, &manifest.name))];
    if would.outcome() == Outcome::Unchanged {
        return lines;
    }
    let width = would.changes.iter().map(|change| change.path.chars().count()).max().unwrap_or(0);
    for change in &would.changes {
        let path = format!("{:width$}", change.path);
        lines.push(match (change.before.as_str(), change.after.as_str()) {
            ("", after) => out::paint(Tone::Good, &format!("  + {path}  {after}")),
            (before, "") => out::paint(Tone::Bad, &format!("  - {path}  {before}")),
            (before, after) => format!("  {} {path}  {before} -> {after}", out::paint(Tone::Warning, "~")),
        });
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(path: &str, before: &str, after: &str) -> pb::FieldChange {
        pb::FieldChange { path: path.into(), before: before.into(), after: after.into() }
    }

    #[test]
    fn a_dry_run_shows_each_field_and_what_becomes_of_the_processes() {
        let manifest = pb::Manifest { name: "web".into(), ..Default::default() };
        let would = pb::ApplyServiceResponse {
            outcome: Outcome::Updated.into(),
            replaces_instances: true,
            changes: vec![
                change("count", "2", "3"),
                change("env.LOG", "", "debug"),
                change("user", "me", ""),
            ],
            ..Default::default()
        };
        assert_eq!(
            difference(&manifest, &would),
            [
                "web  would change, and its processes be replaced, 1 at a time",
                "  ~ count    2 -> 3",
                "  + env.LOG  debug",
                "  - user     me",
            ]
        );
    }

    #[test]
    fn an_update_says_whether_processes_are_replaced() {
        let mut applied =
            pb::ApplyServiceResponse { version: 2, outcome: Outcome::Updated.into(), ..Default::default() };
        assert_eq!(outcome(&applied), "updated, version 2");
        applied.changes.push(pb::FieldChange::default());
        assert_eq!(outcome(&applied), "updated, version 2; its processes stay");
        applied.replaces_instances = true;
        assert_eq!(outcome(&applied), "updated, version 2; its processes are being replaced");
    }
}
