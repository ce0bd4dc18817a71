//! `ReadLogs`: the output of a service wherever its instances run or ran. The lines lie on the hosts; this member
//! asks each agent and merges what they send by time (`logs/merge.rs`). A host that cannot be asked becomes a
//! warning in the answer and never spoils the others' lines.

mod merge;

use std::collections::BTreeMap;
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
use tokio::time::timeout;
use tonic::Status;

use crate::api::{Hub, convert, errors};
use merge::Merge;

/// An agent that does not begin to answer in this time is left out.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);
/// Answers of one host that wait to be merged. Agents send at most some 64 KiB at once: 256 KiB a host.
const WAITING_PER_HOST: usize = 4;
/// All the events that are kept for one service name the hosts it was on.
const EVENTS_ASKED: usize = 1000;

/// What `ReadLogs` answers with.
pub(crate) type LogStream = Pin<Box<dyn Stream<Item = Result<pb::ReadLogsResponse, Status>> + Send>>;

/// A host to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Source {
    host: HostId,
    name: String,
    /// Empty: the host is no longer known.
    address: String,
}

/// Begins to ask all hosts; their lines follow as they come.
pub(crate) fn open(hub: &Arc<Hub>, request: pb::ReadLogsRequest) -> Result<LogStream, Status> {
    let instance = match request.instance_id.as_str() {
        "" => None,
        text => Some(text.parse::<InstanceId>().map_err(|e| errors::invalid_field("instance_id", &e.to_string()))?),
    };
    let sources = {
        let state = hub.raft.state();
        let sources = sources(&state, &request.service, instance);
        if sources.is_empty() && state.service(&request.service).is_none() {
            return Err(errors::no_service(&request.service));
        }
        sources
    };
    let mut merge = Merge::new(request.follow);
    for source in sources {
        let (lines, waiting) = mpsc::channel(WAITING_PER_HOST);
        merge.add(source.name.clone(), waiting);
        let ask = pb::ReadHostLogsRequest {
            service: request.service.clone(),
            instance_id: request.instance_id.clone(),
            follow: request.follow,
            tail_lines: request.tail_lines,
            since: request.since,
        };
        let hub = hub.clone();
        hub.tasks.clone().spawn(async move {
            tokio::select! {
                () = hub.stop.cancelled() => {}
                // The reader has gone.
                () = lines.closed() => {}
                () = relay(&hub, source, ask, &lines) => {}
            }
        });
    }
    let stop = hub.stop.clone();
    Ok(Box::pin(stream::unfold((merge, stop), |(mut merge, stop)| async move {
        tokio::select! {
            () = stop.cancelled() => None,
            answer = merge.next() => answer.map(|answer| (Ok(answer), (merge, stop))),
        }
    })))
}

/// The hosts that have instances of the service, or had them as far as the history goes back.
fn sources(state: &ClusterState, service: &str, instance: Option<InstanceId>) -> Vec<Source> {
    let mut hosts = BTreeMap::new();
    if let Some(record) = instance.and_then(|id| state.instance(id)) {
        hosts.insert(record.host_id, ());
    }
    for record in state.instances_of(service) {
        if instance.is_none_or(|id| id.0 == record.id) {
            hosts.insert(record.host_id, ());
        }
    }
    let filter = EventFilter { service: Some(service.to_owned()), host: None };
    for event in state.events(&filter, EVENTS_ASKED) {
        if event.instance_id != 0 && instance.is_none_or(|id| id.0 == event.instance_id) {
            hosts.insert(event.host_id, ());
        }
    }
    hosts.remove(&0);
    let source = |id: u64| Source {
        host: HostId(id),
        name: convert::host_name(state, id),
        address: state
            .host(HostId(id))
            .and_then(|host| host.facts.as_ref())
            .map_or_else(String::new, |facts| facts.address.clone()),
    };
    hosts.into_keys().map(source).collect()
}

/// Hands on one host's lines; ends with a warning when the host cannot be asked or breaks off.
async fn relay(
    hub: &Hub,
    source: Source,
    ask: pb::ReadHostLogsRequest,
    lines: &mpsc::Sender<pb::ReadLogsResponse>,
) {
    let warn = async |what: String| {
        let warning = format!("no output from host {} ({}): {what}", source.name, source.host);
        // The reader may have gone meanwhile, which needs no warning.
        lines.send(pb::ReadLogsResponse { lines: Vec::new(), warning }).await.ok();
    };
    if source.address.is_empty() {
        return warn("the hub no longer knows it".to_owned()).await;
    }
    let channel = nave_tls::channel(
        &source.address,
        &hub.credentials,
        Expect::Agent(source.host),
        ChannelOptions::default(),
    );
    let mut agent = AgentServiceClient::new(channel);
    let mut answer = match timeout(ANSWER_TIMEOUT, agent.read_host_logs(ask)).await {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return warn(format!("{} at {}", status.message(), source.address)).await,
        Err(_) => return warn(format!("no answer from {} within 4 s", source.address)).await,
    };
    loop {
        match answer.message().await {
            Ok(Some(mut response)) => {
                for line in response.lines.iter_mut().filter(|line| line.host.is_empty()) {
                    line.host.clone_from(&source.name);
                }
                if lines.send(response).await.is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(status) => return warn(format!("broken off: {}", status.message())).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_nobody_knows_has_no_sources() {
        assert_eq!(sources(&ClusterState::new(), "web", None), []);
        assert_eq!(sources(&ClusterState::new(), "web", Some(InstanceId(1))), []);
    }
}
