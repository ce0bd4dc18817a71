//! PEM files: certificates that anyone may read, keys that only their owner may.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use tracing::warn;

/// A key or certificate file that cannot be read, written or understood.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system said no.
    #[error("cannot {verb} {}", path.display())]
    Io {
        /// `read` or `write`.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file does not hold what its name promises.
    #[error("{} holds no usable {what}: {why}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// `certificate` or `private key`.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

impl FileError {
    pub(crate) fn malformed(path: &Path, what: &'static str, why: impl ToString) -> Self {
        Self::Malformed { path: path.to_owned(), what, why: why.to_string() }
    }
}

/// Reads every certificate of a PEM file, in its order; at least one.
pub(crate) fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let text = read(path)?;
    let certificates = CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| FileError::malformed(path, "certificate", error))?;
    if certificates.is_empty() {
        return Err(FileError::malformed(path, "certificate", "no PEM block called CERTIFICATE"));
    }
    Ok(certificates)
}

/// Reads a key file's text, warning when others than its owner can read it.
pub(crate) fn read_key(path: &Path) -> Result<String, FileError> {
    let text = read(path)?;
    if let Ok(metadata) = fs::metadata(path) {
        let mode = metadata.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            warn!(path = %path.display(), mode = format!("{mode:o}"), "private key is readable by others, chmod 600 it");
        }
    }
    Ok(text)
}

/// Writes certificates as PEM, mode 0644, replacing the file in one step.
pub(crate) fn write_certificates(
    path: &Path,
    certificates: &[CertificateDer<'static>],
) -> Result<(), FileError> {
    let blocks: Vec<_> = certificates.iter().map(|der| pem::Pem::new("CERTIFICATE", der.to_vec())).collect();
    write(path, &unix_lines(&pem::encode_many(&blocks)), 0o644)
}

/// Writes a key's PEM text, mode 0600 from the first byte on, replacing the file in one step.
pub(crate) fn write_key(path: &Path, pem_text: &str) -> Result<(), FileError> {
    write(path, &unix_lines(pem_text), 0o600)
}

fn unix_lines(text: &str) -> String {
    text.replace("\r\n", "\n")
}

fn read(path: &Path) -> Result<String, FileError> {
    fs::read_to_string(path).map_err(|source| FileError::Io { verb: "read", path: path.to_owned(), source })
}

/// A crash leaves the old file or the new one, never half of one: written beside, synced, renamed.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), FileError> {
    let beside = path.with_extension("new");
    let result = (|| {
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        let directory =
            path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::File::open(directory)?.sync_all()
    })();
    result.map_err(|source| FileError::Io { verb: "write", path: path.to_owned(), source })
}
