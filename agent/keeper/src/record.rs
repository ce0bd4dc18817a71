//! A file of records that survives being cut anywhere: u32 little-endian length, u32 CRC-32 of the body, body.
//!
//! Exit records and the ledger both live in one. Reading stops at the first record that is not whole; what follows is
//! cut off and its size told, so that the undamaged rest is used. Some room is reserved ahead, so that a full disk
//! does not at once keep the keeper from noting what it does.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use prost::Message;

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
    /// Bytes at the end that were no whole record and have been cut off.
    pub(crate) torn_bytes: u64,
}

impl RecordFile {
    /// Opens or makes the file and reads what is whole in it.
    ///
    /// # Errors
    /// When it cannot be opened, read or cut.
    pub(crate) fn open<M: Message + Default>(path: &Path) -> io::Result<(Self, Loaded<M>)> {
        let mut file = options().read(true).append(true).create(true).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let (records, whole) = parse(&bytes);
        let torn_bytes = (bytes.len() - whole) as u64;
        if torn_bytes > 0 {
            file.set_len(whole as u64)?;
        }
        reserve(&file);
        let length = whole as u64;
        Ok((Self { path: path.to_path_buf(), file, length }, Loaded { records, torn_bytes }))
    }

    /// Reads what is whole in a file and changes nothing; none when there is no file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn read<M: Message + Default>(path: &Path) -> io::Result<Vec<M>> {
        match std::fs::read(path) {
            Ok(bytes) => Ok(parse(&bytes).0),
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
        let bytes = frame(records);
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
        let bytes = frame(records);
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

fn frame<M: Message>(records: &[M]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for record in records {
        let body = record.encode_to_vec();
        let length = u32::try_from(body.len()).expect("a record is built from at most one frame of 1 MiB");
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&crc32(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
    }
    bytes
}

/// The whole records from the start, and the bytes that they take.
fn parse<M: Message + Default>(bytes: &[u8]) -> (Vec<M>, usize) {
    let mut records = Vec::new();
    let mut whole = 0;
    while let Some((record, size)) = parse_one(&bytes[whole..]) {
        records.push(record);
        whole += size;
    }
    (records, whole)
}

fn parse_one<M: Message + Default>(bytes: &[u8]) -> Option<(M, usize)> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    let length =
        usize::try_from(u32::from_le_bytes(*length)).ok().filter(|length| *length <= RECORD_BYTES_MAX)?;
    let body = rest.get(..length)?;
    // Zeroes, as a crash can leave them, would be an empty record with a right sum.
    if length == 0 || crc32(body) != u32::from_le_bytes(*sum) {
        return None;
    }
    Some((M::decode(body).ok()?, 8 + length))
}

/// CRC-32 (IEEE), four bits at a time: a table of 64 bytes instead of a KiB.
fn crc32(bytes: &[u8]) -> u32 {
    const NIBBLES: [u32; 16] = {
        let mut table = [0; 16];
        let mut index = 0;
        while index < 16 {
            let mut value: u32 = index;
            let mut bit = 0;
            while bit < 4 {
                value = if value & 1 == 1 { (value >> 1) ^ 0xedb8_8320 } else { value >> 1 };
                bit += 1;
            }
            table[index as usize] = value;
            index += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |sum, byte| {
        let sum = sum ^ u32::from(*byte);
        let sum = (sum >> 4) ^ NIBBLES[(sum & 15) as usize];
        (sum >> 4) ^ NIBBLES[(sum & 15) as usize]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nave_proto::pb;

    fn exit(sequence: u64) -> pb::ExitRecord {
        pb::ExitRecord { sequence, message: "x".repeat(20), ..Default::default() }
    }

    #[test]
    fn crc_is_the_one_of_the_standard() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
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
            assert_eq!(loaded.torn_bytes, cut as u64 - two);
            file.append(&[exit(4)]).unwrap();
            let (_, loaded) = RecordFile::open::<pb::ExitRecord>(&path).unwrap();
            assert_eq!(loaded.records, [exit(1), exit(2), exit(4)]);
        }
    }

    #[test]
    fn a_flipped_bit_or_zeroes_end_the_reading() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exits");
        let (mut file, _) = RecordFile::open::<pb::ExitRecord>(&path).unwrap();
        file.append(&[exit(1), exit(2)]).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let (_, loaded) = RecordFile::open::<pb::ExitRecord>(&path).unwrap();
        assert_eq!(loaded.records, [exit(1)]);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend([0; 64]);
        std::fs::write(&path, &bytes).unwrap();
        let (_, loaded) = RecordFile::open::<pb::ExitRecord>(&path).unwrap();
        assert_eq!((loaded.records, loaded.torn_bytes), (vec![exit(1)], 64));
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
