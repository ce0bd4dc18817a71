//! Reading a tree key by key while collecting every mistake with its place.

use std::time::Duration;

use super::Problem;
use super::tree::{Entry, Path, Position, Spanned, Value};
use crate::time;

/// Mistakes so far, and the parts of the manifest that are known to be wrong because of them.
#[derive(Debug, Default)]
pub(super) struct Problems {
    found: Vec<(Position, Path, String)>,
    also_covered: Vec<Path>,
}

impl Problems {
    pub(super) fn add(&mut self, at: Position, path: Path, message: impl Into<String>) {
        self.found.push((at, path, message.into()));
    }

    /// What is missing at `path` is explained by a mistake already found, such as a misspelt key.
    pub(super) fn cover(&mut self, path: Path) {
        self.also_covered.push(path);
    }

    /// Whether a mistake already found explains trouble at `path`.
    pub(super) fn covers(&self, path: &Path) -> bool {
        self.found
            .iter()
            .map(|(_, wrong, _)| wrong)
            .chain(&self.also_covered)
            .any(|wrong| wrong.overlaps(path))
    }

    pub(super) fn into_list(self) -> Vec<Problem> {
        self.found
            .into_iter()
            .map(|(at, path, message)| Problem {
                line: at.line,
                column: at.column,
                path: path.to_string(),
                message,
            })
            .collect()
    }
}

/// A table being read.
#[derive(Debug)]
pub(super) struct Table<'t> {
    pub(super) path: Path,
    pub(super) at: Position,
    entries: &'t [Entry],
}

impl<'t> Table<'t> {
    /// `None`, and a problem, when the value is no table.
    pub(super) fn open(
        value: &'t Spanned,
        path: Path,
        example: &str,
        problems: &mut Problems,
    ) -> Option<Self> {
        match &value.value {
            Value::Table(entries) => Some(Self { path, at: value.at, entries }),
            other => {
                let what = if path.0.is_empty() { "a manifest" } else { "it" };
                problems.add(
                    value.at,
                    path,
                    format!("{what} must be a table, {example}, not {}", other.describe()),
                );
                None
            }
        }
    }

    pub(super) fn field(&self, key: &str) -> Option<Field<'t>> {
        self.fields().find(|field| field.key == key)
    }

    pub(super) fn fields(&self) -> impl Iterator<Item = Field<'t>> + use<'t> {
        let path = self.path.clone();
        self.entries.iter().map(move |entry| Field {
            key: &entry.key,
            key_at: entry.key_at,
            path: path.key(&entry.key),
            value: &entry.value,
        })
    }
}

/// One key and its value.
#[derive(Debug, Clone)]
pub(super) struct Field<'t> {
    pub(super) key: &'t str,
    pub(super) key_at: Position,
    pub(super) path: Path,
    pub(super) value: &'t Spanned,
}

impl<'t> Field<'t> {
    pub(super) fn refuse(&self, problems: &mut Problems, message: impl Into<String>) {
        problems.add(self.value.at, self.path.clone(), message);
    }

    fn must_be<T>(&self, problems: &mut Problems, what: &str) -> Option<T> {
        self.refuse(problems, format!("must be {what}, not {}", self.value.value.describe()));
        None
    }

    pub(super) fn text(&self, problems: &mut Problems) -> Option<&'t str> {
        match &self.value.value {
            Value::Str(text) => Some(text),
            _ => self.must_be(problems, "text in quotes"),
        }
    }

    pub(super) fn flag(&self, problems: &mut Problems) -> Option<bool> {
        match self.value.value {
            Value::Bool(value) => Some(value),
            _ => self.must_be(problems, "true or false"),
        }
    }

    /// `true`, for keys that choose something by being there.
    pub(super) fn chosen(&self, problems: &mut Problems) -> Option<bool> {
        match self.flag(problems)? {
            true => Some(true),
            false => {
                self.refuse(problems, "false says nothing here; leave the key out");
                None
            }
        }
    }

    /// A whole number of 32 bits; the rules know the tighter bounds.
    pub(super) fn whole(&self, problems: &mut Problems) -> Option<u32> {
        match self.value.value {
            Value::Int(number) => match u32::try_from(number) {
                Ok(number) => Some(number),
                Err(_) if number < 0 => self.must_be(problems, "0 or more"),
                Err(_) => self.must_be(problems, "less than 4294967296"),
            },
            _ => self.must_be(problems, "a whole number"),
        }
    }

    /// A whole number that may be below zero; the rules know the tighter bounds.
    pub(super) fn signed(&self, problems: &mut Problems) -> Option<i32> {
        match self.value.value {
            Value::Int(number) => match i32::try_from(number) {
                Ok(number) => Some(number),
                Err(_) => self.must_be(problems, "of less than ten digits"),
            },
            _ => self.must_be(problems, "a whole number"),
        }
    }

    /// A list of whole numbers; what is none is reported and left out.
    pub(super) fn wholes(&self, problems: &mut Problems, example: &str) -> Vec<u32> {
        let Value::List(items) = &self.value.value else {
            self.must_be::<()>(problems, &format!("a list of whole numbers, {example}"));
            return Vec::new();
        };
        let mut numbers = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            match item.value {
                Value::Int(number) if u32::try_from(number).is_ok() => {
                    numbers.push(u32::try_from(number).expect("the guard has looked"));
                }
                _ => {
                    let message = format!("must be a whole number, not {}", item.value.describe());
                    problems.add(item.at, self.path.index(index), message);
                }
            }
        }
        numbers
    }

    /// Any number, as a float.
    pub(super) fn number(&self, problems: &mut Problems, what: &str) -> Option<f64> {
        match self.value.value {
            #[expect(
                clippy::cast_precision_loss,
                reason = "core counts are small; what is not is refused later"
            )]
            Value::Int(number) => Some(number as f64),
            Value::Float(number) => Some(number),
            _ => self.must_be(problems, what),
        }
    }

    /// Text that `parse` understands.
    pub(super) fn parsed<T, E: ToString>(
        &self,
        problems: &mut Problems,
        what: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let Value::Str(text) = &self.value.value else { return self.must_be(problems, what) };
        match parse(text) {
            Ok(parsed) => Some(parsed),
            Err(error) => {
                self.refuse(problems, error.to_string());
                None
            }
        }
    }

    pub(super) fn duration(&self, problems: &mut Problems) -> Option<Duration> {
        self.parsed(problems, "a duration in quotes, such as \"10s\"", time::parse_duration)
    }

    /// One of a few words.
    pub(super) fn word<T>(
        &self,
        problems: &mut Problems,
        words: &[&str],
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let text = self.text(problems)?;
        let known = words.contains(&text).then(|| parse(text)).flatten();
        if known.is_none() {
            let meant = super::definition::nearest(text, words.iter().copied());
            let hint = meant.map_or(String::new(), |word| format!("; did you mean {word:?}?"));
            self.refuse(problems, format!("must be one of {}, not {text:?}{hint}", words.join(", ")));
        }
        known
    }

    pub(super) fn table(&self, example: &str, problems: &mut Problems) -> Option<Table<'t>> {
        Table::open(self.value, self.path.clone(), example, problems)
    }

    /// A list of tables; what is none is reported and left out.
    pub(super) fn tables(&self, problems: &mut Problems, example: &str) -> Vec<Table<'t>> {
        let Value::List(items) = &self.value.value else {
            self.must_be::<()>(problems, &format!("a list of tables, {example}"));
            return Vec::new();
        };
        let open = |(index, item)| Table::open(item, self.path.index(index), example, problems);
        items.iter().enumerate().filter_map(open).collect()
    }

    /// A list of texts; what is not text is reported and left out.
    pub(super) fn texts(&self, problems: &mut Problems, example: &str) -> Vec<String> {
        let Value::List(items) = &self.value.value else {
            self.must_be::<()>(problems, &format!("a list of texts, {example}"));
            return Vec::new();
        };
        let mut texts = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            match &item.value {
                Value::Str(text) => texts.push(text.clone()),
                other => {
                    let message = format!("must be text in quotes, not {}", other.describe());
                    problems.add(item.at, self.path.index(index), message);
                }
            }
        }
        texts
    }
}
