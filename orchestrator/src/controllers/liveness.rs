//! Says which hosts are lost, as long as this member leads. Beats are heard outside the log (`dispatch/beats`), and the
//! core decides (`Judge`); here is when, and that only a leader that has just proved its leadership puts a verdict
//! into the log.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use nave_orchestrator_core::{Judge, Verdict};
use nave_proto::ids::HostId;
use nave_proto::pb;
use pb::command::Body;
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::{Looks, leadership, still_leads};
use crate::api::{self, Hub};
use crate::clock;

/// A lost host is said within the lease + a forwarded beat's 250 ms + this + a second at most, below the 5 s promised.
const TICK: Duration = Duration::from_millis(250);
/// How long a proof of leadership, or a verdict's commit, may take.
const DEADLINE: Duration = Duration::from_secs(2);
/// Verdicts proposed together: a few at a time of what the log takes at once.
const TOGETHER: usize = 128;

/// Judges while this member leads, until it stops.
pub(crate) async fn run(hub: Arc<Hub>) {
    while let Some(term) = leadership(&hub).await {
        hub.beats.lead(term);
        lead(&hub, term).await;
        hub.beats.follow();
        if hub.stop.is_cancelled() {
            return;
        }
    }
}

/// One leadership.
async fn lead(hub: &Hub, term: u64) {
    let mut judge = Judge::new(hub.beats.now());
    let (mut settled, mut braking) = (false, false);
    let mut looks = Looks::new(hub, term, TICK);
    while looks.next().await {
        if !settled {
            // A linearizable read has waited for all that was committed before this term.
            settled = is_proven(hub, term).await;
            if settled {
                hub.beats.settle(term);
            }
        }
        let verdicts = look(hub, &mut judge);
        say_brake(hub, &judge, &mut braking);
        if !verdicts.is_empty() && is_proven(hub, term).await {
            for some in verdicts.chunks(TOGETHER) {
                join_all(some.iter().map(|verdict| pass(hub, verdict))).await;
            }
        }
        say_clones(hub).await;
    }
}

fn look(hub: &Hub, judge: &mut Judge) -> Vec<Verdict> {
    let (state, now) = (hub.raft.state(), hub.beats.now());
    let verdicts = hub.beats.with_leases(|leases| {
        leases.retain(|host| state.host(host).is_some());
        judge.look(&state, leases, now, clock::unix_now_ns())
    });
    verdicts.unwrap_or_default()
}

fn say_brake(hub: &Hub, judge: &Judge, braking: &mut bool) {
    if judge.is_braking() == *braking {
        return;
    }
    *braking = judge.is_braking();
    let hosts = hub.raft.state().hosts().len();
    match *braking {
        true => error!(
            hosts,
            "so many hosts fell silent at once that the fault is probably here: none is replaced until most of them \
             return"
        ),
        false => info!(hosts, "most silent hosts have returned, judging again"),
    }
}

/// Whether a quorum says just now that this member leads.
async fn is_proven(hub: &Hub, term: u64) -> bool {
    hub.raft.linearize(Instant::now() + DEADLINE).await.is_ok()
        && still_leads(hub, term)
        && hub.raft.status().leader_proven
}

async fn pass(hub: &Hub, verdict: &Verdict) {
    let Verdict { host, status, reason, lease_over_ms } = verdict;
    match propose(hub, Body::SetHostStatus(verdict.command())).await {
        Ok(()) => info!(%host, ?status, reason, lease_over_ms, "host judged"),
        // It is judged again at the next tick.
        Err(cause) => warn!(%host, ?status, cause, "verdict not committed"),
    }
}

/// One identity on two machines is a person's mistake, so it is told as an event.
async fn say_clones(hub: &Hub) {
    for host in hub.beats.with_leases(|leases| leases.take_clones()).unwrap_or_default() {
        let message = cloned(host);
        error!(%host, message);
        let note = pb::NoteHost { host_id: host.0, kind: "host_cloned".to_owned(), message };
        if let Err(cause) = propose(hub, Body::NoteHost(note)).await {
            warn!(%host, cause, "the event of a cloned host was not committed");
        }
    }
}

fn cloned(host: HostId) -> String {
    format!(
        "two agents use the identity of {host} at the same time: a data directory was copied; the newer one is refused, \
         so stop it, remove its data directory, and let it join with a token of its own"
    )
}

async fn propose(hub: &Hub, body: Body) -> Result<(), String> {
    let command = api::command("hub".to_owned(), None, body);
    let reply =
        hub.raft.propose(command, Instant::now() + DEADLINE).await.map_err(|error| error.to_string())?;
    match reply.result {
        Some(pb::reply::Result::Rejected(rejected)) => Err(rejected.message),
        Some(pb::reply::Result::Accepted(_)) | None => Ok(()),
    }
}
