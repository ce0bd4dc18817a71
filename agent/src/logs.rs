//! Reads what the keeper wrote: the output of all (or one) of a service's instances on this host, merged by time,
//! from any point, and on as it grows. The API streams it; nothing here is ever written.
//!
//! Following polls: ten looks a second at a handful of files cost nothing measurable, and a poll cannot miss an
//! event the way a watch on a directory that is being rotated can.

pub(crate) mod limits;
mod line;
mod selection;
pub(crate) mod source;

use std::io;
use std::path::{Path, PathBuf};

use nave_proto::pb;

use selection::Selection;
use source::Source;

/// Lines sent at once; with lines of up to 16 KiB a message stays below 4 MiB, gRPC's usual bound.
const BATCH_LINES: usize = 200;
const BATCH_BYTES: usize = 1024 * 1024;

/// All sources of one request, merged.
#[derive(Debug)]
pub(crate) struct LogReader {
    service_dir: PathBuf,
    host: String,
    selection: Selection,
    sources: Vec<Source>,
    /// Once the past has been read, instances that appear are read from their first line.
    live: bool,
}

/// A request that cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogRequestError {
    #[error("{0:?} is not a service name")]
    Service(String),
    #[error(transparent)]
    Instance(#[from] nave_proto::ids::ParseIdError),
}

impl LogReader {
    /// `logs_dir` is the host's log directory. Opens no file yet.
    pub(crate) fn new(
        logs_dir: &Path,
        host: String,
        request: &pb::ReadHostLogsRequest,
    ) -> Result<Self, LogRequestError> {
        // It becomes part of a path.
        if !is_service_name(&request.service) {
            return Err(LogRequestError::Service(request.service.clone()));
        }
        let selection = Selection::of(request)?;
        let service_dir = logs_dir.join(&request.service);
        Ok(Self { service_dir, host, selection, sources: Vec::new(), live: false })
    }

    /// The next lines in order of time; empty when there are no more for now. Blocks on the disk.
    pub(crate) fn next_batch(&mut self) -> io::Result<Vec<pb::LogLine>> {
        self.find_sources()?;
        let mut batch = Vec::new();
        let mut batch_bytes = 0;
        while batch.len() < BATCH_LINES && batch_bytes < BATCH_BYTES {
            let Some(line) = self.next_line()? else {
                self.live = true;
                break;
            };
            batch_bytes += line.text.len();
            batch.push(line);
        }
        Ok(batch)
    }

    /// All that was there has been handed out.
    pub(crate) fn is_live(&self) -> bool {
        self.live
    }

    /// The oldest of the sources' next lines.
    fn next_line(&mut self) -> io::Result<Option<pb::LogLine>> {
        let mut oldest: Option<(i64, usize)> = None;
        for (index, source) in self.sources.iter_mut().enumerate() {
            if !source.fill()? {
                continue;
            }
            let unix_ns = source.lines.front().map_or(i64::MAX, |line| line.unix_ns);
            if oldest.is_none_or(|(other, _)| unix_ns < other) {
                oldest = Some((unix_ns, index));
            }
        }
        Ok(oldest.and_then(|(_, index)| self.sources[index].lines.pop_front()))
    }

    fn find_sources(&mut self) -> io::Result<()> {
        let found = source::instances(&self.service_dir)?;
        // What is gone has been read to its end.
        self.sources.retain(|source| found.contains(&source.instance) || !source.lines.is_empty());
        for instance in found {
            let wanted = self.selection.instance.is_none_or(|only| only == instance);
            if !wanted || self.sources.iter().any(|source| source.instance == instance) {
                continue;
            }
            let mut selection = self.selection.clone();
            if self.live {
                selection.tail_lines = 0;
            }
            self.sources.push(Source::open(&self.service_dir, &self.host, instance, &selection)?);
            // Should it vanish and come again, it is read anew.
            self.selection.resume.remove(&instance);
        }
        Ok(())
    }
}

fn is_service_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs::OpenOptions;
    use std::io::Write as _;

    use super::*;

    struct Host {
        dir: tempfile::TempDir,
    }

    impl Host {
        fn new() -> Self {
            Self { dir: tempfile::tempdir().unwrap() }
        }

        /// Appends a line as the keeper does.
        fn write(&self, folder: &str, segment: u64, second: u64, text: &str) {
            self.write_raw(folder, segment, &format!("1970-01-01T00:00:{second:02}Z stdout F {text}\n"));
        }

        fn write_raw(&self, folder: &str, segment: u64, text: &str) {
            let dir = self.dir.path().join("web").join(folder);
            std::fs::create_dir_all(&dir).unwrap();
            let path = dir.join(format!("{segment:010}.log"));
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .unwrap()
                .write_all(text.as_bytes())
                .unwrap();
        }

        fn remove(&self, folder: &str, segment: u64) {
            std::fs::remove_file(self.dir.path().join("web").join(folder).join(format!("{segment:010}.log")))
                .unwrap();
        }

        fn reader(&self, request: pb::ReadHostLogsRequest) -> LogReader {
            let request = pb::ReadHostLogsRequest { service: "web".into(), ..request };
            LogReader::new(self.dir.path(), "host-a".into(), &request).unwrap()
        }
    }

    /// All that is to be read now.
    pub(crate) fn texts(reader: &mut LogReader) -> Vec<String> {
        let mut all = Vec::new();
        loop {
            let batch = reader.next_batch().unwrap();
            if batch.is_empty() {
                return all;
            }
            all.extend(batch.iter().map(|line| String::from_utf8(line.text.to_vec()).unwrap()));
        }
    }

    #[test]
    fn instances_epochs_and_segments_are_merged_by_time() {
        let host = Host::new();
        host.write("i-1-1", 1, 1, "a1");
        host.write("i-1-1", 2, 4, "a4");
        host.write("i-1-2", 1, 5, "a5");
        host.write("i-2-1", 1, 2, "b2");
        host.write("i-2-1", 1, 6, "b6");
        let mut reader = host.reader(pb::ReadHostLogsRequest::default());
        assert_eq!(texts(&mut reader), ["a1", "b2", "a4", "a5", "b6"]);
        let one = pb::ReadHostLogsRequest { instance_id: "i-2".into(), ..Default::default() };
        assert_eq!(texts(&mut host.reader(one)), ["b2", "b6"]);
    }

    #[test]
    fn tail_counts_per_instance_over_segments_and_epochs() {
        let host = Host::new();
        for second in 0..10 {
            host.write("i-1-1", second / 4, second, &format!("a{second}"));
        }
        host.write("i-1-2", 0, 10, "a10");
        host.write("i-2-1", 0, 5, "b5");
        let tail = |tail_lines| {
            texts(&mut host.reader(pb::ReadHostLogsRequest { tail_lines, ..Default::default() }))
        };
        assert_eq!(tail(1), ["b5", "a10"]);
        assert_eq!(tail(4), ["b5", "a7", "a8", "a9", "a10"]);
        assert_eq!(tail(100).len(), 12);
    }

    #[test]
    fn tail_finds_its_place_in_files_longer_than_a_chunk() {
        let host = Host::new();
        for number in 0..2000 {
            host.write("i-1-1", 0, 1, &format!("{number} {}", "x".repeat(100)));
        }
        let request = pb::ReadHostLogsRequest { tail_lines: 1500, ..Default::default() };
        let lines = texts(&mut host.reader(request));
        assert_eq!(lines.len(), 1500);
        assert!(lines[0].starts_with("500 "), "{}", lines[0]);
    }

    #[test]
    fn since_begins_at_the_time_whatever_segment_it_is_in() {
        let host = Host::new();
        for second in 0..10 {
            host.write("i-1-1", second / 3, second, &format!("a{second}"));
        }
        for start in 0..=10 {
            let since = Some(prost_types::Timestamp { seconds: start, nanos: 0 });
            let lines = texts(&mut host.reader(pb::ReadHostLogsRequest { since, ..Default::default() }));
            let expected: Vec<String> = (start..10).map(|second| format!("a{second}")).collect();
            assert_eq!(lines, expected, "since {start}");
        }
    }

    #[test]
    fn following_has_no_gap_and_no_repeat_through_rotation() {
        let host = Host::new();
        host.write("i-1-1", 1, 1, "one");
        let mut reader =
            host.reader(pb::ReadHostLogsRequest { follow: true, tail_lines: 1, ..Default::default() });
        assert_eq!(texts(&mut reader), ["one"]);
        assert!(texts(&mut reader).is_empty());
        // The end of the old segment, the new one and the removal of the old, all between two looks.
        host.write("i-1-1", 1, 2, "two");
        host.write("i-1-1", 2, 3, "three");
        host.remove("i-1-1", 1);
        assert_eq!(texts(&mut reader), ["two", "three"]);
        // A line that is half written is not shown, and is shown once when whole.
        host.write_raw("i-1-1", 2, "1970-01-01T00:00:04Z stdout F fo");
        assert!(texts(&mut reader).is_empty());
        host.write_raw("i-1-1", 2, "ur\n");
        assert_eq!(texts(&mut reader), ["four"]);
        // A new instance is shown from its first line, in spite of tail.
        host.write("i-2-1", 1, 5, "five");
        host.write("i-2-1", 1, 6, "six");
        assert_eq!(texts(&mut reader), ["five", "six"]);
        // Segments that came and went unseen cost only themselves.
        host.write("i-1-1", 5, 7, "seven");
        assert_eq!(texts(&mut reader), ["seven"]);
    }

    fn cursor(line: &pb::LogLine) -> pb::LogCursor {
        pb::LogCursor {
            host: line.host.clone(),
            instance_id: line.instance_id.clone(),
            epoch: line.epoch,
            segment: line.segment,
            offset: line.end_offset,
        }
    }

    /// Lines that are read at once have one time, so a time cannot say which of them have been seen.
    #[test]
    fn a_reader_that_was_broken_off_anywhere_goes_on_without_gap_or_repeat() {
        let host = Host::new();
        let mut wanted = Vec::new();
        for number in 0..9_u64 {
            host.write("i-1-1", 1 + number / 3, 1, &format!("a{number}"));
            host.write("i-2-1", 1, 1, &format!("b{number}"));
            wanted.extend([format!("a{number}"), format!("b{number}")]);
        }
        host.write("i-1-2", 1, 2, "a9");
        wanted.push("a9".into());
        wanted.sort();
        let mut whole = host.reader(pb::ReadHostLogsRequest::default());
        let all = whole.next_batch().unwrap();
        for broken_off in 0..=all.len() {
            let mut cursors = std::collections::BTreeMap::new();
            for line in &all[..broken_off] {
                cursors.insert(line.instance_id.clone(), cursor(line));
            }
            // The tail of the first request is over once there is a place to go on from.
            let resume = cursors.into_values().collect();
            let rest = texts(&mut host.reader(pb::ReadHostLogsRequest { resume, ..Default::default() }));
            let seen = all[..broken_off].iter().map(|line| String::from_utf8(line.text.to_vec()).unwrap());
            let mut both: Vec<String> = seen.chain(rest).collect();
            both.sort();
            assert_eq!(both, wanted, "broken off after {broken_off}");
        }
    }

    #[test]
    fn a_reader_goes_on_after_what_it_had_read_was_rotated_away() {
        let host = Host::new();
        host.write("i-1-1", 1, 1, "one");
        let line = host.reader(pb::ReadHostLogsRequest::default()).next_batch().unwrap().remove(0);
        host.write("i-1-1", 2, 2, "two");
        host.remove("i-1-1", 1);
        let resume = vec![cursor(&line)];
        let tail = pb::ReadHostLogsRequest { resume, tail_lines: 1, ..Default::default() };
        host.write("i-1-1", 2, 3, "three");
        assert_eq!(texts(&mut host.reader(tail)), ["two", "three"]);
    }

    #[test]
    fn lines_are_chosen_by_time_and_text_and_the_tail_counts_the_chosen() {
        let host = Host::new();
        for second in 0..20 {
            let what = if second % 2 == 0 { "even" } else { "odd" };
            host.write("i-1-1", second / 6, second, &format!("{what} {second}"));
        }
        host.write_raw("i-1-1", 3, "1970-01-01T00:00:20Z stdout D 3 lines dropped\n");
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let read = |request| texts(&mut host.reader(request));
        let until = pb::ReadHostLogsRequest { until: at(3), ..Default::default() };
        assert_eq!(read(until.clone()), ["even 0", "odd 1", "even 2", "odd 3"]);
        assert_eq!(read(pb::ReadHostLogsRequest { tail_lines: 2, ..until.clone() }), ["even 2", "odd 3"]);
        assert_eq!(read(pb::ReadHostLogsRequest { contains: "odd".into(), ..until }), ["odd 1", "odd 3"]);
        let odd = pb::ReadHostLogsRequest { contains: "odd".into(), since: at(15), ..Default::default() };
        let dropped = "[nave: 3 lines dropped]";
        assert_eq!(read(odd.clone()), ["odd 15", "odd 17", "odd 19", dropped]);
        assert_eq!(read(pb::ReadHostLogsRequest { tail_lines: 3, ..odd }), ["odd 17", "odd 19", dropped]);
    }

    #[test]
    fn damage_is_passed_over() {
        let host = Host::new();
        host.write("i-1-1", 1, 1, "one");
        host.write_raw("i-1-1", 1, "\0\0\0garbage\n\n");
        host.write_raw("i-1-1", 1, &format!("{}\n", "y".repeat(LONG)));
        host.write("i-1-1", 1, 2, "two");
        assert_eq!(texts(&mut host.reader(pb::ReadHostLogsRequest::default())), ["one", "two"]);
    }
    const LONG: usize = 3 * 1024 * 1024;

    #[test]
    fn a_service_name_cannot_leave_the_directory() {
        for service in ["..", "a/b", "", "A", "."] {
            let request = pb::ReadHostLogsRequest { service: service.into(), ..Default::default() };
            let error = LogReader::new(Path::new("/"), String::new(), &request).unwrap_err();
            assert!(matches!(error, LogRequestError::Service(_)), "{service}: {error}");
        }
    }
}
