//! Bytes of a stream into lines of the CRI form: `2026-11-26T13:59:24.123456789Z stdout F text`.
//!
//! Pure. `F` ends a line, `P` is a part of one that goes on in the next record of its stream, `D` counts what is
//! missing at its place.

use crate::clock::SECOND;

/// The longest text of one record; what is longer comes in parts.
pub(crate) const LINE_BYTES_MAX: usize = 16 * 1024;

/// Which of a process's two outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout = 0,
    Stderr = 1,
}

pub(crate) const STREAMS: [Stream; 2] = [Stream::Stdout, Stream::Stderr];

impl Stream {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Where the stream's name is in a record.
const STREAM_AT: usize = 31;

/// How many records of each stream are in `text`.
pub(crate) fn count(text: &[u8]) -> [u64; 2] {
    let mut counts = [0; 2];
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let stderr = line.get(STREAM_AT..).is_some_and(|rest| rest.starts_with(b"stderr"));
        counts[usize::from(stderr)] += 1;
    }
    counts
}

/// The stamp of one moment, the same for all that is read at once.
pub(crate) struct Stamp([u8; 30]);

impl Stamp {
    pub(crate) fn new(unix_ns: i64) -> Self {
        let (seconds, ns) = (unix_ns.div_euclid(SECOND), unix_ns.rem_euclid(SECOND));
        let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let (year, month, day) = civil(days);
        let mut bytes = *b"0000-00-00T00:00:00.000000000Z";
        for (at, width, mut value) in [
            (0, 4, year),
            (5, 2, month),
            (8, 2, day),
            (11, 2, second / 3600),
            (14, 2, second / 60 % 60),
            (17, 2, second % 60),
            (20, 9, ns),
        ] {
            for digit in bytes[at..at + width].iter_mut().rev() {
                *digit = b'0' + u8::try_from(value % 10).unwrap_or(0);
                value /= 10;
            }
        }
        Self(bytes)
    }

    pub(crate) fn record(&self, out: &mut Vec<u8>, stream: Stream, tag: u8, parts: [&[u8]; 2]) {
        out.extend_from_slice(&self.0);
        out.push(b' ');
        out.extend_from_slice(stream.name().as_bytes());
        out.extend_from_slice(&[b' ', tag, b' ']);
        out.extend_from_slice(parts[0]);
        out.extend_from_slice(parts[1]);
        out.push(b'\n');
    }
}

/// Appends a record as the output of processes has them, for logs that others than the keeper write.
pub fn write_line(unix_ns: i64, text: &[u8], out: &mut Vec<u8>) {
    Stamp::new(unix_ns).record(out, Stream::Stdout, b'F', [text, b""]);
}

/// Appends the record that stands in the place of so many lines that could not be written.
pub fn write_missing(unix_ns: i64, lines: u64, out: &mut Vec<u8>) {
    let text = format!("{lines} lines dropped");
    Stamp::new(unix_ns).record(out, Stream::Stdout, b'D', [text.as_bytes(), b""]);
}

/// Year, month and day of a day since 1970, by the well-known arithmetic of 400-year cycles from 1 March.
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

/// Cuts one stream into lines, holding what has no end yet.
#[derive(Debug, Default)]
pub(crate) struct Splitter {
    held: Vec<u8>,
    /// The last record was a part, and its line has not ended.
    within_line: bool,
}

impl Splitter {
    /// Whether a line waits for its end.
    pub(crate) fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// Adds what was read, appends what is whole to `out`.
    pub(crate) fn push(&mut self, out: &mut Vec<u8>, stamp: &Stamp, stream: Stream, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = LINE_BYTES_MAX - self.held.len();
            let end = memchr::memchr(b'\n', &bytes[..bytes.len().min(room + 1)]);
            match end {
                Some(end) => {
                    stamp.record(out, stream, b'F', [&self.held, &bytes[..end]]);
                    (self.held, self.within_line) = (Vec::new(), false);
                    bytes = &bytes[end + 1..];
                }
                // More than a record may hold: the rest follows in the next.
                None if bytes.len() > room => {
                    stamp.record(out, stream, b'P', [&self.held, &bytes[..room]]);
                    (self.held, self.within_line) = (Vec::new(), true);
                    bytes = &bytes[room..];
                }
                None => {
                    self.held.extend_from_slice(bytes);
                    return;
                }
            }
        }
    }

    /// Gives out what is held, as a whole line when the stream has ended, else as a part. A line of which parts were given
    /// out ends with its stream, so that nobody takes what the next process says for the rest of it.
    pub(crate) fn flush(&mut self, out: &mut Vec<u8>, stamp: &Stamp, stream: Stream, ended: bool) {
        if self.holds() || (ended && self.within_line) {
            stamp.record(out, stream, if ended { b'F' } else { b'P' }, [&self.held, b""]);
            (self.held, self.within_line) = (Vec::new(), !ended);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: i64 = 1_795_701_564_123_456_789;

    fn split(chunks: &[&[u8]]) -> Vec<String> {
        let mut splitter = Splitter::default();
        let mut out = Vec::new();
        for chunk in chunks {
            splitter.push(&mut out, &Stamp::new(AT), Stream::Stderr, chunk);
        }
        splitter.flush(&mut out, &Stamp::new(AT), Stream::Stderr, true);
        String::from_utf8(out).unwrap().lines().map(|line| line[38..].to_owned()).collect()
    }

    #[test]
    fn stamps_are_the_calendar() {
        let cases = [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (AT, "2026-11-26T13:59:24.123456789Z"),
            (951_782_400 * SECOND, "2000-02-29T00:00:00.000000000Z"),
            (4_107_542_399 * SECOND, "2100-02-28T23:59:59.000000000Z"),
        ];
        for (ns, text) in cases {
            assert_eq!(std::str::from_utf8(&Stamp::new(ns).0).unwrap(), text);
        }
    }

    #[test]
    fn a_record_has_the_form_that_readers_know() {
        let mut out = Vec::new();
        Splitter::default().push(&mut out, &Stamp::new(AT), Stream::Stdout, b"hello\n");
        assert_eq!(out, b"2026-11-26T13:59:24.123456789Z stdout F hello\n");
        assert_eq!(count(&out), [1, 0]);
    }

    #[test]
    fn lines_are_the_same_however_they_arrive() {
        let wanted = ["F one", "F ", "F two", "F end"];
        assert_eq!(split(&[b"one\n\ntwo\nend"]), wanted);
        assert_eq!(split(&[b"o", b"ne\n", b"\ntw", b"o\ne", b"nd"]), wanted);
    }

    #[test]
    fn a_line_of_which_a_part_was_given_out_ends_with_its_stream() {
        let mut splitter = Splitter::default();
        let (mut out, stamp) = (Vec::new(), Stamp::new(AT));
        splitter.push(&mut out, &stamp, Stream::Stdout, b"fatal: no such file");
        // After a moment, when the process ends, and when the next one does that has said nothing.
        for ended in [false, true, true] {
            splitter.flush(&mut out, &stamp, Stream::Stdout, ended);
        }
        let records = String::from_utf8(out).unwrap();
        let records: Vec<&str> = records.lines().map(|line| &line[38..]).collect();
        assert_eq!(records, ["P fatal: no such file", "F "]);
    }

    #[test]
    fn a_long_line_comes_in_parts_that_join_to_it() {
        for length in [LINE_BYTES_MAX - 1, LINE_BYTES_MAX, LINE_BYTES_MAX + 1, 3 * LINE_BYTES_MAX + 5] {
            let mut line: Vec<u8> = (b'a'..=b'z').cycle().take(length).collect();
            line.push(b'\n');
            for chunk in [1000, LINE_BYTES_MAX, line.len()] {
                let records = split(&line.chunks(chunk).collect::<Vec<_>>());
                let (last, parts) = records.split_last().unwrap();
                assert!(
                    last.starts_with("F ") && parts.iter().all(|part| part.starts_with("P ")),
                    "{length}"
                );
                assert!(records.iter().all(|record| record.len() <= LINE_BYTES_MAX + 2));
                let joined: String = records.iter().map(|record| &record[2..]).collect();
                assert_eq!(joined.as_bytes(), &line[..length]);
            }
        }
    }
}
