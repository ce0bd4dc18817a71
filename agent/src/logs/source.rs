//! The segment files of one instance as one long text, over rotation and over its epochs on this host.
//!
//! A position is (epoch, segment, byte). Segments are written in order and never again once a later one exists,
//! so a reader at the end of one may go on to the next as soon as it sees it, after one more look at the old.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nave_proto::ids::InstanceId;
use nave_proto::pb;

use super::line::Line;
use super::selection::{Filter, Selection};

/// Read at once; per open source, so that a host with a hundred instances needs 1.6 MiB to merge all.
const CHUNK_BYTES: usize = 16 * 1024;
/// The keeper cuts lines far below this; what is longer is not a line but damage.
const LINE_BYTES_MAX: usize = 1024 * 1024;

/// One segment file: epochs and numbers both rise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Segment {
    pub(super) epoch: u64,
    pub(super) number: u64,
}

/// One instance's output, read forward.
#[derive(Debug)]
pub(super) struct Source {
    service_dir: PathBuf,
    service: String,
    host: String,
    pub(super) instance: InstanceId,
    filter: Filter,
    /// Where the next read begins; `None`: nothing was seen yet.
    at: Option<(Segment, u64)>,
    open: Option<(Segment, File)>,
    /// Parsed and not yet taken.
    pub(super) lines: VecDeque<pb::LogLine>,
}

impl Source {
    /// Begins where `selection` says: after what was read before, else at the last so many lines, at a time, or at the
    /// oldest line kept.
    pub(super) fn open(
        service_dir: &Path,
        host: &str,
        instance: InstanceId,
        selection: &Selection,
    ) -> io::Result<Self> {
        let mut source = Self {
            service_dir: service_dir.to_owned(),
            service: selection.service.clone(),
            host: host.to_owned(),
            instance,
            filter: selection.filter.clone(),
            at: None,
            open: None,
            lines: VecDeque::new(),
        };
        if let Some(read) = selection.resume.get(&instance) {
            source.filter.since_unix_ns = 0;
            source.at = Some(*read);
            return Ok(source);
        }
        let segments = source.segments()?;
        if selection.filter.since_unix_ns > 0 {
            source.at = source.position_of_time(&segments, selection.filter.since_unix_ns);
        }
        if selection.tail_lines > 0 {
            source.at = source.at.max(source.position_of_tail(&segments, selection.tail_lines)?);
        }
        Ok(source)
    }

    /// Reads on until there are lines or nothing more is written. `false`: at the end for now.
    pub(super) fn fill(&mut self) -> io::Result<bool> {
        while self.lines.is_empty() {
            if !self.advance()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// One chunk, or one step to the next segment.
    fn advance(&mut self) -> io::Result<bool> {
        let Some((segment, offset)) = self.at else {
            let first = self.segments()?.into_iter().next();
            self.at = first.map(|segment| (segment, 0));
            return Ok(first.is_some());
        };
        match self.read_chunk(segment, offset)? {
            true => Ok(true),
            false => self.leave(segment, offset),
        }
    }

    /// At the end of a segment: on to the next, if there is one.
    fn leave(&mut self, segment: Segment, offset: u64) -> io::Result<bool> {
        let Some(next) = self.segments()?.into_iter().find(|other| *other > segment) else {
            return Ok(false);
        };
        // The next one existed before this look, so after it the old one is complete.
        if !self.read_chunk(segment, offset)? {
            self.at = Some((next, 0));
            self.open = None;
        }
        Ok(true)
    }

    /// Takes the whole lines at `offset`. `false`: there are none (yet).
    fn read_chunk(&mut self, segment: Segment, offset: u64) -> io::Result<bool> {
        if self.open.as_ref().is_none_or(|(open, _)| *open != segment) {
            self.open = match open_segment(&self.path(segment)) {
                Ok(file) => Some((segment, file)),
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false), // rotated away
                Err(e) => return Err(e),
            };
        }
        let (_, file) = self.open.as_ref().expect("opened above");
        let Some(chunk) = whole_lines(file, offset)? else { return Ok(false) };
        let instance = self.instance.to_string();
        let mut end_offset = offset;
        for line in chunk.split_inclusive(|byte| *byte == b'\n') {
            end_offset += to_u64(line.len());
            if let Some(line) = Line::parse(line.trim_ascii_newline())
                && self.filter.admits(&line)
            {
                self.lines.push_back(pb::LogLine {
                    epoch: segment.epoch,
                    segment: segment.number,
                    end_offset,
                    ..line.to_log_line(&self.service, &instance, &self.host)
                });
            }
        }
        self.at = Some((segment, offset + to_u64(chunk.len())));
        Ok(true)
    }

    fn segments(&self) -> io::Result<Vec<Segment>> {
        let mut segments = Vec::new();
        for epoch in epochs(&self.service_dir, self.instance)? {
            for number in segment_numbers(&self.epoch_dir(epoch))? {
                segments.push(Segment { epoch, number });
            }
        }
        segments.sort_unstable();
        Ok(segments)
    }

    /// The last segment that begins before the time: all that is wanted lies in it or after it.
    fn position_of_time(&self, segments: &[Segment], unix_ns: i64) -> Option<(Segment, u64)> {
        let begins_before = |segment: &&Segment| {
            let file = open_segment(&self.path(**segment)).ok();
            let chunk = file.and_then(|file| whole_lines(&file, 0).ok().flatten()).unwrap_or_default();
            let first = chunk.split(|byte| *byte == b'\n').find_map(Line::parse);
            first.is_some_and(|line| line.unix_ns < unix_ns)
        };
        segments.iter().rev().find(begins_before).map(|segment| (*segment, 0))
    }

    /// Counts lines backwards from the end.
    fn position_of_tail(&self, segments: &[Segment], tail_lines: u64) -> io::Result<Option<(Segment, u64)>> {
        let mut left = tail_lines;
        for segment in segments.iter().rev() {
            let path = self.path(*segment);
            let found = match self.filter.admits_all_since() {
                true => offset_of_tail(&path, &mut left),
                false => offset_of_admitted_tail(&path, &self.filter, &mut left),
            };
            match found {
                Ok(Some(offset)) => return Ok(Some((*segment, offset))),
                Ok(None) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    fn epoch_dir(&self, epoch: u64) -> PathBuf {
        self.service_dir.join(format!("{}-{epoch}", self.instance))
    }

    fn path(&self, segment: Segment) -> PathBuf {
        self.epoch_dir(segment.epoch).join(format!("{:010}.log", segment.number))
    }
}

/// What an instance has written since a time, line by line, for who looks again and again.
#[derive(Debug)]
pub(crate) struct LinesSince {
    service_dir: PathBuf,
    instance: InstanceId,
    since_unix_ns: i64,
    source: Option<Source>,
    /// A line was found; it stays found.
    found: bool,
}

impl LinesSince {
    pub(crate) fn new(service_dir: &Path, instance: InstanceId, since_unix_ns: i64) -> Self {
        Self { service_dir: service_dir.to_owned(), instance, since_unix_ns, source: None, found: false }
    }

    /// Whether a line of all so far fits. Each is looked at once. Blocks.
    pub(crate) fn any(&mut self, fits: impl Fn(&str) -> bool) -> io::Result<bool> {
        if self.found {
            return Ok(true);
        }
        let mut source = match self.source.take() {
            Some(source) => source,
            None => {
                let (seconds, nanos) = (
                    self.since_unix_ns.div_euclid(1_000_000_000),
                    self.since_unix_ns.rem_euclid(1_000_000_000),
                );
                let nanos = i32::try_from(nanos).expect("less than a second");
                let request = pb::ReadHostLogsRequest {
                    since: Some(prost_types::Timestamp { seconds, nanos }),
                    ..pb::ReadHostLogsRequest::default()
                };
                let selection = Selection::of(&request).expect("it names no id that could be wrong");
                Source::open(&self.service_dir, "", self.instance, &selection)?
            }
        };
        while !self.found && source.fill()? {
            self.found = std::mem::take(&mut source.lines)
                .iter()
                .any(|line| fits(&String::from_utf8_lossy(&line.text)));
        }
        self.source = Some(source);
        Ok(self.found)
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
fn whole_lines(file: &File, offset: u64) -> io::Result<Option<Vec<u8>>> {
    let mut size = CHUNK_BYTES;
    loop {
        let mut chunk = vec![0; size];
        let length = read_at(file, &mut chunk, offset)?;
        if let Some(end) = chunk[..length].iter().rposition(|byte| *byte == b'\n') {
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

fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
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

/// Where the last `left` lines of a file begin; `None` when it has fewer, and `left` is what remains to find.
fn offset_of_tail(path: &Path, left: &mut u64) -> io::Result<Option<u64>> {
    let file = open_segment(path)?;
    let mut end = file.metadata()?.len();
    // A newline ends a line; the one that ends the line before the wanted ones is the mark.
    while end > 0 {
        let start = end.saturating_sub(to_u64(CHUNK_BYTES));
        let mut chunk = vec![0; usize::try_from(end - start).expect("at most one chunk")];
        let length = read_at(&file, &mut chunk, start)?;
        for index in (0..length).rev() {
            if chunk[index] != b'\n' {
                continue;
            }
            if *left == 0 {
                return Ok(Some(start + to_u64(index) + 1));
            }
            *left -= 1;
        }
        end = start;
    }
    Ok((*left == 0).then_some(0))
}

/// Likewise, of the lines that a filter admits; the file is read from its beginning.
fn offset_of_admitted_tail(path: &Path, filter: &Filter, left: &mut u64) -> io::Result<Option<u64>> {
    let file = open_segment(path)?;
    let wanted = usize::try_from(*left).unwrap_or(usize::MAX);
    let mut begins = VecDeque::new();
    let mut offset = 0;
    while let Some(chunk) = whole_lines(&file, offset)? {
        for line in chunk.split_inclusive(|byte| *byte == b'\n') {
            if Line::parse(line.trim_ascii_newline()).is_some_and(|line| filter.admits(&line)) {
                begins.push_back(offset);
                if begins.len() > wanted {
                    begins.pop_front();
                }
            }
            offset += to_u64(line.len());
        }
    }
    *left -= to_u64(begins.len());
    Ok(begins.front().copied().filter(|_| *left == 0))
}

trait TrimNewline {
    fn trim_ascii_newline(&self) -> &Self;
}

impl TrimNewline for [u8] {
    fn trim_ascii_newline(&self) -> &Self {
        self.strip_suffix(b"\n").unwrap_or(self)
    }
}

fn to_u64(length: usize) -> u64 {
    u64::try_from(length).expect("usize fits u64 on every Linux")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line is written, and the segment left, between the look at its end and the look for the next one.
    #[test]
    fn what_is_written_just_before_a_rotation_is_read_before_the_next_segment() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("i-1-1");
        std::fs::create_dir(&folder).unwrap();
        let write = |segment: u64, text: &str| {
            let path = folder.join(format!("{segment:010}.log"));
            let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
            std::io::Write::write_all(
                &mut file,
                format!("1970-01-01T00:00:01Z stdout F {text}\n").as_bytes(),
            )
            .unwrap();
        };
        let selection = Selection { service: "web".into(), ..Selection::default() };
        write(1, "one");
        let mut source = Source::open(dir.path(), "north", InstanceId(1), &selection).unwrap();
        assert!(source.fill().unwrap());
        source.lines.clear();
        let (segment, offset) = source.at.unwrap();
        assert!(!source.read_chunk(segment, offset).unwrap());
        write(1, "two");
        write(2, "three");
        assert!(source.leave(segment, offset).unwrap());
        assert!(source.fill().unwrap());
        assert_eq!(source.lines[0].text, "two");
    }
}
