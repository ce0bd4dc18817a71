//! The other members as this one reaches them for the API: what each says of itself, and which do not answer.
//! Raft has its own connections; these are for the rare calls between members, one lazy channel for each.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::future::join_all;
use nave_proto::ids::MemberId;
use nave_proto::pb;
use nave_proto::pb::cluster_service_client::ClusterServiceClient;
use nave_proto::pb::member_service_client::MemberServiceClient;
use nave_tls::{ChannelOptions, Credentials, Expect};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;

use crate::api::errors::Reach;
use crate::raft::MemberNode;

/// How long a member may take to say how it is.
pub(crate) const INFO_TIMEOUT: Duration = Duration::from_secs(1);
/// In error messages, where the caller is already waiting.
const REACH_TIMEOUT: Duration = Duration::from_millis(400);
/// An error storm asks each member once in this time.
const REACH_AGE_MAX: Duration = Duration::from_secs(1);

/// Channels to the other members.
#[derive(Debug)]
pub(crate) struct Peers {
    own: MemberId,
    credentials: Credentials,
    channels: Mutex<BTreeMap<MemberId, (String, Channel)>>,
    reach: Mutex<Option<(Instant, Reach)>>,
}

/// A member of the cluster, its place, and whether it votes.
pub(crate) type Listed = (MemberId, MemberNode, bool);

impl Peers {
    pub(crate) fn new(own: MemberId, credentials: Credentials) -> Self {
        Self { own, credentials, channels: Mutex::default(), reach: Mutex::default() }
    }

    fn channel(&self, id: MemberId, address: &str) -> Channel {
        let mut channels = self.channels.lock();
        if let Some((known, channel)) = channels.get(&id)
            && known == address
        {
            return channel.clone();
        }
        let channel =
            nave_tls::channel(address, &self.credentials, Expect::MemberId(id), ChannelOptions::default());
        channels.insert(id, (address.to_owned(), channel.clone()));
        channel
    }

    /// Closes the connections to all others.
    pub(crate) fn retain(&self, members: &BTreeSet<MemberId>) {
        self.channels.lock().retain(|id, _| members.contains(id));
    }

    /// Another member's part of the members' own API.
    pub(crate) fn member(&self, id: MemberId, address: &str) -> MemberServiceClient<Channel> {
        MemberServiceClient::new(self.channel(id, address))
    }

    /// Another member's API about the cluster, for what only the leader can do.
    pub(crate) fn cluster(&self, id: MemberId, address: &str) -> ClusterServiceClient<Channel> {
        ClusterServiceClient::new(self.channel(id, address))
    }

    /// What a member says of itself; nothing when it does not answer in time.
    pub(crate) async fn info(&self, id: MemberId, address: &str, within: Duration) -> Option<pb::MemberInfo> {
        let mut client = self.member(id, address);
        let answer = timeout(within, client.get_member_info(pb::GetMemberInfoRequest {})).await;
        answer.ok()?.ok().map(tonic::Response::into_inner)
    }

    /// All other members at once.
    pub(crate) async fn infos(
        &self,
        members: &[Listed],
        within: Duration,
    ) -> BTreeMap<MemberId, pb::MemberInfo> {
        let others = members.iter().filter(|(id, _, _)| *id != self.own);
        let asked = others.map(|(id, node, _)| async move {
            self.info(*id, &node.address, within).await.map(|info| (*id, info))
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    /// How many of the members do not answer.
    pub(crate) async fn reach(&self, members: &[Listed]) -> Reach {
        if let Some((at, reach)) = *self.reach.lock()
            && at.elapsed() < REACH_AGE_MAX
        {
            return reach;
        }
        let infos = self.infos(members, REACH_TIMEOUT).await;
        let others = members.iter().filter(|(id, _, _)| *id != self.own).count();
        let reach = Reach { members: members.len(), unreachable: others - infos.len() };
        *self.reach.lock() = Some((Instant::now(), reach));
        reach
    }
}
