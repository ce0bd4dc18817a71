//! Whether this member still belongs to its cluster. One that was removed while it was away, or that missed the entry
//! which removed it, hears of no leader any more; then it asks the others. Ids are never used again, so a single
//! "removed" is the truth for ever: it is written into the data directory, and the member ends. Here the connections,
//! and what the agents know of the members, follow the membership too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use nave_proto::ids::MemberId;
use nave_proto::pb::MemberStanding;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{error, warn};

use crate::api::Hub;
use crate::api::peers::Listed;
use crate::config::MemberConfig;
use crate::raft::MemberNode;

const TICK: Duration = Duration::from_secs(1);
/// Longer than any election; nobody is asked while there is a leader.
const LEADERLESS: Duration = Duration::from_secs(2);
const ASK: Duration = Duration::from_secs(1);

/// Returns once this member was removed, with who said so; never when it stops for another reason.
pub(super) async fn removed(hub: Arc<Hub>, config: MemberConfig) -> String {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let status = hub.raft.status();
        let listed: BTreeSet<MemberId> = status.members.iter().map(|(id, _, _)| *id).collect();
        let addresses: Vec<String> = status.members.iter().map(|(_, node, _)| node.address.clone()).collect();
        hub.addresses.send_if_modified(|known| {
            let changed = *known != addresses;
            if changed {
                *known = addresses;
            }
            changed
        });
        if !listed.is_empty() {
            hub.peers.retain(&listed);
            hub.raft.retain_channels(&listed);
        }
        if status.last_quorum_contact < LEADERLESS {
            continue;
        }
        let others = others(hub.id, &config, &status.members);
        let infos = hub.peers.infos(&others, ASK).await;
        let said = infos.values().find(|info| info.caller_standing() == MemberStanding::Removed);
        let Some(by) = said.map(|info| info.name.clone()) else { continue };
        error!(
            member = %hub.id, by,
            "this member was removed from the cluster and stops; its data stays, and is not used again"
        );
        if let Err(error) = hub.raft.mark_removed(&by).await {
            warn!(%error, "cannot write down that this member was removed; it will ask again at its next start");
        }
        return by;
    }
}

/// Everyone that this member has heard of: the cluster may have changed wholly while it was away.
pub(super) fn others(own: MemberId, config: &MemberConfig, members: &[Listed]) -> Vec<Listed> {
    let configured = config.members.iter().map(|entry| {
        let node = MemberNode { name: entry.name.clone(), address: entry.address.clone() };
        (entry.id, (node, true))
    });
    let known = members.iter().map(|(id, node, voter)| (*id, (node.clone(), *voter)));
    let all: BTreeMap<MemberId, (MemberNode, bool)> = configured.chain(known).collect();
    all.into_iter().filter(|(id, _)| *id != own).map(|(id, (node, voter))| (id, node, voter)).collect()
}
