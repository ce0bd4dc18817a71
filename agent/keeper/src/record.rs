//! A file of records that survives being cut or damaged anywhere (`frames`).
//!
//! Exit records and the ledger both live in one. What is not whole is left out and its size told, so that the undamaged
//! rest is used. Some room is reserved ahead, so that a full disk does not at once keep the keeper from noting what it
//! does.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use prost::Message;

use crate::frames;

/// Reserved beyond the end when the file is made: some hundreds of records.
const RESERVED_BYTES: i64 = 128 * 1024;
/// A length beyond this is damage: no record holds more than one frame.
const RECORD_BYTES_MAX: usize = crate::frame::FRAME_BYTES_MAX;

/// An open file of records, positioned at its end.
#[derive(Debug)]
pub(crate) struct RecordFile {
    path: PathBuf,
    file: File,
    length: u64,
}

/// What a file held when it was opened.
#[derive(Debug)]
pub(crate) struct Loaded<M> {
    pub(crate) records: Vec<M>,
    /// Bytes that were no whole record.
    pub(crate) lost_bytes: u64,
}

impl RecordFile {
    /// Opens or makes the file and reads what is whole in it. What is not is cut off at its end, and left where it is
    /// between whole records until the next [`RecordFile::replace`].
    ///
    /// # Errors
    /// When it cannot be opened, read or cut.
    pub(crate) fn open<M: Message + Default>(path: &Path) -> io::Result<(Self, Loaded<M>)> {
        let mut file = options().read(true).append(true).create(true).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let frames::Read { records, end, lost_bytes } = frames::read(&bytes, RECORD_BYTES_MAX);
        if end < bytes.len() {
            file.set_len(end as u64)?;
        }
        reserve(&file);
        Ok((Self { path: path.to_path_buf(), file, length: end as u64 }, Loaded { records, lost_bytes }))
    }

    /// Reads what is whole in a file and changes nothing; none when there is no file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn read<M: Message + Default>(path: &Path) -> io::Result<Vec<M>> {
        match std::fs::read(path) {
            Ok(bytes) => Ok(frames::read(&bytes, RECORD_BYTES_MAX).records),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Bytes in the file.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Appends records in one write. When that fails, the file is as before.
    ///
    /// # Errors
    /// As write, mostly `StorageFull`.
    pub(crate) fn append<M: Message>(&mut self, records: &[M]) -> io::Result<()> {
        let bytes = frames::write(records);
        if let Err(error) = self.file.write_all(&bytes) {
            // A part of it may be there; without this a later record would follow a torn one and be lost with it.
            self.file.set_len(self.length)?;
            return Err(error);
        }
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Makes what was appended survive a loss of power.
    ///
    /// # Errors
    /// As fdatasync.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Replaces the whole content, or nothing of it: written beside, synced, renamed over.
    ///
    /// # Errors
    /// As the calls; the old content stands then.
    pub(crate) fn replace<M: Message>(&mut self, records: &[M]) -> io::Result<()> {
        let beside = self.path.with_extension("new");
        let mut file = options().read(true).append(true).create(true).open(&beside)?;
        file.set_len(0)?;
        let bytes = frames::write(records);
        file.write_all(&bytes)?;
        file.sync_data()?;
        std::fs::rename(&beside, &self.path)?;
        if let Some(parent) = self.path.parent() {
            File::open(parent)?.sync_all()?;
        }
        reserve(&file);
        self.file = file;
        self.length = bytes.len() as u64;
        Ok(())
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
    options
}

/// Best effort: some file systems cannot.
fn reserve(file: &File) {
    let _ = fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, RESERVED_BYTES);
}

#[cfg(test)]
mod tests {
    use super::*;
    use nave_proto::pb;

    fn exit(sequence: u64) -> pb::ExitRecord {
        pb::ExitRecord { sequence, message: "x".repeat(20), ..Default::default() }
    }

    #[test]
    fn a_cut_anywhere_keeps_all_whole_records() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exits");
        let (mut file, _) = RecordFile::open::<pb::ExitRecord>(&path).unwrap();
        file.append(&[exit(1), exit(2)]).unwrap();
        let two = file.length();
        file.append(&[exit(3)]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, file.length(), "reserved room is not part of the content");
        for cut in usize::try_from(two).unwrap()..bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let (mut file, loaded) = RecordFile::open::<pb::ExitRecord>(&path).unwrap();
            assert_eq!(loaded.records, [exit(1), exit(2)], "cut at {cut}");
            assert_eq!(loaded.lost_bytes, cut as u64 - two);
            file.append(&[exit(4)]).unwrap();
            let (_, loaded) = RecordFile::open::<pb::ExitRecord>(&path).unwrap();
            assert_eq!(loaded.records, [exit(1), exit(2), exit(4)]);
        }
    }

    #[test]
    fn what_is_damaged_between_whole_records_stays_out_until_the_file_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exits");
        let (mut file, _) = RecordFile::open::<pb::ExitRecord>(&path).unwrap();
        file.append(&[exit(1)]).unwrap();
        let one = file.length();
        file.append(&[exit(2)]).unwrap();
        let size = file.length() - one;
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[12] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let (mut file, _) = RecordFile::open::<pb::ExitRecord>(&path).unwrap();
        file.append(&[exit(3)]).unwrap();
        let (mut file, loaded) = RecordFile::open::<pb::ExitRecord>(&path).unwrap();
        assert_eq!((&loaded.records[..], loaded.lost_bytes), (&[exit(2), exit(3)][..], one));
        file.replace(&loaded.records).unwrap();
        let (file, loaded) = RecordFile::open::<pb::ExitRecord>(&path).unwrap();
        assert_eq!((loaded.lost_bytes, file.length()), (0, 2 * size));
    }

    #[test]
    fn replace_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exits");
        let (mut file, _) = RecordFile::open::<pb::ExitRecord>(&path).unwrap();
        file.append(&[exit(1), exit(2)]).unwrap();
        file.replace(&[exit(2)]).unwrap();
        file.append(&[exit(3)]).unwrap();
        let (_, loaded) = RecordFile::open::<pb::ExitRecord>(&path).unwrap();
        assert_eq!(loaded.records, [exit(2), exit(3)]);
    }
}
