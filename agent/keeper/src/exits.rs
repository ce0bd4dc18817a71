//! How each process ended, in `<data_dir>/exits`: written before it is told, synced right after, told until it is
//! acknowledged. A keeper that is killed loses nothing that was written. After a loss of power no process is left; all
//! that may be missing is how one ended in the last milliseconds before, and waiting for the disk would delay every
//! restart.
//!
//! A disk that is full or failing must not hide an exit from the agent, or nothing would be restarted: the record is
//! then told from memory and written when that works again. What is lost by that is only a record whose keeper dies
//! before the disk recovers.

use std::collections::VecDeque;
use std::io;
use std::path::Path;

use nave_proto::pb;

use crate::record::RecordFile;

/// Above this many bytes an all-acknowledged file is written anew.
const COMPACT_BYTES: u64 = 32 * 1024;

/// The exit records that nobody has acknowledged.
#[derive(Debug)]
pub(crate) struct Exits {
    file: RecordFile,
    /// By rising sequence.
    unacknowledged: VecDeque<pb::ExitRecord>,
    last: Option<pb::ExitRecord>,
    last_sequence: u64,
    /// Sequences above this are in memory only.
    durable_sequence: u64,
    /// Written since the last sync.
    unsynced: bool,
}

impl Exits {
    /// Reads the file; `acknowledged` is the highest sequence that the ledger knows as acknowledged. Also returns how
    /// many bytes of it were torn or damaged. What such a record said was perhaps told, so its sequence is not given out
    /// again.
    ///
    /// # Errors
    /// When the file cannot be opened or read.
    pub(crate) fn open(path: &Path, acknowledged: u64) -> io::Result<(Self, u64)> {
        let (mut file, loaded) = RecordFile::open::<pb::ExitRecord>(path)?;
        let mut last = loaded.records.last().cloned();
        let written = last.as_ref().map_or(0, |last| last.sequence);
        let unheard = |record: &pb::ExitRecord| record.sequence > acknowledged && !is_mark(record);
        let unacknowledged: VecDeque<_> = loaded.records.into_iter().filter(unheard).collect();
        // Each lost record took more than a byte.
        let last_sequence = written.max(acknowledged) + loaded.lost_bytes;
        if loaded.lost_bytes > 0 {
            let mark = pb::ExitRecord { sequence: last_sequence, ..Default::default() };
            let whole: Vec<_> = unacknowledged.iter().chain([&mark]).cloned().collect();
            if let Err(error) = file.replace(&whole) {
                crate::say!("exit records could not be written anew without what is damaged: {error}");
            }
            last = Some(mark);
        }
        let exits = Self {
            file,
            unacknowledged,
            last,
            last_sequence,
            durable_sequence: last_sequence,
            unsynced: false,
        };
        Ok((exits, loaded.lost_bytes))
    }

    /// Takes a record, gives it the next sequence and returns that. [`Exits::persist`] before it is told, [`Exits::sync`]
    /// after.
    pub(crate) fn add(&mut self, mut record: pb::ExitRecord) -> u64 {
        self.last_sequence += 1;
        record.sequence = self.last_sequence;
        self.unacknowledged.push_back(record);
        self.last_sequence
    }

    /// Writes all that is in memory only, in one write.
    ///
    /// # Errors
    /// When the disk refuses; call again later.
    pub(crate) fn persist(&mut self) -> io::Result<()> {
        let pending: Vec<_> = self.after(self.durable_sequence).cloned().collect();
        if pending.is_empty() {
            // Acknowledged from memory, before the disk would take it.
            self.durable_sequence = self.last_sequence;
            return Ok(());
        }
        self.file.append(&pending)?;
        self.durable_sequence = self.last_sequence;
        self.last = pending.into_iter().next_back();
        self.unsynced = true;
        Ok(())
    }

    /// Makes what was written survive a loss of power.
    ///
    /// # Errors
    /// As fdatasync. It is not tried again for the same records: that would not make them safer.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        match std::mem::take(&mut self.unsynced) {
            true => self.file.sync(),
            false => Ok(()),
        }
    }

    /// Whether [`Exits::persist`] has something to do.
    pub(crate) fn undurable(&self) -> bool {
        self.durable_sequence < self.last_sequence
    }

    /// Records with a higher sequence than this that are not acknowledged, oldest first.
    pub(crate) fn after(&self, sequence: u64) -> impl Iterator<Item = &pb::ExitRecord> {
        self.unacknowledged.iter().filter(move |record| record.sequence > sequence)
    }

    /// Whether an exit of this attempt still waits for its acknowledgement.
    pub(crate) fn holds(&self, instance_id: u64, epoch: u64, attempt: u32) -> bool {
        let name = (instance_id, epoch, attempt);
        self.unacknowledged.iter().any(|exit| (exit.instance_id, exit.epoch, exit.attempt) == name)
    }

    /// Forgets all records up to and with this sequence; a sequence not given out yet is brought down to the last.
    /// Returns what now counts as acknowledged.
    pub(crate) fn acknowledge(&mut self, up_to: u64) -> u64 {
        let up_to = up_to.min(self.last_sequence);
        while self.unacknowledged.front().is_some_and(|record| record.sequence <= up_to) {
            self.unacknowledged.pop_front();
        }
        if self.unacknowledged.is_empty() && self.file.length() > COMPACT_BYTES {
            // The newest stays, so that the file alone still says where the sequence is.
            let rest: Vec<_> = self.last.iter().cloned().collect();
            if let Err(error) = self.file.replace(&rest) {
                crate::say!("exit records could not be written anew, will try later: {error}");
            }
        }
        up_to
    }
}

/// It says only where the sequence is: no process has instance 0.
fn is_mark(record: &pb::ExitRecord) -> bool {
    record.instance_id == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(instance_id: u64) -> pb::ExitRecord {
        pb::ExitRecord { instance_id, epoch: 1, attempt: 1, ..Default::default() }
    }

    fn told(exits: &Exits) -> Vec<(u64, u64)> {
        exits.after(0).map(|exit| (exit.sequence, exit.instance_id)).collect()
    }

    #[test]
    fn sequences_rise_over_reopening_and_acknowledged_ones_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exits");
        let (mut exits, _) = Exits::open(&path, 0).unwrap();
        exits.add(exit(7));
        exits.add(exit(8));
        exits.persist().unwrap();
        assert_eq!(exits.acknowledge(1), 1);
        let (mut exits, _) = Exits::open(&path, 1).unwrap();
        assert_eq!(told(&exits), [(2, 8)]);
        assert_eq!(exits.add(exit(9)), 3);
        assert_eq!(exits.acknowledge(100), 3, "what was never given out cannot be acknowledged");
        let (mut exits, _) = Exits::open(&path, 3).unwrap();
        assert_eq!(exits.add(exit(10)), 4, "not persisted, but acknowledged: never given out again");
    }

    #[test]
    fn what_was_acknowledged_from_memory_need_not_be_written() {
        let dir = tempfile::tempdir().unwrap();
        let (mut exits, _) = Exits::open(&dir.path().join("exits"), 0).unwrap();
        let sequence = exits.add(exit(1));
        assert!(exits.undurable());
        exits.acknowledge(sequence);
        exits.persist().unwrap();
        assert!(!exits.undurable());
    }

    #[test]
    fn the_file_stays_small_and_keeps_the_sequence() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exits");
        let (mut exits, _) = Exits::open(&path, 0).unwrap();
        for instance in 1..=600 {
            let sequence = exits.add(pb::ExitRecord { message: "y".repeat(90), ..exit(instance) });
            exits.persist().unwrap();
            exits.acknowledge(sequence);
        }
        assert!(std::fs::metadata(&path).unwrap().len() < 2 * COMPACT_BYTES);
        let (mut exits, _) = Exits::open(&path, 0).unwrap();
        assert_eq!(exits.add(exit(1)), 601, "even when the ledger was lost");
    }
}
