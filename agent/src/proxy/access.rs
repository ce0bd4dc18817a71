//! A line for each call of the services that want it, in files as the keeper writes processes' output, so that they are
//! read, followed and merged the same way: `<data>/access/<service>/i-0-1/<10 digits>.log`. Of each service the newest
//! 16 MiB, and of one that nobody has called for as long as ended output is kept, as one that is deleted, nothing. A
//! thread of its own writes, since disks stall; what it cannot keep up with is dropped, counted, and said in
//! its place.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use tracing::{debug, warn};

use crate::clock;
use crate::executor::directories::is_older;
use crate::logs::limits::MAX_AGE;

/// Of about 300 bytes each; at 100,000 a second the disk may stall for 80 ms.
const WAITING: usize = 8192;
/// Written at once.
const BATCH: usize = 512;
const SEGMENT_BYTES: u64 = 4 * 1024 * 1024;
const SEGMENTS: usize = 4;
/// More are closed and opened again.
const OPEN_FILES_MAX: usize = 64;
/// How often it is looked for what is too old.
const PRUNE_EVERY: Duration = Duration::from_secs(600);
/// In place of an instance and its epoch.
const FOLDER: &str = "i-0-1";

struct Line {
    service: Arc<str>,
    unix_ns: i64,
    text: String,
}

/// For everybody who has something to write. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct AccessLog {
    /// `None`: nothing is written.
    lines: Option<SyncSender<Line>>,
    dropped: Arc<AtomicU64>,
}

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Line").field("service", &self.service).finish_non_exhaustive()
    }
}

impl AccessLog {
    /// Begins the thread that writes below `directory`; it ends with the last clone.
    ///
    /// # Errors
    /// No thread can be started.
    pub(crate) fn start(directory: PathBuf) -> io::Result<Self> {
        let (lines, to_write) = sync_channel(WAITING);
        let dropped = Arc::<AtomicU64>::default();
        let writer = Writer { directory, dropped: dropped.clone(), files: BTreeMap::new(), refused: false };
        std::thread::Builder::new().name("nave-access".to_owned()).spawn(move || writer.run(&to_write))?;
        Ok(Self { lines: Some(lines), dropped })
    }

    /// Never waits.
    pub(crate) fn write(&self, service: &Arc<str>, text: String) {
        let Some(lines) = &self.lines else { return };
        let line = Line { service: service.clone(), unix_ns: clock::wall_unix_ns(), text };
        if lines.try_send(line).is_err() {
            self.dropped.fetch_add(1, Relaxed);
        }
    }
}

struct Writer {
    directory: PathBuf,
    dropped: Arc<AtomicU64>,
    files: BTreeMap<Arc<str>, Segments>,
    /// Said once, until it works again.
    refused: bool,
}

impl Writer {
    fn run(mut self, lines: &Receiver<Line>) {
        let mut prune_at = clock::monotonic();
        loop {
            let now = clock::monotonic();
            if now >= prune_at {
                self.prune(MAX_AGE);
                prune_at = now + PRUNE_EVERY;
            }
            let first = match lines.recv_timeout(prune_at.since(now)) {
                Ok(first) => first,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let mut texts = BTreeMap::<Arc<str>, (u64, Vec<u8>)>::new();
            for line in std::iter::once(first).chain(lines.try_iter().take(BATCH - 1)) {
                let (count, text) = texts.entry(line.service).or_default();
                let missing = self.dropped.swap(0, Relaxed);
                if missing > 0 {
                    nave_keeper::write_missing(line.unix_ns, missing, text);
                }
                *count += 1;
                nave_keeper::write_line(line.unix_ns, line.text.as_bytes(), text);
            }
            for (service, (count, text)) in texts {
                self.write(service, count, &text);
            }
        }
    }

    /// By this thread, which may have the file open.
    fn prune(&mut self, age: Duration) {
        for entry in std::fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            let folder = entry.path();
            if !is_older(&folder.join(FOLDER), age) {
                continue;
            }
            self.files.retain(|service, _| *entry.file_name() != **service);
            match std::fs::remove_dir_all(&folder) {
                Ok(()) => debug!(path = %folder.display(), "an old access log is removed"),
                Err(error) => warn!(path = %folder.display(), %error, "an old access log cannot be removed"),
            }
        }
    }

    fn write(&mut self, service: Arc<str>, count: u64, text: &[u8]) {
        if self.files.len() >= OPEN_FILES_MAX && !self.files.contains_key(&service) {
            self.files.clear();
        }
        let directory = self.directory.join(&*service).join(FOLDER);
        let written = match self.files.entry(service) {
            std::collections::btree_map::Entry::Occupied(open) => Ok(open.into_mut()),
            std::collections::btree_map::Entry::Vacant(none) => {
                Segments::open(directory).map(|segments| none.insert(segments))
            }
        };
        match written.and_then(|segments| segments.write(text)) {
            Ok(()) => self.refused = false,
            Err(error) => {
                self.dropped.fetch_add(count, Relaxed);
                self.files.clear();
                if !std::mem::replace(&mut self.refused, true) {
                    warn!(%error, "the access log cannot be written: lines are dropped and counted");
                }
            }
        }
    }
}

/// The files of one service.
#[derive(Debug)]
struct Segments {
    directory: PathBuf,
    /// Rising; the last is written to.
    numbers: Vec<u64>,
    file: File,
    bytes: u64,
}

impl Segments {
    /// Goes on after what is there.
    fn open(directory: PathBuf) -> io::Result<Self> {
        std::fs::create_dir_all(&directory)?;
        let mut numbers: Vec<u64> = std::fs::read_dir(&directory)?
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".log")?.parse().ok())
            .collect();
        numbers.sort_unstable();
        let last = numbers.last().copied().unwrap_or(1);
        if numbers.is_empty() {
            numbers.push(last);
        }
        let file = append(&path(&directory, last))?;
        let bytes = file.metadata()?.len();
        Ok(Self { directory, numbers, file, bytes })
    }

    fn write(&mut self, text: &[u8]) -> io::Result<()> {
        if self.bytes >= SEGMENT_BYTES {
            let next = self.numbers.last().map_or(1, |last| last + 1);
            self.file = append(&path(&self.directory, next))?;
            self.bytes = 0;
            self.numbers.push(next);
            while self.numbers.len() > SEGMENTS {
                let oldest = self.numbers.remove(0);
                std::fs::remove_file(path(&self.directory, oldest))?;
            }
        }
        match self.file.write_all(text) {
            Ok(()) => {
                self.bytes += text.len() as u64;
                Ok(())
            }
            Err(error) => {
                // Half a line would be read as one.
                self.file.set_len(self.bytes)?;
                Err(error)
            }
        }
    }
}

fn path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:010}.log"))
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use nave_proto::pb;

    use super::*;
    use crate::logs::{self, LogReader};

    fn texts(directory: &Path) -> Vec<String> {
        let request = pb::ReadHostLogsRequest { service: "web".to_owned(), ..Default::default() };
        logs::tests::texts(&mut LogReader::new(directory, "here".to_owned(), &request).unwrap())
    }

    fn writer(directory: &Path) -> Writer {
        Writer {
            directory: directory.to_owned(),
            dropped: Arc::default(),
            files: BTreeMap::new(),
            refused: false,
        }
    }

    #[test]
    fn what_is_written_is_read_as_logs_are_and_old_files_go() {
        let directory = tempfile::tempdir().unwrap();
        let writer = || writer(directory.path());
        let (lines, to_write) = sync_channel(WAITING);
        let line = |text: &str| Line {
            service: "web".into(),
            unix_ns: clock::wall_unix_ns(),
            text: text.to_owned(),
        };
        lines.send(line("first")).unwrap();
        drop(lines);
        writer().run(&to_write);
        let (lines, to_write) = sync_channel(WAITING);
        let second = writer();
        second.dropped.store(3, Relaxed);
        lines.send(line("second")).unwrap();
        drop(lines);
        second.run(&to_write);
        assert_eq!(texts(directory.path()), ["first", "[nave: 3 lines dropped]", "second"]);

        let long = "x".repeat(15_000);
        let mut third = writer();
        for _ in 0..2_000 {
            let mut text = Vec::new();
            nave_keeper::write_line(clock::wall_unix_ns(), long.as_bytes(), &mut text);
            third.write("web".into(), 1, &text);
        }
        let folder = directory.path().join("web").join(FOLDER);
        let sizes: Vec<u64> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .collect();
        assert!(sizes.len() == SEGMENTS, "{sizes:?}");
        assert!(sizes.iter().all(|size| *size <= SEGMENT_BYTES + 16_000), "{sizes:?}");
        assert_eq!(third.dropped.load(Relaxed), 0);
    }

    #[test]
    fn what_nobody_has_called_for_long_goes_and_may_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = writer(directory.path());
        let mut text = Vec::new();
        nave_keeper::write_line(clock::wall_unix_ns(), b"called", &mut text);
        for service in ["db", "web"] {
            writer.write(service.into(), 1, &text);
        }
        let day = Duration::from_secs(24 * 3600);
        let long_ago = std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let file = path(&directory.path().join("web").join(FOLDER), 1);
        File::options().append(true).open(file).unwrap().set_modified(long_ago).unwrap();
        writer.prune(day);
        assert!(texts(directory.path()).is_empty() && !directory.path().join("web").exists());
        assert!(directory.path().join("db").exists());
        writer.write("web".into(), 1, &text);
        assert_eq!(texts(directory.path()), ["called"], "not into a file that is gone");
    }

    #[test]
    fn a_disk_that_refuses_costs_lines_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        // A file where the directory would be.
        std::fs::write(directory.path().join("web"), "").unwrap();
        let mut writer = writer(directory.path());
        writer.write("web".into(), 2, b"x");
        assert_eq!(writer.dropped.load(Relaxed), 2);
        std::fs::remove_file(directory.path().join("web")).unwrap();
        writer.write("web".into(), 1, b"");
        assert!(!writer.refused);
    }
}
