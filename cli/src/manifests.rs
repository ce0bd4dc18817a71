//! From what was named after `-f` to manifests: files, directories, standard input. All are read and checked before
//! one is sent, so that a mistake in the last file does not leave half a change behind.

use std::collections::BTreeMap;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use nave_proto::manifest::{self, Format};
use nave_proto::pb;

use crate::context::plain;
use crate::failure::Failure;

/// A manifest and the name of the file it came from.
#[derive(Debug)]
pub(crate) struct Named {
    pub(crate) file: String,
    pub(crate) manifest: pb::Manifest,
}

/// Text not yet parsed.
#[derive(Debug, PartialEq, Eq)]
struct Source {
    file: String,
    format: Format,
    text: String,
}

/// Reads and checks everything, or names all that is wrong.
pub(crate) fn load(paths: &[PathBuf]) -> Result<Vec<Named>, Failure> {
    let mut manifests = Vec::new();
    let mut wrong = Vec::new();
    for source in gather(paths, io::stdin())? {
        match manifest::parse(&source.text, source.format, &source.file) {
            Ok(manifest) => manifests.push(Named { file: source.file, manifest }),
            Err(error) => wrong.push(error.to_string()),
        }
    }
    wrong.extend(duplicates(&manifests));
    match wrong.len() {
        0 => Ok(manifests),
        1 => Err(Failure::usage(wrong.remove(0)).next(NOTHING_SENT)),
        number => Err(Failure::usage(format!("{number} mistakes")).details(wrong).next(NOTHING_SENT)),
    }
}

const NOTHING_SENT: &str = "nothing was sent; `nave schema` describes a manifest";

/// A sentence for each name that two files claim.
fn duplicates(manifests: &[Named]) -> Vec<String> {
    let mut seen: BTreeMap<&str, &str> = BTreeMap::new();
    let mut wrong = Vec::new();
    for named in manifests {
        match seen.get(named.manifest.name.as_str()) {
            Some(first) if *first == named.file => {
                wrong.push(format!("{}: given twice", named.file));
            }
            Some(first) => wrong.push(format!(
                "{} and {} both describe a service named {:?}",
                first, named.file, named.manifest.name
            )),
            None => {
                seen.insert(&named.manifest.name, &named.file);
            }
        }
    }
    wrong
}

fn gather(paths: &[PathBuf], mut stdin: impl io::Read) -> Result<Vec<Source>, Failure> {
    let mut sources = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            let text = text_of(&mut stdin).map_err(|error| unreadable("standard input", &error))?;
            let format = guess(&text);
            sources.push(Source { file: "standard input".to_owned(), format, text });
        } else if path.is_dir() {
            for file in files_in(path)? {
                let format = format_of(&file).expect("files_in() returns only files with a known ending");
                sources.push(read(&file, format)?);
            }
        } else {
            let Some(format) = format_of(path) else {
                return Err(Failure::usage(format!(
                    "{}: a manifest ends in .toml, .yaml, .yml or .json",
                    path.display()
                )));
            };
            sources.push(read(path, format)?);
        }
    }
    Ok(sources)
}

/// The manifests right in a directory, by name; hidden files and other endings are passed over.
fn files_in(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let shown = folder.display().to_string();
    let entries = std::fs::read_dir(folder).map_err(|error| unreadable(&shown, &error))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| unreadable(&shown, &error))?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !hidden && path.is_file() && format_of(&path).is_some() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Failure::usage(format!(
            "{shown} has no manifests in it (*.toml, *.yaml, *.yml, *.json)"
        )));
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path, format: Format) -> Result<Source, Failure> {
    let file = path.display().to_string();
    let text = std::fs::File::open(path).and_then(text_of).map_err(|error| unreadable(&file, &error))?;
    Ok(Source { file, format, text })
}

/// Far more than a manifest may have, which the parser then says; but not a whole disk image.
const READ_BYTES_MAX: u64 = 16 << 20;

fn text_of(reader: impl io::Read) -> io::Result<String> {
    let mut bytes = Vec::new();
    reader.take(READ_BYTES_MAX).read_to_end(&mut bytes)?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        // Cut within a character, above.
        Err(error) if error.utf8_error().error_len().is_none() => {
            Ok(String::from_utf8_lossy(error.as_bytes()).into_owned())
        }
        Err(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn unreadable(file: &str, error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::InvalidData => Failure::usage(format!("{file} is not text")),
        _ => Failure::usage(format!("cannot read {file}: {}", plain(error))),
    }
}

fn format_of(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()? {
        "toml" => Some(Format::Toml),
        "yaml" | "yml" => Some(Format::Yaml),
        "json" => Some(Format::Json),
        _ => None,
    }
}

/// Standard input has no ending; the first line that says something gives it away.
fn guess(text: &str) -> Format {
    let first =
        text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#')).unwrap_or("");
    let toml = first.starts_with('[') || first.find('=').is_some_and(|at| !first[..at].contains(':'));
    match first.starts_with('{') {
        true => Format::Json,
        false if toml => Format::Toml,
        false => Format::Yaml,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(sources: &[Source]) -> Vec<&str> {
        sources.iter().map(|source| source.file.rsplit('/').next().unwrap()).collect()
    }

    #[test]
    fn a_directory_gives_its_manifests_in_order() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.toml", "a.yaml", "c.json", "README.md", ".hidden.toml"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        std::fs::create_dir(folder.path().join("deeper.toml")).unwrap();
        let sources = gather(&[folder.path().to_owned()], io::empty()).unwrap();
        assert_eq!(names(&sources), ["a.yaml", "b.toml", "c.json"]);
    }

    #[test]
    fn an_empty_directory_and_an_unknown_ending_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let failure = gather(&[folder.path().to_owned()], io::empty()).unwrap_err();
        assert!(failure.to_string().contains("no manifests"), "{failure}");
        let failure = gather(&["web.conf".into()], io::empty()).unwrap_err();
        assert!(failure.to_string().contains(".toml, .yaml"), "{failure}");
        let failure = gather(&["/nonexistent/web.toml".into()], io::empty()).unwrap_err();
        assert!(failure.to_string().contains("no such file"), "{failure}");
        assert_eq!(failure.exit, crate::failure::Exit::Usage);
    }

    #[test]
    fn standard_input_gives_its_format_away() {
        assert_eq!(guess("# hello\n\nname = \"web\""), Format::Toml);
        assert_eq!(guess("[ports.http]"), Format::Toml);
        assert_eq!(guess("command: [\"a=b\"]"), Format::Yaml);
        assert_eq!(guess("name: web"), Format::Yaml);
        assert_eq!(guess("{\"name\": \"web\"}"), Format::Json);
        let sources = gather(&["-".into()], "name: web".as_bytes()).unwrap();
        assert_eq!(sources[0].file, "standard input");
    }

    #[test]
    fn two_files_with_one_name_are_both_named() {
        let named = |file: &str| Named {
            file: file.to_owned(),
            manifest: pb::Manifest { name: "web".to_owned(), ..Default::default() },
        };
        assert_eq!(
            duplicates(&[named("a.toml"), named("b.toml")]),
            ["a.toml and b.toml both describe a service named \"web\""]
        );
        assert_eq!(duplicates(&[named("a.toml"), named("a.toml")]), ["a.toml: given twice"]);
    }

    #[test]
    fn every_mistake_is_named_before_anything_is_sent() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.toml"), "name = \"a\"\nnonsense = 1\n").unwrap();
        std::fs::write(folder.path().join("b.yaml"), "name: b\nrubbish: 1\n").unwrap();
        let failure = load(&[folder.path().to_owned()]).unwrap_err();
        assert_eq!(failure.exit, crate::failure::Exit::Usage);
        let text = failure.to_string();
        assert!(
            text.contains("2 mistakes") && text.contains("nonsense") && text.contains("rubbish"),
            "{text}"
        );
    }
}
