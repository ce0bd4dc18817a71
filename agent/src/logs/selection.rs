//! Which lines a request asks for, and where it goes on when it was broken off.

use std::collections::BTreeMap;

use memchr::memmem::Finder;
use nave_proto::ids::{InstanceId, ParseIdError};
use nave_proto::pb;

use super::line::Line;
use super::segments::{Place, Segment};

/// What to read.
#[derive(Debug, Clone, Default)]
pub(super) struct Selection {
    pub(super) service: String,
    pub(super) instance: Option<InstanceId>,
    pub(super) tail_lines: u64,
    /// What is written later is wanted too.
    pub(super) follow: bool,
    pub(super) filter: Filter,
    /// Of these instances all before the place has been read.
    pub(super) resume: BTreeMap<InstanceId, Place>,
}

/// Which lines of a file are shown.
#[derive(Debug, Clone, Default)]
pub(super) struct Filter {
    pub(super) since_unix_ns: i64,
    until_unix_ns: Option<i64>,
    contains: Option<Finder<'static>>,
    /// Only one of the two streams.
    pub(super) stderr: Option<bool>,
}

impl Selection {
    pub(super) fn of(request: &pb::ReadHostLogsRequest) -> Result<Self, ParseIdError> {
        let instance = match request.instance_id.as_str() {
            "" => None,
            id => Some(id.parse::<InstanceId>()?),
        };
        let filter = Filter {
            since_unix_ns: request.since.as_ref().map_or(0, unix_ns),
            until_unix_ns: request.until.as_ref().map(unix_ns),
            contains: (!request.contains.is_empty()).then(|| Finder::new(&request.contains).into_owned()),
            stderr: match request.stream() {
                pb::OutputStream::Unspecified => None,
                pb::OutputStream::Stdout => Some(false),
                pb::OutputStream::Stderr => Some(true),
            },
        };
        let mut resume = BTreeMap::new();
        for cursor in &request.resume {
            let segment = Segment { epoch: cursor.epoch, number: cursor.segment };
            resume.insert(cursor.instance_id.parse()?, (segment, cursor.offset));
        }
        let (service, tail_lines) = (request.service.clone(), u64::from(request.tail_lines));
        Ok(Self { service, instance, tail_lines, follow: request.follow, filter, resume })
    }
}

impl Filter {
    /// All since then.
    pub(super) fn since(unix_ns: i64) -> Self {
        Self { since_unix_ns: unix_ns, ..Self::default() }
    }

    #[cfg(test)]
    pub(super) fn of_stream(stderr: bool) -> Self {
        Self { stderr: Some(stderr), ..Self::default() }
    }

    #[cfg(test)]
    pub(super) fn containing(text: &str) -> Self {
        Self { contains: Some(Finder::new(text).into_owned()), ..Self::default() }
    }

    /// Whether it may belong to a line that is shown.
    pub(super) fn wants(&self, record: &Line<'_>) -> bool {
        self.stderr.is_none_or(|stderr| stderr == record.stderr) && record.unix_ns >= self.since_unix_ns
    }

    /// Of the lines whose records are [wanted](Self::wants). The note of lines that are missing passes every text: what
    /// it stands for might have had it.
    pub(super) fn admits(&self, line: &Line<'_>) -> bool {
        line.unix_ns >= self.since_unix_ns
            && self.until_unix_ns.is_none_or(|until| line.unix_ns <= until)
            && (line.dropped || self.contains.as_ref().is_none_or(|text| text.find(line.text).is_some()))
    }

    /// Whether some lines are left out for what they say, or because they are too new: then a tail cannot be counted from
    /// the end.
    pub(super) fn chooses(&self) -> bool {
        self.until_unix_ns.is_some() || self.contains.is_some()
    }
}

fn unix_ns(time: &prost_types::Timestamp) -> i64 {
    time.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(time.nanos))
}
