//! A line per thing that is waited for: kept up to date in place on a terminal, else printed when it changes.

use std::io::{self, IsTerminal as _};
use std::time::Duration;

use tokio::time::Instant;

use crate::out::{self, Tone};

/// What is said of one thing: how far it is, and why not further.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Text {
    tone: Tone,
    how_far: String,
    why: String,
    said: Instant,
}

/// Reasons that last no longer are not worth a line of their own.
const WHY_AT_MOST_EVERY: Duration = Duration::from_secs(2);

/// The lines.
#[derive(Debug)]
pub(crate) struct Progress {
    names: Vec<String>,
    texts: Vec<Option<Text>>,
    width: usize,
    live: bool,
    /// Lines on the screen, below which the cursor stands.
    drawn: usize,
}

impl Progress {
    pub(crate) fn new(names: impl IntoIterator<Item = String>) -> Self {
        let names: Vec<String> = names.into_iter().collect();
        let live = io::stdout().is_terminal() && names.len() < MANY;
        let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
        Self { texts: vec![None; names.len()], names, width, live, drawn: 0 }
    }

    /// What to say of one thing from now on.
    pub(crate) fn set(&mut self, index: usize, tone: Tone, how_far: &str, why: &str) {
        let before = &self.texts[index];
        let now = Instant::now();
        let moved = before.as_ref().is_none_or(|before| before.how_far != how_far);
        let news = before.as_ref().is_none_or(|before| before.why != why);
        if !moved && !news {
            return;
        }
        let soon = before.as_ref().is_some_and(|before| now < before.said + WHY_AT_MOST_EVERY);
        if !self.live && !moved && soon {
            return;
        }
        self.texts[index] = Some(Text { tone, how_far: how_far.to_owned(), why: why.to_owned(), said: now });
        if self.live {
            self.draw();
        } else {
            out::line(self.line(index, usize::MAX));
            out::flush();
        }
    }

    /// The last word on one thing.
    pub(crate) fn finish(&mut self, index: usize, tone: Tone, text: &str) {
        self.set(index, tone, text, "");
    }

    /// Leaves the lines as they stand.
    pub(crate) fn end(self) {
        out::flush();
    }

    fn draw(&mut self) {
        let columns = columns();
        let mut screen = String::new();
        if self.drawn > 0 {
            screen.push_str(&format!("\u{1b}[{}A", self.drawn));
        }
        let shown: Vec<usize> = (0..self.names.len()).filter(|&index| self.texts[index].is_some()).collect();
        for &index in &shown {
            screen.push_str("\r\u{1b}[2K");
            screen.push_str(&self.line(index, columns));
            screen.push('\n');
        }
        self.drawn = shown.len();
        out::raw(screen.as_bytes());
        out::flush();
    }

    fn line(&self, index: usize, columns: usize) -> String {
        let Some(text) = &self.texts[index] else { return String::new() };
        let name = format!("{:width$}", self.names[index], width = self.width);
        let room = columns.saturating_sub(self.width + 3);
        let said = if text.why.is_empty() {
            text.how_far.clone()
        } else {
            format!("{}: {}", text.how_far, text.why)
        };
        format!("{name}  {}", out::paint(text.tone, &cut(&said, room)))
    }
}

/// More lines than a screen has cannot be kept up to date in place.
const MANY: usize = 20;

fn columns() -> usize {
    terminal_size::terminal_size().map_or(80, |(width, _)| usize::from(width.0))
}

/// At most `room` characters, the last one `…` when something is missing.
fn cut(text: &str, room: usize) -> String {
    if text.chars().count() <= room {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(room.saturating_sub(1)).collect();
    short.push('…');
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_never_wraps() {
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("abcd", 3), "ab…");
        assert_eq!(cut("äöüß", 3), "äö…");
    }

    #[test]
    fn names_line_up() {
        let mut progress = Progress::new(["a".to_owned(), "long".to_owned()]);
        for index in 0..2 {
            progress.set(index, Tone::Plain, "0 of 1", ["", "it starts"][index]);
        }
        assert_eq!(progress.line(0, 80), "a     0 of 1");
        assert_eq!(progress.line(1, 80), "long  0 of 1: it starts");
    }
}
