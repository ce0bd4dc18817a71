//! `nave logs`: the hub merges the output of all instances on all hosts; here it gets its prefixes and colours. An answer
//! that may lack lines ends with exit code 1, and never says that there are none.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use nave_proto::ids::InstanceId;
use nave_proto::pb;
use serde::Serialize;
use tonic::Code;

use crate::args::{Logs, Stream};
use crate::client::Hub;
use crate::failure::Failure;
use crate::out::{self, Tone};
use crate::when;

#[derive(Debug, Serialize)]
struct LineRow {
    time: String,
    service: String,
    instance: String,
    host: String,
    stream: &'static str,
    text: String,
    partial: bool,
    epoch: u64,
}

/// Between tries when a followed stream broke.
const PAUSE: Duration = Duration::from_millis(500);

pub(super) async fn run(args: &Logs, hub: &Hub) -> Result<(), Failure> {
    if let Some(id) = &args.instance
        && let Err(error) = id.parse::<InstanceId>()
    {
        return Err(Failure::usage(error.to_string()).next(format!("`nave ps {}` lists them", args.service)));
    }
    let mut printer = Printer::new(args);
    let mut since = args.since;
    let mut tail = args.tail.unwrap_or(0);
    let mut tries = 0;
    if args.tail == Some(0) {
        if !args.follow {
            return Ok(());
        }
        since = Some(crate::clock::now());
    }
    loop {
        let request = pb::ReadLogsRequest {
            service: args.service.clone(),
            instance_id: args.instance.clone().unwrap_or_default(),
            follow: args.follow,
            tail_lines: tail,
            since: since.map(to_proto),
            until: args.until.map(to_proto),
            contains: args.grep.clone().unwrap_or_default(),
            resume: printer.cursors(),
            access: args.access,
            stream: wanted_stream(args.stream).into(),
        };
        let trouble = match hub
            .read_status(|mut member| {
                let request = request.clone();
                async move { member.services.read_logs(request).await }
            })
            .await?
        {
            Ok(mut stream) => loop {
                match stream.message().await {
                    Ok(Some(response)) => {
                        tries = 0;
                        printer.print(&response);
                    }
                    Ok(None) => return printer.end(),
                    Err(status) => break status,
                }
            },
            Err(status) => status,
        };
        if trouble.code() == Code::NotFound && args.instance.is_none() {
            return Err(super::about_service(hub, &args.service, &trouble).await);
        }
        if !args.follow || !crate::client::passes_over(&trouble) {
            if !printer.rows.is_empty() {
                printer.print_rows();
            }
            return Err(Failure::from_status(&trouble));
        }
        if tries == 0 {
            out::note(format_args!("{}; asking another member", crate::client::reason(&trouble)));
        }
        tries += 1;
        hub.pass_over();
        // From the last line seen of each source; what has come to be since is wanted whole.
        if !printer.read.is_empty() {
            tail = 0;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

struct Printer<'a> {
    args: &'a Logs,
    /// A colour for each instance, in the order in which they spoke.
    sources: BTreeMap<String, usize>,
    width: usize,
    /// What has been read of each instance on each host, so that a stream that broke goes on behind it.
    read: BTreeMap<(String, String), pb::LogCursor>,
    rows: Vec<LineRow>,
    /// The hub has said that lines may be missing, and why.
    is_warned: bool,
}

impl<'a> Printer<'a> {
    fn new(args: &'a Logs) -> Self {
        let (sources, read) = (BTreeMap::new(), BTreeMap::new());
        Self { args, sources, width: 0, read, rows: Vec::new(), is_warned: false }
    }

    fn print(&mut self, response: &pb::ReadLogsResponse) {
        if !response.warning.is_empty() {
            out::note(&response.warning);
            self.is_warned = true;
        }
        // All prefixes of a batch are as wide as its widest.
        let widths = response.lines.iter().map(|line| self.name(line).chars().count());
        self.width = widths.max().unwrap_or(0).max(self.width);
        for line in &response.lines {
            self.line(line);
        }
        if self.args.follow {
            out::flush();
        }
    }

    fn line(&mut self, line: &pb::LogLine) {
        // Members and agents of older builds send both.
        let wanted = match self.args.stream {
            Stream::All => true,
            Stream::Stdout => !line.stderr,
            Stream::Stderr => line.stderr,
        };
        let cursor = pb::LogCursor {
            host: line.host.clone(),
            instance_id: line.instance_id.clone(),
            epoch: line.epoch,
            segment: line.segment,
            offset: line.end_offset,
        };
        self.read.insert((line.host.clone(), line.instance_id.clone()), cursor);
        if !wanted {
            return;
        }
        if self.args.listing.json() {
            let row = row(line);
            if self.args.follow {
                out::json_line(&row)
            } else {
                self.rows.push(row)
            }
            return;
        }
        let mut bytes = self.prefix(line).into_bytes();
        bytes.extend_from_slice(&line.text);
        bytes.push(b'\n');
        out::raw(&bytes);
    }

    /// `i-4 host | `; nothing when there can only be one source, and red before what went to stderr.
    fn prefix(&mut self, line: &pb::LogLine) -> String {
        let mut prefix = String::new();
        if self.args.timestamps {
            prefix = format!("{} ", out::paint(Tone::Dim, &when::rfc3339(time(line.unix_ns))));
        }
        if self.args.instance.is_some() {
            return prefix;
        }
        let next = self.sources.len();
        let name = self.name(line);
        let source = if self.args.access { &line.host } else { &line.instance_id };
        let number = *self.sources.entry(source.clone()).or_insert(next);
        self.width = self.width.max(name.chars().count());
        let name = format!("{name:width$}", width = self.width);
        let bar = out::paint(if line.stderr { Tone::Bad } else { Tone::Dim }, "|");
        format!("{prefix}{} {bar} ", out::paint(Tone::Source(number), &name))
    }

    /// A call was made on a host and by no instance of the service.
    fn name(&self, line: &pb::LogLine) -> String {
        match self.args.access {
            true => line.host.clone(),
            false => format!("{} {}", line.instance_id, line.host),
        }
    }

    /// Where to go on.
    fn cursors(&self) -> Vec<pb::LogCursor> {
        self.read.values().cloned().collect()
    }

    /// All that was answered has been printed.
    fn end(&self) -> Result<(), Failure> {
        self.print_rows();
        if self.is_warned {
            let said = "this may not be all that there is: the notes above say what could not be read";
            return Err(Failure::refused(said).next("`nave hosts` shows how they are; then ask again"));
        }
        if self.read.is_empty() && !self.args.listing.json() {
            out::aside(self.nothing());
        }
        Ok(())
    }

    /// The array, which is printed as a whole.
    fn print_rows(&self) {
        if self.args.listing.json() && !self.args.follow {
            out::json(&self.rows);
        }
    }

    /// Why not a line was printed.
    fn nothing(&self) -> String {
        let what = match (self.args.access, self.args.stream) {
            (true, _) => "has not been called, where calls are noted,",
            (false, Stream::All) => "has written nothing",
            (false, Stream::Stdout) => "has written nothing to stdout",
            (false, Stream::Stderr) => "has written nothing to stderr",
        };
        let when = match (&self.args.grep, self.args.until, self.args.since) {
            (Some(_), _, _) => "with that text",
            (None, Some(_), _) => "in that time",
            (None, None, Some(_)) => "since then",
            (None, None, None) => "yet",
        };
        format!("{} {what} {when}", self.args.service)
    }
}

fn wanted_stream(stream: Stream) -> pb::OutputStream {
    match stream {
        Stream::All => pb::OutputStream::Unspecified,
        Stream::Stdout => pb::OutputStream::Stdout,
        Stream::Stderr => pb::OutputStream::Stderr,
    }
}

fn to_proto(time: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: time.as_second(), nanos: time.subsec_nanosecond() }
}

fn time(unix_ns: i64) -> Option<Timestamp> {
    Timestamp::from_nanosecond(i128::from(unix_ns)).ok()
}

fn row(line: &pb::LogLine) -> LineRow {
    LineRow {
        time: time(line.unix_ns).map_or_else(String::new, |time| format!("{time:.9}")),
        service: line.service.clone(),
        instance: line.instance_id.clone(),
        host: line.host.clone(),
        stream: if line.stderr { "stderr" } else { "stdout" },
        text: String::from_utf8_lossy(&line.text).into_owned(),
        partial: line.partial,
        epoch: line.epoch,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Exit;

    fn args() -> Logs {
        use clap::Parser as _;
        match crate::args::Cli::parse_from(["nave", "logs", "web"]).verb {
            crate::args::Verb::Logs(args) => args,
            other => panic!("{other:?}"),
        }
    }

    fn line(instance: &str, host: &str, unix_ns: i64) -> pb::LogLine {
        pb::LogLine { instance_id: instance.into(), host: host.into(), unix_ns, ..Default::default() }
    }

    #[test]
    fn prefixes_line_up_and_vanish_for_one_instance() {
        let mut args = args();
        {
            let mut printer = Printer::new(&args);
            assert_eq!(printer.prefix(&line("i-10", "alpha", 0)), "i-10 alpha | ");
            assert_eq!(printer.prefix(&line("i-2", "b", 0)), "i-2 b      | ");
        }
        args.instance = Some("i-2".into());
        assert_eq!(Printer::new(&args).prefix(&line("i-2", "b", 0)), "");
    }

    #[test]
    fn an_answer_that_may_lack_lines_fails_and_only_a_whole_one_says_that_there_are_none() {
        let mut args = args();
        args.grep = Some("needle".into());
        let mut printer = Printer::new(&args);
        assert_eq!(printer.nothing(), "web has written nothing with that text");
        printer.end().unwrap();
        let warning = "host a stopped answering; its output is not complete".to_owned();
        printer.print(&pb::ReadLogsResponse { warning, ..Default::default() });
        let failure = printer.end().unwrap_err();
        assert_eq!(failure.exit, Exit::Refused);
        assert!(!failure.to_string().contains("nothing"), "{failure}");
    }

    #[test]
    fn what_there_is_none_of_is_said_by_what_was_asked() {
        let mut args = args();
        assert_eq!(Printer::new(&args).nothing(), "web has written nothing yet");
        args.stream = Stream::Stderr;
        args.since = Some(Timestamp::UNIX_EPOCH);
        assert_eq!(Printer::new(&args).nothing(), "web has written nothing to stderr since then");
    }

    #[test]
    fn a_stream_that_broke_goes_on_behind_the_last_line_of_each_source() {
        let mut args = args();
        args.stream = Stream::Stdout;
        let mut printer = Printer::new(&args);
        for (instance, host, stderr, end_offset) in [
            ("i-1", "a", false, 10),
            ("i-1", "b", false, 20),
            ("i-1", "a", false, 30),
            ("i-1", "a", true, 40),
        ] {
            let line = pb::LogLine { stderr, end_offset, ..line(instance, host, 7) };
            printer.line(&line);
        }
        let cursors = printer.cursors();
        let offsets: Vec<(&str, u64)> = cursors.iter().map(|at| (at.host.as_str(), at.offset)).collect();
        assert_eq!(offsets, [("a", 40), ("b", 20)], "what is left out has been read too");
    }
}
