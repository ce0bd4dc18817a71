//! openraft's type parameters, bound once. Nothing outside `raft` and `storage` sees these.
//!
//! **Leader ids are `leader_id_adv`**: a log id holds (term, member, index) and leader ids are totally ordered, so two
//! candidates of one term do not split the vote for a whole election time-out; the later one wins. It is also
//! openraft's default, hence what its fuzzer and our spike ran. `leader_id_std` would save eight bytes per log id.
//! The choice is on disk and on the wire (`LogId.node_id` in `raft.proto`) and must not change.

use std::fmt;

use bytes::Bytes;
use nave_proto::pb;

openraft::declare_raft_types!(
    /// The registry's Raft group, and later every event shard's.
    pub(crate) TypeConfig:
        D = EncodedCommand,
        R = CommandReply,
        NodeId = u64,
        Node = MemberNode,
        LeaderId = openraft::impls::leader_id_adv::LeaderId<u64, u64>,
);

pub(crate) type LeaderId = openraft::impls::leader_id_adv::LeaderId<u64, u64>;
pub(crate) type LogId = openraft::LogId<LeaderId>;
pub(crate) type Vote = openraft::Vote<LeaderId>;
pub(crate) type Membership = openraft::Membership<u64, MemberNode>;
pub(crate) type StoredMembership = openraft::StoredMembership<LeaderId, u64, MemberNode>;
pub(crate) type SnapshotMeta = openraft::SnapshotMeta<LeaderId, u64, MemberNode>;
pub(crate) type Payload = openraft::EntryPayload<EncodedCommand, u64, MemberNode>;
pub(crate) type Entry = openraft::Entry<LeaderId, Payload>;
pub(crate) type Raft = openraft::Raft<TypeConfig, crate::raft::state_machine::StateMachine>;

/// The registry's group id; the event shards will be 1 and up.
pub(crate) const REGISTRY_GROUP: u32 = 0;

/// An encoded `nave.v1.Command`. It stays encoded from the propose door to `apply`, so the log, the network and the
/// tail cache pass on one buffer by reference count.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct EncodedCommand(pub(crate) Bytes);

impl fmt::Debug for EncodedCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command of {} bytes", self.0.len())
    }
}

impl fmt::Display for EncodedCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The answer of `ClusterState::apply`; empty for blank and membership entries, which nobody waits for.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct CommandReply(pub(crate) pb::Reply);

/// A member as the membership entry names it. The name is for people, the address (`host:port`) is dialled.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemberNode {
    pub name: String,
    pub address: String,
}
