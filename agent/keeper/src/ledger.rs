//! What this keeper runs, in `<data_dir>/keeper.ledger`, so that the next one can adopt it.
//!
//! A spawn is noted before its program is let go, so that no process of ours runs unnoted. Records are not synced:
//! they must outlive the keeper, not the machine, after whose restart no process is left. Environment and arguments
//! are left out, which keeps the file small and secrets off the disk.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use nave_proto::pb;
use pb::keeper_ledger_record::Record;

use crate::record::RecordFile;

/// Written anew once it is this long and at least twice as long as after the last time.
const COMPACT_BYTES: u64 = 64 * 1024;

/// Names all processes of one instance on this host under one placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) instance_id: u64,
    pub(crate) epoch: u64,
}

/// All that a ledger says about one [`Key`].
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Noted {
    pub(crate) started: pb::KeptSpawn,
    /// The last attempt has ended.
    pub(crate) exited: bool,
    /// The cause that its exit record shall say.
    pub(crate) signalled: Option<pb::Signal>,
    pub(crate) deadline: Option<pb::SetDeadline>,
}

/// The whole content of a ledger.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Content {
    pub(crate) kept: BTreeMap<Key, Noted>,
    pub(crate) acknowledged_sequence: u64,
    pub(crate) agent: Option<pb::ProcessIdentity>,
}

/// The open ledger.
#[derive(Debug)]
pub(crate) struct Ledger {
    file: RecordFile,
    content: Content,
    compacted_length: u64,
    /// The file lacks something that the content has: write it anew.
    behind: bool,
}

impl Ledger {
    /// Reads the file; also returns how many bytes of it were torn or damaged. It is written anew then, without them.
    ///
    /// # Errors
    /// When the file cannot be opened or read.
    pub(crate) fn open(path: &Path) -> io::Result<(Self, u64)> {
        let (file, loaded) = RecordFile::open::<pb::KeeperLedgerRecord>(path)?;
        let mut content = Content::default();
        for record in loaded.records.into_iter().filter_map(|record| record.record) {
            content.take(record);
        }
        let compacted_length = file.length();
        let lost_bytes = loaded.lost_bytes;
        let mut ledger = Self { file, content, compacted_length, behind: lost_bytes > 0 };
        ledger.catch_up();
        Ok((ledger, lost_bytes))
    }

    /// What is on the disk, as far as it is whole.
    fn read(path: &Path) -> io::Result<Content> {
        let mut content = Content::default();
        let records = RecordFile::read::<pb::KeeperLedgerRecord>(path)?;
        for record in records.into_iter().filter_map(|record| record.record) {
            content.take(record);
        }
        Ok(content)
    }

    pub(crate) fn content(&self) -> &Content {
        &self.content
    }

    /// Notes one thing. A disk that refuses is said once and made good by [`Ledger::catch_up`]: the cgroup still
    /// tells what runs, and services must go on starting.
    pub(crate) fn note(&mut self, mut record: Record) {
        if let Record::Started(pb::KeptSpawn { spawn: Some(spawn), .. }) = &mut record {
            strip(spawn);
        }
        self.content.take(record.clone());
        if self.behind {
            return;
        }
        if let Err(error) = self.file.append(&[pb::KeeperLedgerRecord { record: Some(record) }]) {
            crate::say!("the keeper's ledger cannot be written, will go on trying: {error}");
            self.behind = true;
        } else if self.file.length() > COMPACT_BYTES.max(2 * self.compacted_length) {
            self.behind = true;
            self.catch_up();
        }
    }

    /// Whether [`Ledger::catch_up`] has something to do.
    pub(crate) fn behind(&self) -> bool {
        self.behind
    }

    /// Writes the whole content anew, if the file lacks something.
    pub(crate) fn catch_up(&mut self) {
        if self.behind && self.file.replace(&self.content.records()).is_ok() {
            self.behind = false;
            self.compacted_length = self.file.length();
        }
    }
}

/// How many the ledger of a data directory says run; exit records are read as well.
///
/// # Errors
/// When either file cannot be read.
pub(crate) fn running(data_dir: &Path) -> io::Result<usize> {
    let content = Ledger::read(&data_dir.join("keeper.ledger"))?;
    RecordFile::read::<pb::ExitRecord>(&data_dir.join("exits"))?;
    Ok(content.kept.values().filter(|noted| !noted.exited).count())
}

impl Content {
    fn take(&mut self, record: Record) {
        match record {
            Record::Started(started) => {
                let Some(spawn) = &started.spawn else { return };
                let key = Key { instance_id: spawn.instance_id, epoch: spawn.epoch };
                let before = self.kept.remove(&key).and_then(|before| before.deadline);
                let deadline = spawn.deadline.or(before);
                self.kept.insert(key, Noted { started, deadline, ..Noted::default() });
            }
            Record::Exited(exit) => {
                let key = Key { instance_id: exit.instance_id, epoch: exit.epoch };
                if let Some(noted) = self.kept.get_mut(&key)
                    && noted.started.spawn.as_ref().is_some_and(|spawn| spawn.attempt == exit.attempt)
                {
                    noted.exited = true;
                }
            }
            Record::AcknowledgedSequence(sequence) => {
                self.acknowledged_sequence = self.acknowledged_sequence.max(sequence);
            }
            Record::Forgotten(forget) => {
                self.kept.remove(&Key { instance_id: forget.instance_id, epoch: forget.epoch });
            }
            Record::Deadline(deadline) => {
                let key = Key { instance_id: deadline.instance_id, epoch: deadline.epoch };
                if let Some(noted) = self.kept.get_mut(&key) {
                    noted.deadline = (deadline.boottime_ns != 0).then_some(deadline);
                }
            }
            Record::Agent(agent) => self.agent = Some(agent),
            Record::OomTold(told) => {
                let key = Key { instance_id: told.instance_id, epoch: told.epoch };
                if let Some(noted) = self.kept.get_mut(&key)
                    && noted.started.spawn.as_ref().is_some_and(|spawn| spawn.attempt == told.attempt)
                {
                    noted.started.oom_kills = told.oom_kills;
                }
            }
            Record::Signalled(signal) => {
                let key = Key { instance_id: signal.instance_id, epoch: signal.epoch };
                if let Some(noted) = self.kept.get_mut(&key) {
                    noted.signalled = Some(signal);
                }
            }
        }
    }

    /// The shortest file that says the same.
    fn records(&self) -> Vec<pb::KeeperLedgerRecord> {
        let mut records = vec![Record::AcknowledgedSequence(self.acknowledged_sequence)];
        records.extend(self.agent.clone().map(Record::Agent));
        for (key, noted) in &self.kept {
            records.push(Record::Started(noted.started.clone()));
            records.extend(noted.signalled.map(Record::Signalled));
            records.extend(noted.deadline.map(Record::Deadline));
            if noted.exited {
                records.push(Record::Exited(pb::ExitRecord {
                    instance_id: key.instance_id,
                    epoch: key.epoch,
                    attempt: noted.started.spawn.as_ref().map_or(0, |spawn| spawn.attempt),
                    ..Default::default()
                }));
            }
        }
        records.into_iter().map(|record| pb::KeeperLedgerRecord { record: Some(record) }).collect()
    }
}

/// What only the stub needs.
pub(crate) fn strip(spawn: &mut pb::Spawn) {
    spawn.argv = Vec::new();
    spawn.env = Vec::new();
    spawn.cgroup_files = Vec::new();
    spawn.rlimits = Vec::new();
    spawn.groups = Vec::new();
    spawn.working_dir = String::new();
    spawn.sandbox = None;
    spawn.notify_fifo = String::new();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(instance_id: u64, attempt: u32) -> Record {
        Record::Started(pb::KeptSpawn {
            spawn: Some(pb::Spawn {
                instance_id,
                epoch: 1,
                attempt,
                service: "web".to_owned(),
                env: vec!["SECRET=x".to_owned()],
                ..Default::default()
            }),
            process: Some(pb::ProcessIdentity { pid: 100 + attempt, ..Default::default() }),
            started_unix_ns: 1,
            oom_kills: 1,
        })
    }

    fn exited(instance_id: u64, attempt: u32) -> Record {
        Record::Exited(pb::ExitRecord { instance_id, epoch: 1, attempt, ..Default::default() })
    }

    fn deadline(boottime_ns: i64) -> Record {
        Record::Deadline(pb::SetDeadline { instance_id: 1, epoch: 1, boottime_ns, ..Default::default() })
    }

    #[test]
    fn the_next_keeper_reads_what_was_noted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keeper.ledger");
        let (mut ledger, _) = Ledger::open(&path).unwrap();
        for record in [started(1, 1), deadline(9), exited(1, 1), started(1, 2), exited(1, 1), started(2, 1)] {
            ledger.note(record);
        }
        ledger.note(Record::Forgotten(pb::Forget { instance_id: 2, epoch: 1, remove_logs: false }));
        ledger.note(Record::AcknowledgedSequence(4));
        let (mut next, lost_bytes) = Ledger::open(&path).unwrap();
        assert_eq!((next.content(), lost_bytes), (ledger.content(), 0));
        let noted = &next.content().kept[&Key { instance_id: 1, epoch: 1 }];
        assert!(!noted.exited, "attempt 2 has not ended; the exit was of attempt 1");
        assert_eq!(noted.deadline.map(|deadline| deadline.boottime_ns), Some(9), "outlives the attempt");
        let bytes = std::fs::read(&path).unwrap();
        assert!(!bytes.windows(6).any(|window| window == b"SECRET"), "no environment on the disk");
        next.note(deadline(0));
        assert_eq!(next.content().kept[&Key { instance_id: 1, epoch: 1 }].deadline, None);
    }

    #[test]
    fn kills_that_were_told_are_known_to_the_next_keeper_until_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let (mut ledger, _) = Ledger::open(&dir.path().join("keeper.ledger")).unwrap();
        let kills =
            |ledger: &Ledger| ledger.content().kept[&Key { instance_id: 1, epoch: 1 }].started.oom_kills;
        let told = |attempt, oom_kills| {
            Record::OomTold(pb::OomNoted { instance_id: 1, epoch: 1, attempt, oom_kills })
        };
        ledger.note(started(1, 2));
        ledger.note(told(1, 7));
        assert_eq!(kills(&ledger), 1, "of an attempt that is over");
        ledger.note(told(2, 7));
        let (mut next, _) = Ledger::open(&dir.path().join("keeper.ledger")).unwrap();
        assert_eq!(kills(&next), 7);
        next.note(started(1, 3));
        assert_eq!(kills(&next), 1);
    }

    #[test]
    fn it_stays_small_and_says_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keeper.ledger");
        let (mut ledger, _) = Ledger::open(&path).unwrap();
        ledger.note(started(1, 1));
        for beat in 1..=20_000 {
            ledger.note(deadline(beat));
        }
        assert!(std::fs::metadata(&path).unwrap().len() < 2 * COMPACT_BYTES);
        let (next, _) = Ledger::open(&path).unwrap();
        assert_eq!(next.content(), ledger.content());
    }
}
