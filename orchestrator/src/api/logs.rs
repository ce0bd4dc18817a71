//! `ReadLogs`: the output of a service wherever its instances run or ran. The lines lie on the hosts; this member
//! asks each agent that may have some (`logs/sources.rs`) and merges what they send by time (`logs/merge.rs`). A host
//! that cannot be asked becomes a warning in the answer and never spoils the others' lines.

mod merge;
mod sources;

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, stream};
use nave_orchestrator_core::ClusterState;
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use nave_tls::{ChannelOptions, Expect};
use pb::agent_service_client::AgentServiceClient;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::api::{Hub, errors};
use merge::{Joining, Merge};
use sources::{Source, Whom};

/// An agent that does not begin to answer in this time is left out.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// Agents that one call waits for at once to begin: a handshake costs some milliseconds of a core.
const ASKED_AT_ONCE: usize = 64;
/// Answers of one host that wait to be merged. Agents send some 256 KiB at once, and 1 MiB more in very long lines.
const WAITING_PER_HOST: usize = 4;
/// Hosts that were found and not joined yet; finding waits.
const HOSTS_WAITING: usize = 4;
/// How often a follower's hosts are looked for, when anything changed.
const LOOK_FOR_HOSTS: Duration = Duration::from_millis(500);
/// A follower asks a host again after this.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What `ReadLogs` answers with.
pub(crate) type LogStream = Pin<Box<dyn Stream<Item = Result<pb::ReadLogsResponse, Status>> + Send>>;

/// Begins to ask all hosts; their lines follow as they come.
pub(crate) fn open(hub: &Arc<Hub>, mut request: pb::ReadLogsRequest) -> Result<LogStream, Status> {
    let instance = match request.instance_id.as_str() {
        "" => None,
        text => Some(
            text.parse::<InstanceId>().map_err(|e| errors::invalid_field("instance_id", &e.to_string()))?,
        ),
    };
    let Whom { sources, warnings, unknown } = Whom::of(&hub.raft.state(), &request, instance)?;
    // What the hub does not know writes nothing more.
    request.follow &= unknown.is_none();
    let reading = Reading::new(hub, request, instance);
    let merge = if reading.request.follow {
        // A host that gets an instance later joins in, so the hosts are looked for as long as somebody reads.
        let (joining, joined) = mpsc::channel(HOSTS_WAITING);
        hub.tasks.spawn(reading.find(sources, joining));
        Merge::following(joined)
    } else {
        Merge::of(sources.into_iter().map(|source| reading.begin(source)).collect())
    };
    Ok(answer(hub.stop.clone(), merge.with_warnings(warnings), unknown))
}

/// What is merged, as a stream. `unknown`: how it ends when there is not a line.
fn answer(stop: CancellationToken, merge: Merge, unknown: Option<Status>) -> LogStream {
    Box::pin(stream::unfold((Some((merge, unknown)), stop), |(merging, stop)| async move {
        let (mut merge, mut unknown) = merging?;
        let answer = tokio::select! {
            () = stop.cancelled() => return Some((Err(errors::stopping()), (None, stop))),
            answer = merge.next() => answer,
        };
        match answer {
            Some(answer) => {
                unknown = unknown.filter(|_| answer.lines.is_empty());
                Some((Ok(answer), (Some((merge, unknown)), stop)))
            }
            None => unknown.map(|status| (Err(status), (None, stop))),
        }
    }))
}

/// One call of `ReadLogs`.
#[derive(Debug, Clone)]
struct Reading {
    hub: Arc<Hub>,
    request: pb::ReadLogsRequest,
    instance: Option<InstanceId>,
    asking: Arc<Semaphore>,
    /// The hosts to be followed.
    likely: Arc<watch::Sender<BTreeSet<HostId>>>,
}

impl Reading {
    fn new(hub: &Arc<Hub>, request: pb::ReadLogsRequest, instance: Option<InstanceId>) -> Self {
        let (hub, asking) = (hub.clone(), Arc::new(Semaphore::new(ASKED_AT_ONCE)));
        Self { hub, request, instance, asking, likely: Arc::new(watch::Sender::new(BTreeSet::new())) }
    }

    /// Looks for hosts until nobody reads any more.
    async fn find(self, mut found: Vec<Source>, joining: mpsc::Sender<Joining>) {
        let mut known = BTreeSet::new();
        let mut changed = self.hub.changes.subscribe();
        loop {
            self.tell_likely(&found);
            for source in found {
                if known.insert(source.host) && joining.send(self.begin(source)).await.is_err() {
                    return;
                }
            }
            tokio::select! {
                () = self.hub.stop.cancelled() => return,
                () = joining.closed() => return,
                () = sleep(LOOK_FOR_HOSTS) => {}
            }
            if changed.changed().await.is_err() {
                return;
            }
            found = sources::sources(&self.hub.raft.state(), &self.request, self.instance).0;
        }
    }

    fn tell_likely(&self, found: &[Source]) {
        let likely = found.iter().filter(|source| source.is_likely || self.request.access);
        let likely: BTreeSet<HostId> = likely.map(|source| source.host).collect();
        self.likely.send_if_modified(|told| std::mem::replace(told, likely.clone()) != likely);
    }

    /// Begins to read one host, in a task that ends with its reader.
    fn begin(&self, source: Source) -> Joining {
        let (lines, waiting) = mpsc::channel(WAITING_PER_HOST);
        let name = source.name.clone();
        let reading = self.clone();
        self.hub.tasks.spawn(async move {
            tokio::select! {
                () = reading.hub.stop.cancelled() => {}
                // The reader has gone.
                () = lines.closed() => {}
                () = reading.relay(source, &lines) => {}
            }
        });
        Joining { name, waiting }
    }

    /// Hands on one host's lines. A host that cannot be asked or breaks off is a warning; a follower asks it again,
    /// for what it has written since. One that has no instance is not followed before it has.
    async fn relay(&self, source: Source, lines: &mpsc::Sender<pb::ReadLogsResponse>) {
        let mut ask = self.first_question();
        let asked = self.request.resume.iter().filter(|cursor| cursor.host == source.name).cloned();
        let mut read: BTreeMap<String, pb::LogCursor> =
            asked.map(|cursor| (cursor.instance_id.clone(), cursor)).collect();
        let mut likely = self.likely.subscribe();
        let mut warned = false;
        loop {
            ask.follow = self.request.follow && likely.borrow().contains(&source.host);
            ask.resume = read.values().cloned().collect();
            let mut progress = false;
            let attempt = self.attempt(&source, &mut ask, lines, &mut read, &mut progress).await;
            if let Err(what) = &attempt
                && !std::mem::replace(&mut warned, true)
            {
                let warning = format!("no output from host {} ({}): {what}", source.name, source.host);
                // The reader may have gone meanwhile, which needs no warning.
                lines.send(pb::ReadLogsResponse { warning, ..Default::default() }).await.ok();
            }
            if !self.request.follow {
                return;
            }
            if progress {
                warned = false;
            }
            if ask.follow || attempt.is_err() {
                sleep(ASK_AGAIN).await;
                continue;
            }
            // All that it had was read, so that what comes to be there from now on is wanted whole.
            ask.tail_lines = 0;
            if likely.wait_for(|likely| likely.contains(&source.host)).await.is_err() {
                return;
            }
        }
    }

    fn first_question(&self) -> pb::ReadHostLogsRequest {
        pb::ReadHostLogsRequest {
            service: self.request.service.clone(),
            instance_id: self.request.instance_id.clone(),
            follow: self.request.follow,
            tail_lines: self.request.tail_lines,
            since: self.request.since,
            until: self.request.until,
            contains: self.request.contains.clone(),
            resume: Vec::new(),
            access: self.request.access,
            stream: self.request.stream,
        }
    }

    /// One stream of a host, to its end. `read` becomes what of each instance has been handed on.
    async fn attempt(
        &self,
        source: &Source,
        ask: &mut pb::ReadHostLogsRequest,
        lines: &mpsc::Sender<pb::ReadLogsResponse>,
        read: &mut BTreeMap<String, pb::LogCursor>,
        progress: &mut bool,
    ) -> Result<(), String> {
        let mut answer = self.ask(source, ask).await?;
        // From now on it is missed when it says nothing.
        let mut handed_on = lines.send(pb::ReadLogsResponse::default()).await;
        while handed_on.is_ok() {
            match answer.message().await {
                Ok(Some(mut response)) => {
                    *progress = true;
                    if response.live {
                        // What comes to be from now on is new, so all of it is wanted.
                        ask.tail_lines = 0;
                    }
                    for line in &mut response.lines {
                        line.host.clone_from(&source.name);
                    }
                    let cursors: Vec<pb::LogCursor> = response.lines.iter().map(after).collect();
                    handed_on = lines.send(response).await;
                    if handed_on.is_ok() {
                        read.extend(cursors.into_iter().map(|cursor| (cursor.instance_id.clone(), cursor)));
                    }
                }
                Ok(None) => return Ok(()),
                Err(status) => return Err(format!("broken off: {}", status.message())),
            }
        }
        Ok(())
    }

    /// The beginning of a host's answer.
    async fn ask(
        &self,
        source: &Source,
        ask: &pb::ReadHostLogsRequest,
    ) -> Result<tonic::Streaming<pb::ReadLogsResponse>, String> {
        let _turn = self.asking.acquire().await.expect("it is never closed");
        let address = address(&self.hub.raft.state(), source.host);
        if address.is_empty() {
            return Err("the hub no longer knows it".to_owned());
        }
        let (credentials, expect) = (&self.hub.credentials, Expect::Agent(source.host));
        let channel = nave_tls::channel(&address, credentials, expect, ChannelOptions::default());
        let mut agent = AgentServiceClient::new(channel);
        match timeout(ANSWER_TIMEOUT, agent.read_host_logs(ask.clone())).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(format!("{} at {address}", status.message())),
            Err(_) => Err(format!("no answer from {address} within {} s", ANSWER_TIMEOUT.as_secs())),
        }
    }
}

/// The place behind a line.
fn after(line: &pb::LogLine) -> pb::LogCursor {
    pb::LogCursor {
        host: line.host.clone(),
        instance_id: line.instance_id.clone(),
        epoch: line.epoch,
        segment: line.segment,
        offset: line.end_offset,
    }
}

/// Where a host's agent answers; empty when the host is not known.
fn address(state: &ClusterState, host: HostId) -> String {
    let facts = state.host(host).and_then(|host| host.facts.as_ref());
    facts.map_or_else(String::new, |facts| facts.address.clone())
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;
    use tonic::Code;

    use super::*;

    /// What a caller is answered when one host has sent this, as lines, warning, or the code of a refusal.
    async fn answered(lines: usize, unknown: Option<Status>) -> Vec<Result<(usize, bool), Code>> {
        let (sender, waiting) = mpsc::channel(4);
        let lines = vec![pb::LogLine::default(); lines];
        sender.send(pb::ReadLogsResponse { lines, ..Default::default() }).await.unwrap();
        drop(sender);
        let merge = Merge::of(vec![Joining { name: "a".to_owned(), waiting }]);
        let merge = merge.with_warnings(vec!["b is not connected".to_owned()]);
        let answer: Vec<_> = answer(CancellationToken::new(), merge, unknown).collect().await;
        let said = |answer: pb::ReadLogsResponse| (answer.lines.len(), !answer.warning.is_empty());
        answer.into_iter().map(|answer| answer.map(said).map_err(|status| status.code())).collect()
    }

    #[tokio::test]
    async fn what_nobody_knows_is_refused_once_all_have_been_asked() {
        let unknown = || Some(errors::no_service("web"));
        assert_eq!(answered(0, unknown()).await, [Ok((0, true)), Err(Code::NotFound)]);
        assert_eq!(answered(2, unknown()).await, [Ok((0, true)), Ok((2, false))]);
        assert_eq!(answered(0, None).await, [Ok((0, true))]);
    }

    #[tokio::test]
    async fn a_member_that_stops_does_not_pass_for_the_end() {
        let (_sender, waiting) = mpsc::channel(4);
        let stop = CancellationToken::new();
        let merge = Merge::of(vec![Joining { name: "a".to_owned(), waiting }]);
        let mut answer = answer(stop.clone(), merge, None);
        stop.cancel();
        assert_eq!(answer.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
        assert!(answer.next().await.is_none());
    }
}
