//! Files of environment variables, as shells and systemd read them: a `NAME=value` on each line, quotes around a value
//! if wanted, `#` before a comment. Nothing is expanded, and no message ever has a value in it.

use std::collections::BTreeMap;
use std::path::Path;

use super::{ProvisionError, read_host_file};

/// More is no environment: the kernel takes 2 MiB of arguments and variables together.
const BYTES_MAX: u64 = 256 * 1024;

/// The variables of all files; of two with one name the later one.
pub(crate) fn read_all(paths: &[String]) -> Result<BTreeMap<String, String>, ProvisionError> {
    let mut variables = BTreeMap::new();
    for path in paths {
        let bytes = read_host_file("env_file", Path::new(path), BYTES_MAX)?;
        let text = String::from_utf8(bytes)
            .map_err(|_| ProvisionError::new(0, format!("env_file {path}: is not text in UTF-8")))?;
        let read = parse(&text)
            .map_err(|(line, why)| ProvisionError::new(0, format!("env_file {path}:{line}: {why}")))?;
        variables.extend(read);
    }
    Ok(variables)
}

/// The error: number of the line, and what is wrong with it.
fn parse(text: &str) -> Result<BTreeMap<String, String>, (usize, String)> {
    let mut variables = BTreeMap::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let refuse = |why: &str| (index + 1, why.to_owned());
        let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
        let (name, value) = line.split_once('=').ok_or_else(|| refuse("a line is NAME=value"))?;
        let mut characters = name.chars();
        let well_formed = characters.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
            && characters.all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !well_formed {
            return Err(refuse("a variable's name has letters, digits and _, and no digit first"));
        }
        if name.starts_with("NAVE_") || name == "NOTIFY_SOCKET" {
            return Err(refuse(&format!("{name} is set by Nave; choose another name")));
        }
        let value = unquote(value.trim()).ok_or_else(|| refuse("a quote is not closed"))?;
        if value.contains('\0') {
            return Err(refuse("has a NUL byte, which no variable can have"));
        }
        variables.insert(name.to_owned(), value);
    }
    Ok(variables)
}

/// Between single quotes as it is; between double quotes `\"`, `\\`, `\n` and `\t` are what they are in most languages.
fn unquote(value: &str) -> Option<String> {
    if let Some(rest) = value.strip_prefix('\'') {
        return rest.strip_suffix('\'').map(str::to_owned);
    }
    let Some(rest) = value.strip_prefix('"') else { return Some(value.to_owned()) };
    let mut plain = String::new();
    let mut characters = rest.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => return characters.next().is_none().then_some(plain),
            '\\' => match characters.next()? {
                'n' => plain.push('\n'),
                't' => plain.push('\t'),
                other @ ('"' | '\\' | '$') => plain.push(other),
                other => plain.extend(['\\', other]),
            },
            other => plain.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_common_form_of_a_line_is_read() {
        let text = "# comment\n\nA=1\nexport B = no\nB=two words \nC='as $it \"is\"'\nD=\"a\\\"b\\n\\q\"\nE=\nA=last\n";
        assert_eq!(
            parse("export B = no"),
            Err((1, "a variable's name has letters, digits and _, and no digit first".into()))
        );
        let read = parse(&text.replace("export B = no\n", "export F=1\n")).unwrap();
        let pairs: Vec<(&str, &str)> =
            read.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(
            pairs,
            [
                ("A", "last"),
                ("B", "two words"),
                ("C", "as $it \"is\""),
                ("D", "a\"b\n\\q"),
                ("E", ""),
                ("F", "1")
            ]
        );
    }

    #[test]
    fn a_mistake_is_told_by_its_line_and_never_by_its_value() {
        for (text, line) in
            [("A=1\nsecret", 2), ("1A=secret", 1), ("NAVE_X=secret", 1), ("A='secret", 1), ("A=\"secret", 1)]
        {
            let (at, why) = parse(text).unwrap_err();
            assert_eq!(at, line, "{text}");
            assert!(!why.contains("secret"), "{why}");
        }
    }
}
