//! The verbs, a file each: ask, print, hint at what comes next. None keeps state; all errors are a [`Failure`].
//!
//! Lists are read from whichever member answers, as it stands there, so that they work without a leader; an answer
//! from a member without one is marked on stderr. `--wait` reads linearizably: it never sees less than the write.

mod apply;
mod change;
mod cluster;
mod endpoints;
mod events;
mod hosts;
mod logs;
mod members;
mod ps;
mod runs;
mod services;
pub(crate) mod snapshot;
mod status;
mod token;
mod traffic;
mod url;
mod wait;

use nave_proto::pb;
use tonic::{Code, Status};

use crate::args::{ClusterVerb, Hosts, HostsVerb, TokenVerb, Verb};
use crate::client::Hub;
use crate::failure::Failure;
use crate::out::Tone;
use crate::table::Cell;

/// Every verb that speaks to a hub.
pub(crate) async fn run(verb: Verb, hub: &Hub) -> Result<(), Failure> {
    match verb {
        Verb::Apply(args) => apply::run(&args, hub).await,
        Verb::Services(args) => services::run(&args, hub).await,
        Verb::Ps(args) => ps::run(&args, hub).await,
        Verb::Hosts(Hosts { listing, verb: None }) => hosts::run(&listing, hub).await,
        Verb::Hosts(Hosts { verb: Some(HostsVerb::Forget { host, reason }), .. }) => {
            hosts::forget(host, reason, hub).await
        }
        Verb::Drain(args) => hosts::drain(&args, hub).await,
        Verb::Undrain { host } => hosts::undrain(host, hub).await,
        Verb::Endpoints(args) => endpoints::run(&args, hub).await,
        Verb::Status(args) => status::run(&args, hub).await,
        Verb::Logs(args) => logs::run(&args, hub).await,
        Verb::Events(args) => events::run(&args, hub).await,
        Verb::Url(args) => url::run(&args, hub).await,
        Verb::Scale(args) => change::scale(&args, hub).await,
        Verb::Restart(args) => change::restart(&args, hub).await,
        Verb::Rollback(args) => change::rollback(&args, hub).await,
        Verb::Pause { service } => change::pause(&service, hub).await,
        Verb::Resume(args) => change::resume(&args, hub).await,
        Verb::Promote(args) => change::promote(&args, hub).await,
        Verb::Delete(args) => change::delete(&args, hub).await,
        Verb::Cluster { verb: ClusterVerb::Status(args) } => cluster::status(&args, hub).await,
        Verb::Cluster { verb: ClusterVerb::Transfer { to } } => cluster::transfer(to, hub).await,
        Verb::Cluster { verb: ClusterVerb::Add(args) } => members::add(&args, None, hub).await,
        Verb::Cluster { verb: ClusterVerb::Replace { old, new } } => {
            members::add(&new, Some(&old), hub).await
        }
        Verb::Cluster { verb: ClusterVerb::Remove(args) } => members::remove(&args, hub).await,
        Verb::Cluster { verb: ClusterVerb::Snapshot(args) } => snapshot::take(&args, hub).await,
        Verb::Token { verb: TokenVerb::Create { ttl, uses } } => token::create(ttl, uses, hub).await,
        Verb::Token { verb: TokenVerb::List(args) } => token::list(&args, hub).await,
        Verb::Token { verb: TokenVerb::Revoke { id } } => token::revoke(id, hub).await,
        Verb::Cluster { verb: ClusterVerb::Restore(_) }
        | Verb::Dev(_)
        | Verb::Init(_)
        | Verb::Orchestrator(_)
        | Verb::Agent(_)
        | Verb::AgentProcess(_)
        | Verb::Schema
        | Verb::Completions { .. }
        | Verb::Version => unreachable!("main runs the verbs that need no hub"),
    }
}

/// The refusal of a verb about one service; a name nobody has leads to the nearest one.
async fn about_service(hub: &Hub, name: &str, status: &Status) -> Failure {
    if status.code() != Code::NotFound {
        return Failure::from_status(status);
    }
    let absent = no_service(hub, name).await;
    // It exists: something else of it does not, a version for instance.
    absent.unwrap_or_else(|| Failure::from_status(status))
}

/// The refusal for a name that no service has; nothing when one has it.
async fn no_service(hub: &Hub, name: &str) -> Option<Failure> {
    let absent = Failure::refused(format!("there is no service {name:?}"));
    let listed = hub.read(|mut member| async move {
        member.services.list_services(pb::ListServicesRequest::default()).await
    });
    let Ok(listed) = listed.await else { return Some(absent) };
    let mut names = listed.services.iter().map(|service| service.name.as_str());
    if names.clone().any(|found| found == name) {
        return None;
    }
    Some(match nearest(name, &mut names) {
        Some(near) => absent.next(format!("did you mean {near}? `nave services` lists them all")),
        None if listed.services.is_empty() => absent.next("there are none yet: `nave apply -f FILE`"),
        None => absent.next("`nave services` lists them"),
    })
}

/// The name most like `wanted`, when one is like it at all.
fn nearest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    names
        .map(|name| (strsim::damerau_levenshtein(wanted, name), name))
        .filter(|(distance, name)| *distance <= 2.max(wanted.len() / 3) || name.contains(wanted))
        .min()
        .map(|(_, name)| name)
}

/// `2/3`, in the colour of what it says.
fn ready_of(ready: u32, desired: u32) -> Cell {
    let tone = match ready {
        _ if ready == desired => Tone::Good,
        0 => Tone::Bad,
        _ => Tone::Warning,
    };
    Cell::new(format!("{ready}/{desired}"), tone)
}

fn observed_tone(observed: &str, ready: bool) -> Tone {
    match observed {
        "running" if ready => Tone::Good,
        "failed" | "lost" => Tone::Bad,
        "exited" => Tone::Dim,
        _ => Tone::Warning,
    }
}

/// `running` is what a process does; whether it answers is what a person wants to know.
fn observed_text(instance: &pb::Instance) -> String {
    match instance.observed.as_str() {
        "running" if instance.ready => "ready".to_owned(),
        "running" => "running, not ready".to_owned(),
        other => other.replace('_', " "),
    }
}

/// A count with its noun.
fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_offered_and_a_far_one_is_not() {
        let names = ["web", "database", "mail"];
        assert_eq!(nearest("wbe", names.into_iter()), Some("web"));
        assert_eq!(nearest("databse", names.into_iter()), Some("database"));
        assert_eq!(nearest("data", names.into_iter()), Some("database"));
        assert_eq!(nearest("frontend", names.into_iter()), None);
    }
}
