//! Retries take effect once. A client numbers its writes; the newest replies of each client are kept in the log's
//! state, so that every member knows them, also one that leads since a second ago. Time is the command's, never a
//! clock's. A request too old to be remembered is refused as *forgotten*: its outcome is unknown, and saying so
//! beats doing it twice.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use nave_proto::pb;

use crate::change::{Change, RowId};
use crate::limits::{DEDUP_CLIENTS_MAX, DEDUP_EXPIRED_PER_COMMAND, DEDUP_IDLE_NS, DEDUP_REPLIES_MAX};

/// What is known of a request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Recall {
    /// It has not taken effect.
    New,
    /// It has, and this was the answer.
    Done(pb::Reply),
    /// It is older than what is kept of its client.
    Forgotten,
}

/// Clients and their newest replies.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct DedupTable {
    clients: BTreeMap<Arc<str>, Arc<pb::DedupRecord>>,
    /// The longest idle first.
    by_use: BTreeSet<(i64, Arc<str>)>,
}

impl DedupTable {
    pub(crate) fn recall(&self, request: &pb::RequestId) -> Recall {
        let Some(record) = self.clients.get(request.client_id.as_str()) else { return Recall::New };
        if let Some(kept) = record.replies.iter().find(|kept| kept.serial == request.serial) {
            return kept.reply.clone().map_or(Recall::Forgotten, Recall::Done);
        }
        let full = record.replies.len() >= DEDUP_REPLIES_MAX;
        match record.replies.first() {
            Some(oldest) if full && request.serial < oldest.serial => Recall::Forgotten,
            Some(_) | None => Recall::New,
        }
    }

    /// Keeps the reply to a request that was new, and forgets clients that have been idle for long.
    pub(crate) fn remember(&mut self, request: pb::RequestId, reply: &pb::Reply, now: i64) -> Vec<Change> {
        let entry = self.clients.entry(Arc::from(request.client_id.as_str()));
        let client = Arc::clone(entry.key());
        let record = entry.or_insert_with(|| {
            Arc::new(pb::DedupRecord { client_id: request.client_id, ..Default::default() })
        });
        self.by_use.remove(&(record.last_used_unix_ns, Arc::clone(&client)));
        self.by_use.insert((now, client));
        let fields = Arc::make_mut(record);
        if fields.replies.len() >= DEDUP_REPLIES_MAX {
            // What is new is newer than the oldest kept, else it would have been forgotten.
            fields.replies.remove(0);
        }
        let kept = pb::DedupReply { serial: request.serial, reply: Some(reply.clone()) };
        let at = fields.replies.partition_point(|other| other.serial < kept.serial);
        fields.replies.insert(at, kept);
        fields.last_used_unix_ns = now;
        let record = Arc::clone(record);
        let mut changes = vec![Change::Dedup(record)];
        changes.extend(self.expire(now));
        changes
    }

    fn expire(&mut self, now: i64) -> Vec<Change> {
        let mut forgotten = Vec::new();
        while let Some((last_used, client)) = self.by_use.first().cloned() {
            let idle = last_used < now.saturating_sub(DEDUP_IDLE_NS);
            let crowded = self.clients.len() > DEDUP_CLIENTS_MAX;
            if !crowded && (!idle || forgotten.len() >= DEDUP_EXPIRED_PER_COMMAND) {
                break;
            }
            self.forget(last_used, &client);
            forgotten.push(Change::Deleted(RowId::Dedup(client.to_string())));
        }
        forgotten
    }

    /// Puts a row as it is, as when reading rows.
    pub(crate) fn insert(&mut self, record: Arc<pb::DedupRecord>) {
        let client = Arc::from(record.client_id.as_str());
        self.by_use.insert((record.last_used_unix_ns, Arc::clone(&client)));
        self.clients.insert(client, record);
    }

    fn forget(&mut self, last_used: i64, client: &Arc<str>) {
        self.clients.remove(client);
        self.by_use.remove(&(last_used, Arc::clone(client)));
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<pb::DedupRecord>> + '_ {
        self.clients.values()
    }

    pub(crate) fn newest_use(&self) -> i64 {
        self.by_use.last().map_or(0, |(last_used, _)| *last_used)
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        if self.clients.len() > DEDUP_CLIENTS_MAX {
            return Err(format!("{} clients remembered", self.clients.len()));
        }
        for record in self.clients.values() {
            let rising = record.replies.windows(2).all(|pair| pair[0].serial < pair[1].serial);
            if !rising || record.replies.len() > DEDUP_REPLIES_MAX {
                return Err(format!("replies to client {:?} are out of order or too many", record.client_id));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::SECOND_NS;

    fn request(client: &str, serial: u64) -> pb::RequestId {
        pb::RequestId { client_id: client.into(), serial }
    }

    fn reply(revision: u64) -> pb::Reply {
        pb::Reply { revision, ..Default::default() }
    }

    #[test]
    fn a_retry_gets_the_first_answer() {
        let mut table = DedupTable::default();
        assert_eq!(table.recall(&request("a", 1)), Recall::New);
        table.remember(request("a", 1), &reply(10), 0);
        assert_eq!(table.recall(&request("a", 1)), Recall::Done(reply(10)));
        assert_eq!(table.recall(&request("b", 1)), Recall::New);
    }

    #[test]
    fn an_older_serial_is_new_until_replies_had_to_go() {
        let mut table = DedupTable::default();
        for serial in 2..=17 {
            assert_eq!(table.recall(&request("a", 1)), Recall::New, "before {serial}");
            table.remember(request("a", serial), &reply(serial), 0);
        }
        assert_eq!(table.recall(&request("a", 1)), Recall::Forgotten);
        table.remember(request("a", 18), &reply(18), 0);
        assert_eq!(table.recall(&request("a", 2)), Recall::Forgotten);
        assert_eq!(table.recall(&request("a", 3)), Recall::Done(reply(3)));
        table.check().unwrap();
    }

    #[test]
    fn serials_that_arrive_out_of_order_are_kept_in_order() {
        let mut table = DedupTable::default();
        for serial in [3, 1, 2] {
            assert_eq!(table.recall(&request("a", serial)), Recall::New);
            table.remember(request("a", serial), &reply(serial), 0);
        }
        table.check().unwrap();
    }

    #[test]
    fn idle_clients_are_forgotten_a_few_at_a_time() {
        let mut table = DedupTable::default();
        for client in 0..40 {
            table.remember(request(&format!("c{client:02}"), 1), &reply(1), client);
        }
        let changes = table.remember(request("new", 1), &reply(2), 601 * SECOND_NS);
        assert_eq!(changes.len(), 1 + DEDUP_EXPIRED_PER_COMMAND);
        assert_eq!(changes[1], Change::Deleted(RowId::Dedup("c00".into())));
        assert_eq!(table.recall(&request("c00", 1)), Recall::New);
        assert_ne!(table.recall(&request("c39", 1)), Recall::New);
    }

    #[test]
    fn the_table_is_bounded_and_the_longest_idle_goes() {
        let mut table = DedupTable::default();
        for client in 0..DEDUP_CLIENTS_MAX {
            table.remember(request(&format!("c{client:05}"), 1), &reply(1), 10);
        }
        table.remember(request("c00000", 2), &reply(2), 11);
        let changes = table.remember(request("one-more", 1), &reply(3), 12);
        assert_eq!(changes[1..], [Change::Deleted(RowId::Dedup("c00001".into()))]);
        table.check().unwrap();
    }
}
