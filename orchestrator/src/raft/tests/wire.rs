//! What a member answers to those who should not ask, and to bytes that should not come.

use nave_proto::ids::{HostId, MemberId};
use nave_proto::pb;
use nave_proto::pb::member_service_client::MemberServiceClient;
use nave_proto::pb::raft_transport_client::RaftTransportClient;
use nave_tls::{ChannelOptions, Credentials, Expect};
use tonic::Code;
use tonic::transport::Channel;

use super::cluster::{Cluster, soon, token};
use crate::raft::SnapshotSettings;

fn channel(cluster: &Cluster, to: MemberId, credentials: &Credentials) -> Channel {
    let address = &cluster.nodes[&to].address;
    nave_tls::channel(address, credentials, Expect::MemberId(to), ChannelOptions::default())
}

fn vote(member: u64) -> Option<pb::Vote> {
    Some(pb::Vote { term: 1_000, node_id: member, committed: true })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_members_speak_raft_and_each_for_itself() {
    let cluster = Cluster::start(1, SnapshotSettings::default()).await;
    let only = cluster.leader().await;
    for role in [nave_tls::Role::Operator("eve".into()), nave_tls::Role::Agent(HostId(1))] {
        let channel = channel(&cluster, only, &cluster.credentials_of(role));
        let append = pb::AppendRequest { vote: vote(2), ..Default::default() };
        let refused = RaftTransportClient::new(channel.clone()).append(append).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
        let propose = pb::ProposeRequest { commands: vec![], hops: 1 };
        let refused = MemberServiceClient::new(channel).propose(propose).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    }
    let channel = channel(&cluster, only, &cluster.credentials(MemberId(2)));
    let append = pb::AppendRequest { vote: vote(3), ..Default::default() };
    let refused = RaftTransportClient::new(channel).append(append).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::PermissionDenied, "m-2 sent the vote of m-3"));
    assert_eq!(cluster.hub(only).status().term, 1, "nobody was heard");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_transfer_is_refused_and_harms_nobody() {
    let cluster = Cluster::start(1, SnapshotSettings::default()).await;
    let only = cluster.leader().await;
    let channel = channel(&cluster, only, &cluster.credentials(MemberId(2)));
    let mut client = RaftTransportClient::new(channel);
    let head = |size_bytes| pb::SnapshotChunk {
        chunk: Some(pb::snapshot_chunk::Chunk::Head(pb::SnapshotHead {
            vote: vote(2),
            meta: Some(pb::SnapshotMeta::default()),
            size_bytes,
            ..Default::default()
        })),
    };
    let data = |bytes: &'static [u8]| pb::SnapshotChunk {
        chunk: Some(pb::snapshot_chunk::Chunk::Data(bytes.into())),
    };
    for (chunks, code) in [
        (vec![], Code::InvalidArgument),
        (vec![data(b"NAVESNAP")], Code::InvalidArgument),
        (vec![head(9), data(b"NAVESNAP")], Code::DataLoss),
        (vec![head(7), data(b"NAVESNAP")], Code::InvalidArgument),
        (vec![head(8), data(b"NAVESNAP")], Code::DataLoss),
        (vec![head(8), data(b"whatever")], Code::DataLoss),
    ] {
        let refused = client.install_snapshot(futures::stream::iter(chunks)).await.unwrap_err();
        assert_eq!(refused.code(), code, "{refused}");
    }
    cluster.hub(only).propose(token("alive"), soon()).await.unwrap();
    let left: Vec<_> = std::fs::read_dir(cluster.data_dir(only).join("snapshots")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}
