//! Where the last so many lines of an instance begin.
//!
//! Where every line counts they are counted from the end, without a look at what they say; where lines are chosen, one
//! segment after the other is read, the newest first. Either may take long, so it goes in steps.

use std::collections::VecDeque;
use std::fs::File;
use std::io;

use super::join::{JOINED_BYTES_MAX, Spot};
use super::line::Line;
use super::segments::{CHUNK_BYTES, Folder, Place, Segment, read_at, to_u64};
use super::selection::Filter;
use super::walk::{Step, Walk};

/// A record up to its text is shorter.
const HEAD_BYTES: usize = 64;

/// The search, between two steps.
#[derive(Debug)]
pub(super) struct TailSearch {
    folder: Folder,
    filter: Filter,
    /// Not looked at yet, the newest last.
    segments: Vec<Segment>,
    scan: Option<Scan>,
    count: Count,
    /// Where lines are chosen: the first of those found so far; while there is none, the end of what was looked at.
    first: Option<Place>,
    /// Nothing before it is wanted.
    floor: Option<Place>,
}

/// Whether a search is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Search {
    GoesOn,
    /// Before this no line is asked for, as far as is known.
    Over(Option<Place>),
}

#[derive(Debug)]
enum Scan {
    Backwards(Backwards),
    Forwards(Box<Forwards>),
}

/// What is left to find, and what is known of the records after those that were looked at.
#[derive(Debug)]
struct Count {
    left: u64,
    /// Of each stream, in this epoch.
    next: [Next; 2],
    epoch: u64,
}

/// What follows a record in its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Nothing,
    Text,
    Note,
}

impl TailSearch {
    /// `floor`: nothing before it is wanted.
    pub(super) fn new(
        folder: &Folder,
        filter: &Filter,
        lines: u64,
        floor: Option<Place>,
    ) -> io::Result<Self> {
        let mut segments = folder.segments()?;
        segments.retain(|segment| floor.is_none_or(|(first, _)| *segment >= first));
        let count = Count { left: lines, next: [Next::Nothing; 2], epoch: 0 };
        Ok(Self {
            folder: folder.clone(),
            filter: filter.clone(),
            segments,
            scan: None,
            count,
            first: None,
            floor,
        })
    }

    /// Looks on until it is over, or that many bytes have been read.
    pub(super) fn step(&mut self, budget: &mut usize) -> io::Result<Search> {
        while *budget > 0 {
            let Some(scan) = &mut self.scan else {
                let Some(segment) = self.segments.pop() else { return Ok(Search::Over(self.first)) };
                self.scan = self.begin(segment)?;
                continue;
            };
            let (bytes, found) = match scan {
                Scan::Backwards(scan) => scan.step(&self.filter, &mut self.count)?,
                Scan::Forwards(scan) => scan.step(&mut self.count, &mut self.first)?,
            };
            *budget = budget.saturating_sub(bytes);
            match found {
                Found::Place(place) => return Ok(Search::Over(Some(place))),
                Found::Not => self.scan = None,
                Found::NotYet => {}
            }
        }
        Ok(Search::GoesOn)
    }

    /// From the first of the lines that were found.
    pub(super) fn walk(&self, first: Option<Place>) -> io::Result<Walk> {
        let walk = Walk::new(self.folder.clone(), self.filter.clone());
        match first.max(self.floor) {
            Some(place) => walk.begin_at(place),
            None => Ok(walk),
        }
    }

    /// `None`: it has been removed.
    fn begin(&mut self, segment: Segment) -> io::Result<Option<Scan>> {
        let Some(file) = self.folder.open(segment)? else { return Ok(None) };
        self.count.enter(segment.epoch);
        if self.filter.chooses() {
            let walk = Walk::new(self.folder.clone(), self.filter.clone()).begin_at((segment, 0))?;
            let scan = Forwards { segment, walk, lines: VecDeque::new() };
            return Ok(Some(Scan::Forwards(Box::new(scan))));
        }
        let end = file.metadata()?.len();
        Ok(Some(Scan::Backwards(Backwards { segment, file, end, is_whole: false })))
    }
}

/// What a step has found in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Place(Place),
    NotYet,
    /// Nor will the next.
    Not,
}

impl Count {
    /// No line goes on from one epoch into the next.
    fn enter(&mut self, epoch: u64) {
        if std::mem::replace(&mut self.epoch, epoch) != epoch {
            self.next = [Next::Nothing; 2];
        }
    }

    /// Takes the record before those that were taken; whether with it all are found.
    fn take(&mut self, record: &Line<'_>) -> bool {
        let this = if record.dropped { Next::Note } else { Next::Text };
        let next = std::mem::replace(&mut self.next[usize::from(record.stderr)], this);
        // A part is counted with the record that ends its line, unless there is none.
        if record.partial && next == Next::Text {
            return false;
        }
        self.left -= 1;
        self.left == 0
    }
}

/// Counts the records of a segment from its end.
#[derive(Debug)]
struct Backwards {
    segment: Segment,
    file: File,
    /// All behind it has been looked at.
    end: u64,
    /// The record that ends there has its newline.
    is_whole: bool,
}

impl Backwards {
    fn step(&mut self, filter: &Filter, count: &mut Count) -> io::Result<(usize, Found)> {
        let start = self.end.saturating_sub(to_u64(CHUNK_BYTES));
        let size = usize::try_from(self.end - start).expect("at most one chunk");
        let mut chunk = vec![0; size + HEAD_BYTES];
        let length = read_at(&self.file, &mut chunk, start)?;
        for newline in memchr::memrchr_iter(b'\n', &chunk[..size.min(length)]) {
            if self.ends_at(filter, count, &chunk[newline + 1..length]) {
                return Ok((size, Found::Place((self.segment, start + to_u64(newline) + 1))));
            }
            self.is_whole = true;
        }
        self.end = start;
        if start > 0 {
            return Ok((size, Found::NotYet));
        }
        let is_found = self.ends_at(filter, count, &chunk[..length]);
        Ok((size, if is_found { Found::Place((self.segment, 0)) } else { Found::Not }))
    }

    /// Whether the last line to be found ends with the record that begins here.
    fn ends_at(&self, filter: &Filter, count: &mut Count, bytes: &[u8]) -> bool {
        let head = &bytes[..bytes.len().min(HEAD_BYTES)];
        let head = &head[..memchr::memchr(b'\n', head).unwrap_or(head.len())];
        let record = Line::parse(head).filter(|record| self.is_whole && filter.wants(record));
        record.is_some_and(|record| count.take(&record))
    }
}

/// Reads a segment and keeps the last lines of it that are chosen.
#[derive(Debug)]
struct Forwards {
    segment: Segment,
    walk: Walk,
    /// Where their last records begin.
    lines: VecDeque<u64>,
}

impl Forwards {
    fn step(&mut self, count: &mut Count, first: &mut Option<Place>) -> io::Result<(usize, Found)> {
        let (segment, lines) = (self.segment, &mut self.lines);
        let mut each = |_: &Line<'_>, spot: Spot| keep(lines, segment, count.left, spot);
        let step = self.walk.step(JOINED_BYTES_MAX, &mut each)?;
        if step == Step::End {
            self.walk.give_unfinished(&mut each);
        }
        let is_over = step == Step::End || self.walk.segment() > Some(segment);
        let bytes = match step {
            Step::Read(bytes) => bytes,
            Step::End => 0,
        };
        if !is_over {
            return Ok((bytes, Found::NotYet));
        }
        count.left -= to_u64(self.lines.len());
        *first = self.lines.front().map(|offset| (segment, *offset)).or(*first).or(self.walk.place());
        Ok((bytes, first.filter(|_| count.left == 0).map_or(Found::Not, Found::Place)))
    }
}

/// Adds a line that ends in the segment; one without an end may come after lines behind it.
fn keep(lines: &mut VecDeque<u64>, segment: Segment, most: u64, spot: Spot) {
    let (of, offset) = spot.begins;
    if of != segment {
        return;
    }
    lines.insert(lines.partition_point(|other| *other < offset), offset);
    if to_u64(lines.len()) > most {
        lines.pop_front();
    }
}

#[cfg(test)]
mod tests {
    use nave_proto::ids::InstanceId;

    use super::*;

    const RECORDS: [&str; 10] = [
        "stdout F one",
        "stdout P two",
        "stderr F two",
        "stdout P two",
        "stdout F two",
        "stdout P three",
        "stdout D 1 lines dropped",
        "stdout F four",
        "stderr P five",
        "stdout F six",
    ];

    /// Each record in a segment of its own, or all in one.
    fn folder(apart: bool) -> (tempfile::TempDir, Folder, Vec<Place>) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path(), InstanceId(1));
        std::fs::create_dir(dir.path().join("i-1-1")).unwrap();
        let mut texts = vec![String::new()];
        let mut places = Vec::new();
        for record in RECORDS {
            if apart {
                texts.push(String::new());
            }
            let number = to_u64(texts.len());
            let text = texts.last_mut().unwrap();
            places.push((Segment { epoch: 1, number }, to_u64(text.len())));
            *text += &format!("1970-01-01T00:00:01Z {record}\n");
        }
        texts.last_mut().unwrap().push_str("1970-01-01T00:00:01Z stdout F being writ");
        for (number, text) in (1..).zip(texts) {
            std::fs::write(dir.path().join(format!("i-1-1/{number:010}.log")), text).unwrap();
        }
        (dir, folder, places)
    }

    fn search(folder: &Folder, filter: &Filter, lines: u64) -> (Option<Place>, usize) {
        let mut search = TailSearch::new(folder, filter, lines, None).unwrap();
        let mut steps = 1;
        loop {
            match search.step(&mut 1).unwrap() {
                Search::Over(found) => return (found, steps),
                Search::GoesOn => steps += 1,
            }
        }
    }

    /// Where the last so many lines end, as records of the list above.
    fn begins_with(filter: &Filter, wanted: &[usize]) {
        for apart in [false, true] {
            check(apart, filter, wanted);
        }
    }

    fn check(apart: bool, filter: &Filter, wanted: &[usize]) {
        let (_dir, folder, places) = folder(apart);
        for (lines, record) in (1..).zip(wanted) {
            let (found, _) = search(&folder, filter, lines);
            assert_eq!(found, Some(places[*record]), "{lines} lines, apart: {apart}");
        }
        // Where lines are chosen, nothing before the first of them is read again.
        let first = wanted.last().filter(|_| filter.chooses()).map(|record| places[*record]);
        assert_eq!(search(&folder, filter, to_u64(wanted.len()) + 1).0, first);
    }

    #[test]
    fn a_line_of_many_parts_is_one_and_what_has_no_end_is_one_too() {
        begins_with(&Filter::default(), &[9, 8, 7, 6, 5, 4, 2, 0]);
    }

    #[test]
    fn a_prompt_of_one_epoch_is_no_beginning_of_a_line_of_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path(), InstanceId(1));
        for (epoch, record) in [(1, "stdout P prompt"), (2, "stdout F text")] {
            std::fs::create_dir(dir.path().join(format!("i-1-{epoch}"))).unwrap();
            let path = dir.path().join(format!("i-1-{epoch}/0000000001.log"));
            std::fs::write(path, format!("1970-01-01T00:00:01Z {record}\n")).unwrap();
        }
        let prompt = Some((Segment { epoch: 1, number: 1 }, 0));
        assert_eq!(search(&folder, &Filter::default(), 2).0, prompt);
        assert_eq!(search(&folder, &Filter::containing("t"), 2).0, prompt);
    }

    #[test]
    fn only_the_wanted_stream_is_counted() {
        begins_with(&Filter::of_stream(true), &[8, 2]);
        begins_with(&Filter::of_stream(false), &[9, 7, 6, 5, 4, 0]);
    }

    #[test]
    fn lines_are_chosen_by_all_that_they_say() {
        begins_with(&Filter::containing("twotwotwo"), &[6, 4]);
        begins_with(&Filter::containing("two"), &[6, 4, 2]);
        check(false, &Filter::containing("five"), &[8, 6]);
    }

    #[test]
    fn a_long_search_goes_in_steps() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path(), InstanceId(1));
        std::fs::create_dir(dir.path().join("i-1-1")).unwrap();
        let text = "1970-01-01T00:00:01Z stdout F text\n".repeat(10_000);
        std::fs::write(dir.path().join("i-1-1/0000000001.log"), &text).unwrap();
        let end = to_u64(text.len());
        for (filter, offset) in
            [(Filter::default(), 35), (Filter::containing("text"), 35), (Filter::containing("none"), end)]
        {
            let (found, steps) = search(&folder, &filter, 9_999);
            assert_eq!(found, Some((Segment { epoch: 1, number: 1 }, offset)));
            assert!(steps >= text.len() / CHUNK_BYTES, "{steps}");
        }
    }
}
