//! YAML 1.2, from the parser's events, with the core schema for plain scalars (`no` is text, not false). Aliases are
//! followed within a budget; merge keys and tags of one's own are refused, since nothing in a manifest needs them.

use std::collections::BTreeMap;

use granit_parser::{Event, Parser, ScalarStyle, ScanError, Span};

use super::{DEPTH_MAX, problem};
use crate::manifest::Problem;
use crate::manifest::tree::{Entry, Position, Spanned, Value};

/// Values in all documents together, aliases followed: what 64 KiB of text could need many times over.
const VALUES_MAX: usize = 100_000;

pub(super) fn parse(text: &str) -> Result<Vec<Spanned>, Vec<Problem>> {
    Builder::default().run(Parser::new_from_str(text)).map_err(|problem| vec![problem])
}

#[derive(Default)]
struct Builder {
    documents: Vec<Spanned>,
    open: Vec<Open>,
    anchors: BTreeMap<usize, Spanned>,
    values: usize,
}

/// A list or table that has begun and not ended.
struct Open {
    at: Position,
    anchor: usize,
    content: Content,
}

enum Content {
    List(Vec<Spanned>),
    Table { entries: Vec<Entry>, key: Option<(String, Position)> },
}

impl Builder {
    fn run<'a>(
        mut self,
        events: impl Iterator<Item = Result<(Event<'a>, Span), ScanError>>,
    ) -> Result<Vec<Spanned>, Problem> {
        for event in events {
            let (event, span) = event
                .map_err(|error| problem(position(*error.marker()), format!("not YAML: {}", error.info())))?;
            self.event(event, position(span.start))?;
        }
        if self.documents.is_empty() {
            self.documents.push(Spanned { at: Position { line: 1, column: 1 }, value: Value::Null });
        }
        Ok(self.documents)
    }

    fn event(&mut self, event: Event<'_>, at: Position) -> Result<(), Problem> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let as_text = match tag {
                    None => style != ScalarStyle::Plain,
                    Some(tag) if tag.is_yaml_core_schema() && tag.suffix() == "str" => true,
                    Some(tag) => return Err(problem(at, format!("a manifest has no tags, found {tag}"))),
                };
                let value = if as_text { Value::Str(text.into_owned()) } else { plain(&text) };
                self.finished(Spanned { at, value }, anchor)
            }
            Event::SequenceStart(_, anchor, tag) => {
                refuse_tag(tag.is_some(), at)?;
                self.begin(at, anchor, Content::List(Vec::new()))
            }
            Event::MappingStart(_, anchor, tag) => {
                refuse_tag(tag.is_some(), at)?;
                self.begin(at, anchor, Content::Table { entries: Vec::new(), key: None })
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let open = self.open.pop().expect("the parser ends only what began");
                let value = match open.content {
                    Content::List(items) => Value::List(items),
                    Content::Table { entries, .. } => Value::Table(entries),
                };
                self.finished(Spanned { at: open.at, value }, open.anchor)
            }
            Event::Alias(anchor) => {
                let known = self.anchors.get(&anchor).cloned();
                let value = known.ok_or_else(|| problem(at, "an alias inside of what it stands for"))?;
                self.values = self.values.saturating_add(count(&value.value));
                self.finished(Spanned { at, value: value.value }, 0)
            }
            _ => Ok(()),
        }
    }

    fn begin(&mut self, at: Position, anchor: usize, content: Content) -> Result<(), Problem> {
        if self.open.len() >= DEPTH_MAX {
            return Err(problem(at, "nested too deeply"));
        }
        self.open.push(Open { at, anchor, content });
        Ok(())
    }

    /// A whole value: into the list or table around it, or a document of its own.
    fn finished(&mut self, value: Spanned, anchor: usize) -> Result<(), Problem> {
        self.values = self.values.saturating_add(1);
        if self.values > VALUES_MAX {
            return Err(problem(value.at, "too many values, are aliases nested?"));
        }
        if anchor != 0 {
            self.anchors.insert(anchor, value.clone());
        }
        match self.open.last_mut().map(|open| &mut open.content) {
            None => self.documents.push(value),
            Some(Content::List(items)) => items.push(value),
            Some(Content::Table { entries, key }) => match key.take() {
                Some((name, key_at)) => entries.push(Entry { key: name, key_at, value }),
                None => *key = Some((key_text(&value, entries)?, value.at)),
            },
        }
        Ok(())
    }
}

/// Keys are text; numbers and the like are taken as written, as in JSON.
fn key_text(key: &Spanned, entries: &[Entry]) -> Result<String, Problem> {
    let text = match &key.value {
        Value::Str(text) => text.clone(),
        Value::Bool(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        other => return Err(problem(key.at, format!("a key must be text, not {}", other.describe()))),
    };
    if text == "<<" {
        return Err(problem(key.at, "merge keys (<<) are not YAML 1.2 and not supported; repeat the keys"));
    }
    if entries.iter().any(|entry| entry.key == text) {
        return Err(problem(key.at, format!("not YAML: the key {text:?} is there twice")));
    }
    Ok(text)
}

fn refuse_tag(present: bool, at: Position) -> Result<(), Problem> {
    if present { Err(problem(at, "a manifest has no tags")) } else { Ok(()) }
}

/// YAML 1.2.2, 10.3.2: the core schema.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    let radix = |digits: &str, radix| match i64::from_str_radix(digits, radix) {
        Ok(number) => Value::Int(number),
        Err(_) => Value::Str(text.to_owned()),
    };
    if let Some(digits) = text.strip_prefix("0x") {
        return radix(digits, 16);
    }
    if let Some(digits) = text.strip_prefix("0o") {
        return radix(digits, 8);
    }
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if !unsigned.is_empty() && digits(unsigned) {
        return match text.parse() {
            Ok(number) => Value::Int(number),
            Err(_) => Value::Other("number", text.to_owned()),
        };
    }
    let numeric = unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && unsigned.bytes().all(|byte| byte.is_ascii_digit() || b".eE+-".contains(&byte));
    match text.parse::<f64>() {
        Ok(number) if numeric => Value::Float(number),
        _ => Value::Str(text.to_owned()),
    }
}

fn count(value: &Value) -> usize {
    match value {
        Value::List(items) => 1 + items.iter().map(|item| count(&item.value)).sum::<usize>(),
        Value::Table(entries) => 1 + entries.iter().map(|entry| count(&entry.value.value)).sum::<usize>(),
        Value::Null | Value::Bool(_) | Value::Int(_) | Value::Float(_) | Value::Str(_) | Value::Other(..) => {
            1
        }
    }
}

fn position(marker: granit_parser::Marker) -> Position {
    Position { line: marker.line().max(1), column: marker.col() + 1 }
}
