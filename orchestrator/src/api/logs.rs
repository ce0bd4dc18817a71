//! `ReadLogs`: the output of a service wherever its instances run or ran. The lines lie on the hosts; this member
//! asks each agent and merges what they send by time (`logs/merge.rs`). A host that cannot be asked becomes a
//! warning in the answer and never spoils the others' lines.

mod merge;

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, stream};
use nave_orchestrator_core::{ClusterState, EventFilter};
use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;
use nave_tls::{ChannelOptions, Expect};
use pb::agent_service_client::AgentServiceClient;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tonic::Status;

use crate::api::{Hub, convert, errors};
use merge::{Joining, Merge};

/// An agent that does not begin to answer in this time is left out.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// Answers of one host that wait to be merged. Agents send at most some 64 KiB at once: 256 KiB a host.
const WAITING_PER_HOST: usize = 4;
/// Hosts that were found and not joined yet; finding waits.
const HOSTS_WAITING: usize = 4;
/// How often a follower's hosts are looked for, when anything changed.
const LOOK_FOR_HOSTS: Duration = Duration::from_millis(500);
/// A follower asks a host again after this.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Asked for calls of a service: each costs this member a connection and some hundred KiB.
const CALLING_HOSTS_MAX: usize = 256;
/// All the events that are kept for one service name the hosts it was on.
const EVENTS_ASKED: usize = 1000;

/// What `ReadLogs` answers with.
pub(crate) type LogStream = Pin<Box<dyn Stream<Item = Result<pb::ReadLogsResponse, Status>> + Send>>;

/// A host to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Source {
    host: HostId,
    name: String,
}

/// Begins to ask all hosts; their lines follow as they come.
pub(crate) fn open(hub: &Arc<Hub>, request: pb::ReadLogsRequest) -> Result<LogStream, Status> {
    let instance = match request.instance_id.as_str() {
        "" => None,
        text => Some(
            text.parse::<InstanceId>().map_err(|e| errors::invalid_field("instance_id", &e.to_string()))?,
        ),
    };
    let sources = {
        let state = hub.raft.state();
        let sources = sources(&state, &request, instance);
        if sources.is_empty() && state.service(&request.service).is_none() {
            return Err(errors::no_service(&request.service));
        }
        sources
    };
    let reading = Reading { hub: hub.clone(), request, instance };
    let merge = if reading.request.follow {
        // A host that gets an instance later joins in, so the hosts are looked for as long as somebody reads.
        let (joining, joined) = mpsc::channel(HOSTS_WAITING);
        hub.tasks.spawn(reading.find(sources, joining));
        Merge::following(joined)
    } else {
        Merge::of(sources.into_iter().map(|source| reading.begin(source)).collect())
    };
    let stop = hub.stop.clone();
    Ok(Box::pin(stream::unfold((merge, stop), |(mut merge, stop)| async move {
        tokio::select! {
            () = stop.cancelled() => None,
            answer = merge.next() => answer.map(|answer| (Ok(answer), (merge, stop))),
        }
    })))
}

/// The hosts that have instances of the service, or had them as far as the history goes back. Calls of it may come from
/// any that is connected.
fn sources(state: &ClusterState, request: &pb::ReadLogsRequest, instance: Option<InstanceId>) -> Vec<Source> {
    let source = |id: u64| Source { host: HostId(id), name: convert::host_name(state, id) };
    if request.access {
        let connected = state.hosts().filter(|host| host.status() == pb::HostStatus::Connected);
        return connected.take(CALLING_HOSTS_MAX).map(|host| source(host.id)).collect();
    }
    let (service, mut hosts) = (request.service.as_str(), BTreeSet::new());
    if let Some(record) = instance.and_then(|id| state.instance(id)) {
        hosts.insert(record.host_id);
    }
    for record in state.instances_of(service) {
        if instance.is_none_or(|id| id.0 == record.id) {
            hosts.insert(record.host_id);
        }
    }
    let filter = EventFilter { service: Some(service.to_owned()), host: None };
    for event in state.events(&filter, EVENTS_ASKED) {
        if event.instance_id != 0 && instance.is_none_or(|id| id.0 == event.instance_id) {
            hosts.insert(event.host_id);
        }
    }
    hosts.remove(&0);
    hosts.into_iter().map(source).collect()
}

/// One call of `ReadLogs`.
#[derive(Debug, Clone)]
struct Reading {
    hub: Arc<Hub>,
    request: pb::ReadLogsRequest,
    instance: Option<InstanceId>,
}

impl Reading {
    /// Looks for hosts until nobody reads any more.
    async fn find(self, mut found: Vec<Source>, joining: mpsc::Sender<Joining>) {
        let mut known = BTreeSet::new();
        let mut changed = self.hub.changes.subscribe();
        loop {
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
            found = sources(&self.hub.raft.state(), &self.request, self.instance);
        }
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
    /// for what it has written since.
    async fn relay(&self, source: Source, lines: &mpsc::Sender<pb::ReadLogsResponse>) {
        let mut ask = pb::ReadHostLogsRequest {
            service: self.request.service.clone(),
            instance_id: self.request.instance_id.clone(),
            follow: self.request.follow,
            tail_lines: self.request.tail_lines,
            since: self.request.since,
            until: self.request.until,
            contains: self.request.contains.clone(),
            resume: Vec::new(),
            access: self.request.access,
        };
        let asked = self.request.resume.iter().filter(|cursor| cursor.host == source.name).cloned();
        let mut read: BTreeMap<String, pb::LogCursor> =
            asked.map(|cursor| (cursor.instance_id.clone(), cursor)).collect();
        let mut warned = false;
        loop {
            ask.resume = read.values().cloned().collect();
            let mut progress = false;
            if let Err(what) = self.attempt(&source, &mut ask, lines, &mut read, &mut progress).await
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
            sleep(ASK_AGAIN).await;
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
        let address = address(&self.hub.raft.state(), source.host);
        if address.is_empty() {
            return Err("the hub no longer knows it".to_owned());
        }
        let (credentials, expect) = (&self.hub.credentials, Expect::Agent(source.host));
        let mut agent = AgentServiceClient::new(nave_tls::channel(
            &address,
            credentials,
            expect,
            ChannelOptions::default(),
        ));
        let mut answer = match timeout(ANSWER_TIMEOUT, agent.read_host_logs(ask.clone())).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => return Err(format!("{} at {address}", status.message())),
            Err(_) => return Err(format!("no answer from {address} within {} s", ANSWER_TIMEOUT.as_secs())),
        };
        loop {
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
                    if !cursors.is_empty() && lines.send(response).await.is_err() {
                        return Ok(());
                    }
                    read.extend(cursors.into_iter().map(|cursor| (cursor.instance_id.clone(), cursor)));
                }
                Ok(None) => return Ok(()),
                Err(status) => return Err(format!("broken off: {}", status.message())),
            }
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
    use super::*;

    #[test]
    fn a_service_nobody_knows_has_no_sources() {
        let web = pb::ReadLogsRequest { service: "web".to_owned(), ..Default::default() };
        assert_eq!(sources(&ClusterState::new(), &web, None), []);
        assert_eq!(sources(&ClusterState::new(), &web, Some(InstanceId(1))), []);
    }
}
