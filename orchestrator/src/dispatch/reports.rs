//! The way up: what one agent reports, until it is committed. While a proposal is under way, newer reports merge
//! into one that waits, so a session holds two at most; what could not be committed goes back under the newer ones
//! and is tried again, with patience while there is no leader.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use nave_proto::ids::HostId;
use nave_proto::pb;
use pb::command::Body;
use tokio::time::{Instant, sleep_until};
use tonic::Status;
use tracing::{info, warn};

use crate::api::errors::{self, Reach};
use crate::api::{self, Hub};
use crate::raft::ProposeError;

/// How long one try to commit a report may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// Between tries.
const RETRY: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(2);

/// Reports merged into one.
#[derive(Debug, Clone, Default, PartialEq)]
struct Merged {
    /// Of the newest report in it; 0: facts of the hello alone.
    sequence: u64,
    full: bool,
    instances: BTreeMap<u64, pb::InstanceReport>,
    gone: BTreeSet<u64>,
    facts: Option<pb::HostFacts>,
}

impl Merged {
    fn is_empty(&self) -> bool {
        self.sequence == 0 && self.facts.is_none()
    }

    /// Adds a newer report.
    fn add(&mut self, report: pb::Report) {
        self.sequence = report.sequence;
        if report.full {
            // It names all there is; what was said before is said anew or no longer true.
            self.full = true;
            self.instances.clear();
        }
        for id in report.gone {
            self.instances.remove(&id);
            self.gone.insert(id);
        }
        for instance in report.instances {
            self.gone.remove(&instance.instance_id);
            self.instances.insert(instance.instance_id, instance);
        }
        if report.facts.is_some() {
            self.facts = report.facts;
        }
    }

    /// Puts what could not be committed under what came since.
    fn under(self, newer: Self) -> Self {
        let mut merged = self;
        if newer.sequence != 0 {
            merged.add(pb::Report {
                sequence: newer.sequence,
                full: newer.full,
                instances: newer.instances.into_values().collect(),
                gone: newer.gone.into_iter().collect(),
                facts: None,
            });
        }
        if newer.facts.is_some() {
            merged.facts = newer.facts;
        }
        merged
    }

    /// `session`: its number, so that it is void once a newer one is open.
    fn report(&self, host: HostId, session: u64) -> Option<Body> {
        let empty = self.instances.is_empty() && self.gone.is_empty() && !self.full;
        (!empty).then(|| {
            Body::ReportInstances(pb::ReportInstances {
                host_id: host.0,
                full: self.full,
                instances: self.instances.values().cloned().collect(),
                gone: self.gone.iter().copied().collect(),
                session,
                sequence: self.sequence,
            })
        })
    }
}

/// What became of the reports that were under way.
#[derive(Debug)]
pub(super) enum Progress {
    /// Committed up to this sequence, which may be told to the agent.
    Committed { sequence: u64 },
    /// Not yet; it is tried again by itself.
    Later,
    /// Never: the session has to end, for this reason.
    Hopeless(Status),
    /// Never: a newer session of the host speaks for it, or did and is gone.
    Superseded,
}

type Attempt = BoxFuture<'static, (Merged, Result<(), Failure>)>;

enum Failure {
    Again,
    Never(Box<Status>),
    Superseded,
}

/// The reports of one session.
pub(super) struct Reports {
    hub: Arc<Hub>,
    host: HostId,
    session: u64,
    waiting: Merged,
    attempt: Option<Attempt>,
    not_before: Instant,
    delay: Duration,
}

impl Reports {
    /// Begins with the facts of the hello. `session`: the number that the log gave it.
    pub(super) fn new(hub: Arc<Hub>, host: HostId, session: u64, facts: Option<pb::HostFacts>) -> Self {
        let waiting = Merged { facts, ..Merged::default() };
        Self { hub, host, session, waiting, attempt: None, not_before: Instant::now(), delay: RETRY }
    }

    pub(super) fn add(&mut self, report: pb::Report) {
        self.waiting.add(report);
    }

    /// Moves the reports on; waits for ever when there are none. Cancel-safe.
    pub(super) async fn progress(&mut self) -> Progress {
        if self.attempt.is_none() {
            if self.waiting.is_empty() {
                return std::future::pending().await;
            }
            sleep_until(self.not_before).await;
        }
        let attempt = self.attempt.get_or_insert_with(|| {
            let merged = std::mem::take(&mut self.waiting);
            Box::pin(commit(self.hub.clone(), self.host, self.session, merged))
        });
        let (merged, outcome) = attempt.await;
        self.attempt = None;
        match outcome {
            Ok(()) => {
                self.delay = RETRY;
                Progress::Committed { sequence: merged.sequence }
            }
            Err(Failure::Again) => {
                self.waiting = merged.under(std::mem::take(&mut self.waiting));
                self.not_before = Instant::now() + self.delay;
                self.delay = (self.delay * 2).min(RETRY_MAX);
                Progress::Later
            }
            Err(Failure::Never(status)) => Progress::Hopeless(*status),
            Err(Failure::Superseded) => Progress::Superseded,
        }
    }
}

/// Proposes facts, when they are news, and the report. Both may be repeated without harm.
async fn commit(hub: Arc<Hub>, host: HostId, session: u64, merged: Merged) -> (Merged, Result<(), Failure>) {
    let known = hub.raft.state().host(host).and_then(|record| record.facts.clone());
    let news = merged.facts.clone().filter(|facts| known.as_ref() != Some(facts));
    let update = |facts| pb::UpdateHost { host_id: host.0, facts: Some(facts), session };
    let facts = news.map(|facts| Body::UpdateHost(update(facts)));
    for body in facts.into_iter().chain(merged.report(host, session)) {
        if let Err(failure) = propose(&hub, host, body).await {
            return (merged, Err(failure));
        }
    }
    (merged, Ok(()))
}

async fn propose(hub: &Hub, host: HostId, body: Body) -> Result<(), Failure> {
    let of_facts = matches!(body, Body::UpdateHost(_));
    let command = api::command(format!("agent/{host}"), None, body);
    let reply = match hub.raft.propose(command, Instant::now() + DEADLINE).await {
        Ok(reply) => reply,
        Err(error @ ProposeError::TooLarge) => {
            return Err(Failure::Never(Box::new(errors::propose(&error, Reach::default()))));
        }
        Err(error) => {
            info!(%host, %error, "report not committed, trying again");
            return Err(Failure::Again);
        }
    };
    match reply.result {
        Some(pb::reply::Result::Rejected(rejected)) if rejected.code() == pb::RejectedCode::Superseded => {
            Err(Failure::Superseded)
        }
        Some(pb::reply::Result::Rejected(rejected)) if of_facts => {
            // For instance a name that another host has: the host goes on under its old one.
            warn!(%host, reason = rejected.message, "the host's facts were refused");
            Ok(())
        }
        // The host is lost and about to be called back.
        Some(pb::reply::Result::Rejected(rejected)) if rejected.code() == pb::RejectedCode::Conflict => {
            Err(Failure::Again)
        }
        Some(pb::reply::Result::Rejected(rejected)) => {
            Err(Failure::Never(Box::new(refused(host, &rejected))))
        }
        Some(pb::reply::Result::Accepted(_)) | None => Ok(()),
    }
}

/// A host that was forgotten has to join again; anything else is told as it is.
pub(super) fn refused(host: HostId, rejected: &pb::Rejected) -> Status {
    match rejected.code() {
        pb::RejectedCode::NotFound => errors::forgotten(host),
        _ => errors::rejected(rejected),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(sequence: u64, full: bool, instances: &[(u64, u32)], gone: &[u64]) -> pb::Report {
        let instance = |(instance_id, attempt): &(u64, u32)| pb::InstanceReport {
            instance_id: *instance_id,
            attempt: *attempt,
            ..Default::default()
        };
        pb::Report {
            sequence,
            full,
            instances: instances.iter().map(instance).collect(),
            facts: None,
            gone: gone.to_vec(),
        }
    }

    fn merged(reports: &[pb::Report]) -> Merged {
        let mut merged = Merged::default();
        for report in reports {
            merged.add(report.clone());
        }
        merged
    }

    fn shape(merged: &Merged) -> (u64, bool, Vec<(u64, u32)>, Vec<u64>) {
        let instances = merged.instances.values().map(|one| (one.instance_id, one.attempt)).collect();
        (merged.sequence, merged.full, instances, merged.gone.iter().copied().collect())
    }

    #[test]
    fn the_newest_word_on_each_instance_counts() {
        let both = merged(&[report(1, true, &[(1, 1), (2, 1)], &[]), report(2, false, &[(1, 2)], &[2])]);
        assert_eq!(shape(&both), (2, true, vec![(1, 2)], vec![2]));
        let back = merged(&[report(1, false, &[], &[3]), report(2, false, &[(3, 1)], &[])]);
        assert_eq!(shape(&back), (2, false, vec![(3, 1)], vec![]));
    }

    #[test]
    fn a_full_report_replaces_what_was_said() {
        let both = merged(&[report(1, false, &[(1, 1), (2, 1)], &[9]), report(2, true, &[(2, 5)], &[])]);
        assert_eq!(shape(&both), (2, true, vec![(2, 5)], vec![9]));
    }

    #[test]
    fn what_failed_goes_back_under_what_came_since() {
        let failed = merged(&[report(1, true, &[(1, 1), (2, 1)], &[])]);
        let newer = merged(&[report(2, false, &[(2, 2)], &[1])]);
        assert_eq!(shape(&failed.clone().under(newer)), (2, true, vec![(2, 2)], vec![1]));
        assert_eq!(failed.clone().under(Merged::default()), failed);
    }

    #[test]
    fn an_empty_report_is_acknowledged_and_proposes_nothing() {
        let empty = merged(&[report(7, false, &[], &[])]);
        assert!(!empty.is_empty());
        assert_eq!(empty.report(HostId(1), 9), None);
        assert!(
            merged(&[report(1, true, &[], &[])]).report(HostId(1), 9).is_some(),
            "full and empty is news"
        );
    }
}
