//! The second of the two output threads: formatted lines into segment files, and what happens when the disk refuses.
//!
//! It may be stopped by a slow disk, which is why it is not the thread that reads the FIFOs. Files are
//! `<log_dir>/<10 digits>.log`, at most `segments` of them, each of about `segment_bytes`, none written to for longer
//! than a share of `age`, so that lines go by their age too. A write that fails is cut back to whole lines; the rest is
//! counted, and a `D` record stands where it is missing as soon as writing works.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::backlog::Backlog;
use crate::clock::{self, SECOND};
use crate::lines::{self, STREAMS, Stamp};
use crate::output::{Event, EventSender};

/// How soon a log that lacks lines is tried again when nothing else comes.
const RETRY: Duration = Duration::from_secs(1);
/// A segment is left for the next when this part of the age that lines may have is over: they go by whole segments.
const AGE_PARTS: u32 = 8;
/// How often what is too old is looked for, at most and at least.
const LOOK: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(600)];

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
    /// What the disk said when it last refused to take lines; 0: it takes them.
    pub(crate) refused_errno: AtomicI32,
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
    pub(crate) limits: Limits,
}

/// How much of a log is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) segment_bytes: u64,
    pub(crate) segments: usize,
    /// `None`: however old.
    pub(crate) age: Option<Duration>,
}

/// From the reading thread.
#[derive(Debug)]
pub(crate) enum Job {
    Open { log: u32, place: Place, counters: Arc<Counters> },
    Write { log: u32, text: Vec<u8>, missing: [u64; 2] },
    Limit { log: u32, limits: Limits },
    Close { log: u32, remove_fifos: bool, remove_logs: bool },
    Stop,
}

/// The thread's life.
pub(crate) fn run(jobs: &Receiver<Job>, events: &EventSender, backlog: &Backlog) {
    let mut logs: BTreeMap<u32, Segments> = BTreeMap::new();
    loop {
        match wait_for_job(jobs, &logs) {
            Ok(Job::Open { log, place, counters }) => {
                logs.insert(log, Segments::open(place, counters));
            }
            Ok(Job::Write { log, text, missing }) => {
                let Some(segments) = logs.get_mut(&log) else { continue };
                let refused = segments.refused;
                if !segments.write(&text, missing) || segments.refused != refused {
                    events.send_dropped();
                }
                backlog.done(&segments.counters, text.len());
            }
            Ok(Job::Limit { log, limits }) => {
                if let Some(segments) = logs.get_mut(&log) {
                    segments.limit(limits);
                }
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
                    if segments.say_missing() {
                        events.send_dropped();
                    }
                }
            }
            Ok(Job::Stop) | Err(RecvTimeoutError::Disconnected) => {
                for segments in logs.values_mut() {
                    segments.say_missing();
                }
                return;
            }
        }
        let now = clock::boottime_ns();
        for segments in logs.values_mut().filter(|segments| segments.look_at.is_some_and(|at| at <= now)) {
            segments.drop_old(clock::unix_ns());
        }
    }
}

/// The next job, or the time-out when something is due. Silent processes without files cost nothing.
fn wait_for_job(jobs: &Receiver<Job>, logs: &BTreeMap<u32, Segments>) -> Result<Job, RecvTimeoutError> {
    let look = logs.values().filter_map(|segments| segments.look_at).min();
    let look = look
        .map(|at| Duration::from_nanos(u64::try_from(at.saturating_sub(clock::boottime_ns())).unwrap_or(0)));
    let retry = logs.values().any(Segments::lacks_lines).then_some(RETRY);
    match look.into_iter().chain(retry).min() {
        Some(wait) => jobs.recv_timeout(wait),
        None => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
    }
}

/// The files of one log.
#[derive(Debug)]
struct Segments {
    place: Place,
    counters: Arc<Counters>,
    /// Numbers of the files there are, rising.
    numbers: VecDeque<u64>,
    /// The highest number ever used here: readers rely on numbers that rise.
    last_number: u64,
    /// When the file that is written to was opened, by the wall.
    begun_unix_ns: i64,
    /// When what is too old is next looked for; none while there is nothing that could be.
    look_at: Option<i64>,
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
        let numbers: VecDeque<u64> = found.iter().map(|(number, _)| *number).collect();
        let mut segments = Self {
            place,
            counters,
            last_number: numbers.back().copied().unwrap_or(0),
            numbers,
            begun_unix_ns: 0,
            look_at: None,
            file: None,
            length: 0,
            missing: [0; 2],
            refused: false,
        };
        segments.drop_old(clock::unix_ns());
        segments
    }

    fn limit(&mut self, limits: Limits) {
        self.place.limits = limits;
        let mut sizes: VecDeque<u64> = self.numbers.iter().map(|number| self.size(*number)).collect();
        let all = limits.segment_bytes.saturating_mul(limits.segments as u64);
        while self.numbers.len() > 1
            && (self.numbers.len() > limits.segments || sizes.iter().sum::<u64>() > all)
        {
            sizes.pop_front();
            self.drop_oldest();
        }
        self.drop_old(clock::unix_ns());
    }

    fn drop_oldest(&mut self) {
        if let Some(oldest) = self.numbers.pop_front() {
            self.unlink(&segment_name(oldest));
        }
    }

    /// Removes the files whose last line is too old, that of a silent process included. An empty one stays, so that also
    /// a keeper that starts later counts on from it.
    fn drop_old(&mut self, now_unix_ns: i64) {
        let Some(age) = self.place.limits.age else {
            self.look_at = None;
            return;
        };
        while let Some(oldest) = self.numbers.front()
            && self.written_unix_ns(*oldest).is_none_or(|at| is_over(age, at, now_unix_ns))
        {
            if self.numbers.len() == 1 {
                if self.size(*oldest) == 0 {
                    break;
                }
                // The one that is written to, if any is.
                (self.file, self.length) = (None, 0);
                // Failing, only this keeper counts on.
                let _ = self.add_file();
            }
            self.drop_oldest();
        }
        let pause = (age / AGE_PARTS).clamp(LOOK[0], LOOK[1]);
        let next = clock::boottime_ns() + i64::try_from(pause.as_nanos()).unwrap_or(i64::MAX / 2);
        let is_used = self.file.is_some() || self.numbers.iter().any(|number| self.size(*number) > 0);
        self.look_at = is_used.then_some(next);
    }

    fn stat(&self, number: u64) -> Option<FileStat> {
        let name = segment_name(number);
        fstatat(self.place.directory.as_fd(), name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW).ok()
    }

    fn size(&self, number: u64) -> u64 {
        self.stat(number).map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0))
    }

    /// None: it is not there.
    fn written_unix_ns(&self, number: u64) -> Option<i64> {
        self.stat(number).map(|stat| stat.st_mtime.saturating_mul(SECOND).saturating_add(stat.st_mtime_nsec))
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
                self.counters.refused_errno.store(0, Ordering::Relaxed);
                text.len()
            }
            Err((whole, error)) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                self.counters.refused_errno.store(errno, Ordering::Relaxed);
                if !self.refused {
                    crate::say!("output in {} is being dropped: {error}", self.place.path.display());
                }
                self.refused = true;
                whole
            }
        }
    }

    fn try_append(&mut self, text: &[u8]) -> Result<(), (usize, io::Error)> {
        let limits = self.place.limits;
        let is_old =
            limits.age.is_some_and(|age| is_over(age / AGE_PARTS, self.begun_unix_ns, clock::unix_ns()));
        let full = self.length > 0 && (self.length + text.len() as u64 > limits.segment_bytes || is_old);
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
            if length < self.place.limits.segment_bytes && ends_whole(&file, length) {
                self.write_to(file, length);
                return Ok(());
            }
        }
        while self.numbers.len() >= self.place.limits.segments.max(1) {
            self.drop_oldest();
        }
        let file = self.add_file()?;
        self.write_to(file, 0);
        Ok(())
    }

    fn add_file(&mut self) -> io::Result<File> {
        let number = self.last_number + 1;
        let file = self.open_file(number)?;
        self.last_number = number;
        self.numbers.push_back(number);
        Ok(file)
    }

    fn write_to(&mut self, file: File, length: u64) {
        (self.file, self.length) = (Some(file), length);
        self.begun_unix_ns = clock::unix_ns();
        if self.look_at.is_none() && self.place.limits.age.is_some() {
            self.look_at = Some(clock::boottime_ns());
        }
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

/// Whether `age` has passed since; a clock that was set back makes nothing old.
fn is_over(age: Duration, since_unix_ns: i64, now_unix_ns: i64) -> bool {
    let passed = now_unix_ns.saturating_sub(since_unix_ns);
    u128::try_from(passed).is_ok_and(|passed| passed > age.as_nanos())
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
        let limits = Limits { segment_bytes, segments, age: None };
        Segments::open(Place { path: dir.to_path_buf(), directory, limits }, Arc::default())
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

    #[test]
    fn lines_go_when_they_are_too_old_and_numbers_go_on_rising() {
        let dir = tempfile::tempdir().unwrap();
        let size = line(0).len() as u64;
        let mut log = segments(dir.path(), 2 * size, 9);
        for index in 0..5 {
            assert!(log.write(line(index).as_bytes(), [0; 2]));
        }
        let written = log.written_unix_ns(3).unwrap();
        let age = Duration::from_secs(3600);
        log.limit(Limits { age: Some(age), ..log.place.limits });
        assert_eq!(files(dir.path()).len(), 3, "nothing is old yet");
        assert!(log.look_at.is_some());
        let hour = i64::try_from(age.as_nanos()).unwrap();
        log.drop_old(written + hour - SECOND);
        assert_eq!(files(dir.path()).len(), 3);
        log.drop_old(written + hour + SECOND);
        assert_eq!(files(dir.path()), ["0000000004.log"], "that of a silent process goes too");
        assert_eq!((log.size(4), log.look_at), (0, None));
        log.drop_old(written + 9 * hour);
        let mut log = segments(dir.path(), 2 * size, 9);
        log.limit(Limits { age: Some(age), ..log.place.limits });
        assert_eq!((files(dir.path()).len(), log.look_at), (1, None), "an empty one is not replaced");
        assert!(log.write(line(5).as_bytes(), [0; 2]));
        assert_eq!(files(dir.path()), ["0000000004.log"]);
        assert!(log.look_at.is_some());
        log.drop_old(log.written_unix_ns(4).unwrap() + hour + SECOND);
        assert_eq!(files(dir.path()), ["0000000005.log"], "also for a keeper that was started meanwhile");
    }

    #[test]
    fn an_old_segment_is_left_for_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = segments(dir.path(), 1 << 20, 9);
        log.limit(Limits { age: Some(Duration::from_secs(3600)), ..log.place.limits });
        assert!(log.write(line(0).as_bytes(), [0; 2]));
        assert!(log.write(line(1).as_bytes(), [0; 2]));
        assert_eq!(files(dir.path()).len(), 1);
        log.begun_unix_ns -= 3600 / i64::from(AGE_PARTS) * SECOND;
        assert!(log.write(line(2).as_bytes(), [0; 2]));
        assert_eq!(files(dir.path()), ["0000000001.log", "0000000002.log"]);
    }

    #[test]
    fn smaller_limits_hold_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let size = line(0).len() as u64;
        let mut log = segments(dir.path(), 4 * size, 5);
        for index in 0..20 {
            assert!(log.write(line(index).as_bytes(), [0; 2]));
        }
        assert_eq!(files(dir.path()).len(), 5);
        log.limit(Limits { segment_bytes: size, segments: 5, age: None });
        assert_eq!(files(dir.path()), ["0000000005.log"], "5 lines are allowed, a file of 4 is there");
    }
}
