//! The manifest: what a person writes to say how one service is run. One definition reads TOML, YAML and JSON.
//!
//! The road: text -> a tree of values that know their line and column (`toml`, `yaml`, `json` in `source`) -> the
//! message, by one definition (`definition`) with defaults filled in -> the rules that hold for any manifest, from a
//! file or over the wire (`rules`). Both last steps collect every mistake instead of stopping at the first, and each
//! names the place in the text. A general serde derive was turned down for the first step: it stops at the first
//! mistake and, but for TOML, does not know where.
//!
//! The command line parses before it sends; the hub runs [`fill_defaults`] and [`validate`] on what it receives.

mod changes;
mod defaults;
mod definition;
mod document;
mod reader;
mod rules;
pub mod schedule;
mod source;
#[cfg(test)]
mod tests;
mod tree;
mod values;

use std::fmt;
use std::path::Path;

use crate::pb;

pub use changes::{diff, same_limits, same_template};
pub use defaults::fill_defaults;
pub use document::{json_schema, to_json, to_toml};
pub use rules::{COUNT_MAX, Violation, validate};
pub use values::{format_cpu, format_size, parse_size};

use reader::Problems;
use tree::{Path as KeyPath, Position, Spanned, Value};

/// Largest manifest, as text and as a message.
pub const MANIFEST_BYTES_MAX: usize = 64 * 1024;

/// How a manifest is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// The native one.
    Toml,
    /// YAML 1.2; a stream may hold several manifests.
    Yaml,
    /// JSON.
    Json,
}

impl Format {
    /// By the file's extension: `toml`, `yaml`, `yml`, `json`.
    pub fn of_path(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "toml" => Some(Self::Toml),
            "yaml" | "yml" => Some(Self::Yaml),
            "json" => Some(Self::Json),
            _ => None,
        }
    }

    /// By its first character, for text without a name: `{` begins JSON; `---` and `name:` are YAML.
    pub fn guess(text: &str) -> Self {
        let first =
            text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#')).unwrap_or("");
        let key_end = first.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(first.len());
        if first.starts_with('{') {
            Self::Json
        } else if first.starts_with("---") || first.starts_with('%') || first[key_end..].starts_with(':') {
            Self::Yaml
        } else {
            Self::Toml
        }
    }
}

/// One mistake in a manifest's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    /// The key it is about, for instance `ports.http.port`; empty for the text as a whole.
    pub path: String,
    /// What is wrong, and what to write instead.
    pub message: String,
}

/// Everything that is wrong with a manifest's text. `Display` is a line each: `web.toml:3:1: comand: unknown key; …`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestError {
    /// Name of the file, as given.
    pub file: String,
    /// In the order of the text; at least one.
    pub problems: Vec<Problem>,
}

impl std::error::Error for ManifestError {}

impl fmt::Display for ManifestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            let Problem { line, column, path, message } = problem;
            let (newline, colon) =
                (if index > 0 { "\n" } else { "" }, if path.is_empty() { "" } else { ": " });
            write!(f, "{newline}{}:{line}:{column}: {path}{colon}{message}", self.file)?;
        }
        Ok(())
    }
}

/// Reads one manifest, fills in the defaults and checks it. `file` is used in messages only.
pub fn parse(text: &str, format: Format, file: &str) -> Result<pb::Manifest, ManifestError> {
    let mut manifests = parse_all(text, format, file)?;
    match manifests.len() {
        1 => Ok(manifests.remove(0)),
        number => Err(ManifestError {
            file: file.to_owned(),
            problems: vec![Problem {
                line: 1,
                column: 1,
                path: String::new(),
                message: format!("one manifest is expected here, the file has {number}"),
            }],
        }),
    }
}

/// Like [`parse`], for a YAML stream of several manifests, separated by `---`. TOML and JSON always hold one.
pub fn parse_all(text: &str, format: Format, file: &str) -> Result<Vec<pb::Manifest>, ManifestError> {
    let failed = |mut problems: Vec<Problem>| {
        problems.sort_by_key(|problem| (problem.line, problem.column));
        ManifestError { file: file.to_owned(), problems }
    };
    if text.len() > MANIFEST_BYTES_MAX {
        let message =
            format!("a manifest has at most {MANIFEST_BYTES_MAX} bytes, this one has {}", text.len());
        return Err(failed(vec![Problem { line: 1, column: 1, path: String::new(), message }]));
    }
    let mut documents = source::parse(text, format).map_err(failed)?;
    if documents.len() > 1 {
        // A stream that ends in `---` has an empty document behind it.
        documents.retain(|document| document.value != Value::Null);
    }
    let mut manifests = Vec::new();
    let mut problems = Vec::new();
    for document in &documents {
        match read(document) {
            Ok(manifest) => manifests.push(manifest),
            Err(found) => problems.extend(found),
        }
    }
    if problems.is_empty() { Ok(manifests) } else { Err(failed(problems)) }
}

/// One tree: shapes and formats first, then the rules, where a key that is already known to be wrong is not
/// complained of twice.
fn read(document: &Spanned) -> Result<pb::Manifest, Vec<Problem>> {
    let mut problems = Problems::default();
    let mut manifest = definition::manifest(document, &mut problems);
    fill_defaults(&mut manifest);
    for (path, message) in rules::check(&manifest) {
        if !problems.covers(&path) {
            problems.add(place(document, &path), path, message);
        }
    }
    let problems = problems.into_list();
    if problems.is_empty() { Ok(manifest) } else { Err(problems) }
}

/// Where a path is in the text, or the closest table around it that is.
fn place(document: &Spanned, path: &KeyPath) -> Position {
    document.find(path)
}
