//! TOML, through the `toml` crate, whose document keeps byte spans.

use toml::de::{DeInteger, DeTable, DeValue};

use super::problem;
use crate::manifest::Problem;
use crate::manifest::tree::{Entry, Lines, Position, Spanned, Value};

pub(super) fn parse(text: &str) -> Result<Spanned, Vec<Problem>> {
    let lines = Lines::new(text);
    let (document, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        let at = |span: Option<std::ops::Range<usize>>| lines.position(span.map_or(0, |span| span.start));
        return Err(errors
            .iter()
            .map(|error| problem(at(error.span()), one_line(error.message())))
            .collect());
    }
    Ok(Spanned { at: Position { line: 1, column: 1 }, value: table(document.into_inner(), &lines) })
}

/// The crate's messages go over lines: "invalid string", "expected …".
fn one_line(message: &str) -> String {
    let text = message.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    format!("not TOML: {text}")
}

fn table(table: DeTable<'_>, lines: &Lines<'_>) -> Value {
    let mut entries: Vec<Entry> = table
        .into_iter()
        .map(|(key, spanned)| {
            let key_at = lines.position(key.span().start);
            let at = lines.position(spanned.span().start);
            Entry {
                key: key.into_inner().into_owned(),
                key_at,
                value: Spanned { at, value: value(spanned.into_inner(), lines) },
            }
        })
        .collect();
    entries.sort_by_key(|entry| entry.key_at);
    Value::Table(entries)
}

fn value(given: DeValue<'_>, lines: &Lines<'_>) -> Value {
    match given {
        DeValue::String(text) => Value::Str(text.into_owned()),
        DeValue::Integer(number) => integer(&number),
        DeValue::Float(number) => match number.as_str().parse() {
            Ok(parsed) => Value::Float(parsed),
            Err(_) => Value::Other("number", number.as_str().to_owned()),
        },
        DeValue::Boolean(value) => Value::Bool(value),
        DeValue::Datetime(time) => Value::Other("time", time.to_string()),
        DeValue::Array(items) => Value::List(
            items
                .into_iter()
                .map(|item| Spanned {
                    at: lines.position(item.span().start),
                    value: value(item.into_inner(), lines),
                })
                .collect(),
        ),
        DeValue::Table(entries) => table(entries, lines),
    }
}

fn integer(number: &DeInteger<'_>) -> Value {
    match i64::from_str_radix(number.as_str(), number.radix()) {
        Ok(parsed) => Value::Int(parsed),
        Err(_) => Value::Other("number", number.to_string()),
    }
}
