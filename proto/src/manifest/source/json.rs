//! JSON. serde_json judges the syntax, since its messages are good; a walk over text then known to be valid finds
//! the places, which serde_json does not tell.

use super::{DEPTH_MAX, problem};
use crate::manifest::Problem;
use crate::manifest::tree::{Entry, Lines, Position, Spanned, Value};

pub(super) fn parse(text: &str) -> Result<Spanned, Vec<Problem>> {
    if let Err(error) = serde_json::from_str::<serde_json::Value>(text) {
        let at = Position { line: error.line().max(1), column: error.column().max(1) };
        return Err(vec![problem(at, syntax_message(&error))]);
    }
    Walk { text, at: 0, lines: Lines::new(text) }.value(0).map_err(|problem| vec![problem])
}

/// Without the " at line 1 column 2" that is said already.
fn syntax_message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let end = text.rfind(" at line ").unwrap_or(text.len());
    format!("not JSON: {}", &text[..end])
}

struct Walk<'a> {
    text: &'a str,
    at: usize,
    lines: Lines<'a>,
}

impl Walk<'_> {
    fn value(&mut self, depth: usize) -> Result<Spanned, Problem> {
        let first = self.next_token();
        let at = self.lines.position(self.at);
        if depth > DEPTH_MAX {
            return Err(problem(at, "nested too deeply"));
        }
        let value = match first {
            b'{' => self.table(depth)?,
            b'[' => self.list(depth)?,
            b'"' => Value::Str(self.string()),
            _ => self.literal(),
        };
        Ok(Spanned { at, value })
    }

    fn table(&mut self, depth: usize) -> Result<Value, Problem> {
        let mut entries: Vec<Entry> = Vec::new();
        self.at += 1;
        while self.next_token() != b'}' {
            let key_at = self.lines.position(self.at);
            let key = self.string();
            self.next_token();
            self.at += 1; // the colon
            let value = self.value(depth + 1)?;
            if entries.iter().any(|entry| entry.key == key) {
                return Err(problem(key_at, format!("not JSON: the key {key:?} is there twice")));
            }
            entries.push(Entry { key, key_at, value });
            if self.next_token() == b',' {
                self.at += 1;
            }
        }
        self.at += 1;
        Ok(Value::Table(entries))
    }

    fn list(&mut self, depth: usize) -> Result<Value, Problem> {
        let mut items = Vec::new();
        self.at += 1;
        while self.next_token() != b']' {
            items.push(self.value(depth + 1)?);
            if self.next_token() == b',' {
                self.at += 1;
            }
        }
        self.at += 1;
        Ok(Value::List(items))
    }

    /// The string that begins here, quotes and escapes resolved.
    fn string(&mut self) -> String {
        let bytes = self.text.as_bytes();
        let start = self.at;
        self.at += 1;
        while bytes[self.at] != b'"' {
            self.at += if bytes[self.at] == b'\\' { 2 } else { 1 };
        }
        self.at += 1;
        serde_json::from_str(&self.text[start..self.at]).expect("the text is valid JSON")
    }

    fn literal(&mut self) -> Value {
        let rest = &self.text[self.at..];
        let end = rest.find(|c: char| c.is_ascii_whitespace() || ",]}".contains(c)).unwrap_or(rest.len());
        self.at += end;
        match &rest[..end] {
            "null" => Value::Null,
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            number if number.contains(['.', 'e', 'E']) => match number.parse() {
                Ok(parsed) => Value::Float(parsed),
                Err(_) => Value::Other("number", number.to_owned()),
            },
            number => match number.parse() {
                Ok(parsed) => Value::Int(parsed),
                Err(_) => Value::Other("number", number.to_owned()),
            },
        }
    }

    /// Moves to the next byte that is not white space.
    fn next_token(&mut self) -> u8 {
        let bytes = self.text.as_bytes();
        while bytes[self.at].is_ascii_whitespace() {
            self.at += 1;
        }
        bytes[self.at]
    }
}
