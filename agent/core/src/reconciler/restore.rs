//! The reconciler from and to its ledger. The file is read to its end before anything is done; records of kinds a
//! newer build has written are skipped, since the wanted set comes again with the first session.

use std::collections::BTreeMap;

use nave_proto::ids::InstanceId;
use nave_proto::pb::{self, ledger_record::Record};

use super::Reconciler;
use crate::monotonic::Monotonic;
use crate::supervisor::{Supervisor, forgotten};

impl Reconciler {
    /// From the ledger, in the order in which it was written. The keeper's exits and list come next.
    #[must_use]
    pub fn restore(
        boot_id: &str,
        records: impl IntoIterator<Item = pb::LedgerRecord>,
        now: Monotonic,
    ) -> Self {
        let mut reconciler = Self::new(boot_id);
        let mut wanted = BTreeMap::new();
        // What was wanted before of those that are not any more.
        let mut before = BTreeMap::new();
        let mut ledgers: BTreeMap<InstanceId, pb::InstanceLedger> = BTreeMap::new();
        for record in records {
            match record.record {
                Some(Record::Wanted(set)) => {
                    (reconciler.incarnation, reconciler.generation) = (set.incarnation, set.generation);
                    reconciler.doubtful = false;
                    let named = set.instances.into_iter().map(|one| (InstanceId(one.instance_id), one));
                    before.extend(std::mem::replace(&mut wanted, named.collect()));
                }
                Some(Record::Delta(delta)) if reconciler.continues(&delta) => {
                    reconciler.generation = delta.to_generation;
                    let removed = delta.removed.iter().map(|id| InstanceId(*id));
                    before.extend(removed.filter_map(|id| wanted.remove_entry(&id)));
                    wanted.extend(delta.put.into_iter().map(|one| (InstanceId(one.instance_id), one)));
                }
                // A delta may continue what was lost, and cannot be followed either.
                Some(Record::Damaged(_)) => reconciler.doubtful = true,
                Some(Record::Delta(_)) | None => {}
                Some(Record::Instance(ledger)) => {
                    ledgers.insert(InstanceId(ledger.instance_id), ledger);
                }
                Some(Record::Forgotten(id)) => {
                    ledgers.remove(&InstanceId(id));
                    before.remove(&InstanceId(id));
                }
            }
        }
        for (instance, wanted) in wanted {
            let ledger = ledgers.remove(&instance);
            let supervisor = Supervisor::restore(wanted, ledger.as_ref(), boot_id, now);
            reconciler.supervisors.insert(supervisor);
        }
        // In the ledger but not wanted: its stop was under way.
        for (instance, ledger) in ledgers {
            let wanted = forgotten(instance, &ledger, before.remove(&instance));
            let supervisor = Supervisor::restore(wanted, Some(&ledger), boot_id, now);
            reconciler.supervisors.insert(supervisor.forgotten());
        }
        reconciler
    }

    /// The whole ledger as it should be now, to replace a file that has grown long.
    #[must_use]
    pub fn ledger_records(&self) -> Vec<pb::LedgerRecord> {
        let wanted = pb::WantedSet {
            incarnation: self.incarnation,
            generation: self.generation,
            instances: self
                .supervisors
                .values()
                .filter(|supervisor| !supervisor.is_forgotten())
                .map(|supervisor| supervisor.wanted().clone())
                .collect(),
        };
        let ledgers = self.supervisors.values().map(|supervisor| Record::Instance(supervisor.ledger()));
        let damaged = self.doubtful.then_some(Record::Damaged(true));
        std::iter::once(Record::Wanted(wanted))
            .chain(ledgers)
            .chain(damaged)
            .map(|record| pb::LedgerRecord { record: Some(record) })
            .collect()
    }
}
