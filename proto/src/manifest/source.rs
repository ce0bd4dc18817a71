//! From text to a tree, one module for each format.

mod json;
mod toml;
mod yaml;

use super::tree::{Position, Spanned};
use super::{Format, Problem};

/// Deepest nesting that is read; a manifest has three levels.
const DEPTH_MAX: usize = 32;

/// The documents of a text: several at most in YAML, never none.
pub(super) fn parse(text: &str, format: Format) -> Result<Vec<Spanned>, Vec<Problem>> {
    // Editors on other systems put a byte order mark in front.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    match format {
        Format::Toml => toml::parse(text).map(|document| vec![document]),
        Format::Json => json::parse(text).map(|document| vec![document]),
        Format::Yaml => yaml::parse(text),
    }
}

fn problem(at: Position, message: impl Into<String>) -> Problem {
    Problem { line: at.line, column: at.column, path: String::new(), message: message.into() }
}
