//! What a command did to the rows. `apply` yields changes in order; the state writer turns each into a key and a
//! value, watchers into items. A change shares its record with the tables (an `Arc`), and is encoded only when
//! [`Change::value`] is called, which is the writer's work, not `apply`'s.

use std::sync::Arc;

use nave_proto::ids::{HostId, InstanceId};
use nave_proto::pb;

/// The key of a row.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum RowId {
    Cluster,
    Service(String),
    Version(String, u64),
    Host(HostId),
    Instance(InstanceId),
    Event(u64, u32),
    Token(String),
    Dedup(String),
    Session(HostId),
}

/// A row as it is now, or the id of one that is no more.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    Cluster(Arc<pb::ClusterRecord>),
    Service(Arc<pb::ServiceRecord>),
    Version(Arc<pb::VersionRecord>),
    Host(Arc<pb::HostRecord>),
    Instance(Arc<pb::InstanceRecord>),
    Event(Arc<pb::EventRecord>),
    Token(Arc<pb::TokenRecord>),
    Dedup(Arc<pb::DedupRecord>),
    Session(Arc<pb::SessionRecord>),
    Deleted(RowId),
}

// The first byte of a key and the field number in `pb::Row` are one number, for ever.
const CLUSTER: u8 = 1;
const SERVICE: u8 = 2;
const VERSION: u8 = 3;
const HOST: u8 = 4;
const INSTANCE: u8 = 5;
const EVENT: u8 = 6;
const TOKEN: u8 = 7;
const DEDUP: u8 = 8;
const SESSION: u8 = 9;

impl RowId {
    fn tag(&self) -> u8 {
        match self {
            RowId::Cluster => CLUSTER,
            RowId::Service(_) => SERVICE,
            RowId::Version(..) => VERSION,
            RowId::Host(_) => HOST,
            RowId::Instance(_) => INSTANCE,
            RowId::Event(..) => EVENT,
            RowId::Token(_) => TOKEN,
            RowId::Dedup(_) => DEDUP,
            RowId::Session(_) => SESSION,
        }
    }

    /// Bytes that order as the ids do: a table's tag, then the key, numbers big-endian.
    pub fn key(&self) -> Vec<u8> {
        match self {
            RowId::Cluster => vec![CLUSTER],
            RowId::Service(name) => text_key(SERVICE, name),
            RowId::Version(name, version) => version_key(name, *version),
            RowId::Host(id) => number_key(HOST, id.0),
            RowId::Instance(id) => number_key(INSTANCE, id.0),
            RowId::Event(revision, index) => event_key(*revision, *index),
            RowId::Token(id) => text_key(TOKEN, id),
            RowId::Dedup(client) => text_key(DEDUP, client),
            RowId::Session(host) => number_key(SESSION, host.0),
        }
    }
}

impl Change {
    /// Which row changed.
    pub fn id(&self) -> RowId {
        match self {
            Change::Cluster(_) => RowId::Cluster,
            Change::Service(record) => RowId::Service(record.name.clone()),
            Change::Version(record) => RowId::Version(record.service.clone(), record.version),
            Change::Host(record) => RowId::Host(HostId(record.id)),
            Change::Instance(record) => RowId::Instance(InstanceId(record.id)),
            Change::Event(record) => RowId::Event(record.revision, record.index),
            Change::Token(record) => RowId::Token(record.id.clone()),
            Change::Dedup(record) => RowId::Dedup(record.client_id.clone()),
            Change::Session(record) => RowId::Session(HostId(record.host_id)),
            Change::Deleted(id) => id.clone(),
        }
    }

    /// The table that the row is in.
    fn tag(&self) -> u8 {
        match self {
            Change::Cluster(_) => CLUSTER,
            Change::Service(_) => SERVICE,
            Change::Version(_) => VERSION,
            Change::Host(_) => HOST,
            Change::Instance(_) => INSTANCE,
            Change::Event(_) => EVENT,
            Change::Token(_) => TOKEN,
            Change::Dedup(_) => DEDUP,
            Change::Session(_) => SESSION,
            Change::Deleted(id) => id.tag(),
        }
    }

    /// Whether two changes are of one row. Names are copied only when both are in one table.
    pub(crate) fn same_row(&self, other: &Self) -> bool {
        self.tag() == other.tag() && self.id() == other.id()
    }

    /// [`RowId::key`] of the row, made without copying its name first.
    pub fn key(&self) -> Vec<u8> {
        match self {
            Change::Cluster(_) => vec![CLUSTER],
            Change::Service(record) => text_key(SERVICE, &record.name),
            Change::Version(record) => version_key(&record.service, record.version),
            Change::Host(record) => number_key(HOST, record.id),
            Change::Instance(record) => number_key(INSTANCE, record.id),
            Change::Event(record) => event_key(record.revision, record.index),
            Change::Token(record) => text_key(TOKEN, &record.id),
            Change::Dedup(record) => text_key(DEDUP, &record.client_id),
            Change::Session(record) => number_key(SESSION, record.host_id),
            Change::Deleted(id) => id.key(),
        }
    }

    /// The encoded `pb::Row`; None: the row is deleted. Encodes each time it is called.
    pub fn value(&self) -> Option<Vec<u8>> {
        match self {
            Change::Cluster(record) => Some(encode(CLUSTER, record.as_ref())),
            Change::Service(record) => Some(encode(SERVICE, record.as_ref())),
            Change::Version(record) => Some(encode(VERSION, record.as_ref())),
            Change::Host(record) => Some(encode(HOST, record.as_ref())),
            Change::Instance(record) => Some(encode(INSTANCE, record.as_ref())),
            Change::Event(record) => Some(encode(EVENT, record.as_ref())),
            Change::Token(record) => Some(encode(TOKEN, record.as_ref())),
            Change::Dedup(record) => Some(encode(DEDUP, record.as_ref())),
            Change::Session(record) => Some(encode(SESSION, record.as_ref())),
            Change::Deleted(_) => None,
        }
    }

    /// The row as a message of its own (a deep copy); None: deleted.
    pub fn row(&self) -> Option<pb::Row> {
        use pb::row::Row;
        let row = match self {
            Change::Cluster(record) => Row::Cluster(record.as_ref().clone()),
            Change::Service(record) => Row::Service(record.as_ref().clone()),
            Change::Version(record) => Row::Version(record.as_ref().clone()),
            Change::Host(record) => Row::Host(record.as_ref().clone()),
            Change::Instance(record) => Row::Instance(record.as_ref().clone()),
            Change::Event(record) => Row::Event(record.as_ref().clone()),
            Change::Token(record) => Row::Token(record.as_ref().clone()),
            Change::Dedup(record) => Row::Dedup(record.as_ref().clone()),
            Change::Session(record) => Row::Session(**record),
            Change::Deleted(_) => return None,
        };
        Some(pb::Row { row: Some(row) })
    }
}

/// A `pb::Row` around the record, without building one (that would copy the record).
fn encode<M: prost::Message>(field: u8, record: &M) -> Vec<u8> {
    let field = u32::from(field);
    let mut bytes = Vec::with_capacity(prost::encoding::message::encoded_len(field, record));
    prost::encoding::message::encode(field, record, &mut bytes);
    bytes
}

fn text_key(tag: u8, text: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(1 + text.len());
    key.push(tag);
    key.extend_from_slice(text.as_bytes());
    key
}

fn number_key(tag: u8, number: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(9);
    key.push(tag);
    key.extend_from_slice(&number.to_be_bytes());
    key
}

/// A zero byte ends the name, so that `web` sorts before `web-2`; names have no zero byte.
fn version_key(name: &str, version: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(10 + name.len());
    key.push(VERSION);
    key.extend_from_slice(name.as_bytes());
    key.push(0);
    key.extend_from_slice(&version.to_be_bytes());
    key
}

fn event_key(revision: u64, index: u32) -> Vec<u8> {
    let mut key = Vec::with_capacity(13);
    key.push(EVENT);
    key.extend_from_slice(&revision.to_be_bytes());
    key.extend_from_slice(&index.to_be_bytes());
    key
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn samples() -> Vec<Change> {
        vec![
            Change::Cluster(Arc::new(pb::ClusterRecord { cluster_id: "c".into(), ..Default::default() })),
            Change::Service(Arc::new(pb::ServiceRecord {
                name: "web".into(),
                version: 3,
                ..Default::default()
            })),
            Change::Version(Arc::new(pb::VersionRecord {
                service: "web".into(),
                version: 300,
                ..Default::default()
            })),
            Change::Host(Arc::new(pb::HostRecord { id: 7, ..Default::default() })),
            Change::Instance(Arc::new(pb::InstanceRecord { id: 9, ..Default::default() })),
            Change::Event(Arc::new(pb::EventRecord { revision: 5, index: 1, ..Default::default() })),
            Change::Token(Arc::new(pb::TokenRecord { id: "t".into(), ..Default::default() })),
            Change::Dedup(Arc::new(pb::DedupRecord { client_id: "c".into(), ..Default::default() })),
            Change::Session(Arc::new(pb::SessionRecord { host_id: 7, session: 5, sequence: 2 })),
        ]
    }

    #[test]
    fn value_is_the_encoding_of_the_row() {
        for change in samples() {
            let value = change.value().unwrap();
            assert_eq!(value, change.row().unwrap().encode_to_vec());
            assert_eq!(pb::Row::decode(value.as_slice()).unwrap(), change.row().unwrap());
        }
    }

    #[test]
    fn key_is_the_key_of_the_id_also_when_deleted() {
        for change in samples() {
            assert_eq!(change.key(), change.id().key());
            let deleted = Change::Deleted(change.id());
            assert_eq!((deleted.key(), deleted.value()), (change.key(), None));
        }
    }

    #[test]
    fn keys_order_as_ids_do() {
        let version = |name: &str, version| RowId::Version(name.into(), version);
        let mut ids = vec![
            RowId::Instance(InstanceId(256)),
            RowId::Instance(InstanceId(255)),
            version("web-2", 1),
            version("web", 256),
            version("web", 2),
            RowId::Event(2, 0),
            RowId::Event(1, 300),
            RowId::Cluster,
            RowId::Host(HostId(1)),
        ];
        let mut by_key = ids.clone();
        by_key.sort_by_key(RowId::key);
        ids.sort();
        assert_eq!(by_key, ids);
    }
}
