//! Everything a person sees goes through here: plain lines, notes and hints on stderr, colour only where someone
//! looks. A reader that went away (`nave ps | head -1`) ends the program quietly.

use std::fmt;
use std::io::{self, IsTerminal as _, Write as _};
use std::sync::OnceLock;

use serde::Serialize;

/// What a piece of text says, from which its colour follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Good,
    Warning,
    Bad,
    Dim,
    Bold,
    /// One of a handful of colours, to tell sources apart.
    Source(usize),
}

impl Tone {
    fn sgr(self) -> &'static str {
        const SOURCES: [&str; 6] = ["36", "35", "34", "33", "32", "96"];
        match self {
            Tone::Plain => "0",
            Tone::Good => "32",
            Tone::Warning => "33",
            Tone::Bad => "31",
            Tone::Dim => "2",
            Tone::Bold => "1",
            Tone::Source(number) => SOURCES[number % SOURCES.len()],
        }
    }
}

/// `text` in the colour of its tone when stdout is looked at.
pub(crate) fn paint(tone: Tone, text: &str) -> String {
    paint_if(colour(), tone, text)
}

/// Likewise for text that goes to stderr.
pub(crate) fn paint_stderr(tone: Tone, text: &str) -> String {
    paint_if(colour_stderr(), tone, text)
}

fn paint_if(colour: bool, tone: Tone, text: &str) -> String {
    if colour && tone != Tone::Plain && !text.is_empty() {
        format!("\u{1b}[{}m{text}\u{1b}[0m", tone.sgr())
    } else {
        text.to_owned()
    }
}

fn wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Whether stdout is a terminal that wants colour.
pub(crate) fn colour() -> bool {
    static COLOUR: OnceLock<bool> = OnceLock::new();
    *COLOUR.get_or_init(|| io::stdout().is_terminal() && wanted())
}

pub(crate) fn colour_stderr() -> bool {
    static COLOUR: OnceLock<bool> = OnceLock::new();
    *COLOUR.get_or_init(|| io::stderr().is_terminal() && wanted())
}

/// One line on stdout.
pub(crate) fn line(text: impl fmt::Display) {
    let mut stdout = io::stdout().lock();
    settle(writeln!(stdout, "{text}"));
}

/// Text on stdout as it is.
pub(crate) fn raw(text: &[u8]) {
    settle(io::stdout().lock().write_all(text));
}

/// Shows what has been written; for output that goes on.
pub(crate) fn flush() {
    settle(io::stdout().lock().flush());
}

/// One object or array on stdout, indented.
pub(crate) fn json(value: &impl Serialize) {
    line(serde_json::to_string_pretty(value).expect("plain structs with string keys encode"));
}

/// One object on one line, for streams.
pub(crate) fn json_line(value: &impl Serialize) {
    line(serde_json::to_string(value).expect("plain structs with string keys encode"));
    flush();
}

/// An aside on stderr, so that it never mixes with what a script reads.
pub(crate) fn note(text: impl fmt::Display) {
    aside(format_args!("{} {text}", paint_stderr(Tone::Warning, "note:")));
}

/// The next command, on stderr, and only to a person.
pub(crate) fn hint(text: impl fmt::Display) {
    if io::stderr().is_terminal() {
        aside(format_args!("{}", paint_stderr(Tone::Dim, &format!("next: {text}"))));
    }
}

/// Why a verb failed, on stderr.
pub(crate) fn error(failure: &impl fmt::Display) {
    aside(format_args!("{} {failure}", paint_stderr(Tone::Bad, "error:")));
}

/// A plain line on stderr.
pub(crate) fn aside(text: impl fmt::Display) {
    // Nothing is left to tell a person whose stderr is gone.
    drop(writeln!(io::stderr().lock(), "{text}"));
}

fn settle(result: io::Result<()>) {
    let Err(error) = result else { return };
    if error.kind() == io::ErrorKind::BrokenPipe {
        exit(0);
    }
    aside(format_args!("error: cannot write the answer: {error}"));
    exit(1);
}

#[expect(clippy::exit, reason = "the reader is gone: nothing that follows has a use")]
fn exit(code: i32) -> ! {
    std::process::exit(code)
}
