//! One reader over the files of several instances.

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
        OpenOptions::new().create(true).append(true).open(path).unwrap().write_all(text.as_bytes()).unwrap();
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
    lines_at(reader, 0).iter().map(|line| String::from_utf8(line.text.to_vec()).unwrap()).collect()
}

/// All lines that are to be read so many milliseconds after the beginning.
fn lines_at(reader: &mut LogReader, at_ms: i64) -> Vec<pb::LogLine> {
    let mut all = Vec::new();
    loop {
        match reader.next_batch(Monotonic(at_ms * 1_000_000)).unwrap() {
            Batch::Lines(lines) => all.extend(lines),
            Batch::Searching => {}
            Batch::End => return all,
        }
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
    let tail =
        |tail_lines| texts(&mut host.reader(pb::ReadHostLogsRequest { tail_lines, ..Default::default() }));
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
    // Segments that came and went unseen cost only themselves, and that is said.
    host.write("i-1-1", 5, 7, "seven");
    assert_eq!(texts(&mut reader), [REMOVED, "seven"]);
}

const REMOVED: &str = "[nave: output was removed by rotation before it was read]";

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
    let all = lines_at(&mut host.reader(pb::ReadHostLogsRequest::default()), 0);
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
    let line = lines_at(&mut host.reader(pb::ReadHostLogsRequest::default()), 0).remove(0);
    host.write("i-1-1", 2, 2, "two");
    host.remove("i-1-1", 1);
    let resume = vec![cursor(&line)];
    let tail = pb::ReadHostLogsRequest { resume, tail_lines: 1, ..Default::default() };
    host.write("i-1-1", 2, 3, "three");
    // Nobody knows whether there was more in it.
    let perhaps = "[nave: output may have been removed by rotation before it was read]";
    assert_eq!(texts(&mut host.reader(tail)), [perhaps, "two", "three"]);
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
fn the_tail_counts_lines_of_the_wanted_stream() {
    let host = Host::new();
    for second in 0..20 {
        let stream = if second % 5 == 0 { "stderr" } else { "stdout" };
        host.write_raw("i-1-1", 1, &format!("1970-01-01T00:00:{second:02}Z {stream} F {second}\n"));
    }
    let read = |stream: pb::OutputStream, contains: &str, tail_lines| {
        let (stream, contains) = (stream.into(), contains.to_owned());
        let request = pb::ReadHostLogsRequest { stream, contains, tail_lines, ..Default::default() };
        texts(&mut host.reader(request))
    };
    assert_eq!(read(pb::OutputStream::Stderr, "", 3), ["5", "10", "15"]);
    assert_eq!(read(pb::OutputStream::Stderr, "1", 2), ["10", "15"]);
    assert_eq!(read(pb::OutputStream::Stdout, "", 2), ["18", "19"]);
    assert_eq!(read(pb::OutputStream::Stderr, "", 0).len(), 4);
    assert_eq!(read(pb::OutputStream::Unspecified, "", 3), ["17", "18", "19"]);
}

/// A line as the keeper writes it when it is longer than a record may be.
fn in_parts(stream: &str, text: &str) -> String {
    let parts: Vec<&str> =
        (0..text.len()).step_by(100).map(|at| &text[at..text.len().min(at + 100)]).collect();
    let tag = |index: usize| if index + 1 < parts.len() { "P" } else { "F" };
    let record =
        |(index, part): (usize, &&str)| format!("1970-01-01T00:00:01Z {stream} {} {part}\n", tag(index));
    parts.iter().enumerate().map(record).collect()
}

#[test]
fn a_long_line_is_one_line_to_print_to_find_and_to_count() {
    let host = Host::new();
    let long = format!("{}needle{}", "a".repeat(997), "b".repeat(20_000));
    let long = long.as_str();
    host.write("i-1-1", 1, 1, "before");
    host.write_raw("i-1-1", 1, &in_parts("stdout", long));
    host.write("i-1-1", 2, 2, "after");
    let read = |request| texts(&mut host.reader(request));
    assert_eq!(read(pb::ReadHostLogsRequest::default()), ["before", long, "after"]);
    let found = pb::ReadHostLogsRequest { contains: "needle".into(), ..Default::default() };
    assert_eq!(read(found.clone()), [long]);
    assert_eq!(read(pb::ReadHostLogsRequest { tail_lines: 1, ..found }), [long]);
    assert_eq!(read(pb::ReadHostLogsRequest { tail_lines: 2, ..Default::default() }), [long, "after"]);
    let whole = lines_at(&mut host.reader(pb::ReadHostLogsRequest::default()), 0);
    assert!(whole.iter().all(|line| !line.partial));
}

#[test]
fn two_long_lines_side_by_side_survive_a_break_between_them() {
    let host = Host::new();
    let (out, err) = ("o".repeat(300), "e".repeat(300));
    let (out_records, err_records) = (in_parts("stdout", &out), in_parts("stderr", &err));
    for (a, b) in out_records.split_inclusive('\n').zip(err_records.split_inclusive('\n')) {
        // Each record in a segment of its own.
        let segment = std::fs::read_dir(host.dir.path().join("web/i-1-1")).map_or(0, Iterator::count);
        host.write_raw("i-1-1", u64::try_from(segment).unwrap() + 1, b);
        host.write_raw("i-1-1", u64::try_from(segment).unwrap() + 2, a);
    }
    let all = lines_at(&mut host.reader(pb::ReadHostLogsRequest::default()), 0);
    let both: Vec<&[u8]> = all.iter().map(|line| &line.text[..]).collect();
    assert_eq!(both, [err.as_bytes(), out.as_bytes()]);
    let resume = vec![cursor(&all[0])];
    assert_eq!(texts(&mut host.reader(pb::ReadHostLogsRequest { resume, ..Default::default() })), [out]);
}

#[test]
fn a_line_beyond_the_bound_comes_in_pieces_that_say_so_and_lose_nothing() {
    let host = Host::new();
    let long: String = ('a'..='z').cycle().take(2 * JOINED_BYTES_MAX + 500).collect();
    host.write_raw("i-1-1", 1, &in_parts("stdout", &long));
    let lines = lines_at(&mut host.reader(pb::ReadHostLogsRequest::default()), 0);
    assert_eq!(lines.iter().map(|line| line.partial).collect::<Vec<_>>(), [true, true, false]);
    assert!(lines.iter().all(|line| line.text.len() <= JOINED_BYTES_MAX));
    assert_eq!(lines.iter().flat_map(|line| line.text.to_vec()).collect::<Vec<_>>(), long.as_bytes());
}

#[test]
fn many_long_lines_at_once_are_cut_sooner() {
    let host = Host::new();
    let long = "x".repeat(JOINED_BYTES_MAX - 1);
    let instances = KEPT_BYTES_MAX / JOINED_BYTES_MAX + 8;
    for instance in 1..=instances {
        host.write_raw(&format!("i-{instance}-1"), 1, &in_parts("stdout", &long));
    }
    let mut reader = host.reader(pb::ReadHostLogsRequest::default());
    let (mut read, mut kept): (usize, usize) = (0, 0);
    loop {
        match reader.next_batch(Monotonic(0)).unwrap() {
            Batch::Lines(lines) => read += lines.iter().map(|line| line.text.len()).sum::<usize>(),
            Batch::Searching => {}
            Batch::End => break,
        }
        kept = kept.max(reader.sources.iter().map(Source::bytes).sum());
    }
    assert_eq!(read, instances * long.len(), "and nothing is lost");
    assert!(kept <= KEPT_BYTES_MAX + 2 * JOINED_BYTES_MAX, "{kept}");
}

#[test]
fn a_prompt_is_shown_to_a_follower_after_a_while_and_to_others_at_once() {
    let host = Host::new();
    host.write_raw("i-1-1", 1, "1970-01-01T00:00:01Z stdout P name? ");
    host.write_raw("i-1-1", 1, "\n");
    let shown = |lines: Vec<pb::LogLine>| -> Vec<(String, bool)> {
        lines.iter().map(|line| (String::from_utf8_lossy(&line.text).into_owned(), line.partial)).collect()
    };
    let prompt = [("name? ".to_owned(), true)];
    assert_eq!(shown(lines_at(&mut host.reader(pb::ReadHostLogsRequest::default()), 0)), prompt);
    let mut reader = host.reader(pb::ReadHostLogsRequest { follow: true, ..Default::default() });
    assert_eq!(shown(lines_at(&mut reader, 0)), []);
    assert_eq!(shown(lines_at(&mut reader, 999)), []);
    assert_eq!(shown(lines_at(&mut reader, 1_000)), prompt);
    host.write("i-1-1", 1, 2, "Bob");
    assert_eq!(shown(lines_at(&mut reader, 1_100)), [("Bob".to_owned(), false)]);
    // In time, it is one line.
    host.write_raw("i-1-1", 1, "1970-01-01T00:00:03Z stdout P one \n");
    assert_eq!(shown(lines_at(&mut reader, 2_000)), []);
    host.write_raw("i-1-1", 1, "1970-01-01T00:00:03Z stdout P line\n");
    assert_eq!(shown(lines_at(&mut reader, 2_900)), []);
    host.write("i-1-1", 1, 3, ", whole");
    assert_eq!(shown(lines_at(&mut reader, 3_500)), [("one line, whole".to_owned(), false)]);
}

#[test]
fn a_long_search_that_finds_nothing_says_that_it_goes_on() {
    let host = Host::new();
    let record = "1970-01-01T00:00:01Z stdout F text\n";
    host.write_raw("i-1-1", 1, &record.repeat(4 * STEP_BYTES / record.len()));
    for tail_lines in [0, 5] {
        let request = pb::ReadHostLogsRequest { contains: "none".into(), tail_lines, ..Default::default() };
        let mut reader = host.reader(request);
        let mut looks = 0;
        while let Batch::Searching = reader.next_batch(Monotonic(0)).unwrap() {
            looks += 1;
        }
        assert!(looks >= 3, "{looks} looks for a tail of {tail_lines}");
    }
}

#[test]
fn an_instance_that_is_removed_while_it_is_read_is_read_to_where_it_is_gone() {
    let host = Host::new();
    for number in 0..2 * BATCH_LINES {
        host.write("i-1-1", 1, 1, &number.to_string());
    }
    host.write("i-1-1", 2, 2, "never read");
    let mut reader = host.reader(pb::ReadHostLogsRequest::default());
    let Batch::Lines(first) = reader.next_batch(Monotonic(0)).unwrap() else { panic!("there are lines") };
    std::fs::remove_dir_all(host.dir.path().join("web")).unwrap();
    let rest = texts(&mut reader);
    assert_eq!(first.len() + rest.len(), 2 * BATCH_LINES + 1);
    assert_eq!(rest.last().map(String::as_str), Some(REMOVED));
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
