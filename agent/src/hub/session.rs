//! One stream with one member: hello first (the main loop writes it), a beat each second, and everything that comes
//! handed on. A member that has died without a word is noticed by HTTP/2 pings within three seconds.

use std::collections::VecDeque;
use std::time::Duration;

use futures::stream::{self, Stream, StreamExt as _};
use nave_agent_core::Monotonic;
use nave_proto::lease::BEAT;
use nave_proto::pb;
use nave_tls::{ChannelOptions, Expect};
use pb::agent_message::Message as ToHub;
use pb::agent_session_client::AgentSessionClient;
use pb::hub_message::Message as FromHub;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::info;

use super::{HubEvent, Members, explain, is_given_up, is_refusal};
use crate::clock;

/// Beats that wait for an answer: more than a lease of them are of no use.
const UNANSWERED_MAX: usize = 32;
const PING: Duration = Duration::from_secs(1);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// Until the member has taken the hello and said welcome.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Hello, one report and one acknowledgement at a time, and some beats that wait for a slow network.
const OUTGOING: usize = 16;
/// A wanted set of a thousand instances with manifests of 64 KiB.
const MESSAGE_BYTES_MAX: usize = 80 * 1024 * 1024;
/// A wanted set arrives in a few round trips, and an idle session holds no such buffer.
const WINDOW_BYTES: u32 = 256 * 1024;

/// How a session ended.
#[derive(Debug)]
pub(super) enum Ended {
    Goodbye {
        reason: String,
        members: Vec<String>,
    },
    Lost {
        why: String,
    },
    Refused {
        why: String,
    },
    /// What this host runs is others' now.
    GivenUp {
        why: String,
    },
}

impl From<Status> for Ended {
    fn from(status: Status) -> Self {
        let why = explain(&status);
        match (is_given_up(&status), is_refusal(&status)) {
            (true, _) => Self::GivenUp { why },
            (false, true) => Self::Refused { why },
            (false, false) => Self::Lost { why },
        }
    }
}

#[derive(Debug)]
pub(super) struct Session<'a> {
    pub(super) members: &'a Members,
    pub(super) events: &'a mpsc::Sender<HubEvent>,
}

impl Session<'_> {
    pub(super) async fn run(&self, address: &str) -> Ended {
        let (outgoing, to_send) = mpsc::channel(OUTGOING);
        let close = CancellationToken::new();
        let opening = HubEvent::Opening { outgoing: outgoing.clone(), close: close.clone() };
        if self.events.send(opening).await.is_err() {
            return Ended::Lost { why: "the agent is ending".to_owned() };
        }
        let opening = tokio::time::timeout(OPEN_TIMEOUT, self.open(address, to_send));
        let incoming = match opening.await {
            Ok(Ok(incoming)) => incoming,
            Ok(Err(status)) => return status.into(),
            Err(_) => {
                return Ended::Lost { why: format!("no answer from {address} within {OPEN_TIMEOUT:?}") };
            }
        };
        tokio::select! {
            ended = self.converse(address, incoming, outgoing) => ended,
            () = close.cancelled() => Ended::Lost { why: format!("what {address} says does not fit what is known") },
        }
    }

    async fn open(
        &self,
        address: &str,
        to_send: mpsc::Receiver<pb::AgentMessage>,
    ) -> Result<Streaming<pb::HubMessage>, Status> {
        let options = ChannelOptions {
            keep_alive_interval: Some(PING),
            keep_alive_timeout: PING_TIMEOUT,
            stream_window_bytes: WINDOW_BYTES,
            connection_window_bytes: WINDOW_BYTES,
            ..ChannelOptions::default()
        };
        let channel = nave_tls::channel(address, &self.members.identity.credentials, Expect::Member, options);
        let mut client = AgentSessionClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        Ok(client.open_session(begun(to_send).await).await?.into_inner())
    }

    async fn converse(
        &self,
        address: &str,
        mut incoming: Streaming<pb::HubMessage>,
        outgoing: mpsc::Sender<pb::AgentMessage>,
    ) -> Ended {
        let mut beats = tokio::time::interval(BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sequence = 0;
        let mut unanswered: VecDeque<(u64, Monotonic)> = VecDeque::new();
        loop {
            tokio::select! {
                message = incoming.message() => match message {
                    Ok(Some(pb::HubMessage { message: Some(FromHub::Lease(lease)) })) => {
                        if let Some(until) = lease_until(&mut unanswered, lease)
                            && self.events.send(HubEvent::Lease { until }).await.is_err()
                        {
                            return Ended::Lost { why: "the agent is ending".to_owned() };
                        }
                    }
                    Ok(Some(pb::HubMessage { message: Some(message) })) => {
                        if let Some(ended) = self.take(address, message).await {
                            return ended;
                        }
                    }
                    Ok(Some(pb::HubMessage { message: None })) => {} // of a newer hub
                    Ok(None) => return Ended::Lost { why: format!("{address} ended the stream") },
                    Err(status) => return status.into(),
                },
                _ = beats.tick() => {
                    sequence += 1;
                    let beat = ToHub::Beat(pb::Beat { sequence });
                    // The lease is counted from before the beat leaves, whenever it does.
                    let sent = clock::monotonic();
                    // When older messages still wait for the network, a beat would only wait behind them.
                    if outgoing.try_send(pb::AgentMessage { message: Some(beat) }).is_ok() {
                        unanswered.push_back((sequence, sent));
                        if unanswered.len() > UNANSWERED_MAX {
                            unanswered.pop_front();
                        }
                    }
                }
            }
        }
    }

    async fn take(&self, address: &str, message: FromHub) -> Option<Ended> {
        match &message {
            FromHub::Goodbye(goodbye) => {
                return Some(Ended::Goodbye {
                    reason: goodbye.reason.clone(),
                    members: goodbye.members.clone(),
                });
            }
            FromHub::Welcome(welcome) => {
                let ours = self.members.identity.cluster.to_string();
                if welcome.cluster_id != ours {
                    return Some(Ended::Refused {
                        why: format!(
                            "{address} is of cluster {}, this host is of {ours}",
                            welcome.cluster_id
                        ),
                    });
                }
                info!(address, member = welcome.member, "session with the hub");
                let (identity, welcome) = (self.members.identity.clone(), welcome.clone());
                let kept = tokio::task::spawn_blocking(move || {
                    identity.heard(&welcome.members, welcome.hub_time_unix_ns);
                });
                kept.await.expect("writing a small file does not panic");
            }
            FromHub::Wanted(_)
            | FromHub::Delta(_)
            | FromHub::ReportAcknowledged(_)
            | FromHub::Lease(_)
            | FromHub::Directory(_)
            | FromHub::CallersLeft(_) => {}
        }
        match self.events.send(HubEvent::Message(Box::new(message))).await {
            Ok(()) => None,
            Err(_) => Some(Ended::Lost { why: "the agent is ending".to_owned() }),
        }
    }
}

/// What is to be sent, once it has begun with the main loop's hello. A member may take the stream before it has heard
/// anything, and then we begin to beat; a beat that overtook the hello would be refused.
async fn begun(mut to_send: mpsc::Receiver<pb::AgentMessage>) -> impl Stream<Item = pb::AgentMessage> {
    let hello = to_send.recv().await;
    stream::iter(hello).chain(ReceiverStream::new(to_send))
}

/// When the lease ends that answers a beat, by when that beat was sent; nothing when we do not know it (any more).
fn lease_until(unanswered: &mut VecDeque<(u64, Monotonic)>, lease: pb::Lease) -> Option<Monotonic> {
    while let Some((sequence, sent)) = unanswered.pop_front() {
        if sequence == lease.sequence {
            return Some(sent + Duration::from_millis(lease.hold_ms));
        }
        if sequence > lease.sequence {
            unanswered.push_front((sequence, sent));
            return None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn nothing_is_sent_before_the_hello() {
        let (outgoing, to_send) = mpsc::channel(OUTGOING);
        let mut begun = std::pin::pin!(begun(to_send));
        assert!(begun.as_mut().now_or_never().is_none(), "a stream would be taken, and beats begin");
        let said = [ToHub::Hello(pb::Hello::default()), ToHub::Beat(pb::Beat { sequence: 1 })]
            .map(|message| pb::AgentMessage { message: Some(message) });
        for message in said.clone() {
            outgoing.send(message).await.unwrap();
        }
        drop(outgoing);
        assert_eq!(begun.await.collect::<Vec<_>>().await, said);
    }

    #[test]
    fn a_lease_is_counted_from_when_its_beat_was_sent() {
        let second = 1_000_000_000;
        let mut unanswered: VecDeque<_> =
            (1..=4).map(|n| (n, Monotonic(i64::try_from(n).unwrap() * second))).collect();
        let lease = |sequence| pb::Lease { sequence, hold_ms: 9_000 };
        assert_eq!(lease_until(&mut unanswered, lease(2)), Some(Monotonic(11 * second)));
        assert_eq!(
            lease_until(&mut unanswered, lease(1)),
            None,
            "an answer that came late moves nothing back"
        );
        assert_eq!(lease_until(&mut unanswered, lease(4)), Some(Monotonic(13 * second)));
        assert_eq!(lease_until(&mut unanswered, lease(4)), None);
    }
}
