//! Who was heard when. Beats never enter the log: each member keeps a table of the hosts whose sessions it has, and
//! hands what it heard to the leader twice a second. The leader's table is the one that counts (`controllers/liveness`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use nave_proto::ids::HostId;
use nave_proto::pb;
use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tracing::debug;

use crate::api::Hub;
use crate::clock;

/// A host that is not heard for this long has lost its lease.
pub(crate) const TTL: Duration = Duration::from_secs(3);
/// How often beats are handed to the leader: a sixth of the lease, so one lost call does no harm.
const FORWARD: Duration = Duration::from_millis(500);

/// When each host was last heard, unix nanoseconds.
pub(crate) type Heard = BTreeMap<HostId, i64>;

/// When each host was last heard by this member, of itself or through another.
#[derive(Debug, Default)]
pub(crate) struct Beats {
    heard: Mutex<BTreeMap<HostId, Instant>>,
}

impl Beats {
    /// These were heard now.
    pub(crate) fn mark(&self, hosts: impl IntoIterator<Item = HostId>) {
        let now = Instant::now();
        let mut heard = self.heard.lock();
        for host in hosts {
            heard.insert(host, now);
        }
    }

    /// When a host was last heard; nothing when never by this process.
    pub(crate) fn last(&self, host: HostId) -> Option<Instant> {
        self.heard.lock().get(&host).copied()
    }

    /// All that is known, as wall time.
    pub(crate) fn heard(&self) -> Heard {
        let (now, now_ns) = (Instant::now(), clock::unix_now_ns());
        let ago = |at: Instant| i64::try_from((now - at).as_nanos()).unwrap_or(i64::MAX);
        self.heard.lock().iter().map(|(host, at)| (*host, now_ns.saturating_sub(ago(*at)))).collect()
    }

    /// The hosts heard since a moment.
    fn since(&self, moment: Instant) -> Vec<HostId> {
        self.heard.lock().iter().filter(|(_, at)| **at >= moment).map(|(host, _)| *host).collect()
    }

    /// Drops hosts that are no more, so that the table is as large as the fleet.
    pub(crate) fn retain(&self, known: impl Fn(HostId) -> bool) {
        self.heard.lock().retain(|host, _| known(*host));
    }
}

/// Hands this member's beats to the leader until the member stops.
pub(crate) async fn forward(hub: Arc<Hub>) {
    let mut ticks = interval(FORWARD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut handed_on = Instant::now();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = hub.stop.cancelled() => return,
        }
        let begun = Instant::now();
        let status = hub.raft.status();
        let leader = status.leader.filter(|leader| *leader != hub.id);
        let leader = leader.and_then(|leader| status.members.into_iter().find(|(id, _, _)| *id == leader));
        let Some((id, node, _)) = leader else {
            handed_on = begun;
            continue;
        };
        // After an outage only what is recent is handed on, else a host long silent would seem to speak.
        let heard = hub.beats.since(handed_on.max(begun - 2 * FORWARD));
        if heard.is_empty() {
            handed_on = begun;
            continue;
        }
        let request = pb::ForwardBeatsRequest {
            host_ids: heard.into_iter().map(|host| host.0).collect(),
            from_member: hub.id.0,
        };
        let mut client = hub.peers.member(id, &node.address);
        match timeout(FORWARD, client.forward_beats(request)).await {
            // Taken, or the other no longer leads: what was heard up to now is told, or will be heard again.
            Ok(Ok(_)) => handed_on = begun,
            Ok(Err(status)) => debug!(leader = %id, error = status.message(), "beats not handed on"),
            Err(_) => debug!(leader = %id, "beats not handed on in time"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_what_was_heard_since_is_handed_on() {
        let beats = Beats::default();
        beats.mark([HostId(1)]);
        tokio::time::advance(Duration::from_secs(1)).await;
        let moment = Instant::now();
        beats.mark([HostId(2)]);
        assert_eq!(beats.since(moment), [HostId(2)]);
        assert_eq!(beats.last(HostId(1)), Some(moment - Duration::from_secs(1)));
        beats.retain(|host| host == HostId(2));
        assert_eq!(beats.last(HostId(1)), None);
    }
}
