//! `nave.pid` in the data directory: the pid of the running member, for people, scripts and tests. It is not the
//! lock (that is `storage`'s), so one left behind by a kill misleads nobody who asks the kernel.

use std::path::{Path, PathBuf};

use super::RunError;

/// Removes the file when the member ends in order.
#[derive(Debug)]
pub(super) struct PidFile(PathBuf);

/// Writes the pid under another name first, so that a reader never sees half of it.
pub(super) fn write(data_dir: &Path) -> Result<PidFile, RunError> {
    let path = data_dir.join("nave.pid");
    let draft = data_dir.join("nave.pid.new");
    let write = std::fs::write(&draft, format!("{}\n", std::process::id()));
    write
        .and_then(|()| std::fs::rename(&draft, &path))
        .map_err(|source| RunError::Write { path: path.clone(), source })?;
    Ok(PidFile(path))
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // One that stays behind does no harm.
        std::fs::remove_file(&self.0).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_lives_as_long_as_the_member() {
        let folder = tempfile::tempdir().unwrap();
        let file = write(folder.path()).unwrap();
        let text = std::fs::read_to_string(folder.path().join("nave.pid")).unwrap();
        assert_eq!(text.trim().parse(), Ok(std::process::id()));
        drop(file);
        assert!(!folder.path().join("nave.pid").exists());
    }
}
