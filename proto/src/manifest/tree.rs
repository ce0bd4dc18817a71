//! Values that know where they were written: what all three formats are turned into.

use std::fmt;

/// A place in a text, both from 1; the column counts characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Position {
    pub(super) line: usize,
    pub(super) column: usize,
}

/// A value and the place where it begins.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Spanned {
    pub(super) at: Position,
    pub(super) value: Value,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(String),
    List(Vec<Spanned>),
    Table(Vec<Entry>),
    /// What no manifest has: a date, a number beyond 64 bits. As written, with its kind.
    Other(&'static str, String),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) key_at: Position,
    pub(super) value: Spanned,
}

impl Value {
    /// What it is, for "must be …, not …".
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Null => "empty".to_owned(),
            Self::Bool(value) => format!("{value}"),
            Self::Int(value) => format!("the number {value}"),
            Self::Float(value) => format!("the number {value}"),
            Self::Str(value) => format!("the text {:?}", shorten(value)),
            Self::List(_) => "a list".to_owned(),
            Self::Table(_) => "a table".to_owned(),
            Self::Other(kind, text) => format!("the {kind} {}", shorten(text)),
        }
    }
}

/// Long values are cut in messages.
pub(super) fn shorten(text: &str) -> String {
    const CHARACTERS_MAX: usize = 60;
    match text.char_indices().nth(CHARACTERS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

impl Spanned {
    /// The place of a path: of the value, or of the key when the value is a table; when it is not there, of the
    /// closest part around it that is.
    pub(super) fn find(&self, path: &Path) -> Position {
        let mut found = self.at;
        let mut value = self;
        for segment in &path.0 {
            match (segment, &value.value) {
                (Segment::Key(key), Value::Table(entries)) => {
                    let Some(entry) = entries.iter().find(|entry| entry.key == *key) else { return found };
                    value = &entry.value;
                    found = if matches!(value.value, Value::Table(_)) { entry.key_at } else { value.at };
                }
                (Segment::Index(index), Value::List(items)) => {
                    let Some(item) = items.get(*index) else { return found };
                    value = item;
                    found = item.at;
                }
                _ => return found,
            }
        }
        found
    }
}

/// The way to a value: `ports.http.port`, `needs[1]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Path(pub(super) Vec<Segment>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Segment {
    Key(String),
    Index(usize),
}

impl Path {
    pub(super) fn key(&self, key: &str) -> Self {
        self.with(Segment::Key(key.to_owned()))
    }

    pub(super) fn index(&self, index: usize) -> Self {
        self.with(Segment::Index(index))
    }

    fn with(&self, segment: Segment) -> Self {
        let mut segments = self.0.clone();
        segments.push(segment);
        Self(segments)
    }

    /// Whether one of the two lies within the other.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        let shared = self.0.len().min(other.0.len());
        self.0[..shared] == other.0[..shared]
    }
}

/// Keys that need it are quoted, as TOML does.
impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Index(index) => write!(f, "[{index}]")?,
                Segment::Key(key) => {
                    let dot = if position > 0 { "." } else { "" };
                    let bare = !key.is_empty()
                        && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
                    if bare { write!(f, "{dot}{key}")? } else { write!(f, "{dot}{:?}", shorten(key))? }
                }
            }
        }
        Ok(())
    }
}

/// Turns byte offsets into lines and columns.
#[derive(Debug)]
pub(super) struct Lines<'a> {
    text: &'a str,
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        let after_newlines =
            text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        Self { text, starts: std::iter::once(0).chain(after_newlines).collect() }
    }

    pub(super) fn position(&self, offset: usize) -> Position {
        let offset = offset.min(self.text.len());
        let line = self.starts.partition_point(|start| *start <= offset);
        let before = self.text.get(self.starts[line - 1]..offset).unwrap_or("");
        Position { line, column: before.chars().count() + 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_count_characters() {
        let lines = Lines::new("é = 1\nb = 2");
        assert_eq!(lines.position(0), Position { line: 1, column: 1 });
        assert_eq!(lines.position(5), Position { line: 1, column: 5 });
        assert_eq!(lines.position(7), Position { line: 2, column: 1 });
        assert_eq!(lines.position(999), Position { line: 2, column: 6 });
    }

    #[test]
    fn paths_are_written_as_in_toml() {
        let path = Path::default().key("env").key("A.B").index(2);
        assert_eq!(path.to_string(), "env.\"A.B\"[2]");
        assert!(path.overlaps(&Path::default().key("env")));
        assert!(!path.overlaps(&Path::default().key("environment")));
    }
}
