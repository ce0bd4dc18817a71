//! The agents' side of a member: every agent keeps one stream open to any one member (`AgentSession`).
//!
//! Down go the instances wanted on that host, whole at first and after each gap, then what changes; up come beats,
//! and reports, which are acknowledged once they are committed. A session holds no queue of its own: what is wanted
//! is read from the state when the host is due, and reports merge into one while the log is slow. A member that
//! has no leader for a third of the lease sends its agents away, as another member may have one.
//!
//! `session.rs` is one stream, `wanted.rs` what is wanted of one host, `directory.rs` what its agent knows of the others, `reports.rs` the way up, `beats.rs` who was
//! heard when, `callers.rs` whether nobody calls what drains.

pub(crate) mod beats;
mod callers;
mod directory;
mod reports;
#[cfg(test)]
mod scene;
mod session;
mod wanted;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use nave_proto::ids::HostId;
use nave_proto::lease::TTL;
use nave_proto::pb;
use parking_lot::Mutex;
use pb::agent_session_server::AgentSession;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use crate::api::{Hub, errors};
use session::{End, Session};

/// Messages to one agent that wait for its connection: a whole set, a delta and some acknowledgements. When they
/// are full the session waits, and what is wanted gathers in the state, where it costs nothing.
const MESSAGES_WAITING: usize = 8;

/// How often it is looked whether there is a leader.
const LEADER_LOOK: Duration = Duration::from_millis(100);

/// The service of this name on one member.
#[derive(Debug)]
pub(crate) struct Dispatch {
    hub: Arc<Hub>,
    open: Arc<Mutex<BTreeMap<HostId, OpenSession>>>,
}

/// A session as the next one of the same host finds it.
#[derive(Debug)]
struct OpenSession {
    number: u64,
    replaced: CancellationToken,
}

impl Dispatch {
    pub(crate) fn new(hub: Arc<Hub>) -> Self {
        Self { hub, open: Arc::default() }
    }

    /// Lets a session take the place of an older one of the same host, which ends. The leader has let it in by then, so
    /// it is not another machine's.
    fn replace(open: &Mutex<BTreeMap<HostId, OpenSession>>, host: HostId, number: u64) -> CancellationToken {
        let replaced = CancellationToken::new();
        let new = OpenSession { number, replaced: replaced.clone() };
        if let Some(old) = open.lock().insert(host, new) {
            info!(%host, "the agent has connected again, its older session ends");
            old.replaced.cancel();
        }
        replaced
    }
}

/// Says whether this member has been without a leader for a third of the lease, until the member stops. A member
/// that is alone has nowhere to send its agents.
pub(crate) async fn watch_leader(hub: Arc<Hub>, leaderless: watch::Sender<bool>) {
    let mut ticks = interval(LEADER_LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = hub.stop.cancelled() => return,
        }
        let status = hub.raft.status();
        let without = status.members.len() > 1 && status.last_quorum_contact > TTL / 3;
        let changed =
            leaderless.send_if_modified(|leaderless| std::mem::replace(leaderless, without) != without);
        if changed && without {
            warn!("this member knows no leader: its agents are sent to the others");
        }
    }
}

/// What a stranger to the session protocol is told.
fn hello_first() -> Status {
    errors::invalid_field("hello", "must be the first message of a session")
}

#[tonic::async_trait]
impl AgentSession for Dispatch {
    type OpenSessionStream = Pin<Box<dyn Stream<Item = Result<pb::HubMessage, Status>> + Send>>;

    async fn open_session(
        &self,
        request: Request<Streaming<pb::AgentMessage>>,
    ) -> Result<Response<Self::OpenSessionStream>, Status> {
        let Some(identity) = nave_tls::peer(&request).cloned() else {
            return Err(errors::not_registered("no certificate was shown"));
        };
        let (sender, receiver) = mpsc::channel(MESSAGES_WAITING);
        let (hub, open) = (self.hub.clone(), self.open.clone());
        let mut incoming = request.into_inner();
        // The answer begins at once, so that the agent may wait for it before it says hello.
        self.hub.tasks.spawn(async move {
            let number = hub.metrics.next_session();
            let begun = tokio::select! {
                begun = session::begin(&hub, &identity, number, &mut incoming) => begun,
                () = hub.stop.cancelled() => Err(End::Refused(errors::stopping())),
            };
            let greeted = match begun {
                Ok(greeted) => greeted,
                Err(end) => {
                    info!(agent = %identity.role, %end, "no session");
                    // The agent may have gone meanwhile.
                    if let Some(last) = end.last_word(&hub) {
                        sender.send(last).await.ok();
                    }
                    return;
                }
            };
            let host = greeted.host;
            let replaced = Self::replace(&open, host, number);
            hub.metrics.sessions.inc();
            Session::new(hub.clone(), greeted, number, sender, replaced).run(incoming).await;
            hub.metrics.sessions.dec();
            hub.beats.close(number);
            let mut open = open.lock();
            if open.get(&host).is_some_and(|current| current.number == number) {
                open.remove(&host);
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newer_session_of_a_host_ends_the_older() {
        let open = Mutex::default();
        let first = Dispatch::replace(&open, HostId(1), 1);
        let other = Dispatch::replace(&open, HostId(2), 2);
        assert!(!first.is_cancelled());
        let second = Dispatch::replace(&open, HostId(1), 3);
        assert!(first.is_cancelled() && !second.is_cancelled() && !other.is_cancelled());
        assert_eq!(open.lock().len(), 2);
    }
}
