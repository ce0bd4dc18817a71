//! What openraft sends to the other members, over tonic: log entries as one pipelined stream (`stream.rs`), heartbeats
//! and votes as unary calls on a connection of their own, snapshots in chunks on a third (`transfer.rs`).

mod stream;
mod transfer;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use nave_proto::ids::MemberId;
use nave_proto::pb::raft_transport_client::RaftTransportClient;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::{RPCOption, RPCTypes, RaftNetworkFactory, RaftNetworkV2, stream_append_sequential};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::storage::Snapshot;
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::raft::channels::{Channels, Purpose};
use crate::raft::convert;
use crate::raft::types::{LeaderId, MemberNode, TypeConfig, Vote};
use crate::storage::snapshot::SnapshotFile;

/// What either end decodes in one message. A request is at most the reader's byte budget (1 MiB) or one entry, an entry
/// at most the largest command (1 MiB); the rest is room for what a later version allows.
pub(crate) const MESSAGE_BYTES_MAX: usize = 8 * 1024 * 1024;

type Client = RaftTransportClient<Channel>;

/// Makes the clients of one member.
#[derive(Debug, Clone)]
pub(crate) struct Network {
    own: MemberId,
    channels: Arc<Channels>,
}

impl Network {
    pub(crate) fn new(own: MemberId, channels: Arc<Channels>) -> Self {
        Self { own, channels }
    }

    fn peer(&self, target: u64, node: &MemberNode, purpose: Purpose) -> Peer {
        let client = |purpose| {
            RaftTransportClient::new(self.channels.get(MemberId(target), &node.address, purpose))
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX)
        };
        Peer {
            own: self.own.0,
            target,
            purpose,
            client: client(purpose),
            control: client(Purpose::Heartbeat),
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &MemberNode) -> Peer {
        self.peer(target, node, Purpose::Append)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &MemberNode) -> Peer {
        self.peer(target, node, Purpose::Heartbeat)
    }

    async fn new_snapshot_client(&mut self, target: u64, node: &MemberNode) -> Peer {
        self.peer(target, node, Purpose::Snapshot)
    }
}

/// One other member.
#[derive(Debug)]
pub(crate) struct Peer {
    own: u64,
    target: u64,
    purpose: Purpose,
    /// On the connection of this purpose.
    client: Client,
    /// On the heartbeat connection.
    control: Client,
}

impl Peer {
    /// A unary call, bounded by what openraft waits for it.
    async fn call<T>(
        &self,
        action: RPCTypes,
        within: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, RPCError<TypeConfig>> {
        match tokio::time::timeout(within, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(unreachable(&status)),
            Err(_) => {
                Err(RPCError::Timeout(Timeout { action, id: self.own, target: self.target, timeout: within }))
            }
        }
    }
}

/// Every transport error asks for a back-off: `Network` and `Timeout` have a rank of 2 against a threshold of 20, which
/// would let a dead member cost a core.
fn unreachable(error: &(impl std::error::Error + 'static)) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::new(error))
}

impl RaftNetworkV2<TypeConfig> for Peer {
    type SnapshotData = SnapshotFile;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let mut client = self.client.clone();
        let request = convert::append_to_pb(request);
        let response = self.call(RPCTypes::AppendEntries, option.soft_ttl(), client.append(request)).await?;
        convert::appended_from_pb(response).map_err(|e| unreachable(&e))
    }

    /// A heartbeat is a stream of one request each time; it goes as a unary call. Real appends are pipelined.
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<
        's,
        Result<
            BoxStream<'s, Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>>,
            RPCError<TypeConfig>,
        >,
    >
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        if self.purpose == Purpose::Heartbeat {
            return stream_append_sequential(self, input, option);
        }
        stream::open(self.client.clone(), input, option.soft_ttl())
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let mut client = self.control.clone();
        let request = convert::vote_request_to_pb(&request);
        let response = self.call(RPCTypes::Vote, option.soft_ttl(), client.vote(request)).await?;
        convert::vote_response_from_pb(&response).map_err(|e| unreachable(&e))
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let mut client = self.control.clone();
        let request = convert::vote_request_to_pb(&request);
        let response = self.call(RPCTypes::Vote, option.soft_ttl(), client.pre_vote(request)).await?;
        convert::vote_response_from_pb(&response).map_err(|e| unreachable(&e))
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot<LeaderId, u64, MemberNode, SnapshotFile>,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let send = transfer::send(self.client.clone(), vote, snapshot);
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = self.call(RPCTypes::InstallSnapshot, option.soft_ttl(), send) => {
                let vote = sent?.vote.unwrap_or_default();
                Ok(SnapshotResponse::new(convert::vote_from_pb(&vote)))
            }
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let mut client = self.control.clone();
        let request = convert::transfer_to_pb(&request);
        self.call(RPCTypes::TransferLeader, option.soft_ttl(), client.transfer_leader(request)).await?;
        Ok(Ok(()))
    }
}
