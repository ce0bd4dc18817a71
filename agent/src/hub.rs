//! The way to the hub: which members there are, and a session with one of them, begun again for ever.
//!
//! Members are dialled in random order, so that agents spread; one that ends the session is tried last. The list is
//! what the configuration says plus what a hub last said, which is on disk, so that an agent finds a hub that moved
//! while it was off. `AgentSession` messages pass through here; the main loop alone gives them a meaning.

mod session;

use std::sync::Arc;
use std::time::Duration;

use nave_agent_core::Monotonic;
use nave_proto::pb;
use nave_proto::words::HOST_FORGOTTEN;
use rand::seq::SliceRandom as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use tracing::{error, info, warn};

use crate::backoff::Backoff;
use crate::clock;
use crate::identity::Identity;
use session::{Ended, Session};

/// A session that lasted so long was a good one: the next begins without a pause.
const GOOD_SESSION: Duration = Duration::from_secs(10);
/// The hub has said no, which only a person changes.
const REFUSED_PAUSE: Duration = Duration::from_secs(10);
/// The hub has given this host up, which is for ever; asked again only to go on saying so.
const GIVEN_UP_PAUSE: Duration = Duration::from_secs(60);

/// Whom to dial.
#[derive(Debug, Clone)]
pub(crate) struct Members {
    pub(crate) identity: Arc<Identity>,
    /// From the configuration.
    pub(crate) join: Vec<String>,
}

impl Members {
    pub(crate) fn in_random_order(&self) -> Vec<String> {
        let mut addresses = self.identity.members();
        addresses.shuffle(&mut rand::rng());
        let mut configured = self.join.clone();
        configured.shuffle(&mut rand::rng());
        // The hub's own word first: `join` may be old.
        for address in configured {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        addresses
    }
}

/// What happens between a hub and us, in order.
#[derive(Debug)]
pub(crate) enum HubEvent {
    /// A stream is being opened; the hello goes first into `outgoing`.
    /// `close` ends it when what the member says cannot be used.
    Opening {
        outgoing: mpsc::Sender<pb::AgentMessage>,
        close: CancellationToken,
    },
    Message(Box<pb::hub_message::Message>),
    /// A beat was answered: this host has a lease until then.
    Lease {
        until: Monotonic,
    },
    /// What this host runs is others' now.
    GivenUp,
    Closed,
}

/// Keeps a session until it is dropped.
#[derive(Debug)]
pub(crate) struct HubTask {
    pub(crate) members: Members,
    pub(crate) events: mpsc::Sender<HubEvent>,
}

impl HubTask {
    pub(crate) async fn run(self) {
        let mut backoff = Backoff::new();
        let mut said = String::new();
        let mut avoid: Option<String> = None;
        let mut prefer: Vec<String> = Vec::new();
        loop {
            let mut addresses = std::mem::take(&mut prefer);
            for address in self.members.in_random_order() {
                if !addresses.contains(&address) {
                    addresses.push(address);
                }
            }
            // A stable sort: all that is not to be avoided keeps its order.
            addresses.sort_by_key(|address| Some(address) == avoid.as_ref());
            let mut refused = None;
            for address in addresses {
                let began = clock::monotonic();
                let ended = Session { members: &self.members, events: &self.events }.run(&address).await;
                if self.events.send(HubEvent::Closed).await.is_err() {
                    return; // the agent is ending
                }
                let lasted = clock::monotonic().since(began);
                avoid = Some(address.clone());
                match ended {
                    Ended::Goodbye { reason, members } => {
                        info!(address, reason, "the member sends us elsewhere");
                        prefer = members;
                        prefer.retain(|other| *other != address);
                        prefer.shuffle(&mut rand::rng());
                        said.clear();
                        if lasted >= GOOD_SESSION {
                            backoff = Backoff::new();
                        }
                        break;
                    }
                    Ended::Lost { why } if lasted >= GOOD_SESSION => {
                        warn!(address, why, "lost the hub member, looking for another; services go on");
                        said = why;
                        backoff = Backoff::new();
                        break;
                    }
                    Ended::Lost { why } => {
                        if why != said {
                            warn!(address, why, "no session with the hub, trying on; services go on");
                            said = why;
                        }
                    }
                    Ended::GivenUp { why } => {
                        if why != said {
                            error!(address, why, "this host is no longer the hub's; what it runs is stopped");
                            said = why;
                        }
                        if self.events.send(HubEvent::GivenUp).await.is_err() {
                            return; // the agent is ending
                        }
                        refused = Some(GIVEN_UP_PAUSE);
                        break;
                    }
                    Ended::Refused { why } => {
                        if why != said {
                            error!(address, why, "the hub refuses this host; services go on as they are");
                            said = why;
                        }
                        refused = Some(REFUSED_PAUSE);
                    }
                }
            }
            let pause = backoff.next();
            tokio::time::sleep(refused.map_or(pause, |refused| refused + pause)).await;
        }
    }
}

/// Whether the hub says that another host has what this one runs.
fn is_given_up(status: &Status) -> bool {
    let details = status.get_error_details();
    details.error_info().is_some_and(|info| info.reason == HOST_FORGOTTEN)
}

/// A failed call to a member, for people.
pub(crate) fn explain(status: &Status) -> String {
    match nave_tls::connect_error(status) {
        Some(error) => crate::error_chain(error),
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}

/// Whether only a person can change the answer.
fn is_refusal(status: &Status) -> bool {
    match nave_tls::connect_error(status) {
        Some(nave_tls::ConnectError::Refused { .. }) => true,
        Some(_) => false,
        None => matches!(
            status.code(),
            Code::PermissionDenied | Code::Unauthenticated | Code::InvalidArgument | Code::FailedPrecondition
        ),
    }
}
