//! Reads what the keeper wrote: the output of all (or one) of a service's instances on this host, merged by time,
//! from any point, and on as it grows. The API streams it; nothing here is ever written.
//!
//! Following polls: ten looks a second at a handful of files cost nothing measurable, and a poll cannot miss an
//! event the way a watch on a directory that is being rotated can.

mod join;
pub(crate) mod limits;
mod line;
mod segments;
mod selection;
pub(crate) mod source;
mod tail;
mod walk;

use std::io;
use std::path::{Path, PathBuf};

use nave_agent_core::Monotonic;
use nave_proto::pb;

use join::JOINED_BYTES_MAX;
use selection::Selection;
use source::{Filled, Source};

/// Lines sent at once; with lines of up to 1 MiB a message stays below 4 MiB, gRPC's usual bound.
const BATCH_LINES: usize = 200;
const BATCH_BYTES: usize = 256 * 1024;
/// Read in one go, found or not: a fraction of a second on a slow disk, so that whoever waits can be told.
const STEP_BYTES: usize = 1024 * 1024;
/// Text that a reader keeps at once, all instances together. When they have more of long lines, those come in smaller
/// pieces. With the 32 readers that the API has, 512 MiB at the very most.
const KEPT_BYTES_MAX: usize = 16 * 1024 * 1024;

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

/// What one look has found.
#[derive(Debug)]
pub(crate) enum Batch {
    Lines(Vec<pb::LogLine>),
    /// Nothing yet; there is more to look at.
    Searching,
    /// There is no more for now.
    End,
}

/// A request that cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogRequestError {
    #[error("{0:?} is not a service name")]
    Service(String),
    #[error(transparent)]
    Instance(#[from] nave_proto::ids::ParseIdError),
}

/// The next line of all sources.
enum Next {
    Line(pb::LogLine),
    Later,
    End,
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

    /// Where what it reads would be; nothing is there when the service has never been here.
    pub(crate) fn service_dir(&self) -> &Path {
        &self.service_dir
    }

    /// The next lines in order of time. Blocks on the disk, for no longer than a step takes.
    pub(crate) fn next_batch(&mut self, now: Monotonic) -> io::Result<Batch> {
        self.find_sources()?;
        let (mut lines, mut bytes, mut budget) = (Vec::new(), 0, STEP_BYTES);
        while lines.len() < BATCH_LINES && bytes < BATCH_BYTES {
            match self.next_line(now, &mut budget)? {
                Next::Line(line) => {
                    bytes += line.text.len();
                    lines.push(line);
                }
                Next::Later if lines.is_empty() => return Ok(Batch::Searching),
                Next::Later => break,
                Next::End => {
                    self.live = true;
                    break;
                }
            }
        }
        Ok(if lines.is_empty() { Batch::End } else { Batch::Lines(lines) })
    }

    /// All that was there has been handed out.
    pub(crate) fn is_live(&self) -> bool {
        self.live
    }

    /// The oldest of the sources' next lines, once each has shown its own.
    fn next_line(&mut self, now: Monotonic, budget: &mut usize) -> io::Result<Next> {
        let mut kept: usize = self.sources.iter().map(Source::bytes).sum();
        let mut oldest: Option<(i64, usize)> = None;
        for (index, source) in self.sources.iter_mut().enumerate() {
            let limit = if kept < KEPT_BYTES_MAX { JOINED_BYTES_MAX } else { 0 };
            kept -= source.bytes();
            let filled = source.fill(budget, limit)?;
            kept += source.bytes();
            match filled {
                Filled::Later => return Ok(Next::Later),
                Filled::End if !source.show_unfinished(self.selection.follow, now) => continue,
                Filled::End | Filled::Line => {}
            }
            let unix_ns = source.front().map_or(i64::MAX, |line| line.unix_ns);
            if oldest.is_none_or(|(other, _)| unix_ns < other) {
                oldest = Some((unix_ns, index));
            }
        }
        let line = oldest.and_then(|(_, index)| self.sources[index].take());
        Ok(line.map_or(Next::End, Next::Line))
    }

    fn find_sources(&mut self) -> io::Result<()> {
        let found = segments::instances(&self.service_dir)?;
        // What is gone is read as far as its files are open, and said to be gone where they are not.
        self.sources.retain(|source| found.contains(&source.instance) || !source.is_through());
        for instance in found {
            let wanted = self.selection.instance.is_none_or(|only| only == instance);
            if !wanted || self.sources.iter().any(|source| source.instance == instance) {
                continue;
            }
            let (dir, host) = (&self.service_dir, &self.host);
            self.sources.push(Source::open(dir, host, instance, &self.selection, self.live)?);
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
pub(crate) mod tests;
