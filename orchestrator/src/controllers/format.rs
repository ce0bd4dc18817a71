//! Raises the format that commands are written in once every member knows a later one, on the leader. Until then members
//! of several builds live together: what only the newer know is not used.

use std::sync::Arc;
use std::time::Duration;

use nave_proto::{COMMAND_FORMAT, pb};
use pb::command::Body;
use tokio::time::Instant;
use tracing::{debug, info};

use super::{Looks, leadership};
use crate::api::{self, Hub};

/// After the last member was upgraded.
const TICK: Duration = Duration::from_secs(3);
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
const DEADLINE: Duration = Duration::from_secs(5);

/// Works while this member leads, until it stops.
pub(crate) async fn run(hub: Arc<Hub>) {
    while let Some(term) = leadership(&hub).await {
        let mut looks = Looks::new(&hub, term, TICK);
        while looks.next().await {
            look(&hub).await;
        }
        if hub.stop.is_cancelled() {
            return;
        }
    }
}

/// Asks nobody while this build knows nothing later than what is in use.
async fn look(hub: &Hub) {
    let used = hub.raft.state().command_format();
    if used >= COMMAND_FORMAT {
        return;
    }
    let members = hub.raft.status().members;
    let infos = hub.peers.infos(&members, ANSWER_WITHIN).await;
    let known = members.iter().map(|(id, _, _)| match *id == hub.id {
        true => Some(COMMAND_FORMAT),
        false => infos.get(id).map(|info| info.command_format),
    });
    let Some(format) = common(known).filter(|common| *common > used) else { return };
    let agree = Body::AgreeFormat(pb::AgreeFormat { format });
    match hub.raft.propose(api::command("hub".to_owned(), None, agree), Instant::now() + DEADLINE).await {
        Ok(_) => info!(format, "all members know this command format; it is used from now on"),
        Err(error) => debug!(format, %error, "the command format could not be raised, trying again"),
    }
}

/// The newest format that all know; none while somebody has not said what it knows.
fn common(known: impl IntoIterator<Item = Option<u32>>) -> Option<u32> {
    known.into_iter().collect::<Option<Vec<u32>>>()?.into_iter().min()
}

#[cfg(test)]
mod tests {
    use super::common;

    #[test]
    fn it_rises_to_what_the_oldest_knows_and_not_while_one_is_silent() {
        assert_eq!(common([Some(7), Some(9), Some(8)]), Some(7));
        assert_eq!(common([Some(7), None, Some(8)]), None);
        assert_eq!(common([]), None);
    }
}
