//! The second of the two output threads: formatted lines into segment files, and what happens when the disk refuses.
//!
//! It may be stopped by a slow disk, which is why it is not the thread that reads the FIFOs. Files are
//! `<log_dir>/<10 digits>.log`, at most `segments` of them, each of about `segment_bytes`. A write that fails is cut
//! back to whole lines; the rest is counted, and a `D` record stands where it is missing as soon as writing works.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::backlog::Backlog;
use crate::clock;
use crate::lines::{self, STREAMS, Stamp};
use crate::output::{Event, EventSender};

/// How soon a log that lacks lines is tried again when nothing else comes.
const RETRY: Duration = Duration::from_secs(1);

/// Numbers of one log that both threads and the loop look at.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Bytes in segments, those of before included.
    pub(crate) written_bytes: AtomicU64,
    /// Bytes on their way to the disk.
    pub(crate) queued_bytes: AtomicU64,
    /// Not yet told to the agent.
    pub(crate) dropped_lines: AtomicU64,
    pub(crate) dropped_bytes: AtomicU64,
}

impl Counters {
    pub(crate) fn dropped(&self, lines: u64, bytes: usize) {
        self.dropped_lines.fetch_add(lines, Ordering::Relaxed);
        self.dropped_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Where a log's files are and how large they may grow.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) path: PathBuf,
    pub(crate) directory: OwnedFd,
    pub(crate) segment_bytes: u64,
    pub(crate) segments: usize,
}

/// From the reading thread.
#[derive(Debug)]
pub(crate) enum Job {
    Open { log: u32, place: Place, counters: Arc<Counters> },
    Write { log: u32, text: Vec<u8>, missing: [u64; 2] },
    Close { log: u32, remove_fifos: bool, remove_logs: bool },
    Stop,
}

/// The thread's life.
pub(crate) fn run(jobs: &Receiver<Job>, events: &EventSender, backlog: &Backlog) {
    let mut logs: BTreeMap<u32, Segments> = BTreeMap::new();
    loop {
        let job = if logs.values().any(Segments::lacks_lines) {
            jobs.recv_timeout(RETRY)
        } else {
            jobs.recv().map_err(|_| RecvTimeoutError::Disconnected)
        };
        match job {
            Ok(Job::Open { log, place, counters }) => {
                logs.insert(log, Segments::open(place, counters));
            }
            Ok(Job::Write { log, text, missing }) => {
                let Some(segments) = logs.get_mut(&log) else { continue };
                if !segments.write(&text, missing) {
                    events.send_dropped();
                }
                backlog.done(&segments.counters, text.len());
            }
            Ok(Job::Close { log, remove_fifos, remove_logs }) => {
                if let Some(mut segments) = logs.remove(&log) {
                    segments.say_missing();
                    segments.close(remove_fifos, remove_logs);
                }
                events.send(Event::Closed(log));
            }
            Err(RecvTimeoutError::Timeout) => {
                for segments in logs.values_mut().filter(|segments| segments.lacks_lines()) {
                    segments.say_missing();
                }
            }
            Ok(Job::Stop) | Err(RecvTimeoutError::Disconnected) => {
                for segments in logs.values_mut() {
                    segments.say_missing();
                }
                return;
            }
        }
    }
}

/// The files of one log.
#[derive(Debug)]
struct Segments {
    place: Place,
    counters: Arc<Counters>,
    /// Numbers of the files there are, rising.
    numbers: VecDeque<u64>,
    /// Made with the first line, so that a silent process costs no file.
    file: Option<File>,
    length: u64,
    /// Lines of each stream that are missing at the end.
    missing: [u64; 2],
    /// Said once, until it works again.
    refused: bool,
}

impl Segments {
    fn open(place: Place, counters: Arc<Counters>) -> Self {
        let mut found: Vec<(u64, u64)> = std::fs::read_dir(&place.path)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
            .filter_map(|entry| {
                let number = segment_number(entry.file_name().to_str()?)?;
                Some((number, entry.metadata().ok()?.len()))
            })
            .collect();
        found.sort_unstable();
        let bytes = found.iter().map(|(_, bytes)| bytes).sum();
        counters.written_bytes.store(bytes, Ordering::Relaxed);
        let numbers = found.iter().map(|(number, _)| *number).collect();
        Self { place, counters, numbers, file: None, length: 0, missing: [0; 2], refused: false }
    }

    fn lacks_lines(&self) -> bool {
        self.missing != [0; 2]
    }

    /// Writes lines after as many missing ones; `false` when some were dropped.
    fn write(&mut self, text: &[u8], missing: [u64; 2]) -> bool {
        self.add_missing(missing);
        if !self.say_missing() {
            self.add_missing(lines::count(text));
            self.counters.dropped(lines::count(text).iter().sum(), text.len());
            return false;
        }
        if text.is_empty() {
            return true;
        }
        let rest = &text[self.append(text)..];
        if rest.is_empty() {
            return true;
        }
        self.add_missing(lines::count(rest));
        self.counters.dropped(lines::count(rest).iter().sum(), rest.len());
        false
    }

    fn add_missing(&mut self, missing: [u64; 2]) {
        for (sum, more) in self.missing.iter_mut().zip(missing) {
            *sum += more;
        }
    }

    /// Writes the `D` records that are due; `false` when the disk still refuses.
    fn say_missing(&mut self) -> bool {
        if !self.lacks_lines() {
            return true;
        }
        let stamp = Stamp::new(clock::unix_ns());
        let mut text = Vec::new();
        for (stream, count) in STREAMS.into_iter().zip(self.missing).filter(|(_, count)| *count > 0) {
            stamp.record(&mut text, stream, b'D', [format!("{count} lines dropped").as_bytes(), b""]);
        }
        let done = self.append(&text) == text.len();
        if done {
            self.missing = [0; 2];
        }
        done
    }

    /// Appends whole lines; returns how many bytes of them are in the file, all of them when nothing failed.
    fn append(&mut self, text: &[u8]) -> usize {
        match self.try_append(text) {
            Ok(()) => {
                self.refused = false;
                text.len()
            }
            Err((whole, error)) => {
                if !self.refused {
                    crate::say!("output in {} is being dropped: {error}", self.place.path.display());
                }
                self.refused = true;
                whole
            }
        }
    }

    fn try_append(&mut self, text: &[u8]) -> Result<(), (usize, io::Error)> {
        let full = self.length > 0 && self.length + text.len() as u64 > self.place.segment_bytes;
        if full || self.file.is_none() {
            self.next_file(full).map_err(|error| (0, error))?;
        }
        let file = self.file.as_mut().expect("next_file has opened one");
        let mut written = 0;
        let error = loop {
            match file.write(&text[written..]) {
                Ok(0) => break io::ErrorKind::WriteZero.into(),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break error,
            }
            if written == text.len() {
                self.length += written as u64;
                self.counters.written_bytes.fetch_add(written as u64, Ordering::Relaxed);
                return Ok(());
            }
        };
        let whole = text[..written].iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
        self.length += whole as u64;
        self.counters.written_bytes.fetch_add(whole as u64, Ordering::Relaxed);
        if written > whole && file.set_len(self.length).is_err() {
            // A torn line at its end: go on in another file.
            self.file = None;
            self.length = u64::MAX / 2;
        }
        Err((whole, error))
    }

    /// Goes on with the newest file when it has room, else with a new one; the oldest go first, which may be what
    /// makes the room.
    fn next_file(&mut self, full: bool) -> io::Result<()> {
        if !full
            && self.length == 0
            && let Some(newest) = self.numbers.back()
        {
            let file = self.open_file(*newest)?;
            let length = file.metadata()?.len();
            if length < self.place.segment_bytes && ends_whole(&file, length) {
                (self.file, self.length) = (Some(file), length);
                return Ok(());
            }
        }
        while self.numbers.len() >= self.place.segments.max(1) {
            let oldest = self.numbers.pop_front().expect("the loop's condition");
            self.unlink(&segment_name(oldest));
        }
        let number = self.numbers.back().map_or(1, |newest| newest + 1).max(1);
        let file = self.open_file(number)?;
        self.numbers.push_back(number);
        (self.file, self.length) = (Some(file), 0);
        Ok(())
    }

    fn open_file(&self, number: u64) -> io::Result<File> {
        let flags = OFlag::O_RDWR
            | OFlag::O_APPEND
            | OFlag::O_CREAT
            | OFlag::O_NOFOLLOW
            | OFlag::O_CLOEXEC
            | OFlag::O_NONBLOCK;
        let name = segment_name(number);
        let fd = openat(self.place.directory.as_fd(), name.as_str(), flags, Mode::from_bits_truncate(0o600))?;
        Ok(File::from(fd))
    }

    fn close(self, remove_fifos: bool, remove_logs: bool) {
        if remove_fifos {
            for stream in STREAMS {
                self.unlink(stream.name());
            }
        }
        if remove_logs {
            for number in &self.numbers {
                self.unlink(&segment_name(*number));
            }
            // Refused when somebody else keeps something there, which is then theirs.
            let _ = std::fs::remove_dir(&self.place.path);
        }
    }

    fn unlink(&self, name: &str) {
        let _ = unlinkat(self.place.directory.as_fd(), name, UnlinkatFlags::NoRemoveDir);
    }
}

/// Whether the last line has its end; a loss of power may have taken it.
fn ends_whole(file: &File, length: u64) -> bool {
    use std::os::unix::fs::FileExt as _;
    let mut last = [0];
    length == 0 || (file.read_exact_at(&mut last, length - 1).is_ok() && last == *b"\n")
}

fn segment_name(number: u64) -> String {
    format!("{number:010}.log")
}

fn segment_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".log")?;
    (digits.len() == 10 && digits.bytes().all(|digit| digit.is_ascii_digit())).then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments(dir: &std::path::Path, segment_bytes: u64, segments: usize) -> Segments {
        let directory = OwnedFd::from(File::open(dir).unwrap());
        let place = Place { path: dir.to_path_buf(), directory, segment_bytes, segments };
        Segments::open(place, Arc::default())
    }

    fn line(index: usize) -> String {
        format!("2026-11-26T13:59:24.123456789Z stdout F line {index:04}\n")
    }

    fn files(dir: &std::path::Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn segments_rotate_by_size_and_the_oldest_go() {
        let dir = tempfile::tempdir().unwrap();
        let size = line(0).len() as u64;
        let mut log = segments(dir.path(), 4 * size, 3);
        for index in 0..18 {
            assert!(log.write(line(index).as_bytes(), [0; 2]));
        }
        assert_eq!(files(dir.path()), ["0000000003.log", "0000000004.log", "0000000005.log"]);
        assert_eq!(log.counters.written_bytes.load(Ordering::Relaxed), 18 * size);
        // The next keeper goes on in the newest.
        let mut log = segments(dir.path(), 4 * size, 3);
        assert!(log.write(line(18).as_bytes(), [0; 2]));
        assert_eq!(files(dir.path()).len(), 3);
        let newest = std::fs::read_to_string(dir.path().join("0000000005.log")).unwrap();
        assert_eq!(newest, line(16) + &line(17) + &line(18));
    }

    #[test]
    fn a_torn_last_line_is_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("0000000007.log"), "2026-11-26T13:5").unwrap();
        let mut log = segments(dir.path(), 1 << 20, 3);
        assert!(log.write(line(1).as_bytes(), [0; 2]));
        assert_eq!(std::fs::read_to_string(dir.path().join("0000000008.log")).unwrap(), line(1));
    }

    #[test]
    fn missing_lines_are_said_at_their_place() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = segments(dir.path(), 1 << 20, 3);
        log.write(line(1).as_bytes(), [0; 2]);
        log.write(line(9).as_bytes(), [7, 0]);
        let text = std::fs::read_to_string(dir.path().join("0000000001.log")).unwrap();
        let tails: Vec<&str> = text.lines().map(|line| &line[31..]).collect();
        assert_eq!(tails, ["stdout F line 0001", "stdout D 7 lines dropped", "stdout F line 0009"]);
    }

    #[test]
    fn a_link_in_place_of_a_segment_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        std::fs::write(&target, "precious\n").unwrap();
        std::os::unix::fs::symlink(&target, dir.path().join("0000000001.log")).unwrap();
        let mut log = segments(dir.path(), 1 << 20, 3);
        log.write(line(1).as_bytes(), [0; 2]);
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "precious\n");
        assert!(log.lacks_lines());
    }
}
