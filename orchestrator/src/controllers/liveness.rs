//! Which hosts are lost. Beats are heard outside the log (`dispatch/beats`); only the verdict is logged, by a leader
//! that has just proved its leadership, after it has led for one lease, so that every agent had time to be heard.
//!
//! **The brake.** When more than max(1, a fifth) of the hosts fall silent within a minute, it is more likely us than
//! them: none is judged, the silent ones are marked so in the log where people see it, and judging goes on only
//! once so many have returned that the rest are few. [`Judge`] decides, as plain data; the loop does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use nave_orchestrator_core::ClusterState;
use nave_proto::ids::HostId;
use nave_proto::pb;
use pb::HostStatus;
use pb::command::Body;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{error, info, warn};

use super::{leadership, still_leads};
use crate::api::{self, Hub};
use crate::dispatch::beats::{Beats, TTL};

/// A lost host is said within TTL + a forwarded beat's 500 ms + this, below the 5 s that are promised.
const TICK: Duration = Duration::from_millis(250);
/// How long a proof of leadership, or a verdict's commit, may take.
const DEADLINE: Duration = Duration::from_secs(2);
/// Hosts that fall silent within this time count together.
const TOGETHER: Duration = Duration::from_secs(60);

/// Judges while this member leads, until it stops.
pub(crate) async fn run(hub: Arc<Hub>) {
    while let Some(term) = leadership(&hub).await {
        let mut judge = Judge::new(Instant::now());
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while still_leads(&hub, term) {
            tokio::select! {
                _ = ticks.tick() => {}
                () = hub.stop.cancelled() => return,
            }
            let verdicts = {
                let state = hub.raft.state();
                hub.beats.retain(|host| state.host(host).is_some());
                judge.look(&state, &hub.beats, Instant::now())
            };
            if !verdicts.is_empty() && is_proven(&hub, term).await {
                for verdict in verdicts {
                    pass(&hub, verdict).await;
                }
            }
        }
        if hub.stop.is_cancelled() {
            return;
        }
    }
}

/// Whether a quorum says just now that this member leads.
async fn is_proven(hub: &Hub, term: u64) -> bool {
    hub.raft.linearize(Instant::now() + DEADLINE).await.is_ok()
        && still_leads(hub, term)
        && hub.raft.status().leader_proven
}

async fn pass(hub: &Hub, verdict: Verdict) {
    let Verdict { host, status, reason } = verdict;
    let body = pb::SetHostStatus { host_id: host.0, status: status.into(), reason: reason.clone() };
    let command = api::command("hub".to_owned(), None, Body::SetHostStatus(body));
    match hub.raft.propose(command, Instant::now() + DEADLINE).await {
        Ok(_) => info!(%host, ?status, reason, "host judged"),
        // It is judged again at the next tick.
        Err(cause) => warn!(%host, ?status, %cause, "verdict not committed"),
    }
}

/// A change of a host's status that belongs into the log.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    host: HostId,
    status: HostStatus,
    reason: String,
}

/// What one leadership remembers.
#[derive(Debug)]
struct Judge {
    leads_since: Instant,
    /// Hosts judged lost by this leader and not heard since, with the moment they fell silent.
    lost: BTreeMap<HostId, Instant>,
    braking: bool,
}

impl Judge {
    fn new(leads_since: Instant) -> Self {
        Self { leads_since, lost: BTreeMap::new(), braking: false }
    }

    /// What is to be said of the hosts now.
    fn look(&mut self, state: &ClusterState, beats: &Beats, now: Instant) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        let mut silent = BTreeMap::new();
        for record in state.hosts() {
            let host = HostId(record.id);
            // A leader that has heard nothing yet counts from its own beginning.
            let heard = beats.last(host).filter(|heard| *heard + TTL >= now);
            match (heard, record.status()) {
                (Some(_), HostStatus::Lost | HostStatus::Silent) => {
                    self.lost.remove(&host);
                    verdicts.push(Verdict { host, status: HostStatus::Connected, reason: String::new() });
                }
                (Some(_), HostStatus::Connected | HostStatus::Unspecified) => {}
                (None, HostStatus::Lost) => {}
                (None, HostStatus::Connected | HostStatus::Silent | HostStatus::Unspecified) => {
                    let since = beats.last(host).map_or(self.leads_since, |last| last.max(self.leads_since));
                    if since + TTL <= now {
                        silent.insert(host, since);
                    }
                }
            }
        }
        self.lost.retain(|host, since| now - *since < TOGETHER && state.host(*host).is_some());
        verdicts.extend(self.judge(state, &silent));
        verdicts
    }

    fn judge(&mut self, state: &ClusterState, silent: &BTreeMap<HostId, Instant>) -> Vec<Verdict> {
        let hosts = state.hosts().len();
        // A verdict that was passed and not applied yet must not count twice.
        let known: BTreeSet<_> = silent.keys().chain(self.lost.keys()).collect();
        let braking = known.len() > (hosts / 5).max(1);
        if braking && !self.braking {
            error!(
                silent = silent.len(),
                hosts,
                "so many hosts fell silent at once that the fault is probably here: none is replaced until most \
                 of them return"
            );
        }
        if !braking && self.braking {
            info!(silent = silent.len(), hosts, "most silent hosts have returned, judging again");
        }
        self.braking = braking;
        if braking {
            let reason = format!(
                "{} of {hosts} hosts fell silent within a minute: none is replaced until most return; look at the \
                 network between the hub and the hosts, or give one up with `nave hosts forget HOST`",
                known.len()
            );
            let unsaid = silent.keys().filter(|host| {
                state.host(**host).is_some_and(|record| record.status() != HostStatus::Silent)
            });
            return unsaid
                .map(|host| Verdict { host: *host, status: HostStatus::Silent, reason: reason.clone() })
                .collect();
        }
        self.lost.extend(silent);
        let lost = silent.keys().map(|host| Verdict {
            host: *host,
            status: HostStatus::Lost,
            reason: format!("not heard for {} s", TTL.as_secs()),
        });
        lost.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(statuses: &[HostStatus]) -> ClusterState {
        let rows = statuses.iter().zip(1u64..).map(|(status, id)| {
            let facts = pb::HostFacts { name: format!("host-{id}"), ..Default::default() };
            let key = vec![u8::try_from(id).unwrap(); 32];
            let record = pb::HostRecord {
                id,
                facts: Some(facts),
                public_key_sha256: key,
                status: (*status).into(),
                ..Default::default()
            };
            pb::Row { row: Some(pb::row::Row::Host(record)) }
        });
        ClusterState::from_rows(rows, 1).unwrap()
    }

    fn said(verdicts: &[Verdict]) -> Vec<(u64, HostStatus)> {
        verdicts.iter().map(|verdict| (verdict.host.0, verdict.status)).collect()
    }

    async fn pass_time(seconds: u64) -> Instant {
        tokio::time::advance(Duration::from_secs(seconds)).await;
        Instant::now()
    }

    const UP: HostStatus = HostStatus::Connected;

    #[tokio::test(start_paused = true)]
    async fn a_silent_host_is_lost_after_its_lease_and_not_before() {
        let (state, beats) = (state(&[UP]), Beats::default());
        let mut judge = Judge::new(Instant::now());
        let now = pass_time(2).await;
        assert_eq!(judge.look(&state, &beats, now), [], "a new leader waits one lease");
        beats.mark([HostId(1)]);
        let now = pass_time(2).await;
        assert_eq!(judge.look(&state, &beats, now), []);
        let now = pass_time(2).await;
        assert_eq!(said(&judge.look(&state, &beats, now)), [(1, HostStatus::Lost)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_is_heard_again_is_connected() {
        let beats = Beats::default();
        let mut judge = Judge::new(Instant::now());
        let now = pass_time(4).await;
        assert_eq!(judge.look(&state(&[HostStatus::Lost]), &beats, now), [], "lost is said once");
        beats.mark([HostId(1)]);
        assert_eq!(said(&judge.look(&state(&[HostStatus::Lost]), &beats, now)), [(1, UP)]);
    }

    #[tokio::test(start_paused = true)]
    async fn when_many_fall_silent_none_is_lost_until_most_return() {
        let (all, beats) = (state(&[UP; 5]), Beats::default());
        let mut judge = Judge::new(Instant::now());
        let now = pass_time(4).await;
        beats.mark([HostId(1), HostId(2), HostId(3)]);
        let verdicts = judge.look(&all, &beats, now);
        assert_eq!(said(&verdicts), [(4, HostStatus::Silent), (5, HostStatus::Silent)]);
        assert!(verdicts[0].reason.contains("2 of 5 hosts"), "{}", verdicts[0].reason);

        // Also long after, and without saying it again.
        let marked = state(&[UP, UP, UP, HostStatus::Silent, HostStatus::Silent]);
        for _ in 0..100 {
            let now = pass_time(2).await;
            beats.mark([HostId(1), HostId(2), HostId(3)]);
            assert_eq!(judge.look(&marked, &beats, now), []);
        }
        beats.mark([HostId(4)]);
        let verdicts = judge.look(&marked, &beats, Instant::now());
        assert_eq!(said(&verdicts), [(4, UP), (5, HostStatus::Lost)], "one of five may be lost");
    }

    #[tokio::test(start_paused = true)]
    async fn hosts_lost_one_after_another_within_a_minute_count_together() {
        let beats = Beats::default();
        let mut judge = Judge::new(Instant::now());
        let now = pass_time(4).await;
        beats.mark([HostId(2), HostId(3)]);
        assert_eq!(said(&judge.look(&state(&[UP; 3]), &beats, now)), [(1, HostStatus::Lost)]);
        let after = state(&[HostStatus::Lost, UP, UP]);
        let now = pass_time(10).await;
        beats.mark([HostId(3)]);
        assert_eq!(said(&judge.look(&after, &beats, now)), [(2, HostStatus::Silent)]);
        let after = state(&[HostStatus::Lost, HostStatus::Silent, UP]);
        let now = pass_time(60).await;
        beats.mark([HostId(3)]);
        assert_eq!(
            said(&judge.look(&after, &beats, now)),
            [(2, HostStatus::Lost)],
            "a minute later it stands alone"
        );
    }
}
