//! The segment files of one instance as one long text, over rotation and over its epochs on this host, line by line.
//!
//! A reader at the end of a segment may go on to the next as soon as it sees it, after one more look at the old. What
//! rotation has removed before it was read is said in its place, as lines that the keeper had to drop are.

use std::fs::File;
use std::io;

use super::join::{Each, Joiner, Spot};
use super::line::Line;
use super::segments::{Folder, Place, Segment, to_u64, whole_lines, without_newline};
use super::selection::Filter;

/// Goes forward through one instance's output.
#[derive(Debug)]
pub(super) struct Walk {
    folder: Folder,
    filter: Filter,
    /// Where the next read begins; `None`: nothing was seen yet.
    at: Option<Place>,
    begin: Option<Begin>,
    open: Option<(Segment, File)>,
    joiner: Joiner,
    /// The newest segment that was ever seen.
    newest: Option<Segment>,
    /// What is missing before the next record.
    lost: Option<Lost>,
    /// The first line ever written is wanted, not only the oldest that is kept.
    from_first: bool,
    /// All that was there when it was last looked has been read.
    is_through: bool,
    /// Of the last record.
    unix_ns: i64,
}

/// What came of one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// So many bytes were read.
    Read(usize),
    /// There is no more for now.
    End,
}

/// Where what was asked for begins. What is read before it is only there to know the beginnings of lines.
#[derive(Debug, Clone, Copy)]
struct Begin {
    at: Place,
    /// All that had an end before it has been shown, and nothing else.
    resumes: bool,
}

/// Output that nobody can read any more, by what is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Lost {
    Perhaps,
    Certainly,
}

impl Walk {
    /// From the oldest line that is kept.
    pub(super) fn new(folder: Folder, filter: Filter) -> Self {
        Self {
            folder,
            filter,
            at: None,
            begin: None,
            open: None,
            joiner: Joiner::default(),
            newest: None,
            lost: None,
            from_first: false,
            is_through: false,
            unix_ns: 0,
        }
    }

    /// From the first line that was written.
    pub(super) fn begin_at_first(self) -> Self {
        Self { from_first: true, ..self }
    }

    /// From a time on, as the filter has it.
    pub(super) fn from_time(folder: Folder, filter: Filter) -> io::Result<Self> {
        let walk = Self::new(folder, filter);
        match walk.folder.place_of_time(walk.filter.since_unix_ns)? {
            Some(place) => walk.begin_at(place),
            None => Ok(walk),
        }
    }

    /// From a place on, of which all before is not wanted.
    pub(super) fn begin_at(self, place: Place) -> io::Result<Self> {
        let at = self.folder.look_back(place)?;
        Ok(self.begun(at, place, false))
    }

    /// On from a place, all before having been shown.
    pub(super) fn resume_at(self, place: Place) -> io::Result<Self> {
        let at = self.folder.look_back(place)?;
        Ok(self.begun(at, place, true))
    }

    fn begun(self, at: Place, place: Place, resumes: bool) -> Self {
        Self { at: Some(at), begin: Some(Begin { at: place, resumes }), ..self }
    }

    /// The segment that is being read.
    pub(super) fn segment(&self) -> Option<Segment> {
        self.at.map(|(segment, _)| segment)
    }

    /// Where it goes on.
    pub(super) fn place(&self) -> Option<Place> {
        self.at
    }

    pub(super) fn is_through(&self) -> bool {
        self.is_through
    }

    /// What has been read of lines that have no end yet.
    pub(super) fn unfinished(&self) -> impl Iterator<Item = &[u8]> {
        self.joiner.unfinished()
    }

    pub(super) fn has_unfinished(&self) -> bool {
        self.joiner.has_new()
    }

    /// Bytes of lines that have no end yet.
    pub(super) fn bytes(&self) -> usize {
        self.joiner.bytes()
    }

    /// Reads one chunk, or goes on to the next segment. `limit`: more bytes are not kept of a line.
    pub(super) fn step(&mut self, limit: usize, each: Each<'_>) -> io::Result<Step> {
        let Some(at) = self.at else { return self.enter() };
        match self.read_chunk(at, limit, each)? {
            Some(bytes) => Ok(Step::Read(bytes)),
            None => self.leave(at, limit, each),
        }
    }

    /// Hands on the lines that have no end, as lines that go on.
    pub(super) fn give_unfinished(&mut self, each: Each<'_>) {
        self.pass_begin();
        let Some(after) = self.at else { return };
        let Self { joiner, filter, .. } = self;
        joiner.give(after, &mut |line, spot| {
            if filter.admits(line) {
                each(line, spot);
            }
        });
    }

    /// What has no end will have none.
    fn end_lines(&mut self, each: Each<'_>) {
        self.give_unfinished(each);
        self.joiner = Joiner::default();
    }

    fn enter(&mut self) -> io::Result<Step> {
        let Some(first) = self.segments()?.first().copied() else {
            self.is_through = true;
            return Ok(Step::End);
        };
        if self.from_first && first.number > 1 {
            self.lost = Some(Lost::Certainly);
        }
        self.at = Some((first, 0));
        Ok(Step::Read(0))
    }

    /// At the end of a segment: on to the next, if there is one.
    fn leave(&mut self, at: Place, limit: usize, each: Each<'_>) -> io::Result<Step> {
        let (segment, _) = at;
        let segments = self.segments()?;
        let Some(next) = segments.iter().copied().find(|other| *other > segment) else {
            self.miss_the_rest(at, each);
            self.is_through = true;
            return Ok(Step::End);
        };
        // The next one existed before this look, so after it the old one is complete.
        if let Some(bytes) = self.read_chunk(at, limit, each)? {
            return Ok(Step::Read(bytes));
        }
        self.lost = self.lost.max(self.lost_before(at, next, segments.contains(&segment)));
        if self.lost.is_some() || next.epoch != segment.epoch {
            self.end_lines(each);
        }
        (self.at, self.open) = (Some((next, 0)), None);
        Ok(Step::Read(0))
    }

    /// What is missing between the end of what was read and `next`. `listed`: the segment that was read is still there.
    fn lost_before(&self, at: Place, next: Segment, listed: bool) -> Option<Lost> {
        let is_open = self.open.is_some();
        match self.begin {
            Some(begin) if next <= begin.at.0 => None,
            Some(begin) if at.0 < begin.at.0 => lost(begin.at, false, false, next),
            _ => lost(at, is_open, listed || self.is_through, next),
        }
    }

    /// Later segments were seen, and all are gone: nothing will come that this could be said before.
    fn miss_the_rest(&mut self, at: Place, each: Each<'_>) {
        if self.newest.take().is_some_and(|newest| newest > at.0) {
            self.end_lines(each);
            self.say(Lost::Certainly, self.unix_ns, Spot { begins: at, after: at }, each);
        }
    }

    /// Takes the whole lines at a place. `None`: there are none (yet), or it has been removed.
    fn read_chunk(
        &mut self,
        (segment, offset): Place,
        limit: usize,
        each: Each<'_>,
    ) -> io::Result<Option<usize>> {
        if self.open.as_ref().is_none_or(|(open, _)| *open != segment) {
            self.open = self.folder.open(segment)?.map(|file| (segment, file));
        }
        let Some((_, file)) = &self.open else { return Ok(None) };
        let Some(chunk) = whole_lines(file, offset)? else { return Ok(None) };
        let mut begins = offset;
        for record in chunk.split_inclusive(|byte| *byte == b'\n') {
            let ends = begins + to_u64(record.len());
            if let Some(line) = Line::parse(without_newline(record)) {
                let spot = Spot { begins: (segment, begins), after: (segment, ends) };
                self.take(&line, spot, limit, each);
            }
            begins = ends;
        }
        (self.at, self.is_through) = (Some((segment, begins)), false);
        Ok(Some(chunk.len()))
    }

    fn take(&mut self, record: &Line<'_>, spot: Spot, limit: usize, each: Each<'_>) {
        self.unix_ns = record.unix_ns;
        if let Some(lost) = self.lost.take() {
            self.say(lost, record.unix_ns, Spot { after: spot.begins, ..spot }, each);
        }
        if let Some(begin) = self.begin.filter(|begin| spot.after <= begin.at) {
            self.take_before(begin, record, spot, limit);
            return;
        }
        self.pass_begin();
        let Self { joiner, filter, .. } = self;
        if filter.wants(record) {
            joiner.push(record, spot, limit, &mut |line, spot| {
                if filter.admits(line) {
                    each(line, spot);
                }
            });
        }
    }

    fn take_before(&mut self, begin: Begin, record: &Line<'_>, spot: Spot, limit: usize) {
        if self.filter.wants(record) {
            self.joiner.push(record, spot, limit, &mut |_, _| {});
        }
        // It was shown although it has no end, or nobody could have got to a place behind it.
        if begin.resumes && record.partial && spot.after == begin.at {
            self.joiner.forget(record.stderr);
        }
    }

    fn pass_begin(&mut self) {
        if self.begin.take().is_some_and(|begin| !begin.resumes) {
            self.joiner.grow_old();
        }
    }

    /// It passes every choice but that of a time: what is missing might have been chosen.
    fn say(&self, lost: Lost, unix_ns: i64, spot: Spot, each: Each<'_>) {
        let stderr = self.filter.stderr.unwrap_or_default();
        let line = Line { unix_ns, stderr, partial: false, dropped: true, text: lost.text().as_bytes() };
        if self.filter.admits(&line) {
            each(&line, spot);
        }
    }

    fn segments(&mut self) -> io::Result<Vec<Segment>> {
        let segments = self.folder.segments()?;
        self.newest = self.newest.max(segments.last().copied());
        Ok(segments)
    }
}

impl Lost {
    fn text(self) -> &'static str {
        match self {
            Self::Perhaps => "output may have been removed by rotation before it was read",
            Self::Certainly => "output was removed by rotation before it was read",
        }
    }
}

/// What is missing between a place and a later segment. `is_read`: the place's segment was read to its end. `is_last`: no
/// later one of its epoch can have come and gone unseen.
fn lost((segment, offset): Place, is_read: bool, is_last: bool, next: Segment) -> Option<Lost> {
    let same_epoch = next.epoch == segment.epoch;
    let expected = if same_epoch { segment.number + 1 } else { 1 };
    match (is_read, is_last || same_epoch) {
        _ if next.number > expected => Some(Lost::Certainly),
        // It was there once, so there was something in it.
        (false, _) if offset == 0 => Some(Lost::Certainly),
        (false, _) | (true, false) => Some(Lost::Perhaps),
        (true, true) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write as _;
    use std::path::{Path, PathBuf};

    use nave_proto::ids::InstanceId;

    use super::*;
    use crate::logs::join::JOINED_BYTES_MAX;

    fn path(dir: &Path, epoch: u64, number: u64) -> PathBuf {
        dir.join(format!("i-1-{epoch}/{number:010}.log"))
    }

    fn write(dir: &Path, epoch: u64, number: u64, record: &str) {
        let path = path(dir, epoch, number);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
        writeln!(file, "1970-01-01T00:00:01Z {record}").unwrap();
    }

    fn walk(dir: &Path) -> Walk {
        Walk::new(Folder::new(dir, InstanceId(1)), Filter::default())
    }

    /// All lines up to the end for now.
    fn lines(walk: &mut Walk) -> Vec<String> {
        let mut lines = Vec::new();
        let mut each = |line: &Line<'_>, _: Spot| lines.push(said(line));
        while walk.step(JOINED_BYTES_MAX, &mut each).unwrap() != Step::End {}
        lines
    }

    fn said(line: &Line<'_>) -> String {
        let text = String::from_utf8_lossy(line.text);
        match (line.dropped, line.partial) {
            (true, _) => format!("[{text}]"),
            (false, true) => format!("{text}+"),
            (false, false) => text.into_owned(),
        }
    }

    const CERTAINLY: &str = "[output was removed by rotation before it was read]";
    const PERHAPS: &str = "[output may have been removed by rotation before it was read]";

    /// A line is written, and the segment left, between the look at its end and the look for the next one.
    #[test]
    fn what_is_written_just_before_a_rotation_is_read_before_the_next_segment() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, 1, "stdout F one");
        let mut walk = walk(dir.path());
        assert_eq!(lines(&mut walk), ["one"]);
        let at = walk.at.unwrap();
        write(dir.path(), 1, 1, "stdout F two");
        write(dir.path(), 1, 2, "stdout F three");
        let mut left = Vec::new();
        walk.leave(at, JOINED_BYTES_MAX, &mut |line, _| left.push(said(line))).unwrap();
        assert_eq!(left, ["two"]);
        assert_eq!(lines(&mut walk), ["three"]);
    }

    #[test]
    fn segments_that_came_and_went_unread_are_said_in_their_place() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, 1, "stdout F one");
        let mut walk = walk(dir.path());
        assert_eq!(lines(&mut walk), ["one"]);
        write(dir.path(), 1, 1, "stdout P hal");
        std::fs::remove_file(path(dir.path(), 1, 1)).unwrap();
        write(dir.path(), 1, 3, "stdout F f");
        write(dir.path(), 1, 3, "stdout F four");
        // The half is not joined to what is no rest of it.
        assert_eq!(lines(&mut walk), ["hal+", CERTAINLY, "f", "four"]);
        // The next epoch begins with its second segment.
        write(dir.path(), 2, 2, "stderr F five");
        assert_eq!(lines(&mut walk), [CERTAINLY, "five"]);
    }

    #[test]
    fn what_was_read_to_its_end_may_go_and_nothing_is_said() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, 1, "stdout F one");
        let mut walk = walk(dir.path());
        assert_eq!(lines(&mut walk), ["one"]);
        write(dir.path(), 1, 2, "stdout F two");
        std::fs::remove_file(path(dir.path(), 1, 1)).unwrap();
        assert_eq!(lines(&mut walk), ["two"]);
        std::fs::remove_dir_all(dir.path().join("i-1-1")).unwrap();
        write(dir.path(), 2, 1, "stdout F three");
        assert_eq!(lines(&mut walk), ["three"]);
    }

    #[test]
    fn a_segment_that_went_before_it_was_opened_is_said() {
        let dir = tempfile::tempdir().unwrap();
        for number in 1..=3 {
            write(dir.path(), 1, number, &format!("stdout F {number}"));
        }
        let segment = Segment { epoch: 1, number: 2 };
        let begun = [walk(dir.path()).begin_at((segment, 0)), walk(dir.path()).resume_at((segment, 5))];
        std::fs::remove_file(path(dir.path(), 1, 2)).unwrap();
        for (walk, note) in begun.into_iter().zip([CERTAINLY, PERHAPS]) {
            assert_eq!(lines(&mut walk.unwrap()), [note, "3"]);
        }
    }

    #[test]
    fn all_that_goes_in_the_midst_of_it_is_said_at_once() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, 1, "stdout F one");
        write(dir.path(), 1, 2, "stdout F two");
        let mut walk = walk(dir.path());
        let mut read = Vec::new();
        walk.step(JOINED_BYTES_MAX, &mut |_, _| {}).unwrap();
        walk.step(JOINED_BYTES_MAX, &mut |line, _| read.push(said(line))).unwrap();
        std::fs::remove_dir_all(dir.path().join("i-1-1")).unwrap();
        read.extend(lines(&mut walk));
        assert_eq!(read, ["one", CERTAINLY]);
        assert_eq!(lines(&mut walk), Vec::<String>::new(), "said once");
    }

    #[test]
    fn one_that_is_wanted_from_its_first_line_says_when_that_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, 2, "stdout F two");
        assert_eq!(lines(&mut walk(dir.path())), ["two"]);
        assert_eq!(lines(&mut walk(dir.path()).begin_at_first()), [CERTAINLY, "two"]);
    }

    #[test]
    fn what_is_lost_follows_from_the_numbers() {
        let segment = |epoch, number| Segment { epoch, number };
        let (certainly, perhaps) = (Some(Lost::Certainly), Some(Lost::Perhaps));
        for (offset, is_read, is_last, next, wanted) in [
            (9, true, false, segment(1, 4), None),
            (9, true, false, segment(1, 5), certainly),
            (9, false, false, segment(1, 4), perhaps),
            (0, false, false, segment(1, 4), certainly),
            (9, true, true, segment(2, 1), None),
            (9, true, false, segment(2, 1), perhaps),
            (9, true, true, segment(2, 2), certainly),
        ] {
            let found = lost((segment(1, 3), offset), is_read, is_last, next);
            assert_eq!(found, wanted, "{offset} {is_read} {is_last} {next:?}");
        }
    }

    #[test]
    fn a_line_is_one_over_segments_and_never_over_processes_of_two_epochs() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, 1, "stdout P on");
        write(dir.path(), 1, 2, "stderr F aside");
        write(dir.path(), 1, 2, "stdout F e");
        write(dir.path(), 1, 2, "stdout P prompt");
        write(dir.path(), 2, 1, "stdout F two");
        assert_eq!(lines(&mut walk(dir.path())), ["aside", "one", "prompt+", "two"]);
    }

    #[test]
    fn wherever_it_begins_a_line_has_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, 1, "stdout P on");
        write(dir.path(), 1, 2, "stderr F aside");
        let aside = std::fs::metadata(path(dir.path(), 1, 2)).unwrap().len();
        write(dir.path(), 1, 2, "stdout F e");
        let second = Segment { epoch: 1, number: 2 };
        for (place, rest) in [((second, 0), vec!["aside", "one"]), ((second, aside), vec!["one"])] {
            assert_eq!(lines(&mut walk(dir.path()).begin_at(place).unwrap()), rest);
            assert_eq!(lines(&mut walk(dir.path()).resume_at(place).unwrap()), rest);
        }
        // Right behind a part is only who was shown that part.
        let part = std::fs::metadata(path(dir.path(), 1, 1)).unwrap().len();
        let first = Segment { epoch: 1, number: 1 };
        assert_eq!(lines(&mut walk(dir.path()).resume_at((first, part)).unwrap()), ["aside", "e"]);
    }

    #[test]
    fn a_line_without_an_end_is_given_only_to_whom_it_is_new() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, 1, "stdout P prompt");
        write(dir.path(), 1, 1, "stderr F aside");
        let end = (Segment { epoch: 1, number: 1 }, std::fs::metadata(path(dir.path(), 1, 1)).unwrap().len());
        let given = |mut walk: Walk| {
            let mut given = lines(&mut walk);
            walk.give_unfinished(&mut |line, _| given.push(said(line)));
            given
        };
        assert_eq!(given(walk(dir.path())), ["aside", "prompt+"]);
        assert_eq!(given(walk(dir.path()).begin_at(end).unwrap()), Vec::<String>::new());
        assert_eq!(given(walk(dir.path()).resume_at(end).unwrap()), ["prompt+"]);
    }
}
