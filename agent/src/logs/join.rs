//! Parts put together to lines. The keeper writes a long line in parts, and a line that has no end after a moment as a
//! part too, so that a prompt is seen; who reads them means the line. It counts as written where its last part is: that
//! gives it its time and its place among the others. Pure.

use super::line::Line;
use super::segments::Place;

/// The longest line that parts are joined to. What is longer comes in pieces of at most this size, and each but the last
/// says, as the keeper's parts do, that it goes on.
pub(super) const JOINED_BYTES_MAX: usize = 1024 * 1024;

/// Where a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spot {
    /// Of its last record.
    pub(super) begins: Place,
    /// Where to go on once it has been handed on.
    pub(super) after: Place,
}

/// What takes the lines.
pub(super) type Each<'a> = &'a mut dyn FnMut(&Line<'_>, Spot);

/// The lines of both streams that have no end yet.
#[derive(Debug, Default)]
pub(super) struct Joiner {
    streams: [Kept; 2],
}

/// Of one stream.
#[derive(Debug, Default)]
struct Kept {
    line: Option<Unfinished>,
    /// What was read of its line was handed on without its end.
    is_shown: bool,
}

#[derive(Debug)]
struct Unfinished {
    text: Vec<u8>,
    /// Of the last part.
    unix_ns: i64,
    begins: Place,
    /// All of it lies before what was asked for: by itself it is not wanted.
    is_old: bool,
}

impl Joiner {
    /// Adds a record and hands on what is whole by it. `limit`: more bytes are not kept of a line.
    pub(super) fn push(&mut self, record: &Line<'_>, spot: Spot, limit: usize, each: Each<'_>) {
        let kept = &mut self.streams[usize::from(record.stderr)];
        // What is missing may be the rest of it.
        if record.dropped || kept.bytes() > limit.saturating_sub(record.text.len()) {
            kept.give(record.stderr, spot.begins, each);
        }
        let is_shown = std::mem::take(&mut kept.is_shown);
        match &mut kept.line {
            None if record.partial => kept.line = Some(Unfinished::of(record, spot)),
            // Only the end of what was shown.
            None if is_shown && record.text.is_empty() => {}
            None => each(record, spot),
            Some(line) => {
                line.add(record, spot);
                if !record.partial {
                    each(&Line { text: &line.text, ..record.clone() }, spot);
                    kept.line = None;
                }
            }
        }
    }

    /// Hands on what has no end, as lines that go on. `after`: all before it has been read.
    pub(super) fn give(&mut self, after: Place, each: Each<'_>) {
        for (kept, stderr) in self.streams.iter_mut().zip([false, true]) {
            if kept.is_new() {
                kept.give(stderr, after, each);
            }
        }
    }

    /// What there is lies before what was asked for: it is only the beginning of what may follow.
    pub(super) fn grow_old(&mut self) {
        let lines = self.streams.iter_mut().filter_map(|kept| kept.line.as_mut());
        lines.for_each(|line| line.is_old = true);
    }

    /// What there is of this stream has been shown.
    pub(super) fn forget(&mut self, stderr: bool) {
        self.streams[usize::from(stderr)] = Kept { line: None, is_shown: true };
    }

    /// Whether there is anything to [give](Self::give).
    pub(super) fn has_new(&self) -> bool {
        self.streams.iter().any(Kept::is_new)
    }

    pub(super) fn unfinished(&self) -> impl Iterator<Item = &[u8]> {
        self.streams.iter().filter_map(|kept| kept.line.as_ref()).map(|line| &line.text[..])
    }

    pub(super) fn bytes(&self) -> usize {
        self.streams.iter().map(Kept::bytes).sum()
    }
}

impl Kept {
    fn is_new(&self) -> bool {
        self.line.as_ref().is_some_and(|line| !line.is_old)
    }

    fn bytes(&self) -> usize {
        self.line.as_ref().map_or(0, |line| line.text.len())
    }

    fn give(&mut self, stderr: bool, after: Place, each: Each<'_>) {
        if let Some(line) = self.line.take()
            && !line.is_old
        {
            let spot = Spot { begins: line.begins, after };
            let (unix_ns, text) = (line.unix_ns, &line.text[..]);
            each(&Line { unix_ns, stderr, partial: true, dropped: false, text }, spot);
            self.is_shown = true;
        }
    }
}

impl Unfinished {
    fn of(record: &Line<'_>, spot: Spot) -> Self {
        Self { text: record.text.to_vec(), unix_ns: record.unix_ns, begins: spot.begins, is_old: false }
    }

    fn add(&mut self, record: &Line<'_>, spot: Spot) {
        self.text.extend_from_slice(record.text);
        (self.unix_ns, self.begins, self.is_old) = (record.unix_ns, spot.begins, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::segments::Segment;

    fn place(offset: u64) -> Place {
        (Segment { epoch: 1, number: 1 }, offset)
    }

    /// Records as `out P text`, each of ten bytes.
    fn pushed(joiner: &mut Joiner, from: u64, limit: usize, records: &[&str]) -> Vec<String> {
        let mut lines = Vec::new();
        for (at, record) in (from..).zip(records) {
            let (stream, tag, text) = (&record[..3], &record[4..5], &record.as_bytes()[6..]);
            let unix_ns = i64::try_from(at).unwrap();
            let (stderr, partial, dropped) = (stream == "err", tag == "P", tag == "D");
            let line = Line { unix_ns, stderr, partial, dropped, text };
            let spot = Spot { begins: place(at * 10), after: place(at * 10 + 10) };
            joiner.push(&line, spot, limit, &mut |line, spot| lines.push(said(line, spot)));
        }
        lines
    }

    fn given(joiner: &mut Joiner, after: u64) -> Vec<String> {
        let mut lines = Vec::new();
        joiner.give(place(after), &mut |line, spot| lines.push(said(line, spot)));
        lines
    }

    fn said(line: &Line<'_>, spot: Spot) -> String {
        let goes_on = if line.partial { "+" } else { "" };
        let text = String::from_utf8_lossy(line.text);
        format!("{text}{goes_on} at {} of {}..{}", line.unix_ns, spot.begins.1, spot.after.1)
    }

    #[test]
    fn parts_are_one_line_of_their_stream_where_it_ends() {
        let mut joiner = Joiner::default();
        let records = ["out P a", "err P x", "out P b", "err F y", "out F c", "out F d"];
        let lines = ["xy at 3 of 30..40", "abc at 4 of 40..50", "d at 5 of 50..60"];
        assert_eq!(pushed(&mut joiner, 0, 100, &records), lines);
        assert_eq!((given(&mut joiner, 60), joiner.bytes()), (vec![], 0));
    }

    #[test]
    fn what_has_no_end_is_given_once_and_its_rest_is_a_line() {
        let mut joiner = Joiner::default();
        assert_eq!(pushed(&mut joiner, 0, 100, &["out P a", "out P b", "err F x"]), ["x at 2 of 20..30"]);
        assert_eq!(joiner.unfinished().collect::<Vec<_>>(), [b"ab"]);
        assert_eq!(given(&mut joiner, 30), ["ab+ at 1 of 10..30"]);
        assert_eq!(pushed(&mut joiner, 3, 100, &["out F c"]), ["c at 3 of 30..40"]);
    }

    #[test]
    fn the_end_of_what_was_given_is_no_line_by_itself() {
        let mut joiner = Joiner::default();
        for _ in 0..2 {
            pushed(&mut joiner, 0, 100, &["out P a"]);
            assert_eq!(given(&mut joiner, 10), ["a+ at 0 of 0..10"]);
            assert_eq!(pushed(&mut joiner, 1, 100, &["out F ", "out F "]), [" at 2 of 20..30"]);
        }
        pushed(&mut joiner, 0, 100, &["err P a"]);
        joiner.forget(true);
        assert_eq!(pushed(&mut joiner, 1, 100, &["err F ", "err F "]), [" at 2 of 20..30"]);
    }

    #[test]
    fn a_line_that_is_too_long_comes_in_pieces_and_nothing_of_it_is_lost() {
        let mut joiner = Joiner::default();
        let records = ["out P aaaa", "out P bbbb", "out P cc", "out P dddd", "out F ee"];
        let lines = ["aaaabbbb+ at 1 of 10..20", "ccddddee at 4 of 40..50"];
        assert_eq!(pushed(&mut joiner, 0, 8, &records), lines);
        // With no room at all, part by part.
        let lines = ["aaaa+ at 0 of 0..10", "bbbb+ at 1 of 10..20", "c at 2 of 20..30"];
        assert_eq!(pushed(&mut joiner, 0, 0, &["out P aaaa", "out P bbbb", "out F c"]), lines);
    }

    #[test]
    fn lines_that_are_missing_end_the_line_before_them() {
        let mut joiner = Joiner::default();
        let lines = ["a+ at 0 of 0..10", "2 lines dropped at 1 of 10..20", "b at 2 of 20..30"];
        assert_eq!(pushed(&mut joiner, 0, 100, &["out P a", "out D 2 lines dropped", "out F b"]), lines);
    }

    #[test]
    fn what_is_old_is_only_the_beginning_of_what_follows() {
        let mut joiner = Joiner::default();
        assert!(pushed(&mut joiner, 0, 100, &["out P a", "err P x"]).is_empty());
        joiner.grow_old();
        assert!(!joiner.has_new() && given(&mut joiner, 20).is_empty());
        assert_eq!(pushed(&mut joiner, 2, 100, &["out P b"]), Vec::<String>::new());
        assert_eq!(given(&mut joiner, 30), ["ab+ at 2 of 20..30"]);
        pushed(&mut joiner, 3, 100, &["out P c"]);
        joiner.forget(false);
        assert_eq!(pushed(&mut joiner, 4, 100, &["out F d"]), ["d at 4 of 40..50"]);
    }
}
