//! What must outlive the agent: the last wanted set and, per instance, attempts, back-off and deadlines.
//!
//! One append-only file of records (`LedgerRecord` in the keeper's `frames`), synced once per turn of the main loop and
//! before the effects that the records guard. It is rewritten when most of it is old. A record that is damaged is left
//! out, and the next rewrite takes it off the disk: each of the others says all of what it is about.
//! Space is reserved ahead, so that a disk that others filled does not stop us from writing down a restart.
//! Only the main loop owns one. Exit records live in the keeper's file; this one only says how far we took them.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use nave_keeper::frames;
use nave_proto::pb;
use nave_proto::pb::ledger_record::Record;
use nix::fcntl::{FallocateFlags, fallocate};
use tracing::{debug, warn};

use crate::data_dir::sync_folder;

const MAGIC: &[u8; 8] = b"navelgr1";
/// Longer than any record we write (a wanted set of a thousand instances with 64 KiB manifests), short enough
/// that a damaged length cannot make us allocate the machine away.
const FRAME_BYTES_MAX: usize = 80 * 1024 * 1024;
/// Reserved ahead of the end: some thousand instance records, hours of crash loops.
const RESERVE_BYTES: u64 = 1024 * 1024;
/// Not worth a rewrite below this.
const COMPACT_BYTES_MIN: u64 = 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("{path} is not an agent ledger (wrong first bytes); move it away to start this host afresh")]
    Strange { path: String },
    #[error("cannot {action} the agent ledger {path}")]
    Io { path: String, action: &'static str, source: std::io::Error },
}

#[derive(Debug)]
pub(crate) struct Ledger {
    path: PathBuf,
    file: File,
    /// End of the last whole frame.
    len: u64,
    reserved: u64,
    /// Length right after the last rewrite.
    compacted_len: u64,
    /// Something in it is damaged.
    is_damaged: bool,
}

/// What a file held when it was opened.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) ledger: Ledger,
    pub(crate) records: Vec<pb::LedgerRecord>,
    /// Torn or damaged; a person is to hear of it, and the ledger is to be rewritten.
    pub(crate) lost_bytes: u64,
}

impl Ledger {
    /// Opens or makes it, reads all whole records and cuts off what follows the last one.
    pub(crate) fn open(path: &Path) -> Result<Opened, LedgerError> {
        let io = |action| move |source| LedgerError::Io { path: path.display().to_string(), action, source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(io("open"))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io("read"))?;
        if bytes.len() < MAGIC.len() && MAGIC.starts_with(&bytes) {
            // New, or we died while making it.
            file.set_len(0).map_err(io("write"))?;
            file.seek(SeekFrom::Start(0)).map_err(io("write"))?;
            file.write_all(MAGIC).map_err(io("write"))?;
            file.sync_all().map_err(io("sync"))?;
            sync_folder(path).map_err(io("sync"))?;
            bytes = MAGIC.to_vec();
        }
        if !bytes.starts_with(MAGIC) {
            return Err(LedgerError::Strange { path: path.display().to_string() });
        }
        let frames::Read { records, end, lost_bytes } = read_records(&bytes);
        let whole = MAGIC.len() + end;
        if whole < bytes.len() {
            file.set_len(to_u64(whole)).map_err(io("truncate"))?;
            file.sync_all().map_err(io("sync"))?;
        }
        file.seek(SeekFrom::Start(to_u64(whole))).map_err(io("seek in"))?;
        let mut ledger = Self {
            path: path.to_owned(),
            file,
            len: to_u64(whole),
            reserved: 0,
            compacted_len: to_u64(whole),
            is_damaged: lost_bytes > 0,
        };
        ledger.reserve();
        Ok(Opened { ledger, records, lost_bytes })
    }

    /// Reads what is whole and changes nothing; none when there is no file.
    pub(crate) fn read(path: &Path) -> Result<Vec<pb::LedgerRecord>, LedgerError> {
        let shown = || path.display().to_string();
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(LedgerError::Io { path: shown(), action: "read", source }),
        };
        if !bytes.starts_with(MAGIC) {
            return Err(LedgerError::Strange { path: shown() });
        }
        Ok(read_records(&bytes).records)
    }

    /// Writes and syncs all of `records`; they are durable once this returns. Blocks on the disk.
    /// After an error the agent must end: what a failed sync left on disk nobody can know.
    pub(crate) fn append(&mut self, records: Vec<Record>) -> Result<(), LedgerError> {
        if records.is_empty() {
            return Ok(());
        }
        let records: Vec<_> =
            records.into_iter().map(|record| pb::LedgerRecord { record: Some(record) }).collect();
        let bytes = frames::write(&records);
        self.file.write_all(&bytes).map_err(|e| self.io("write", e))?;
        self.file.sync_data().map_err(|e| self.io("sync", e))?;
        self.len += to_u64(bytes.len());
        if self.reserved < self.len + RESERVE_BYTES / 2 {
            self.reserve();
        }
        Ok(())
    }

    /// Whether it should be rewritten: most of the file is old, or some of it damaged.
    pub(crate) fn wants_rewrite(&self) -> bool {
        self.is_damaged || self.len > COMPACT_BYTES_MIN && self.len > self.compacted_len.saturating_mul(4)
    }

    /// Puts a new file with `records`, which say all that is true now, in the old one's place. A full disk only
    /// postpones it.
    pub(crate) fn rewrite(&mut self, records: &[pb::LedgerRecord]) -> Result<(), LedgerError> {
        let new_path = self.path.with_extension("new");
        match write_whole(&new_path, records) {
            Ok((file, len)) => {
                std::fs::rename(&new_path, &self.path).map_err(|e| self.io("replace", e))?;
                sync_folder(&self.path).map_err(|e| self.io("sync", e))?;
                debug!(from_bytes = self.len, to_bytes = len, "agent ledger rewritten");
                self.file = file;
                self.len = len;
                self.reserved = 0;
                self.reserve();
            }
            Err(error) => {
                warn!(%error, "the agent ledger could not be rewritten; it grows on");
                // The reason to go on is that the old file is whole; the leftover is overwritten next time.
                let _gone = std::fs::remove_file(&new_path);
            }
        }
        self.compacted_len = self.len;
        self.is_damaged = false;
        Ok(())
    }

    /// Best effort: file systems without it simply have no reserve.
    fn reserve(&mut self) {
        let (Ok(offset), Ok(length)) = (i64::try_from(self.len), i64::try_from(RESERVE_BYTES)) else {
            return;
        };
        if fallocate(&self.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, length).is_ok() {
            self.reserved = self.len + RESERVE_BYTES;
        }
    }

    fn io(&self, action: &'static str, source: std::io::Error) -> LedgerError {
        LedgerError::Io { path: self.path.display().to_string(), action, source }
    }
}

fn write_whole(path: &Path, records: &[pb::LedgerRecord]) -> std::io::Result<(File, u64)> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(frames::write(records));
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    Ok((file, to_u64(bytes.len())))
}

/// `bytes` begin with the magic.
fn read_records(bytes: &[u8]) -> frames::Read<pb::LedgerRecord> {
    frames::read(&bytes[MAGIC.len()..], FRAME_BYTES_MAX)
}

fn to_u64(length: usize) -> u64 {
    u64::try_from(length).expect("usize fits u64 on every Linux")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(id: u64, attempt: u32) -> Record {
        Record::Instance(pb::InstanceLedger { instance_id: id, attempt, ..Default::default() })
    }

    fn read(path: &Path) -> Vec<Record> {
        Ledger::open(path).unwrap().records.into_iter().filter_map(|record| record.record).collect()
    }

    #[test]
    fn what_was_appended_is_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let Opened { mut ledger, records, .. } = Ledger::open(&path).unwrap();
        assert_eq!(records, []);
        let wanted = Record::Wanted(pb::WantedSet { incarnation: 1, generation: 5, instances: Vec::new() });
        ledger.append(vec![wanted.clone(), instance(1, 1)]).unwrap();
        ledger.append(vec![Record::Forgotten(1)]).unwrap();
        assert_eq!(read(&path), [wanted, instance(1, 1), Record::Forgotten(1)]);
    }

    /// Power is lost in the middle of a write: whatever length is left, all records before are read, and what
    /// is appended afterwards is read as well.
    #[test]
    fn a_tail_torn_anywhere_costs_only_the_last_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let mut ledger = Ledger::open(&path).unwrap().ledger;
        ledger.append(vec![instance(1, 7)]).unwrap();
        let whole = std::fs::metadata(&path).unwrap().len();
        ledger.append(vec![instance(1, 8)]).unwrap();
        drop(ledger);
        let bytes = std::fs::read(&path).unwrap();
        for cut in usize::try_from(whole).unwrap()..bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let Opened { mut ledger, lost_bytes, .. } = Ledger::open(&path).unwrap();
            assert_eq!(lost_bytes, to_u64(cut) - whole, "told, for a person to hear of");
            ledger.append(vec![instance(2, 1)]).unwrap();
            drop(ledger);
            assert_eq!(read(&path), [instance(1, 7), instance(2, 1)], "cut at {cut}");
        }
    }

    #[test]
    fn a_flipped_bit_is_noticed_and_what_came_before_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let mut ledger = Ledger::open(&path).unwrap().ledger;
        ledger.append(vec![instance(1, 7), instance(1, 8)]).unwrap();
        drop(ledger);
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read(&path), [instance(1, 7)]);
    }

    #[test]
    fn what_is_whole_behind_damage_is_used_and_a_rewrite_takes_the_damage_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let mut ledger = Ledger::open(&path).unwrap().ledger;
        ledger.append(vec![instance(1, 7)]).unwrap();
        let first = usize::try_from(std::fs::metadata(&path).unwrap().len()).unwrap();
        ledger.append(vec![instance(2, 8)]).unwrap();
        let second = usize::try_from(std::fs::metadata(&path).unwrap().len()).unwrap();
        ledger.append(vec![instance(1, 9)]).unwrap();
        drop(ledger);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[first + frames::HEADER_BYTES] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let Opened { mut ledger, lost_bytes, records } = Ledger::open(&path).unwrap();
        assert_eq!(lost_bytes, to_u64(second - first));
        ledger.append(vec![instance(3, 6)]).unwrap();
        assert_eq!(
            read(&path),
            [instance(1, 7), instance(1, 9), instance(3, 6)],
            "the damage is passed over"
        );
        assert!(ledger.wants_rewrite());
        ledger.rewrite(&records).unwrap();
        assert!(!ledger.wants_rewrite());
        ledger.append(vec![instance(3, 6)]).unwrap();
        drop(ledger);
        assert_eq!(read(&path), [instance(1, 7), instance(1, 9), instance(3, 6)]);
        assert_eq!(Ledger::open(&path).unwrap().lost_bytes, 0);
    }

    #[test]
    fn somebody_elses_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        std::fs::write(&path, "#!/bin/sh\necho hello\n").unwrap();
        assert!(matches!(Ledger::open(&path), Err(LedgerError::Strange { .. })));
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("#!/bin/sh"));
    }

    #[test]
    fn the_file_stays_bounded_however_often_things_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let mut ledger = Ledger::open(&path).unwrap().ledger;
        let reason = "x".repeat(64 * 1024);
        for attempt in 0..128 {
            let record =
                pb::InstanceLedger { instance_id: 1, attempt, reason: reason.clone(), ..Default::default() };
            ledger.append(vec![Record::Instance(record.clone())]).unwrap();
            if ledger.wants_rewrite() {
                ledger.rewrite(&[pb::LedgerRecord { record: Some(Record::Instance(record)) }]).unwrap();
            }
        }
        assert!(std::fs::metadata(&path).unwrap().len() < 2 * COMPACT_BYTES_MIN);
        drop(ledger);
        let last = read(&path).pop();
        assert!(matches!(last, Some(Record::Instance(last)) if last.attempt == 127));
    }
}
