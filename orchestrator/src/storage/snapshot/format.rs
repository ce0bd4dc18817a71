//! The bytes of a snapshot file, written and read as a stream: a snapshot is never in memory as a whole. The checksum is
//! compared when the last row has been read, so whoever uses rows on the way must be able to throw them away.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use nave_proto::{COMMAND_FORMAT, pb};
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use crate::clock;
use crate::raft::convert::{snapshot_meta_from_pb, snapshot_meta_to_pb};
use crate::raft::types::SnapshotMeta;

const MAGIC: &[u8; 8] = b"NAVESNAP";
/// Rises when a file of this layout can no longer be read by the builds before.
const FORMAT: u32 = 1;
const END: u32 = u32::MAX;
/// No key or row comes near this; a longer length is damage, and must not be allocated.
const FRAME_BYTES_MAX: u32 = 64 * 1024 * 1024;
const BUFFER_BYTES: usize = 256 * 1024;

pub(crate) struct SnapshotWriter {
    out: BufWriter<File>,
    hash: Sha256,
    rows: u64,
}

impl SnapshotWriter {
    pub(crate) fn create(path: &Path, meta: &SnapshotMeta) -> io::Result<Self> {
        let out = BufWriter::with_capacity(BUFFER_BYTES, File::create(path)?);
        let mut writer = Self { out, hash: Sha256::new(), rows: 0 };
        writer.bytes(MAGIC)?;
        writer.bytes(&FORMAT.to_be_bytes())?;
        let head = pb::SnapshotMeta {
            created_unix_ns: clock::unix_now_ns(),
            written_by: env!("CARGO_PKG_VERSION").to_owned(),
            command_format: COMMAND_FORMAT,
            ..snapshot_meta_to_pb(meta)
        };
        writer.frame(&head.encode_to_vec())?;
        Ok(writer)
    }

    pub(crate) fn row(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.rows += 1;
        self.frame(key)?;
        self.frame(value)
    }

    /// Writes the end and the checksum; the caller syncs (`SnapshotDirectory::publish`).
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.bytes(&END.to_be_bytes())?;
        self.bytes(&self.rows.to_be_bytes())?;
        let sum = self.hash.finalize_reset();
        self.out.write_all(&sum)?;
        self.out.flush()
    }

    fn frame(&mut self, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len())
            .ok()
            .filter(|length| *length <= FRAME_BYTES_MAX)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a row of more than 64 MiB"))?;
        self.bytes(&length.to_be_bytes())?;
        self.bytes(bytes)
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.out.write_all(bytes)
    }
}

pub(crate) struct SnapshotReader {
    input: BufReader<FileCursor>,
    hash: Sha256,
    meta: SnapshotMeta,
    head: pb::SnapshotMeta,
    rows: u64,
    ended: bool,
}

impl SnapshotReader {
    pub(super) fn new(file: Arc<File>) -> io::Result<Self> {
        let input = BufReader::with_capacity(BUFFER_BYTES, FileCursor { file, offset: 0 });
        let (meta, head) = (SnapshotMeta::default(), pb::SnapshotMeta::default());
        let mut reader = Self { input, hash: Sha256::new(), meta, head, rows: 0, ended: false };
        if &reader.array::<8>()? != MAGIC {
            return Err(damaged("not a snapshot"));
        }
        let format = u32::from_be_bytes(reader.array()?);
        if format != FORMAT {
            return Err(damaged(&format!("snapshot format {format}, this program knows {FORMAT}")));
        }
        let frame = reader.frame()?.ok_or_else(|| damaged("no head"))?;
        let meta = pb::SnapshotMeta::decode(frame.as_slice()).map_err(|e| damaged(&e.to_string()))?;
        reader.head = meta.clone();
        reader.meta = snapshot_meta_from_pb(meta).map_err(|e| damaged(&e.to_string()))?;
        Ok(reader)
    }

    pub(crate) fn meta(&self) -> &SnapshotMeta {
        &self.meta
    }

    /// What the file says of itself, and who wrote it.
    pub(crate) fn head(&self) -> &pb::SnapshotMeta {
        &self.head
    }

    /// The next key and row; `None` at the end, after the checksum was compared.
    pub(crate) fn next_row(&mut self) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
        if self.ended {
            return Ok(None);
        }
        let Some(key) = self.frame()? else {
            self.check_end()?;
            self.ended = true;
            return Ok(None);
        };
        let value = self.frame()?.ok_or_else(|| damaged("a key without its row"))?;
        self.rows += 1;
        Ok(Some((key, value)))
    }

    fn check_end(&mut self) -> io::Result<()> {
        let rows = u64::from_be_bytes(self.array()?);
        if rows != self.rows {
            return Err(damaged(&format!("{} rows instead of {rows}", self.rows)));
        }
        let expected = self.hash.finalize_reset();
        let mut found = [0; 32];
        self.input.read_exact(&mut found)?;
        if expected.as_slice() != found {
            return Err(damaged("checksum differs"));
        }
        if self.input.read(&mut [0])? != 0 {
            return Err(damaged("bytes after the end"));
        }
        Ok(())
    }

    /// `None`: the end mark.
    fn frame(&mut self) -> io::Result<Option<Vec<u8>>> {
        let length = u32::from_be_bytes(self.array()?);
        if length == END {
            return Ok(None);
        }
        if length > FRAME_BYTES_MAX {
            return Err(damaged("impossible length"));
        }
        // Grows with what is really there, so a wrong length costs no memory.
        let mut bytes = Vec::new();
        let read = self.input.by_ref().take(u64::from(length)).read_to_end(&mut bytes)?;
        if read as u64 != u64::from(length) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.hash.update(&bytes);
        Ok(Some(bytes))
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        self.hash.update(bytes);
        Ok(bytes)
    }
}

/// A position of its own in a file that several readers share.
struct FileCursor {
    file: Arc<File>,
    offset: u64,
}

impl Read for FileCursor {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("snapshot damaged: {what}"))
}
