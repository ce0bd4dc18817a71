//! The segment files of one instance: where they lie, in which order, and the whole lines in them.
//!
//! A place is (epoch, segment, byte). Segments are written in order and never again once a later one exists.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nave_proto::ids::InstanceId;

use super::join::JOINED_BYTES_MAX;
use super::line::Line;

/// Read at once; per open source, so that a host with a hundred instances needs 1.6 MiB to merge all.
pub(super) const CHUNK_BYTES: usize = 16 * 1024;
/// The keeper cuts lines far below this; what is longer is not a line but damage.
const LINE_BYTES_MAX: usize = 1024 * 1024;
/// Whether a place is in the midst of a line is looked for so far before it: the last part of each stream lies there,
/// unless the other stream has said more than this since.
const NEAR_BYTES: u64 = 64 * 1024;
/// The beginning of such a line is looked for so far before: the longest, and as much of the other stream between.
const FAR_BYTES: u64 = 2 * JOINED_BYTES_MAX as u64;

/// One segment file: epochs and numbers both rise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Segment {
    pub(super) epoch: u64,
    pub(super) number: u64,
}

/// A byte of a segment.
pub(super) type Place = (Segment, u64);

/// Where the output of one instance lies.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    service_dir: PathBuf,
    pub(super) instance: InstanceId,
}

impl Folder {
    pub(super) fn new(service_dir: &Path, instance: InstanceId) -> Self {
        Self { service_dir: service_dir.to_owned(), instance }
    }

    /// All that are there now, in order.
    pub(super) fn segments(&self) -> io::Result<Vec<Segment>> {
        let mut segments = Vec::new();
        for epoch in epochs(&self.service_dir, self.instance)? {
            for number in segment_numbers(&self.epoch_dir(epoch))? {
                segments.push(Segment { epoch, number });
            }
        }
        segments.sort_unstable();
        Ok(segments)
    }

    /// `None`: it has been removed.
    pub(super) fn open(&self, segment: Segment) -> io::Result<Option<File>> {
        match open_segment(&self.path(segment)) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The last segment that begins before the time: all that is wanted lies in it or after it.
    pub(super) fn place_of_time(&self, unix_ns: i64) -> io::Result<Option<Place>> {
        let begins_before = |segment: &&Segment| {
            let file = open_segment(&self.path(**segment)).ok();
            let chunk = file.and_then(|file| whole_lines(&file, 0).ok().flatten()).unwrap_or_default();
            let first = chunk.split(|byte| *byte == b'\n').find_map(Line::parse);
            first.is_some_and(|line| line.unix_ns < unix_ns)
        };
        Ok(self.segments()?.iter().rev().find(begins_before).map(|segment| (*segment, 0)))
    }

    /// Where to begin to read so that the lines that `place` is in the midst of are known from their beginning.
    pub(super) fn look_back(&self, place: Place) -> io::Result<Place> {
        let near = self.before(place, NEAR_BYTES)?;
        match self.is_within_a_line(near, place)? {
            true => self.before(place, FAR_BYTES),
            false => Ok(place),
        }
    }

    /// The beginning of a line so many bytes before, as far as the segments go back.
    fn before(&self, (mut segment, mut end): Place, mut bytes: u64) -> io::Result<Place> {
        while end < bytes {
            bytes -= end;
            let previous = Segment { number: segment.number.wrapping_sub(1), ..segment };
            let Some(file) = self.open(previous)? else { return Ok((segment, 0)) };
            (segment, end) = (previous, file.metadata()?.len());
        }
        let Some(file) = self.open(segment)? else { return Ok((segment, end)) };
        Ok((segment, line_at_or_after(&file, end - bytes)?))
    }

    /// Whether a stream's last record in this stretch is a part of a line that goes on.
    fn is_within_a_line(&self, (mut segment, mut offset): Place, to: Place) -> io::Result<bool> {
        let mut within = [false; 2];
        while (segment, offset) < to {
            let Some(file) = self.open(segment)? else { break };
            while (segment, offset) < to
                && let Some(chunk) = whole_lines(&file, offset)?
            {
                for record in chunk.split_inclusive(|byte| *byte == b'\n') {
                    offset += to_u64(record.len());
                    if (segment, offset) <= to
                        && let Some(line) = Line::parse(without_newline(record))
                    {
                        within[usize::from(line.stderr)] = line.partial;
                    }
                }
            }
            (segment.number, offset) = (segment.number + 1, 0);
        }
        Ok(within.contains(&true))
    }

    fn epoch_dir(&self, epoch: u64) -> PathBuf {
        self.service_dir.join(format!("{}-{epoch}", self.instance))
    }

    fn path(&self, segment: Segment) -> PathBuf {
        self.epoch_dir(segment.epoch).join(format!("{:010}.log", segment.number))
    }
}

/// The instances that have logs of a service here.
pub(super) fn instances(service_dir: &Path) -> io::Result<Vec<InstanceId>> {
    let mut found: Vec<InstanceId> = names(service_dir)?
        .iter()
        .filter_map(|name| parse_folder(name))
        .map(|(instance, _)| instance)
        .collect();
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

fn epochs(service_dir: &Path, instance: InstanceId) -> io::Result<Vec<u64>> {
    let folders = names(service_dir)?;
    let parsed = folders.iter().filter_map(|name| parse_folder(name));
    Ok(parsed.filter(|(other, _)| *other == instance).map(|(_, epoch)| epoch).collect())
}

fn segment_numbers(dir: &Path) -> io::Result<Vec<u64>> {
    Ok(names(dir)?.iter().filter_map(|name| name.strip_suffix(".log")?.parse().ok()).collect())
}

/// `i-42-3`: instance 42 in its third epoch.
pub(crate) fn parse_folder(name: &str) -> Option<(InstanceId, u64)> {
    let (instance, epoch) = name.rsplit_once('-')?;
    Some((instance.parse().ok()?, epoch.parse().ok()?))
}

fn names(dir: &Path) -> io::Result<Vec<String>> {
    match std::fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// Never through a link: should a service ever get to write here, it must not choose what we read.
fn open_segment(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)
}

/// All whole lines of the next chunk, newlines included. `None`: not one line is complete.
pub(super) fn whole_lines(file: &File, offset: u64) -> io::Result<Option<Vec<u8>>> {
    let mut size = CHUNK_BYTES;
    loop {
        let mut chunk = vec![0; size];
        let length = read_at(file, &mut chunk, offset)?;
        if let Some(end) = memchr::memrchr(b'\n', &chunk[..length]) {
            chunk.truncate(end + 1);
            return Ok(Some(chunk));
        }
        if length < size {
            return Ok(None);
        }
        if size >= LINE_BYTES_MAX {
            return Ok(Some(chunk)); // passed over: it parses as no line
        }
        size *= 4;
    }
}

/// The first beginning of a line from `offset` on.
fn line_at_or_after(file: &File, offset: u64) -> io::Result<u64> {
    let Some(before) = offset.checked_sub(1) else { return Ok(0) };
    let chunk = whole_lines(file, before)?.unwrap_or_default();
    Ok(memchr::memchr(b'\n', &chunk).map_or(offset, |newline| before + to_u64(newline) + 1))
}

pub(super) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read_at(&mut buffer[length..], offset + to_u64(length)) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(length)
}

pub(super) fn without_newline(record: &[u8]) -> &[u8] {
    record.strip_suffix(b"\n").unwrap_or(record)
}

pub(super) fn to_u64(length: usize) -> u64 {
    u64::try_from(length).expect("usize fits u64 on every Linux")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Segment = Segment { epoch: 1, number: 1 };
    const SECOND: Segment = Segment { epoch: 1, number: 2 };

    fn record(kind: &str, text: &str) -> String {
        format!("1970-01-01T00:00:01Z {kind} {text}\n")
    }

    fn folder(segments: &[&str]) -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("i-1-1")).unwrap();
        for (number, text) in (1..).zip(segments) {
            std::fs::write(dir.path().join(format!("i-1-1/{number:010}.log")), text).unwrap();
        }
        let folder = Folder::new(dir.path(), InstanceId(1));
        (dir, folder)
    }

    #[test]
    fn a_place_between_lines_is_where_to_begin() {
        let lines = record("stdout F", "one") + &record("stderr F", "two");
        let (_dir, folder) = folder(&[&lines]);
        for place in [(FIRST, 0), (FIRST, to_u64(lines.len())), (SECOND, 0)] {
            assert_eq!(folder.look_back(place).unwrap(), place);
        }
    }

    #[test]
    fn the_beginning_of_a_line_is_found_over_segments_and_the_other_stream() {
        let (part, other) = (record("stdout P", "one"), record("stderr F", "other"));
        let (_dir, folder) = folder(&[&part, &other]);
        assert_eq!(folder.look_back((SECOND, to_u64(other.len()))).unwrap(), (FIRST, 0));
        assert_eq!(folder.look_back((SECOND, 0)).unwrap(), (FIRST, 0));
    }

    #[test]
    fn one_looks_back_only_so_far_and_to_the_beginning_of_a_record() {
        let part = record("stdout P", &"x".repeat(15_000));
        let whole = part.repeat(200);
        let (_dir, folder) = folder(&[&whole]);
        let (segment, offset) = folder.look_back((FIRST, to_u64(whole.len()))).unwrap();
        assert_eq!((segment, offset % to_u64(part.len())), (FIRST, 0));
        let back = to_u64(whole.len()) - offset;
        assert!(back <= FAR_BYTES && back + to_u64(part.len()) > FAR_BYTES, "{back}");
    }
}
