//! One instance's output as what asks for it wants it: from where it says, what it chooses, a step at a time.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nave_agent_core::Monotonic;
use nave_proto::ids::InstanceId;
use nave_proto::pb;

use super::join::{JOINED_BYTES_MAX, Spot};
use super::line::Line;
use super::segments::Folder;
pub(crate) use super::segments::parse_folder;
use super::selection::{Filter, Selection};
use super::tail::{Search, TailSearch};
use super::walk::{Step, Walk};

/// A follower is shown a line without an end when nothing has been added to it for so long, so that a prompt is seen.
const UNFINISHED_SHOWN_AFTER: Duration = Duration::from_secs(1);

/// One instance's output, read forward.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) instance: InstanceId,
    /// Where to begin is still looked for.
    search: Option<TailSearch>,
    walk: Walk,
    ready: Ready,
    /// Since when nothing has been added to a line without an end.
    quiet_since: Option<Monotonic>,
}

/// Lines that were read and not yet taken.
#[derive(Debug)]
struct Ready {
    service: String,
    instance: String,
    host: String,
    lines: VecDeque<pb::LogLine>,
    bytes: usize,
}

/// What there is after a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filled {
    /// A line can be taken.
    Line,
    /// There is no more for now.
    End,
    /// Enough was read for one step, and nothing found so far.
    Later,
}

impl Source {
    /// Begins where `selection` says: after what was read before, else at the last so many lines, at a time, or at the
    /// oldest line kept. `is_new`: its first line is wanted, whatever `selection` says of a tail.
    pub(super) fn open(
        service_dir: &Path,
        host: &str,
        instance: InstanceId,
        selection: &Selection,
        is_new: bool,
    ) -> io::Result<Self> {
        let folder = Folder::new(service_dir, instance);
        let (mut filter, lines) = (selection.filter.clone(), selection.tail_lines);
        let (mut search, is_timed) = (None, filter.since_unix_ns > 0);
        let walk = if let Some(read) = selection.resume.get(&instance) {
            filter.since_unix_ns = 0;
            Walk::new(folder, filter).resume_at(*read)?
        } else if is_new {
            Walk::new(folder, filter).begin_at_first()
        } else if lines > 0 {
            let floor = if is_timed { folder.place_of_time(filter.since_unix_ns)? } else { None };
            search = Some(TailSearch::new(&folder, &filter, lines, floor)?);
            Walk::new(folder, filter)
        } else if is_timed {
            Walk::from_time(folder, filter)?
        } else {
            Walk::new(folder, filter)
        };
        let ready = Ready {
            service: selection.service.clone(),
            instance: instance.to_string(),
            host: host.to_owned(),
            lines: VecDeque::new(),
            bytes: 0,
        };
        Ok(Self { instance, search, walk, ready, quiet_since: None })
    }

    /// Reads on until there are lines, nothing more is written, or `budget` bytes have been read. `limit`: more bytes are
    /// not kept of a line.
    pub(super) fn fill(&mut self, budget: &mut usize, limit: usize) -> io::Result<Filled> {
        while self.ready.lines.is_empty() {
            if *budget == 0 || !self.has_begun(budget)? {
                return Ok(Filled::Later);
            }
            let Self { walk, ready, .. } = self;
            match walk.step(limit, &mut |line, spot| ready.put(line, spot))? {
                Step::Read(bytes) => {
                    *budget = budget.saturating_sub(bytes);
                    self.quiet_since = None;
                }
                Step::End => return Ok(Filled::End),
            }
        }
        Ok(Filled::Line)
    }

    /// At the end for now: whether a line without an end can be taken all the same. A follower waits a while for its end.
    pub(super) fn show_unfinished(&mut self, follow: bool, now: Monotonic) -> bool {
        let since = *self.quiet_since.get_or_insert(now);
        if follow && now.since(since) < UNFINISHED_SHOWN_AFTER {
            return false;
        }
        let Self { walk, ready, .. } = self;
        walk.give_unfinished(&mut |line, spot| ready.put(line, spot));
        !self.ready.lines.is_empty()
    }

    pub(super) fn front(&self) -> Option<&pb::LogLine> {
        self.ready.lines.front()
    }

    pub(super) fn take(&mut self) -> Option<pb::LogLine> {
        let line = self.ready.lines.pop_front()?;
        self.ready.bytes -= line.text.len();
        Some(line)
    }

    /// Bytes of text that are kept here.
    pub(super) fn bytes(&self) -> usize {
        self.ready.bytes + self.walk.bytes()
    }

    /// All that there was has been taken.
    pub(super) fn is_through(&self) -> bool {
        self.search.is_none()
            && self.ready.lines.is_empty()
            && self.walk.is_through()
            && !self.walk.has_unfinished()
    }

    /// Whether it is known where to begin.
    fn has_begun(&mut self, budget: &mut usize) -> io::Result<bool> {
        let Some(search) = &mut self.search else { return Ok(true) };
        let Search::Over(first) = search.step(budget)? else { return Ok(false) };
        self.walk = search.walk(first)?;
        self.search = None;
        Ok(true)
    }
}

impl Ready {
    fn put(&mut self, line: &Line<'_>, spot: Spot) {
        let (segment, end_offset) = spot.after;
        let line = line.to_log_line(&self.service, &self.instance, &self.host);
        self.bytes += line.text.len();
        self.lines.push_back(pb::LogLine {
            epoch: segment.epoch,
            segment: segment.number,
            end_offset,
            ..line
        });
    }
}

/// What an instance has written since a time, line by line, for who looks again and again.
#[derive(Debug)]
pub(crate) struct LinesSince {
    service_dir: PathBuf,
    instance: InstanceId,
    since_unix_ns: i64,
    walk: Option<Walk>,
    /// A line was found; it stays found.
    found: bool,
}

impl LinesSince {
    pub(crate) fn new(service_dir: &Path, instance: InstanceId, since_unix_ns: i64) -> Self {
        Self { service_dir: service_dir.to_owned(), instance, since_unix_ns, walk: None, found: false }
    }

    /// Whether a line of all so far fits, or the beginning of one that has no end yet. Each line is looked at once.
    /// Blocks.
    pub(crate) fn any(&mut self, fits: impl Fn(&str) -> bool) -> io::Result<bool> {
        if self.found {
            return Ok(true);
        }
        let mut walk = match self.walk.take() {
            Some(walk) => walk,
            None => {
                let folder = Folder::new(&self.service_dir, self.instance);
                Walk::from_time(folder, Filter::since(self.since_unix_ns))?
            }
        };
        let fits = |text: &[u8]| fits(&String::from_utf8_lossy(text));
        let mut found = false;
        loop {
            // What is said of lines that are missing is no word of the process.
            let step = walk.step(JOINED_BYTES_MAX, &mut |line, _| {
                found |= !line.dropped && fits(line.text);
            })?;
            if found || step == Step::End {
                break;
            }
        }
        self.found = found || walk.unfinished().any(fits);
        self.walk = Some(walk);
        Ok(self.found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_says_it_is_found_also_in_parts_and_without_an_end() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("i-1-1")).unwrap();
        let path = dir.path().join("i-1-1/0000000001.log");
        let since = |second: i64| LinesSince::new(dir.path(), InstanceId(1), second * 1_000_000_000);
        let says = |lines: &mut LinesSince, text: &str| lines.any(|line| line.contains(text)).unwrap();
        let mut text =
            "1970-01-01T00:00:01Z stdout P it is re\n1970-01-01T00:00:02Z stdout P ad\n".to_owned();
        std::fs::write(&path, &text).unwrap();
        let mut lines = since(1);
        assert!(!says(&mut lines, "ready"));
        assert!(says(&mut since(1), "it is read"));
        // The beginning was another process's.
        assert!(!says(&mut since(2), "read"));
        text += "1970-01-01T00:00:02Z stdout D 1 lines dropped\n1970-01-01T00:00:03Z stdout F y\n";
        std::fs::write(&path, &text).unwrap();
        assert!(!says(&mut lines, "ready") && !says(&mut lines, "dropped"));
        assert!(says(&mut since(1), "it is read") && says(&mut since(1), "y"));
    }
}
